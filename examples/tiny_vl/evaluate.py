"""Asks a checkpoint about samples that are not in the training set: `python -m tiny_vl.evaluate CHECKPOINT`.

Everything goes through the public functions of `deepstack_jax`: prepare, generate, decode. An answer counts when it is
the right sentence, letter by letter. Beside each family stand the scores of the same questions

- with another sample's pictures in the place of their own (what can be guessed without seeing),
- without DeepStack, and with each of its levels off (their mergers' outputs set to zero).
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import deepstack_jax as dsj
from deepstack_jax.demo.samples import KINDS, Exchange, Sample, sample
from tiny_vl.batches import Batcher
from tiny_vl.checkpoint import FRAMES_PER_SECOND
from tiny_vl.loss import expert_load

PROMPTS = {"picture": 64, "pair": 32, "clip": 16}  # at a time
LONG = ("describe", "pair_describe")  # families whose answers are several times as long as the others'
NEW_TOKENS = {True: 26, False: 11}
WANTED = {"picture": 97.0, "pair": 95.0, "clip": 95.0}  # exact answers in percent, by kind
WANTED_NUMBER = 92.0


@dataclass(frozen=True)
class Case:
    """A question and the sample that it is about."""

    sample: Sample
    exchange: Exchange

    @property
    def is_long(self) -> bool:
        return self.exchange.family in LONG


@dataclass
class Scores:
    """Questions and right answers by column and family."""

    asked: dict[str, dict[str, int]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(int)))
    right: dict[str, dict[str, int]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(int)))

    def share(self, column: str, family: str) -> float:
        """Right answers in percent; NaN if nothing was asked."""
        asked = self.asked[column][family]
        return 100 * self.right[column][family] / asked if asked else float("nan")


def cases_of(seeds: Iterable[int]) -> list[Case]:
    """All questions of the samples of `seeds`."""
    return [Case(one, exchange) for one in map(sample, seeds) for exchange in one.exchanges]


def messages_of(one: Sample, question: str) -> list[dict[str, Any]]:
    """The conversation that asks `question` of a sample."""
    parts: list[dict[str, Any]] = [{"type": "image", "image": image} for image in one.images]
    if one.video:
        parts.append({"type": "video", "video": list(one.video), "fps": FRAMES_PER_SECOND})
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def inputs_of(model: dsj.Model, cases: Sequence[Case], media: Sequence[Sample] | None = None) -> dict[str, Any]:
    """The arrays of `cases`, with the media of `media` in place of their own if given."""
    shown = [case.sample for case in cases] if media is None else media
    return dsj.prepare(
        model, [messages_of(one, case.exchange.question) for one, case in zip(shown, cases, strict=True)]
    )


def answers(model: dsj.Model, cases: Sequence[Case]) -> list[str]:
    """The model's answers, all cases in one batch."""
    return _decode(model, inputs_of(model, cases), any(case.is_long for case in cases))


def without_levels(model: dsj.Model, levels: Iterable[int]) -> dsj.Model:
    """`model` whose DeepStack levels `levels` add nothing."""
    off = {f"visual.deepstack_merger_list.{level}.linear_fc2.{part}" for level in levels for part in ("weight", "bias")}
    return replace(model, params={name: value * 0 if name in off else value for name, value in model.params.items()})


def evaluate(
    model: dsj.Model,
    cases: Sequence[Case],
    advance: Callable[[int], None] = lambda n: None,
    compare_every: int = 1,
) -> Scores:
    """Asks every case, and those of every `compare_every`th batch in all ways of the table.

    Cases of one kind and length share batches; `advance` is called with the number of cases done.
    """
    levels = range(model.config.num_deepstack_levels)
    variants = {"no deepstack": without_levels(model, levels)}
    variants |= {f"no level {level}": without_levels(model, [level]) for level in levels}
    scores = Scores()
    for number, (batch, size) in enumerate(batches_of(cases)):
        inputs = inputs_of(model, batch)
        ways = {"exact": (model, inputs)}
        if number % compare_every == 0:
            ways["swapped"] = model, inputs_of(model, batch, _others(batch, cases))
            ways |= {name: (variant, inputs) for name, variant in variants.items()}
        for name, (asked, arrays) in ways.items():
            found = _decode(asked, arrays, batch[0].is_long)
            for case, answer in zip(batch[:size], found, strict=False):
                scores.asked[name][case.exchange.family] += 1
                scores.right[name][case.exchange.family] += answer == case.exchange.answer
        advance(size)
    return scores


