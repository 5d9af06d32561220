"""Model configuration, read from a Hugging Face config.json of the families qwen3_vl_moe, qwen3_moe, qwen3_vl, qwen3.

Key names changed between transformers 4 and 5 (`num_experts` -> `num_local_experts`, `rope_theta` and `rope_scaling`
-> `rope_parameters`); both are read. Missing keys take the family's default, as transformers gives it.
"""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

FAMILIES = ("qwen3_vl_moe", "qwen3_moe", "qwen3_vl", "qwen3")
ROPE_TYPES = ("default", "linear", "yarn")


class ConfigError(ValueError):
    """A config.json that can't be read as one of the four families."""


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding. `mrope_section` counts the frequencies of (time, height, width); None is 1-D rope."""

    theta: float
    rope_type: str = "default"
    mrope_section: tuple[int, int, int] | None = None
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


@dataclass(frozen=True)
class TextConfig:
    """The decoder. `sparse_layers[i]` says whether layer i routes to experts; `sliding_windows[i]` is its window."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope: RopeConfig
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = True
    sparse_layers: tuple[bool, ...] = ()
    sliding_windows: tuple[int | None, ...] = ()


@dataclass(frozen=True)
class VisionConfig:
    """The vision encoder. `deepstack_visual_indexes` are the blocks after which a deepstack level is tapped."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_hidden_size: int
    num_position_embeddings: int
    deepstack_visual_indexes: tuple[int, ...] = ()
    in_channels: int = 3
    patch_size: int = 16
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    hidden_act: str = "gelu_pytorch_tanh"
    rope_theta: float = 10000.0

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def merge_unit(self) -> int:
        """Patches merged into one visual token."""
        return self.spatial_merge_size**2

    @property
    def patch_dim(self) -> int:
        """Values of one row of `pixel_values`."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def num_deepstack_levels(self) -> int:
        return len(self.deepstack_visual_indexes)


@dataclass(frozen=True)
class ModelConfig:
    """A whole checkpoint: the text model and, for the VL families, the vision encoder."""

    model_type: str
    text: TextConfig
    vision: VisionConfig | None = None
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    dtype: str | None = None
    raw: dict[str, Any] = field(default_factory=dict, hash=False, compare=False, repr=False)

    @property
    def num_deepstack_levels(self) -> int:
        return self.vision.num_deepstack_levels if self.vision else 0

    def text_only(self) -> "ModelConfig":
        """The same checkpoint without its vision encoder: what a language node loads."""
        return replace(self, vision=None)


def read_config(path: str | Path) -> ModelConfig:
    """Reads `path` (a config.json or the directory that holds one)."""
    path = Path(path)
    file = path / "config.json" if path.is_dir() else path
    try:
        raw = json.loads(file.read_text())
    except FileNotFoundError:
        raise ConfigError(
            f"no config.json in {path}: give the directory of a Hugging Face or converted checkpoint"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not valid JSON ({error}): download it again") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{file} holds {type(raw).__name__}, not an object: download it again")
    return parse_config(raw)


def parse_config(raw: dict[str, Any]) -> ModelConfig:
    """Turns the contents of a config.json into a `ModelConfig`; raises `ConfigError` naming what can't be served."""
    model_type = raw.get("model_type")
    if model_type not in FAMILIES:
        raise ConfigError(f"model_type {model_type!r} is not supported: expected one of {', '.join(FAMILIES)}")
    is_vl = model_type in ("qwen3_vl_moe", "qwen3_vl")
    text_raw = raw.get("text_config") if is_vl else raw
    if not isinstance(text_raw, dict):
        raise ConfigError(f"model_type {model_type} needs an object text_config, found {text_raw!r}")
    if is_vl and not isinstance(raw.get("vision_config"), dict):
        raise ConfigError(f"model_type {model_type} needs an object vision_config, found {raw.get('vision_config')!r}")
    # transformers ties by the outermost config alone: a text_config that says otherwise is ignored
    text = _text_config(model_type, text_raw, tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)))
    vision = _vision_config(raw["vision_config"]) if is_vl else None
    if vision and vision.out_hidden_size != text.hidden_size:
        raise ConfigError(
            f"vision_config.out_hidden_size {vision.out_hidden_size} differs from text_config.hidden_size "
            f"{text.hidden_size}: visual rows would not fit the text model"
        )
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return ModelConfig(
        model_type=model_type,
        text=text,
        vision=vision,
        eos_token_ids=_token_ids(_first(raw.get("eos_token_id"), text_raw.get("eos_token_id"))),
        pad_token_id=_first(raw.get("pad_token_id"), text_raw.get("pad_token_id")),
        dtype=_first(raw.get("dtype"), raw.get("torch_dtype"), text_raw.get("dtype"), text_raw.get("torch_dtype")),
        raw=raw,
        **{name: raw[name] for name in names if name in raw},
    )


