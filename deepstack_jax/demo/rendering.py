"""From a scene to a picture: anti-aliased shapes and digits over a muted background."""

from functools import lru_cache
from math import ceil, cos, floor, pi, radians, sin
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from deepstack_jax.demo.scenes import LEVELS, PHOTOGRAPHS, Background, Number, Scene, Thing

HERE = Path(__file__).parent
SUPERSAMPLING = 4
MOST_CHROMA = 36  # between the channels of a background's pixel: colors stand out by their saturation


def render(scene: Scene) -> Image.Image:
    """The picture of a scene, RGB, of the scene's width and height."""
    picture = _background(scene.background, scene.width, scene.height).copy()
    for thing in scene.things:
        _draw_thing(picture, thing)
    if scene.number:
        _draw_number(picture, scene.number)
    return picture


def _draw_thing(picture: Image.Image, thing: Thing) -> None:
    reach = thing.extent + 1
    left, top = floor(thing.x - reach), floor(thing.y - reach)
    side = ceil(2 * reach) + 1
    x, y = (thing.x - left) * SUPERSAMPLING, (thing.y - top) * SUPERSAMPLING
    width = thing.width * SUPERSAMPLING
    mask = Image.new("L", (side * SUPERSAMPLING, side * SUPERSAMPLING))
    draw = ImageDraw.Draw(mask)
    if thing.shape in ("circle", "ring"):
        _disc(draw, x, y, width / 2, 255)
        if thing.shape == "ring":
            _disc(draw, x, y, width * 0.27, 0)
    else:
        turn = radians(thing.angle)
        draw.polygon(
            [
                (x + width * (u * cos(turn) - v * sin(turn)), y + width * (u * sin(turn) + v * cos(turn)))
                for u, v in OUTLINES[thing.shape]
            ],
            fill=255,
        )
    picture.paste(thing.rgb, (left, top), mask.reduce(SUPERSAMPLING))


def _disc(draw: ImageDraw.ImageDraw, x: float, y: float, radius: float, level: int) -> None:
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=level)


def _corners(*radii: float, count: int) -> list[tuple[float, float]]:
    """Corners around (0, 0), the first one straight up, with the radii in turn."""
    angles = [2 * pi * i / count for i in range(count)]
    return [(radii[i % len(radii)] * sin(angle), -radii[i % len(radii)] * cos(angle)) for i, angle in enumerate(angles)]


# Outlines about (0, 0) of shapes of width 1.
_ARM = [(-0.16, -0.16), (-0.16, -0.52), (0.16, -0.52)]  # of a cross: a quarter of its outline
OUTLINES = {
    "square": [(-0.43, -0.43), (0.43, -0.43), (0.43, 0.43), (-0.43, 0.43)],
    "triangle": _corners(0.58, count=3),
    "star": _corners(0.57, 0.23, count=10),
    "cross": _ARM + [(-v, u) for u, v in _ARM] + [(-u, -v) for u, v in _ARM] + [(v, -u) for u, v in _ARM],
}


def _draw_number(picture: Image.Image, number: Number) -> None:
    font = font_of(number.face, round(2 * number.height / digit_height(number.face)))
    left, top, right, bottom = font.getbbox(number.text)
    mask = Image.new("L", (ceil(right - left) + 4, ceil(bottom - top) + 4))
    ImageDraw.Draw(mask).text((2 - left, 2 - top), number.text, fill=255, font=font)
    mask = mask.rotate(number.angle, Image.Resampling.BICUBIC, expand=True).reduce(2)
    corner = round(number.x - mask.width / 2), round(number.y - mask.height / 2)
    picture.paste(number.rgb, corner, mask)


@lru_cache(maxsize=512)
def font_of(face: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(HERE / "fonts" / f"{face}.ttf", size, layout_engine=ImageFont.Layout.BASIC)


@lru_cache(maxsize=16)
def digit_height(face: str) -> float:
    """Height of the digits of a face at size 1."""
    _, top, _, bottom = font_of(face, 200).getbbox("0123456789")
    return (bottom - top) / 200


@lru_cache(maxsize=2)  # the frames of a clip, and the two pictures of a pair, have one background
def _background(background: Background, width: int, height: int) -> Image.Image:
    first, second = (np.array(tone, np.float32) for tone in background.tones)
    rng = np.random.Generator(np.random.PCG64(background.seed))
    if background.kind == "plain":
        return Image.new("RGB", (width, height), background.tones[0])
    if background.kind == "gradient":
        angle = 2 * pi * rng.random()
        along = np.add.outer(np.linspace(-0.5, 0.5, height) * sin(angle), np.linspace(-0.5, 0.5, width) * cos(angle))
        along = (along - along.min()) / (along.max() - along.min())
        pixels = first + along[..., None].astype(np.float32) * (second - first)
    elif background.kind == "noise":
        grain = 1 + int(4 * rng.random())  # pixels
        noise = rng.random((ceil(height / grain), ceil(width / grain), 1), np.float32)
        noise = noise.repeat(grain, 0).repeat(grain, 1)[:height, :width] - 0.5
        pixels = first + 80 * background.strength * noise
    else:
        pixels = _photograph(background.kind, width, height, rng).astype(np.float32)
        grey = pixels.mean(-1, keepdims=True)
        pixels = first + background.strength * (0.35 * (grey - 128) + 0.15 * (pixels - grey))
    return Image.fromarray(_mute(pixels, *LEVELS[background.lightness]))


def _mute(pixels: np.ndarray, darkest: int, lightest: int) -> np.ndarray:
    """[height, width, 3] float to uint8, within the levels and the chroma that a background may have."""
    low, high = pixels.min(-1, keepdims=True), pixels.max(-1, keepdims=True)
    middle = (low + high) / 2
    pixels = middle + (pixels - middle) * np.minimum(1, MOST_CHROMA / np.maximum(high - low, 1))
    return np.clip(pixels, darkest, lightest).astype(np.uint8)


def _photograph(name: str, width: int, height: int, rng: np.random.Generator) -> np.ndarray:
    """A random part of a photograph, of the canvas' aspect: uint8 [height, width, 3]."""
    photograph = _load(name)
    scale = min(photograph.width / width, photograph.height / height) * (0.4 + 0.6 * rng.random())
    left = rng.random() * (photograph.width - scale * width)
    top = rng.random() * (photograph.height - scale * height)
    box = (left, top, left + scale * width, top + scale * height)
    return np.asarray(photograph.resize((width, height), Image.Resampling.BILINEAR, box))


@lru_cache(maxsize=len(PHOTOGRAPHS))
def _load(name: str) -> Image.Image:
    return Image.open(HERE / "photographs" / f"{name}.jpg").convert("RGB")
