"""Answers requests whose visual rows come from encode nodes: prefill runs while they are encoded and arrive."""

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from typing import Any

from deepstack_jax.disagg.language.encoder_pool import EncoderPool
from deepstack_jax.disagg.language.fetch import Fetch, KnownPrompt
from deepstack_jax.disagg.language.incoming import BlockRows
from deepstack_jax.disagg.tasks import settle
from deepstack_jax.engine.prefix_cache import ImageSpan
from deepstack_jax.engine.request import GenerationPlan, Image
from deepstack_jax.engine.request import Request as EngineRequest
from deepstack_jax.engine.runner import Chunk, Runner
from deepstack_jax.models.vision import VisualRows
from deepstack_jax.programs import PromptArrays
from deepstack_jax.serving.looked_at import LookedAt, joined_rows
from deepstack_jax.serving.timeline import split_spans


@dataclass
class RemoteRows:
    """A language node's engine and the encode nodes that it uses.

    Attributes:
        runner: runs the engine.
        encoders: started and closed by the node.
        overlap: whether a request is prefilled while its rows arrive, or only once all of them have; the latter is for
            comparisons.
    """

    runner: Runner
    encoders: EncoderPool
    overlap: bool = field(default=True, kw_only=True)

    async def answer(
        self,
        payload: bytes,
        plan: Callable[[PromptArrays], GenerationPlan],
        deadline: float,
        timed: bool = False,
        **options: Any,
    ) -> AsyncGenerator[Chunk]:
        """The chunks of the answer to a request.

        Args:
            payload: what `disagg.wire.payload.pack` returned.
            plan: called with the prompt's tokens as soon as they are known; it may raise an error to refuse them.
            deadline: on time.monotonic()'s clock.
            timed: whether the chunks have a timeline.
            options: other fields of the engine's request: `tenant`, `salt`, `grammar`.

        Raises:
            TransferFailedError: the rows could not be fetched.
            NoEncoderError: no encoder is left, and this node can encode too. No chunk was given out.
            RequestFailed: as `Runner.run`.
        """
        started = time.monotonic()
        arrived: list[tuple[BlockRows, VisualRows]] = []
        request: EngineRequest | None = None

        def on_rows(block: BlockRows, rows: VisualRows) -> None:
            if request is None:
                arrived.append((block, rows))
            else:
                self.runner.add_rows(request, block.first_row, rows)

        async with self.encoders.fetch(secrets.token_hex(16), payload, deadline, on_rows) as fetch:
            prompt = await fetch.prompt
            prepared = engine_request(prompt, plan(prompt.arrays), deadline=deadline, **options)
            prepared.stages = [] if timed else None
            if self.overlap:
                prepared.on_admitted = _in_this_loop(lambda cached: fetch.want(cached, admitted=True))
                fetch.want(self.runner.find_cached(prepared), admitted=False)
            else:
                fetch.want(0, admitted=True)
                await fetch.done
            for block, rows in arrived:
                prepared.add_rows(block.first_row, rows)
            arrived.clear()
            request = prepared
            chunks = self.runner.run(request, request.plan, deadline)
            async with aclosing(chunks), aclosing(_unless_failed(chunks, fetch.done)) as answer:
                async for chunk in answer:
                    timings, split = chunk.timings | fetch.timings, _transfer_stats(fetch, started)
                    spans = split_spans(prepared, prompt, fetch, started) if timed else ()
                    yield replace(chunk, timings=timings, transfer_stats=split, timeline=spans)

    async def rows_of(self, payload: bytes, deadline: float, check: Callable[[int], None]) -> LookedAt:
        """A prompt with all of its rows, as encode nodes send them.

        Args:
            payload, deadline: as for `answer`.
            check: called with the prompt's tokens before anything is encoded; it may raise an error to refuse them.

        Raises:
            TransferFailedError, NoEncoderError: as `answer`.
        """
        arrived: dict[int, tuple[int, VisualRows]] = {}

        def on_rows(block: BlockRows, rows: VisualRows) -> None:
            arrived[block.first_row] = block.rows, rows

        async with self.encoders.fetch(secrets.token_hex(16), payload, deadline, on_rows) as fetch:
            prompt = await fetch.prompt
            check(int(prompt.arrays.lengths[0]))
            fetch.want(0, admitted=True)
            await fetch.done
        rows = await asyncio.to_thread(joined_rows, [arrived[first] for first in sorted(arrived)])
        return LookedAt(replace(prompt.arrays, rows=rows), [(image.first_row, image.rows) for image in prompt.images])

    def warm_up(self) -> None:
        """Compiles what places the rows of a token block in a chunk."""
        self.runner.engine.warm_up_rows(self.encoders.hello.block_size)


def engine_request(prompt: KnownPrompt, plan: GenerationPlan, **options: Any) -> EngineRequest:
    """A request whose rows come block by block, by `Runner.add_rows`; `options` are fields of the request."""
    request = EngineRequest.of_row(prompt.arrays, plan, **options)
    request.spans = tuple(ImageSpan(image.first_row, image.rows, image.digest) for image in prompt.images)
    request.images = [
        Image(block.first_row, block.rows, block.first_token, block.stop_token) for block in prompt.blocks.values()
    ]
    return request


def _in_this_loop(call: Callable[[int], None]) -> Callable[[int], None]:
    """`call`, for another thread, which does not wait for it."""
    loop = asyncio.get_running_loop()

    def schedule(value: int) -> None:
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(call, value)

    return schedule


async def _unless_failed(chunks: AsyncGenerator[Chunk], done: "asyncio.Future[None]") -> AsyncGenerator[Chunk]:
    """The chunks, or the error of `done` if it fails before the first one."""
    first = asyncio.ensure_future(anext(chunks))
    try:
        await asyncio.wait({first, done}, return_when=asyncio.FIRST_COMPLETED)
        if not first.done():
            done.result()
        yield await first
    finally:
        await settle(first)
    async for chunk in chunks:
        yield chunk


def _transfer_stats(fetch: Fetch, started: float) -> dict[str, Any]:
    """Builds `meta_info.split` of an answer, with intervals as [begin, end] in seconds since `started`."""

    def relative(intervals: list[Any]) -> list[list[float]]:
        return [[round(each.start - started, 6), round(each.end - started, 6)] for each in intervals]

    return {
        "encoder": fetch.encoder,
        "encoded": relative(fetch.encoded),
        "rounds": relative(fetch.rounds),
        "bytes": fetch.num_bytes,
    }
