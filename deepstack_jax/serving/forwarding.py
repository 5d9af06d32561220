"""Passes requests on to language nodes: if one is lost before its answer has begun, another one gets the request."""

import asyncio
import itertools
import logging
import socket
import ssl
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import httpx
import msgspec

from deepstack_jax.disagg.tasks import Tasks, settle
from deepstack_jax.engine.runner import DeadlineError
from deepstack_jax.errors import one_line
from deepstack_jax.serving.errors import RequestError

CONNECT_SECONDS = 3.0  # including TLS
WRITE_SECONDS = 10.0  # without progress, of a request's body
IDLE_SECONDS = 2.0  # a connection is kept for; servers close theirs after 5 s
MAX_EVENT = 64 << 20  # bytes of a server-sent event
EVENT_STREAM = "text/event-stream"

# a machine that is gone closes no connection: the kernel asks it, and gives up after about nine seconds
_KEEP_ALIVE = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)] + [
    (socket.IPPROTO_TCP, getattr(socket, name), value)
    for name, value in (("TCP_KEEPIDLE", 3), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 3), ("TCP_USER_TIMEOUT", 9000))
    if hasattr(socket, name)
]

_log = logging.getLogger(__name__)


class LanguageNode(Protocol):
    """A language node that is connected to this encode node."""

    @property
    def name(self) -> str:
        """Identifies this start of it."""
        ...

    @property
    def http_url(self) -> str:
        """Of its HTTP server; empty if it has none."""
        ...

    @property
    def gone(self) -> "asyncio.Future[None]":
        """Ends when it leaves, or counts as gone because it is silent."""
        ...


@dataclass(frozen=True)
class Answer:
    """A language node's answer, of which something has arrived.

    Attributes:
        status, headers: of the response.
        parts: its body: whole server-sent events with the empty line at their end, or all of it at once. The iterator
            raises RequestError if the node is lost, and DeadlineError. Close it.
    """

    status: int
    headers: httpx.Headers
    parts: AsyncGenerator[bytes]


class _LostError(Exception):
    """The language node is gone, or its answer has ended early."""


