"""How nodes with keys of their own show each other their certificates, before they connect.

CURVE needs the encode node's public key in advance. The encode node therefore has a second socket for introductions: a
language node sends its certificate there, and gets the encode node's. Both are public, and CURVE proves afterwards that
each node has the secret of what it has shown.
"""

import hashlib
from typing import Annotated, Literal

import msgspec
import zmq
from msgspec import Meta
from zmq.utils import z85

from deepstack_jax.disagg.keys.certificates import Certificate

MAX_INTRODUCTION = 1024  # bytes
INTRODUCTION_DOMAIN = b"introductions"  # what ZeroMQ's questions about peers of the second socket are marked with


class Introduction(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The message of either side."""

    certificate: Certificate
    port: Annotated[int, Meta(ge=0, le=65535)] = 0  # of the encode node's control socket; 0 from a language node
    version: Literal[1] = 1


def pack_introduction(introduction: Introduction) -> bytes:
    """The message as msgpack."""
    return msgspec.msgpack.encode(introduction)


def unpack_introduction(parts: list[bytes]) -> Introduction | None:
    """The message, None if it can't be read. It raises for no input."""
    try:
        return _DECODER.decode(parts[0]) if len(parts) == 1 else None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def introduction_pair(authority: bytes) -> tuple[bytes, bytes]:
    """The CURVE pair (public, secret) of all introduction sockets of a cluster, in Z85.

    It follows from the authority's public key, which is in every key file of the cluster: it keeps strangers out, but
    proves nothing.
    """
    secret = z85.encode(hashlib.blake2b(authority, digest_size=32, person=b"dsj introduction").digest())
    return zmq.curve_public(secret), secret


_DECODER = msgspec.msgpack.Decoder(Introduction)
