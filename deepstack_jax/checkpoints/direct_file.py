"""Writes large files without filling the page cache.

Newly written weights are rarely read again soon, and in the cache they would evict data that is. When memory is nearly
full, finding pages for them costs more than writing them. Direct writes need Linux and a file system that accepts
O_DIRECT; elsewhere the file is written normally.
"""

import errno
import fcntl
import math
import mmap
import os
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import DTypeLike

from deepstack_jax.rounding import cdiv

_BUFFER = 1 << 20
_BLOCK = 4096  # a multiple of a disk's block size: lengths and offsets of direct writes must be multiples of it


def aligned_empty(shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """Returns an array whose memory starts at a page boundary, so that `DirectFile` can write it without a copy."""
    count = math.prod(shape)
    room = mmap.mmap(-1, max(1, count * np.dtype(dtype).itemsize))
    return np.frombuffer(room, dtype, count).reshape(shape)


class DirectFile:
    """A new file, written in order and forced to disk when the `with` block ends.

    Raises `FileExistsError` if the file exists and `OSError` if a write fails. If the block raises, the file is closed
    but left incomplete.
    """

    def __init__(self, file: Path):
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        try:
            self._descriptor = os.open(file, flags | getattr(os, "O_DIRECT", 0), 0o644)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            file.unlink(missing_ok=True)  # some file systems create the file before they refuse O_DIRECT
            self._descriptor = os.open(file, flags, 0o644)
        self._buffer = mmap.mmap(-1, _BUFFER)  # page-aligned, as direct writes require
        self._filled = self._length = 0

    def write(self, values: np.ndarray) -> None:
        """Appends the bytes of a contiguous array. An array of whole blocks from `aligned_empty` is not copied."""
        if not self._filled and values.ctypes.data % _BLOCK == 0 and values.nbytes % _BLOCK == 0:
            self._write_all(memoryview(values.reshape(-1).view(np.uint8)))
            self._length += values.nbytes
            return
        data = memoryview(values.reshape(-1).view(np.uint8))
        while data:
            count = min(len(data), _BUFFER - self._filled)
            self._buffer[self._filled : self._filled + count] = data[:count]
            self._filled += count
            data = data[count:]
            if self._filled == _BUFFER:
                self._flush()

    def __enter__(self) -> "DirectFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._flush()
                os.ftruncate(self._descriptor, self._length)
                os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)
            self._buffer.close()

    def _flush(self) -> None:
        """Writes the buffered bytes, padded to whole blocks; closing the file truncates the padding."""
        self._length += self._filled
        with memoryview(self._buffer) as buffer:
            self._write_all(buffer[: cdiv(self._filled, _BLOCK) * _BLOCK])
        self._filled = 0

    def _write_all(self, data: memoryview) -> None:
        with data:
            start = 0
            while start < len(data):
                with data[start:] as rest:
                    start += self._write_once(rest)

    def _write_once(self, data: memoryview) -> int:
        try:
            return os.write(self._descriptor, data)
        except OSError as error:
            flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
            direct = flags & getattr(os, "O_DIRECT", 0)
            if error.errno != errno.EINVAL or not direct:
                raise
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~direct)
            return os.write(self._descriptor, data)
