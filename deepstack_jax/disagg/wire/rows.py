"""Helpers of both bridges: where visual rows are in a block, how they are copied, and how long each stage took."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from deepstack_jax.disagg.wire.layout import visual_runs

PART_BYTES = 1 << 18  # bytes copied and then summed at a time, so that the sum reads the CPU's cache


@dataclass
class StageTimes:
    """Busy seconds of the stages of a bridge, and the amounts that they processed."""

    device: float = 0.0  # waiting for rows to reach the host, or sending them to the device
    host: float = 0.0  # copies and checksums
    wire: float = 0.0  # with at least one write in flight
    num_bytes: int = 0
    num_segments: int = 0


def in_parts(source: np.ndarray, target: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Cuts two arrays of one shape [n, ...] into parts of so many rows that they stay in the CPU's cache."""
    step = max(1, PART_BYTES // max(1, source[:1].nbytes))
    for start in range(0, len(source), step):
        yield source[start : start + step], target[start : start + step]


def copy_in_parts(source: np.ndarray, target: np.ndarray, wipes: bool = False) -> Iterator[np.ndarray]:
    """Copies rows [n, ...] to contiguous memory, and yields each part while it is still in the CPU's cache.

    `wipes` leaves zeros in the source.
    """
    for part, copy in in_parts(source, target):
        copy[...] = part
        if wipes:
            part[...] = 0
        yield copy


def block_runs(visual: np.ndarray) -> tuple[tuple[int, int], ...]:
    """Returns `visual_runs` of a block; blocks that are all visual or all text, as most are, take a fast path."""
    if visual.all():
        return ((0, len(visual)),)
    return visual_runs(visual) if visual.any() else ()


def first_row(runs: Sequence[tuple[int, int]]) -> int:
    """Returns the offset of a block's visual rows, which are contiguous in each buffer.

    A single run keeps its tokens' offset, so that adjacent blocks merge. Several runs are packed at the block's start.
    """
    return runs[0][0] if len(runs) == 1 else 0
