"""The transport: Mooncake's writes into other processes' memory, which take time, fail, or do half of what they should.

A write's segments land one by one, and each is read from its source when it lands. A write that is reported as failed
may have landed in part, and the rest may land later.
"""

import ctypes
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from deepstack_jax.disagg.transports import TransferError, WriteSegment
from tests.simulation.threads import Condition
from tests.simulation.world import Process, World

PROGRESS_TIMEOUT_S = 10.0  # a write to a peer that is gone or frozen fails after this long at most


@dataclass
class Rates:
    """How writes go: the probability of each fault, and the seconds that a segment takes at most."""

    seconds: float = 0.002
    fail: float = 0.0  # part of it lands
    late: float = 0.0  # it is reported as failed, and lands later
    drop: float = 0.0  # it is reported as done, and part of it never lands
    damage: float = 0.0  # one bit arrives changed
    stall: float = 0.0  # it fails only after PROGRESS_TIMEOUT_S


@dataclass
class Memories:
    """The registered memory of all processes, by session.

    `watch` is called with (process, session, segments) as a write begins.
    """

    world: World
    rates: Rates = field(default_factory=Rates)
    open: dict[str, "SimulatedTransport"] = field(default_factory=dict)
    faults: dict[str, int] = field(default_factory=dict)  # by kind
    when: list[tuple[float, int, str]] = field(default_factory=list)  # of each fault: (time, weight, session)
    watch: Callable[[Process, str, Sequence[WriteSegment]], None] = lambda *_: None
    sessions: int = 0

    def draw(self, session: str, weight: int) -> str:
        """The fault of the next write, "" for none; it may harm `weight` blocks."""
        place = self.world.dice.random()
        for kind in ("fail", "late", "drop", "damage", "stall"):
            place -= getattr(self.rates, kind)
            if place < 0:
                self.faults[kind] = self.faults.get(kind, 0) + 1
                self.when.append((self.world.now, weight, session))
                return kind
        return ""


class SimulatedTransport:
    """A `Transport` of one process."""

    def __init__(self, memories: Memories, process: Process, needs_registered_sources: bool = False):
        self.needs_registered_sources = needs_registered_sources
        self._memories, self._process = memories, process
        memories.sessions += 1
        self.session = f"10.0.0.{memories.sessions}:{memories.sessions}"
        self.registered: dict[int, np.ndarray] = {}
        self.in_flight = 0
        self.closed = False
        self._quiet = Condition()
        memories.open[self.session] = self
        process.at_kill.append(self._drop)

    def register(self, memory: np.ndarray) -> None:
        self.registered[memory.ctypes.data] = memory

    def unregister(self, memory: np.ndarray) -> None:
        if self.registered.pop(memory.ctypes.data, None) is None and not self.closed:
            self._memories.world.violated(self._process.name, "unregistered memory that is not registered")

    def submit(self, session: str, segments: Sequence[WriteSegment]) -> "Future[None]":
        future: Future[None] = Future()
        future.set_running_or_notify_cancel()
        if self.closed:
            future.set_exception(TransferError("the transport is closed"))
            return future
        for segment in segments if self.needs_registered_sources else ():
            if not self.holds(segment.source, segment.num_bytes):
                self._memories.world.violated(self._process.name, "wrote from memory that is not registered")
        self.in_flight += 1
        self._memories.watch(self._process, session, segments)
        _Write(self._memories, self._process, self, session, list(segments), future).begin()
        return future

    def holds(self, address: int, num_bytes: int) -> bool:
        """Whether these bytes are registered."""
        return any(
            start <= address and address + num_bytes <= start + memory.nbytes
            for start, memory in self.registered.items()
        )

    def close(self) -> None:
        self.closed = True
        while self.in_flight:
            self._quiet.wait()
        self.registered.clear()
        self._memories.open.pop(self.session, None)

    def end(self) -> None:
        """A write has ended."""
        self.in_flight -= 1
        if not self.in_flight:
            self._quiet.notify_all()

    def _drop(self) -> None:
        self.closed = True
        self._memories.open.pop(self.session, None)


class _Write:
    """One write on its way."""

    def __init__(
        self,
        memories: Memories,
        process: Process,
        transport: SimulatedTransport,
        session: str,
        segments: list[WriteSegment],
        future: "Future[None]",
    ):
        self.memories, self.process, self.transport = memories, process, transport
        self.session, self.segments, self.future = session, segments, future
        self.fault = ""
        self.victim = -1  # the segment that the fault is about
        self.copies: list[bytes] = []  # of the sources, for a write that lands after it has failed

    def begin(self) -> None:
        dice, rates = self.memories.world.dice, self.memories.rates
        self.fault = self.memories.draw(self.session, len(self.segments))
        if self.fault:
            self.victim = dice.randrange(len(self.segments))
        seconds = dice.random() * rates.seconds
        if self.fault == "stall":
            self._later(PROGRESS_TIMEOUT_S, self._end, False)
        elif self.fault == "late":
            self.copies = [ctypes.string_at(source, num_bytes) for source, _, num_bytes in self.segments]
            self._later(seconds, self._end, False)
            self._later(seconds + dice.random() * 3.0, self._land_all)
        else:
            self._later(seconds, self._step, 0)

    def _later(self, seconds: float, call: Callable[..., None], *args: object) -> None:
        self.process.after(seconds, call, *args)

    def _step(self, number: int) -> None:
        """Lands one segment, then the next."""
        peer = self.memories.open.get(self.session)
        if peer is None:
            self._later(self.memories.world.dice.random() * PROGRESS_TIMEOUT_S, self._end, False)
            return
        if number == self.victim and self.fault == "fail":
            self._end(False)
            return
        if not (number >= self.victim >= 0 and self.fault == "drop") and not self._land(peer, number):
            self._end(False)
            return
        if number + 1 < len(self.segments):
            dice = self.memories.world.dice
            if dice.random() < 0.05:
                self._later(dice.random() * self.memories.rates.seconds, self._step, number + 1)
            else:
                self._step(number + 1)
        else:
            self._end(True)

    def _land_all(self) -> None:
        if peer := self.memories.open.get(self.session):
            for number in range(len(self.segments)):
                self._land(peer, number)

    def _land(self, peer: SimulatedTransport, number: int) -> bool:
        """False if the peer has not registered this memory, or no longer."""
        source, destination, num_bytes = self.segments[number]
        if not peer.holds(destination, num_bytes):
            return False
        ctypes.memmove(destination, self.copies[number] if self.copies else source, num_bytes)
        if number == self.victim and self.fault == "damage":
            place = destination + self.memories.world.dice.randrange(num_bytes)
            byte = ctypes.c_ubyte.from_address(place)
            byte.value ^= 1 << self.memories.world.dice.randrange(8)
        return True

    def _end(self, done: bool) -> None:
        self.transport.end()
        if done:
            self.future.set_result(None)
        else:
            self.future.set_exception(TransferError(f"write to {self.session} failed: the peer is gone or stopped"))
