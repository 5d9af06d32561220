"""Sampling against transformers' logits processors, and at the edges against the same rule in float64."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.generation import logits_process as hf

from deepstack_jax.sampling import (
    GENERATED,
    IN_PROMPT,
    SamplingParams,
    TokenMask,
    count_tokens,
    log_probabilities,
    sample,
)
from deepstack_jax.sampling_options import SamplingOptions

compiled_sample = jax.jit(sample)

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

    params = SamplingParams.of(draws, SamplingOptions(**options, seed=0))
    tokens = compiled_sample(
        jnp.broadcast_to(logits, (draws, vocabulary)), jnp.zeros((draws, vocabulary), jnp.int32), params, 0
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
    prompt, answer = rng.integers(0, 20, (3, 4)), rng.integers(0, 8, (3, 6))  # with tokens that come several times
    seen = np.zeros((3, 20), np.int32)
    np.put_along_axis(seen, prompt, IN_PROMPT, axis=1)
    seen = count_tokens(jnp.asarray(seen), jnp.asarray(answer))
    both = torch.tensor(np.concatenate([prompt, answer], axis=1))
    expected = hf.RepetitionPenaltyLogitsProcessor(1.7)(both, torch.tensor(logits)).numpy()
    for row in range(3):
        tokens, counts = np.unique(answer[row], return_counts=True)
        assert counts.max() > 1
        expected[row, tokens] -= 0.8 + 0.35 * counts

    params = SamplingParams.of(3, SamplingOptions(repetition_penalty=1.7, presence_penalty=0.8, frequency_penalty=0.35))
    np.testing.assert_array_equal(order_of_draws(logits, seen, params, 0), np.argsort(-expected, axis=1))


def order_of_draws(logits: np.ndarray, seen: jax.Array, params: SamplingParams, step: int, *others) -> np.ndarray:
    """Tokens from the likeliest on: each is lowered until every one has been the likeliest once."""
    masked, order = jnp.asarray(logits), []
    for _ in range(logits.shape[1]):
        order.append(np.asarray(compiled_sample(masked, seen, params, step, *others)))
        masked = masked.at[jnp.arange(len(logits)), order[-1]].set(-1e30)
    return np.stack(order, axis=1)


@pytest.mark.parametrize("step", [0, 3, 4])
def test_bias_comes_before_penalties_and_no_answer_ends_early(step: int):
    """Against transformers' processors, in vLLM's order."""
    rng = np.random.default_rng(7)
    logits = rng.normal(0, 3, (2, 20)).astype(np.float32)
    prompt = np.array([[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12]])
    bias, ends = {2: 5.5, 9: -4.25, 15: 100.0, 17: -100.0, 0: 0.0}, [6, 15, 8]
    ids = torch.tensor(np.concatenate([prompt, np.ones((2, step), np.int64)], axis=1))
    expected = torch.tensor(logits)
    for processor in (
        hf.SequenceBiasLogitsProcessor([[[token], value] for token, value in bias.items()]),
        hf.MinNewTokensLengthLogitsProcessor(6, 4, ends, device="cpu"),
        hf.RepetitionPenaltyLogitsProcessor(1.7),
    ):
        expected = processor(ids, expected)
    seen = np.zeros((2, 20), np.int32)
    np.put_along_axis(seen, np.asarray(ids), IN_PROMPT, axis=1)
    options = SamplingOptions(repetition_penalty=1.7, logit_bias=bias, min_tokens=4)
    params = SamplingParams.of(2, options, end_token_ids=ends)
    possible = 20 - (len(ends) if step < 4 else 0)
    order = order_of_draws(logits, jnp.asarray(seen), params, step)[:, :possible]
    np.testing.assert_array_equal(order, np.argsort(-expected.numpy(), axis=1, kind="stable")[:, :possible])


def mask_of(rows: list[bool], allowed: np.ndarray) -> TokenMask:
    bits = np.pad(allowed, [(0, 0), (0, -allowed.shape[1] % 32)])
    return TokenMask(np.array(rows), np.packbits(bits, axis=1, bitorder="little").view(np.int32))


def test_masked_rows_draw_allowed_tokens_only():
    rng = np.random.default_rng(8)
    logits, allowed = rng.normal(0, 1, (3, 100)).astype(np.float32), rng.random((3, 100)) < 0.3
    allowed[:, [0, 31, 32, 99]] = True
    params = SamplingParams.of(3, SamplingOptions(logit_bias={0: 100, 31: 99, 50: 98}, top_logprobs=0))
    mask = mask_of([True, False, True], allowed)
    seen = jnp.zeros((3, 100), jnp.int32)
    order = order_of_draws(logits, seen, params, 0, None, mask)
    biased = logits.copy()
    biased[:, [0, 31, 50]] += [100, 99, 98]
    for row in (0, 2):
        likeliest = [token for token in np.argsort(-biased[row]) if allowed[row, token]]
        assert order[row, : len(likeliest)].tolist() == likeliest
        assert set(order[row]) == set(likeliest)
    np.testing.assert_array_equal(order[1], order_of_draws(logits, seen, params, 0)[1])
    sampled = SamplingParams.of(3, SamplingOptions(temperature=50, seed=1))
    for step in range(20):
        tokens = compiled_sample(jnp.asarray(logits), seen, sampled, step, None, mask)
        assert allowed[0, tokens[0]]
        assert allowed[2, tokens[2]]


def test_min_tokens_yields_where_a_mask_leaves_end_tokens_only():
    params = SamplingParams.of(2, SamplingOptions(min_tokens=5), end_token_ids=[3, 4])
    allowed = np.zeros((2, 40), bool)
    allowed[:, 4], allowed[1, 9] = True, True
    logits = jnp.zeros((2, 40)).at[:, 4].set(2)
    tokens = compiled_sample(logits, jnp.zeros((2, 40), jnp.int32), params, 0, None, mask_of([True, True], allowed))
    np.testing.assert_array_equal(tokens, [4, 9])


@pytest.mark.parametrize("vocabulary", [7, 20, 500])
def test_log_probabilities_are_those_of_the_models_own_logits(vocabulary: int):
    logits = np.random.default_rng(9).normal(0, 5, (3, vocabulary)).astype(np.float32)
    logits[1] = np.round(logits[1]) + 0.0  # with ties, and without a negative zero
    tokens = np.array([vocabulary - 1, 0, 3])
    found = jax.jit(log_probabilities)(jnp.asarray(logits), jnp.asarray(tokens), True)
    exact = logits.astype(np.float64)
    exact -= np.log(np.exp(exact).sum(axis=1, keepdims=True))
    count = min(vocabulary, 20)
    likeliest = np.argsort(-exact, axis=1, kind="stable")[:, :count]
    np.testing.assert_array_equal(found.top_ids[:, :count], likeliest)
    # float32 has 24 digits, and the largest number is about 20
    np.testing.assert_allclose(found.top_values[:, :count], np.take_along_axis(exact, likeliest, axis=1), atol=1e-5)
    np.testing.assert_allclose(found.chosen, exact[np.arange(3), tokens], atol=1e-5)
    assert (np.asarray(found.top_values[:, count:]) == -np.inf).all()


def test_tokens_are_counted_and_those_below_zero_are_not():
    seen = count_tokens(jnp.asarray([[0, 0, 0, IN_PROMPT, 0], [0] * 5]), jnp.asarray([[-1, 3, 1, 3], [-1, -1, -1, -1]]))
    np.testing.assert_array_equal(seen, [[0, GENERATED, 0, IN_PROMPT + 2 * GENERATED, 0], [0] * 5])


def test_rows_mix_greedy_and_drawn():
    logits = jnp.asarray(np.random.default_rng(2).normal(0, 1, (2, 50)), jnp.float32)
    params = SamplingParams.of(2, SamplingOptions(temperature=5.0, seed=3))
    params.temperature[0] = 0
    tokens = {int(compiled_sample(logits, jnp.zeros((2, 50), jnp.int32), params, step)[1]) for step in range(8)}
    assert len(tokens) > 2
    assert int(compiled_sample(logits, jnp.zeros((2, 50), jnp.int32), params, 0)[0]) == int(jnp.argmax(logits[0]))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"temperature": -0.1}, "temperature -0.1 is out of range: expected 0 (greedy) or more"),
        ({"temperature": float("nan")}, "temperature nan is out of range"),
        ({"temperature": 1e39}, "temperature 1e+39 is out of range: expected 0 (greedy) or more, at most 3.4e38"),
        ({"temperature": 10**400}, "temperature 100000000000000000...0000000000000000000 is out of range"),
        ({"temperature": "0.7"}, "temperature '0.7' is not a number: give one number for all rows"),
        ({"temperature": True}, "temperature True is not a number"),
        ({"temperature": np.True_}, "temperature True is not a number"),
        ({"temperature": [0.5, 0.7]}, "temperature [0.5, 0.7] is not a number: give one number for all rows"),
        ({"temperature": 1j}, "temperature 1j is not a number"),
        ({"top_k": -2}, "top_k -2 is out of range: expected 0 or -1 (all) or a positive integer"),
        ({"top_k": -0.5}, "top_k -0.5 is out of range: expected 0 or -1 (all) or a positive integer"),
        ({"top_k": 2.5}, "top_k 2.5 is out of range"),
        ({"top_k": float("inf")}, "top_k inf is out of range"),
        ({"top_k": "40"}, "top_k '40' is not a number"),
        ({"top_p": 0.0}, "top_p 0.0 is out of range: expected above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p 1.5 is out of range"),
        ({"min_p": 2}, "min_p 2 is out of range: expected between 0 and 1"),
        ({"top_p": "x" * 1000}, "top_p 'xxxxxxxxxxxx...xxxxxxxxxxxxx' is not a number"),
        ({"repetition_penalty": 0}, "repetition_penalty 0 is out of range: expected positive (1 for none)"),
        ({"repetition_penalty": 1e13}, "repetition_penalty 10000000000000.0 is out of range"),
        ({"presence_penalty": float("inf")}, "presence_penalty inf is out of range"),
        ({"presence_penalty": -1e39}, "presence_penalty -1e+39 is out of range: expected finite (0 for none)"),
        ({"frequency_penalty": 1e31}, "frequency_penalty 1e+31 is out of range: expected finite (0 for none)"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty nan is out of range"),
        ({"min_tokens": -1}, "min_tokens -1 is out of range: expected 0 or more"),
        ({"min_tokens": 65}, "min_tokens 65 is out of range: expected at most max_new_tokens 64"),
        ({"logit_bias": [1]}, "logit_bias [1] is not a mapping: give numbers by token id"),
        ({"logit_bias": dict.fromkeys(range(301), 1)}, "has 301 entries: expected at most 300"),
        ({"logit_bias": {-1: 1}}, "logit_bias of token -1 is out of range: expected a token id"),
        ({"logit_bias": {"5": 1}}, "logit_bias of token '5' is not a number"),
        ({"logit_bias": {5: 100.5}}, "logit_bias[5] 100.5 is out of range: expected -100 to 100"),
        ({"logit_bias": {5: float("nan")}}, "logit_bias[5] nan is out of range"),
        ({"top_logprobs": 21}, "top_logprobs 21 is out of range: expected 0 to 20"),
        ({"top_logprobs": True}, "top_logprobs True is not a number"),
        ({"seed": [1, 2, 3]}, "3 seeds for a batch of 2: give one integer or one per row"),
        ({"seed": 1.5}, "seed 1.5 is out of range: expected a whole number"),
        ({"seed": "1"}, "seed '1' is not a number"),
        ({"seed": [1, False]}, "seed[1] False is not a number"),
    ],
)
def test_parameters_out_of_range_are_named(option: dict, message: str):
    with pytest.raises(ValueError) as error:
        SamplingParams.of(2, SamplingOptions(**option))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ({"temperature": 1e-50}, np.finfo(np.float32).tiny),  # still a draw, of the likeliest
        ({"temperature": 1e-40}, np.finfo(np.float32).tiny),
        ({"temperature": np.float32(0.7)}, np.float32(0.7)),
        ({"temperature": jnp.float32(0.7)}, np.float32(0.7)),
        ({"temperature": torch.tensor(0.7)}, np.float32(0.7)),
        ({"temperature": Fraction(7, 10)}, np.float32(0.7)),
        ({"temperature": 2}, 2),
        ({"temperature": 3e38}, np.float32(3e38)),
        ({"temperature": None}, 0),
        ({"top_k": -1}, 0),
        ({"top_k": 40.0}, 40),
        ({"top_k": np.int64(40)}, 40),
        ({"top_k": 10**12}, 2**31 - 1),
        ({"top_k": None}, 0),
        ({"top_p": 1e-50}, np.finfo(np.float32).tiny),
        ({"top_p": np.float64(0.5)}, 0.5),
        ({"top_p": None}, 1),
        ({"min_p": 1e-50}, np.finfo(np.float32).tiny),
        ({"min_p": 1}, 1),
        ({"presence_penalty": -1e-50}, 0),
        ({"repetition_penalty": None}, 1),
    ],
)
def test_numbers_of_any_kind_become_what_float32_and_int32_hold(option: dict, expected: float):
    params = SamplingParams.of(2, SamplingOptions(**option))
    for name in option:
        rows = getattr(params, name)
        assert rows.dtype == (np.int32 if name == "top_k" else np.float32)
        # what chips take for 0 counts as 0
        np.testing.assert_array_equal(np.where(np.abs(rows) < np.finfo(np.float32).tiny, 0, rows), [expected] * 2)


@pytest.mark.parametrize(
    ("seed", "expected"),
    [
        (7, [7, 8]),
        (7.0, [7, 8]),
        (np.uint32(7), [7, 8]),
        (None, [0, 1]),
        (2**32 - 1, [2**32 - 1, 0]),
        (2**64 + 3, [3, 4]),
        (-1, [2**32 - 1, 0]),
        ([5, -2], [5, 2**32 - 2]),
        ((2**40 + 1, 3.0), [1, 3]),
        (np.array([1, 2]), [1, 2]),
        (jnp.array([1, 2]), [1, 2]),
    ],
)
def test_seeds_count_modulo_2_to_the_32(seed, expected: list[int]):
    params = SamplingParams.of(2, SamplingOptions(seed=seed))
    assert params.seed.dtype == np.uint32
    np.testing.assert_array_equal(params.seed, expected)


def plain_sample(logits, seen, params: SamplingParams, step) -> jax.Array:
    """The rule as it is written down, without care for overflow: what a seed draws must not change."""
    factor = params.repetition_penalty[:, None]
    repeated = jnp.where(logits > 0, logits / factor, logits * factor)
    logits = jnp.where(seen > 0, repeated, logits)
    logits = logits - jnp.where(seen >= GENERATED, params.presence_penalty[:, None], 0)
    scaled = logits / params.temperature[:, None]

    descending = -jnp.sort(-scaled, axis=-1)
    last = jnp.where(params.top_k > 0, jnp.minimum(params.top_k, logits.shape[-1]), logits.shape[-1]) - 1
    of_top_k = jnp.take_along_axis(descending, last[:, None], axis=-1)
    likely = jax.nn.softmax(jnp.where(descending >= of_top_k, descending, -1e30), axis=-1)
    inside = jnp.cumsum(likely, axis=-1) - likely < params.top_p[:, None]
    of_top_p = jnp.min(jnp.where(inside, descending, jnp.inf), axis=-1, keepdims=True)
    of_min_p = descending[:, :1] + jnp.log(params.min_p)[:, None]
    kept = jnp.where(scaled >= jnp.maximum(jnp.maximum(of_top_k, of_top_p), of_min_p), scaled, -1e30)
    keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), step))(params.seed)
    return jax.vmap(jax.random.categorical)(keys, kept).astype(jnp.int32)


@pytest.mark.parametrize("spread", [0.5, 3, 30])
def test_a_seed_draws_the_token_that_the_plain_rule_draws(spread: float):
    rows, vocabulary = 256, 384
    rng = np.random.default_rng(3)
    logits = jnp.asarray(rng.normal(-2, spread, (rows, vocabulary)), jnp.float32)
    seen = jnp.asarray(rng.integers(0, 4, (rows, vocabulary)), jnp.int32)
    plain = jax.jit(plain_sample)
    penalties = {"repetition_penalty": 1.3, "presence_penalty": 0.7}
    for options in [*OPTIONS, {"temperature": 0.02}, {"temperature": 1, "top_p": 0.999}, {"temperature": 50}]:
        for extra in ({}, penalties):
            params = SamplingParams.of(rows, SamplingOptions(**options, **extra, seed=11))
            for step in (0, 5):
                tokens = compiled_sample(logits, seen, params, step)
                np.testing.assert_array_equal(tokens, plain(logits, seen, params, step), str(options | extra))


LARGEST = 3.4028234663852886e38
ROW = [0.3, -1.2, 2.1, 0.7, 1.4, -0.4, 2.9, -3.0]
INF = np.inf
LOGITS = {
    "moderate": ROW,
    "negative": [-5, -3.5, -4, -9, -7, -3, -11, -6],
    "ties": [1, 4, 4, 0, 4, 1, -2, -2],
    "all equal": [0.5] * 8,
    "up to float32's largest": [LARGEST * share for share in (-1, 0.4, 0.9, 1, -0.6, 0.2, 1, -0.3)],
    "down to float32's lowest": [-LARGEST * share for share in (1, 1, 0.7, 0.5, 0.9, 0.5, 0.8, 1)],
    "all at float32's largest": [LARGEST] * 8,
    "all at float32's lowest": [-LARGEST] * 8,
    "up to bfloat16's largest": [0, -3.3895313892515355e38, 1, 3.3895313892515355e38, 5, 3.3762e38, -2, 3],
    "large ties": [1e10, 9e9, 1e10, 0, -1e10, 9e9, 1e10, 3],
    "one token left": [-INF, -INF, -INF, -INF, -INF, -3, -INF, -INF],
    "one token left, the lowest": [-INF, -INF, -INF, -INF, -LARGEST, -INF, -INF, -INF],
    "masked as some programs do": [-1e30, -1e30, -1e30, 2, -LARGEST, 1, -INF, -1e9],
    "below masks of other programs": [-INF, -INF, -2e38, -3e38, -INF, -1.5e38, -1.5e38, -INF],
    "infinite": [0, 3, INF, 2e38, -INF, INF, 1, 2],
    "nan": [np.nan, 1, 0.5, np.nan, np.nan, -1, 2, np.nan],
    "nan and nothing else but one": [np.nan, np.nan, np.nan, np.nan, -7, np.nan, -INF, np.nan],
}
TEMPERATURES = [1e-45, 1e-38, 1.2e-38, 1e-30, 1e-6, 0.01, 1, 30, 1e6, 1e30, 3.4e38]
TRUNCATIONS = [
    {},
    {"top_k": 1},
    {"top_k": 3},
    {"top_k": 10**9},
    {"top_p": 1e-9},
    {"top_p": 1e-45},
    {"top_p": 0.55},
    {"min_p": 0.999},
    {"min_p": 1e-30},
    {"top_k": 5, "top_p": 0.7, "min_p": 0.01},
]
PENALTIES = [
    {"repetition_penalty": factor, "presence_penalty": presence}
    for factor in (1e-12, 1e-6, 0.5, 1, 2, 1e6, 1e12)
    for presence in (-3e38, -1000, 0, 1000, 3e38)
] + [
    {"repetition_penalty": factor, "frequency_penalty": frequency}
    for factor in (1e-12, 1, 1e12)
    for frequency in (-1e30, -1000, 0.5, 1e30)
]
SEEN = np.array([IN_PROMPT, GENERATED, 0, IN_PROMPT + 2 * GENERATED, 0, 4 * GENERATED, IN_PROMPT, 0], np.int32)
DRAWS = 600


def float32_digits(x: np.ndarray) -> np.ndarray:
    """`x` rounded to the 24 binary digits of float32, of any size."""
    fraction, exponent = np.frexp(x)
    return np.ldexp(np.rint(fraction * 2**24), exponent - 24)


def exact_logits(
    logits: list[float], repetition_penalty: float = 1, presence_penalty: float = 0, frequency_penalty: float = 0
) -> np.ndarray:
    """Penalised logits with float32's digits in float64's range, which nothing here exceeds; NaN is -inf."""
    exact = np.nan_to_num(np.asarray(np.float32(logits), np.float64), nan=-INF, posinf=INF, neginf=-INF)
    factor = np.float64(np.float32(repetition_penalty))
    repeated = float32_digits(np.where(exact > 0, exact / factor, exact * factor))
    exact = np.where(SEEN > 0, repeated, exact)
    presence, frequency = np.float32([presence_penalty, frequency_penalty]).astype(np.float64)
    counts = SEEN // GENERATED
    return float32_digits(exact - np.where(counts > 0, presence + counts * frequency, 0))


def exact_distribution(exact: np.ndarray, temperature: float, top_k=0, top_p=1.0, min_p=0.0) -> np.ndarray:
    """float64 probabilities of one row; equal logits are kept or left out together."""
    top = exact.max()
    with np.errstate(invalid="ignore", over="ignore"):
        ratio = np.exp(np.where(exact == top, 0, (exact - top) / temperature))  # to the likeliest token's probability
    kept = exact > -INF
    if top_k:
        kept &= exact >= np.sort(exact)[::-1][min(top_k, 8) - 1]
    if top_p < 1:
        order = np.argsort(-exact, kind="stable")
        likely = np.where(kept, ratio, 0)[order] / np.where(kept, ratio, 0).sum()
        kept &= exact >= exact[order][np.cumsum(likely) - likely < top_p].min()
    kept &= ratio >= min_p
    return np.where(kept, ratio, 0) / np.where(kept, ratio, 0).sum()


def assert_draws_follow(logits: list[float], expected: np.ndarray, **options: float):
    params = SamplingParams.of(DRAWS, SamplingOptions(**options, seed=17))
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (DRAWS, 8))
    tokens = np.asarray(compiled_sample(rows, jnp.broadcast_to(SEEN, (DRAWS, 8)), params, 3))
    drawn = np.bincount(tokens, minlength=8)
    assert not drawn[expected < 1e-12].any(), (options, drawn, expected)
    # seven standard deviations of each count, and one draw for tokens that are hardly ever drawn: over some 10**5
    # counts, a right distribution exceeds neither
    deviation = np.sqrt(DRAWS * expected * (1 - expected))
    assert (np.abs(drawn - DRAWS * expected) <= 7 * deviation + (expected < 1) * 1).all(), (options, drawn, expected)


@pytest.mark.parametrize("name", LOGITS)
def test_extreme_temperatures_give_the_limits_distribution(name: str):
    for temperature in TEMPERATURES:
        for truncation in TRUNCATIONS:
            expected = exact_distribution(exact_logits(LOGITS[name]), temperature, **truncation)
            assert_draws_follow(LOGITS[name], expected, temperature=temperature, **truncation)


@pytest.mark.parametrize("name", LOGITS)
def test_extreme_penalties_give_the_limits_distribution(name: str):
    for penalties in PENALTIES:
        exact = exact_logits(LOGITS[name], **penalties)
        for options in (
            {"temperature": 1e-38},
            {"temperature": 0.8},
            {"temperature": 1e6, "top_k": 3},
            {"temperature": 1, "top_p": 1e-9},
        ):
            assert_draws_follow(LOGITS[name], exact_distribution(exact, **options), **options, **penalties)


@pytest.mark.parametrize("name", LOGITS)
def test_greedy_takes_the_first_of_the_highest_logits(name: str):
    for penalties in PENALTIES:
        params = SamplingParams.of(1, SamplingOptions(**penalties))
        token = compiled_sample(jnp.asarray([LOGITS[name]], jnp.float32), SEEN[None], params, 0)
        assert int(token[0]) == np.argmax(exact_logits(LOGITS[name], **penalties)), penalties


def test_min_p_of_one_leaves_the_likeliest_tokens():
    for temperature in (1e-38, 0.5, 1e6):
        expected = exact_distribution(exact_logits(LOGITS["ties"]), temperature, min_p=1.0)
        np.testing.assert_array_equal(expected > 0, np.array(LOGITS["ties"]) == 4)
        assert_draws_follow(LOGITS["ties"], expected, temperature=temperature, min_p=1.0)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_formats_are_drawn_from_in_float32(dtype):
    largest = float(jnp.finfo(dtype).max)
    logits = jnp.asarray([[0, largest, 1, largest, -largest, -jnp.inf, jnp.nan, 3]] * 64, dtype)
    params = SamplingParams.of(64, SamplingOptions(temperature=1e-38))
    tokens = compiled_sample(logits, jnp.zeros((64, 8), jnp.int32), params, 0)
    assert set(np.asarray(tokens).tolist()) == {1, 3}


@pytest.mark.parametrize("logits", [[-INF] * 8, [np.nan] * 8, [np.nan, -INF] * 4], ids=["masked", "nan", "both"])
def test_a_row_with_nothing_to_choose_gives_the_pad_token(logits: list[float]):
    rows = jnp.asarray([logits, ROW, logits], jnp.float32)
    for options in ({}, {"temperature": 1.0}, {"temperature": 1e-38, "top_k": 2}, {"temperature": 1e6, "top_p": 0.5}):
        params = SamplingParams.of(3, SamplingOptions(**options), pad_token_id=5)
        tokens = compiled_sample(rows, jnp.zeros((3, 8), jnp.int32), params, 0)
        assert (int(tokens[0]), int(tokens[2])) == (5, 5)
        alone = SamplingParams.of(1, SamplingOptions(seed=1, **options), pad_token_id=5)
        assert int(tokens[1]) == int(compiled_sample(rows[1:2], jnp.zeros((1, 8), jnp.int32), alone, 0)[0])


def test_a_row_draws_the_same_beside_rows_with_other_options():
    everything = [
        {"temperature": 1e-38, "top_k": 1},
        {"temperature": 1.0},
        {"temperature": 1e6, "min_p": 0.5, "repetition_penalty": 1e6},
        {"temperature": 0.7, "top_p": 0.6, "presence_penalty": 3e38},
        {"temperature": 0.9, "frequency_penalty": -1e30},
        {},
        {"temperature": 0.9, "logit_bias": {7: 3.0, 2999: 5.0}, "min_tokens": 4, "repetition_penalty": 1.3},
    ]
    vocabulary = 3000
    logits = jnp.asarray(np.random.default_rng(5).normal(0, 2, (7, vocabulary)), jnp.float32)
    logits = logits.at[0].multiply(3e37)
    seen = jnp.ones((7, vocabulary), jnp.int32) * GENERATED
    alone = [SamplingParams.of(1, SamplingOptions(seed=row, **options)) for row, options in enumerate(everything)]
    together = jax.tree.map(lambda *rows: np.concatenate(rows), *alone)
    for step in range(6):
        tokens = compiled_sample(logits, seen, together, step)
        each = [int(compiled_sample(logits[row : row + 1], seen[:1], one, step)[0]) for row, one in enumerate(alone)]
        np.testing.assert_array_equal(tokens, each)
