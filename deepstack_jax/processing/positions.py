"""Computes the M-RoPE positions of a prompt's tokens, and the row of each visual token's embedding.

The number of an image's tokens determines where its block ends, so images may follow one another with nothing between
them. A video counts as one block per temporal patch, because a timestamp precedes each of them.
"""

import numpy as np

from deepstack_jax.config import ModelConfig


def rope_positions(
    input_ids: np.ndarray,
    attention_mask: np.ndarray | None,
    image_grid_thw: np.ndarray | None,
    video_grid_thw: np.ndarray | None,
    config: ModelConfig,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the positions (time, height, width) of every token, as transformers' Qwen3VLModel.get_rope_index does.

    Args:
        input_ids: int `[B, T]`.
        attention_mask: `[B, T]`, 0 for padding on either side; None means no padding.
        image_grid_thw: int `[n, 3]`, the patches of each image before merging, in reading order over the batch.
        video_grid_thw: int `[n, 3]`, the same for each video.

    Returns:
        position_ids, int32 `[3, B, T]`, 0 at padding; and rope_deltas, int32 `[B]`: the number to add to the index of a
        token after the prompt in its row (without padding) to get its position.

    Raises:
        ValueError: the visual tokens do not fit the grids.
    """
    mask = _mask(input_ids, attention_mask)
    kinds = _token_kinds(input_ids, mask, config)
    blocks = _blocks(kinds, image_grid_thw, video_grid_thw, config)
    position_ids = np.zeros((3, *input_ids.shape), np.int32)
    rope_deltas = np.zeros(len(input_ids), np.int32)
    taken = [0, 0]
    for row, visible in enumerate(mask):
        columns = np.flatnonzero(visible)
        if not len(columns):
            continue
        positions = _row_positions(kinds[row, columns], blocks, taken, row)
        position_ids[:, row, columns] = positions
        rope_deltas[row] = positions.max() + 1 - len(columns)
    return position_ids, rope_deltas


def visual_index(
    input_ids: np.ndarray,
    attention_mask: np.ndarray | None,
    image_grid_thw: np.ndarray | None,
    video_grid_thw: np.ndarray | None,
    config: ModelConfig,
) -> np.ndarray:
    """Returns the row of each token's visual embedding, int32 `[B, T]`, -1 for text and padding.

    The rows of images come first, in reading order over the batch, then those of videos. Arguments and errors are those
    of `rope_positions`.
    """
    kinds = _token_kinds(input_ids, _mask(input_ids, attention_mask), config)
    _blocks(kinds, image_grid_thw, video_grid_thw, config)
    index = np.full(input_ids.shape, -1, np.int32)
    images, videos = kinds == 1, kinds == 2
    index[images] = np.arange(images.sum())
    index[videos] = images.sum() + np.arange(videos.sum())
    return index


def _mask(input_ids: np.ndarray, attention_mask: np.ndarray | None) -> np.ndarray:
    if attention_mask is None:
        return np.ones(input_ids.shape, bool)
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask {list(attention_mask.shape)} must have the shape of input_ids {list(input_ids.shape)}"
        )
    return np.asarray(attention_mask).astype(bool)


def _token_kinds(input_ids: np.ndarray, mask: np.ndarray, config: ModelConfig) -> np.ndarray:
    """Returns int8 `[B, T]`: 0 for text and padding, 1 for image tokens, 2 for video tokens."""
    kinds = np.zeros(input_ids.shape, np.int8)
    if config.vision:
        kinds[mask & (input_ids == config.image_token_id)] = 1
        kinds[mask & (input_ids == config.video_token_id)] = 2
    return kinds


def _blocks(
    kinds: np.ndarray, image_grid_thw: np.ndarray | None, video_grid_thw: np.ndarray | None, config: ModelConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the merged sizes (t, h, w) `[n, 3]` of image and video blocks, checked against the token counts."""
    blocks = []
    for kind, name, grids in ((1, "image", image_grid_thw), (2, "video", video_grid_thw)):
        grids = np.zeros((0, 3), np.int64) if grids is None else np.asarray(grids, np.int64)
        if grids.ndim != 2 or grids.shape[1] != 3:
            raise ValueError(f"{name}_grid_thw of shape {list(grids.shape)}: expected [number of {name}s, 3]")
        if len(grids) and not config.vision:
            raise ValueError(
                f"{name}_grid_thw given to a {config.model_type} checkpoint, which has no vision: leave it out"
            )
        if config.vision and len(grids):
            merge = config.vision.spatial_merge_size
            if (grids < 1).any() or (grids[:, 1:] % merge).any():
                raise ValueError(
                    f"{name}_grid_thw {grids.tolist()}: height and width must be positive multiples of {merge}"
                )
            grids = grids // (1, merge, merge)
        if name == "video":
            grids = np.repeat(grids, grids[:, 0], axis=0)
            grids[:, 0] = 1
        tokens, asked = int((kinds == kind).sum()), int(grids.prod(axis=1).sum())
        if tokens != asked:
            raise ValueError(f"{tokens} {name} tokens in input_ids, but {name}_grid_thw asks for {asked}")
        blocks.append(grids)
    return blocks[0], blocks[1]


def _row_positions(kinds: np.ndarray, blocks: tuple[np.ndarray, np.ndarray], taken: list[int], row: int) -> np.ndarray:
    """Returns positions `[3, n]` of one row's unmasked tokens; advances `taken`, the blocks used so far per kind."""
    steps = np.ones(len(kinds), np.int64)  # by how much the position grows after each token
    offsets = np.zeros((3, len(kinds)), np.int64)  # from the first token of a visual token's block
    for kind, name in ((1, "image"), (2, "video")):
        tokens = np.flatnonzero(kinds == kind)
        if not len(tokens):
            continue
        grids = blocks[kind - 1][taken[kind - 1] :]
        ends = grids.prod(axis=1).cumsum()
        used = int(np.searchsorted(ends, len(tokens))) + 1
        if used > len(ends) or ends[used - 1] != len(tokens):
            raise ValueError(
                f"row {row} of input_ids has {len(tokens)} {name} tokens, which do not end where an entry of "
                f"{name}_grid_thw ends: a prompt holds whole {name}s"
            )
        grids, ends = grids[:used], ends[:used]
        taken[kind - 1] += used
        starts = np.concatenate(([0], ends[:-1]))
        broken = tokens[ends - 1] - tokens[starts] != ends - 1 - starts
        if broken.any():
            raise ValueError(
                f"row {row} of input_ids has other tokens between those of one {name}: "
                f"keep each {name}'s tokens together"
            )
        _, height, width = (np.repeat(sizes, ends - starts) for sizes in grids.T)
        within = np.arange(len(tokens)) - np.repeat(starts, ends - starts)
        offsets[:, tokens] = within // (height * width), within // width % height, within % width
        steps[tokens] = 0
        steps[tokens[ends - 1]] = grids[:, 1:].max(axis=1)
    return offsets + (steps.cumsum() - steps)
