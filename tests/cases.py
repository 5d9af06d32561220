"""The random configurations that parity is shown on: every dimension of a case differs from its others.

Seeds are chosen so that no router and no greedy step stands close to a tie: rounding, in which two right programs
differ, then can't turn a decision (tests/test_parity.py asserts that the experts share the load all the same).
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from deepstack_jax.models import registry
from deepstack_jax.models.vision import VisualRows
from deepstack_jax.testing.random_checkpoint import tiny_config

# those whose checkpoints are whole models
FAMILIES = tuple(name for name, family in registry.FAMILIES.items() if not family.is_text_part)
IMAGE, VIDEO = "image", "video"
# One row of a batch: text lengths and (kind, grid) in reading order.
Row = list[int | tuple[str, tuple[int, int, int]]]


def side_by_side(rows: VisualRows | None) -> np.ndarray:
    """Rows [M, (1+N)*D] as `encode` returned them."""
    assert rows is not None
    return np.concatenate([np.asarray(part) for part in rows if part is not None], axis=1)


@dataclass
class Case:
    """A configuration and a batch of prompts for it."""

    name: str
    config: dict[str, Any]
    rows: list[Row]
    padding: str = "left"
    expert_layout: str = "hf4"
    seed: int = 0
    inputs: dict[str, np.ndarray] = field(init=False)

    def __post_init__(self) -> None:
        self.inputs = batch_of(self.config, self.rows, self.padding, self.seed)


def batch_of(config: dict[str, Any], rows: list[Row], padding: str = "left", seed: int = 0) -> dict[str, np.ndarray]:
    """Random tokens and patches for `rows`, with the names of a Hugging Face processor's output."""
    rng = np.random.default_rng(seed)
    vision = config.get("vision_config", {})
    patch_dim = 3 * vision.get("temporal_patch_size", 2) * vision.get("patch_size", 16) ** 2
    merge_unit = vision.get("spatial_merge_size", 2) ** 2
    grids: dict[str, list[tuple[int, int, int]]] = {IMAGE: [], VIDEO: []}
    ids, kinds = [], []
    for row in rows:
        tokens: list[int] = []
        types: list[int] = []
        for part in row:
            if isinstance(part, int):
                tokens += rng.integers(0, 256, part).tolist()
                types += [0] * part
                continue
            kind, grid = part
            grids[kind].append(grid)
            frames = 1 if kind == IMAGE else grid[0]
            pad, kind_type = (config["image_token_id"], 1) if kind == IMAGE else (config["video_token_id"], 2)
            for _ in range(frames):
                count = int(np.prod(grid)) // frames // merge_unit
                stamp = [] if kind == IMAGE else rng.integers(0, 256, 3).tolist()  # stands for "<1.0 seconds>"
                tokens += [*stamp, config["vision_start_token_id"], *[pad] * count, config["vision_end_token_id"]]
                types += [0] * (len(stamp) + 1) + [kind_type] * count + [0]
        ids.append(tokens)
        kinds.append(types)
    length = max(map(len, ids))
    padded = np.zeros((3, len(ids), length), np.int64)
    for i, (tokens, types) in enumerate(zip(ids, kinds, strict=True)):
        where = slice(length - len(tokens), length) if padding == "left" else slice(0, len(tokens))
        padded[0, i, where], padded[1, i, where], padded[2, i, where] = tokens, 1, types
    inputs = {"input_ids": padded[0], "attention_mask": padded[1]}
    if grids[IMAGE] or grids[VIDEO]:
        inputs["mm_token_type_ids"] = padded[2]
    for kind, pixels, grid_name in (
        (IMAGE, "pixel_values", "image_grid_thw"),
        (VIDEO, "pixel_values_videos", "video_grid_thw"),
    ):
        if grids[kind]:
            inputs[grid_name] = np.asarray(grids[kind])
            patches = int(inputs[grid_name].prod(axis=1).sum())
            inputs[pixels] = rng.standard_normal((patches, patch_dim)).astype(np.float32)
    return inputs


def mrope(*section: int) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 5e6, "mrope_section": list(section), "mrope_interleaved": True}


