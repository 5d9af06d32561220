"""Compiles JAX programs and Pallas kernels for TPUs and NVIDIA GPUs on a machine that has neither.

The real compilers of the targets run (libtpu's, and XLA's for CUDA with Mosaic GPU). This shows, without the chip,
which programs they refuse, how much memory they plan and which copies they insert. Nothing is executed: this tells
nothing about results (the interpreters do) or speed (`cost_analysis()` is not a model of time).

    from pallas_kernels import aot

    compiled = aot.compile_for("v5e", fn, jax.ShapeDtypeStruct((8, 2048), jnp.bfloat16), donate_argnums=0)
    compiled.memory_analysis().temp_size_in_bytes, aot.copies(compiled, at_least=1 << 20)

Besides jax, this needs `libtpu` for TPUs, and for CUDA `jax-cuda13-plugin` and `jax-cuda13-pjrt` of jax's version,
installed with `--no-deps`. `make test-aot` sets that up in .venv-aot, apart from the environment in which programs run.
Set the environment variable JAX_PLATFORMS=cpu: with both plugins installed and no chip, jax may crash when it starts.
Import this module before jax compiles anything. Only one process at a time can use libtpu.

    python -m pallas_kernels.aot      # compiles one small kernel for every target and prints a table
"""

import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # otherwise libtpu waits for a cloud's metadata server
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
# XLA's radix sort asks the local GPU how much scratch memory it needs, and there is none
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_enable_cub_radix_sort=false"

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental import topologies
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

# chips of a slice -> how they are arranged, for chips with a torus of two and of three dimensions
_IN_2D = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_IN_3D = {1: "1x1x1", 4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8"}
TPUS = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "v5p": "v5p:2x2x1", "tpu7x": "tpu7x:2x2x1"}
GPUS = ("h100", "h200")
TARGETS = (*TPUS, *GPUS)
SLICES = (*TPUS, *GPUS, "b200")  # chips of which `slice_devices` describes several
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "f32": 4}


def mesh_of(target: str, num_devices: int = 1) -> Mesh:
    """Returns a mesh with one axis "x" over described (not present) devices of a target from `TARGETS`.

    Raises:
        ValueError: the target is unknown, or its compiler isn't installed.
    """
    if target not in TARGETS:
        raise ValueError(f"no target {target!r}: expected one of {', '.join(TARGETS)}")
    if target in TPUS:
        with _compiler_needed(target, "libtpu"):
            devices = topologies.get_topology_desc(TPUS[target], platform="tpu").devices
    else:
        devices = _gpus(target, num_devices)
    return Mesh(devices[:num_devices], ("x",), axis_types=(AxisType.Auto,))


def slice_devices(name: str) -> list[Any]:
    """Returns the described devices of a slice, named as clouds name it: "v5e-16", "v6e-8", "h200-8".

    Google counts chips of v5e and v6e, and cores of v5p and tpu7x, of which a chip has two. JAX's devices are chips,
    but on tpu7x they are cores.

    Raises:
        ValueError: there is no such slice, or its compiler isn't installed.
    """
    chip, _, size = name.partition("-")
    if chip not in SLICES or not size.isdecimal() or int(size) < 1:
        raise ValueError(f"no target {name!r}: give a chip and a number, as v5e-16; chips are {', '.join(SLICES)}")
    if chip not in TPUS:
        return _gpus(chip, int(size))
    cores = 2 if chip in ("v5p", "tpu7x") else 1
    shapes = _IN_3D if cores == 2 else _IN_2D
    chips, left = divmod(int(size), cores)
    if left or chips not in shapes:
        sizes = ", ".join(str(cores * count) for count in shapes)
        raise ValueError(f"there is no {name}: {chip} comes with {sizes}")
    with _compiler_needed(name, "libtpu"):
        return list(topologies.get_topology_desc(f"{chip}:{shapes[chips]}", platform="tpu").devices)


