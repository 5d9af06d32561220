"""Parity at the widths of Qwen3-VL-30B-A3B, with few layers: 128 experts of 768, heads of 128 and, in vision, of 72."""

import gc

import numpy as np
import pytest

import deepstack_jax as dsj
from deepstack_jax.encoding import encode_rows
from deepstack_jax.processing.batch import prepare_batch
from deepstack_jax.testing.random_checkpoint import write_random_checkpoint
from tests.cases import IMAGE, VIDEO, batch_of, mrope, side_by_side
from tests.torch_reference import load_reference, reference_logits, reference_rows, reference_tokens

CONFIG = {
    "model_type": "qwen3_vl_moe",
    "tie_word_embeddings": False,
    "image_token_id": 32001,
    "video_token_id": 32002,
    "vision_start_token_id": 32003,
    "vision_end_token_id": 32004,
    "text_config": {
        "model_type": "qwen3_vl_moe_text",
        "vocab_size": 32768,  # of 151936: the embeddings' length changes nothing that is tested here
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 2,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-6,
        "rope_parameters": mrope(24, 20, 20),
    },
    "vision_config": {
        "model_type": "qwen3_vl_moe",
        "depth": 3,
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_heads": 16,
        "out_hidden_size": 2048,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": [0, 2],
    },
}


@pytest.mark.slow
def test_parity_at_the_widths_of_the_30b_model(tmp_path):
    write_random_checkpoint(tmp_path, CONFIG, seed=1, tokenizer=False, repeat_values=True)
    inputs = batch_of(CONFIG, [[9, (IMAGE, (1, 10, 14)), 12, (VIDEO, (2, 6, 8)), 5], [31]], seed=1)

    reference = load_reference(tmp_path)
    logits = reference_logits(reference, inputs)
    tokens = reference_tokens(reference, inputs)
    rows = np.concatenate(
        [
            reference_rows(reference, inputs["pixel_values"], inputs["image_grid_thw"]),
            reference_rows(reference, inputs["pixel_values_videos"], inputs["video_grid_thw"]),
        ]
    )
    del reference  # the two models together would not fit a small machine
    gc.collect()

    model = dsj.load(tmp_path)
    batch = prepare_batch(model.config, **inputs)
    found = side_by_side(encode_rows(model, batch))[: batch.num_visual_tokens]
    for level in range(3):
        part = slice(2048 * level, 2048 * (level + 1))
        assert np.abs(found - rows)[:, part].max() <= 1e-5 * np.abs(rows[:, part]).max()
    real = inputs["attention_mask"] == 1
    found = np.asarray(dsj.forward(model, **inputs))[real]
    assert np.abs(found - logits[real]).max() <= 2e-5 * np.abs(logits[real]).max()
    out = dsj.generate(model, **inputs, max_new_tokens=16, eos_token_id=[])
    np.testing.assert_array_equal(out.tokens, tokens)
