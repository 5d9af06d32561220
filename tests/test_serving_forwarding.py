"""What an encode node does with requests when language nodes refuse, hang, leave or die: real sockets, bare servers."""

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

import pytest

from deepstack_jax.engine.runner import DeadlineError
from deepstack_jax.serving.errors import RequestError
from deepstack_jax.serving.forwarding import Forwarder

EVENTS = [b'data: {"n": 1}\n\n', b'data: {"n": 2}\n\n', b"data: [DONE]\n\n"]
STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def whole(status: str, body: bytes, length: int | None = None) -> bytes:
    length = len(body) if length is None else length
    return f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n".encode() + body


GOOD = STREAM + b"".join(map(chunk, EVENTS)) + chunk(b"")
REFUSED = whole("503 Service Unavailable", json.dumps({"error": {"message": "full", "code": "queue_full"}}).encode())


@dataclass
class Node:
    """A language node: what it sends after a request, and whether it hangs then or closes the connection."""

    answer: bytes
    hangs: bool = False
    name: str = ""
    http_url: str = ""
    requests: int = 0
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    closed: asyncio.Event = field(default_factory=asyncio.Event)
    gone: "asyncio.Future[None]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(int(line[16:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length: "))
        await reader.readexactly(length)
        self.requests += 1
        writer.write(self.answer)
        self.arrived.set()
        if self.hangs:
            await reader.read()
            self.closed.set()
        writer.close()


@asynccontextmanager
async def forwarding(*nodes: Node) -> AsyncIterator[Forwarder]:
    async with AsyncExitStack() as stack:
        for number, node in enumerate(nodes):
            server = await stack.enter_async_context(await asyncio.start_server(node.serve, "127.0.0.1", 0))
            node.name = f"node{number}"
            node.http_url = node.http_url or f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        forwarder = Forwarder(lambda: [node for node in nodes if not node.gone.done()])
        try:
            yield forwarder
        finally:
            await forwarder.close()


async def ask(forwarder: Forwarder, seconds: float = 20.0) -> list[bytes]:
    answer = await forwarder.send("/generate", b"{}", {}, time.monotonic() + seconds)
    return [part async for part in answer.parts]


def closed_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return f"http://127.0.0.1:{free.getsockname()[1]}"


BAD: dict[str, Callable[[], Node]] = {
    "nobody listens": lambda: Node(b"", http_url=closed_port()),
    "it closes without an answer": lambda: Node(b""),
    "it stops or is full": lambda: Node(REFUSED),
    "it dies before its first event": lambda: Node(STREAM + chunk(EVENTS[0][:9])),
    "it dies in an answer that isn't streamed": lambda: Node(whole("200 OK", b'{"te', 100)),
    "it does not speak HTTP": lambda: Node(b"SSH-2.0-OpenSSH_9.6\r\n"),
}


@pytest.mark.parametrize("kind", BAD)
def test_another_node_gets_a_request_whose_answer_has_not_begun(kind: str):
    async def work() -> None:
        bad, good = BAD[kind](), Node(GOOD)
        async with forwarding(bad, good) as forwarder:
            for _ in range(4):
                assert await ask(forwarder) == EVENTS
        assert good.requests == 4
        assert bad.requests == (0 if kind == "nobody listens" else 2)  # they take turns

    asyncio.run(work())


@pytest.mark.parametrize("kind", BAD)
def test_without_another_node_the_client_is_told_and_no_address_is(kind: str):
    async def work() -> RequestError:
        async with forwarding(BAD[kind]()) as forwarder:
            with pytest.raises(RequestError) as error:
                await ask(forwarder)
            return error.value

    error = asyncio.run(work())
    assert error.status == 503
    assert "127.0.0.1" not in str(error)
    assert str(error) == ("full" if "full" in kind else "the language node can't be reached: try again later")


def test_no_node_at_all():
    async def work() -> None:
        async with forwarding() as forwarder:
            with pytest.raises(RequestError, match="no language node is connected") as error:
                await ask(forwarder)
            assert error.value.status == 503

    asyncio.run(work())