def _gpus(chip: str, count: int) -> list[Any]:
    described = Path(__file__).parent / "aot_targets" / f"{chip}.txtpb"  # XLA's GpuTargetConfigProto
    topology = {"topology": f"1x1x{count}", "target_config": described.read_text()}
    with _compiler_needed(chip, "jax-cuda13-plugin and jax-cuda13-pjrt (pip install --no-deps)"):
        return list(topologies.get_topology_desc(chip, platform="cuda", **topology).devices)


@contextmanager
def _compiler_needed(target: str, packages: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"can't compile for {target}: {error}. It needs {packages} of a version that fits jax"
        ) from error


def compile_for(target: str | Mesh, fn: Callable[..., Any], *args: Any, **jit_options: Any) -> Any:
    """Lowers and compiles `fn` for a target's chip.

    Args:
        target: a name from `TARGETS`, or a mesh from `mesh_of`.
        fn: a function of `args`, plain or already jitted. A plain one is jitted with `jit_options` (static_argnums,
            donate_argnums).
        args: pytrees of `jax.ShapeDtypeStruct`, replicated if they have no sharding, and static arguments.

    Returns:
        `jax.stages.Compiled`, whose `memory_analysis()` and `as_text()` show what the compiler planned.

    Raises:
        ValueError: the errors of `mesh_of`.
        Exception: any error of the target's compiler.
    """
    return _lowered(target, fn, *args, **jit_options).compile()


def _lowered(target: str | Mesh, fn: Callable[..., Any], *args: Any, **jit_options: Any) -> Any:
    mesh = mesh_of(target) if isinstance(target, str) else target
    jitted = fn if hasattr(fn, "trace") else jax.jit(fn, **jit_options)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # tells Pallas which chip it lowers for
        return jitted.trace(*(placed(arg, mesh) for arg in args)).lower()


def placed(tree: Any, mesh: Mesh) -> Any:
    """Returns `tree` with every `jax.ShapeDtypeStruct` that has no sharding replicated over the mesh."""
    replicated = NamedSharding(mesh, PartitionSpec())

    def place(leaf: Any) -> Any:
        if not isinstance(leaf, jax.ShapeDtypeStruct) or leaf.sharding is not None:
            return leaf
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated)

    return jax.tree.map(place, tree)


