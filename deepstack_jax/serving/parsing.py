"""What a body may hold, counted before it is parsed, and the thread in which large bodies are read.

The parser holds the interpreter until it has read a body, in whichever thread it runs. The bounds here keep that below
50 ms; the count itself goes piece by piece.
"""

import asyncio
import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from deepstack_jax.serving.errors import RequestError

TEXT_BYTES = 16 << 20  # limit of a body without its media, which base64 makes a third longer
INLINE_BYTES = 64 << 10  # larger bodies are read off the event loop
MAX_DEPTH = 100  # of lists and objects in each other
MAX_CONTAINERS = 1 << 17  # lists, objects and their keys
MAX_VALUES = 1 << 19  # of lists and objects
MAX_ESCAPES = 1 << 21
MAX_DIGITS = 40  # of a number
MAX_LONG_NUMBERS = 1024  # of more than 20 characters, which take a hundred times as long as others
_PIECE_BYTES = 1 << 18

# one thread, because each of several would hold the interpreter in turn
_reader = ThreadPoolExecutor(1, thread_name_prefix="bodies")


async def read_body[T](body: bytes | bytearray, read: Callable[[], T]) -> T:
    """Returns `read()`, which reads a body; it runs in a thread if the body is large."""
    if len(body) <= INLINE_BYTES:
        return read()
    return await asyncio.get_running_loop().run_in_executor(_reader, copy_context().run, read)


def parse_json(body: bytes | bytearray) -> Any:
    """Returns the value in a body.

    Raises:
        RequestError: 400: it is not JSON, or holds more than a request needs.
    """
    check_body(body)
    try:
        bytearray(2 * len(body))  # raises MemoryError where msgspec would end the process; gives it back at once
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise RequestError(f"the body is not valid JSON ({error}): send one JSON object", code="invalid_json") from None


def to_json(value: Any) -> bytes:
    """Returns JSON of a value, in which integers may have any size, as in what a request sent."""
    try:
        return msgspec.json.encode(value)
    except OverflowError:  # more than 64 bits
        return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def check_body(body: bytes | bytearray) -> None:
    """Refuses a body that would take long to parse. One that isn't JSON passes up to where it ceases to be.

    Raises:
        RequestError: 400 with the bound.
    """
    count = _Count()
    for start in range(0, len(body), _PIECE_BYTES):
        count.add(bytes(memoryview(body)[start : start + _PIECE_BYTES]))


@dataclass
class _Count:
    """What a body holds so far."""

    depth: int = 0
    containers: int = 0
    values: int = 0
    escapes: int = 0
    long_numbers: int = 0
    blank: int = 0  # bytes outside of strings
    beyond_ascii: int = 0
    quoted: bool = False  # whether the last piece ended inside a string
    escaping: bytes = b""  # a backslash at its end

    def add(self, piece: bytes) -> None:
        """Counts the next piece."""
        if not piece.isascii():
            self.beyond_ascii += len(piece.translate(None, _ASCII))
            self._bound("bytes beyond ASCII", self.beyond_ascii, TEXT_BYTES)
        outside = self._outside(self.escaping + piece)
        self.blank += len(outside)
        self._bound("bytes outside of strings", self.blank, TEXT_BYTES)
        outside = outside.translate(None, b" \t\r\n")
        self.containers += len(outside) - len(outside.translate(None, b"[{:"))
        self._bound("lists, objects and keys", self.containers, MAX_CONTAINERS)
        self.values += outside.count(b",")
        self._bound("values", self.values, MAX_VALUES)
        brackets = np.frombuffer(outside.translate(None, _NO_BRACKETS), np.uint8)
        if len(brackets):
            depths = self.depth + np.cumsum(np.where((brackets == ord("[")) | (brackets == ord("{")), 1, -1))
            self._bound("levels of lists and objects in each other", int(depths.max()), MAX_DEPTH)
            self.depth = int(depths[-1])
        numbers = _LONG_NUMBER.findall(outside)
        if any(len(number) > MAX_DIGITS for number in numbers):
            raise RequestError(
                f"the body has a number of more than {MAX_DIGITS} characters: send fewer digits", code="too_complex"
            )
        self.long_numbers += len(numbers)
        self._bound("numbers of more than 20 characters", self.long_numbers, MAX_LONG_NUMBERS)

    def _outside(self, piece: bytes) -> bytes:
        """Returns what is outside of strings, with the quotation mark at each string's end."""
        self.escaping = b""
        if b"\\" in piece:
            if (len(piece) - len(piece.rstrip(b"\\"))) % 2:
                piece, self.escaping = piece[:-1], b"\\"
            self.escapes += piece.count(b"\\")
            self._bound("escaped characters", self.escapes, MAX_ESCAPES)
            piece = piece.replace(b"\\\\", b"").replace(b'\\"', b"")
        if b'"' not in piece:
            return b"" if self.quoted else piece
        array = np.frombuffer(piece, np.uint8)
        quoted = (np.cumsum(array == ord('"'), dtype=np.uint8) + self.quoted) % 2
        self.quoted = bool(quoted[-1])
        return array[quoted == 0].tobytes()

    def _bound(self, what: str, count: int, most: int) -> None:
        if count > most:
            raise RequestError(f"the body has more than {most} {what}: send less", code="too_complex")


_ASCII = bytes(range(128))
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_LONG_NUMBER = re.compile(rb"[-+.0-9eE]{21,}")
