"""Helpers for kernels inside shard_map: a result varies over every mesh axis over which an argument varies."""

from typing import Any

import jax
import jax.numpy as jnp


def result(shape: tuple[int, ...], dtype: Any, *args: jax.Array) -> jax.ShapeDtypeStruct:
    """Returns the shape, dtype and varying axes of a kernel's result, given its arguments."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.sharding.ManualAxisType(varying=_axes(args)))


def zeros(shape: tuple[int, ...], dtype: Any, *args: jax.Array) -> jax.Array:
    """Returns zeros to which a loop adds `args`: the state of a loop must vary from its start."""
    made, axes = jnp.zeros(shape, dtype), _axes(args)
    return jax.lax.pcast(made, tuple(axes), to="varying") if axes else made


def _axes(args: tuple[jax.Array, ...]) -> frozenset[Any]:
    return frozenset[Any]().union(*(jax.typeof(x).manual_axis_type.varying for x in args))
