"""fused_moe for XLA on CPU: few tokens run through each expert in use, many are sorted by expert and run in tiles."""

import jax
import jax.numpy as jnp

from pallas_kernels import sharded
from pallas_kernels.fused_moe import xla
from pallas_kernels.fused_moe.transforms import differentiable

# Up to this many tokens all of them run through every expert in use, as reading its weights takes longer than the
# products; above it, sorting pays (measured by benchmarks/kernels.py).
FEW_TOKENS = 12


@differentiable
def fused_moe(
    hidden: jax.Array, gate_up: jax.Array, down: jax.Array, top_k_index: jax.Array, top_k_weights: jax.Array
) -> jax.Array:
    """See `pallas_kernels.fused_moe`."""
    run = _by_expert if len(hidden) <= FEW_TOKENS else _sorted
    out = run(hidden.astype(gate_up.dtype), gate_up, down, top_k_index, top_k_weights.astype(jnp.float32))
    return out.astype(hidden.dtype)


def _by_expert(
    x: jax.Array, gate_up: jax.Array, down: jax.Array, top_k_index: jax.Array, top_k_weights: jax.Array
) -> jax.Array:
    """float32 [T, D]: a loop over the experts in use, which reads the weights of each once and no others."""
    tokens = len(x)
    is_bfloat16 = x.dtype == jnp.bfloat16
    if tokens == 1 and is_bfloat16:
        x, top_k_index, top_k_weights = (jnp.pad(a, ((0, 1), (0, 0))) for a in (x, top_k_index, top_k_weights))
    num_in_use, in_use_first = _in_use(top_k_index[:tokens], gate_up.shape[0])

    def add_expert(i: jax.Array, total: jax.Array) -> jax.Array:
        number = in_use_first[i]
        chosen = jnp.any(top_k_index == number, axis=1)
        share = jnp.sum(jnp.where(top_k_index == number, top_k_weights, 0), axis=1)

        def weighted(x: jax.Array, chosen: jax.Array, share: jax.Array) -> jax.Array:
            return jnp.where(chosen[:, None], share[:, None] * _expert(x, gate_up, down, number), 0)

        def add_all() -> jax.Array:
            return total + weighted(x, chosen, share)

        def add_two() -> jax.Array:
            rows = jax.lax.top_k(chosen, 2)[1]
            return total.at[rows].add(weighted(x[rows], chosen[rows], share[rows]), unique_indices=True)

        # XLA reads weights fastest for two bfloat16 rows: four times as fast as for one, a fifth faster than for eight
        return jax.lax.cond(jnp.sum(chosen) <= 2, add_two, add_all) if is_bfloat16 else add_all()

    total = sharded.zeros(x.shape, jnp.float32, x, gate_up, down, top_k_index, top_k_weights)
    return jax.lax.fori_loop(0, num_in_use, add_expert, total)[:tokens]


def _sorted(
    x: jax.Array, gate_up: jax.Array, down: jax.Array, top_k_index: jax.Array, top_k_weights: jax.Array
) -> jax.Array:
    """float32 [T, D]: tokens sorted by expert, each expert over its own rows in tiles; idle experts aren't read."""
    tokens, top_k = top_k_index.shape
    experts = gate_up.shape[0]
    tile = _tile(tokens * top_k, experts)
    expert_of_row = top_k_index.reshape(-1)
    order = jnp.argsort(expert_of_row)
    counts = jnp.bincount(expert_of_row, length=experts)
    first_row = jnp.cumsum(counts) - counts
    rows = jnp.pad(x[order // top_k], ((0, tile), (0, 0)))

    num_in_use, in_use_first = _in_use(top_k_index, experts)

    def run_expert(i: jax.Array, out: jax.Array) -> jax.Array:
        number = in_use_first[i]

        def run_tile(i: jax.Array, out: jax.Array) -> jax.Array:
            start = first_row[number] + i * tile
            tile_out = _expert(jax.lax.dynamic_slice_in_dim(rows, start, tile), gate_up, down, number)
            # rows past the expert's last are the next one's, which writes them again
            return jax.lax.dynamic_update_slice_in_dim(out, tile_out, start, axis=0)

        return jax.lax.fori_loop(0, (counts[number] + tile - 1) // tile, run_tile, out)

    out = sharded.zeros((tokens * top_k + tile, x.shape[1]), jnp.float32, x, gate_up, down, top_k_index)
    out = jax.lax.fori_loop(0, num_in_use, run_expert, out)
    row_of = jnp.zeros(tokens * top_k, jnp.int32).at[order].set(jnp.arange(tokens * top_k, dtype=jnp.int32))
    return jnp.sum(out[row_of].reshape(tokens, top_k, -1) * top_k_weights[..., None], axis=1)


def _in_use(top_k_index: jax.Array, experts: int) -> tuple[jax.Array, jax.Array]:
    """(number of experts that a token chose, their numbers followed by those of the others)."""
    in_use = jnp.zeros(experts, bool).at[top_k_index.reshape(-1)].set(True)
    return jnp.sum(in_use), jnp.argsort(~in_use, stable=True)


def _tile(rows: int, experts: int) -> int:
    """Rows of a product: about half of what an expert has when the load is even, so that little is padding."""
    tile = 8
    while tile < 64 and 4 * tile * experts <= 3 * rows:
        tile *= 2
    return tile


def _expert(x: jax.Array, gate_up: jax.Array, down: jax.Array, number: jax.Array) -> jax.Array:
    """Rows [n, D] through one expert, float32."""
    of_expert = (jax.lax.dynamic_index_in_dim(weights, number, keepdims=False) for weights in (gate_up, down))
    expert_gate_up, expert_down = of_expert
    inner = xla.swiglu(jnp.dot(x, expert_gate_up, preferred_element_type=jnp.float32))
    return jnp.dot(inner.astype(down.dtype), expert_down, preferred_element_type=jnp.float32)
