"""fused_moe for XLA on CPU: a loop over the experts in use, each of which multiplies its own rows in tiles of one size.

The number of rows of a product depends only on the shapes and the dtype. XLA sums a row in a different order if the
product has a different size, so the number of tokens that chose an expert must not change that size.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels import sharded
from pallas_kernels.fused_moe import routing, xla
from pallas_kernels.fused_moe.transforms import differentiable

# Up to this many tokens, reading an expert's weights takes longer than its products; above it, larger tiles are faster
# (measured by benchmarks/kernels.py).
FEW_TOKENS = 12

_AddExpert = Callable[[jax.Array, jax.Array], jax.Array]


@differentiable
def fused_moe(
    hidden: jax.Array, gate_up: jax.Array, down: jax.Array, top_k_index: jax.Array, top_k_weights: jax.Array
) -> jax.Array:
    """See `pallas_kernels.fused_moe`."""
    few = 2 if gate_up.dtype == jnp.bfloat16 else FEW_TOKENS
    run = _all_rows if len(hidden) <= few else _sorted
    out = run(hidden.astype(gate_up.dtype), gate_up, down, top_k_index, top_k_weights.astype(jnp.float32))
    return out.astype(hidden.dtype)


def _all_rows(
    x: jax.Array, gate_up: jax.Array, down: jax.Array, top_k_index: jax.Array, top_k_weights: jax.Array
) -> jax.Array:
    """Returns float32 [T, D]: runs all tokens through each expert in use and omits from its sum those of others."""
    if len(x) == 1 and x.dtype == jnp.bfloat16:  # XLA reads weights four times as fast for two rows as for one
        x, top_k_weights = (jnp.pad(a, ((0, 1), (0, 0))) for a in (x, top_k_weights))
        top_k_index = jnp.pad(top_k_index, ((0, 1), (0, 0)), constant_values=-1)
        return _all_rows(x, gate_up, down, top_k_index, top_k_weights)[:1]

    def add_expert(number: jax.Array, total: jax.Array) -> jax.Array:
        chose = top_k_index == number
        share = jnp.sum(jnp.where(chose, top_k_weights, 0), axis=1, keepdims=True)
        out = _expert(x, *_weights_of(number, gate_up, down))
        return total + jnp.where(jnp.any(chose, axis=1, keepdims=True), share * out, 0)

    total = sharded.zeros(x.shape, jnp.float32, x, gate_up, down, top_k_index, top_k_weights)
    return _for_experts_in_use(top_k_index, len(gate_up), add_expert, total)


def _sorted(
    x: jax.Array, gate_up: jax.Array, down: jax.Array, top_k_index: jax.Array, top_k_weights: jax.Array
) -> jax.Array:
    """Returns float32 [T, D]: sorts tokens by expert and runs each expert over its own rows in tiles.

    The weights of idle experts aren't read.
    """
    (tokens, top_k), experts = top_k_index.shape, len(gate_up)
    tile = _tile(tokens, top_k, experts)
    expert_of_row = routing.nowhere_last(top_k_index, experts).reshape(-1)
    order = jnp.argsort(expert_of_row)
    counts = jnp.bincount(expert_of_row, length=experts)
    first_row = jnp.cumsum(counts) - counts
    rows = jnp.pad(x[order // top_k], ((0, tile), (0, 0)))

    def run_expert(number: jax.Array, out: jax.Array) -> jax.Array:
        weights = _weights_of(number, gate_up, down)

        def run_tile(i: jax.Array, out: jax.Array) -> jax.Array:
            start = first_row[number] + i * tile
            tile_out = _expert(jax.lax.dynamic_slice_in_dim(rows, start, tile), *weights)
            # rows past the expert's last belong to the next expert, which overwrites them, or to none and aren't read
            return jax.lax.dynamic_update_slice_in_dim(out, tile_out, start, axis=0)

        return jax.lax.fori_loop(0, (counts[number] + tile - 1) // tile, run_tile, out)

    out = sharded.zeros((tokens * top_k + tile, x.shape[1]), jnp.float32, x, gate_up, down, top_k_index)
    out = _for_experts_in_use(top_k_index, experts, run_expert, out)
    row_of = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=order.dtype))
    return routing.weighted_sum(out[row_of].reshape(tokens, top_k, -1), top_k_index, top_k_weights, experts)


def _for_experts_in_use(top_k_index: jax.Array, experts: int, add_expert: _AddExpert, total: jax.Array) -> jax.Array:
    """Runs total = add_expert(number, total) for each expert that a token chose, in the order of their numbers."""
    is_in_use = routing.in_use(top_k_index, experts)
    in_use_first = jnp.argsort(~is_in_use, stable=True)
    return jax.lax.fori_loop(0, jnp.sum(is_in_use), lambda i, total: add_expert(in_use_first[i], total), total)


def _tile(tokens: int, top_k: int, experts: int) -> int:
    """Returns the rows of a product: about half of an expert's rows under even load, so that there is little padding.

    With few tokens it starts from two, because XLA reads bfloat16 weights a fifth faster for two rows than for eight.
    """
    tile = 2 if tokens <= FEW_TOKENS else 8
    while tile < 64 and 4 * tile * experts <= 3 * tokens * top_k:
        tile *= 2
    return tile


def _weights_of(number: jax.Array, gate_up: jax.Array, down: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns one expert's weights, [D, 2F] and [F, D]."""
    of_expert = (jax.lax.dynamic_index_in_dim(weights, number, keepdims=False) for weights in (gate_up, down))
    expert_gate_up, expert_down = of_expert
    return expert_gate_up, expert_down


def _expert(x: jax.Array, expert_gate_up: jax.Array, expert_down: jax.Array) -> jax.Array:
    """Runs rows [n, D] through one expert; returns float32 [n, D]."""
    inner = xla.swiglu(jnp.dot(x, expert_gate_up, preferred_element_type=jnp.float32))
    return jnp.dot(inner.astype(expert_down.dtype), expert_down, preferred_element_type=jnp.float32)
