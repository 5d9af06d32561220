"""The model families. One entry per family holds everything specific to it; no other code compares `model_type`.

To add a family, call `register(Family(...))`: see docs/add-a-model.md.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from flax import nnx
from jax.typing import DTypeLike

from deepstack_jax.config import FamilyTraits, ModelConfig, parse_model, read_config_object
from deepstack_jax.config_values import ConfigError
from deepstack_jax.errors import short
from deepstack_jax.models.qwen3_vl_moe import Qwen3VLMoeForConditionalGeneration

ModuleClass = Callable[..., nnx.Module]  # (config, *, dtype, rngs)
Aliases = tuple[tuple[re.Pattern[str], str], ...]


def _aliases(*pairs: tuple[str, str]) -> Aliases:
    return tuple((re.compile(pattern), replacement) for pattern, replacement in pairs)


_TEXT_ALIASES = _aliases((r"^(?=embed_tokens\.|layers\.|norm\.)", "model."))
# names of a base model that was saved by itself, and of older multimodal families
_VL_ALIASES = _aliases(
    (r"^language_model\.model\.", "model.language_model."),
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.", "model.language_model."),
    (r"^visual\.", "model.visual."),
    (r"^model\.(?=embed_tokens\.|layers\.|norm\.)", "model.language_model."),
)
# names of a text model that was extracted from a vision-language checkpoint without renaming
_TEXT_PART_ALIASES = (
    *_aliases(
        (r"^(model\.)?language_model\.lm_head\.", "lm_head."),
        (r"^(model\.)?language_model\.(model\.)?", "model."),
    ),
    *_TEXT_ALIASES,
)


@dataclass(frozen=True)
class CheckpointLayout:
    """How a Hugging Face checkpoint names the parameters.

    Attributes:
        roots: pairs (prefix of our paths, prefix of its names), of which the first match applies.
        aliases: pairs (pattern of an older name, replacement), of which the first match applies.
    """

    roots: tuple[tuple[str, str], ...]
    aliases: Aliases = ()


@dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
        model_type: the model_type in config.json.
        architecture: the transformers class that config.json names.
        parse_config: turns the contents of a config.json into a `ModelConfig`; raises `ConfigError`.
        layout: the names in its Hugging Face checkpoints.
        module: `module(config, dtype=..., rngs=...)` has a `language_model` and, with vision, `visual`.
        checkpoints: published checkpoints, for the README's table.
        is_text_part: whether it is the text model of another family, saved by itself.
    """

    model_type: str
    architecture: str
    parse_config: Callable[[dict[str, Any]], ModelConfig]
    layout: CheckpointLayout
    module: ModuleClass = Qwen3VLMoeForConditionalGeneration
    checkpoints: str = ""
    is_text_part: bool = False


FAMILIES: dict[str, Family] = {}


def register(family: Family) -> None:
    """Adds a family.

    Raises:
        ValueError: a family with this model_type exists already.
    """
    if family.model_type in FAMILIES:
        raise ValueError(f"model_type {family.model_type!r} is registered already: choose another name")
    FAMILIES[family.model_type] = family


def family_of(config: ModelConfig) -> Family:
    """Returns the family of a configuration; raises `KeyError` if it isn't registered."""
    return FAMILIES[config.model_type]


def parse_config(raw: dict[str, Any]) -> ModelConfig:
    """Turns the contents of a config.json into a `ModelConfig`; raises `ConfigError` naming what is not supported."""
    family = FAMILIES.get(model_type) if isinstance(model_type := raw.get("model_type"), str) else None
    if family is None:
        raise ConfigError(f"model_type {short(model_type)} is not supported: expected one of {', '.join(FAMILIES)}")
    return family.parse_config(raw)


def read_config(path: str | Path) -> ModelConfig:
    """Reads `path`, a config.json or the directory that holds one; raises `ConfigError` that names the problem."""
    return parse_config(read_config_object(path))


def build_module(config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> Any:
    """Returns the initialised module of a configuration's family."""
    return family_of(config).module(config, dtype=dtype, rngs=rngs)


_HEAD = ("language_model.lm_head.", "lm_head.")
_TEXT_LAYOUT = CheckpointLayout((("language_model.model.", "model."), _HEAD), _TEXT_ALIASES)
_VL_LAYOUT = CheckpointLayout(
    (("language_model.model.", "model.language_model."), ("visual.", "model.visual."), _HEAD), _VL_ALIASES
)
_TEXT_PART_LAYOUT = CheckpointLayout(_TEXT_LAYOUT.roots, _TEXT_PART_ALIASES)

for _family in (
    Family(
        "qwen3_vl_moe",
        "Qwen3VLMoeForConditionalGeneration",
        partial(
            parse_model,
            traits=FamilyTraits(has_vision=True, of_vision_language=True, has_experts=True, renormalises=True),
        ),
        _VL_LAYOUT,
        checkpoints="Qwen3-VL-30B-A3B, Qwen3-VL-235B-A22B",
    ),
    Family(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        partial(parse_model, traits=FamilyTraits(has_experts=True, windows="all")),
        _TEXT_LAYOUT,
        checkpoints="Qwen3-MoE, text",
    ),
    Family(
        "qwen3_vl",
        "Qwen3VLForConditionalGeneration",
        partial(parse_model, traits=FamilyTraits(has_vision=True, of_vision_language=True, head_dim=128)),
        _VL_LAYOUT,
        checkpoints="Qwen3-VL, dense",
    ),
    Family(
        "qwen3",
        "Qwen3ForCausalLM",
        partial(parse_model, traits=FamilyTraits(head_dim=128, windows="some")),
        _TEXT_LAYOUT,
        checkpoints="Qwen3, text",
    ),
    # the text model of a vision-language checkpoint, saved by itself, never holds a head
    Family(
        "qwen3_vl_moe_text",
        "Qwen3VLMoeTextModel",
        partial(
            parse_model,
            traits=FamilyTraits(of_vision_language=True, has_experts=True, renormalises=True, tied=True),
        ),
        _TEXT_PART_LAYOUT,
        is_text_part=True,
    ),
    Family(
        "qwen3_vl_text",
        "Qwen3VLTextModel",
        partial(parse_model, traits=FamilyTraits(of_vision_language=True, head_dim=128, tied=True)),
        _TEXT_PART_LAYOUT,
        is_text_part=True,
    ),
):
    register(_family)
