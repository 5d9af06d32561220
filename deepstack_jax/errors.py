"""Helpers for error messages of all parts."""

import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import takewhile
from typing import Any

MAX_MESSAGE = 1000  # characters


def one_line(error: BaseException) -> str:
    """Returns an exception's message on one printable line, or the name of its type if it has no message."""
    return printable(" ".join(str(error).split())) or type(error).__name__


# what a process may lack, and what its operator can do
REMEDIES = {
    "memory": "give it more, or a smaller model or limit",
    "threads": "raise the limit on processes (ulimit -u, or pids of the container)",
    "open files": "raise their limit (ulimit -n)",
}
_LACKING = {
    errno.ENOMEM: "memory",
    errno.ENOBUFS: "memory",
    errno.EAGAIN: "threads",  # of a process that can't be started
    errno.EMFILE: "open files",
    errno.ENFILE: "open files",
}


# XLA's and Pillow's words: they raise other types
_LACKING_MEMORY = "RESOURCE_EXHAUSTED: Out of memory", "out of memory when reading image file"


def shortage(error: BaseException) -> str | None:
    """Returns what the process lacked when `error` was raised, a key of `REMEDIES`; None if it lacked nothing."""
    if isinstance(error, MemoryError) or str(error).startswith(_LACKING_MEMORY):
        return "memory"
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        return "threads"
    return _LACKING.get(error.errno or 0) if isinstance(error, OSError) else None


def raise_shortage(error: BaseException) -> None:
    """Raises `error` again if something was lacking: it says nothing about the file that was being read."""
    if shortage(error):
        raise error


@contextmanager
def naming(file: str | os.PathLike[str]) -> Iterator[None]:
    """Adds the name of `file` to an `OSError` that has none: a read or write that fails knows only a descriptor."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(file)
        raise


def printable(text: str, most: int = MAX_MESSAGE) -> str:
    """Returns the first `most` characters; what a terminal or a reader of lines could take for more is escaped."""
    cut = text[:most]
    if not cut.isprintable():
        cut = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in cut)
    return cut + "..." if len(text) > most else cut


def short(value: Any) -> str:
    """Returns `value` as an error message shows it: about 100 characters at most, however large it is."""
    text = repr(_beginning(value, [100]))
    return text if len(text) <= 100 else text[:100] + "..."


def _beginning(value: Any, left: list[int]) -> Any:
    """The first values of nested lists and objects, as many as `left` says; each takes a character at least."""
    left[0] -= 1
    if isinstance(value, str | bytes):
        return value[:101]
    if isinstance(value, Mapping):
        return {_beginning(key, left): _beginning(value[key], left) for key in takewhile(lambda _: left[0] > 0, value)}
    if isinstance(value, list | tuple):
        values = [_beginning(one, left) for one in takewhile(lambda _: left[0] > 0, value)]
        return values if isinstance(value, list) else tuple(values)
    return value
