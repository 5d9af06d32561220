"""Routing helpers that the backends share: a choice of no expert adds nothing and reads no weights."""

import jax
import jax.numpy as jnp


def is_expert(top_k_index: jax.Array, experts: int) -> jax.Array:
    """Returns bool [T, k]: whether a choice goes to an expert. -1, or any number outside 0..E-1, goes nowhere."""
    return (top_k_index >= 0) & (top_k_index < experts)


def nowhere_last(top_k_index: jax.Array, experts: int) -> jax.Array:
    """Returns int32 [T, k]: the experts' numbers, with E for a choice that goes nowhere, so that it sorts last."""
    return jnp.where(is_expert(top_k_index, experts), top_k_index, experts).astype(jnp.int32)


def in_use(top_k_index: jax.Array, experts: int) -> jax.Array:
    """Returns bool [E]: whether any token chose the expert."""
    return jnp.zeros(experts, bool).at[nowhere_last(top_k_index, experts).reshape(-1)].set(True, mode="drop")


def weighted_sum(out: jax.Array, top_k_index: jax.Array, top_k_weights: jax.Array, experts: int) -> jax.Array:
    """Sums each token's experts by routing weight, in the order of its choices, regardless of the other tokens.

    `out` is float32 [T, k, D]; if a choice goes nowhere, its values may be anything, including NaN. Returns float32
    [T, D].
    """
    somewhere = is_expert(top_k_index, experts)[..., None]
    return jnp.sum(jnp.where(somewhere, out * top_k_weights.astype(jnp.float32)[..., None], 0), axis=1)
