"""Mooncake's transfer engine as a transport.

It listens on every interface without authentication: keep it on a private network.
"""

import contextlib
import importlib
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from deepstack_jax.disagg.transports import TransferError, WriteSegment
from deepstack_jax.disagg.transports.mooncake_wheel import explain

QUEUE_LIMIT = 1024  # segments in the engine per peer; it refuses more than 2048
# Polling sleeps this long between two checks. The engine's own blocking calls spin, which takes a core.
MIN_POLL_INTERVAL_S, MAX_POLL_INTERVAL_S = 5e-5, 1e-2
MAX_BYTES_PER_S = 8e9  # a write is not polled before it can have ended at this rate
IDLE_TIMEOUT_S = 30.0  # a peer's thread ends after this long without a write
PROGRESS_TIMEOUT_S = 10  # the engine fails a write after this long without progress


class MooncakeTransport:
    """Mooncake's engine in its peer-to-peer mode, over `protocol` tcp or rdma.

    Args:
        host: the address under which peers reach this node, without a port. One process uses either IPv4 or IPv6.
        device: names of RDMA devices, separated by commas, or "" for all.

    Attributes:
        engine: Mooncake's `TransferEngine`, or None after `close`.

    Raises:
        TransferError: Mooncake or a library that it needs is not installed, or the RDMA device does not exist.
    """

    def __init__(self, host: str, protocol: Literal["tcp", "rdma"] = "tcp", device: str = ""):
        if protocol == "rdma":
            _check_rdma_device(device)
        self.needs_registered_sources = protocol == "rdma"
        self.engine: Any = _start_engine(host, protocol, device)
        address = f"[{host}]" if ":" in host else host
        self._session = f"{address}:{self.engine.get_rpc_port()}"
        self._registered: dict[int, np.ndarray] = {}
        self._peers: dict[str, _Peer] = {}
        self._lock = threading.Lock()
        self._closed = False

    @property
    def session(self) -> str:
        return self._session

    def register(self, memory: np.ndarray) -> None:
        address = memory.ctypes.data
        if status := self.engine.register_memory(address, memory.nbytes):
            raise TransferError(f"Mooncake refused to register {memory.nbytes} bytes at {address:#x} (status {status})")
        self._registered[address] = memory

    def unregister(self, memory: np.ndarray) -> None:
        if self._registered.pop(memory.ctypes.data, None) is not None:
            self.engine.unregister_memory(memory.ctypes.data)

    def submit(self, session: str, segments: Sequence[WriteSegment]) -> "Future[None]":
        write = _Write(session, len(segments), sum(segment.num_bytes for segment in segments), len(segments))
        write.future.set_running_or_notify_cancel()
        if not segments:
            write.future.set_result(None)
        elif not self._queue(write, segments):
            write.future.set_exception(TransferError(f"write to {session} failed: the transport is closed"))
        return write.future

    def _queue(self, write: "_Write", segments: Sequence[WriteSegment]) -> bool:
        with self._lock:
            if self._closed:
                return False
            peer = self._peers.get(write.session)
            if peer is None or not peer.add(write, segments):
                self._peers = {name: each for name, each in self._peers.items() if each.thread.is_alive()}
                self._peers[write.session] = peer = _Peer(self.engine, write.session)
                peer.add(write, segments)
            return True

    def close(self) -> None:
        with self._lock:
            self._closed = True
        for peer in self._peers.values():
            peer.close()
        for peer in self._peers.values():
            peer.thread.join()
        for memory in tuple(self._registered.values()):
            self.unregister(memory)
        self.engine = None


def open_tcp(host: str) -> MooncakeTransport:
    """Opens Mooncake over tcp, for `open_transport`."""
    return MooncakeTransport(host, "tcp")


def open_rdma(host: str, device: str = "") -> MooncakeTransport:
    """Opens Mooncake over rdma, for `open_transport`; `device` names RDMA devices, separated by commas."""
    return MooncakeTransport(host, "rdma", device)


@dataclass
class _Write:
    session: str
    num_segments: int
    num_bytes: int
    outstanding: int
    failed: bool = False
    future: "Future[None]" = field(default_factory=Future)

    def end_segment(self, succeeded: bool) -> None:
        self.outstanding -= 1
        self.failed |= not succeeded
        if self.outstanding:
            return
        if self.failed:
            self.future.set_exception(
                TransferError(
                    f"write of {self.num_bytes} bytes in {self.num_segments} segments to {self.session} failed: "
                    "the peer is gone or stopped, or the address is outside its registered memory"
                )
            )
        else:
            self.future.set_result(None)


