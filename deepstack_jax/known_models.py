"""The configurations of the published models, for what needs no checkpoint: planning, and made-up weights."""

from typing import Any

_VISION: dict[str, Any] = {
    "model_type": "qwen3_vl_moe",
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_heads": 16,
    "in_channels": 3,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [8, 16, 24],
    "hidden_act": "gelu_pytorch_tanh",
}
_TEXT: dict[str, Any] = {
    "model_type": "qwen3_vl_moe_text",
    "vocab_size": 151936,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 262144,
    "rms_norm_eps": 1e-6,
    "rope_theta": 5e6,
    "rope_scaling": {"rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True},
    "attention_bias": False,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}


def _config(text: dict[str, Any]) -> dict[str, Any]:
    return {
        "model_type": "qwen3_vl_moe",
        "architectures": ["Qwen3VLMoeForConditionalGeneration"],
        "dtype": "bfloat16",
        "tie_word_embeddings": False,
        "image_token_id": 151655,
        "video_token_id": 151656,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "text_config": _TEXT | text,
        "vision_config": _VISION | {"out_hidden_size": text["hidden_size"]},
    }


# the contents of the config.json of Qwen3-VL-30B-A3B and Qwen3-VL-235B-A22B, as far as it is read here
KNOWN_MODELS: dict[str, dict[str, Any]] = {
    "30b-a3b": _config(
        {
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "moe_intermediate_size": 768,
        }
    ),
    "235b-a22b": _config(
        {
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 94,
            "num_attention_heads": 64,
            "moe_intermediate_size": 1536,
        }
    ),
}
