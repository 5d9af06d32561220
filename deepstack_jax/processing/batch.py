"""Turns arrays with Hugging Face's names into the arrays that the compiled programs take.

Rows are moved to the left edge, so that token i of a row is in slot i however the row was padded. Every length is
rounded up to a bucket, so that a bounded number of programs serves all prompts.
"""

import hashlib
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike

from deepstack_jax.config import ModelConfig, VisionConfig
from deepstack_jax.models.vision import PatchGeometry, patch_geometry
from deepstack_jax.processing.positions import rope_positions, visual_index
from deepstack_jax.processing.sources import host_array
from deepstack_jax.rounding import cdiv

SMALLEST_BUCKET = 16
FINER_FROM = 128  # from this length on an octave has `parts` buckets, below it two
ENCODE_PARTS = 8  # the encoder's work grows with every patch of padding


def bucket(length: int, parts: int = 4) -> int:
    """Returns the smallest of 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, ... that holds `length`.

    With `parts` 8, the steps from 128 on are half as long: 128, 144, 160, ...
    """
    octave = SMALLEST_BUCKET
    while 2 * octave < length:
        octave *= 2
    step = octave // parts if octave >= FINER_FROM else octave // 2
    return max(octave, cdiv(length, step) * step)


@dataclass
class VisionInput:
    """One image or one video, padded to a bucket of P patches."""

    pixel_values: np.ndarray  # float32 [P, C*Tp*p*p]
    geometry: PatchGeometry
    num_rows: int  # visual tokens

    @cached_property
    def digest(self) -> bytes:
        """The SHA-256 of the padded patches and of their geometry."""
        hashed = hashlib.sha256()
        geometry = (getattr(self.geometry, each.name) for each in fields(self.geometry))
        for array in map(np.ascontiguousarray, (self.pixel_values, *geometry)):
            hashed.update(f"{array.dtype.name}{array.shape}".encode())
            hashed.update(array.view(np.uint8).reshape(-1))
        return hashed.digest()


@dataclass
class Batch:
    """The prompts of one call, compacted and padded to buckets: B rows of T tokens."""

    input_ids: np.ndarray  # int32 [B, T]
    position_ids: np.ndarray  # int32 [3, B, T]
    lengths: np.ndarray  # int32 [B]: tokens per row
    rope_deltas: np.ndarray  # int32 [B]: M-RoPE position minus slot, of the tokens after the prompt
    token_columns: list[np.ndarray]  # per row, the columns of its tokens in the caller's input_ids
    visual_index: np.ndarray | None = None  # int32 [B, T]: row of each visual token, -1 for text
    visuals: tuple[VisionInput, ...] = ()  # the images, then the videos

    @property
    def num_visual_tokens(self) -> int:
        """The number of rows that `visual_index` refers to."""
        return sum(visual.num_rows for visual in self.visuals)


def prepare_batch(
    config: ModelConfig,
    input_ids: ArrayLike,
    attention_mask: ArrayLike | None = None,
    pixel_values: ArrayLike | None = None,
    image_grid_thw: ArrayLike | None = None,
    pixel_values_videos: ArrayLike | None = None,
    video_grid_thw: ArrayLike | None = None,
    mm_token_type_ids: ArrayLike | None = None,
) -> Batch:
    """Checks the arrays against the model and each other, and brings them into the form of `Batch`.

    Shapes and dtypes are those of `forward`. The arrays may be NumPy, JAX or torch arrays (on any device, bfloat16,
    part of an autograd graph), or nested lists. `mm_token_type_ids` is ignored: it is accepted so that the whole output
    of a processor can be passed.

    Raises:
        ValueError: an array doesn't fit; the message names it, the problem and what is expected.
    """
    del mm_token_type_ids
    ids, mask = _checked_tokens(config, input_ids, attention_mask)
    columns = [np.flatnonzero(row) for row in mask]
    lengths = np.asarray([len(row) for row in columns], np.int32)
    compact = np.zeros((len(ids), int(lengths.max())), np.int32)
    for row, (source, where) in enumerate(zip(ids, columns, strict=True)):
        compact[row, : len(where)] = source[where]
    compact_mask = (np.arange(compact.shape[1]) < lengths[:, None]).astype(np.int32)

    visuals = [
        _checked_visuals(config, name, pixels, grid)
        for name, pixels, grid in (
            ("image", pixel_values, image_grid_thw),
            ("video", pixel_values_videos, video_grid_thw),
        )
    ]
    image_grid, video_grid = (grid for _, grid in visuals)
    positions, deltas = rope_positions(compact, compact_mask, image_grid, video_grid, config)
    padding = bucket(compact.shape[1]) - compact.shape[1]
    batch = Batch(
        input_ids=np.pad(compact, [(0, 0), (0, padding)]),
        position_ids=np.pad(positions, [(0, 0), (0, 0), (0, padding)]),
        lengths=lengths,
        rope_deltas=deltas,
        token_columns=columns,
    )
    if config.vision:
        index = visual_index(compact, compact_mask, image_grid, video_grid, config)
        batch.visuals = tuple(
            _one_visual(config.vision, part, one_grid)
            for pixels, grid in visuals
            if pixels is not None and grid is not None
            for part, one_grid in zip(np.split(pixels, np.cumsum(grid.prod(axis=1))[:-1]), grid, strict=True)
        )
        if batch.visuals:
            batch.visual_index = np.pad(index, [(0, 0), (0, padding)], constant_values=-1)
    return batch


