"""Prompts with their options, and what each of them gets when it has an engine to itself."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np

import deepstack_jax as dsj
from deepstack_jax.encoding import encode_images
from deepstack_jax.engine.core import Engine, Failed, Stopped
from deepstack_jax.engine.request import GenerationPlan, Request
from deepstack_jax.engine.scheduler import Running
from deepstack_jax.engine.shape import EngineShape
from deepstack_jax.generation import encode_prompt, plan_generation
from deepstack_jax.processing.batch import Batch, prepare_batch
from deepstack_jax.programs import PromptArrays
from deepstack_jax.sampling import TokenLogprobs
from deepstack_jax.testing.random_checkpoint import tiny_config
from tests.cases import IMAGE, VIDEO, Row, batch_of
from tests.counting_grammar import CountingGrammar

Inputs = dict[str, np.ndarray]

# Two layers, so that the second one's keys show what the first one attended to and which experts it added, and four
# experts per token, because a sum of two has only one order.
CONFIG = tiny_config(
    text_config={"num_hidden_layers": 2, "max_position_embeddings": 96, "num_experts": 6, "num_experts_per_tok": 4},
    vision_config={"depth": 2, "deepstack_visual_indexes": [0, 1], "patch_size": 4},
)
# Last pieces of up to 8 and up to 16 tokens share a program with another request's, and leave room in it.
SHAPE = EngineShape(slots=3, chunk=32, page=16, tail_rows=((8, 2), (16, 2), (32, 1)))


@dataclass(frozen=True, eq=False)
class Question:
    """A prompt of one row and its options, in the forms in which they reach an engine."""

    batch: Batch  # with pixels
    plan: GenerationPlan
    prompt: PromptArrays  # with visual rows
    rows: tuple[jax.Array, ...]  # of each image of the batch
    grammar: Callable[[], CountingGrammar | None] = lambda: None

    @property
    def has_images(self) -> bool:
        return bool(self.batch.visuals)


@dataclass(frozen=True, eq=False)
class Answer:
    """Tokens, their log probabilities if asked for, and the bits of keys and values of the prompt and of all tokens but
    the last: uint8 [2 L, T, K * h * n] of numbers of n bytes."""

    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    kv_bits: np.ndarray


@dataclass(eq=False)
class Bench:
    """A model, an engine's shape and questions. Each answer is computed once, with nothing else in the engine."""

    model: dsj.Model
    shape: EngineShape
    questions: Sequence[Question]
    num_pages: int = 1 + 4 * 5  # programs are compiled for it: 4 requests of 70 tokens
    answers: dict[Question, Answer] = field(default_factory=dict)

    def answer(self, question: Question) -> Answer:
        if question not in self.answers:
            self.answers[question] = alone(self.model, self.shape, self.num_pages, question)
        return self.answers[question]


def ask(model: dsj.Model, inputs: Inputs, **options: Any) -> Question:
    """A question with `SamplingOptions`; no end tokens unless they are named."""
    batch = prepare_batch(model.config, **inputs)
    return ask_batch(model, batch, **options)


def ask_batch(model: dsj.Model, batch: Batch, **options: Any) -> Question:
    plan = plan_generation(model, batch, dsj.SamplingOptions(**({"max_new_tokens": 5, "eos_token_id": []} | options)))
    return Question(batch, plan, encode_prompt(model, batch), tuple(encode_images(model, batch.visuals)))


def alone(model: dsj.Model, shape: EngineShape, num_pages: int, question: Question) -> Answer:
    """The answer from a new engine without a prefix cache."""
    request = Request.of_row(question.batch, question.plan, grammar=question.grammar())
    engine = Engine(model, shape, num_pages, prefix_cache=False)
    engine.add(request)
    tokens: list[int] = []
    logprobs: tuple[TokenLogprobs, ...] = ()
    held: tuple[int, ...] = ()
    while not engine.idle:
        for event in engine.step():
            if isinstance(event, Failed):
                raise event.error
            assert not isinstance(event, Stopped)
            tokens += event.tokens
            logprobs += event.logprobs
        held = next((pages_of(engine, entry) for entry in engine.scheduler.running.values()), held)
    return Answer(tuple(tokens), logprobs, read_kv_bits(engine, held, request.length + len(tokens) - 1))


def pages_of(engine: Engine, entry: Running) -> tuple[int, ...]:
    """A request's pages, counted over all pools."""
    return tuple(engine.shape.pool_of(entry.slot) * engine.num_pages + page for page in entry.pages)


def read_kv_bits(engine: Engine, pages: Sequence[int], length: int) -> np.ndarray:
    """The bits of the first `length` keys and values in these pages: uint8 [2 L, length, K * h * n].

    As long as nothing was launched since a request ended, its pages hold what it left in them.
    """
    cache = engine._state.cache
    found = [np.asarray(array)[list(pages)].swapaxes(1, 2) for array in (*cache.keys, *cache.values)]
    return np.stack([array.reshape(-1, array[0, 0].size)[:length].view(np.uint8) for array in found])


def scramble(engine: Engine, rng: np.random.Generator) -> None:
    """Fills an empty engine with what nothing may read: NaN in all pages, and rows that look alive."""
    state = engine._state
    cache = state.cache
    keys, values = (tuple(np.full_like(array, np.nan) for array in arrays) for arrays in (cache.keys, cache.values))
    table = rng.integers(0, engine.num_pages, cache.page_table.shape, np.int32)
    slots = engine.shape.slots
    scrambled = replace(
        state,
        cache=replace(cache, keys=keys, values=values, page_table=table),
        lengths=rng.integers(0, 64, slots, np.int32),
        made=rng.integers(0, 9, slots, np.int32),
        limits=np.full(slots, 1000, np.int32),
        done=np.zeros(slots, bool),
    )
    engine._state = jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), scrambled, state)


