"""Trains tiny_vl: `python -m tiny_vl.train --out RUN --minutes 90`.

One process draws samples and makes batches ahead, this one runs the steps. The newest state is kept in RUN/state, from
which the same command goes on; with `--steps` a run that was interrupted ends with the bits of one that was not.
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Iterator
from multiprocessing import get_context, parent_process
from pathlib import Path
from queue import Empty, Full
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepstack_jax.config import ModelConfig
from deepstack_jax.demo.samples import KINDS
from deepstack_jax.models.parameters import Params
from tiny_vl.batches import SEEDS, Batcher, TrainingBatch
from tiny_vl.checkpoint import model_config
from tiny_vl.runs import FIRST_SEED, Run, export, open_run, plot, restore, save
from tiny_vl.steps import TrainState, check_step, rate, train_step

# Of the steps. Pictures say most about what shapes look like, so they come first.
EARLY, EARLY_SHARES = 900, {"picture": 0.8, "pair": 0.1, "clip": 0.1}
SHARES = {"picture": 0.35, "pair": 0.45, "clip": 0.2}
AHEAD = 6  # batches made ahead
CHECKED = {"picture": 8, "pair": 6, "clip": 6}  # batches of held-out samples that a check asks
CHECK_SEED = 500_000


def train(directory: Path, minutes: float | None, steps: int | None, check_minutes: float, stop_at: int | None) -> None:
    """Runs until `steps` or for `minutes` in all, from the newest state in `directory` if there is one.

    A state is kept, and held-out samples are asked, every `check_minutes`; `stop_at` ends earlier, to go on later.
    """
    run, config = open_run(directory), model_config()
    # a resumed run needs not compile again
    jax.config.update("jax_compilation_cache_dir", str(run.directory / "compiled"))
    state, elapsed = restore(run, config)
    batcher = Batcher(run.companions, config)
    held_out = [
        batcher.batch(kind, CHECK_SEED + SEEDS * i, densely=False)
        for kind, count in CHECKED.items()
        for i in range(count)
    ]
    began, first = time.monotonic() - elapsed, int(state.step)
    last_check = time.monotonic()
    smooth: dict[str, float] = {}
    for step, batch in zip(range(first, stop_at or 10**9), prepared(run, first), strict=False):
        spent = time.monotonic() - began
        progress = step / steps if steps else spent / (60 * (minutes or 1))
        if progress >= 1:
            break
        learning_rate = rate(step, progress)
        state, seen = train_step(config, state, batch.arrays(), jnp.float32(learning_rate))
        loss = float(seen["answers"])
        found = {batch.kind: loss} | {name: float(seen[name]) for name in ("balance", "sight")}
        smooth |= {name: 0.95 * smooth.get(name, value) + 0.05 * value for name, value in found.items()}
        run.history.append({"step": step, "kind": batch.kind, "loss": round(loss, 5), "seconds": round(spent, 1)})
        if step % 10 == 0 or step - first < 3:
            report(step, smooth, np.asarray(seen["load"]), learning_rate, spent, time.monotonic() - began, progress)
        if time.monotonic() - last_check > 60 * check_minutes:
            keep_and_check(run, config, state, held_out, time.monotonic() - began)
            last_check = time.monotonic()
    keep_and_check(run, config, state, held_out, time.monotonic() - began)
    print(f"wrote {export(run.directory)}")


def keep_and_check(
    run: Run, config: ModelConfig, state: TrainState, held_out: list[TrainingBatch], elapsed: float
) -> None:
    """Asks the held-out samples, notes and prints the answers, and keeps the state."""
    exact = check(config, state.average, held_out)
    print("exact " + " ".join(f"{name} {100 * share:.1f}" for name, share in exact.items()), flush=True)
    run.history.append({"step": int(state.step), "exact": exact})
    save(run, state, elapsed)
    plot(run)


def check(config: ModelConfig, params: Params, batches: list[TrainingBatch]) -> dict[str, float]:
    """The share of exact answers by family, with right answers so far as context: that is greedy decoding's share."""
    right: dict[str, list[bool]] = defaultdict(list)
    for batch in batches:
        exact = check_step(config, params, batch.arrays())["exact"]
        for name, rows in batch.rows.items():
            for family, is_exact in zip(rows.families, np.asarray(exact[name]), strict=True):
                if family:
                    right[family].append(bool(is_exact))
    return {family: sum(found) / len(found) for family, found in sorted(right.items())}


def report(
    step: int, smooth: dict[str, float], load: np.ndarray, rate: float, before: float, now: float, progress: float
) -> None:
    """One line: losses, the share of things that visual tokens tell, the experts' least and most load (1 is even)."""
    shown = " ".join(f"{name} {value:.3f}" for name, value in smooth.items())
    experts = load.shape[1]
    left = now * (1 - progress) / max(progress, 1e-6) / 60
    print(
        f"step {step} {shown} load {load.min() * experts:.2f}-{load.max() * experts:.2f} rate {rate:.1e} "
        f"{now - before:.2f} s/step {100 * progress:.1f}% {left:.0f} min left",
        flush=True,
    )


def kind_of(step: int) -> str:
    """The kind of a step's samples: drawn by the step's number, so that a resumed run goes on with the same."""
    shares = EARLY_SHARES if step < EARLY else SHARES
    place = np.random.default_rng(step).random()
    return KINDS[int(np.searchsorted(np.cumsum(list(shares.values()))[:-1], place, side="right"))]


def prepared(run: Run, first_step: int) -> Iterator[TrainingBatch]:
    """The batches of the steps from `first_step` on, made ahead by a process of its own."""
    context = get_context("spawn")
    queue = context.Queue(AHEAD)
    worker = context.Process(target=_prepare, args=(queue, str(run.companions), first_step), daemon=True)
    worker.start()
    try:
        while True:
            try:
                yield queue.get(timeout=5)
            except Empty:
                if not worker.is_alive():
                    raise RuntimeError("the process that makes batches has ended: its error stands above") from None
    finally:
        worker.terminate()


def _prepare(queue: Any, companions: str, step: int) -> None:
    """Puts the batches of `step`, `step + 1`, ... into the queue for as long as the process that asked lives."""
    queue.cancel_join_thread()  # or this process would wait for ever for a reader that was killed
    batcher, parent = Batcher(companions, model_config()), parent_process()
    while True:
        batch = batcher.batch(kind_of(step), FIRST_SEED + SEEDS * step)
        while batch is not None and parent is not None:
            if not parent.is_alive():
                return
            try:
                queue.put(batch, timeout=5)
                batch = None
            except Full:
                pass
        step += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory of the run")
    parser.add_argument("--minutes", type=float, help="how long to train")
    parser.add_argument("--steps", type=int, help="how long to train, in place of --minutes")
    parser.add_argument("--check-minutes", type=float, default=5, help="minutes between states kept and checks")
    parser.add_argument("--stop-at", type=int, help="stop before this step, to go on later")
    parser.add_argument("--export", action="store_true", help="write the newest state as RUN/checkpoint and end")
    args = parser.parse_args()
    if args.export:
        print(export(args.out))
        return
    if (args.minutes is None) == (args.steps is None):
        parser.error("give either --minutes or --steps")
    train(args.out, args.minutes, args.steps, args.check_minutes, args.stop_at)


if __name__ == "__main__":
    main()
