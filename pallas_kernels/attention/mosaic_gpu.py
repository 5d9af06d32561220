"""Attention for Hopper (H100, H200): flash attention whose masks are the queries' ranges, over keys or over pages.

The G query heads that share a key head are rows of one product: row t * G + g is token t of head g. A tile of rows
reads blocks of 128 keys, from the first that any of its rows reads to the last, with a running softmax in registers
(arXiv:2205.14135; two warp groups multiply and one copies, as in arXiv:2407.08608). With at most 64 rows (`_decode`),
the keys are also cut into splits that are read side by side, and a second kernel combines their results.

A row's bits depend on its own query and range and on the keys and values in it. Blocks and splits stand at fixed
places, products have fixed shapes, and a block of which a row reads nothing adds 0 to the row's sums. Nothing here was
timed on a chip: sizes follow from counts of bytes and flops (docs/kernels.md).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from pallas_kernels import hopper, sharded
from pallas_kernels.attention.running_softmax import LOWEST
from pallas_kernels.attention.transforms import differentiable

BLOCK = 128  # keys per product
ROWS = 64  # rows per warp group: wgmma's first operand

# Blocks per split: few at first, so that one short row keeps the chip busy; then more, to bound the results' memory.
SPLIT, LONG_SPLIT = 4, 16
SHORT_SPLITS = 32  # up to key 16384
MAX_HEAD_DIM = 128
COLUMNS = 16  # columns of a split's result that one block combines

_BUFFERS = {1: 3, 2: 2}  # of keys and of values, by the number of warp groups that multiply
_COMBINED = 8  # splits that are loaded at once


def unsupported_ranged(query: jax.Array, key: jax.Array, value: jax.Array, *_: jax.Array) -> str | None:
    """Returns why these arguments (or `jax.ShapeDtypeStruct`s) of ranged_attention are not supported, or None."""
    return _unsupported(query, key, value)


def unsupported_paged(
    query: jax.Array, key_pages: jax.Array, value_pages: jax.Array, page_table: jax.Array, *_: jax.Array
) -> str | None:
    """Returns why these arguments (or `jax.ShapeDtypeStruct`s) of paged_attention are not supported, or None."""
    page, head_dim = key_pages.shape[2:]
    if head_dim % 16:
        return f"h = {head_dim} is not a multiple of 16, and all pages would have to be padded"
    if page % 8 or (BLOCK % page and page % BLOCK):
        return f"page = {page} is neither a multiple of {BLOCK} nor a divisor of it that is a multiple of 8"
    return _unsupported(query, key_pages, value_pages, page_table)


def _unsupported(query: jax.Array, key: jax.Array, value: jax.Array, *others: jax.Array) -> str | None:
    for name, x in (("queries", query), ("keys", key), ("values", value)):
        if x.dtype != jnp.bfloat16:
            return f"{name} are {x.dtype}, not bfloat16 (wgmma would round float32 to tf32)"
    if query.shape[3] > MAX_HEAD_DIM:
        return f"h = {query.shape[3]} is more than {MAX_HEAD_DIM}"
    if any(0 in x.shape for x in (query, key, *others)):
        return f"queries {query.shape} or keys {key.shape} are empty"
    return None


@differentiable
def ranged_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, start: jax.Array, stop: jax.Array
) -> jax.Array:
    """See `pallas_kernels.attention`."""
    if reason := unsupported_ranged(query, key, value):
        raise NotImplementedError(reason)
    # XLA pads in the pass that makes these, if it makes them; a tensor copy fills up the rest of the last block with 0
    padding, slots = -query.shape[3] % 16, max(BLOCK - key.shape[2], -key.shape[2] % 8)
    query = jnp.pad(query, [(0, 0)] * 3 + [(0, padding)])
    key, value = (jnp.pad(x, [(0, 0)] * 2 + [(0, slots), (0, padding)]) for x in (key, value))
    scale = (query.shape[3] - padding) ** -0.5
    return _attend(query, key, value, None, start, stop, scale)[..., : query.shape[3] - padding]


def paged_attention(
    query: jax.Array,
    key_pages: jax.Array,
    value_pages: jax.Array,
    page_table: jax.Array,
    start: jax.Array,
    stop: jax.Array,
    dtype: DTypeLike = jnp.float32,
) -> jax.Array:
    """See `pallas_kernels.attention`."""
    if reason := unsupported_paged(query, key_pages, value_pages, page_table):
        raise NotImplementedError(reason)
    return _attend(query, key_pages, value_pages, page_table, start, stop, query.shape[3] ** -0.5, dtype)


class Bounds(NamedTuple):
    """What the rows read, each int32. A row that reads nothing has start >= stop and bounds no tile."""

    start: jax.Array  # [B, tiles * rows]
    stop: jax.Array  # [B, tiles * rows]
    of_tile: jax.Array  # [B, tiles, 7], see `Tile`


def _bounds(start: jax.Array, stop: jax.Array, capacity: int, groups: int, tile: int) -> Bounds:
    """Returns the bounds of the rows of tokens that read [start, stop) [B, T] of `capacity` keys."""
    start, stop = jnp.maximum(start, 0), jnp.minimum(stop, capacity)
    start, stop = (jnp.repeat(x.astype(jnp.int32), groups, axis=1) for x in (start, stop))
    start, stop = (jnp.pad(x, [(0, 0), (0, -x.shape[1] % tile)]) for x in (start, stop))
    of_tile = [x.reshape(len(x), -1, tile) for x in (start, stop)]
    reads, most = of_tile[0] < of_tile[1], jnp.iinfo(jnp.int32).max // 2

    def reduce(reduction: Callable[..., jax.Array], bound: int, otherwise: int) -> jax.Array:
        return reduction(jnp.where(reads, of_tile[bound], otherwise), axis=2)

    last_key = reduce(jnp.max, 1, 0)
    first_key = jnp.minimum(reduce(jnp.min, 0, most), last_key)
    first, last = first_key // BLOCK, pl.cdiv(last_key, BLOCK)
    latest_start, earliest_stop = reduce(jnp.max, 0, 0), reduce(jnp.min, 1, most)
    whole = jnp.clip(pl.cdiv(latest_start, BLOCK), first, last)
    partial = jnp.clip(earliest_stop // BLOCK, whole, last)
    scattered = (latest_start > earliest_stop).astype(jnp.int32)
    return Bounds(start, stop, jnp.stack([first_key, last_key, scattered, first, whole, partial, last], axis=-1))


def _attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    page_table: jax.Array | None,
    start: jax.Array,
    stop: jax.Array,
    scale: float,
    dtype: DTypeLike = jnp.float32,
) -> jax.Array:
    """Returns the attention of both ops; `query` times `scale` times a key is the score."""
    batch, heads, length, head_dim = query.shape
    kv_heads = key.shape[1]
    groups = heads // kv_heads
    count = length * groups
    warp_groups = 1 if count <= ROWS else 2
    tile = ROWS * warp_groups
    rows = query.reshape(batch, kv_heads, groups, length, head_dim).swapaxes(2, 3)
    rows = rows.reshape(batch, kv_heads, count, head_dim)
    # of the 64 rows of a product in decoding, all beyond these hold what was in shared memory before
    rows = jnp.pad(rows, [(0, 0), (0, 0), (0, -count % (8 if warp_groups == 1 else tile)), (0, 0)])
    capacity = key.shape[2] if page_table is None else page_table.shape[1] * key.shape[2]
    bounds = _bounds(start, stop, capacity, groups, tile)
    if warp_groups == 1:
        out = _combine(*_decode(rows, key, value, page_table, bounds, capacity, scale), bounds, dtype)
    else:
        out = _prefill(rows, key, value, page_table, bounds, scale).astype(dtype)
    tables = [] if page_table is None else [page_table]
    out = sharded.varying(out, query, key, value, *tables, start, stop)
    out = out[:, :, :count].reshape(batch, kv_heads, length, groups, head_dim)
    return out.transpose(0, 2, 1, 3, 4).reshape(batch, length, heads, head_dim)


class State(NamedTuple):
    """The running softmax of 64 rows, in registers."""

    weighted: jax.Array  # float32 [64, h]
    maximum: jax.Array  # float32 [64], of the products before they are scaled
    total: jax.Array  # float32 [64]


class Tile(NamedTuple):
    """What the rows of a tile read, as scalars. Those that read nothing don't count."""

    first_key: jax.Array
    last_key: jax.Array  # the one after the last that is read
    scattered: jax.Array  # 0: the ranges have a key in common or touch, so that all keys in between are read
    first: jax.Array  # the block from which on some row reads
    whole: jax.Array  # the block from which on every row reads all
    partial: jax.Array  # the one after the last of which every row reads all
    last: jax.Array  # the one after the last of which some row reads something

    def within(self, first: jax.Array, last: jax.Array) -> "Tile":
        """Returns the tile's blocks from `first` to before `last`."""
        return Tile(*self[:3], *(jnp.clip(block, first, last) for block in self[3:]))


