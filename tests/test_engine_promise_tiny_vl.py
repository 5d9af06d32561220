"""The engine's promise with the checkpoint that ships, in both dtypes: tokens, keys and values are those alone."""

from collections.abc import Iterator

import jax.numpy as jnp
import pytest

import deepstack_jax as dsj
from deepstack_jax.demo.samples import sample
from deepstack_jax.engine.shape import EngineShape
from tests.engine_questions import Bench, Question, ask
from tests.engine_schedules_on_device import simulate_all

SHAPE = EngineShape(slots=3, chunk=64, page=16, tail_rows=((32, 2), (64, 1)))
SAMPLED = {"temperature": 0.8, "top_p": 0.95, "repetition_penalty": 1.1, "seed": 7}
FIRST_SEED = 500_000  # not trained on


def questions_of(model: dsj.Model) -> Iterator[Question]:
    """One and two pictures, a clip, and text; two questions about one picture begin alike."""
    picture, pair, clip = (sample(FIRST_SEED + n, kind) for n, kind in enumerate(("picture", "pair", "clip")))
    other = sample(FIRST_SEED + 9, "picture")
    ends = {"max_new_tokens": 6, "eos_token_id": model.eos_token_ids}
    for options in ({}, SAMPLED):
        for exchange in picture.exchanges[:2]:
            yield ask(model, dsj.prepare(model, exchange.question, images=picture.images), **ends, **options)
        yield ask(model, dsj.prepare(model, picture.exchanges[0].question, images=other.images), **ends, **options)
        yield ask(model, dsj.prepare(model, pair.exchanges[0].question, images=pair.images), **ends, **options)
        yield ask(model, dsj.prepare(model, clip.exchanges[0].question, videos=[clip.video]), **ends, **options)
        yield ask(model, dsj.prepare(model, "What is in the picture?"), **ends, **options)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_schedule_shows_in_an_answer(dtype: str):
    model = dsj.load("tiny-vl", dtype=jnp.dtype(dtype))
    questions = list(questions_of(model))
    longest = max(SHAPE.pages_of(int(each.batch.lengths[0]) + 6) for each in questions)
    seen = simulate_all(Bench(model, SHAPE, questions, num_pages=1 + 3 * longest), range(40))
    assert all(seen[what] for what in ("length", "stop", "cancelled", "late", "cached with images")), seen
