"""The engine turn by turn: what it refuses, how failures stay with their request, and where prompts and answers end."""

import asyncio
import json
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import pytest

import deepstack_jax as dsj
from deepstack_jax.engine import followers
from deepstack_jax.engine.core import Engine, Event, Failed, NewTokens, Stopped
from deepstack_jax.engine.options import EngineOptions
from deepstack_jax.engine.request import Request
from deepstack_jax.engine.runner import Runner
from deepstack_jax.engine.scheduler import NeverFits, QueueFull
from deepstack_jax.engine.shape import EngineShape
from deepstack_jax.models.vision import separate_deepstack_embeds
from deepstack_jax.programs import decode_loop, prefill_chunk, write_rows
from deepstack_jax.testing.random_checkpoint import write_random_checkpoint
from tests.cases import IMAGE, VIDEO, batch_of
from tests.counting_grammar import CountingGrammar
from tests.engine_questions import CONFIG, SHAPE, Inputs, Question, ask, first_tokens, inputs_of, with_one_pixel_changed

PAGES = 21


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> dsj.Model:
    path = tmp_path_factory.mktemp("checkpoint")
    write_random_checkpoint(path, CONFIG, seed=3, tokenizer=False)
    return dsj.load(path)


def engine_of(model: dsj.Model, shape: EngineShape = SHAPE, **options: int | bool) -> Engine:
    return Engine(model, shape, PAGES, **options)


def request_of(question: Question, row: int = 0) -> Request:
    return Request.of_row(question.batch, question.plan, row)


def add_all(engine: Engine, questions: Iterable[Question]) -> list[Request]:
    requests = [request_of(question) for question in questions]
    for request in requests:
        engine.add(request)
    return requests


def run(engine: Engine, turns: int = 200) -> dict[Request, list[Event]]:
    """The events of each request until the engine is idle."""
    events = defaultdict(list)
    for _ in range(turns):
        for event in engine.step():
            events[event.request].append(event)
        if engine.idle:
            return events
    raise AssertionError(f"not idle after {turns} turns")


def tokens_of(events: list[Event]) -> list[int]:
    return [token for event in events if isinstance(event, NewTokens) for token in event.tokens]


def greedy_by_forward(model: dsj.Model, inputs: Inputs, count: int) -> list[int]:
    """The likeliest tokens by `forward` over the whole prompt and answer, which PyTorch's parity is shown on."""
    tokens: list[int] = []
    for _ in range(count):
        ids = np.concatenate([inputs["input_ids"], np.asarray([tokens], np.int64).reshape(1, -1)], axis=1)
        known = {name: array for name, array in inputs.items() if name not in ("attention_mask", "mm_token_type_ids")}
        logits = np.asarray(dsj.forward(model, **(known | {"input_ids": ids})))[0, -1]
        tokens.append(int(logits.argmax()))
    return tokens


class TestRefusals:
    def test_a_request_that_never_fits_is_told_the_numbers(self, model: dsj.Model):
        engine = Engine(model, SHAPE, 4)
        question = ask(model, inputs_of(40), max_new_tokens=10)  # 49 tokens in the cache
        with pytest.raises(
            NeverFits, match=r"40 prompt tokens and 10 new ones need 4 KV pages .* holds 3 \(48 tokens\)"
        ):
            engine.add(request_of(question))
        engine.add(request_of(ask(model, inputs_of(40), max_new_tokens=9)))
        assert engine.waiting == 1

    def test_a_full_line(self, model: dsj.Model):
        engine = engine_of(model, max_waiting=2)
        question = ask(model, inputs_of(4))
        add_all(engine, [question] * 2)
        with pytest.raises(QueueFull, match="2 requests are waiting already"):
            engine.add(request_of(question))
        engine.step()
        engine.add(request_of(question))  # two of them have slots
        assert len(run(engine)) == 3

    def test_more_end_tokens_than_rows_have_room_for(self, model: dsj.Model):
        question = ask(model, inputs_of(4), eos_token_id=range(100, 117))
        with pytest.raises(ValueError, match="17 end tokens: give at most 16"):
            engine_of(model).add(request_of(question))

    def test_a_request_with_fewer_end_tokens_than_there_is_room_for(self, model: dsj.Model):
        many = ask(model, inputs_of(4), eos_token_id=range(17))
        few = ask(model, inputs_of(5))
        engine = engine_of(model, end_tokens=32)
        events = run_all(engine, [many, few])
        assert tokens_of(events[1]) == tokens_of(run_all(engine_of(model), [few])[0])


