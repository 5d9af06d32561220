"""Arrays that don't fit are refused before any work, in one line that names them."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import deepstack_jax as dsj
from deepstack_jax.encoding import encode_images, encode_rows
from deepstack_jax.models.parameters import init_params
from deepstack_jax.models.registry import parse_config
from deepstack_jax.processing.batch import Batch, bucket, prepare_batch
from deepstack_jax.testing.random_checkpoint import tiny_config
from tests.cases import IMAGE, VIDEO, batch_of, side_by_side

CONFIG = parse_config(tiny_config())
GOOD = batch_of(tiny_config(), [[4, (IMAGE, (1, 4, 6)), 3]])


def test_buckets_are_few_and_hold_their_length():
    sizes = {bucket(length) for length in range(1, 5000)}
    assert sorted(sizes)[:12] == [16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320]
    assert len(sizes) == 28
    assert all(length <= bucket(length) < max(17, 1.5 * length) for length in range(1, 128))
    assert all(length <= bucket(length) < 1.25 * length for length in range(128, 5000))
    assert all(length <= bucket(length, 8) < 1.125 * length for length in range(128, 5000))
    assert all(bucket(bucket(length, 8)) == bucket(length) for length in range(1, 5000))


def test_pictures_in_two_buckets_of_the_encoder_share_one_of_prefill():
    model = dsj.Model(CONFIG, init_params(CONFIG))
    rows = []
    for grid in ((1, 20, 26), (1, 20, 30)):  # 130 and 150 visual tokens
        arrays = batch_of(tiny_config(), [[4, (IMAGE, grid), 3]])
        batch = prepare_batch(CONFIG, **arrays)
        rows.append((len(batch.visuals[0].pixel_values) // 4, side_by_side(encode_rows(model, batch))))
    assert [(patches, len(made)) for patches, made in rows] == [(144, 160), (160, 160)]
    assert all(np.abs(made[0]).max() > 0 for _, made in rows)
    assert not rows[0][1][130:].any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_image_has_the_same_rows_bit_for_bit_whatever_comes_with_it(dtype: str):
    """What a cache of rows by image, and encode nodes that batch several requests, rely on."""
    model = dsj.Model(CONFIG, init_params(CONFIG, dtype=dtype))
    grids = [(1, 8, 6), (1, 20, 30), (1, 10, 6), (1, 6, 8), (1, 4, 6), (1, 8, 8), (3, 4, 6)]
    arrays = batch_of(tiny_config(), [[4, *((VIDEO if grid[0] > 1 else IMAGE, grid) for grid in grids), 3]])
    visuals = prepare_batch(CONFIG, **arrays).visuals
    together = encode_images(model, visuals)
    for visual, rows in zip(visuals, together, strict=True):
        np.testing.assert_array_equal(rows, encode_images(model, [visual])[0])
    # five images share a bucket: four run together, then one
    assert sorted(len(rows) for rows in together) == [16] * 5 + [24, 160]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": np.zeros((1, 0), int), "attention_mask": None}, "empty prompt"),
        ({"attention_mask": np.zeros_like(GOOD["input_ids"])}, "empty prompt: every row"),
        ({"input_ids": GOOD["input_ids"].astype(float)}, "input_ids must be integers [B, T], found float64"),
        ({"input_ids": np.full_like(GOOD["input_ids"], 300)}, "token id 300 is outside the vocabulary of 300"),
        ({"input_ids": np.full_like(GOOD["input_ids"], -1)}, "token id -1 is outside the vocabulary"),
        ({"attention_mask": np.ones((1, 3))}, "attention_mask [1, 3] must have the shape of input_ids"),
        ({"image_grid_thw": None}, "pixel_values and image_grid_thw go together"),
        ({"pixel_values": GOOD["pixel_values"][:-1]}, "pixel_values [23, 1536] should be [24, 1536]"),
        ({"image_grid_thw": np.asarray([[1, 3, 8]])}, "height and width must be multiples of 2"),
        ({"image_grid_thw": np.asarray([[1, 0, 8]])}, "must be positive integers [n, 3]"),
        ({"input_ids": np.full_like(GOOD["input_ids"], 5)}, "image"),
        ({"pixel_values": None, "image_grid_thw": None}, "image"),
    ],
)
def test_arrays_that_do_not_fit_are_named(change: dict, message: str):
    with pytest.raises(ValueError) as error:
        prepare_batch(CONFIG, **(GOOD | change))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def leaves(batch: Batch) -> list[np.ndarray]:
    index = [] if batch.visual_index is None else [batch.visual_index]
    pixels = [visual.pixel_values for visual in batch.visuals]
    return [batch.input_ids, batch.position_ids, batch.lengths, batch.rope_deltas, *index, *pixels]


def floating(name: str, dtype: Any) -> Any:
    return dtype if name.startswith("pixel_values") else None


@pytest.mark.parametrize(
    "convert",
    [
        pytest.param(lambda name, array: torch.from_numpy(array), id="torch"),
        pytest.param(lambda name, array: torch.from_numpy(array).to(floating(name, torch.bfloat16)), id="bfloat16"),
        pytest.param(lambda name, array: torch.from_numpy(array).to(floating(name, torch.float64)), id="float64"),
        pytest.param(
            lambda name, array: torch.from_numpy(array).requires_grad_(name.startswith("pixel_values")), id="gradient"
        ),
        pytest.param(
            lambda name, array: torch.nn.Parameter(torch.from_numpy(array), name.startswith("pixel_values")),
            id="parameter",
        ),
        pytest.param(lambda name, array: torch.from_numpy(array).to_sparse(), id="sparse"),
        pytest.param(lambda name, array: jnp.asarray(array), id="jax"),
        pytest.param(lambda name, array: jnp.asarray(array, floating(name, jnp.bfloat16)), id="jax-bfloat16"),
        pytest.param(lambda name, array: array.tolist(), id="lists"),
        pytest.param(lambda name, array: list(torch.from_numpy(array)), id="list-of-tensors"),
        pytest.param(lambda name, array: array.astype(array.dtype.newbyteorder(">")), id="big-endian"),
        pytest.param(lambda name, array: memoryview(np.ascontiguousarray(array)), id="memory"),
    ],
)
def test_arrays_of_every_library_give_the_batch_of_their_values(convert: Callable[[str, np.ndarray], Any]):
    """The reference is the batch of NumPy's arrays. The pixels are small integers, which bfloat16 holds exactly."""
    arrays = batch_of(tiny_config(), [[4, (IMAGE, (1, 4, 6)), 3], [5, (VIDEO, (2, 4, 4))]])
    for name in ("pixel_values", "pixel_values_videos"):
        arrays[name] = np.random.default_rng(0).integers(-8, 8, arrays[name].shape).astype(np.float32)
    batch = prepare_batch(CONFIG, **{name: convert(name, np.asarray(array)) for name, array in arrays.items()})
    for found, expected in zip(leaves(batch), leaves(prepare_batch(CONFIG, **arrays)), strict=True):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", sorted(GOOD.keys() - {"mm_token_type_ids"}))
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(2, 2, device="meta"), " can't be read from Tensor (a tensor on the device meta has no values)"),
        ([[1, 2], [3]], " can't be read from list (setting an array element with a sequence"),
        ([["a"]], " of type list holds <U1, not real numbers: give integers or floating point"),
        ({"a": 1}, " of type dict holds object, not real numbers"),
        (np.ones((2, 2), complex), " of type ndarray holds complex128, not real numbers"),
    ],
)
def test_arrays_that_can_not_be_read_are_named(name: str, value: Any, message: str):
    with pytest.raises(ValueError) as error:
        prepare_batch(CONFIG, **(GOOD | {name: value}))
    assert str(error.value).startswith(name + message)
    assert "\n" not in str(error.value)


