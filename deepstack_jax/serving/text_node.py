"""A node with the text model: in the unified role it encodes too, in the language role encode nodes do."""

import asyncio
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, aclosing, suppress
from typing import Any

import numpy as np

from deepstack_jax.checkpoint import Model
from deepstack_jax.disagg.language.encoder_pool import EncoderPool
from deepstack_jax.disagg.language.fetch import NoEncoderError, TransferFailedError
from deepstack_jax.disagg.wire.payload import pack
from deepstack_jax.engine.options import EngineOptions
from deepstack_jax.engine.request import GenerationPlan
from deepstack_jax.engine.runner import Chunk, DeadlineError, Runner
from deepstack_jax.errors import one_line
from deepstack_jax.generation import plan_generation
from deepstack_jax.processing.batch import Batch, prepare_batch
from deepstack_jax.processing.messages import texts_in
from deepstack_jax.processing.processor import DecodeStream
from deepstack_jax.programs import PromptArrays
from deepstack_jax.serving.policy import MediaPolicy
from deepstack_jax.serving.remote_rows import RemoteRows
from deepstack_jax.serving.requests import GenerateRequest, Inputs, RequestError, admit_media

MAX_PREPARED = 2  # requests whose pixels are in memory, the one that is being encoded included
START_SECONDS = 3600.0  # within which the programs of a large model have to compile
TEXT_BYTES_A_TOKEN = 64  # text longer than this times the context isn't tokenized at all
_NO_ANSWER = "no answer in time (preparing the request): send fewer media, or retry later"


