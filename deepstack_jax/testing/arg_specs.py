"""Shapes, dtypes and shardings of the compiled programs' arguments, to compile them without data."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from deepstack_jax import sharding
from deepstack_jax.config import ModelConfig
from deepstack_jax.models.parameters import abstract_params, model_dtype, param_shardings
from deepstack_jax.programs import EngineState, PromptChunk, empty_rows
from deepstack_jax.sampling import SamplingParams, TokenMask


def param_specs(config: ModelConfig, mesh: Mesh | None = None) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of all parameters by dotted path, in the model's dtype."""
    shapes = abstract_params(config, model_dtype(config))
    if mesh is None:
        return shapes
    placed = param_shardings(config, mesh, model_dtype(config))
    return {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed[path]) for path, leaf in shapes.items()}


def state_specs(
    config: ModelConfig, slots: int, num_pages: int, page: int = 128, mesh: Mesh | None = None
) -> EngineState:
    """Returns the shapes of an engine's state with `slots` decode rows and `num_pages` KV pages in all."""
    if mesh is None:
        return jax.eval_shape(lambda: EngineState.empty(config, slots, num_pages, page))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        state = jax.eval_shape(lambda: EngineState.empty(config, slots, num_pages, page))
    keys, values = (_on(mesh, pages, "slots", "kv_heads") for pages in (state.cache.keys, state.cache.values))
    rows = _on(mesh, replace(state, cache=replace(state.cache, keys=(), values=())), "slots")
    return replace(rows, cache=replace(rows.cache, keys=keys, values=values))


def chunk_specs(config: ModelConfig, state: EngineState, width: int, count: int = 1) -> PromptChunk:
    """Returns the shapes of chunks of `count` prompts: `width` tokens each, and as many visual rows."""
    table = state.cache.page_table.shape[1]
    shapes = (count, width), (3, count, width), (count,), (count,), (count, table), (count,), (count,), (count,)

    def chunk() -> PromptChunk:
        seen = jnp.zeros((count, config.text.vocab_size), jnp.uint8)
        sampling = jax.tree.map(jnp.asarray, SamplingParams.of(count))
        mask = TokenMask.none(count, config.text.vocab_size)
        numbers = (jnp.zeros(shape, jnp.int32) for shape in shapes)
        if config.vision is None:
            return PromptChunk(*numbers, seen=seen, sampling=sampling, mask=mask)
        index, rows = jnp.zeros((count, width), jnp.int32), empty_rows(config, count * width)
        return PromptChunk(*numbers, seen=seen, sampling=sampling, mask=mask, visual_index=index, visual_rows=rows)

    return jax.eval_shape(chunk)


def decode_limits(config: ModelConfig, slots: int) -> tuple[Any, ...]:
    """Returns the shapes of the last arguments of `decode_loop`: running rows, steps, when to leave, and the mask."""
    shapes: tuple[tuple[tuple[int, ...], Any], ...] = ((slots,), bool), ((), jnp.int32), ((), bool)
    running, steps, leave = (jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes)
    return running, steps, leave, jax.eval_shape(lambda: TokenMask.none(slots, config.text.vocab_size))


def _on[T](mesh: Mesh, tree: T, *logical: str) -> T:
    def place(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.sharding_of(x.shape, logical, mesh))

    return jax.tree.map(place, tree)
