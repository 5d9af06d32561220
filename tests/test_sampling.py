"""Sampling against transformers' logits processors and against the distribution that they leave."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.generation import logits_process as hf

from deepstack_jax.sampling import GENERATED, IN_PROMPT, SamplingParams, mark_seen, sample

OPTIONS = [
    {"temperature": 0.7},
    {"temperature": 1.3, "top_k": 5},
    {"temperature": 0.9, "top_p": 0.6},
    {"temperature": 1.1, "min_p": 0.15},
    {"temperature": 0.8, "top_k": 12, "top_p": 0.8, "min_p": 0.05},
    {"temperature": 1.0, "top_p": 1e-6},
]


def reference_distribution(logits: np.ndarray, options: dict[str, float]) -> np.ndarray:
    """float64 probabilities after transformers' warpers, in its order."""
    scores = torch.tensor(logits, dtype=torch.float64)
    warpers = [hf.TemperatureLogitsWarper(options["temperature"])]
    if "top_k" in options:
        warpers.append(hf.TopKLogitsWarper(int(options["top_k"])))
    if "top_p" in options:
        warpers.append(hf.TopPLogitsWarper(options["top_p"]))
    if "min_p" in options:
        warpers.append(hf.MinPLogitsWarper(options["min_p"]))
    for warper in warpers:
        scores = warper(torch.zeros((len(scores), 1), dtype=torch.long), scores)
    return torch.softmax(scores, dim=-1).numpy()


@pytest.mark.parametrize("options", OPTIONS)
def test_draws_follow_the_distribution_that_transformers_leaves(options: dict[str, float]):
    draws, vocabulary = 4000, 40
    logits = np.random.default_rng(0).normal(0, 2, (1, vocabulary)).astype(np.float32)
    expected = reference_distribution(logits, options)[0]

    params = SamplingParams.of(draws, **options, seed=0)
    tokens = jax.jit(sample)(
        jnp.broadcast_to(logits, (draws, vocabulary)), jnp.zeros((draws, vocabulary), jnp.uint8), params, 0
    )
    drawn = np.bincount(np.asarray(tokens), minlength=vocabulary)
    assert not drawn[expected == 0].any()
    kept = expected > 0
    # chi-square statistic of k - 1 degrees of freedom: five standard deviations above its mean
    statistic = np.sum((drawn[kept] - draws * expected[kept]) ** 2 / (draws * expected[kept]))
    freedom = np.count_nonzero(kept) - 1
    assert statistic <= freedom + 5 * np.sqrt(2 * freedom)


def test_penalties_change_logits_as_transformers_and_openai_say():
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 3, (3, 20)).astype(np.float32)
    prompt, answer = rng.integers(0, 20, (3, 4)), rng.integers(0, 20, (3, 2))
    seen = mark_seen(jnp.zeros((3, 20), jnp.uint8), jnp.asarray(prompt), IN_PROMPT)
    seen = mark_seen(seen, jnp.asarray(answer), GENERATED)
    both = torch.tensor(np.concatenate([prompt, answer], axis=1))
    expected = hf.RepetitionPenaltyLogitsProcessor(1.7)(both, torch.tensor(logits)).numpy()
    for row in range(3):
        expected[row, np.unique(answer[row])] -= 0.8

    # a row's own likeliest token is lowered until every token has been the likeliest once: compares whole orders
    params = SamplingParams.of(3, repetition_penalty=1.7, presence_penalty=0.8)
    masked, order = jnp.asarray(logits), []
    for _ in range(20):
        token = sample(masked, seen, params, jnp.int32(0))
        order.append(np.asarray(token))
        masked = masked.at[jnp.arange(3), token].set(-1e30)
    np.testing.assert_array_equal(np.stack(order, axis=1), np.argsort(-expected, axis=1))


def test_tokens_below_zero_are_not_marked():
    seen = mark_seen(jnp.zeros((2, 5), jnp.uint8), jnp.asarray([[-1, 3], [-1, -1]]), IN_PROMPT)
    np.testing.assert_array_equal(seen, [[0, 0, 0, 1, 0], [0, 0, 0, 0, 0]])


def test_rows_mix_greedy_and_drawn():
    logits = jnp.asarray(np.random.default_rng(2).normal(0, 1, (2, 50)), jnp.float32)
    params = SamplingParams.of(2, temperature=5.0, seed=3)
    params.temperature[0] = 0
    tokens = {int(sample(logits, jnp.zeros((2, 50), jnp.uint8), params, jnp.int32(step))[1]) for step in range(8)}
    assert len(tokens) > 2
    assert int(sample(logits, jnp.zeros((2, 50), jnp.uint8), params, jnp.int32(0))[0]) == int(jnp.argmax(logits[0]))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"temperature": -0.1}, "temperature -0.1 is out of range: expected 0 (greedy) or more"),
        ({"temperature": float("nan")}, "temperature nan is out of range"),
        ({"top_k": -1}, "top_k -1 is out of range: expected 0 (all) or a positive integer"),
        ({"top_p": 0.0}, "top_p 0.0 is out of range: expected above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p 1.5 is out of range"),
        ({"min_p": 2}, "min_p 2 is out of range: expected between 0 and 1"),
        ({"repetition_penalty": 0}, "repetition_penalty 0 is out of range: expected positive (1 for none)"),
        ({"presence_penalty": float("inf")}, "presence_penalty inf is out of range"),
        ({"seed": [1, 2, 3]}, "3 seeds for a batch of 2: give one integer or one a row"),
    ],
)
def test_parameters_out_of_range_are_named(option: dict, message: str):
    with pytest.raises(ValueError) as error:
        SamplingParams.of(2, **option)
    assert message in str(error.value)
