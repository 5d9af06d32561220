"""Encoding, transfer and prefill at the same time: what runs when, what is spared, and that no token depends on it.

The reference is an engine of the same shape with the whole model. Encode nodes run in this process and write through
Mooncake; a gate in front of an encoder shows what happens before its next image is encoded.
"""

import asyncio
import io
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import Future
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import deepstack_jax as dsj
from deepstack_jax.disagg.encode.server import EncodeServer
from deepstack_jax.disagg.encode.worker import EncodedImage
from deepstack_jax.disagg.language.fetch import TransferFailedError
from deepstack_jax.disagg.nodes import open_encode_server, open_encoder_pool
from deepstack_jax.disagg.wire.payload import pack
from deepstack_jax.engine.options import EngineOptions
from deepstack_jax.engine.request import GenerationPlan
from deepstack_jax.engine.runner import Chunk, Runner
from deepstack_jax.generation import plan_generation
from deepstack_jax.processing.batch import VisionInput, prepare_batch
from deepstack_jax.processing.sources import MediaFile
from deepstack_jax.programs import PromptArrays, decode_loop, prefill_chunk, write_rows
from deepstack_jax.serving.remote_rows import RemoteRows
from tests.nodes import write_image_sensitive_checkpoint

BLOCK, CHUNK = 16, 128  # tokens
IMAGE_TOKENS = 64  # 256 x 256 pixels
STORY = "a story of " * 20  # more than a chunk
OPTIONS = EngineOptions(slots=2, chunk=CHUNK, kv_bytes=1 << 22)
SAMPLING = dsj.SamplingOptions(max_new_tokens=12, eos_token_id=[])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> dsj.Model:
    path: Path = tmp_path_factory.mktemp("overlap") / "model"
    write_image_sensitive_checkpoint(path)
    return dsj.load(path, "float32")


@pytest.fixture(scope="module")
def whole(model: dsj.Model) -> Iterator[Runner]:
    runner = Runner(model, options=OPTIONS)
    yield runner
    runner.stop()
    runner.join()


@pytest.fixture
def runner(model: dsj.Model) -> Iterator[Runner]:
    runner = Runner(text_only(model), options=OPTIONS)
    yield runner
    runner.stop()
    runner.join()


def text_only(model: dsj.Model) -> dsj.Model:
    return dsj.Model(model.config, model.text_params, model.path, model.eos_token_ids, model.pad_token_id)


def picture(seed: int) -> MediaFile:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), np.uint8).repeat(16, 0).repeat(16, 1)
    Image.fromarray(pixels).save(file, "PNG")
    return MediaFile(file.getvalue(), "PNG")


def asked(seeds: tuple[int, ...], question: str = "What are these?") -> tuple[list[dict[str, Any]], list[MediaFile]]:
    """A prompt with a story, then pictures with a few words between them, then a question."""
    parts = [part for number in range(len(seeds)) for part in (f"Number {number}:", {"type": "image"})]
    return [{"role": "user", "content": [STORY, *parts, question]}], [picture(seed) for seed in seeds]


async def expected(whole: Runner, seeds: tuple[int, ...], question: str = "What are these?") -> list[int]:
    """The tokens of the whole model."""
    messages, images = asked(seeds, question)
    batch = prepare_batch(whole.model.config, **dsj.prepare(whole.model, messages, images=images))
    plan = plan_generation(whole.model, batch, SAMPLING)
    return [token async for chunk in whole.run(batch, plan, time.monotonic() + 100) for token in chunk.tokens]


class Gate:
    """Stands in front of a server's encoder and lets images through one by one."""

    def __init__(self, server: EncodeServer):
        self._submit, self._waiting = server.worker.submit, []  # type: ignore[var-annotated]
        server.worker.submit = self._hold  # type: ignore[method-assign]

    @property
    def num_waiting(self) -> int:
        return sum(not future.cancelled() for _, future in self._waiting)

    def _hold(self, visual: VisionInput, key: bytes | None = None) -> "Future[EncodedImage]":
        future: Future[EncodedImage] = Future()
        self._waiting.append(((visual, key), future))
        return future

    def open(self, count: int = 1) -> None:
        for _ in range(count):
            arguments, future = self._waiting.pop(0)
            encoding = self._submit(*arguments)
            encoding.add_done_callback(lambda done, future=future: future.set_result(done.result()))


