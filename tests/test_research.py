"""What research changes and looks at: scales of DeepStack levels, likely tokens, and the choice of experts."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import deepstack_jax as dsj
from deepstack_jax.encoding import checked_scales
from deepstack_jax.engine.request import GenerationPlan, Request
from deepstack_jax.engine.shape import EngineShape
from deepstack_jax.generation import encode_prompt
from deepstack_jax.models.vision import VisualRows
from deepstack_jax.processing.batch import prepare_batch
from deepstack_jax.programs import all_logits
from deepstack_jax.research import MAX_TOKENS, token_choices
from deepstack_jax.sampling import SamplingParams
from deepstack_jax.testing.random_checkpoint import write_random_checkpoint
from tests.cases import CASES, Case
from tests.torch_reference import load_reference, reference_logits

IMAGES, VIDEOS, LONG = CASES[0], CASES[1], CASES[8]
WITHIN = 2e-5  # of the largest |logit|: float32 sums in another order (tests/test_parity.py)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory):
    """Checkpoint directories by case, made once."""

    @cache
    def of(name: str) -> Path:
        (case,) = (case for case in CASES if case.name == name)
        path = tmp_path_factory.mktemp("research")
        write_random_checkpoint(path, case.config, seed=case.seed, expert_layout=case.expert_layout, tokenizer=False)
        return path

    return of


@pytest.fixture(scope="module")
def model(directory: Any) -> dsj.Model:
    return dsj.load(directory(IMAGES.name))


def logits_of(model: dsj.Model, case: Case, **options: Any) -> np.ndarray:
    return np.asarray(dsj.forward(model, **case.inputs, **options))[case.inputs["attention_mask"] == 1]


def torch_logits(directory: Path, case: Case, scales: Sequence[float]) -> np.ndarray:
    """PyTorch's logits with each DeepStack feature multiplied by its scale."""
    reference = load_reference(directory)

    def scaled(_module: torch.nn.Module, _inputs: Any, out: Any) -> Any:
        out.deepstack_features = [each * scale for each, scale in zip(out.deepstack_features, scales, strict=True)]
        return out

    with_hook = reference.model.visual.register_forward_hook(scaled)
    logits = reference_logits(reference, case.inputs)[case.inputs["attention_mask"] == 1]
    with_hook.remove()
    return logits


@pytest.mark.parametrize(
    ("case", "scales"),
    [
        pytest.param(IMAGES, (0.5, 3.25, 0.0), id="images"),
        pytest.param(IMAGES, (0.0, 0.0, 0.0), id="off", marks=pytest.mark.slow),
        pytest.param(VIDEOS, (0.0, 1.75), id="videos", marks=pytest.mark.slow),
    ],
)
def test_scaled_levels_give_the_logits_of_pytorch_with_scaled_features(case: Case, scales: Any, directory: Any):
    expected = torch_logits(directory(case.name), case, scales)
    model = dsj.load(directory(case.name))
    logits = logits_of(model, case, deepstack_scales=scales)
    assert np.abs(logits - expected).max() <= WITHIN * np.abs(expected).max()
    assert np.abs(logits - logits_of(model, case)).max() > 100 * WITHIN * np.abs(expected).max()


@pytest.mark.slow
def test_scales_of_zero_are_the_model_without_deepstack(model: dsj.Model):
    batch = prepare_batch(model.config, **IMAGES.inputs)
    prompt = encode_prompt(model, batch)
    assert prompt.rows is not None
    bare = replace(prompt, rows=VisualRows(prompt.rows.embeds))
    expected = np.asarray(all_logits(model.config, model.text_params, bare))
    off = np.asarray(all_logits(model.config, model.text_params, encode_prompt(model, batch, (0.0, 0.0, 0.0))))
    for row, length in enumerate(batch.lengths):
        assert np.abs(off - expected)[row, :length].max() <= WITHIN * np.abs(expected).max()


