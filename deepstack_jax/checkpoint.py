"""Loads a converted or a Hugging Face checkpoint as a `Model`."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.typing import DTypeLike

from deepstack_jax import sharding
from deepstack_jax.bundled import checkpoint_path
from deepstack_jax.checkpoints.hf_checkpoint import HfCheckpoint, Rows, open_checkpoint, read_rows
from deepstack_jax.checkpoints.hf_folder import check_sums, refuse_larger_model
from deepstack_jax.checkpoints.manifest import FORMAT_FILE, read_manifest
from deepstack_jax.config import ModelConfig, read_special_tokens
from deepstack_jax.models.parameters import (
    Params,
    abstract_params,
    flat_params,
    merge_params,
    model_dtype,
    param_shardings,
)
from deepstack_jax.models.registry import read_config
from deepstack_jax.processing.processor import Processor

VISION, TEXT = "visual.", "language_model."


@dataclass
class Model:
    """A checkpoint in memory. Its parameters are a flat dictionary by dotted path (see models/parameters.py).

    `config.dtype` is the dtype of weights, cache and visual rows. It is set to the parameters' dtype if they all have
    the same one.

    Raises:
        ValueError: the parameters have several dtypes and the configuration names none.
    """

    config: ModelConfig
    params: Params
    path: Path | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int = 0

    def __post_init__(self) -> None:
        found = {array.dtype.name for array in self.params.values()}
        if len(found) == 1:
            self.config = replace(self.config, dtype=found.pop())
        model_dtype(self.config)

    @property
    def dtype(self) -> np.dtype:
        """The dtype of weights, cache and visual rows."""
        return model_dtype(self.config)

    def module(self) -> nnx.Module:
        """Returns the model as a Flax module over these parameters, for optax, LoRA or quantisation.

        Its `language_model` is a `Qwen3MoeForCausalLM`. If the family has vision, its `visual` is a `VisionEncoder`,
        which runs only if its parameters are loaded.
        """
        return merge_params(self.config, self.params)

    def from_module(self, module: nnx.Module) -> "Model":
        """Returns this model with the parameters of `module`, which came from `module()` and was trained.

        Raises:
            ValueError: the module lacks a parameter of this model.
        """
        params = flat_params(module)
        if missing := [path for path in self.params if path not in params]:
            raise ValueError(f"the module has no parameter {missing[0]}: it was not made by this model's module()")
        return replace(self, params={path: params[path] for path in self.params})

    @cached_property
    def mesh(self) -> jax.sharding.Mesh | None:
        """The mesh on which the parameters are; None on a single device."""
        return sharding.mesh_of(self.params)

    @cached_property
    def vision_params(self) -> Params:
        """The parameters that the encode program needs."""
        return self._part(VISION)

    @cached_property
    def text_params(self) -> Params:
        """The parameters that the prefill and decode programs need."""
        return self._part(TEXT)

    @cached_property
    def processor(self) -> Processor:
        """Tokenizer, chat template, and image and video processing, read from the checkpoint on first use."""
        if self.path is None:
            raise ValueError("this model was not loaded from a checkpoint: it has no tokenizer")
        return Processor.from_directory(self.path, self.config)

    def _part(self, prefix: str) -> Params:
        return {path: array for path, array in self.params.items() if path.startswith(prefix)}


def load(
    path: str | Path,
    dtype: DTypeLike | None = None,
    mesh: jax.sharding.Mesh | None = None,
    *,
    expert_layout: str | None = None,
    parts: Iterable[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Model:
    """Loads a directory made by `deepstack-jax convert`, or an unconverted Hugging Face directory.

    Args:
        path: the directory, or the name of a checkpoint that comes with the package (`tiny-vl`).
        dtype: float32 or bfloat16; None keeps the checkpoint's. If its tensors differ, None takes the dtype that
            transformers' from_pretrained chooses, and emits a `CheckpointWarning`.
        mesh: places every parameter by its logical axes (sharding.py), and all programs run on it; None places all on
            the default device. It has the axes `data` and `tensor`, or one of them: see `make_mesh`.
        expert_layout: hf4 or hf5, for a Hugging Face directory whose shapes are ambiguous.
        parts: prefixes of the parameters to load ("visual.", "language_model."); None loads all.
        progress: called with (bytes read, total bytes), of what this process's devices hold.

    Every file of a converted directory that is read is checked by its checksum, and the files that SHA256SUMS lists if
    a Hugging Face directory has it.

    Raises:
        ValueError: the directory is not a checkpoint of a supported family, or is damaged, quantised or an adapter; the
            message is one line that says what is wrong and where. Or the mesh has another axis.

    Emits a `CheckpointWarning` for tensors that are not part of the model, which are skipped. Logs a warning for
    parameters that the mesh doesn't divide.
    """
    path = checkpoint_path(path)
    if dtype is not None and jnp.dtype(dtype) not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"dtype {jnp.dtype(dtype).name} is not supported: expected float32 or bfloat16")
    converted = (path / FORMAT_FILE).exists()
    manifest = read_manifest(path) if converted else None
    if manifest:
        manifest.check_copies()
    else:
        check_sums(path)
    config = read_config(path)
    ends, pad = read_special_tokens(path, config)
    prefixes = None if parts is None else tuple(parts)
    checkpoint = None if manifest else open_checkpoint(path, config, expert_layout)
    if manifest and manifest.arrays:
        refuse_larger_model(path, config, manifest.arrays)
    shardings = param_shardings(config, mesh, _dtype_of_bytes(config, dtype)) if mesh else None
    if checkpoint is None:
        from deepstack_jax.checkpoints.orbax_checkpoint import restore_params  # Orbax takes a second to import

        params = restore_params(path, config, dtype=dtype, prefixes=prefixes, shardings=shardings, progress=progress)
    else:
        params = _read_hugging_face(checkpoint, dtype, prefixes, shardings, progress)
    return Model(config, params, path, ends, pad)


def _dtype_of_bytes(config: ModelConfig, dtype: DTypeLike | None) -> DTypeLike:
    """Returns the dtype in which bytes are told before the parameters' own is known."""
    return dtype or (config.dtype if config.dtype in ("float32", "bfloat16", "float16") else jnp.bfloat16)


