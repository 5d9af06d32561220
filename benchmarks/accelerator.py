"""What this chip does with the project, in one run: every kernel against float64, and then how fast everything is.

    python benchmarks/accelerator.py [--out FILE.md] [--minutes 8] [--only kernels bridge ...] [--layers 48]

If a kernel is wrong, the run ends after `check` with exit code 1, because what is wrong is not worth timing. Sections:

    check    each backend's error against float64 on small shapes, at most a tenth above the plain form's, which rounds
             as often; the demo's answers whole, and split between two processes on the chip
    kernels  experts, deepstack-add and attention at the sizes of Qwen3-VL-30B-A3B, beside XLA, tokamax, cuDNN and
             PyTorch where these are installed
    bridge   rows from one process's device memory through Mooncake to another's, bits compared, beside copies between
             device and pinned host memory. A TPU belongs to one process, so there the rows end in the other's host
    model    prefill and decode of one stream: 30B-A3B, or as many of its layers as fit
    engine   tokens per second at 1, 8 and 32 streams, with prefill and in the decode phase

Each figure stands beside its bound: bytes over the bandwidth and operations over the product rate, both measured in
this run. The report is written after each section, so that a run which is cut short leaves what it has. A section that
would begin after `--minutes` is left out. On a CPU everything is small, which only tests this program.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the bridge's other process wants its share of a GPU
sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
from kernels import Measured, attention_specs, measure_add, measure_attention, measure_moe, versions
from measured import bandwidth, best_rate, chip_name, median_seconds

from deepstack_jax.known_models import KNOWN_MODELS
from deepstack_jax.models.parameters import abstract_params
from deepstack_jax.models.registry import parse_config
from pallas_kernels import attention as attention_module
from pallas_kernels import deepstack_add as add_module
from pallas_kernels import fused_moe as moe_module
from pallas_kernels import norm_rope_append as append_module
from pallas_kernels.attention import arg_specs as attention_arg_specs
from pallas_kernels.attention import paged_attention, ranged_attention
from pallas_kernels.deepstack_add import arg_specs as add_arg_specs
from pallas_kernels.deepstack_add import deepstack_add
from pallas_kernels.fused_moe import arg_specs as moe_arg_specs
from pallas_kernels.fused_moe import fused_moe
from pallas_kernels.norm_rope_append import arg_specs as append_arg_specs
from pallas_kernels.norm_rope_append import norm_rope_append
from tests import float64

ON_CPU = jax.default_backend() == "cpu"
ROUNDS = 5
OF_OTHER_CHIPS = {"tpu": "mosaic_gpu", "gpu": "mosaic_tpu", "cpu": "mosaic"}  # backends that can't run on a platform
LAYERS = (48, 36, 24, 12, 6, 3)
EPS = 1e-6
PLAIN_ERROR = 0.01  # of values around 1, in bfloat16
FREE = 0.7  # of the chip's memory: weights may take this much, and the cache and temporaries the rest


class Report:
    """Markdown, printed as it grows and written to a file after each section."""

    def __init__(self, path: Path | None):
        self._path, self._text = path, ""

    def add(self, *lines: str) -> None:
        text = "\n".join(lines) + "\n"
        self._text += text
        print(text, end="", flush=True)
        if self._path:
            self._path.write_text(self._text)

    def table(self, columns: str, rows: list[str]) -> None:
        count = columns.count("|") + 1
        self.add("", f"| {columns} |", "|" + "---|" * count, *(f"| {row} |" for row in rows))


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--out", type=Path, help="file of the report")
    arguments.add_argument("--minutes", type=float, default=8.0)
    arguments.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    arguments.add_argument("--layers", type=int, help="of 30B-A3B; by default as many as fit")
    options = arguments.parse_args()
    began = time.monotonic()
    report = Report(options.out)
    report.add(f"# {chip_name()}, {time.strftime('%Y-%m-%d')}", "", f"{platform.machine()}; {versions()}.")
    for name in options.only:
        spent = time.monotonic() - began
        if spent > 60 * options.minutes:
            report.add("", f"## {name}", "", f"Left out: {spent:.0f} s have passed.")
            continue
        report.add("", f"## {name}")
        try:
            right = SECTIONS[name](report, options)
        except Exception as error:  # the other sections' figures are wanted all the same
            report.add("", f"Failed: {type(error).__name__}: {str(error)[:1000]}")
            right = name != "check"
        report.add("", f"({time.monotonic() - began - spent:.0f} s)")
        if not right:
            return 1
    return 0


def check(report: Report, _options: argparse.Namespace) -> bool:
    rows, wrong = [], []
    for op, spec, backend, run in kernel_cases():
        try:
            error, of_plain = run()
        except NotImplementedError:
            continue  # a backend may refuse; another one is chosen then
        except Exception as failed:
            error = of_plain = float("inf")
            report.add("", f"{op} {spec} {backend}: {type(failed).__name__}: {str(failed).splitlines()[0][:300]}")
        right = error <= 1.1 * of_plain and of_plain <= PLAIN_ERROR
        print(op, spec, backend, error, file=sys.stderr, flush=True)  # what came last, should the chip's driver crash
        rows.append(f"{op} | {spec} | {backend} | {error:.2e} | {of_plain:.2e} | {'yes' if right else '**no**'}")
        if not right:
            wrong.append(f"{op} {spec} {backend}")
    report.table("op | shape | backend | error | of the plain form | right", rows)
    report.add("", f"Wrong: {'; '.join(wrong)}." if wrong else f"All {len(rows)} are right.")
    split = subprocess.run(
        [sys.executable, "-m", "deepstack_jax", "demo", "--json", "--seed", "1"], capture_output=True, text=True
    )
    if split.returncode:
        report.add("", f"The demo failed: {split.stderr.strip()[-600:]}")
        return False
    shown = json.loads(split.stdout)
    if shown["tokens_split"] is None:
        report.add("", f"The demo's answers are right; nothing was split: {shown['missing']}.")
    else:
        count = sum(map(len, shown["tokens_split"]))
        report.add("", f"The demo's {count} tokens whole and split between two processes are equal.")
    return not wrong


def kernel_cases() -> Iterator[tuple[str, str, str, Callable[[], tuple[float, float]]]]:
    """(op, shape, backend, its error and the plain form's)."""
    moe_specs = [replace(moe_arg_specs.TILED, tokens=tokens) for tokens in (1, 7, 40, 200)]
    moe_specs += [replace(moe_arg_specs.TILED, tokens=200, routing=routing) for routing in moe_arg_specs.ROUTINGS[1:]]
    moe_specs += [replace(moe_arg_specs.QWEN3_VL_30B_A3B, experts=16, tokens=tokens) for tokens in (1, 64, 65, 300)]
    for spec in moe_specs[: 3 if ON_CPU else None]:
        args = spec.arrays("bfloat16")
        exact = float64.fused_moe(*args, read_as=jnp.bfloat16)
        yield from cases("fused_moe", str(spec), fused_moe, moe_module.BACKENDS, args, exact)
    for spec in add_arg_specs.SMALL[1:]:
        args = spec.arrays("float32", "bfloat16")
        add = partial(deepstack_add, level=1)
        yield from cases("deepstack_add", str(spec), add, add_module.BACKENDS, args, float64.deepstack_add(*args, 1))
    for spec in attention_arg_specs.SMALL_PAGED + attention_arg_specs.SMALL_RANGED:
        args = spec.arrays("bfloat16")
        paged = isinstance(spec, attention_arg_specs.PagedArgSpec)
        op, exact = (
            (paged_attention, float64.paged_attention) if paged else (ranged_attention, float64.ranged_attention)
        )
        yield from cases(op.__name__, str(spec), op, attention_module.BACKENDS, args, exact(*args))
    for spec in append_arg_specs.SMALL:
        args = spec.arrays("bfloat16")
        exact = float64.norm_rope_append(*args, eps=EPS)
        active = np.asarray(args[-1])[:, 0] >= 0
        exact = np.concatenate(exact, axis=1)[active]
        yield from cases("norm_rope_append", str(spec), partial(appended, active), append_module.BACKENDS, args, exact)


def appended(active: np.ndarray, *args: jax.Array, backend: str | None) -> jax.Array:
    """The queries of active rows, and what they appended to the pages."""
    query, *pages = norm_rope_append(*args, eps=EPS, backend=backend)
    return jnp.concatenate([query, *(append_arg_specs.at_slots(x, *args[-2:]) for x in pages)], axis=1)[active]


def cases(
    op: str, spec: str, call: Callable[..., jax.Array], backends: Any, args: tuple[jax.Array, ...], exact: np.ndarray
) -> Iterator[tuple[str, str, str, Callable[[], tuple[float, float]]]]:
    of_plain: list[float] = []

    def error(backend: str | None) -> float:
        out = np.asarray(jax.jit(partial(call, backend=backend))(*args)).astype(np.float64)
        return float(np.sqrt(np.mean((out - exact) ** 2)))

    def run(backend: str | None) -> tuple[float, float]:
        if not of_plain:
            of_plain.append(error("xla"))
        return error(backend), of_plain[0]

    others = OF_OTHER_CHIPS[jax.default_backend()]
    for backend in (None, *(name for name in backends if name != "xla" and others not in name)):
        yield op, spec, backend or "automatic", partial(run, backend)


@cache
def speeds() -> tuple[float, float]:
    """Bytes per second that this chip reads, and operations per second of its bfloat16 products."""
    return bandwidth(), best_rate("bfloat16")


def kernels(report: Report, _options: argparse.Namespace) -> bool:
    speed = speeds()
    report.add("", f"Measured: {speed[0] / 1e9:.0f} GB/s read, {speed[1] / 1e12:.1f} TFLOP/s of bfloat16 products.")
    model = replace(moe_arg_specs.QWEN3_VL_30B_A3B, experts=16) if ON_CPU else moe_arg_specs.QWEN3_VL_30B_A3B
    found = []
    for tokens in (1, 8) if ON_CPU else (1, 8, 64, 512, 4096):
        found.append(measure_moe(replace(model, tokens=tokens), "bfloat16", *speed, ROUNDS))
    for spec in attention_specs("600M" if ON_CPU else "30B-A3B"):
        found.append(measure_attention(spec, "bfloat16", *speed, ROUNDS))
    found.append(measure_add(add_arg_specs.REAL[1], "bfloat16", speed[0], ROUNDS))
    report.table("kernel | backend | time, ms | of the bound | error", [row for each in found for row in rows_of(each)])
    return True


def rows_of(found: Measured) -> Iterator[str]:
    title = found.title
    for each in found.timings:
        if each.refused and OF_OTHER_CHIPS[jax.default_backend()] in each.name:
            continue
        name = f"**{each.name}**" if each.automatic else each.name
        if each.refused:
            yield f"{title} | {name} | {each.refused.replace('|', '/')} | |"
        else:
            error = "" if each.error is None else f"{each.error:.1e}"
            yield f"{title} | {name} | {1e3 * each.seconds:.3f} | {each.share:.0%} | {error}"
        title = ""


def bridge(report: Report, _options: argparse.Namespace) -> bool:
    rows = jax.random.normal(jax.random.key(0), (4096, 8192), jnp.bfloat16)
    if not ON_CPU:
        pinned = rows.sharding.with_memory_kind("pinned_host")
        on_host = jax.block_until_ready(jax.device_put(rows, pinned))
        for way, source, place in (("to", rows, pinned), ("from", on_host, rows.sharding)):
            seconds = median_seconds(lambda source=source, place=place: jax.device_put(source, place), ROUNDS)
            report.add("", f"A copy {way} pinned host memory: {rows.nbytes / seconds / 1e9:.2f} GB/s.")
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder) / "figures.json"
        command = [sys.executable, str(Path(__file__).with_name("transfer.py")), "--json", str(figures)]
        command += ["--tokens", "1024", "4096", "--rounds", str(ROUNDS)]
        here = os.environ.get("JAX_PLATFORMS") or jax.default_backend().replace("gpu", "cuda,cpu")
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": here})
        if done.returncode:
            raise RuntimeError(done.stderr.strip()[-1000:])
        measured = json.loads(figures.read_text())["figures"]
    report.table(
        "visual tokens | MB | bridge, GB/s | with a tag | encrypted | plain Mooncake writes "
        "| milliseconds: device, sums, wire, copying",
        [
            f"{each['tokens']} | {each['bytes'] / 1e6:.0f} | {each['bridge_gb_s']:.2f} | {each['tag_gb_s']:.2f} "
            f"| {each['encryption_gb_s']:.2f} | {max(each['blocking_gb_s'], each['polled_gb_s']):.2f} | "
            + ", ".join(
                f"{1e3 * each['stage_seconds'][name]:.1f}" for name in ("device", "checksums", "wire", "copying_out")
            )
            for each in measured
        ],
    )
    report.add("", "All rows arrived bit for bit.")  # transfer.py ends with an error otherwise
    return True


