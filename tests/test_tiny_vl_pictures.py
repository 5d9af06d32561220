"""The drawn pictures and what is asked of them: every answer is right, the only one, and no more likely than another.

Two readers here answer the questions again: one measures the pixels, one goes through the scene. Neither shares code
with what made the question: both parse its English.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from statistics import mean

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from deepstack_jax.demo.changes import Clip, Pair
from deepstack_jax.demo.questions import WORDINGS, describe
from deepstack_jax.demo.rendering import render
from deepstack_jax.demo.samples import Drawing, draw, sample
from deepstack_jax.demo.scenes import FACES, Background, Number, Scene, draw_scene

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
PALETTE = {
    "red": (215, 30, 35), "green": (25, 150, 50), "blue": (35, 70, 220), "yellow": (245, 220, 40),
    "purple": (140, 35, 180), "orange": (250, 140, 20), "black": (15, 15, 15), "white": (250, 250, 250),
}  # fmt: skip
NUMERALS = {"none": 0, "one": 1, "two": 2, "three": 3, "four": 4}
GREY = Background("plain", "middle", ((130, 130, 130), (130, 130, 130)), 0.0, 0)
SEEDS = range(6000)


@dataclass(frozen=True)
class Seen:
    """A thing as a reader sees it: lengths as shares of the picture's width and height."""

    shape: str  # or "number"
    color: str
    size: str
    x: float
    y: float

    @property
    def name(self) -> str:
        return "number" if self.shape == "number" else f"{self.color} {self.shape}"


@pytest.fixture(scope="module")
def drawings() -> list[Drawing]:
    return [draw(seed) for seed in SEEDS]


# The reader of scenes.


def see(scene: Scene) -> list[Seen]:
    things = [Seen(t.shape, t.color, t.size, t.x / scene.width, t.y / scene.height) for t in scene.things]
    number = scene.number
    return things + ([Seen("number", "", "", number.x / scene.width, number.y / scene.height)] if number else [])


# The reader of pixels: only for pictures on plain grey, and without a number.


def look(scene: Scene) -> list[Seen]:
    return read(render(replace(scene, background=GREY)))


def look_as_the_model(scene: Scene) -> list[Seen]:
    """At the coarsest that a model need look: sides in steps of 32 pixels, an area of about 128 x 128."""
    picture = render(replace(scene, background=GREY))
    scale = 128 / (picture.width * picture.height) ** 0.5
    width, height = (max(round(side * scale / 32), 1) * 32 for side in picture.size)
    squeezed = height * picture.width / (width * picture.height)
    return read(picture.resize((width, height), Image.Resampling.BICUBIC), squeezed)


def read(picture: Image.Image, squeezed: float = 1.0) -> list[Seen]:
    pixels = np.asarray(picture, np.float64)
    away = np.abs(pixels - 130).max(-1)
    labels, count = ndimage.label(away > 12, np.ones((3, 3)))
    parts = [labels == label for label in range(1, count + 1)]
    return [measure(pixels, part, squeezed) for part in parts if part.sum() > 20]  # less is an echo of the resizing