class Streams:
    """Blocks of keys and values on their way from device memory to the warp groups that multiply.

    A buffer passes to them when its copies have arrived, and back when all of them have consumed it.
    """

    def __init__(self, batch: Any, head: Any, key: Any, value: Any, table: Any, keys: Any, values: Any, barriers: Any):
        self.batch, self.head, self.table = batch, head, table
        self.streams = [(key, keys, *barriers[:2]), (value, values, *barriers[2:])]
        self.buffers = keys.shape[0]

    def fetch(self, step: jax.Array, block: jax.Array) -> None:
        """Starts to copy a block of keys and one of values once their buffer is free."""
        buffer = lax.rem(step, self.buffers)
        for source, target, arrived, consumed in self.streams:
            pl.when(step >= self.buffers)(lambda consumed=consumed: plgpu.barrier_wait(consumed.at[buffer]))
            for part, slots in self._parts(source, block):
                plgpu.copy_gmem_to_smem(part, target.at[buffer, slots], arrived.at[buffer])

    def _parts(self, source: Any, block: jax.Array) -> list[tuple[Any, Any]]:
        """Returns the parts of a block in device memory, and their slots in the block."""
        if self.table is None:
            return [(source.at[self.batch, self.head, pl.ds(block * BLOCK, BLOCK)], pl.ds(0, BLOCK))]
        page, last = source.shape[2], self.table.shape[1] - 1
        if page >= BLOCK:
            each = page // BLOCK
            number = self.table[self.batch, lax.div(block, each)]
            return [(source.at[number, self.head, pl.ds(lax.rem(block, each) * BLOCK, BLOCK)], pl.ds(0, BLOCK))]
        each = BLOCK // page
        # the last block may have more pages than the table; a row doesn't read them
        numbers = [self.table[self.batch, jnp.minimum(block * each + i, last)] for i in range(each)]
        return [(source.at[number, self.head], pl.ds(i * page, page)) for i, number in enumerate(numbers)]

    def finish(self, steps: jax.Array) -> None:
        """Waits until all buffers are free."""
        for *_, consumed in self.streams:
            hopper.wait_for_the_last(consumed, steps, self.buffers)


