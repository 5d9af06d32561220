"""Attention over keys in blocks, with a running softmax (Milakov and Gimelshein, arXiv:1805.02867)."""

import jax
import jax.numpy as jnp

from pallas_kernels import sharded

LOWEST = -1e30  # replaces minus infinity, because the difference of two of them must not be NaN

State = tuple[jax.Array, jax.Array, jax.Array]  # (running maximum, running sum, running weighted values)


def initial(query: jax.Array) -> State:
    """Returns the state of queries [..., h] that have read nothing: float32 [...], [...] and [..., h]."""
    zeros = sharded.zeros(query.shape[:-1], jnp.float32, query)
    return zeros + LOWEST, zeros, sharded.zeros(query.shape, jnp.float32, query)


def read_block(state: State, products: jax.Array, value: jax.Array, readable: jax.Array) -> State:
    """Returns the state [B, K, G, T, ...] after a block of S keys.

    Args:
        state: the state before the block.
        products: float32 [B, K, G, T, S], query times key.
        value: [B, K, S, h].
        readable: bool [B, T, S], which keys a query reads.
    """
    maximum, total, weighted = state
    scores = jnp.where(readable[:, None, None], products * value.shape[-1] ** -0.5, LOWEST)
    # The result does not depend on the maximum, so neither does the gradient.
    new_maximum = jax.lax.stop_gradient(jnp.maximum(maximum, jnp.max(scores, axis=-1)))
    # kept above LOWEST, so that unreadable keys weigh 0 even if nothing was readable so far
    weights = jnp.exp(scores - jnp.maximum(new_maximum, LOWEST / 2)[..., None])
    shrink = jnp.exp(maximum - new_maximum)
    read = jnp.einsum("bkgts,bksh->bkgth", weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
    return new_maximum, total * shrink + jnp.sum(weights, axis=-1), weighted * shrink[..., None] + read


def finish(state: State) -> jax.Array:
    """Returns the attention [..., h] of a state; 0 if nothing was read."""
    _, total, weighted = state
    return weighted / jnp.where(total == 0, 1, total)[..., None]