def _read_hugging_face(
    checkpoint: HfCheckpoint,
    dtype: DTypeLike | None,
    prefixes: tuple[str, ...] | None,
    shardings: Mapping[str, NamedSharding] | None,
    progress: Callable[[int, int], None] | None,
) -> Params:
    """Reads the rows of parameters that devices of this process hold, and no others."""
    shapes = {name: leaf.shape for name, leaf in abstract_params(checkpoint.config).items()}
    if shardings is None:
        rows: dict[str, list[Rows]] = {name: [(0, shape[0])] for name, shape in shapes.items()}
    else:
        rows = {name: _rows_held(shape, shardings[name]) for name, shape in shapes.items()}
    sizes = {
        name: sum(end - first for first, end in rows[name]) * prod(shape[1:])
        for name, shape in shapes.items()
        if prefixes is None or name.startswith(prefixes)
    }
    total, done, params = sum(sizes.values()), 0, {}
    for name, arrays in read_rows(checkpoint, dtype, prefixes, rows):
        if shardings is None:
            params[name] = jax.device_put(arrays[rows[name][0]], may_alias=False)
        else:
            params[name] = _from_rows(shapes[name], shardings[name], arrays)
        done += sizes[name]
        if progress:
            progress(done * params[name].dtype.itemsize, total * params[name].dtype.itemsize)
    return params


def _rows_held(shape: tuple[int, ...], placed: NamedSharding) -> list[Rows]:
    """Returns the rows of a parameter's first axis that this process's devices hold."""
    indices = placed.addressable_devices_indices_map(shape).values()
    return sorted({index[0].indices(shape[0])[:2] for index in indices if index})


def _from_rows(shape: tuple[int, ...], placed: NamedSharding, arrays: Mapping[Rows, np.ndarray]) -> jax.Array:
    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        # a copy: on a CPU, jax would keep the array itself, and with it the rows of other devices
        return arrays[index[0].indices(shape[0])[:2]][(slice(None), *index[1:])].copy()

    return jax.make_array_from_callback(shape, placed, part)