class Ranges(NamedTuple):
    """The ranges of a tile's rows."""

    starts: Any  # of all rows of the tile, in device memory
    stops: Any
    start: jax.Array  # of the warp group's 64 rows, in registers
    stop: jax.Array

    @staticmethod
    def load(starts: Any, stops: Any, first: jax.Array | int) -> "Ranges":
        """Loads those of the 64 rows from the tile's row `first` on."""
        layout, own = plgpu.Layout.WGMMA.reduce(1), pl.ds(first, ROWS)
        of_rows = (plgpu.load(bound.at[own], layout=layout, optimized=False) for bound in (starts, stops))
        return Ranges(starts, stops, *of_rows)


def _read(
    tile: Tile, step: jax.Array, queries: Any, streams: Streams, cleared: Any, ranges: Ranges, scale: float, role: Any
) -> State:
    """Returns the state of a warp group's rows after the tile's blocks, the first of which comes at `step`."""
    (_, keys, keys_arrived, keys_consumed), (_, values, values_arrived, values_consumed) = streams.streams
    warp_groups = 1 if cleared is None else 2
    in_log2 = scale * math.log2(math.e)

    def is_read(slot: jax.Array) -> jax.Array:
        """Returns whether any row of the tile reads each of 64 slots."""

        def by_row(row: jax.Array, found: jax.Array) -> jax.Array:
            return found | ((slot >= ranges.starts[row]) & (slot < ranges.stops[row])).astype(jnp.int32)

        # the rows one by one only where their ranges leave keys out
        count = jnp.where(tile.scattered > 0, warp_groups * ROWS, 0)
        touching = (slot >= tile.first_key) & (slot < tile.last_key) & (tile.scattered == 0)
        return lax.fori_loop(0, count, by_row, touching.astype(jnp.int32))

    def clear_unread(buffer: jax.Array, block: jax.Array) -> None:
        """Replaces values that no row reads by 0, because their weight of 0 would not remove a NaN."""
        for half in range(2) if warp_groups == 1 else (role,):
            part = values.at[buffer, pl.ds(half * ROWS, ROWS)]
            slot = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=plgpu.Layout.WGMMA.reduce(1))
            kept = lax.broadcast_in_dim(is_read(slot + (block * BLOCK + half * ROWS)), part.shape, [0])
            part[...] = jnp.where(kept > 0, plgpu.load(part, layout=plgpu.Layout.WGMMA), 0)
        plgpu.commit_smem()
        if cleared is not None:
            plgpu.barrier_arrive(cleared)
            plgpu.barrier_wait(cleared)

    def masked(products: jax.Array, block: jax.Array) -> jax.Array:
        slot = plgpu.broadcasted_iota(jnp.int32, products.shape, 1, layout=plgpu.Layout.WGMMA) + block * BLOCK
        start, stop = (lax.broadcast_in_dim(bound, products.shape, [0]) for bound in (ranges.start, ranges.stop))
        return jnp.where((slot >= start) & (slot < stop), products, LOWEST)

    def read(block: jax.Array, state: State) -> State:
        is_partial = (block < tile.whole) | (block >= tile.partial)
        at = step + (block - tile.first)
        buffer = lax.rem(at, streams.buffers)

        plgpu.barrier_wait(keys_arrived.at[buffer])
        products = _product(queries, keys.at[buffer].transpose((1, 0)))
        plgpu.barrier_arrive(keys_consumed.at[buffer])
        # Only this differs between blocks. Two variants of the rest could round differently, and a row's bits would
        # then depend on what the other rows of its tile read.
        products = lax.cond(is_partial, lambda x: masked(x, block), lambda x: x, products)
        maximum = jnp.maximum(state.maximum, jnp.max(products, axis=1))
        # kept above LOWEST, so that unreadable keys weigh 0 even if nothing was readable so far
        subtracted = jnp.maximum(maximum, LOWEST / 2) * in_log2
        weights = jnp.exp2(products * in_log2 - lax.broadcast_in_dim(subtracted, products.shape, [0]))
        shrink = jnp.exp2((state.maximum - maximum) * in_log2)
        total = state.total * shrink + jnp.sum(weights, axis=1)
        plgpu.barrier_wait(values_arrived.at[buffer])
        is_edge = (block * BLOCK < tile.first_key) | ((block + 1) * BLOCK > tile.last_key)
        pl.when(is_edge | (is_partial & (tile.scattered > 0)))(lambda: clear_unread(buffer, block))
        of_block = _product(weights.astype(values.dtype), values.at[buffer])
        plgpu.barrier_arrive(values_consumed.at[buffer])
        weighted = state.weighted * lax.broadcast_in_dim(shrink, of_block.shape, [0]) + of_block
        return State(weighted, maximum, total)

    zeros = jnp.zeros(ROWS, jnp.float32)
    state = State(jnp.zeros(queries.shape, jnp.float32), zeros + LOWEST, zeros)
    return lax.fori_loop(tile.first, tile.last, read, state)