def copies(compiled: Any, at_least: int) -> list[str]:
    """Lists instructions of the compiled program that only copy, transpose or convert `at_least` bytes or more."""
    pattern = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (\w+)\[([\d,]*)\]\S* ((?:copy|transpose|convert)[\w-]*)\(", re.M)
    found = []
    for name, dtype, dims, op in pattern.findall(compiled.as_text()):
        size = _BYTES.get(dtype, 8) * math.prod(int(d) for d in dims.split(",") if d)
        if size >= at_least:
            found.append(f"{name} = {op} {dtype}[{dims}]")
    return found


class Collective(NamedTuple):
    """A collective operation of a compiled program, and the bytes of its result on each device."""

    kind: str
    shape: str
    nbytes: int


def collectives(compiled: Any) -> list[Collective]:
    """Lists the collective operations in a compiled program's text. One in a loop's body is listed once.

    So is one that XLA for TPUs divides into a chain of steps, to run them beside products.
    """
    kinds = "all-reduce|all-gather|reduce-scatter|ragged-all-to-all|all-to-all|collective-permute|collective-broadcast"
    found, chains = [], set()
    for result, kind, rest in re.findall(rf"= (.*?) ({kinds})(?:-start)?\((.*)", compiled.as_text()):
        if chain := re.search(r'chain_id="\d+"', rest):
            if chain.group() in chains:
                continue
            chains.add(chain.group())
        shapes = re.findall(r"\b(\w+)\[([\d,]*)\]", result)
        shapes = [(dtype, dims) for dtype, dims in shapes if dtype in _BYTES]
        # the start of an asynchronous one names its argument before its result
        sizes = [_BYTES[dtype] * math.prod(int(d) for d in dims.split(",") if d) for dtype, dims in shapes]
        if sizes:
            dtype, dims = shapes[sizes.index(max(sizes))]
            found.append(Collective(kind, f"{dtype}[{dims}]", max(sizes)))
    return found


def kernels(compiled: Any) -> list[str]:
    """Lists the names of the Pallas kernels in a compiled program, each once, in alphabetical order."""
    text = compiled.as_text()
    of_tpu = re.findall(r'%?([\w.-]+?)(?:\.\d+)? = [^\n]*custom_call_target="tpu_custom_call"', text)
    of_gpu = re.findall(r'custom_call_target="(mosaic_gpu\w*)"', text)
    return sorted({*of_tpu, *of_gpu})


class Thunk(NamedTuple):
    """One step of what the host of an NVIDIA GPU runs, in XLA's words, and the kinds of steps that hold it."""

    kind: str  # kCustomKernel (XLA's kernels), kCustomCall (Pallas' too), kCopy, kWhile, kConditional, kCommandBuffer
    name: str
    within: tuple[str, ...]  # from the outside to the inside; a loop's condition is in the loop

    @property
    def launches(self) -> bool:
        """Whether this is a kernel or a copy, rather than a loop, a branch or a CUDA graph that holds others."""
        return self.kind not in (_GRAPH, *_DECIDED)

    @property
    def decided_by_host(self) -> bool:
        """Whether this is a loop or branch outside CUDA graphs: the host waits for the device before every turn."""
        return self.kind in _DECIDED and _GRAPH not in self.within


_GRAPH, _DECIDED = "kCommandBuffer", ("kWhile", "kConditional")


def thunks(target: str | Mesh, fn: Callable[..., Any], *args: Any, **jit_options: Any) -> list[Thunk]:
    """Compiles for an NVIDIA GPU as `compile_for` does, and lists what the program launches, in order.

    A loop's body and each branch of a conditional are listed once, however often they run.

    Raises:
        ValueError: the errors of `mesh_of`.
        Exception: any error of the target's compiler.
    """
    lowered = _lowered(target, fn, *args, **jit_options)
    with tempfile.TemporaryDirectory() as folder:
        lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        (listed,) = Path(folder).glob("*.thunk_sequence_after_thunk_passes.txt")
        text = listed.read_text()
    found, holders = [], []  # of (indentation, kind)
    for indent, kind, name in re.findall(r"^( *)\d+: (k\w+) *\[[^\]]*\] *(\S*)", text, re.M):
        while holders and holders[-1][0] >= len(indent):
            holders.pop()
        found.append(Thunk(kind, name, tuple(holder for _, holder in holders)))
        holders.append((len(indent), kind))
    return found


def _main() -> None:
    x = jax.ShapeDtypeStruct((1024, 128), jnp.bfloat16)

    def on_tpu(x: jax.Array) -> jax.Array:
        def body(x_ref: Any, out_ref: Any) -> None:
            out_ref[...] = x_ref[...] * 2

        block = pl.BlockSpec((128, 128), lambda i: (i, 0))
        return pl.pallas_call(body, grid=(8,), in_specs=[block], out_specs=block, out_shape=x)(x)

    def on_gpu(x: jax.Array) -> jax.Array:
        def body(x_ref: Any, out_ref: Any) -> None:
            rows = pl.ds(jax.lax.axis_index("i") * 128, 128)
            out_ref[rows, :] = x_ref[rows, :] * 2

        return plgpu.kernel(body, out_type=jax.ShapeDtypeStruct(x.shape, x.dtype), grid=(8,), grid_names=("i",))(x)

    for target in TARGETS:
        try:
            memory = compile_for(target, on_tpu if target in TPUS else on_gpu, x).memory_analysis()
            print(f"{target:6} compiles: {memory.argument_size_in_bytes} B in, {memory.temp_size_in_bytes} B temporary")
        except Exception as error:  # the table shows what works and what doesn't
            print(f"{target:6} {type(error).__name__}: {str(error).splitlines()[0][:200]}")


if __name__ == "__main__":
    _main()
