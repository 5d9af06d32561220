"""The batching engine against the engine of before (`one_at_a_time.py`), on the same weights in one process.

    python benchmarks/engine.py --folder /some/disk [--rounds 5] [--only streams widths prefill gap library ...]

The model has 600M parameters in bfloat16 (`decode.py`'s); its checkpoint is made once in the folder. Every round runs
each side once, in alternating order; figures are medians, and ratios are of medians. Jobs:

    streams  1, 2, 4 and 8 streams of 128 new tokens after 512, at once against one after another: tokens per second
             with prefill, and of the decode phase only
    widths   one stream with decode widths 1 and 8 against the engine of before
    prefill  time to the first token of 8 prompts that come at once; programs that compile after the engine is warm
    gap      the largest gap between two tokens of a running stream while a prompt of 4096 tokens prefills, against one
             chunk and two decode steps measured by themselves
    library  `generate` of 8 prompts of 64 tokens with 32 new ones, and the prefill of one of 512
    prefix   20 prompts that share 2000 tokens with an image, with the prefix cache and without it
    start    seconds from the process's start to an engine that is warm, with a cold and a warm compilation cache
"""

import argparse
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np
from decode import CONFIG, prompt_ids
from measured import chip_name
from one_at_a_time import decode, prefill

import deepstack_jax as dsj
from deepstack_jax.checkpoint import Model, load
from deepstack_jax.engine.core import Engine, NewTokens
from deepstack_jax.engine.options import EngineOptions
from deepstack_jax.engine.request import GenerationPlan, Request
from deepstack_jax.processing.batch import prepare_batch
from deepstack_jax.programs import decode_loop, prefill_chunk
from deepstack_jax.sampling import SamplingParams
from deepstack_jax.testing.random_checkpoint import write_random_checkpoint

CONTEXT, NEW_TOKENS = 512, 128
LONG_PROMPT = 4096
SHARED, ASKED = 2000, 20


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--folder", type=Path, required=True, help="where the made-up checkpoint is kept")
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--only", nargs="+", choices=JOBS, default=list(JOBS))
    options = arguments.parse_args()
    directory = options.folder / "model-bfloat16"
    if not directory.exists():
        write_random_checkpoint(directory, CONFIG, dtype="bfloat16")
    print(f"{chip_name()}, {platform.machine()}, jax {version('jax')}; {time.strftime('%Y-%m-%d')}")
    model = load(directory)
    for name in options.only:
        JOBS[name](model, options.rounds)


def measure_streams(model: Model, rounds: int) -> None:
    print(
        f"{'streams':>8} {'engine':>8} {'before':>8} {'ratio':>6}   {'decode':>8} {'before':>8} {'ratio':>6}  tokens/s"
    )
    engine = warm(model, slots=8)
    for count in (1, 2, 4, 8):
        ids = prompt_ids(8, CONTEXT)[:count]
        ours, theirs = alternate(rounds, lambda ids=ids: together(engine, ids), lambda ids=ids: in_turn(model, ids))
        total = count * NEW_TOKENS
        rates = [total / statistics.median(times) for times in (*zip(*ours, strict=True), *zip(*theirs, strict=True))]
        whole, phase, whole_before, phase_before = rates
        print(
            f"{count:8} {whole:8.1f} {whole_before:8.1f} {whole / whole_before:6.2f}   "
            f"{phase:8.1f} {phase_before:8.1f} {phase / phase_before:6.2f}",
            flush=True,
        )


def measure_widths(model: Model, rounds: int) -> None:
    engine = warm(model, slots=8, decode_widths=(1, 8))
    ids = prompt_ids(1, CONTEXT)
    ours, theirs = alternate(rounds, lambda: together(engine, ids), lambda: in_turn(model, ids))
    for name, side in (("with prefill", 0), ("decode", 1)):
        rate, before = (NEW_TOKENS / statistics.median(run[side] for run in runs) for runs in (ours, theirs))
        print(
            f"one stream, decode widths 1 and 8, {name}: {rate:.1f} tokens/s, before {before:.1f}: {rate / before:.2f}"
        )


