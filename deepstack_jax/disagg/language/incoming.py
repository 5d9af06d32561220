"""A prompt on a language node: what has arrived of it."""

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
from deepstack_jax.disagg.wire.rows import copied, place_of_rows, runs_of
from deepstack_jax.models.vision import VisualRows


class BlockCopy(NamedTuple):
    """What the sender says of a block, and what its copy has."""

    checksum: bytes
    num_bytes: int


class IncomingPrompt:
    """The own memory of a request on the language node: what has arrived of T tokens and M visual rows.

    Blocks may come in any order; a block counts once its checksum is right, and is never written again.
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
        """Takes memory for the prompt, from `memory` if it is given.

        Args:
            visual_ids: ids of the tokens that stand for visual rows.
            num_rows: rows of `rows`, filled up with zeros: a bucket of prefill. None takes `visual_rows`.
            sharding: where `rows` goes; None takes the first device.
        """
        self._pool, self._visual_ids = pool, np.asarray(visual_ids)
        self.total_tokens, self.visual_rows = total_tokens, visual_rows
        self.fill_ids = np.zeros(total_tokens, np.int32)
        self.aux_datas = np.zeros(AUX_LENGTH, np.int32)
        self._positions = np.zeros((total_tokens, 3), np.int32)
        self._arrived: list[BlockCopy | None] = [None] * -(-total_tokens // pool.block_size)
        memory, height = memory or HostMemory(), max(num_rows or visual_rows, visual_rows)
        self._rows: list[np.ndarray] = []  # embeddings, and deepstack where there is any
        for buffer in ROW_BUFFERS[: 2 if pool.num_deepstack_embeddings else 1]:
            width = pool.arrays[buffer].shape[-1]
            room = memory.take(height * width * pool.dtype.itemsize)
            self._rows.append(room.view(pool.dtype).reshape(height, width))
            self._rows[-1][visual_rows:] = 0
        self._ready_blocks = self._ready_rows = 0  # from the start on without a gap
        self._parked: dict[int, list[np.ndarray]] = {}  # rows of blocks after a gap
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
        """int32 [T]: row of each visual token, -1 for text."""
        visual = self._is_visual(self.fill_ids)
        return np.where(visual, np.cumsum(visual) - 1, -1).astype(np.int32)

    def rows(self) -> VisualRows:
        """`num_rows` rows on the device, in the order of the visual tokens.

        On a CPU the arrays are this object's memory, which nothing writes from here on.

        Raises:
            RuntimeError: a block is missing, or the prompt has fewer visual tokens than rows.
        """
        if not self.complete:
            raise RuntimeError(f"{self._arrived.count(None)} of {len(self._arrived)} blocks haven't arrived")
        if self._ready_rows < self.visual_rows:
            raise RuntimeError(f"{self._ready_rows} visual tokens for the {self.visual_rows} rows that were announced")
        return VisualRows(*(device.finish() for device in self._devices))

    def copy_out(self, token_block: int, pool_block: int, expected: BlockCopy) -> BlockCopy:
        """Copies a block out of the pool. It counts if the copy is as expected.

        Raises:
            ValueError: there is no such block, or the prompt has more visual tokens than rows.
        """
        if not 0 <= token_block < len(self._arrived):
            raise ValueError(f"token block {token_block} is outside the prompt of {len(self._arrived)} blocks")
        if not 0 <= pool_block < self._pool.num_blocks:
            raise ValueError(f"block {pool_block} is outside the pool of {self._pool.num_blocks} blocks")
        if self._arrived[token_block] is not None:
            return expected  # right once is right: another encoder's last bits may differ
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
        # what follows reads these copies: the pool may change under us
        runs = runs_of(self._is_visual(ids))
        count = sum(stop - start for start, stop in runs)
        if token_block == self._ready_blocks and self._ready_rows + count <= self.visual_rows:
            rows = [rows[self._ready_rows : self._ready_rows + count] for rows in self._rows]
        else:
            rows = [np.empty((count, rows.shape[1]), rows.dtype) for rows in self._rows]

        def parts() -> Iterator[np.ndarray]:
            yield from small
            place = place_of_rows(runs)
            for buffer, target in zip(ROW_BUFFERS, rows, strict=False):
                yield from copied(block[buffer][place : place + count], target)

        copy = BlockCopy(checksum(parts()), sum(part.nbytes for part in (*small, *rows)))
        if copy == expected:
            self._arrived[token_block] = copy
            self._parked[token_block] = rows
            self._join()
        return copy

    def _is_visual(self, ids: np.ndarray) -> np.ndarray:
        return (ids[:, None] == self._visual_ids).any(axis=1)

    def _join(self) -> None:
        """Moves the end of what is there without a gap forward."""
        while (rows := self._parked.pop(self._ready_blocks, None)) is not None:
            first, stop = self._ready_rows, self._ready_rows + len(rows[0])
            if stop > self.visual_rows:
                raise ValueError(f"more visual tokens than the {self.visual_rows} rows that were announced")
            for all_rows, own in zip(self._rows, rows, strict=True):
                if all_rows[first:stop].ctypes.data != own.ctypes.data:
                    all_rows[first:stop] = own
            self._ready_rows = stop
            self._ready_blocks += 1
        for device in self._devices:
            device.send(self._ready_rows)