def run_all(engine: Engine, questions: Iterable[Question]) -> list[list[Event]]:
    requests = add_all(engine, questions)
    events = run(engine)
    return [events[request] for request in requests]


class TestAnswers:
    """Against `forward` without a cache, pages or chunks."""

    @pytest.mark.parametrize("length", [1, 16, 31, 32, 33, 64, 70])
    def test_a_prompt_that_ends_on_either_side_of_a_border(self, model: dsj.Model, length: int):
        inputs = first_tokens(inputs_of(70), length)
        (events,) = run_all(engine_of(model), [ask(model, inputs, max_new_tokens=4)])
        assert tokens_of(events) == greedy_by_forward(model, inputs, 4)

    @pytest.mark.parametrize(
        "row",
        [
            pytest.param((25, (IMAGE, (1, 8, 8)), 24), id="an image across chunks"),
            pytest.param((3, (VIDEO, (2, 4, 4)), 5, (IMAGE, (1, 4, 4)), 30), id="a video before an image"),
            pytest.param((2, (IMAGE, (1, 8, 8)), 3, (IMAGE, (1, 8, 8)), 2), id="two images across a border"),
            pytest.param((20, (VIDEO, (3, 4, 8)), 2), id="a video whose frames are in two chunks"),
        ],
    )
    def test_images_and_videos(self, model: dsj.Model, row: tuple):
        inputs = inputs_of(*row, seed=4)
        (events,) = run_all(engine_of(model), [ask(model, inputs, max_new_tokens=4)])
        assert tokens_of(events) == greedy_by_forward(model, inputs, 4)

    def test_rows_of_one_batch(self, model: dsj.Model):
        """Their images stand one after another in the batch's visual rows."""
        rows = [[7, (IMAGE, (1, 4, 4)), 30], [12], [30, (IMAGE, (1, 4, 8)), 4]]
        inputs = batch_of(CONFIG, rows, seed=2)
        expected = dsj.generate(model, **inputs, max_new_tokens=5, eos_token_id=[]).tokens
        batch = ask(model, inputs)
        for row in (2, 0, 1):
            engine, request = engine_of(model), request_of(batch, row)
            engine.add(request)
            assert tokens_of(run(engine)[request]) == expected[row].tolist()

    @pytest.mark.parametrize("shared", [1, 2, 3], ids=["one row", "two rows", "three rows"])
    def test_last_pieces_full_of_visual_tokens(self, model: dsj.Model, shared: int):
        """More rows of a program than a chunk has tokens."""
        shape = EngineShape(slots=4, chunk=32, page=16, tail_rows=((16, 3), (32, 1)))
        prompts = [inputs_of(1, (IMAGE, (1, 4, 12)), 1, seed=seed) for seed in range(shared)]
        questions = [ask(model, each, max_new_tokens=3) for each in prompts]
        engine, requests = engine_of(model, shape), [Request.of_row(each.prompt, each.plan) for each in questions]
        for request in requests:
            engine.add(request)
        events = run(engine)
        assert [tokens_of(events[each]) for each in requests] == [greedy_by_forward(model, each, 3) for each in prompts]

    def test_narrow_decode_programs(self, model: dsj.Model):
        shape = EngineShape(slots=4, chunk=32, page=16, decode_widths=(1, 2, 4))
        prompts = [inputs_of(3 + seed, seed=seed) for seed in range(4)]
        limits = (4, 12, 8, 2)  # so that 1, 2 and more of them run
        questions = [ask(model, each, max_new_tokens=limit) for each, limit in zip(prompts, limits, strict=True)]
        events = run_all(engine_of(model, shape), questions)
        for inputs, limit, of_request in zip(prompts, limits, events, strict=True):
            assert tokens_of(of_request) == greedy_by_forward(model, inputs, limit)

    def test_the_context_may_be_full(self, model: dsj.Model):
        limit = model.config.text.max_position_embeddings
        inputs = inputs_of(limit - 6)
        (events,) = run_all(engine_of(model), [ask(model, inputs, max_new_tokens=6)])
        assert tokens_of(events) == greedy_by_forward(model, inputs, 6)
        with pytest.raises(ValueError, match=f"exceed the model's {limit} positions"):
            ask(model, inputs, max_new_tokens=7)

    @pytest.mark.parametrize("place", [0, 1, 2])
    def test_an_end_token_ends_the_answer_wherever_it_comes(self, model: dsj.Model, place: int):
        tokens = greedy_by_forward(model, inputs_of(9), 4)
        question = ask(model, inputs_of(9), max_new_tokens=4, eos_token_id=[tokens[place]])
        (events,) = run_all(engine_of(model), [question])
        assert tokens_of(events) == tokens[: tokens.index(tokens[place]) + 1]
        assert [event.finish_reason for event in events if isinstance(event, NewTokens)][-1] == "stop"

    @pytest.mark.parametrize("limit", [1, 2, 3, 4])
    def test_only_the_last_event_says_why_an_answer_ended(self, model: dsj.Model, limit: int):
        """The first token and the next ones may come out of one turn."""
        (events,) = run_all(engine_of(model), [ask(model, inputs_of(9), max_new_tokens=limit)])
        reasons = [event.finish_reason for event in events if isinstance(event, NewTokens)]
        assert reasons == [None] * (len(reasons) - 1) + ["length"]
        assert len(tokens_of(events)) == limit