@pytest.mark.slow
def test_generating_takes_scales_as_forward_does(model: dsj.Model):
    """Each row's first greedy token is the likeliest of `forward`; scales of 1 leave every token."""
    options = {"max_new_tokens": 6, "eos_token_id": [], "chunk": 128}
    usual = dsj.generate(model, **IMAGES.inputs, **options).tokens
    ones = dsj.generate(model, **IMAGES.inputs, **options, deepstack_scales=[1, 1, 1]).tokens
    np.testing.assert_array_equal(usual, ones)
    off = dsj.generate(model, **IMAGES.inputs, **options, deepstack_scales=[0, 0, 4]).tokens
    expected = np.asarray(dsj.forward(model, **IMAGES.inputs, deepstack_scales=[0, 0, 4]))[:, -1].argmax(-1)
    np.testing.assert_array_equal(off[:, 0], expected)
    assert (off != usual).any()
    streamed = list(dsj.stream(model, **IMAGES.inputs, **options, deepstack_scales=[0, 0, 4]))
    np.testing.assert_array_equal(np.stack(streamed, axis=1), off)


@pytest.mark.parametrize(("scales", "reason"), [([1, 1], "3 DeepStack levels"), ([1, 1, float("nan")], "finite")])
def test_scales_that_are_none_are_refused(model: dsj.Model, scales: list[float], reason: str):
    for call in (dsj.forward, dsj.generate, dsj.stream):
        with pytest.raises(ValueError, match=reason):
            call(model, **IMAGES.inputs, deepstack_scales=scales)


def test_other_scales_have_other_keys_in_the_prefix_cache(directory: Any):
    model = dsj.load(directory(LONG.name))
    batch = prepare_batch(model.config, **LONG.inputs)
    plan = GenerationPlan(SamplingParams.of(2), 4)
    shape = EngineShape(slots=1, chunk=128)

    def keys(scales: Sequence[float] | None, salt: bytes = b"") -> tuple[bytes, ...]:
        request = Request.of_row(batch, plan, deepstack_scales=checked_scales(model.config, scales))
        return request.keys(shape, salt)

    assert len(keys(None)) == 4
    assert keys([1, 1.0, 1]) == keys(None)
    scaled = [keys(scales) for scales in (None, [0, 1, 1], [1, 0, 1], [1, 1, 0.999])]
    different = [*scaled, keys(None, b"x"), keys([0, 1, 1], b"x")]
    assert len({key for each in different for key in each}) == 4 * len(different)


@pytest.mark.parametrize(
    "case", [pytest.param(IMAGES, id="images"), pytest.param(VIDEOS, id="videos", marks=pytest.mark.slow)]
)
def test_likely_tokens_are_those_of_forward_and_experts_those_of_the_router(case: Case, directory: Any):
    model = dsj.load(directory(case.name))
    row = 0 if case is IMAGES else len(case.inputs["input_ids"]) - 1
    keep = case.inputs["attention_mask"][row] == 1
    logits = np.asarray(dsj.forward(model, **case.inputs))[row, keep].astype(np.float64)
    expected = np.exp(logits - logits.max(-1, keepdims=True))
    expected /= expected.sum(-1, keepdims=True)

    batch = prepare_batch(model.config, **case.inputs)
    whole = encode_prompt(model, batch)
    length, text = int(batch.lengths[row]), model.config.text
    alone = replace(
        whole,
        input_ids=batch.input_ids[row : row + 1],
        position_ids=batch.position_ids[:, row : row + 1],
        lengths=batch.lengths[row : row + 1],
        rope_deltas=batch.rope_deltas[row : row + 1],
        visual_index=None if batch.visual_index is None else batch.visual_index[row : row + 1],
    )
    choices = token_choices(model, alone)
    ids = batch.input_ids[row, :length]
    assert choices.probability[0] == 0
    np.testing.assert_allclose(choices.probability[1:], expected[np.arange(length - 1), ids[1:]], rtol=1e-4, atol=1e-7)
    np.testing.assert_array_equal(choices.top_ids[1:], np.argsort(-expected[:-1], axis=-1)[:, :5])
    layers = sum(text.sparse_layers)
    assert choices.experts.shape == choices.weights.shape == (length, layers, text.num_experts_per_tok)
    assert (np.diff(np.sort(choices.experts)) > 0).all()  # no expert twice
    assert choices.experts.max() < text.num_experts
    np.testing.assert_allclose(choices.weights.sum(-1), 1, rtol=1e-5)
    assert (np.diff(choices.weights) <= 0).all()  # most likely first


def test_a_long_prompt_is_refused(model: dsj.Model):
    batch = prepare_batch(model.config, np.zeros((1, MAX_TOKENS + 1), np.int32))
    with pytest.raises(ValueError, match=f"at most {MAX_TOKENS}"):
        token_choices(model, encode_prompt(model, batch))