class _Peer:
    """The queue of one peer. It has its own thread, because opening a connection may block."""

    def __init__(self, engine: Any, session: str):
        self._engine = engine
        self._session = session
        self._waiting: deque[tuple[_Write, WriteSegment]] = deque()
        self._in_flight: deque[tuple[_Write, int]] = deque()
        self._wake = threading.Condition()
        self._ended = False
        self.thread = threading.Thread(target=self._run, name=f"mooncake {session}", daemon=True)
        self.thread.start()

    def add(self, write: _Write, segments: Sequence[WriteSegment]) -> bool:
        """Queues a write; returns False if the thread has ended because it was idle."""
        with self._wake:
            if self._ended:
                return False
            self._waiting.extend((write, segment) for segment in segments)
            self._wake.notify()
            return True

    def close(self) -> None:
        with self._wake:
            self._ended = True
            dropped = list(self._waiting)
            self._waiting.clear()
            self._wake.notify()
        for write, _ in dropped:
            write.end_segment(False)

    def _run(self) -> None:
        try:
            while self._wait_for_writes():
                self._submit()
                last_progress = time.perf_counter()
                while self._in_flight:
                    if self._collect():
                        last_progress = time.perf_counter()
                    else:
                        waited = time.perf_counter() - last_progress
                        soonest = self._in_flight[0][0].num_bytes / MAX_BYTES_PER_S - waited
                        time.sleep(min(max(soonest, waited / 16, MIN_POLL_INTERVAL_S), MAX_POLL_INTERVAL_S))
                    self._submit()
        finally:
            self.close()
            for write, _ in self._in_flight:
                write.end_segment(False)

    def _wait_for_writes(self) -> bool:
        """Waits for a write; returns False after IDLE_TIMEOUT_S, or when the transport closes."""
        with self._wake:
            self._wake.wait_for(lambda: self._waiting or self._ended, timeout=IDLE_TIMEOUT_S)
            self._ended |= not self._waiting
            return bool(self._waiting)

    def _submit(self) -> None:
        while len(self._in_flight) < QUEUE_LIMIT:
            with self._wake:
                if not self._waiting:
                    return
                write, segment = self._waiting.popleft()
            addresses = segment.source, segment.destination
            batch = self._engine.transfer_submit_write(self._session, *addresses, segment.num_bytes)
            if batch in (0, -1, 2**64 - 1):
                write.end_segment(False)
            else:
                self._in_flight.append((write, batch))

    def _collect(self) -> bool:
        """Removes ended segments from the front; they end nearly in order, so later ones can wait."""
        any_ended = False
        while self._in_flight:
            write, batch = self._in_flight[0]
            # 1: done, -1: failed, otherwise in flight (-2: the engine considers it slow)
            status = self._engine.transfer_check_status(batch)
            if status not in (1, -1):
                break
            self._in_flight.popleft()
            write.end_segment(status == 1)
            any_ended = True
        return any_ended


def _start_engine(host: str, protocol: str, device: str) -> Any:
    quiet = os.environ.setdefault("MC_LOG_LEVEL", "ERROR") == "ERROR"
    os.environ.setdefault("MC_TCP_PROGRESS_TIMEOUT_SEC", str(PROGRESS_TIMEOUT_S))
    os.environ.setdefault("MC_TCP_STATUS_TIMEOUT_SEC", str(PROGRESS_TIMEOUT_S))
    if ":" in host:
        os.environ.setdefault("MC_USE_IPV6", "1")
    if protocol == "tcp":
        os.environ.setdefault("MC_FORCE_TCP", "1")  # otherwise the engine uses any RDMA device that it finds
    try:
        module = importlib.import_module("mooncake.engine")
    except ImportError as error:
        raise TransferError(explain(error)) from error
    engine = module.TransferEngine()
    with _silent() if quiet else contextlib.nullcontext():
        status = engine.initialize(host, "P2PHANDSHAKE", protocol, device)
    if status:
        raise TransferError(f"Mooncake can't start on {host} over {protocol} (status {status})")
    return engine


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Hides standard error: when it starts, the engine prints a spurious error at every log level."""
    saved = os.dup(2)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


def _check_rdma_device(device: str) -> None:
    folder = Path("/sys/class/infiniband")
    found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if not found:
        raise TransferError("protocol rdma needs an RDMA device, and this machine has none: use tcp")
    for name in filter(None, device.split(",")):
        if name not in found:
            raise TransferError(f"RDMA device {name!r} does not exist: this machine has {', '.join(found)}")
