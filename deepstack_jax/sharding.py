"""Meshes: one table from logical axes to the mesh axes `data` and `tensor`, and how a program applies it.

The rows of a program and the KV pages that belong to them are split over `data`, heads and the vocabulary over
`tensor`, experts over both. Programs are traced under their mesh (`on_mesh_of`), and modules ask here
how a dimension is split. Without a mesh, every function here returns what it was given.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "tensor")
MeshAxes = tuple[str, ...]


@dataclass(frozen=True)
class ShardingRules:
    """The mesh axes over which each logical axis of a parameter or of a program's arrays is split; () for none.

    Experts are never cut along their width, since the kernels need a multiple of 128 columns. Vision weights are on
    every device, because images are spread over the devices.
    """

    slots: MeshAxes = ("data",)  # rows of a program, and the KV pages that they use
    heads: MeshAxes = ("tensor",)
    kv_heads: MeshAxes = ("tensor",)
    mlp: MeshAxes = ("tensor",)
    vocab: MeshAxes = ("tensor",)
    expert: MeshAxes = ("data", "tensor")
    image: MeshAxes = ("data", "tensor")
    embed: MeshAxes = ()
    expert_mlp: MeshAxes = ()
    head_dim: MeshAxes = ()
    norm: MeshAxes = ()
    router: MeshAxes = ()
    vision_embed: MeshAxes = ()
    vision_heads: MeshAxes = ()
    vision_mlp: MeshAxes = ()
    patch: MeshAxes = ()

    def of(self, logical: str) -> MeshAxes:
        """Returns the mesh axes of a logical axis.

        Raises:
            ValueError: there is no rule for it.
        """
        if logical not in self.__dataclass_fields__:
            raise ValueError(f"logical axis {logical!r} has no rule in sharding.ShardingRules")
        return getattr(self, logical)


RULES = ShardingRules()


def make_mesh(shape: int | str | None = None) -> Mesh:
    """Returns a mesh over the first devices, with the axes "data" and "tensor" or one of them.

    Args:
        shape: sizes of the axes, such as "data=2,tensor=4". A number is the size of "tensor", the only axis then; None
            takes all devices.

    Raises:
        ValueError: an axis has another name, or the sizes don't fit the number of devices.
    """
    devices = jax.devices()
    sizes = _parse(len(devices) if shape is None else shape)
    count = math.prod(sizes.values())
    if not 1 <= count <= len(devices):
        raise ValueError(f"mesh of {count} devices: there are {len(devices)}, ask for 1 to {len(devices)}")
    kinds = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds, devices=devices[:count])


def abstract_mesh(shape: str) -> AbstractMesh:
    """Returns the mesh of that shape without devices: for sizes alone.

    Raises:
        ValueError: an axis has another name, or a size is below one.
    """
    named = _parse(shape)
    if min(named.values()) < 1:
        raise ValueError(f"mesh {shape!r} has no devices: give sizes of 1 and more")
    return AbstractMesh(tuple(named.get(name, 1) for name in AXES), AXES, axis_types=(AxisType.Auto,) * 2)


def _parse(shape: int | str) -> dict[str, int]:
    """Returns the sizes of the named axes, `data` before `tensor`."""
    form = f"mesh {shape!r} is not supported: give a number of devices, or sizes of its axes as data=2,tensor=4"
    if isinstance(shape, bool) or not (isinstance(shape, str) or hasattr(shape, "__index__")):
        raise ValueError(form)
    if not isinstance(shape, str) or shape.strip().isdecimal():
        return {"tensor": int(shape)}
    named: dict[str, int] = {}
    for part in shape.split(","):
        name, _, size = (piece.strip() for piece in part.partition("="))
        if name in named or not size.isdecimal():
            raise ValueError(form)
        _check_axis(name)
        named[name] = int(size)
    return {name: named[name] for name in AXES if name in named}


def _check_axis(name: str) -> None:
    if name not in AXES:
        raise ValueError(
            f"mesh axis {name!r} doesn't exist: the axes are data and tensor, and experts are split over both"
        )


def canonical(mesh: Mesh | AbstractMesh) -> Mesh | AbstractMesh:
    """Returns the mesh with both axes, in the order of `AXES` and of type Auto, over the same devices.

    A mesh from `abstract_mesh` is returned as it is.

    Raises:
        ValueError: it has another axis.
    """
    for name in mesh.axis_names:
        _check_axis(name)
    if isinstance(mesh, AbstractMesh):
        return mesh
    order = [mesh.axis_names.index(name) for name in AXES if name in mesh.axis_names]
    devices = np.transpose(mesh.devices, order).reshape([mesh.shape.get(name, 1) for name in AXES])
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 2)


def sizes(mesh: Mesh | None) -> tuple[int, int]:
    """Returns the sizes of `data` and `tensor`, (1, 1) without a mesh."""
    return (1, 1) if mesh is None else (mesh.shape["data"], mesh.shape["tensor"])


def describe(mesh: Mesh | AbstractMesh) -> str:
    """Returns the axes as `make_mesh` takes them, for example "data=2,tensor=4"."""
    return ",".join(f"{name}={mesh.shape[name]}" for name in AXES)


def mesh_of(tree: Any) -> Mesh | None:
    """Returns the mesh on which the first array of a pytree is, or None if it is on a single device."""
    if isinstance(tree, dict):  # parameters, on every call of a program: one of the hundreds tells
        tree = next(iter(tree.values()), None)
    first = next((leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)), None)
    placed = getattr(first, "sharding", None)
    return placed.mesh if isinstance(placed, NamedSharding) and isinstance(placed.mesh, Mesh) else None


def replicated(mesh: Mesh | None) -> NamedSharding | None:
    """Returns the sharding of an array that every device holds; None without a mesh."""
    return None if mesh is None else NamedSharding(mesh, PartitionSpec())


class on_mesh_of:
    """Decorates a jitted program: it runs under the mesh of its argument with this number.

    Everything else of the jitted function (`lower`, `trace`, ...) can be used as before.
    """

    def __init__(self, argument: int):
        self._argument = argument

    def __call__[F: Callable[..., Any]](self, program: F) -> F:
        return cast(F, _Program(program, self._argument))


class _Program:
    def __init__(self, program: Callable[..., Any], argument: int):
        functools.update_wrapper(self, program)
        self._program, self._argument = program, argument

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        mesh = mesh_of(args[self._argument])
        if mesh is None:
            return self._program(*args, **kwargs)
        with jax.set_mesh(mesh):
            return self._program(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._program, name)


def current() -> AbstractMesh | None:
    """Returns the mesh of the program that is being traced; None if it has none of these axes."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if set(AXES) <= set(mesh.axis_names) and mesh.size > 1 else None


