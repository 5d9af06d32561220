"""Parameters, and the linear layer that all models use.

A parameter is declared once, with its shape, dtype, logical axes and initialiser. Initialisation, conversion, restoring
and sharding all derive from that declaration (`abstract_params` in models/parameters.py lists them).

The numerics are the same in every module: activations between products are float32; a product reads both operands in
the parameters' dtype and accumulates in float32.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

# an argument of a program: an array on a device, or a host array that the program moves there
AnyArray = jax.Array | np.ndarray
Axes = tuple[str | None, ...]
Initializer = Callable[[jax.Array, tuple[int, ...], DTypeLike], jax.Array]


def param(rngs: nnx.Rngs, shape: tuple[int, ...], axes: Axes, dtype: DTypeLike, init: Initializer) -> nnx.Param:
    """Declares a parameter of `shape` with one logical axis name per dimension (sharding.py maps them to a mesh).

    Raises `ValueError` if `axes` has another length than `shape`.
    """
    if len(shape) != len(axes):
        raise ValueError(f"{len(shape)} dimensions {shape} but {len(axes)} logical axes {axes}")
    # not eager: parameters are placed where they are read or initialised, not where a module is declared
    return nnx.Param(init(rngs.params(), shape, dtype), out_sharding=axes, eager_sharding=False)


def scaled_normal(fan_in: int) -> Initializer:
    """Returns a normal initialiser with deviation 1/sqrt(fan_in), so that a product keeps its input's variance."""
    return nnx.initializers.normal(stddev=fan_in**-0.5)


class Linear(nnx.Module):
    """`y = x @ weight.T + bias`, with weight [*out_shape, in] in PyTorch's order.

    Heads and their width form one dimension: chips store the last two dimensions of an array in tiles, so a weight with
    a separate dimension of heads would be padded, and copied before it is multiplied.
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
        """Maps x [..., in] of any float dtype to float32 [..., *out_shape]."""
        y = product(x, self.weight[...])
        return y if self.bias is None else y + self.bias[...].astype(jnp.float32)


def product(x: Float[Array, "*lead i"], weight: Float[Array, "*out i"]) -> Float[Array, "..."]:
    """Returns x @ weight.T over the last axes, float32 [*lead, *out]; x is read in the weight's dtype."""
    rows = x.reshape(-1, x.shape[-1]).astype(weight.dtype)
    count = len(rows)
    if count == 1 and weight.dtype == jnp.bfloat16:
        rows = jnp.concatenate(
            [rows, rows]
        )  # XLA on CPU reads the weights far more slowly for one bfloat16 row than for two
    matrix = weight.reshape(-1, weight.shape[-1])
    y = jnp.einsum("ri,oi->ro", rows, matrix, preferred_element_type=jnp.float32)
    return y[:count].reshape(*x.shape[:-1], *weight.shape[:-1])
