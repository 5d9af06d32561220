"""The encode role over HTTP: it encodes for language nodes, and forwards its own HTTP requests to one of them."""

import asyncio
import ssl
import time
from collections.abc import AsyncGenerator, Collection, Iterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

import msgspec
from starlette.responses import StreamingResponse

from deepstack_jax.checkpoint import Model
from deepstack_jax.config import ModelConfig
from deepstack_jax.disagg.encode.server import EncodeServer
from deepstack_jax.engine.runner import Chunk, tiny_prompt
from deepstack_jax.errors import one_line
from deepstack_jax.processing.processor import DecodeStream
from deepstack_jax.sampling import TokenLogprobs
from deepstack_jax.serving.cluster import Cluster, encode_cluster
from deepstack_jax.serving.endpoint import NO_HEADERS, Call, Reply
from deepstack_jax.serving.errors import RequestError
from deepstack_jax.serving.forwarding import Answer, Forwarder, refusal
from deepstack_jax.serving.parsing import to_json
from deepstack_jax.serving.readings import Reading, encode_readings
from deepstack_jax.serving.requests import GenerateRequest

IDLE_SECONDS = 30.0  # an encoder that has been idle for longer is tested before it is called healthy
TEST_SECONDS = 10.0
FORWARDED = "authorization", "x-api-key", "x-request-id", "traceparent", "tracestate"  # to the language node


