"""The HTTP endpoints, which are the same on every role: POST /generate, GET /health, GET /v1/models."""

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing, suppress
from typing import Any, Protocol
from urllib.parse import urlsplit

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from deepstack_jax.engine.runner import Chunk, DeadlineError, QueueFullError, RequestFailed, StoppingError
from deepstack_jax.errors import one_line
from deepstack_jax.processing.processor import DecodeStream
from deepstack_jax.processing.stop_strings import StopStrings
from deepstack_jax.serving.policy import MediaError, MediaPolicy
from deepstack_jax.serving.requests import GenerateRequest, RequestError, parse_request

TEXT_BYTES = 16 << 20  # limit of a body without its media, which base64 makes a third longer
BODY_SECONDS = 60.0  # within which a body has to arrive
SLACK_SECONDS = 5.0  # after the deadline, for a client that reads slowly

_log = logging.getLogger(__name__)


class Node(Protocol):
    """What answers requests: a whole model, or one side of the split."""

    role: str
    model_names: Sequence[str]
    control: str | None  # where an encode node's control socket listens

    def generate(self, request: GenerateRequest, deadline: float) -> AsyncGenerator[Chunk]:
        """The chunks of an answer, an async generator: closing it cancels the request. `deadline` is monotonic time.

        Raises:
            RequestError: with the status that the client gets. A ValueError is a 400, a RequestFailed a 500, and its
                subclasses 503 and 504.
        """
        ...

    async def start(self) -> None:
        """Runs the model once, before the first request.

        Raises:
            ValueError: the node is not able to answer, with the reason.
        """
        ...

    async def health(self) -> str | None:
        """None if the node is alive and able to answer, otherwise the reason in one line."""
        ...

    def decode_stream(self) -> DecodeStream:
        """Turns one answer's tokens into text."""
        ...

    def stop(self, grace: float) -> None:
        """Takes no more requests, and ends those that run within `grace` seconds. Returns at once."""
        ...

    async def close(self) -> None:
        """Frees what the node holds, after `stop`."""
        ...


def create_app(node: Node, policy: MediaPolicy, *, max_requests: int = 128, timeout: float = 600.0) -> Starlette:
    """The application of one node.

    Args:
        node: answers the requests.
        policy: bounds the bodies: what media it takes has to come through them.
        max_requests: taken at once; more get a 503.
        timeout: seconds from a request's arrival to its last token.
    """
    started = int(time.time())

    async def health(_request: Request) -> Response:
        reason = await node.health()
        if reason is not None:
            return JSONResponse({"status": "unavailable", "role": node.role, "reason": reason}, 503)
        return JSONResponse({"status": "ok", "role": node.role})

    async def models(_request: Request) -> Response:
        fields = {"object": "model", "created": started, "owned_by": "deepstack-jax"}
        return JSONResponse({"object": "list", "data": [{"id": name, **fields} for name in node.model_names]})

    routes = [
        Route("/generate", _Generate(node, policy, max_requests, timeout), methods=["POST"]),
        _get_route("/health", health),
        _get_route("/v1/models", models),
    ]
    return Starlette(routes=routes, exception_handlers={HTTPException: _refuse_route})


def _get_route(path: str, endpoint: Callable[[Request], Awaitable[Response]]) -> Route:
    route = Route(path, endpoint)
    route.methods = {"GET"}  # Starlette adds HEAD, which this server refuses like any other method
    return route


async def _refuse_route(_request: Request, error: Exception) -> Response:
    """The answer where no route has the path, or none with it has the method."""
    assert isinstance(error, HTTPException)
    message = f"{error.detail}: use POST /generate, GET /health or GET /v1/models"
    return _error_response(RequestError(message, error.status_code, headers=dict(error.headers or {})))


