"""Reads the model configuration from a Hugging Face config.json. models/registry.py lists the families.

Key names changed between transformers 4 and 5 (`num_experts` -> `num_local_experts`, `rope_theta` and `rope_scaling`
-> `rope_parameters`); both are read. Missing keys and nulls take the family's default, as in transformers. A value of
the wrong type is refused by name, and so is an unsupported key of the rope's scaling.
"""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from deepstack_jax.config_rope import RopeConfig, refuse_unknown_rope_keys, rope_config
from deepstack_jax.config_values import ConfigError, Values, read_json_object
from deepstack_jax.errors import short

# Far above every published model, and low enough for what is made from them to be small
MAX_LAYERS, MAX_HEADS, MAX_EXPERTS, MAX_WIDTH, MAX_VOCABULARY = 512, 4096, 1 << 14, 1 << 20, 1 << 24
MAX_PATCH = 1024  # pixels, frames or patches along a side
DTYPE_NAMES = {"float": "float32", "half": "float16"}  # PyTorch's other names


@dataclass(frozen=True)
class TextConfig:
    """The decoder. `sparse_layers[i]` says whether layer i routes to experts; `sliding_windows[i]` is its window.

    A window counts tokens; None means no window. `max_position_embeddings` is the longest supported context in tokens:
    factor x original positions if the rope is scaled.
    """

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
    """The vision encoder. A DeepStack level is taken after each block in `deepstack_visual_indexes`."""

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
        """The number of patches that are merged into one visual token."""
        return self.spatial_merge_size**2

    @property
    def patch_dim(self) -> int:
        """The number of values in one row of `pixel_values`."""
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
    is_vision_language: bool = False  # whether the checkpoint has a vision encoder, loaded or not
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
        """Returns the configuration without the vision encoder, as a language node uses it."""
        return replace(self, vision=None)


@dataclass(frozen=True)
class FamilyTraits:
    """Properties of a family that its config.json does not state and that `parse_model` needs to read it.

    Attributes:
        has_vision: text_config and vision_config are objects inside config.json.
        of_vision_language: the decoder belongs to a vision-language family and has the rope defaults of one.
        has_experts: layers route to experts.
        head_dim: the default; None divides hidden_size by the number of heads.
        renormalises: the router's weights always add up to one, whatever norm_topk_prob says.
        windows: the layers with a sliding window: "none", "all", or "some" (by layer_types or max_window_layers).
        tied: the default of tie_word_embeddings.
    """

    has_vision: bool = False
    of_vision_language: bool = False
    has_experts: bool = False
    head_dim: int | None = None
    renormalises: bool = False
    windows: Literal["none", "all", "some"] = "none"
    tied: bool = False


def read_config_object(path: str | Path) -> dict[str, Any]:
    """Returns the contents of `path`, a config.json or the directory that holds one.

    Raises `ConfigError` if the file is damaged (the message gives the position) or the directory isn't a checkpoint.
    """
    path = Path(path)
    file = path / "config.json" if path.is_dir() else path
    if file.is_file() and file.name.endswith((".safetensors", ".gguf", ".bin", ".pt", ".pth")):
        raise ConfigError(f"{file} is a file of weights: give the directory of a Hugging Face or converted checkpoint")
    if path.is_dir() and (reason := _other_kind(path)):
        raise ConfigError(reason)
    try:
        return read_json_object(file)
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(
            f"no config.json in {path}: give the directory of a Hugging Face or converted checkpoint"
        ) from None


def read_special_tokens(directory: Path, config: ModelConfig) -> tuple[tuple[int, ...], int]:
    """Returns (end tokens, pad token) from generation_config.json, otherwise from config.json, as in transformers.

    Without a pad token, it is the first end token, or 0. Raises `ConfigError` if generation_config.json is damaged or
    its ids are not token ids.
    """
    file = directory / "generation_config.json"
    values = Values(read_json_object(file) if file.exists() else {}, str(file))
    ends = values.token_ids("eos_token_id", config.eos_token_ids)
    pad = values.integer("pad_token_id", config.pad_token_id, least=0)
    return ends, (ends[0] if ends else 0) if pad is None else pad


