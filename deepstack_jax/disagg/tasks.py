"""The background tasks of a node, none of which ends unseen."""

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

_log = logging.getLogger(__name__)


async def settle(*tasks: asyncio.Future[Any]) -> None:
    """Cancels those that still run, and waits until all have ended. Nobody is told of their errors any more.

    Otherwise asyncio logs the error of a task that failed just before its reader was cancelled.
    """
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class Tasks:
    """Tasks in the event loop in which they are started.

    Attributes:
        failure: why the node can't go on, in one line: the first task that should have run until `cancel` and did not.
            None while all of them run.
    """

    def __init__(self) -> None:
        self.failure: str | None = None
        self._tasks: dict[asyncio.Task[None], None] = {}  # oldest first
        self._cancelled = False

    def __len__(self) -> int:
        return len(self._tasks)

    def keep(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        """Starts work that runs until `cancel`. If it ends before, that is a `failure`."""
        self._start(name, work, kept=True)

    def run(self, name: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Starts work that ends by itself. It may be cancelled; an error is logged."""
        return self._start(name, work, kept=False)

    async def join(self) -> None:
        """Waits until all tasks have ended."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def cancel(self) -> None:
        """Cancels all tasks and waits for them."""
        self._cancelled = True
        for task in self._tasks:
            task.cancel()
        await self.join()

    def _start(self, name: str, work: Coroutine[Any, Any, None], kept: bool) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks[task] = None
        task.add_done_callback(lambda task: self._ended(name, task, kept))
        return task

    def _ended(self, name: str, task: asyncio.Task[None], kept: bool) -> None:
        self._tasks.pop(task, None)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            _log.error("%s failed", name, exc_info=error)
        if kept and not self._cancelled:
            how = "was cancelled" if task.cancelled() else f"failed ({type(error).__name__})" if error else "ended"
            self.failure = self.failure or f"{name} {how}: restart the node"
