"""The runner: the tokens of generate whatever the pace, in order, and no piece of work that goes wrong harms others."""

import asyncio
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import deepstack_jax as dsj
from deepstack_jax.engine.options import EngineOptions
from deepstack_jax.engine.runner import (
    Chunk,
    DeadlineError,
    Event,
    QueueFullError,
    RequestFailed,
    Runner,
    StoppingError,
)
from deepstack_jax.generation import encode_prompt, plan_generation
from deepstack_jax.processing.batch import prepare_batch
from deepstack_jax.testing.random_checkpoint import tiny_config, write_random_checkpoint
from tests.cases import IMAGE, batch_of
from tests.waiting import until

CONFIG = tiny_config(text_config={"num_hidden_layers": 1}, vision_config={"depth": 1, "deepstack_visual_indexes": [0]})
ONE_BY_ONE = EngineOptions(slots=1, decode_steps=1)
LONG = 1500  # tokens: a second of work and more at one a step


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> dsj.Model:
    path = tmp_path_factory.mktemp("checkpoint")
    write_random_checkpoint(path, CONFIG, seed=3, tokenizer=False)
    return dsj.load(path)


@pytest.fixture
def runner(model: dsj.Model) -> Iterator[Runner]:
    runner = Runner(model, max_waiting=4, options=EngineOptions(slots=4))
    yield runner
    runner.stop()
    assert runner.join(60)


def inputs_of(seed: int = 0, image: bool = False) -> dict[str, np.ndarray]:
    return batch_of(CONFIG, [[3, (IMAGE, (1, 4, 4)), 4]] if image else [[12]], seed=seed)


def work_of(model: dsj.Model, inputs: dict[str, np.ndarray], **options: Any) -> tuple[Any, Any]:
    batch = prepare_batch(model.config, **inputs)
    return batch, plan_generation(
        model, batch, dsj.SamplingOptions(**({"max_new_tokens": 8, "eos_token_id": []} | options))
    )


async def answer(runner: Runner, prompt: Any, plan: Any, seconds: float = 120.0) -> list[Chunk]:
    return [chunk async for chunk in runner.run(prompt, plan, time.monotonic() + seconds)]


def tokens_of(chunks: list[Chunk]) -> list[int]:
    return [token for chunk in chunks for token in chunk.tokens]


class Events:
    """Takes what a runner emits, and waits for the last of it."""

    def __init__(self) -> None:
        self.all: list[Event] = []
        self.first, self.ended = threading.Event(), threading.Event()

    def __call__(self, event: Event) -> None:
        self.all.append(event)
        self.first.set()
        if isinstance(event, RequestFailed) or event.finish_reason:
            self.ended.set()