class TestLogprobs:
    def test_they_are_those_of_forward_and_only_where_asked_for(self, model: dsj.Model):
        """Beside sampled, biased and masked rows, whatever comes after the model's own logits."""
        prompts = [inputs_of(9), inputs_of(40, seed=1), inputs_of(5, seed=2)]
        options = {"temperature": 2.0, "logit_bias": {3: 20.0, 8: 20.0}, "repetition_penalty": 1.5, "seed": 4}
        questions = [
            ask(model, prompts[0], top_logprobs=4, **options),
            ask(model, prompts[1], **options),
            ask(model, prompts[2], top_logprobs=0),
        ]
        events = run_all(engine_of(model), questions)
        told = [[each for event in of if isinstance(event, NewTokens) for each in event.logprobs] for of in events]
        assert [len(each) for each in told] == [5, 0, 5]
        for row, count in ((0, 4), (2, 0)):
            tokens = tokens_of(events[row])
            ids = np.concatenate([prompts[row]["input_ids"], [tokens]], axis=1)
            logits = np.asarray(dsj.forward(model, input_ids=ids), np.float64)[0, -6:-1]
            exact = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
            for place, (logprob, top) in enumerate(told[row]):
                assert abs(logprob - exact[place, tokens[place]]) < 1e-4
                likeliest = np.argsort(-exact[place])[:count]
                assert [token for token, _ in top] == likeliest.tolist()
                np.testing.assert_allclose([value for _, value in top], exact[place, likeliest], atol=1e-4)
        assert any(tokens_of(events[0])[place] != told[0][place].top[0][0] for place in range(5))

    def test_generate_gives_them_in_arrays(self, model: dsj.Model):
        inputs = batch_of(CONFIG, [[9], [12]], seed=3)
        free = dsj.generate(model, **inputs, max_new_tokens=6, eos_token_id=[])
        assert free.logprobs is None
        end = int(free.tokens[1, 2])
        out = dsj.generate(model, **inputs, max_new_tokens=6, eos_token_id=[end], top_logprobs=3)
        np.testing.assert_array_equal(out.lengths, [first_of(row, end) for row in free.tokens])
        for row, length in enumerate(out.lengths):
            np.testing.assert_array_equal(out.top_token_ids[row, :length, 0], out.tokens[row, :length])  # greedy
            np.testing.assert_array_equal(out.top_logprobs[row, :length, 0], out.logprobs[row, :length])
            assert (out.top_token_ids[row, length:] == -1).all()
            assert (out.logprobs[row, length:] == -np.inf).all()
        with pytest.raises(ValueError, match="top_logprobs 3: a stream yields tokens only"):
            dsj.stream(model, inputs, top_logprobs=3)

    def test_a_bias_of_a_token_that_does_not_exist(self, model: dsj.Model):
        size = CONFIG["text_config"]["vocab_size"]
        with pytest.raises(ValueError, match=f"logit_bias of token {size}: the model's tokens are 0 to {size - 1}"):
            ask(model, inputs_of(4), logit_bias={3: 1.0, size: 2.0})

    def test_an_answer_has_its_least_tokens(self, model: dsj.Model):
        ends = list(range(CONFIG["text_config"]["vocab_size"] - 40, CONFIG["text_config"]["vocab_size"] - 24))
        bias = dict.fromkeys(ends, 50.0)
        for least in (0, 1, 3, 5):
            options = {"logit_bias": bias, "eos_token_id": ends, "min_tokens": least}
            (events,) = run_all(engine_of(model), [ask(model, inputs_of(9), **options)])
            assert len(tokens_of(events)) == min(least + 1, 5)


