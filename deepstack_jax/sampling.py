"""Chooses the next token: greedily, or sampled after penalties, temperature, top-k, top-p and min-p, in that order.

The order and meaning of the parameters are those of transformers' logits processors; presence_penalty and
frequency_penalty are OpenAI's. Every parameter is an array over rows, so one program serves any mixture of them.

Extreme values behave like their limits for logits of any size: a temperature near 0 gives the most likely token
(sampled if there are several), and a huge one samples uniformly from the tokens that top-k, top-p and min-p keep. Equal
logits are kept or dropped together. A logit of NaN counts as -inf, which is never chosen; a row with no other logits
gives the pad token.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32

from deepstack_jax.rounding import cdiv
from deepstack_jax.sampling_options import SamplingOptions

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
        return SamplingParams(
            **{name: rows(max(x, _SMALLEST) if x > 0 else x, np.float32) for name, x in numbers.items()},
            top_k=rows(min(options.top_k, np.iinfo(np.int32).max), np.int32),
            seed=np.array(options.seeds(batch), np.uint32),
            end_token_ids=np.tile(np.asarray(ends, np.int32), (batch, 1)),
            pad_token_id=rows(pad_token_id, np.int32),
        )


def sample(
    logits: Float[Array, "B V"], seen: Int32[Array, "B V"], params: SamplingParams, step: Int[Array, "*B"]
) -> Int[Array, "B"]:
    """Returns the token of every row at `step` of its answer, int32 [B].

    A row's token depends only on its own logits, `seen`, options, seed and step. `step` is one for all rows or one per
    row.
    """
    logits, unit = _penalise(logits, seen, params)
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    highest = jnp.take_along_axis(logits, greedy[:, None], axis=-1)

    def draw() -> jax.Array:
        temperature = jnp.asarray(params.temperature)[:, None]
        scale = _scaling(highest, jnp.maximum(temperature * unit, _SMALLEST))
        truncates = (params.top_k > 0) | (params.top_p < 1) | (params.min_p > 0)
        kept = jax.lax.cond(jnp.any(truncates), lambda: _truncate(logits, scale, params), lambda: scale(logits))
        steps = jnp.broadcast_to(step, len(logits))
        keys = jax.vmap(lambda seed, step: jax.random.fold_in(jax.random.key(seed), step))(params.seed, steps)
        drawn = jax.vmap(jax.random.categorical)(keys, kept).astype(jnp.int32)
        return jnp.where(temperature[:, 0] > 0, drawn, greedy)

    tokens = jax.lax.cond(jnp.any(params.temperature > 0), draw, lambda: greedy)
    return jnp.where(highest[:, 0] > -jnp.inf, tokens, params.pad_token_id)


def count_tokens(seen: Int32[Array, "B V"], tokens: Int[Array, "B T"]) -> Int32[Array, "B V"]:
    """Adds GENERATED to `seen` for each token of a row's answer; tokens below 0 are ignored."""
    rows = jnp.arange(len(tokens))[:, None]
    return seen.at[rows, jnp.where(tokens < 0, seen.shape[1], tokens)].add(GENERATED, mode="drop")


def _penalise(logits: jax.Array, seen: jax.Array, params: SamplingParams) -> tuple[jax.Array, jax.Array]:
    """Returns (float32 logits [B, V] after the penalties, `unit` [B, 1]); logits are multiplied by the unit.

    The unit keeps logits from overflowing. It is a power of two, so the digits equal those of the plain products, also
    after division by a temperature in the same unit.
    """
    factor, presence, frequency = (
        jnp.asarray(penalty)[:, None]
        for penalty in (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
    )
    # an eighth of the unit that keeps logits in range, because two logits may be subtracted, each after two penalties
    unit = _power_of_two(jnp.minimum(factor, 1 / factor)) / 8
    logits = jnp.where(jnp.isnan(logits), -jnp.inf, logits).astype(jnp.float32) * unit
    repeated = jnp.where(logits > 0, logits / factor, logits * factor)
    logits = jnp.where(seen > 0, repeated, logits)
    count = seen // GENERATED
    return logits - jnp.where(count > 0, presence * unit + count * (frequency * unit), 0), unit


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
