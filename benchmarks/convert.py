"""Conversion against copying: time and peak memory on a made-up sharded checkpoint of at least 6 GB.

    python benchmarks/convert.py --folder /some/disk [--rounds 5] [--expert-layout hf5]

The checkpoint has the widths of Qwen3-VL-30B-A3B in bfloat16 and 8 layers. Each round copies its files with fsync
and converts it in a fresh process, one after the other, in alternating order. Both start from the same state: the
source in the page cache, the rest of the memory filled with pages of another file, all written data on disk. (On a
virtual machine that returns free memory to its host, the first use of a page costs several times as much as writing
it; with free memory, whichever runs soon after a large deletion would win.) Deleting what they wrote is not timed. The
first round is a warm-up and is not counted.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from math import prod
from pathlib import Path

from deepstack_jax.checkpoints.mapping import parameters
from deepstack_jax.models.registry import parse_config
from deepstack_jax.testing.random_checkpoint import write_random_checkpoint

CONFIG = {
    "model_type": "qwen3_vl_moe",
    "tie_word_embeddings": False,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "text_config": {
        "model_type": "qwen3_vl_moe_text",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 8,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "max_position_embeddings": 262144,
        "rope_theta": 5000000,
        "rope_scaling": {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [24, 20, 20]},
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "eos_token_id": 151645,
    },
    "vision_config": {
        "model_type": "qwen3_vl_moe",
        "depth": 27,
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_heads": 16,
        "out_hidden_size": 2048,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": [8, 16, 24],
    },
}
RATIO_BOUND = 1.5
COPY_PIECE = 4 << 20
KEPT_FREE = 2 << 30


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--folder", type=Path, required=True, help="a folder on the disk to measure; 40 GB of room")
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--expert-layout", choices=("hf4", "hf5", "per_expert"), default="hf4")
    arguments.add_argument("--keep", action="store_true", help="keep the made-up checkpoint for the next run")
    options = arguments.parse_args()
    source = options.folder / f"checkpoint-{options.expert_layout}"
    copied, converted, filler = (options.folder / name for name in ("copied", "converted", "filler"))
    if not source.exists():
        print(f"making {source} ...", flush=True)
        write_random_checkpoint(
            source, CONFIG, dtype="bfloat16", expert_layout=options.expert_layout, tokenizer=False, repeat_values=True
        )
    files = sorted(source.iterdir())
    nbytes = sum(file.stat().st_size for file in files)
    largest = max(2 * prod(parameter.shape) for parameter in parameters(parse_config(CONFIG)))
    bound = (1 << 30) + 3 * largest
    _describe(nbytes, len([file for file in files if file.suffix == ".safetensors"]), options.expert_layout)
    rounds = []
    try:
        for i in range(options.rounds + 1):
            measured = {}
            for kind in ("copy", "convert") if i % 2 else ("convert", "copy"):
                _fill_memory(filler)
                _read(files)
                os.sync()
                if kind == "copy":
                    measured["copy"] = _copy(files, copied)
                else:
                    measured["convert"], measured["peak"] = _convert(source, converted)
            ratio = measured["convert"] / measured["copy"]
            print(
                f"round {i or 'warm-up'}: copy {measured['copy']:.2f} s, convert {measured['convert']:.2f} s, "
                f"ratio {ratio:.2f}, peak {measured['peak'] / 2**30:.2f} GiB",
                flush=True,
            )
            if i:
                rounds.append({**measured, "ratio": ratio})
    finally:
        filler.unlink(missing_ok=True)
        for folder in (copied, converted) if options.keep else (copied, converted, source):
            shutil.rmtree(folder, ignore_errors=True)
    copy, convert, ratio = (statistics.median(r[key] for r in rounds) for key in ("copy", "convert", "ratio"))
    peak = max(r["peak"] for r in rounds)
    print(f"\n| | copy with fsync | convert | ratio (bound {RATIO_BOUND}) | peak (bound {bound / 2**30:.2f} GiB) |")
    print("|---|---|---|---|---|")
    print(f"| {options.expert_layout} | {copy:.2f} s | {convert:.2f} s | {ratio:.2f} | {peak / 2**30:.2f} GiB |")
    print(f"| GB/s | {nbytes / copy / 1e9:.2f} | {nbytes / convert / 1e9:.2f} | | |")
    if ratio > RATIO_BOUND or peak > bound:
        sys.exit("FAILED: a bound is not held")


def _describe(nbytes: int, shards: int, layout: str) -> None:
    model = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "?: ?")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    print(f"machine: {model.split(':')[1].strip()}, {os.cpu_count()} cores, {memory:.0f} GiB; {platform.platform()}")
    names = ("jax", "orbax-checkpoint", "tensorstore", "numpy", "deepstack-jax")
    print("versions: Python", platform.python_version(), *(f"{name} {version(name)}" for name in names))
    print(f"source: {nbytes / 1e9:.2f} GB bfloat16 in {shards} files, expert layout {layout}")


def _read(files: list[Path]) -> None:
    """Brings the source into the page cache."""
    for file in files:
        with file.open("rb", buffering=0) as stream:
            while stream.read(COPY_PIECE):
                pass


def _fill_memory(filler: Path) -> None:
    """Leaves little memory free, by reading a file of holes into the page cache."""
    while (free := _free_memory()) > KEPT_FREE:
        size = filler.stat().st_size if filler.exists() else 0
        with filler.open("ab") as stream:
            stream.truncate(size + free - KEPT_FREE // 2)
        _read([filler])


def _free_memory() -> int:
    line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemFree"))
    return int(line.split()[1]) * 1024


def _copy(files: list[Path], target: Path) -> float:
    start = time.perf_counter()
    target.mkdir()
    buffer = bytearray(COPY_PIECE)
    for file in files:
        with file.open("rb", buffering=0) as reading, (target / file.name).open("wb", buffering=0) as writing:
            while got := reading.readinto(buffer):
                writing.write(memoryview(buffer)[:got])
            os.fsync(writing.fileno())
    elapsed = time.perf_counter() - start
    shutil.rmtree(target)
    return elapsed


def _convert(source: Path, target: Path) -> tuple[float, int]:
    """Seconds of the whole child process, its start included, and its peak resident memory in bytes."""
    shutil.rmtree(target, ignore_errors=True)
    os.sync()
    program = (
        "import json, sys; from converters.hf_to_orbax import convert; convert(*sys.argv[1:3]); "
        # not getrusage: its maximum includes the parent's memory from before exec
        "lines = open('/proc/self/status').read().splitlines(); "
        "print(json.dumps(next(int(line.split()[1]) * 1024 for line in lines if line.startswith('VmHWM'))))"
    )
    start = time.perf_counter()
    command = [sys.executable, "-c", program, str(source), str(target)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    elapsed = time.perf_counter() - start
    shutil.rmtree(target)
    return elapsed, json.loads(done.stdout)


if __name__ == "__main__":
    main()