def _one_visual(config: VisionConfig, patches: np.ndarray, grid: np.ndarray) -> VisionInput:
    num_rows = len(patches) // config.merge_unit
    room = config.merge_unit * bucket(num_rows, ENCODE_PARTS)
    return VisionInput(
        np.pad(patches, [(0, room - len(patches)), (0, 0)]), patch_geometry(config, grid[None], room), num_rows
    )


def _checked_tokens(
    config: ModelConfig, input_ids: ArrayLike, attention_mask: ArrayLike | None
) -> tuple[np.ndarray, np.ndarray]:
    ids = host_array(input_ids, "input_ids", ValueError)
    ids = ids[None] if ids.ndim == 1 else ids
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"input_ids must be integers [B, T], found {ids.dtype} {list(ids.shape)}")
    if attention_mask is None:
        mask = np.ones(ids.shape, bool)
    else:
        mask = host_array(attention_mask, "attention_mask", ValueError) != 0
    mask = mask[None] if mask.ndim == 1 else mask
    if mask.shape != ids.shape:
        raise ValueError(f"attention_mask {list(mask.shape)} must have the shape of input_ids {list(ids.shape)}")
    if not ids.size or not mask.any(axis=1).all():
        raise ValueError("empty prompt: every row of input_ids needs at least one token that attention_mask keeps")
    if ((outside := (ids < 0) | (ids >= config.text.vocab_size)) & mask).any():
        first = ids[outside & mask][0]
        raise ValueError(
            f"token id {first} is outside the vocabulary of {config.text.vocab_size}: "
            "was this tokenizer made for this model?"
        )
    return ids, mask


def _checked_visuals(
    config: ModelConfig, name: str, pixels: ArrayLike | None, grid: ArrayLike | None
) -> tuple[np.ndarray | None, np.ndarray | None]:
    names = ("pixel_values", "image_grid_thw") if name == "image" else ("pixel_values_videos", "video_grid_thw")
    if (pixels is None) != (grid is None):
        raise ValueError(f"{names[0]} and {names[1]} go together: only one of them was given")
    if pixels is None or grid is None:
        return None, None
    if config.vision is None:
        raise ValueError(f"{names[0]} was given, but {config.model_type} is a text model: leave {name}s out")
    grids = host_array(grid, names[1], ValueError)
    rows = host_array(pixels, names[0], ValueError).astype(np.float32, copy=False)
    if not grids.size and not rows.size:
        return None, None  # the empty arrays of a processor that was given no pictures
    if grids.ndim != 2 or grids.shape[1] != 3 or not np.issubdtype(grids.dtype, np.integer) or (grids < 1).any():
        raise ValueError(
            f"{names[1]} must be positive integers [n, 3] (time, height, width), "
            f"found {grids.dtype} {list(grids.shape)}"
        )
    if (grids[:, 1:] % config.vision.spatial_merge_size).any():
        raise ValueError(
            f"{names[1]} {grids.tolist()}: height and width must be multiples of {config.vision.spatial_merge_size}"
        )
    expected = int(grids.prod(axis=1).sum()), config.vision.patch_dim
    if rows.shape != expected:
        raise ValueError(
            f"{names[0]} {list(rows.shape)} should be {list(expected)}, as {names[1]} {grids.tolist()} says"
        )
    return rows, grids.astype(np.int64)
