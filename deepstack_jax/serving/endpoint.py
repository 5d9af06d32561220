"""What all endpoints share: bodies with bounds, answers in one piece or as server-sent events, and how requests end."""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from deepstack_jax.config import ModelConfig
from deepstack_jax.disagg.tasks import settle
from deepstack_jax.engine.runner import Chunk, DeadlineError, QueueFullError, RequestFailed, StoppingError
from deepstack_jax.processing.processor import DecodeStream
from deepstack_jax.serving.bodies import Bodies
from deepstack_jax.serving.cluster import Cluster
from deepstack_jax.serving.errors import OVERLOADED, RequestError, error_fields, error_response, reported, retry_after
from deepstack_jax.serving.metrics import Metrics
from deepstack_jax.serving.parsing import TEXT_BYTES, to_json
from deepstack_jax.serving.policy import MediaPolicy
from deepstack_jax.serving.readings import Reading
from deepstack_jax.serving.requests import GenerateRequest

SLACK_SECONDS = 5.0  # after the deadline, for a client that reads slowly
LOADING_RETRY_SECONDS = 5
NO_HEADERS: Mapping[str, str] = MappingProxyType({})


class Node(Protocol):
    """What answers requests: a whole model, or one side of the split."""

    role: str
    model_names: Sequence[str]
    control: str | None  # where an encode node's control socket listens

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and answer at most."""
        ...

    @property
    def config(self) -> ModelConfig:
        """The model's configuration."""
        ...

    def generate(
        self,
        request: GenerateRequest,
        deadline: float,
        tenant: str = "",
        headers: Mapping[str, str] = NO_HEADERS,
        ended: Collection[int] = (),
    ) -> AsyncGenerator[Chunk]:
        """The chunks of an answer, an async generator: closing it cancels the request.

        Args:
            request: what `parse_request` returned.
            deadline: on time.monotonic()'s clock.
            tenant: whose request it is.
            headers: those of the client; a node that passes the request on sends some of them along.
            ended: numbers of choices of which the caller, who may add to them at any time, wants no more.

        Raises:
            RequestError: with the status that the client gets. A ValueError is a 400, a RequestFailed a 500, and its
                subclasses 503 and 504.
        """
        ...

    async def start(self) -> None:
        """Compiles and runs the model, before the first request.

        Raises:
            ValueError: the node is not able to answer, with the reason.
        """
        ...

    def dead(self) -> str | None:
        """Why this process can't go on, in one line; None if it can. It returns at once."""
        ...

    def load(self) -> Mapping[str, float]:
        """Figures that `/health` shows beside the state. It returns at once."""
        ...

    async def unable(self) -> str | None:
        """Why the node should get no requests now, in one line; None if it should."""
        ...

    async def self_test(self) -> str | None:
        """Runs the model unless it has run just now; the reason in one line if it fails, otherwise None."""
        ...

    def readings(self) -> Iterable[Reading]:
        """Numbers for the metrics."""
        ...

    def cluster(self) -> Cluster:
        """What the node tells of itself and of the nodes that it is linked with. It returns at once."""
        ...

    def describe(self) -> dict[str, Any]:
        """What the node runs, in values that JSON has."""
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


