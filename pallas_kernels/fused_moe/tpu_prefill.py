"""fused_moe for many tokens on TPU: (token, expert) rows are sorted by expert and cut into tiles of one expert.

There are two forms. If hidden and the sums of all tokens fit into VMEM (`_in_vmem`), vector instructions gather each
tile's rows and add its results, and no row ever lies in HBM. Otherwise (`_by_row_copies`) a tile fetches its tokens
from HBM row by row, and sends its results to where the sum over k reads them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import sharded, tpu
from pallas_kernels.fused_moe import routing, tpu_blocks
from pallas_kernels.fused_moe.tpu_blocks import LANES, TpuSpec

# The most sorted rows of one kernel. A row's index and routing weight take 8 bytes of 1 MiB SMEM; by row copies, its
# float32 output takes D * 4 bytes of HBM (1 GiB in all at D = 4096). At E = 128, an expert has 512 of them, enough to
# amortise reading its weights.
MAX_ROWS = 65536

_TILE_ROWS = 512, 256, 128
_AT_ONCE = 8  # rows that one turn of a loop moves, or waits for


class Tiles(NamedTuple):
    """How a kernel divides its work."""

    rows: int  # sorted rows of one expert per tile
    step: int  # rows per product; steps past a tile's last row are skipped
    block: int  # columns of F per step


class Schedule(NamedTuple):
    """How a call is divided into kernels."""

    in_vmem: bool  # the form
    part: int  # the most tokens of one kernel
    tiles: Tiles


def schedule(
    top_k_index: jax.Array | jax.ShapeDtypeStruct, down: jax.Array | jax.ShapeDtypeStruct, tpu_spec: TpuSpec
) -> Schedule | None:
    """Returns the form and sizes that move the fewest bytes, or None if not even the smallest tiles fit into VMEM.

    In VMEM, tokens may have to run in more parts, each of which reads the weights again. Row copies cost a pass over
    float32 [T * k, D], and starting them takes at least as long as another one.
    """
    (tokens, top_k), (experts, inner, width) = top_k_index.shape, down.shape
    fewest = max(pl.cdiv(tokens, MAX_ROWS // top_k), 1)
    weights = 3 * experts * inner * width * jnp.dtype(down.dtype).itemsize
    row_copies = 2 * 4 * tokens * top_k * width
    parts = fewest
    while _lines(width, down.dtype) and (parts - fewest) * weights <= row_copies:
        part = pl.cdiv(tokens, parts)
        nbytes = partial(_bytes_in_vmem, part, width, down.dtype)
        # smaller tiles would read weights again for fewer rows, as more parts do
        if tiles := _largest_tiles(nbytes, _TILE_ROWS[:1], tpu_blocks.blocks(inner, tpu_spec.cores), tpu_spec):
            return Schedule(True, part, tiles)
        parts += 1
    nbytes = partial(_bytes_by_row_copies, width, down.dtype)
    tiles = _largest_tiles(nbytes, _TILE_ROWS, tpu_blocks.blocks(inner), tpu_spec)
    return tiles and Schedule(False, MAX_ROWS // top_k, tiles)


def run(
    hidden: jax.Array,
    gate_up: jax.Array,
    down: jax.Array,
    top_k_index: jax.Array,
    top_k_weights: jax.Array,
    *,
    cores: int,
    schedule: Schedule,
) -> jax.Array:
    """Runs equal parts of the tokens one after another; see `pallas_kernels.fused_moe` for arguments and result."""
    form = partial(_in_vmem if schedule.in_vmem else _by_row_copies, cores=cores, tiles=schedule.tiles)
    tokens = len(hidden)
    parts = pl.cdiv(tokens, schedule.part)
    if parts == 1:
        return form(hidden, gate_up, down, top_k_index, top_k_weights)
    pad = -tokens % parts

    def split(x: jax.Array, fill: int) -> jax.Array:
        return jnp.pad(x, ((0, pad), (0, 0)), constant_values=fill).reshape(parts, -1, x.shape[1])

    out = jax.lax.map(
        lambda part: form(part[0], gate_up, down, part[1], part[2]),
        (split(hidden, 0), split(top_k_index, -1), split(top_k_weights, 0)),
    )
    return out.reshape(-1, hidden.shape[1])[:tokens]


def _largest_tiles(
    nbytes: Callable[[Tiles], int], tile_rows: tuple[int, ...], blocks: list[int], tpu_spec: TpuSpec
) -> Tiles | None:
    """Returns the largest tiles whose `nbytes` fit into VMEM, or None.

    `rows` has priority, because a tile's rows are the flops per byte of weights. `block` is next: if it is all of F,
    consecutive tiles of one expert don't fetch its weights again.
    """
    for rows in tile_rows:
        for block in blocks:
            tiles = Tiles(rows, min(rows, tpu_spec.matrix_unit), block)
            if nbytes(tiles) <= tpu_spec.room:
                return tiles
    return None


def _bytes_in_vmem(tokens: int, width: int, dtype: Any, tiles: Tiles) -> int:
    """Returns the bytes of VMEM for x and sums, of all tokens and of a tile, and a step's."""
    return (tokens + tiles.rows) * width * (jnp.dtype(dtype).itemsize + 4) + _bytes_of_step(width, dtype, tiles)


