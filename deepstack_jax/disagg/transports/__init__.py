"""Writing into another node's memory: the interface that the bridges need, and what opens one by its scheme.

A write is a list of pieces for one peer. It ends, as done or failed, when none of its pieces is in flight any more;
there is no cancel.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from importlib import import_module
from typing import NamedTuple, Protocol
from urllib.parse import parse_qs, urlsplit

import numpy as np


class Piece(NamedTuple):
    """Bytes to write: addresses in this process and in the peer's."""

    source: int
    destination: int
    num_bytes: int


class TransferError(Exception):
    """A write failed, or the engine refused. Part of the bytes may have arrived, or may still arrive."""


class Transport(Protocol):
    """What carries bytes between nodes."""

    @property
    def session(self) -> str:
        """The name under which peers write to this process."""
        ...

    @property
    def needs_registered_sources(self) -> bool:
        """Whether writes are only from registered memory."""
        ...

    def register(self, memory: np.ndarray) -> None:
        """Opens contiguous memory to peers' writes, and to be written from. It lives until `unregister`."""
        ...

    def unregister(self, memory: np.ndarray) -> None: ...

    def submit(self, session: str, pieces: Sequence[Piece]) -> "Future[None]":
        """Starts a write to a peer and returns at once. The sources must stay as they are until the future ends.

        The future fails with `TransferError`. Its callbacks run in the transport's threads: they must be short.
        """
        ...

    def close(self) -> None:
        """Lets what is in flight end, fails what is not, and frees the engine."""
        ...


# scheme -> "module:function"; the function takes the host and the URL's options, such as device="mlx5_0"
SCHEMES = {
    "mooncake+tcp": "deepstack_jax.disagg.transports.mooncake:open_tcp",
    "mooncake+rdma": "deepstack_jax.disagg.transports.mooncake:open_rdma",
}


def open_transport(url: str) -> Transport:
    """The transport of a URL such as `mooncake+tcp://10.0.0.1` or `mooncake+rdma://10.0.0.1?device=mlx5_0`.

    Another transport is one module and its scheme in `SCHEMES` (docs/add-a-transport.md).

    Raises:
        ValueError: an unknown scheme, or no host.
        TransferError: the engine could not be started.
    """
    parts = urlsplit(url)
    if parts.scheme not in SCHEMES:
        raise ValueError(f"transport {url!r} is not supported: use one of {', '.join(f'{s}://host' for s in SCHEMES)}")
    if not parts.hostname:
        raise ValueError(f"transport {url!r} names no host: write {parts.scheme}://host")
    module, function = SCHEMES[parts.scheme].split(":")
    opener: Callable[..., Transport] = getattr(import_module(module), function)
    return opener(parts.hostname, **{name: values[-1] for name, values in parse_qs(parts.query).items()})
