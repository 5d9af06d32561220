"""Endless samples by seed: pictures, pairs and clips with what is asked of them."""

from dataclasses import dataclass

from numpy.random import PCG64, Generator, SeedSequence
from PIL import Image

from deepstack_jax.demo.changes import Clip, Pair, draw_clip, draw_pair
from deepstack_jax.demo.questions import Exchange, ask_of_clip, ask_of_pair, ask_of_picture
from deepstack_jax.demo.rendering import render
from deepstack_jax.demo.scenes import Scene, draw_scene

KINDS = ("picture", "pair", "clip")
UNSEEN_SEEDS = 1_000_000  # seeds from here on are training's
__all__ = ["KINDS", "UNSEEN_SEEDS", "Drawing", "Exchange", "Sample", "draw", "sample"]


@dataclass(frozen=True)
class Drawing:
    """What a sample shows and asks, before anything is rendered."""

    kind: str
    subject: Scene | Pair | Clip
    exchanges: tuple[Exchange, ...]


@dataclass(frozen=True)
class Sample:
    """Media and exchanges about them: one image, or two, or a clip of four to eight frames of one size."""

    kind: str
    images: tuple[Image.Image, ...]
    video: tuple[Image.Image, ...]
    exchanges: tuple[Exchange, ...]


def sample(seed: int, kind: str | None = None) -> Sample:
    """The sample of a seed, the same one every time; 70% pictures, 15% pairs and 15% clips unless `kind` says which."""
    drawing = draw(seed, kind)
    subject = drawing.subject
    if isinstance(subject, Clip):
        return Sample(drawing.kind, (), tuple(render(scene) for scene in subject.scenes), drawing.exchanges)
    scenes = (subject.first, subject.second) if isinstance(subject, Pair) else (subject,)
    return Sample(drawing.kind, tuple(render(scene) for scene in scenes), (), drawing.exchanges)


def draw(seed: int, kind: str | None = None) -> Drawing:
    """What `sample` renders."""
    if kind is None:
        place = Generator(PCG64(SeedSequence(seed))).random()
        kind = "picture" if place < 0.7 else "pair" if place < 0.85 else "clip"
    rng = Generator(PCG64(SeedSequence([seed, 1 + KINDS.index(kind)])))  # [seed, 0] would be the stream of the kind
    if kind == "picture":
        scene = draw_scene(rng)
        return Drawing(kind, scene, ask_of_picture(rng, scene))
    if kind == "pair":
        pair = draw_pair(rng)
        return Drawing(kind, pair, ask_of_pair(rng, pair))
    clip = draw_clip(rng)
    return Drawing(kind, clip, ask_of_clip(rng, clip))
