"""Normalises and rotates the queries and keys of new tokens, and appends keys and values to KV pages."""

from collections.abc import Callable
from functools import partial

import jax

from pallas_kernels import hopper
from pallas_kernels.dispatch import Chip, get_backend, log_choice, target_chip, unsupported_on_mesh
from pallas_kernels.norm_rope_append import mosaic_gpu, xla

Result = tuple[jax.Array, jax.Array, jax.Array]
BACKENDS: dict[str, Callable[..., Result]] = {"xla": xla.norm_rope_append, "mosaic_gpu": mosaic_gpu.norm_rope_append}


@jax.named_scope("norm_rope_append")
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
    backend: str | None = None,
) -> Result:
    """Returns the rotated queries, and pages with the rotated keys and the values of the tokens in their slots.

    Each head of the queries and keys is divided by its root mean square and multiplied by the norm's weights (RMSNorm,
    arXiv:1910.07467); then each pair (x[i], x[i + h/2]) is rotated (RoPE, arXiv:2104.09864). All of that is float32,
    and the results are rounded once, to the pages' dtype.

    Args:
        query: [B, T, H, h], any float dtype.
        key: [B, T, K, h].
        value: [B, T, K, h].
        query_norm: [h], the weights of the queries' norm.
        key_norm: [h].
        cos: float32 [B, T, h/2], of the angles by which the tokens are rotated.
        sin: float32 [B, T, h/2].
        key_pages: [N, K, page, h]. Slot s of row b is in page `page_table[b, s // page]`. Donate both, or the backend
            writes into a copy.
        value_pages: [N, K, page, h].
        page_table: int32 [B, P].
        slots: int32 [B, T]; tokens at slot -1 are inactive and leave every page as it is, apart from page 0, which
            nobody may read. Several tokens of a row begin at a multiple of the page size and are consecutive. They
            are written page by page, together with inactive ones that follow them, so a slot must not be read before
            its own token is written.
        eps: is added to the mean square.
        backend: a name from `BACKENDS`, or None for the automatic choice by chip and shapes (docs/kernels.md).

    Returns:
        (query [B, H, T, h] in the pages' dtype, key_pages, value_pages).

    Raises:
        ValueError: the shapes don't fit together, or the backend is unknown.
        NotImplementedError: the named backend doesn't support the arguments; the message says why.
    """
    args = query, key, value, query_norm, key_norm, cos, sin, key_pages, value_pages, page_table, slots
    _check_shapes(*args)
    if backend is not None:
        return get_backend("norm_rope_append", BACKENDS, backend)(*args, eps=eps)
    chip = target_chip(*args)
    name, why = _automatic(chip, *args)
    log_choice("norm_rope_append", f"query {query.shape}, pages {key_pages.shape} {key_pages.dtype}", chip, name, why)
    plain = partial(xla.norm_rope_append, eps=eps)
    if name == "xla":
        return plain(*args)
    # selects by the platform that is really compiled for; a kernel is only traced for this chip
    return jax.lax.platform_dependent(*args, default=plain, **{chip.platform: partial(BACKENDS[name], eps=eps)})


def _automatic(chip: Chip, *args: jax.Array) -> tuple[str, str]:
    """Returns (backend, reason) for the chip that is compiled for."""
    if not hopper.is_hopper(chip):
        return "xla", f"no kernel for {chip.kind}"
    reason = unsupported_on_mesh(*args) or mosaic_gpu.unsupported(*args)
    return ("xla", reason) if reason else ("mosaic_gpu", "the form for Hopper")


def _check_shapes(
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
) -> None:
    batch, length, _, head_dim = query.shape
    pages = (*key_pages.shape[:1], *key.shape[2:3], *key_pages.shape[2:3], head_dim)
    expected = {
        "key": (key, (batch, length, *key.shape[2:3], head_dim)),
        "value": (value, key.shape),
        "query_norm": (query_norm, (head_dim,)),
        "key_norm": (key_norm, (head_dim,)),
        "cos": (cos, (batch, length, head_dim // 2)),
        "sin": (sin, (batch, length, head_dim // 2)),
        "key_pages": (key_pages, pages),
        "value_pages": (value_pages, pages),
        "page_table": (page_table, (batch, *page_table.shape[1:2])),
        "slots": (slots, (batch, length)),
    }
    for name, (array, shape) in expected.items():
        if array.shape != shape:
            fault = f"{name} {array.shape} doesn't fit query {query.shape}: expected {shape}"
            raise ValueError(f"norm_rope_append: {fault}")
