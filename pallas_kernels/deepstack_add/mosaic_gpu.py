"""deepstack_add for Hopper: one block per token, in place.

The block of a text token only reads its index. The block of a visual token reads the hidden row and the level's columns
of the feature row once, and writes the hidden row. Rows may be anywhere, so nothing is staged: up to 16 blocks of 128
threads per multiprocessor keep enough reads in flight.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.deepstack_add.transforms import differentiable


def unsupported(hidden: jax.Array, rows: jax.Array, visual_index: jax.Array, level: int) -> str | None:
    """Returns why these arguments (or `jax.ShapeDtypeStruct`s) are not supported, or None."""
    width = hidden.shape[1]
    if width % 128:
        return f"D = {width} is not a multiple of 128"
    if rows.shape[0] == 0:
        return "M = 0: there is no feature row to read"
    for name, dtype in (("hidden is", hidden.dtype), ("rows are", rows.dtype)):
        if dtype not in (jnp.bfloat16, jnp.float32):
            return f"{name} {dtype}, not bfloat16 or float32"
    return None


def deepstack_add(hidden: jax.Array, rows: jax.Array, visual_index: jax.Array, level: int) -> jax.Array:
    """See `pallas_kernels.deepstack_add`. Overwrites hidden if the program donates it or no longer needs it."""
    reason = unsupported(hidden, rows, visual_index, level)
    if reason:
        raise NotImplementedError(reason)
    return _in_place(hidden, rows, visual_index, level)


@differentiable
def _in_place(hidden: jax.Array, rows: jax.Array, visual_index: jax.Array, level: int) -> jax.Array:
    tokens, width = hidden.shape

    def body(hidden_ref: Any, rows_ref: Any, index_ref: Any) -> None:
        token = lax.axis_index("token")
        row = index_ref[token]

        @pl.when(row >= 0)
        def _() -> None:
            added = rows_ref[row, pl.ds(level * width, width)]
            hidden_ref[token] = hidden_ref[token] + added.astype(hidden.dtype)

    out = jax.new_ref(hidden)  # XLA copies hidden only if it is used later
    plgpu.kernel(
        body,
        grid=(tokens,),
        grid_names=("token",),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )(out, rows, visual_index)
    return jax.freeze(out)
