"""Reading and writing one safetensors file with plain reads and writes, a tensor at a time.

The format: eight bytes with the header's length, the header as JSON (name -> dtype, shape, range of bytes), the data.
Plain reads are used in place of a memory map, whose pages would count as this process's memory.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_LONGEST_HEADER = 100 << 20  # as the safetensors library has it
_LFS_POINTER = b"version https://git-lfs"


class CheckpointError(ValueError):
    """A checkpoint that can't be read: the message names the file, the tensor, the value and the remedy."""


class CheckpointWarning(UserWarning):
    """A checkpoint is read otherwise than it is stored."""


@dataclass(frozen=True)
class Entry:
    """A tensor inside a file: `offset` is the first byte of its data from the start of the file.

    `code` is the dtype as the file spells it, which may be one that is not read here.
    """

    name: str
    file: Path
    code: str
    shape: tuple[int, ...]
    offset: int

    @property
    def dtype(self) -> np.dtype:
        """The dtype of a tensor that is read; raises `CheckpointError` for any other."""
        if self.code in DTYPES:
            return DTYPES[self.code]
        remedy = f"expected one of {', '.join(DTYPES)}"
        if self.code.startswith(("F8", "F4")):
            remedy = "these weights are quantised, give a checkpoint in bfloat16"
        raise CheckpointError(
            f"{self.file}: tensor {self.name} has dtype {self.code}, which is not supported: {remedy}"
        )


def refuse_lfs_pointer(file: Path) -> None:
    """Raises `CheckpointError` for a file whose contents Git LFS has not fetched."""
    with file.open("rb") as stream:
        if stream.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise CheckpointError(
                f"{file} is a Git LFS pointer, not the file itself: run git lfs pull in its directory"
            )


def read_entries(file: Path) -> dict[str, Entry]:
    """Reads and checks the header of `file`; raises `CheckpointError` where the file can't hold what it promises."""
    try:
        refuse_lfs_pointer(file)
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _LONGEST_HEADER):
                raise CheckpointError(
                    f"{file} is not a safetensors file or is truncated "
                    f"(header of {length} bytes in a file of {size}): download it again"
                )
            header = json.loads(stream.read(length))
    except FileNotFoundError:
        raise CheckpointError(f"{file} does not exist: download the missing file") from None
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} has a damaged header ({error}): download it again") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{file} has a damaged header (not an object): download it again")
    header.pop("__metadata__", None)
    return {name: _entry(file, name, value, 8 + length, size) for name, value in header.items()}


def _entry(file: Path, name: str, value: Any, data: int, size: int) -> Entry:
    try:
        code, shape, (start, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        if type(code) is not str or not all(type(n) is int and n >= 0 for n in (*shape, start, end)):
            raise ValueError
    except (TypeError, KeyError, ValueError):
        raise CheckpointError(f"{file} has a damaged header (tensor {name}: {value!r}): download it again") from None
    entry = Entry(name, file, code, shape, data + start)
    needed = prod(shape) * DTYPES[code].itemsize if code in DTYPES else end - start
    if (given := end - start) != needed:
        raise CheckpointError(
            f"{file} has a damaged header (tensor {name}: {given} bytes for {code} {list(shape)}): download it again"
        )
    if data + end > size:
        raise CheckpointError(
            f"{file} is truncated: tensor {name} ends at byte {data + end}, the file at {size}: download it again"
        )
    return entry


def read_tensor(
    entry: Entry,
    start: int = 0,
    out: np.ndarray | None = None,
    inspect: Callable[[np.ndarray], None] | None = None,
) -> np.ndarray:
    """Reads a whole tensor into a new array, or into `out` as many values as it holds, from value `start` on.

    `out` is contiguous, of the tensor's dtype and of any shape. `inspect` is called with what was read.
    """
    if out is None:
        out = np.empty(entry.shape, entry.dtype)
    buffer = memoryview(out.reshape(-1).view(np.uint8))
    position, done = entry.offset + start * entry.dtype.itemsize, 0
    with entry.file.open("rb", buffering=0) as stream:
        while done < len(buffer):
            got = os.preadv(stream.fileno(), [buffer[done:]], position + done)
            if not got:
                raise CheckpointError(f"{entry.file} ended while tensor {entry.name} was read: it changed meanwhile")
            done += got
    if inspect:
        inspect(out)
    return out


class FiniteCheck:
    """Watches float32, float16 and bfloat16 values for NaN and infinity: all bits of the exponent set."""

    def __init__(self) -> None:
        self.failed = False
        self._shifted = np.empty(1 << 18, np.uint8)  # small enough for the processor's cache

    def __call__(self, values: np.ndarray) -> None:
        """Looks at a contiguous array of any length; `failed` stays true once set."""
        bits = np.dtype(f"u{values.itemsize}")
        infinity = np.array(np.inf, values.dtype).view(bits) << bits.type(1)
        flat, room = values.reshape(-1).view(bits), self._shifted.view(bits)
        for start in range(0, flat.size, room.size):
            piece = flat[start : start + room.size]
            shifted = np.left_shift(piece, 1, out=room[: piece.size])
            self.failed = self.failed or bool(shifted.max() >= infinity)


class FileWriter:
    """Writes one safetensors file: the header first, then each tensor at its place, in any order.

    `tensors` maps names to (dtype, shape). `close` checks that every tensor was written and forces the file to disk;
    leaving the `with` block on an error only closes it. Raises `ValueError` for a tensor that was not announced.
    """

    def __init__(self, file: Path, tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]]):
        # widest items first, so that every tensor starts at a multiple of its item size
        order = sorted(tensors, key=lambda name: -tensors[name][0].itemsize)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
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
        """Writes the whole tensor `name`; `values` need not be contiguous."""
        if self._expected.get(name) != (values.dtype, values.shape):
            raise ValueError(f"{self._file}: {name} {values.dtype} {values.shape} is not what the header announces")
        position = self._data + self._offsets[name]
        # a row at a time where a copy is needed, so that it stays small
        for part in (values,) if values.flags.c_contiguous or values.ndim < 2 else values:
            part = np.ascontiguousarray(part)
            self._pwrite(memoryview(part.reshape(-1).view(np.uint8)), position)
            position += part.nbytes
        self._missing.discard(name)

    def close(self) -> None:
        """Forces the file to disk; raises `ValueError` where a tensor was never written."""
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
