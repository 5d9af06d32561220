"""The plain form of fused_moe, the reference of the others; differentiable."""

import jax
import jax.numpy as jnp


def fused_moe(
    hidden: jax.Array, gate_up: jax.Array, down: jax.Array, top_k_index: jax.Array, top_k_weights: jax.Array
) -> jax.Array:
    """Expert after expert over all tokens, weighted by 0 where the expert wasn't chosen; an idle expert is skipped.

    Memory is that of one expert's weights and activations, whatever E is.
    """
    x = hidden.astype(gate_up.dtype)
    width = down.shape[1]

    def add_expert(total: jax.Array, expert: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        number, expert_gate_up, expert_down = expert
        chosen = top_k_index == number

        def run(total: jax.Array) -> jax.Array:
            gate_up_out = jnp.dot(x, expert_gate_up, preferred_element_type=jnp.float32)
            inner = jax.nn.silu(gate_up_out[:, :width]) * gate_up_out[:, width:]
            out = jnp.dot(inner.astype(down.dtype), expert_down, preferred_element_type=jnp.float32)
            weight = jnp.sum(jnp.where(chosen, top_k_weights.astype(jnp.float32), 0), axis=1)
            return total + out * weight[:, None]

        return jax.lax.cond(jnp.any(chosen), run, lambda total: total, total), None

    start = jnp.zeros(hidden.shape, jnp.float32)
    numbers = jnp.arange(gate_up.shape[0], dtype=top_k_index.dtype)
    return jax.lax.scan(add_expert, start, (numbers, gate_up, down))[0].astype(hidden.dtype)
