"""Plans a model on a slice of chips that need not be there, by compiling the engine's programs for it.

Needs the compilers of the target (`pallas_kernels/aot.py`), which `pip install 'deepstack-jax[aot]'` brings for TPUs.
"""

import math
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pallas_kernels import aot  # isort: skip (before jax compiles anything)
import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from deepstack_jax import sharding
from deepstack_jax.checkpoint import TEXT
from deepstack_jax.config import ModelConfig
from deepstack_jax.engine.options import CHIP_CHUNK, CHIP_SLOTS, FREE_SHARE, chunk_on, token_bytes
from deepstack_jax.engine.shape import EngineShape
from deepstack_jax.models.parameters import model_dtype
from deepstack_jax.programs import decode_loop, prefill_chunk
from deepstack_jax.rounding import cdiv
from deepstack_jax.testing.arg_specs import chunk_specs, decode_limits, param_specs, state_specs

GiB = 1 << 30


@dataclass(frozen=True)
class Chip:
    """What one of JAX's devices has.

    Attributes:
        memory: bytes that programs can use.
        bandwidth: bytes per second of its memory.
        flops: bfloat16 operations per second of its matrix units.
        links: bytes per second to its neighbours, all links together.
    """

    memory: int
    bandwidth: float
    flops: float
    links: float


# From the makers' data sheets, except memory: what TPUs' compilers allow, and GPUs' after the driver's own.
CHIPS = {
    "v5e": Chip(int(15.75 * GiB), 819e9, 197e12, 200e9),
    "v6e": Chip(int(31.25 * GiB), 1640e9, 918e12, 448e9),
    "v5p": Chip(int(95.74 * GiB), 2765e9, 459e12, 600e9),
    "tpu7x": Chip(int(94.75 * GiB), 3690e9, 1153e12, 600e9),
    "h100": Chip(int(79.2 * GiB), 3350e9, 989e12, 450e9),
    "h200": Chip(int(140.0 * GiB), 4800e9, 989e12, 450e9),
    "b200": Chip(int(178.0 * GiB), 7670e9, 2250e12, 900e9),
}


@dataclass(frozen=True)
class Bytes:
    """Bytes on each device: weights of the whole model, KV pages, and temporaries of the larger program."""

    weights: int
    pages: int
    temporaries: int

    @property
    def total(self) -> int:
        return self.weights + self.pages + self.temporaries


@dataclass(frozen=True)
class Program:
    """One compiled program.

    Attributes:
        compile_seconds: of this machine's CPU.
        temporaries: bytes on each device.
        collectives: how many of each kind and shape; one in the loop of decode steps counts once.
        collective_bytes: of their results on each device.
        collectives_per_layer: those that each layer has.
        kernels: names of Pallas kernels.
        pages_in_place: whether the KV pages that come in are those that go out.
        seconds: the least time on this chip, of a decode step or of a chunk.
        arithmetic: how that comes about.
    """

    compile_seconds: float
    temporaries: int
    collectives: dict[str, int]
    collective_bytes: int
    collectives_per_layer: int
    kernels: list[str]
    pages_in_place: bool
    seconds: float
    arithmetic: str


@dataclass(frozen=True)
class Plan:
    """A model on a mesh of a slice.

    Attributes:
        why: why it doesn't fit, empty if it does.
        kv_tokens: tokens that the pages hold, of all requests together.
        programs: `decode` and `prefill`; empty if a compiler refused them.
    """

    target: str
    mesh: str
    fits: bool
    why: str
    slots: int
    chunk: int
    bytes_per_device: Bytes
    memory_per_device: int
    kv_tokens: int
    programs: dict[str, Program]

    def as_json(self) -> dict[str, Any]:
        """Returns the plan as an object, with the decode step's collectives per layer and all kernels at its top."""
        programs = self.programs.values()
        decode = self.programs.get("decode")
        return {
            **asdict(self),
            "collectives_per_layer": decode.collectives_per_layer if decode else None,
            "kernels": sorted({name for program in programs for name in program.kernels}),
            "compile_seconds": round(sum(program.compile_seconds for program in programs), 1),
        }


