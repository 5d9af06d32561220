"""A prompt on either side of the bridge: what an encode node has, and what has arrived on a language node."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Sharding

from deepstack_jax.disagg.buffers import MultimodalDataBuffers
from deepstack_jax.disagg.device_rows import DeviceRows, HostMemory, HostRows
from deepstack_jax.disagg.wire import (
    AUX_DATAS,
    AUX_LENGTH,
    DEEPSTACK_EMBEDDINGS,
    FILL_IDS,
    INPUT_EMBEDDINGS,
    MROPE_POSITIONS,
    checksum,
    visual_runs,
)

CACHED_BYTES = 1 << 18  # of rows copied and summed at a time, so that the second reads the cache


@dataclass(frozen=True, eq=False)
class OutgoingPrompt:
    """What an encode node has for a prompt of T tokens."""

    fill_ids: np.ndarray  # int32 [T]
    mrope_positions: np.ndarray  # int32 [3, T]
    aux_datas: np.ndarray  # int32 [16]
    visual_index: np.ndarray  # int32 [T]: row of each visual token, -1 for text
    rows: jax.Array | None = None  # [M, (1+N)*D]; None for text alone

    @cached_property
    def host_rows(self) -> HostRows:
        """Its rows for the bridge."""
        if self.rows is None:
            raise ValueError("the prompt has visual tokens and no rows: encode its pictures first")
        return HostRows(self.rows)

    @cached_property
    def token_positions(self) -> np.ndarray:
        """Its positions as the wire has them: [T, 3]."""
        return np.ascontiguousarray(self.mrope_positions.T)


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
        width = pool.hidden_size * (1 + pool.num_deepstack_embeddings)
        shape = max(num_rows or visual_rows, visual_rows), width
        room = (memory or HostMemory()).take(shape[0] * width * pool.dtype.itemsize)
        self._rows = room.view(pool.dtype).reshape(shape)
        self._rows[visual_rows:] = 0
        self._ready_blocks = self._ready_rows = 0  # from the start on without a gap
        self._parked: dict[int, np.ndarray] = {}  # rows of blocks after a gap
        self._rows_at_a_time = max(1, CACHED_BYTES // (width * pool.dtype.itemsize))
        self._device = DeviceRows(self._rows, sharding)

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

    def rows(self) -> jax.Array:
        """[num_rows, (1+N)*D] on the device, in the order of the visual tokens.

        On a CPU the array is this object's memory, which nothing writes from here on.

        Raises:
            RuntimeError: a block is missing, or the prompt has fewer visual tokens than rows.
        """
        if not self.complete:
            raise RuntimeError(f"{self._arrived.count(None)} of {len(self._arrived)} blocks haven't arrived")
        if self._ready_rows < self.visual_rows:
            raise RuntimeError(f"{self._ready_rows} visual tokens for the {self.visual_rows} rows that were announced")
        return self._device.finish()

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
            rows = self._rows[self._ready_rows : self._ready_rows + count]
        else:
            rows = np.empty((count, self._rows.shape[1]), self._rows.dtype)

        def parts() -> Iterator[np.ndarray]:
            yield from small
            place, width = place_of_rows(runs), self._pool.hidden_size
            for done in range(0, count, self._rows_at_a_time):
                part = rows[done : done + self._rows_at_a_time]
                source = slice(place + done, place + done + len(part))
                part[:, :width] = block[INPUT_EMBEDDINGS][source]
                if part.shape[1] > width:
                    part[:, width:] = block[DEEPSTACK_EMBEDDINGS][source]
                yield part

        copy = BlockCopy(checksum(parts()), rows.nbytes + sum(part.nbytes for part in small))
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
            place = self._rows[self._ready_rows : min(self._ready_rows + len(rows), self.visual_rows)]
            if len(place) < len(rows):
                raise ValueError(f"more visual tokens than the {self.visual_rows} rows that were announced")
            if place.ctypes.data != rows.ctypes.data:
                place[...] = rows
            self._ready_rows += len(place)
            self._ready_blocks += 1
        self._device.send(self._ready_rows)


def runs_of(visual: np.ndarray) -> tuple[tuple[int, int], ...]:
    """`visual_runs` of a block; most blocks are of one kind."""
    if visual.all():
        return ((0, len(visual)),)
    return visual_runs(visual) if visual.any() else ()


def place_of_rows(runs: Sequence[tuple[int, int]]) -> int:
    """Where in a block its visual rows begin; they are one piece in each buffer.

    One run stands at its tokens' places, so that neighbouring blocks merge; several are packed at the block's start.
    """
    return runs[0][0] if len(runs) == 1 else 0