def measure_prefill(model: Model, rounds: int) -> None:
    engine = warm(model, slots=8)
    compiled = programs()
    firsts = []
    for _ in range(rounds):
        requests = [request_of(model, row, NEW_TOKENS) for row in prompt_ids(8, CONTEXT)]
        finish(engine, requests)
        firsts.append(sorted(each.first_token_at - each.submitted for each in requests))
    medians = np.median(firsts, axis=0)
    print("8 prompts at once, seconds to the first token of each:", " ".join(f"{x:.2f}" for x in medians))
    print(f"programs compiled after the engine was warm: {programs() - compiled}")


def measure_gap(model: Model, rounds: int) -> None:
    engine, gaps, bounds = warm(model, slots=8), [], []
    for _ in range(rounds):
        running = request_of(model, prompt_ids(1, CONTEXT)[0], 256)
        engine.add(running)
        while not running.made:
            engine.step()
        other, times = request_of(model, prompt_ids(2, LONG_PROMPT)[0], 2), []
        engine.add(other)
        while not other.made:
            times += [time.perf_counter() for event in engine.step() if made_by(event, running)]
        gaps.append(max(np.diff(times)))
        list(engine.run())
        bounds.append(chunk_seconds(engine) + 2 * step_seconds(engine))
    ours, bound = statistics.median(gaps), statistics.median(bounds)
    print(f"largest gap while {LONG_PROMPT} tokens prefill: {ours:.3f} s; a chunk and two steps: {bound:.3f} s")


def measure_library(model: Model, rounds: int) -> None:
    ids = prompt_ids(8, 64)
    options = dsj.SamplingOptions(max_new_tokens=32, eos_token_id=[])

    def before() -> float:
        return timed(lambda: decode(model, prefill(model, ids, 32), 32))

    ours, theirs = alternate(rounds, lambda: timed(lambda: dsj.generate(model, ids, sampling=options)), before)
    report("generate of 8 x 64, 32 new tokens", ours, theirs)
    one = prompt_ids(1, CONTEXT)
    first = dsj.SamplingOptions(max_new_tokens=1, eos_token_id=[])
    ours, theirs = alternate(
        rounds,
        lambda: timed(lambda: dsj.generate(model, one, sampling=first)),
        lambda: timed(lambda: prefill(model, one, 1)),
    )
    report("prefill of 512", ours, theirs)


def measure_prefix(model: Model, rounds: int) -> None:
    ids, arrays = with_image(model)
    for cached in (False, True):
        engine = warm(model, slots=8, prefix_cache=cached)
        work, prompts = [], 0
        for question in range(ASKED):
            row = np.concatenate([ids, prompt_ids(1, 64)[0] + question])
            request = request_of(model, row, 1, **arrays)
            finish(engine, [request])
            work.append(request.first_token_at - request.submitted)
            prompts += request.length
        hits = engine.prefix_caches[0].hit_tokens
        print(
            f"{ASKED} prompts, {SHARED} tokens shared, prefix cache {'on' if cached else 'off'}: {sum(work):.2f} s to "
            f"first tokens (the first {work[0]:.2f}); {hits} of {prompts} tokens found"
        )


def measure_start(model: Model, rounds: int) -> None:
    del rounds  # each start is one run
    assert model.path
    code = (
        "import sys, time; began = time.time()\n"
        "from deepstack_jax.cli.compile_cache import use\n"
        "use(sys.argv[2])\n"
        "from deepstack_jax.checkpoint import load\n"
        "from deepstack_jax.engine.options import EngineOptions\n"
        "model = load(sys.argv[1]); loaded = time.time()\n"
        "EngineOptions(slots=8).build(model).warm_up()\n"
        "print(f'{loaded - began:.1f} s to load, {time.time() - loaded:.1f} s to compile every language program')"
    )
    with tempfile.TemporaryDirectory() as folder:
        for cache in ("cold", "warm"):
            ran = subprocess.run([sys.executable, "-c", code, model.path, folder], capture_output=True, text=True)
            print(f"start, {cache} compilation cache: {ran.stdout.strip() or ran.stderr.strip()[-300:]}", flush=True)


def warm(model: Model, **options: object) -> Engine:
    """An engine whose language programs are compiled."""
    engine = EngineOptions(**options).build(model, LONG_PROMPT + 1024)  # pyright: ignore
    engine.warm_up()
    return engine