def read_sampling_defaults(directory: Path) -> dict[str, float]:
    """Returns the sampling options that generation_config.json sets; greedy where it says not to sample.

    Raises `ConfigError` if the file is damaged or a value is not a number.
    """
    file = directory / "generation_config.json"
    values = Values(read_json_object(file) if file.exists() else {}, str(file))
    numbers = {name: values.number(name, None) for name in ("temperature", "top_p", "repetition_penalty")}
    numbers["top_k"] = values.integer("top_k", None, least=0)
    if not values.flag("do_sample", True):
        return {"temperature": 0.0}
    return {name: value for name, value in numbers.items() if value is not None}


def parse_model(raw: dict[str, Any], traits: FamilyTraits) -> ModelConfig:
    """Turns the contents of a config.json into a `ModelConfig`; raises `ConfigError` naming what is not supported."""
    model_type, is_vl = raw["model_type"], traits.has_vision
    text_raw = raw.get("text_config") if is_vl else raw
    if not isinstance(text_raw, dict):
        raise ConfigError(f"model_type {model_type} needs an object text_config, found {short(text_raw)}")
    if is_vl and not isinstance(raw.get("vision_config"), dict):
        raise ConfigError(
            f"model_type {model_type} needs an object vision_config, found {short(raw.get('vision_config'))}"
        )
    for part in (raw, text_raw):
        _refuse_quantized(part)
    if is_vl:
        _refuse_misplaced_rope(raw, text_raw)
    root, inner = Values(raw, "config.json"), Values(text_raw, "text_config" if is_vl else "config.json")
    # as in transformers, only the outermost tie_word_embeddings counts: that of text_config is ignored
    text = _text_config(traits, inner, tie_word_embeddings=root.flag("tie_word_embeddings", traits.tied))
    vision = _vision_config(raw["vision_config"]) if is_vl else None
    if vision and vision.out_hidden_size != text.hidden_size:
        raise ConfigError(
            f"vision_config.out_hidden_size {vision.out_hidden_size} differs from text_config.hidden_size "
            f"{text.hidden_size}: visual rows would not fit the text model"
        )
    tokens = {
        name: root.integer(name, getattr(ModelConfig, name), least=0)
        for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    }
    return ModelConfig(
        model_type=model_type,
        text=text,
        vision=vision,
        is_vision_language=is_vl,
        eos_token_ids=root.token_ids("eos_token_id", inner.token_ids("eos_token_id", ())),
        pad_token_id=root.integer("pad_token_id", inner.integer("pad_token_id", None, least=0), least=0),
        dtype=_dtype(root),
        raw=raw,
        **tokens,
    )


def _other_kind(directory: Path) -> str | None:
    """Returns why a directory is not a complete checkpoint, if the names of its files tell, otherwise None."""
    for name in ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"):
        if (directory / name).exists():
            return (
                f"{directory} holds an adapter ({name}): merge it into its base model first (merge_and_unload of "
                "PEFT, then save_pretrained), or remove the adapter's files if that has been done"
            )
    if not (directory / "config.json").exists() and (file := next(directory.glob("*.gguf"), None)):
        return f"{file} is a GGUF file: give the Hugging Face checkpoint in safetensors that it was made from"
    return None


def _refuse_quantized(raw: dict[str, Any]) -> None:
    """Raises `ConfigError` if a config.json says that its weights are quantised."""
    for key in ("quantization_config", "compression_config", "quantization"):
        found = raw.get(key)
        if found is None or found == {}:
            continue
        method, bits = None, None
        if isinstance(found, dict):
            method = found.get("quant_method") or ("MLX" if key == "quantization" else None)
            four, eight = (found.get(f"load_in_{n}bit", found.get(f"_load_in_{n}bit")) for n in (4, 8))
            bits = found.get("bits", 4 if four else 8 if eight else None)
            method = method or ("bitsandbytes" if four is not None or eight is not None else None)
        how = f"with {_plain(method) or 'an unknown method'}" + (f", {_plain(bits)} bits" if bits is not None else "")
        raise ConfigError(
            f"{key} says that the weights are quantised {how}, which is not supported: give the checkpoint in "
            f"bfloat16 that it was made from, or remove {key} if the weights are not quantised"
        )


