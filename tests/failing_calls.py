"""Calls of the system that fail: `failing_calls.c`, built for the tests and loaded into processes that they start."""

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

_NOTICE = ctypes.CFUNCTYPE(None, ctypes.c_char, ctypes.c_int, ctypes.c_char_p)


class FailingCalls:
    """The library in this process, into which LD_PRELOAD must have loaded it; the kinds of calls are in its source."""

    def __init__(self, library: str):
        self._library = ctypes.CDLL(library)
        self._notice: Any = None

    def arm(self, folder: object, kind: str, first: int = 0, last: int = 0, error: int = 0, least: int = 0) -> None:
        """Lets the calls `first` to `last` of a kind fail with an errno; only those in `folder`, if it is of files."""
        where, what = str(folder).encode(), ctypes.c_char(kind.encode())
        self._library.arm(where, what, first, last, error, ctypes.c_size_t(least))

    def calls(self) -> int:
        """How many calls of the kind there were since it was armed."""
        return self._library.calls()

    def watch(self, notice: Callable[[str, bool, Path], None] | None) -> None:
        """Calls `notice` (kind, whether it is done, path) before and after each sync and rename in the folder."""
        if notice is None:
            self._library.watch(None)
            return
        self._notice = _NOTICE(lambda what, done, path: notice(what.decode(), bool(done), Path(os.fsdecode(path))))
        self._library.watch(self._notice)


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library's file."""
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs a C compiler, and Linux's LD_PRELOAD")
    built = tmp_path_factory.mktemp("library") / "failing_calls.so"
    source = Path(__file__).parent / "failing_calls.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", str(built), str(source), "-ldl"], check=True)
    return built


def environment_of(library: Path, kind: str, first: int, last: int, error: int, **where: Any) -> dict[str, str]:
    """The environment of a process in which calls fail from its start (see `FailingCalls.arm`)."""
    armed = f"{kind} {first} {last} {error} {where.get('least', 0)} {where.get('folder', '')}"
    return {**os.environ, "JAX_PLATFORMS": "cpu", "LD_PRELOAD": str(library), "FAILING_CALLS": armed}
