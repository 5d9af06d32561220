"""The compiled programs: vision encoding, prefill chunks, decoding, and logits of whole prompts.

Each is a pure function of `(config, params)` and arrays of fixed shapes. An engine compiles one encode program per
bucket of patches, one prefill program per width of prompt pieces, and one decode program. The library, whole servers
and split servers run the same programs. They run on the mesh of their parameters (sharding.py), with every state and
result placed explicitly: rows over `data`, what the host reads on every device.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Int32, UInt8

from deepstack_jax import sharding
from deepstack_jax.config import ModelConfig
from deepstack_jax.models.param import AnyArray
from deepstack_jax.models.parameters import Params, merge_params, model_dtype
from deepstack_jax.models.qwen3_moe import PagedKVCache
from deepstack_jax.models.vision import PatchGeometry, VisualRows, separate_deepstack_embeds
from deepstack_jax.rounding import cdiv
from deepstack_jax.sampling import (
    END_TOKENS,
    Logprobs,
    SamplingParams,
    TokenMask,
    count_tokens,
    log_probabilities,
    no_logprobs,
    sample,
    wants_logprobs,
)

DECODE_BUFFER = 64  # the most steps per decode call


@no_type_check  # JAX puts shapes, specifications and placeholders into it as well
@jax.tree_util.register_dataclass
@dataclass
class PromptArrays:
    """Tokens of B rows, padded at the end to T, with the visual rows and their places (None for text)."""

    input_ids: Int[AnyArray, "B T"]
    position_ids: Int[AnyArray, "3 B T"]
    lengths: Int[AnyArray, " B"]
    rope_deltas: Int[AnyArray, " B"]
    visual_index: Int[AnyArray, "B T"] | None = None
    rows: VisualRows | None = None  # rows of the images and videos, one after another


@no_type_check  # the same
@jax.tree_util.register_dataclass
@dataclass
class PromptChunk:
    """Pieces of R prompts, padded at the end to W tokens, with the decode rows of prompts that end here."""

    input_ids: Int[AnyArray, "R W"]
    position_ids: Int[AnyArray, "3 R W"]
    starts: Int[AnyArray, " R"]  # slot of each piece's first token, a multiple of the page
    counts: Int[AnyArray, " R"]  # tokens of each piece, 0 for an unused row
    page_table: Int[AnyArray, "R P"]
    rows: Int[AnyArray, " R"]  # the decode row that takes over a prompt whose last piece this is, otherwise B
    rope_deltas: Int[AnyArray, " R"]
    limits: Int[AnyArray, " R"]  # maximum tokens of each answer
    seen: UInt8[AnyArray, "R V"]  # sampling.IN_PROMPT for each token of the whole prompt; read only for last pieces
    sampling: SamplingParams  # of R rows
    mask: TokenMask  # of the first tokens
    visual_index: Int[AnyArray, "R W"] | None = None  # None for text models
    visual_rows: VisualRows | None = None  # rows of the pieces' visual tokens


@no_type_check  # the same
@jax.tree_util.register_dataclass
@dataclass
class EngineState:
    """An engine's state on the device: KV pages and B decode rows. It is donated to each program, which returns it.

    On a mesh, rows and pages are split over `data`, and page numbers count within a row's part of the pages.
    """

    cache: PagedKVCache  # its page table is that of the decode rows
    last: Int[Array, " B"]  # the newest token, not yet in the cache
    lengths: Int[Array, " B"]  # tokens in the cache
    made: Int[Array, " B"]  # tokens of the answer so far
    limits: Int[Array, " B"]
    rope_deltas: Int[Array, " B"]
    done: Bool[Array, " B"]
    seen: Int32[Array, "B V"]  # sampling.IN_PROMPT, and sampling.GENERATED for each time in the answer
    sampling: SamplingParams

    @staticmethod
    def empty(config: ModelConfig, rows: int, num_pages: int, page: int, end_tokens: int = END_TOKENS) -> "EngineState":
        """Returns a state of zeros with `num_pages` pages in all: all rows have ended, and no page was written."""
        last, lengths, made, limits, deltas = (jnp.zeros(rows, jnp.int32) for _ in range(5))
        table = jnp.zeros((rows, cdiv(config.text.max_position_embeddings, page)), jnp.int32)
        sampling = jax.tree.map(jnp.asarray, SamplingParams.of(rows, end_token_ids=[-1] * end_tokens))
        cache = PagedKVCache.empty(config.text, num_pages, page, table, model_dtype(config))
        seen = jnp.zeros((rows, config.text.vocab_size), jnp.int32)
        done = jnp.ones(rows, bool)
        return _placed(EngineState(cache, last, lengths, made, limits, deltas, done, seen, sampling))


@sharding.on_mesh_of(argument=1)
@partial(jax.jit, static_argnums=0)
def encode_vision(
    config: ModelConfig, params: Params, pixel_values: Float[Array, "G P C"], geometry: PatchGeometry
) -> Float[Array, "G M R"]:
    """Returns rows [G, P / merge^2, (1+N)*D] of G images or videos of one bucket, in the model's dtype.

    It needs only the `visual.` parameters. Each image is computed separately, so the bits of its rows don't depend on
    the others. The geometry's arrays have a leading G as well. On a mesh that divides G, each device encodes its part
    of the images.
    """

    def each(params: Params, pixel_values: jax.Array, geometry: PatchGeometry) -> jax.Array:
        def one(item: tuple[jax.Array, PatchGeometry]) -> jax.Array:
            return merge_params(config, params).visual(*item)

        if len(pixel_values) == 1:
            return one(jax.tree.map(lambda x: x[0], (pixel_values, geometry)))[None]
        return jax.lax.map(one, (pixel_values, geometry))

    with precision_of(config):
        of_images = PartitionSpec(sharding.split(len(pixel_values), "image") or None)
        run = sharding.each_device(each, (PartitionSpec(), of_images, of_images), of_images)
        return sharding.constrain(run(params, jnp.asarray(pixel_values), jax.tree.map(jnp.asarray, geometry)))


@sharding.on_mesh_of(argument=1)
@partial(jax.jit, static_argnums=0, donate_argnums=1)
def write_rows(
    config: ModelConfig,
    rows: VisualRows,
    part: Float[Array, "m R"] | VisualRows,
    first: Int[Array, ""],
    skip: Int[Array, ""],
    count: Int[Array, ""],
) -> VisualRows:
    """Returns `rows` (donated) with `count` rows from `first` on replaced by those of `part` from `skip` on."""
    place = jnp.arange(len(rows.embeds)) - first
    inside = ((place >= 0) & (place < count))[:, None]

    def taken(source: jax.Array) -> jax.Array:
        return source[jnp.clip(place + skip, 0, len(source) - 1)]

    if isinstance(part, VisualRows):
        new = jax.tree.map(taken, part)
    else:
        new = separate_deepstack_embeds(taken(part), config.num_deepstack_levels)
    return jax.tree.map(lambda new, old: sharding.constrain(jnp.where(inside, new, old)), new, rows)


@sharding.on_mesh_of(argument=0)
@partial(jax.jit, donate_argnums=0)
def scale_deepstack(deepstack: Float[Array, "M ND"], scales: Float[AnyArray, "M N"]) -> Float[Array, "M ND"]:
    """Returns DeepStack rows (donated) with level i of row m multiplied by scales[m, i]; a 1 leaves its bits."""
    factors = jnp.repeat(jnp.asarray(scales, jnp.float32), deepstack.shape[1] // scales.shape[1], axis=1)
    return sharding.constrain((deepstack * factors).astype(deepstack.dtype))


def empty_rows(config: ModelConfig, height: int, mesh: Mesh | None = None) -> VisualRows:
    """Returns `height` visual rows of zeros in the model's dtype, on every device of a mesh."""
    width, levels = config.text.hidden_size, config.num_deepstack_levels
    widths = (width, levels * width) if levels else (width,)
    where = sharding.replicated(mesh)
    return VisualRows(*(jnp.zeros((height, each), model_dtype(config), device=where) for each in widths))