def _plain(value: Any) -> str:
    """Returns a name or number as messages show it."""
    return short(value).strip("'") if value else ""


def _dtype(root: Values) -> str | None:
    """Returns the outermost config's dtype, as transformers does, or None."""
    name = root.text("dtype", root.text("torch_dtype", None))
    if name is None:
        return None
    name = name.removeprefix("torch.")
    return DTYPE_NAMES.get(name, name)


def _text_config(traits: FamilyTraits, values: Values, tie_word_embeddings: bool) -> TextConfig:
    where, integer = values.where, values.integer
    if (act := values.text("hidden_act", "silu")) != "silu":
        raise ConfigError(f"{where}.hidden_act {short(act)} is not supported: expected 'silu'")
    layers, heads = integer("num_hidden_layers", most=MAX_LAYERS), integer("num_attention_heads", most=MAX_HEADS)
    hidden = integer("hidden_size", most=MAX_WIDTH)
    head_dim = integer(
        "head_dim", hidden // heads if traits.head_dim is None else traits.head_dim, least=2, most=MAX_WIDTH
    )
    if head_dim < 2 or head_dim % 2:
        raise ConfigError(f"{where}.head_dim {head_dim} must be even and at least 2: rope turns pairs of values")
    kv_heads = integer("num_key_value_heads", heads, most=MAX_HEADS)
    if heads % kv_heads:
        raise ConfigError(f"{where}: {heads} attention heads are not a multiple of {kv_heads} key-value heads")
    experts, top_k, width, sparse = _experts(values, layers) if traits.has_experts else (0, 0, 0, (False,) * layers)
    rope, positions = rope_config(values, of_vl=traits.of_vision_language, sections=traits.has_vision)
    return TextConfig(
        vocab_size=integer("vocab_size", most=MAX_VOCABULARY),
        hidden_size=hidden,
        intermediate_size=(
            integer("intermediate_size", 0, least=0, most=MAX_WIDTH)
            if all(sparse)
            else integer("intermediate_size", most=MAX_WIDTH)
        ),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rope=rope,
        max_position_embeddings=positions,
        rms_norm_eps=values.number("rms_norm_eps", 1e-6, least=0, most=1),
        attention_bias=values.flag("attention_bias", False),
        tie_word_embeddings=tie_word_embeddings,
        num_experts=experts,
        num_experts_per_tok=top_k,
        moe_intermediate_size=width,
        norm_topk_prob=values.flag("norm_topk_prob", False) or traits.renormalises,
        sparse_layers=sparse,
        sliding_windows=_sliding_windows(traits, values, layers),
    )


def _experts(values: Values, layers: int) -> tuple[int, int, int, tuple[bool, ...]]:
    """Returns (experts, experts per token, their width, which layers have them)."""
    experts = values.integer("num_experts", None, least=0, most=MAX_EXPERTS)
    experts = values.integer("num_local_experts", experts, least=0, most=MAX_EXPERTS)
    if experts is None:
        raise ConfigError(f"{values.where} has neither num_experts nor num_local_experts")
    dense = set(values.integers("mlp_only_layers", ()))
    step = values.integer("decoder_sparse_step", 1)
    sparse = tuple(experts > 0 and i not in dense and (i + 1) % step == 0 for i in range(layers))
    if not any(sparse):
        return experts, 0, 0, sparse
    top_k, width = values.integer("num_experts_per_tok"), values.integer("moe_intermediate_size", most=MAX_WIDTH)
    if top_k > experts:
        raise ConfigError(f"{values.where}.num_experts_per_tok {top_k} must lie between 1 and num_experts {experts}")
    return experts, top_k, width, sparse


