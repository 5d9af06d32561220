"""What is asked of a picture, a pair and a clip. Every question has one right answer, which the scene decides.

A number is no shape: "How many shapes" leaves it out. Things are named by color and shape; "the red star" is said only
where there is one red star. Left and right, above and below compare centres, and are asked only where every other
thing's centre is SEPARATION or more away.
"""

from dataclasses import dataclass

from numpy.random import Generator

from deepstack_jax.demo.changes import Clip, Pair
from deepstack_jax.demo.scenes import COLORS, SEPARATION, SHAPES, Number, Scene, Thing, integer, pick

COUNTS = ("none", "one", "two", "three", "four")
SIDES = {"left_of": "left of", "right_of": "right of", "above": "above", "below": "below"}
OFTEN = 0.65  # how often each of the families is asked that any picture allows
# How often a relation is asked whose answer is "Nothing.", where there is one; a quarter of the answers come out so.
NOTHING_SHARE = {"left_of": 0.23, "right_of": 0.23, "above": 0.165, "below": 0.165}

WORDINGS = {
    "describe": (
        "Describe the picture.",
        "Describe this picture.",
        "What is in the picture?",
        "What do you see?",
        "What does the picture show?",
        "Tell me what is in this picture.",
    ),
    "count": (
        "How many shapes are there?",
        "How many shapes are in the picture?",
        "How many shapes do you see?",
        "Count the shapes.",
        "How many objects are there, not counting numbers?",
    ),
    "count_kind": (
        "How many {} are there?",
        "How many {} are in the picture?",
        "How many {} do you see?",
        "Count the {}.",
        "How many {} does the picture show?",
    ),
    "color": (
        "What color is the {}?",
        "What colour is the {}?",
        "Which color does the {} have?",
        "Which colour does the {} have?",
        "Tell me the color of the {}.",
        "Tell me the colour of the {}.",
    ),
    "left_of": (
        "What is left of the {}?",
        "What is to the left of the {}?",
        "Which thing is left of the {}?",
        "What do you see to the left of the {}?",
    ),
    "right_of": (
        "What is right of the {}?",
        "What is to the right of the {}?",
        "Which thing is right of the {}?",
        "What do you see to the right of the {}?",
    ),
    "above": (
        "What is above the {}?",
        "What is there above the {}?",
        "Which thing is above the {}?",
        "What do you see above the {}?",
    ),
    "below": (
        "What is below the {}?",
        "What is there below the {}?",
        "Which thing is below the {}?",
        "What do you see below the {}?",
    ),
    "exists": (
        "Is there {}?",
        "Is there {} in the picture?",
        "Do you see {}?",
        "Does the picture show {}?",
        "Can you see {}?",
    ),
    "number": (
        "Which number is written?",
        "What number is written in the picture?",
        "Read the number.",
        "What number do you see?",
        "Which number does the picture show?",
    ),
    "pair_more": (
        "Which picture has more {}?",
        "Which picture shows more {}?",
        "Where are there more {}?",
        "In which picture do you see more {}?",
    ),
    "pair_changed": (
        "What changed?",
        "What has changed?",
        "What is different in the second picture?",
        "What changed between the pictures?",
    ),
    "pair_describe": (
        "Describe the {} picture.",
        "What is in the {} picture?",
        "What does the {} picture show?",
        "Tell me what is in the {} picture.",
    ),
    "clip_motion": (
        "Which way does the {} move?",
        "Where does the {} move?",
        "In which direction does the {} move?",
        "How does the {} move?",
    ),
    "clip_event": ("What happens?", "What happens in the clip?", "Describe the clip.", "Tell me what happens."),
    "clip_color": (
        "What color is the {} at the {}?",
        "What colour is the {} at the {}?",
        "Which color does the {} have at the {}?",
        "Which colour does the {} have at the {}?",
    ),
    "clip_count": (
        "How many shapes are there at the {}?",
        "How many shapes do you see at the {}?",
        "Count the shapes at the {}.",
        "How many shapes does the clip show at the {}?",
    ),
}


@dataclass(frozen=True)
class Exchange:
    """A question of a family and its one right answer."""

    family: str
    question: str
    answer: str


