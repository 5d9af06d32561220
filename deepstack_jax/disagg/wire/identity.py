"""Identifies a model, so that two nodes can tell whether they loaded the same one, although each holds half of it."""

import json
from dataclasses import asdict

import numpy as np
import xxhash

from deepstack_jax.checkpoint import Model, load
from deepstack_jax.errors import naming

# These parameters are small and exist in every checkpoint. Both sides read them from disk.
_SAMPLED = ("visual.merger.norm.", "language_model.model.norm.")
_FILES = ("tokenizer.json", "chat_template.jinja", "preprocessor_config.json", "video_preprocessor_config.json")


def identity_of(model: Model) -> str:
    """Returns the architecture and a digest of the configuration, tokenizer, processors and samples of the weights.

    Raises:
        ValueError: the model was not loaded from a checkpoint.
    """
    if model.path is None:
        raise ValueError("a model that was not loaded from a checkpoint can't be split: save it and load it")
    digest = xxhash.xxh3_128(json.dumps(asdict(model.config), sort_keys=True, default=str).encode())
    for name in _FILES:
        file = model.path / name
        with naming(file):
            digest.update(file.read_bytes() if file.exists() else b"")
    sampled = load(model.path, "float32", parts=_SAMPLED).params
    for path in sorted(sampled):
        digest.update(np.ascontiguousarray(sampled[path]).data)
    return f"{model.config.model_type}-{digest.hexdigest()}"
