"""Parameters and the one kind of linear layer that every model here is made of.

A parameter is declared once: shape, dtype, logical axes and initialiser together. Initialisation, conversion, restoring
and sharding all derive from that declaration (`abstract_params` in models/qwen3_vl_moe.py lists them).

Numerics, the same in every module: activations between products are float32; a product reads both operands in the
parameters' dtype and accumulates in float32.
"""

from collections.abc import Callable
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

# A field of a state that passes through programs: an array, or its shape and dtype where one is only compiled.
Leaf = Any
Axes = tuple[str | None, ...]
Initializer = Callable[[jax.Array, tuple[int, ...], DTypeLike], jax.Array]


def param(rngs: nnx.Rngs, shape: tuple[int, ...], axes: Axes, dtype: DTypeLike, init: Initializer) -> nnx.Param:
    """A parameter of `shape` whose dimensions carry the logical names `axes` (see sharding.py for what they map to)."""
    if len(shape) != len(axes):
        raise ValueError(f"{len(shape)} dimensions {shape} but {len(axes)} logical axes {axes}")
    return nnx.Param(init(rngs.params(), shape, dtype), logical_axes=axes)


def scaled_normal(fan_in: int) -> Initializer:
    """Normal with standard deviation 1/sqrt(fan_in), so that a product keeps its input's variance."""
    return nnx.initializers.normal(stddev=fan_in**-0.5)


class Linear(nnx.Module):
    """`y = x @ weight.T + bias` over the trailing `in_shape` of x.

    weight is [*out_shape, *in_shape]: PyTorch's order, with heads apart.
    """

    def __init__(
        self,
        out_shape: tuple[int, ...],
        in_shape: tuple[int, ...],
        axes: Axes,
        *,
        bias: bool,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.num_in_axes = len(in_shape)
        self.weight = param(rngs, (*out_shape, *in_shape), axes, dtype, scaled_normal(prod(in_shape)))
        self.bias = param(rngs, out_shape, axes[: len(out_shape)], dtype, nnx.initializers.zeros) if bias else None

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """x [..., *in_shape] of any float dtype -> float32 [..., *out_shape]."""
        weight = self.weight[...]
        y = jax.lax.platform_dependent(x.astype(weight.dtype), weight, cpu=self._on_cpu, default=self._contract)
        return y if self.bias is None else y + self.bias[...].astype(jnp.float32)

    def _contract(self, x: jax.Array, weight: jax.Array) -> jax.Array:
        contract = tuple(range(-self.num_in_axes, 0))
        dims = tuple(x.ndim + i for i in contract), tuple(weight.ndim + i for i in contract)
        return jax.lax.dot_general(x, weight, (dims, ((), ())), preferred_element_type=jnp.float32)

    def _on_cpu(self, x: jax.Array, weight: jax.Array) -> jax.Array:
        """With the weights as one matrix: XLA on CPU would transpose a copy of those that have more axes."""
        lead, out_shape = x.shape[: x.ndim - self.num_in_axes], weight.shape[: -self.num_in_axes]
        size = prod(x.shape[x.ndim - self.num_in_axes :])
        return product(x.reshape(prod(lead), size), weight.reshape(prod(out_shape), size)).reshape(*lead, *out_shape)



def product(x: Float[Array, "rows i"], weight: Float[Array, "o i"]) -> Float[Array, "rows o"]:
    """float32 `x @ weight.T`, x read in the weight's dtype."""
    rows = len(x)
    x = x.astype(weight.dtype)
    if rows == 1 and weight.dtype == jnp.bfloat16:
        x = jnp.concatenate([x, x])  # XLA on CPU reads the weights for one bfloat16 row far slower than for two
    return jnp.einsum("ri,oi->ro", x, weight, preferred_element_type=jnp.float32)[:rows]
