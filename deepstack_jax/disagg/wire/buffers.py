"""The host memory through which rows of visual tokens move: five buffers, each with one row per block of C tokens.

| # | buffer | one row | dtype |
|---|---|---|---|
| 0 | input_embeddings | [C, D] | the model's dtype |
| 1 | fill_ids | [C] | int32 |
| 2 | mrope_positions | [C, 3] | int32 |
| 3 | aux_datas | [16] | int32 |
| 4 | deepstack_embeddings | [C, N*D] | the model's dtype; absent when N is 0 |

Tokens are the first dimension of every row. A range of a block's tokens is therefore contiguous in each buffer, and so
are full blocks that are adjacent.
"""

import mmap
import operator
from bisect import insort
from collections.abc import Sequence
from typing import NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from deepstack_jax.disagg.wire.layout import (
    AUX_DATAS,
    AUX_LENGTH,
    DEEPSTACK_EMBEDDINGS,
    FILL_IDS,
    INPUT_EMBEDDINGS,
    MROPE_POSITIONS,
    NAMES,
    BufferLayout,
)
from deepstack_jax.rounding import cdiv


class BufferData(NamedTuple):
    """Copies of the buffers' contents for T tokens."""

    input_embeddings: np.ndarray  # [T, D]
    fill_ids: np.ndarray  # int32 [T]
    mrope_positions: np.ndarray  # int32 [3, T]
    aux_datas: np.ndarray  # int32 [16]
    deepstack_embeddings: np.ndarray | None  # [T, N*D]; None when N is 0


