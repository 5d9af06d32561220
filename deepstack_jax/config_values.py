"""Reads a checkpoint's JSON files: one object per file, and typed values from it."""

import json
import math
import stat
from collections.abc import Callable
from itertools import pairwise
from operator import itemgetter
from pathlib import Path
from typing import Any

from deepstack_jax.errors import naming, short

MAX_JSON_BYTES = 256 << 20  # ten times the largest tokenizer.json
MAX_INT = 2**31 - 1  # of what becomes an int32 on a device
MAX_NUMBER = 1e12


class ConfigError(ValueError):
    """A JSON file of a checkpoint is damaged, or its config.json is not supported."""


class DuplicateKey(ValueError):
    """A JSON object has a key twice, of which every reader would take another value."""


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Makes an object of its keys and values, for `json.loads`; raises `DuplicateKey` if a key occurs twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(key for (key, _), (other, _) in pairwise(sorted(pairs, key=itemgetter(0))) if key == other)
        raise DuplicateKey(f"the key {short(twice)} occurs twice")
    return found


def read_json_object(file: Path) -> dict[str, Any]:
    """Returns the object in a JSON file of a checkpoint.

    Raises `ConfigError` if the file is damaged (the message gives the position), and `OSError` if it can't be read.
    """
    found = file.stat()
    if stat.S_ISFIFO(found.st_mode) or not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
        raise ConfigError(f"{file} is a pipe or a device, not a file: give a file")
    if found.st_size > MAX_JSON_BYTES:
        raise ConfigError(
            f"{file} has {found.st_size} bytes, more than the {MAX_JSON_BYTES} allowed: download it again"
        )
    with naming(file):
        data = file.read_bytes()
    if data.startswith(b"version https://git-lfs"):
        raise ConfigError(f"{file} is a Git LFS pointer, not the file itself: run git lfs pull beside it")
    try:
        raw = json.loads(data.decode(), object_pairs_hook=unique_keys)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        reason = f"{error.reason} at line {line}, byte {error.start}"
    except RecursionError:
        reason = "nested too deeply"
    except ValueError as error:  # includes numbers with too many digits
        reason = str(error) if data.strip() else "it is empty"
    else:
        if isinstance(raw, dict):
            return raw
        raise ConfigError(f"{file} holds {type(raw).__name__}, not an object: download it again, or correct it")
    raise ConfigError(f"{file} is not valid JSON ({reason}): download it again, or correct it there")


class Values:
    """Reads typed values from one object. Null counts as absent.

    A value of the wrong type, or above what any model needs, raises `ConfigError`, before anything of its size is made.
    """

    def __init__(self, raw: dict[str, Any], where: str):
        self.raw, self.where = raw, where

    def integer(self, key: str, default: Any = ..., least: int = 1, most: int = MAX_INT) -> Any:
        """Returns an integer from `least` to `most`; without a `default` it is required."""
        expected = "a positive integer" if least == 1 else f"an integer of at least {least}"
        return self._bounded(key, self._read(key, default, expected, _is_int(least)), most)

    def integers(self, key: str, default: tuple[int, ...], most: int = MAX_INT) -> tuple[int, ...]:
        """Returns a list of integers from 0 to `most`, as a tuple."""
        found = self._read(key, default, "a list of integers of at least 0", _is_list(_is_int(0)))
        return tuple(self._bounded(key, value, most) for value in found)

    def token_ids(self, key: str, default: tuple[int, ...]) -> tuple[int, ...]:
        """Returns a token id or a list of them, as a tuple."""
        one, several = _is_int(0), _is_list(_is_int(0))
        found = self._read(key, default, "a token id or a list of them", lambda value: one(value) or several(value))
        found = (found,) if isinstance(found, int) else tuple(found)
        return tuple(self._bounded(key, value, MAX_INT) for value in found)

    def number(
        self,
        key: str,
        default: Any,
        least: float | None = None,
        above: float | None = None,
        most: float = MAX_NUMBER,
    ) -> Any:
        """Returns a finite number of at least `least` or above `above`, and at most `most`, as a float."""
        bound = f" of at least {least}" if least is not None else f" above {above}" if above is not None else ""

        def fits(value: Any) -> bool:
            if isinstance(value, bool) or not isinstance(value, int | float) or not _is_finite(value):
                return False
            return (least is None or value >= least) and (above is None or value > above)

        found = self._bounded(key, self._read(key, default, f"a number{bound}", fits), most)
        return None if found is None else float(found)

    def flag(self, key: str, default: bool) -> bool:
        """Returns a JSON true or false."""
        return self._read(key, default, "true or false", lambda value: isinstance(value, bool))

    def text(self, key: str, default: Any) -> Any:
        """Returns a string."""
        return self._read(key, default, "a string", lambda value: isinstance(value, str))

    def object(self, key: str) -> dict[str, Any]:
        """Returns an object, which is empty if the key is absent."""
        return self._read(key, {}, "an object", lambda value: isinstance(value, dict))

    def _bounded(self, key: str, value: Any, most: float) -> Any:
        if value is not None and abs(value) > most:
            raise ConfigError(
                f"{self.where}.{key} {short(value)} is above {most:.15g}, the most that is supported: correct it"
            )
        return value

    def _read(self, key: str, default: Any, expected: str, fits: Callable[[Any], bool]) -> Any:
        value = self.raw.get(key)
        if value is None and default is not ...:
            return default
        if not fits(value):
            raise ConfigError(f"{self.where}.{key} must be {expected}, found {short(value)}")
        return value


def _is_int(least: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_list(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list | tuple) and all(map(fits, value))


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(float(value))
    except OverflowError:  # an integer beyond float's range
        return False