def test_a_jax_array_that_was_given_away_is_named():
    array = jnp.asarray(GOOD["pixel_values"])
    array.delete()
    with pytest.raises(ValueError, match=r"pixel_values can't be read from ArrayImpl .*deleted"):
        prepare_batch(CONFIG, **(GOOD | {"pixel_values": array}))


def test_arrays_of_no_pictures_are_as_if_absent():
    none = {"pixel_values": np.zeros((0, 1536), np.float32), "image_grid_thw": np.zeros((0, 3), np.int64)}
    assert prepare_batch(CONFIG, [[1, 2, 3]], **none).visuals == ()


def test_a_dtype_that_the_models_do_not_compute_in_is_refused(tmp_path):
    with pytest.raises(ValueError, match="dtype int8 is not supported: expected float32 or bfloat16"):
        dsj.load(tmp_path, np.int8)


def test_a_text_model_refuses_pictures():
    with pytest.raises(ValueError, match="qwen3_moe is a text model: leave images out"):
        prepare_batch(parse_config(tiny_config("qwen3_moe")), **GOOD)


@pytest.mark.parametrize(
    ("max_new_tokens", "message"),
    [
        (0, "max_new_tokens 0 is out of range: expected 1 or more"),
        (-3, "max_new_tokens -3 is out of range"),
        (4095, "2 prompt tokens and max_new_tokens 4095 exceed the model's 4096 positions: .* at most 4094"),
    ],
)
def test_max_new_tokens_out_of_range_is_named(max_new_tokens: int, message: str):
    model = dsj.Model(CONFIG, init_params(CONFIG))
    with pytest.raises(ValueError, match=message):
        dsj.generate(model, input_ids=[[1, 2]], max_new_tokens=max_new_tokens)
    with pytest.raises(ValueError, match=message):
        next(dsj.stream(model, {"input_ids": [[1, 2]]}, max_new_tokens=max_new_tokens))
