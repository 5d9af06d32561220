"""Agreement with PyTorch (transformers) on random checkpoints, in float32 and bfloat16."""

from functools import cache
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import deepstack_jax as dsj
from deepstack_jax.encoding import encode_rows
from deepstack_jax.models.parameters import merge_params
from deepstack_jax.processing.batch import prepare_batch
from deepstack_jax.testing.random_checkpoint import write_random_checkpoint
from tests.cases import BY_NAME, CASES, Case, side_by_side
from tests.torch_reference import load_reference, reference_logits, reference_rows, reference_tokens

NAMES = [case.name for case in CASES]
VISUAL_NAMES = [case.name for case in CASES if "pixel_values" in case.inputs or "pixel_values_videos" in case.inputs]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory):
    """Checkpoint directories by case, made once."""

    @cache
    def of(name: str) -> Path:
        case = BY_NAME[name]
        path = tmp_path_factory.mktemp("checkpoint")
        write_random_checkpoint(path, case.config, seed=case.seed, expert_layout=case.expert_layout, tokenizer=False)
        return path

    return of


@pytest.mark.parametrize("name", NAMES)
def test_float32_logits_and_greedy_tokens_are_those_of_pytorch(name: str, directory):
    case = BY_NAME[name]
    reference, model = load_reference(directory(name)), dsj.load(directory(name))
    real = case.inputs["attention_mask"] == 1
    expected = reference_logits(reference, case.inputs)[real]
    logits = np.asarray(dsj.forward(model, **case.inputs))[real]
    assert np.abs(logits - expected).max() <= 2e-5 * np.abs(expected).max()

    out = dsj.generate(model, **case.inputs, max_new_tokens=16, eos_token_id=[])
    if case.padding == "left":
        np.testing.assert_array_equal(out.tokens, reference_tokens(reference, case.inputs))
    else:  # transformers generates from left-padded prompts alone: one row at a time, without padding
        for row, tokens in enumerate(out.tokens):
            alone = single_row(case, row)
            np.testing.assert_array_equal(tokens, reference_tokens(reference, alone)[0])


@pytest.mark.parametrize("name", VISUAL_NAMES)
def test_float32_visual_rows_and_each_deepstack_level_are_those_of_pytorch(name: str, directory):
    expected, rows = rows_of_both(directory(name), BY_NAME[name], torch.float32, jnp.float32)
    width = BY_NAME[name].config["text_config"]["hidden_size"]
    for level in range(expected.shape[1] // width):
        part = slice(level * width, (level + 1) * width)
        assert np.abs(rows - expected)[:, part].max() <= 1e-5 * np.abs(expected[:, part]).max()


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_at_least_as_close_to_float32_as_pytorch_is(name: str, directory):
    case = BY_NAME[name]
    real = case.inputs["attention_mask"] == 1
    exact = reference_logits(load_reference(directory(name)), case.inputs)[real]
    theirs = reference_logits(load_reference(directory(name), torch.bfloat16), case.inputs)[real]
    ours = np.asarray(dsj.forward(dsj.load(directory(name), jnp.bfloat16), **case.inputs))[real]
    assert_no_worse(ours - exact, theirs - exact)

    if name in VISUAL_NAMES:
        exact, _ = rows_of_both(directory(name), case, torch.float32, jnp.float32)
        theirs, ours = rows_of_both(directory(name), case, torch.bfloat16, jnp.bfloat16)
        assert_no_worse(ours - exact, theirs - exact)


@pytest.mark.parametrize("name", [name for name in NAMES if "moe" in BY_NAME[name].config["model_type"]])
def test_the_random_checkpoints_use_their_experts(name: str, directory):
    """Parity over a router that always takes the same experts would say little."""
    case, model = BY_NAME[name], dsj.load(directory(name))
    tokens = case.inputs["input_ids"][case.inputs["attention_mask"] == 1]
    language_model = merge_params(model.config, model.params).language_model.model
    hidden = language_model.embed_tokens(jnp.asarray(tokens))
    sparse = next(layer for layer in language_model.layers if hasattr(layer.mlp, "route"))
    _, chosen, _ = sparse.mlp.route(sparse.post_attention_layernorm(hidden))
    experts = model.config.text.num_experts
    load = np.bincount(np.asarray(chosen).ravel(), minlength=experts) / chosen.size
    assert np.count_nonzero(load) > experts / 2
    assert load.max() < 4 / experts


def rows_of_both(
    directory: Path, case: Case, torch_dtype: torch.dtype, jax_dtype: jnp.dtype
) -> tuple[np.ndarray, np.ndarray]:
    """float32 rows of PyTorch and of JAX."""
    reference, model = load_reference(directory, torch_dtype), dsj.load(directory, jax_dtype)
    parts = (("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw"))
    expected = [reference_rows(reference, case.inputs[p], case.inputs[g]) for p, g in parts if p in case.inputs]
    batch = prepare_batch(model.config, **case.inputs)
    rows = side_by_side(encode_rows(model, batch))[: batch.num_visual_tokens].astype(np.float32)
    return np.concatenate(expected), rows


def single_row(case: Case, row: int) -> dict[str, np.ndarray]:
    """One row of a batch whose rows have one image each, without its padding."""
    keep = case.inputs["attention_mask"][row] == 1
    alone = {name: case.inputs[name][row][keep][None] for name in ("input_ids", "attention_mask", "mm_token_type_ids")}
    grids = case.inputs["image_grid_thw"]
    ends = np.cumsum(grids.prod(axis=1))
    alone["image_grid_thw"] = grids[row : row + 1]
    alone["pixel_values"] = case.inputs["pixel_values"][ends[row] - grids[row].prod() : ends[row]]
    return alone


def assert_no_worse(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Our error is no larger than theirs, on average and at its largest."""
    assert np.sqrt(np.mean(np.square(ours, dtype=np.float64))) <= np.sqrt(np.mean(np.square(theirs, dtype=np.float64)))
    assert np.abs(ours).max() <= np.abs(theirs).max()
