"""Two scenes that differ, and scenes that follow one another in a clip."""

from dataclasses import dataclass, replace

from numpy.random import Generator

from deepstack_jax.demo.scenes import (
    COLORS,
    Kind,
    Scene,
    Thing,
    arrange,
    draw_asked,
    draw_canvas,
    draw_distinct_kinds,
    draw_number,
    draw_rgb,
    draw_scene,
    draw_width,
    integer,
    pick,
    shows,
)

CHANGES = ("color", "size", "removed", "added", "nothing", "nothing")  # as often as they stand here
EVENTS = ("move", "move", "appear", "color")  # as often as they stand here
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


@dataclass(frozen=True)
class Pair:
    """Two scenes. `change` is None when they have nothing to do with one another, else one of CHANGES.

    `before` and `after` are the thing that changed, None where it is not there.
    """

    first: Scene
    second: Scene
    change: str | None = None
    before: Thing | None = None
    after: Thing | None = None


@dataclass(frozen=True)
class Clip:
    """A scene a frame. `event` is one of EVENTS; `subject` is the thing as the first frame that has it shows it."""

    scenes: tuple[Scene, ...]
    event: str
    subject: Thing
    direction: str | None = None  # of a move
    color: str | None = None  # that the subject turns


def draw_pair(rng: Generator) -> Pair:
    """Half of the pairs are to be compared, half are one scene before and after a change."""
    return draw_unlike(rng) if rng.random() < 0.5 else draw_changed(rng)


def draw_unlike(rng: Generator) -> Pair:
    """Two scenes. Which has more shapes, and which has more of the kind asked for: first, second, neither, as often."""
    counts = pick(rng, COUNTS[integer(rng, -1, 1)])
    word = draw_asked(rng)
    of_kind = pick(rng, [c for c in KIND_COUNTS[integer(rng, -1, 1)] if c[0] <= counts[0] and c[1] <= counts[1]])
    first = draw_scene(rng, count=counts[0], asked=(word, of_kind[0]))
    return Pair(first, draw_scene(rng, count=counts[1], asked=(word, of_kind[1])))


def _by_sign(most: int, least: int) -> dict[int, list[tuple[int, int]]]:
    pairs = [(a, b) for a in range(least, most + 1) for b in range(least, most + 1)]
    return {sign: [(a, b) for a, b in pairs if (b > a) - (b < a) == sign] for sign in (-1, 0, 1)}


COUNTS, KIND_COUNTS = _by_sign(4, 1), _by_sign(3, 0)


def draw_changed(rng: Generator) -> Pair:
    """A scene, and the same scene after one change or none; no two of its shapes share both shape and color."""
    change = pick(rng, CHANGES)
    count = integer(rng, 2, 4) if change in ("removed", "added") else integer(rng, 1, 4)
    kinds = draw_distinct_kinds(rng, count)
    text = draw_number(rng) if rng.random() < 0.25 else None
    if change == "size":
        kinds[0] = (*kinds[0][:2], "large")  # placed large, so that there is room for it
    whole = arrange(rng, draw_canvas(rng), kinds, text)
    while change == "size" and all(thing.size == "small" for thing in whole.things):
        whole = arrange(rng, draw_canvas(rng), kinds, text)
    if change == "nothing":
        return Pair(whole, whole, change)
    thing = pick(rng, whole.things)
    if change == "size":
        thing = pick(rng, [thing for thing in whole.things if thing.size == "large"])
        small = replace(thing, size="small", width=draw_width(rng, "small", (whole.width * whole.height) ** 0.5))
        other = _with(whole, thing, small)
        if rng.random() < 0.5:
            return Pair(whole, other, change, thing, small)
        return Pair(other, whole, change, small, thing)
    if change == "color":
        changed = _recolored(rng, whole, thing)
        return Pair(whole, _with(whole, thing, changed), change, thing, changed)
    without = replace(whole, things=tuple(other for other in whole.things if other is not thing))
    if change == "removed":
        return Pair(whole, without, change, before=thing)
    return Pair(without, whole, change, after=thing)


def draw_clip(rng: Generator) -> Clip:
    """Four to eight frames in which one shape moves, appears or turns another color; up to two others stand still."""
    event = pick(rng, EVENTS)
    frames = integer(rng, 4, 8)
    # One that appears leaves one fewer at the start; these counts make the answers "one" to "three" nearly even.
    count = pick(rng, (1, 1, 1, 2, 2, 3, 3, 3, 3, 3)) if event == "appear" else integer(rng, 1, 3)
    kinds = draw_distinct_kinds(rng, count)
    canvas = draw_canvas(rng, 80, 128)
    if event == "move":
        return _draw_move(rng, frames, kinds, canvas)
    whole = arrange(rng, canvas, kinds)
    subject = pick(rng, whole.things)
    start = integer(rng, 2, frames - 2)  # the first frame that shows the change
    if event == "appear":
        without = replace(whole, things=tuple(thing for thing in whole.things if thing is not subject))
        return Clip((without,) * start + (whole,) * (frames - start), event, subject)
    changed = _recolored(rng, whole, subject)
    after = _with(whole, subject, changed)
    return Clip((whole,) * start + (after,) * (frames - start), event, subject, color=changed.color)


def _draw_move(rng: Generator, frames: int, kinds: list[Kind], canvas: tuple[int, int]) -> Clip:
    direction = pick(rng, tuple(DIRECTIONS))
    along_x, along_y = DIRECTIONS[direction]
    side = canvas[0] if along_x else canvas[1]
    travel = (0.34 + 0.16 * rng.random()) * side
    middle = arrange(rng, canvas, kinds, sweep=(travel * abs(along_x), travel * abs(along_y)))
    mover = next(thing for thing in middle.things if (thing.shape, thing.color) == kinds[0][:2])
    scenes = []
    for frame in range(frames):
        way = (frame / (frames - 1) - 0.5) * travel
        moved = replace(mover, x=mover.x + way * along_x, y=mover.y + way * along_y)
        scenes.append(_with(middle, mover, moved))
    subject = next(t for t in scenes[0].things if (t.shape, t.color) == kinds[0][:2])
    return Clip(tuple(scenes), "move", subject, direction=direction)


def _recolored(rng: Generator, scene: Scene, thing: Thing) -> Thing:
    taken = {other.color for other in scene.things if other.shape == thing.shape}
    free = [color for color in COLORS if color not in taken and shows(color, scene.background.lightness)]
    color = pick(rng, free)
    return replace(thing, color=color, rgb=draw_rgb(rng, color))


def _with(scene: Scene, thing: Thing, other: Thing) -> Scene:
    return replace(scene, things=tuple(other if each is thing else each for each in scene.things))
