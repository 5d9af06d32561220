"""Paces refusals while requests are answered, so that what is refused takes little of the time that answers need."""

import asyncio
import math
import time
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

AT_ONCE = 20  # refusals that wait for nothing
PER_SECOND = 20  # those after them
LONGEST_S = 1.0  # that one waits


class PacedRefusals:
    """Delays statuses from 400 to 499, those of all clients together, unless nothing else is being answered.

    A client that sends only what is refused waits for each refusal before it sends more, which bounds what a connection
    costs. What a refused request held is given back before it waits.
    """

    def __init__(self, app: ASGIApp, busy: Callable[[], bool]):
        """
        Args:
            app: what refuses.
            busy: whether requests are being answered.
        """
        self._app, self._busy = app, busy
        self._next = -math.inf  # when the next refusal is due that follows the last one at PER_SECOND

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def paced(message: Message) -> None:
            if message["type"] == "http.response.start" and 400 <= message["status"] < 500 and self._busy():
                await asyncio.sleep(self._seconds(time.monotonic()))
            await send(message)

        await self._app(scope, receive, paced)

    def _seconds(self, now: float) -> float:
        """How long a refusal waits that is made now."""
        self._next = min(max(self._next, now - AT_ONCE / PER_SECOND) + 1 / PER_SECOND, now + LONGEST_S)
        return max(self._next - now, 0.0)