def small_bench(model: dsj.Model, shape: EngineShape = SHAPE) -> Bench:
    """The questions of the random schedules over a model of CONFIG."""
    bench = Bench(model, shape, [])
    bench.questions = [*_texts(model), *_pictures(model), *(ask_batch(model, each) for each in two_halves(model))]
    bench.questions += [replace(bench.questions[place], grammar=CountingGrammar) for place in (3, 4, 13, 14)]
    bench.questions += [
        ending_at(bench, bench.questions[0], 0),
        ending_at(bench, bench.questions[6], 2),
        ending_at(bench, bench.questions[-3], 1),
    ]
    return bench


def ending_at(bench: Bench, question: Question, place: int) -> Question:
    """The same question with the answer's token at `place` as its end token."""
    plan, token = question.plan, bench.answer(question).tokens[place]
    ends = plan.sampling.end_token_ids.copy()
    ends[0, 1] = token  # not the first of them
    return replace(question, plan=replace(plan, sampling=replace(plan.sampling, end_token_ids=ends)))


def with_one_pixel_changed(inputs: Inputs, value: float = 1.0) -> Inputs:
    """The same prompt, with another number in one place of one patch."""
    pixels = inputs["pixel_values"].copy()
    pixels[5, 7] = value
    return {**inputs, "pixel_values": pixels}


def inputs_of(*row: Any, seed: int = 0) -> Inputs:
    """One prompt of text lengths and images, as `tests.cases.batch_of` takes them."""
    layout: Row = list(row)
    return batch_of(CONFIG, [layout], seed=seed)


def first_tokens(inputs: Inputs, count: int, *other: int) -> Inputs:
    """The prompt's first `count` tokens and then others; all its images must lie in them."""
    ids = np.concatenate([inputs["input_ids"][0, :count], np.asarray(other, np.int64)])[None]
    rest = {name: array for name, array in inputs.items() if array.shape != inputs["input_ids"].shape}
    return {**rest, "input_ids": ids}


OPTIONS: tuple[dict[str, Any], ...] = (
    {"max_new_tokens": 5},
    {"max_new_tokens": 7, "temperature": 1.0, "seed": 3},
    {"max_new_tokens": 1},
    {"max_new_tokens": 4, "temperature": 0.8, "top_k": 20, "top_p": 0.9, "seed": 11, "top_logprobs": 3},
    {"max_new_tokens": 6, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.25}
    | {"logit_bias": {5: 2.0, 9: 1.5, 70: -20}, "min_tokens": 3, "eos_token_id": [5, 9], "top_logprobs": 0},
    {"max_new_tokens": 2, "temperature": 2.0, "min_p": 0.05, "repetition_penalty": 0.8, "seed": 2**32 - 1},
)


def _texts(model: dsj.Model) -> list[Question]:
    """Prompts with one beginning that end on both sides of each border of pages, widths and chunks."""
    whole = inputs_of(70)
    cut = [first_tokens(whole, length) for length in (1, 8, 9, 16, 17, 31, 32, 33, 64, 65, 70)]
    cut += [first_tokens(whole, 40, 9, 8, 7), first_tokens(whole, 32, 5)]
    return [ask(model, each, **OPTIONS[place % len(OPTIONS)]) for place, each in enumerate(cut)]


def _pictures(model: dsj.Model) -> list[Question]:
    """Images within chunks, across their borders, several in one prompt, and between the frames of a video."""
    early = inputs_of(3, (IMAGE, (1, 4, 8)), 45, seed=1)
    across = inputs_of(25, (IMAGE, (1, 8, 8)), 24, seed=2)
    twice = inputs_of(2, (IMAGE, (1, 4, 4)), 20, (IMAGE, (1, 8, 4)), 5, seed=3)
    film = inputs_of(3, (VIDEO, (2, 4, 4)), 5, (IMAGE, (1, 4, 4)), 30, seed=4)
    late = inputs_of(50, (IMAGE, (1, 4, 4)), 2, seed=5)
    short = inputs_of(1, (IMAGE, (1, 4, 4)), seed=6)
    again = inputs_of(9, (IMAGE, (1, 4, 8)), 30, seed=7) | {"pixel_values": early["pixel_values"]}
    prompts = [early, first_tokens(early, 40, 1), with_one_pixel_changed(early), again, across]
    prompts += [with_one_pixel_changed(across), first_tokens(across, 60, 2, 3), twice, film, late, short]
    return [ask(model, each, **OPTIONS[place % len(OPTIONS)]) for place, each in enumerate(prompts)]


def two_halves(model: dsj.Model) -> list[Batch]:
    """Two prompts of the same ids and positions that show the first and the second half of one picture."""
    half = prepare_batch(model.config, **inputs_of(3, (IMAGE, (1, 4, 8)), 25, seed=8))
    picture = prepare_batch(model.config, **inputs_of(3, (IMAGE, (1, 8, 8)), 25, seed=8)).visuals
    assert half.visual_index is not None
    second = np.where(half.visual_index >= 0, half.visual_index + half.num_visual_tokens, -1)
    return [replace(half, visuals=picture, visual_index=index) for index in (half.visual_index, second)]
