"""Reads and writes safetensors files, one tensor or some of its rows at a time.

The safetensors library checks the headers. It reads values only through a memory map, where a disk that fails or a file
that is cut short ends the process, and it writes only whole files: `TensorReader` and `FileWriter` replace it there. A
file consists of eight bytes with the header's length, the header as JSON (name -> dtype, shape, range of bytes), and
the data.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from deepstack_jax.config_values import DuplicateKey, unique_keys
from deepstack_jax.errors import naming, short

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_LFS_POINTER = b"version https://git-lfs"
MAX_NAME = 512
MAX_AXES = 64  # NumPy's
MAX_HEADER_BYTES = 100_000_000  # safetensors' own bound
_NOT_A_HEADER = ("header too small", "header too large", "invalid header length")  # safetensors' words
_NOT_COVERED = "file not fully covered"

Rows = tuple[int | slice, ...]


class CheckpointError(ValueError):
    """A checkpoint can't be read. The message names the file, the tensor, the value and the remedy."""


class CheckpointWarning(UserWarning):
    """A checkpoint is read or converted differently from what a user would expect."""


@dataclass(frozen=True)
class Entry:
    """A tensor in a file.

    Attributes:
        code: the dtype as the file spells it, which may be an unsupported one.
        start: where its values begin in the file, in bytes.
        version: the file's inode, size and time of its last change when its header was read.
    """

    name: str
    file: Path
    code: str
    shape: tuple[int, ...]
    start: int
    version: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype:
        """The numpy dtype; raises `CheckpointError` if it is not supported."""
        if self.code in DTYPES:
            return DTYPES[self.code]
        remedy = f"expected one of {', '.join(DTYPES)}"
        if self.code.startswith(("F8", "F4")):
            remedy = "these weights are quantised, give a checkpoint in bfloat16"
        raise CheckpointError(
            f"{self.file}: tensor {self.name} has dtype {self.code}, which is not supported: {remedy}"
        )


def refuse_lfs_pointer(file: Path) -> None:
    """Raises `CheckpointError` if Git LFS has not fetched the contents of `file`."""
    with naming(file), file.open("rb") as stream:
        if stream.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise CheckpointError(
                f"{file} is a Git LFS pointer, not the file itself: run git lfs pull in its directory"
            )


def read_entries(file: Path) -> dict[str, Entry]:
    """Reads and checks the header of `file`, by tensor name; raises `CheckpointError` if it is missing or damaged."""
    try:
        if not file.is_file() and file.exists():
            raise CheckpointError(f"{file} is a directory, a pipe or a device, not a file: download it again")
        refuse_lfs_pointer(file)
        entries = _read_header(file)
        try:
            with safe_open(file, "numpy") as tensors:
                names: list[str] = tensors.keys()
                return {name: entries[name] for name in names}
        except SafetensorError as error:
            reason = _why_refused(str(error), file.stat().st_size)
            raise CheckpointError(f"{file} {reason}: download it again") from None
        except KeyError:
            raise _changed(file) from None
    except FileNotFoundError:
        raise CheckpointError(f"{file} does not exist: download the missing file") from None


