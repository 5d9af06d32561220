"""A new family is one entry of the registry: it converts, loads and answers without a change to any other file."""

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors.numpy import load_file

import deepstack_jax as dsj
from converters.hf_to_orbax import convert
from converters.orbax_to_hf import export
from deepstack_jax.config import FamilyTraits, ModelConfig, parse_model
from deepstack_jax.config_values import ConfigError
from deepstack_jax.models import registry
from deepstack_jax.models.qwen3_moe import DecoderLayer
from deepstack_jax.models.qwen3_vl_moe import Qwen3VLMoeForConditionalGeneration
from deepstack_jax.models.registry import CheckpointLayout, Family, parse_config
from deepstack_jax.models.rope import text_rotation
from deepstack_jax.testing.random_checkpoint import tiny_config, write_random_checkpoint

ROOT = Path(__file__).parent.parent

# What docs/add-a-model.md walks through: a decoder whose layers damp what they add, with names and keys of its own.


class DampedLayer(DecoderLayer):
    def __call__(self, hidden: Any, *args: Any) -> Any:
        after, cached = super().__call__(hidden, *args)
        return hidden + 0.5 * (after - hidden), cached


class DampedForCausalLM(Qwen3VLMoeForConditionalGeneration):
    def __init__(self, config: ModelConfig, *, dtype: Any, rngs: nnx.Rngs):
        super().__init__(config, dtype=dtype, rngs=rngs)
        layers = range(config.text.num_hidden_layers)
        layers = [DampedLayer(config.text, i, dtype=dtype, rngs=rngs) for i in layers]
        self.language_model.model.layers = nnx.List(layers)


def parse_damped(raw: dict[str, Any]) -> ModelConfig:
    return parse_model(raw | {"hidden_size": raw["width"]}, FamilyTraits())


DAMPED = Family(
    model_type="damped",
    architecture="DampedForCausalLM",
    parse_config=parse_damped,
    layout=CheckpointLayout((("language_model.model.", "decoder."), ("language_model.lm_head.", "head."))),
    module=DampedForCausalLM,
)


@pytest.fixture
def damped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "FAMILIES", dict(registry.FAMILIES))
    registry.register(DAMPED)


def damped_config() -> dict[str, Any]:
    raw = tiny_config("qwen3", num_hidden_layers=2) | {"model_type": "damped"}
    raw["width"] = raw.pop("hidden_size")
    return raw


@pytest.mark.usefixtures("damped")
def test_a_family_needs_no_other_file(tmp_path: Path):
    write_random_checkpoint(tmp_path / "hf", damped_config(), seed=3)
    names = load_file(tmp_path / "hf" / "model.safetensors").keys()
    assert {"head.weight", "decoder.embed_tokens.weight", "decoder.layers.1.mlp.up_proj.weight"} <= names
    convert(tmp_path / "hf", tmp_path / "ckpt")
    model = dsj.load(tmp_path / "ckpt")
    inputs = dsj.prepare(model, "Who is there?")
    logits = dsj.forward(model, **inputs)

    # by hand: the same parameters in the layers of qwen3, half of what each adds
    plain = dsj.Model(replace(model.config, model_type="qwen3"), model.params)
    language_model = plain.module().language_model
    ids = jnp.asarray(inputs["input_ids"])
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), (3, *ids.shape))
    hidden = language_model.model.embed_tokens(ids)
    rotation = text_rotation(plain.config.text.rope, plain.config.text.head_dim, positions)
    for layer in language_model.model.layers:
        hidden = (hidden + layer(hidden, rotation, positions[0])[0]) / 2
    expected = language_model.logits(language_model.model.norm(hidden))
    np.testing.assert_allclose(logits, expected, atol=2e-5 * float(jnp.abs(expected).max()))
    assert not np.allclose(logits, dsj.forward(plain, **inputs), atol=1e-2)

    export(tmp_path / "ckpt", tmp_path / "back")
    assert load_file(tmp_path / "back" / "model.safetensors").keys() == names