class _Generate:
    """POST /generate as one ASGI coroutine, so that cancelling it also cancels the request."""

    def __init__(self, node: Node, policy: MediaPolicy, max_requests: int, timeout: float):
        self._node = node
        self._max_body = TEXT_BYTES + policy.max_bytes * 4 // 3
        self._max_requests, self._timeout = max_requests, timeout
        self._in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        deadline = time.monotonic() + self._timeout
        begun = False

        async def noting(message: Any) -> None:
            nonlocal begun
            begun = True
            await send(message)

        self._in_flight += 1
        try:
            try:
                if self._in_flight > self._max_requests:
                    raise QueueFullError(f"{self._max_requests} requests are being served already: try again later")
                _check_origin(request)
                parsed = parse_request(await _read_body(request, self._max_body))
            except (RequestError, RequestFailed) as error:
                await _error_response(error)(scope, receive, send)
                return
            await _while_connected(receive, self._respond(parsed, deadline, scope, receive, noting), deadline)
        except ClientDisconnect:
            return
        except DeadlineError as error:
            if not begun:
                await _error_response(error)(scope, receive, send)
        finally:
            self._in_flight -= 1

    async def _respond(
        self, request: GenerateRequest, deadline: float, scope: Scope, receive: Receive, send: Send
    ) -> None:
        answer = _Answer(self._node.decode_stream(), request)
        begun = False
        try:
            async with aclosing(self._node.generate(request, deadline)) as chunks:
                async for chunk in chunks:
                    answer.add(chunk)
                    if request.stream:
                        # only now, so that an error before the first token gets its own status
                        if not begun:
                            await send(_STREAM_START)
                            begun = True
                        await send(_event(msgspec.json.encode(answer.event())))
                    if answer.ended:
                        break
            if not request.stream:
                await JSONResponse(answer.body())(scope, receive, send)
                return
        except Exception as error:
            if not isinstance(error, RequestError | RequestFailed | ValueError):
                _log.exception("a request failed")
            if not begun:
                await _error_response(error)(scope, receive, send)
                return
            await send(_event(msgspec.json.encode({"error": _error_fields(error)})))
        await send(_event(b"[DONE]"))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class _Answer:
    """An unfinished answer in SGLang's shape. It ends with its last chunk, or at a stop string."""

    def __init__(self, pieces: DecodeStream, request: GenerateRequest):
        self.ended = False
        self._pieces = pieces
        self._stop = StopStrings.of(request.sampling_params.stop)
        self._only_new = request.stream_deltas
        self._started = time.monotonic()
        self._text, self._ids = "", []
        self._sent = 0, 0  # characters and tokens that events have had
        self._meta: dict[str, Any] = {"id": request.rid or uuid.uuid4().hex}

    def add(self, chunk: Chunk) -> None:
        for token in chunk.tokens:
            self._ids.append(token)
            self._text += self._stop.feed(self._pieces.feed(token))
            if self._stop.matched is not None:
                break  # tokens after the stop string are not part of the answer
        if chunk.finish_reason is not None and self._stop.matched is None:
            self._text += self._stop.feed(self._pieces.finish()) + self._stop.finish()
        self.ended = chunk.finish_reason is not None or self._stop.matched is not None
        self._meta |= {
            "prompt_tokens": chunk.prompt_tokens,
            "completion_tokens": len(self._ids),
            "finish_reason": self._reason(chunk) if self.ended else None,
        }
        if self.ended:
            self._meta["e2e_latency"] = round(time.monotonic() - self._started, 6)
            self._meta["timings"] = {stage: round(seconds, 6) for stage, seconds in chunk.timings.items()}
            self._meta["cached_tokens"] = chunk.cached_tokens
            if chunk.engine_shape:
                self._meta["engine_shape"] = chunk.engine_shape
            if chunk.transfer_stats is not None:
                self._meta["split"] = chunk.transfer_stats

    def body(self) -> dict[str, Any]:
        return {"text": self._text, "output_ids": self._ids, "meta_info": self._meta}

    def event(self) -> dict[str, Any]:
        """The next event of a stream: the whole answer so far, or only what is new since the last event."""
        if not self._only_new:
            return self.body()
        characters, tokens = self._sent
        self._sent = len(self._text), len(self._ids)
        return {"text": self._text[characters:], "output_ids": self._ids[tokens:], "meta_info": self._meta}

    def _reason(self, chunk: Chunk) -> dict[str, Any]:
        if self._stop.matched is not None:
            return {"type": "stop", "matched": self._stop.matched}
        if chunk.finish_reason == "stop":
            return {"type": "stop", "matched": self._ids[-1]}
        return {"type": "length", "length": len(self._ids)}


_STREAM_START = {
    "type": "http.response.start",
    "status": 200,
    "headers": [
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"cache-control", b"no-cache"),
        (b"x-accel-buffering", b"no"),
    ],
}


def _event(data: bytes) -> dict[str, Any]:
    return {"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": True}


def _check_origin(request: Request) -> None:
    """Refuses pages of other sites, which any browser in reach of this server might show: it has no users."""
    origin = request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
        raise RequestError(f"origin {origin[:100]!r} is another site: send the request from a program", 403)


async def _read_body(request: Request, most: int) -> bytes:
    if (encoding := request.headers.get("content-encoding", "identity").lower()) != "identity":
        raise RequestError(f"content-encoding {encoding[:20]!r} is not supported: send the body as it is", 415)
    too_large = RequestError(f"the body has more than the {most} bytes allowed: send less", 413, code="body_too_large")
    too_large.headers["connection"] = "close"
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            pieces = request.stream()
            async for piece in pieces:
                body += piece
                if len(body) > most:
                    break
            else:
                return bytes(body)
            body.clear()
            with suppress(TimeoutError):
                # a client that is still sending doesn't read the answer, so take some more of its body
                async with asyncio.timeout(2.0):
                    async for _ in pieces:
                        pass
    except TimeoutError:
        raise RequestError(f"the body did not arrive within {BODY_SECONDS:g} s: send it faster", 408) from None
    raise too_large


async def _while_connected(receive: Receive, response: Any, deadline: float) -> None:
    """Runs a response, and cancels it if the client disconnects.

    Raises:
        DeadlineError: it was cancelled after the deadline: the client reads too slowly, or the process stood still.
    """
    task, gone = asyncio.ensure_future(response), asyncio.ensure_future(_disconnected(receive))
    try:
        left = max(deadline - time.monotonic(), 0) + SLACK_SECONDS
        done, _ = await asyncio.wait((task, gone), timeout=left, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)
    if not task.cancelled() and (error := task.exception()) is not None:
        raise error
    if not done:
        raise DeadlineError("no answer in time: ask for less, or try again later")


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _error_fields(error: Exception) -> dict[str, Any]:
    error = _as_request_error(error)
    return {"message": str(error), "type": error.kind, "param": error.param, "code": error.code}


def _error_response(error: Exception) -> Response:
    error = _as_request_error(error)
    return JSONResponse({"error": _error_fields(error)}, error.status, error.headers)


def _as_request_error(error: Exception) -> RequestError:
    match error:
        case RequestError():
            return error
        case MediaError():
            return RequestError(one_line(error), error.status, code="media_refused")
        case ValueError():
            return RequestError(one_line(error))
        case QueueFullError() | StoppingError():
            code = "queue_full" if isinstance(error, QueueFullError) else "stopping"
            return RequestError(str(error), 503, code=code, kind="overloaded_error", headers={"retry-after": "1"})
        case DeadlineError():
            return RequestError(str(error), 504, code="deadline", kind="timeout_error")
        case RequestFailed():
            return RequestError(str(error), 500)
    return RequestError(f"the server failed ({type(error).__name__}): see its log", 500)