class TestGrammars:
    """Rows whose next step depends on their newest token."""

    def masked(self, model: dsj.Model, grammar: CountingGrammar, **options: Any) -> Question:
        return replace(ask(model, inputs_of(9, seed=3), **options), grammar=lambda: grammar)

    def run(self, engine: Engine, questions: list[Question]) -> list[list[Event]]:
        requests = [Request.of_row(each.batch, each.plan, grammar=each.grammar()) for each in questions]
        for request in requests:
            engine.add(request)
        events = run(engine)
        return [events[request] for request in requests]

    @pytest.mark.parametrize("options", [{}, {"temperature": 1.5, "seed": 3}], ids=["greedy", "sampled"])
    def test_every_token_is_allowed_from_the_first_on(self, model: dsj.Model, options: dict[str, float]):
        for first in range(3):
            question = self.masked(model, CountingGrammar(first), max_new_tokens=7, **options)
            (events,) = self.run(engine_of(model), [question])
            assert [token % 3 for token in tokens_of(events)] == [(step + first) % 3 for step in range(7)]

    def test_greedy_tokens_are_the_likeliest_allowed_ones(self, model: dsj.Model):
        inputs, tokens = inputs_of(9, seed=3), []
        for step in range(5):
            ids = np.concatenate([inputs["input_ids"], np.asarray([tokens], np.int64).reshape(1, -1)], axis=1)
            logits = np.asarray(dsj.forward(model, input_ids=ids))[0, -1]
            tokens.append(max(range(step % 3, len(logits), 3), key=lambda token: logits[token]))
        (events,) = self.run(engine_of(model), [self.masked(model, CountingGrammar())])
        assert tokens_of(events) == tokens

    def test_neighbours_keep_their_tokens_and_launch_few_steps_only_beside_it(self, model: dsj.Model):
        plain = ask(model, inputs_of(20), max_new_tokens=12, temperature=1.0, top_logprobs=2)
        (alone,) = run_all(engine_of(model), [plain])
        masked = self.masked(model, CountingGrammar(), max_new_tokens=5)
        (of_masked,) = self.run(engine_of(model), [masked])
        masked = self.masked(model, CountingGrammar(), max_new_tokens=5)
        beside, together = self.run(engine_of(model), [plain, masked])
        assert tokens_of(beside) == tokens_of(alone)
        told = [[x for e in events if isinstance(e, NewTokens) for x in e.logprobs] for events in (beside, alone)]
        assert told[0] == told[1]
        assert tokens_of(together) == tokens_of(of_masked)
        assert len(beside) > len(alone)

    @pytest.mark.parametrize("own_ends", [[40], []], ids=["the request's end tokens", "none"])
    def test_an_answer_ends_where_its_grammar_does(self, model: dsj.Model, own_ends: list[int]):
        """Also if the request ignores end tokens, or wants more tokens than the grammar has."""
        for length in (1, 3):
            grammar = CountingGrammar(length=length, ends=(40,))
            options = {"max_new_tokens": 9, "eos_token_id": own_ends, "min_tokens": 7}
            (events,) = self.run(engine_of(model), [self.masked(model, grammar, **options)])
            tokens = tokens_of(events)
            assert (len(tokens), tokens[-1]) == (length + 1, 40)
            assert events[-1].finish_reason == "stop"

    @pytest.mark.parametrize("place", [0, 1, 3])
    @pytest.mark.parametrize("how", ["fails_after", "empty_after"])
    def test_an_error_of_a_grammar_ends_its_own_request(self, model: dsj.Model, how: str, place: int):
        good = ask(model, inputs_of(9), max_new_tokens=8)
        alone = tokens_of(run_all(engine_of(model), [good])[0])
        engine = engine_of(model)
        bad = self.masked(model, CountingGrammar(**{how: place}), max_new_tokens=8)
        events, failed = self.run(engine, [good, bad])
        assert tokens_of(events) == alone
        assert len(tokens_of(failed)) == place
        assert isinstance(failed[-1], Failed)
        message = "the grammar fails here" if how == "fails_after" else f"the grammar allows no token after {place}"
        assert message in str(failed[-1].error)
        assert engine.prefix_caches[0].ledger.in_use == 0
        assert engine.free_slots == SHAPE.slots

    def test_a_token_that_the_grammar_refuses_ends_its_own_request(self, model: dsj.Model):
        class Refuses(CountingGrammar):
            def accept(self, token: int) -> None:
                if len(self.taken) == 2:
                    raise ValueError("not this one")
                super().accept(token)

        good, engine = ask(model, inputs_of(9), max_new_tokens=8), engine_of(model)
        events, failed = self.run(engine, [good, self.masked(model, Refuses(), max_new_tokens=8)])
        assert tokens_of(events) == tokens_of(run_all(engine_of(model), [good])[0])
        assert str(failed[-1].error) == "not this one"
        assert engine.free_slots == SHAPE.slots

    def test_cancellation_between_two_tokens(self, model: dsj.Model):
        engine = engine_of(model)
        request = Request.of_row(ask(model, inputs_of(9), max_new_tokens=50).batch, ask(model, inputs_of(9)).plan)
        request.grammar = CountingGrammar()
        engine.add(request)
        engine.step()
        engine.cancel(request)
        assert isinstance(run(engine)[request][-1], Stopped)
        assert engine.free_slots == SHAPE.slots

    def test_what_arrives_at_another_process_is_the_same_request(self, model: dsj.Model):
        question = self.masked(model, CountingGrammar(2, 5, (40,)), top_logprobs=3, logit_bias={4: 1.5}, min_tokens=2)
        request = Request.of_row(question.batch, question.plan, grammar=question.grammar())
        engine = engine_of(model)
        engine.grammar_of = lambda spec: CountingGrammar(*json.loads(spec))
        sent = msgspec.msgpack.decode(msgspec.msgpack.encode(followers._pack(request)))
        arrived = followers._unpack(engine, sent)
        assert arrived.grammar is not request.grammar
        assert arrived.grammar.spec == request.grammar.spec
        jax.tree.map(np.testing.assert_array_equal, arrived.plan.sampling, request.plan.sampling)
        for each in (request, arrived):
            engine.add(each)
        events = run(engine)
        assert tokens_of(events[arrived]) == tokens_of(events[request])


