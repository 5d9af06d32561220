"""A model's parameters as one flat dictionary, separate from its modules.

The dictionary maps dotted paths, such as `language_model.model.layers.0.self_attn.q_proj.weight`, to arrays. A pure
function rebuilds the modules around them while it is traced, so every jitted program depends only on `(config, params)`
and its other arguments, and a part of a model is a part of the dictionary.
"""

from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from deepstack_jax.config import ModelConfig
from deepstack_jax.models.registry import build_module

Params = dict[str, jax.Array]


def model_dtype(config: ModelConfig) -> np.dtype:
    """Returns the dtype of weights, cache and visual rows.

    Raises:
        ValueError: the configuration names no dtype.
    """
    if config.dtype is None:
        raise ValueError("the configuration names no dtype: set one, as dataclasses.replace(config, dtype='bfloat16')")
    return jnp.dtype(config.dtype)


def flat_params(module: nnx.Module) -> Params:
    """Returns the parameters of a module by dotted path."""
    return {_dotted(path): variable[...] for path, variable in nnx.to_flat_state(nnx.state(module, nnx.Param))}


def merge_params(config: ModelConfig, params: Params) -> Any:
    """Returns the modules around `params`. Parts whose parameters are missing have only shapes and can't be run."""
    graphdef, declared = _declared(config)
    state = {path: variable.replace(params.get(_dotted(path), variable.get_value())) for path, variable in declared}
    return nnx.merge(graphdef, nnx.from_flat_state(state))


def abstract_params(config: ModelConfig, dtype: DTypeLike = jnp.float32) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shape of every parameter by dotted path, each with the given dtype."""
    shapes = ((path, variable.get_value().shape) for path, variable in _declared(config)[1])
    return {_dotted(path): jax.ShapeDtypeStruct(shape, dtype) for path, shape in shapes}


def logical_axes(config: ModelConfig) -> dict[str, tuple[str | None, ...]]:
    """Returns the logical axes of every parameter by dotted path, one name (or None) per dimension."""
    return {_dotted(path): variable.get_metadata("out_sharding") for path, variable in _declared(config)[1]}


def init_params(config: ModelConfig, seed: int = 0, dtype: DTypeLike = jnp.float32) -> Params:
    """Returns random parameters by dotted path, drawn by the initialisers of their declarations."""
    # This runs op by op: one program for all parameters takes longer to compile than the ops take to run.
    return flat_params(build_module(config, dtype=dtype, rngs=nnx.Rngs(seed)))


@lru_cache(maxsize=32)
def _declared(config: ModelConfig) -> tuple[nnx.GraphDef[Any], list[tuple[Any, Any]]]:
    """Returns the modules without their parameters, and each parameter's path and declaration."""
    # names and shapes don't depend on the dtype, and a model that is run has one of these
    dtype = config.dtype if config.dtype in ("float32", "bfloat16", "float16") else jnp.float32
    model = nnx.eval_shape(lambda: build_module(config, dtype=dtype, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(model)
    return graphdef, list(nnx.to_flat_state(state))


def _dotted(path: Any) -> str:
    return ".".join(str(key) for key in path)
