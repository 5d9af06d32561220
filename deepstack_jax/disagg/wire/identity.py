"""What tells whether two nodes have loaded the same model, although each holds another half of it."""

import json
from dataclasses import asdict

import numpy as np
import xxhash

from deepstack_jax.checkpoint import Model, load

# Small, in every checkpoint, and on neither side of the split alone: read from the disk by both.
_SAMPLED = ("visual.merger.norm.", "language_model.model.norm.")
_FILES = ("tokenizer.json", "chat_template.jinja", "preprocessor_config.json", "video_preprocessor_config.json")


def identity_of(model: Model) -> str:
    """The architecture and a digest of configuration, tokenizer, processors and samples of the weights.

    Raises:
        ValueError: the model was not loaded from a checkpoint.
    """
    if model.path is None:
        raise ValueError("a model that was not loaded from a checkpoint can't be split: save and load it")
    digest = xxhash.xxh3_128(json.dumps(asdict(model.config), sort_keys=True, default=str).encode())
    for name in _FILES:
        file = model.path / name
        digest.update(file.read_bytes() if file.exists() else b"")
    sampled = load(model.path, "float32", parts=_SAMPLED).params
    for path in sorted(sampled):
        digest.update(np.ascontiguousarray(sampled[path]).data)
    return f"{model.config.model_type}-{digest.hexdigest()}"
