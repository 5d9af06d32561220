"""What shows that a token block arrived as it was sent, and what hides it on its way.

Without a key that is a checksum, which finds damage. With a key it is the tag of AES-256-GCM, which nobody without the
key can make, over the block and over what it was written for: request, attempt, round, token block and pool block. A
block that was recorded or moved therefore never fits. Blocks may also be encrypted.

With a key a seal consists of 16 bytes of salt, 8 of a counter and 16 of the tag. Each sender draws a salt and derives
its own key with it, under which the counter is the nonce, so that no nonce comes twice.
"""

import hmac
import itertools
import secrets
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import msgspec
import numpy as np

from deepstack_jax.disagg.wire.layout import checksum
from deepstack_jax.disagg.wire.rows import copy_in_parts, in_parts

KEY_BYTES = 32
_SALT_BYTES, _COUNTER_BYTES, _TAG_BYTES = 16, 8, 16

Parts = Iterable[tuple[np.ndarray, np.ndarray]]  # contiguous sources, with targets of their shape or the sources again


class Purpose(NamedTuple):
    """What blocks are written for."""

    request_id: str = ""
    attempt: int = 0
    round: int = 0


NO_PURPOSE = Purpose()


class BlockSeal:
    """Seals blocks on an encode node, and opens them on a language node. One thread uses it at a time."""

    def __init__(self, key: bytes = b"", encrypts: bool = False):
        """
        Args:
            key: KEY_BYTES that both sides share, or none for checksums.
            encrypts: whether blocks are encrypted; needs a key.

        Raises:
            ValueError: the key has another length, is missing, or the package that uses it is.
        """
        if len(key) not in (KEY_BYTES,) + (0,) * (not encrypts):
            raise ValueError(f"a block key of {len(key)} bytes: expected {KEY_BYTES}; encryption needs one")
        self.encrypts = encrypts
        self._key = key
        self._salt, self._counter = secrets.token_bytes(_SALT_BYTES), itertools.count()
        self._ciphers: dict[bytes, Any] = {}  # the latest salt, with its key
        if key:
            check_installed()

    @property
    def has_key(self) -> bool:
        return bool(self._key)

    def seal(self, purpose: Purpose, token_block: int, pool_block: int, parts: Parts) -> bytes:
        """Fills targets from sources, and returns the seal of what they have then."""
        if not self._key:
            return checksum(_filled(parts))
        counter = next(self._counter).to_bytes(_COUNTER_BYTES, "big")
        cipher = self._cipher(self._salt, counter).encryptor()
        self._run(cipher, _header(purpose, token_block, pool_block), parts)
        cipher.finalize()
        return self._salt + counter + cipher.tag

    def open(self, purpose: Purpose, token_block: int, pool_block: int, parts: Parts, seal: bytes) -> bytes:
        """Fills targets from sources. Returns `seal` if it is theirs, otherwise something else.

        With a key it leaves zeros in the sources, whatever it returns: others may read them.
        """
        if not self._key:
            return checksum(_filled(parts))
        from cryptography.exceptions import InvalidTag

        salt, rest = seal[:_SALT_BYTES], seal[_SALT_BYTES:]
        counter, tag = rest[:_COUNTER_BYTES], rest[_COUNTER_BYTES:]
        if len(tag) != _TAG_BYTES:
            for source, _ in parts:
                source[...] = 0
            return b""
        cipher = self._cipher(salt, counter).decryptor()
        self._run(cipher, _header(purpose, token_block, pool_block), parts, wipes=True)
        try:
            cipher.finalize_with_tag(tag)
        except InvalidTag:
            return b""
        return seal

    def _run(self, cipher: Any, header: bytes, parts: Parts, wipes: bool = False) -> None:
        cipher.authenticate_additional_data(header)
        if not self.encrypts:
            for part in _filled(parts, wipes):
                cipher.authenticate_additional_data(_bytes(part))
            return
        for source, target in itertools.chain.from_iterable(in_parts(*pair) for pair in parts):
            cipher.update_into(_bytes(source), _bytes(target))
            if wipes:
                source[...] = 0

    def _cipher(self, salt: bytes, counter: bytes) -> Any:
        from cryptography.hazmat.primitives.ciphers import Cipher, modes
        from cryptography.hazmat.primitives.ciphers.algorithms import AES

        if salt not in self._ciphers:
            use = b"deepstack-jax blocks, encrypted" if self.encrypts else b"deepstack-jax blocks, in the clear"
            self._ciphers = {salt: AES(hmac.digest(self._key, use + salt, "sha256"))}
        return Cipher(self._ciphers[salt], modes.GCM(counter.rjust(12, b"\0")))


def check_installed() -> None:
    """
    Raises:
        ValueError: the package that keys of blocks need is missing.
    """
    try:
        import cryptography  # noqa: F401
    except ImportError:
        raise ValueError("a keyed split needs cryptography: pip install 'deepstack-jax[mooncake]'") from None


def _header(*what: Any) -> bytes:
    return msgspec.msgpack.encode(what)


def _filled(parts: Parts, wipes: bool = False) -> Iterator[np.ndarray]:
    """Fills targets, and yields what they have while it is in the CPU's cache; `wipes` leaves zeros in the sources."""
    for source, target in parts:
        if target is not source:
            yield from copy_in_parts(source, target, wipes)
        elif len(target):
            yield target


def _bytes(part: np.ndarray) -> memoryview:
    return part.view(np.uint8).data.cast("B")  # raises if it is not contiguous
