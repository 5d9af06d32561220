"""A prompt with its visual rows, for those who look at them instead of asking for an answer."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import numpy as np

from deepstack_jax.config import ModelConfig
from deepstack_jax.encoding import scale_rows
from deepstack_jax.models.vision import VisualRows
from deepstack_jax.processing.batch import Batch
from deepstack_jax.programs import PromptArrays


@dataclass(frozen=True)
class LookedAt:
    """A prompt of one row, and which of its visual rows belong to which image or video.

    Attributes:
        prompt: with the rows as they reach the text model.
        spans: (first row, rows) of each image and video.
    """

    prompt: PromptArrays
    spans: Sequence[tuple[int, int]]

    @property
    def length(self) -> int:
        """Tokens of the prompt."""
        return int(np.asarray(self.prompt.lengths)[0])

    @property
    def ids(self) -> np.ndarray:
        """int32 [T]."""
        return np.asarray(self.prompt.input_ids)[0, : self.length]


def of_batch(batch: Batch, rows: VisualRows | None) -> LookedAt:
    """The prompt of a batch of one row, whose rows were encoded here."""
    sizes = [visual.num_rows for visual in batch.visuals]
    firsts = np.cumsum([0, *sizes]).tolist()
    arrays = batch.input_ids, batch.position_ids, batch.lengths, batch.rope_deltas, batch.visual_index, rows
    return LookedAt(PromptArrays(*arrays), list(zip(firsts, sizes, strict=False)))


def joined_rows(parts: Sequence[tuple[int, VisualRows]]) -> VisualRows | None:
    """The first so many rows of each part, one part after another, on the host; None for no parts."""
    if not parts:
        return None
    return jax.tree.map(
        lambda *arrays: np.concatenate([np.asarray(x)[:count] for (count, _), x in zip(parts, arrays, strict=True)]),
        *(rows for _, rows in parts),
    )


def scaled_rows(looked_at: LookedAt, scales: Sequence[float]) -> LookedAt:
    """The prompt with the DeepStack levels of its rows multiplied by scales."""
    rows = looked_at.prompt.rows
    if rows is None:
        return looked_at
    return replace(looked_at, prompt=replace(looked_at.prompt, rows=scale_rows(rows, scales)))


def with_answer(looked_at: LookedAt, answer_ids: Sequence[int]) -> LookedAt:
    """The prompt with an answer's tokens behind it, at the positions that decoding gives them."""
    prompt, length = looked_at.prompt, looked_at.length
    slots = np.arange(length, length + len(answer_ids), dtype=np.int32) + np.asarray(prompt.rope_deltas)[0]
    index = prompt.visual_index
    if index is not None:
        text = np.full(len(answer_ids), -1, np.int32)
        index = np.concatenate([np.asarray(index)[0, :length], text])[None]
    positions = np.concatenate([np.asarray(prompt.position_ids)[:, 0, :length], np.tile(slots, (3, 1))], axis=1)
    longer = replace(
        prompt,
        input_ids=np.concatenate([looked_at.ids, np.asarray(answer_ids, np.int32)])[None],
        position_ids=positions[:, None],
        lengths=np.asarray([length + len(answer_ids)], np.int32),
        visual_index=index,
    )
    return replace(looked_at, prompt=longer)


@dataclass(frozen=True)
class Picture:
    """Where an image or video of a prompt is, and its grid of visual tokens (time, height, width)."""

    kind: str
    grid: tuple[int, int, int]
    rows: slice


def pictures_of(config: ModelConfig, looked_at: LookedAt) -> list[Picture]:
    """The images and videos of a prompt in the order of its tokens. Their grids are read from their positions."""
    if looked_at.prompt.visual_index is None:
        return []
    index = np.asarray(looked_at.prompt.visual_index)[0, : looked_at.length]
    positions = np.asarray(looked_at.prompt.position_ids)[:, 0, : looked_at.length]
    found: list[tuple[int, Picture]] = []
    for first, count in looked_at.spans:
        tokens = np.flatnonzero((index >= first) & (index < first + count))
        run = tokens[: int(np.argmax(np.append(np.diff(tokens) != 1, True))) + 1]  # a video's frames stand apart
        height, width = (int(np.ptp(positions[axis, run])) + 1 for axis in (1, 2))
        kind = "video" if looked_at.ids[tokens[0]] == config.video_token_id else "image"
        grid = count // (height * width), height, width
        found.append((int(tokens[0]), Picture(kind, grid, slice(first, first + count))))
    return [picture for _, picture in sorted(found, key=lambda each: each[0])]
