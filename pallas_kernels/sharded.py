"""Kernels inside shard_map: what they make varies over every mesh axis that one of their arguments varies over."""

from typing import Any

import jax
import jax.numpy as jnp


def result(shape: tuple[int, ...], dtype: Any, *args: jax.Array) -> jax.ShapeDtypeStruct:
    """What a kernel of `args` returns."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.sharding.ManualAxisType(varying=_axes(args)))


def zeros(shape: tuple[int, ...], dtype: Any, *args: jax.Array) -> jax.Array:
    """Zeros for a loop to add `args` to: a loop's state must vary from its start."""
    made, axes = jnp.zeros(shape, dtype), _axes(args)
    return jax.lax.pcast(made, tuple(axes), to="varying") if axes else made


def _axes(args: tuple[jax.Array, ...]) -> frozenset[Any]:
    return frozenset[Any]().union(*(jax.typeof(x).manual_axis_type.varying for x in args))
