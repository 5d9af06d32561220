"""Writes random checkpoints in Hugging Face's layout, for tests and benchmarks. It does not need PyTorch.

Weights are scaled so that experts share the load: token embeddings have standard deviation 1 and stay large compared to
what the layers add (0.5 / sqrt(fan in)). The values depend only on the seed and the parameter, so the same seed gives
the same model in every dtype (up to rounding), expert layout and division into files.
"""

import json
import zlib
from contextlib import ExitStack
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from deepstack_jax.checkpoints.mapping import Parameter, parameters
from deepstack_jax.checkpoints.safetensors_file import FileWriter, plan_files
from deepstack_jax.config import ModelConfig
from deepstack_jax.models.registry import family_of, parse_config

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
_BLOCK = 1 << 20  # values generated at once
# Frequent pairs of letters, so that a random model's output resembles text a little.
_MERGES = (
    "Ġ t", "Ġ a", "h e", "i n", "r e", "o n", "Ġt he", "e r", "Ġ s", "a t", "Ġ w", "Ġ o", "e n", "Ġ c", "i t", "i s",
    "a n", "o r", "e s", "Ġ b", "e d", "Ġ f", "in g", "Ġ p", "o u", "Ġa n", "a l", "a r", "Ġt o", "Ġ m", "Ġo f", "Ġ in",
    "Ġ d", "Ġ h", "Ġan d", "i c", "a s",
)  # fmt: skip


def tiny_config(model_type: str = "qwen3_vl_moe", **overrides: Any) -> dict[str, Any]:
    """Returns the contents of a config.json for a model with a few hundred thousand parameters.

    `model_type` is qwen3_vl_moe, qwen3_moe, qwen3_vl or qwen3. `overrides` replace keys of the outermost object;
    `text_config` and `vision_config` are merged into the tiny ones. In the text families, the keys of `text_config` are
    in the outermost object.
    """
    text = {
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "attention_bias": False,
        "bos_token_id": 256,
        "eos_token_id": 258,
    }
    if "moe" in model_type:
        text |= {
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "norm_topk_prob": True,
        }
    root: dict[str, Any] = {"model_type": model_type, "tie_word_embeddings": False}
    if "_vl" not in model_type:
        return {**root, **text, **overrides}
    text["rope_scaling"] = {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [4, 2, 2]}
    vision = {
        "depth": 5,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_heads": 3,
        "in_channels": 3,
        "patch_size": 16,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "out_hidden_size": 64,
        "num_position_embeddings": 144,
        "deepstack_visual_indexes": [1, 2, 4],
        "hidden_act": "gelu_pytorch_tanh",
    }
    root |= {"vision_start_token_id": 259, "vision_end_token_id": 260, "image_token_id": 261, "video_token_id": 262}
    text |= overrides.pop("text_config", {})
    vision |= overrides.pop("vision_config", {})
    kind = {"model_type": f"{model_type}_text"}
    return {**root, "text_config": {**kind, **text}, "vision_config": {"model_type": model_type, **vision}, **overrides}


def write_random_checkpoint(
    directory: str | Path,
    config: dict[str, Any],
    seed: int = 0,
    dtype: str = "float32",
    expert_layout: str = "hf4",
    max_shard_bytes: int = 5 * 10**9,
    tokenizer: bool = True,
    repeat_values: bool = False,
) -> None:
    """Writes a checkpoint of `config` (the contents of a config.json) with random weights into `directory`.

    Only one parameter is in memory at a time. `dtype` is float32, bfloat16 or float16. `tokenizer` adds a byte-level
    tokenizer whose special tokens have the config's ids and, with vision, the settings of the processors.
    `repeat_values` takes all weights from one random block, which is about ten times as fast, for benchmarks that only
    move bytes.
    Raises `ConfigError` if `parse_config` refuses the config, and `FileExistsError` if there are safetensors files.
    """
    directory = Path(directory)
    parsed = parse_config(config)
    numpy_dtype = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
    directory.mkdir(parents=True, exist_ok=True)
    if any(directory.glob("*.safetensors")):
        raise FileExistsError(f"{directory} already holds a checkpoint: give another directory")
    _write_weights(directory, parsed, seed, numpy_dtype, expert_layout, max_shard_bytes, repeat_values)
    written = {"architectures": [family_of(parsed).architecture], "dtype": dtype, **config}
    _write_json(directory / "config.json", written)
    generation = {"do_sample": False, "eos_token_id": list(parsed.eos_token_ids), "pad_token_id": parsed.pad_token_id}
    _write_json(directory / "generation_config.json", {k: v for k, v in generation.items() if v not in (None, [])})
    if tokenizer:
        _write_tokenizer(directory, parsed)
        if parsed.vision:
            _write_processor(directory, parsed)


