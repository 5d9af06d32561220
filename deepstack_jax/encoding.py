"""Encodes images and videos to visual rows, several of one bucket per run, and concatenates the rows."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from deepstack_jax.checkpoint import Model
from deepstack_jax.config import ModelConfig
from deepstack_jax.errors import short
from deepstack_jax.models.vision import VisualRows
from deepstack_jax.processing.batch import Batch, VisionInput, bucket
from deepstack_jax.programs import empty_rows, encode_vision, scale_deepstack, write_rows

ENCODE_TOGETHER = 4  # the most images per run of the encoder


def group_size(model: Model, count: int) -> int:
    """Returns how many of `count` images of one bucket run together.

    That is a power of two, which keeps programs few, and at most ENCODE_TOGETHER. On a mesh it is one per device.
    """
    if model.mesh is not None:
        return min(model.mesh.size, count)
    return min(ENCODE_TOGETHER, 1 << (count.bit_length() - 1))


def encode_group(model: Model, visuals: Sequence[VisionInput]) -> jax.Array:
    """Returns rows [G, bucket of m, (1+N)*D] of G images of one bucket; an image's bits don't depend on the others.

    On a mesh, G is the number of devices, and rows after those of the images are of no use.
    """
    if model.mesh is not None:
        visuals = [*visuals, *[visuals[-1]] * (model.mesh.size - len(visuals))]
    items = [(visual.pixel_values, visual.geometry) for visual in visuals]
    # one image needs no copy of its pixels
    stacked = jax.tree.map(lambda *arrays: np.stack(arrays) if arrays[1:] else arrays[0][None], *items)
    return encode_vision(model.config, model.vision_params, *stacked)


def encode_images(model: Model, visuals: Sequence[VisionInput]) -> list[jax.Array]:
    """Returns rows [bucket of m, (1+N)*D] per image and video, running up to ENCODE_TOGETHER of one bucket together."""
    rows: dict[int, jax.Array] = {}
    waiting: dict[int, list[int]] = {}
    for i, visual in enumerate(visuals):
        waiting.setdefault(len(visual.pixel_values), []).append(i)
    for numbers in waiting.values():
        while numbers:
            size = group_size(model, len(numbers))
            group, numbers[:] = numbers[:size], numbers[size:]
            rows |= zip(group, encode_group(model, [visuals[i] for i in group]), strict=False)
    return [rows[i] for i in range(len(visuals))]


def encode_rows(model: Model, batch: Batch, scales: Sequence[float] = ()) -> VisualRows | None:
    """Returns the visual rows of a batch, padded to a bucket, or None if it has neither images nor videos.

    `scales` multiply the DeepStack levels; see `checked_scales`.
    """
    if not batch.visuals:
        return None
    rows = concat_rows(model, encode_images(model, batch.visuals), batch.visuals)
    return scale_rows(rows, scales) if scales else rows


def scale_rows(rows: VisualRows, scales: Sequence[float]) -> VisualRows:
    """Returns the rows with their DeepStack levels, which are donated, multiplied by scales."""
    if rows.deepstack is None:
        return rows
    each_row = np.tile(np.asarray(scales, np.float32), (len(rows.embeds), 1))
    return rows._replace(deepstack=scale_deepstack(jnp.asarray(rows.deepstack), each_row))


def checked_scales(config: ModelConfig, scales: Sequence[float] | None) -> tuple[float, ...]:
    """Returns the factors of a model's DeepStack levels; () where all of them are 1, or none is given.

    Raises:
        ValueError: another number of them than the model has levels, or one that is not a finite number.
    """
    if scales is None:
        return ()
    levels = config.num_deepstack_levels
    if len(scales) != levels:
        raise ValueError(f"{len(scales)} deepstack_scales: the model has {levels} DeepStack levels, give one for each")
    if not np.isfinite(scales).all():
        raise ValueError(f"deepstack_scales {short(list(scales))}: give finite numbers")
    return () if all(scale == 1 for scale in scales) else tuple(map(float, scales))


def concat_rows(model: Model, parts: Sequence[jax.Array], visuals: Sequence[VisionInput]) -> VisualRows:
    """Returns the rows of all images in order, padded with zeros to a bucket."""
    rows = empty_rows(model.config, bucket(sum(visual.num_rows for visual in visuals)), model.mesh)
    first = 0
    for part, visual in zip(parts, visuals, strict=True):
        rows = write_rows(model.config, rows, part, np.int32(first), np.int32(0), np.int32(visual.num_rows))
        first += visual.num_rows
    return rows
