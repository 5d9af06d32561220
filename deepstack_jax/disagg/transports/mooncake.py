"""Mooncake's transfer engine as a transport. It listens on every interface without authentication: keep it on a private
network.
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

from deepstack_jax.disagg.transports import Piece, TransferError
from deepstack_jax.disagg.transports.mooncake_wheel import explain

QUEUE_LIMIT = 1024  # pieces handed to the engine a peer; at 2048 it refuses
POLL_SECONDS = 5e-5, 1e-2  # least and most between two looks; the engine's own waiting calls spin, and take a core
POLL_RATE = 8e9  # bytes a second: a write isn't looked at before it can have ended
IDLE_SECONDS = 30.0  # after which a peer's thread ends
PROGRESS_SECONDS = 10  # without a byte of progress, after which the engine gives a write up


class MooncakeTransport:
    """Mooncake's engine, peer to peer, over `protocol` tcp or rdma.

    Args:
        host: the address under which peers reach this node, without a port. One process uses IPv4 or IPv6.
        device: the RDMA device's name, several with commas, or "" for all.

    Raises:
        TransferError: Mooncake or a library that it needs isn't installed, or there is no such RDMA device.
    """

    def __init__(self, host: str, protocol: Literal["tcp", "rdma"] = "tcp", device: str = ""):
        if protocol == "rdma":
            _check_rdma_device(device)
        self.needs_registered_sources = protocol == "rdma"
        self._engine: Any = _start_engine(host, protocol, device)
        name = f"[{host}]" if ":" in host else host
        self._session = f"{name}:{self._engine.get_rpc_port()}"
        self._registered: dict[int, np.ndarray] = {}
        self._peers: dict[str, _Peer] = {}
        self._lock = threading.Lock()
        self._closed = False

    @property
    def session(self) -> str:
        return self._session

    def register(self, memory: np.ndarray) -> None:
        address = memory.ctypes.data
        if status := self._engine.register_memory(address, memory.nbytes):
            raise TransferError(f"Mooncake refused to register {memory.nbytes} bytes at {address:#x} (status {status})")
        self._registered[address] = memory

    def unregister(self, memory: np.ndarray) -> None:
        if self._registered.pop(memory.ctypes.data, None) is not None:
            self._engine.unregister_memory(memory.ctypes.data)

    def submit(self, session: str, pieces: Sequence[Piece]) -> "Future[None]":
        write = _Write(session, len(pieces), sum(piece.num_bytes for piece in pieces), len(pieces))
        write.future.set_running_or_notify_cancel()
        if not pieces:
            write.future.set_result(None)
        elif not self._queue(write, pieces):
            write.future.set_exception(TransferError(f"no write to {session}: the transport is closed"))
        return write.future

    def _queue(self, write: "_Write", pieces: Sequence[Piece]) -> bool:
        with self._lock:
            if self._closed:
                return False
            peer = self._peers.get(write.session)
            if peer is None or not peer.add(write, pieces):
                self._peers = {name: each for name, each in self._peers.items() if each.thread.is_alive()}
                self._peers[write.session] = peer = _Peer(self._engine, write.session)
                peer.add(write, pieces)
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
        self._engine = None


def open_tcp(host: str) -> MooncakeTransport:
    """Mooncake over tcp, for `open_transport`."""
    return MooncakeTransport(host, "tcp")


def open_rdma(host: str, device: str = "") -> MooncakeTransport:
    """Mooncake over rdma, for `open_transport`; `device` names RDMA devices with commas between, all by default."""
    return MooncakeTransport(host, "rdma", device)


@dataclass
class _Write:
    session: str
    num_pieces: int
    num_bytes: int
    outstanding: int
    failed: bool = False
    future: "Future[None]" = field(default_factory=Future)

    def piece_ended(self, good: bool) -> None:
        self.outstanding -= 1
        self.failed |= not good
        if self.outstanding:
            return
        if self.failed:
            self.future.set_exception(
                TransferError(
                    f"write of {self.num_bytes} bytes in {self.num_pieces} pieces to {self.session} failed: "
                    "the peer is gone or stopped, or the place is outside its registered memory"
                )
            )
        else:
            self.future.set_result(None)


class _Peer:
    """The queue of one peer. A thread of its own, because opening a connection may block."""

    def __init__(self, engine: Any, session: str):
        self._engine = engine
        self._session = session
        self._waiting: deque[tuple[_Write, Piece]] = deque()
        self._in_flight: deque[tuple[_Write, int]] = deque()
        self._wake = threading.Condition()
        self._ended = False
        self.thread = threading.Thread(target=self._run, name=f"mooncake {session}", daemon=True)
        self.thread.start()

    def add(self, write: _Write, pieces: Sequence[Piece]) -> bool:
        """False when the thread has ended, having been idle."""
        with self._wake:
            if self._ended:
                return False
            self._waiting.extend((write, piece) for piece in pieces)
            self._wake.notify()
            return True

    def close(self) -> None:
        with self._wake:
            self._ended = True
            dropped = list(self._waiting)
            self._waiting.clear()
            self._wake.notify()
        for write, _ in dropped:
            write.piece_ended(False)

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._submit()
                news = time.perf_counter()
                while self._in_flight:
                    if self._collect():
                        news = time.perf_counter()
                    else:
                        waited = time.perf_counter() - news
                        soonest = self._in_flight[0][0].num_bytes / POLL_RATE - waited
                        time.sleep(min(max(soonest, waited / 16, POLL_SECONDS[0]), POLL_SECONDS[1]))
                    self._submit()
        finally:
            self.close()
            for write, _ in self._in_flight:
                write.piece_ended(False)

    def _wait_for_work(self) -> bool:
        """False when there has been none for long, or the transport closes."""
        with self._wake:
            self._wake.wait_for(lambda: self._waiting or self._ended, timeout=IDLE_SECONDS)
            self._ended |= not self._waiting
            return bool(self._waiting)

    def _submit(self) -> None:
        while len(self._in_flight) < QUEUE_LIMIT:
            with self._wake:
                if not self._waiting:
                    return
                write, piece = self._waiting.popleft()
            batch = self._engine.transfer_submit_write(self._session, piece.source, piece.destination, piece.num_bytes)
            if batch in (0, -1, 2**64 - 1):
                write.piece_ended(False)
            else:
                self._in_flight.append((write, batch))

    def _collect(self) -> bool:
        """Takes ended pieces off the front: pieces end nearly in order, and a later one's end can wait."""
        any_ended = False
        while self._in_flight:
            write, batch = self._in_flight[0]
            # 1 done, -1 failed; else it is still in flight (-2 says that the engine thinks it slow)
            status = self._engine.transfer_check_status(batch)
            if status not in (1, -1):
                break
            self._in_flight.popleft()
            write.piece_ended(status == 1)
            any_ended = True
        return any_ended


def _start_engine(host: str, protocol: str, device: str) -> Any:
    quiet = os.environ.setdefault("MC_LOG_LEVEL", "ERROR") == "ERROR"
    os.environ.setdefault("MC_TCP_PROGRESS_TIMEOUT_SEC", str(PROGRESS_SECONDS))
    os.environ.setdefault("MC_TCP_STATUS_TIMEOUT_SEC", str(PROGRESS_SECONDS))
    if ":" in host:
        os.environ.setdefault("MC_USE_IPV6", "1")
    if protocol == "tcp":
        os.environ.setdefault("MC_FORCE_TCP", "1")  # else the engine takes any RDMA device that it finds
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
    """The engine's start prints an error that is none, whatever its log level."""
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _check_rdma_device(device: str) -> None:
    folder = Path("/sys/class/infiniband")
    found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if not found:
        raise TransferError("protocol rdma needs an RDMA device and this machine has none: use tcp")
    for name in filter(None, device.split(",")):
        if name not in found:
            raise TransferError(f"no RDMA device {name!r}: this machine has {', '.join(found)}")
