"""A request on a language node: the tokens and rows that have arrived."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import Sharding

from deepstack_jax.disagg.wire.buffers import MultimodalDataBuffers
from deepstack_jax.disagg.wire.device_rows import DeviceRows, HostMemory
from deepstack_jax.disagg.wire.layout import (
    AUX_DATAS,
    AUX_LENGTH,
    FILL_IDS,
    MROPE_POSITIONS,
    ROW_BUFFERS,
    checksum,
)
from deepstack_jax.disagg.wire.rows import block_runs, copy_in_parts, first_row
from deepstack_jax.models.vision import VisualRows
from deepstack_jax.rounding import cdiv


class BlockCopy(NamedTuple):
    """The checksum and size of a block, as reported by the sender or as found in the copy."""

    checksum: bytes
    num_bytes: int


class IncomingRequest:
    """A request's own memory on the language node: T tokens and M visual rows, as far as they have arrived.

    Blocks may arrive in any order. A block counts once its checksum matches, and is never overwritten afterwards.
    """

    def __init__(
        self,
        pool: MultimodalDataBuffers,
        total_tokens: int,
        visual_rows: int,
        visual_ids: Sequence[int],
        num_rows: int | None = None,
        sharding: Sharding | None = None,
        memory: HostMemory | None = None,
    ):
        """Allocates memory for the request, from `memory` if it is given.

        Args:
            pool: the receive pool that blocks are copied from.
            total_tokens: T.
            visual_rows: M.
            visual_ids: ids of the placeholder tokens, each of which stands for one visual row.
            num_rows: length of the arrays that `rows` returns, padded with zeros: a prefill bucket. None takes M.
            sharding: where `rows` puts its arrays; None takes the first device.
        """
        self._pool, self._visual_ids = pool, np.asarray(visual_ids)
        self.total_tokens, self.visual_rows = total_tokens, visual_rows
        self.fill_ids = np.zeros(total_tokens, np.int32)
        self.aux_datas = np.zeros(AUX_LENGTH, np.int32)
        self._positions = np.zeros((total_tokens, 3), np.int32)
        self._arrived: list[BlockCopy | None] = [None] * cdiv(total_tokens, pool.block_size)
        memory, height = memory or HostMemory(), max(num_rows or visual_rows, visual_rows)
        self._rows: list[np.ndarray] = []  # embeddings, then deepstack embeddings if the model has any
        for buffer in ROW_BUFFERS[: 2 if pool.num_deepstack_embeddings else 1]:
            width = pool.arrays[buffer].shape[-1]
            buffer_bytes = memory.take(height * width * pool.dtype.itemsize)
            self._rows.append(buffer_bytes.view(pool.dtype).reshape(height, width))
            self._rows[-1][visual_rows:] = 0
        self._ready_blocks = self._ready_rows = 0  # contiguous from the start
        self._parked: dict[int, list[np.ndarray]] = {}  # rows of blocks after the first gap
        self._devices = [DeviceRows(rows, sharding) for rows in self._rows]

    @property
    def complete(self) -> bool:
        return None not in self._arrived

    @property
    def mrope_positions(self) -> np.ndarray:
        """int32 [3, T]."""
        return np.ascontiguousarray(self._positions.T)

    @property
    def visual_index(self) -> np.ndarray:
        """int32 [T]: the row of each visual token, -1 for text."""
        visual = self._is_visual(self.fill_ids)
        return np.where(visual, np.cumsum(visual) - 1, -1).astype(np.int32)

    def rows(self) -> VisualRows:
        """Returns `num_rows` rows on the device, in the order of the visual tokens.

        On a CPU the arrays share this object's memory, which is not written afterwards.

        Raises:
            RuntimeError: a block is missing, or the prompt has fewer visual tokens than rows.
        """
        if not self.complete:
            raise RuntimeError(f"{self._arrived.count(None)} of {len(self._arrived)} blocks have not arrived")
        if self._ready_rows < self.visual_rows:
            raise RuntimeError(f"{self._ready_rows} visual tokens for the {self.visual_rows} rows that were announced")
        return VisualRows(*(device.finish() for device in self._devices))

    def copy_out(self, token_block: int, pool_block: int, expected: BlockCopy) -> BlockCopy:
        """Copies a block out of the pool, and counts it if the copy matches `expected`.

        Raises:
            ValueError: the block does not exist, or the prompt has more visual tokens than rows.
        """
        if not 0 <= token_block < len(self._arrived):
            raise ValueError(f"token block {token_block} is outside the prompt of {len(self._arrived)} blocks")
        if not 0 <= pool_block < self._pool.num_blocks:
            raise ValueError(f"block {pool_block} is outside the pool of {self._pool.num_blocks} blocks")
        if self._arrived[token_block] is not None:
            return expected  # it has matched before; another encoder's rows may differ in their last bits
        block = [array[pool_block] for array in self._pool.arrays]
        start = token_block * self._pool.block_size
        tokens = slice(start, min(start + self._pool.block_size, self.total_tokens))
        ids, positions = self.fill_ids[tokens], self._positions[tokens]
        ids[...] = block[FILL_IDS][: len(ids)]
        positions[...] = block[MROPE_POSITIONS][: len(ids)]
        small = [ids, positions]
        if token_block == 0:
            self.aux_datas[...] = block[AUX_DATAS]
            small.append(self.aux_datas)
        # read these copies from here on: a late write may change the pool at any time
        runs = block_runs(self._is_visual(ids))
        count = sum(stop - start for start, stop in runs)
        if token_block == self._ready_blocks and self._ready_rows + count <= self.visual_rows:
            rows = [rows[self._ready_rows : self._ready_rows + count] for rows in self._rows]
        else:
            rows = [np.empty((count, rows.shape[1]), rows.dtype) for rows in self._rows]

        def parts() -> Iterator[np.ndarray]:
            yield from small
            first = first_row(runs)
            for buffer, target in zip(ROW_BUFFERS, rows, strict=False):
                yield from copy_in_parts(block[buffer][first : first + count], target)

        copy = BlockCopy(checksum(parts()), sum(part.nbytes for part in (*small, *rows)))
        if copy == expected:
            self._arrived[token_block] = copy
            self._parked[token_block] = rows
            self._advance()
        return copy

    def _is_visual(self, ids: np.ndarray) -> np.ndarray:
        return (ids[:, None] == self._visual_ids).any(axis=1)

    def _advance(self) -> None:
        """Moves parked rows up to the next gap into place, and sends what is contiguous to the device."""
        while (rows := self._parked.pop(self._ready_blocks, None)) is not None:
            first, stop = self._ready_rows, self._ready_rows + len(rows[0])
            if stop > self.visual_rows:
                raise ValueError(f"more visual tokens than the {self.visual_rows} rows that were announced")
            for all_rows, parked in zip(self._rows, rows, strict=True):
                if all_rows[first:stop].ctypes.data != parked.ctypes.data:
                    all_rows[first:stop] = parked
            self._ready_rows = stop
            self._ready_blocks += 1
        for device in self._devices:
            device.send(self._ready_rows)
