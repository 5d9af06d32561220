"""The checkpoint that ships answers questions about pictures, and transformers gives the same answers with it."""

import numpy as np
import pytest

import deepstack_jax as dsj
from deepstack_jax.shipped import checkpoint_path
from tiny_vl.evaluate import Case, answers, cases_of, evaluate, load_of, wanted, without_levels
from tiny_vl.parity import cases_of_kinds, differing, load_torch
from tiny_vl.samples import KINDS, sample

SLACK = 5.0  # percentage points: few questions are asked here, 2000 samples by evaluate.py
FIRST_SEED = 500_000  # not trained on


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
    """Of the answers, all asked in one batch."""
    said = answers(model, asked)
    return float(np.mean([answer == case.exchange.answer for case, answer in zip(asked, said, strict=True)]))


def test_it_is_small_enough_to_ship():
    files = list(checkpoint_path("tiny-vl").iterdir())
    assert sum(file.stat().st_size for file in files) < 16 << 20
    assert {"config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json"} <= {f.name for f in files}


@pytest.mark.parametrize("kind", KINDS)
def test_it_answers_fifty_prompts_of_each_kind(model: dsj.Model, kind: str):
    asked = cases(50, kind)
    assert 100 * share_right(model, asked) >= np.mean([wanted(case.exchange.family) for case in asked]) - SLACK


def test_the_picture_is_needed(model: dsj.Model):
    """With another picture in place of its own the answers are guesses."""
    asked = cases_of(range(FIRST_SEED, FIRST_SEED + 24))
    scores = evaluate(model, asked)
    right = {column: sum(families.values()) / len(asked) for column, families in scores.right.items()}
    assert right["exact"] > 0.9
    assert right["swapped"] < 0.4  # yes or no, one of four counts, one of eight colors, or less


def test_deepstack_is_needed_to_see_what_changed(model: dsj.Model):
    """Where it matters most: what is the same in two pictures is told by embeddings alone four times in five."""
    asked = [case for case in cases(400, "pair") if case.exchange.family == "pair_changed"][:64]
    assert len(asked) == 64
    right = share_right(model, asked)
    assert right > 0.9
    assert share_right(without_levels(model, range(model.config.num_deepstack_levels)), asked) < right - 0.1


def test_every_expert_is_used(model: dsj.Model):
    load = load_of(model, FIRST_SEED, batches=1)
    assert load.max() <= 3
    assert load.min() >= 0.25


@pytest.mark.slow
def test_pytorch_gives_the_same_tokens_for_200_prompts(model: dsj.Model):
    cases = cases_of_kinds(200, FIRST_SEED)
    found, asked = differing(model, load_torch(checkpoint_path("tiny-vl")), cases)
    assert asked == {"picture": 67, "pair": 67, "clip": 66}
    assert not found
