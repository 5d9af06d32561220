"""The plain form of paged_attention: a running softmax over pages, up to the last one that a query reads.

The time grows with the distance from the first key that any query of the batch reads to the last; the temporary memory
does not. A row's bits don't depend on the other rows: the sizes of products follow from the shapes, turns start at
fixed places of a row's keys, and a turn does not change the state of a query that reads none of its keys.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

from pallas_kernels.attention.running_softmax import State, finish, initial, read_block
from pallas_kernels.attention.xla_ranged import BLOCK, even_block

# Keys per turn, rounded to whole pages. One query takes fewer, because there reading keys costs more than updating the
# state. Turns may depend only on shapes, because bits depend on turns.
TURN = BLOCK
DECODE_TURN = 128


def paged_attention(
    query: jax.Array,
    key_pages: jax.Array,
    value_pages: jax.Array,
    page_table: jax.Array,
    start: jax.Array,
    stop: jax.Array,
    dtype: DTypeLike = jnp.float32,
) -> jax.Array:
    """See `pallas_kernels.attention`."""
    batch, heads, length, head_dim = query.shape
    kv_heads, page = key_pages.shape[1:3]
    groups = heads // kv_heads
    grouped = query.reshape(batch, kv_heads, groups, length, head_dim)
    if groups * length == 1:  # XLA on CPU reads bfloat16 at a tenth of the speed for a product of one row
        grouped = jnp.concatenate([grouped, grouped], axis=2)
    pages = max((DECODE_TURN if length == 1 else TURN) // page, 1)
    page_table = jnp.pad(page_table, [(0, 0), (0, -page_table.shape[1] % pages)])

    def attend(query: jax.Array, start: jax.Array, stop: jax.Array) -> jax.Array:
        return _attend(query, start, stop, key_pages, value_pages, page_table, pages)

    out = _by_blocks(attend, grouped, start, stop)
    return out[:, :, :groups].reshape(batch, heads, length, head_dim).swapaxes(1, 2).astype(dtype)


def _by_blocks(attend: Callable[..., jax.Array], query: jax.Array, start: jax.Array, stop: jax.Array) -> jax.Array:
    """Calls `attend` on blocks of at most BLOCK queries, one after another; the last block's padding reads nothing."""
    length = query.shape[3]
    if length <= BLOCK:
        return attend(query, start, stop)
    rows = even_block(length)
    padding = -length % rows
    query = jnp.pad(query, [(0, 0)] * 3 + [(0, padding), (0, 0)])
    start, stop = (jnp.pad(bound, [(0, 0), (0, padding)]) for bound in (start, stop))

    def attend_block(i: jax.Array) -> jax.Array:
        bounds = (jax.lax.dynamic_slice_in_dim(bound, i * rows, rows, axis=1) for bound in (start, stop))
        return attend(jax.lax.dynamic_slice_in_dim(query, i * rows, rows, axis=3), *bounds)

    out = jax.lax.map(attend_block, jnp.arange(query.shape[3] // rows))
    return jnp.moveaxis(out, 0, 3).reshape(query.shape)[:, :, :, :length]


def _attend(
    query: jax.Array,
    start: jax.Array,
    stop: jax.Array,
    key_pages: jax.Array,
    value_pages: jax.Array,
    page_table: jax.Array,
    pages: int,
) -> jax.Array:
    """Returns the attention of queries [B, K, G, T, h], reading `pages` pages of each row per turn.

    The turns run from the first to the last page that any query reads.
    """
    size = pages * key_pages.shape[2]

    def step(turn: jax.Array, state: State) -> State:
        numbers = jax.lax.dynamic_slice_in_dim(page_table, turn * pages, pages, axis=1)
        key, value = (_gather(x, numbers) for x in (key_pages, value_pages))
        slots = turn * size + jnp.arange(size)
        readable = (slots >= start[..., None]) & (slots < stop[..., None])
        # values that no query of a row reads have weight 0, but 0 * NaN would be NaN
        value = jnp.where(jnp.any(readable, axis=1)[:, None, :, None], value, 0)
        reads = jnp.any(readable, axis=2)[:, None, None]
        return _choose(reads, read_block(state, _products(query, key), value, readable), state)

    reads_any = start < stop
    first = jnp.min(jnp.where(reads_any, start, page_table.shape[1] * key_pages.shape[2])) // size
    last = pl.cdiv(jnp.max(jnp.where(reads_any, stop, 0)), size)
    return finish(jax.lax.fori_loop(first, last, step, initial(query)))


def _choose(reads: jax.Array, after: State, before: State) -> State:
    """Returns the state after a turn for queries that read one of its keys, and the unchanged bits for the others."""
    maximum, total = (jnp.where(reads, after[i], before[i]) for i in (0, 1))
    return maximum, total, jnp.where(reads[..., None], after[2], before[2])


def _gather(pages: jax.Array, numbers: jax.Array) -> jax.Array:
    """Returns the pages [N, K, page, h] with the `numbers` [B, n] side by side: [B, K, n * page, h]."""
    batch, count = numbers.shape
    _, kv_heads, page, head_dim = pages.shape
    chosen = jnp.take(pages, numbers.reshape(-1), axis=0, mode="clip")
    chosen = chosen.reshape(batch, count, kv_heads, page, head_dim).swapaxes(1, 2)
    return chosen.reshape(batch, kv_heads, count * page, head_dim)


def _products(query: jax.Array, key: jax.Array) -> jax.Array:
    """Returns query times key, float32 [B, K, G, T, S]."""
    if query.shape[3] > 1:
        return jnp.einsum("bkgth,bksh->bkgts", query, key, preferred_element_type=jnp.float32)
    # keys are on the left, because XLA on CPU would first transpose them on the right
    products = jnp.einsum("bksh,bkgh->bksg", key, query[:, :, :, 0], preferred_element_type=jnp.float32)
    return products.swapaxes(2, 3)[:, :, :, None]