def _product(a: Any, b: Any) -> jax.Array:
    """Returns a @ b, float32; `a` is in shared memory or in registers, `b` in shared memory."""

    def run(acc: Any) -> jax.Array:
        plgpu.wgmma(acc, a, b)
        return acc[...]

    return pl.run_scoped(run, plgpu.WGMMAAccumulatorRef((a.shape[0], b.shape[1])))


def _result(state: State, ranges: Ranges) -> tuple[jax.Array, jax.Array]:
    """Returns the attention [64, h] of rows, which is 0 for rows that read nothing, and whether they read (bool [64]).

    A zero is positive, because whether a sum is -0 may depend on blocks that only other rows read.
    """
    shape = state.weighted.shape
    reads = (ranges.start < ranges.stop) & (state.total != 0)
    total = lax.broadcast_in_dim(jnp.where(reads, state.total, 1.0), shape, [0])
    kept = lax.broadcast_in_dim(jnp.where(reads, 1, 0), shape, [0])
    return jnp.where((kept > 0) & (state.weighted != 0), state.weighted / total, 0.0), reads


def _scratch(warp_groups: int, head_dim: int, key: jax.Array, page_table: jax.Array | None) -> dict[str, Any]:
    """Returns the shared memory of a tile: its queries, and the buffers and barriers of keys and values."""
    dtype, buffers = key.dtype, _BUFFERS[warp_groups]
    layout = hopper.swizzled(math.gcd(head_dim, 64))
    copies = 1 if page_table is None else pl.cdiv(BLOCK, key.shape[2])
    stream = plgpu.SMEM((buffers, BLOCK, head_dim), dtype, transforms=layout)
    return {
        "queries": plgpu.SMEM((warp_groups, ROWS, head_dim), dtype, transforms=layout),
        "queries_arrived": plgpu.Barrier(num_barriers=warp_groups),
        "keys": stream,
        "values": stream,
        "barriers": [
            plgpu.Barrier(num_arrivals=arrivals, num_barriers=buffers)
            for arrivals in (copies, warp_groups, copies, warp_groups)
        ],
    }


