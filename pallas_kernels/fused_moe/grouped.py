"""fused_moe in plain XLA, for NVIDIA chips that the Pallas kernel doesn't support: grouped products over sorted tokens.

With few tokens, multiply and add replaces the matrix product: XLA fuses the gather of the chosen experts' weights into
the sum, so that they are read once per token and never copied.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.fused_moe import routing, xla
from pallas_kernels.fused_moe.transforms import differentiable

FEW_ROWS = 16  # T * k up to which weights are read again for every token


@differentiable
def fused_moe(
    hidden: jax.Array, gate_up: jax.Array, down: jax.Array, top_k_index: jax.Array, top_k_weights: jax.Array
) -> jax.Array:
    """See `pallas_kernels.fused_moe`."""
    run = _read_by_token if top_k_index.size <= FEW_ROWS else _sorted
    out = run(hidden.astype(gate_up.dtype), gate_up, down, top_k_index)
    return routing.weighted_sum(out, top_k_index, top_k_weights, len(gate_up)).astype(hidden.dtype)


def _read_by_token(x: jax.Array, gate_up: jax.Array, down: jax.Array, top_k_index: jax.Array) -> jax.Array:
    """Returns float32 [T, k, D], not yet weighted.

    A choice of no expert uses one that another choice reads anyway, so that it costs no extra read. A call whose
    choices are all -1 reads one expert.
    """
    experts = len(gate_up)
    is_expert = routing.is_expert(top_k_index, experts)
    read_anyway = jnp.max(jnp.where(is_expert, top_k_index, 0))
    number = jnp.where(is_expert, top_k_index, read_anyway)

    def product(rows: jax.Array, weights: jax.Array) -> jax.Array:
        """rows [T, j, a], j being k or 1 -> float32 [T, k, b]."""
        of_row = weights[number].astype(jnp.float32)
        return jnp.sum(rows.astype(jnp.float32)[..., None] * of_row, axis=2)

    return product(xla.swiglu(product(x[:, None], gate_up)).astype(x.dtype), down)


def _sorted(x: jax.Array, gate_up: jax.Array, down: jax.Array, top_k_index: jax.Array) -> jax.Array:
    """Returns float32 [T, k, D], not yet weighted."""
    tokens, top_k = top_k_index.shape
    expert_of_row = routing.nowhere_last(top_k_index, len(gate_up)).reshape(-1)
    order = jnp.argsort(expert_of_row)
    counts = jnp.bincount(expert_of_row, length=len(gate_up)).astype(jnp.int32)  # without rows of no expert

    def product(rows: jax.Array, weights: jax.Array) -> jax.Array:
        return jax.lax.ragged_dot(rows, weights, counts, preferred_element_type=jnp.float32)

    out = product(xla.swiglu(product(x[order // top_k], gate_up)).astype(x.dtype), down)
    row_of = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=order.dtype))
    return out[row_of].reshape(tokens, top_k, -1)
