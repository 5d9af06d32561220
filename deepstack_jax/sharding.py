"""Places parameters on a mesh, by one table from logical axes to mesh axes.

The mesh has an axis "tensor", over which heads, feed-forward widths and the vocabulary are split. All other dimensions
are replicated, and so is a dimension that the axis doesn't divide (into whole heads). XLA adds the collectives.
"""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deepstack_jax.config import ModelConfig
from deepstack_jax.models.parameters import abstract_params, logical_axes

RULES: dict[str, str | None] = {
    "embed": None,
    "vision_embed": None,
    "norm": None,
    "head_dim": None,
    "patch": None,
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "expert": None,
}


def make_mesh(num_devices: int | str | None = None) -> Mesh:
    """Returns a mesh over the first `num_devices` devices (all by default) with one axis "tensor".

    "tensor=8" means the same as 8.

    Raises:
        ValueError: another axis is named, or the number is not from 1 to the number of devices.
    """
    devices = jax.devices()
    count = len(devices) if num_devices is None else _count(num_devices)
    if not 1 <= count <= len(devices):
        raise ValueError(f"mesh of {count} devices: there are {len(devices)}, ask for 1 to {len(devices)}")
    return Mesh(np.asarray(devices[:count]), ("tensor",))


def _count(num_devices: int | str) -> int:
    if isinstance(num_devices, str):
        text = num_devices.strip().removeprefix("tensor=")
        if not text.isdecimal():
            raise ValueError(
                f"mesh {num_devices!r} is not supported: the only axis is tensor, give a number of devices or tensor=8"
            )
        return int(text)
    if isinstance(num_devices, bool) or not hasattr(num_devices, "__index__"):
        raise ValueError(f"mesh {num_devices!r} is not supported: give a number of devices or tensor=8")
    return num_devices.__index__()


def param_shardings(config: ModelConfig, mesh: Mesh) -> dict[str, NamedSharding]:
    """Returns the sharding of every parameter by dotted path.

    Raises:
        ValueError: a logical axis has no rule, or two dimensions of one parameter are on the same mesh axis.
    """
    shapes = abstract_params(config)
    # XLA places intermediate values, so axes are of type Auto, whatever the type in the caller's mesh
    mesh = Mesh(mesh.devices, mesh.axis_names)
    return {
        path: NamedSharding(mesh, _partition(path, axes, _parts(config, path, axes, shapes[path].shape), mesh))
        for path, axes in logical_axes(config).items()
    }


def _parts(config: ModelConfig, path: str, axes: tuple[str | None, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the most parts into which each dimension may be split: a dimension of heads only into whole heads."""
    heads = {"heads": config.text.num_attention_heads, "kv_heads": config.text.num_key_value_heads}
    if config.vision and path.startswith("visual."):
        heads = {"heads": config.vision.num_heads}
    return tuple(heads.get(axis or "", size) for axis, size in zip(axes, shape, strict=True))


def _partition(path: str, axes: tuple[str | None, ...], parts: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    placed: list[str | None] = []
    for axis, size in zip(axes, parts, strict=True):
        if axis is not None and axis not in RULES:
            raise ValueError(f"{path}: logical axis {axis!r} has no rule in sharding.RULES")
        target = RULES[axis] if axis else None
        divides = target in mesh.shape and size % mesh.shape[target] == 0
        placed.append(target if divides else None)
    used = [target for target in placed if target]
    if len(used) != len(set(used)):
        raise ValueError(f"{path}: logical axes {axes} put two dimensions on one mesh axis {used}")
    return PartitionSpec(*placed)
