"""Maps Hugging Face tensors to parameters, and parameters back to tensors.

A parameter is identified by its dotted path in the model (`language_model.model.layers.0.self_attn.q_proj.weight`),
which is the same for the vision-language and the text families. Names and shapes are derived from the modules'
declarations: a tensor has the parameter's shape, and its name under the family's root. The exceptions are the patch
embedding's convolution, the joined qkv of the vision encoder, and the experts, which come in three layouts:

| layout | tensors | who writes it |
|---|---|---|
| `hf4` | `gate_up_proj [E, D, 2F]`, `down_proj [E, F, D]` | transformers 4.57; the canonical order here |
| `hf5` | `gate_up_proj [E, 2F, D]`, `down_proj [E, D, F]` | transformers 5 |
| `per_expert` | `N.gate_proj.weight`, `N.up_proj.weight [F, D]`, `N.down_proj.weight [D, F]` | text checkpoints |

Names and shapes are those of transformers' Qwen3VLMoeForConditionalGeneration and Qwen3MoeForCausalLM.
"""

import re
from dataclasses import dataclass
from math import prod

import numpy as np

from deepstack_jax.config import ModelConfig
from deepstack_jax.models.parameters import abstract_params
from deepstack_jax.models.registry import family_of

EXPERT_LAYOUTS = ("hf4", "hf5", "per_expert")


@dataclass(frozen=True)
class HfTensor:
    """One tensor of a Hugging Face checkpoint and the part of a parameter that it holds.

    `index` (a tuple of ints and slices) selects that part. If `transposed`, the tensor is the part with its last two
    axes swapped; otherwise it is a reshape of the part.
    """

    name: str
    shape: tuple[int, ...]
    index: tuple[int | slice, ...] = ()
    transposed: bool = False

    def take(self, parameter: np.ndarray) -> np.ndarray:
        """Returns this tensor's values, a view of the whole (contiguous) parameter."""
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
    """Returns every parameter of `config`'s model in the model's order, with its tensors in `expert_layout`.

    Raises `ValueError` for an unknown expert layout.
    """
    if expert_layout not in EXPERT_LAYOUTS:
        raise ValueError(f"expert layout {expert_layout!r} is unknown: expected one of {', '.join(EXPERT_LAYOUTS)}")
    roots, declared = family_of(config).layout.roots, abstract_params(config)
    found = []
    # in the order of the forward pass: the encoder first and the head last
    for path, leaf in sorted(declared.items(), key=lambda item: (".lm_head." in item[0], "visual." not in item[0])):
        root, theirs = next(root for root in roots if path.startswith(root[0]))
        found.append(_parameter(config, path, leaf.shape, theirs + path.removeprefix(root), expert_layout))
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
    """Returns the current transformers name of a tensor that an older or base-model checkpoint calls `name`."""
    for pattern, replacement in family_of(config).layout.aliases:
        if pattern.search(name):
            return pattern.sub(replacement, name, count=1)
    return name


def head_and_embedding(config: ModelConfig) -> tuple[str, str]:
    """Returns the names of the output head and the token embedding, which are one tensor if embeddings are tied."""
    return "lm_head.weight", f"{_text_root(config)}embed_tokens.weight"


def fused_experts(config: ModelConfig) -> list[str]:
    """Returns the name of the first of the two fused expert tensors of each sparse layer."""
    layers = (i for i, sparse in enumerate(config.text.sparse_layers) if sparse)
    return [f"{_text_root(config)}layers.{i}.mlp.experts.gate_up_proj" for i in layers]


def group_of(path: str) -> str:
    """Returns the part of the model that a parameter belongs to, for summaries."""
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
    return dict(family_of(config).layout.roots)["language_model.model."]


def _parameter(config: ModelConfig, path: str, shape: tuple[int, ...], name: str, expert_layout: str) -> Parameter:
    """Returns the parameter at `path` with its tensors; `name` is the tensor's name if there is only one."""
    if path.startswith("visual."):
        return Parameter(path, shape, (HfTensor(name, _vision_shape(config, path, shape)),))
    if ".mlp.experts." not in path:
        return Parameter(path, shape, (HfTensor(name, shape),))
    if expert_layout == "hf4":
        return Parameter(path, shape, (HfTensor(name, shape),))
    if expert_layout == "hf5":
        return Parameter(path, shape, (HfTensor(name, (shape[0], shape[2], shape[1]), transposed=True),))
    return Parameter(path, shape, _per_expert(name, shape))


def _vision_shape(config: ModelConfig, path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape on disk. It differs for the convolution's kernel and for stacked queries, keys and values."""
    assert config.vision is not None
    if path == "visual.patch_embed.proj.weight":
        patch = config.vision.patch_size
        return (shape[0], config.vision.in_channels, config.vision.temporal_patch_size, patch, patch)
    if re.search(r"\.attn\.qkv\.(weight|bias)$", path):
        return (shape[0] * shape[1], *shape[2:])
    return shape


def _per_expert(name: str, shape: tuple[int, ...]) -> tuple[HfTensor, ...]:
    """Returns one matrix per expert and projection: gate and up are the halves of gate_up's last axis."""
    root = name.removesuffix("gate_up_proj").removesuffix("down_proj")
    experts, rows, columns = shape
    if name.endswith("down_proj"):
        return tuple(HfTensor(f"{root}{i}.down_proj.weight", (columns, rows), (i,), True) for i in range(experts))
    everything, half = slice(None), columns // 2
    halves = ("gate_proj", slice(0, half)), ("up_proj", slice(half, columns))
    return tuple(
        HfTensor(f"{root}{i}.{part}.weight", (half, rows), (i, everything, where), transposed=True)
        for i in range(experts)
        for part, where in halves
    )