class EncodeNode:
    """An encode node (see `endpoint.Node`)."""

    role = "encode"

    def __init__(
        self,
        model: Model,
        server: EncodeServer,
        *,
        name: str,
        stuck_after: float = 300.0,
        verify: ssl.SSLContext | bool = True,
    ):
        """
        Args:
            model: with vision parameters; no others are used.
            server: not yet started; closed by `close`.
            name: the model's name in `/v1/models`.
            stuck_after: seconds after which a program that hasn't come back makes the node unhealthy.
            verify: how the certificates of language nodes are checked; True trusts the usual authorities.
        """
        self.model_names: Sequence[str] = [name]
        self.control: str | None = server.listener.endpoint
        self._model, self._server, self._stuck_after = model, server, stuck_after
        self._forwarder = Forwarder(lambda: tuple(server.peers.values()), verify)
        self._stopping = False

    @property
    def max_model_len(self) -> int:
        """The model's positions; language nodes may allow fewer."""
        return self._model.config.text.max_position_embeddings

    @property
    def config(self) -> ModelConfig:
        """The model's configuration."""
        return self._model.config

    async def start(self) -> None:
        """Encodes a tiny picture, then opens to language nodes.

        Raises:
            ValueError: the encoder failed; with the reason.
        """
        if (reason := await self._encode_tiny(None)) is not None:
            raise ValueError(reason)
        await self._server.start()

    async def generate(
        self,
        request: GenerateRequest,
        deadline: float,
        tenant: str = "",
        headers: Mapping[str, str] = NO_HEADERS,
        ended: Collection[int] = (),
    ) -> AsyncGenerator[Chunk]:
        """The chunks that a language node answers with.

        Raises:
            RequestError: that node's refusal, or 503 if none is connected.
        """
        headers = {name: value for name in FORWARDED if (value := headers.get(name)) is not None}
        body = to_json(msgspec.to_builtins(msgspec.structs.replace(request, stream=True, stream_deltas=True)))
        answer = await self._forward("/generate", body, headers, deadline)
        async with aclosing(answer.parts) as parts:
            if answer.status != 200:
                raise refusal(answer.status, await anext(parts), answer.headers.get("retry-after"))
            async for part in parts:
                if not part.startswith(b"data: {"):
                    continue
                event = msgspec.json.decode(part.removeprefix(b"data: "))
                if "error" in event:
                    raise refusal(_STATUS.get(event["error"]["type"], 500), msgspec.json.encode(event))
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
                    _logprobs(meta),
                )
                if finish:
                    return
        raise RequestError("the language node ended its answer early: try again", 502)

    async def forward(self, path: str, call: Call, reply: Reply) -> None:
        """Passes a call on to a language node, and its response back as it comes.

        Raises:
            RequestError, DeadlineError: as `Forwarder.send`, and if the node is lost during its answer.
        """
        given = {name: call.headers.get(name, "") for name in ("content-type", *FORWARDED)}
        headers = {name: value for name, value in given.items() if value and value.isascii()}
        headers["x-request-id"] = call.id
        answer = await self._forward(path, bytes(call.body), headers, call.deadline)
        async with aclosing(answer.parts) as parts:
            kept = {name: answer.headers[name] for name in _RETURNED if name in answer.headers}
            await reply.whole(StreamingResponse(parts, answer.status, kept))

    def dead(self) -> str | None:
        """Why this process can't go on, None if it can."""
        busy, preparing = self._server.worker.busy_seconds, self._server.preparing_seconds
        if busy > self._stuck_after:
            return f"the device has been busy with one program for {busy:.0f} s"
        if preparing > self._stuck_after:
            return f"a request has been in preparation for {preparing:.0f} s"
        return None if self._stopping else self._server.failure

    def load(self) -> dict[str, float]:
        """How long the oldest preparation of a request has run, for `/health`."""
        return {"preparing_seconds": round(self._server.preparing_seconds, 3)}

    async def unable(self) -> str | None:
        """Why the node should get no requests now, None if it should."""
        if reason := self.dead() or ("the server is stopping" if self._stopping else None):
            return reason
        return await self.self_test() if self._server.worker.error else None

    async def self_test(self) -> str | None:
        """Encodes a tiny picture unless the encoder has run just now; the reason if it fails, otherwise None."""
        worker = self._server.worker
        old = worker.last_run is None or time.monotonic() - worker.last_run > IDLE_SECONDS
        return self.dead() or (await self._encode_tiny(TEST_SECONDS) if old or worker.error else None)

    def readings(self) -> Iterator[Reading]:
        """Numbers for the metrics."""
        return encode_readings(self._server)

    def cluster(self) -> Cluster:
        """This node and the language nodes that use it."""
        return encode_cluster(self._server)

    def describe(self) -> dict[str, Any]:
        """The model's encoder."""
        vision = self._model.config.vision
        return {"model": {"vision_layers": vision.depth if vision else 0}, "control": self.control}

    def decode_stream(self) -> DecodeStream:
        """Turns an answer's tokens into text as they come."""
        return self._model.processor.decode_stream()

    def stop(self, grace: float) -> None:
        """Takes no more requests of its own. Returns at once."""
        self._stopping = True

    async def close(self) -> None:
        """Says goodbye to language nodes and frees everything."""
        await self._forwarder.close()
        await self._server.close()

    async def _forward(self, path: str, body: bytes, headers: Mapping[str, str], deadline: float) -> Answer:
        if self._stopping:
            raise RequestError("the server is stopping: try again later", 503)
        return await self._forwarder.send(path, body, headers, deadline)

    async def _encode_tiny(self, timeout: float | None) -> str | None:
        (visual,) = tiny_prompt(self._model).visuals
        try:
            await asyncio.wait_for(asyncio.wrap_future(self._server.worker.submit(visual)), timeout)
        except TimeoutError:
            return f"the encoder has not come back within {timeout:g} s"
        except Exception as error:
            return f"the encoder failed ({type(error).__name__}): {one_line(error)[:300]}"
        return None


def _logprobs(meta: Mapping[str, Any]) -> tuple[TokenLogprobs, ...]:
    """Those of an event's tokens, which SGLang's API gives in two lists."""
    pairs = zip(meta.get("output_token_logprobs", ()), meta.get("output_top_logprobs", ()), strict=True)
    return tuple(
        TokenLogprobs(logprob, tuple((token, value) for value, token, _ in top)) for (logprob, *_), top in pairs
    )


_RETURNED = ("content-type", "cache-control", "retry-after", "x-request-id")

# of errors that come once a stream has begun, and its status with it
_STATUS = {"timeout_error": 504, "overloaded_error": 503, "invalid_request_error": 400}