def measure(pixels: np.ndarray, where: np.ndarray, squeezed: float) -> Seen:
    height, width = where.shape
    rows, columns = np.nonzero(where)
    found = pixels[rows, columns]
    strongest = found[np.argsort(-np.abs(found - 130).sum(-1))[: max(len(found) // 4, 1)]].mean(0)
    color = min(PALETTE, key=lambda name: float(np.square(strongest - PALETTE[name]).sum()))
    cover = np.clip((found - 130) @ (strongest - 130) / np.square(strongest - 130).sum(), 0, 1)
    x, y = cover @ columns / cover.sum(), cover @ rows / cover.sum()
    shape = shape_of(cover * squeezed, (columns - x) * squeezed, rows - y)
    across = max(np.ptp(rows), np.ptp(columns) * squeezed) / np.sqrt(height * width * squeezed)
    return Seen(shape, color, "small" if across < 0.235 else "large", (x + 0.5) / width, (y + 0.5) / height)


def shape_of(cover: np.ndarray, x: np.ndarray, y: np.ndarray) -> str:
    """By the hole of a ring, then by symmetry: the moments of order 3, 4 and 5 about the centre; cross from square by
    how far the area spreads."""
    area, radius = cover.sum(), np.hypot(x, y)
    if (cover * (radius < 0.25 * radius.max())).sum() < 0.02 * area:
        return "ring"
    corners = {k: abs((cover * (x + 1j * y) ** k).sum()) / (cover * radius**k).sum() for k in (3, 4, 5)}
    most = max(corners, key=corners.__getitem__)
    if corners[most] < 0.06:
        return "circle"
    if most == 4:
        return "square" if (cover * radius**2).sum() / area**2 < 0.19 else "cross"
    return {3: "triangle", 5: "star"}[most]


# What both share: the answers to a question about things seen. More than one answer means that it is ambiguous.


def answers(question: str, seen: list[Seen], margin: float = 0.1) -> set[str]:
    """Every answer that the question could be given about a picture; empty where what it speaks of isn't there."""
    shapes = [thing for thing in seen if thing.shape != "number"]
    words = question.lower().rstrip("?.").replace("colour", "color").split()
    if "color" in words:
        shape = next(word for word in words if word in SHAPES)
        size = [word for word in words if word in ("small", "large")]
        there = [thing for thing in shapes if thing.shape == shape and thing.size in (size or ("small", "large"))]
        return {f"It is {thing.color}." for thing in there} if len(there) == 1 else set()
    for side in ("left", "right", "above", "below"):
        if side in words:
            name = " ".join(words[words.index("the", words.index(side)) + 1 :])
            if sum(thing.name == name for thing in seen) != 1:
                return set()
            subject = next(thing for thing in seen if thing.name == name)
            others = [thing for thing in seen if thing is not subject]
            apart = [thing.x - subject.x if side in ("left", "right") else thing.y - subject.y for thing in others]
            apart = [-step if side in ("left", "above") else step for step in apart]
            if any(abs(step) < margin for step in apart):
                return {"too near", "to say"}
            return {f"The {o.name}." for o, step in zip(others, apart, strict=True) if step > 0} or {"Nothing."}
    if words[0] in ("how", "count"):
        of = [word for word in words if word.rstrip("s") in SHAPES or word == "crosses" or word in PALETTE]
        kind = {"crosses": "cross"}.get(of[0], of[0].removesuffix("s")) if of else None
        return {number_of(sum(kind in (None, thing.shape, thing.color) for thing in shapes))}
    if words[0] in ("is", "do", "does", "can"):
        wanted = [word for word in words if word in SHAPES or word in PALETTE or word == "number"]
        if "number" in wanted:
            return {yes(len(shapes) < len(seen))}
        return {yes(any(all(word in (thing.shape, thing.color) for word in wanted) for thing in shapes))}
    raise AssertionError(f"no reading for {question!r}")


def number_of(count: int) -> str:
    return f"There {'is' if count == 1 else 'are'} {list(NUMERALS)[count]}."


def yes(true: bool) -> str:
    return "Yes." if true else "No."


def description(seen: list[Seen]) -> str:
    parts = []
    for thing in sorted(seen, key=lambda thing: thing.x):
        parts.append("a number" if thing.shape == "number" else f"a {thing.size} {thing.color} {thing.shape}")
    text = parts[0] if parts else "nothing"
    for i, part in enumerate(parts[1:], 2):
        text += (" and " if i == len(parts) else ", ") + part
    return text.capitalize() + "."


def change_between(first: list[Seen], second: list[Seen]) -> str:
    gone = [thing for thing in first if not any(same_place(thing, other) for other in second)]
    new = [thing for thing in second if not any(same_place(thing, other) for other in first)]
    became = [(a, b) for a in first for b in second if same_place(a, b) and (a.color, a.size) != (b.color, b.size)]
    assert len(gone) + len(new) + len(became) < 2
    if gone:
        return f"The {gone[0].name} was removed."
    if new:
        return f"A{'n' if new[0].color == 'orange' else ''} {new[0].name} was added."
    if became:
        (before, after), = became  # fmt: skip
        return f"The {before.name} became {after.color if after.color != before.color else after.size}."
    return "Nothing changed."


def same_place(one: Seen, other: Seen) -> bool:
    return one.shape == other.shape and abs(one.x - other.x) < 0.02 and abs(one.y - other.y) < 0.02


def event_between(first: list[Seen], last: list[Seen]) -> str:
    if len(last) > len(first):
        new = next(thing for thing in last if not any(same_place(thing, other) for other in first))
        return f"A{'n' if new.color == 'orange' else ''} {new.name} appears."
    for thing in first:
        if not any(same_place(thing, other) for other in last):
            moved = next(o for o in last if o.name == thing.name)
            return f"The {thing.name} moves {way(thing, moved)}."
    before, after = next((a, b) for a in first for b in last if same_place(a, b) and a.color != b.color)
    return f"The {before.name} turns {after.color}."


def way(start: Seen, end: Seen) -> str:
    dx, dy = end.x - start.x, end.y - start.y
    return ("left" if dx < 0 else "right") if abs(dx) > abs(dy) else ("up" if dy < 0 else "down")


def check(drawing: Drawing, read: Callable[[Scene], list[Seen]]) -> Counter[str]:
    """Answers every exchange again from what `read` sees of its scenes; which families there were."""
    subject = drawing.subject
    for exchange in drawing.exchanges:
        family, question, answer = exchange.family, exchange.question, exchange.answer
        if family == "number":
            assert isinstance(subject, Scene)
            assert subject.number
            assert answer == f"It is {subject.number.text}."
            continue
        if isinstance(subject, Scene):
            found = {description(read(subject))} if family == "describe" else answers(question, read(subject))
        elif isinstance(subject, Pair):
            first, second = read(subject.first), read(subject.second)
            if family == "pair_describe":
                found = {description(first if "first" in question else second)}
            elif family == "pair_changed":
                found = {change_between(first, second)}
            else:
                what = "how many " + re.search(r"more (.*)\?", question)[1]  # type: ignore[index]
                ((a,), (b,)) = answers(what, first), answers(what, second)
                a, b = (NUMERALS[text.split()[-1].rstrip(".")] for text in (a, b))
                found = {"Both have the same." if a == b else "The first." if a > b else "The second."}
        else:
            first, last = read(subject.scenes[0]), read(subject.scenes[-1])
            if family == "clip_event":
                found = {event_between(first, last)}
            elif family == "clip_motion":
                name = re.search(r"the (\w+ \w+) move", question)[1]  # type: ignore[index]
                (start,), (end,) = ([thing for thing in seen if thing.name == name] for seen in (first, last))
                found = {"It does not move." if same_place(start, end) else f"It moves {way(start, end)}."}
            else:
                asked, when = re.fullmatch(r"(.*) at the (start|end)[?.]", question).groups()  # type: ignore[union-attr]
                found = answers(asked + "?", first if when == "start" else last)
        assert found == {answer}, f"{question} {answer} but {found}"
    return Counter(exchange.family for exchange in drawing.exchanges)


def test_every_answer_is_right_and_the_only_one(drawings):
    families = sum((check(drawing, see) for drawing in drawings), Counter())
    assert set(families) == set(WORDINGS)


@pytest.mark.parametrize("look", [look, look_as_the_model])
def test_the_pixels_give_the_same_answers(look):
    families = Counter()
    for kind in ("picture", "pair", "clip"):
        drawn = (draw(seed, kind) for seed in range(400))
        for drawing in [d for d in drawn if not any(scene.number for scene in scenes_of(d))][:100]:
            families += check(drawing, look)
    assert set(families) == set(WORDINGS) - {"number"}


def test_what_moves_moves_one_way_through_the_whole_clip():
    clips = [draw(seed, "clip").subject for seed in range(60)]
    moves = [clip for clip in clips if isinstance(clip, Clip) and clip.event == "move"]
    for clip in moves:
        name = f"{clip.subject.color} {clip.subject.shape}"
        path = [next(thing for thing in look(scene) if thing.name == name) for scene in clip.scenes]
        assert all(way(start, end) == clip.direction for start, end in pairwise(path))
        assert abs(path[-1].x - path[0].x) + abs(path[-1].y - path[0].y) > 0.3
    assert len(moves) > 20


def test_what_appears_or_turns_shows_in_two_frames_before_and_after():
    for seed in range(200):
        clip = draw(seed, "clip").subject
        assert isinstance(clip, Clip)
        if clip.event != "move":
            frames = [see(scene) for scene in clip.scenes]
            assert frames[0] == frames[1] != frames[-2] == frames[-1]
            assert sum(one != other for one, other in pairwise(frames)) == 1


# Balance: what could be answered without looking.


def test_answers_are_balanced(drawings):
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for exchange in (exchange for drawing in drawings for exchange in drawing.exchanges):
        found[exchange.family][exchange.answer] += 1
    share = {f: {answer: n / c.total() for answer, n in c.items()} for f, c in found.items()}
    assert 0.47 < share["exists"]["Yes."] < 0.53
    for family, fewest, most, ways in (
        ("count", 0.22, 0.28, 4),
        ("count_kind", 0.22, 0.28, 4),
        ("color", 0.1, 0.15, 8),
        ("clip_color", 0.09, 0.16, 8),
        ("pair_more", 0.29, 0.38, 3),
        ("clip_motion", 0.1, 0.27, 5),
    ):
        assert len(share[family]) == ways
        assert all(fewest < part < most for part in share[family].values()), (family, share[family])
    for family in ("left_of", "right_of", "above", "below"):
        assert 0.2 < share[family]["Nothing."] < 0.3
        assert all(part < 0.2 for answer, part in share[family].items() if answer != "Nothing.")
    assert 0.28 < share["pair_changed"]["Nothing changed."] < 0.4
    assert max(share["clip_count"].values()) < 0.4
    assert max(share["clip_event"].values()) < 0.03
    assert max(share["number"].values()) < 0.05
    asked = {family: counts.total() for family, counts in found.items()}
    pictures = [asked[family] for family in WORDINGS if not family.startswith(("pair", "clip", "describe"))]
    assert max(pictures) < 3 * min(pictures), asked


def test_wordings_and_what_is_asked_for_tell_nothing():
    """Yes and no, and the counts, are even for each color, shape and wording by itself, not only on the whole."""
    exists, counts = defaultdict(list), defaultdict(list)
    for seed in range(10_000):
        for exchange in draw(seed, "picture").exchanges:
            words = [word.strip("?.") for word in exchange.question.replace("crosses", "cross").split()]
            asked = [word.removesuffix("s") if word[:-1] in SHAPES else word for word in words]
            if exchange.family == "exists":
                kind = " ".join(w for w in asked if w in SHAPES or w in PALETTE or w == "number")
                exists[" ".join(asked[:2])].append(exchange.answer)
                exists["a color and a shape" if " " in kind else kind].append(exchange.answer)
            elif exchange.family == "count_kind":
                counts[next(w for w in asked if w in SHAPES or w in PALETTE)].append(exchange.answer)
                counts[" ".join(asked[:2]) if asked[0] == "How" else asked[0]].append(exchange.answer)
    assert len(exists) == 6 + 8 + 2 + 4  # shapes, colors, the two other patterns, how the wordings start
    assert len(counts) == 6 + 8 + 2  # the last: "How many" and "Count"
    for table, even in ((exists, 0.5), (counts, 0.25)):
        for key, given in table.items():
            spread = 4 * (even * (1 - even) / len(given)) ** 0.5  # four standard deviations
            for answer, times in Counter(given).items():
                assert abs(times / len(given) - even) < spread, (key, answer, times, len(given))


def test_another_picture_gives_the_same_answer_by_chance_alone():
    drawn = [draw(seed, "picture") for seed in range(3000)]
    same = defaultdict(list)
    for drawing, other in pairwise(drawn):
        assert isinstance(other.subject, Scene)
        seen = see(other.subject)
        for exchange in drawing.exchanges:
            if exchange.family == "number":
                written = other.subject.number.text if other.subject.number else ""
                same["number"].append(exchange.answer == f"It is {written}.")
            elif exchange.family == "describe":
                same["describe"].append(description(seen) == exchange.answer)
            elif len(found := answers(exchange.question, seen)) == 1:
                same[exchange.family].append(found == {exchange.answer})
    share = {family: mean(times) for family, times in same.items()}
    chance = {"exists": 0.53, "count": 0.28, "count_kind": 0.28, "color": 0.16, "number": 0.02, "describe": 0.01}
    chance |= dict.fromkeys(("left_of", "right_of", "above", "below"), 0.3)
    assert share.keys() == chance.keys()
    assert all(share[family] < chance[family] for family in chance), share


# The pictures themselves.


def scenes_of(drawing: Drawing) -> tuple[Scene, ...]:
    subject = drawing.subject
    if isinstance(subject, Clip):
        return subject.scenes
    return (subject.first, subject.second) if isinstance(subject, Pair) else (subject,)


def test_a_seed_gives_the_same_sample_whatever_was_drawn_before():
    def everything(seed):
        made = sample(seed)
        return made.kind, made.exchanges, [(p.size, p.mode, p.tobytes()) for p in made.images + made.video]

    first = [everything(seed) for seed in range(30)]
    again = [everything(seed) for seed in reversed(range(30))][::-1]
    assert first == again
    assert len({str(exchanges) for _, exchanges, _ in first}) == 30
    assert sample(7).exchanges == sample(7, sample(7).kind).exchanges


def test_kinds_sizes_and_lengths(drawings):
    shares = Counter(drawing.kind for drawing in drawings)
    assert all(
        abs(shares[k] / len(drawings) - part) < 0.02 for k, part in (("picture", 0.7), ("pair", 0.15), ("clip", 0.15))
    )
    sizes = defaultdict(set)
    for drawing in drawings:
        scenes = scenes_of(drawing)
        for scene in scenes:
            sizes[drawing.kind].update((scene.width, scene.height))
            assert 0.5 <= scene.width / scene.height <= 2
        if isinstance(drawing.subject, Clip):
            assert 4 <= len(scenes) <= 8
            assert len({(scene.width, scene.height) for scene in scenes}) == 1
        fewest, most = {"picture": (5, 8), "pair": (2, 4), "clip": (2, 4)}[drawing.kind]
        assert fewest <= len(drawing.exchanges) <= most
        assert len({exchange.question for exchange in drawing.exchanges}) == len(drawing.exchanges)
    assert (min(sizes["picture"]), max(sizes["picture"])) == (64, 256)
    assert (min(sizes["clip"]), max(sizes["clip"])) == (80, 128)
    made = sample(3, "clip")
    assert [frame.size for frame in made.video] == [made.video[0].size] * len(made.video)


def masks(scene: Scene) -> list[np.ndarray]:
    """Where each thing changes the picture, and the number: bool [height, width] each."""
    empty = np.asarray(render(replace(scene, things=(), number=None)), int)
    alone = [replace(scene, things=(thing,), number=None) for thing in scene.things]
    alone += [replace(scene, things=())] if scene.number else []
    return [np.abs(np.asarray(render(one), int) - empty).max(-1) > 0 for one in alone]


def test_nothing_touches_anything_nor_leaves_the_picture():
    for seed in range(150):
        (scene,) = scenes_of(draw(seed, "picture"))
        found = masks(scene)
        for mask in found:
            assert mask.any()
            assert mask[1:-1, 1:-1].sum() == mask.sum(), seed
        for one, other in combinations(found, 2):
            assert not (ndimage.binary_dilation(one) & other).any(), seed


def test_everything_stands_out_from_what_is_behind_it():
    for seed in range(150):
        (scene,) = scenes_of(draw(seed, "picture"))
        behind = np.asarray(render(replace(scene, things=(), number=None)), int)
        paints = [thing.rgb for thing in scene.things] + ([scene.number.rgb] if scene.number else [])
        for mask, rgb in zip(masks(scene), paints, strict=True):
            around = behind[ndimage.binary_dilation(mask, iterations=2)]
            assert np.sqrt(np.square(around - np.array(rgb)).sum(-1)).min() > 60, (seed, rgb)


def test_small_and_large_are_far_apart_and_small_is_not_too_small():
    widths = defaultdict(list)
    for seed in range(1500):
        for scene in scenes_of(draw(seed)):
            for thing in scene.things:
                widths[thing.size].append(thing.width / (scene.width * scene.height) ** 0.5)
                assert thing.width * 128 / min(scene.width, scene.height) > 10
    assert max(widths["small"]) * 1.6 < min(widths["large"])


def test_digits_are_tall_enough_and_all_of_them_are_drawn():
    for seed in range(300):
        (scene,) = scenes_of(draw(seed, "picture"))
        if number := scene.number:
            upright = replace(scene, things=(), background=GREY, number=replace(number, angle=0.0))
            away = np.abs(np.asarray(render(upright), int) - 130).max(-1) > 40
            assert np.ptp(np.nonzero(away)[0]) + 1 > 0.18 * min(scene.width, scene.height)
            assert ndimage.label(away, np.ones((3, 3)))[1] >= 1
            columns = ndimage.label(away.any(0))[1]
            assert columns <= len(number.text)


@pytest.mark.parametrize("face", FACES)
def test_the_ten_digits_of_a_face_differ(face):
    def digit(text: str) -> np.ndarray:
        number = Number(text, 48.0, 48.0, 60.0, 0.0, face, "black", (0, 0, 0))
        return np.asarray(render(Scene(96, 96, GREY, (), number)).convert("L"), float) < 65

    drawn = {text: digit(text) for text in "0123456789"}
    for one, other in combinations(drawn, 2):
        differ = (drawn[one] ^ drawn[other]).sum() / (drawn[one] | drawn[other]).sum()
        assert differ > 0.15, (one, other, differ)


def test_the_words_are_few_and_both_spellings_are_used(drawings):
    text = " ".join(f"{e.question} {e.answer}" for drawing in drawings for e in drawing.exchanges).lower()
    words = set(re.findall(r"[a-z]+", text))
    assert len(words) < 150
    assert {"color", "colour"} <= words
    assert all(len(set(wordings)) >= 4 for wordings in WORDINGS.values())


def test_a_scene_can_be_asked_for():
    rng = np.random.default_rng(5)
    for count, asked in ((4, ("star", 3)), (1, ("red", 0)), (3, ("orange", 3))):
        scene = draw_scene(rng, count=count, asked=asked)
        assert len(scene.things) == count
        assert sum(asked[0] in (thing.shape, thing.color) for thing in scene.things) == asked[1]
        assert describe(scene) == description(see(scene))
