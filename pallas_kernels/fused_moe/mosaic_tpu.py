"""fused_moe for TPU: two Pallas kernels, selected by the number of tokens.

With few tokens (`_decode`), every chosen expert's weights are streamed once past all tokens, which stay in VMEM. With
many (`_prefill`), (token, expert) rows are sorted by expert; each tile of rows fetches its tokens by row copies, passes
through its expert and is sent to where the sum over k reads it. In both, the activation exists only in VMEM, and the
order of a token's sum depends only on its own experts, not on what other tokens chose.
Nothing here was timed on a chip: tile sizes follow from counts of bytes and flops (docs/kernels.md).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import sharded, tpu
from pallas_kernels.fused_moe import routing
from pallas_kernels.fused_moe.transforms import differentiable

# With T tokens, an expert's weights give T flops per byte in _decode, however many of the tokens chose it. Chips need
# 186 (v5p) to 560 (v6e) flops per byte before the matrix units are the bottleneck; until then, sorting saves nothing.
DECODE_TOKENS = 256

# The most sorted rows of one _prefill kernel. A row's index takes 4 bytes of 1 MiB SMEM, its float32 output D * 4 bytes
# of HBM (1 GiB in all at D = 4096). At E = 128, an expert has 512 of them, enough to amortise reading its weights.
PREFILL_ROWS = 65536

_LANES = 128
_ROW_COPIES = 8  # row copies that one turn of a loop starts, or waits for


class TpuSpec(NamedTuple):
    """The properties of a chip on which tile sizes depend."""

    vmem: int  # bytes per core
    cores: int  # cores that share HBM and run one program
    matrix_unit: int  # rows and columns of the matrix unit


class Tiles(NamedTuple):
    """How _prefill divides its work."""

    rows: int  # sorted rows of one expert per tile
    step: int  # rows per product; steps past a tile's last row are skipped
    block: int  # columns of F per step


def unsupported(
    hidden: jax.Array, gate_up: jax.Array, down: jax.Array, top_k_index: jax.Array, top_k_weights: jax.Array
) -> str | None:
    """Returns why these arguments (or `jax.ShapeDtypeStruct`s) are not supported, or None."""
    width, inner = down.shape[2], down.shape[1]
    for name, size in (("D", width), ("F", inner)):
        if size % _LANES:
            return f"{name} = {size} is not a multiple of {_LANES}"
    if gate_up.dtype != down.dtype or down.dtype not in (jnp.bfloat16, jnp.float32):
        return f"weights are {gate_up.dtype} and {down.dtype}, not both bfloat16 or float32"
    if hidden.dtype not in (jnp.bfloat16, jnp.float32):
        return f"hidden is {hidden.dtype}, not bfloat16 or float32"
    if down.shape[0] >= 1 << 15:
        return f"E = {down.shape[0]} is more than {(1 << 15) - 1}"
    tpu_spec = _tpu_spec()
    if _prefill_tiles(width, inner, down.dtype, tpu_spec) is None:
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
    tpu_spec, tokens, (_, inner, width) = _tpu_spec(), hidden.shape[0], down.shape
    block = _decode_block(width, inner, down.dtype, tpu_spec.cores)
    if tokens <= DECODE_TOKENS and _decode_bytes(tokens, width, block, down.dtype) <= _room(tpu_spec):
        return _decode(*args, cores=tpu_spec.cores, block=block)
    tiles = _prefill_tiles(width, inner, down.dtype, tpu_spec)
    assert tiles is not None
    return _prefill(*args, cores=tpu_spec.cores, tiles=tiles)


def _tpu_spec() -> TpuSpec:
    """Returns the spec of the chip that is compiled for; without a TPU, that of the smallest one."""
    if not pltpu.is_tpu_device():
        return TpuSpec(vmem=64 << 20, cores=1, matrix_unit=128)
    info = pltpu.get_tpu_info()
    return TpuSpec(info.vmem_capacity_bytes, info.num_cores, info.mxu_column_size)


def _room(tpu_spec: TpuSpec) -> int:
    """Returns the bytes of VMEM for a kernel's arrays; the compiler may add 1/16 of that, and XLA has the rest."""
    return tpu_spec.vmem * 13 // 16


