"""The plain form of ranged_attention, which is differentiable for T > 1.

Long inputs run block by block with a running softmax, so memory grows with T + S instead of T x S.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.attention.running_softmax import State, finish, initial, read_block

BLOCK = 256  # queries per block, and keys per block
DECODE_BLOCK = 1024  # keys per block for one query


def ranged_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, start: jax.Array, stop: jax.Array
) -> jax.Array:
    """See `pallas_kernels.attention`."""
    batch, heads, length, head_dim = query.shape
    kv_heads, capacity = key.shape[1:3]
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, length, head_dim)
    if length == 1:
        out = _one_query(grouped, key, value, start, stop)
    elif length <= BLOCK and capacity <= BLOCK:
        out = _at_once(grouped, key, value, start, stop)
    else:
        out = _blocked(grouped, key, value, start, stop)
    return out.reshape(batch, heads, length, head_dim).swapaxes(1, 2)


def _at_once(query: jax.Array, key: jax.Array, value: jax.Array, start: jax.Array, stop: jax.Array) -> jax.Array:
    readable = _readable(key, start, stop, 0, 0)
    return finish(read_block(initial(query), _products(query, key), value, readable))


def _one_query(query: jax.Array, key: jax.Array, value: jax.Array, start: jax.Array, stop: jax.Array) -> jax.Array:
    """Decodes: reads only the blocks that hold a slot in use, however long the cache is."""
    size = DECODE_BLOCK
    if key.shape[2] <= size:
        return _at_once(query, key, value, start, stop)

    def step(i: jax.Array, state: State) -> State:
        return _read_block(state, query, key, value, start, stop, i, size)

    last = (jnp.max(stop) + size - 1) // size
    return finish(jax.lax.fori_loop(jnp.min(start) // size, last, step, initial(query)))


def _blocked(query: jax.Array, key: jax.Array, value: jax.Array, start: jax.Array, stop: jax.Array) -> jax.Array:
    """Runs blocks of queries one after another, each over the blocks of keys that it reads."""
    length = query.shape[3]
    rows = even_block(length)
    padding = -length % rows
    query = jnp.pad(query, [(0, 0)] * 3 + [(0, padding), (0, 0)])
    start, stop = (jnp.pad(bound, [(0, 0), (0, padding)]) for bound in (start, stop))
    size = even_block(key.shape[2])
    key_blocks = jnp.arange(pl.cdiv(key.shape[2], size))

    @jax.checkpoint  # a gradient recomputes a block's scores instead of keeping those of all blocks
    def attend(i: jax.Array) -> jax.Array:
        q = jax.lax.dynamic_slice_in_dim(query, i * rows, rows, axis=3)
        first, last = (jax.lax.dynamic_slice_in_dim(bound, i * rows, rows, axis=1) for bound in (start, stop))
        reads_any = first < last
        lowest = jnp.min(jnp.where(reads_any, first, key.shape[2]))
        highest = jnp.max(jnp.where(reads_any, last, 0))

        def step(state: State, j: jax.Array) -> tuple[State, None]:
            def read(state: State) -> State:
                return _read_block(state, q, key, value, first, last, j, size)

            wanted = (j * size < highest) & ((j + 1) * size > lowest)
            return jax.lax.cond(wanted, read, lambda state: state, state), None

        return finish(jax.lax.scan(step, initial(q), key_blocks)[0])

    out = jax.lax.map(attend, jnp.arange(query.shape[3] // rows))
    return jnp.moveaxis(out, 0, 3).reshape(*query.shape[:-1], -1)[..., :length, :]


def even_block(length: int) -> int:
    """Returns the size of blocks that divide `length` evenly, at most BLOCK, rounded up to a multiple of 8."""
    size = pl.cdiv(length, pl.cdiv(length, BLOCK))
    return min(length, pl.cdiv(size, 8) * 8)


def _read_block(
    state: State,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    start: jax.Array,
    stop: jax.Array,
    i: jax.Array,
    size: int,
) -> State:
    """Adds block i of `size` keys. A shorter last block is read together with preceding keys, which are masked."""
    slot = jnp.minimum(i * size, key.shape[2] - size)
    key, value = (jax.lax.dynamic_slice_in_dim(x, slot, size, axis=2) for x in (key, value))
    return read_block(state, _products(query, key), value, _readable(key, start, stop, slot, i * size))


def _readable(
    key: jax.Array, start: jax.Array, stop: jax.Array, slot: jax.Array | int, unread_from: jax.Array | int
) -> jax.Array:
    """Returns bool [B, T, S]: which keys at slots `slot`, `slot` + 1, ... a query reads; none before unread_from."""
    slots = slot + jnp.arange(key.shape[2])
    return (slots >= jnp.maximum(start, unread_from)[..., None]) & (slots < stop[..., None])


def _products(query: jax.Array, key: jax.Array) -> jax.Array:
    """Returns query times key, float32 [B, K, G, T, S]."""

    def product(query: jax.Array, key: jax.Array) -> jax.Array:
        return jnp.einsum("bkgth,bksh->bkgts", query, key, preferred_element_type=jnp.float32)

    def sum_of_products(query: jax.Array, key: jax.Array) -> jax.Array:
        return jnp.sum(query.astype(jnp.float32) * key.astype(jnp.float32)[:, :, None], axis=-1)[:, :, :, None]

    if query.shape[3] > 1:
        return product(query, key)
    # for one query, XLA on CPU would first transpose the keys, which takes as long as the rest
    return jax.lax.platform_dependent(query, key, cpu=sum_of_products, default=product)
