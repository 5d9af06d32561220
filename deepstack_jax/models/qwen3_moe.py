"""The Qwen3-MoE text model, and Qwen3, which is the same with dense layers.

`Qwen3MoeForCausalLM` serves plain text, vision-language and the language side of a split: they differ only in whether
visual rows are given. References: transformers' qwen3_moe and qwen3_vl_moe; DeepStack (arXiv:2406.04334).
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import no_type_check

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from deepstack_jax import sharding
from deepstack_jax.config import TextConfig
from deepstack_jax.models.moe import DenseMLP, SparseMoE
from deepstack_jax.models.norm import RMSNorm
from deepstack_jax.models.param import Linear, param, product
from deepstack_jax.models.rope import Rotation, text_rotation
from pallas_kernels.attention import paged_attention, ranged_attention
from pallas_kernels.deepstack_add import deepstack_add
from pallas_kernels.norm_rope_append import norm_rope_append
from pallas_kernels.norm_rope_append.xla import norm_rope

# keys and values of one layer, [B, K, S, h], or [N, K, page, h] in pages
LayerCache = tuple[Float[Array, "_ K _ h"], Float[Array, "_ K _ h"]]


@no_type_check  # JAX puts shapes, specifications and placeholders into it as well
@jax.tree_util.register_dataclass
@dataclass
class KVCache:
    """Keys and values of every layer, each [B, K, S, h], which is the order in which decoding reads them.

    A row's tokens fill slots 0, 1, 2, ... without gaps, however its prompt was padded.
    """

    keys: tuple[Float[Array, "B K S h"], ...]
    values: tuple[Float[Array, "B K S h"], ...]

    @staticmethod
    def empty(config: TextConfig, batch: int, capacity: int, dtype: DTypeLike) -> "KVCache":
        """Returns zeros for `batch` rows of `capacity` slots."""
        shape = (batch, _cached_heads(config), capacity, config.head_dim)
        layers = range(config.num_hidden_layers)
        return KVCache(tuple(jnp.zeros(shape, dtype) for _ in layers), tuple(jnp.zeros(shape, dtype) for _ in layers))


@no_type_check  # the same
@jax.tree_util.register_dataclass
@dataclass
class PagedKVCache:
    """Keys and values of every layer in pages that rows of any length share.

    Slot s of row b is in page `page_table[b, s // page]`. Inactive tokens write to page 0, which is never read. On a
    mesh, each part of the rows has its own part of the pages, and a page table counts within that part.
    """

    keys: tuple[Float[Array, "N K page h"], ...]
    values: tuple[Float[Array, "N K page h"], ...]
    page_table: Int[Array, "B P"]

    @staticmethod
    def empty(config: TextConfig, num_pages: int, page: int, page_table: Array, dtype: DTypeLike) -> "PagedKVCache":
        """Returns zeros: `num_pages` pages of `page` slots per layer."""
        shape = (num_pages, _cached_heads(config), page, config.head_dim)
        layers = range(config.num_hidden_layers)
        keys, values = (tuple(jnp.zeros(shape, dtype) for _ in layers) for _ in range(2))
        return PagedKVCache(keys, values, page_table)


class Attention(nnx.Module):
    """Grouped-query attention with normalised queries and keys."""

    def __init__(self, config: TextConfig, layer: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        hidden, head_dim, bias = config.hidden_size, config.head_dim, config.attention_bias
        heads, kv_heads = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
        self.q_proj = Linear(heads, hidden, ("heads", "embed"), bias=bias, dtype=dtype, rngs=rngs)
        self.k_proj = Linear(kv_heads, hidden, ("kv_heads", "embed"), bias=bias, dtype=dtype, rngs=rngs)
        self.v_proj = Linear(kv_heads, hidden, ("kv_heads", "embed"), bias=bias, dtype=dtype, rngs=rngs)
        self.o_proj = Linear(hidden, heads, ("embed", "heads"), bias=bias, dtype=dtype, rngs=rngs)
        self.q_norm = RMSNorm(head_dim, config.rms_norm_eps, axis="head_dim", dtype=dtype, rngs=rngs)
        self.k_norm = RMSNorm(head_dim, config.rms_norm_eps, axis="head_dim", dtype=dtype, rngs=rngs)
        self.head_dim, self.dtype = head_dim, jnp.dtype(dtype)
        self.heads = config.num_attention_heads, config.num_key_value_heads
        self.window = config.sliding_windows[layer]

    def __call__(
        self,
        hidden: Float[Array, "B T D"],
        rotation: Rotation,
        slots: Int[Array, "B T"],
        cached: LayerCache | None,
        page_table: Int[Array, "B P"] | None = None,
    ) -> tuple[Float[Array, "B T D"], LayerCache]:
        """Returns the float32 output, and the layer's keys and values with those of `hidden` written at `slots`.

        With a page table, `cached` is in pages, and tokens at slot -1 are inactive: they write to page 0, read nothing
        and are never read.
        """
        hidden = sharding.constrain(hidden, "slots")  # if experts split tokens further, XLA would gather weights here
        query, key, value = (
            proj(hidden).reshape(*hidden.shape[:-1], -1, self.head_dim)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if (repeats := sharding.kv_repeats(*self.heads)) > 1:
            key, value = (jnp.repeat(x, repeats, axis=2) for x in (key, value))
        start = jnp.maximum(slots - self.window + 1, 0) if self.window else jnp.zeros_like(slots)
        attended, cached = self._attend((query, key, value), rotation, start, slots, cached, page_table)
        return self.o_proj(attended.reshape(*hidden.shape[:-1], -1)), cached

    def _attend(
        self,
        products: tuple[Array, Array, Array],
        rotation: Rotation,
        start: Array,
        slots: Array,
        cached: LayerCache | None,
        page_table: Array | None,
    ) -> tuple[Array, LayerCache]:
        """Returns the attention [B, T, H, h] of tokens at `slots`, and keys and values with those of the tokens.

        `products` are the tokens' queries, keys and values [B, T, H or K, h], which are not yet normalised. On a mesh,
        each device computes its own rows and heads.
        """
        eps, dtype = self.q_norm.eps, self.dtype

        def own(
            products: tuple[Array, Array, Array],
            norms: tuple[Array, Array],
            rotation: Rotation,
            start: Array,
            slots: Array,
            cached: LayerCache | None,
            page_table: Array | None,
        ) -> tuple[Array, LayerCache]:
            query, key, value = products
            if cached is not None and page_table is not None:
                rest = *norms, *rotation, *cached, page_table, slots
                query, keys, values = norm_rope_append(query, key, value, *rest, eps=eps)
                # rounded at once to what the output product reads, so that no pass of its own does it
                attended = paged_attention(query, keys, values, page_table, start, slots + 1, dtype=dtype)
                return attended, (keys, values)
            query, key = (norm_rope(*pair, *rotation, eps, dtype) for pair in ((query, norms[0]), (key, norms[1])))
            value = value.astype(dtype).swapaxes(1, 2)
            if cached is not None:
                key, value = _write(cached[0], key, slots[:, 0]), _write(cached[1], value, slots[:, 0])
            return ranged_attention(query, key, value, start, slots + 1), (key, value)

        norms = self.q_norm.weight[...], self.k_norm.weight[...]
        rows = sharding.split(len(slots), "slots") or None
        heads = sharding.split(products[1].shape[2], "kv_heads") or None
        of_rows, of_heads, of_cache = PartitionSpec(rows), PartitionSpec(rows, None, heads), PartitionSpec(rows, heads)
        specs = of_heads, PartitionSpec(), of_rows, of_rows, of_rows, of_cache, of_rows
        run = sharding.each_device(own, specs, (of_heads, of_cache))
        return run(products, norms, rotation, start, slots, cached, page_table)


class DecoderLayer(nnx.Module):
    """Attention and a dense or sparse feed-forward, each behind a norm and around a residual."""

    def __init__(self, config: TextConfig, layer: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        norm = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(*norm, dtype=dtype, rngs=rngs)
        self.self_attn = Attention(config, layer, dtype=dtype, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(*norm, dtype=dtype, rngs=rngs)
        self.mlp = (SparseMoE if config.sparse_layers[layer] else DenseMLP)(config, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        hidden: Float[Array, "B T D"],
        rotation: Rotation,
        slots: Int[Array, "B T"],
        cached: LayerCache | None = None,
        page_table: Int[Array, "B P"] | None = None,
    ) -> tuple[Float[Array, "B T D"], LayerCache]:
        """Returns the hidden states after the layer, and its keys and values with those of `hidden` written at `slots`.

        With a page table, tokens at slot -1 are inactive: they attend to nothing and go to no expert.
        """
        with jax.named_scope("attention"):
            attended, cached = self.self_attn(self.input_layernorm(hidden), rotation, slots, cached, page_table)
            hidden = hidden + sharding.constrain(attended, "slots")
        active = None if page_table is None else slots >= 0
        with jax.named_scope("mlp"):
            return hidden + self.mlp(self.post_attention_layernorm(hidden), active), cached


class Embedding(nnx.Module):
    """The token embeddings, which are also the output head if the two are tied."""

    def __init__(self, config: TextConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        init = nnx.initializers.normal(stddev=1.0)
        self.weight = param(rngs, (config.vocab_size, config.hidden_size), ("vocab", "embed"), dtype, init)

    def __call__(self, input_ids: Int[Array, "..."]) -> Float[Array, "... D"]:
        """Returns float32 embeddings of token ids."""
        return sharding.constrain(self.weight[...][input_ids].astype(jnp.float32), "slots")

    def attend(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Returns float32 logits, the products of `hidden` with every token's embedding."""
        return product(hidden, self.weight[...])


