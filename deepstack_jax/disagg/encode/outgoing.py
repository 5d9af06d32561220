"""A request on an encode node: the arrays to send."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from deepstack_jax.disagg.wire.device_rows import HostRows
from deepstack_jax.models.vision import VisualRows


@dataclass(frozen=True, eq=False)
class OutgoingRequest:
    """The arrays of a request whose prompt has T tokens."""

    fill_ids: np.ndarray  # int32 [T]
    mrope_positions: np.ndarray  # int32 [3, T]
    aux_datas: np.ndarray  # int32 [16]
    visual_index: np.ndarray  # int32 [T]: the row of each visual token, -1 for text
    rows: VisualRows | None = None  # None without visual tokens

    @cached_property
    def host_rows(self) -> list[HostRows]:
        """The rows as the bridge reads them: embeddings, then deepstack embeddings if the model has any."""
        if self.rows is None:
            raise ValueError("the prompt has visual tokens but no rows: encode its images first")
        return [HostRows(rows) for rows in self.rows if rows is not None]

    @cached_property
    def rows_before(self) -> np.ndarray:
        """int [T + 1]: the number of visual tokens before each token."""
        return np.concatenate([[0], np.cumsum(self.visual_index >= 0)])

    @cached_property
    def token_positions(self) -> np.ndarray:
        """int32 [T, 3]: the positions in the layout of the wire."""
        return np.ascontiguousarray(self.mrope_positions.T)