@asynccontextmanager
async def nodes(
    model: dsj.Model, runner: Runner, encoders: int = 1, **options: Any
) -> AsyncIterator[tuple[RemoteRows, list[EncodeServer]]]:
    """Encode nodes without a cache, and a language node that is connected to all of them."""
    servers = [open_encode_server(model, block_size=BLOCK, cache_bytes=0) for _ in range(encoders)]
    for server in servers:
        await server.start()
    endpoints = [server.listener.endpoint for server in servers]
    pool = open_encoder_pool(runner.model, endpoints, block_size=BLOCK, num_blocks=16)
    await pool.start()
    try:
        await until(lambda: pool.num_encoders == encoders)
        yield RemoteRows(runner, pool, **options), servers
    finally:
        await pool.close()
        for server in servers:
            await server.close()


async def until(condition: Callable[[], Any], seconds: float = 60.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


async def answer(remote: RemoteRows, seeds: tuple[int, ...], question: str = "What are these?") -> list[Chunk]:
    def plan(prompt: PromptArrays) -> GenerationPlan:
        return plan_generation(remote.runner.model, prompt, SAMPLING)

    messages, images = asked(seeds, question)
    chunks = remote.answer(pack(messages, images, []), plan, time.monotonic() + 100)
    return [chunk async for chunk in chunks]


def tokens_of(chunks: list[Chunk]) -> list[int]:
    return [token for chunk in chunks for token in chunk.tokens]


def prefilled(runner: Runner) -> int:
    """Tokens of the only request's prompt that are in launched chunks."""
    return max((entry.prefilled for entry in list(runner.engine.scheduler.running.values())), default=0)


def run(work: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(work())  # type: ignore[arg-type]


@pytest.mark.parametrize("overlap", [True, False])
def test_the_tokens_are_those_of_the_whole_model(model: dsj.Model, whole: Runner, runner: Runner, overlap: bool):
    async def work() -> None:
        async with nodes(model, runner, overlap=overlap) as (remote, _):
            chunks = await answer(remote, (1, 2, 3))
            assert tokens_of(chunks) == await expected(whole, (1, 2, 3))
            assert tokens_of(chunks) != await expected(whole, (1, 2, 4))  # it depends on the last picture
            split = chunks[-1].transfer_stats
            assert split is not None
            assert len(split["encoded"]) == 3
            assert not remote.encoders.receiver.requests

    run(work)


def test_chunks_run_as_soon_as_their_rows_are_there(model: dsj.Model, whole: Runner, runner: Runner):
    async def work() -> None:
        async with nodes(model, runner) as (remote, [server]):
            gate = Gate(server)
            answering = asyncio.create_task(answer(remote, (1, 2, 3, 4)))
            await until(lambda: gate.num_waiting == 4)
            await until(lambda: prefilled(runner) >= CHUNK)  # the story, before any picture is encoded
            await asyncio.sleep(0.2)
            begun = prefilled(runner)
            assert begun < len(STORY) + IMAGE_TOKENS
            gate.open(2)
            await until(lambda: prefilled(runner) > begun)  # before the others are encoded
            await asyncio.sleep(0.2)
            [entry] = runner.engine.scheduler.running.values()
            assert prefilled(runner) < entry.job.ready < entry.job.prompt_tokens
            [request] = remote.encoders.receiver.requests.values()
            assert not request.granted  # no block is held while the next picture is encoded
            gate.open(2)
            assert tokens_of(await answering) == await expected(whole, (1, 2, 3, 4))

    run(work)


def test_no_program_of_the_language_node_compiles_after_its_warm_up(model: dsj.Model, runner: Runner):
    programs = prefill_chunk, decode_loop, write_rows

    async def work() -> None:
        async with nodes(model, runner) as (remote, _):
            runner.warm_up()
            remote.warm_up()
            compiled = [program._cache_size() for program in programs]
            await answer(remote, (1, 2))
            assert [program._cache_size() for program in programs] == compiled

    run(work)


def test_rows_leave_the_device_after_their_chunk(model: dsj.Model, runner: Runner):
    async def work() -> None:
        async with nodes(model, runner) as (remote, [server]):
            gate = Gate(server)
            answering = asyncio.create_task(answer(remote, (1, 2, 3, 4)))
            await until(lambda: gate.num_waiting == 4)
            gate.open(3)
            await until(lambda: prefilled(runner) >= 2 * CHUNK)
            await asyncio.sleep(0.2)
            [request] = list(runner.engine._requests.values())
            assert all(image.stop_token > prefilled(runner) for image in request.images)
            held = [image for image in request.images if image.encoded is not None]
            assert sum(image.rows for image in held) <= CHUNK + BLOCK
            gate.open()
            await answering

    run(work)


def test_a_prefix_in_the_cache_spares_its_grants_its_transfer_and_its_encoding(
    model: dsj.Model, whole: Runner, runner: Runner
):
    async def work() -> None:
        async with nodes(model, runner) as (remote, [server]):
            first = await answer(remote, (1, 2, 3))
            assert (first[-1].cached_tokens, server.worker.num_encoded) == (0, 3)
            again = await answer(remote, (1, 2, 3), "Really?")
            cached = again[-1].cached_tokens
            assert cached >= 2 * CHUNK
            assert server.worker.num_encoded < 6
            for chunk in (first[-1], again[-1]):
                assert chunk.transfer_stats is not None
            assert again[-1].transfer_stats["bytes"] < first[-1].transfer_stats["bytes"] / 2  # type: ignore[index]
            assert tokens_of(again) == await expected(whole, (1, 2, 3), "Really?")
            before = server.worker.num_encoded
            other = await answer(remote, (9, 2, 3), "Really?")  # another picture of the same size in the same place
            assert other[-1].cached_tokens == CHUNK
            assert server.worker.num_encoded == before + 3
            assert tokens_of(other) == await expected(whole, (9, 2, 3), "Really?")

    run(work)


def test_another_encoder_continues_with_the_rows_that_are_missing(model: dsj.Model, whole: Runner, runner: Runner):
    """Its rows have the same bits. What has arrived, and has been prefilled, is not asked for again."""

    async def work() -> None:
        async with nodes(model, runner, encoders=2) as (remote, servers):
            gates = [Gate(server) for server in servers]
            answering = asyncio.create_task(answer(remote, (1, 2, 3, 4)))
            await until(lambda: any(gate.num_waiting for gate in gates))
            first = next(place for place, gate in enumerate(gates) if gate.num_waiting)
            gates[first].open(2)
            await until(lambda: servers[first].worker.num_encoded == 2 and prefilled(runner) > CHUNK)
            await until(lambda: not remote.encoders.receiver.pool.num_used)
            await servers[first].close()
            other = gates[1 - first]
            await until(lambda: other.num_waiting)
            await asyncio.sleep(0.2)
            assert other.num_waiting <= 3  # the third and fourth, and the second where they share a token block
            other.open(other.num_waiting)
            assert tokens_of(await answering) == await expected(whole, (1, 2, 3, 4))
            assert remote.encoders.receiver.attempts == 2
            gone, left = (remote.encoders.encoders[place] for place in (first, 1 - first))
            assert (gone.state, gone.requests, gone.failures) == ("unreachable", 1, 1)
            assert (left.state, left.requests, left.failures) == ("ready", 1, 0)
            assert left.num_bytes > 0 < gone.num_bytes
            *_, lost, moved = ((event.node, event.what) for event in remote.encoders.events)
            assert lost == (gone.name, gone.reason)
            assert moved == (left.name, f"took over a request of {gone.name}")

    run(work)


def test_a_fetch_that_fails_ends_its_request_in_the_engine(model: dsj.Model, runner: Runner):
    async def work() -> None:
        async with nodes(model, runner) as (remote, [server]):
            gate = Gate(server)
            answering = asyncio.create_task(answer(remote, (1, 2)))
            await until(lambda: gate.num_waiting == 2 and prefilled(runner) >= CHUNK)
            await server.close()
            with pytest.raises(TransferFailedError, match="no encoder is left"):
                await answering
            assert "a request failed: no encoder is left" in [*remote.encoders.events][-1].what
            await until(lambda: not runner.waiting)
            assert runner.engine.free_slots == 2

    run(work)


def test_a_client_that_leaves_frees_both_nodes(model: dsj.Model, runner: Runner):
    async def work() -> None:
        async with nodes(model, runner) as (remote, [server]):
            gate = Gate(server)
            answering = asyncio.create_task(answer(remote, (1, 2)))
            await until(lambda: gate.num_waiting == 2 and prefilled(runner) >= CHUNK)
            answering.cancel()
            with pytest.raises(asyncio.CancelledError):
                await answering
            await until(lambda: not runner.waiting and not server.num_attempts)
            assert gate.num_waiting == 0  # the pictures have left the encoder's queue
            assert not remote.encoders.receiver.requests

    run(work)
