"""fused_moe for TPU: two kernels, selected by the number of tokens.

With few tokens (`_decode`), every chosen expert's weights are streamed once past all tokens, which stay in VMEM. With
many (`tpu_prefill`), (token, expert) rows are sorted by expert and pass through their experts in tiles. In both, the
activation exists only in VMEM, and the order of a token's sum depends only on its own experts, not on what other
tokens chose.
Nothing here was timed on a chip: tile sizes follow from counts of bytes and flops (docs/kernels.md).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import sharded
from pallas_kernels.fused_moe import tpu_blocks, tpu_prefill
from pallas_kernels.fused_moe.transforms import differentiable

# With T tokens, an expert's weights give T flops per byte in _decode, however many of the tokens chose it. Chips need
# 186 (v5p) to 560 (v6e) flops per byte before the matrix units are the bottleneck; until then, sorting saves nothing.
DECODE_TOKENS = 256


def unsupported(
    hidden: jax.Array, gate_up: jax.Array, down: jax.Array, top_k_index: jax.Array, top_k_weights: jax.Array
) -> str | None:
    """Returns why these arguments (or `jax.ShapeDtypeStruct`s) are not supported, or None."""
    width, inner = down.shape[2], down.shape[1]
    for name, size in (("D", width), ("F", inner)):
        if size % tpu_blocks.LANES:
            return f"{name} = {size} is not a multiple of {tpu_blocks.LANES}"
    if gate_up.dtype != down.dtype or down.dtype not in (jnp.bfloat16, jnp.float32):
        return f"weights are {gate_up.dtype} and {down.dtype}, not both bfloat16 or float32"
    if hidden.dtype not in (jnp.bfloat16, jnp.float32):
        return f"hidden is {hidden.dtype}, not bfloat16 or float32"
    if down.shape[0] >= 1 << 15:
        return f"E = {down.shape[0]} is more than {(1 << 15) - 1}"
    tpu_spec = tpu_blocks.tpu_spec()
    if tpu_prefill.schedule(top_k_index, down, tpu_spec) is None:
        return f"tiles of D = {width} don't fit into {tpu_spec.vmem >> 20} MiB of VMEM"
    return None


@differentiable
def fused_moe(
    hidden: jax.Array, gate_up: jax.Array, down: jax.Array, top_k_index: jax.Array, top_k_weights: jax.Array
) -> jax.Array:
    """See `pallas_kernels.fused_moe`."""
    args = hidden, gate_up, down, top_k_index, top_k_weights
    if reason := unsupported(*args):
        raise NotImplementedError(reason)
    tpu_spec, tokens, (_, inner, width) = tpu_blocks.tpu_spec(), hidden.shape[0], down.shape
    block = _decode_block(width, inner, down.dtype, tpu_spec.cores)
    if tokens <= DECODE_TOKENS and _decode_bytes(tokens, width, block, down.dtype) <= tpu_spec.room:
        return _decode(*args, cores=tpu_spec.cores, block=block)
    schedule = tpu_prefill.schedule(top_k_index, down, tpu_spec)
    assert schedule is not None
    return tpu_prefill.run(*args, cores=tpu_spec.cores, schedule=schedule)


def _decode_block(width: int, inner: int, dtype: Any, cores: int) -> int:
    """Returns the columns of F per step: the largest block whose three [D, block] matrices take at most 8 MiB.

    It takes 2 us (tpu7x) to 10 us (v5e) to fetch 8 MiB, and about 0.4 us to start a step. Apart from that, smaller is
    better: nothing is multiplied while the first block is fetched, and nothing is fetched while the last one is
    multiplied. If the lanes allow it, each core has the same number of blocks.
    """
    blocks = tpu_blocks.blocks(inner, cores)
    return next(b for b in blocks if b == tpu_blocks.LANES or 3 * width * b * jnp.dtype(dtype).itemsize <= 8 << 20)


def _decode_bytes(tokens: int, width: int, block: int, dtype: Any) -> int:
    """Returns the bytes of VMEM for two of each block of weights, hidden, x, the result twice, and a step's values."""
    size, tokens = jnp.dtype(dtype).itemsize, pl.cdiv(tokens, 16) * 16
    arrays = tokens * (width * (4 + size + 2 * 4) + 4 * tpu_blocks.LANES * 4)
    return 2 * 3 * width * block * size + arrays + tpu_blocks.bytes_of_values(tokens, width, block, dtype)