class MultimodalDataBuffers:
    """The buffers of `num_blocks` blocks, in one anonymous mapping, page-aligned and with every page touched.

    `arrays` are views of that memory, with the shapes of the module's table and blocks as the first dimension.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        hidden_size: int,
        num_deepstack_embeddings: int = 3,
        dtype: DTypeLike = ml_dtypes.bfloat16,
    ):
        """Allocates and touches the memory.

        Raises:
            ValueError: a size is too small, or no model has this dtype.
        """
        for name, value, least in (
            ("num_blocks", num_blocks, 1),
            ("block_size", block_size, 1),
            ("hidden_size", hidden_size, 1),
            ("num_deepstack_embeddings", num_deepstack_embeddings, 0),
        ):
            if operator.index(value) < least:
                raise ValueError(f"{name} {value} is too small: expected {least} or more")
        self.dtype = np.dtype(dtype)
        if self.dtype not in (np.float32, np.float16, ml_dtypes.bfloat16):
            raise ValueError(f"dtype {self.dtype} is not supported: expected float32, bfloat16 or float16")
        self.num_blocks, self.block_size = int(num_blocks), int(block_size)
        self.hidden_size, self.num_deepstack_embeddings = int(hidden_size), int(num_deepstack_embeddings)

        rows: list[tuple[tuple[int, ...], np.dtype]] = [
            ((self.block_size, self.hidden_size), self.dtype),
            ((self.block_size,), np.dtype(np.int32)),
            ((self.block_size, 3), np.dtype(np.int32)),
            ((AUX_LENGTH,), np.dtype(np.int32)),
            ((self.block_size, self.num_deepstack_embeddings * self.hidden_size), self.dtype),
        ]
        rows = rows if self.num_deepstack_embeddings else rows[:DEEPSTACK_EMBEDDINGS]
        item_lens = [int(np.prod(shape)) * kind.itemsize for shape, kind in rows]
        total_lens = [self.num_blocks * length for length in item_lens]
        starts = np.cumsum([0] + [cdiv(length, mmap.PAGESIZE) * mmap.PAGESIZE for length in total_lens]).tolist()
        # the arrays keep the mapping alive; it is unmapped when the last of them is freed
        memory = np.frombuffer(mmap.mmap(-1, starts[-1]), np.uint8)
        memory.fill(0)  # the first write to untouched memory is slow
        self.arrays = [
            memory[start : start + total].view(kind).reshape(self.num_blocks, *shape)
            for start, total, (shape, kind) in zip(starts[:-1], total_lens, rows, strict=True)
        ]
        self.layout = BufferLayout(
            self.block_size, tuple(a.ctypes.data for a in self.arrays), tuple(total_lens), tuple(item_lens)
        )

    def get_buf_infos(self) -> tuple[list[int], list[int], list[int]]:
        """Returns (addresses, bytes per buffer, bytes per row), for registration and for the other side."""
        return list(self.layout.ptrs), list(self.layout.total_lens), list(self.layout.item_lens)

    def set_buf(
        self,
        block_indices: Sequence[int],
        input_embeddings: ArrayLike | None = None,
        fill_ids: ArrayLike | None = None,
        mrope_positions: ArrayLike | None = None,
        aux_datas: ArrayLike | None = None,
        deepstack_embeddings: ArrayLike | None = None,
    ) -> None:
        """Writes T tokens into blocks in the order of `block_indices`. Buffers whose argument is None stay unchanged.

        Args:
            block_indices: blocks with room for T tokens or more.
            input_embeddings: [T, D] in the buffers' dtype.
            fill_ids: integers [T].
            mrope_positions: integers [3, T].
            aux_datas: up to 16 integers for the first block.
            deepstack_embeddings: [T, N*D] in the buffers' dtype.

        Raises:
            ValueError: a shape, dtype, count or block is wrong; nothing has been written.
        """
        blocks = self._checked_blocks(block_indices)
        arrays = {}
        for buffer, value in (
            (INPUT_EMBEDDINGS, input_embeddings),
            (FILL_IDS, fill_ids),
            (MROPE_POSITIONS, mrope_positions),
            (DEEPSTACK_EMBEDDINGS, deepstack_embeddings),
        ):
            if value is not None:
                arrays[buffer] = self._checked(buffer, np.asarray(value))
        lengths = {NAMES[buffer]: len(array) for buffer, array in arrays.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"arrays have different numbers of tokens: {lengths}")
        self._check_room(max(lengths.values(), default=0), blocks)
        aux = None if aux_datas is None else _integers("aux_datas", np.asarray(aux_datas))
        if aux is not None and (aux.ndim != 1 or len(aux) > AUX_LENGTH or not blocks):
            raise ValueError(f"aux_datas {list(aux.shape)} must be up to {AUX_LENGTH} integers for a first block")

        for buffer, array in arrays.items():
            for index, block in enumerate(blocks):
                part = array[index * self.block_size : (index + 1) * self.block_size]
                self.arrays[buffer][block, : len(part)] = part
        if aux is not None:
            self.arrays[AUX_DATAS][blocks[0]] = np.pad(aux, (0, AUX_LENGTH - len(aux)))

    def get_buf(self, block_indices: Sequence[int], total_tokens: int) -> BufferData:
        """Copies the first `total_tokens` tokens of the blocks, and the first block's aux_datas.

        Raises:
            ValueError: a block does not exist or is named twice, or the blocks hold fewer tokens.
        """
        blocks = self._checked_blocks(block_indices)
        self._check_room(total_tokens, blocks)
        if not blocks:
            raise ValueError("block_indices is empty: name one block or more")

        def copy_of(buffer: int) -> np.ndarray:
            source = self.arrays[buffer]
            out = np.empty((total_tokens, *source.shape[2:]), source.dtype)
            for index, block in enumerate(blocks):
                part = out[index * self.block_size : (index + 1) * self.block_size]
                part[...] = source[block, : len(part)]
            return out

        return BufferData(
            input_embeddings=copy_of(INPUT_EMBEDDINGS),
            fill_ids=copy_of(FILL_IDS),
            mrope_positions=np.ascontiguousarray(copy_of(MROPE_POSITIONS).T),
            aux_datas=self.arrays[AUX_DATAS][blocks[0]].copy(),
            deepstack_embeddings=copy_of(DEEPSTACK_EMBEDDINGS) if self.num_deepstack_embeddings else None,
        )

    def wipe(self, block_indices: Sequence[int]) -> None:
        """Overwrites blocks with zeros."""
        for array in self.arrays:
            array[list(block_indices)] = 0

    def _checked_blocks(self, block_indices: Sequence[int]) -> list[int]:
        blocks = [operator.index(block) for block in block_indices]
        for block in blocks:
            if not 0 <= block < self.num_blocks:
                raise ValueError(f"block {block} is outside the pool of {self.num_blocks} blocks")
        if len(set(blocks)) < len(blocks):
            raise ValueError(f"block_indices {blocks} name a block twice")
        return blocks

    def _check_room(self, tokens: int, blocks: list[int]) -> None:
        room = len(blocks) * self.block_size
        if not 0 <= tokens <= room:
            raise ValueError(f"{tokens} tokens do not fit in {len(blocks)} blocks of {self.block_size} tokens")

    def _checked(self, buffer: int, array: np.ndarray) -> np.ndarray:
        """Returns the array with tokens as its first dimension, in the buffer's dtype."""
        name = NAMES[buffer]
        if buffer == DEEPSTACK_EMBEDDINGS and not self.num_deepstack_embeddings:
            raise ValueError("these buffers have no deepstack_embeddings: omit them")
        if buffer in (FILL_IDS, MROPE_POSITIONS):
            if array.ndim != 1 + (buffer == MROPE_POSITIONS) or (array.ndim == 2 and len(array) != 3):
                expected = "[T]" if buffer == FILL_IDS else "[3, T]"
                raise ValueError(f"{name} {list(array.shape)} must be {expected}")
            return _integers(name, array).T
        width = self.arrays[buffer].shape[-1]
        if array.ndim != 2 or array.shape[1] != width:
            raise ValueError(f"{name} {list(array.shape)} must be [T, {width}]")
        if array.dtype != self.dtype:
            raise ValueError(f"{name} are {array.dtype}, but the buffers are {self.dtype}: convert them first")
        return array


