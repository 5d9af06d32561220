"""Loading a checkpoint, converted or as Hugging Face has it, as a `Model`."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from deepstack_jax.bundled import checkpoint_path
from deepstack_jax.checkpoints.hf_checkpoint import read_params
from deepstack_jax.config import ModelConfig, read_special_tokens
from deepstack_jax.models.parameters import Params, abstract_params, flat_params, merge_params, model_dtype
from deepstack_jax.models.registry import read_config
from deepstack_jax.processing.processor import Processor
from deepstack_jax.sharding import param_shardings

VISION, TEXT = "visual.", "language_model."


@dataclass
class Model:
    """A checkpoint in memory. Its parameters are a flat dictionary by dotted path (see models/parameters.py).

    `config.dtype` is that of weights, cache and visual rows: the one that the parameters have, or, if they have
    several, the one that it names.

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
        """Of weights, cache and visual rows."""
        return model_dtype(self.config)

    def module(self) -> nnx.Module:
        """The model as a Flax module over these parameters, for optax, LoRA or quantisation.

        Its `language_model` is a `Qwen3MoeForCausalLM`; it has a `visual` if those parameters are loaded.
        """
        return merge_params(self.config, self.params)

    def from_module(self, module: nnx.Module) -> "Model":
        """This model with the parameters of a module that came from `module()` and was trained."""
        params = flat_params(module)
        if missing := [path for path in self.params if path not in params]:
            raise ValueError(f"the module has no parameter {missing[0]}: it was not made by this model's module()")
        return replace(self, params={path: params[path] for path in self.params})

    @cached_property
    def vision_params(self) -> Params:
        """What the encode program needs."""
        return self._part(VISION)

    @cached_property
    def text_params(self) -> Params:
        """What the prefill and decode programs need."""
        return self._part(TEXT)

    @cached_property
    def processor(self) -> Processor:
        """Tokenizer, chat template, image and video processing; read from the checkpoint when first asked for."""
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
    """Loads a directory made by `deepstack-jax convert`, or a Hugging Face directory as it is.

    Args:
        path: the directory, or the name of a checkpoint that comes with the package (`tiny-vl`).
        dtype: float32 or bfloat16; None keeps the checkpoint's. If its tensors differ, that is the one dtype that
            transformers' from_pretrained takes, and a `CheckpointWarning` says so.
        mesh: places every parameter by its logical axes (sharding.py); None takes the default device.
        expert_layout: hf4 or hf5, for a Hugging Face directory whose layout can't be told from its shapes.
        parts: parameters to load, by prefix ("visual.", "language_model."); None loads all.
        progress: called with (bytes read, bytes in all).

    Raises:
        ValueError: a directory that is not a checkpoint of the four families, or is damaged, quantised or an adapter;
            one line says what is wrong, and where.

    Warns `CheckpointWarning` of tensors that are not the model's and left out.
    """
    path = checkpoint_path(path)
    if dtype is not None and jnp.dtype(dtype) not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"dtype {jnp.dtype(dtype).name} is not supported: expected float32 or bfloat16")
    config = read_config(path)
    ends, pad = read_special_tokens(path, config)
    prefixes = None if parts is None else tuple(parts)
    shardings = param_shardings(config, mesh) if mesh else None
    if (path / "deepstack_jax.json").exists():
        from deepstack_jax.checkpoints.orbax_checkpoint import restore_params  # Orbax takes a second to import

        params = restore_params(path, config, dtype=dtype, prefixes=prefixes, shardings=shardings, progress=progress)
    else:
        arrays = read_params(path, config, dtype=dtype, expert_layout=expert_layout, prefixes=prefixes)
        sizes = {name: int(np.prod(leaf.shape)) for name, leaf in abstract_params(config).items()}
        total, done, params = sum(sizes.values()), 0, {}
        for name, array in arrays:
            params[name] = jax.device_put(array, shardings[name] if shardings else None, may_alias=False)
            done += sizes[name]
            if progress:
                progress(done * array.itemsize, total * array.itemsize)
    return Model(config, params, path, ends, pad)