@sharding.on_mesh_of(argument=1)
@partial(jax.jit, static_argnums=0)
def all_logits(config: ModelConfig, params: Params, prompt: PromptArrays) -> Float[Array, "B T V"]:
    """Returns float32 logits of every token."""
    with precision_of(config):
        return sharding.constrain(merge_params(config, params).language_model(**language_inputs(prompt))[0])


@sharding.on_mesh_of(argument=1)
@partial(jax.jit, static_argnums=0, donate_argnums=2)
def prefill_chunk(
    config: ModelConfig, params: Params, state: EngineState, chunk: PromptChunk
) -> tuple[EngineState, Int[Array, " R"], Logprobs]:
    """Writes the keys and values of R pieces of prompts into their pages.

    A prompt whose last piece is in the chunk samples its first token and takes over its decode row.

    Returns:
        the state, the first token of each prompt that ends in the chunk, and its log probabilities if any of the
        prompts wants them; the other values have no meaning.
    """
    counts, rows = jnp.asarray(chunk.counts), jnp.asarray(chunk.rows)
    column = jnp.arange(chunk.input_ids.shape[1])
    slots = jnp.where(column < counts[:, None], jnp.asarray(chunk.starts)[:, None] + column, -1)
    embeds, deepstack = chunk.visual_rows or (None, None)
    model = merge_params(config, params).language_model
    with precision_of(config):
        hidden, cache = model.model(
            jnp.asarray(chunk.input_ids),
            jnp.asarray(chunk.position_ids),
            slots=slots,
            cache=replace(state.cache, page_table=jnp.asarray(chunk.page_table)),
            input_embeds=embeds,
            input_deepstack_embeds=deepstack,
            visual_index=None if chunk.visual_index is None else jnp.asarray(chunk.visual_index),
        )
        assert isinstance(cache, PagedKVCache)
        state = replace(state, cache=replace(cache, page_table=state.cache.page_table))
        at_end = jnp.take_along_axis(hidden, jnp.maximum(counts - 1, 0)[:, None, None], axis=1)[:, 0]

        def first_tokens() -> tuple[jax.Array, Logprobs]:
            logits = model.logits(at_end)
            tokens = sample(logits, seen, chunk.sampling, jnp.int32(0), ends, chunk.mask)
            return tokens, log_probabilities(logits, tokens, wants_logprobs(chunk.sampling, ends))

        seen, ends = jnp.asarray(chunk.seen).astype(state.seen.dtype), rows < len(state.last)
        nothing = jnp.zeros(len(rows), jnp.int32), no_logprobs(len(rows))
        tokens, logprobs = jax.lax.cond(jnp.any(ends), first_tokens, lambda: nothing)
    return _placed(_begin_rows(state, chunk, tokens)), *jax.tree.map(sharding.constrain, (tokens, logprobs))


