"""Compares the split with the whole model: rows, logits and tokens are equal bit for bit, over Mooncake."""

import asyncio
import io
import time
from collections import Counter
from collections.abc import Coroutine, Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
from PIL import Image

import deepstack_jax as dsj
from deepstack_jax.disagg.language.encoder_pool import EncoderPool
from deepstack_jax.disagg.language.fetch import TransferFailedError
from deepstack_jax.disagg.nodes import open_encode_server, open_encoder_pool
from deepstack_jax.disagg.wire.payload import pack
from deepstack_jax.engine.core import NewTokens
from deepstack_jax.engine.request import GenerationPlan, Request
from deepstack_jax.generation import encode_prompt, engine_for, plan_generation
from deepstack_jax.processing.batch import prepare_batch
from deepstack_jax.processing.sources import MediaFile
from deepstack_jax.programs import PromptArrays, all_logits
from deepstack_jax.testing.random_checkpoint import tiny_config, write_random_checkpoint
from tests.media import CASES, IMAGES, VIDEOS, media, opened
from tests.nodes import EncodeProcess, encode_process
from tests.whole_prompts import FetchedPrompt, fetch

BLOCK = 16  # tokens


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("split") / "model"
    write_random_checkpoint(path, tiny_config(), seed=2)
    return path


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def pair(request: pytest.FixtureRequest, checkpoint: Path) -> Iterator[tuple[dsj.Model, EncodeProcess]]:
    """The whole model, and a process that encodes with the same checkpoint."""
    with encode_process(checkpoint, request.param, BLOCK) as process:
        yield dsj.load(checkpoint, request.param), process


async def with_pool(encoders: EncoderPool, work: Coroutine[Any, Any, Any]) -> Any:
    """Runs `work` while at least one encoder is connected."""
    await encoders.start()
    try:
        async with asyncio.timeout(60):
            while not encoders.num_encoders:
                assert not encoders.refused, encoders.refused
                await asyncio.sleep(0.02)
        return await work
    finally:
        await encoders.close()


def fetch_all(model: dsj.Model, process: EncodeProcess, payloads: list[bytes], **options: Any) -> list[FetchedPrompt]:
    """Fetches the prompts of all payloads at once."""
    text_only = dsj.Model(model.config, model.text_params, model.path, model.eos_token_ids, model.pad_token_id)
    encoders = open_encoder_pool(text_only, [process.endpoint], block_size=BLOCK, **options)

    async def work() -> list[FetchedPrompt]:
        deadline = time.monotonic() + 100
        return await asyncio.gather(*(fetch(encoders, f"r{i}", data, deadline) for i, data in enumerate(payloads)))

    return asyncio.run(with_pool(encoders, work()))


def whole_prompt(model: dsj.Model, case: str) -> PromptArrays:
    images, videos = media(case)
    arrays = dsj.prepare(model, "What is this?", images=images, videos=videos)
    return encode_prompt(model, prepare_batch(model.config, **arrays))


