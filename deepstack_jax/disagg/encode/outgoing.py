"""A prompt on an encode node: what there is to send."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from deepstack_jax.disagg.wire.device_rows import HostRows
from deepstack_jax.models.vision import VisualRows


@dataclass(frozen=True, eq=False)
class OutgoingPrompt:
    """What an encode node has for a prompt of T tokens."""

    fill_ids: np.ndarray  # int32 [T]
    mrope_positions: np.ndarray  # int32 [3, T]
    aux_datas: np.ndarray  # int32 [16]
    visual_index: np.ndarray  # int32 [T]: row of each visual token, -1 for text
    rows: VisualRows | None = None  # None for text alone

    @cached_property
    def host_rows(self) -> list[HostRows]:
        """Its rows for the bridge: embeddings, and deepstack where there is any."""
        if self.rows is None:
            raise ValueError("the prompt has visual tokens and no rows: encode its pictures first")
        return [HostRows(rows) for rows in self.rows if rows is not None]

    @cached_property
    def rows_before(self) -> np.ndarray:
        """VisionInput tokens before each place: [T + 1]."""
        return np.concatenate([[0], np.cumsum(self.visual_index >= 0)])

    @cached_property
    def token_positions(self) -> np.ndarray:
        """Its positions as the wire has them: [T, 3]."""
        return np.ascontiguousarray(self.mrope_positions.T)