def _write_weights(
    directory: Path, config: ModelConfig, seed: int, dtype: np.dtype, expert_layout: str, max_bytes: int, repeat: bool
) -> None:
    listed = parameters(config, expert_layout)
    shapes = {tensor.name: tensor.shape for parameter in listed for tensor in parameter.tensors}
    files = plan_files({name: prod(shape) * dtype.itemsize for name, shape in shapes.items()}, max_bytes)
    file_of = {name: file for file, names in files.items() for name in names}
    block = np.random.default_rng(seed).standard_normal(16 * _BLOCK, np.float32) if repeat else None
    with ExitStack() as stack:
        writers = {
            file: stack.enter_context(FileWriter(directory / file, {name: (dtype, shapes[name]) for name in names}))
            for file, names in files.items()
        }
        for parameter in listed:
            values = _random_values(parameter, seed, dtype, block)
            for tensor in parameter.tensors:
                writers[file_of[tensor.name]].write(tensor.name, tensor.take(values))
    if len(files) > 1:
        total = sum(prod(shape) * dtype.itemsize for shape in shapes.values())
        index = {"metadata": {"total_size": total}, "weight_map": {name: file_of[name] for name in sorted(file_of)}}
        _write_json(directory / "model.safetensors.index.json", index)


def _random_values(parameter: Parameter, seed: int, dtype: np.dtype, block: np.ndarray | None) -> np.ndarray:
    """Returns the values of one parameter, generated in float32 one block at a time."""
    mean, deviation = (np.float32(value) for value in _distribution(parameter))
    key = zlib.crc32(parameter.path.encode())
    random = np.random.default_rng([seed, key])
    out = np.empty(parameter.size, dtype)
    for i in range(0, out.size, _BLOCK):
        piece = out[i : i + _BLOCK]
        if block is None:
            normal = random.standard_normal(piece.size, np.float32)
        else:
            start = (key + 7 * i) % (block.size - _BLOCK)
            normal = block[start : start + piece.size]
        piece[:] = normal * deviation + mean
    return out.reshape(parameter.shape)


def _distribution(parameter: Parameter) -> tuple[float, float]:
    """Returns the mean and standard deviation of a parameter's values."""
    path, shape = parameter.path, parameter.shape
    if path.endswith(".bias"):
        return 0.0, 0.02
    if "norm" in path.split(".")[-2]:
        return 1.0, 0.1
    if "embed_tokens" in path or "pos_embed" in path:
        return 0.0, 1.0
    if ".experts." in path:
        fan_in = shape[1]  # [E, in, out]
    elif path.endswith(("o_proj.weight", "attn.proj.weight")):
        fan_in = prod(shape[1:])  # [out, H * h]
    else:
        fan_in = shape[-1]
    # visual rows then are about as large as token embeddings
    return 0.0, (1.0 if "merger" in path else 0.5) / fan_in**0.5


def _write_tokenizer(directory: Path, config: ModelConfig) -> None:
    ids = _special_ids(config)
    taken = set(ids.values())
    free = (i for i in range(config.text.vocab_size) if i not in taken)
    # a prefix of the merges is consistent, because each merge needs only pieces of earlier ones
    vocabulary = dict(zip([*_byte_characters(), *(merge.replace(" ", "") for merge in _MERGES)], free, strict=False))
    merges = [merge for merge in _MERGES if merge.replace(" ", "") in vocabulary]
    added = [
        {"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True}
        for token, i in sorted(ids.items(), key=lambda item: item[1])
    ]  # fmt: skip
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": vocabulary | ids,
            "merges": [merge.split(" ") for merge in merges],
        },
    }
    _write_json(directory / "tokenizer.json", tokenizer)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "additional_special_tokens": [token for token in ids if token not in ("<|im_end|>", "<|endoftext|>")],
        "added_tokens_decoder": {str(entry["id"]): {k: v for k, v in entry.items() if k != "id"} for entry in added},
        "model_max_length": config.text.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
    }
    _write_json(directory / "tokenizer_config.json", settings)


def _special_ids(config: ModelConfig) -> dict[str, int]:
    """Returns the ids of the special tokens: the config's, otherwise the first free ones after the bytes."""
    ids: dict[str, int] = {}
    if config.vision:
        ids |= {
            "<|vision_start|>": config.vision_start_token_id,
            "<|vision_end|>": config.vision_end_token_id,
            "<|image_pad|>": config.image_token_id,
            "<|video_pad|>": config.video_token_id,
        }
    if config.eos_token_ids:
        ids["<|im_end|>"] = config.eos_token_ids[0]
    if config.pad_token_id is not None and config.pad_token_id not in ids.values():
        ids["<|endoftext|>"] = config.pad_token_id
    free = (i for i in range(256, 256 + 2 * len(SPECIAL_TOKENS)) if i not in set(ids.values()))
    return {token: ids[token] if token in ids else next(free) for token in SPECIAL_TOKENS}


def _byte_characters() -> list[str]:
    """Returns the printable character that stands for each byte in byte-level BPE (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def _write_processor(directory: Path, config: ModelConfig) -> None:
    assert config.vision is not None
    shared = {
        "patch_size": config.vision.patch_size,
        "temporal_patch_size": config.vision.temporal_patch_size,
        "merge_size": config.vision.spatial_merge_size,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    image = {
        "size": {"shortest_edge": 65536, "longest_edge": 16777216},
        "image_processor_type": "Qwen2VLImageProcessorFast",
    }
    video = {"size": {"shortest_edge": 4096, "longest_edge": 25165824}, "video_processor_type": "Qwen3VLVideoProcessor"}
    _write_json(directory / "preprocessor_config.json", shared | image | {"processor_class": "Qwen3VLProcessor"})
    _write_json(directory / "video_preprocessor_config.json", shared | video | {"processor_class": "Qwen3VLProcessor"})


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
