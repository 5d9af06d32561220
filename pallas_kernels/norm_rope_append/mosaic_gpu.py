"""norm_rope_append for Hopper: one token per row, and one launch in place of five.

There is one block of 128 threads per row and head, which computes a query head, or a key head and its value. A head is
read and written once, so nothing is staged but the head itself, of which every thread needs the other half's element.
Nothing here was timed on a chip (docs/kernels.md).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper, sharded


def unsupported(query: jax.Array, *args: jax.Array) -> str | None:
    """Returns why these arguments (or `jax.ShapeDtypeStruct`s) of norm_rope_append are not supported, or None."""
    _, length, _, head_dim = query.shape
    if length != 1:
        return f"T = {length} is not 1: with several tokens per row, launches cost little beside the products"
    if sharded.varies(query, *args):
        return "Pallas can't write in place into what differs between the devices of a mesh"
    if head_dim % 128:
        return f"h = {head_dim} is not a multiple of 128, the threads of a block"
    for x in (query, *args):
        if jnp.issubdtype(x.dtype, jnp.floating) and x.dtype not in (jnp.bfloat16, jnp.float32):
            return f"an argument is {x.dtype}, not bfloat16 or float32"
        if 0 in x.shape:
            return f"an argument is empty: {x.shape}"
    return None


def norm_rope_append(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    query_norm: jax.Array,
    key_norm: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    key_pages: jax.Array,
    value_pages: jax.Array,
    page_table: jax.Array,
    slots: jax.Array,
    *,
    eps: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `pallas_kernels.norm_rope_append`. Inactive tokens write nothing."""
    args = query, key, value, query_norm, key_norm, cos, sin, key_pages, value_pages, page_table, slots
    if reason := unsupported(*args):
        raise NotImplementedError(reason)
    batch, _, heads, head_dim = query.shape
    kv_heads, page, dtype = key.shape[2], key_pages.shape[2], key_pages.dtype

    def body(keys: Any, values: Any, *refs: Any) -> None:
        products, of_query, of_key, cos_ref, sin_ref, table, slots_ref, out, staged = refs
        row, head = lax.axis_index("row"), lax.axis_index("head")
        slot = slots_ref[row]

        def rotated(weight: Any) -> jax.Array:
            x = products[row, head].astype(jnp.float32)
            x *= lax.rsqrt(jnp.sum(x * x) / head_dim + eps)
            x *= weight[...].astype(jnp.float32)
            for i in range(2):
                staged[pl.ds(i * head_dim, head_dim)] = x
            swapped = staged[pl.ds(head_dim // 2, head_dim)]  # the second half, then the first
            return (x * cos_ref[row] + swapped * sin_ref[row]).astype(dtype)

        @pl.when(head < heads)
        def _() -> None:
            out[row, head] = rotated(of_query)

        @pl.when((head >= heads) & (slot >= 0))
        def _() -> None:
            place = table[row, lax.div(slot, page)], head - heads, lax.rem(slot, page)
            keys[place] = rotated(of_key)
            values[place] = products[row, head + kv_heads].astype(dtype)

    # XLA merges the products of one hidden state, and concatenates their slices without a launch
    products = jnp.concatenate([x.reshape(batch, -1) for x in (query, key, value)], axis=1)
    products = products.reshape(batch, -1, head_dim)
    whole = jnp.concatenate([cos, cos], axis=-1)[:, 0], jnp.concatenate([-sin, sin], axis=-1)[:, 0]
    keys, values = jax.new_ref(key_pages), jax.new_ref(value_pages)  # copied only if the pages are used later
    out = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((batch, heads, head_dim), dtype),
        grid=(batch, heads + kv_heads),
        grid_names=("row", "head"),
        scratch_types=(plgpu.SMEM((2 * head_dim,), jnp.float32),),
        compiler_params=hopper.params(),
    )(keys, values, products, query_norm, key_norm, *whole, page_table, slots[:, 0])
    return out[:, :, None], jax.freeze(keys), jax.freeze(values)
