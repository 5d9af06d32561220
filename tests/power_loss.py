"""What a power loss leaves of a directory, by a simple model of a disk.

Of a file, what was written since its last sync is lost: it is cut off, or reads as zeros. Of a directory, the entries
since its last sync are lost, or all of them have reached the disk before the files' contents.
"""

import os
import stat
import threading
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Image:
    """What may be left after one power loss: the contents of files, and the directories, by path."""

    name: str
    files: dict[str, bytes]
    directories: frozenset[str]

    def write(self, place: Path) -> None:
        """Writes it into a new directory."""
        place.mkdir()
        for path in sorted(self.directories):
            (place / path).mkdir()
        for path, content in self.files.items():
            (place / path).write_bytes(content)


class Disk:
    """The disk under a directory that exists and is synced.

    Attributes:
        images: what a power loss would have left at each moment; equal ones once.
    """

    def __init__(self, root: Path):
        self.images: list[Image] = []
        self._root, self._lock = root, threading.Lock()
        self._descriptors: dict[int, int] = {}  # by inode: one that is open is given to no other file
        self._contents: dict[int, bytes] = {}
        self._entries: dict[int, dict[str, int]] = {}
        self.synced(root)

    def notice(self, what: str, done: bool, path: Path) -> None:
        """Takes what `FailingCalls.watch` says."""
        with self._lock:
            if not done:
                self.lose_power(f"before {'sync' if what == 's' else 'rename'} of {path.relative_to(self._root)}")
            elif what == "s":
                self.synced(path)

    def synced(self, path: Path) -> None:
        """A file or directory is on the disk as it is now."""
        if path.is_dir():
            self._entries[self._inode(path)] = {name: self._inode(path / name) for name in os.listdir(path)}
        else:
            self._contents[self._inode(path)] = path.read_bytes()

    def lose_power(self, when: str) -> list[Image]:
        """Keeps and returns the images of a power loss at this moment."""
        images = []
        for entries in ("lost", "kept"):
            found: dict[str, int] = {}
            if entries == "lost":
                self._walk_synced(self._inode(self._root), "", found)
            else:
                self._walk(self._root, "", found)
            directories = frozenset(path for path, inode in found.items() if self._is_directory(inode))
            for lost in ("cut", "zeros"):
                files = {path: self._content(found[path], lost) for path in found.keys() - directories}
                image = Image(f"{when}, entries {entries}, contents {lost}", files, directories)
                images.append(image)
                if not any(image.files == one.files and directories == one.directories for one in self.images):
                    self.images.append(image)
        return images

    def _walk_synced(self, inode: int, prefix: str, found: dict[str, int]) -> None:
        for name, below in self._entries.get(inode, {}).items():
            found[prefix + name] = below
            if self._is_directory(below):
                self._walk_synced(below, f"{prefix}{name}/", found)

    def _walk(self, folder: Path, prefix: str, found: dict[str, int]) -> None:
        for name in os.listdir(folder):
            try:
                found[prefix + name] = self._inode(folder / name)
                if (folder / name).is_dir():
                    self._walk(folder / name, f"{prefix}{name}/", found)
            except FileNotFoundError:  # another thread has removed it
                found.pop(prefix + name, None)

    def _content(self, inode: int, lost: str) -> bytes:
        kept = self._contents.get(inode, b"")
        return kept if lost == "cut" else kept.ljust(os.fstat(self._descriptors[inode]).st_size, b"\0")

    def _is_directory(self, inode: int) -> bool:
        return stat.S_ISDIR(os.fstat(self._descriptors[inode]).st_mode)

    def _inode(self, path: Path) -> int:
        descriptor = os.open(path, os.O_RDONLY)
        inode = os.fstat(descriptor).st_ino
        if self._descriptors.setdefault(inode, descriptor) != descriptor:
            os.close(descriptor)
        return inode
