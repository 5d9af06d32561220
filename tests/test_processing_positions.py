"""Positions of tokens: against transformers' get_rope_index on random layouts, and by hand where it does not go."""

import time
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.qwen3_vl_moe.configuration_qwen3_vl_moe import Qwen3VLMoeConfig
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeModel

from deepstack_jax.config import ModelConfig
from deepstack_jax.models.registry import parse_config
from deepstack_jax.processing.positions import rope_positions, visual_index

IMAGE, VIDEO, PAD = 91, 92, 0


def model_config(merge: int = 2, model_type: str = "qwen3_vl_moe") -> ModelConfig:
    text = {
        "vocab_size": 100,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 16,
        "rope_scaling": {"mrope_section": [4, 2, 2]},
    }
    if not model_type.startswith("qwen3_vl"):
        return parse_config({"model_type": model_type, **text})
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_heads": 2,
        "out_hidden_size": 32,
        "deepstack_visual_indexes": [0],
        "spatial_merge_size": merge,
    }
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
    return parse_config(
        {
            "model_type": model_type,
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
            "text_config": text | experts,
            "vision_config": vision,
        }
    )


@dataclass
class Layout:
    """A batch: what transformers' processor would make of random conversations."""

    merge: int
    input_ids: np.ndarray
    attention_mask: np.ndarray
    image_grid_thw: np.ndarray | None
    video_grid_thw: np.ndarray | None


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    merge = draw(st.integers(1, 3))
    side = st.integers(1, 5)
    images, videos, rows = [], [], []
    text = st.lists(st.integers(1, 90), min_size=1, max_size=6)
    for _ in range(draw(st.integers(1, 3))):
        row = draw(text)
        for kind in draw(st.lists(st.sampled_from(["image", "video"]), max_size=4)):
            frames = 1 if kind == "image" else draw(st.integers(1, 3))
            height, width = draw(side), draw(side)
            for _ in range(frames):
                row += draw(text) + [IMAGE if kind == "image" else VIDEO] * (height * width)
            (images if kind == "image" else videos).append((frames, height * merge, width * merge))
        # text at the end is optional: a prompt may stop with an image
        rows.append(row + draw(st.lists(st.integers(1, 90), max_size=4)))
    length = max(map(len, rows)) + draw(st.integers(0, 3))
    input_ids = np.full((len(rows), length), PAD, np.int32)
    attention_mask = np.zeros_like(input_ids)
    for i, row in enumerate(rows):
        start = draw(st.integers(0, length - len(row)))  # padding on the left, on the right or on both sides
        input_ids[i, start : start + len(row)] = row
        attention_mask[i, start : start + len(row)] = 1
    grids = [np.array(grid, np.int64) if grid else None for grid in (images, videos)]
    return Layout(merge, input_ids, attention_mask, *grids)


