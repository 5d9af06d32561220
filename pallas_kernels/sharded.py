"""Helpers for kernels inside shard_map: a result varies over every mesh axis over which an argument varies."""

from typing import Any

import jax
import jax.numpy as jnp


def result(shape: tuple[int, ...], dtype: Any, *args: jax.Array) -> jax.ShapeDtypeStruct:
    """Returns the shape, dtype and varying axes of a kernel's result, given its arguments."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.sharding.ManualAxisType(varying=_axes(args)))


def varying(x: jax.Array, *args: jax.Array) -> jax.Array:
    """Returns `x`, typed as what a function of `args` returns: plgpu.kernel drops the axes of its `result`."""
    axes = _axes(args) - jax.typeof(x).manual_axis_type.varying
    return jax.lax.pcast(x, tuple(axes), to="varying") if axes else x


def varies(*args: jax.Array) -> bool:
    """Returns whether an argument differs between devices of a mesh."""
    return bool(_axes(args))


def zeros(shape: tuple[int, ...], dtype: Any, *args: jax.Array) -> jax.Array:
    """Returns zeros to which a loop adds `args`: the state of a loop must vary from its start."""
    return varying(jnp.zeros(shape, dtype), *args)


def _axes(args: tuple[jax.Array, ...]) -> frozenset[Any]:
    return frozenset[Any]().union(*(jax.typeof(x).manual_axis_type.varying for x in args))
