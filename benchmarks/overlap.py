"""Measures the time to the first token of a prompt with many images, split, with and without overlap in the same run.

    python benchmarks/overlap.py [--folder FOLDER] [--images 8] [--side 448] [--rounds 5]

An encode node runs in a process of its own; this process is the language node, with a random checkpoint of 600M
parameters. One form prefills each chunk as soon as its rows have arrived, the other once all rows have. Both encode
image by image and send rows meanwhile. Rounds alternate, images are new each time, and figures are medians. The
timeline shows one round: `encode` ends with the message about an image, `round` is a grant until its last block, and
`prefill` begins with a chunk's launch and ends with the next one's.

"two machines" is arithmetic: with e seconds of encoding and p of prefill per image, n images take n*max(e, p) +
min(e, p) with overlap and n*(e + p) without.
"""

import argparse
import asyncio
import base64
import contextlib
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from decode import CONFIG
from first_token import random_image
from measured import chip_name
from rich.console import Console

import deepstack_jax as dsj
from deepstack_jax.cli.demo_split import serve_process
from deepstack_jax.cli.timeline import Span, draw
from deepstack_jax.disagg.nodes import open_encoder_pool
from deepstack_jax.disagg.wire.payload import pack
from deepstack_jax.engine.options import EngineOptions
from deepstack_jax.engine.request import GenerationPlan
from deepstack_jax.engine.runner import Chunk, Runner
from deepstack_jax.generation import plan_generation
from deepstack_jax.processing.sources import MediaFile
from deepstack_jax.programs import PromptArrays
from deepstack_jax.serving.remote_rows import RemoteRows
from deepstack_jax.testing.random_checkpoint import write_random_checkpoint

POLL_S = 0.002


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="folder for the checkpoint; default: a temporary one")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--side", type=int, default=448, help="of the square images, in pixels")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        checkpoint = folder / "model-bfloat16"
        if not checkpoint.exists():
            write_random_checkpoint(checkpoint, CONFIG, dtype="bfloat16")
        encode = stack.enter_context(serve_process(checkpoint, "encode", ["--cache-bytes", "0"]))
        model = dsj.load(checkpoint, parts=("language_model.",))
        encode.wait()
        print(f"{chip_name()}; jax {jax.__version__}; {options.images} images of {options.side} pixels; bfloat16\n")
        asyncio.run(measure(model, encode.control, options.images, options.side, options.rounds))


async def measure(model: dsj.Model, endpoint: str, images: int, side: int, rounds: int) -> None:
    runner, pool = Runner(model, options=EngineOptions(prefix_cache=False)), open_encoder_pool(model, [endpoint])
    await pool.start()
    forms = {name: RemoteRows(runner, pool, overlap=name == "overlap") for name in ("overlap", "wait")}
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    spans: dict[str, list[Span]] = {}
    try:
        while not pool.num_encoders:
            await asyncio.sleep(0.05)
        for number in range(rounds + 1):  # the first round compiles
            for place, (name, form) in enumerate(forms.items()):
                seeds = range(1000 * number + 100 * place, 1000 * number + 100 * place + images)
                payload = pack("What is in these pictures?", [picture(side, seed) for seed in seeds], [])
                took, spans[name] = await first_token(form, payload)
                seconds[name] += [took] if number else []
    finally:
        await pool.close()
        runner.stop()
    report(seconds, spans, images)


async def first_token(form: RemoteRows, payload: bytes) -> tuple[float, list[Span]]:
    """Seconds to the first token, and the stages of the request."""

    def plan(prompt: PromptArrays) -> GenerationPlan:
        options = dsj.SamplingOptions(max_new_tokens=1, eos_token_id=[])
        return plan_generation(form.runner.model, prompt, options)

    started = time.monotonic()
    launches: list[float] = []
    watching = asyncio.create_task(watch(form.runner, started, launches))
    [chunk] = [chunk async for chunk in form.answer(payload, plan, started + 600)]
    took = time.monotonic() - started
    watching.cancel()
    return took, spans_of(chunk, launches, took)


async def watch(runner: Runner, started: float, launches: list[float]) -> None:
    """Notes when chunks of the only request are launched, in seconds since `started`, until it is cancelled."""
    last = 0
    while True:
        running = list(runner.engine.scheduler.running.values())
        prefilled = running[0].prefilled if running else last
        if prefilled > last:
            launches.append(time.monotonic() - started)
            last = prefilled
        await asyncio.sleep(POLL_S)


def spans_of(chunk: Chunk, launches: list[float], took: float) -> list[Span]:
    split: dict[str, Any] = chunk.transfer_stats or {}
    prefill = zip(launches, [*launches[1:], took], strict=True)
    return [
        *(Span("encode", *interval) for interval in split["encoded"]),
        *(Span(f"round {number}", *interval) for number, interval in enumerate(split["rounds"], 1)),
        *(Span("prefill", *interval) for interval in prefill),
    ]


def report(seconds: dict[str, list[float]], spans: dict[str, list[Span]], images: int) -> None:
    console = Console()
    for name, stages in spans.items():
        console.print(f"{name}: first token after {statistics.median(seconds[name]):.2f} s (median)")
        console.print(draw(stages, console.width))
    ratio = statistics.median(seconds["overlap"]) / statistics.median(seconds["wait"])
    print(f"overlap / wait = {ratio:.2f} (expected at most 0.90)")
    stages = spans["wait"]
    encode, prefill = (
        sum(span.end - span.begin for span in stages if span.stage == stage) / images for stage in ("encode", "prefill")
    )
    two = images * max(encode, prefill) + min(encode, prefill)
    one_by_one = images * (encode + prefill)
    print(
        f"two machines, e {encode:.2f} s, p {prefill:.2f} s: {two:.2f} s / {one_by_one:.2f} s = {two / one_by_one:.2f}"
    )


def picture(side: int, seed: int) -> MediaFile:
    return MediaFile(base64.b64decode(random_image(side, seed).partition(",")[2]), "PNG")


if __name__ == "__main__":
    main()