_models: dict[int, Any] = {}


def the_model(options: argparse.Namespace) -> Any:
    """30B-A3B with random weights, or its first layers; on a CPU a small model."""
    from decode import CONFIG, made_on_chip

    config = CONFIG if ON_CPU else KNOWN_MODELS["30b-a3b"]
    layers = options.layers or (3 if ON_CPU else next(layers for layers in LAYERS if fits(with_layers(config, layers))))
    if layers not in _models:
        _models[layers] = made_on_chip(with_layers(config, layers), "bfloat16")
    return _models[layers]


def with_layers(config: dict[str, Any], layers: int) -> dict[str, Any]:
    return config | {"text_config": config["text_config"] | {"num_hidden_layers": layers}}


def fits(config: dict[str, Any]) -> bool:
    stats = jax.local_devices()[0].memory_stats() or {}
    size = sum(2 * leaf.size for leaf in abstract_params(parse_config(config)).values())
    return size <= FREE * stats.get("bytes_limit", 16e9)


def model(report: Report, options: argparse.Namespace) -> bool:
    from decode import NEW_TOKENS, our_decode, our_prefill, prefill_flops, prompt_ids, step_bytes

    of, speed = the_model(options), speeds()
    report.add(
        "", f"{of.config.text.num_hidden_layers} layers, {sum(x.nbytes for x in of.params.values()) / 1e9:.1f} GB."
    )
    lengths = (512,) if ON_CPU else (512, 4096)
    rows = []
    for length in lengths:
        ids = prompt_ids(1, length)
        jobs = (
            ("prefill", length, partial(our_prefill, of, ids, max(lengths)), prefill_flops(of, length) / speed[1]),
            (
                "decode after",
                NEW_TOKENS,
                partial(our_decode, of, ids, max(lengths)),
                NEW_TOKENS * step_bytes(of, 1, length) / speed[0],
            ),
        )
        for name, amount, run, bound in jobs:
            begun = time.monotonic()
            run()
            first = time.monotonic() - begun
            seconds = statistics.median(run() for _ in range(ROUNDS))
            rows.append(
                f"{name} {length} | {amount / seconds:.1f} | {amount / bound:.1f} | {bound / seconds:.0%} | {first:.0f}"
            )
    report.table("one stream | tokens/s | bound | of the bound | first run, s", rows)
    return True


def engine(report: Report, options: argparse.Namespace) -> bool:
    from decode import prompt_ids
    from engine import CONTEXT, NEW_TOKENS, together

    from deepstack_jax.engine.options import EngineOptions

    streams = (1, 4) if ON_CPU else (1, 8, 32)
    running = EngineOptions(slots=max(streams), chunk=CONTEXT).build(the_model(options), 2 * CONTEXT)
    rows = []
    for count in streams:
        ids = prompt_ids(max(streams), CONTEXT)[:count]
        together(running, ids)
        whole, decoding = zip(*(together(running, ids) for _ in range(3)), strict=True)
        total = count * NEW_TOKENS
        rows.append(f"{count} | {total / statistics.median(whole):.1f} | {total / statistics.median(decoding):.1f}")
    report.table("streams | tokens/s with prefill | in the decode phase", rows)
    report.add("", f"{max(streams)} slots, prompts of {CONTEXT} tokens, {NEW_TOKENS} new ones each.")
    return True


SECTIONS: dict[str, Callable[[Report, argparse.Namespace], bool]] = {
    "check": check,
    "kernels": kernels,
    "bridge": bridge,
    "model": model,
    "engine": engine,
}

if __name__ == "__main__":
    sys.exit(main())
