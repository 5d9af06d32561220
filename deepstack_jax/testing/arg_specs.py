"""Shapes and dtypes of the compiled programs' arguments, to compile them without data."""

import jax
import jax.numpy as jnp

from deepstack_jax.config import ModelConfig
from deepstack_jax.programs import EngineState, PromptChunk, empty_rows
from deepstack_jax.sampling import SamplingParams


def state_specs(config: ModelConfig, slots: int, num_pages: int, page: int = 128) -> EngineState:
    """Returns the shapes of an engine's state with `slots` decode rows and `num_pages` KV pages."""
    return jax.eval_shape(lambda: EngineState.empty(config, slots, num_pages, page))


def chunk_specs(config: ModelConfig, state: EngineState, width: int) -> PromptChunk:
    """Returns the shapes of a chunk of one prompt: `width` tokens, and as many visual rows."""
    shapes = (1, width), (3, 1, width), (1,), (1,), (1, state.cache.page_table.shape[1]), (1,), (1,), (1,)

    def chunk() -> PromptChunk:
        seen = jnp.zeros((1, config.text.vocab_size), jnp.uint8)
        sampling = jax.tree.map(jnp.asarray, SamplingParams.of(1))
        numbers = (jnp.zeros(shape, jnp.int32) for shape in shapes)
        index, rows = jnp.zeros((1, width), jnp.int32), empty_rows(config, width)
        return PromptChunk(*numbers, seen=seen, sampling=sampling, visual_index=index, visual_rows=rows)

    return jax.eval_shape(chunk)