def batches_of(cases: Sequence[Case]) -> Iterable[tuple[list[Case], int]]:
    """(a full batch, how many of its first cases count): the rest of a last batch repeats its first case."""
    groups: dict[tuple[str, bool], list[Case]] = defaultdict(list)
    for case in cases:
        groups[case.sample.kind, case.is_long].append(case)
    for (kind, _), group in groups.items():
        for start in range(0, len(group), PROMPTS[kind]):
            batch = group[start : start + PROMPTS[kind]]
            yield batch + [batch[0]] * (PROMPTS[kind] - len(batch)), len(batch)


def load_of(model: dsj.Model, first_seed: int, batches: int) -> np.ndarray:
    """Each expert's load, 1 where even, [L, E]: over media, questions and answers of some batches of each kind."""
    assert model.path is not None
    batcher = Batcher(model.path, model.config)
    found = [
        expert_load(model.config, model.params, batcher.batch(kind, first_seed + i * 64).arrays())
        for kind in KINDS
        for i in range(batches)
    ]
    total = np.sum(found, axis=0)
    return total / total.mean(axis=1, keepdims=True)


def table_of(scores: Scores) -> Table:
    """The scores, one family per row."""
    columns = [name for name in scores.right if name not in ("exact", "swapped")]
    table = Table(title="exact answers, %")
    for name in ("family", "questions", "exact", "wanted", "compared", "another picture", *columns):
        table.add_column(name, justify="left" if name == "family" else "right")
    for family, asked in scores.asked["exact"].items():
        exact, *others = (f"{scores.share(name, family):.1f}" for name in ("exact", "swapped", *columns))
        compared = scores.asked["swapped"][family]
        table.add_row(family, str(asked), exact, f"{wanted(family):.0f}", str(compared), *others)
    return table


def wanted(family: str) -> float:
    """The share of exact answers that a family must reach, in percent."""
    return WANTED_NUMBER if family == "number" else WANTED.get(family.split("_")[0], WANTED["picture"])


def _others(batch: Sequence[Case], cases: Sequence[Case]) -> list[Sample]:
    """For each case the media of another sample of its kind: the next one among all cases."""
    kind = batch[0].sample.kind
    of_kind = list({id(case.sample): case.sample for case in cases if case.sample.kind == kind}.values())
    place = {id(one): i for i, one in enumerate(of_kind)}
    return [of_kind[(place[id(case.sample)] + 1) % len(of_kind)] for case in batch]


def _decode(model: dsj.Model, inputs: dict[str, Any], is_long: bool) -> list[str]:
    return dsj.decode(model, dsj.generate(model, **inputs, max_new_tokens=NEW_TOKENS[is_long]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--samples", type=int, default=2000, help="pictures, pairs and clips together")
    parser.add_argument("--first-seed", type=int, default=0, help="seeds from 1000000 on are training's")
    parser.add_argument("--compare-every", type=int, default=4, help="every how many batches are asked in all ways")
    args = parser.parse_args()
    console, began = Console(width=150), time.monotonic()
    model = dsj.load(args.checkpoint, dtype="float32")
    cases = cases_of(range(args.first_seed, args.first_seed + args.samples))
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(f"{len(cases)} questions", total=len(cases))
        scores = evaluate(model, cases, lambda n: progress.advance(task, n), args.compare_every)
    console.print(table_of(scores))
    load = load_of(model, args.first_seed, batches=max(1, args.samples // 500))
    for layer, of_layer in enumerate(load):
        console.print(f"layer {layer}: experts' load, 1 where even: {' '.join(f'{x:.2f}' for x in of_layer)}")
    short = [family for family in scores.asked["exact"] if scores.share("exact", family) < wanted(family)]
    console.print(f"families below what is wanted: {', '.join(short) or 'none'}")
    console.print(f"{len(cases)} questions about {args.samples} samples, {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