class TextNode:
    """Answers requests with a whole model, or with the text model and encode nodes (see `http.Node`)."""

    def __init__(
        self,
        model: Model,
        policy: MediaPolicy,
        *,
        name: str = "deepstack-jax",
        max_waiting: int = 64,
        max_context: int | None = None,
        stuck_after: float = 300.0,
        encoders: EncoderPool | None = None,
        engine: EngineOptions | None = None,
        warm_up: bool = True,
        overlap: bool = True,
    ):
        """
        Args:
            model: what `load` returned; with `encoders`, its vision parameters serve if no encoder is left.
            policy: what media are taken.
            name: the model's name in `/v1/models`.
            max_waiting: requests that wait for a slot.
            max_context: tokens of prompt and answer together; None takes the model's own bound.
            stuck_after: seconds after which a program that hasn't come back makes the node unhealthy.
            engine: sizes of the engine.
            warm_up: whether `start` compiles every language program; otherwise each compiles at its first use.
            encoders: make it a language node; not yet started, closed by `close`.
            overlap: whether a language node prefills a request while its rows arrive (see `RemoteRows`).
        """
        self.role = "language" if encoders else "unified"
        self.control: str | None = None
        self._encoders = encoders
        self.model_names: Sequence[str] = [name]
        self.runner = Runner(model, max_waiting, engine, max_context)
        self._remote = None if encoders is None else RemoteRows(self.runner, encoders, overlap=overlap)
        self._model, self._policy, self._stuck_after = model, policy, stuck_after
        most = model.config.text.max_position_embeddings
        self._warm_up = warm_up
        self._max_context = most if max_context is None else min(max_context, most)
        self._prepared = asyncio.Semaphore(MAX_PREPARED)
        # separate threads, so that texts never wait for pictures
        self._media = ThreadPoolExecutor(MAX_PREPARED, thread_name_prefix="media")
        self._texts = ThreadPoolExecutor(MAX_PREPARED, thread_name_prefix="texts")

    async def generate(self, request: GenerateRequest, deadline: float) -> AsyncGenerator[Chunk]:
        """The chunks of the answer.

        Args:
            request: what `parse_request` returned.
            deadline: on time.monotonic()'s clock.

        Raises:
            RequestError, MediaError, ValueError: what is wrong with the request.
            RequestFailed: what went wrong with the work.
        """
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                self._check_text(request)
                inputs = await admit_media(request, self._policy)
        except TimeoutError:
            raise DeadlineError(_NO_ANSWER) from None
        ways = [self._answer_remotely] if inputs.has_media and self._remote else []
        for way in (*ways, self._answer_here):
            with suppress(NoEncoderError):  # it comes before the first chunk
                async with aclosing(way(request, inputs, deadline)) as answer:
                    async for chunk in answer:
                        yield chunk
                return

    async def _answer_here(self, request: GenerateRequest, inputs: Inputs, deadline: float) -> AsyncGenerator[Chunk]:
        """The chunks of an answer for which this node encodes the pictures, if there are any."""
        async with AsyncExitStack() as prepared:
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    if inputs.has_media:
                        await prepared.enter_async_context(self._prepared)
                    pool, loop = self._media if inputs.has_media else self._texts, asyncio.get_running_loop()
                    batch, plan = await loop.run_in_executor(pool, self._prepare, request, inputs)
            except TimeoutError:
                raise DeadlineError(_NO_ANSWER) from None
            chunks = self.runner.run(batch, plan, deadline)
            del inputs, batch
            async with aclosing(chunks):
                async for chunk in chunks:
                    await prepared.aclose()  # the pixels are encoded
                    yield chunk

    async def _answer_remotely(
        self, request: GenerateRequest, inputs: Inputs, deadline: float
    ) -> AsyncGenerator[Chunk]:
        """The chunks of an answer for which an encode node encodes the pictures.

        Raises:
            NoEncoderError: no encoder is left, and this node encodes by itself.
        """
        assert self._remote is not None
        loop = asyncio.get_running_loop()
        parts = inputs.prompt, inputs.images, inputs.videos, inputs.options
        payload = await loop.run_in_executor(self._media, pack, *parts)
        chunks = self._remote.answer(payload, lambda prompt: self._plan(request, prompt), deadline)
        try:
            async with aclosing(chunks):
                async for chunk in chunks:
                    yield chunk
        except TransferFailedError as error:
            headers = {"retry-after": "1"} if error.status == 503 else {}
            raise RequestError(one_line(error), error.status, headers=headers) from None

    async def start(self) -> None:
        """Reads the tokenizer, compiles the language programs and runs a tiny prompt.

        Raises:
            ValueError: one of them failed; with the reason.
        """
        await asyncio.to_thread(lambda: self._model.processor.tokenizer)
        if self._warm_up:
            await asyncio.to_thread(self.runner.warm_up)
            if self._remote:
                await asyncio.to_thread(self._remote.warm_up)
        if (reason := await self.runner.self_test(START_SECONDS)) is not None:
            raise ValueError(reason)
        if self._encoders:
            await self._encoders.start()

    @property
    def engine_shape(self) -> str:
        """The sizes on which the bits of answers depend."""
        return self.runner.engine.shape.name()

    async def health(self) -> str | None:
        """None if the node is alive and able to answer, otherwise the reason."""
        return await self.runner.health(self._stuck_after)

    def decode_stream(self) -> DecodeStream:
        """Turns an answer's tokens into text as they come."""
        return self._model.processor.decode_stream()

    def stop(self, grace: float) -> None:
        """Takes no more requests; those running have `grace` seconds to end. Returns at once."""
        self.runner.stop(grace)

    async def close(self) -> None:
        """Ends the threads; call it after `stop`."""
        if self._encoders:
            await self._encoders.close()
        for pool in (self._media, self._texts):
            pool.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self.runner.join, 10.0)

    def _check_text(self, request: GenerateRequest) -> None:
        """Refuses what can't fit before it is rendered and tokenized."""
        size = len(request.text or "") + sum(map(len, texts_in([request.tools, request.chat_template_kwargs])))
        for message in request.messages or ():
            size += sum(map(len, _texts_of(message)))
        if size > TEXT_BYTES_A_TOKEN * self._max_context:
            raise RequestError(f"the text has {size} characters, too many for {self._max_context} tokens: shorten it")

    def _prepare(self, request: GenerateRequest, inputs: Inputs) -> tuple[Batch, GenerationPlan]:
        """Decodes pictures, tokenizes, and checks that prompt and answer fit."""
        arrays = self._model.processor.prepare(
            inputs.prompt, images=inputs.images, videos=inputs.videos, **inputs.options
        )
        batch = prepare_batch(self._model.config, **arrays)
        return batch, self._plan(request, batch)

    def _plan(self, request: GenerateRequest, prompt: Batch | PromptArrays) -> GenerationPlan:
        """How the prompt is answered; checks that prompt and answer fit."""
        options = request.sampling_params.options(self._model.eos_token_ids)
        tokens, wanted = int(np.max(prompt.lengths)), request.sampling_params.max_new_tokens
        if tokens + wanted > self._max_context:
            raise RequestError(
                f"{tokens} prompt tokens and max_new_tokens {wanted} exceed the {self._max_context} of this server: "
                f"shorten the prompt or ask for at most {max(self._max_context - tokens, 0)}",
                param="max_new_tokens",
                code="context_length_exceeded",
            )
        return plan_generation(self._model, prompt, options)


def _texts_of(message: Any) -> Iterator[str]:
    """The texts of an unparsed message, without its pictures."""
    if not isinstance(message, dict):
        return
    yield from texts_in([value for key, value in message.items() if key != "content"])
    content = message.get("content")
    for part in content if isinstance(content, list) else [content]:
        yield from texts_in(part.get("text") if isinstance(part, dict) else part)