def _decode_block(width: int, inner: int, dtype: Any, cores: int) -> int:
    """Returns the columns of F per step: the largest block whose three [D, block] matrices take at most 8 MiB.

    It takes 2 us (tpu7x) to 10 us (v5e) to fetch 8 MiB, and about 0.4 us to start a step. Apart from that, smaller is
    better: nothing is multiplied while the first block is fetched, and nothing is fetched while the last one is
    multiplied. If the lanes allow it, each core has the same number of blocks.
    """
    blocks = _blocks(inner // cores if inner % (cores * _LANES) == 0 else inner)
    return next(b for b in blocks if b == _LANES or 3 * width * b * jnp.dtype(dtype).itemsize <= 8 << 20)


def _decode_bytes(tokens: int, width: int, block: int, dtype: Any) -> int:
    """Returns the bytes of VMEM for two of each block of weights, hidden, x, the result twice, and a step's values."""
    size, tokens = jnp.dtype(dtype).itemsize, pl.cdiv(tokens, 16) * 16
    arrays = tokens * (width * (4 + size + 2 * 4) + 4 * _LANES * 4)
    return 2 * 3 * width * block * size + arrays + _bytes_of_values(tokens, width, block, dtype)


def _bytes_of_values(rows: int, width: int, block: int, dtype: Any) -> int:
    """Returns the bytes of VMEM for the values of [rows, D]: gate, up, activation, result and sum, in float32."""
    passes = 4 if dtype == jnp.float32 else 1  # each float32 operand is split into three bfloat16 ones
    return passes * rows * (3 * block + 2 * width) * 4


def _blocks(inner: int) -> list[int]:
    """Returns the sizes that divide F into equal blocks of whole lanes, the largest first."""
    return [b for b in range(inner, 0, -_LANES) if inner % b == 0]


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
                *_weight_specs(block_at, width, inner, block),
            ],
            out_specs=pl.BlockSpec((None, tokens, width), lambda core, *_: (core, 0, 0)),
            scratch_shapes=[pltpu.VMEM((tokens, width), down.dtype)],
        ),
        compiler_params=_compiler_params(_decode_bytes(tokens, width, block, down.dtype)),
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
        activation = jax.nn.silu(_dot(x, gate_ref[...])) * _dot(x, up_ref[...])
        out = _dot(activation.astype(x.dtype), down_ref[...])
        chose = index_ref[...] == chosen_ref[turn]
        share = jnp.sum(jnp.where(chose, weights_ref[...], 0), axis=1, keepdims=True)
        is_mine = jnp.sum(chose.astype(jnp.int32), axis=1, keepdims=True) > 0
        out_ref[...] += jnp.where(is_mine, share * out, 0)  # 0 * inf would be NaN


def _prefill_tiles(width: int, inner: int, dtype: Any, tpu_spec: TpuSpec) -> Tiles | None:
    """Returns the largest tiles that fit into VMEM, or None.

    `rows` has priority, because a tile's rows are the flops per byte of weights. `block` is next: if it is all of F,
    consecutive tiles of one expert don't fetch its weights again.
    """
    for rows in (512, 256, 128):
        for block in _blocks(inner):
            tiles = Tiles(rows, min(rows, tpu_spec.matrix_unit), block)
            if _prefill_bytes(width, tiles, dtype) <= _room(tpu_spec):
                return tiles
    return None


def _prefill_bytes(width: int, tiles: Tiles, dtype: Any) -> int:
    """Returns the bytes of VMEM for two of each block of weights, of x and of the result, and one step's values."""
    size = jnp.dtype(dtype).itemsize
    weights = 2 * 3 * width * tiles.block * size
    arrays = 2 * tiles.rows * width * (size + 4)
    return weights + arrays + _bytes_of_values(tiles.step, width, tiles.block, dtype)