@pytest.mark.parametrize("decode_steps", [1, 3, 64])
@pytest.mark.parametrize("image", [False, True])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.9, "top_k": 20, "seed": 5, "repetition_penalty": 1.2}])
def test_tokens_are_those_of_generate(model: dsj.Model, decode_steps: int, image: bool, options: dict[str, Any]):
    inputs = inputs_of(image=image)
    out = dsj.generate(model, **inputs, max_new_tokens=8, eos_token_id=[], **options, slots=4)
    batch, plan = work_of(model, inputs, **options)
    runner = Runner(model, options=EngineOptions(decode_steps=decode_steps))
    # pixels to encode, and rows that are there already
    for prompt in (batch, encode_prompt(model, batch)):
        chunks = asyncio.run(answer(runner, prompt, plan))
        assert tokens_of(chunks) == out.tokens[0].tolist()
        assert [chunk.finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
        assert chunks[-1].timings.keys() == {"queue", "encode", "prefill", "decode"}
        assert {chunk.prompt_tokens for chunk in chunks} == {inputs["input_ids"].shape[1]}
        sizes = {1: [1] * 8, 3: [1, 2, 3, 2], 64: [1, 2, 5]}  # two beside the prefill
        assert [len(chunk.tokens) for chunk in chunks] == sizes[decode_steps]
    runner.stop()


def test_an_end_token_ends_the_answer_and_is_part_of_it(model: dsj.Model, runner: Runner):
    inputs, drawn = inputs_of(), {"temperature": 2.0, "seed": 1}
    free = dsj.generate(model, **inputs, max_new_tokens=8, eos_token_id=[], **drawn).tokens[0].tolist()
    new = [i for i, token in enumerate(free) if token not in free[:i]]
    # the first token, one in the middle, and the last one allowed
    for i, max_new_tokens in ((0, 8), (new[len(new) // 2], 8), (new[-1], new[-1] + 1)):
        batch, plan = work_of(model, inputs, eos_token_id=[free[i], 299], max_new_tokens=max_new_tokens, **drawn)
        chunks = asyncio.run(answer(runner, batch, plan))
        assert tokens_of(chunks) == free[: i + 1]
        until(lambda: runner.engine.free_slots == 4)  # also of what was launched before the end was known
        assert chunks[-1].finish_reason == "stop"


def test_requests_run_together_and_each_has_the_tokens_of_its_own(model: dsj.Model, runner: Runner):
    works = [work_of(model, inputs_of(seed, image=seed % 2 == 0), max_new_tokens=30 - seed) for seed in range(8)]
    alone = [tokens_of(asyncio.run(answer(runner, *work))) for work in works]

    async def all_of_them() -> list[list[Chunk]]:
        return await asyncio.gather(*(answer(runner, *work) for work in works))

    together = asyncio.run(all_of_them())
    assert [tokens_of(chunks) for chunks in together] == alone
    assert max(chunks[-1].timings["queue"] for chunks in together) > 0  # eight of them, in four slots


def test_a_full_line_takes_no_more_until_a_place_is_given_back(model: dsj.Model):
    runner = Runner(model, max_waiting=2, options=ONE_BY_ONE)
    batch, plan = work_of(model, inputs_of())
    running, events = Events(), [Events() for _ in range(3)]
    deadline = time.monotonic() + 120
    long = runner.submit(*work_of(model, inputs_of(), max_new_tokens=LONG), deadline, running)
    assert running.first.wait(60)  # it has left the line
    first = runner.submit(batch, plan, deadline, events[0])
    runner.submit(batch, plan, deadline, events[1])
    with pytest.raises(QueueFullError, match="2 requests are waiting"):
        runner.submit(batch, plan, deadline, events[2])
    first.cancel()
    runner.submit(batch, plan, deadline, events[2])
    long.cancel()
    assert events[1].ended.wait(60)
    assert events[2].ended.wait(60)
    assert not events[0].all  # nobody hears of what was cancelled
    runner.stop()


def test_who_hears_the_end_finds_the_place_given_back(model: dsj.Model, runner: Runner):
    batch, plan = work_of(model, inputs_of())
    narrow = replace(encode_prompt(model, batch), input_ids=np.zeros((1, 0), np.int32))
    for prompt in (batch, narrow):
        ended, busy = threading.Event(), []

        def emit(event: Event) -> None:
            if isinstance(event, RequestFailed) or event.finish_reason:
                busy.append((runner.waiting, runner.busy_seconds))  # noqa: B023
                ended.set()  # noqa: B023

        runner.submit(prompt, plan, time.monotonic() + 120, emit)
        assert ended.wait(120)
        assert busy == [(0, 0.0)]


def test_a_cancelled_request_stops_and_the_next_begins(model: dsj.Model):
    runner = Runner(model, options=ONE_BY_ONE)
    long, short = work_of(model, inputs_of(), max_new_tokens=LONG), work_of(model, inputs_of())

    async def leave_early() -> tuple[int, list[int]]:
        chunks, heard = runner.run(*long, time.monotonic() + 120), 0
        async for chunk in chunks:
            heard += len(chunk.tokens)
            if heard > 3:
                break
        await chunks.aclose()
        return heard, tokens_of(await answer(runner, *short))

    heard, tokens = asyncio.run(leave_early())
    assert len(tokens) == 8
    assert heard < LONG / 2
    assert runner.waiting == 0
    runner.stop()


def test_deadlines_pass_in_line_and_while_running(model: dsj.Model):
    runner = Runner(model, options=ONE_BY_ONE)
    long, short = work_of(model, inputs_of(), max_new_tokens=LONG), work_of(model, inputs_of())
    asyncio.run(answer(runner, *short))

    async def both() -> list[Any]:
        return await asyncio.gather(
            answer(runner, *long, seconds=0.3), answer(runner, *short, seconds=0.1), return_exceptions=True
        )

    running, waiting = asyncio.run(both())
    assert isinstance(running, DeadlineError)
    assert "no answer within 0.3 s" in str(running)
    assert isinstance(waiting, DeadlineError)
    assert len(tokens_of(asyncio.run(answer(runner, *short)))) == 8
    runner.stop()


def test_a_failure_ends_its_own_request_alone(model: dsj.Model, runner: Runner, caplog: pytest.LogCaptureFixture):
    batch, plan = work_of(model, inputs_of(image=True))
    prompt = encode_prompt(model, batch)
    narrow = replace(prompt, rows=prompt.rows._replace(embeds=prompt.rows.embeds[:, :-5]))  # not D wide
    good, good_plan = work_of(model, inputs_of())

    async def three() -> list[Any]:
        works = [(good, good_plan), (narrow, plan), (good, good_plan)]
        return await asyncio.gather(*(answer(runner, *work) for work in works), return_exceptions=True)

    before, failed, after = asyncio.run(three())
    assert isinstance(failed, RequestFailed)
    assert "\n" not in str(failed)
    assert tokens_of(before) == tokens_of(after)
    assert len(tokens_of(after)) == 8
    assert runner.error is None  # what came after went well
    assert "a request failed" in caplog.text


def test_a_taker_that_fails_harms_nobody_else(model: dsj.Model, runner: Runner, caplog: pytest.LogCaptureFixture):
    def fail(event: Event) -> None:
        raise RuntimeError("the loop is closed")

    batch, plan = work_of(model, inputs_of())
    runner.submit(batch, plan, time.monotonic() + 60, fail)
    assert len(tokens_of(asyncio.run(answer(runner, batch, plan)))) == 8
    assert "the receiver of an answer failed" in caplog.text


def test_health_is_what_the_model_shows(model: dsj.Model, runner: Runner, caplog: pytest.LogCaptureFixture):
    assert runner.last_run is None
    assert asyncio.run(runner.health(timeout=120)) is None  # the self-test ran
    first = runner.last_run
    assert first is not None
    assert asyncio.run(runner.health()) is None
    assert runner.last_run == first  # it is recent enough
    assert asyncio.run(runner.health(idle_after=0)) is None
    assert runner.last_run > first

    # the last request failed on the device: a self-test says whether it was the request
    batch, plan = work_of(model, inputs_of(image=True))
    prompt = encode_prompt(model, batch)
    narrow = replace(prompt, rows=prompt.rows._replace(embeds=prompt.rows.embeds[:, :-5]))
    with pytest.raises(RequestFailed):
        asyncio.run(answer(runner, narrow, plan))
    assert runner.error is not None
    assert asyncio.run(runner.health()) is None
    assert runner.error is None

    # a device that computes something else than before
    other = {name: -array if name.endswith("lm_head.weight") else array for name, array in model.params.items()}
    assert any(other[name] is not array for name, array in model.params.items())
    runner.engine.model = dsj.Model(model.config, other)
    assert "before" in (asyncio.run(runner.health(idle_after=0)) or "")
    # a model that can't run at all
    runner.engine.model = dsj.Model(model.config, {name: array[..., :3] for name, array in model.params.items()})
    assert "the self-test failed" in (asyncio.run(runner.health(idle_after=0)) or "")


def test_a_stuck_device_is_not_healthy(model: dsj.Model):
    runner = Runner(model, options=EngineOptions(slots=1, decode_steps=64))
    events = Events()
    work = runner.submit(*work_of(model, inputs_of(), max_new_tokens=LONG), time.monotonic() + 120, events)
    assert events.first.wait(60)
    reason = None
    while reason is None and not events.ended.is_set():
        reason = asyncio.run(runner.health(stuck_after=0.0))
    assert "busy with one program" in (reason or "")
    work.cancel()
    runner.stop()


def test_stopping_refuses_ends_and_waits(model: dsj.Model):
    runner = Runner(model, options=ONE_BY_ONE)
    batch, plan = work_of(model, inputs_of())
    deadline = time.monotonic() + 120
    running, waiting = Events(), Events()
    runner.submit(*work_of(model, inputs_of(), max_new_tokens=LONG), deadline, running)
    runner.submit(batch, plan, deadline, waiting)
    assert running.first.wait(60)
    runner.stop()
    assert runner.join(60)
    assert isinstance(running.all[-1], StoppingError)
    assert isinstance(waiting.all[-1], StoppingError)
    with pytest.raises(StoppingError):
        runner.submit(batch, plan, deadline, Events())
    assert asyncio.run(runner.health()) == "the server is stopping"

    runner = Runner(model)
    events = [Events(), Events()]
    for one in events:
        runner.submit(batch, plan, deadline, one)
    runner.stop(grace=60)
    assert runner.join(60)
    for one in events:
        assert isinstance(one.all[-1], Chunk)
        assert one.all[-1].finish_reason == "length"


def test_an_error_in_the_thread_itself_fails_all_requests_at_once(model: dsj.Model, monkeypatch: pytest.MonkeyPatch):
    runner = Runner(model, options=ONE_BY_ONE)
    running, waiting = Events(), Events()
    deadline = time.monotonic() + 3600
    runner.submit(*work_of(model, inputs_of(), max_new_tokens=LONG), deadline, running)
    runner.submit(*work_of(model, inputs_of()), deadline, waiting)
    assert running.first.wait(60)
    monkeypatch.setattr(runner.engine, "step", lambda: [object()])  # an event that nothing expects
    for events in (running, waiting):
        assert events.ended.wait(60)
        assert isinstance(events.all[-1], RequestFailed)
    assert runner.dead() == "the device's thread has ended"
    with pytest.raises(StoppingError):
        runner.submit(*work_of(model, inputs_of()), deadline, waiting)
    with pytest.raises(ValueError, match="the engine could not start"):
        runner.warm_up()
