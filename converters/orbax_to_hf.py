"""Restores the original Hugging Face checkpoint from a converted one: its names, layout, files and bits."""

import json
from contextlib import ExitStack
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from converters.hf_to_orbax import Progress, copy_companions, new_directory, refuse_existing
from deepstack_jax.checkpoints.hf_folder import INDEX, is_plain_name
from deepstack_jax.checkpoints.manifest import FORMAT_FILE, Manifest, read_manifest
from deepstack_jax.checkpoints.mapping import EXPERT_LAYOUTS, current_name, head_and_embedding, parameters
from deepstack_jax.checkpoints.orbax_checkpoint import check_model, read_orbax_params, stored_params
from deepstack_jax.checkpoints.safetensors_file import CheckpointError, FileWriter
from deepstack_jax.config import ModelConfig
from deepstack_jax.models.registry import read_config


def export(ckpt_dir: str | Path, hf_dir: str | Path, progress: Progress | None = None) -> None:
    """Writes the converted checkpoint `ckpt_dir` as a Hugging Face checkpoint into a new directory `hf_dir`.

    Tensors have the names, the expert layout and the division into files of the original, and the same bits if the
    conversion kept the dtype. transformers' `from_pretrained` loads the result. `progress` is called with (bytes
    written, total bytes).

    Raises:
        CheckpointError: `ckpt_dir` is not a converted checkpoint, or is damaged.
        OSError: `hf_dir` is not empty or can't be written; nothing is left behind.
    """
    ckpt_dir, hf_dir = Path(ckpt_dir), Path(hf_dir).absolute()
    refuse_existing(hf_dir)
    manifest = read_manifest(ckpt_dir)
    manifest.check_copies()
    config = read_config(ckpt_dir)
    source = _source(manifest)
    stored = stored_params(ckpt_dir)
    check_model(ckpt_dir, config, stored)
    listed = {parameter.path: parameter for parameter in parameters(config, source["expert_layout"])}
    places = _places(source["files"], config)
    head, embedding = head_and_embedding(config)
    # the source may have held tied embeddings under either name, or under both
    tied = [name for name in (embedding, head) if name in places] or [embedding]
    names_of = {embedding: tied} if config.text.tie_word_embeddings else {}
    shapes = {
        name: (np.dtype(stored[path].dtype), tensor.shape)
        for path, parameter in listed.items()
        for tensor in parameter.tensors
        for name in names_of.get(tensor.name, [tensor.name])
    }
    if unknown := [name for name in shapes if name not in places]:
        raise CheckpointError(f"{ckpt_dir} does not say which file holds {unknown[0]}: convert the checkpoint again")
    total = sum(prod(shape) * dtype.itemsize for dtype, shape in shapes.values())
    done = 0
    with new_directory(hf_dir, total) as directory:
        with ExitStack() as stack:
            writers = {
                file: stack.enter_context(
                    FileWriter(directory / file, {name: shapes[current_name(name, config)] for name in names})
                )
                for file, names in source["files"].items()
            }
            for path, values in read_orbax_params(ckpt_dir, list(listed)):
                for tensor in listed[path].tensors:
                    part = tensor.take(values)
                    for name in names_of.get(tensor.name, [tensor.name]):
                        file, called = places[name]
                        writers[file].write(called, part)
                        done += part.nbytes
                del values
                if progress:
                    progress(done, total)
        if len(source["files"]) > 1:
            _write_index(directory / INDEX, source["files"], total)
        copy_companions(ckpt_dir, directory)


def _source(manifest: Manifest) -> dict[str, Any]:
    source = manifest.contents.get("source")
    if isinstance(source, dict) and isinstance(files := source.get("files"), dict):
        listed = (
            is_plain_name(file) and isinstance(names, list) and all(isinstance(name, str) for name in names)
            for file, names in files.items()
        )
        if source.get("expert_layout") in EXPERT_LAYOUTS and all(listed):
            return source
    raise CheckpointError(
        f"{manifest.directory / FORMAT_FILE} does not say what it was converted from: convert the checkpoint again"
    )


def _places(files: dict[str, list[str]], config: ModelConfig) -> dict[str, tuple[str, str]]:
    """Maps each tensor's current name to the file that holds it and its name there."""
    return {current_name(name, config): (file, name) for file, names in files.items() for name in names}


def _write_index(file: Path, files: dict[str, list[str]], total: int) -> None:
    weight_map = {name: shard for shard, names in files.items() for name in names}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    file.write_text(json.dumps(index, indent=2) + "\n")
