"""Attention in which every query reads one contiguous range of keys.

Both masks of this project are of that form: causal attention over a cache (token i of a row reads slots 0 to i, or the
last `window` of them) and attention within a segment of packed patches (one image, one video frame). So a mask is two
integers a query, padding is an empty range, and blocks of keys that no query of a block reads are skipped.

Long inputs run block by block with a running softmax (Milakov and Gimelshein, arXiv:1805.02867), so memory grows with
T + S and not with T x S.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

BLOCK = 256  # queries, and keys, at a time
DECODE_BLOCK = 1024  # keys at a time for one query
_LOWEST = -1e30  # stands for minus infinity where the difference of two of them must not be NaN


def ranged_attention(
    query: Float[Array, "B H T h"],
    key: Float[Array, "B K S h"],
    value: Float[Array, "B K S h"],
    start: Int[Array, "B T"],
    stop: Int[Array, "B T"],
) -> Float[Array, "B T H h"]:
    """softmax(query key^T / sqrt(h)) value over keys `start <= s < stop` of each query; 0 where the range is empty.

    Query head j reads key head j // (H / K). Products read the given dtype and accumulate in float32; the result is
    float32. Differentiable for T > 1, whatever the lengths.
    """
    batch, heads, length, head_dim = query.shape
    kv_heads, capacity = key.shape[1:3]
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, length, head_dim)
    if length == 1:
        out = _one_query(grouped, key, value, start, stop)
    elif length <= BLOCK and capacity <= BLOCK:
        out = _finish(_read_block(_initial(grouped), grouped, key, value, start, stop, 0, 0))
    else:
        out = _blocked(grouped, key, value, start, stop)
    return out.reshape(batch, heads, length, head_dim).swapaxes(1, 2)


def _one_query(query: jax.Array, key: jax.Array, value: jax.Array, start: jax.Array, stop: jax.Array) -> jax.Array:
    """Decoding: only the blocks that hold a slot in use are read, however long the cache is."""
    size = DECODE_BLOCK
    if key.shape[2] <= size:
        return _finish(_read_block(_initial(query), query, key, value, start, stop, 0, 0))

    def step(i: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return _read_block(state, query, *_slice_keys(key, value, i, size), start, stop, *_slots(key, i, size))

    last = (jnp.max(stop) + size - 1) // size
    return _finish(jax.lax.fori_loop(jnp.min(start) // size, last, step, _initial(query)))


def _blocked(query: jax.Array, key: jax.Array, value: jax.Array, start: jax.Array, stop: jax.Array) -> jax.Array:
    """Blocks of queries one after another, each over the blocks of keys that it reads."""
    length = query.shape[3]
    rows = _even_block(length)
    padding = -length % rows
    query = jnp.pad(query, [(0, 0)] * 3 + [(0, padding), (0, 0)])
    start, stop = (jnp.pad(bound, [(0, 0), (0, padding)]) for bound in (start, stop))
    size = _even_block(key.shape[2])
    key_blocks = jnp.arange(-(-key.shape[2] // size))

    @jax.checkpoint  # a gradient recomputes a block's scores instead of keeping those of all blocks
    def attend(i: jax.Array) -> jax.Array:
        q = jax.lax.dynamic_slice_in_dim(query, i * rows, rows, axis=3)
        first, last = (jax.lax.dynamic_slice_in_dim(bound, i * rows, rows, axis=1) for bound in (start, stop))
        reads_any = first < last
        lowest = jnp.min(jnp.where(reads_any, first, key.shape[2]))
        highest = jnp.max(jnp.where(reads_any, last, 0))

        def step(state: tuple[jax.Array, ...], j: jax.Array) -> tuple[tuple[jax.Array, ...], None]:
            def read(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                return _read_block(state, q, *_slice_keys(key, value, j, size), first, last, *_slots(key, j, size))

            wanted = (j * size < highest) & ((j + 1) * size > lowest)
            return jax.lax.cond(wanted, read, lambda state: state, state), None

        return _finish(jax.lax.scan(step, _initial(q), key_blocks)[0])

    out = jax.lax.map(attend, jnp.arange(query.shape[3] // rows))
    return jnp.moveaxis(out, 0, 3).reshape(*query.shape[:-1], -1)[..., :length, :]


def _even_block(length: int) -> int:
    """The size of blocks of at most BLOCK that split `length` evenly, up to a multiple of 8."""
    size = -(-length // -(-length // BLOCK))
    return min(length, -(-size // 8) * 8)


def _slots(key: jax.Array, i: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """(first slot of the slice that holds block i, first slot of block i): they differ for a last, shorter block."""
    return jnp.minimum(i * size, key.shape[2] - size), i * size


def _slice_keys(key: jax.Array, value: jax.Array, i: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    first, _ = _slots(key, i, size)
    return tuple(jax.lax.dynamic_slice_in_dim(x, first, size, axis=2) for x in (key, value))  # pyright: ignore


def _initial(query: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(running maximum, running sum, running weighted values)."""
    shape = query.shape[:-1]
    return jnp.full(shape, _LOWEST), jnp.zeros(shape), jnp.zeros(query.shape)


def _read_block(
    state: tuple[jax.Array, ...],
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    start: jax.Array,
    stop: jax.Array,
    slot: jax.Array | int,
    unread_from: jax.Array | int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Adds the keys at slots `slot`, `slot + 1`, ... to the state, leaving out those before `unread_from`."""
    maximum, total, weighted = state
    scores = _scores(query, key) * query.shape[-1] ** -0.5
    slots = slot + jnp.arange(key.shape[2])
    readable = (slots >= jnp.maximum(start, unread_from)[..., None]) & (slots < stop[..., None])
    readable = readable[:, None, None]
    scores = jnp.where(readable, scores, _LOWEST)
    # The result does not depend on the maximum, so neither does the gradient.
    new_maximum = jax.lax.stop_gradient(jnp.maximum(maximum, jnp.max(scores, axis=-1)))
    # held above _LOWEST, so that what isn't readable weighs 0 where nothing was readable yet
    weights = jnp.exp(scores - jnp.maximum(new_maximum, _LOWEST / 2)[..., None])
    shrink = jnp.exp(maximum - new_maximum)
    read = jnp.einsum("bkgts,bksh->bkgth", weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
    return new_maximum, total * shrink + jnp.sum(weights, axis=-1), weighted * shrink[..., None] + read


def _scores(query: jax.Array, key: jax.Array) -> jax.Array:
    """float32 [B, K, G, T, S]."""

    def product(query: jax.Array, key: jax.Array) -> jax.Array:
        return jnp.einsum("bkgth,bksh->bkgts", query, key, preferred_element_type=jnp.float32)

    def sum_of_products(query: jax.Array, key: jax.Array) -> jax.Array:
        return jnp.sum(query.astype(jnp.float32) * key.astype(jnp.float32)[:, :, None], axis=-1)[:, :, :, None]

    if query.shape[3] > 1:
        return product(query, key)
    # for one query XLA on CPU would transpose the keys first, which takes as long as the rest
    return jax.lax.platform_dependent(query, key, cpu=sum_of_products, default=product)


def _finish(state: tuple[jax.Array, ...]) -> jax.Array:
    _, total, weighted = state
    return weighted / jnp.where(total == 0, 1, total)[..., None]
