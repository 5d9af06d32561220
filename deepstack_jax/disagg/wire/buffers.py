"""Host memory that rows of visual tokens travel through: blocks of C tokens, five buffers, one row per block in each.

| # | buffer | one row | dtype |
|---|---|---|---|
| 0 | input_embeddings | [C, D] | the model's |
| 1 | fill_ids | [C] | int32 |
| 2 | mrope_positions | [C, 3] | int32 |
| 3 | aux_datas | [16] | int32 |
| 4 | deepstack_embeddings | [C, N*D] | the model's; absent when N is 0 |

Tokens come first in every row, so any range of a block's tokens is one piece of memory in each buffer, and full
blocks that stand side by side are one piece together.
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


class BufferData(NamedTuple):
    """Copies of what T tokens have in the buffers."""

    input_embeddings: np.ndarray  # [T, D]
    fill_ids: np.ndarray  # int32 [T]
    mrope_positions: np.ndarray  # int32 [3, T]
    aux_datas: np.ndarray  # int32 [16]
    deepstack_embeddings: np.ndarray | None  # [T, N*D]; None when N is 0


class MultimodalDataBuffers:
    """The buffers of `num_blocks` blocks: one anonymous mapping, page-aligned, every page touched.

    `arrays` are views of the memory itself, shaped as the module's table says with the blocks in front.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        hidden_size: int,
        num_deepstack_embeddings: int = 3,
        dtype: DTypeLike = ml_dtypes.bfloat16,
    ):
        """Takes and touches the memory.

        Raises:
            ValueError: a size below one, or a dtype that no model has.
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
        starts = np.cumsum([0] + [-(-length // mmap.PAGESIZE) * mmap.PAGESIZE for length in total_lens]).tolist()
        # the arrays keep the mapping alive; it is unmapped with the last of them
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
        """(addresses, bytes of each buffer, bytes of one row of each), for registration and for the other side."""
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
        """Writes T tokens, block by block in the order of `block_indices`. What is None stays as it is.

        Args:
            block_indices: blocks that hold T tokens or more.
            input_embeddings: [T, D] in the buffers' dtype.
            fill_ids: integers [T].
            mrope_positions: integers [3, T].
            aux_datas: up to 16 integers, for the first block.
            deepstack_embeddings: [T, N*D] in the buffers' dtype.

        Raises:
            ValueError: a wrong shape, dtype, count or block; nothing has been written then.
        """
        blocks = self._checked_blocks(block_indices)
        given = {}
        for buffer, value in (
            (INPUT_EMBEDDINGS, input_embeddings),
            (FILL_IDS, fill_ids),
            (MROPE_POSITIONS, mrope_positions),
            (DEEPSTACK_EMBEDDINGS, deepstack_embeddings),
        ):
            if value is not None:
                given[buffer] = self._checked(buffer, np.asarray(value))
        lengths = {NAMES[buffer]: len(array) for buffer, array in given.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"arrays of different numbers of tokens: {lengths}")
        self._check_room(max(lengths.values(), default=0), blocks)
        aux = None if aux_datas is None else _integers("aux_datas", np.asarray(aux_datas))
        if aux is not None and (aux.ndim != 1 or len(aux) > AUX_LENGTH or not blocks):
            raise ValueError(f"aux_datas {list(aux.shape)} must be up to {AUX_LENGTH} integers, for a first block")

        for buffer, array in given.items():
            for place, block in enumerate(blocks):
                part = array[place * self.block_size : (place + 1) * self.block_size]
                self.arrays[buffer][block, : len(part)] = part
        if aux is not None:
            self.arrays[AUX_DATAS][blocks[0]] = np.pad(aux, (0, AUX_LENGTH - len(aux)))

    def get_buf(self, block_indices: Sequence[int], total_tokens: int) -> BufferData:
        """Private copies of the first `total_tokens` tokens of the blocks, and of the first block's aux_datas.

        Raises:
            ValueError: a block that doesn't exist or comes twice, or blocks that hold fewer tokens.
        """
        blocks = self._checked_blocks(block_indices)
        self._check_room(total_tokens, blocks)
        if not blocks:
            raise ValueError("block_indices is empty: name one block or more")

        def copied(buffer: int) -> np.ndarray:
            source = self.arrays[buffer]
            out = np.empty((total_tokens, *source.shape[2:]), source.dtype)
            for place, block in enumerate(blocks):
                part = out[place * self.block_size : (place + 1) * self.block_size]
                part[...] = source[block, : len(part)]
            return out

        return BufferData(
            input_embeddings=copied(INPUT_EMBEDDINGS),
            fill_ids=copied(FILL_IDS),
            mrope_positions=np.ascontiguousarray(copied(MROPE_POSITIONS).T),
            aux_datas=self.arrays[AUX_DATAS][blocks[0]].copy(),
            deepstack_embeddings=copied(DEEPSTACK_EMBEDDINGS) if self.num_deepstack_embeddings else None,
        )

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
            raise ValueError(f"{tokens} tokens do not fit {len(blocks)} blocks of {self.block_size} tokens")

    def _checked(self, buffer: int, array: np.ndarray) -> np.ndarray:
        """The array as tokens-first, of the buffer's dtype."""
        name = NAMES[buffer]
        if buffer == DEEPSTACK_EMBEDDINGS and not self.num_deepstack_embeddings:
            raise ValueError("deepstack_embeddings were given, but these buffers have none: leave them out")
        if buffer in (FILL_IDS, MROPE_POSITIONS):
            if array.ndim != 1 + (buffer == MROPE_POSITIONS) or (array.ndim == 2 and len(array) != 3):
                expected = "[T]" if buffer == FILL_IDS else "[3, T]"
                raise ValueError(f"{name} {list(array.shape)} must be {expected}")
            return _integers(name, array).T
        width = self.arrays[buffer].shape[-1]
        if array.ndim != 2 or array.shape[1] != width:
            raise ValueError(f"{name} {list(array.shape)} must be [T, {width}]")
        if array.dtype != self.dtype:
            raise ValueError(f"{name} are {array.dtype}, the buffers {self.dtype}: convert them first")
        return array