def _prefill(
    hidden: jax.Array,
    gate_up: jax.Array,
    down: jax.Array,
    top_k_index: jax.Array,
    top_k_weights: jax.Array,
    *,
    cores: int,
    tiles: Tiles,
    max_rows: int = PREFILL_ROWS,
) -> jax.Array:
    """Runs equal parts of the tokens one after another, each with at most `max_rows` rows."""
    tokens, top_k = top_k_index.shape
    run = partial(_prefill_part, cores=cores, tiles=tiles)
    parts = pl.cdiv(tokens, max_rows // top_k)
    if parts == 1:
        return run(hidden, gate_up, down, top_k_index, top_k_weights)
    pad = -tokens % parts

    def split(x: jax.Array, fill: int) -> jax.Array:
        return jnp.pad(x, ((0, pad), (0, 0)), constant_values=fill).reshape(parts, -1, x.shape[1])

    out = jax.lax.map(
        lambda part: run(part[0], gate_up, down, part[1], part[2]),
        (split(hidden, 0), split(top_k_index, -1), split(top_k_weights, 0)),
    )
    return out.reshape(-1, hidden.shape[1])[:tokens]


def _prefill_part(
    hidden: jax.Array,
    gate_up: jax.Array,
    down: jax.Array,
    top_k_index: jax.Array,
    top_k_weights: jax.Array,
    *,
    cores: int,
    tiles: Tiles,
) -> jax.Array:
    (tokens, width), (experts, inner, _), top_k = hidden.shape, down.shape, top_k_index.shape[1]
    stride = pl.cdiv(tokens, 8) * 8  # so that [k * stride, D] is [k, stride, D] without a copy
    order, expert_of, rows_before, tiles_before = _sorted(top_k_index, experts, tiles.rows)
    x = tpu.pack_bf16_pairs(hidden, down.dtype)

    def block_at(
        core: Any, turn: Any, step: Any, order_ref: Any, expert_ref: Any, rows_ref: Any, tiles_ref: Any
    ) -> tuple[Any, Any]:
        count = tiles_ref[experts]
        tile = jnp.clip(_tile_of(core, turn, cores, count), 0, jnp.maximum(count - 1, 0))
        return expert_ref[tile], jnp.where(count > 0, step, 0)

    out = pl.pallas_call(
        partial(_prefill_body, cores, tiles, stride),
        out_shape=sharded.result((top_k * stride, width), jnp.float32, x, order, gate_up, down),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(cores, jnp.maximum(pl.cdiv(tiles_before[experts], cores), 1), inner // tiles.block),
            in_specs=[pl.BlockSpec(memory_space=pl.ANY), *_weight_specs(block_at, width, inner, tiles.block)],
            out_specs=pl.BlockSpec(memory_space=pl.ANY),
            scratch_shapes=[
                pltpu.VMEM((2, tiles.rows, x.shape[1]), x.dtype),
                pltpu.VMEM((2, tiles.rows, width), jnp.float32),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        compiler_params=_compiler_params(_prefill_bytes(width, tiles, down.dtype)),
        name="fused_moe_prefill",
    )(order, expert_of, rows_before, tiles_before, x, gate_up, gate_up, down)
    out = out.reshape(top_k, stride, width)[:, :tokens]
    # rows of no expert were never written; the routing weights cost nothing here, where memory is the bottleneck
    is_expert = routing.is_expert(top_k_index, experts)
    share, is_expert = (x.T[..., None] for x in (top_k_weights.astype(jnp.float32), is_expert))
    return jnp.sum(jnp.where(is_expert, share * out, 0), axis=0).astype(hidden.dtype)


def _sorted(top_k_index: jax.Array, experts: int, rows: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Sorts the T * k rows by expert and divides each expert's rows into tiles of at most `rows`.

    Returns, in int32:
        order: [T * k], j << 16 | t of each sorted row.
        expert_of: [maximum number of tiles], the expert of each tile.
        rows_before, tiles_before: [E + 1], rows and tiles of the experts before each one, and of all.
    """
    tokens = top_k_index.shape[0]
    index = routing.nowhere_last(top_k_index, experts).T.reshape(-1)
    # sorting single words is cheaper than sorting pairs; with at most PREFILL_ROWS rows, 16 bits suffice for the row
    row = jnp.sort(index << 16 | jnp.arange(index.size, dtype=jnp.int32), stable=False) & 0xFFFF
    order = (row // tokens) << 16 | row % tokens

    rows_before = jnp.sum(index[:, None] < jnp.arange(experts + 1, dtype=jnp.int32), axis=0, dtype=jnp.int32)
    tiles_before = jnp.pad(jnp.cumsum(pl.cdiv(jnp.diff(rows_before), rows)), (1, 0))
    tile = jnp.arange(min(index.size, index.size // rows + experts), dtype=jnp.int32)
    expert_of = jnp.sum(tiles_before[1:] <= tile[:, None], axis=1, dtype=jnp.int32)
    return order, jnp.minimum(expert_of, experts - 1), rows_before, tiles_before


def _prefill_body(
    cores: int,
    tiles: Tiles,
    stride: int,
    order_ref: Any,  # [T * k]
    expert_ref: Any,  # [tiles]
    rows_before: Any,  # [E + 1]
    tiles_before: Any,  # [E + 1]
    x_hbm: Any,  # words of [T, D]
    gate_ref: Any,  # [D, block]
    up_ref: Any,  # [D, block]
    down_ref: Any,  # [block, D]
    out_hbm: Any,  # float32 [k * stride, D], row j * stride + t
    x_ref: Any,  # words of [2, rows, D]: of this tile and of the next one
    total_ref: Any,  # float32 [2, rows, D]: of this tile and of the previous one, which is being sent
    fetched: Any,  # DMA semaphores [2]
    sent: Any,  # DMA semaphores [2]
) -> None:
    core, turn, step = (pl.program_id(axis) for axis in range(3))
    count = tiles_before[tiles_before.shape[0] - 1]
    tile, end = _tile_of(core, turn, cores, count), jnp.minimum(_tile_of(core + 1, 0, cores, count), count)
    slot = jax.lax.rem(turn, 2)

    def rows_of(tile: Any) -> tuple[Any, Any]:
        """Returns the first of a tile's sorted rows, and their number."""
        expert = expert_ref[tile]
        first = rows_before[expert] + (tile - tiles_before[expert]) * tiles.rows
        return first, jnp.minimum(rows_before[expert + 1] - first, tiles.rows)

    def fetch(tile: Any, slot: Any) -> None:
        first, count = rows_of(tile)

        def start(row: Any) -> None:
            token = order_ref[first + row] & 0xFFFF
            pltpu.make_async_copy(x_hbm.at[pl.ds(token, 1)], x_ref.at[slot, pl.ds(row, 1)], fetched.at[slot]).start()

        _for_rows(count, start)

    def send(tile: Any, slot: Any) -> None:
        first, count = rows_of(tile)

        def start(row: Any) -> None:
            to = order_ref[first + row]
            to = (to >> 16) * stride + (to & 0xFFFF)
            pltpu.make_async_copy(total_ref.at[slot, pl.ds(row, 1)], out_hbm.at[pl.ds(to, 1)], sent.at[slot]).start()

        _for_rows(count, start)

    def wait_until_sent(tile: Any, slot: Any) -> None:
        _wait_for_rows(rows_of(tile)[1], total_ref.at[slot], sent.at[slot])

    @pl.when(tile < end)
    def _():
        _, count = rows_of(tile)

        @pl.when(step == 0)
        def _():
            pl.when(turn == 0)(lambda: fetch(tile, slot))
            pl.when(tile + 1 < end)(lambda: fetch(tile + 1, 1 - slot))
            _wait_for_rows(count, x_ref.at[slot], fetched.at[slot])
            pl.when(turn >= 2)(lambda: wait_until_sent(tile - 2, slot))

        @pl.loop(0, pl.cdiv(count, tiles.step))
        def _(i: Any):
            rows = pl.ds(pl.multiple_of(i * tiles.step, tiles.step), tiles.step)
            columns = [x.astype(down_ref.dtype) for x in tpu.unpack_bf16_pairs(x_ref[slot, rows])]
            activation = jax.nn.silu(_dot_of_columns(columns, gate_ref)) * _dot_of_columns(columns, up_ref)
            out = _dot(activation.astype(down_ref.dtype), down_ref[...])
            total_ref[slot, rows] = out + jnp.where(step == 0, 0, total_ref[slot, rows])

        @pl.when(step == pl.num_programs(2) - 1)
        def _():
            send(tile, slot)

            @pl.when(tile == end - 1)
            def _():
                pl.when(turn >= 1)(lambda: wait_until_sent(tile - 1, 1 - slot))
                wait_until_sent(tile, slot)


def _for_rows(count: Any, start: Callable[[Any], None]) -> None:
    """Calls start(row) for row in 0..count-1, several per turn of the loop."""

    @pl.loop(0, count // _ROW_COPIES)
    def _(group: Any):
        for row in range(_ROW_COPIES):
            start(group * _ROW_COPIES + row)

    pl.loop(count // _ROW_COPIES * _ROW_COPIES, count)(start)


def _wait_for_rows(count: Any, rows_ref: Any, semaphore: Any) -> None:
    """Waits for `count` row copies to or from rows_ref. A semaphore counts bytes, so one wait can be for several."""

    def wait(rows: int) -> None:
        pltpu.make_async_copy(rows_ref.at[:rows], rows_ref.at[:rows], semaphore).wait()

    pl.loop(0, count // _ROW_COPIES)(lambda _: wait(_ROW_COPIES))
    pl.loop(0, jax.lax.rem(count, _ROW_COPIES))(lambda _: wait(1))


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns a @ b in float32: bfloat16 products are exact; float32 takes several passes, summed in short pieces."""
    if a.dtype == jnp.bfloat16:
        return jnp.dot(a, b, precision=jax.lax.Precision.DEFAULT, preferred_element_type=jnp.float32)
    pieces = (slice(at, at + _LANES) for at in range(0, a.shape[1], _LANES))
    first, *rest = (jnp.dot(a[:, piece], b[piece], precision=jax.lax.Precision.HIGHEST) for piece in pieces)
    return sum(rest, first)


def _dot_of_columns(columns: list[jax.Array], weights_ref: Any) -> jax.Array:
    """Returns x @ weights for an x that is given as one or two blocks of columns."""
    size = columns[0].shape[1]
    first, *rest = (_dot(x, weights_ref[i * size : (i + 1) * size]) for i, x in enumerate(columns))
    return first + rest[0] if rest else first


def _weight_specs(block_at: Callable[..., tuple[Any, Any]], width: int, inner: int, block: int) -> list[pl.BlockSpec]:
    """Returns block specs of gate, up and down; block_at(*grid indices, *scalars) returns the expert and block of F.

    Gate and up are blocks of the same array. A block that is the same as in the previous step isn't fetched again.
    """

    def columns(first: int) -> Callable[..., tuple[Any, ...]]:
        def index(*args: Any) -> tuple[Any, ...]:
            expert, number = block_at(*args)
            return expert, 0, first + number

        return index

    return [
        pl.BlockSpec((None, width, block), columns(0)),
        pl.BlockSpec((None, width, block), columns(inner // block)),
        pl.BlockSpec((None, block, width), lambda *args: (*block_at(*args), 0)),
    ]


def _tile_of(core: Any, turn: Any, cores: int, count: Any) -> Any:
    """Returns which of `count` tiles a core takes at its turn; `count` and above mean none."""
    return core * pl.cdiv(count, cores) + turn


def _compiler_params(vmem: int) -> pltpu.CompilerParams:
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "arbitrary", "arbitrary"),
        vmem_limit_bytes=vmem + vmem // 16 + (1 << 20),  # XLA keeps the rest
        # every index comes from a sort of checked indices, and each row copy would be checked again
        disable_bounds_checks=True,
    )
