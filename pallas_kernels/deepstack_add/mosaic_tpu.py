"""deepstack_add for TPU: a Pallas kernel that adds in place and touches visual tokens only.

The plain form reads and writes all of hidden. Here the positions of the visual tokens are listed first; the kernel
copies their rows of hidden into VMEM, with the level's columns of their rows, adds, and copies the sums back, one group
of rows while the next one comes. Reasoned from bytes, not timed on a chip (docs/kernels.md).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import sharded, tpu
from pallas_kernels.deepstack_add.transforms import differentiable

# Positions and rows of the visual tokens take 8 bytes each of 1 MiB SMEM.
MAX_TOKENS = 65536

# Rows at a time. While one group is added the next one's rows of hidden and rows are under way: 64 copies of 8 KiB (at
# D = 2048, float32), half a MiB, which is what 0.8 TB/s (v5e) to 3.7 (tpu7x) bring in 0.6 to 0.14 us.
_GROUP = 32


def unsupported(hidden: jax.Array, rows: jax.Array, visual_index: jax.Array, level: int) -> str | None:
    """Why these arguments (or `jax.ShapeDtypeStruct`s) can't be served, or None."""
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
    """See `pallas_kernels.deepstack_add`. Overwrites hidden where jit donates it, else a copy of it."""
    if reason := unsupported(hidden, rows, visual_index, level):
        raise NotImplementedError(reason)
    tokens, width = hidden.shape
    first_column = level * width
    if rows.dtype != jnp.float32:  # a pass over the level's columns makes words of them, which can be copied by row
        rows, first_column = tpu.pack_bf16_pairs(rows[:, first_column : first_column + width], rows.dtype), 0
    else:  # where they lie, else XLA may bring all levels into VMEM beforehand
        rows = pltpu.with_memory_space_constraint(rows, pltpu.HBM)
    columns = width // 2 if rows.dtype == jnp.uint32 else width
    is_visual = visual_index >= 0
    token = jnp.arange(tokens, dtype=jnp.int32)
    token = jnp.sort(jnp.where(is_visual, token, tokens), stable=False)
    row = visual_index[jnp.minimum(token, tokens - 1)]  # what follows the visual ones isn't read
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
        input_output_aliases={4: 0},  # rows are number 3 because the scalars count
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        name="deepstack_add",
    )(token, row, jnp.sum(is_visual, dtype=jnp.int32)[None], rows, hidden)


def _body(
    first_column: int,
    token_ref: Any,  # [T] the visual tokens
    row_ref: Any,  # [T] their rows
    count_ref: Any,  # [1] how many they are
    rows_hbm: Any,  # float32 [M, N * D], or uint32 words of one level's columns
    _: Any,  # hidden, which out is
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
            pl.when(group >= 1)(lambda: wait_until_sent(group - 1))  # from where the next group goes
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
