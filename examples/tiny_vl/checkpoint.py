"""What makes a checkpoint of tiny_vl: its configuration, its tokenizer, and the Hugging Face directory that holds both.

The directory has the layout of the official Qwen3-VL-MoE checkpoints, so transformers loads it as one of them.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from converters.hf_to_orbax import new_directory
from deepstack_jax.checkpoints.hf_folder import write_sums
from deepstack_jax.checkpoints.mapping import parameters
from deepstack_jax.checkpoints.safetensors_file import FileWriter
from deepstack_jax.config import ModelConfig
from deepstack_jax.models.registry import parse_config
from deepstack_jax.testing.random_checkpoint import SPECIAL_TOKENS

VOCABULARY = 640
# Pictures become about 25 to 36 visual tokens, temporal patches of a clip 9 to 20 each: near-constant cost, and things
# that are small in a small picture are enlarged.
IMAGE_PIXELS = 160 * 160, 192 * 192
VIDEO_PIXELS = 4 * 128 * 128, 8 * 128 * 128
FRAMES_PER_SECOND = 2  # as clips are trained and asked: every frame is seen, temporal patches stand a second apart

# Behaves as Qwen3-VL's for conversations of text, images and videos: no system message unless one is given.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
  {{- '<|im_start|>' + message['role'] + '\\n' -}}
  {%- if message['content'] is string -%}
    {{- message['content'] -}}
  {%- else -%}
    {%- for part in message['content'] -%}
      {%- if part['type'] == 'image' or 'image' in part or 'image_url' in part -%}
        {{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
      {%- elif part['type'] == 'video' or 'video' in part -%}
        {{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
      {%- elif 'text' in part -%}
        {{- part['text'] -}}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
  {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def tiny_vl_config() -> dict[str, Any]:
    """The contents of config.json."""
    ids = {token: i for i, token in enumerate(SPECIAL_TOKENS)}  # the tokenizer's first
    text = {
        "model_type": "qwen3_vl_moe_text",
        "vocab_size": VOCABULARY,
        "hidden_size": 160,
        "intermediate_size": 320,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [6, 5, 5]},
        "attention_bias": False,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 96,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
    }
    vision = {
        "model_type": "qwen3_vl_moe",
        "depth": 5,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_heads": 4,
        "in_channels": 3,
        "patch_size": 16,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "out_hidden_size": 160,
        "num_position_embeddings": 144,
        "deepstack_visual_indexes": [0, 1, 3],
        "hidden_act": "gelu_pytorch_tanh",
    }
    return {
        "architectures": ["Qwen3VLMoeForConditionalGeneration"],
        "model_type": "qwen3_vl_moe",
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "tie_word_embeddings": False,
        "text_config": text,
        "vision_config": vision,
    }


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """A byte-level BPE whose merges come from `texts`; any text is accepted, and each digit is a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def write_companions(directory: Path, tokenizer: Tokenizer, dtype: str) -> None:
    """Writes everything but the weights: configurations, tokenizer, chat template, settings of the processors."""
    directory.mkdir(parents=True, exist_ok=True)
    _write_json(directory / "config.json", tiny_vl_config() | {"dtype": dtype})
    end, pad = SPECIAL_TOKENS.index("<|im_end|>"), SPECIAL_TOKENS.index("<|endoftext|>")
    _write_json(
        directory / "generation_config.json", {"do_sample": False, "eos_token_id": [end, pad], "pad_token_id": pad}
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS[1:2] + SPECIAL_TOKENS[3:]),
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.save_pretrained(str(directory))
    shared = {
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "Qwen3VLProcessor",
    }
    kinds = (
        ("preprocessor_config.json", IMAGE_PIXELS, {"image_processor_type": "Qwen2VLImageProcessorFast"}),
        (
            "video_preprocessor_config.json",
            VIDEO_PIXELS,
            {"video_processor_type": "Qwen3VLVideoProcessor", "fps": FRAMES_PER_SECOND, "max_frames": 8},
        ),
    )
    for name, (least, most), own in kinds:
        size = {"shortest_edge": least, "longest_edge": most}
        _write_json(directory / name, shared | own | {"size": size})


def write_checkpoint(
    directory: str | Path, params: Mapping[str, np.ndarray], tokenizer: Tokenizer, dtype: str = "bfloat16"
) -> None:
    """Writes a Hugging Face directory of `params` (by dotted path) in float32 or bfloat16; an old one is replaced."""
    numpy_dtype = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
    listed = parameters(model_config(), "hf4")
    tensors = {tensor.name: (numpy_dtype, tensor.shape) for parameter in listed for tensor in parameter.tensors}
    directory = Path(directory).absolute()
    nbytes = sum(parameter.size for parameter in listed) * numpy_dtype.itemsize
    _remove_checkpoint(directory)
    with new_directory(directory, nbytes) as staging:
        write_companions(staging, tokenizer, dtype)
        with FileWriter(staging / "model.safetensors", tensors) as writer:
            for parameter in listed:
                values = np.asarray(params[parameter.path], np.float32).astype(numpy_dtype)
                for tensor in parameter.tensors:
                    writer.write(tensor.name, tensor.take(values))
        write_sums(staging)


def model_config() -> ModelConfig:
    """The configuration as the model reads it."""
    return parse_config(tiny_vl_config())


def _remove_checkpoint(directory: Path) -> None:
    """Removes an older export; a directory with anything else in it is left for `new_directory` to refuse."""
    if not (directory / "model.safetensors").is_file():
        return
    for file in directory.iterdir():
        file.unlink()
    directory.rmdir()


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