def _bytes_by_row_copies(width: int, dtype: Any, tiles: Tiles) -> int:
    """Returns the bytes of VMEM for two tiles of x and of the result, and a step's."""
    return 2 * tiles.rows * width * (jnp.dtype(dtype).itemsize + 4) + _bytes_of_step(width, dtype, tiles)


def _bytes_of_step(width: int, dtype: Any, tiles: Tiles) -> int:
    """Returns the bytes of VMEM for two of each block of weights, and for values."""
    weights = 2 * 3 * width * tiles.block * jnp.dtype(dtype).itemsize
    return weights + tpu_blocks.bytes_of_values(tiles.step, width, tiles.block, dtype)


def _lines(width: int, dtype: Any) -> int:
    """Returns how many lines of 128 words a row of hidden takes; 0 if it doesn't fill them."""
    words = width * jnp.dtype(dtype).itemsize // 4
    return 0 if words % LANES else words // LANES


def _in_vmem(
    hidden: jax.Array,
    gate_up: jax.Array,
    down: jax.Array,
    top_k_index: jax.Array,
    top_k_weights: jax.Array,
    *,
    cores: int,
    tiles: Tiles,
) -> jax.Array:
    """If two cores share HBM, each takes half of every expert's blocks of F and adds it to its own sums.

    Distributing tiles would make the order of a token's sum depend on the other tokens.
    """
    (tokens, width), (experts, inner, _) = hidden.shape, down.shape
    blocks = inner // tiles.block
    cores = cores if blocks % cores == 0 else 1
    steps = blocks // cores
    order, expert_of, rows_before, tiles_before = _sorted(top_k_index, experts, tiles.rows)
    share = top_k_weights.astype(jnp.float32).T.reshape(-1)
    # rows of whole lines lie one below the other: one instruction moves up to eight lines of a row
    x = tpu.pack_bf16_pairs(hidden, down.dtype).reshape(-1, LANES)
    sums = tokens * width // LANES, LANES

    def block_at(core: Any, turn: Any, step: Any, *tables: Any) -> tuple[Any, Any]:
        _, _, expert_ref, _, tiles_ref = tables
        return expert_ref[turn], jnp.where(tiles_ref[experts] > 0, core * steps + step, 0)

    args = order, share, expert_of, rows_before, tiles_before, x, gate_up, gate_up, down
    out = pl.pallas_call(
        partial(_body_in_vmem, tiles),
        out_shape=sharded.result((cores, *sums), jnp.float32, *args),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(cores, jnp.maximum(tiles_before[experts], 1), steps),
            in_specs=[
                pl.BlockSpec(x.shape, lambda *_: (0, 0), pipeline_mode=pl.Buffered(1)),
                *tpu_blocks.weight_specs(block_at, width, inner, tiles.block),
            ],
            out_specs=pl.BlockSpec((None, *sums), lambda core, *_: (core, 0, 0), pipeline_mode=pl.Buffered(1)),
            scratch_shapes=[
                pltpu.VMEM((tiles.rows * _lines(width, down.dtype), LANES), x.dtype),
                pltpu.VMEM((tiles.rows * width // LANES, LANES), jnp.float32),
            ],
        ),
        compiler_params=tpu_blocks.compiler_params(_bytes_in_vmem(tokens, width, down.dtype, tiles)),
        name="fused_moe_prefill",
    )(*args)
    return jnp.sum(out, axis=0).reshape(hidden.shape).astype(hidden.dtype)


def _body_in_vmem(
    tiles: Tiles,
    order_ref: Any,  # [T * k]
    share_ref: Any,  # float32 [k * T], the routing weights
    expert_ref: Any,  # [tiles]
    rows_before: Any,  # [E + 1]
    tiles_before: Any,  # [E + 1]
    x_ref: Any,  # words of [T, D], in lines
    gate_ref: Any,  # [D, block]
    up_ref: Any,  # [D, block]
    down_ref: Any,  # [block, D]
    sums_ref: Any,  # float32 [T, D] in lines, stays in VMEM for all of the core's tiles
    rows_ref: Any,  # words of [rows, D] in lines, of this tile
    total_ref: Any,  # float32 [rows, D] in lines, of this tile
) -> None:
    turn, step = pl.program_id(1), pl.program_id(2)
    lines_of_x, lines_of_sum = rows_ref.shape[0] // tiles.rows, total_ref.shape[0] // tiles.rows
    tokens = sums_ref.shape[0] // lines_of_sum

    @pl.when((turn == 0) & (step == 0))
    def _():
        @pl.loop(0, tokens)
        def _(token: Any):
            sums_ref[_row(token, lines_of_sum)] = jnp.zeros((lines_of_sum, LANES), jnp.float32)

    @pl.when(turn < tiles_before[tiles_before.shape[0] - 1])
    def _():
        first, count = _rows_of(turn, tiles, expert_ref, rows_before, tiles_before)

        @pl.when(step == 0)
        def _():
            @partial(_for_rows, count)
            def _(row: Any):
                token = order_ref[first + row] & 0xFFFF
                rows_ref[_row(row, lines_of_x)] = x_ref[_row(token, lines_of_x)]

        @pl.loop(0, pl.cdiv(count, tiles.step))
        def _(i: Any):
            def columns(line: int, lines: int) -> Any:
                """The same line of each of the step's rows: 128 of its columns."""
                return pl.ds(i * tiles.step * lines + line, tiles.step, stride=lines)

            words = jnp.concatenate([rows_ref[columns(line, lines_of_x)] for line in range(lines_of_x)], axis=1)
            out = _experts_out(words, gate_ref, up_ref, down_ref)
            for line in range(lines_of_sum):
                at, piece = columns(line, lines_of_sum), out[:, line * LANES : (line + 1) * LANES]
                total_ref[at] = piece + jnp.where(step == 0, 0, total_ref[at])

        @pl.when(step == pl.num_programs(2) - 1)
        def _():
            @partial(_for_rows, count)
            def _(row: Any):
                choice, token = order_ref[first + row] >> 16, order_ref[first + row] & 0xFFFF
                share = share_ref[choice * tokens + token]
                sums_ref[_row(token, lines_of_sum)] += share * total_ref[_row(row, lines_of_sum)]


def _row(row: Any, lines: int) -> Any:
    """Returns the slice of a row that takes so many lines."""
    return pl.ds(pl.multiple_of(row * lines, lines), lines)


def _experts_out(words: jax.Array, gate_ref: Any, up_ref: Any, down_ref: Any) -> jax.Array:
    """Returns what one expert's block of F makes of packed rows, float32 [rows, D]."""
    x = [columns.astype(down_ref.dtype) for columns in tpu.unpack_bf16_pairs(words)]
    gate, up = (tpu_blocks.dot_of_columns(x, weights_ref) for weights_ref in (gate_ref, up_ref))
    return tpu_blocks.dot((jax.nn.silu(gate) * up).astype(down_ref.dtype), down_ref[...])


def _rows_of(tile: Any, tiles: Tiles, expert_ref: Any, rows_before: Any, tiles_before: Any) -> tuple[Any, Any]:
    """Returns the first of a tile's sorted rows, and their number."""
    expert = expert_ref[tile]
    first = rows_before[expert] + (tile - tiles_before[expert]) * tiles.rows
    return first, jnp.minimum(rows_before[expert + 1] - first, tiles.rows)


def _by_row_copies(
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
        partial(_body_by_row_copies, cores, tiles, stride),
        out_shape=sharded.result((top_k * stride, width), jnp.float32, x, order, gate_up, down),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(cores, jnp.maximum(pl.cdiv(tiles_before[experts], cores), 1), inner // tiles.block),
            in_specs=[pl.BlockSpec(memory_space=pl.ANY), *tpu_blocks.weight_specs(block_at, width, inner, tiles.block)],
            out_specs=pl.BlockSpec(memory_space=pl.ANY),
            scratch_shapes=[
                pltpu.VMEM((2, tiles.rows, x.shape[1]), x.dtype),
                pltpu.VMEM((2, tiles.rows, width), jnp.float32),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        compiler_params=tpu_blocks.compiler_params(_bytes_by_row_copies(width, down.dtype, tiles)),
        name="fused_moe_prefill",
    )(order, expert_of, rows_before, tiles_before, x, gate_up, gate_up, down)
    out = out.reshape(top_k, stride, width)[:, :tokens]
    # rows of no expert were never written; the routing weights cost nothing here, where memory is the bottleneck
    is_expert = routing.is_expert(top_k_index, experts)
    share, is_expert = (x.T[..., None] for x in (top_k_weights.astype(jnp.float32), is_expert))
    return jnp.sum(jnp.where(is_expert, share * out, 0), axis=0).astype(hidden.dtype)


def _body_by_row_copies(
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
        return _rows_of(tile, tiles, expert_ref, rows_before, tiles_before)

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
            out = _experts_out(x_ref[slot, rows], gate_ref, up_ref, down_ref)
            total_ref[slot, rows] = out + jnp.where(step == 0, 0, total_ref[slot, rows])

        @pl.when(step == pl.num_programs(2) - 1)
        def _():
            send(tile, slot)

            @pl.when(tile == end - 1)
            def _():
                pl.when(turn >= 1)(lambda: wait_until_sent(tile - 1, 1 - slot))
                wait_until_sent(tile, slot)


def _sorted(top_k_index: jax.Array, experts: int, rows: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Sorts the T * k rows by expert and divides each expert's rows into tiles of at most `rows`.

    Returns, in int32:
        order: [T * k], j << 16 | t of each sorted row.
        expert_of: [maximum number of tiles], the expert of each tile.
        rows_before, tiles_before: [E + 1], rows and tiles of the experts before each one, and of all.
    """
    tokens = top_k_index.shape[0]
    index = routing.nowhere_last(top_k_index, experts).T.reshape(-1)
    # sorting single words is cheaper than sorting pairs; with at most MAX_ROWS rows, 16 bits suffice for the row
    row = jnp.sort(index << 16 | jnp.arange(index.size, dtype=jnp.int32), stable=False) & 0xFFFF
    order = (row // tokens) << 16 | row % tokens

    rows_before = jnp.sum(index[:, None] < jnp.arange(experts + 1, dtype=jnp.int32), axis=0, dtype=jnp.int32)
    tiles_before = jnp.pad(jnp.cumsum(pl.cdiv(jnp.diff(rows_before), rows)), (1, 0))
    tile = jnp.arange(min(index.size, index.size // rows + experts), dtype=jnp.int32)
    expert_of = jnp.sum(tiles_before[1:] <= tile[:, None], axis=1, dtype=jnp.int32)
    return order, jnp.minimum(expert_of, experts - 1), rows_before, tiles_before


def _for_rows(count: Any, start: Callable[[Any], None]) -> None:
    """Calls start(row) for row in 0..count-1, several per turn of the loop."""

    @pl.loop(0, count // _AT_ONCE)
    def _(group: Any):
        for row in range(_AT_ONCE):
            start(group * _AT_ONCE + row)

    pl.loop(count // _AT_ONCE * _AT_ONCE, count)(start)


def _wait_for_rows(count: Any, rows_ref: Any, semaphore: Any) -> None:
    """Waits for `count` row copies to or from rows_ref. A semaphore counts bytes, so one wait can be for several."""

    def wait(rows: int) -> None:
        pltpu.make_async_copy(rows_ref.at[:rows], rows_ref.at[:rows], semaphore).wait()

    pl.loop(0, count // _AT_ONCE)(lambda _: wait(_AT_ONCE))
    pl.loop(0, jax.lax.rem(count, _AT_ONCE))(lambda _: wait(1))


def _tile_of(core: Any, turn: Any, cores: int, count: Any) -> Any:
    """Returns which of `count` tiles a core takes at its turn; `count` and above mean none."""
    return core * pl.cdiv(count, cores) + turn