def ask_of_picture(rng: Generator, scene: Scene) -> tuple[Exchange, ...]:
    """Five to eight exchanges: the description, the number if there is one, and others at random.

    Counts and the first "is there" are asked as often of every scene, so that what a scene allows to be asked besides
    can't tip the balance of their answers. Relations and colors come as far as the scene allows.
    """
    exchanges = [_say(rng, "describe", describe(scene))]
    if scene.number:
        exchanges.append(_say(rng, "number", f"It is {scene.number.text}."))
    if rng.random() < OFTEN:
        exchanges.append(_say(rng, "count", count_sentence(len(scene.things))))
    if rng.random() < OFTEN:
        exchanges.append(_say(rng, "count_kind", count_sentence(_count(scene, scene.asked)), plural(scene.asked)))
    if rng.random() < OFTEN:
        exchanges.append(_ask_exists(rng, scene, pick(rng, ("shape", "color", "both", "both", "number"))))
    wanted = max(integer(rng, 5, 8), len(exchanges))
    for family in _shuffled(rng, ("color", *SIDES)):
        exchange = _ask_color(rng, scene) if family == "color" else _ask_relation(rng, scene, family)
        if exchange and len(exchanges) < wanted:
            exchanges.append(exchange)
    while len(exchanges) < 5:
        exchange = _ask_exists(rng, scene, pick(rng, ("shape", "color", "both")))
        if all(exchange.question != other.question for other in exchanges):
            exchanges.append(exchange)
    return tuple(_shuffled(rng, exchanges))


def ask_of_pair(rng: Generator, pair: Pair) -> tuple[Exchange, ...]:
    """Two to four exchanges: what changed, or which picture has more; and descriptions of either picture."""
    exchanges = []
    if pair.change:
        exchanges.append(_say(rng, "pair_changed", change_sentence(pair)))
    else:
        for word in _shuffled(rng, ("shapes", pair.first.asked)):
            first, second = (_count(scene, word) for scene in (pair.first, pair.second))
            answer = "Both have the same." if first == second else "The first." if first > second else "The second."
            exchanges.append(_say(rng, "pair_more", answer, plural(word)))
    for word, scene in _shuffled(rng, (("first", pair.first), ("second", pair.second)))[: integer(rng, 1, 2)]:
        exchanges.append(_say(rng, "pair_describe", describe(scene), word))
    return tuple(_shuffled(rng, exchanges))


def ask_of_clip(rng: Generator, clip: Clip) -> tuple[Exchange, ...]:
    """Three or four exchanges: what happens, which way a shape moves, and colors and counts at the start or the end."""
    exchanges = [_say(rng, "clip_event", event_sentence(clip))]
    if clip.event == "move":
        still = _still(clip)
        if still and rng.random() < 0.2:
            exchanges.append(_ask_still(rng, still))
        else:
            exchanges.append(_say(rng, "clip_motion", f"It moves {clip.direction}.", name(clip.subject)))
    when = pick(rng, ("start", "end"))
    scene = clip.scenes[0 if when == "start" else -1]
    exchanges.append(_say(rng, "clip_count", count_sentence(len(scene.things)), when))
    when = pick(rng, ("start", "end"))
    things = clip.scenes[0 if when == "start" else -1].things
    alone = [thing for thing in things if sum(other.shape == thing.shape for other in things) == 1]
    if alone:
        thing = pick(rng, alone)
        exchanges.append(_say(rng, "clip_color", f"It is {thing.color}.", thing.shape, when))
    return tuple(_shuffled(rng, exchanges))


def ask_of_what_is_not(rng: Generator, subject: Scene | Clip) -> tuple[Exchange, ...]:
    """What is above the topmost thing of a picture; of a clip, where a thing moves that does not."""
    if isinstance(subject, Clip):
        still = _still(subject)
        return (_ask_still(rng, still),) if still else ()
    topmost = _related(subject, "above")[0]
    return (_say(rng, "above", *pick(rng, topmost)),) if topmost else ()


