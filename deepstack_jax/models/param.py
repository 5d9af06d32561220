"""Parameters and the one kind of linear layer that every model here is made of.

A parameter is declared once: shape, dtype, logical axes and initialiser together. Initialisation, conversion, restoring
and sharding all derive from that declaration (`abstract_params` in models/qwen3_vl_moe.py lists them).

Numerics, the same in every module: activations between products are float32; a product reads both operands in the
parameters' dtype and accumulates in float32.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

# what a program is given: an array on a device, or one of the host that it moves there
AnyArray = jax.Array | np.ndarray
Axes = tuple[str | None, ...]
Initializer = Callable[[jax.Array, tuple[int, ...], DTypeLike], jax.Array]


def param(rngs: nnx.Rngs, shape: tuple[int, ...], axes: Axes, dtype: DTypeLike, init: Initializer) -> nnx.Param:
    """A parameter of `shape` whose dimensions carry the logical names `axes` (see sharding.py for what they map to)."""
    if len(shape) != len(axes):
        raise ValueError(f"{len(shape)} dimensions {shape} but {len(axes)} logical axes {axes}")
    # lazily: the parameters are placed where they are read or initialised, not where a module is described
    return nnx.Param(init(rngs.params(), shape, dtype), out_sharding=axes, eager_sharding=False)


def scaled_normal(fan_in: int) -> Initializer:
    """Normal with standard deviation 1/sqrt(fan_in), so that a product keeps its input's variance."""
    return nnx.initializers.normal(stddev=fan_in**-0.5)


class Linear(nnx.Module):
    """`y = x @ weight.T + bias`; weight is [*out_shape, in]: PyTorch's order.

    Heads and their width are one dimension: chips lay the last two dimensions of an array out in tiles, so a weight
    with a dimension of heads there would be padded, and copied to be multiplied.
    """

    def __init__(
        self,
        out_shape: int | tuple[int, ...],
        in_size: int,
        axes: Axes,
        *,
        bias: bool,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        out_shape = (out_shape,) if isinstance(out_shape, int) else out_shape
        self.weight = param(rngs, (*out_shape, in_size), axes, dtype, scaled_normal(in_size))
        self.bias = param(rngs, out_shape, axes[:-1], dtype, nnx.initializers.zeros) if bias else None

    def __call__(self, x: Float[Array, "*lead i"]) -> Float[Array, "..."]:
        """x [..., in] of any float dtype -> float32 [..., *out_shape]."""
        y = product(x, self.weight[...])
        return y if self.bias is None else y + self.bias[...].astype(jnp.float32)


def product(x: Float[Array, "*lead i"], weight: Float[Array, "*out i"]) -> Float[Array, "..."]:
    """float32 [*lead, *out], x read in the weight's dtype."""
    rows = x.reshape(-1, x.shape[-1]).astype(weight.dtype)
    count = len(rows)
    if count == 1 and weight.dtype == jnp.bfloat16:
        rows = jnp.concatenate(
            [rows, rows]
        )  # XLA on CPU reads the weights for one bfloat16 row far slower than for two
    matrix = weight.reshape(-1, weight.shape[-1])
    y = jnp.einsum("ri,oi->ro", rows, matrix, preferred_element_type=jnp.float32)
    return y[:count].reshape(*x.shape[:-1], *weight.shape[:-1])
