"""Threads, locks and executors of the simulated processes: greenlets on the world's clock.

A thread runs until it would block, and goes on after a random delay. Locks are the real ones, because nothing blocks
while it holds one. Code of an event loop must not block: that is a violation, and an error.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from queue import Empty
from typing import Any

import greenlet

from tests.simulation import clock
from tests.simulation.world import Process

Lock = threading.Lock


class Thread:
    """As `threading.Thread`, in the process that makes it."""

    def __init__(
        self,
        target: Callable[..., Any],
        name: str = "",
        args: Iterable[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        daemon: bool = True,
    ):
        self.process = clock.process()
        self.name, self.daemon = name, daemon
        self._call = target, tuple(args), dict(kwargs or {})
        self._greenlet = greenlet.greenlet(self._run, self.process.world.main)
        self._started = self._ended = False
        self._joiners = _Waiters()
        self.process.threads.append(self)

    def start(self) -> None:
        self._started = True
        self.process.after(self.process.delay(), self._greenlet.switch)

    def is_alive(self) -> bool:
        return self._started and not self._ended

    def join(self, timeout: float | None = None) -> None:
        if self.is_alive():
            self._joiners.wait(timeout)

    @property
    def where(self) -> str:
        """The thread's name, and the function of the product in which it waits; "" before it has begun."""
        if not self._greenlet:
            return ""
        frame = self._greenlet.gr_frame
        while frame is not None and "simulation" in frame.f_code.co_filename:
            frame = frame.f_back
        return self.name if frame is None else f"{self.name} in {frame.f_code.co_qualname}:{frame.f_lineno}"

    def _run(self) -> None:
        target, args, kwargs = self._call
        try:
            target(*args, **kwargs)
        except Exception as error:
            self.process.world.violated(self.process.name, "thread", self.name, "died of", repr(error))
        finally:
            self._ended = True
            self.process.threads.remove(self)
            self._joiners.wake()


class _Waiting:
    """One thread that waits."""

    __slots__ = ("ended", "process", "thread", "woken")

    def __init__(self, process: Process, thread: greenlet.greenlet):
        self.process, self.thread = process, thread
        self.woken = self.ended = False

    def expire(self) -> None:
        if not (self.woken or self.ended):
            self.ended = True
            self.thread.switch()


class _Waiters:
    """Threads that wait for the same thing, oldest first."""

    def __init__(self) -> None:
        self._waiting: deque[_Waiting] = deque()

    def wait(self, timeout: float | None = None) -> bool:
        """Blocks the thread that runs now; False after the time-out."""
        process, thread = clock.process(), greenlet.getcurrent()
        main = process.world.main
        if thread is main:
            process.world.violated(process.name, "the event loop's thread would block")
            raise RuntimeError("the event loop's thread would block")
        waiting = _Waiting(process, thread)
        self._waiting.append(waiting)
        if timeout is not None:
            process.after(max(timeout, 0.0), waiting.expire)
        main.switch()
        return waiting.woken

    def wake(self, count: int | None = None) -> None:
        """Wakes the oldest `count` waiting threads, None for all."""
        woken = 0
        while self._waiting and woken != count:
            waiting = self._waiting.popleft()
            if not waiting.ended:
                waiting.woken, woken = True, woken + 1
                waiting.process.after(waiting.process.delay(), waiting.thread.switch)


def sleep(seconds: float) -> None:
    """As `time.sleep`, in a thread."""
    _Waiters().wait(seconds)


class SimpleQueue:
    """As `queue.SimpleQueue`."""

    def __init__(self) -> None:
        self._items: deque[Any] = deque()
        self._waiters = _Waiters()

    def put(self, item: Any) -> None:
        self._items.append(item)
        self._waiters.wake(1)

    def get(self) -> Any:
        while not self._items:
            self._waiters.wait()
        return self._items.popleft()

    def get_nowait(self) -> Any:
        if not self._items:
            raise Empty
        return self._items.popleft()

    def qsize(self) -> int:
        return len(self._items)


class Condition:
    """As `threading.Condition`; a thread is never interrupted while it holds the lock."""

    def __init__(self) -> None:
        self._waiters = _Waiters()

    def __enter__(self) -> bool:
        return True

    def __exit__(self, *_: object) -> None:
        pass

    def wait(self, timeout: float | None = None) -> bool:
        return self._waiters.wait(timeout)

    def notify_all(self) -> None:
        self._waiters.wake()


class Event:
    """As `threading.Event`."""

    def __init__(self) -> None:
        self._set = False
        self._waiters = _Waiters()

    def is_set(self) -> bool:
        return self._set

    def set(self) -> None:
        self._set = True
        self._waiters.wake()

    def wait(self, timeout: float | None = None) -> bool:
        return self._set or self._waiters.wait(timeout)


class ThreadPoolExecutor:
    """As `concurrent.futures.ThreadPoolExecutor`; a thread ends when nothing is left to do."""

    def __init__(self, max_workers: int = 8, thread_name_prefix: str = "worker"):
        self._max_workers, self._name = max_workers, thread_name_prefix
        self._process: Process | None = None
        self._queue: deque[tuple[Future[Any], Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = deque()
        self._running = 0
        self._closed = False
        self._idle = _Waiters()

    def submit(self, call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        if self._closed:
            raise RuntimeError("cannot schedule new futures after shutdown")
        future: Future[Any] = Future()
        self._queue.append((future, call, args, kwargs))
        if self._running < self._max_workers:
            self._running += 1
            Thread(self._work, self._name).start()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._closed = True
        if cancel_futures:
            for future, *_ in self._queue:
                future.cancel()
        if wait and self._running:
            self._idle.wait()

    def _work(self) -> None:
        while self._queue:
            future, call, args, kwargs = self._queue.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                result = call(*args, **kwargs)
            except Exception as error:
                future.set_exception(error)
            else:
                future.set_result(result)
        self._running -= 1
        if not self._running:
            self._idle.wake()