# ---- many rows: a tile of 128 rows per block, two warp groups that multiply and one that copies ----


def _prefill(
    rows: jax.Array, key: jax.Array, value: jax.Array, page_table: jax.Array | None, bounds: Bounds, scale: float
) -> jax.Array:
    """[B, K, tiles * 128, h] -> float32 [B, K, tiles * 128, h].

    Registers per thread at h = 128: 64 for the sums, 64 for the products, which become 32 of weights, and 64 for the
    block's weighted values. Shared memory: 32 KiB of queries, and 2 blocks of keys and 2 of values of 32 KiB: 160 KiB.
    """
    batch, kv_heads, count, head_dim = rows.shape
    tiles = count // (2 * ROWS)
    tables = [] if page_table is None else [page_table]

    def body(query_ref: Any, key_ref: Any, value_ref: Any, *refs: Any) -> None:
        *table_ref, start_ref, stop_ref, tile_ref, out_ref, cleared, scratch = refs
        role = lax.axis_index("role")
        b, head = lax.axis_index("batch"), lax.axis_index("head")
        at = tiles - 1 - lax.axis_index("tile")  # in causal attention, the last tiles take longest
        tile = Tile(*(tile_ref[b, at, i] for i in range(7)))
        table = table_ref[0] if table_ref else None
        streams = Streams(b, head, key_ref, value_ref, table, scratch["keys"], scratch["values"], scratch["barriers"])

        @pl.when(role == 2)
        def copy() -> None:
            plgpu.set_max_registers(40, action="decrease")
            steps = tile.last - tile.first
            pl.loop(0, steps)(lambda step: streams.fetch(step, tile.first + step))
            streams.finish(steps)

        @pl.when(role < 2)
        def multiply() -> None:
            plgpu.set_max_registers(232, action="increase")
            own = pl.ds(at * (2 * ROWS) + role * ROWS, ROWS)
            queries, arrived = scratch["queries"].at[role], scratch["queries_arrived"].at[role]
            plgpu.copy_gmem_to_smem(query_ref.at[b, head, own], queries, arrived)
            starts, stops = (bound.at[b, pl.ds(at * (2 * ROWS), 2 * ROWS)] for bound in (start_ref, stop_ref))
            ranges = Ranges.load(starts, stops, role * ROWS)
            plgpu.barrier_wait(arrived)
            state = _read(tile, jnp.int32(0), queries, streams, cleared, ranges, scale, role)
            out_ref[b, head, own, :] = _result(state, ranges)[0]

    return plgpu.kernel(
        body,
        out_type=sharded.result(rows.shape, jnp.float32, rows, key, *tables, bounds.start),
        grid=(batch, kv_heads, tiles),
        grid_names=("batch", "head", "tile"),
        num_threads=3,
        thread_name="role",
        scratch_types=(plgpu.Barrier(num_arrivals=2), _scratch(2, head_dim, key, page_table)),
        compiler_params=hopper.params(hands_over_by_barrier=True, approximate=True),
    )(rows, key, value, *tables, *bounds)