def _decode(
    hidden: jax.Array,
    gate_up: jax.Array,
    down: jax.Array,
    top_k_index: jax.Array,
    top_k_weights: jax.Array,
    *,
    cores: int,
    block: int,
) -> jax.Array:
    """Streams each chosen expert's weights past all T tokens, `block` of its F columns at a time.

    A token that didn't choose the expert is multiplied too, because the matrix unit has the rows anyway, and is left
    out of the sum. If two cores share HBM, each takes half of every expert's blocks. Distributing whole experts by
    their rank among the chosen ones would make the order of a token's sum depend on the other tokens.
    """
    (tokens, width), (experts, inner, _), top_k = hidden.shape, down.shape, top_k_index.shape[1]
    blocks = inner // block
    cores = min(cores, blocks)
    steps = pl.cdiv(blocks, cores)
    numbers = jnp.arange(experts, dtype=jnp.int32)
    is_chosen = jnp.any(top_k_index.reshape(-1, 1) == numbers, axis=0)
    chosen = jnp.sort(jnp.where(is_chosen, numbers, experts), stable=False)[: min(experts, tokens * top_k)]
    chosen = jnp.minimum(chosen, experts - 1)  # those past the count aren't used, but one is read if it is 0
    count = jnp.sum(is_chosen, dtype=jnp.int32)

    def block_at(core: Any, turn: Any, step: Any, chosen_ref: Any, count_ref: Any) -> tuple[Any, Any]:
        is_work = count_ref[0] > 0  # without work, every step names the same block, so that only one is fetched
        return chosen_ref[turn], jnp.where(is_work, jnp.minimum(core * steps + step, blocks - 1), 0)

    def whole(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec(shape, lambda *_: (0,) * len(shape), pipeline_mode=pl.Buffered(1))

    args = hidden, top_k_index, top_k_weights.astype(jnp.float32), gate_up, gate_up, down
    out = pl.pallas_call(
        partial(_decode_body, blocks),
        out_shape=sharded.result((cores, tokens, width), jnp.float32, *args),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(cores, jnp.maximum(count, 1), steps),
            in_specs=[
                whole(tokens, width),
                whole(tokens, top_k),
                whole(tokens, top_k),
                *tpu_blocks.weight_specs(block_at, width, inner, block),
            ],
            out_specs=pl.BlockSpec((None, tokens, width), lambda core, *_: (core, 0, 0)),
            scratch_shapes=[pltpu.VMEM((tokens, width), down.dtype)],
        ),
        compiler_params=tpu_blocks.compiler_params(_decode_bytes(tokens, width, block, down.dtype)),
        name="fused_moe_decode",
    )(chosen, count[None], *args)
    return jnp.sum(out, axis=0).astype(hidden.dtype)


def _decode_body(
    blocks: int,
    chosen_ref: Any,  # [at most E] the chosen experts
    count_ref: Any,  # [1] their number
    hidden_ref: Any,  # [T, D]
    index_ref: Any,  # [T, k]
    weights_ref: Any,  # [T, k]
    gate_ref: Any,  # [D, block]
    up_ref: Any,  # [D, block]
    down_ref: Any,  # [block, D]
    out_ref: Any,  # float32 [T, D], stays in VMEM for all of the core's blocks
    x_ref: Any,  # [T, D] hidden in the weights' dtype
) -> None:
    core, turn, step = (pl.program_id(axis) for axis in range(3))

    @pl.when((turn == 0) & (step == 0))
    def _():
        out_ref[...] = jnp.zeros_like(out_ref)
        x_ref[...] = hidden_ref[...].astype(x_ref.dtype)

    @pl.when((turn < count_ref[0]) & (core * pl.num_programs(2) + step < blocks))
    def _():
        x = x_ref[...]
        activation = jax.nn.silu(tpu_blocks.dot(x, gate_ref[...])) * tpu_blocks.dot(x, up_ref[...])
        out = tpu_blocks.dot(activation.astype(x.dtype), down_ref[...])
        chose = index_ref[...] == chosen_ref[turn]
        share = jnp.sum(jnp.where(chose, weights_ref[...], 0), axis=1, keepdims=True)
        is_mine = jnp.sum(chose.astype(jnp.int32), axis=1, keepdims=True) > 0
        out_ref[...] += jnp.where(is_mine, share * out, 0)  # 0 * inf would be NaN
