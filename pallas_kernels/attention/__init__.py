"""Attention in which every query reads one contiguous range of keys.

Both masks of this project have that form: causal attention over a cache (token i of a row reads slots 0 to i, or the
last `window` of them) and attention within a segment of packed patches (one image or one video frame). A mask is then
two integers per query, padding is an empty range, and blocks of keys that no query of a block reads are skipped.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax

from pallas_kernels.attention import xla_paged, xla_ranged
from pallas_kernels.dispatch import get_backend


class Backend(NamedTuple):
    """The two functions of one backend. Each takes the arguments of the public function except `backend`."""

    ranged_attention: Callable[..., jax.Array]
    paged_attention: Callable[..., jax.Array]


BACKENDS = {"xla": Backend(xla_ranged.ranged_attention, xla_paged.paged_attention)}


def ranged_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    start: jax.Array,
    stop: jax.Array,
    *,
    backend: str | None = None,
) -> jax.Array:
    """softmax(query key^T / sqrt(h)) value over keys `start <= s < stop` of each query; 0 if the range is empty.

    It is differentiable in query, key and value for T > 1 and any lengths.

    Args:
        query: [B, H, T, h]; query head j reads key head j // (H / K).
        key: [B, K, S, h]. Products read the given dtype and accumulate in float32.
        value: [B, K, S, h].
        start: int32 [B, T], the first slot that a query reads.
        stop: int32 [B, T], the slot after the last one, at most S.
        backend: a name from `BACKENDS`. None is `xla` on every chip.

    Returns:
        float32 [B, T, H, h].

    Raises:
        ValueError: the shapes don't fit together, or the backend is unknown.
        NotImplementedError: the named backend doesn't support the arguments; the message says why.
    """
    _check_queries("ranged_attention", query, key, start, stop)
    if key.shape != value.shape or key.shape[0] != query.shape[0]:
        raise ValueError(
            f"ranged_attention: query {query.shape}, key {key.shape} and value {value.shape} must be "
            "[B, H, T, h], [B, K, S, h] and [B, K, S, h]"
        )
    return get_backend("ranged_attention", BACKENDS, backend or "xla").ranged_attention(query, key, value, start, stop)


def paged_attention(
    query: jax.Array,
    key_pages: jax.Array,
    value_pages: jax.Array,
    page_table: jax.Array,
    start: jax.Array,
    stop: jax.Array,
    *,
    backend: str | None = None,
) -> jax.Array:
    """`ranged_attention` over keys that are stored in pages: key s of row b is in page `page_table[b, s // page]`.

    For given B, T, page and dtypes, the bits of a row's output depend only on the row's own queries and ranges, and on
    the keys and values within its ranges. They don't depend on N, P, the pages that hold them, the other rows, or the
    row's place in the batch. Values outside a row's ranges may be anything, including NaN. There is no gradient.

    Args:
        query: [B, H, T, h]; query head j reads key head j // (H / K).
        key_pages: [N, K, page, h], in which key s of a row is at offset s % page of its page. Products read the given
            dtype and accumulate in float32.
        value_pages: [N, K, page, h].
        page_table: int32 [B, P], page numbers; 0 <= page_table < N even where a row reads nothing.
        start: int32 [B, T], the first key that a query reads.
        stop: int32 [B, T], the key after the last one, at most P * page.
        backend: a name from `BACKENDS`. None is `xla` on every chip.

    Returns:
        float32 [B, T, H, h]; 0 if the range is empty.

    Raises:
        ValueError: the shapes don't fit together, or the backend is unknown.
        NotImplementedError: the named backend doesn't support the arguments; the message says why.
    """
    _check_queries("paged_attention", query, key_pages, start, stop)
    if key_pages.shape != value_pages.shape or page_table.ndim != 2 or page_table.shape[0] != query.shape[0]:
        raise ValueError(
            f"paged_attention: query {query.shape}, key_pages {key_pages.shape}, value_pages {value_pages.shape} and "
            f"page_table {page_table.shape} must be [B, H, T, h], [N, K, page, h], [N, K, page, h] and [B, P]"
        )
    of_backend = get_backend("paged_attention", BACKENDS, backend or "xla").paged_attention
    return of_backend(query, key_pages, value_pages, page_table, start, stop)


def _check_queries(op: str, query: jax.Array, key: jax.Array, start: jax.Array, stop: jax.Array) -> None:
    if query.ndim != 4 or key.ndim != 4 or query.shape[3] != key.shape[3] or query.shape[1] % key.shape[1]:
        raise ValueError(
            f"{op}: query {query.shape} and keys {key.shape} must be [B, H, T, h] and [..., K, ..., h], H a multiple "
            "of K"
        )
    batch, _, length, _ = query.shape
    if start.shape != (batch, length) or stop.shape != (batch, length):
        raise ValueError(f"{op}: start {start.shape} and stop {stop.shape} must both be [{batch}, {length}]")