# ---- at most 64 rows: the keys are cut into splits, which blocks read side by side ----


def _first_block(split: jax.Array) -> jax.Array:
    return split * SPLIT + jnp.maximum(split - SHORT_SPLITS, 0) * (LONG_SPLIT - SPLIT)


def _splits_before(
    block: Any, minimum: Callable[..., Any] = jnp.minimum, maximum: Callable[..., Any] = jnp.maximum
) -> Any:
    """Returns how many splits begin before a block."""
    beyond = maximum(block - SHORT_SPLITS * SPLIT, 0)
    return minimum(pl.cdiv(block, SPLIT), SHORT_SPLITS) + pl.cdiv(beyond, LONG_SPLIT)


def _splits_of(tile: Tile) -> tuple[jax.Array, jax.Array]:
    """Returns the first split of which a row of the tile reads something, and the one after the last."""
    return _splits_before(tile.first + 1) - 1, _splits_before(tile.last)


def _decode(
    rows: jax.Array,
    key: jax.Array,
    value: jax.Array,
    page_table: jax.Array | None,
    bounds: Bounds,
    capacity: int,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """[B, K, R, h], R = 8, 16 ... 64 -> the results of splits, float32, and the logarithms of their sums.

    The results are [B, K, splits, h / 16, R, 16] and the logarithms (to base 2) [B, K, splits, R, 16], equal along the
    last axis. Only splits of which a row reads something are written. A block reads every `workers`-th of a row's
    splits, so that all multiprocessors have work if the splits suffice.
    """
    batch, kv_heads, count, head_dim = rows.shape
    splits = _splits_before(pl.cdiv(capacity, BLOCK), min, max)
    workers = min(splits, pl.cdiv(2 * hopper.multiprocessors(rows, key), batch * kv_heads))
    pieces = head_dim // COLUMNS
    tables = [] if page_table is None else [page_table]

    def body(query_ref: Any, key_ref: Any, value_ref: Any, *refs: Any) -> None:
        *table_ref, start_ref, stop_ref, tile_ref, out_ref, log_ref, staged, scratch = refs
        role, worker = lax.axis_index("role"), lax.axis_index("worker")
        b, head = lax.axis_index("batch"), lax.axis_index("head")
        tile = Tile(*(tile_ref[b, 0, i] for i in range(7)))
        first, last = _splits_of(tile)
        own_splits = lax.div(jnp.maximum(last - first - worker, 0) + (workers - 1), workers)
        table = table_ref[0] if table_ref else None
        streams = Streams(b, head, key_ref, value_ref, table, scratch["keys"], scratch["values"], scratch["barriers"])

        def split_of(number: jax.Array) -> tuple[jax.Array, Tile]:
            split = first + worker + number * workers
            return split, tile.within(_first_block(split), _first_block(split + 1))

        @pl.when(role == 1)
        def copy() -> None:
            def fetch(number: jax.Array, step: jax.Array) -> jax.Array:
                _, part = split_of(number)
                blocks = part.last - part.first
                pl.loop(0, blocks)(lambda i: streams.fetch(step + i, part.first + i))
                return step + blocks

            streams.finish(lax.fori_loop(0, own_splits, fetch, jnp.int32(0)))

        @pl.when((role == 0) & (own_splits > 0))
        def multiply() -> None:
            queries, arrived = scratch["queries"].at[0], scratch["queries_arrived"].at[0]
            plgpu.copy_gmem_to_smem(query_ref.at[b, head], queries.at[pl.ds(0, count)], arrived)
            ranges = Ranges.load(start_ref.at[b], stop_ref.at[b], 0)
            plgpu.barrier_wait(arrived)

            def write(number: int, piece: jax.Array, target: Any) -> None:
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                staged[number % 2] = piece
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(staged.at[number % 2, pl.ds(0, count)], target)

            def attend(number: jax.Array, step: jax.Array) -> jax.Array:
                split, part = split_of(number)
                state = _read(part, step, queries, streams, None, ranges, scale, role)
                out, reads = _result(state, ranges)
                for i in range(pieces):
                    write(i, out[:, i * COLUMNS : (i + 1) * COLUMNS], out_ref.at[b, head, split, i])
                total = jnp.log2(jnp.where(reads, state.total, 1.0))
                log = jnp.where(reads, state.maximum * (scale * math.log2(math.e)) + total, LOWEST)
                write(pieces, lax.broadcast_in_dim(log, (ROWS, COLUMNS), [0]), log_ref.at[b, head, split])
                if pieces % 2 == 0:  # the next split begins with the same buffer
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                return step + (part.last - part.first)

            lax.fori_loop(0, own_splits, attend, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

    args = rows, key, *tables, bounds.start
    return plgpu.kernel(
        body,
        out_type=(
            sharded.result((batch, kv_heads, splits, pieces, count, COLUMNS), jnp.float32, *args),
            sharded.result((batch, kv_heads, splits, count, COLUMNS), jnp.float32, *args),
        ),
        grid=(batch, kv_heads, workers),
        grid_names=("batch", "head", "worker"),
        num_threads=2,
        thread_name="role",
        scratch_types=(
            plgpu.SMEM((2, ROWS, COLUMNS), jnp.float32, transforms=hopper.swizzled(COLUMNS, jnp.float32)),
            _scratch(1, head_dim, key, page_table),
        ),
        compiler_params=hopper.params(hands_over_by_barrier=True, approximate=True),
    )(rows, key, value, *tables, *bounds)


def _combine(results: jax.Array, logs: jax.Array, bounds: Bounds, dtype: DTypeLike) -> jax.Array:
    """Returns the sum of the splits' results, in the order of splits, weighted by their sums: [B, K, R, h].

    A block combines 16 columns of the rows of one key head. It loads several splits at once and adds one after another.
    """
    batch, kv_heads, _, pieces, count, _ = results.shape

    def body(results_ref: Any, logs_ref: Any, tile_ref: Any, out_ref: Any, staged: Any) -> None:
        b, head, piece = (lax.axis_index(name) for name in ("batch", "head", "piece"))
        first, last = _splits_of(Tile(*(tile_ref[b, 0, i] for i in range(7))))

        def add(turn: jax.Array, state: State) -> State:
            numbers = [first + turn * _COMBINED + i for i in range(_COMBINED)]
            loaded = []
            for number in numbers:
                at = jnp.minimum(number, last - 1)  # not written beyond
                loaded.append((results_ref[b, head, at, piece], logs_ref[b, head, at]))
            for number, (result, log) in zip(numbers, loaded, strict=True):
                log += jnp.where(number < last, 0.0, LOWEST)
                maximum = jnp.maximum(state.maximum, log)
                shrink, weight = jnp.exp2(state.maximum - maximum), jnp.exp2(log - jnp.maximum(maximum, LOWEST / 2))
                state = State(state.weighted * shrink + result * weight, maximum, state.total * shrink + weight)
            return state

        zeros = jnp.zeros((count, COLUMNS), jnp.float32)
        turns = pl.cdiv(last - first, _COMBINED)
        state = lax.fori_loop(0, turns, add, State(zeros, zeros + LOWEST, zeros))
        staged[...] = jnp.where(state.weighted != 0, state.weighted / state.total, 0.0).astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(staged, out_ref.at[b, head, :, pl.ds(piece * COLUMNS, COLUMNS)])
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        body,
        out_type=sharded.result((batch, kv_heads, count, pieces * COLUMNS), dtype, results, logs),
        grid=(batch, kv_heads, pieces),
        grid_names=("batch", "head", "piece"),
        scratch_types=(plgpu.SMEM((count, COLUMNS), dtype),),
        compiler_params=hopper.params(approximate=True),
    )(results, logs, bounds.of_tile)