def plans(
    config: ModelConfig,
    target: str,
    mesh: str | None = None,
    slots: int | None = None,
    chunk: int | None = None,
    kv_bytes: int | None = None,
) -> Iterator[Plan]:
    """Compiles the engine's programs for one mesh after another, the most promising first.

    Args:
        config: the model; its dtype is bfloat16 if it names none.
        target: a slice as `pallas_kernels.aot.slice_devices` names it, or cpu-8 for this machine's virtual devices.
        mesh: the only one to try, as `make_mesh` takes it.
        slots, chunk: of the engine; None takes a server's default.
        kv_bytes: memory of each device for KV pages; None takes most of what the weights leave.

    Raises:
        ValueError: there is no such slice or mesh, or its compiler isn't installed.
    """
    config = config if config.dtype else replace(config, dtype="bfloat16")
    chip, devices = _devices_of(target)
    for data, tensor in _meshes(config, target, len(devices), mesh):
        placed = Mesh(np.asarray(devices).reshape(data, tensor), sharding.AXES, axis_types=(AxisType.Auto,) * 2)
        yield _plan(config, target, chip, placed, slots, chunk, kv_bytes)


def _devices_of(target: str) -> tuple[Chip, list[Any]]:
    name, _, count = target.partition("-")
    if name != "cpu":
        return CHIPS.get(name, CHIPS["v5e"]), aot.slice_devices(target)
    devices = jax.devices("cpu")
    if not count.isdecimal() or not 1 <= int(count) <= len(devices):
        raise ValueError(
            f"no target {target!r}: there are {len(devices)} CPU devices, set "
            "XLA_FLAGS=--xla_force_host_platform_device_count=8 for more"
        )
    pages = re.search(r"MemTotal:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    memory = int(pages.group(1)) * 1024 // int(count) if pages else GiB
    return Chip(memory, 10e9, 100e9, 10e9), devices[: int(count)]


def _meshes(config: ModelConfig, target: str, devices: int, given: str | None) -> Iterator[tuple[int, int]]:
    """Yields (data, tensor): heads are divided as far as they go, since that divides the weights of attention.

    XLA for GPUs makes five collectives of a layer's three if both axes are more than 1, so there one axis comes first,
    with the KV heads repeated if that takes all of them.
    """
    if given is not None:
        sizes = sharding.abstract_mesh(given)
        if sizes.size != devices:
            raise ValueError(f"mesh {given} has {sizes.size} devices, and the target {devices}: make them equal")
        yield sizes.shape["data"], sizes.shape["tensor"]
        return
    most = config.text.num_key_value_heads
    alone = sharding.abstract_mesh(f"tensor={devices}")
    if (
        target.partition("-")[0] not in aot.TPUS
        and sharding.kv_repeats(config.text.num_attention_heads, most, alone) > 1
    ):
        yield 1, devices
    for tensor in range(min(most, devices), 0, -1):
        if devices % tensor == 0 and most % tensor == 0:
            yield devices // tensor, tensor


def _plan(
    config: ModelConfig,
    target: str,
    chip: Chip,
    mesh: Mesh,
    slots: int | None,
    chunk: int | None,
    kv_bytes: int | None,
) -> Plan:
    sizes = data, _ = sharding.sizes(mesh)
    chunk = chunk_on(mesh, CHIP_CHUNK) if chunk is None else chunk
    shape = EngineShape(cdiv(CHIP_SLOTS, data) * data if slots is None else slots, chunk, mesh=sizes)
    params = param_specs(config, mesh)
    weights = sum(_held(leaf) for leaf in params.values())
    of_page = shape.page * token_bytes(config.text, model_dtype(config), mesh)
    room = int(FREE_SHARE * max(chip.memory - weights, 0)) if kv_bytes is None else kv_bytes
    longest = shape.slots // data * cdiv(config.text.max_position_embeddings, shape.page)
    pages = min(room // of_page, 1 + longest)
    programs: dict[str, Program] = {}
    why = "" if pages >= 2 else f"the weights take {weights / GiB:.1f} of {chip.memory / GiB:.1f} GiB of each device"
    try:
        if not why:
            programs = dict(_compile(config, params, chip, mesh, shape, pages))
    except jax.errors.JaxRuntimeError as error:
        why = f"the compiler refuses it: {' '.join(str(error).split())[:300]}"
    temporaries = max((program.temporaries for program in programs.values()), default=0)
    found = Bytes(weights, max(pages, 0) * of_page, temporaries)
    if not why and found.total > chip.memory:
        why = f"it takes {found.total / GiB:.1f} of {chip.memory / GiB:.1f} GiB of each device"
    tokens = data * max(pages - 1, 0) * shape.page
    description = sharding.describe(mesh)
    return Plan(target, description, not why, why, shape.slots, chunk, found, chip.memory, tokens, programs)


def _compile(
    config: ModelConfig,
    params: dict[str, jax.ShapeDtypeStruct],
    chip: Chip,
    mesh: Mesh,
    shape: EngineShape,
    pages: int,
) -> Iterator[tuple[str, Program]]:
    params = {path: leaf for path, leaf in params.items() if path.startswith(TEXT)}
    state = state_specs(config, shape.slots, shape.pools * pages, shape.page, mesh)
    chunk = chunk_specs(config, state, shape.chunk, shape.pools)
    in_pages = sum(_held(leaf) for leaf in jax.tree.leaves((state.cache.keys, state.cache.values)))
    for name, program, rest, tokens in (
        ("decode", decode_loop, decode_limits(config, shape.slots), shape.slots),
        ("prefill", prefill_chunk, (chunk,), shape.pools * shape.chunk),
    ):
        began = time.perf_counter()
        compiled = aot.compile_for(mesh, program, config, params, state, *rest)
        seconds, memory = time.perf_counter() - began, compiled.memory_analysis()
        found = aot.collectives(compiled)
        counts = Counter(f"{each.kind} {each.shape}" for each in found)
        layers = config.text.num_hidden_layers
        moved = sum(each.nbytes for each in found)
        bound, arithmetic = _bound(config, params, chip, mesh.size, tokens, moved)
        yield (
            name,
            Program(
                round(seconds, 1),
                memory.temp_size_in_bytes,
                dict(counts),
                moved,
                sum(count // layers for count in counts.values()),
                aot.kernels(compiled),
                memory.alias_size_in_bytes >= in_pages,
                bound,
                arithmetic,
            ),
        )


def _bound(
    config: ModelConfig,
    params: dict[str, jax.ShapeDtypeStruct],
    chip: Chip,
    devices: int,
    tokens: int,
    moved: int,
) -> tuple[float, str]:
    """Returns the least seconds of a program over `tokens` tokens: weights read or operations, then collectives.

    Keys and values that attention reads are left out.
    """
    text = config.text
    experts = {path: leaf for path, leaf in params.items() if ".experts." in path}
    whole = sum(math.prod(leaf.shape) for leaf in experts.values())
    others = sum(math.prod(x.shape) for path, x in params.items() if path not in experts and "embed_tokens" not in path)
    chosen = text.num_experts_per_tok / text.num_experts if text.num_experts else 0.0
    reached = 1 - (1 - chosen) ** tokens
    read = sum(_held(x) for path, x in params.items() if path not in experts and "embed_tokens" not in path)
    read += int(reached * sum(_held(leaf) for leaf in experts.values()))
    operations = 2 * tokens * (others + chosen * whole) / devices
    reading, computing, moving = read / chip.bandwidth, operations / chip.flops, moved / chip.links
    arithmetic = (
        f"{read / 1e9:.2f} GB of weights at {chip.bandwidth / 1e9:.0f} GB/s = {reading * 1e3:.2f} ms, "
        f"{operations / 1e12:.2f} TFLOP at {chip.flops / 1e12:.0f} TFLOP/s = {computing * 1e3:.2f} ms, "
        f"collectives {moved / 1e6:.1f} MB at {chip.links / 1e9:.0f} GB/s = {moving * 1e3:.2f} ms"
    )
    return max(reading, computing) + moving, arithmetic


def _held(leaf: jax.ShapeDtypeStruct) -> int:
    assert leaf.sharding is not None
    return sharding.bytes_held(leaf, leaf.sharding)
