"""What each visual token shows: the truth that training holds against the encoder's rows.

Answers by themselves teach colors soon and shapes late: a word of a description says what some thing is, not where. The
scene says where. A linear head, which is discarded afterwards, therefore reads from each token's row which thing is
there, and which digits of a number.
"""

from math import cos, radians, sin

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from deepstack_jax.demo.changes import Pair
from deepstack_jax.demo.rendering import digit_height, font_of
from deepstack_jax.demo.samples import Drawing
from deepstack_jax.demo.scenes import COLORS, SHAPES, SIZES, Number, Scene

KINDS = ("nothing", *SHAPES, "number")
DIGITS = 11  # the ten digits, and none
# kind, color and size of the thing; first and second digit whose centres lie in the token
CLASSES = (len(KINDS), len(COLORS), len(SIZES), DIGITS, DIGITS)
LEAST = 0.12  # of a token's area: what covers less of it is not seen there, unless its centre is
UNKNOWN = -1


def scenes_of(drawing: Drawing) -> list[Scene]:
    """The scene of each view: of each picture, or of the later frame of each temporal patch of a clip."""
    subject = drawing.subject
    if isinstance(subject, Scene):
        return [subject]
    if isinstance(subject, Pair):
        return [subject.first, subject.second]
    count = len(subject.scenes)
    return [subject.scenes[min(i + 1, count - 1)] for i in range(0, count, 2)]


def seen_in(scene: Scene, rows: int, columns: int) -> Int[np.ndarray, "M 5"]:
    """The classes (as in `CLASSES`) of a view's rows x columns tokens; UNKNOWN where a class does not apply."""
    covered = np.full((rows, columns), LEAST)
    seen = np.full((rows, columns, len(CLASSES)), UNKNOWN, np.int32)
    seen[..., 0] = 0
    scale_x, scale_y = columns / scene.width, rows / scene.height
    digits = _digit_centres(scene.number) if scene.number else []
    boxes = [
        (thing.x, thing.y, 0.48 * thing.width, (1 + SHAPES.index(thing.shape), _color(thing.color), _size(thing.size)))
        for thing in scene.things
    ]
    if scene.number:
        number = len(KINDS) - 1, UNKNOWN, UNKNOWN
        boxes += [(x, y, 0.4 * scene.number.height, number) for x, y, _ in digits]
    for x, y, half, classes in boxes:
        area = np.outer(
            _overlap((y - half) * scale_y, (y + half) * scale_y, rows),
            _overlap((x - half) * scale_x, (x + half) * scale_x, columns),
        )
        area[_cell(y * scale_y, rows), _cell(x * scale_x, columns)] += LEAST
        best = area > covered
        covered[best] = area[best]
        seen[best, :3] = classes
    is_number = seen[..., 0] == len(KINDS) - 1
    seen[is_number, 3:] = DIGITS - 1
    for x, y, digit in digits:
        cell = seen[_cell(y * scale_y, rows), _cell(x * scale_x, columns)]
        if cell[0] == len(KINDS) - 1:
            cell[3 if cell[3] == DIGITS - 1 else 4] = digit
    return seen.reshape(-1, len(CLASSES))


def sight_loss(logits: Float[Array, "M C"], seen: Int[Array, "M 5"]) -> tuple[jax.Array, jax.Array]:
    """(sum over the five classes of their mean cross-entropy, share of the tokens with a thing whose kind is right).

    Args:
        logits: of all classes side by side.
        seen: UNKNOWN where a class does not count.
    """
    total, right = jnp.zeros(()), jnp.zeros(())
    parts = jnp.split(logits, np.cumsum(CLASSES)[:-1], axis=-1)
    for i, part in enumerate(parts):
        truth = seen[:, i]
        losses = optax.softmax_cross_entropy_with_integer_labels(part, jnp.maximum(truth, 0))
        total += jnp.sum(jnp.where(truth >= 0, losses, 0)) / jnp.maximum(jnp.sum(truth >= 0), 1)
        if i == 0:
            is_thing = truth > 0
            right = jnp.sum(is_thing & (jnp.argmax(part, axis=-1) == truth)) / jnp.maximum(jnp.sum(is_thing), 1)
    return total, right


def _digit_centres(number: Number) -> list[tuple[float, float, int]]:
    """(x, y, digit) of each digit of a number."""
    font, scale = font_of(number.face, round(2 * number.height / digit_height(number.face))), 2
    ends = [font.getlength(number.text[: i + 1]) / scale for i in range(len(number.text))]
    turn, starts = radians(number.angle), [0.0, *ends[:-1]]
    along = [(start + end) / 2 - ends[-1] / 2 for start, end in zip(starts, ends, strict=True)]
    return [
        (number.x + at * cos(turn), number.y - at * sin(turn), int(digit))
        for at, digit in zip(along, number.text, strict=True)
    ]


def _overlap(low: float, high: float, count: int) -> Float[np.ndarray, " n"]:
    """How much of each of `count` unit cells lies between `low` and `high`."""
    cells = np.arange(count)
    return np.clip(np.minimum(cells + 1, high) - np.maximum(cells, low), 0, 1)


def _cell(at: float, count: int) -> int:
    return min(max(int(at), 0), count - 1)


def _color(name: str) -> int:
    return list(COLORS).index(name)


def _size(name: str) -> int:
    return SIZES.index(name)