def describe(scene: Scene) -> str:
    """All shapes with size and color from left to right, the number in its place: "A large red star and a number."."""
    things = sorted((*scene.things, *((scene.number,) if scene.number else ())), key=lambda thing: thing.x)
    parts = ["a number" if isinstance(thing, Number) else f"a {thing.size} {name(thing)}" for thing in things]
    if not parts:
        return "Nothing."
    return _sentence(" and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts))


def change_sentence(pair: Pair) -> str:
    """What the one change of a pair was."""
    if pair.before and pair.after:
        became = pair.after.color if pair.change == "color" else pair.after.size
        return f"The {name(pair.before)} became {became}."
    if pair.before:
        return f"The {name(pair.before)} was removed."
    if pair.after:
        return _sentence(f"{article(pair.after.color)} {name(pair.after)} was added")
    return "Nothing changed."


def event_sentence(clip: Clip) -> str:
    """What happens in a clip."""
    if clip.event == "move":
        return f"The {name(clip.subject)} moves {clip.direction}."
    if clip.event == "appear":
        return _sentence(f"{article(clip.subject.color)} {name(clip.subject)} appears")
    return f"The {name(clip.subject)} turns {clip.color}."


def count_sentence(count: int) -> str:
    """A count of none to four."""
    return f"There {'is' if count == 1 else 'are'} {COUNTS[count]}."


def name(thing: Thing | Number) -> str:
    """How questions and answers name a thing: its color and shape."""
    return "number" if isinstance(thing, Number) else f"{thing.color} {thing.shape}"


def plural(word: str) -> str:
    """Things of a shape or a color: "crosses", "red shapes"; "shapes" for all."""
    if word in COLORS:
        return f"{word} shapes"
    return word if word == "shapes" else "crosses" if word == "cross" else f"{word}s"


def article(word: str) -> str:
    """The indefinite article before a word."""
    return "an" if word == "orange" else "a"


def _ask_color(rng: Generator, scene: Scene) -> Exchange | None:
    """Of a shape that is there once, else of one that is there once in its size."""
    for key in (lambda thing: thing.shape, lambda thing: f"{thing.size} {thing.shape}"):
        keys = [key(thing) for thing in scene.things]
        alone = [thing for thing in scene.things if keys.count(key(thing)) == 1]
        if alone:
            thing = pick(rng, alone)
            return _say(rng, "color", f"It is {thing.color}.", key(thing))
    return None


def _ask_exists(rng: Generator, scene: Scene, pattern: str) -> Exchange:
    """Yes and no are as likely for each thing asked; what is absent is often nearly there."""
    if pattern == "number":  # half of all pictures have one
        return _say(rng, "exists", "Yes." if scene.number else "No.", "a number")
    present = rng.random() < 0.5
    shapes = {thing.shape for thing in scene.things}
    colors = {thing.color for thing in scene.things}
    if pattern == "shape":
        shape = pick(rng, [shape for shape in SHAPES if (shape in shapes) == present])
        what = f"a {shape}"
    elif pattern == "color":
        color = pick(rng, [color for color in COLORS if (color in colors) == present])
        what = f"{article(color)} {color} shape"
    else:
        kinds = {(thing.color, thing.shape) for thing in scene.things}
        if present:
            options = sorted(kinds)
        else:
            options = [(color, shape) for color in COLORS for shape in SHAPES if (color, shape) not in kinds]
            near = pick(rng, ("color", "shape", "either", "any"))
            close = [
                (color, shape)
                for color, shape in options
                if (near != "shape" and color in colors) or (near != "color" and shape in shapes) or near == "any"
            ]
            options = close or options
        color, shape = pick(rng, options)
        what = f"{article(color)} {color} {shape}"
    return _say(rng, "exists", "Yes." if present else "No.", what)


def _ask_relation(rng: Generator, scene: Scene, family: str) -> Exchange | None:
    """What is on that side of a thing, where that is nothing or exactly one thing."""
    wanted = _related(scene, family)[0 if rng.random() < NOTHING_SHARE[family] else 1]
    return _say(rng, family, *pick(rng, wanted)) if wanted else None


def _related(scene: Scene, family: str) -> dict[int, list[tuple[str, str]]]:
    """(answer, thing) of those with nothing, and of those with one thing, on that side and no doubt about any other."""
    things: list[Thing | Number] = [*scene.things, *((scene.number,) if scene.number else ())]
    names = [name(thing) for thing in things]
    sign = -1 if family in ("left_of", "above") else 1
    sideways = family in ("left_of", "right_of")
    found: dict[int, list[tuple[str, str]]] = {0: [], 1: []}
    for thing in things:
        if names.count(name(thing)) > 1:
            continue
        others = [other for other in things if other is not thing]
        if sideways:
            apart = [sign * (other.x - thing.x) / scene.width for other in others]
        else:
            apart = [sign * (other.y - thing.y) / scene.height for other in others]
        there = [name(other) for other, distance in zip(others, apart, strict=True) if distance > 0]
        if len(there) < 2 and all(abs(distance) >= SEPARATION for distance in apart):
            found[len(there)].append((f"The {there[0]}." if there else "Nothing.", name(thing)))
    return found


def _still(clip: Clip) -> list[Thing]:
    """What stands still while another thing moves."""
    if clip.event != "move":
        return []
    moves = clip.subject.shape, clip.subject.color
    return [thing for thing in clip.scenes[-1].things if (thing.shape, thing.color) != moves]


def _ask_still(rng: Generator, still: list[Thing]) -> Exchange:
    return _say(rng, "clip_motion", "It does not move.", name(pick(rng, still)))


def _count(scene: Scene, word: str) -> int:
    """How many shapes there are, or how many of a shape or a color."""
    return sum(word in ("shapes", thing.shape, thing.color) for thing in scene.things)


def _say(rng: Generator, family: str, answer: str, *words: str) -> Exchange:
    return Exchange(family, pick(rng, WORDINGS[family]).format(*words), answer)


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def _shuffled[T](rng: Generator, items: tuple[T, ...] | list[T]) -> list[T]:
    return [items[i] for i in rng.permutation(len(items))]
