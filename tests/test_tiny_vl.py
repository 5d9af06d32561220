"""The checkpoint that ships answers questions about pictures, and transformers gives the same answers with it."""

from collections.abc import Iterator

import numpy as np
import pytest

import deepstack_jax as dsj
from deepstack_jax.bundled import checkpoint_path
from deepstack_jax.demo.samples import KINDS, sample
from tiny_vl import evaluate as evaluation
from tiny_vl.evaluate import Case, Scores, answers, batches_of, cases_of, load_of, wanted
from tiny_vl.parity import cases_of_kinds, differing, load_torch

pytestmark = pytest.mark.slow

SLACK = 5.0  # percentage points: few questions are asked here, 2000 samples by evaluate.py
FIRST_SEED = 500_000  # not trained on


@pytest.fixture(autouse=True, scope="module")
def _small_batches() -> Iterator[None]:
    """All tests ask in batches of these sizes, which few questions nearly fill: so they share compiled programs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "PROMPTS", {"picture": 32, "pair": 8, "clip": 16})
        yield


@pytest.fixture(scope="module")
def model() -> dsj.Model:
    return dsj.load("tiny-vl", dtype="float32")


def cases(count: int, kind: str) -> list[Case]:
    """The first questions of one kind, of every family that it has."""
    found: list[Case] = []
    for seed in range(FIRST_SEED, FIRST_SEED + count):
        one = sample(seed, kind)
        found += [Case(one, exchange) for exchange in one.exchanges]
    return found[:count]


def share_right(model: dsj.Model, asked: list[Case]) -> float:
    """Of the answers."""
    right = []
    for batch, size in batches_of(asked):
        said = answers(model, batch)
        right += [answer == case.exchange.answer for case, answer in zip(batch, said, strict=True)][:size]
    assert len(right) == len(asked)
    return float(np.mean(right))


def test_it_is_small_enough_to_ship():
    files = list(checkpoint_path("tiny-vl").iterdir())
    assert sum(file.stat().st_size for file in files) < 16 << 20
    assert {"config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json"} <= {f.name for f in files}


@pytest.mark.parametrize("kind", KINDS)
def test_it_answers_fifty_prompts_of_each_kind(model: dsj.Model, kind: str):
    asked = cases(50, kind)
    assert 100 * share_right(model, asked) >= np.mean([wanted(case.exchange.family) for case in asked]) - SLACK


@pytest.fixture(scope="module")
def scores(model: dsj.Model) -> Scores:
    """All questions of some samples, asked in all ways."""
    return evaluation.evaluate(model, cases_of(range(FIRST_SEED, FIRST_SEED + 24)))


def share_of(scores: Scores, column: str) -> float:
    return sum(scores.right[column].values()) / sum(scores.asked[column].values())


def test_the_picture_is_needed(scores: Scores):
    """With another picture in place of its own the answers are guesses."""
    assert share_of(scores, "exact") > 0.9
    assert share_of(scores, "swapped") < 0.4  # yes or no, one of four counts, one of eight colors, or less


def test_deepstack_is_needed(scores: Scores):
    """Without it most answers are guesses, and descriptions wrong; the last level alone is most of that."""
    assert share_of(scores, "no deepstack") < 0.6
    right = {column: scores.share(column, "describe") for column in scores.right}
    assert right["exact"] > 90
    assert right["no deepstack"] < 40
    assert right["no level 2"] < 60


def test_every_expert_is_used(model: dsj.Model):
    load = load_of(model, FIRST_SEED, batches=1)
    assert load.max() <= 3
    assert load.min() >= 0.25


def test_pytorch_gives_the_same_tokens_for_200_prompts(model: dsj.Model):
    cases = cases_of_kinds(200, FIRST_SEED)
    found, asked = differing(model, load_torch(checkpoint_path("tiny-vl")), cases)
    assert asked == {"picture": 67, "pair": 67, "clip": 66}
    assert not found
