"""Choosing the next token: greedy, or drawn after penalties, temperature, top-k, top-p and min-p, in that order.

The order and the meaning of each parameter are those of transformers' logits processors; presence_penalty and
frequency_penalty are OpenAI's.
Every parameter is an array over rows, so one program serves any mixture of them.

Extreme values give the limit's answer, whatever the size of the logits: a temperature near 0 gives the likeliest token
(a draw if several are), a huge one draws uniformly from what top-k, top-p and min-p keep. Equal logits are kept or
left out together. A logit of NaN counts as -inf, which is never chosen; a row with no other logits gives the pad token.
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
END_TOKENS = 16  # end tokens of a row, up to a multiple of this
_SMALLEST = float(np.finfo(np.float32).tiny)  # of the normal numbers: XLA on CPU and TPU takes smaller ones for 0
_STEEP = 2.0**14  # above it, a logit over the temperature rounds the Gumbel noise added to it to less than 10 bits
_DEFAULTS = SamplingOptions()
# those that are float32
_NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")


@jax.tree_util.register_dataclass
@dataclass
class SamplingParams:
    """Sampling of B rows. Neutral values: temperature 0 (greedy), top_k 0, top_p 1, min_p 0, penalties 1 and 0."""

    temperature: np.ndarray  # float32 [B]
    top_k: np.ndarray  # int32 [B], 0 for all
    top_p: np.ndarray  # float32 [B]
    min_p: np.ndarray  # float32 [B]
    repetition_penalty: np.ndarray  # float32 [B], divides positive logits of tokens in prompt or answer
    presence_penalty: np.ndarray  # float32 [B], subtracted from logits of tokens in the answer
    frequency_penalty: np.ndarray  # float32 [B], the same, times how often the answer has the token
    seed: np.ndarray  # uint32 [B]
    end_token_ids: np.ndarray  # int32 [B, E], filled up with -1
    pad_token_id: np.ndarray  # int32 [B]

    @staticmethod
    def of(
        batch: int,
        options: SamplingOptions = _DEFAULTS,
        *,
        end_token_ids: Iterable[int] = (),
        pad_token_id: int = 0,
    ) -> "SamplingParams":
        """The same options for every row, except for its seed. Row r of one seed draws as a batch of one with seed + r.

        `end_token_ids` are the answer's end tokens, whatever the options say. A positive value below 1.2e-38
        (float32's smallest normal number) is taken as that number.

        Raises:
            ValueError: another number of seeds than rows.
        """
        ends = list(end_token_ids)
        # room for some, so that naming other ones compiles nothing
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
    """The token of every row at `step` of its answer: a function of the row's logits, options, seed and step only.

    `step` is one for all rows, or one per row.
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
    """Adds GENERATED for each token of a row's answer; tokens below 0 are left out."""
    rows = jnp.arange(len(tokens))[:, None]
    return seen.at[rows, jnp.where(tokens < 0, seen.shape[1], tokens)].add(GENERATED, mode="drop")


def _penalise(logits: jax.Array, seen: jax.Array, params: SamplingParams) -> tuple[jax.Array, jax.Array]:
    """float32 logits [B, V] after the penalties, multiplied by `unit` [B, 1] so that none of them overflows.

    The unit is a power of two, so the digits are those of the plain products, and so are the digits after the division
    by a temperature in the same unit.
    """
    factor, presence, frequency = (
        jnp.asarray(penalty)[:, None]
        for penalty in (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
    )
    # an eighth of what keeps logits in range: two of them may be subtracted, each after two penalties
    unit = _power_of_two(jnp.minimum(factor, 1 / factor)) / 8
    logits = jnp.where(jnp.isnan(logits), -jnp.inf, logits).astype(jnp.float32) * unit
    repeated = jnp.where(logits > 0, logits / factor, logits * factor)
    logits = jnp.where(seen > 0, repeated, logits)
    count = seen // GENERATED
    return logits - jnp.where(count > 0, presence * unit + count * (frequency * unit), 0), unit


def _power_of_two(x: jax.Array) -> jax.Array:
    """The largest power of two that is at most `x`: a positive float32's exponent without its fraction."""
    return jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(x, jnp.uint32) & 0x7F800000, jnp.float32)


def _scaling(highest: jax.Array, temperature: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """The division of logits by the temperature, relative to the highest one if the quotients would be too large.

    Such quotients overflow, or swallow the noise that draws among equal logits. Others stay as they are: a shift would
    round them differently and change what a seed draws.
    """
    peak = jnp.where(jnp.abs(highest / temperature) > _STEEP, highest, 0)
    return lambda logits: jnp.where(logits == peak, 0, logits - peak) / temperature


def _truncate(
    logits: jax.Array, scale: Callable[[jax.Array], jax.Array], params: SamplingParams
) -> Float[Array, "B V"]:
    """Scaled logits with -inf for what top-k, top-p and min-p leave out; each keeps at least the likeliest token.

    Logits are compared before scaling, after which a huge temperature makes them equal.
    """
    # fused with what follows, the sort takes a TPU more than sixty copies of the logits
    descending = jax.lax.optimization_barrier(-jnp.sort(-logits, axis=-1))
    vocabulary = logits.shape[-1]
    last = jnp.where(params.top_k > 0, jnp.minimum(params.top_k, vocabulary), vocabulary) - 1
    of_top_k = jnp.take_along_axis(descending, last[:, None], axis=-1)

    scaled = scale(descending)
    likely = jax.nn.softmax(jnp.where(descending >= of_top_k, scaled, -jnp.inf), axis=-1)
    likelier = jnp.cumsum(likely, axis=-1) - likely
    # sums may reach 1 before the last token, which a row without top-p keeps
    inside = likelier < jnp.where(params.top_p < 1, params.top_p, jnp.inf)[:, None]
    of_top_p = jnp.min(jnp.where(inside, descending, jnp.inf), axis=-1, keepdims=True)

    of_min_p = scaled[:, :1] + jnp.log(jnp.asarray(params.min_p))[:, None]
    relative = scale(logits)
    return jnp.where((logits >= jnp.maximum(of_top_k, of_top_p)) & (relative >= of_min_p), relative, -jnp.inf)