class BlockAllocator:
    """Tracks which request holds which block. A block is free, used by one request, or in quarantine.

    No request holds a block in quarantine, because a late write may still change it.
    """

    def __init__(self, num_blocks: int, block_size: int):
        """Raises ValueError if a size is below one."""
        for name, value in (("num_blocks", num_blocks), ("block_size", block_size)):
            if operator.index(value) < 1:
                raise ValueError(f"{name} {value} is too small: expected 1 or more")
        self.num_blocks, self.block_size = int(num_blocks), int(block_size)
        self._free = list(range(self.num_blocks))  # ascending
        self._used: dict[str, list[int]] = {}
        self._quarantined: set[int] = set()

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def free_blocks(self) -> list[int]:
        """The free blocks in ascending order."""
        return list(self._free)

    @property
    def num_used(self) -> int:
        return sum(map(len, self._used.values()))

    @property
    def num_quarantined(self) -> int:
        return len(self._quarantined)

    def blocks_of(self, request_id: str) -> list[int]:
        """The blocks that the request holds, in the order of their allocation."""
        return list(self._used.get(request_id, ()))

    def alloc(self, num_tokens: int, request_id: str) -> list[int] | None:
        """Allocates blocks for `num_tokens` more tokens of the request; returns None if too few are free.

        Raises:
            ValueError: `num_tokens` is below one.
        """
        if operator.index(num_tokens) < 1:
            raise ValueError(f"num_tokens {num_tokens} of request {request_id!r}: expected 1 or more")
        blocks = cdiv(num_tokens, self.block_size)
        return self.take(request_id, blocks) if blocks <= self.num_free else None

    def take(self, request_id: str, at_most: int) -> list[int]:
        """Allocates up to `at_most` free blocks, as many as there are, adjacent if possible."""
        if at_most < 0:
            raise ValueError(f"at_most {at_most} of request {request_id!r}: expected 0 or more")
        taken = _adjacent(self._free, min(at_most, self.num_free))
        if taken:
            removed = set(taken)
            self._free = [block for block in self._free if block not in removed]
            self._used.setdefault(request_id, []).extend(taken)
        return taken

    def free(self, request_id: str) -> list[int]:
        """Frees all blocks of the request and returns them.

        Raises:
            ValueError: the request holds no blocks, or they were freed before.
        """
        if request_id not in self._used:
            raise ValueError(f"request {request_id!r} holds no blocks: it has none, or they were freed before")
        blocks = self._used.pop(request_id)
        for block in blocks:
            insort(self._free, block)
        return blocks

    def free_block(self, request_id: str, block: int) -> None:
        """Frees one block of the request.

        Raises:
            ValueError: the request does not hold it.
        """
        self._take_from(request_id, block)
        insort(self._free, block)

    def quarantine(self, request_id: str, block: int) -> None:
        """Moves one block of the request to quarantine; it is not allocated before `release`.

        Raises:
            ValueError: the request does not hold it.
        """
        self._take_from(request_id, block)
        self._quarantined.add(block)

    def release(self, block: int) -> None:
        """Ends the quarantine of a block.

        Raises:
            ValueError: the block is not in quarantine.
        """
        if block not in self._quarantined:
            raise ValueError(f"block {block} is not in quarantine")
        self._quarantined.remove(block)
        insort(self._free, block)

    def _take_from(self, request_id: str, block: int) -> None:
        held = self._used.get(request_id, [])
        if block not in held:
            raise ValueError(f"request {request_id!r} does not hold block {block}: it holds {held}")
        held.remove(block)
        if not held:
            del self._used[request_id]


def _adjacent(free: list[int], count: int) -> list[int]:
    """Picks `count` of the ascending `free` blocks, from the shortest run with enough, otherwise the longest runs."""
    runs: list[list[int]] = []
    for block in free:
        if runs and runs[-1][-1] == block - 1:
            runs[-1].append(block)
        else:
            runs.append([block])
    if enough := [run for run in runs if len(run) >= count]:
        return min(enough, key=len)[:count]
    taken: list[int] = []
    for run in sorted(runs, key=len, reverse=True):
        taken += run[: count - len(taken)]
    return taken


def _integers(name: str, array: np.ndarray) -> np.ndarray:
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} are {array.dtype}: expected integers")
    limits = np.iinfo(np.int32)
    if array.size and not (limits.min <= array.min() and array.max() <= limits.max):
        raise ValueError(f"{name} from {array.min()} to {array.max()} do not fit in 32 bits")
    return array.astype(np.int32, copy=False)
