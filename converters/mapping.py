"""Which Hugging Face tensors make which parameter, in one table that is read both ways.

A parameter is known by its dotted path in the model (`language_model.model.layers.0.self_attn.q_proj.weight`), which
is the same for the vision-language and the text families. Apart from experts, it is a reshape of one tensor of the
checkpoint. Experts come in three layouts:

| layout | tensors | who writes it |
|---|---|---|
| `hf4` | `gate_up_proj [E, D, 2F]`, `down_proj [E, F, D]` | transformers 4.57; the canonical order here |
| `hf5` | `gate_up_proj [E, 2F, D]`, `down_proj [E, D, F]` | transformers 5 |
| `per_expert` | `N.gate_proj.weight`, `N.up_proj.weight [F, D]`, `N.down_proj.weight [D, F]` | text checkpoints |

Names and shapes are those of transformers' Qwen3VLMoeForConditionalGeneration and Qwen3MoeForCausalLM.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # deepstack_jax imports the converters to load a checkpoint
    from deepstack_jax.config import ModelConfig, TextConfig, VisionConfig

EXPERT_LAYOUTS = ("hf4", "hf5", "per_expert")

# Other spellings of the two roots: of a base model saved alone, and of the older multimodal families.
_VL_ALIASES = (
    (re.compile(r"^language_model\.model\."), "model.language_model."),
    (re.compile(r"^language_model\.lm_head\."), "lm_head."),
    (re.compile(r"^language_model\."), "model.language_model."),
    (re.compile(r"^visual\."), "model.visual."),
    (re.compile(r"^model\.(?=embed_tokens\.|layers\.|norm\.)"), "model.language_model."),
)
_TEXT_ALIASES = ((re.compile(r"^(?=embed_tokens\.|layers\.|norm\.)"), "model."),)
# The text model of a vision-language checkpoint, taken out of it with its names.
_TEXT_PART_ALIASES = (
    (re.compile(r"^(model\.)?language_model\.lm_head\."), "lm_head."),
    (re.compile(r"^(model\.)?language_model\.(model\.)?"), "model."),
    *_TEXT_ALIASES,
)


@dataclass(frozen=True)
class HfTensor:
    """One tensor of a Hugging Face checkpoint and the part of a parameter that it holds.

    `index` selects the part of the parameter (a tuple of ints and slices); with `transposed` the tensor is that
    part with its last two axes exchanged; otherwise it is a reshape of it.
    """

    name: str
    shape: tuple[int, ...]
    index: tuple[int | slice, ...] = ()
    transposed: bool = False

    def take(self, parameter: np.ndarray) -> np.ndarray:
        """This tensor's values out of the whole parameter: a view where no axes are exchanged."""
        part = parameter[self.index]
        return part.swapaxes(-1, -2) if self.transposed else part.reshape(self.shape)


@dataclass(frozen=True)
class Parameter:
    """A parameter of the model and the tensors that make it up. The tensors cover it without overlap."""

    path: str
    shape: tuple[int, ...]
    tensors: tuple[HfTensor, ...]

    @property
    def size(self) -> int:
        return prod(self.shape)


def parameters(config: ModelConfig, expert_layout: str = "hf4") -> list[Parameter]:
    """Every parameter of `config`'s model in the model's order, with its tensors in `expert_layout`."""
    if expert_layout not in EXPERT_LAYOUTS:
        raise ValueError(f"expert layout {expert_layout!r} is unknown: expected one of {', '.join(EXPERT_LAYOUTS)}")
    found = list(_vision(config.vision)) if config.vision else []
    found += _text(config.text, "language_model.model.", _text_root(config), expert_layout)
    if not config.text.tie_word_embeddings:
        shape = (config.text.vocab_size, config.text.hidden_size)
        found.append(_reshaped("language_model.lm_head.weight", shape, "lm_head.weight", shape))
    return found


def canonical_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Path -> shape of every parameter."""
    return {parameter.path: parameter.shape for parameter in parameters(config)}


def hf_tensors(config: ModelConfig, expert_layout: str = "hf4") -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that a Hugging Face checkpoint of `config` holds."""
    return {
        tensor.name: tensor.shape for parameter in parameters(config, expert_layout) for tensor in parameter.tensors
    }


def current_name(name: str, config: ModelConfig) -> str:
    """The name that transformers gives today to a tensor that an older or bare checkpoint calls `name`."""
    for pattern, replacement in _aliases(config):
        if pattern.search(name):
            return pattern.sub(replacement, name, count=1)
    return name


def head_and_embedding(config: ModelConfig) -> tuple[str, str]:
    """The names of the two tensors that are one where embeddings are tied."""
    return "lm_head.weight", f"{_text_root(config)}embed_tokens.weight"


def fused_experts(config: ModelConfig) -> list[str]:
    """The names that the first of a layer's two fused expert tensors has, layer by layer."""
    layers = (i for i, sparse in enumerate(config.text.sparse_layers) if sparse)
    return [f"{_text_root(config)}layers.{i}.mlp.experts.gate_up_proj" for i in layers]


def group_of(path: str) -> str:
    """The part of the model that a parameter belongs to, for summaries."""
    groups = (
        ("visual.deepstack_merger_list.", "deepstack mergers"),
        ("visual.merger.", "vision merger"),
        ("visual.", "vision encoder"),
        ("embed_tokens.", "embeddings"),
        ("lm_head.", "language head"),
        (".self_attn.", "attention"),
        (".mlp.experts.", "experts"),
        (".mlp.gate.", "routers"),
        (".mlp.", "dense MLPs"),
    )
    return next((group for part, group in groups if part in path), "norms")


