"""Reads the bodies of requests within bounds: bytes per body, bytes of all that arrive at once, and a least rate."""

import asyncio
from dataclasses import dataclass, field

from starlette.requests import Request

from deepstack_jax.engine.runner import QueueFullError
from deepstack_jax.serving.errors import RequestError

BODY_SECONDS = 60.0  # within which a body has to arrive
GRACE_SECONDS = 10.0  # after which a body has to have come at LEAST_RATE on average
LEAST_RATE = 4 << 10  # bytes per second
BODIES_AT_ONCE = 8  # of the largest size, whose bytes all arriving bodies may have together


@dataclass(eq=False)
class _Arriving:
    bound: asyncio.Timeout
    data: bytearray = field(default_factory=bytearray)
    refusal: Exception | None = None


class Bodies:
    """The bodies that are arriving.

    Where they hold too many bytes together, the largest of them is refused: a client that sends little is never kept
    out by others that send much.
    """

    def __init__(self, most: int):
        """
        Args:
            most: bytes of one body at most.
        """
        self._most = most
        self._held = 0  # bytes
        self._arriving: set[_Arriving] = set()

    async def read(self, request: Request) -> bytearray:
        """Returns the body of a request.

        Raises:
            RequestError: it is encoded, too large, or too slow.
            QueueFullError: it is the largest of those that hold too many bytes together.
            ClientDisconnect: the client went away.
        """
        encoding = request.headers.get("content-encoding", "identity").lower()
        if encoding != "identity":
            raise RequestError(f"content-encoding {encoding[:20]!r} is not supported: send the body as it is", 415)
        if int(request.headers.get("content-length", 0)) > self._most:  # h11 has checked that it is a number
            raise self._too_large()
        bound = asyncio.timeout(min(BODY_SECONDS, GRACE_SECONDS))
        body = _Arriving(bound)
        self._arriving.add(body)
        try:
            async with bound:
                return await self._read(request, body)
        except TimeoutError:
            reason = f"the body came at less than {LEAST_RATE} bytes per second, or in more than {BODY_SECONDS:g} s"
            raise body.refusal or RequestError(f"{reason}: send it faster", 408) from None
        finally:
            self._arriving.remove(body)
            self._held -= len(body.data)

    def refuse_all(self, error: Exception) -> None:
        """Ends the reading of all bodies with an error."""
        for body in self._arriving:
            self._refuse(body, error)

    async def _read(self, request: Request, body: _Arriving) -> bytearray:
        started = asyncio.get_running_loop().time()
        async for piece in request.stream():
            if body.refusal:
                break
            body.data += piece
            self._held += len(piece)
            if len(body.data) > self._most:
                raise self._too_large()
            body.bound.reschedule(started + min(BODY_SECONDS, GRACE_SECONDS + len(body.data) / LEAST_RATE))
            while self._held > BODIES_AT_ONCE * self._most:
                largest = max(self._arriving, key=lambda each: len(each.data))
                self._refuse(largest, QueueFullError("the bodies of too many requests are arriving: try again later"))
        if body.refusal:
            raise body.refusal
        return body.data

    def _refuse(self, body: _Arriving, error: Exception) -> None:
        self._held -= len(body.data)
        body.data.clear()
        body.refusal = error
        if not body.bound.expired():
            body.bound.reschedule(0.0)  # wakes the task that waits for the next piece

    def _too_large(self) -> RequestError:
        message = f"the body has more than the {self._most} bytes allowed: send less"
        return RequestError(message, 413, code="body_too_large")
