"""Digests of a checkpoint's tensors: equal for a Hugging Face directory, its conversion, and what `export` makes of it.

A tensor is digested as layout `hf4` has it (see mapping.py), whatever the layout of the checkpoint: by its name and
shape there, and its values in the dtype in which the model is read, little-endian and in C order. The experts of a
layer are therefore two tensors, `gate_up_proj [E, D, 2F]` and `down_proj [E, F, D]`, even if a file holds them one by
one or transposed; tied embeddings are one tensor; and tensors that are not the model's are left out.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from deepstack_jax.checkpoints.hf_checkpoint import open_checkpoint
from deepstack_jax.checkpoints.manifest import FORMAT_FILE, read_manifest
from deepstack_jax.checkpoints.mapping import Parameter, parameters
from deepstack_jax.checkpoints.orbax_checkpoint import check_model, read_orbax_params, stored_params
from deepstack_jax.models.registry import read_config


class TensorDigest(NamedTuple):
    """The SHA-256 of a tensor's bytes, in hexadecimal digits."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    sha256: str

    def __str__(self) -> str:
        return f"{self.sha256}  {self.dtype}  {list(self.shape)}  {self.name}"


def tensor_digests(
    directory: str | Path, expert_layout: str | None = None, progress: Callable[[int, int], object] | None = None
) -> Iterator[TensorDigest]:
    """Yields the digest of each tensor of a converted or a Hugging Face checkpoint, in the model's order.

    `expert_layout` is needed only for a Hugging Face directory whose shapes are ambiguous. `progress` is called with
    (bytes read, total bytes). Raises `CheckpointError` or `ConfigError` as loading does.
    """
    directory = Path(directory)
    converted = (directory / FORMAT_FILE).exists()
    if converted:
        read_manifest(directory).check_copies()
    config = read_config(directory)
    if converted:
        stored = stored_params(directory)
        check_model(directory, config, stored)
        dtypes = {path: leaf.dtype for path, leaf in stored.items()}
        listed = parameters(config)
        whole = read_orbax_params(directory, [parameter.path for parameter in listed])
        values: Iterable[Iterable[np.ndarray]] = ((array,) for _, array in whole)
    else:
        checkpoint = open_checkpoint(directory, config, expert_layout)
        listed = parameters(config)
        dtypes = dict.fromkeys((parameter.path for parameter in listed), checkpoint.dtype)
        values = (checkpoint.stream(parameter) for parameter in checkpoint.parameters)
    sizes = [parameter.size * dtypes[parameter.path].itemsize for parameter in listed]
    done = 0
    for parameter, parts, size in zip(listed, values, sizes, strict=True):
        yield _digest(parameter, dtypes[parameter.path], parts)
        done += size
        if progress:
            progress(done, sum(sizes))


def model_digest(tensors: Iterable[TensorDigest]) -> str:
    """Returns the SHA-256 of the tensors' lines, in the order of their names."""
    lines = (f"{tensor}\n" for tensor in sorted(tensors))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _digest(parameter: Parameter, dtype: np.dtype, parts: Iterable[np.ndarray]) -> TensorDigest:
    digest = hashlib.sha256()
    for values in parts:
        digest.update(np.ascontiguousarray(values).reshape(-1).view(np.uint8))
    (tensor,) = parameter.tensors  # layout hf4 has one for each parameter
    return TensorDigest(tensor.name, dtype.name, tensor.shape, digest.hexdigest())
