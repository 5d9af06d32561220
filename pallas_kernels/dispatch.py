"""Finding a backend of an op: by name, or by the chip that the program is compiled for."""

import logging
from collections.abc import Callable, Mapping
from functools import cache
from typing import NamedTuple

import jax
from jax.sharding import AxisType

Backend = Callable[..., jax.Array]
_log = logging.getLogger(__name__)


class Chip(NamedTuple):
    """What a program is compiled for: platform is cpu, tpu or cuda; kind is jax's device_kind, as "NVIDIA H200"."""

    platform: str
    kind: str


def target_chip() -> Chip:
    """The chip of the mesh in use (also a described one, see aot.py), else of jax's default device."""
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.config.jax_default_device or jax.devices()[0]
    if isinstance(device, str):
        device = jax.devices(device)[0]
    platform = "cuda" if device.platform == "gpu" else device.platform
    return Chip(platform, device.device_kind)


def partitioned_by_xla() -> bool:
    """Whether XLA splits this program over devices. It can't split a kernel: that takes shard_map."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.size > 1 and any(kind != AxisType.Manual for kind in mesh.axis_types)


def named(op: str, backends: Mapping[str, Backend], name: str) -> Backend:
    """The backend called `name`; a `ValueError` lists those that there are."""
    if name not in backends:
        raise ValueError(f"{op} has no backend {name!r}: expected one of {', '.join(backends)}")
    return backends[name]


@cache
def log_choice(op: str, shapes: str, chip: Chip, backend: str, why: str) -> None:
    """Says once for each op, shapes and chip which backend was taken."""
    _log.debug("%s of %s on %s: %s (%s)", op, shapes, chip.kind, backend, why)
