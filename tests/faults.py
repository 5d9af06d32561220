"""A transport and a message filter that inject faults, to test the code that uses them."""

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

from deepstack_jax.disagg.transports import TransferError, Transport, WriteSegment
from deepstack_jax.disagg.wire import control

FaultKind = Literal["delay", "drop", "fail", "stall", "late", "corrupt"]


@dataclass(frozen=True)
class Fault:
    """The fault of one write.

    delay: the write starts after `seconds`.
    drop: it is reported as done, but nothing is written.
    fail: it is reported as failed, and nothing is written.
    stall: nothing is written, and the write is reported as failed after `seconds`, or never if that is 0.
    late: it is reported as failed, but written after `seconds`.
    corrupt: one byte of it arrives changed.
    """

    kind: FaultKind
    seconds: float = 0.0


def random_faults(seed: int, rates: Mapping[FaultKind, float], seconds: float = 0.2) -> Iterator[Fault | None]:
    """Yields faults endlessly, each of `kind` with probability `rates[kind]` and a wait of up to `seconds`.

    Raises:
        ValueError: a kind is unknown, or the rates sum to more than 1.
    """
    if unknown := set(rates) - set(get_args(FaultKind)):
        raise ValueError(f"unknown fault {sorted(unknown)[0]!r}: choose from {', '.join(get_args(FaultKind))}")
    if min(rates.values(), default=0) < 0 or sum(rates.values()) > 1:
        raise ValueError(f"rates {dict(rates)} must be probabilities that sum to at most 1")
    return _draw(random.Random(seed), rates, seconds)


class FaultyTransport:
    """Applies `faults` to the writes of `inner`, one per write; further writes have no fault.

    `counts` has the number of writes per kind, including "none", and "late landed" for late ones that were written.
    Late and corrupt writes send from memory that is not registered, which works only over tcp.
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

    def submit(self, session: str, segments: Sequence[WriteSegment]) -> "Future[None]":
        with self._lock:
            fault = next(self._faults, None)
            self.counts[fault.kind if fault else "none"] += 1
            position = self._random.random()
        if fault is None:
            return self._inner.submit(session, segments)
        outcome: Future[None] = Future()
        outcome.set_running_or_notify_cancel()
        match fault.kind:
            case "delay":
                self._after(fault.seconds, lambda: _forward(self._inner.submit(session, segments), outcome))
            case "drop":
                outcome.set_result(None)
            case "fail" | "late":
                if fault.kind == "late":
                    memory, copies = _copied(segments)  # the caller may reuse its memory immediately
                    self._after(fault.seconds, lambda: self._write_late(session, copies, memory))
                outcome.set_exception(TransferError(f"write to {session} failed: injected fault {fault.kind!r}"))
            case "corrupt":
                memory, copies = _copied(segments)
                index = int(position * len(memory))
                memory[index] ^= 1 << int(position * 1e6) % 8
                outcome.add_done_callback(lambda _: memory)  # keeps the memory alive until the write ends
                _forward(self._inner.submit(session, copies), outcome)
            case "stall":
                if fault.seconds:
                    error = TransferError(f"write to {session} failed: injected fault 'stall'")
                    self._after(fault.seconds, lambda: outcome.set_exception(error))
        return outcome

    def close(self) -> None:
        """Closes the transport after all delayed and late writes."""
        with self._lock:
            timers = tuple(self._timers)
        for timer in timers:
            timer.join()
        self._inner.close()

    def _write_late(self, session: str, segments: Sequence[WriteSegment], memory: bytearray) -> None:
        def landed(write: "Future[None]", memory: bytearray = memory) -> None:
            with self._lock:
                self.counts["late landed"] += write.exception() is None

        self._inner.submit(session, segments).add_done_callback(landed)

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


def _draw(numbers: random.Random, rates: Mapping[FaultKind, float], seconds: float) -> Iterator[Fault | None]:
    while True:
        drawn, wait = numbers.random(), numbers.random() * seconds
        fault = None
        for kind, rate in rates.items():
            if 0 <= drawn < rate:
                fault = Fault(kind, wait)
            drawn -= rate
        yield fault


def _copied(segments: Sequence[WriteSegment]) -> tuple[bytearray, list[WriteSegment]]:
    memory = bytearray(sum(segment.num_bytes for segment in segments))
    start = ctypes.addressof((ctypes.c_char * len(memory)).from_buffer(memory))
    copies, offset = [], 0
    for segment in segments:
        ctypes.memmove(start + offset, segment.source, segment.num_bytes)
        copies.append(segment._replace(source=start + offset))
        offset += segment.num_bytes
    return memory, copies


def _forward(write: "Future[None]", outcome: "Future[None]") -> None:
    def ended(write: "Future[None]") -> None:
        if error := write.exception():
            outcome.set_exception(error)
        else:
            outcome.set_result(None)

    write.add_done_callback(ended)


def inject_message_faults(fault: Callable[[bytes], Iterable[tuple[float, bytes]]]) -> Any:
    """Patches this process's control sockets: `fault` maps a message to pairs (delay in s, bytes) to send instead."""
    plain = control._send

    def send(socket: Any, prefix: list[bytes], data: bytes) -> None:
        for delay, instead in fault(data):
            asyncio.get_running_loop().call_later(delay, plain, socket, prefix, instead)

    return mock.patch.object(control, "_send", send)
