"""The encode role over HTTP: it encodes for language nodes, and forwards its own HTTP requests to one of them."""

import asyncio
import itertools
import json
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import httpx
import msgspec

from deepstack_jax.checkpoint import Model
from deepstack_jax.disagg.encode.server import EncodeServer
from deepstack_jax.engine.runner import Chunk, DeadlineError, tiny_prompt
from deepstack_jax.errors import one_line
from deepstack_jax.processing.processor import DecodeStream
from deepstack_jax.serving.requests import GenerateRequest, RequestError

IDLE_SECONDS = 30.0  # an encoder that has been idle for longer is tested before it is called healthy
TEST_SECONDS = 10.0


class EncodeNode:
    """An encode node (see `http.Node`)."""

    role = "encode"

    def __init__(self, model: Model, server: EncodeServer, *, name: str, stuck_after: float = 300.0):
        """
        Args:
            model: with vision parameters; no others are used.
            server: not yet started; closed by `close`.
            name: the model's name in `/v1/models`.
            stuck_after: seconds after which a program that hasn't come back makes the node unhealthy.
        """
        self.model_names: Sequence[str] = [name]
        self.control: str | None = server.listener.endpoint
        self._model, self._server, self._stuck_after = model, server, stuck_after
        self._client = httpx.AsyncClient(timeout=None, trust_env=False)
        self._turns = itertools.count()
        self._stopping = False

    async def start(self) -> None:
        """Encodes a tiny picture, then opens to language nodes.

        Raises:
            ValueError: the encoder failed; with the reason.
        """
        if (reason := await self._self_test(None)) is not None:
            raise ValueError(reason)
        await self._server.start()

    async def generate(self, request: GenerateRequest, deadline: float) -> AsyncGenerator[Chunk]:
        """The chunks that a language node answers with.

        Raises:
            RequestError: that node's refusal, or 503 if none is connected.
        """
        urls = [peer.hello.http_url for peer in self._server.peers.values() if peer.hello.http_url]
        if self._stopping or not urls:
            reason = "the server is stopping" if self._stopping else "no language node is connected"
            raise RequestError(f"{reason}: try again later", 503, headers={"retry-after": "1"})
        url = f"{urls[next(self._turns) % len(urls)]}/generate"
        body = _body(msgspec.structs.replace(request, stream=True, stream_deltas=True))
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                async with self._client.stream("POST", url, content=body) as response:
                    if response.status_code != 200:
                        raise _refusal(response.status_code, await response.aread())
                    async for line in response.aiter_lines():
                        if not line.startswith("data: {"):
                            continue
                        event = msgspec.json.decode(line[6:])
                        if "error" in event:
                            raise _refusal(_STATUS.get(event["error"]["type"], 500), msgspec.json.encode(event))
                        meta = event["meta_info"]
                        finish = meta["finish_reason"] and meta["finish_reason"]["type"]
                        timings, split = meta.get("timings", {}), meta.get("split")
                        yield Chunk(
                            tuple(event["output_ids"]),
                            meta["prompt_tokens"],
                            finish,
                            timings,
                            split,
                            meta.get("cached_tokens", 0),
                            meta.get("engine_shape", ""),
                        )
                        if finish:
                            return
        except TimeoutError:
            raise DeadlineError(
                "no answer in time from the language node: reduce max_new_tokens, or retry later"
            ) from None
        except httpx.HTTPError as error:
            raise RequestError(
                f"the language node can't be reached ({one_line(error)}): try again later", 503
            ) from None
        raise RequestError("the language node ended its answer early: try again", 502)

    async def health(self) -> str | None:
        """None if the node is alive and able to answer, otherwise the reason."""
        worker = self._server.worker
        if self._stopping:
            return "the server is stopping"
        if worker.busy_seconds > self._stuck_after:
            return f"the device has been busy with one program for {worker.busy_seconds:.0f} s"
        old = worker.last_run is None or time.monotonic() - worker.last_run > IDLE_SECONDS
        return await self._self_test(TEST_SECONDS) if old or worker.error else None

    def decode_stream(self) -> DecodeStream:
        """Turns an answer's tokens into text as they come."""
        return self._model.processor.decode_stream()

    def stop(self, grace: float) -> None:
        """Takes no more requests of its own. Returns at once."""
        self._stopping = True

    async def close(self) -> None:
        """Says goodbye to language nodes and frees everything."""
        await self._client.aclose()
        await self._server.close()

    async def _self_test(self, timeout: float | None) -> str | None:
        (visual,) = tiny_prompt(self._model).visuals
        try:
            await asyncio.wait_for(asyncio.wrap_future(self._server.worker.submit(visual)), timeout)
        except TimeoutError:
            return f"the encoder has not come back within {timeout:g} s"
        except Exception as error:
            return f"the encoder failed ({type(error).__name__}): {one_line(error)[:300]}"
        return None


# of errors that come once a stream has begun, and its status with it
_STATUS = {"timeout_error": 504, "overloaded_error": 503, "invalid_request_error": 400}


def _body(request: GenerateRequest) -> bytes:
    try:
        return msgspec.json.encode(request)
    except OverflowError:  # JSON may have integers of more than 64 bits
        return json.dumps(msgspec.to_builtins(request)).encode()


def _refusal(status: int, body: bytes) -> RequestError:
    """The error that another node answered with."""
    fields: dict[str, Any] = {}
    try:
        fields = msgspec.json.decode(body)["error"]
        message = str(fields["message"])
    except (msgspec.DecodeError, KeyError, TypeError):
        message = f"the language node answered {status}"
    headers = {"retry-after": "1"} if status == 503 else {}
    return RequestError(message, status, fields.get("param"), fields.get("code"), fields.get("type"), headers)
