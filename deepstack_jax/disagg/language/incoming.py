"""A request on a language node: its prompt, and the rows that have arrived, one token block at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jax.sharding import Sharding

from deepstack_jax.disagg.wire.buffers import MultimodalDataBuffers
from deepstack_jax.disagg.wire.device_rows import HostMemory, to_device
from deepstack_jax.disagg.wire.layout import (
    AUX_DATAS,
    AUX_LENGTH,
    FILL_IDS,
    MROPE_POSITIONS,
    ROW_BUFFERS,
)
from deepstack_jax.disagg.wire.rows import block_runs, first_row
from deepstack_jax.disagg.wire.seals import NO_PURPOSE, BlockSeal, Purpose
from deepstack_jax.models.vision import VisualRows


class BlockCopy(NamedTuple):
    """The checksum and size of a block, as reported by the sender or as found in the copy."""

    checksum: bytes
    num_bytes: int


@dataclass(frozen=True)
class BlockRows:
    """The visual rows of a token block.

    Attributes:
        first_row, rows: the first of them, and how many there are.
        first_token, stop_token: the prompt's tokens from its first visual token to after its last one.
    """

    first_row: int
    rows: int
    first_token: int
    stop_token: int


class IncomingRequest:
    """A request's own memory on the language node: T tokens, and the rows of blocks that have arrived.

    Blocks may arrive in any order. A block counts once its checksum matches, and is never copied again.

    Attributes:
        input_ids: int32 [T].
        mrope_positions: int32 [3, T].
        visual_index: int32 [T], the row of each visual token in the order of tokens, -1 for text.
        blocks: the token blocks that have visual rows.
    """

    def __init__(
        self,
        pool: MultimodalDataBuffers,
        input_ids: np.ndarray,
        mrope_positions: np.ndarray,
        visual_ids: Sequence[int],
        sharding: Sharding | None = None,
        memory: HostMemory | None = None,
    ):
        """
        Args:
            pool: the receive pool that blocks are copied from.
            input_ids: int32 [T].
            mrope_positions: int32 [3, T].
            visual_ids: ids of the placeholder tokens, each of which stands for one visual row.
            sharding: where `take_rows` puts its arrays; None takes the first device.
            memory: where rows are copied to.
        """
        self._pool, self._sharding, self._memory = pool, sharding, memory or HostMemory()
        self.input_ids, self.mrope_positions = input_ids, mrope_positions
        self._positions = np.ascontiguousarray(mrope_positions.T)
        self._visual = np.isin(input_ids, visual_ids)
        self.visual_index = np.where(self._visual, np.cumsum(self._visual) - 1, -1).astype(np.int32)
        self.blocks = self._find_blocks()
        self._arrived: dict[int, VisualRows | None] = {}  # None once they are taken

    def copy_out(
        self,
        token_block: int,
        pool_block: int,
        expected: BlockCopy,
        seal: BlockSeal | None = None,
        purpose: Purpose = NO_PURPOSE,
    ) -> BlockCopy:
        """Copies a block out of the pool, and counts it if the copy matches `expected`.

        `seal` and `purpose` are those with which it was written. With a key the block is wiped in the pool, where
        others may read it.

        Raises:
            ValueError: the block does not exist, or its ids or positions are not those of the prompt.
        """
        size = self._pool.block_size
        if not 0 <= token_block * size < len(self.input_ids):
            raise ValueError(f"token block {token_block} is outside the prompt of {len(self.input_ids)} tokens")
        if not 0 <= pool_block < self._pool.num_blocks:
            raise ValueError(f"block {pool_block} is outside the pool of {self._pool.num_blocks} blocks")
        seal = seal or BlockSeal()
        if token_block in self._arrived:  # it has matched before
            if seal.has_key:
                self._pool.wipe([pool_block])
            return expected
        tokens = slice(token_block * size, min((token_block + 1) * size, len(self.input_ids)))
        # read these copies from here on: a late write may change the pool at any time
        sources, rows = self._small(token_block, pool_block, tokens), self._take_memory()
        small = [np.empty_like(source) for source in sources]
        parts = [*zip(sources, small, strict=True), *self._row_parts(rows, tokens, pool_block)]
        opened = seal.open(purpose, token_block, pool_block, parts, expected.checksum)
        copy = BlockCopy(opened, sum(target.nbytes for _, target in parts))
        if copy == expected:
            if not (
                np.array_equal(small[0], self.input_ids[tokens]) and np.array_equal(small[1], self._positions[tokens])
            ):
                raise ValueError(f"the ids or positions of token block {token_block} contradict the prompt")
            self._arrived[token_block] = VisualRows(*(to_device(array, self._sharding) for array in rows))
        return copy

    def take_rows(self, token_block: int) -> VisualRows | None:
        """Returns the rows of a block that has arrived, once; they are padded to the size of a block.

        On a CPU the arrays share the memory that the block was copied to, which is not written afterwards.
        """
        rows = self._arrived.get(token_block)
        if rows is not None:
            self._arrived[token_block] = None
        return rows

    def _find_blocks(self) -> dict[int, BlockRows]:
        tokens, size = np.flatnonzero(self._visual), self._pool.block_size
        blocks = {}
        for first, stop in zip(*_bounds(tokens // size), strict=True):
            of_block = tokens[first:stop]
            blocks[int(of_block[0]) // size] = BlockRows(first, stop - first, int(of_block[0]), int(of_block[-1]) + 1)
        return blocks

    def _small(self, token_block: int, pool_block: int, tokens: slice) -> list[np.ndarray]:
        """The block's ids, positions and aux_datas in the pool."""
        count, arrays = tokens.stop - tokens.start, self._pool.arrays
        small = [arrays[buffer][pool_block][:count] for buffer in (FILL_IDS, MROPE_POSITIONS)]
        return small if token_block else [*small, arrays[AUX_DATAS][pool_block][:AUX_LENGTH]]

    def _take_memory(self) -> list[np.ndarray]:
        """Memory for the rows of one block: embeddings, then deepstack embeddings if the model has any."""
        height, dtype = self._pool.block_size, self._pool.dtype
        widths = [self._pool.arrays[buffer].shape[-1] for buffer in self._row_buffers]
        return [self._memory.take(height * width * dtype.itemsize).view(dtype).reshape(height, -1) for width in widths]

    @property
    def _row_buffers(self) -> tuple[int, ...]:
        return ROW_BUFFERS[: 2 if self._pool.num_deepstack_embeddings else 1]

    def _row_parts(
        self, rows: list[np.ndarray], tokens: slice, pool_block: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The block's rows in the pool, with their places in `rows`, whose remaining rows become zero."""
        runs = block_runs(self._visual[tokens])
        first, count = first_row(runs) if runs else 0, sum(stop - start for start, stop in runs)
        for buffer, target in zip(self._row_buffers, rows, strict=True):
            target[count:] = 0
            yield self._pool.arrays[buffer][pool_block][first : first + count], target[:count]


def _bounds(numbers: np.ndarray) -> tuple[list[int], list[int]]:
    """Where runs of equal numbers start and stop."""
    if not len(numbers):
        return [], []
    edges = (np.flatnonzero(np.diff(numbers)) + 1).tolist()
    return [0, *edges], [*edges, len(numbers)]
