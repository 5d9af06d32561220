"""deepstack_add for TPU: a Pallas kernel that adds in place and touches only visual tokens.

The plain form reads and writes all of hidden. Here the positions of the visual tokens are listed first. The kernel
copies their rows of hidden into VMEM, together with the level's columns of their feature rows, adds them, and copies
the sums back; one group of rows is processed while the next one is fetched. The design follows from byte counts and was
not timed on a chip (docs/kernels.md).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import sharded, tpu
from pallas_kernels.deepstack_add.transforms import differentiable

# The position and row of a visual token take 8 bytes of the 1 MiB SMEM.
MAX_TOKENS = 65536

# Rows per group. While one group is added, the next group's rows of hidden and of features are in flight: 64 copies of
# 8 KiB (at D = 2048, float32), half a MiB, which takes 0.6 us at 0.8 TB/s (v5e) and 0.14 us at 3.7 TB/s (tpu7x).
_GROUP = 32


def unsupported(hidden: jax.Array, rows: jax.Array, visual_index: jax.Array, level: int) -> str | None:
    """Returns why these arguments (or `jax.ShapeDtypeStruct`s) are not supported, or None."""
    tokens, width = hidden.shape
    if width % 128:
        return f"D = {width} is not a multiple of 128"
    if hidden.dtype != jnp.float32:
        return f"hidden is {hidden.dtype}, not float32: a copy can't start at every row of 16-bit numbers"
    if rows.dtype not in (jnp.float32, jnp.bfloat16):
        return f"rows are {rows.dtype}, not float32 or bfloat16"
    if rows.dtype == jnp.bfloat16 and width % 256:
        return f"D = {width} is not a multiple of 256, and rows are bfloat16"
    if tokens > MAX_TOKENS:
        return f"T = {tokens} is more than {MAX_TOKENS}"
    return None


@differentiable
def deepstack_add(hidden: jax.Array, rows: jax.Array, visual_index: jax.Array, level: int) -> jax.Array:
    """See `pallas_kernels.deepstack_add`. Overwrites hidden if jit donates it, otherwise a copy of it."""
    if reason := unsupported(hidden, rows, visual_index, level):
        raise NotImplementedError(reason)
    tokens, width = hidden.shape
    first_column = level * width
    if rows.dtype != jnp.float32:  # one pass packs the level's columns into words, which can be copied row by row
        rows, first_column = tpu.pack_bf16_pairs(rows[:, first_column : first_column + width], rows.dtype), 0
    else:  # rows stay in HBM, otherwise XLA may first copy all levels to VMEM
        rows = pltpu.with_memory_space_constraint(rows, pltpu.HBM)
    columns = width // 2 if rows.dtype == jnp.uint32 else width
    is_visual = visual_index >= 0
    token = jnp.arange(tokens, dtype=jnp.int32)
    token = jnp.sort(jnp.where(is_visual, token, tokens), stable=False)
    row = visual_index[jnp.minimum(token, tokens - 1)]  # entries after the visual tokens aren't read
    return pl.pallas_call(
        partial(_body, first_column),
        out_shape=sharded.result(hidden.shape, hidden.dtype, hidden, rows, visual_index),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(1,),
            in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * 2,
            out_specs=pl.BlockSpec(memory_space=pl.ANY),
            scratch_shapes=[
                pltpu.VMEM((2, _GROUP, width), jnp.float32),
                pltpu.VMEM((2, _GROUP, columns), rows.dtype),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        input_output_aliases={4: 0},  # hidden; the three scalar arguments count too
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        name="deepstack_add",
    )(token, row, jnp.sum(is_visual, dtype=jnp.int32)[None], rows, hidden)


def _body(
    first_column: int,
    token_ref: Any,  # [T] the visual tokens
    row_ref: Any,  # [T] their rows
    count_ref: Any,  # [1] their number
    rows_hbm: Any,  # float32 [M, N * D], or uint32 words of one level's columns
    _: Any,  # hidden, which is aliased to out
    out_hbm: Any,  # float32 [T, D]
    sum_ref: Any,  # float32 [2, group, D]
    added_ref: Any,  # float32 or words of [2, group, D]
    fetched: Any,  # DMA semaphores [2]
    sent: Any,  # DMA semaphores [2]
) -> None:
    count = count_ref[0]
    groups = pl.cdiv(count, _GROUP)

    def copies_in(group: Any, i: Any) -> tuple[Any, Any]:
        slot, at = jax.lax.rem(group, 2), group * _GROUP + i
        token, row, columns = pl.ds(token_ref[at], 1), pl.ds(row_ref[at], 1), pl.ds(first_column, added_ref.shape[2])
        return (
            pltpu.make_async_copy(out_hbm.at[token], sum_ref.at[slot, pl.ds(i, 1)], fetched.at[slot]),
            pltpu.make_async_copy(rows_hbm.at[row, columns], added_ref.at[slot, pl.ds(i, 1)], fetched.at[slot]),
        )

    def copy_out(group: Any, i: Any) -> Any:
        slot, token = jax.lax.rem(group, 2), pl.ds(token_ref[group * _GROUP + i], 1)
        return pltpu.make_async_copy(sum_ref.at[slot, pl.ds(i, 1)], out_hbm.at[token], sent.at[slot])

    def rows_of(group: Any) -> Any:
        return pl.loop(0, jnp.minimum(count - group * _GROUP, _GROUP))

    def fetch(group: Any) -> None:
        @rows_of(group)
        def _(i: Any):
            for copy in copies_in(group, i):
                copy.start()

    def wait_until_fetched(group: Any) -> None:
        @rows_of(group)
        def _(i: Any):
            for copy in copies_in(group, i):
                copy.wait()

    def wait_until_sent(group: Any) -> None:
        rows_of(group)(lambda i: copy_out(group, i).wait())

    pl.when(groups > 0)(lambda: fetch(0))

    @pl.loop(0, groups)
    def _(group: Any):
        @pl.when(group + 1 < groups)
        def _():
            pl.when(group >= 1)(lambda: wait_until_sent(group - 1))  # the next group takes its buffer
            fetch(group + 1)

        wait_until_fetched(group)
        slot, first = jax.lax.rem(group, 2), 0
        for added in tpu.unpack_bf16_pairs(added_ref[slot]):
            columns = slice(first, first + added.shape[1])
            sum_ref[slot, :, columns] += added
            first = columns.stop
        rows_of(group)(lambda i: copy_out(group, i).start())

    pl.when(groups >= 2)(lambda: wait_until_sent(groups - 2))
    pl.when(groups >= 1)(lambda: wait_until_sent(groups - 1))