def test_an_unknown_family_and_a_second_of_one_name_are_refused():
    with pytest.raises(ConfigError, match="model_type 'damped' is not supported: expected one of qwen3_vl_moe"):
        parse_config(damped_config())
    with pytest.raises(ValueError, match="model_type 'qwen3' is registered already"):
        registry.register(replace(DAMPED, model_type="qwen3"))


@pytest.mark.parametrize("model_type", ["qwen3_vl_moe", "qwen3"])
def test_models_are_called_as_transformers_calls_them(tmp_path: Path, model_type: str):
    """A module gives the logits of `forward`, whose parity with PyTorch tests/test_parity.py shows."""
    write_random_checkpoint(tmp_path, tiny_config(model_type), seed=2)
    model = dsj.load(tmp_path)
    images = [np.random.default_rng(1).integers(0, 256, (256, 256, 3), np.uint8)] if model.config.vision else []
    inputs = dsj.prepare(model, "Who is there?", images=images)
    batch = dsj.generation.prepare_batch(model.config, **inputs)
    more: dict[str, Any] = {}
    if images:
        visual = batch.visuals[0]
        more = {"pixel_values": jnp.asarray(visual.pixel_values), "geometry": visual.geometry,
                "visual_index": jnp.asarray(batch.visual_index)}  # fmt: skip
    logits, cache = model.module()(jnp.asarray(batch.input_ids), jnp.asarray(batch.position_ids), **more)
    assert cache is None
    expected = np.asarray(dsj.forward(model, **inputs))[0]
    np.testing.assert_allclose(logits[0, : batch.lengths[0]], expected, atol=2e-5 * np.abs(expected).max())


def test_the_ten_lines_of_the_documentation_give_the_logits_of_forward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    text = (ROOT / "docs" / "usage.md").read_text()
    code = text.partition("### The modules")[2].partition("```python\n")[2].partition("```")[0]
    shutil.copyfile(ROOT / "docs" / "tiny-vl" / "picture-0.png", tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code, names)
    inputs = dsj.prepare(names["model"], "What color is the star?", images=["picture.png"])
    expected = np.asarray(dsj.forward(names["model"], **inputs))[0]
    found = np.asarray(names["logits"])[0, : len(expected)]
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


def test_the_readme_lists_the_registered_families():
    rows = re.findall(r"^\| `(\w+)` \| (.+) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    families = registry.FAMILIES.values()
    assert rows == [(family.model_type, family.checkpoints) for family in families if not family.is_text_part]


def test_a_lora_trains_through_the_module(tmp_path: Path):
    """Only the adapters change; the model that is built from the module again answers as before."""
    write_random_checkpoint(tmp_path, tiny_config("qwen3", num_hidden_layers=2), seed=2)
    model = dsj.load(tmp_path)
    module = model.module()
    size = model.config.text.hidden_size
    for layer in module.language_model.model.layers:
        attention = layer.self_attn
        attention.o_proj = nnx.LoRA(
            model.config.text.num_attention_heads * attention.head_dim, 2, size, base_module=attention.o_proj,
            rngs=nnx.Rngs(0),
        )  # fmt: skip
    ids = jnp.arange(1, 9)[None]
    positions = jnp.broadcast_to(jnp.arange(8), (3, 1, 8))

    def loss(module: nnx.Module) -> jax.Array:
        logits, _ = module.language_model(ids[:, :-1], positions[..., :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()

    optimizer = nnx.Optimizer(module, optax.adam(0.1), wrt=nnx.LoRAParam)
    step = nnx.jit(lambda module, optimizer: _step(loss, module, optimizer))
    losses = [float(step(module, optimizer)) for _ in range(60)]
    assert losses[-1] < losses[0] / 2
    with pytest.raises(ValueError, match=r"the module has no parameter .*o_proj\.weight: it was not made by this"):
        model.from_module(module)
    for layer in module.language_model.model.layers:
        layer.self_attn.o_proj = layer.self_attn.o_proj.base_module
    back = model.from_module(module)
    assert back.params.keys() == model.params.keys()
    for path, array in model.params.items():
        np.testing.assert_array_equal(back.params[path], array)


def _step(loss: Any, module: nnx.Module, optimizer: nnx.Optimizer) -> jax.Array:
    value, gradient = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(module)
    optimizer.update(module, gradient)
    return value
