"""HTTP between clients and nodes, and from encode nodes to language nodes: calls of the ASGI application."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from typing import TYPE_CHECKING, Any

import httpx

from tests.simulation import clock
from tests.simulation.world import Process

if TYPE_CHECKING:
    from tests.simulation.nodes import Machine

LATENCY_S = 0.001
CONNECT_SECONDS = 3.0  # until a connection that gets no answer is given up


class Exchange:
    """One request to a node, and its response, whose messages arrive in order.

    `on_message` is called with each message of the response (see ASGI), and with None if the connection breaks.
    """

    def __init__(
        self,
        machine: "Machine",
        path: str,
        headers: Mapping[str, str],
        body: bytes,
        on_message: Callable[[dict[str, Any] | None], None],
    ):
        self._machine, self._process = machine, machine.process
        self._scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
        }
        self._body, self._on_message = body, on_message
        self._gone: asyncio.Future[None] | None = None
        self._sent_body = self._over = self._hung_up = False
        self._last = 0.0
        self._on_the_way: deque[dict[str, Any] | None] = deque()
        if not self._process.alive:
            self._break()
            return
        self._process.at_kill.append(self._break)
        self._process.loop.call_soon(self._begin)

    def hang_up(self) -> None:
        """The caller has gone away."""
        self._hung_up = True
        self._process.after(LATENCY_S, self._disconnect)

    def _begin(self) -> None:
        app = self._machine.app  # type: ignore[attr-defined]
        if app is None:
            self._break()
            return
        self._gone = self._process.loop.create_future()
        if self._hung_up:
            self._gone.set_result(None)
        task = self._process.loop.create_task(app(self._scope, self._receive, self._send))
        self._machine.tasks[task] = None  # type: ignore[attr-defined]
        task.add_done_callback(self._ended)

    async def _receive(self) -> dict[str, Any]:
        if not self._sent_body:
            self._sent_body = True
            return {"type": "http.request", "body": self._body, "more_body": False}
        assert self._gone is not None
        await asyncio.shield(self._gone)
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        self._return(message)
        if message["type"] == "http.response.body" and not message.get("more_body"):
            self._over = True

    def _return(self, message: dict[str, Any] | None) -> None:
        world = self._process.world
        self._last = max(self._last, world.now + LATENCY_S * (1 + world.dice.random()))
        self._on_the_way.append(message)
        world.after(self._last - world.now, self._deliver)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._machine.tasks.pop(task, None)  # type: ignore[attr-defined]
        if task.cancelled():  # the node stops
            self._break()
        elif task.exception() is not None:
            self._process.world.violated(self._process.name, "the application raised", repr(task.exception()))
        elif not self._over and not self._hung_up:
            self._process.world.violated(self._process.name, "the application did not finish its response")
        self._disconnect()
        if self._break in self._process.at_kill:
            self._process.at_kill.remove(self._break)

    def _disconnect(self) -> None:
        if self._gone is not None and not self._gone.done():
            self._gone.set_result(None)

    def _break(self) -> None:
        if not self._over:
            self._return(None)

    def _deliver(self) -> None:
        message = self._on_the_way.popleft()
        if not self._hung_up:
            self._on_message(message)


class Transport(httpx.AsyncBaseTransport):
    """Stands for `httpx.AsyncHTTPTransport` in one process: a URL's host is the name of a machine."""

    machines: Mapping[str, "Machine"]
    is_cut: Callable[[Process, "Machine"], bool]

    def __init__(self, **_: Any):
        self._process = clock.process()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        machine = self.machines[request.url.host]
        body = await request.aread()
        if Transport.is_cut(self._process, machine):
            await asyncio.sleep(CONNECT_SECONDS)
            raise httpx.ConnectTimeout("no answer")
        messages: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        arrived: deque[dict[str, Any] | None] = deque()

        def arrive(message: dict[str, Any] | None) -> None:
            arrived.append(message)
            self._process.after(0.0, lambda: messages.put_nowait(arrived.popleft()))

        exchange = Exchange(machine, request.url.path, request.headers, body, arrive)
        try:
            start = await messages.get()
        except asyncio.CancelledError:
            exchange.hang_up()
            raise
        if start is None:
            raise httpx.ReadError("the connection was lost")
        return httpx.Response(start["status"], headers=start["headers"], stream=_Body(exchange, messages))


class _Body(httpx.AsyncByteStream):
    def __init__(self, exchange: Exchange, messages: "asyncio.Queue[dict[str, Any] | None]"):
        self._exchange, self._messages = exchange, messages

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            message = await self._messages.get()
            if message is None:
                raise httpx.ReadError("the connection was lost")
            if body := message.get("body"):
                yield body
            if not message.get("more_body"):
                return

    async def aclose(self) -> None:
        self._exchange.hang_up()
