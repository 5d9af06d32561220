"""The engine's two programs for Qwen3-VL-30B-A3B at full depth, compiled for chips that need not be there.

    JAX_PLATFORMS=cpu .venv-aot/bin/python benchmarks/aot_engine.py [--targets h200 v5p] [--slots 32] [--chunk 1024]
    JAX_PLATFORMS=cpu .venv-aot/bin/python benchmarks/aot_engine.py --launches [--targets h100]

`make test-aot` sets up .venv-aot. Prints what each program's compiler plans: the memory of a chip, the copies of 1 MiB
and more of weights or pages, whether the pages are updated in place, and the time to compile. Nothing runs.

With --launches, prints what the programs launch on NVIDIA GPUs, for 1, 8 and 64 slots and for chunks of 512 tokens: the
kernels and copies of one decoding step or one chunk, in each layer (the difference between cuts to 2 and 4 layers) and
in the rest; those in the branches of sampling options, of which greedy decoding takes none; CUDA graphs; and the loops
and branches that the host decides, for which it waits.
"""

import argparse
import math
import time
from collections import Counter
from importlib.metadata import version
from typing import Any

from pallas_kernels import aot  # isort: skip (before jax compiles anything)
import jax
import jax.numpy as jnp

from deepstack_jax.checkpoint import TEXT
from deepstack_jax.known_models import KNOWN_MODELS
from deepstack_jax.models.parameters import abstract_params
from deepstack_jax.models.registry import parse_config
from deepstack_jax.programs import EngineState, decode_loop, prefill_chunk
from deepstack_jax.testing.arg_specs import chunk_specs, decode_limits, state_specs

MiB, GiB = 1 << 20, 1 << 30


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--targets", nargs="+", choices=aot.TARGETS, default=["h200", "v5p"])
    arguments.add_argument("--slots", type=int, default=32)
    arguments.add_argument("--chunk", type=int, default=1024)
    arguments.add_argument("--pages", type=int, default=1024, help="KV pages of 128 tokens")
    arguments.add_argument("--launches", action="store_true")
    options = arguments.parse_args()
    if options.launches:
        for target in options.targets if set(options.targets) <= set(aot.GPUS) else ["h100"]:
            print_launches(target)
        return
    config = parse_config(KNOWN_MODELS["30b-a3b"])
    params = {path: leaf for path, leaf in abstract_params(config, jnp.bfloat16).items() if path.startswith(TEXT)}
    state = state_specs(config, options.slots, options.pages)
    pages = f"{options.pages} pages ({size_of(state.cache) / GiB:.1f} GiB)"
    print(
        f"30B-A3B, {config.text.num_hidden_layers} layers, bfloat16, jax {version('jax')}; {time.strftime('%Y-%m-%d')}"
    )
    print(f"{options.slots} slots, chunk {options.chunk}, {pages}")
    print("target   program        arguments  temporary  in place  copies  compiled")
    programs = {
        "decode_loop": (decode_loop, decode_limits(config, options.slots)),
        "prefill_chunk": (prefill_chunk, (chunk_specs(config, state, options.chunk),)),
    }
    for target in options.targets:
        for name, (program, rest) in programs.items():
            began = time.perf_counter()
            compiled = aot.compile_for(target, program, config, params, state, *rest)
            memory = compiled.memory_analysis()
            seconds, held = time.perf_counter() - began, memory.argument_size_in_bytes / GiB
            in_place = "yes" if memory.alias_size_in_bytes >= size_of(state.cache) else "no"
            sizes = f"{held:5.1f} GiB {memory.temp_size_in_bytes / MiB:6.0f} MiB"
            count = len(copies_of(compiled, params, state))
            print(f"{target:8} {name:14} {sizes} {in_place:>9} {count:7} {seconds:7.0f} s", flush=True)


def print_launches(target: str) -> None:
    print(f"30B-A3B, bfloat16, jax {version('jax')}, {target}; {time.strftime('%Y-%m-%d')}")
    print("                    of each layer")
    print("program         XLA  Pallas  copies  all    rest  in branches  graphs  loops  branches of the host")
    for name, size in (*(("decode_loop", slots) for slots in (1, 8, 64)), ("prefill_chunk", 512)):
        two, four = (launches_of(target, name, layers, size) for layers in (2, 4))
        kinds = "kCustomKernel", "kCustomCall", "kCopy"
        each = [(four[kind] - two[kind]) / 2 for kind in kinds]
        rest = sum(two[kind] for kind in kinds) - 2 * sum(each)
        of_host = f"{four['host kWhile']:6} {four['host kConditional']:9}"
        print(f"{name:13} {size:4}", f"{each[0]:4g} {each[1]:6g} {each[2]:7g} {sum(each):5g} {rest:6g}", end=" ")
        print(f"{four['branch']:12} {four['kCommandBuffer']:7} {of_host}", flush=True)


def launches_of(target: str, name: str, layers: int, size: int) -> Counter[str]:
    """Counts a program's thunks by kind; of decoding with `size` slots those of one step, of prefill of a `size` chunk.

    "branch" counts launches in branches, "host kWhile" and "host kConditional" what the host decides.
    """
    values = KNOWN_MODELS["30b-a3b"]
    config = parse_config(values | {"text_config": values["text_config"] | {"num_hidden_layers": layers}})
    params = {path: leaf for path, leaf in abstract_params(config, jnp.bfloat16).items() if path.startswith(TEXT)}
    state = state_specs(config, size if name == "decode_loop" else 32, 1024)
    if name == "decode_loop":
        whole = aot.thunks(target, decode_loop, config, params, state, *decode_limits(config, size))
        thunks = [each._replace(within=each.within[1:]) for each in whole if each.within[:1] == ("kWhile",)]
    else:
        thunks = aot.thunks(target, prefill_chunk, config, params, state, chunk_specs(config, state, size))
    counts = Counter(each.kind for each in thunks if "kConditional" not in each.within)
    counts["branch"] = sum(each.launches for each in thunks if "kConditional" in each.within)
    counts.update(f"host {each.kind}" for each in thunks if each.decided_by_host)
    return counts


def size_of(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def copies_of(compiled: Any, params: dict[str, jax.ShapeDtypeStruct], state: EngineState) -> list[str]:
    """Copies of 1 MiB and more of arrays that have the shape of experts' weights or of pages."""
    arrays = [leaf for path, leaf in params.items() if ".experts." in path] + [state.cache.keys[0]]
    dims = {",".join(str(n) for n in array.shape) for array in arrays}
    return [line for line in aot.copies(compiled, at_least=MiB) if any(f"[{each}]" in line for each in dims)]


if __name__ == "__main__":
    main()
