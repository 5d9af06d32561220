"""A run's directory: its tokenizer, its newest state, its history and plot, and the checkpoint made of it."""

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tokenizers import Tokenizer

from deepstack_jax.config import ModelConfig
from deepstack_jax.demo.samples import KINDS, draw
from tiny_vl.checkpoint import model_config, train_tokenizer, write_checkpoint, write_companions
from tiny_vl.steps import TrainState, initial_state

FIRST_SEED = 1_000_000  # of training: seeds below are for evaluation


@dataclass
class Run:
    """A directory, and the history of what was trained there: one entry per step, and one per check."""

    directory: Path
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def state(self) -> Path:
        return self.directory / "state"

    @property
    def fresh(self) -> Path:
        """Where a state is written before it replaces the kept one."""
        return self.directory / "state.new"

    @property
    def companions(self) -> Path:
        return self.directory / "companions"


def open_run(directory: Path) -> Run:
    """The run in `directory`; a new one gets its tokenizer, trained on what a few thousand seeds ask and answer."""
    run = Run(directory.absolute())
    if not (run.companions / "tokenizer.json").exists():
        texts = spoken_texts(range(FIRST_SEED, FIRST_SEED + 3000))
        write_companions(run.companions, train_tokenizer(texts), "float32")
    return run


def spoken_texts(seeds: Iterable[int]) -> list[str]:
    """What a tokenizer has to say: questions and answers of each kind's samples, and what stands around them."""
    texts = ["user\n", "assistant\n", "system\n", *(f"<{t}.2 seconds>" for t in range(8))]
    for kind in KINDS:
        texts += [text for seed in seeds for e in draw(seed, kind).exchanges for text in (e.question, e.answer)]
    return texts


def save(run: Run, state: TrainState, elapsed: float) -> None:
    """Replaces the kept state; at any moment one that is whole is there."""
    from orbax.checkpoint import v1 as ocp

    shutil.rmtree(run.fresh, ignore_errors=True)
    ocp.save(str(run.fresh), _tree(state))
    shutil.rmtree(run.state, ignore_errors=True)
    run.fresh.rename(run.state)
    (run.directory / "history.json").write_text(json.dumps({"elapsed": elapsed, "history": run.history}))


def restore(run: Run, config: ModelConfig) -> tuple[TrainState, float]:
    """(the newest state, seconds spent so far); a new one if nothing was kept."""
    from orbax.checkpoint import v1 as ocp

    state = initial_state(config)
    place = run.state if run.state.exists() else run.fresh  # killed between the two steps of `save`
    if not place.exists():
        return state, 0.0
    kept = json.loads((run.directory / "history.json").read_text())
    run.history = kept["history"]
    leaves = ocp.load(str(place), _tree(state))
    structure = jax.tree.structure(state)
    return jax.tree.unflatten(structure, [leaves[key] for key in sorted(leaves)]), kept["elapsed"]


def export(directory: Path, dtype: str = "bfloat16") -> Path:
    """Writes the averaged weights of the newest state as the Hugging Face directory RUN/checkpoint."""
    run = open_run(directory)
    state, _ = restore(run, model_config())
    out = run.directory / "checkpoint"
    params = {name: np.asarray(value) for name, value in state.average.items()}
    write_checkpoint(out, params, Tokenizer.from_file(str(run.companions / "tokenizer.json")), dtype)
    return out


def plot(run: Run) -> None:
    """RUN/loss.png: the loss of each kind of samples, and the share of exact answers where it was checked."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, figsize=(9, 9), sharex=True)
    for kind in KINDS:
        points = [(entry["step"], entry["loss"]) for entry in run.history if entry.get("kind") == kind]
        if points:
            steps, losses = np.array(points).T
            width = min(len(losses), 25)
            smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
            above.plot(steps[width - 1 :], smooth, label=kind)
    above.set_yscale("log")
    above.set_ylabel("cross-entropy of an answer's token")
    above.legend()
    checks = [entry for entry in run.history if "exact" in entry]
    for i, family in enumerate(checks[-1]["exact"] if checks else ()):
        shares = [100 * check["exact"].get(family, np.nan) for check in checks]
        style = ("-", "--")[i // 10]  # there are ten colors
        below.plot([check["step"] for check in checks], shares, style, label=family)
    below.set_xlabel("step")
    below.set_ylabel("exact answers, %")
    if checks:
        below.legend(fontsize=7, ncols=3)
    figure.tight_layout()
    figure.savefig(run.directory / "loss.png", dpi=100)
    pyplot.close(figure)


def _tree(state: TrainState) -> dict[str, Any]:
    """The state's arrays by their number: what Orbax needs no types of ours for."""
    return {f"{i:05d}": leaf for i, leaf in enumerate(jax.tree.leaves(state))}
