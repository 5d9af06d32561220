"""A bounded pool of daemon threads, for calls that may hang: neither other work nor the end of the process waits.

`in_thread_or_here` is for calls that have to be made even if no thread can be started.
"""

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from deepstack_jax.errors import shortage


class DaemonThreads:
    """Runs calls in at most `most` threads, which end once nothing is left to do.

    `concurrent.futures` joins its threads when the interpreter exits, and `asyncio.to_thread` shares one pool among
    everything: a name server or a disk that doesn't answer would stop both.
    """

    def __init__(self, name: str, most: int):
        self._name, self._most = name, most
        self._lock = threading.Lock()
        self._waiting: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._running = 0

    def submit[T](self, call: Callable[[], T]) -> "Future[T]":
        """Runs `call` once a thread is free, unless the future is cancelled before.

        Raises:
            RuntimeError: there is no thread, and none can be started.
        """
        future: Future[T] = Future()
        with self._lock:
            if self._running < self._most:
                try:
                    threading.Thread(target=self._work, name=self._name, daemon=True).start()
                    self._running += 1
                except RuntimeError:
                    if not self._running:
                        raise
            self._waiting.append((future, call))
        return future

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._running -= 1
                    return
                future, call = self._waiting.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                result = call()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)
            del future, call  # nothing is kept alive while the thread waits for the lock


async def in_thread_or_here(call: Callable[[], object]) -> None:
    """Runs `call` in a thread if one is free or can be started, otherwise here: what closes something must not fail."""
    left = [call]

    def run() -> None:
        while left:  # asyncio may also keep what it refused, until a thread is free
            left.pop()()

    try:
        await asyncio.to_thread(run)
    except RuntimeError as error:
        if shortage(error) != "threads":
            raise
        run()
