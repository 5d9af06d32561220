"""Makes docs/tiny-vl.md: `python -m tiny_vl.gallery CHECKPOINT docs`.

The page shows held-out samples, and what a checkpoint answers with all of its DeepStack levels, with each
one off, and with none.
"""

import argparse
from pathlib import Path

from PIL import Image

import deepstack_jax as dsj
from deepstack_jax.demo.samples import Sample, sample
from tiny_vl.evaluate import Case, answers, without_levels

SHOWN = {"picture": (0, 1, 2, 3), "pair": (0, 1), "clip": (0, 1)}  # seeds
INTRODUCTION = """\
# What tiny-vl sees

`tiny-vl` is the checkpoint that comes with the package: {parameters:.1f} million parameters, {layers} decoder layers
of {experts} experts, a vision encoder of {depth} layers, {levels} DeepStack levels. It was trained only on drawn
pictures, pairs and clips ([examples/tiny_vl](../examples/tiny_vl/README.md)).

```sh
deepstack-jax demo                       # a new picture each time, in the terminal
deepstack-jax generate tiny-vl --prompt "What color is the star?" --image docs/tiny-vl/picture-0.png
```

Below are the first held-out samples. The columns are its answers with all DeepStack levels, with one level switched off
(its rows set to zero), and with none. Wrong answers are in italics.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a directory, or tiny-vl")
    parser.add_argument("docs", type=Path, help="the folder of the page")
    args = parser.parse_args()
    model = dsj.load(args.checkpoint, dtype="float32")
    (args.docs / "tiny-vl").mkdir(exist_ok=True)
    page = introduction(model)
    for kind, seeds in SHOWN.items():
        for seed in seeds:
            one, name = sample(seed, kind), f"{kind}-{seed}"
            strip(one).save(args.docs / "tiny-vl" / f"{name}.png", optimize=True)
            page += f"\n## {kind.capitalize()} {seed}\n\n![{alternative(one)}](tiny-vl/{name}.png)\n\n" + table(
                model, one
            )
    (args.docs / "tiny-vl.md").write_text(page)


def introduction(model: dsj.Model) -> str:
    """The page's start, with the model's sizes."""
    config = model.config
    assert config.vision is not None
    return INTRODUCTION.format(
        parameters=sum(array.size for array in model.params.values()) / 1e6,
        layers=config.text.num_hidden_layers,
        experts=config.text.num_experts,
        depth=config.vision.depth,
        levels=config.num_deepstack_levels,
    )


def strip(one: Sample, gap: int = 6) -> Image.Image:
    """A sample's images, or a clip's frames, side by side."""
    images = one.images or one.video
    size = sum(image.width + gap for image in images) - gap, max(image.height for image in images)
    whole = Image.new("RGB", size, "white")
    left = 0
    for image in images:
        whole.paste(image, (left, 0))
        left += image.width + gap
    return whole


def alternative(one: Sample) -> str:
    """The picture in words, for those who can't see it."""
    words = [
        exchange.answer for exchange in one.exchanges if exchange.family in ("describe", "clip_event", "pair_changed")
    ]
    return words[0] if words else "Two pictures side by side."


def table(model: dsj.Model, one: Sample) -> str:
    """All questions about a sample, with the answers of every variant."""
    levels = range(model.config.num_deepstack_levels)
    variants = {"all levels": model} | {f"without {level}": without_levels(model, [level]) for level in levels}
    variants["none"] = without_levels(model, levels)
    cases = [Case(one, exchange) for exchange in one.exchanges]
    said = [answers(variant, cases) for variant in variants.values()]
    lines = ["| question | truth | " + " | ".join(variants) + " |", "|---" * (2 + len(variants)) + "|"]
    for case, found in zip(cases, zip(*said, strict=True), strict=True):
        truth = case.exchange.answer
        cells = [answer if answer == truth else f"*{answer or '(nothing)'}*" for answer in found]
        lines.append(f"| {case.exchange.question} | {truth} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