class Qwen3MoeModel(nnx.Module):
    """Maps token ids, or visual rows in their place, to normalised hidden states."""

    def __init__(self, config: TextConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.config = config
        self.embed_tokens = Embedding(config, dtype=dtype, rngs=rngs)
        self.layers = nnx.List(
            [DecoderLayer(config, i, dtype=dtype, rngs=rngs) for i in range(config.num_hidden_layers)]
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        input_ids: Int[Array, "B T"],
        position_ids: Int[Array, "3 B T"],
        *,
        slots: Int[Array, "B T"] | None = None,
        cache: KVCache | PagedKVCache | None = None,
        input_embeds: Float[Array, "M D"] | None = None,
        input_deepstack_embeds: Float[Array, "M ND"] | None = None,
        visual_index: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache | PagedKVCache | None]:
        """Takes the arguments of `Qwen3MoeForCausalLM`.

        `nnx.capture` collects its `hidden_states`: the embeddings, then those after each layer and its DeepStack level.

        Returns:
            float32 normalised hidden states, and the cache with these tokens in it (None without a cache).

        Raises:
            ValueError: `input_embeds` is given without `visual_index`.
        """
        hidden = self.embed_tokens(input_ids)
        if input_embeds is not None:
            if visual_index is None:
                raise ValueError("input_embeds needs visual_index: the row of each visual token, -1 for text")
            rows = input_embeds[jnp.maximum(visual_index, 0)].astype(jnp.float32)
            hidden = sharding.constrain(jnp.where((visual_index >= 0)[..., None], rows, hidden), "slots")
        self.sow(nnx.Intermediate, "hidden_states", hidden, capture_noop=True)

        batch, length, width = hidden.shape
        if slots is None:
            slots = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
        slots = sharding.constrain(slots)  # whole on every device, which routes the tokens of all
        rotation = text_rotation(self.config.rope, self.config.head_dim, position_ids)
        levels = 0 if input_deepstack_embeds is None else input_deepstack_embeds.shape[1] // width
        page_table = cache.page_table if isinstance(cache, PagedKVCache) else None
        keys, values = [], []
        for i, layer in enumerate(self.layers):
            cached = None if cache is None else (cache.keys[i], cache.values[i])
            with jax.named_scope(f"layer{i}"):
                hidden, (key, value) = layer(hidden, rotation, slots, cached, page_table)
            if input_deepstack_embeds is not None and visual_index is not None and i < levels:
                flat = hidden.reshape(-1, width)
                hidden = deepstack_add(flat, input_deepstack_embeds, visual_index.reshape(-1), i).reshape(hidden.shape)
            keys.append(key)
            values.append(value)
            self.sow(nnx.Intermediate, "hidden_states", hidden, capture_noop=True)
        cache = None if cache is None else replace(cache, keys=tuple(keys), values=tuple(values))
        return self.norm(hidden), cache


class Qwen3MoeForCausalLM(nnx.Module):
    """`Qwen3MoeModel` and the output head: plain text, vision-language and the language side of a split.

    These uses differ only in whether visual rows are given:

        logits, _ = model(input_ids, position_ids)  # text
        logits, _ = model(input_ids, position_ids, input_embeds=embeds, visual_index=index,
                          input_deepstack_embeds=deepstack)  # with images
    """

    def __init__(self, config: TextConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.model = Qwen3MoeModel(config, dtype=dtype, rngs=rngs)
        if not config.tie_word_embeddings:
            shape = config.vocab_size, config.hidden_size
            self.lm_head = Linear(*shape, ("vocab", "embed"), bias=False, dtype=dtype, rngs=rngs)
        self.tied = config.tie_word_embeddings

    def __call__(
        self,
        input_ids: Int[Array, "B T"],
        position_ids: Int[Array, "3 B T"],
        *,
        slots: Int[Array, "B T"] | None = None,
        cache: KVCache | PagedKVCache | None = None,
        input_embeds: Float[Array, "M D"] | None = None,
        input_deepstack_embeds: Float[Array, "M ND"] | None = None,
        visual_index: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T V"], KVCache | PagedKVCache | None]:
        """
        Args:
            input_ids: the tokens of each row, followed by padding.
            position_ids: M-RoPE positions (time, height, width) of the tokens.
            slots: the tokens' slots in the cache, consecutive in each row; 0, 1, 2, ... by default. In a paged cache,
                several tokens must begin at a multiple of the page size, and tokens at slot -1 are inactive.
            cache: keys and values of the preceding tokens; with None, tokens attend only to those in `input_ids`.
            input_embeds: embeddings of M visual tokens, which replace those of their token ids.
            input_deepstack_embeds: their N DeepStack levels, side by side; level i is added after layer i.
            visual_index: the row of each visual token in the two arrays, -1 for text.

        Returns:
            float32 logits, and the cache with these tokens in it (None without a cache).

        Raises:
            ValueError: `input_embeds` is given without `visual_index`.
        """
        hidden, cache = self.model(
            input_ids,
            position_ids,
            slots=slots,
            cache=cache,
            input_embeds=input_embeds,
            input_deepstack_embeds=input_deepstack_embeds,
            visual_index=visual_index,
        )
        return self.logits(hidden), cache

    def logits(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Returns float32 logits of normalised hidden states; pass only those of the tokens that need logits."""
        with jax.named_scope("lm_head"):
            logits = self.model.embed_tokens.attend(hidden) if self.tied else self.lm_head(hidden)
        # each device computes its part of the vocabulary, and tokens are drawn from the whole
        vocabulary = [None] * (logits.ndim - 2) + ["vocab"]
        return sharding.constrain(sharding.constrain(logits, "slots", *vocabulary), "slots")


def _cached_heads(config: TextConfig) -> int:
    """Returns the KV heads in a cache, with the copies that the current mesh needs."""
    heads = config.num_attention_heads, config.num_key_value_heads
    return config.num_key_value_heads * sharding.kv_repeats(*heads)


def _write(cached: jax.Array, new: jax.Array, first: jax.Array) -> jax.Array:
    """Writes `new` [B, K, T, h] to slots first[b], first[b] + 1, ... of `cached` [B, K, S, h]."""
    if new.shape == cached.shape:
        return new  # a prompt that fills the cache can only start at slot 0
    write_row = partial(jax.lax.dynamic_update_slice_in_dim, axis=1)
    return jax.vmap(write_row)(cached, new, first)