def _read_header(file: Path) -> dict[str, Entry]:
    """Raises `CheckpointError` unless names differ, sizes fit, and the ranges follow each other without gap or overlap.

    The library checks the rest, and refuses a file for which this returns nothing. Of these faults, it accepts the same
    name twice and doesn't tell the values of others.
    """
    with naming(file), file.open("rb") as stream:
        version = _version(stream.fileno())
        size = version[1]
        length = int.from_bytes(stream.read(8), "little")
        if not 0 < length <= min(size - 8, MAX_HEADER_BYTES):
            return {}
        text = stream.read(length)
    try:
        header = json.loads(text, object_pairs_hook=unique_keys)
        ranges = [(*one["data_offsets"], name, one) for name, one in header.items() if name != "__metadata__"]
        end, entries = 0, {}
        for start, stop, name, one in sorted(ranges, key=lambda found: found[:2]):
            shape, wrong = one["shape"], ""
            if not all(type(number) is int and 0 <= number < 1 << 64 for number in shape):
                return {}
            bits = int(found[0]) if (found := re.search(r"\d+", one["dtype"])) else 8
            if not name.isprintable() or len(name) > MAX_NAME:
                wrong = f"has a name of {len(name)} characters, expected at most {MAX_NAME} that can be printed"
            elif start != end or stop < start:
                wrong = f"has the bytes {short(start)} to {short(stop)}, expected to start at {end}"
            elif len(shape) > MAX_AXES:
                wrong = f"has {len(shape)} axes, expected at most {MAX_AXES}"
            elif prod(shape) * bits != (stop - start) * 8:
                wrong = f"of dtype {short(one['dtype'])[1:-1]} and shape {short(shape)} has {stop - start} bytes"
            if wrong:
                raise CheckpointError(f"{file} has a damaged header (tensor {short(name)} {wrong}): download it again")
            end = stop
            entries[name] = Entry(name, file, one["dtype"], tuple(shape), 8 + length + start, version)
        return entries
    except DuplicateKey as error:
        raise CheckpointError(f"{file} has a damaged header ({error}): download it again") from None
    except CheckpointError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}


