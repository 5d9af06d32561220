"""The plain form of fused_moe, which is differentiable and the reference for the others.

It runs expert after expert over all tokens and leaves out tokens that didn't choose the expert; an idle expert is
skipped. A token's sum is in the order of its experts' numbers. Memory is that of one expert's weights and activations.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import sharded
from pallas_kernels.fused_moe import routing


def fused_moe(
    hidden: jax.Array, gate_up: jax.Array, down: jax.Array, top_k_index: jax.Array, top_k_weights: jax.Array
) -> jax.Array:
    """See `pallas_kernels.fused_moe`."""
    x = hidden.astype(gate_up.dtype)
    experts = gate_up.shape[0]

    def share_of(number: jax.Array, expert_gate_up: jax.Array, expert_down: jax.Array) -> jax.Array:
        """Returns what one expert adds to every token, float32 [T, D]."""
        gate_up_out = jnp.dot(x, expert_gate_up, preferred_element_type=jnp.float32)
        out = jnp.dot(swiglu(gate_up_out).astype(down.dtype), expert_down, preferred_element_type=jnp.float32)
        chose = top_k_index == number
        weight = jnp.sum(jnp.where(chose, top_k_weights.astype(jnp.float32), 0), axis=1, keepdims=True)
        return jnp.where(jnp.any(chose, axis=1, keepdims=True), weight * out, 0)  # 0 * inf would be NaN

    def add_by_number(number: jax.Array, total: jax.Array) -> jax.Array:
        """Reads the expert's weights only if a token chose it: ten times as fast for one token and 128 experts."""

        def add() -> jax.Array:
            at = (jax.lax.dynamic_index_in_dim(weights, number, keepdims=False) for weights in (gate_up, down))
            return total + share_of(number, *at)

        return jax.lax.cond(is_in_use[number], add, lambda: total)

    def add_scanned(total: jax.Array, expert: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        """Reads all weights in turn, because most are needed; its gradient does the same."""
        is_in_use, *of_expert = expert
        return jax.lax.cond(is_in_use, lambda: total + share_of(*of_expert), lambda: total), None

    is_in_use = routing.in_use(top_k_index, experts)
    total = sharded.zeros(hidden.shape, jnp.float32, hidden, gate_up, down, top_k_index, top_k_weights)
    if top_k_index.size <= experts:
        total = jax.lax.fori_loop(0, experts, add_by_number, total)
    else:
        numbers = jnp.arange(experts, dtype=top_k_index.dtype)
        total, _ = jax.lax.scan(add_scanned, total, (is_in_use, numbers, gate_up, down))
    return total.astype(hidden.dtype)


def swiglu(gate_up_out: jax.Array) -> jax.Array:
    """Returns silu(gate) * up, [..., F], of [..., 2F] with the gate in the first F columns."""
    gate, up = jnp.split(gate_up_out, 2, axis=-1)
    return jax.nn.silu(gate) * up