def hf_rope_index(layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    model = Qwen3VLMoeModel.__new__(Qwen3VLMoeModel)  # the method reads nothing but the configuration
    torch.nn.Module.__init__(model)
    model.config = Qwen3VLMoeConfig(
        vision_config={"spatial_merge_size": layout.merge}, image_token_id=IMAGE, video_token_id=VIDEO
    )
    kinds = np.where(layout.input_ids == IMAGE, 1, np.where(layout.input_ids == VIDEO, 2, 0))
    tensors = [
        None if array is None else torch.tensor(array).long()
        for array in (layout.input_ids, kinds, layout.image_grid_thw, layout.video_grid_thw, layout.attention_mask)
    ]
    position_ids, deltas = model.get_rope_index(*tensors)
    return position_ids.numpy(), deltas.numpy()[:, 0]


@given(layouts())
@settings(max_examples=200, deadline=None)
def test_positions_and_deltas_equal_transformers_on_random_layouts(layout: Layout):
    config = model_config(layout.merge)
    grids = layout.image_grid_thw, layout.video_grid_thw
    position_ids, deltas = rope_positions(layout.input_ids, layout.attention_mask, *grids, config)
    expected_positions, expected_deltas = hf_rope_index(layout)
    assert position_ids.dtype == np.int32
    assert deltas.dtype == np.int32
    np.testing.assert_array_equal(position_ids, expected_positions)  # padding is 0 in both
    np.testing.assert_array_equal(deltas, expected_deltas)


@given(layouts())
@settings(max_examples=100, deadline=None)
def test_visual_index_counts_images_then_videos_in_reading_order(layout: Layout):
    grids = layout.image_grid_thw, layout.video_grid_thw
    index = visual_index(layout.input_ids, layout.attention_mask, *grids, model_config(layout.merge))
    expected, next_image = np.full(layout.input_ids.shape, -1), 0
    next_video = int((layout.input_ids == IMAGE).sum())
    for row, column in np.ndindex(*layout.input_ids.shape):
        if layout.input_ids[row, column] == IMAGE:
            expected[row, column] = next_image
            next_image += 1
        elif layout.input_ids[row, column] == VIDEO:
            expected[row, column] = next_video
            next_video += 1
    assert index.dtype == np.int32
    np.testing.assert_array_equal(index, expected)


def test_text_alone_counts_its_unmasked_tokens():
    input_ids = np.array([[PAD, PAD, 5, 6, 7], [1, 2, 3, PAD, PAD]], np.int32)
    attention_mask = (input_ids != PAD).astype(np.int32)
    for model_type in ("qwen3_vl_moe", "qwen3_moe"):
        config = model_config(model_type=model_type) if "vl" in model_type else text_config()
        position_ids, deltas = rope_positions(input_ids, attention_mask, None, None, config)
        np.testing.assert_array_equal(position_ids, [[[0, 0, 0, 1, 2], [0, 1, 2, 0, 0]]] * 3)
        np.testing.assert_array_equal(deltas, [0, 0])
        assert (visual_index(input_ids, attention_mask, None, None, config) == -1).all()


def text_config() -> ModelConfig:
    raw = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    return parse_config({"model_type": "qwen3", "num_attention_heads": 2, **raw})


def test_a_text_checkpoint_takes_image_tokens_for_text():
    input_ids = np.array([[1, 151655, 151655, 2]], np.int32)
    position_ids, deltas = rope_positions(input_ids, None, None, None, text_config())
    np.testing.assert_array_equal(position_ids, [[[0, 1, 2, 3]]] * 3)
    assert deltas.tolist() == [0]


def test_adjacent_images_are_told_apart_by_their_numbers_of_tokens():
    # 2x1 and 1x3 merged patches with nothing between; transformers would read one run of 5 tokens
    input_ids = np.array([[7, IMAGE, IMAGE, IMAGE, IMAGE, IMAGE, 8]], np.int32)
    grids = np.array([[1, 4, 2], [1, 2, 6]])
    position_ids, deltas = rope_positions(input_ids, None, grids, None, model_config())
    # the first starts at 1 and takes max(2, 1) positions, the second starts at 3 and takes max(1, 3)
    np.testing.assert_array_equal(
        position_ids[:, 0], [[0, 1, 1, 3, 3, 3, 6], [0, 1, 2, 3, 3, 3, 6], [0, 1, 1, 3, 4, 5, 6]]
    )
    assert deltas.tolist() == [0]


def test_images_of_a_batch_go_to_their_own_rows():
    input_ids = np.array([[IMAGE, IMAGE, 5, 6], [5, IMAGE, 6, IMAGE]], np.int32)
    grids = np.array([[1, 2, 4], [1, 2, 2], [1, 2, 2]])
    np.testing.assert_array_equal(
        visual_index(input_ids, None, grids, None, model_config()), [[0, 1, -1, -1], [-1, 2, -1, 3]]
    )


@pytest.mark.parametrize(
    ("row", "image_grid_thw", "video_grid_thw", "message"),
    [
        ([IMAGE] * 4, [[1, 4, 6]], None, "4 image tokens in input_ids, but image_grid_thw asks for 6"),
        ([1, IMAGE], None, None, "1 image tokens in input_ids, but image_grid_thw asks for 0"),
        ([1, VIDEO], None, [[2, 2, 2]], "1 video tokens in input_ids, but video_grid_thw asks for 2"),
        ([1, 2], [[1, 2, 2]], None, "0 image tokens in input_ids, but image_grid_thw asks for 1"),
        ([IMAGE] * 2, [[1, 3, 4]], None, "height and width must be positive multiples of 2"),
        ([IMAGE, 5, IMAGE], [[1, 2, 4]], None, "other tokens between those of one image"),
        ([IMAGE], [1, 2, 2], None, r"image_grid_thw of shape \[3\]"),
    ],
)
def test_tokens_that_do_not_fit_the_grids_are_refused(row, image_grid_thw, video_grid_thw, message):
    grids = [None if grid is None else np.array(grid) for grid in (image_grid_thw, video_grid_thw)]
    with pytest.raises(ValueError, match=message):
        rope_positions(np.array([row], np.int32), None, *grids, model_config())


def test_an_image_split_over_two_rows_is_refused():
    input_ids = np.array([[1, IMAGE], [IMAGE, 1]], np.int32)
    with pytest.raises(ValueError, match="row 0 of input_ids has 1 image tokens, which do not end where"):
        rope_positions(input_ids, None, np.array([[1, 2, 4]]), None, model_config())


def test_grids_for_a_text_checkpoint_are_refused():
    with pytest.raises(ValueError, match="qwen3 checkpoint, which has no vision"):
        rope_positions(np.array([[1, 2]]), None, np.array([[1, 2, 2]]), None, text_config())


def test_a_hundred_thousand_tokens_take_well_under_a_second():
    frames, height, width = 384, 16, 16
    row = ([5] * 10 + [VIDEO] * (height * width)) * frames
    grid = np.array([[frames, height * 2, width * 2]])
    start = time.perf_counter()
    position_ids, _ = rope_positions(np.array([row], np.int32), None, None, grid, model_config())
    assert time.perf_counter() - start < 1
    assert position_ids[0, 0, -1] == 10 * frames + 16 * (frames - 1)