class TensorReader:
    """Reads rows of tensors. The files that it opens stay open until the `with` block ends."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._files: dict[Path, int] = {}  # their descriptors

    def read(self, entry: Entry, rows: Rows = ()) -> np.ndarray:
        """Returns the tensor's values at the index `rows` as a new contiguous array.

        An index is a tuple for the leading axes: integers, and a slice of step 1 as its last item. Raises
        `CheckpointError` if the file has changed since its header was read, and `OSError` if it can't be read.
        """
        shape, first = entry.shape, 0
        for index in rows:
            start = index if isinstance(index, int) else index.start
            first += start * prod(shape[1:])
            shape = shape[1:] if isinstance(index, int) else (index.stop - start, *shape[1:])
        values = np.empty(shape, entry.dtype)
        room, position = memoryview(values.reshape(-1).view(np.uint8)), entry.start + first * values.itemsize
        with naming(entry.file):
            descriptor = self._open(entry)
            while room:
                if not (count := os.preadv(descriptor, [room], position)):
                    raise _changed(entry.file)
                room, position = room[count:], position + count
        return values

    def _open(self, entry: Entry) -> int:
        if entry.file not in self._files:
            stream = self._stack.enter_context(entry.file.open("rb", buffering=0))
            if _version(stream.fileno()) != entry.version:
                raise _changed(entry.file)
            self._files[entry.file] = stream.fileno()
        return self._files[entry.file]

    def __enter__(self) -> "TensorReader":
        return self

    def __exit__(self, *_: object) -> None:
        self._files.clear()
        self._stack.close()


def _version(descriptor: int) -> tuple[int, ...]:
    found = os.fstat(descriptor)
    return found.st_ino, found.st_size, found.st_mtime_ns


def _changed(file: Path) -> CheckpointError:
    return CheckpointError(f"{file} changed while it was read: convert or load again")


def _why_refused(said: str, size: int) -> str:
    """Explains what is wrong with a file of `size` bytes for which safetensors raised the message `said`."""
    reason = " ".join(said.rsplit("deserializing header: ", 1)[-1].split())[:200]
    if any(sign in reason for sign in _NOT_A_HEADER):
        return f"is not a safetensors file or is truncated ({reason}, in a file of {size} bytes)"
    if _NOT_COVERED in reason:
        return f"is truncated, or longer than its tensors ({reason}, in a file of {size} bytes)"
    return f"has a damaged header ({reason})"


def row_blocks(shape: tuple[int, ...], rows: range, most: int) -> Iterator[Rows]:
    """Yields indices that cover `rows` of a tensor's first axis in order, each with at most `most` values.

    The number of rows per block is a power of two, so that a block covers whole pages if a row is a fraction of one. A
    row with more than `most` values is divided into several blocks.
    """
    if (row := prod(shape[1:])) <= most:
        step = 1 << ((most // row).bit_length() - 1)
        for start in range(rows.start, rows.stop, step):
            yield (slice(start, min(start + step, rows.stop)),)
        return
    for i in rows:
        for rest in row_blocks(shape[1:], range(shape[1]), most):
            yield (i, *rest)


class FiniteCheck:
    """Detects NaN and infinity in float32, float16 and bfloat16 values, whose exponent bits are then all set."""

    def __init__(self) -> None:
        self.failed = False
        self._shifted = np.empty(1 << 18, np.uint8)  # small enough for the processor's cache

    def __call__(self, values: np.ndarray) -> None:
        """Checks a contiguous array of any length; `failed` stays true once it is set."""
        bits = np.dtype(f"u{values.itemsize}")
        infinity = np.array(np.inf, values.dtype).view(bits) << bits.type(1)
        flat, room = values.reshape(-1).view(bits), self._shifted.view(bits)
        for start in range(0, flat.size, room.size):
            piece = flat[start : start + room.size]
            shifted = np.left_shift(piece, 1, out=room[: piece.size])
            self.failed = self.failed or bool(shifted.max() >= infinity)


class FileWriter:
    """Writes one safetensors file: first the header, then each tensor at its offset, in any order.

    `tensors` maps names to (dtype, shape). `close` checks that every tensor was written and forces the file to disk;
    if the `with` block raises, the file is only closed. Raises `FileExistsError` if the file exists.
    """

    def __init__(self, file: Path, tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]]):
        # widest items first, so that every tensor starts at a multiple of its item size
        order = sorted(tensors, key=lambda name: -tensors[name][0].itemsize)
        header: dict[str, Mapping[str, object]] = {"__metadata__": {"format": "pt"}}
        self._file, self._offsets, self._expected = file, {}, {}
        position = 0
        for name in order:
            dtype, shape = tensors[name]
            end = position + prod(shape) * dtype.itemsize
            header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [position, end]}
            self._offsets[name], self._expected[name] = position, (dtype, tuple(shape))
            position = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._missing = set(tensors)
        self._data = 8 + len(text)
        self._descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        self._pwrite(memoryview(len(text).to_bytes(8, "little") + text), 0)

    def write(self, name: str, values: np.ndarray) -> None:
        """Writes the whole tensor `name`; `values` need not be contiguous.

        Raises `ValueError` if the header has no tensor of this name, dtype and shape.
        """
        if self._expected.get(name) != (values.dtype, values.shape):
            raise ValueError(f"{self._file}: {name} {values.dtype} {values.shape} is not what the header announces")
        position = self._data + self._offsets[name]
        # if a copy is needed, it is made row by row to stay small
        for part in (values,) if values.flags.c_contiguous or values.ndim < 2 else values:
            part = np.ascontiguousarray(part)
            self._pwrite(memoryview(part.reshape(-1).view(np.uint8)), position)
            position += part.nbytes
        self._missing.discard(name)

    def close(self) -> None:
        """Forces the file to disk and closes it; raises `ValueError` if a tensor was never written."""
        if self._missing:
            raise ValueError(f"{self._file}: tensor {min(self._missing)} was announced and never written")
        os.fsync(self._descriptor)
        self._abandon()

    def _abandon(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _pwrite(self, buffer: memoryview, position: int) -> None:
        while buffer:
            written = os.pwrite(self._descriptor, buffer, position)
            buffer, position = buffer[written:], position + written

    def __enter__(self) -> "FileWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        self._abandon()


def plan_files(tensors: Mapping[str, int], max_bytes: int) -> dict[str, list[str]]:
    """Divides tensors (name -> bytes) in order among files of at most `max_bytes`, named as transformers names them."""
    shards: list[list[str]] = [[]]
    held = 0
    for name, nbytes in tensors.items():
        if shards[-1] and held + nbytes > max_bytes:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += nbytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": names for i, names in enumerate(shards, 1)}