def first_of(tokens: np.ndarray, end: int) -> int:
    """The length of an answer that ends with `end`."""
    return next((place + 1 for place, token in enumerate(tokens) if token == end), len(tokens))


class TestPrefixCache:
    LONG = inputs_of(3, (IMAGE, (1, 4, 8)), 60, seed=1)

    def cached(self, engine: Engine, model: dsj.Model, inputs: Inputs, salt: bytes = b"") -> int:
        """The cached tokens of a request that runs to its end."""
        request = request_of(ask(model, inputs, max_new_tokens=2))
        engine.add(request, salt)
        assert len(tokens_of(run(engine)[request])) == 2
        return request.cached_tokens

    def test_the_same_prompt_hits(self, model: dsj.Model):
        engine = engine_of(model)
        assert [self.cached(engine, model, self.LONG) for _ in range(2)] == [0, 64]
        assert self.cached(engine, model, first_tokens(self.LONG, 50, 1, 2, 3)) == 32
        assert self.cached(engine, model, first_tokens(self.LONG, 64)) == 32  # its last token has to be computed

    @pytest.mark.parametrize(
        "other",
        [
            pytest.param(with_one_pixel_changed(LONG, 0.5), id="one number of the picture"),
            pytest.param(inputs_of(4, (IMAGE, (1, 4, 8)), 60, seed=1) | {"pixel_values": LONG["pixel_values"]},
                         id="at another place"),
            pytest.param(LONG | {"image_grid_thw": np.array([[1, 8, 4]])}, id="of another grid"),
        ],
    )  # fmt: skip
    def test_another_picture_does_not(self, model: dsj.Model, other: Inputs):
        engine = engine_of(model)
        self.cached(engine, model, self.LONG)
        assert self.cached(engine, model, other) == 0

    def test_another_salt_does_not_nor_an_engine_without_a_cache(self, model: dsj.Model):
        engine = engine_of(model)
        found = [self.cached(engine, model, self.LONG, salt) for salt in (b"", b"tenant", b"tenant")]
        assert found == [0, 0, 64]
        engine = engine_of(model, prefix_cache=False)
        assert [self.cached(engine, model, self.LONG) for _ in range(2)] == [0, 0]