@sharding.on_mesh_of(argument=1)
@partial(jax.jit, static_argnums=0, donate_argnums=2)
def decode_loop(
    config: ModelConfig,
    params: Params,
    state: EngineState,
    running: Bool[AnyArray, " B"],
    steps: Int[AnyArray, ""],
    leave_on_end: Bool[AnyArray, ""],
    mask: TokenMask,
    rows: Int[AnyArray, " b"] | None = None,
) -> tuple[EngineState, Int[Array, "b N"], Logprobs]:
    """Generates up to `steps` tokens, at most DECODE_BUFFER, in each of the `running` rows that have not ended.

    This is one loop on the device, which updates the pages in place. It stops when all rows have ended, or with
    `leave_on_end` as soon as one has. With `rows`, a program of that many rows computes only these, each named once.
    `mask` is that of every step: a row whose mask changes takes one step per call.

    Returns:
        the state, the tokens of each row (of `rows`) from column 0 on, -1 where it generated none, and their log
        probabilities [b, N] in the steps in which any of the rows wanted them.
    """
    if rows is not None:
        taken = jnp.asarray(rows)
        whole, part = _rows_of(state), jax.tree.map(lambda x: x[taken], _rows_of(state))
        part, *made = decode_loop(
            config,
            params,
            _with_pages(part, state.cache),
            jnp.asarray(running)[taken],
            steps,
            leave_on_end,
            jax.tree.map(lambda x: jnp.asarray(x)[taken], mask),
        )
        put = jax.tree.map(lambda old, new: old.at[taken].set(new), whole, _rows_of(part))
        return _with_pages(put, part.cache), *made
    model = merge_params(config, params).language_model

    def unfinished(carry: tuple[jax.Array, Any, EngineState]) -> jax.Array:
        step, _, state = carry
        live = jnp.asarray(running) & ~state.done
        whole = jnp.any(live) & (~jnp.asarray(leave_on_end) | (step == 0) | jnp.all(live == began))
        return (step < steps) & whole

    def next_token(carry: tuple[jax.Array, Any, EngineState]) -> tuple[jax.Array, Any, EngineState]:
        step, made, state = carry
        live = jnp.asarray(running) & ~state.done
        slots = jnp.where(live, state.lengths, -1)[:, None]
        positions = jnp.broadcast_to(slots + state.rope_deltas[:, None], (3, *slots.shape))
        hidden, cache = model.model(state.last[:, None], positions, slots=slots, cache=state.cache)
        assert isinstance(cache, PagedKVCache)
        logits = model.logits(hidden[:, 0])
        token = sample(logits, state.seen, state.sampling, state.made, live, mask)
        logprobs = log_probabilities(logits, token, wants_logprobs(state.sampling, live))
        state = _placed(_append(replace(state, cache=cache), token, live))

        def put(made: jax.Array, of_step: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(made, of_step[:, None], step, axis=1)

        return step + 1, jax.tree.map(put, made, (jnp.where(live, token, -1), logprobs)), state

    began = jnp.asarray(running) & ~state.done
    size = len(state.last), DECODE_BUFFER
    made = jnp.full(size, -1, jnp.int32), no_logprobs(*size)
    with precision_of(config):
        _, made, state = jax.lax.while_loop(unfinished, next_token, (jnp.int32(0), made, _placed(state)))
    return state, *jax.tree.map(sharding.constrain, made)


def language_inputs(prompt: PromptArrays) -> dict[str, Any]:
    """Returns the arguments of `Qwen3MoeForCausalLM` for a prompt, including its visual rows."""
    embeds, deepstack = prompt.rows or (None, None)
    return {
        "input_ids": jnp.asarray(prompt.input_ids),
        "position_ids": jnp.asarray(prompt.position_ids),
        "input_embeds": embeds,
        "input_deepstack_embeds": deepstack,
        "visual_index": None if prompt.visual_index is None else jnp.asarray(prompt.visual_index),
    }


def precision_of(config: ModelConfig) -> AbstractContextManager[object]:
    """Returns a context in which float32 models compute full float32 products.

    By default, TPUs and NVIDIA GPUs compute them with bfloat16 or tf32 passes.
    """
    return jax.default_matmul_precision("highest" if model_dtype(config) == jnp.float32 else "default")


def _begin_rows(state: EngineState, chunk: PromptChunk, tokens: jax.Array) -> EngineState:
    """Returns the state in which each prompt that ended in a chunk has its decode row and its first token."""
    new = replace(
        state,
        cache=replace(state.cache, keys=(), values=(), page_table=chunk.page_table),
        last=tokens,
        lengths=jnp.asarray(chunk.starts) + jnp.asarray(chunk.counts),
        made=jnp.ones_like(tokens),
        limits=chunk.limits,
        rope_deltas=chunk.rope_deltas,
        done=_ends(tokens, chunk.sampling) | (jnp.asarray(chunk.limits) <= 1),
        seen=count_tokens(jnp.asarray(chunk.seen).astype(state.seen.dtype), tokens[:, None]),
        sampling=chunk.sampling,
    )
    rows = jnp.asarray(chunk.rows)
    begun = jax.tree.map(lambda old, new: old.at[rows].set(jnp.asarray(new), mode="drop"), _rows_of(state), new)
    return _with_pages(begun, state.cache)


def _placed(state: EngineState) -> EngineState:
    """Returns the state with its rows and pages where the mesh's rules have them."""
    rows = jax.tree.map(lambda x: sharding.constrain(x, "slots"), _rows_of(state))
    keys, values = (
        tuple(sharding.constrain(x, "slots", "kv_heads") for x in pages)
        for pages in (state.cache.keys, state.cache.values)
    )
    return _with_pages(rows, replace(state.cache, keys=keys, values=values))


def _rows_of(state: EngineState) -> EngineState:
    """Returns a state with only the arrays that have decode rows, that is, without the pages."""
    return replace(state, cache=replace(state.cache, keys=(), values=()))


def _with_pages(rows: EngineState, cache: PagedKVCache) -> EngineState:
    """Returns `rows` with the pages of `cache`."""
    return replace(rows, cache=replace(cache, page_table=rows.cache.page_table))


def _append(state: EngineState, tokens: jax.Array, live: jax.Array) -> EngineState:
    """Returns the state after each live row generated its token."""
    made = state.made + live
    return replace(
        state,
        last=jnp.where(live, tokens, state.last),
        lengths=state.lengths + live,
        made=made,
        done=state.done | (live & (_ends(tokens, state.sampling) | (made >= state.limits))),
        seen=count_tokens(state.seen, jnp.where(live, tokens, -1)[:, None]),
    )


def _ends(tokens: jax.Array, sampling: SamplingParams) -> jax.Array:
    return jnp.any(tokens[:, None] == jnp.asarray(sampling.end_token_ids), axis=1)
