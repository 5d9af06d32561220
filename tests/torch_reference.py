"""What PyTorch says: transformers' models on the checkpoint directory that the JAX side loads."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from deepstack_jax.models.registry import read_config


def load_reference(directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model, every tensor of it from the checkpoint and no tensor of the checkpoint unused.

    Experts run in transformers' plain loop: PyTorch's grouped product refuses bfloat16 widths that are odd.
    """
    auto = AutoModelForImageTextToText if read_config(directory).vision else AutoModelForCausalLM
    options = {} if "moe" not in read_config(directory).model_type else {"experts_implementation": "eager"}
    model, report = auto.from_pretrained(directory, dtype=dtype, output_loading_info=True, **options)
    assert not report["missing_keys"], report["missing_keys"]
    assert not report["unexpected_keys"], report["unexpected_keys"]
    return model.eval()


@torch.no_grad()
def reference_logits(model: Any, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """float32 [B, T, V]."""
    return model(**_tensors(model, inputs)).logits.float().numpy()


@torch.no_grad()
def reference_tokens(model: Any, inputs: dict[str, np.ndarray], max_new_tokens: int = 16, **options: Any) -> np.ndarray:
    """Greedy tokens [B, max_new_tokens], no end token. Takes left-padded prompts."""
    options |= {"max_new_tokens": max_new_tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    out = model.generate(**_tensors(model, inputs), **options)
    return out[:, inputs["input_ids"].shape[1] :].numpy()


@torch.no_grad()
def reference_rows(model: Any, pixel_values: np.ndarray, grid_thw: np.ndarray) -> np.ndarray:
    """Visual rows [M, (1+N)*D], float32."""
    visual = model.model.visual
    out = visual(torch.tensor(pixel_values).to(visual.dtype), grid_thw=torch.tensor(grid_thw))
    return torch.cat([out.pooler_output, *out.deepstack_features], dim=-1).float().numpy()


def _tensors(model: Any, inputs: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    if hasattr(model, "model") and hasattr(model.model, "rope_deltas"):
        model.model.rope_deltas = None  # those of the last prompt would be taken for this one's
    return {name: torch.tensor(value) for name, value in inputs.items()}
