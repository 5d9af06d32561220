"""Choosing the next token: greedy, or drawn after penalties, temperature, top-k, top-p and min-p, in that order.

The order and the meaning of each parameter are those of transformers' logits processors; presence_penalty is OpenAI's.
Every parameter is an array over rows, so one program serves any mixture of them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

IN_PROMPT, GENERATED = 1, 2  # bits of `seen`
_MASKED = -1e30


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
    seed: np.ndarray  # uint32 [B]
    end_token_ids: np.ndarray  # int32 [E], filled up with -1
    pad_token_id: np.ndarray  # int32 []

    @staticmethod
    def of(
        batch: int,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        seed: int | Sequence[int] = 0,
        end_token_ids: Iterable[int] = (),
        pad_token_id: int = 0,
    ) -> "SamplingParams":
        """The same sampling for every row. Row r of an int seed draws as a batch of one with `seed + r` does.

        Raises:
            ValueError: a parameter out of its range.
        """
        for name, value, good, expected in (
            ("temperature", temperature, temperature >= 0, "0 (greedy) or more"),
            ("top_k", top_k, top_k >= 0 and top_k == int(top_k), "0 (all) or a positive integer"),
            ("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1"),
            ("min_p", min_p, 0 <= min_p <= 1, "between 0 and 1"),
            ("repetition_penalty", repetition_penalty, repetition_penalty > 0, "positive (1 for none)"),
            ("presence_penalty", presence_penalty, np.isfinite(presence_penalty), "finite (0 for none)"),
        ):
            if not (good and np.isfinite(value)):
                raise ValueError(f"{name} {value} is out of range: expected {expected}")
        seeds = np.arange(batch) + seed if isinstance(seed, int | np.integer) else np.asarray(seed)
        if seeds.shape != (batch,):
            raise ValueError(f"{len(seeds)} seeds for a batch of {batch}: give one integer or one a row")
        ends = list(end_token_ids)
        # room for eight end tokens, so that naming other ones compiles nothing
        ends += [-1] * (-len(ends) % 8 or (8 if not ends else 0))

        def rows(value: float, dtype: type) -> np.ndarray:
            return np.full(batch, value, dtype)

        return SamplingParams(
            temperature=rows(temperature, np.float32),
            top_k=rows(top_k, np.int32),
            top_p=rows(top_p, np.float32),
            min_p=rows(min_p, np.float32),
            repetition_penalty=rows(repetition_penalty, np.float32),
            presence_penalty=rows(presence_penalty, np.float32),
            seed=(seeds % 2**32).astype(np.uint32),
            end_token_ids=np.asarray(ends, np.int32),
            pad_token_id=np.asarray(pad_token_id, np.int32),
        )


def sample(
    logits: Float[Array, "B V"], seen: UInt8[Array, "B V"], params: SamplingParams, step: Int[Array, ""]
) -> Int[Array, "B"]:
    """The token of every row at `step` of its answer: a function of the row's logits, seed and step alone."""
    logits = _penalise(logits, seen, params)
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def draw() -> jax.Array:
        temperature = jnp.asarray(params.temperature)
        scaled = logits / jnp.where(temperature > 0, temperature, 1)[:, None]
        truncates = (params.top_k > 0) | (params.top_p < 1) | (params.min_p > 0)
        kept = jax.lax.cond(jnp.any(truncates), lambda: _truncate(scaled, params), lambda: scaled)
        keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), step))(params.seed)
        drawn = jax.vmap(jax.random.categorical)(keys, kept).astype(jnp.int32)
        return jnp.where(temperature > 0, drawn, greedy)

    return jax.lax.cond(jnp.any(params.temperature > 0), draw, lambda: greedy)


def mark_seen(seen: UInt8[Array, "B V"], tokens: Int[Array, "B T"], bit: int) -> UInt8[Array, "B V"]:
    """Sets `bit` of each token of a row; tokens below 0 are left out."""
    rows = jnp.arange(len(tokens))[:, None]
    here = jnp.zeros_like(seen).at[rows, jnp.where(tokens < 0, seen.shape[1], tokens)].set(bit, mode="drop")
    return seen | here


def _penalise(logits: jax.Array, seen: jax.Array, params: SamplingParams) -> jax.Array:
    factor = jnp.asarray(params.repetition_penalty)[:, None]
    repeated = jnp.where(logits > 0, logits / factor, logits * factor)
    logits = jnp.where(seen > 0, repeated, logits)
    return logits - jnp.where(seen & GENERATED > 0, jnp.asarray(params.presence_penalty)[:, None], 0)


def _truncate(logits: jax.Array, params: SamplingParams) -> jax.Array:
    """Masks what top-k, top-p and min-p leave out; each keeps at least the likeliest token."""
    descending = -jnp.sort(-logits, axis=-1)
    vocabulary = logits.shape[-1]
    last = jnp.where(params.top_k > 0, jnp.minimum(params.top_k, vocabulary), vocabulary) - 1
    of_top_k = jnp.take_along_axis(descending, last[:, None], axis=-1)

    likely = jax.nn.softmax(jnp.where(descending >= of_top_k, descending, _MASKED), axis=-1)
    likelier = jnp.cumsum(likely, axis=-1) - likely
    inside = likelier < jnp.asarray(params.top_p)[:, None]
    of_top_p = jnp.min(jnp.where(inside, descending, jnp.inf), axis=-1, keepdims=True)

    of_min_p = descending[:, :1] + jnp.log(jnp.asarray(params.min_p))[:, None]
    lowest = jnp.maximum(jnp.maximum(of_top_k, of_top_p), of_min_p)
    return jnp.where(logits >= lowest, logits, _MASKED)