CASES = [
    Case(
        "three levels, images of different sizes",
        tiny_config(),
        [[7, (IMAGE, (1, 4, 6)), 5], [11, (IMAGE, (1, 6, 8)), 3, (IMAGE, (1, 8, 4)), 9], [13]],
    ),
    Case(
        "two levels, dense layers in between, videos",
        tiny_config(
            text_config={
                "vocab_size": 290, "hidden_size": 72, "intermediate_size": 104, "num_hidden_layers": 5,
                "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 20, "num_experts": 12,
                "num_experts_per_tok": 3, "moe_intermediate_size": 28, "mlp_only_layers": [1, 3],
                "rope_scaling": None, "rope_parameters": mrope(4, 3, 3),
            },
            vision_config={
                "depth": 4, "hidden_size": 40, "intermediate_size": 84, "num_heads": 2, "out_hidden_size": 72,
                "num_position_embeddings": 81, "deepstack_visual_indexes": [0, 2],
            },
        ),
        [[6, (VIDEO, (3, 4, 6)), 8], [4, (VIDEO, (2, 6, 4)), 2, (VIDEO, (1, 4, 4)), 17]],
    ),
    Case(
        "one level, tied embeddings, uneven heads, right padding",
        tiny_config(
            tie_word_embeddings=True,
            text_config={
                "vocab_size": 310, "hidden_size": 80, "num_hidden_layers": 3, "num_attention_heads": 9,
                "num_key_value_heads": 3, "head_dim": 24, "num_experts": 6, "num_experts_per_tok": 4,
                "moe_intermediate_size": 36, "rope_scaling": {"mrope_section": [6, 3, 3]},
            },
            vision_config={
                "depth": 3, "hidden_size": 32, "intermediate_size": 56, "num_heads": 2, "out_hidden_size": 80,
                "num_position_embeddings": 49, "deepstack_visual_indexes": [1],
            },
        ),
        [[5, (IMAGE, (1, 6, 4)), 10], [3, (IMAGE, (1, 4, 4)), 2]],
        padding="right",
    ),
    Case(
        "no deepstack, experts in every second layer",
        tiny_config(
            text_config={
                "hidden_size": 56, "intermediate_size": 88, "num_hidden_layers": 4, "num_attention_heads": 5,
                "num_key_value_heads": 1, "head_dim": 12, "num_experts": 7, "moe_intermediate_size": 44,
                "decoder_sparse_step": 2, "rope_scaling": {"mrope_section": [16, 1, 8]},  # more than head_dim / 2
            },
            vision_config={"depth": 2, "out_hidden_size": 56, "deepstack_visual_indexes": []},
        ),
        [[9, (IMAGE, (1, 8, 6)), 6], [20]],
        expert_layout="hf5",
    ),
    Case(
        "dense family, attention bias, an image and a video in one prompt",
        tiny_config(
            "qwen3_vl",
            text_config={
                "hidden_size": 88, "intermediate_size": 120, "num_hidden_layers": 4, "num_attention_heads": 8,
                "num_key_value_heads": 4, "head_dim": 16, "attention_bias": True,
            },
            vision_config={"depth": 4, "out_hidden_size": 88, "deepstack_visual_indexes": [0, 1, 3]},
        ),
        [[4, (VIDEO, (2, 4, 4)), 5, (IMAGE, (1, 4, 8)), 7], [6, (IMAGE, (1, 4, 4)), 3, (VIDEO, (2, 4, 6)), 2]],
    ),
    Case(
        "taps out of order, one decoder layer fewer than levels, larger merge and patch",
        tiny_config(
            text_config={"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 3,
                         "num_experts": 5, "moe_intermediate_size": 40},
            vision_config={
                "depth": 4, "hidden_size": 24, "intermediate_size": 68, "num_heads": 3, "out_hidden_size": 96,
                "num_position_embeddings": 36, "deepstack_visual_indexes": [3, 0, 2], "patch_size": 8,
                "temporal_patch_size": 1, "spatial_merge_size": 3,
            },
        ),
        [[8, (IMAGE, (1, 6, 9)), 4], [2, (IMAGE, (1, 3, 3)), 1, (IMAGE, (1, 9, 6)), 6]],
    ),
    Case(
        "text model with one matrix an expert, probabilities not renormalised",
        tiny_config("qwen3_moe", hidden_size=48, moe_intermediate_size=20, num_attention_heads=6, head_dim=10,
                    num_experts=9, num_experts_per_tok=3, norm_topk_prob=False, mlp_only_layers=[2]),
        [[15], [33], [4]],
        expert_layout="per_expert",
    ),
    Case(
        "dense text model, sliding window, yarn",
        tiny_config("qwen3", hidden_size=60, num_attention_heads=4, num_key_value_heads=2, head_dim=18,
                    tie_word_embeddings=True, use_sliding_window=True, sliding_window=6, max_window_layers=2,
                    rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}),
        [[40], [21]],
    ),
    Case(
        "longer than one block of attention",
        tiny_config(
            text_config={"num_hidden_layers": 3}, vision_config={"depth": 3, "deepstack_visual_indexes": [0, 1, 2]}
        ),
        [[30, (IMAGE, (1, 40, 30)), 200, (IMAGE, (1, 12, 20)), 25], [300]],
    ),
]  # fmt: skip
BY_NAME = {case.name: case for case in CASES}