@pytest.mark.parametrize("num_blocks", [1, 3, 64])
@pytest.mark.parametrize("case", CASES)
def test_the_split_gives_the_bits_of_the_whole(pair: tuple[dsj.Model, EncodeProcess], case: str, num_blocks: int):
    model, process = pair
    whole = whole_prompt(model, case)
    (fetched,) = fetch_all(model, process, [pack("What is this?", *media(case))], num_blocks=num_blocks)
    split = fetched.prompt
    rows = int((np.asarray(whole.visual_index) >= 0).sum())
    for name in ("input_ids", "position_ids", "lengths", "rope_deltas", "visual_index"):
        np.testing.assert_array_equal(getattr(split, name), getattr(whole, name), err_msg=name)
    for arrived, encoded in zip(split.rows or (), whole.rows or (), strict=True):
        np.testing.assert_array_equal(np.asarray(arrived)[:rows], np.asarray(encoded)[:rows])
        assert (arrived.shape, arrived.dtype) == (encoded.shape, encoded.dtype)  # the same programs
    np.testing.assert_array_equal(
        *(np.asarray(all_logits(model.config, model.text_params, p))[:, : whole.lengths[0]] for p in (whole, split))
    )
    plan = plan_generation(model, whole, dsj.SamplingOptions(max_new_tokens=8, eos_token_id=[]))
    assert answer_to(model, whole, plan) == answer_to(model, split, plan)
    assert sum(block.rows for block in fetched.known.blocks.values()) == rows
    least = -(-len(fetched.known.blocks) // max(1, num_blocks // 4))
    # a round has only blocks whose images are encoded
    assert least <= len(fetched.fetch.rounds) <= least + len(fetched.known.images)


def answer_to(model: dsj.Model, prompt: PromptArrays, plan: GenerationPlan) -> list[int]:
    events = list(engine_for(model, [Request.of_row(prompt, plan)]).run())
    return [token for event in events if isinstance(event, NewTokens) for token in event.tokens]


def test_only_blocks_with_visual_rows_cross_the_wire(pair: tuple[dsj.Model, EncodeProcess]):
    """Such a block has its rows and 16 bytes per token. Nothing is sent twice, in one round or in many."""
    model, process = pair
    text = "a long story " * 400
    payload = pack(text, *media("one image"))
    itemsize = model.dtype.itemsize
    for num_blocks in (1, 64):
        (fetched,) = fetch_all(model, process, [payload], num_blocks=num_blocks)
        tokens = int(fetched.prompt.lengths[0])
        index = np.asarray(fetched.prompt.visual_index)[0]
        visual, blocks = int((index >= 0).sum()), sorted(fetched.known.blocks)
        assert blocks == np.unique(np.flatnonzero(index >= 0) // BLOCK).tolist()
        sent = sum(min(BLOCK, tokens - BLOCK * block) for block in blocks)
        rows = visual * (1 + model.config.num_deepstack_levels) * model.config.text.hidden_size * itemsize
        assert tokens > 500
        assert fetched.fetch.num_bytes == rows + 16 * sent + 64 * (0 in blocks)  # aux_datas with the first block


def test_one_image_is_encoded_once_and_the_cache_keeps_its_bound(checkpoint: Path):
    model = dsj.load(checkpoint, "float32")
    with encode_process(checkpoint, "float32", BLOCK) as process:
        payload = pack("What is this?", *media("three images"))
        other = pack("Another question?", *media("three images"))
        fetch_all(model, process, [payload, other, payload])
        fetch_all(model, process, [other])
        counters = process.command()
        assert (counters["encoded"], counters["found"]) == (3, 9)
        assert all(name.startswith("visual.") for name in counters["parameters"])
        row = model.config.text.hidden_size * (1 + model.config.num_deepstack_levels) * 4
        for side in range(64, 1000, 64):  # more than the one megabyte of the process's cache
            file = io.BytesIO()
            Image.new("RGB", (side, 96), (side % 255, 0, 0)).save(file, "PNG")
            fetch_all(model, process, [pack("What is this?", [opened(file.getvalue())], [])])
            assert process.command()["cached_bytes"] <= 1 << 20
        assert process.command()["cached_bytes"] > (1 << 20) - 400 * row


def test_sixty_four_requests_share_a_pool_for_three(pair: tuple[dsj.Model, EncodeProcess]):
    model, process = pair
    payloads = [pack(f"What is number {i}?", *media("one image")) for i in range(64)]
    prompts = fetch_all(model, process, payloads, num_blocks=12, share=4)
    texts = [model.processor.tokenizer.decode(fetched.prompt.input_ids[0]) for fetched in prompts]
    assert all(f"number {i}?" in text for i, text in enumerate(texts))


def test_with_two_encoders_sixty_four_requests_end_about_in_order(
    pair: tuple[dsj.Model, EncodeProcess], checkpoint: Path
):
    """Each encoder gets every second one and answers about in order.

    Its decoder processes prepare pictures side by side, so one that the machine holds up is overtaken by those that the
    others prepare meanwhile: by how many is up to the machine. If order meant nothing, the mean would be 8.
    """
    model, process = pair
    dtype = model.dtype.name
    payloads = [pack(f"What is number {i}?", *media("one image")) for i in range(64)]
    ended: list[int] = []
    with encode_process(checkpoint, dtype, BLOCK) as other:
        text_only = dsj.Model(model.config, model.text_params, model.path, model.eos_token_ids, model.pad_token_id)
        endpoints = [process.endpoint, other.endpoint]
        encoders = open_encoder_pool(text_only, endpoints, block_size=BLOCK, num_blocks=12, share=4)

        async def one(number: int) -> tuple[int, str]:
            fetched = await fetch(encoders, f"r{number}", payloads[number], time.monotonic() + 100)
            ended.append(number)
            return fetched.encoder, model.processor.tokenizer.decode(fetched.prompt.input_ids[0])

        async def work() -> list[tuple[int, str]]:
            while encoders.num_encoders < 2:
                await asyncio.sleep(0.02)
            await asyncio.gather(
                *(fetch(encoders, f"w{i}", payloads[0], time.monotonic() + 100) for i in range(4))
            )  # compile
            return await asyncio.gather(*map(one, range(64)))

        answers = asyncio.run(with_pool(encoders, work()))
        assert all(f"number {i}?" in text for i, (_, text) in enumerate(answers))
        assert Counter(encoder for encoder, _ in answers) == {0: 32, 1: 32}
        assert encoders.receiver.attempts == 4 + 64  # one per request
        assert other.command()["jobs"] == process.command()["jobs"] == 0
    for encoder in (0, 1):
        own = [number for number in ended if answers[number][0] == encoder]
        overtaken = [sum(later > number for later in own[:place]) for place, number in enumerate(own)]
        assert fmean(overtaken) <= 2, overtaken


def test_an_invalid_request_fails_with_the_reason(pair: tuple[dsj.Model, EncodeProcess]):
    model, process = pair
    images, _ = media("one image")
    with pytest.raises(TransferFailedError, match="placeholder") as error:
        fetch_all(model, process, [pack("<|vision_start|><|image_pad|><|image_pad|><|vision_end|>", images, [])])
    assert error.value.status == 400


Asked = tuple[Any, list[MediaFile], list[Any], dict[str, Any]]


def requests_of_many_kinds() -> dict[str, Asked]:
    """Creates all requests anew, because preparing one reads its files."""
    question = "What is this?"
    frames = lambda: [opened(IMAGES[name]()) for name in ("MPO", "JPEG RGB", "PNG RGB", "AVIF RGB")]  # noqa: E731
    part = {"type": "video", "video": frames(), "fps": 1.5}
    messages = [{"role": "user", "content": [part, {"type": "image"}, question]}]
    return {
        **{name: (question, [opened(IMAGES[name]())], [], {}) for name in SENT_IMAGES},
        **{name: (question, [], [MediaFile(VIDEOS[name]())], {}) for name in SENT_VIDEOS},
        "frames": (question, [], [frames()], {}),
        "frames in a message": (messages, [opened(IMAGES["MPO"]())], [], {"max_pixels": 4096}),
    }


SENT_IMAGES = ("MPO rotated", "JPEG CMYK", "WebP lossless RGBA", "TIFF LZW", "AVIF RGB")
SENT_VIDEOS = ("webm", "webp", "png", "frames in a data URI")


def test_every_kind_of_file_goes_through_real_nodes(pair: tuple[dsj.Model, EncodeProcess]):
    model, process = pair
    payloads = [pack(*request) for request in requests_of_many_kinds().values()]
    prompts = fetch_all(model, process, payloads)
    for (name, request), fetched in zip(requests_of_many_kinds().items(), prompts, strict=True):
        prompt, images, videos, options = request
        arrays = model.processor.prepare(prompt, images=images, videos=videos, **options)
        whole = encode_prompt(model, prepare_batch(model.config, **arrays))
        for field in ("input_ids", "position_ids", "rope_deltas"):
            np.testing.assert_array_equal(getattr(fetched.prompt, field), getattr(whole, field), err_msg=name)
        # the whole model's rows have images before videos, and the split's rows are in the order of their tokens
        for arrived, encoded in zip(rows_by_token(fetched.prompt), rows_by_token(whole), strict=True):
            np.testing.assert_array_equal(arrived, encoded, err_msg=name)


def rows_by_token(prompt: PromptArrays) -> list[np.ndarray]:
    index = np.asarray(prompt.visual_index)
    return [np.asarray(rows)[index[index >= 0]] for rows in prompt.rows or ()]


def test_invalid_requests_do_not_affect_others(pair: tuple[dsj.Model, EncodeProcess]):
    """The requests have an image damaged after its header, an unsupported format, or bytes that are not a request."""
    model, process = pair
    good = pack("What is this?", [opened(IMAGES["MPO"]())], [])
    cut = pack("What is this?", [opened(IMAGES["MPO"]()[:3000])], [])
    unknown = good.replace(b"MPO     ", b"HEIF    ")
    reasons = {cut: "truncated", unknown: "format HEIF are not supported here", b"junk": "can't read the request"}
    text_only = dsj.Model(model.config, model.text_params, model.path, model.eos_token_ids, model.pad_token_id)
    encoders = open_encoder_pool(text_only, [process.endpoint], block_size=BLOCK)

    async def work() -> list[Any]:
        payloads = [good, *(payload for bad in reasons for payload in (bad, good))]
        deadline = time.monotonic() + 100
        asked = (fetch(encoders, f"r{i}", payload, deadline) for i, payload in enumerate(payloads))
        return await asyncio.gather(*asked, return_exceptions=True)

    answers = asyncio.run(with_pool(encoders, work()))
    assert all(isinstance(fetched, FetchedPrompt) for fetched in answers[::2])
    for error, reason in zip(answers[1::2], reasons.values(), strict=True):
        assert isinstance(error, TransferFailedError)
        assert (error.status, reason in str(error)) == (400, True), error
    assert encoders.receiver.attempts == len(answers)  # one per request, so no attempt was repeated


def test_a_failure_inside_the_encoder_is_reported_with_its_reason(checkpoint: Path):
    """It is reported neither as a bad request nor as a lost encoder. Weights are missing, so every attempt fails."""
    model = dsj.load(checkpoint, "float32")
    text_only = dsj.Model(model.config, model.text_params, model.path, model.eos_token_ids, model.pad_token_id)

    async def work() -> None:
        server = open_encode_server(text_only, block_size=BLOCK)
        await server.start()
        encoders = open_encoder_pool(text_only, [server.listener.endpoint], block_size=BLOCK)
        try:
            await with_pool(encoders, fetch(encoders, "r", pack("?", *media("one image")), time.monotonic() + 60))
        finally:
            await server.close()

    with pytest.raises(
        TransferFailedError, match=r"^encoder 0: encoding .* failed \(\w+\): see the encode node's log$"
    ) as error:
        asyncio.run(work())
    assert error.value.status == 500
    assert "no encoder" not in str(error.value)


def test_a_node_with_another_model_is_refused_with_the_reason(checkpoint: Path, tmp_path: Path):
    write_random_checkpoint(tmp_path / "other", tiny_config(), seed=3)
    other = dsj.load(tmp_path / "other", "float32")
    with encode_process(checkpoint, "float32", BLOCK) as process:
        encoders = open_encoder_pool(other, [process.endpoint], block_size=BLOCK)

        async def until_refused() -> str:
            await encoders.start()
            try:
                async with asyncio.timeout(20):
                    while not encoders.refused:
                        await asyncio.sleep(0.02)
                return encoders.refused[process.endpoint]
            finally:
                await encoders.close()

        assert "load the same checkpoint on both" in asyncio.run(until_refused())


def test_without_an_encoder_a_request_fails_immediately_with_the_reason(checkpoint: Path):
    model = dsj.load(checkpoint, "float32", parts=("language_model.",))
    encoders = open_encoder_pool(model, ["tcp://127.0.0.1:9"], block_size=BLOCK)

    async def work() -> None:
        await encoders.start()
        try:
            await fetch(encoders, "r", b"", time.monotonic() + 60)
        finally:
            await encoders.close()

    with pytest.raises(TransferFailedError, match=r"^no encoder is connected$") as error:
        asyncio.run(work())
    assert error.value.status == 503
