"""Virtual time, the processes of the cluster, and their event loops.

Nothing runs by itself: `World.run` takes the next event of one heap, and whatever is due at the same time comes in an
order that the seed decides. Each process has an event loop of its own, whose callbacks run in the order that asyncio
promises; how long each pass over them takes, and which process comes first, is random. The same seed gives the same
events, in any process and at any speed of the machine.
"""

import asyncio
import heapq
import random
from asyncio import events
from collections import deque
from collections.abc import Callable
from contextvars import Context
from typing import Any

import greenlet
import xxhash

START_S = 1_000.0  # the world's clock begins here, so that no process has a negative time


class Violation(AssertionError):
    """A promise that the product did not keep."""


class World:
    """The clock, the events to come, the dice, and the history.

    Attributes:
        now: seconds.
        dice: every random choice of a run comes from here.
        current: the process whose code runs now, None between events.
        violations: what went wrong so far, in words.
        trace: the history in words, if it is kept.
    """

    def __init__(self, seed: int, keep_trace: bool = False):
        self.seed, self.now = seed, START_S
        self.dice = random.Random(seed)
        self.current: Process | None = None
        self.violations: list[str] = []
        self.trace: list[str] | None = [] if keep_trace else None
        self.num_events = 0
        self.main = greenlet.getcurrent()
        self._heap: list[tuple[float, float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._number = 0
        self._digest = xxhash.xxh3_128()

    def after(self, seconds: float, call: Callable[..., None], *args: Any) -> None:
        """Calls `call(*args)` in `seconds`."""
        self._number += 1
        heapq.heappush(self._heap, (self.now + seconds, self.dice.random(), self._number, call, args))

    def note(self, *what: Any) -> None:
        """Adds an event to the history."""
        line = f"{self.now:.6f} {' '.join(map(str, what))}"
        self._digest.update(line.encode())
        self.num_events += 1
        if self.trace is not None:
            self.trace.append(line)

    def violated(self, *what: Any) -> None:
        """Notes a broken promise; the run goes on."""
        self.note("VIOLATION", *what)
        self.violations.append(f"{self.now:.3f} s: {' '.join(map(str, what))}")

    @property
    def digest(self) -> str:
        """A digest of the history."""
        return self._digest.hexdigest()

    def run(self, seconds: float) -> None:
        """Lets the next seconds pass."""
        heap, limit = self._heap, self.now + seconds
        while heap and heap[0][0] <= limit:
            when, _, _, call, args = heapq.heappop(heap)
            if when > self.now:
                self.now = when
            call(*args)
        self.now = limit


class Process:
    """One process of the cluster, from its start to its end. A restarted node is another process.

    Attributes:
        name: unique to this start.
        offset: seconds by which its monotonic clock differs from the world's.
        slowness: seconds that a pass of its event loop, or a step of a thread, takes at most as a rule.
    """

    def __init__(self, world: World, name: str, slowness: float = 2e-4, hiccups: float = 0.0):
        self.world, self.name = world, name
        self.offset = world.dice.random() * 500
        self.slowness, self.hiccups = slowness, hiccups
        self.alive = True
        self.loop = VirtualLoop(self)
        self.at_kill: list[Callable[[], None]] = []
        self.threads: list[Any] = []
        self._frozen_until = 0.0
        self._waiting: list[tuple[Callable[..., None], tuple[Any, ...]]] = []  # what came while it was frozen
        world.note("start", name)

    def delay(self) -> float:
        """How long the process takes until it goes on."""
        dice = self.world.dice
        if self.hiccups and dice.random() < self.hiccups:
            return dice.random() * 0.2
        return dice.random() * self.slowness

    def after(self, seconds: float, call: Callable[..., None], *args: Any) -> None:
        """As `World.after`, in this process: not while it is frozen, and never once it is dead."""
        if self.alive:
            self.world.after(seconds, self._enter, call, args)

    def _enter(self, call: Callable[..., None], args: tuple[Any, ...]) -> None:
        world = self.world
        if not self.alive:
            return
        if self._frozen_until > world.now:
            self._waiting.append((call, args))
            return
        world.current = self
        try:
            call(*args)
        finally:
            world.current = None

    def freeze(self, seconds: float) -> None:
        """Stops everything in the process for a time, as SIGSTOP does."""
        self.world.note("freeze", self.name, f"{seconds:.3f}")
        self._frozen_until = max(self._frozen_until, self.world.now + seconds)
        self.world.after(seconds, self._thaw)

    def _thaw(self) -> None:
        if self._frozen_until <= self.world.now:
            waiting, self._waiting = self._waiting, []
            for call, args in waiting:
                self._enter(call, args)

    def kill(self) -> None:
        """Ends the process at once: its tasks and threads stay where they are, and its memory is gone."""
        if self.alive:
            self.world.note("kill", self.name)
            self.alive = False
            for call in self.at_kill:
                call()


class VirtualLoop(asyncio.BaseEventLoop):
    """The event loop of one process, on the world's clock."""

    def __init__(self, process: Process):
        self.process, self._world = process, process.world
        super().__init__()
        self._queue: deque[events.Handle] = deque()
        self._awake = False
        self.set_exception_handler(self._report)

    def time(self) -> float:
        return self._world.now + self.process.offset

    def call_soon(self, callback: Any, *args: Any, context: Context | None = None) -> events.Handle:
        handle = events.Handle(callback, args, self, context)
        if self.process.alive:
            self._queue.append(handle)
            self._wake()
        return handle

    call_soon_threadsafe = call_soon

    def call_at(self, when: float, callback: Any, *args: Any, context: Context | None = None) -> events.TimerHandle:
        timer = events.TimerHandle(when, callback, args, self, context)
        self.process.after(max(when - self.time(), 0.0), self._due, timer)
        return timer

    def call_later(self, delay: float, callback: Any, *args: Any, context: Context | None = None) -> Any:
        return self.call_at(self.time() + delay, callback, *args, context=context)

    def _timer_handle_cancelled(self, handle: events.TimerHandle) -> None:
        """A cancelled timer is left in the world's heap until it is due."""

    def is_running(self) -> bool:
        return self._world.current is self.process

    def get_debug(self) -> bool:
        return False

    def _due(self, timer: events.TimerHandle) -> None:
        if not timer._cancelled:
            self._queue.append(timer)
            self._wake()

    def _wake(self) -> None:
        if not self._awake:
            self._awake = True
            self.process.after(self.process.delay(), self._pass)

    def _pass(self) -> None:
        """Runs the callbacks that are ready now, as one turn of asyncio's own loop."""
        self._awake = False
        queue, process = self._queue, self.process
        events._set_running_loop(self)
        try:
            for _ in range(len(queue)):
                handle = queue.popleft()
                if not handle._cancelled:
                    handle._run()
                if not process.alive:
                    return
        finally:
            events._set_running_loop(None)
        if queue:
            self._wake()

    def _report(self, _: Any, context: dict[str, Any]) -> None:
        if self.process.alive:
            error = context.get("exception")
            self._world.violated(self.process.name, context["message"], repr(error))