def _refuse_misplaced_rope(raw: dict[str, Any], text_raw: dict[str, Any]) -> None:
    """Raises `ConfigError` if the outermost object of a vision-language config has a scaling, which nothing reads."""
    for key in ("rope_scaling", "rope_parameters"):
        if raw.get(key) and raw[key] != text_raw.get(key):
            raise ConfigError(f"config.json has {key} beside text_config, where nothing reads it: move it there")


def _sliding_windows(traits: FamilyTraits, values: Values, layers: int) -> tuple[int | None, ...]:
    window = None
    if values.flag("use_sliding_window", False):
        # as in transformers, null means no window and not the default window
        window = values.integer("sliding_window", None if "sliding_window" in values.raw else 4096)
    if traits.windows != "some":
        return (window if traits.windows == "all" else None,) * layers
    if (types := values.raw.get("layer_types")) is not None:
        kinds = ("full_attention", "sliding_attention")
        if not isinstance(types, list) or len(types) != layers or any(kind not in kinds for kind in types):
            raise ConfigError(
                f"{values.where}.layer_types must be {layers} of {', '.join(kinds)}, found {short(types)}"
            )
        if window is None and "sliding_attention" in types:
            raise ConfigError(
                f"{values.where}.layer_types asks for sliding_attention without a window: set use_sliding_window to "
                "true and sliding_window to its length"
            )
        return tuple(window if kind == "sliding_attention" else None for kind in types)
    first = values.integer("max_window_layers", 28, least=0)
    return tuple(window if i >= first else None for i in range(layers))


def _vision_config(raw: dict[str, Any]) -> VisionConfig:
    values = Values(raw, "vision_config")
    integer = values.integer
    if (act := values.text("hidden_act", "gelu_pytorch_tanh")) != "gelu_pytorch_tanh":
        raise ConfigError(f"vision_config.hidden_act {short(act)} is not supported: expected 'gelu_pytorch_tanh'")
    depth = integer("depth", most=MAX_LAYERS)
    indexes = values.integers("deepstack_visual_indexes", (8, 16, 24))
    if len(set(indexes)) != len(indexes) or not all(i < depth for i in indexes):
        raise ConfigError(
            f"vision_config.deepstack_visual_indexes {short(list(indexes))} must be distinct blocks of 0 to {depth - 1}"
        )
    positions = integer("num_position_embeddings", 2304, most=MAX_VOCABULARY)
    if math.isqrt(positions) ** 2 != positions:
        raise ConfigError(
            f"vision_config.num_position_embeddings {positions} must be a square: the grid's sides are equal"
        )
    hidden, heads = integer("hidden_size", most=MAX_WIDTH), integer("num_heads", most=MAX_HEADS)
    if hidden % heads or (hidden // heads) % 4:
        raise ConfigError(f"vision_config.hidden_size {hidden} over {heads} heads must give a head dim divisible by 4")
    rope = Values(values.object("rope_parameters") or values.object("rope_scaling"), "vision_config.rope_parameters")
    rope_type = rope.text("rope_type", rope.text("type", "axial"))
    if rope_type not in ("default", "axial"):
        raise ConfigError(f"{rope.where} asks for rope type {short(rope_type)}: expected one of default, axial")
    refuse_unknown_rope_keys(rope, "default")
    return VisionConfig(
        depth=depth,
        hidden_size=hidden,
        intermediate_size=integer("intermediate_size", most=MAX_WIDTH),
        num_heads=heads,
        out_hidden_size=integer("out_hidden_size", most=MAX_WIDTH),
        num_position_embeddings=positions,
        deepstack_visual_indexes=indexes,
        in_channels=integer("in_channels", 3, most=MAX_PATCH),
        patch_size=integer("patch_size", 16, most=MAX_PATCH),
        temporal_patch_size=integer("temporal_patch_size", 2, most=MAX_PATCH),
        spatial_merge_size=integer("spatial_merge_size", 2, most=MAX_PATCH),
        rope_theta=rope.number("rope_theta", 10000.0, above=1),
    )
