"""The parity tests can fail: each well-known mistake moves the logits of their prompts far beyond the tolerance."""

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deepstack_jax as dsj
from deepstack_jax.generation import encode_prompt
from deepstack_jax.models.vision import patch_geometry, separate_deepstack_embeds
from deepstack_jax.processing.batch import Batch, prepare_batch
from deepstack_jax.programs import PromptArrays, all_logits, encode_vision
from deepstack_jax.testing.random_checkpoint import write_random_checkpoint
from tests.cases import CASES

CASE = CASES[0]


def drop_deepstack(model: dsj.Model, batch: Batch, prompt: PromptArrays) -> PromptArrays:
    assert prompt.rows is not None
    return replace(prompt, rows=prompt.rows._replace(deepstack=jnp.zeros_like(prompt.rows.deepstack)))


def drop_one_level(model: dsj.Model, batch: Batch, prompt: PromptArrays) -> PromptArrays:
    assert prompt.rows is not None
    width = model.config.text.hidden_size
    deepstack = prompt.rows.deepstack.at[:, width : 2 * width].set(0)
    return replace(prompt, rows=prompt.rows._replace(deepstack=deepstack))


def one_dimensional_rope(model: dsj.Model, batch: Batch, prompt: PromptArrays) -> PromptArrays:
    positions = np.broadcast_to(np.arange(batch.input_ids.shape[1]), batch.position_ids.shape)
    return replace(prompt, position_ids=positions.astype(np.int32))


def first_grid_for_every_image(model: dsj.Model, batch: Batch, prompt: PromptArrays) -> PromptArrays:
    assert model.config.vision is not None
    grids = CASE.inputs["image_grid_thw"]
    patches = int(grids.prod(axis=1).sum())
    repeated = np.repeat(grids[:1], -(-patches // int(grids[0].prod())), axis=0)
    geometry = jax.tree.map(lambda x: x[None, :patches], patch_geometry(model.config.vision, repeated))
    assert prompt.rows is not None
    rows = encode_vision(model.config, model.vision_params, CASE.inputs["pixel_values"][None], geometry)[0]
    rows = jnp.pad(rows, [(0, len(prompt.rows.embeds) - len(rows)), (0, 0)])
    return replace(prompt, rows=separate_deepstack_embeds(rows, model.config.num_deepstack_levels))


def images_in_the_wrong_order(model: dsj.Model, batch: Batch, prompt: PromptArrays) -> PromptArrays:
    count = batch.num_visual_tokens
    return replace(prompt, visual_index=np.where(batch.visual_index >= 0, count - 1 - batch.visual_index, -1))


@pytest.mark.parametrize(
    "mistake",
    [drop_deepstack, drop_one_level, one_dimensional_rope, first_grid_for_every_image, images_in_the_wrong_order],
)
def test_a_well_known_mistake_shows(mistake: Callable, tmp_path):
    write_random_checkpoint(tmp_path, CASE.config, seed=CASE.seed, tokenizer=False)
    model = dsj.load(tmp_path, jnp.float32)
    batch = prepare_batch(model.config, **CASE.inputs)
    prompt = encode_prompt(model, batch)
    right = all_logits(model.config, model.text_params, prompt)
    wrong = all_logits(model.config, model.text_params, mistake(model, batch, prompt))
    assert jnp.abs(wrong - right)[:2].max() > 1e-2 * jnp.abs(right).max()  # 500 times what parity allows
