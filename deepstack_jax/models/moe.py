"""The feed-forward half of a decoder layer: dense SwiGLU, or a router with experts.

Reference: transformers' qwen3_moe.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from deepstack_jax import sharding
from deepstack_jax.config import TextConfig
from deepstack_jax.models import expert_exchange
from deepstack_jax.models.param import Linear, param, scaled_normal
from pallas_kernels.fused_moe import fused_moe


class DenseMLP(nnx.Module):
    """SwiGLU of the config's intermediate_size: [B, T, D] to float32 [B, T, D]."""

    def __init__(self, config: TextConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(inner, hidden, ("mlp", "embed"), bias=False, dtype=dtype, rngs=rngs)
        self.up_proj = Linear(inner, hidden, ("mlp", "embed"), bias=False, dtype=dtype, rngs=rngs)
        self.down_proj = Linear(hidden, inner, ("embed", "mlp"), bias=False, dtype=dtype, rngs=rngs)

    def __call__(
        self, hidden: Float[Array, "B T D"], active: Bool[Array, "B T"] | None = None
    ) -> Float[Array, "B T D"]:
        del active  # every token costs the same here
        return self.down_proj(jax.nn.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


class Experts(nnx.Module):
    """The stacked weights of all experts: gate_up_proj [E, D, 2F] and down_proj [E, F, D].

    `compute` is `pallas_kernels.fused_moe`; training may replace it by a function whose gradient costs less.
    """

    def __init__(self, config: TextConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        experts, hidden, inner = config.num_experts, config.hidden_size, config.moe_intermediate_size
        axes = ("expert", "embed", "expert_mlp")
        self.gate_up_proj = param(rngs, (experts, hidden, 2 * inner), axes, dtype, scaled_normal(hidden))
        axes = ("expert", "expert_mlp", "embed")
        self.down_proj = param(rngs, (experts, inner, hidden), axes, dtype, scaled_normal(inner))
        self.compute: Callable[..., jax.Array] = fused_moe

    def __call__(
        self,
        hidden: Float[Array, "T D"],
        top_k_index: Int[Array, "T k"],
        top_k_weights: Float[Array, "T k"],
    ) -> Float[Array, "T D"]:
        """Returns the weighted sum of each token's k experts in hidden's dtype; a choice of -1 adds nothing.

        On a mesh, every device takes all tokens and runs its own experts, and one all-reduce adds the results. On
        many devices, many tokens are instead sent to the devices of their experts (expert_exchange.py).
        """
        weights = self.gate_up_proj[...], self.down_proj[...]
        axes = self._axes()
        if not axes:
            return self.compute(hidden, *weights, top_k_index, top_k_weights)

        def own_experts(hidden: jax.Array, gate_up: jax.Array, down: jax.Array, *routing: jax.Array) -> jax.Array:
            top_k_index, top_k_weights = routing
            own = top_k_index - jax.lax.axis_index(axes) * len(gate_up)  # other devices' are out of range: nowhere
            return jax.lax.psum(self.compute(hidden, gate_up, down, own, top_k_weights), axes)

        whole, of_expert = PartitionSpec(), PartitionSpec(axes)
        run = sharding.each_device(own_experts, (whole, of_expert, of_expert, whole, whole), whole)
        if self.exchanged_over(len(hidden)):
            exchanged = partial(expert_exchange.run_exchanged, self.compute, axes)
            exchanged = sharding.each_device(exchanged, (of_expert,) * 5, of_expert)
            run = expert_exchange.with_gradient_of(run, exchanged)
        return run(hidden, *weights, top_k_index, top_k_weights)

    def exchanged_over(self, tokens: int) -> sharding.MeshAxes:
        """Returns the mesh axes over which so many tokens are split and exchanged; () if each device takes all."""
        axes, mesh = self._axes(), sharding.current()
        return axes if mesh is not None and expert_exchange.pays(tokens, sharding.ways(axes, mesh)) else ()

    def _axes(self) -> sharding.MeshAxes:
        return sharding.split(len(self.gate_up_proj[...]), "expert")


class SparseMoE(nnx.Module):
    """Routes each token to its k most likely experts and sums their outputs, weighted by probability.

    `nnx.capture` collects its `router_logits` [T, E] and `top_k_index` [T, k].
    """

    def __init__(self, config: TextConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.top_k = config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob
        shape = config.num_experts, config.hidden_size
        self.gate = Linear(*shape, ("router", "embed"), bias=False, dtype=dtype, rngs=rngs)
        self.experts = Experts(config, dtype=dtype, rngs=rngs)

    def route(self, hidden: Float[Array, "T D"]) -> tuple[Float[Array, "T k"], Int[Array, "T k"], Float[Array, "T E"]]:
        """Returns (weights, experts, logits) of each token; weights and logits are float32."""
        # Rounding here could change the choice of experts, which later precision can't repair. A bfloat16 router thus
        # reads hidden states in two bfloat16 parts; float32 copies of its weights would exist for all layers at once.
        coarse = jax.lax.reduce_precision(hidden, exponent_bits=8, mantissa_bits=7)
        is_float32 = self.gate.weight[...].dtype == jnp.float32
        logits = self.gate(hidden) if is_float32 else self.gate(coarse) + self.gate(hidden - coarse)
        weights, chosen = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), self.top_k)
        if self.norm_topk_prob:
            # XLA for NVIDIA launches a sum over an axis by itself, and merges additions with what reads the weights
            total = jax.lax.platform_dependent(weights, cuda=_sum_by_additions, default=_sum_over_choices)
            weights = weights / total[:, None]
        return weights, chosen, logits

    def __call__(
        self, hidden: Float[Array, "B T D"], active: Bool[Array, "B T"] | None = None
    ) -> Float[Array, "B T D"]:
        """Returns [B, T, D] in hidden's dtype; tokens that are not `active` go to no expert and get 0."""
        tokens = hidden.reshape(-1, hidden.shape[-1])
        if axes := self.experts.exchanged_over(len(tokens)):
            of_token = PartitionSpec(axes)
            weights, chosen, logits = sharding.each_device(self.route, of_token, of_token)(tokens)
        else:
            tokens = sharding.constrain(tokens)  # on a mesh, all of them on every device
            weights, chosen, logits = self.route(tokens)
        self.sow(nnx.Intermediate, "router_logits", logits, capture_noop=True)
        self.sow(nnx.Intermediate, "top_k_index", chosen, capture_noop=True)
        if active is not None:
            chosen = jnp.where(active.reshape(-1, 1), chosen, -1)
        return sharding.constrain(self.experts(tokens, chosen, weights).reshape(hidden.shape), "slots")


def _sum_over_choices(weights: jax.Array) -> jax.Array:
    return jnp.sum(weights, axis=-1)


def _sum_by_additions(weights: jax.Array) -> jax.Array:
    total = weights[:, 0]
    for choice in range(1, weights.shape[1]):
        total += weights[:, choice]
    return total