@dataclass
class Service:
    """A node, and the limits that its endpoints share.

    Attributes:
        loaded: the node, None until it is ready.
        policy: bounds the bodies: what media it takes has to come through them.
        max_requests: answered at once; more get a 503.
        timeout: seconds from a request's arrival to its last token.
        origins: other sites whose pages may call, "*" for all.
        draining: whether the server takes no more requests, and only finishes those that it has.
        research: whether requests may look into the model and change it (see `research`).
        since: time.monotonic() when it began to load, or was ready.
    """

    loaded: Node | None
    policy: MediaPolicy
    max_requests: int = 128
    timeout: float = 600.0
    origins: Collection[str] = ()
    draining: bool = False
    research: bool = False
    metrics: Metrics = field(default_factory=Metrics)
    started: int = field(default_factory=lambda: int(time.time()))
    in_flight: int = 0
    since: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self._ended = asyncio.Event()
        self.bodies = Bodies(TEXT_BYTES + self.policy.max_bytes * 4 // 3)

    @property
    def node(self) -> Node:
        """Answers the requests.

        Raises:
            RequestError: 503 while it is loading.
        """
        if self.loaded is None:
            headers = {"retry-after": retry_after(LOADING_RETRY_SECONDS)}
            raise RequestError("the model is loading: try again later", 503, None, "loading", OVERLOADED, headers)
        return self.loaded

    def open(self, node: Node) -> None:
        """Answers requests from here on."""
        self.metrics.ready()
        self.loaded, self.since = node, time.monotonic()

    def check_open(self) -> None:
        """
        Raises:
            RequestError: the node is loading.
            StoppingError: the server is draining.
            QueueFullError: as many requests as are taken at once are being answered.
        """
        if self.node and self.draining:
            raise StoppingError(_DRAINING)
        if self.in_flight >= self.max_requests:
            raise QueueFullError(f"{self.max_requests} requests are being served already: try again later")

    def drain(self) -> None:
        """Takes no more requests, also of those whose bodies are still arriving."""
        self.draining = True
        self.bodies.refuse_all(StoppingError(_DRAINING))

    def end(self) -> None:
        """Ends the requests that are still answered, wherever they are: the node ends those that it runs."""
        self._ended.set()

    async def while_open(self, receive: Receive, response: Awaitable[None], deadline: float) -> None:
        """Runs a response, and cancels it if the client disconnects.

        Raises:
            DeadlineError: it was cancelled after the deadline: the client reads too slowly, or the process stood still.
            StoppingError: it was cancelled by `end`.
        """
        task, *others = map(asyncio.ensure_future, (response, _disconnected(receive), self._ended.wait()))
        try:
            left = max(deadline - time.monotonic(), 0) + SLACK_SECONDS
            done, _ = await asyncio.wait((task, *others), timeout=left, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await settle(task, *others)
        if not task.cancelled() and (error := task.exception()) is not None:
            raise error
        if not done:
            raise DeadlineError("no answer in time: ask for less, or try again later")
        if task.cancelled() and self._ended.is_set():
            raise StoppingError("the server is stopping: send the request to another one")

    async def generate(
        self, request: GenerateRequest, call: "Call", ended: Collection[int] = ()
    ) -> AsyncGenerator[Chunk]:
        """The chunks of the node's answer; every endpoint takes them from here. See `Node.generate`."""
        headers = {**call.headers, "x-request-id": call.id}
        chunks = self.node.generate(request, call.deadline, call.tenant, headers, ended)
        with self.metrics.answer() as answer:
            async with aclosing(chunks):
                async for chunk in chunks:
                    prompt = 0 if answer.begun else chunk.prompt_tokens
                    answer.add(chunk)
                    call.tokens.add(prompt, len(chunk.tokens))
                    yield chunk


_DRAINING = "the server takes no more requests: send the request to another one"


@dataclass
class TokenCount:
    """Tokens of one call, counted as its chunks come.

    Attributes:
        prompt, completion: so far.
        charge: called with each number of tokens, for the limits of the caller.
    """

    prompt: int = 0
    completion: int = 0
    charge: Callable[[int], None] | None = None

    def add(self, prompt: int, completion: int) -> None:
        """Counts tokens that were used."""
        self.prompt += prompt
        self.completion += completion
        if self.charge:
            self.charge(prompt + completion)


@dataclass(frozen=True)
class Call:
    """One HTTP request whose body has arrived.

    Attributes:
        deadline: on time.monotonic()'s clock.
        id: the client's `X-Request-Id`, or one of our own.
        tenant: whose request it is: tenants take turns, and don't share prefix caches.
        tokens: counts what the call uses.
    """

    body: bytes | bytearray
    headers: Headers
    deadline: float
    id: str
    tenant: str = ""
    tokens: TokenCount = field(default_factory=TokenCount)


class Reply:
    """The answer to a call: a whole response, or a stream that begins with its first event.

    The start is delayed so that an error before the first token gets its own status.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send):
        self.begun = False
        self.refusal: Response | None = None  # to be sent once the request holds nothing any more
        self._scope, self._receive, self._send = scope, receive, send

    async def whole(self, response: Response) -> None:
        """Sends a response that is not a stream."""
        await response(self._scope, self._receive, self._noting)

    async def json(self, make: Callable[[], Any]) -> None:
        """Sends `make()` as JSON. Both are made in a thread, since an answer may be long."""
        body = await asyncio.to_thread(lambda: to_json(make()))
        await self.whole(Response(body, media_type="application/json"))

    async def event(self, data: Any, name: str | None = None) -> None:
        """Sends one server-sent event: JSON of `data`, or a str as it is."""
        if not self.begun:
            await self._noting(_STREAM_START)
        text = data.encode() if isinstance(data, str) else to_json(data)
        named = f"event: {name}\n".encode() if name else b""
        await self._send({"type": "http.response.body", "body": named + b"data: " + text + b"\n\n", "more_body": True})

    async def end(self) -> None:
        """Ends a stream."""
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _noting(self, message: Message) -> None:
        self.begun = True
        await self._send(message)


_STREAM_START = {
    "type": "http.response.start",
    "status": 200,
    "headers": [
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"cache-control", b"no-cache"),
        (b"x-accel-buffering", b"no"),
    ],
}

Respond = Callable[[Call, Reply], Awaitable[None]]


class Endpoint:
    """A POST endpoint as one ASGI coroutine, so that cancelling it also cancels the request."""

    def __init__(self, service: Service, respond: Respond):
        self._service, self._respond = service, respond

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        service, request, reply = self._service, Request(scope, receive), Reply(scope, receive, send)
        deadline = time.monotonic() + service.timeout
        try:
            try:
                service.check_open()
                _check_origin(request, service.origins)
                body = await service.bodies.read(request)
                service.check_open()  # again: a request counts from here, so bodies that never come keep nobody out
            except (RequestError, RequestFailed) as error:
                await reply.whole(error_response(error))
                return
            state = scope.get("state", {})
            id, tenant = state.get("request_id") or uuid.uuid4().hex, state.get("tenant", "")
            call = Call(body, request.headers, deadline, id, tenant, state.get("tokens") or TokenCount())
            service.in_flight += 1
            try:
                await service.while_open(receive, self._answer(call, reply), deadline)
            finally:
                service.in_flight -= 1
            del body, call
            if reply.refusal:
                await reply.whole(reply.refusal)
        except ClientDisconnect:
            return
        except (DeadlineError, StoppingError) as error:
            if not reply.begun:
                await reply.whole(error_response(error))

    async def _answer(self, call: Call, reply: Reply) -> None:
        """Responds; an error becomes `reply.refusal`, or the last event of a stream that has begun."""
        try:
            await self._respond(call, reply)
        except Exception as error:
            error = reported(error)
            if not reply.begun:
                reply.refusal = error_response(error)
                return
            await reply.event({"error": error_fields(error)})
            await reply.event("[DONE]")
            await reply.end()


def get_route(path: str, endpoint: Callable[[Request], Awaitable[Response]]) -> Route:
    """A route for GET alone: Starlette would add HEAD."""
    route = Route(path, endpoint)
    route.methods = {"GET"}
    return route


def _check_origin(request: Request, allowed: Collection[str]) -> None:
    """Refuses pages of other sites, which any browser in reach of this server might show."""
    origin = request.headers.get("origin")
    if origin is None or origin in allowed or "*" in allowed:
        return
    try:
        netloc = urlsplit(origin).netloc
    except ValueError:  # an address that is none
        netloc = ""
    if netloc != request.headers.get("host", ""):
        raise RequestError(f"origin {origin[:100]!r} is another site: send the request from a program", 403)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
