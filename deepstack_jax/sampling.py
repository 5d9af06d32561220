"""Chooses the next token: greedily, or sampled after penalties, temperature, top-k, top-p and min-p, in that order.

The order and meaning of the parameters are those of transformers' logits processors; presence_penalty and
frequency_penalty are OpenAI's. logit_bias comes before the penalties, as in vLLM; masks and min_tokens come after them,
which gives the same as before them, because what is forbidden stays at -inf. Every parameter is an array over rows, so
one program serves any mixture of them.

Extreme values behave like their limits for logits of any size: a temperature near 0 gives the most likely token
(sampled if there are several), and a huge one samples uniformly from the tokens that top-k, top-p and min-p keep. Equal
logits are kept or dropped together. A logit of NaN counts as -inf, which is never chosen; a row with no other logits
gives the pad token.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int32

from deepstack_jax.rounding import cdiv
from deepstack_jax.sampling_options import MAX_LOGIT_BIASES, MAX_TOP_LOGPROBS, SamplingOptions

# `seen` of a token: IN_PROMPT if the prompt has it, and GENERATED for each time that the answer has it
IN_PROMPT, GENERATED = 1, 2
END_TOKENS = 16  # the number of end tokens per row is padded to a multiple of this
_SMALLEST = float(np.finfo(np.float32).tiny)  # the smallest normal number: XLA on CPU and TPU treats smaller ones as 0
_STEEP = 2.0**14  # above it, a logit over the temperature rounds the Gumbel noise added to it to less than 10 bits
_DEFAULTS = SamplingOptions()
# the float32 options
_NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")


@jax.tree_util.register_dataclass
@dataclass
class SamplingParams:
    """Sampling options of B rows. Neutral are temperature 0 (greedy), top_k 0, top_p 1, min_p 0, penalties 1 and 0."""

    temperature: np.ndarray  # float32 [B]
    top_k: np.ndarray  # int32 [B], 0 for all
    top_p: np.ndarray  # float32 [B]
    min_p: np.ndarray  # float32 [B]
    repetition_penalty: np.ndarray  # float32 [B], divides positive logits of tokens in prompt or answer
    presence_penalty: np.ndarray  # float32 [B], subtracted from logits of tokens in the answer
    frequency_penalty: np.ndarray  # float32 [B], the same, multiplied by how often the answer has the token
    seed: np.ndarray  # uint32 [B]
    end_token_ids: np.ndarray  # int32 [B, E], padded with -1
    pad_token_id: np.ndarray  # int32 [B]
    bias_token_ids: np.ndarray  # int32 [B, 300], padded with -1
    bias_values: np.ndarray  # float32 [B, 300], added to these tokens' logits
    min_tokens: np.ndarray  # int32 [B], end tokens can't be drawn before the answer has so many tokens
    top_logprobs: np.ndarray  # int32 [B], -1 for no log probabilities

    @staticmethod
    def of(
        batch: int,
        options: SamplingOptions = _DEFAULTS,
        *,
        end_token_ids: Iterable[int] = (),
        pad_token_id: int = 0,
    ) -> "SamplingParams":
        """Returns the same options for every row, except for its seed.

        With one seed, row r draws like a batch of one with seed + r. `end_token_ids` are the answer's end tokens; those
        in the options are ignored. A positive value below 1.2e-38 (float32's smallest normal number) is replaced by it.

        Raises:
            ValueError: the number of seeds differs from the number of rows.
        """
        ends = list(end_token_ids)
        # padded, so that different end tokens don't need another compilation
        ends += [-1] * (max(cdiv(len(ends), END_TOKENS), 1) * END_TOKENS - len(ends))

        def rows(value: float, dtype: type) -> np.ndarray:
            return np.full(batch, value, dtype)

        numbers = {name: getattr(options, name) for name in _NUMBERS}
        biases = options.logit_bias or {}
        bias_ids, bias_values = np.full(MAX_LOGIT_BIASES, -1, np.int32), np.zeros(MAX_LOGIT_BIASES, np.float32)
        bias_ids[: len(biases)], bias_values[: len(biases)] = list(biases), list(biases.values())
        return SamplingParams(
            **{name: rows(max(x, _SMALLEST) if x > 0 else x, np.float32) for name, x in numbers.items()},
            top_k=rows(min(options.top_k, np.iinfo(np.int32).max), np.int32),
            seed=np.array(options.seeds(batch), np.uint32),
            end_token_ids=np.tile(np.asarray(ends, np.int32), (batch, 1)),
            pad_token_id=rows(pad_token_id, np.int32),
            bias_token_ids=np.tile(bias_ids, (batch, 1)),
            bias_values=np.tile(bias_values, (batch, 1)),
            min_tokens=rows(options.min_tokens, np.int32),
            top_logprobs=rows(-1 if options.top_logprobs is None else options.top_logprobs, np.int32),
        )


class TokenMask(NamedTuple):
    """Which tokens B rows may draw; those of rows that are not named may draw any."""

    rows: jax.Array | np.ndarray  # bool [B]
    allowed: jax.Array | np.ndarray  # int32 [B, W], bit t % 32 of word t // 32 is set for each allowed token t

    @staticmethod
    def none(batch: int, vocabulary: int) -> "TokenMask":
        """Returns the mask of rows that may draw any token."""
        return TokenMask(jnp.zeros(batch, bool), jnp.zeros((batch, cdiv(vocabulary, 32)), jnp.int32))


class Logprobs(NamedTuple):
    """Log probabilities of drawn tokens and of the likeliest ones, on the device. Zeros where nobody wants them."""

    chosen: Float[Array, "*B"]
    top_ids: Int32[Array, "*B 20"]  # the likeliest first
    top_values: Float[Array, "*B 20"]


class TokenLogprobs(NamedTuple):
    """The log probability of a token of an answer, and the likeliest tokens in its place with theirs, in order."""

    logprob: float
    top: tuple[tuple[int, float], ...]


@jax.named_scope("sample")
def sample(
    logits: Float[Array, "B V"],
    seen: Int32[Array, "B V"],
    params: SamplingParams,
    step: Int[Array, "*B"],
    live: Bool[Array, "B"] | None = None,
    mask: TokenMask | None = None,
) -> Int[Array, "B"]:
    """Returns the token of every row at `step` of its answer, int32 [B].

    A row's token depends only on its own logits, `seen`, options, seed, step and mask. `step` is one for all rows or
    one per row. The tokens of rows that are not `live` have no meaning. min_tokens yields where a mask leaves nothing
    but end tokens.
    """
    steps = jnp.broadcast_to(step, len(logits))
    logits, unit = _adjust(logits, seen, params, steps, jnp.ones(len(logits), bool) if live is None else live, mask)
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    highest = jnp.take_along_axis(logits, greedy[:, None], axis=-1)

    def draw() -> jax.Array:
        temperature = jnp.asarray(params.temperature)[:, None]
        scale = _scaling(highest, jnp.maximum(temperature * unit, _SMALLEST))
        truncates = (params.top_k > 0) | (params.top_p < 1) | (params.min_p > 0)
        kept = jax.lax.cond(jnp.any(truncates), lambda: _truncate(logits, scale, params), lambda: scale(logits))
        keys = jax.vmap(lambda seed, step: jax.random.fold_in(jax.random.key(seed), step))(params.seed, steps)
        drawn = jax.vmap(jax.random.categorical)(keys, kept).astype(jnp.int32)
        return jnp.where(temperature[:, 0] > 0, drawn, greedy)

    tokens = jax.lax.cond(jnp.any(params.temperature > 0), draw, lambda: greedy)
    return jnp.where(highest[:, 0] > -jnp.inf, tokens, params.pad_token_id)


def count_tokens(seen: Int32[Array, "B V"], tokens: Int[Array, "B T"]) -> Int32[Array, "B V"]:
    """Adds GENERATED to `seen` for each token of a row's answer; tokens below 0 are ignored."""
    rows = jnp.arange(len(tokens))[:, None]
    return seen.at[rows, jnp.where(tokens < 0, seen.shape[1], tokens)].add(GENERATED, mode="drop")


def wants_logprobs(params: SamplingParams, live: Bool[Array, "B"]) -> Bool[Array, ""]:
    """Returns whether any live row does."""
    return jnp.any((jnp.asarray(params.top_logprobs) >= 0) & live)


def log_probabilities(logits: Float[Array, "B V"], tokens: Int[Array, "B"], wanted: Bool[Array, ""]) -> Logprobs:
    """Returns those of the model's own logits, in float32, without bias, penalties, temperature and masks.

    A logit of NaN counts as -inf. Of equal tokens, the one with the lowest id comes first.
    """
    batch, count = len(logits), min(MAX_TOP_LOGPROBS, logits.shape[-1])

    def computed() -> Logprobs:
        known = jnp.where(jnp.isnan(logits), -jnp.inf, logits).astype(jnp.float32)
        # the barrier keeps XLA from fusing the sort, as in `_truncate`
        top, ids = jax.lax.top_k(jax.lax.optimization_barrier(known), count)
        total = jax.nn.logsumexp(known, axis=-1, keepdims=True)
        chosen = jnp.take_along_axis(known, tokens[:, None], axis=-1) - total
        padding = [(0, 0), (0, MAX_TOP_LOGPROBS - count)]
        values = jnp.pad(top - total, padding, constant_values=-jnp.inf)
        return Logprobs(chosen[:, 0], jnp.pad(ids.astype(jnp.int32), padding, constant_values=-1), values)

    return jax.lax.cond(wanted, computed, lambda: no_logprobs(batch))


def no_logprobs(*shape: int) -> Logprobs:
    """Returns zeros."""
    top = (*shape, MAX_TOP_LOGPROBS)
    return Logprobs(jnp.zeros(shape, jnp.float32), jnp.zeros(top, jnp.int32), jnp.zeros(top, jnp.float32))


def _adjust(
    logits: jax.Array,
    seen: jax.Array,
    params: SamplingParams,
    steps: jax.Array,
    live: jax.Array,
    mask: TokenMask | None,
) -> tuple[jax.Array, jax.Array]:
    """Returns (float32 logits [B, V] after bias, penalties and masks, `unit` [B, 1]); logits are in this unit."""
    bias_ids, ends = jnp.asarray(params.bias_token_ids), jnp.asarray(params.end_token_ids)
    biased, early = live & jnp.any(bias_ids >= 0, axis=1), live & (steps < jnp.asarray(params.min_tokens))
    masked = jnp.zeros_like(live) if mask is None else live & jnp.asarray(mask.rows)
    rows, vocabulary = jnp.arange(len(logits))[:, None], logits.shape[-1]
    penalise, unit = _penalties(seen, params)

    def adjusted() -> jax.Array:
        places = jnp.where(bias_ids >= 0, bias_ids, vocabulary)
        moved = penalise(logits.astype(jnp.float32).at[rows, places].add(params.bias_values, mode="drop"))
        if mask is not None:
            # Row by row: a TPU, whose tiles have 128 columns, keeps 32 columns in the space of 128. On NVIDIA the host
            # would drive that loop, and wait in every step to decide whether it is needed.
            forms = {"cuda": jax.vmap(_bits), "default": partial(jax.lax.map, _bits)}
            allowed = jax.lax.platform_dependent(jnp.asarray(mask.allowed), **forms)
            moved = jnp.where(allowed[:, :vocabulary] | ~masked[:, None], moved, -jnp.inf)
        at_end = jnp.any(jnp.arange(vocabulary)[:, None] == ends[:, None], axis=-1) & early[:, None]
        others = jnp.any(~at_end & (moved > -jnp.inf), axis=1, keepdims=True)
        return jnp.where(at_end & others, -jnp.inf, moved)

    return jax.lax.cond(jnp.any(biased | early | masked), adjusted, lambda: penalise(logits)), unit


def _bits(words: jax.Array) -> jax.Array:
    """Returns the bits of int32 [W], the lowest of each word first: bool [32 * W]."""
    return (((words[:, None] >> jnp.arange(32)) & 1) > 0).reshape(-1)


def _penalties(seen: jax.Array, params: SamplingParams) -> tuple[Callable[[jax.Array], jax.Array], jax.Array]:
    """Returns (a function of logits to float32 logits [B, V] after the penalties, `unit` [B, 1]).

    The function's results are multiplied by the unit, which keeps them from overflowing. It is a power of two, so the
    digits equal those of the plain products, also after division by a temperature in the same unit.
    """
    factor, presence, frequency = (
        jnp.asarray(penalty)[:, None]
        for penalty in (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
    )
    # an eighth of the unit that keeps logits in range, because two logits may be subtracted, each after two penalties
    unit = _power_of_two(jnp.minimum(factor, 1 / factor)) / 8

    def penalise(logits: jax.Array) -> jax.Array:
        logits = jnp.where(jnp.isnan(logits), -jnp.inf, logits).astype(jnp.float32) * unit
        repeated = jnp.where(logits > 0, logits / factor, logits * factor)
        logits = jnp.where(seen > 0, repeated, logits)
        count = seen // GENERATED
        return logits - jnp.where(count > 0, presence * unit + count * (frequency * unit), 0)

    return penalise, unit


def _power_of_two(x: jax.Array) -> jax.Array:
    """Returns the largest power of two that is at most `x`: a positive float32 without its fraction."""
    return jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(x, jnp.uint32) & 0x7F800000, jnp.float32)


def _scaling(highest: jax.Array, temperature: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """Returns a function that divides logits by the temperature, relative to the highest if quotients are too large.

    Such quotients would overflow, or absorb the noise that chooses among equal logits. Other quotients are not shifted,
    because that would round them differently and change what a seed draws.
    """
    peak = jnp.where(jnp.abs(highest / temperature) > _STEEP, highest, 0)
    return lambda logits: jnp.where(logits == peak, 0, logits - peak) / temperature


def _truncate(
    logits: jax.Array, scale: Callable[[jax.Array], jax.Array], params: SamplingParams
) -> Float[Array, "B V"]:
    """Returns scaled logits, with -inf for tokens that top-k, top-p or min-p drop; each keeps the most likely token.

    Logits are compared before scaling, because a huge temperature makes scaled ones equal.
    """
    # the barrier keeps XLA from fusing the sort, which on a TPU would take more than sixty copies of the logits
    descending = jax.lax.optimization_barrier(-jnp.sort(-logits, axis=-1))
    vocabulary = logits.shape[-1]
    last = jnp.where(params.top_k > 0, jnp.minimum(params.top_k, vocabulary), vocabulary) - 1
    of_top_k = jnp.take_along_axis(descending, last[:, None], axis=-1)

    scaled = scale(descending)
    likely = jax.nn.softmax(jnp.where(descending >= of_top_k, scaled, -jnp.inf), axis=-1)
    likelier = jnp.cumsum(likely, axis=-1) - likely
    # rounded sums may reach 1 before the last token, but a row without top-p keeps all tokens
    inside = likelier < jnp.where(params.top_p < 1, params.top_p, jnp.inf)[:, None]
    of_top_p = jnp.min(jnp.where(inside, descending, jnp.inf), axis=-1, keepdims=True)

    of_min_p = scaled[:, :1] + jnp.log(jnp.asarray(params.min_p))[:, None]
    relative = scale(logits)
    return jnp.where((logits >= jnp.maximum(of_top_k, of_top_p)) & (relative >= of_min_p), relative, -jnp.inf)
