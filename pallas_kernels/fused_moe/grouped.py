"""fused_moe by XLA alone for NVIDIA chips without a kernel of ours: grouped products over sorted tokens.

Few tokens multiply and add instead of calling a matrix product: XLA fuses the gather of the chosen experts' weights
into the sum, so that they are read once for each token and never copied.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.fused_moe import xla
from pallas_kernels.fused_moe.transforms import differentiable

FEW_ROWS = 16  # T * k up to which weights are read for every token anew


@differentiable
def fused_moe(
    hidden: jax.Array, gate_up: jax.Array, down: jax.Array, top_k_index: jax.Array, top_k_weights: jax.Array
) -> jax.Array:
    """See `pallas_kernels.fused_moe`."""
    run = _read_by_token if top_k_index.size <= FEW_ROWS else _sorted
    out = run(hidden.astype(gate_up.dtype), gate_up, down, top_k_index)
    weighted = out * top_k_weights.astype(jnp.float32)[..., None]
    return jnp.sum(weighted, axis=1).astype(hidden.dtype)


def _read_by_token(x: jax.Array, gate_up: jax.Array, down: jax.Array, top_k_index: jax.Array) -> jax.Array:
    """float32 [T, k, D], not yet weighted."""

    def product(rows: jax.Array, weights: jax.Array) -> jax.Array:
        """rows [T, j, a], j being k or 1 -> float32 [T, k, b]."""
        of_row = weights[top_k_index].astype(jnp.float32)
        return jnp.sum(rows.astype(jnp.float32)[..., None] * of_row, axis=2)

    return product(xla.swiglu(product(x[:, None], gate_up)).astype(x.dtype), down)


def _sorted(x: jax.Array, gate_up: jax.Array, down: jax.Array, top_k_index: jax.Array) -> jax.Array:
    """float32 [T, k, D], not yet weighted."""
    tokens, top_k = top_k_index.shape
    expert_of_row = top_k_index.reshape(-1)
    order = jnp.argsort(expert_of_row)
    counts = jnp.bincount(expert_of_row, length=gate_up.shape[0]).astype(jnp.int32)

    def product(rows: jax.Array, weights: jax.Array) -> jax.Array:
        return jax.lax.ragged_dot(rows, weights, counts, preferred_element_type=jnp.float32)

    out = product(xla.swiglu(product(x[order // top_k], gate_up)).astype(x.dtype), down)
    row_of = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=order.dtype))
    return out[row_of].reshape(tokens, top_k, -1)
