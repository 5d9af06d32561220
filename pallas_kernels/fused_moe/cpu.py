"""fused_moe for XLA on CPU: tokens sorted by expert, each expert over its own rows in tiles.

Few tokens are left to the plain form, which reads just the chosen experts' weights.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.fused_moe import xla


@jax.custom_vjp
def fused_moe(
    hidden: jax.Array, gate_up: jax.Array, down: jax.Array, top_k_index: jax.Array, top_k_weights: jax.Array
) -> jax.Array:
    """See `pallas_kernels.fused_moe`. The gradient is the plain form's."""
    experts = gate_up.shape[0]
    if top_k_index.size <= experts:
        return xla.fused_moe(hidden, gate_up, down, top_k_index, top_k_weights)
    return _sorted(hidden, gate_up, down, top_k_index, top_k_weights, _tile(top_k_index.size, experts))


def _tile(rows: int, experts: int) -> int:
    """Rows of a product: about half of what an expert has when the load is even, so that little is padding."""
    tile = 8
    while tile < 64 and 4 * tile * experts <= 3 * rows:
        tile *= 2
    return tile


def _sorted(
    hidden: jax.Array,
    gate_up: jax.Array,
    down: jax.Array,
    top_k_index: jax.Array,
    top_k_weights: jax.Array,
    tile: int,
) -> jax.Array:
    tokens, top_k = top_k_index.shape
    experts, width = down.shape[:2]
    expert_of_row = top_k_index.reshape(-1)
    order = jnp.argsort(expert_of_row)
    counts = jnp.bincount(expert_of_row, length=experts)
    first_row = jnp.cumsum(counts) - counts
    rows = jnp.pad(hidden.astype(gate_up.dtype)[order // top_k], ((0, tile), (0, 0)))

    def run_expert(number: jax.Array, out: jax.Array) -> jax.Array:
        expert_gate_up, expert_down = (
            jax.lax.dynamic_index_in_dim(weights, number, keepdims=False) for weights in (gate_up, down)
        )

        def run_tile(i: jax.Array, out: jax.Array) -> jax.Array:
            start = first_row[number] + i * tile
            tile_rows = jax.lax.dynamic_slice_in_dim(rows, start, tile)
            gate_up_out = jnp.dot(tile_rows, expert_gate_up, preferred_element_type=jnp.float32)
            inner = jax.nn.silu(gate_up_out[:, :width]) * gate_up_out[:, width:]
            tile_out = jnp.dot(inner.astype(down.dtype), expert_down, preferred_element_type=jnp.float32)
            # rows past the expert's last are the next one's, which writes them again
            return jax.lax.dynamic_update_slice_in_dim(out, tile_out, start, axis=0)

        return jax.lax.fori_loop(0, (counts[number] + tile - 1) // tile, run_tile, out)

    out = jnp.zeros((tokens * top_k + tile, hidden.shape[1]), jnp.float32)
    out = jax.lax.fori_loop(0, experts, run_expert, out)
    row_of = jnp.zeros(tokens * top_k, jnp.int32).at[order].set(jnp.arange(tokens * top_k, dtype=jnp.int32))
    out = out[row_of].reshape(tokens, top_k, -1) * top_k_weights.astype(jnp.float32)[..., None]
    return jnp.sum(out, axis=1).astype(hidden.dtype)


def _forward(*args: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return fused_moe(*args), args


def _backward(args: tuple[jax.Array, ...], gradient: jax.Array) -> tuple[jax.Array | None, ...]:
    hidden, gate_up, down, top_k_index, top_k_weights = args
    _, vjp = jax.vjp(lambda h, g, d, w: xla.fused_moe(h, g, d, top_k_index, w), hidden, gate_up, down, top_k_weights)
    of_hidden, of_gate_up, of_down, of_weights = vjp(gradient)
    return of_hidden, of_gate_up, of_down, None, of_weights


fused_moe.defvjp(_forward, _backward)
