"""Defines which parts of a token block cross the wire, in which order, and where in a receive pool they land.

These parts are the block's fill_ids, its positions, aux_datas (only with token block 0), and the rows of its visual
tokens. Rows of text tokens are not sent. Both sides use this module, so that parts and order agree.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import xxhash

INPUT_EMBEDDINGS, FILL_IDS, MROPE_POSITIONS, AUX_DATAS, DEEPSTACK_EMBEDDINGS = range(5)
ROW_BUFFERS = INPUT_EMBEDDINGS, DEEPSTACK_EMBEDDINGS  # the buffers that hold visual rows
NAMES = ("input_embeddings", "fill_ids", "mrope_positions", "aux_datas", "deepstack_embeddings")

AUX_LENGTH = 16
AUX_TOTAL_TOKENS, AUX_ROPE_DELTA, AUX_VISUAL_ROWS, AUX_FORMAT_VERSION = range(4)  # indices into aux_datas
FORMAT_VERSION = 1  # of the buffers and the wire; aux_datas carries it


class Span(NamedTuple):
    """Tokens `start` to `stop` of a block in one buffer, or integers `start` to `stop` of aux_datas."""

    buffer: int
    start: int
    stop: int


@dataclass(frozen=True)
class BufferLayout:
    """The addresses of a pool's rows, in this process or in another one."""

    block_size: int
    ptrs: tuple[int, ...]
    total_lens: tuple[int, ...]  # bytes per buffer
    item_lens: tuple[int, ...]  # bytes per row

    @property
    def num_blocks(self) -> int:
        return self.total_lens[FILL_IDS] // self.item_lens[FILL_IDS]

    def locate(self, block: int, span: Span) -> tuple[int, int]:
        """Returns (address, bytes) of `span` in `block`.

        Raises:
            ValueError: the block, the buffer or a token does not exist.
        """
        units = AUX_LENGTH if span.buffer == AUX_DATAS else self.block_size
        if not 0 <= span.buffer < len(self.ptrs):
            raise ValueError(f"buffer {span.buffer} does not exist: there are {len(self.ptrs)}")
        if not 0 <= block < self.num_blocks:
            raise ValueError(f"block {block} is outside the pool of {self.num_blocks} blocks")
        if not 0 <= span.start <= span.stop <= units:
            raise ValueError(f"{NAMES[span.buffer]} {span.start} to {span.stop} is outside a row of {units}")
        row = self.item_lens[span.buffer]
        unit = row // units
        return self.ptrs[span.buffer] + block * row + span.start * unit, (span.stop - span.start) * unit


def checksum(parts: Iterable[np.ndarray]) -> bytes:
    """Computes XXH3-64 over the bytes of contiguous arrays, as 8 bytes, most significant first.

    Both sides pass the parts of a token block in this order: fill_ids, mrope_positions [n, 3], aux_datas (block 0
    only), embeddings of visual tokens [v, D], their deepstack embeddings [v, N*D]. The result does not depend on how
    the arrays are split or where they are in the pool.
    """
    digest = xxhash.xxh3_64()
    for part in parts:
        digest.update(part.reshape(-1).view(np.uint8).data)
    return digest.digest()


def fingerprint(model: str, fill_ids: np.ndarray, mrope_positions: np.ndarray, content: bytes = b"") -> bytes:
    """Computes 16 bytes that are equal if two encoders have prepared the same prompt for the same model.

    Args:
        model: the model's identity.
        fill_ids: int32 [T].
        mrope_positions: int32 [3, T].
        content: a digest of the pixels; a URL may have served two different images of the same size.
    """
    digest = xxhash.xxh3_128()
    for part in (model.encode(), content):
        digest.update(len(part).to_bytes(8, "big") + part)
    for array in (fill_ids, mrope_positions):
        digest.update(np.ascontiguousarray(array, np.int32).reshape(-1).view(np.uint8).data)
    return digest.digest()


def visual_runs(visual: np.ndarray) -> tuple[tuple[int, int], ...]:
    """Returns the ranges (start, stop) of consecutive True in bool [n]."""
    edges = np.flatnonzero(np.diff(np.asarray(visual, bool), prepend=False, append=False)).tolist()
    return tuple(zip(edges[::2], edges[1::2], strict=True))
