"""Attention in which every query reads one contiguous range of keys.

Both masks of this project have that form: causal attention over a cache (token i of a row reads slots 0 to i, or the
last `window` of them) and attention within a segment of packed patches (one image or one video frame). A mask is then
two integers per query, padding is an empty range, and blocks of keys that no query of a block reads are skipped.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels import hopper
from pallas_kernels.attention import mosaic_gpu, mosaic_tpu, xla_paged, xla_ranged
from pallas_kernels.dispatch import Chip, get_backend, log_choice, target_chip, unsupported_on_mesh


class Backend(NamedTuple):
    """The two functions of one backend. Each takes the arguments of the public function except `backend`."""

    ranged_attention: Callable[..., Any]
    paged_attention: Callable[..., Any]


BACKENDS = {
    "xla": Backend(xla_ranged.ranged_attention, xla_paged.paged_attention),
    "mosaic_tpu": Backend(mosaic_tpu.ranged_attention, mosaic_tpu.paged_attention),
    "mosaic_gpu": Backend(mosaic_gpu.ranged_attention, mosaic_gpu.paged_attention),
}
# the backend of a chip, and what says why it can't run given arguments
KERNELS = {
    "tpu": ("mosaic_tpu", Backend(mosaic_tpu.unsupported_ranged, mosaic_tpu.unsupported_paged)),
    "cuda": ("mosaic_gpu", Backend(mosaic_gpu.unsupported_ranged, mosaic_gpu.unsupported_paged)),
}


@jax.named_scope("ranged_attention")
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
        backend: a name from `BACKENDS`, or None for the automatic choice by chip and shapes (docs/kernels.md).

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
    return _run("ranged_attention", backend, query, key, value, start, stop)


@jax.named_scope("paged_attention")
def paged_attention(
    query: jax.Array,
    key_pages: jax.Array,
    value_pages: jax.Array,
    page_table: jax.Array,
    start: jax.Array,
    stop: jax.Array,
    *,
    dtype: DTypeLike = jnp.float32,
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
        dtype: of the result. It is computed in float32 and rounded once.
        backend: a name from `BACKENDS`, or None for the automatic choice by chip and shapes (docs/kernels.md).

    Returns:
        [B, T, H, h]; 0 if the range is empty.

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
    return _run("paged_attention", backend, query, key_pages, value_pages, page_table, start, stop, dtype=dtype)


def _run(op: str, backend: str | None, *args: jax.Array, **options: Any) -> jax.Array:
    def form(name: str) -> Callable[..., jax.Array]:
        return partial(getattr(get_backend(op, BACKENDS, name), op), **options)

    if backend is not None:
        return form(backend)(*args)
    chip = target_chip(*args)
    name, why = _automatic(op, chip, *args)
    log_choice(op, f"query {args[0].shape}, keys {args[1].shape} {args[1].dtype}", chip, name, why)
    if name == "xla":
        return form(name)(*args)
    # selects by the platform that is really compiled for; a kernel is only traced for this chip
    return jax.lax.platform_dependent(*args, default=form("xla"), **{chip.platform: form(name)})


def _automatic(op: str, chip: Chip, *args: jax.Array) -> tuple[str, str]:
    """Returns (backend, reason) for the chip that is compiled for."""
    if chip.platform not in KERNELS or (chip.platform == "cuda" and not hopper.is_hopper(chip)):
        return "xla", f"no kernel for {chip.kind}"
    if reason := unsupported_on_mesh(*args):
        return "xla", reason
    name, unsupported = KERNELS[chip.platform]
    reason = getattr(unsupported, op)(*args)
    return ("xla", reason) if reason else (name, f"the form for {chip.platform}")


def _check_queries(op: str, query: jax.Array, key: jax.Array, start: jax.Array, stop: jax.Array) -> None:
    if query.ndim != 4 or key.ndim != 4 or query.shape[3] != key.shape[3] or query.shape[1] % key.shape[1]:
        raise ValueError(
            f"{op}: query {query.shape} and keys {key.shape} must be [B, H, T, h] and [..., K, ..., h], H a multiple "
            "of K"
        )
    batch, _, length, _ = query.shape
    if start.shape != (batch, length) or stop.shape != (batch, length):
        raise ValueError(f"{op}: start {start.shape} and stop {stop.shape} must both be [{batch}, {length}]")
