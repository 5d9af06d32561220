"""The engine of before, to measure against: one request at a time, over a contiguous cache of its own.

A whole prompt is one program per bucket of its length, and a cache one decode program per bucket of its capacity. It
takes text only.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, UInt8

from deepstack_jax.checkpoint import Model
from deepstack_jax.config import ModelConfig
from deepstack_jax.models.parameters import Params, merge_params, model_dtype
from deepstack_jax.models.qwen3_moe import KVCache
from deepstack_jax.processing.batch import bucket, prepare_batch
from deepstack_jax.programs import PromptArrays, language_inputs, precision_of
from deepstack_jax.sampling import IN_PROMPT, SamplingParams, count_tokens, sample


@no_type_check  # JAX puts shapes, specifications and placeholders into it as well
@jax.tree_util.register_dataclass
@dataclass
class DecodeState:
    """Everything that decoding carries from token to token; donated to `decode` and returned by it."""

    cache: KVCache
    tokens: Int[Array, "B S"]
    last: Int[Array, " B"]  # the newest token, not yet in the cache
    slots: Int[Array, " B"]  # where `last` goes in the cache
    rope_deltas: Int[Array, " B"]
    done: Bool[Array, " B"]
    seen: UInt8[Array, "B V"]
    step: Int[Array, ""]


def prefill(model: Model, ids: np.ndarray, max_new_tokens: int) -> DecodeState:
    """Runs prompts [B, T] and draws the first token of each."""
    batch = prepare_batch(model.config, ids)
    prompt = PromptArrays(batch.input_ids, batch.position_ids, batch.lengths, batch.rope_deltas)
    capacity = bucket(batch.input_ids.shape[1] + max_new_tokens)
    return _prefill(model.config, capacity, model.text_params, prompt, SamplingParams.of(len(ids)))


def decode(model: Model, state: DecodeState, until: int) -> DecodeState:
    """Goes on until every answer has `until` tokens."""
    sampling = SamplingParams.of(len(state.last))
    return _decode(model.config, model.text_params, state, sampling, np.int32(until))


@partial(jax.jit, static_argnums=(0, 1))
def _prefill(
    config: ModelConfig, capacity: int, params: Params, prompt: PromptArrays, sampling: SamplingParams
) -> DecodeState:
    batch = prompt.input_ids.shape[0]
    with precision_of(config):
        cache = KVCache.empty(config.text, batch, capacity, model_dtype(config))
        model = merge_params(config, params).language_model
        hidden, cache = model.model(cache=cache, **language_inputs(prompt))
        lengths = jnp.asarray(prompt.lengths)
        logits = model.logits(jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0])
    in_row = jnp.arange(prompt.input_ids.shape[1]) < lengths[:, None]
    in_prompt = jnp.where(in_row, jnp.asarray(prompt.input_ids), config.text.vocab_size)
    seen = jnp.zeros((batch, config.text.vocab_size), jnp.int32)
    state = DecodeState(
        cache=cache,
        tokens=jnp.zeros((batch, capacity), jnp.int32),
        last=jnp.zeros(batch, jnp.int32),
        slots=lengths - 1,
        rope_deltas=jnp.asarray(prompt.rope_deltas),
        done=jnp.zeros(batch, bool),
        seen=seen.at[jnp.arange(batch)[:, None], in_prompt].set(IN_PROMPT, mode="drop"),
        step=jnp.zeros((), jnp.int32),
    )
    return _append(state, logits, sampling)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _decode(
    config: ModelConfig, params: Params, state: DecodeState, sampling: SamplingParams, limit: Int[Array, ""]
) -> DecodeState:
    def unfinished(state: DecodeState) -> jax.Array:
        return (state.step < limit) & ~jnp.all(state.done)

    def next_token(state: DecodeState) -> DecodeState:
        slots = state.slots[:, None]
        positions = jnp.broadcast_to(slots + state.rope_deltas[:, None], (3, *slots.shape))
        model = merge_params(config, params).language_model
        hidden, cache = model.model(state.last[:, None], positions, slots=slots, cache=state.cache)
        return _append(replace(state, cache=cache), model.logits(hidden[:, 0]), sampling)

    with precision_of(config):
        return jax.lax.while_loop(unfinished, next_token, state)


def _append(state: DecodeState, logits: jax.Array, sampling: SamplingParams) -> DecodeState:
    token = sample(logits, state.seen, sampling, state.step)
    running = ~state.done
    ends = jnp.any(token[:, None] == jnp.asarray(sampling.end_token_ids), axis=1)
    return replace(
        state,
        tokens=jax.lax.dynamic_update_slice_in_dim(state.tokens, token[:, None], state.step, axis=1),
        last=token,
        slots=state.slots + 1,
        done=state.done | ends,
        seen=count_tokens(state.seen, jnp.where(running, token, -1)[:, None]),
        step=state.step + 1,
    )
