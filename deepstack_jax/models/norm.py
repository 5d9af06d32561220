"""Normalisation, computed in float32 for any dtype of parameters."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from deepstack_jax.models.param import param
from pallas_kernels.norm_rope_append.xla import rms_norm


class RMSNorm(nnx.Module):
    """`x / rms(x) * weight` over the last axis, float32. Source: arXiv:1910.07467."""

    def __init__(self, size: int, eps: float, *, axis: str = "norm", dtype: DTypeLike, rngs: nnx.Rngs):
        self.eps = eps
        self.weight = param(rngs, (size,), (axis,), dtype, nnx.initializers.ones)

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return rms_norm(x, self.weight[...], self.eps)


class LayerNorm(nnx.Module):
    """`(x - mean(x)) / std(x) * weight + bias` over the last axis, float32, with the vision encoder's eps of 1e-6."""

    def __init__(self, size: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.weight = param(rngs, (size,), ("norm",), dtype, nnx.initializers.ones)
        self.bias = param(rngs, (size,), ("norm",), dtype, nnx.initializers.zeros)

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        x = x.astype(jnp.float32)
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)
        return x * self.weight[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)
