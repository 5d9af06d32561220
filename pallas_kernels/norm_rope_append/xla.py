"""The plain form of norm_rope_append, and its parts."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.typing import DTypeLike


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
    """See `pallas_kernels.norm_rope_append`."""
    dtype = key_pages.dtype
    query, key = norm_rope(query, query_norm, cos, sin, eps, dtype), norm_rope(key, key_norm, cos, sin, eps, dtype)
    value = value.astype(dtype).swapaxes(1, 2)
    return query, _write(key_pages, key, page_table, slots), _write(value_pages, value, page_table, slots)


def norm_rope(
    x: jax.Array, weight: jax.Array, cos: jax.Array, sin: jax.Array, eps: float, dtype: DTypeLike
) -> jax.Array:
    """Normalises and rotates the heads of x [B, T, H, h], in float32. Returns [B, H, T, h] in `dtype`."""
    return rotate(rms_norm(x, weight, eps), cos, sin).astype(dtype).swapaxes(1, 2)


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """`x / rms(x) * weight` over the last axis, float32."""
    x = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    return x * scale * weight.astype(jnp.float32)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates each pair (x[i], x[i + h/2]) of x [..., T, H, h] by its angle [..., T, h/2], in float32."""
    cos, sin = cos[..., None, :], sin[..., None, :]
    # XLA for NVIDIA would launch each half by itself, for one token together with its norm
    return jax.lax.platform_dependent(x.astype(jnp.float32), cos, sin, cuda=_rotate_whole, default=_rotate_halves)


def _rotate_halves(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _rotate_whole(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    swapped = x.reshape(*x.shape[:-1], 2, -1)[..., ::-1, :].reshape(x.shape)
    return x * jnp.concatenate([cos, cos], axis=-1) + swapped * jnp.concatenate([-sin, sin], axis=-1)


def _write(pages: jax.Array, new: jax.Array, page_table: jax.Array, slots: jax.Array) -> jax.Array:
    """Writes `new` [B, K, T, h] to the slots [B, T] of `pages` [N, K, page, h]; tokens at slot -1 go to page 0."""
    batch, heads, length, width = new.shape
    page, first = pages.shape[2], slots[:, 0]
    if length == 1:
        place = jnp.maximum(first, 0)
        where = jnp.take_along_axis(page_table, place[:, None] // page, axis=1)
        where = jnp.where(first[:, None] < 0, 0, where) * heads + jnp.arange(heads)
        # pages are viewed as one list of rows, into which a TPU scatters without changing their layout
        rows = pages.reshape(-1, width).at[(where * page + place[:, None] % page).reshape(-1)]
        return rows.set(new.reshape(-1, width)).reshape(pages.shape)
    height = min(length, page)
    count = pl.cdiv(length, height)
    new = jnp.pad(new, [(0, 0), (0, 0), (0, count * height - length), (0, 0)])
    blocks = new.reshape(batch, heads, count, height, width).swapaxes(1, 2).reshape(-1, heads, height, width)
    numbers = jnp.maximum(first, 0)[:, None] // page + jnp.arange(count)
    where = jnp.take_along_axis(page_table, jnp.minimum(numbers, page_table.shape[1] - 1), axis=1)
    active = (slots[:, ::height] >= 0) & (numbers < page_table.shape[1])
    return pages.at[jnp.where(active, where, 0).reshape(-1), :, :height].set(blocks)
