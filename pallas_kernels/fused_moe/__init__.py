"""The experts of a mixture-of-experts layer: SwiGLU through the chosen experts, summed by routing weight."""

import jax

from pallas_kernels.dispatch import named
from pallas_kernels.fused_moe import cpu, xla

BACKENDS = {"xla": xla.fused_moe, "cpu": cpu.fused_moe}


def fused_moe(
    hidden: jax.Array,
    gate_up: jax.Array,
    down: jax.Array,
    top_k_index: jax.Array,
    top_k_weights: jax.Array,
    *,
    backend: str | None = None,
) -> jax.Array:
    """`out[t] = sum_j top_k_weights[t, j] * (silu(g) * u) @ down[e]` with `g, u = split(hidden[t] @ gate_up[e])`.

    Args:
        hidden: [T, D], any float dtype; read in the weights' dtype.
        gate_up: [E, D, 2F], the gate in the first F columns.
        down: [E, F, D].
        top_k_index: int32 [T, k], e = top_k_index[t, j] in 0..E-1.
        top_k_weights: [T, k], any float dtype; applied in float32.
        backend: a name from `BACKENDS`, or None: `cpu` where the program is compiled for the CPU, else `xla`.

    Returns:
        [T, D] in hidden's dtype, accumulated in float32. Every token reaches its k experts: there is no capacity.

    Raises:
        ValueError: shapes that don't fit together, or an unknown backend.
    """
    tokens, width = hidden.shape
    experts, _, double = gate_up.shape
    if gate_up.shape != (experts, width, double) or down.shape != (experts, double // 2, width) or double % 2:
        raise ValueError(
            f"fused_moe: hidden {hidden.shape}, gate_up {gate_up.shape} and down {down.shape} must be "
            "[T, D], [E, D, 2F] and [E, F, D]"
        )
    if top_k_index.shape != top_k_weights.shape or top_k_index.shape[0] != tokens or top_k_index.ndim != 2:
        raise ValueError(
            f"fused_moe: top_k_index {top_k_index.shape} and top_k_weights {top_k_weights.shape} "
            f"must both be [{tokens}, k]"
        )
    args = hidden, gate_up, down, top_k_index, top_k_weights
    if backend is None:
        return jax.lax.platform_dependent(*args, cpu=cpu.fused_moe, default=xla.fused_moe)
    return named("fused_moe", BACKENDS, backend)(*args)
