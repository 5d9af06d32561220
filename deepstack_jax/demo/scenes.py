"""Scenes of shapes and a number, drawn from a random generator without rendering anything.

A scene lists what a picture shows, in the picture's own pixels; `rendering.render` makes the picture. Everything that
a question asks about can be read from a scene, so the answers of a million pictures can be checked without one.
"""

from dataclasses import dataclass, replace
from math import cos, radians, sin, sqrt

from numpy.random import Generator

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
COLORS = {
    "red": (214, 32, 36),
    "green": (24, 150, 48),
    "blue": (36, 72, 222),
    "yellow": (244, 220, 40),
    "purple": (140, 36, 182),
    "orange": (248, 138, 18),
    "black": (14, 14, 14),
    "white": (248, 248, 248),
}
SIZES = ("small", "large")
FACES = ("sans", "sans-bold", "sans-oblique", "condensed-bold", "serif", "serif-bold", "serif-italic", "mono")
# The levels that a background keeps to. White is not drawn on a light one, black not on a dark one; the other colors
# show on any, because a background's channels are nearly the same (see MOST_CHROMA in rendering).
LEVELS = {"dark": (0, 60), "middle": (80, 184), "light": (196, 255)}
PHOTOGRAPHS = ("astronaut", "rocket", "chelsea", "coffee")

# Radius of the circle around a shape, by its width: what keeps two shapes from touching, however they are turned.
EXTENT = {"circle": 0.5, "square": 0.62, "triangle": 0.6, "star": 0.58, "ring": 0.52, "cross": 0.56}
# Width of a line of digits by their height, in the widest face, a digit at a time; the margins around them included.
DIGIT_ADVANCE = 0.97
SEPARATION = 0.12  # of the width (height): what lies nearer than this is neither left nor right (above nor below)


@dataclass(frozen=True)
class Thing:
    """One shape. Lengths are in pixels, `angle` in degrees; (x, y) is its centre, y grows downwards."""

    shape: str
    color: str
    size: str
    x: float
    y: float
    width: float
    angle: float
    rgb: tuple[int, int, int]

    @property
    def extent(self) -> float:
        """Radius of a circle around the centre that holds the whole shape."""
        return EXTENT[self.shape] * self.width


@dataclass(frozen=True)
class Number:
    """One to four digits; `height` is the digits' height in pixels."""

    text: str
    x: float
    y: float
    height: float
    angle: float
    face: str
    color: str
    rgb: tuple[int, int, int]


@dataclass(frozen=True)
class Background:
    """What is behind the things: nearly grey, and never light behind white nor dark behind black, so that all show."""

    kind: str  # "plain", "gradient", "noise", or the name of a photograph
    lightness: str  # a key of LEVELS
    tones: tuple[tuple[int, int, int], tuple[int, int, int]]
    strength: float  # of the noise or the photograph, 0 to 1
    seed: int


@dataclass(frozen=True)
class Scene:
    """What one picture shows: `things` from left to right."""

    width: int
    height: int
    background: Background
    things: tuple[Thing, ...]
    number: Number | None = None
    asked: str = "circle"  # the shape or color whose count is to be asked: counts of this one are even over 0 to 3


Kind = tuple[str, str, str]  # shape, color, size


def draw_scene(rng: Generator, *, count: int | None = None, asked: tuple[str, int] | None = None) -> Scene:
    """A scene of `count` shapes (1 to 4), exactly asked[1] of which are of the shape or color asked[0]."""
    count = count or integer(rng, 1, 4)
    word, of_it = asked or (draw_asked(rng), draw_count_of_kind(rng, count))
    text = draw_number(rng) if rng.random() < 0.5 else None
    scene = arrange(rng, draw_canvas(rng), draw_kinds(rng, count, word, of_it), text)
    return replace(scene, asked=word)


def draw_asked(rng: Generator) -> str:
    """A shape or a color, each half the time."""
    return pick(rng, SHAPES) if rng.random() < 0.5 else pick(rng, tuple(COLORS))


def draw_count_of_kind(rng: Generator, count: int) -> int:
    """How many of `count` shapes are of the kind asked for: over counts drawn evenly from 1 to 4, even over 0 to 3."""
    weights = {1: (4, 4, 0, 0), 2: (2, 2, 4, 0), 3: (1, 1, 2, 4), 4: (1, 1, 2, 4)}[count]
    place = rng.random() * 8
    for value, weight in enumerate(weights):
        if (place := place - weight) < 0:
            return value
    raise AssertionError("the weights sum to 8")


