"""A model's parameters as one flat dictionary, separate from its modules.

The dictionary maps dotted paths, such as `language_model.model.layers.0.self_attn.q_proj.weight`, to arrays. A pure
function rebuilds the modules around them while it is traced, so every jitted program depends only on `(config, params)`
and its other arguments, and a part of a model is a part of the dictionary.
"""

import logging
from collections import defaultdict
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from deepstack_jax import sharding
from deepstack_jax.config import ModelConfig
from deepstack_jax.models.registry import build_module

Params = dict[str, jax.Array]

_log = logging.getLogger(__name__)


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


def param_shardings(
    config: ModelConfig, mesh: Mesh | AbstractMesh, dtype: DTypeLike = jnp.float32
) -> dict[str, NamedSharding]:
    """Returns the sharding of every parameter by dotted path, by its logical axes (sharding.py).

    A dimension that the mesh doesn't divide, or heads that it doesn't divide into whole ones, are on every device; a
    warning names such parameters and their bytes in `dtype`.

    Raises:
        ValueError: the mesh has another axis than `data` and `tensor`, a logical axis has no rule, or two dimensions
            of one parameter are on the same mesh axis.
    """
    mesh = sharding.canonical(mesh)
    shapes, placed = abstract_params(config, dtype), dict[str, NamedSharding]()
    whole: dict[tuple[str, int], list[str]] = defaultdict(list)  # paths by logical axis and number of parts
    for path, axes in logical_axes(config).items():
        spec: list[sharding.MeshAxes] = []
        for logical, size in zip(axes, shapes[path].shape, strict=True):
            count = _parts(config, logical, size)
            spec.append(sharding.split(count, logical, mesh) if logical else ())
            if logical and sharding.ways(spec[-1], mesh) < sharding.ways(sharding.RULES.of(logical), mesh):
                whole[logical, count].append(path)
        used = [axis for axes in spec for axis in axes]
        if len(used) != len(set(used)):
            raise ValueError(f"{path}: logical axes {axes} put two dimensions on one mesh axis {used}")
        placed[path] = NamedSharding(mesh, PartitionSpec(*(axes or None for axes in spec)))
    for (logical, count), paths in whole.items():
        held = sum(sharding.bytes_held(shapes[path], placed[path]) for path in paths)
        others = f" and {len(paths) - 1} more" if paths[1:] else ""
        _log.warning(
            f"mesh {sharding.describe(mesh)} doesn't divide the {count} parts of {logical}: "
            f"each device holds {held:,} bytes of {paths[0]}{others}"
        )
    return placed


def _parts(config: ModelConfig, logical: str | None, size: int) -> int:
    """Returns into how many equal parts a dimension may be split: one of heads only into whole heads."""
    heads = {"heads": config.text.num_attention_heads, "kv_heads": config.text.num_key_value_heads}
    return heads.get(logical or "", size)


def init_params(config: ModelConfig, seed: int = 0, dtype: DTypeLike = jnp.float32) -> Params:
    """Returns random parameters by dotted path, drawn by the initialisers of their declarations."""
    # This runs op by op: one program for all parameters takes longer to compile than the ops take to run.
    return flat_params(build_module(config, dtype=dtype, rngs=nnx.Rngs(seed)))


@lru_cache(maxsize=32)
def _declared(config: ModelConfig) -> tuple[nnx.GraphDef[Any], list[tuple[Any, Any]]]:
    """Returns the modules without their parameters, and each parameter's path and declaration."""
    # names and shapes don't depend on the dtype, and a model that is run has one of these
    dtype = config.dtype if config.dtype in ("float32", "bfloat16", "float16") else jnp.float32
    # without the mesh of a program that is being traced: Flax would look for logical axes among its axes
    with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
        model = nnx.eval_shape(lambda: build_module(config, dtype=dtype, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(model)
    return graphdef, list(nnx.to_flat_state(state))


def _dotted(path: Any) -> str:
    return ".".join(str(key) for key in path)