def test_refusals_that_another_node_would_repeat_are_passed_on():
    async def work() -> None:
        async with forwarding(Node(whole("400 Bad Request", b"{}")), Node(GOOD)) as forwarder:
            answer = await forwarder.send("/generate", b"{}", {}, time.monotonic() + 20)
            assert (answer.status, [part async for part in answer.parts]) == (400, [b"{}"])

    asyncio.run(work())


def test_a_node_that_dies_after_the_first_event_ends_the_answer():
    async def work() -> None:
        dying, other = Node(STREAM + chunk(EVENTS[0]) + chunk(EVENTS[1][:5])), Node(GOOD)
        async with forwarding(dying, other) as forwarder:
            answer = await forwarder.send("/generate", b"{}", {}, time.monotonic() + 20)
            assert await anext(answer.parts) == EVENTS[0]
            with pytest.raises(RequestError, match="ended its answer early") as error:
                await anext(answer.parts)
            assert error.value.status == 502
            assert not other.requests

    asyncio.run(work())


async def hung(node: Node, forwarder: Forwarder, then: Callable[[asyncio.Task[list[bytes]]], Awaitable[None]]) -> None:
    request = asyncio.create_task(ask(forwarder))
    await node.arrived.wait()
    await then(request)
    await asyncio.wait_for(node.closed.wait(), 5)  # its connection isn't kept


def test_a_silent_node_is_left_as_soon_as_it_counts_as_gone():
    """Before its first event another node gets the request; afterwards the answer ends."""

    async def work() -> None:
        silent, good = Node(b"", hangs=True), Node(GOOD)
        async with forwarding(silent, good) as forwarder:

            async def leaves(request: asyncio.Task[list[bytes]]) -> None:
                silent.gone.set_result(None)
                assert await asyncio.wait_for(request, 5) == EVENTS

            await hung(silent, forwarder, leaves)
        silent = Node(STREAM + chunk(EVENTS[0]), hangs=True)
        async with forwarding(silent) as forwarder:
            answer = await forwarder.send("/generate", b"{}", {}, time.monotonic() + 20)
            assert await anext(answer.parts) == EVENTS[0]
            silent.gone.set_result(None)
            with pytest.raises(RequestError, match="ended its answer early"):
                await asyncio.wait_for(anext(answer.parts), 5)

    asyncio.run(work())


def test_the_deadline_ends_the_wait_and_a_cancelled_request_its_connection():
    async def work() -> None:
        silent = Node(b"", hangs=True)
        async with forwarding(silent, Node(GOOD)) as forwarder:
            with pytest.raises(DeadlineError):
                await ask(forwarder, 0.2)
            await asyncio.wait_for(silent.closed.wait(), 5)
        silent = Node(b"", hangs=True)
        async with forwarding(silent) as forwarder:

            async def cancel(request: asyncio.Task[list[bytes]]) -> None:
                request.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await request

            await hung(silent, forwarder, cancel)

    asyncio.run(work())


def test_a_node_that_hangs_takes_no_connection_from_others():
    async def work() -> None:
        silent, good = Node(b"", hangs=True), Node(GOOD)
        async with forwarding(silent, good) as forwarder:
            requests = [asyncio.create_task(ask(forwarder)) for _ in range(400)]
            done, waiting = await asyncio.wait(requests, timeout=10)
            while len(done) < 200:
                more, waiting = await asyncio.wait(waiting, return_when="FIRST_COMPLETED")
                done |= more
            assert all(request.result() == EVENTS for request in done)
            silent.gone.set_result(None)
            assert await asyncio.gather(*waiting) == [EVENTS] * 200

    asyncio.run(work())


def test_the_kernel_notices_a_machine_that_is_gone_within_seconds():
    """Such a machine sends nothing, not even that the connection is closed."""

    async def work() -> None:
        silent = Node(b"", hangs=True)
        async with forwarding(silent) as forwarder:

            async def look(request: asyncio.Task[list[bytes]]) -> None:
                (client,) = forwarder._clients.values()
                (connection,) = client._transport._pool.connections  # type: ignore[attr-defined]
                own = connection._connection._network_stream.get_extra_info("socket")
                assert own.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
                idle, interval, count = (
                    own.getsockopt(socket.IPPROTO_TCP, option)
                    for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
                )
                assert idle + interval * count < 10
                assert own.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) < 10_000
                request.cancel()

            await hung(silent, forwarder, look)

    asyncio.run(work())