def draw_number(rng: Generator) -> str:
    """One to four digits, each length as often; no leading zero but in 0 itself."""
    digits = integer(rng, 1, 4)
    first = integer(rng, 0 if digits == 1 else 1, 9)
    return str(first) + "".join(str(integer(rng, 0, 9)) for _ in range(digits - 1))


def draw_canvas(rng: Generator, smallest: int = 64, largest: int = 256) -> tuple[int, int]:
    """Width and height, each from `smallest` to `largest` pixels, neither above twice the other."""
    while True:
        width, height = integer(rng, smallest, largest), integer(rng, smallest, largest)
        if width <= 2 * height and height <= 2 * width:
            return width, height


def draw_kinds(rng: Generator, count: int, word: str, of_it: int) -> list[Kind]:
    """Kinds of `count` shapes, exactly `of_it` of which are of the shape or color `word`."""
    if word in SHAPES:
        others = tuple(shape for shape in SHAPES if shape != word)
        shapes = [word] * of_it + [pick(rng, others) for _ in range(count - of_it)]
        return [(shape, pick(rng, tuple(COLORS)), pick(rng, SIZES)) for shape in shapes]
    others = tuple(color for color in COLORS if color != word)
    colors = [word] * of_it + [pick(rng, others) for _ in range(count - of_it)]
    return [(pick(rng, SHAPES), color, pick(rng, SIZES)) for color in colors]


def draw_distinct_kinds(rng: Generator, count: int) -> list[Kind]:
    """Kinds of `count` shapes, no two of which have both shape and color in common."""
    kinds: list[Kind] = []
    while len(kinds) < count:
        kind = (pick(rng, SHAPES), pick(rng, tuple(COLORS)), pick(rng, SIZES))
        if all(kind[:2] != other[:2] for other in kinds):
            kinds.append(kind)
    return kinds


def arrange(
    rng: Generator,
    canvas: tuple[int, int],
    kinds: list[Kind],
    text: str | None = None,
    sweep: tuple[float, float] = (0.0, 0.0),
) -> Scene:
    """Places shapes of `kinds` and a number on a canvas (width, height) so that nothing touches anything.

    Centres are at least SEPARATION of the width apart in x, so that left and right are never in doubt. The first kind
    may be given room to move: `sweep` pixels in x and y, with its place in the middle of them.
    """
    width, height = canvas
    middle = sqrt(width * height)
    kinds = list(kinds)
    for attempt in range(10_000):
        if attempt % 24 == 23:  # a full canvas: make one large shape small
            large = [i for i, kind in enumerate(kinds) if kind[2] == "large"]
            if large:
                kinds[large[-1]] = (*kinds[large[-1]][:2], "small")
        placed: list[tuple[float, float, float, float, float]] = []  # x, y, half sides of a box, radius around the box
        number = _place_number(rng, canvas, text, placed) if text else None
        things = [_place(rng, canvas, kind, middle, placed, sweep if i == 0 else None) for i, kind in enumerate(kinds)]
        if (text and number is None) or None in things:
            continue
        ordered = sorted((thing for thing in things if thing), key=lambda thing: thing.x)
        colors = {thing.color for thing in ordered} | ({number.color} if number else set())
        return Scene(width, height, draw_background(rng, colors), tuple(ordered), number)
    raise ValueError(f"{len(kinds)} shapes don't fit on {width}x{height}: give fewer, or a larger canvas")


def draw_width(rng: Generator, size: str, middle: float) -> float:
    """A shape's width; `middle` is the geometric mean of the canvas' sides. Small ones have eleven pixels at least."""
    if size == "small":
        return max((0.14 + 0.03 * rng.random()) * middle, 11.0)
    return (0.28 + 0.07 * rng.random()) * middle


def draw_rgb(rng: Generator, color: str) -> tuple[int, int, int]:
    """A color's red, green and blue, each up to 10 levels from the middle of that color."""
    red, green, blue = (min(max(level + integer(rng, -10, 10), 0), 255) for level in COLORS[color])
    return red, green, blue


