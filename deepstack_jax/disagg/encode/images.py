"""The images and videos of a request on an encode node, in the order of their tokens."""

from dataclasses import dataclass

import numpy as np

from deepstack_jax.processing.batch import Batch, VisionInput


@dataclass(frozen=True, eq=False)
class OutgoingImage:
    """One image or video that is to be encoded.

    Attributes:
        visual: its pixels.
        digest: their SHA-256.
        first_row: the number of its first visual row, in the order of tokens.
        rows: how many visual rows it has.
        blocks: the token blocks in which it has rows.
    """

    visual: VisionInput
    digest: bytes
    first_row: int
    rows: int
    blocks: frozenset[int]


def images_of(batch: Batch, block_size: int) -> tuple[np.ndarray, list[OutgoingImage]]:
    """The visual rows of a batch of one prompt, numbered in the order of their tokens.

    A batch has its images before its videos, whatever their order in the prompt.

    Returns:
        int32 [T], the row of each visual token or -1 for text, and the images and videos with their digests.
    """
    count = int(batch.lengths[0])
    if batch.visual_index is None:
        return np.full(count, -1, np.int32), []
    index = batch.visual_index[0, :count]
    stops = np.cumsum([visual.num_rows for visual in batch.visuals])
    tokens_of = [
        np.flatnonzero((index >= stop - visual.num_rows) & (index < stop))
        for visual, stop in zip(batch.visuals, stops, strict=True)
    ]
    in_order = np.where(index >= 0, np.cumsum(index >= 0) - 1, -1).astype(np.int32)
    images = [
        OutgoingImage(
            visual, visual.digest, int(in_order[tokens[0]]), len(tokens), frozenset((tokens // block_size).tolist())
        )
        for visual, tokens in zip(batch.visuals, tokens_of, strict=True)
    ]
    return in_order, sorted(images, key=lambda image: image.first_row)
