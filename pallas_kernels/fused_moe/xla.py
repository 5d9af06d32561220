"""The plain form of fused_moe, the reference of the others; differentiable.

Expert after expert over all tokens, weighted by 0 where the expert wasn't chosen; an idle expert is skipped. Memory is
that of one expert's weights and activations, whatever E is.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import sharded


def fused_moe(
    hidden: jax.Array, gate_up: jax.Array, down: jax.Array, top_k_index: jax.Array, top_k_weights: jax.Array
) -> jax.Array:
    """See `pallas_kernels.fused_moe`."""
    x = hidden.astype(gate_up.dtype)
    experts = gate_up.shape[0]

    def share_of(number: jax.Array, expert_gate_up: jax.Array, expert_down: jax.Array) -> jax.Array:
        """What one expert adds to every token, float32 [T, D]."""
        gate_up_out = jnp.dot(x, expert_gate_up, preferred_element_type=jnp.float32)
        out = jnp.dot(swiglu(gate_up_out).astype(down.dtype), expert_down, preferred_element_type=jnp.float32)
        weight = jnp.sum(jnp.where(top_k_index == number, top_k_weights.astype(jnp.float32), 0), axis=1)
        return out * weight[:, None]

    def is_idle(number: jax.Array) -> jax.Array:
        return ~jnp.any(top_k_index == number)

    def add_by_number(number: jax.Array, total: jax.Array) -> jax.Array:
        """Reads the expert's weights only where a token chose it: ten times as fast for one token of 128 experts."""

        def add() -> jax.Array:
            at = (jax.lax.dynamic_index_in_dim(weights, number, keepdims=False) for weights in (gate_up, down))
            return total + share_of(number, *at)

        return jax.lax.cond(is_idle(number), lambda: total, add)

    def add_scanned(total: jax.Array, expert: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        """Reads all weights in turn, as most are needed, and so has a gradient in turn."""
        return jax.lax.cond(is_idle(expert[0]), lambda: total, lambda: total + share_of(*expert)), None

    total = sharded.zeros(hidden.shape, jnp.float32, hidden, gate_up, down, top_k_index, top_k_weights)
    if top_k_index.size <= experts:
        total = jax.lax.fori_loop(0, experts, add_by_number, total)
    else:
        numbers = jnp.arange(experts, dtype=top_k_index.dtype)
        total, _ = jax.lax.scan(add_scanned, total, (numbers, gate_up, down))
    return total.astype(hidden.dtype)


def swiglu(gate_up_out: jax.Array) -> jax.Array:
    """silu(gate) * up of [..., 2F], the gate in the first F columns -> [..., F]."""
    gate, up = jnp.split(gate_up_out, 2, axis=-1)
    return jax.nn.silu(gate) * up