def draw_background(rng: Generator, colors: set[str]) -> Background:
    """Plain, gradient, noise or photograph, each as often, on which all of `colors` show.

    It is drawn after the colors: that way it can't make one color of things rarer than another.
    """
    kind = pick(rng, ("plain", "gradient", "noise", "")) or pick(rng, PHOTOGRAPHS)
    lightness = pick(rng, ("middle", "middle", "light", "dark"))
    if not all(shows(color, lightness) for color in colors):
        lightness = "middle"
    tones = _draw_tone(rng, lightness), _draw_tone(rng, lightness)
    return Background(kind, lightness, tones, strength=0.3 + 0.7 * rng.random(), seed=integer(rng, 0, 2**31))


def shows(color: str, lightness: str) -> bool:
    """Whether a thing of `color` stands out from a background of that lightness."""
    return (color, lightness) not in (("white", "light"), ("black", "dark"))


def pick[T](rng: Generator, options: tuple[T, ...] | list[T]) -> T:
    """One of `options`, each as likely."""
    return options[int(rng.random() * len(options))]


def integer(rng: Generator, low: int, high: int) -> int:
    """A whole number from `low` to `high`, both included."""
    return low + int(rng.random() * (high - low + 1))


def _draw_tone(rng: Generator, lightness: str) -> tuple[int, int, int]:
    darkest, lightest = LEVELS[lightness]
    grey = integer(rng, darkest + 12, lightest - 12)
    red, green, blue = (grey + integer(rng, -12, 12) for _ in range(3))
    return red, green, blue


def _place(
    rng: Generator,
    canvas: tuple[int, int],
    kind: Kind,
    middle: float,
    placed: list[tuple[float, float, float, float, float]],
    sweep: tuple[float, float] | None,
) -> Thing | None:
    shape, color, size = kind
    width = draw_width(rng, size, middle)
    radius = EXTENT[shape] * width
    half_x, half_y = (sweep[0] / 2, sweep[1] / 2) if sweep else (0.0, 0.0)
    found = _find_place(rng, canvas, half_x, half_y, radius, placed)
    if found is None:
        return None
    angle = 0.0 if shape in ("circle", "ring") else 30 * rng.random() - 15
    return Thing(shape, color, size, *found, width, angle, draw_rgb(rng, color))


def _place_number(
    rng: Generator, canvas: tuple[int, int], text: str, placed: list[tuple[float, float, float, float, float]]
) -> Number | None:
    middle = sqrt(canvas[0] * canvas[1])
    height = max((0.17 + 0.13 * rng.random()) * middle, 0.2 * min(canvas))
    height = min(height, 0.92 * canvas[0] / (DIGIT_ADVANCE * len(text) + 0.2))
    angle = 16 * rng.random() - 8
    line, turn = DIGIT_ADVANCE * len(text) * height, radians(abs(angle))
    half_x = (line * cos(turn) + height * sin(turn)) / 2
    half_y = (line * sin(turn) + height * cos(turn)) / 2
    found = _find_place(rng, canvas, half_x, half_y, 0.0, placed)
    if found is None:
        return None
    color = pick(rng, tuple(COLORS))
    return Number(text, *found, height, angle, pick(rng, FACES), color, draw_rgb(rng, color))


def _find_place(
    rng: Generator,
    canvas: tuple[int, int],
    half_x: float,
    half_y: float,
    radius: float,
    placed: list[tuple[float, float, float, float, float]],
) -> tuple[float, float] | None:
    """A centre for a box with rounded corners (half sides, then a radius around) that stays clear of those `placed`."""
    width, height = canvas
    gap = 1.0 + 0.015 * min(canvas)
    room_x, room_y = width / 2 - half_x - radius - gap, height / 2 - half_y - radius - gap
    if room_x < 0 or room_y < 0:
        return None
    for _ in range(25):
        x = width / 2 + (2 * rng.random() - 1) * room_x
        y = height / 2 + (2 * rng.random() - 1) * room_y
        for other_x, other_y, other_half_x, other_half_y, other_radius in placed:
            apart_x, apart_y = abs(x - other_x), abs(y - other_y)
            if apart_x < SEPARATION * width:
                break
            apart_x, apart_y = max(apart_x - half_x - other_half_x, 0), max(apart_y - half_y - other_half_y, 0)
            if apart_x**2 + apart_y**2 < (radius + other_radius + gap) ** 2:
                break
        else:
            placed.append((x, y, half_x, half_y, radius))
            return x, y
    return None