class TestFailures:
    def test_rows_of_a_wrong_width_fail_their_request_only(self, model: dsj.Model):
        """It shares its program with another request."""
        good, bad = ask(model, inputs_of(6)), ask(model, inputs_of(1, (IMAGE, (1, 4, 4)), 1))
        alone = tokens_of(run_all(engine_of(model), [good])[0])
        engine = engine_of(model)
        requests = add_all(engine, [good, bad, good])
        for image in requests[1].images:
            image.pixels, image.encoded = None, jnp.zeros((16, 5))
        engine.scheduler.arrived(requests[1].id, requests[1].ready)
        events = run(engine)
        (failed,) = events[requests[1]]
        assert isinstance(failed, Failed)
        assert [tokens_of(events[each]) for each in (requests[0], requests[2])] == [alone, alone]
        assert engine.prefix_caches[0].ledger.in_use == 0

    def test_images_that_cannot_be_encoded_fail_their_request_only(self, model: dsj.Model):
        """Another request's image would run with them."""
        good = ask(model, inputs_of(1, (IMAGE, (1, 4, 4)), 1))
        bad = ask(model, inputs_of(2, (IMAGE, (1, 4, 4)), 1, (IMAGE, (1, 4, 4)), 2))
        alone = tokens_of(run_all(engine_of(model), [good])[0])
        engine = engine_of(model)
        requests = add_all(engine, [bad, good])
        for image in requests[0].images:
            assert image.pixels
            image.pixels = replace(image.pixels, pixel_values=image.pixels.pixel_values[:, :5])
        events = run(engine)
        assert [type(event) for event in events[requests[0]]] == [Failed]
        assert tokens_of(events[requests[1]]) == alone
        assert engine.prefix_caches[0].ledger.in_use == 0

    def test_a_failure_of_the_device_fails_all_and_the_next_request_works(self, model: dsj.Model):
        question = ask(model, inputs_of(40))
        alone = tokens_of(run_all(engine_of(model), [question])[0])
        engine = engine_of(model)
        add_all(engine, [question] * 2)
        engine.step()
        for array in jax.tree.leaves(engine._state):
            array.delete()
        events = run(engine)
        assert [[type(event) for event in each] for each in events.values()] == [[Failed], [Failed]]
        assert tokens_of(run_all(engine, [question])[0]) == alone

    def test_a_request_without_its_rows_is_stalled_until_they_come(self, model: dsj.Model):
        question = ask(model, inputs_of(3, (IMAGE, (1, 4, 8)), 40))
        alone = tokens_of(run_all(engine_of(model), [question])[0])
        engine, request = engine_of(model), request_of(question)
        request.images[0].pixels = None
        engine.add(request)
        assert [engine.step() for _ in range(5)] == [[]] * 5
        assert engine.stalled
        request.images[0].encoded = question.rows[0]
        engine.scheduler.arrived(request.id, request.ready)
        assert tokens_of(run(engine)[request]) == alone

    def test_cancellation_and_deadlines_in_every_stage(self, model: dsj.Model):
        engine = engine_of(model)
        stalled, late, running, waiting = (
            request_of(ask(model, inputs_of(3, (IMAGE, (1, 4, 8)), 40))) for _ in range(4)
        )
        for request in (stalled, late):
            request.images[0].pixels = None
        late.deadline = time.monotonic() + 0.05
        for request in (stalled, late, running, waiting):
            engine.add(request)
        engine.step()
        time.sleep(0.06)
        for request in (stalled, running, waiting):
            engine.cancel(request)
        events = run(engine)
        told = {
            request: (event.reason, event.where)
            for request, (*_, event) in events.items()
            if isinstance(event, Stopped)
        }
        assert told[stalled] == ("cancelled", "while encoding")
        assert told[late] == ("deadline", "while encoding")
        assert told[running][0] == "cancelled"
        assert told[waiting] == ("cancelled", "in line")
        assert engine.free_slots == SHAPE.slots