def ways(axes: MeshAxes, mesh: Mesh | AbstractMesh) -> int:
    """Returns the number of parts into which these mesh axes divide a dimension."""
    return math.prod(mesh.shape[axis] for axis in axes)


def split(count: int, logical: str, mesh: Mesh | AbstractMesh | None = None) -> MeshAxes:
    """Returns the mesh axes over which `count` equal parts of a logical axis are distributed.

    These are the axes of the rule, or one of them if only that divides `count`, or none.
    """
    mesh = mesh or current()
    if mesh is None:
        return ()
    axes = tuple(axis for axis in RULES.of(logical) if mesh.shape[axis] > 1)
    choices = [axes, *((axis,) for axis in reversed(axes))]
    return next((chosen for chosen in choices if count % ways(chosen, mesh) == 0), ())


def kv_repeats(heads: int, kv_heads: int, mesh: Mesh | AbstractMesh | None = None) -> int:
    """Returns how many copies of each KV head the cache holds: more than one if `tensor` has more devices than heads.

    Each device then has the one KV head that its query heads read.
    """
    mesh = mesh or current()
    tensor = 1 if mesh is None else mesh.shape["tensor"]
    return tensor // kv_heads if tensor % kv_heads == 0 and heads % tensor == 0 and tensor > kv_heads else 1


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
    """Returns `x` with its first dimensions split by the rules, as far as they divide, and the others whole."""
    mesh = current()
    return x if mesh is None else jax.lax.with_sharding_constraint(x, sharding_of(x.shape, logical, mesh))


def sharding_of(shape: tuple[int, ...], logical: Sequence[str | None], mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Returns the sharding in which the first dimensions are split by the rules, as far as they divide."""
    parts = (split(size, name, mesh) if name else () for size, name in zip(shape, logical, strict=False))
    return NamedSharding(mesh, PartitionSpec(*(axes or None for axes in parts)))


def each_device[F: Callable[..., Any]](function: F, in_specs: Any, out_specs: Any) -> F:
    """Returns `function`, run by each device of the current mesh on its own parts of the arguments."""
    return function if current() is None else jax.shard_map(function, in_specs=in_specs, out_specs=out_specs)


def bytes_held(shape: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> int:
    """Returns the bytes of an array on each device."""
    return math.prod(sharding.shard_shape(shape.shape)) * np.dtype(shape.dtype).itemsize


def bytes_held_here(shape: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> int:
    """Returns the bytes of an array that this process's devices hold, where each part counts once."""
    parts = {str(index) for index in sharding.addressable_devices_indices_map(shape.shape).values()}
    return len(parts) * bytes_held(shape, sharding)
