"""Rows on their way, for both sides: where they stand in a block, how they are copied, and how long that took."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from deepstack_jax.disagg.wire.layout import visual_runs

CACHED_BYTES = 1 << 18  # of rows copied and summed at a time, so that the second reads the cache


@dataclass
class StageTimes:
    """Seconds that the stages of a bridge were at work, and what went through."""

    device: float = 0.0  # waiting for rows to come to the host, or sending them from it
    host: float = 0.0  # copies and checksums
    wire: float = 0.0  # at least one write in flight
    num_bytes: int = 0
    pieces: int = 0


def copied(source: np.ndarray, target: np.ndarray) -> Iterator[np.ndarray]:
    """Copies rows [n, W] into contiguous ones; yields those part by part, for who reads them from the cache."""
    step = max(1, CACHED_BYTES // (source.shape[1] * source.itemsize))
    for start in range(0, len(source), step):
        part = target[start : start + step]
        part[...] = source[start : start + step]
        yield part


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
