"""A node with the text model: in the unified role it encodes too, in the language role encode nodes do."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, aclosing, suppress
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from deepstack_jax.checkpoint import Model
from deepstack_jax.config import ModelConfig, read_sampling_defaults
from deepstack_jax.disagg.language.encoder_pool import EncoderPool
from deepstack_jax.disagg.language.fetch import NoEncoderError, TransferFailedError
from deepstack_jax.disagg.wire.payload import pack
from deepstack_jax.encoding import checked_scales, encode_rows
from deepstack_jax.engine.grammar import TokenGrammar
from deepstack_jax.engine.options import EngineOptions
from deepstack_jax.engine.request import GenerationPlan
from deepstack_jax.engine.request import Request as EngineRequest
from deepstack_jax.engine.runner import Chunk, DeadlineError, Runner
from deepstack_jax.errors import one_line
from deepstack_jax.generation import plan_generation
from deepstack_jax.processing.batch import Batch, prepare_batch
from deepstack_jax.processing.daemon_threads import in_thread_or_here
from deepstack_jax.processing.grammar import compile_grammar
from deepstack_jax.processing.messages import texts_in
from deepstack_jax.processing.preparation import Preparation
from deepstack_jax.processing.processor import DecodeStream, Processor
from deepstack_jax.programs import PromptArrays
from deepstack_jax.serving.cluster import Cluster, language_cluster
from deepstack_jax.serving.endpoint import NO_HEADERS
from deepstack_jax.serving.errors import RequestError, without_places
from deepstack_jax.serving.looked_at import LookedAt, of_batch, scaled_rows
from deepstack_jax.serving.merged import closing_all, merged
from deepstack_jax.serving.policy import MediaPolicy
from deepstack_jax.serving.readings import Reading, encoder_pool_readings, engine_readings
from deepstack_jax.serving.remote_rows import RemoteRows
from deepstack_jax.serving.requests import GenerateRequest, Inputs, admit_media, check_logprobs
from deepstack_jax.serving.timeline import image_names, local_spans
from deepstack_jax.version import VERSION

NUM_TEXT_THREADS = 2
LEAST_DEFAULT_TOKENS = 1024  # of an answer whose length the request leaves open, as far as the context allows
START_SECONDS = 3600.0  # within which the programs of a large model have to compile
COUNTED_CHARACTERS = 2  # per token of the context: the tokens of longer texts are counted before they are kept
Grammars = Sequence[TokenGrammar | None]  # of the answers to one request
_NO_ANSWER = "no answer in time (preparing the request): send fewer media, or retry later"


class TextNode:
    """Answers requests with a whole model, or with the text model and encode nodes (see `endpoint.Node`)."""

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
        preparation: Preparation | None = None,
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
            preparation: decodes images and videos, closed by `close`; without, threads of this process do.
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
        self.sampling_defaults = {} if model.path is None else read_sampling_defaults(model.path)
        self.research = engine is not None and engine.research
        self._max_context = most if max_context is None else min(max_context, most)
        self._preparation = preparation or Preparation()
        # separate threads, so that texts never wait for pictures
        self._texts = ThreadPoolExecutor(NUM_TEXT_THREADS, thread_name_prefix="texts")

    async def generate(
        self,
        request: GenerateRequest,
        deadline: float,
        tenant: str = "",
        headers: Mapping[str, str] = NO_HEADERS,
        ended: Collection[int] = (),
    ) -> AsyncGenerator[Chunk]:
        """The chunks of the answer (see `endpoint.Node`).

        Raises:
            RequestError, MediaError, ValueError: what is wrong with the request.
            RequestFailed: what went wrong with the work.
        """
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                grammars = await asyncio.to_thread(self._checked, request)
                inputs = await admit_media(request, self._policy, self._preparation.decoders)
        except TimeoutError:
            raise DeadlineError(_NO_ANSWER) from None
        ways = [self._answer_remotely] if inputs.has_media and self._remote else []
        for way in (*ways, self._answer_here):
            with suppress(NoEncoderError):  # it comes before the first chunk
                async with aclosing(way(request, inputs, grammars, deadline, tenant, ended)) as answer:
                    async for choice, chunk in answer:
                        yield replace(chunk, choice=choice)
                return

    async def _answer_here(
        self,
        request: GenerateRequest,
        inputs: Inputs,
        grammars: Grammars,
        deadline: float,
        tenant: str,
        ended: Collection[int],
    ) -> AsyncGenerator[tuple[int, Chunk]]:
        """The chunks of answers for which this node encodes the pictures, if there are any, by choice."""
        began = time.monotonic()
        with ExitStack() as prepared:
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    batch, plans = await self._prepare(request, inputs, prepared)
            except TimeoutError:
                raise DeadlineError(_NO_ANSWER) from None
            options = {"deadline": deadline, "tenant": tenant, **self._engine_options(request)}
            prompts = [EngineRequest.of_row(batch, plan, **options) for plan in plans]
            timed = [_timed(self.config, each) for each in prompts] if request.timeline else []
            del inputs, batch
            runs = [
                self.runner.run(each, each.plan, deadline, tenant, grammar)
                for each, grammar in zip(prompts, grammars, strict=True)
            ]
            del prompts
            async with closing_all(runs), aclosing(merged(runs, ended)) as chunks:
                async for choice, chunk in chunks:
                    prepared.close()  # the pixels are encoded
                    yield choice, replace(chunk, timeline=local_spans(*timed[choice], began)) if timed else chunk

    async def _answer_remotely(
        self,
        request: GenerateRequest,
        inputs: Inputs,
        grammars: Grammars,
        deadline: float,
        tenant: str,
        ended: Collection[int],
    ) -> AsyncGenerator[tuple[int, Chunk]]:
        """The chunks of answers for which an encode node encodes the pictures, by choice. Each fetches its rows.

        Raises:
            NoEncoderError: no encoder is left, and this node encodes by itself.
        """
        assert self._remote is not None
        payload = await self._packed(inputs)

        def planned(choice: int) -> Callable[[PromptArrays], GenerationPlan]:
            return lambda prompt: self._plan(request, prompt, choice)

        options = {"tenant": tenant, "timed": request.timeline, **self._engine_options(request)}
        runs = [
            self._remote.answer(payload, planned(choice), deadline, grammar=grammar, **options)
            for choice, grammar in enumerate(grammars)
        ]
        try:
            async with closing_all(runs), aclosing(merged(runs, ended)) as chunks:
                async for chunk in chunks:
                    yield chunk
        except TransferFailedError as error:
            raise RequestError(without_places(one_line(error)), error.status) from None

    async def look_at(self, request: GenerateRequest, deadline: float, check: Callable[[int], None]) -> LookedAt:
        """The prompt of a request with its visual rows, from encode nodes or encoded here, without an answer.

        Args:
            check: called with the prompt's tokens before anything is encoded; it may raise an error to refuse them.

        Raises:
            RequestError, MediaError, ValueError: what is wrong with the request, or that rows can't be had.
        """
        await asyncio.to_thread(self._checked, request)
        inputs = await admit_media(request, self._policy, self._preparation.decoders)
        looked_at = None
        if inputs.has_media and self._remote:
            with suppress(NoEncoderError):
                looked_at = await self._look_remotely(self._remote, inputs, deadline, check)
        if looked_at is None:
            with ExitStack() as prepared:
                batch, _ = await self._prepare(request, inputs, prepared)
                check(int(batch.lengths[0]))
                looked_at = of_batch(batch, await asyncio.to_thread(encode_rows, self._model, batch))
        if scales := checked_scales(self.config, request.deepstack_scales):
            looked_at = await asyncio.to_thread(scaled_rows, looked_at, scales)
        return looked_at

    async def _look_remotely(
        self, remote: RemoteRows, inputs: Inputs, deadline: float, check: Callable[[int], None]
    ) -> LookedAt:
        payload = await self._packed(inputs)
        try:
            return await remote.rows_of(payload, deadline, check)
        except TransferFailedError as error:
            raise RequestError(without_places(one_line(error)), error.status) from None

    async def _packed(self, inputs: Inputs) -> bytes:
        """What is sent to an encode node."""
        parts = inputs.prompt, inputs.images, inputs.videos, inputs.options
        return await self._preparation.in_thread(lambda: pack(*parts))

    async def start(self) -> None:
        """Reads the tokenizer, compiles the language programs and runs a tiny prompt.

        Raises:
            ValueError: one of them failed; with the reason.
        """
        await asyncio.to_thread(lambda: self._model.processor.longest_token)
        await self._preparation.decoders.start()
        if self._warm_up:
            await asyncio.to_thread(self.runner.warm_up)
            if self._remote:
                await asyncio.to_thread(self._remote.warm_up)
        if (reason := await self.runner.self_test(START_SECONDS)) is not None:
            raise ValueError(reason)
        if self._encoders:
            await self._encoders.start()

    @property
    def model(self) -> Model:
        """What the node runs."""
        return self._model

    @property
    def processor(self) -> Processor:
        """The model's tokenizer and templates."""
        return self._model.processor

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer."""
        return self._model.eos_token_ids

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and answer at most."""
        return min(self._max_context, self.runner.engine.token_capacity // self.runner.engine.shape.pools)

    @property
    def config(self) -> ModelConfig:
        """The model's configuration."""
        return self._model.config

    @cached_property
    def fingerprint(self) -> str:
        """What the bits of answers depend on beside the request: OpenAI's `system_fingerprint`."""
        return f"deepstack-jax-{VERSION},{self._model.dtype.name},{self.engine_shape}"

    def token_ids(self, text: str, empty: bool = False) -> list[int]:
        """The token ids of a text as it is.

        Raises:
            RequestError: it is too long, or has no tokens and may not be `empty`.
        """
        self._check_texts([text])
        ids = self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids and not empty:
            raise RequestError("the prompt is empty: send some text", param="prompt")
        return ids

    @property
    def engine_shape(self) -> str:
        """The sizes on which the bits of answers depend."""
        return self.runner.engine.shape.name()

    def dead(self) -> str | None:
        """Why this process can't go on, None if it can."""
        return self.runner.dead(self._stuck_after) or (self._encoders.failure if self._encoders else None)

    def load(self) -> dict[str, float]:
        """Nothing beside the state for `/health`."""
        return {}

    async def unable(self) -> str | None:
        """Why the node should get no requests now, None if it should."""
        if reason := self.dead() or self.runner.stopping:
            return reason
        return await self.self_test() if self.runner.failing else None

    async def self_test(self) -> str | None:
        """Runs a tiny prompt unless the model has run just now; the reason if it fails, otherwise None."""
        return await self.runner.health(self._stuck_after)

    def readings(self) -> Iterator[Reading]:
        """Numbers for the metrics."""
        yield from engine_readings(self.runner)
        if self._encoders:
            yield from encoder_pool_readings(self._encoders)

    def cluster(self) -> Cluster:
        """This node and the encode nodes that it uses."""
        return language_cluster(self.runner, self._encoders)

    def describe(self) -> dict[str, Any]:
        """The engine and the model."""
        text, mesh = self._model.config.text, self._model.mesh
        return {
            "engine_shape": self.engine_shape,
            "token_capacity": self.runner.engine.token_capacity,
            "max_context": self._max_context,
            "mesh": dict(mesh.shape) if mesh else {},
            "model": {"layers": text.num_hidden_layers, "experts": text.num_experts, "vocabulary": text.vocab_size},
        }

    def decode_stream(self) -> DecodeStream:
        """Turns an answer's tokens into text as they come."""
        return self._model.processor.decode_stream()

    def stop(self, grace: float) -> None:
        """Takes no more requests; those running have `grace` seconds to end. Returns at once."""
        self.runner.stop(grace)
        self._preparation.decoders.close(grace)

    async def close(self) -> None:
        """Ends the threads; call it after `stop`."""
        if self._encoders:
            await self._encoders.close()
        self._preparation.close()
        self._texts.shutdown(wait=False, cancel_futures=True)
        await in_thread_or_here(lambda: self.runner.join(10.0))

    def check_tokens(self, count: int) -> None:
        """Refuses a prompt of so many tokens, unless an answer fits beside it.

        Raises:
            RequestError: none fits.
        """
        if count >= self._max_context:
            raise RequestError(
                f"{count} prompt tokens exceed the {self._max_context} of this server: shorten the prompt",
                param="prompt",
                code="context_length_exceeded",
            )

    def _engine_options(self, request: GenerateRequest) -> dict[str, Any]:
        """Fields of the engine's request that the client chooses."""
        scales = checked_scales(self.config, request.deepstack_scales)
        return {"salt": request.cache_salt, "deepstack_scales": scales}

    def check_research(self) -> None:
        """
        Raises:
            RequestError: the server was started without research.
        """
        if not self.research:
            raise RequestError("research is off: serve with --research", code="research_off")

    def _checked(self, request: GenerateRequest) -> Grammars:
        """The grammars of a request whose prompt and log probabilities may fit."""
        sampling = request.sampling_params
        if request.deepstack_scales is not None:
            self.check_research()
            self._engine_options(request)
        check_logprobs(sampling.n, sampling.max_new_tokens, request.top_logprobs)
        self._check_prompt(request)
        return self._grammars(request)

    def _grammars(self, request: GenerateRequest) -> Grammars:
        """The grammar that each of the answers has to follow, at its beginning; None for none.

        Raises:
            RequestError: it can't be compiled.
        """
        wanted, count = request.sampling_params.grammar(), request.sampling_params.n
        if wanted is None:
            return [None] * count
        sizes = {"vocab_size": self._model.config.text.vocab_size, "end_tokens": self._model.eos_token_ids}
        try:
            return [compile_grammar(self.processor.tokenizer, *wanted, **sizes) for _ in range(count)]
        except ValueError as error:
            raise RequestError(one_line(error), param=wanted[0], code="invalid_grammar") from None

    def _check_prompt(self, request: GenerateRequest) -> None:
        """Refuses what can't fit before it is rendered and tokenized."""
        self.check_tokens(len(request.input_ids or ()))
        texts = [request.text or "", *texts_in([request.tools, request.chat_template_kwargs])]
        for message in request.messages or ():
            texts += _texts_of(message)
        self._check_texts(texts)

    def _check_texts(self, texts: Sequence[str]) -> None:
        size, most = sum(map(len, texts)), self._max_context
        if size <= COUNTED_CHARACTERS * most:
            return
        # what the tokenizer keeps of each token is large; a text that is divided has a few more of them
        if size > self.processor.longest_token * most or self.processor.count_exceeds(texts, most + most // 4):
            raise RequestError(
                f"the text has {size} characters, too many for {most} tokens: shorten it",
                code="context_length_exceeded",
            )

    async def _prepare(
        self, request: GenerateRequest, inputs: Inputs, prepared: ExitStack
    ) -> tuple[Batch, list[GenerationPlan]]:
        """Decodes pictures, tokenizes, and checks that prompt and answers fit; `prepared` gives memory back."""
        arrays, parts = None, (inputs.prompt, inputs.images, inputs.videos)
        if inputs.has_media:
            arrays, release = await self._preparation.prepare(self.processor, *parts, inputs.options)
            prepared.callback(release)

        def finish() -> tuple[Batch, list[GenerationPlan]]:
            if arrays is not None:
                made = arrays
            elif request.input_ids is not None:
                made = {"input_ids": np.array([request.input_ids])}
            else:
                made = self.processor.prepare(*parts, **inputs.options)
            batch = prepare_batch(self._model.config, **made)
            return batch, [self._plan(request, batch, choice) for choice in range(request.sampling_params.n)]

        if inputs.has_media:
            return await self._preparation.in_thread(finish)
        return await asyncio.get_running_loop().run_in_executor(self._texts, finish)

    def _plan(self, request: GenerateRequest, prompt: Batch | PromptArrays, choice: int) -> GenerationPlan:
        """How the prompt is answered; checks that prompt and answer fit."""
        tokens, wanted = int(np.max(prompt.lengths)), request.sampling_params.max_new_tokens
        room = self.max_model_len - tokens
        if wanted is None and room > 0:
            # pages are reserved for the whole answer: more than a slot's share would keep other requests waiting
            share = self.runner.engine.token_capacity // self.runner.engine.shape.slots
            wanted = min(room, max(share - tokens, LEAST_DEFAULT_TOKENS), request.most_logged_tokens or room)
        if wanted is None or tokens + wanted > self._max_context:
            answer = "the answer" if wanted is None else f"max_new_tokens {wanted}"
            raise RequestError(
                f"{tokens} prompt tokens and {answer} exceed the {self._max_context} of this server: "
                f"shorten the prompt or ask for at most {max(room, 0)}",
                param="max_new_tokens",
                code="context_length_exceeded",
            )
        options = request.sampling_params.options(self._model.eos_token_ids, wanted, choice, request.top_logprobs)
        return plan_generation(self._model, prompt, options)


def _timed(config: ModelConfig, request: EngineRequest) -> tuple[EngineRequest, dict[int, str]]:
    """A request that notes its stages, and what its images are called."""
    request.stages = []
    return request, image_names(config, request)


def _texts_of(message: Any) -> Iterator[str]:
    """The texts of an unparsed message, without its pictures."""
    if not isinstance(message, dict):
        return
    yield from texts_in([value for key, value in message.items() if key != "content"])
    content = message.get("content")
    for part in content if isinstance(content, list) else [content]:
        yield from texts_in(part.get("text") if isinstance(part, dict) else part)
