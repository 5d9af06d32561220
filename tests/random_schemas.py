"""Random JSON schemas, and random texts that a grammar allows."""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np

PATTERNS = ("^[a-z]{1,5}$", "^(ab|cd)+$", "^[0-9]{3}-[A-Z]?$", "^x.y$")
FORMATS = ("ipv4", "uuid")
NAMES = ("a", "b", "name", "x y", "ü", 'q"', "key\\", "")
LONGEST = 4000  # tokens; a text that doesn't end by then is not going to


def draw_schema(rng: random.Random, depth: int = 3) -> dict[str, Any]:
    """A schema that can be satisfied, of what llguidance supports."""
    kinds = [_string, _number, _choice, _simple]
    kinds += [_object, _object, _array, _any_of] if depth else []
    schema = rng.choice(kinds)(rng, depth - 1)
    if depth == 3 and rng.random() < 0.3:
        schema = {"type": "array", "items": {"$ref": "#/$defs/item"}, "maxItems": 3, "$defs": {"item": schema}}
    return schema


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(NAMES, rng.randint(0, 4))
    schema: dict[str, Any] = {"type": "object", "properties": {name: draw_schema(rng, depth) for name in names}}
    schema["required"] = [name for name in names if rng.random() < 0.6]
    more = rng.choice((False, False, True, None, {"type": "integer"}))
    return schema if more is None else schema | {"additionalProperties": more}


def _array(rng: random.Random, depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "array", "items": draw_schema(rng, depth)}
    least = rng.randint(0, 2)
    if rng.random() < 0.5:
        schema |= {"minItems": least, "maxItems": least + rng.randint(0, 2)}
    if rng.random() < 0.3:
        schema["prefixItems"] = [draw_schema(rng, depth) for _ in range(rng.randint(1, 2))]
    return schema


def _any_of(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [draw_schema(rng, depth) for _ in range(rng.randint(1, 3))]}


def _string(rng: random.Random, _: int) -> dict[str, Any]:
    least = rng.randint(0, 3)
    bounds = {"minLength": least, "maxLength": least + rng.randint(0, 4)}
    kinds = ({}, bounds, {"pattern": rng.choice(PATTERNS)}, {"format": rng.choice(FORMATS)})
    return {"type": "string"} | rng.choice(kinds)


def _number(rng: random.Random, _: int) -> dict[str, Any]:
    least, span = rng.randint(-50, 50), rng.randint(2, 1000)
    low = rng.choice(({}, {"minimum": least}, {"exclusiveMinimum": least}))
    high = rng.choice(({}, {"maximum": least + span}, {"exclusiveMaximum": least + span}))
    return {"type": rng.choice(("integer", "number"))} | low | high


def _choice(rng: random.Random, _: int) -> dict[str, Any]:
    values = ["red", "a b", 'say "x"', 3, -1.5, True, None, [1, "two"], {"k": 0}]
    return {"const": rng.choice(values)} if rng.random() < 0.3 else {"enum": rng.sample(values, rng.randint(1, 4))}


def _simple(rng: random.Random, _: int) -> dict[str, Any]:
    return rng.choice(({"type": "boolean"}, {"type": "null"}, {"type": ["null", "boolean", "integer"]}))


def allowed_tokens(grammar: Any, vocab_size: int) -> np.ndarray:
    """The tokens that may come next."""
    row = np.zeros(-(-vocab_size // 32), np.int32)
    grammar.fill(row)
    return np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little"))


def walk(grammar: Any, texts: list[str], end_tokens: tuple[int, ...], rng: random.Random, free: int) -> list[int]:
    """Tokens of a text that the grammar allows: `free` are drawn, and the next ones lead to an end."""
    tokens: list[int] = []
    while not grammar.finished:
        allowed = allowed_tokens(grammar, len(texts))
        assert len(allowed), "nothing may come next"
        token = rng.choice(allowed.tolist()) if len(tokens) < free else _towards_the_end(allowed, texts, end_tokens)
        tokens.append(token)
        assert len(tokens) < LONGEST, "the text doesn't end"
        grammar.accept(token)
    return tokens


def _towards_the_end(allowed: np.ndarray, texts: list[str], end_tokens: tuple[int, ...]) -> int:
    by_text = {texts[token]: int(token) for token in reversed(allowed)}
    ends = [token for token in end_tokens if token in allowed]
    closing = '"abcx0' if {"q", "}"} <= by_text.keys() else '}],"0123456789:tfn-[{ax'  # in a string, or outside
    return next(iter(ends), None) or next(_of(by_text, closing), int(allowed[0]))


def _of(by_text: dict[str, int], texts: str) -> Iterator[int]:
    return (by_text[text] for text in texts if text in by_text)
