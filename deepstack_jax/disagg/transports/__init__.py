"""The interface through which bridges write into another node's memory, and `open_transport`, which opens it by URL.

A write is a list of segments for one peer. It succeeds or fails once none of its segments is in flight; it can't be
cancelled.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from importlib import import_module
from typing import NamedTuple, Protocol
from urllib.parse import parse_qs, urlsplit

import numpy as np


class WriteSegment(NamedTuple):
    """Bytes to write: an address in this process, one in the peer's, and a length."""

    source: int
    destination: int
    num_bytes: int


class TransferError(Exception):
    """A write failed, or the engine refused a call. Some of the bytes may have arrived or may still arrive."""


class Transport(Protocol):
    """Writes bytes into other nodes' memory."""

    @property
    def session(self) -> str:
        """The name by which peers address this process."""
        ...

    @property
    def needs_registered_sources(self) -> bool:
        """Whether writes require registered memory as their source."""
        ...

    def register(self, memory: np.ndarray) -> None:
        """Opens contiguous memory to peers' writes, and as a source of writes. It must live until `unregister`."""
        ...

    def unregister(self, memory: np.ndarray) -> None:
        """Closes memory that `register` opened."""
        ...

    def submit(self, session: str, segments: Sequence[WriteSegment]) -> "Future[None]":
        """Starts a write to a peer and returns immediately. The sources must not change until the future ends.

        The future fails with `TransferError`. Its callbacks run in the transport's threads, so they must be short.
        """
        ...

    def close(self) -> None:
        """Waits for writes in flight, fails those that have not started, and frees the engine."""
        ...


# scheme -> "module:function"; the function takes the host and the URL's options as keywords, such as device="mlx5_0"
SCHEMES = {
    "mooncake+tcp": "deepstack_jax.disagg.transports.mooncake:open_tcp",
    "mooncake+rdma": "deepstack_jax.disagg.transports.mooncake:open_rdma",
}


def open_transport(url: str) -> Transport:
    """Opens the transport of a URL such as `mooncake+tcp://10.0.0.1` or `mooncake+rdma://10.0.0.1?device=mlx5_0`.

    Another transport takes one module and one entry in `SCHEMES` (docs/add-a-transport.md).

    Raises:
        ValueError: the scheme is unknown or the host is missing.
        TransferError: the engine could not be started.
    """
    parts = urlsplit(url)
    if parts.scheme not in SCHEMES:
        raise ValueError(f"transport {url!r} is not supported: use one of {', '.join(f'{s}://host' for s in SCHEMES)}")
    if not parts.hostname:
        raise ValueError(f"transport {url!r} has no host: write {parts.scheme}://host")
    module, function = SCHEMES[parts.scheme].split(":")
    opener: Callable[..., Transport] = getattr(import_module(module), function)
    return opener(parts.hostname, **{name: values[-1] for name, values in parse_qs(parts.query).items()})
