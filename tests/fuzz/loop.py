"""The search: mutates inputs of the corpus, and keeps those that reach lines of the project that no other has reached.

`sys.monitoring` tells each line once, so that watching costs nothing afterwards. Mutations depend only on the seed and
the corpus; how many of them there are depends on the time.
"""

import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import CodeType
from typing import Any

import msgspec

from tests.fuzz.targets import Target, check, with_header

SLOW = 1.0  # seconds of the processor's time
LARGEST = 64 << 10  # bytes of an input
NASTY = (
    None, True, False, 0, 1, -1, 255, 2**31 - 1, 2**31, 2**63, 2**64, -(2**63), 10**30, 0.5, -0.0, 1e-300, 1e300, "",
    "a", "\n", "\0", "\ud800", "x" * 300, "../a", "/etc/passwd", "a" * 5000, [], [[]], [0], {}, {"a": 1}, {"": None},
    b"", b"\xff",
)  # fmt: skip
NUMBERS = tuple(
    value.to_bytes(size, order)
    for size in (1, 2, 4, 8)
    for value in (0, 1, 2 ** (8 * size - 1) - 1, 2 ** (8 * size - 1), 2 ** (8 * size) - 1)
    for order in ("little", "big")
)
_TOOL = sys.monitoring.COVERAGE_ID


class Coverage:
    """The lines of the project that were run, each reported once, while the `with` block lasts."""

    def __init__(self) -> None:
        self.found = 0

    def __enter__(self) -> "Coverage":
        sys.monitoring.use_tool_id(_TOOL, "fuzz")
        sys.monitoring.register_callback(_TOOL, sys.monitoring.events.LINE, self._line)
        sys.monitoring.set_events(_TOOL, sys.monitoring.events.LINE)
        return self

    def __exit__(self, *_: object) -> None:
        sys.monitoring.set_events(_TOOL, 0)
        sys.monitoring.free_tool_id(_TOOL)

    def _line(self, code: CodeType, _line: int) -> Any:
        self.found += "/deepstack_jax/" in code.co_filename
        return sys.monitoring.DISABLE


class Failure(Exception):
    """An input that a target did not take as it should."""

    def __init__(self, data: bytes, reason: str):
        super().__init__(reason)
        self.data = data


def search(target: Target, corpus: Sequence[bytes], seconds: float, seed: int, last: Path) -> tuple[list[bytes], int]:
    """Returns the inputs to keep beside `corpus`, and how many were tried; raises `Failure` for a bad one.

    The file `last` always has the input that is being tried: it remains if the process dies.
    """
    rng, known, kept, tried = random.Random(seed), list(corpus), [], 0
    end = time.monotonic() + seconds
    with Coverage() as coverage:
        for data in known:
            last.write_bytes(data)
            attempt(target, data)
        while time.monotonic() < end:
            before, data = coverage.found, mutate(rng, rng.choice(known), rng.choice(known), target.structure)
            last.write_bytes(data)
            attempt(target, data)
            tried += 1
            if coverage.found > before:
                known.append(data)
                kept.append(data)
    return kept, tried


def attempt(target: Target, data: bytes) -> None:
    """Raises `Failure` if the target raises, or is slow three times in a row, since other programs may slow it too."""
    for _ in range(3):
        start = time.process_time()
        try:
            check(target, data)
        except Exception as error:
            raise Failure(data, f"{type(error).__name__}: {error}") from error
        if (took := time.process_time() - start) < SLOW:
            return
    raise Failure(data, f"{took:.1f} s")


def mutate(rng: random.Random, data: bytes, other: bytes, structure: str) -> bytes:
    """Returns `data` with a few changes, some of which are parts of `other`."""
    change = {"json": _json, "message": _message, "safetensors": _safetensors}.get(structure)
    for _ in range(rng.randint(1, 4)):
        whole = change(rng, data, other) if change and rng.random() < 0.7 else None
        data = _bytes(rng, data, other) if whole is None else whole
    return data[:LARGEST]


def _bytes(rng: random.Random, data: bytes, other: bytes) -> bytes:
    at, until = sorted(rng.randint(0, len(data)) for _ in range(2))
    until = min(until, at + rng.choice((1, 4, 16, 4096)))
    match rng.randrange(6):
        case 0 if data:
            at = min(at, len(data) - 1)
            return data[:at] + bytes((data[at] ^ 1 << rng.randrange(8),)) + data[at + 1 :]
        case 1:
            number = rng.choice(NUMBERS)
            return data[:at] + number + data[at + len(number) :]
        case 2:
            return data[:at] + data[until:]
        case 3:
            return data[:until] + data[at:]
        case 4:
            start = rng.randint(0, len(other))
            return data[:at] + other[start : start + rng.choice((4, 64, 4096))] + data[until:]
        case _:
            return data[:at] + rng.randbytes(rng.randint(1, 8)) + data[at:]


def _json(rng: random.Random, data: bytes, other: bytes) -> bytes | None:
    return _structured(rng, data, other, json.loads, lambda value: json.dumps(value, default=str).encode())


def _message(rng: random.Random, data: bytes, other: bytes) -> bytes | None:
    decode, encode = msgspec.msgpack.decode, msgspec.msgpack.encode
    return _structured(rng, data, other, lambda data: decode(data[1:]), lambda value: data[:1] + encode(value))


def _safetensors(rng: random.Random, data: bytes, other: bytes) -> bytes | None:
    def header(data: bytes) -> Any:
        return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])

    rest = data[8 + int.from_bytes(data[:8], "little") :]
    return _structured(
        rng, data, other, header, lambda value: with_header(json.loads(json.dumps(value, default=str)), rest)
    )


def _structured(
    rng: random.Random, data: bytes, other: bytes, read: Callable[[bytes], Any], write: Callable[[Any], bytes]
) -> bytes | None:
    """Returns the value in `data` with one of its parts changed, or None if it has none or can't be written."""
    try:
        value, donor = read(data), read(other)
        places = list(_places(value))
        if not places:
            return None
        parent, key = rng.choice(places)
        gifts = [part[name] for part, name in _places(donor)]
        match rng.randrange(5):
            case 0:
                del parent[key]
            case 1 if gifts:
                parent[key] = rng.choice(gifts)
            case 2 if isinstance(parent, dict):
                parent[rng.choice(_names(donor) or [""])] = parent.pop(key)
            case 3 if isinstance(parent, list):
                parent.insert(key, parent[key])
            case _:
                parent[key] = rng.choice(NASTY)
        return write(value)
    except (ValueError, TypeError, OverflowError, RecursionError, AttributeError, msgspec.MsgspecError):
        return None


def _places(value: Any) -> Any:
    """Yields (container, key) of every part of a value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield value, key
        yield from _places(inner)


def _names(value: Any) -> list[Any]:
    return [key for parent, key in _places(value) if isinstance(parent, dict)]


def read_corpus(folder: Path) -> list[bytes]:
    """Returns the inputs in a folder by the names of their files."""
    return [file.read_bytes() for file in sorted(folder.glob("*"))]
