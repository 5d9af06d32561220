"""The whole model of each family, and its parameters as one flat dictionary.

Parameters live outside the modules as `{dotted path: array}`, such as
`language_model.model.layers.0.self_attn.q_proj.weight`.
A pure function rebuilds the modules around them while it is traced, so everything jitted depends on `(config, params)`
alone, and a part of a model is a part of the dictionary.
"""

from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from deepstack_jax.config import ModelConfig
from deepstack_jax.models.qwen3_moe import Qwen3MoeForCausalLM
from deepstack_jax.models.vision import VisionEncoder

Params = dict[str, jax.Array]


class Qwen3VLMoeForConditionalGeneration(nnx.Module):
    """A vision encoder beside the text model; text families have no `visual`."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        if config.vision:
            self.visual = VisionEncoder(config.vision, dtype=dtype, rngs=rngs)
        self.language_model = Qwen3MoeForCausalLM(config.text, dtype=dtype, rngs=rngs)


def build(config: ModelConfig, params: Params) -> Qwen3VLMoeForConditionalGeneration:
    """The modules around `params`. Parts whose parameters are missing are there in shape only and can't be run."""
    graphdef, declared = _declared(config)
    state = {path: variable.replace(params.get(_dotted(path), variable.get_value())) for path, variable in declared}
    return nnx.merge(graphdef, nnx.from_flat_state(state))


def abstract_params(config: ModelConfig, dtype: DTypeLike = jnp.float32) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every parameter, by dotted path."""
    shapes = ((path, variable.get_value().shape) for path, variable in _declared(config)[1])
    return {_dotted(path): jax.ShapeDtypeStruct(shape, dtype) for path, shape in shapes}


def logical_axes(config: ModelConfig) -> dict[str, tuple[str | None, ...]]:
    """The logical axes of every parameter, by dotted path."""
    return {_dotted(path): variable.logical_axes for path, variable in _declared(config)[1]}


def init_params(config: ModelConfig, seed: int = 0, dtype: DTypeLike = jnp.float32) -> Params:
    """Random parameters, as each one's declaration says."""

    @jax.jit
    def init() -> Params:
        model = Qwen3VLMoeForConditionalGeneration(config, dtype=dtype, rngs=nnx.Rngs(seed))
        return {_dotted(path): variable[...] for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))}

    return init()


@lru_cache(maxsize=32)
def _declared(config: ModelConfig) -> tuple[nnx.GraphDef[Any], list[tuple[Any, Any]]]:
    """The modules without their parameters, and each parameter's path and declaration."""
    model = nnx.eval_shape(lambda: Qwen3VLMoeForConditionalGeneration(config, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(model)
    return graphdef, list(nnx.to_flat_state(state))


def _dotted(path: Any) -> str:
    return ".".join(str(key) for key in path)
