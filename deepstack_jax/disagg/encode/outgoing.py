"""A request on an encode node: the arrays to send."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np

from deepstack_jax.disagg.wire.device_rows import HostRows
from deepstack_jax.models.vision import VisualRows


@dataclass(eq=False)
class OutgoingRequest:
    """The arrays of a request whose prompt has T tokens. Rows may be added later, image by image."""

    fill_ids: np.ndarray  # int32 [T]
    mrope_positions: np.ndarray  # int32 [3, T]
    aux_datas: np.ndarray  # int32 [16]
    visual_index: np.ndarray  # int32 [T]: the row of each visual token, -1 for text
    rows: VisualRows | None = None  # of all visual tokens, if they are encoded
    _parts: dict[int, "_Part"] = field(default_factory=dict, init=False)  # by the number of their first row

    def __post_init__(self) -> None:
        if self.rows is not None:
            self.add_rows(0, len(self.rows.embeds), self.rows)

    def add_rows(self, first_row: int, count: int, rows: VisualRows) -> None:
        """Adds the `count` rows of an image; rows of padding may follow them."""
        self._parts[first_row] = _Part(count, [HostRows(array) for array in rows if array is not None])

    def read(self, start: int, stop: int, which: int) -> Iterator[np.ndarray]:
        """Yields uint8 [n, bytes per row] of rows `start` to `stop`, part by part: embeddings, or 1: deepstack levels.

        Waits until the device has computed the rows.

        Raises:
            ValueError: an image of them has not been encoded.
        """
        while start < stop:
            first = max((first for first in self._parts if first <= start), default=None)
            if first is None or start >= first + self._parts[first].count:
                raise ValueError(f"visual row {start} has not been encoded: encode its image first")
            until = min(stop, first + self._parts[first].count)
            yield from self._parts[first].arrays[which].read(start - first, until - first)
            start = until

    @cached_property
    def rows_before(self) -> np.ndarray:
        """int [T + 1]: the number of visual tokens before each token."""
        return np.concatenate([[0], np.cumsum(self.visual_index >= 0)])

    @cached_property
    def token_positions(self) -> np.ndarray:
        """int32 [T, 3]: the positions in the layout of the wire."""
        return np.ascontiguousarray(self.mrope_positions.T)


class _Part(NamedTuple):
    """Consecutive rows: their number, and their embeddings and deepstack levels as the bridge reads them."""

    count: int
    arrays: list[HostRows]
