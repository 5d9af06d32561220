"""What clients are told of errors, what is kept from them, and what is not logged."""

import asyncio
import gc
import time
from collections.abc import AsyncGenerator, Awaitable
from types import SimpleNamespace
from typing import Any

import pytest

from deepstack_jax.engine.runner import RequestFailed
from deepstack_jax.serving import forwarding, remote_rows
from deepstack_jax.serving.errors import RequestError, as_request_error, without_places


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("can't open /srv/models/qwen/config.json: no such file", "can't open [...]: no such file"),
        ("[Errno 2] No such file: '/a/b c'", "[Errno 2] No such file: '[...] c'"),
        ("tcp://10.0.0.1:7000 is gone", "[...] is gone"),
        ("write to 10.0.0.1:15000 failed", "write to [...] failed"),
        ("write to [fe80::1]:15000 failed", "write to [...] failed"),
        ("localhost:80 and 127.0.0.1 do not answer", "[...] and [...] do not answer"),
        ("see https://internal.example:8443/v1/x?y=z for it", "see [...] for it"),
        ("send it to /v1/chat/completions or /generate", "send it to /v1/chat/completions or /generate"),
        ("2/3 of 1.5 or 1.2.3, ratio 1:2, text/plain", "2/3 of 1.5 or 1.2.3, ratio 1:2, text/plain"),
    ],
)
def test_paths_and_addresses_are_the_operators(said: str, told: str):
    assert without_places(said) == told


@pytest.mark.parametrize("kind", [ValueError, RequestFailed])
def test_errors_of_libraries_name_no_place(kind: type[Exception]):
    assert str(as_request_error(kind("bad /etc/secret/key at 10.1.2.3:99"))) == "bad [...] at [...]"


def test_what_a_client_sent_is_quoted():
    error = RequestError("http://example.org/a.png is not an allowed domain", 403)
    assert as_request_error(error) is error


async def _chunks_of(step: Awaitable[Any]) -> AsyncGenerator[Any]:
    yield await step


async def _first_chunk(step: Awaitable[Any], gone: "asyncio.Future[None]") -> Any:
    return await anext(remote_rows._unless_failed(_chunks_of(step), gone))


async def _step(step: Awaitable[Any], gone: "asyncio.Future[None]") -> Any:
    node: Any = SimpleNamespace(gone=gone)
    return await forwarding._unless_gone(step, node, time.monotonic() + 60)


@pytest.mark.parametrize("reader", [_first_chunk, _step])
def test_an_error_that_comes_while_its_reader_is_cancelled_is_not_logged(reader: Any, caplog: pytest.LogCaptureFixture):
    async def fail(begin: asyncio.Event) -> None:
        await begin.wait()
        raise ValueError("the connection was lost")

    async def main() -> None:
        begin, gone = asyncio.Event(), asyncio.get_running_loop().create_future()
        reading = asyncio.ensure_future(reader(fail(begin), gone))
        await asyncio.sleep(0.01)
        begin.set()
        await asyncio.sleep(0)  # the step has failed, and its reader does not know yet
        reading.cancel()
        await asyncio.wait({reading})
        assert reading.cancelled()

    asyncio.run(main())
    gc.collect()  # asyncio tells of an error that nobody has read when its task is collected
    assert not [record.getMessage() for record in caplog.records if record.name == "asyncio"]
