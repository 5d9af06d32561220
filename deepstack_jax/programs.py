"""The compiled programs: encode, prefill, decode, and logits of whole prompts.

Each is a pure function of `(config, params)` and arrays in bucketed shapes. A server compiles one encode program per
bucket of patches, one prefill program per bucket of prompt (and of visual tokens) and one decode program per bucket of
cache. Whole and split serving run the same programs.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from deepstack_jax.config import ModelConfig
from deepstack_jax.models.param import AnyArray
from deepstack_jax.models.parameters import Params, merge_params, model_dtype
from deepstack_jax.models.qwen3_moe import KVCache
from deepstack_jax.models.vision import PatchGeometry, VisualRows, separate_deepstack_embeds
from deepstack_jax.sampling import GENERATED, IN_PROMPT, SamplingParams, mark_seen, sample


@no_type_check  # JAX puts shapes, specifications and placeholders into it as well
@jax.tree_util.register_dataclass
@dataclass
class PromptArrays:
    """Tokens of B rows, padded at the end to T, and what places the visual rows among them (None for text alone)."""

    input_ids: Int[AnyArray, "B T"]
    position_ids: Int[AnyArray, "3 B T"]
    lengths: Int[AnyArray, " B"]
    rope_deltas: Int[AnyArray, " B"]
    visual_index: Int[AnyArray, "B T"] | None = None
    rows: VisualRows | None = None  # of its images and videos, one after another


@no_type_check  # the same
@jax.tree_util.register_dataclass
@dataclass
class DecodeState:
    """Everything that decoding carries from token to token; donated to `decode_loop` and returned by it."""

    cache: KVCache
    tokens: Int[Array, "B S"]  # the answers, filled up with the pad token
    lengths: Int[Array, " B"]  # tokens of each answer, its end token included
    last: Int[Array, " B"]  # the newest token, not yet in the cache
    slots: Int[Array, " B"]  # where `last` goes in the cache
    rope_deltas: Int[Array, " B"]
    done: Bool[Array, " B"]
    seen: UInt8[Array, "B V"]  # bits of sampling.IN_PROMPT and sampling.GENERATED
    step: Int[Array, ""]  # tokens made so far


@partial(jax.jit, static_argnums=0)
def encode_vision(
    config: ModelConfig, params: Params, pixel_values: Float[Array, "G P C"], geometry: PatchGeometry
) -> Float[Array, "G M R"]:
    """Rows [G, P / merge^2, (1+N)*D] of G images or videos of one bucket, in the model's dtype.

    Needs the `visual.` parameters alone. Each is computed as if it were alone, so its rows are the same bits whatever
    comes with it; the geometry's arrays have a leading G as well.
    """

    def one(item: tuple[jax.Array, PatchGeometry]) -> jax.Array:
        return merge_params(config, params).visual(*item)

    with precision_of(config):
        if len(pixel_values) == 1:
            return one(jax.tree.map(lambda x: x[0], (pixel_values, geometry)))[None]
        return jax.lax.map(one, (pixel_values, geometry))


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def write_rows(
    config: ModelConfig,
    rows: VisualRows,
    part: Float[Array, "m R"],
    first: Int[Array, ""],
    count: Int[Array, ""],
) -> VisualRows:
    """`rows` with rows `first` to `first + count` taken from the start of `part`, as `encode_vision` returned it."""
    source = jnp.arange(len(rows.embeds)) - first
    inside = ((source >= 0) & (source < count))[:, None]
    taken = part[jnp.clip(source, 0, len(part) - 1)]
    return jax.tree.map(partial(jnp.where, inside), separate_deepstack_embeds(taken, config.num_deepstack_levels), rows)


@partial(jax.jit, static_argnums=0)
def all_logits(config: ModelConfig, params: Params, prompt: PromptArrays) -> Float[Array, "B T V"]:
    """float32 logits at every token."""
    with precision_of(config):
        return merge_params(config, params).language_model(**language_inputs(prompt))[0]


@partial(jax.jit, static_argnums=(0, 1))
def prefill(
    config: ModelConfig, capacity: int, params: Params, prompt: PromptArrays, sampling: SamplingParams
) -> DecodeState:
    """Runs the prompt, fills a new cache of `capacity` slots a row and draws the first token."""
    batch = prompt.input_ids.shape[0]
    with precision_of(config):
        cache = KVCache.empty(config.text, batch, capacity, model_dtype(config))
        model = merge_params(config, params).language_model
        hidden, cache = model.model(cache=cache, **language_inputs(prompt))
        assert cache is not None
        lengths = jnp.asarray(prompt.lengths)
        at_end = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
        logits = model.logits(at_end)
    in_row = jnp.arange(prompt.input_ids.shape[1]) < lengths[:, None]
    seen = jnp.zeros((batch, config.text.vocab_size), jnp.uint8)
    state = DecodeState(
        cache=cache,
        tokens=jnp.broadcast_to(jnp.asarray(sampling.pad_token_id), (batch, capacity)),
        lengths=jnp.zeros(batch, jnp.int32),
        last=jnp.zeros(batch, jnp.int32),
        slots=lengths - 1,
        rope_deltas=jnp.asarray(prompt.rope_deltas),
        done=jnp.zeros(batch, bool),
        seen=mark_seen(seen, jnp.where(in_row, jnp.asarray(prompt.input_ids), -1), IN_PROMPT),
        step=jnp.zeros((), jnp.int32),
    )
    return _append(state, logits, sampling)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def decode_loop(
    config: ModelConfig, params: Params, state: DecodeState, sampling: SamplingParams, limit: Int[Array, ""]
) -> DecodeState:
    """Goes on until every answer has `limit` tokens or its end token. One loop on the device, the cache in place."""

    def unfinished(state: DecodeState) -> jax.Array:
        return (state.step < limit) & ~jnp.all(state.done)

    def next_token(state: DecodeState) -> DecodeState:
        slots = state.slots[:, None]
        positions = jnp.broadcast_to(slots + state.rope_deltas[:, None], (3, *slots.shape))
        model = merge_params(config, params).language_model
        hidden, cache = model.model(state.last[:, None], positions, slots=slots, cache=state.cache)
        assert cache is not None
        return _append(replace(state, cache=cache), model.logits(hidden[:, 0]), sampling)

    with precision_of(config):
        return jax.lax.while_loop(unfinished, next_token, state)


def language_inputs(prompt: PromptArrays) -> dict[str, Any]:
    """The arguments of `Qwen3MoeForCausalLM` for a prompt, its visual rows included."""
    embeds, deepstack = prompt.rows or (None, None)
    return {
        "input_ids": jnp.asarray(prompt.input_ids),
        "position_ids": jnp.asarray(prompt.position_ids),
        "input_embeds": embeds,
        "input_deepstack_embeds": deepstack,
        "visual_index": None if prompt.visual_index is None else jnp.asarray(prompt.visual_index),
    }


def precision_of(config: ModelConfig) -> AbstractContextManager[object]:
    """float32 models compute float32 products: the default of TPU and NVIDIA is bfloat16 or tf32 passes."""
    return jax.default_matmul_precision("highest" if model_dtype(config) == jnp.float32 else "default")


def _append(state: DecodeState, logits: jax.Array, sampling: SamplingParams) -> DecodeState:
    """Draws each row's next token and records it, unless the row has ended."""
    token = sample(logits, state.seen, sampling, state.step)
    token = jnp.where(state.done, sampling.pad_token_id, token)
    running = ~state.done
    return replace(
        state,
        tokens=jax.lax.dynamic_update_slice_in_dim(state.tokens, token[:, None], state.step, axis=1),
        lengths=state.lengths + running,
        last=token,
        slots=state.slots + 1,
        done=state.done | jnp.isin(token, sampling.end_token_ids),
        seen=mark_seen(state.seen, jnp.where(running, token, -1)[:, None], GENERATED),
        step=state.step + 1,
    )