def _text_root(config: ModelConfig) -> str:
    return "model.language_model." if config.is_vision_language else "model."


def _aliases(config: ModelConfig) -> tuple[tuple[re.Pattern[str], str], ...]:
    if config.is_vision_language:
        return _VL_ALIASES
    return _TEXT_PART_ALIASES if config.model_type.endswith("_text") else _TEXT_ALIASES


def _reshaped(path: str, shape: tuple[int, ...], name: str, hf_shape: tuple[int, ...]) -> Parameter:
    return Parameter(path, shape, (HfTensor(name, hf_shape),))


def _text(config: TextConfig, ours: str, theirs: str, expert_layout: str) -> Iterator[Parameter]:
    d, heads, kv, h = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim

    def same(name: str, *shape: int) -> Parameter:
        return _reshaped(ours + name, shape, theirs + name, shape)

    yield same("embed_tokens.weight", config.vocab_size, d)
    for i in range(config.num_hidden_layers):
        layer = f"layers.{i}."
        yield same(layer + "input_layernorm.weight", d)
        for name, n in (("q", heads), ("k", kv), ("v", kv)):
            yield same(f"{layer}self_attn.{name}_proj.weight", n * h, d)
            if config.attention_bias:
                yield same(f"{layer}self_attn.{name}_proj.bias", n * h)
        yield same(layer + "self_attn.o_proj.weight", d, heads * h)
        if config.attention_bias:
            yield same(layer + "self_attn.o_proj.bias", d)
        yield same(layer + "self_attn.q_norm.weight", h)
        yield same(layer + "self_attn.k_norm.weight", h)
        yield same(layer + "post_attention_layernorm.weight", d)
        if config.sparse_layers[i]:
            yield same(layer + "mlp.gate.weight", config.num_experts, d)
            yield from _experts(config, f"{ours}{layer}mlp.experts.", f"{theirs}{layer}mlp.experts.", expert_layout)
        else:
            yield same(layer + "mlp.gate_proj.weight", config.intermediate_size, d)
            yield same(layer + "mlp.up_proj.weight", config.intermediate_size, d)
            yield same(layer + "mlp.down_proj.weight", d, config.intermediate_size)
    yield same("norm.weight", d)


def _experts(config: TextConfig, ours: str, theirs: str, expert_layout: str) -> Iterator[Parameter]:
    e, d, f = config.num_experts, config.hidden_size, config.moe_intermediate_size
    gate_up, down = (e, d, 2 * f), (e, f, d)
    if expert_layout == "per_expert":
        everything, first, second = slice(None), slice(0, f), slice(f, 2 * f)
        yield Parameter(
            ours + "gate_up_proj",
            gate_up,
            tuple(
                HfTensor(f"{theirs}{i}.{name}.weight", (f, d), (i, everything, half), transposed=True)
                for i in range(e)
                for name, half in (("gate_proj", first), ("up_proj", second))
            ),
        )
        yield Parameter(
            ours + "down_proj",
            down,
            tuple(HfTensor(f"{theirs}{i}.down_proj.weight", (d, f), (i,), transposed=True) for i in range(e)),
        )
        return
    for name, shape in (("gate_up_proj", gate_up), ("down_proj", down)):
        if expert_layout == "hf5":
            exchanged = (shape[0], shape[2], shape[1])
            yield Parameter(ours + name, shape, (HfTensor(theirs + name, exchanged, transposed=True),))
        else:
            yield _reshaped(ours + name, shape, theirs + name, shape)


def _vision(config: VisionConfig) -> Iterator[Parameter]:
    d, width = config.hidden_size, config.intermediate_size
    merged = d * config.merge_unit

    def same(name: str, *shape: int) -> Parameter:
        return _reshaped(f"visual.{name}", shape, f"model.visual.{name}", shape)

    def shaped(name: str, shape: tuple[int, ...], hf_shape: tuple[int, ...]) -> Parameter:
        return _reshaped(f"visual.{name}", shape, f"model.visual.{name}", hf_shape)

    kernel = (config.temporal_patch_size, config.patch_size, config.patch_size)
    yield shaped("patch_embed.proj.weight", (d, config.patch_dim), (d, config.in_channels, *kernel))
    yield same("patch_embed.proj.bias", d)
    yield same("pos_embed.weight", config.num_position_embeddings, d)
    for i in range(config.depth):
        block = f"blocks.{i}."
        for norm in ("norm1", "norm2"):
            yield same(f"{block}{norm}.weight", d)
            yield same(f"{block}{norm}.bias", d)
        yield shaped(block + "attn.qkv.weight", (3, d, d), (3 * d, d))
        yield shaped(block + "attn.qkv.bias", (3, d), (3 * d,))
        yield same(block + "attn.proj.weight", d, d)
        yield same(block + "attn.proj.bias", d)
        yield same(block + "mlp.linear_fc1.weight", width, d)
        yield same(block + "mlp.linear_fc1.bias", width)
        yield same(block + "mlp.linear_fc2.weight", d, width)
        yield same(block + "mlp.linear_fc2.bias", d)
    # the main merger normalises patches, the deepstack mergers what they have joined
    mergers = [("merger.", d)] + [(f"deepstack_merger_list.{i}.", merged) for i in range(config.num_deepstack_levels)]
    for merger, normalised in mergers:
        yield same(merger + "norm.weight", normalised)
        yield same(merger + "norm.bias", normalised)
        yield same(merger + "linear_fc1.weight", merged, merged)
        yield same(merger + "linear_fc1.bias", merged)
        yield same(merger + "linear_fc2.weight", config.out_hidden_size, merged)
        yield same(merger + "linear_fc2.bias", config.out_hidden_size)
