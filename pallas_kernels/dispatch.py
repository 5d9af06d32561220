"""Selects a backend of an op, by name or by the chip that the program is compiled for."""

import logging
from collections.abc import Callable, Mapping
from functools import cache
from typing import NamedTuple

import jax
from jax.sharding import AxisType

Backend = Callable[..., jax.Array]
_log = logging.getLogger(__name__)


class Chip(NamedTuple):
    """The chip that a program is compiled for: platform is cpu, tpu or cuda; kind is jax's device_kind."""

    platform: str
    kind: str
    capability: str | None = None  # of a present NVIDIA GPU, such as 9.0
    multiprocessors: int | None = None  # of an NVIDIA GPU


def target_chip(*args: jax.Array) -> Chip:
    """Returns the chip of the mesh of `args` or of the mesh in use (which aot.py may describe), otherwise jax's own."""
    of_mesh = next((mesh.abstract_device for mesh in _meshes(args) if mesh.abstract_device), None)
    device = of_mesh or jax.config.jax_default_device or jax.devices()[0]
    if isinstance(device, str):
        device = jax.devices(device)[0]
    if device.platform not in ("gpu", "cuda"):
        return Chip(device.platform, device.device_kind)
    # a chip and a mesh's description of it have different names for the same number
    multiprocessors = getattr(device, "core_count", None) or getattr(device, "num_cores", None)
    return Chip("cuda", device.device_kind, getattr(device, "compute_capability", None), multiprocessors)


def unsupported_on_mesh(*args: jax.Array) -> str | None:
    """Returns why no kernel can run in the program of `args`, which XLA splits over devices, or None."""
    split = any(mesh.size > 1 and set(mesh.axis_types) != {AxisType.Manual} for mesh in _meshes(args))
    return "XLA can't split a kernel over a mesh: use shard_map" if split else None


def _meshes(args: tuple[jax.Array, ...]) -> list[jax.sharding.AbstractMesh]:
    return [*(jax.typeof(x).sharding.mesh for x in args), jax.sharding.get_abstract_mesh()]


def get_backend[B](op: str, backends: Mapping[str, B], name: str) -> B:
    """Returns the backend called `name`; an unknown name raises a `ValueError` that lists the known ones."""
    if name not in backends:
        raise ValueError(f"{op} has no backend {name!r}: expected one of {', '.join(backends)}")
    return backends[name]


@cache
def log_choice(op: str, shapes: str, chip: Chip, backend: str, why: str) -> None:
    """Logs once per op, shapes and chip, at DEBUG level, which backend was chosen and why."""
    _log.debug("%s of %s on %s: %s (%s)", op, shapes, chip.kind, backend, why)
