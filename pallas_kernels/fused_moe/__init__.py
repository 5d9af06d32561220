"""Computes the experts of a mixture-of-experts layer: SwiGLU through the chosen experts, summed by routing weight."""

import jax

from pallas_kernels import hopper
from pallas_kernels.dispatch import get_backend, log_choice, target_chip, unsupported_on_mesh
from pallas_kernels.fused_moe import cpu, grouped, mosaic_gpu, mosaic_tpu, xla

BACKENDS = {
    "xla": xla.fused_moe,
    "cpu": cpu.fused_moe,
    "xla_grouped": grouped.fused_moe,
    "mosaic_tpu": mosaic_tpu.fused_moe,
    "mosaic_gpu": mosaic_gpu.fused_moe,
}


@jax.named_scope("fused_moe")
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

    It is differentiable in everything except top_k_index.

    Args:
        hidden: [T, D], any float dtype; read in the weights' dtype.
        gate_up: [E, D, 2F], the gate in the first F columns.
        down: [E, F, D].
        top_k_index: int32 [T, k], e = top_k_index[t, j] in 0..E-1. A choice of -1 (or any other number) goes nowhere:
            it adds exactly 0 and reads no weights. A token with only such choices gets zeros.
        top_k_weights: [T, k], any float dtype; applied in float32.
        backend: a name from `BACKENDS`, or None for the automatic choice by chip and shapes (docs/kernels.md).

    Returns:
        [T, D] in hidden's dtype, accumulated in float32. Every token reaches its k experts: there is no capacity. For
        a given T, a token's bits depend only on its own row, experts and weights, not on its place or other tokens.

    Raises:
        ValueError: the shapes don't fit together, or the backend is unknown.
        NotImplementedError: the named backend doesn't support the arguments; the message says why.
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
    if backend is not None:
        return get_backend("fused_moe", BACKENDS, backend)(*args)
    # platform_dependent selects by the platform that is really compiled for; a kernel is only traced for this chip
    branches = {"cpu": cpu.fused_moe, "default": xla.fused_moe}
    chip = target_chip(*args)
    name, why = _automatic(*args)
    if chip.platform in ("tpu", "cuda"):
        branches[chip.platform] = BACKENDS[name]
    log_choice("fused_moe", f"hidden {hidden.shape}, gate_up {gate_up.shape} {gate_up.dtype}", chip, name, why)
    return jax.lax.platform_dependent(*args, **branches)


def _automatic(*args: jax.Array) -> tuple[str, str]:
    """Returns (backend, reason) for the chip that is compiled for."""
    chip = target_chip(*args)
    platform = chip.platform
    if platform == "cpu":
        return "cpu", "the form for XLA on CPU"
    if reason := unsupported_on_mesh(*args):
        return "xla", reason
    if platform == "tpu":
        reason = mosaic_tpu.unsupported(*args)
        return ("xla", reason) if reason else ("mosaic_tpu", "the form for TPUs")
    if platform == "cuda":
        reason = mosaic_gpu.unsupported(*args) if hopper.is_hopper(chip) else f"{chip.kind} isn't a Hopper chip"
        return ("xla_grouped", f"mosaic_gpu: {reason}") if reason else ("mosaic_gpu", "the form for Hopper")
    return "xla", f"no form for {platform}"
