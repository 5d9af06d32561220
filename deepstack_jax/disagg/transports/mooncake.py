"""Mooncake's transfer engine as a transport.

It listens on every interface without authentication: keep it on a private network.
"""

import contextlib
import importlib
import logging
import os
import socket
import stat
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from deepstack_jax.disagg.transports import TransferError, WriteSegment
from deepstack_jax.disagg.transports.mooncake_wheel import explain

_log = logging.getLogger(__name__)

QUEUE_LIMIT = 1024  # segments in the engine per peer; it refuses more than 2048
# Polling sleeps this long between two checks. The engine's own blocking calls spin, which takes a core.
MIN_POLL_INTERVAL_S, MAX_POLL_INTERVAL_S = 5e-5, 1e-2
MAX_BYTES_PER_S = 8e9  # a write is not polled before it can have ended at this rate
IDLE_TIMEOUT_S = 30.0  # a peer's thread ends after this long without a write
PROGRESS_TIMEOUT_S = 10  # the engine fails a write after this long without progress
ACCEPT_INTERVAL_S = 1.0  # an engine that is freed ends at its next look, which it takes at this interval


class MooncakeTransport:
    """Mooncake's engine in its peer-to-peer mode, over `protocol` tcp or rdma.

    An engine keeps its connections to peers that are gone as long as it lives, up to four for each. Over tcp an engine
    of its own therefore writes to each peer, and ends IDLE_TIMEOUT_S after the last write. Over rdma one engine writes
    to all of them, because sources are registered with it.

    Args:
        host: the address under which peers reach this node, without a port. One process uses either IPv4 or IPv6.
        device: names of RDMA devices, separated by commas, or "" for all.

    Attributes:
        engine: Mooncake's `TransferEngine` that memory is registered with; None after `close`.

    Raises:
        TransferError: Mooncake or a library that it needs is not installed, or the RDMA device does not exist.
    """

    def __init__(self, host: str, protocol: Literal["tcp", "rdma"] = "tcp", device: str = ""):
        if protocol == "rdma":
            _check_rdma_device(device)
        self.needs_registered_sources = protocol == "rdma"
        self._options = host, protocol, device
        self.engine: Any = _start_engine(*self._options)
        address = f"[{host}]" if ":" in host else host
        self._session = f"{address}:{self.engine.get_rpc_port()}"
        self._registered: dict[int, np.ndarray] = {}
        self._peers: dict[str, _Peer] = {}
        self._lock = threading.Lock()
        self._closed = False

    @property
    def session(self) -> str:
        return self._session

    @property
    def num_engines(self) -> int:
        """Mooncake's engines of this transport, with those that are ending."""
        return (self.engine is not None) + (not self.needs_registered_sources) * sum(
            peer.thread.is_alive() for peer in tuple(self._peers.values())
        )

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
                self._peers[write.session] = peer = _Peer(self._sending_engine, write.session)
                peer.add(write, segments)
            return True

    @contextlib.contextmanager
    def _sending_engine(self) -> Iterator[Any]:
        if self.needs_registered_sources:
            yield self.engine
            return
        engine = _start_engine(*self._options)
        try:
            yield engine
        finally:
            _end_soon(engine)
            time.sleep(1.1 * ACCEPT_INTERVAL_S)

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
        _end_soon(self.engine)
        for peer in self._peers.values():
            peer.close()
        for peer in self._peers.values():
            peer.thread.join()
        for memory in tuple(self._registered.values()):
            self.unregister(memory)
        time.sleep(1.1 * ACCEPT_INTERVAL_S)
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

    def __init__(self, open_engine: Callable[[], contextlib.AbstractContextManager[Any]], session: str):
        """`open_engine` is called in the peer's thread, and its context left at the end of the thread."""
        self._open_engine = open_engine
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
            with self._open_engine() as engine:
                while self._wait_for_writes():
                    self._submit(engine)
                    last_progress = time.perf_counter()
                    while self._in_flight:
                        if self._collect(engine):
                            last_progress = time.perf_counter()
                        else:
                            waited = time.perf_counter() - last_progress
                            soonest = self._in_flight[0][0].num_bytes / MAX_BYTES_PER_S - waited
                            time.sleep(min(max(soonest, waited / 16, MIN_POLL_INTERVAL_S), MAX_POLL_INTERVAL_S))
                        self._submit(engine)
        except Exception:
            _log.exception("writing to %s failed", self._session)
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

    def _submit(self, engine: Any) -> None:
        while len(self._in_flight) < QUEUE_LIMIT:
            with self._wake:
                if not self._waiting:
                    return
                write, segment = self._waiting.popleft()
            addresses = segment.source, segment.destination
            batch = engine.transfer_submit_write(self._session, *addresses, segment.num_bytes)
            if batch in (0, -1, 2**64 - 1):
                write.end_segment(False)
            else:
                self._in_flight.append((write, batch))

    def _collect(self, engine: Any) -> bool:
        """Removes ended segments from the front; they end nearly in order, so later ones can wait."""
        any_ended = False
        while self._in_flight:
            write, batch = self._in_flight[0]
            # 1: done, -1: failed, otherwise in flight (-2: the engine considers it slow)
            status = engine.transfer_check_status(batch)
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


def _end_soon(engine: Any) -> None:
    """Lets an engine end quickly once it is freed, after another ACCEPT_INTERVAL_S.

    Freeing it waits for a thread that accepts connections, and holds Python's lock meanwhile. That thread looks whether
    it is to end whenever its socket's time-out passes.
    """
    port = engine.get_rpc_port()
    for number in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):  # others are closed meanwhile
            if stat.S_ISSOCK(os.fstat(number).st_mode):
                with socket.socket(fileno=os.dup(number)) as found:
                    if found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) and found.getsockname()[1] == port:
                        found.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 0, 1000))


_SILENT = threading.Lock()  # standard error belongs to the whole process


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Hides standard error: when it starts, the engine prints a spurious error at every log level."""
    with _SILENT:
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