class Forwarder:
    """Connections to language nodes, in a pool for each, so that one that hangs takes none from the others."""

    def __init__(self, nodes: Callable[[], Sequence[LanguageNode]], verify: ssl.SSLContext | bool = True):
        """
        Args:
            nodes: those that are connected now.
            verify: how their certificates are checked; True trusts the usual authorities.
        """
        self._nodes = nodes
        self._verify = httpx.create_ssl_context() if verify is True else verify  # once: it takes long
        self._clients: dict[str, httpx.AsyncClient] = {}
        self._turns = itertools.count()
        self._closing = Tasks()

    async def send(self, path: str, body: bytes, headers: Mapping[str, str], deadline: float) -> Answer:
        """Returns the answer of a language node to a POST, once its first part has arrived.

        A node that can't be reached, leaves, answers 503 or ends early is followed by the next one.

        Raises:
            RequestError: no language node is connected, or none of them has answered.
            DeadlineError: the deadline has passed.
        """
        error = RequestError("no language node is connected: try again later", 503)
        tried, turn = set[str](), next(self._turns)
        while (node := self._next(tried, turn)) is not None:
            tried.add(node.http_url)
            parts = self._exchange(node, path, body, headers, deadline)
            try:
                response = await anext(parts)
                assert isinstance(response, httpx.Response)
                first = await anext(parts)
                assert isinstance(first, bytes)
                if response.status_code != 503:
                    return Answer(response.status_code, response.headers, _joined(first, parts))
                error = refusal(503, first, response.headers.get("retry-after"))
            except (_LostError, StopAsyncIteration) as lost:
                _log.warning("a request is not answered by %s: %s", node.name, one_line(lost))
                reason = "the language node can't be reached: try again later"
                error = RequestError(reason, 503)
            except BaseException:
                await parts.aclose()
                raise
            await parts.aclose()
        raise error

    async def close(self) -> None:
        """Closes all connections."""
        for client in self._clients.values():
            await client.aclose()
        await self._closing.join()

    def _next(self, tried: set[str], turn: int) -> LanguageNode | None:
        """The node whose turn it is, of those that have not been tried."""
        nodes = [node for node in self._nodes() if node.http_url and node.http_url not in tried]
        return nodes[turn % len(nodes)] if nodes else None

    def _client(self, node: LanguageNode) -> httpx.AsyncClient:
        client = self._clients.get(node.name)
        if client is None:
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=16, keepalive_expiry=IDLE_SECONDS)
            transport = httpx.AsyncHTTPTransport(
                verify=self._verify, trust_env=False, limits=limits, socket_options=_KEEP_ALIVE
            )
            # reading waits for the node to be gone, or for the deadline
            timeout = httpx.Timeout(None, connect=CONNECT_SECONDS, write=WRITE_SECONDS)
            client = httpx.AsyncClient(transport=transport, timeout=timeout, trust_env=False)
            self._clients[node.name] = client
            node.gone.add_done_callback(lambda _: self._close_client(node.name))
        return client

    def _close_client(self, name: str) -> None:
        if client := self._clients.pop(name, None):
            self._closing.run("closing connections", client.aclose())

    async def _exchange(
        self, node: LanguageNode, path: str, body: bytes, headers: Mapping[str, str], deadline: float
    ) -> AsyncGenerator[httpx.Response | bytes]:
        """The response, then the parts of its body."""
        client = self._client(node)
        headers = {"accept-encoding": "identity", **headers}
        request = client.build_request("POST", node.http_url + path, content=body, headers=headers)
        response = await _unless_gone(client.send(request, stream=True), node, deadline)
        try:
            yield response
            if not response.headers.get("content-type", "").startswith(EVENT_STREAM):
                yield await _unless_gone(response.aread(), node, deadline)
                return
            pieces, buffer = response.aiter_raw(), bytearray()
            with suppress(StopAsyncIteration):
                while True:
                    buffer += await _unless_gone(anext(pieces), node, deadline)
                    *events, rest = bytes(buffer).split(b"\n\n")
                    buffer = bytearray(rest)
                    for event in events:
                        yield event + b"\n\n"
                    if len(buffer) > MAX_EVENT:
                        raise _LostError(f"an event has more than {MAX_EVENT} bytes")
            if buffer:
                raise _LostError("its last event is not whole")
        finally:
            await response.aclose()


async def _joined(first: bytes, rest: AsyncGenerator[httpx.Response | bytes]) -> AsyncGenerator[bytes]:
    try:
        yield first
        async for part in rest:
            assert isinstance(part, bytes)
            yield part
    except _LostError as lost:
        _log.warning("an answer has ended early: %s", one_line(lost))
        raise RequestError("the language node ended its answer early: try again", 502) from None
    finally:
        await rest.aclose()


async def _unless_gone[T](step: Awaitable[T], node: LanguageNode, deadline: float) -> T:
    """Waits for a step of an exchange.

    Raises:
        _LostError: it has failed, or the node is gone.
        DeadlineError: the deadline has passed.
    """
    task = asyncio.ensure_future(step)
    try:
        await asyncio.wait({task, node.gone}, timeout=deadline - time.monotonic(), return_when="FIRST_COMPLETED")
        if task.done():
            return task.result()
    except httpx.HTTPError as error:
        raise _LostError(f"{type(error).__name__}: {one_line(error)}") from None
    finally:
        await settle(task)
    if node.gone.done():
        raise _LostError("it is gone")
    raise DeadlineError("no answer in time from the language node: ask for less, or retry later")


def refusal(status: int, body: bytes, retry_after: str | None = None) -> RequestError:
    """The error that another node answered with."""
    fields: dict[str, object] = {}
    try:
        fields = msgspec.json.decode(body, type=dict[str, dict[str, object]])["error"]
        message = str(fields["message"])
    except (msgspec.DecodeError, KeyError):
        message = f"the language node answered {status}"
    headers = {"retry-after": retry_after} if retry_after else {}
    param, code, kind = (None if (value := fields.get(name)) is None else str(value) for name in _FIELDS)
    return RequestError(message, status, param, code, kind, headers)


_FIELDS = "param", "code", "type"