def together(engine: Engine, ids: np.ndarray) -> tuple[float, float]:
    """Seconds of all streams at once, and of them those in which decoding went on."""
    engine.prefix_caches[0].clear()
    requests = [request_of(engine.model, row, NEW_TOKENS) for row in ids]
    began = time.perf_counter()
    finish(engine, requests)
    ended = time.perf_counter()
    offset = time.monotonic() - time.perf_counter()
    last_first = max(each.first_token_at for each in requests) - offset
    return ended - began, ended - last_first


def in_turn(model: Model, ids: np.ndarray) -> tuple[float, float]:
    """Seconds of all streams one after another on the engine of before, and of them those of decoding."""
    prefilling = decoding = 0.0
    for row in ids:
        began = time.perf_counter()
        state = jax.block_until_ready(prefill(model, row[None], NEW_TOKENS))
        prefilled = time.perf_counter()
        for until in range(9, NEW_TOKENS + 8, 8):  # a stream's tokens are given out now and then
            state = decode(model, state, min(until, NEW_TOKENS))
            np.asarray(state.last)
        prefilling += prefilled - began
        decoding += time.perf_counter() - prefilled
    return prefilling + decoding, decoding


def request_of(model: Model, ids: np.ndarray, max_new_tokens: int, **arrays: np.ndarray) -> Request:
    batch = prepare_batch(model.config, ids[None], **arrays)
    return Request.of_row(batch, GenerationPlan(SamplingParams.of(1), max_new_tokens))


def finish(engine: Engine, requests: list[Request]) -> None:
    for request in requests:
        engine.add(request)
    for _ in engine.run():
        pass


def made_by(event: object, request: Request) -> bool:
    return isinstance(event, NewTokens) and event.request is request


def chunk_seconds(engine: Engine) -> float:
    """Seconds of the last whole chunk of a long prompt."""
    request = request_of(engine.model, prompt_ids(2, LONG_PROMPT)[0], 1)
    engine.prefix_caches[0].clear()
    engine.add(request)
    times = [time.perf_counter()]
    while not request.made:
        engine.step()
        jax.block_until_ready(engine._state)
        times.append(time.perf_counter())
    list(engine.run())
    return max(np.diff(times[1:]))


def step_seconds(engine: Engine) -> float:
    """Seconds of a decode step."""
    request = request_of(engine.model, prompt_ids(1, CONTEXT)[0], NEW_TOKENS)
    finish(engine, [request])
    return (request.last_token_at - request.first_token_at) / (NEW_TOKENS - 1)


def with_image(model: Model) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Token ids [SHARED] with an image of 448 x 448, and its arrays."""
    grid = np.asarray([[1, 28, 28]])
    pixels = np.random.default_rng(0).standard_normal((int(grid.prod()), 3 * 2 * 16 * 16), np.float32)
    ids = prompt_ids(1, SHARED)[0].copy()
    rows = len(pixels) // 4
    ids[100], ids[101 : 101 + rows], ids[101 + rows] = (
        CONFIG["vision_start_token_id"],
        CONFIG["image_token_id"],
        CONFIG["vision_end_token_id"],
    )
    return ids, {"pixel_values": pixels, "image_grid_thw": grid}


def programs() -> int:
    return prefill_chunk._cache_size() + decode_loop._cache_size()  # pyright: ignore[reportAttributeAccessIssue]


def alternate[T](rounds: int, ours: Callable[[], T], theirs: Callable[[], T]) -> tuple[list[T], list[T]]:
    """Results of each side, one untimed run first."""
    results: tuple[list[T], list[T]] = [], []
    for number in range(-1, rounds):
        sides = list(zip(results, (ours, theirs), strict=True))
        for taken, side in sides if number % 2 else sides[::-1]:
            result = side()
            if number >= 0:
                taken.append(result)
    return results


def timed(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - began


def report(name: str, ours: list[float], theirs: list[float]) -> None:
    one, other = statistics.median(ours), statistics.median(theirs)
    print(f"{name}: {one:.3f} s, before {other:.3f}: {one / other:.2f} of the time")


JOBS = {
    "streams": measure_streams,
    "widths": measure_widths,
    "prefill": measure_prefill,
    "gap": measure_gap,
    "library": measure_library,
    "prefix": measure_prefix,
    "start": measure_start,
}

if __name__ == "__main__":
    main()
