"""Key files: of a cluster whose nodes share one key, of an authority, and of single nodes."""

import contextlib
import errno
import os
import secrets
import stat
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec
import zmq

from deepstack_jax.disagg.keys.certificates import KEY_BYTES, Authority, Certificate, KeyBytes, NodeKey, NodeRole
from deepstack_jax.errors import naming

MAX_KEY_FILE = 1 << 16  # bytes
_DAY_S = 24 * 3600


@dataclass(frozen=True)
class ClusterKey:
    """The key pair that all nodes of a cluster share, encoded in Z85."""

    public: bytes
    secret: bytes


Key = ClusterKey | NodeKey


class _SharedFile(msgspec.Struct):
    public: str
    secret: str


class _AuthorityFile(msgspec.Struct, forbid_unknown_fields=True):
    authority_secret: KeyBytes


class _NodeFile(msgspec.Struct, forbid_unknown_fields=True):
    certificate: Certificate
    secret: KeyBytes
    authority: KeyBytes


def make_key(path: str | Path) -> None:
    """Writes a new file with a key that all nodes share.

    Only its owner can read it. It appears with its whole content, or not at all.

    Raises:
        OSError: the file exists or can't be written.
    """
    public, secret = zmq.curve_keypair()
    _write(path, _SharedFile(public.decode(), secret.decode()))


def make_authority(path: str | Path) -> None:
    """Writes a new file with the key of an authority, as `make_key` does.

    Raises:
        ValueError: the package that signs is missing.
        OSError: the file exists or can't be written.
    """
    secret = secrets.token_bytes(KEY_BYTES)
    Authority(secret)
    _write(path, _AuthorityFile(secret))


def make_node_key(
    path: str | Path, name: str, authority: str | Path, role: NodeRole = "any", days: int | None = None
) -> Certificate:
    """Writes a new file with the key of one node, as `make_key` does; returns the node's certificate.

    Args:
        name: of the node.
        authority: the file that `make_authority` wrote.
        role: the role that the node may have.
        days: after which the key expires; None for never.

    Raises:
        ValueError: nothing can have this name, or the authority's file is not one or is not protected.
        OSError: the file exists, or one of the two can't be read or written.
    """
    content = _read(authority)
    if (found := _decoded(content, _AuthorityFile)) is None:
        raise ValueError(
            f"{authority} is not an authority's key file: make one with deepstack-jax keygen FILE --authority"
        )
    expires = 0 if days is None else int(time.time()) + days * _DAY_S
    key = Authority(found.authority_secret).make_node_key(name, role, expires)
    _write(path, _NodeFile(key.certificate, key.secret_bytes, key.authority))
    return key.certificate


def read_key(path: str | Path) -> Key:
    """Reads the key of a node from a file that `make_key` or `make_node_key` wrote.

    Raises:
        ValueError: it is not a key file, is a link, or other users own it or can read it.
        OSError: it can't be read.
    """
    content = _read(path)
    if _decoded(content, _AuthorityFile):
        raise ValueError(
            f"{path} has the authority's key, which stays off the nodes: give the node one of its own, made with "
            f"deepstack-jax keygen FILE --node NAME --signed-by {path}"
        )
    if (node := _decoded(content, _NodeFile)) is not None:
        key = NodeKey(node.certificate, node.secret, node.authority)
        if zmq.curve_public(key.secret) != key.public or not key.certifies(key.certificate):
            raise ValueError(f"{path} is damaged: make another key with deepstack-jax keygen FILE --node NAME")
        return key
    shared = _decoded(content, _SharedFile)
    try:
        if shared is None or zmq.curve_public(shared.secret.encode()) != shared.public.encode():
            raise ValueError
    except (ValueError, zmq.ZMQError):
        raise ValueError(f"{path} is not a key file: make one with deepstack-jax keygen {path}") from None
    return ClusterKey(shared.public.encode(), shared.secret.encode())


def users_key() -> Key:
    """The key of this user's nodes on this machine, in ~/.config/deepstack-jax/cluster.key; the first use makes it.

    Raises:
        ValueError, OSError: as `read_key`, or the file can't be made.
    """
    config = Path(os.environ.get("XDG_CONFIG_HOME", ""))
    path = (config if config.is_absolute() else Path.home() / ".config") / "deepstack-jax" / "cluster.key"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with contextlib.suppress(FileExistsError):  # another node was faster
            make_key(path)
    return read_key(path)


def _write(path: str | Path, content: msgspec.Struct) -> None:
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with naming(path), os.fdopen(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(msgspec.json.encode(content) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        os.link(unfinished, path)  # unlike a rename, it never replaces a key
    except FileExistsError:
        raise FileExistsError(f"{path} exists, and a key is never replaced: choose another name") from None
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None  # not the unfinished file's name
    finally:
        unfinished.unlink(missing_ok=True)


def _read(path: str | Path) -> bytes:
    """The content of a file that only this user can read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ValueError(f"key file {path} is a link: give the file that it leads to") from None
        raise
    with naming(path), os.fdopen(descriptor, "rb") as file:  # what is checked is what is read
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError(f"key file {path} is not a regular file: make one with deepstack-jax keygen")
        if found.st_uid != os.geteuid():
            raise ValueError(f"key file {path} belongs to another user: chown {os.geteuid()} {path}")
        if found.st_mode & 0o077:
            raise ValueError(f"key file {path} can be read by others: chmod 600 {path}")
        return file.read(MAX_KEY_FILE)


def _decoded[T](content: bytes, kind: type[T]) -> T | None:
    try:
        return msgspec.json.decode(content, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