class TestPrograms:
    @pytest.mark.parametrize("widths", [(), (1, 2, 3)], ids=["one width", "three widths"])
    def test_none_is_compiled_after_warm_up(self, model: dsj.Model, widths: tuple[int, ...]):
        engine = engine_of(model, replace(SHAPE, decode_widths=widths or (SHAPE.slots,)))
        engine.warm_up()
        compiled = prefill_chunk._cache_size(), decode_loop._cache_size()
        assert TestGrammars().run(engine, [TestGrammars().masked(model, CountingGrammar())])
        lengths = (1, 8, 9, 16, 17, 32, 33, 70)
        options = {"temperature": 0.7, "top_k": 5, "presence_penalty": 0.3, "eos_token_id": [3, 4]}
        options |= {"logit_bias": {1: 2.0}, "min_tokens": 2, "top_logprobs": 2}
        questions = [ask(model, inputs_of(length), **options) for length in lengths]
        questions += [ask(model, inputs_of(3, (IMAGE, (1, 4, 8)), 40))]
        assert all(run_all(engine, questions))
        assert (prefill_chunk._cache_size(), decode_loop._cache_size()) == compiled

    @pytest.mark.parametrize("options", [{}, {"temperature": 0.9, "top_p": 0.8, "seed": 5}], ids=["greedy", "sampled"])
    @pytest.mark.parametrize(("slots", "chunk"), [(1, None), (3, None), (2, 128)])
    def test_generate_gives_the_tokens_of_a_runner_of_the_same_shape(
        self, model: dsj.Model, slots: int, chunk: int | None, options: dict[str, float]
    ):
        prompts = [inputs_of(20), inputs_of(3, (IMAGE, (1, 4, 8)), 9), inputs_of(40, seed=1)]
        limits = {"max_new_tokens": 6, "eos_token_id": []}
        expected = [
            dsj.generate(model, **each, **limits, **options, slots=slots, chunk=chunk).tokens[0] for each in prompts
        ]
        shape = EngineOptions(slots=slots, chunk=chunk)
        assert [tokens_by_runner(model, shape, ask(model, each, **limits, **options)) for each in prompts] == [
            each.tolist() for each in expected
        ]

    @pytest.mark.parametrize(
        ("size", "message"),
        [
            ({"slots": 0}, "slots 0 is too small"),
            ({"chunk": 0}, "chunk 0 is too small"),
            ({"chunk": 100}, "chunk 100 is not a multiple of page 128: pass 128"),
        ],
    )
    def test_generate_refuses_sizes_that_are_not_possible(self, model: dsj.Model, size: dict[str, int], message: str):
        with pytest.raises(ValueError, match=message):
            dsj.generate(model, **inputs_of(5), **size)

    @pytest.mark.parametrize("limit", [1, 2, 3])
    def test_a_runner_lives_through_answers_that_end_in_their_first_turn(self, model: dsj.Model, limit: int):
        found = tokens_by_runner(model, EngineOptions(slots=2), ask(model, inputs_of(9), max_new_tokens=limit))
        assert found == greedy_by_forward(model, inputs_of(9), limit)


def tokens_by_runner(model: dsj.Model, options: EngineOptions, question: Question) -> list[int]:
    runner = Runner(model, options=options)

    async def answer() -> list[int]:
        deadline = time.monotonic() + 120
        return [token async for chunk in runner.run(question.batch, question.plan, deadline) for token in chunk.tokens]

    try:
        return asyncio.run(answer())
    finally:
        runner.stop()
        assert runner.join(60)


def test_rows_from_elsewhere_compile_nothing_after_the_warm_up(model: dsj.Model):
    """`device_put` binds them to a device, and with them everything that they touch."""
    engine = engine_of(model, EngineShape(slots=5, chunk=32, page=16, tail_rows=((16, 1), (32, 1))))
    question = ask(model, batch_of(CONFIG, [[7, (IMAGE, (1, 4, 6)), 5]]), max_new_tokens=4)
    engine.warm_up()
    engine.warm_up_rows(len(question.rows[0]))
    programs = prefill_chunk, decode_loop, write_rows
    compiled = [program._cache_size() for program in programs]
    for _ in range(2):
        request = request_of(question)
        (image,) = request.images
        bound = jax.device_put(question.rows[0], jax.local_devices()[0])
        image.pixels, image.encoded = None, separate_deepstack_embeds(bound, model.config.num_deepstack_levels)
        engine.add(request)
        assert run(engine)[request]
    assert [program._cache_size() for program in programs] == compiled