def _text_config(model_type: str, raw: dict[str, Any], tie_word_embeddings: bool) -> TextConfig:
    where = "text_config" if "_vl" in model_type else "config.json"
    require = _Reader(raw, where)
    if (act := raw.get("hidden_act", "silu")) != "silu":
        raise ConfigError(f"{where}.hidden_act {act!r} is not supported: expected 'silu'")
    layers = require("num_hidden_layers")
    heads = require("num_attention_heads")
    hidden = require("hidden_size")
    default_head_dim = 128 if model_type in ("qwen3", "qwen3_vl") else hidden // heads
    kv_heads = _first(raw.get("num_key_value_heads"), heads)
    if heads % kv_heads:
        raise ConfigError(f"{where}: {heads} attention heads are no multiple of {kv_heads} key-value heads")

    experts = top_k = width = 0
    sparse = (False,) * layers
    if model_type in ("qwen3_vl_moe", "qwen3_moe"):
        experts = _first(raw.get("num_local_experts"), raw.get("num_experts"))
        if experts is None:
            raise ConfigError(f"{where} has neither num_experts nor num_local_experts")
        dense = set(raw.get("mlp_only_layers") or ())
        step = _first(raw.get("decoder_sparse_step"), 1)
        sparse = tuple(experts > 0 and i not in dense and (i + 1) % step == 0 for i in range(layers))
        if any(sparse):
            top_k, width = require("num_experts_per_tok"), require("moe_intermediate_size")
            if not 1 <= top_k <= experts:
                raise ConfigError(f"{where}.num_experts_per_tok {top_k} must lie between 1 and num_experts {experts}")
    return TextConfig(
        vocab_size=require("vocab_size"),
        hidden_size=hidden,
        intermediate_size=raw.get("intermediate_size", 0) if all(sparse) else require("intermediate_size"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=_first(raw.get("head_dim"), default_head_dim),
        rope=_rope_config(model_type, raw, where),
        max_position_embeddings=raw.get("max_position_embeddings", 128000 if "_vl" in model_type else 32768),
        rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
        attention_bias=bool(raw.get("attention_bias", False)),
        tie_word_embeddings=tie_word_embeddings,
        num_experts=experts,
        num_experts_per_tok=top_k,
        moe_intermediate_size=width,
        # Qwen3-VL-MoE's router always renormalises; Qwen3-MoE does where the config says so
        norm_topk_prob=True if model_type == "qwen3_vl_moe" else bool(raw.get("norm_topk_prob", False)),
        sparse_layers=sparse,
        sliding_windows=_sliding_windows(model_type, raw, layers),
    )


def _rope_config(model_type: str, raw: dict[str, Any], where: str) -> RopeConfig:
    new = raw.get("rope_parameters") or {}
    old = raw.get("rope_scaling") or {}
    merged = {**old, **new}
    theta = _first(new.get("rope_theta"), raw.get("rope_theta"), 500000.0 if "_vl" in model_type else 10000.0)
    # "mrope" was the name of the default type beside an mrope_section
    rope_type = _first(merged.get("rope_type"), merged.get("type"), "default").replace("mrope", "default")
    if rope_type not in ROPE_TYPES:
        raise ConfigError(f"{where} asks for rope type {rope_type!r}: expected one of {', '.join(ROPE_TYPES)}")
    section = None
    if "_vl" in model_type:
        section = tuple(merged.get("mrope_section", (24, 20, 20)))
        # They need not add up to head_dim / 2: height and width take what they reach, time the rest, as in transformers
        if len(section) != 3 or not all(isinstance(count, int) and count >= 0 for count in section):
            raise ConfigError(f"{where}: mrope_section {list(section)} must be three counts (time, height, width)")
    yarn_keys = ("attention_factor", "beta_fast", "beta_slow", "truncate")
    yarn = {key: merged[key] for key in yarn_keys if merged.get(key) is not None}
    return RopeConfig(
        theta=float(theta),
        rope_type=rope_type,
        mrope_section=section,
        factor=float(merged.get("factor", 1.0)),
        original_max_position_embeddings=_first(
            merged.get("original_max_position_embeddings"), raw.get("max_position_embeddings")
        ),
        **yarn,
    )


def _sliding_windows(model_type: str, raw: dict[str, Any], layers: int) -> tuple[int | None, ...]:
    window = raw.get("sliding_window", 4096) if raw.get("use_sliding_window") else None
    if model_type == "qwen3_moe":
        return (window,) * layers
    if model_type != "qwen3" or window is None:
        return (None,) * layers
    if types := raw.get("layer_types"):
        return tuple(window if kind == "sliding_attention" else None for kind in types)
    return tuple(window if i >= raw.get("max_window_layers", 28) else None for i in range(layers))


def _vision_config(raw: dict[str, Any]) -> VisionConfig:
    require = _Reader(raw, "vision_config")
    if (act := raw.get("hidden_act", "gelu_pytorch_tanh")) != "gelu_pytorch_tanh":
        raise ConfigError(f"vision_config.hidden_act {act!r} is not supported: expected 'gelu_pytorch_tanh'")
    depth = require("depth")
    indexes = tuple(raw.get("deepstack_visual_indexes", (8, 16, 24)))
    if len(set(indexes)) != len(indexes) or not all(0 <= i < depth for i in indexes):
        raise ConfigError(
            f"vision_config.deepstack_visual_indexes {list(indexes)} must be distinct blocks of 0 to {depth - 1}"
        )
    positions = raw.get("num_position_embeddings", 2304)
    if round(positions**0.5) ** 2 != positions:
        raise ConfigError(
            f"vision_config.num_position_embeddings {positions} must be a square: the grid's sides are equal"
        )
    hidden, heads = require("hidden_size"), require("num_heads")
    if hidden % heads or (hidden // heads) % 4:
        raise ConfigError(f"vision_config.hidden_size {hidden} over {heads} heads must give a head dim divisible by 4")
    return VisionConfig(
        depth=depth,
        hidden_size=hidden,
        intermediate_size=require("intermediate_size"),
        num_heads=heads,
        out_hidden_size=require("out_hidden_size"),
        num_position_embeddings=positions,
        deepstack_visual_indexes=indexes,
        in_channels=raw.get("in_channels", 3),
        patch_size=raw.get("patch_size", 16),
        temporal_patch_size=raw.get("temporal_patch_size", 2),
        spatial_merge_size=raw.get("spatial_merge_size", 2),
        rope_theta=float((raw.get("rope_parameters") or {}).get("rope_theta", 10000.0)),
    )


class _Reader:
    """Reads required positive integers and names what is missing."""

    def __init__(self, raw: dict[str, Any], where: str):
        self.raw, self.where = raw, where

    def __call__(self, key: str) -> int:
        value = self.raw.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{self.where}.{key} must be a positive integer, found {value!r}")
        return value


def _first(*values: Any) -> Any:
    """The first value that is not None."""
    return next((value for value in values if value is not None), None)


def _token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)
