"""Certificates: the authority of a cluster signs the key of each node, so that a single node can be shut out.

The authority is an Ed25519 key pair (RFC 8032) whose secret stays off the nodes. A node's own key is for CURVE.
"""

import re
import secrets
import time
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, Literal

import msgspec
import zmq
from msgspec import Meta
from zmq.utils import z85

from deepstack_jax.disagg.keys.revocations import Revocations

KEY_BYTES = 32  # of a public or a secret key, for CURVE and for Ed25519
SERIAL_LENGTH = 16
SERIAL_PATTERN = rf"\A[0-9a-f]{{{SERIAL_LENGTH}}}\Z"
NAME_PATTERN = rf"\A(?![0-9a-f]{{{SERIAL_LENGTH}}}\Z)[a-z0-9.-]{{1,63}}\Z"  # logs can show it unchanged

CLOCK_MARGIN_S = 300.0  # by which nodes' clocks may differ: a certificate is taken for so long after its end

# What the authority signs is never valid for another use. Nodes that don't know an expiry can't read certificates with
# one, and take the others.
_USE, _USE_UNTIL = "deepstack-jax node certificate 1", "deepstack-jax node certificate 2"
_LAST = 253_402_300_799  # the end of the year 9999

NodeRole = Literal["any", "encode", "language"]
KeyBytes = Annotated[bytes, Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]


class Certificate(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Says that a CURVE key belongs to a node of the cluster. It is not secret.

    Attributes:
        name: of the node. A node that gets a new key may keep its name.
        serial: of this certificate, drawn at random.
        role: the role that the node may have.
        public: its public key.
        signature: of the authority.
        expires: seconds since 1970 at which it ends; 0 for never.
    """

    name: Annotated[str, Meta(pattern=NAME_PATTERN)]
    serial: Annotated[str, Meta(pattern=SERIAL_PATTERN)]
    role: NodeRole
    public: KeyBytes
    signature: Annotated[bytes, Meta(min_length=64, max_length=64)]
    expires: Annotated[int, Meta(ge=0, le=_LAST)] = 0

    def __str__(self) -> str:
        return f"node {self.name} (serial {self.serial})"

    @property
    def signed_bytes(self) -> bytes:
        """What the signature is of."""
        said = self.name, self.serial, self.role, self.public
        return msgspec.msgpack.encode((_USE_UNTIL, *said, self.expires) if self.expires else (_USE, *said))

    @property
    def end(self) -> str:
        """The date and time at which it expires."""
        return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(self.expires))


class Authority:
    """Signs the keys of nodes."""

    def __init__(self, secret: bytes):
        """
        Args:
            secret: KEY_BYTES.

        Raises:
            ValueError: the package that signs is missing.
        """
        self._key = _ed25519().Ed25519PrivateKey.from_private_bytes(secret)

    @property
    def public(self) -> bytes:
        """The public key, by which nodes know the authority."""
        return self._key.public_key().public_bytes_raw()

    def make_node_key(self, name: str, role: NodeRole = "any", expires: int = 0) -> "NodeKey":
        """Draws the key of a node, and signs it; `expires` is as in `Certificate`.

        Raises:
            ValueError: nothing can have this name.
        """
        if not re.search(NAME_PATTERN, name):
            raise ValueError(
                f"{name!r} can't name a node: use 1 to 63 of the characters a-z, 0-9, '.' and '-', "
                f"but not {SERIAL_LENGTH} hexadecimal digits, which are a serial"
            )
        public, secret = map(z85.decode, zmq.curve_keypair())
        unsigned = Certificate(name, secrets.token_hex(SERIAL_LENGTH // 2), role, public, bytes(64), expires)
        certificate = msgspec.structs.replace(unsigned, signature=self._key.sign(unsigned.signed_bytes))
        return NodeKey(certificate, secret, self.public)


@dataclass(frozen=True)
class NodeKey:
    """The key pair of one node, its certificate, and what it needs to check those of others.

    Attributes:
        certificate: its own.
        secret_bytes: the secret key.
        authority: the authority's public key.
        revoked: the nodes that are shut out.
    """

    certificate: Certificate
    secret_bytes: bytes = field(repr=False)
    authority: bytes
    revoked: Revocations = field(default_factory=Revocations, compare=False)

    @cached_property
    def public(self) -> bytes:
        """The public key in Z85."""
        return z85.encode(self.certificate.public)

    @cached_property
    def secret(self) -> bytes:
        """The secret key in Z85."""
        return z85.encode(self.secret_bytes)

    def certifies(self, certificate: Certificate) -> bool:
        """Whether the authority has signed a certificate."""
        from cryptography.exceptions import InvalidSignature

        key = _ed25519().Ed25519PublicKey.from_public_bytes(self.authority)
        try:
            key.verify(certificate.signature, certificate.signed_bytes)
        except InvalidSignature:
            return False
        return True

    def shut_out(self, certificate: Certificate) -> str | None:
        """Explains in one line why a node of the cluster is no longer served by now; None if it is."""
        self.revoked.refresh()
        if certificate in self.revoked:
            return f"{certificate} is revoked"
        if certificate.expires and time.time() > certificate.expires + CLOCK_MARGIN_S:
            return (
                f"{certificate} has a key that was valid until {certificate.end}: make another one with "
                f"deepstack-jax keygen FILE --node {certificate.name} --signed-by AUTHORITY, or set the clock"
            )
        return None

    def refusal(self, certificate: Certificate, role: Literal["encode", "language"]) -> str | None:
        """Explains in one line why a node can't have this role in the cluster; None if it can."""
        if not self.certifies(certificate):
            return "its certificate was not signed by this cluster's authority: make its key with the same authority"
        if reason := self.shut_out(certificate):
            return reason
        if certificate.role not in ("any", role):
            return f"{certificate} has a key for role {certificate.role}: expected one for role {role}"
        return None


def _ed25519() -> Any:
    try:
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError:
        raise ValueError("keys of nodes need cryptography: pip install 'deepstack-jax[mooncake]'") from None
    return ed25519
