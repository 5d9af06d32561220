"""Adds one DeepStack level (arXiv:2406.04334) to the hidden states of the visual tokens."""

import jax

from pallas_kernels.deepstack_add import mosaic_gpu, mosaic_tpu, xla
from pallas_kernels.dispatch import get_backend

BACKENDS = {
    "xla": xla.deepstack_add,
    "mosaic_tpu": mosaic_tpu.deepstack_add,
    "mosaic_gpu": mosaic_gpu.deepstack_add,
}


@jax.named_scope("deepstack_add")
def deepstack_add(
    hidden: jax.Array, rows: jax.Array, visual_index: jax.Array, level: int, *, backend: str | None = None
) -> jax.Array:
    """`out[t] = hidden[t] + rows[visual_index[t], level*D : (level+1)*D]`, or hidden[t] if visual_index[t] is -1.

    It is differentiable in hidden and rows.

    Args:
        hidden: [T, D], any float dtype.
        rows: [M, N*D], the N deepstack levels of M visual tokens side by side.
        visual_index: int32 [T], the row of each visual token, -1 for text.
        level: 0..N-1, static.
        backend: a name from `BACKENDS`. None is `xla` on every chip: after a decoder layer, XLA adds the level in the
            same pass as the residual, whereas a kernel needs a separate pass (docs/kernels.md).

    Returns:
        [T, D] in hidden's dtype.

    Raises:
        ValueError: the shapes don't fit together, rows don't have the level, or the backend is unknown.
        NotImplementedError: the named backend doesn't support the arguments; the message says why.
    """
    tokens, width = hidden.shape
    if rows.ndim != 2 or rows.shape[1] % width or visual_index.shape != (tokens,):
        raise ValueError(
            f"deepstack_add: hidden {hidden.shape}, rows {rows.shape} and visual_index {visual_index.shape} must be "
            "[T, D], [M, N*D] and [T]"
        )
    levels = rows.shape[1] // width
    if not 0 <= level < levels:
        raise ValueError(f"deepstack_add: level {level} is not among the {levels} levels of rows {rows.shape}")
    return get_backend("deepstack_add", BACKENDS, backend or "xla")(hidden, rows, visual_index, level)