class BlockAllocator:
    """Which request holds which block. A block is free, used by one request, or in quarantine.

    A block in quarantine belongs to nobody: something may still be written to it.
    """

    def __init__(self, num_blocks: int, block_size: int):
        """Raises ValueError when a size is below one."""
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
    def num_used(self) -> int:
        return sum(map(len, self._used.values()))

    @property
    def num_quarantined(self) -> int:
        return len(self._quarantined)

    def blocks_of(self, request_id: str) -> list[int]:
        """The blocks that the request holds now, in the order it got them."""
        return list(self._used.get(request_id, ()))

    def alloc(self, num_tokens: int, request_id: str) -> list[int] | None:
        """Blocks for `num_tokens` more tokens of the request, or None, and nothing taken, if too few are free.

        Raises:
            ValueError: `num_tokens` is below one.
        """
        if operator.index(num_tokens) < 1:
            raise ValueError(f"num_tokens {num_tokens} of request {request_id!r}: expected 1 or more")
        blocks = -(-num_tokens // self.block_size)
        return self.take(request_id, blocks) if blocks <= self.num_free else None

    def take(self, request_id: str, at_most: int) -> list[int]:
        """As many free blocks as there are, up to `at_most`, side by side where possible."""
        if at_most < 0:
            raise ValueError(f"at_most {at_most} of request {request_id!r}: expected 0 or more")
        taken = _side_by_side(self._free, min(at_most, self.num_free))
        if taken:
            gone = set(taken)
            self._free = [block for block in self._free if block not in gone]
            self._used.setdefault(request_id, []).extend(taken)
        return taken

    def free(self, request_id: str) -> list[int]:
        """Gives back every block that the request holds, and names them.

        Raises:
            ValueError: it holds none: it never did, or they have been freed before.
        """
        if request_id not in self._used:
            raise ValueError(f"request {request_id!r} holds no blocks: it never did, or they were freed before")
        blocks = self._used.pop(request_id)
        for block in blocks:
            insort(self._free, block)
        return blocks

    def free_block(self, request_id: str, block: int) -> None:
        """Gives back one block of the request.

        Raises:
            ValueError: the request doesn't hold it.
        """
        self._take_from(request_id, block)
        insort(self._free, block)

    def quarantine(self, request_id: str, block: int) -> None:
        """Takes one block from the request; nobody gets it before `release`.

        Raises:
            ValueError: the request doesn't hold it.
        """
        self._take_from(request_id, block)
        self._quarantined.add(block)

    def release(self, block: int) -> None:
        """Ends the quarantine of a block.

        Raises:
            ValueError: it is in none.
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


def _side_by_side(free: list[int], count: int) -> list[int]:
    """`count` of the ascending `free`: from the shortest run that holds them all, else from the longest runs."""
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
        raise ValueError(f"{name} from {array.min()} to {array.max()} do not fit 32 bits")
    return array.astype(np.int32, copy=False)
