"""A transport that goes wrong on purpose, to show that what is built on it doesn't."""

import asyncio
import ctypes
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal, get_args
from unittest import mock

import numpy as np

from deepstack_jax.disagg.transports import Piece, TransferError, Transport
from deepstack_jax.disagg.wire import control

FaultKind = Literal["delay", "drop", "fail", "stall", "late", "corrupt"]


@dataclass(frozen=True)
class Fault:
    """What happens to one write.

    delay: it starts after `seconds`.  drop: reported as done, and nothing is written.  fail: reported as failed, and
    nothing is written.  stall: nothing is written; it is reported as failed after `seconds`, and never if that is 0.
    late: reported as failed, and after `seconds` written all the same.  corrupt: one byte arrives changed.
    """

    kind: FaultKind
    seconds: float = 0.0


def random_faults(seed: int, rates: Mapping[FaultKind, float], seconds: float = 0.2) -> Iterator[Fault | None]:
    """Endless; each write meets fault `kind` with probability `rates[kind]`, waiting up to `seconds`.

    Raises:
        ValueError: an unknown kind, or rates that don't fit into 1.
    """
    if unknown := set(rates) - set(get_args(FaultKind)):
        raise ValueError(f"unknown fault {sorted(unknown)[0]!r}: choose from {', '.join(get_args(FaultKind))}")
    if min(rates.values(), default=0) < 0 or sum(rates.values()) > 1:
        raise ValueError(f"rates {dict(rates)} must be probabilities that sum to at most 1")
    return _drawn(random.Random(seed), rates, seconds)


class FaultyTransport:
    """`inner` with `faults`: the fate of write after write, none once they run out.

    `counts` has how many writes met each kind, "none" included, and "late landed" for late ones that were written.
    The bytes of late and corrupt writes come from memory that isn't registered: over tcp alone.
    """

    def __init__(self, inner: Transport, faults: Iterable[Fault | None], seed: int = 0):
        self.counts: Counter[str] = Counter()
        self._inner = inner
        self._faults = iter(faults)
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._timers: set[threading.Timer] = set()

    @property
    def session(self) -> str:
        return self._inner.session

    @property
    def needs_registered_sources(self) -> bool:
        return self._inner.needs_registered_sources

    def register(self, memory: np.ndarray) -> None:
        self._inner.register(memory)

    def unregister(self, memory: np.ndarray) -> None:
        self._inner.unregister(memory)

    def submit(self, session: str, pieces: Sequence[Piece]) -> "Future[None]":
        with self._lock:
            fault = next(self._faults, None)
            self.counts[fault.kind if fault else "none"] += 1
            place = self._random.random()
        if fault is None:
            return self._inner.submit(session, pieces)
        outcome: Future[None] = Future()
        outcome.set_running_or_notify_cancel()
        match fault.kind:
            case "delay":
                self._after(fault.seconds, lambda: _forward(self._inner.submit(session, pieces), outcome))
            case "drop":
                outcome.set_result(None)
            case "fail" | "late":
                if fault.kind == "late":
                    memory, copies = _copied(pieces)  # the caller may reuse its memory from now on
                    self._after(fault.seconds, lambda: self._write_late(session, copies, memory))
                outcome.set_exception(TransferError(f"write to {session} failed: injected fault {fault.kind!r}"))
            case "corrupt":
                memory, copies = _copied(pieces)
                spoilt = int(place * len(memory))
                memory[spoilt] ^= 1 << int(place * 1e6) % 8
                outcome.add_done_callback(lambda _: memory)  # lives as long as the write
                _forward(self._inner.submit(session, copies), outcome)
            case "stall":
                if fault.seconds:
                    error = TransferError(f"write to {session} failed: injected fault 'stall'")
                    self._after(fault.seconds, lambda: outcome.set_exception(error))
        return outcome

    def close(self) -> None:
        """Waits for delayed and late writes too."""
        with self._lock:
            timers = tuple(self._timers)
        for timer in timers:
            timer.join()
        self._inner.close()

    def _write_late(self, session: str, pieces: Sequence[Piece], memory: bytearray) -> None:
        def landed(write: "Future[None]", memory: bytearray = memory) -> None:
            with self._lock:
                self.counts["late landed"] += write.exception() is None

        self._inner.submit(session, pieces).add_done_callback(landed)

    def _after(self, seconds: float, action: Callable[[], None]) -> None:
        def run() -> None:
            with self._lock:
                self._timers.discard(timer)
            action()

        timer = threading.Timer(seconds, run)
        timer.daemon = True
        with self._lock:
            self._timers.add(timer)
        timer.start()


def _drawn(numbers: random.Random, rates: Mapping[FaultKind, float], seconds: float) -> Iterator[Fault | None]:
    while True:
        drawn, wait = numbers.random(), numbers.random() * seconds
        fault = None
        for kind, rate in rates.items():
            if 0 <= drawn < rate:
                fault = Fault(kind, wait)
            drawn -= rate
        yield fault


def _copied(pieces: Sequence[Piece]) -> tuple[bytearray, list[Piece]]:
    memory = bytearray(sum(piece.num_bytes for piece in pieces))
    start = ctypes.addressof((ctypes.c_char * len(memory)).from_buffer(memory))
    copies, offset = [], 0
    for piece in pieces:
        ctypes.memmove(start + offset, piece.source, piece.num_bytes)
        copies.append(piece._replace(source=start + offset))
        offset += piece.num_bytes
    return memory, copies


def _forward(write: "Future[None]", outcome: "Future[None]") -> None:
    def ended(write: "Future[None]") -> None:
        if error := write.exception():
            outcome.set_exception(error)
        else:
            outcome.set_result(None)

    write.add_done_callback(ended)


def tamper_with_messages(tamper: Callable[[bytes], Iterable[tuple[float, bytes]]]) -> Any:
    """A patch of the control sockets of this process: `tamper` says what goes out for a message, and after how long."""
    plain = control._send

    def send(socket: Any, prefix: list[bytes], data: bytes) -> None:
        for delay, instead in tamper(data):
            asyncio.get_running_loop().call_later(delay, plain, socket, prefix, instead)

    return mock.patch.object(control, "_send", send)
