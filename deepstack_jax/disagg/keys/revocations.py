"""The nodes of a cluster that are shut out, listed in a file."""

import logging
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

MAX_FILE = 1 << 20  # bytes
_log = logging.getLogger(__name__)
_ENTRY = re.compile(r"[a-z0-9.-]{1,63}")  # a node's name or a serial


class Named(Protocol):
    """What can be revoked: a certificate."""

    @property
    def name(self) -> str: ...

    @property
    def serial(self) -> str: ...


class Revocations:
    """Names and serials of revoked nodes. While the process runs, none is taken back: a cut-off file admits nobody."""

    def __init__(self, file: Path | None = None):
        """
        Args:
            file: a name or a serial per line; `#` begins a comment. Without it, nobody is revoked.

        Raises:
            ValueError: it can't be used; the message names the remedy.
        """
        self._file, self._version = file, _version(file)
        self._entries = _read(file) if file else frozenset[str]()
        self._watchers: list[Callable[[], None]] = []

    @property
    def has_file(self) -> bool:
        """Whether there is a file to reload."""
        return self._file is not None

    def __contains__(self, certificate: Named) -> bool:
        return not self._entries.isdisjoint((certificate.name, certificate.serial))

    def watch(self, changed: Callable[[], None]) -> None:
        """Calls `changed` after each reload."""
        self._watchers.append(changed)

    def refresh(self) -> None:
        """Reloads the file if it has changed. One that can't be used is logged, once, and changes nothing."""
        if _version(self._file) == self._version:
            return
        try:
            self.reload()
        except ValueError as error:
            _log.error("the revoked nodes are still those from before: %s", error)

    def reload(self) -> None:
        """Reads the file again and adds what is new in it.

        Raises:
            ValueError: it can't be used, and the entries are those from before.
        """
        if self._file:
            self._version = _version(self._file)  # a change from here on is seen by the next `refresh`
            self._entries |= _read(self._file)
            for changed in self._watchers:
                changed()


def _version(file: Path | None) -> tuple[int, ...] | None:
    """What differs once a file is written, replaced, or given other rights; None if it can't be found."""
    try:
        found = os.stat(file) if file else None
    except OSError:
        return None
    return found and (found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def _read(file: Path) -> frozenset[str]:
    try:
        # opening a pipe would wait for its writer
        with open(file, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK)) as opened:
            found = os.fstat(opened.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise ValueError(f"the list of revoked nodes {file} is not a regular file: give one")
            if found.st_uid not in (0, os.geteuid()) or found.st_mode & 0o022:
                raise ValueError(
                    f"the list of revoked nodes {file} can be changed by other users: "
                    f"chown {os.geteuid()} {file}, and chmod go-w {file}"
                )
            content = opened.read(MAX_FILE + 1)
        text = content.decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise ValueError(f"the list of revoked nodes {file} can't be read ({reason}): check the path") from None
    if len(content) > MAX_FILE:
        raise ValueError(f"the list of revoked nodes {file} is longer than {MAX_FILE} bytes: shorten it")
    *lines, rest = text.split("\n")
    if rest:  # half a name would shut out another node
        raise ValueError(f"the last line of {file} is cut off: end it with a line break")
    entries = set()
    for number, line in enumerate(lines, 1):
        entry = line.partition("#")[0].strip()
        if entry and not _ENTRY.fullmatch(entry):
            raise ValueError(f"{file} line {number} is neither the name nor the serial of a node: correct it")
        entries.add(entry)
    return frozenset(entries - {""})
