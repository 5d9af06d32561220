"""ranged_attention and paged_attention for TPU: one Pallas kernel with a running softmax.

A step of the grid is a block of queries of one KV head, or for one query (decoding) all heads of a row. It runs over
the keys in turns of TURN keys, which it copies from where they lie; the next turn's copies, or the next step's first
ones, run meanwhile. Only pages between the first and the last key that a query of the block reads are copied, and
scores exist only in VMEM. Turns begin at fixed multiples of keys, products have fixed shapes, and a turn in which a
query reads nothing leaves its state unchanged, so a query's bits don't depend on other queries or on the capacity.
Nothing here was timed on a chip: sizes follow from counts of bytes and flops (docs/kernels.md).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from pallas_kernels import sharded
from pallas_kernels.attention.running_softmax import LOWEST
from pallas_kernels.attention.transforms import differentiable

# Keys per turn. A turn scales the weighted values of all its rows once, which is as much work as the softmax over
# head_dim keys, so it takes several times as many. Four pages of 128 keys for 4 KV heads are 1 MiB, which takes 0.3 us
# (tpu7x) to 1.3 us (v5e) to fetch: enough to hide a copy's latency.
TURN = 512

# Rows (queries times the query heads that share a KV head) per block: each byte of keys and values serves as many flops
# as there are rows. Chips need 186 (v5p) to 560 (v6e) before the matrix units are the bottleneck.
ROWS = 1024

PAGE = 128  # keys per copy where keys are not in pages
DECODE_HEADS = 8  # the most KV heads of a step with one query: the keys of two turns take 8 MiB of VMEM
SMEM_BYTES = 768 << 10  # of 1 MiB, for the page tables of a call
_LANES = 128


class Layout(NamedTuple):
    """How the work is divided. A step has `heads` KV heads, each with `rows` rows."""

    batch: int  # B
    kv_heads: int  # K
    heads: int  # KV heads per step
    rows: int  # query heads per KV head, times queries per block
    length: int  # queries per block
    blocks: int  # blocks of queries per row of the batch
    page: int  # keys per copy
    row_pages: int  # pages per row of the batch
    pages: int  # pages per turn

    @property
    def steps(self) -> int:
        return self.batch * (self.kv_heads // self.heads) * self.blocks

    def place(self, step: Any) -> tuple[Any, Any, Any]:
        """Returns a step's row of the batch, group of KV heads and block of queries."""
        return (
            step // (self.kv_heads // self.heads * self.blocks),
            step // self.blocks % (self.kv_heads // self.heads),
            step % self.blocks,
        )


def unsupported_ranged(
    query: jax.Array, key: jax.Array, value: jax.Array, start: jax.Array, stop: jax.Array
) -> str | None:
    """Returns why these arguments (or `jax.ShapeDtypeStruct`s) are not supported, or None."""
    if query.shape[2] == 1:
        return "T = 1, for which XLA reads keys and values in place, once"
    return _unsupported(query, key, value, _layout(query, key, PAGE, pl.cdiv(key.shape[2], PAGE)))


def unsupported_paged(
    query: jax.Array,
    key_pages: jax.Array,
    value_pages: jax.Array,
    page_table: jax.Array,
    start: jax.Array,
    stop: jax.Array,
) -> str | None:
    """Returns why these arguments (or `jax.ShapeDtypeStruct`s) are not supported, or None."""
    page = key_pages.shape[2]
    if page % 16 or (TURN % page and page % TURN):
        return f"page = {page} is not a multiple of 16 that divides {TURN} or that {TURN} divides"
    layout = _layout(query, key_pages, page, page_table.shape[1])
    if 4 * page_table.shape[1] > SMEM_BYTES:
        return f"a row's page table takes {4 * page_table.shape[1]} bytes, more than {SMEM_BYTES}"
    return _unsupported(query, key_pages, value_pages, layout)


def _unsupported(query: jax.Array, key: jax.Array, value: jax.Array, layout: Layout) -> str | None:
    if not query.dtype == key.dtype == value.dtype == jnp.bfloat16:
        return f"query, keys and values are {query.dtype}, {key.dtype} and {value.dtype}, not bfloat16"
    if query.shape[3] % 8 or query.shape[3] > 256:
        return f"h = {query.shape[3]} is not a multiple of 8 up to 256"
    vmem = _tpu_spec().vmem
    if _vmem_bytes(layout, query.shape[3]) > vmem * 13 // 16:
        return f"{layout.rows} rows don't fit into {vmem >> 20} MiB of VMEM"
    return None


@differentiable
@sequential_vmap
def ranged_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, start: jax.Array, stop: jax.Array
) -> jax.Array:
    """See `pallas_kernels.attention`."""
    if reason := unsupported_ranged(query, key, value, start, stop):
        raise NotImplementedError(reason)
    padding = -key.shape[2] % PAGE
    key, value = (jnp.pad(x, [(0, 0), (0, 0), (0, padding), (0, 0)]) for x in (key, value))
    key, value = (x.reshape(*x.shape[:2], -1, PAGE, x.shape[3]) for x in (key, value))
    return _attend(query, key, value, None, start, stop, _layout(query, key, PAGE, key.shape[2]))


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
    return _paged_attention(query, key_pages, value_pages, page_table, start, stop).astype(dtype)


@sequential_vmap
def _paged_attention(
    query: jax.Array,
    key_pages: jax.Array,
    value_pages: jax.Array,
    page_table: jax.Array,
    start: jax.Array,
    stop: jax.Array,
) -> jax.Array:
    if reason := unsupported_paged(query, key_pages, value_pages, page_table, start, stop):
        raise NotImplementedError(reason)
    # otherwise XLA may first copy a small pool to VMEM
    key_pages, value_pages = (pltpu.with_memory_space_constraint(x, pltpu.HBM) for x in (key_pages, value_pages))

    def attend(query: jax.Array, page_table: jax.Array, start: jax.Array, stop: jax.Array) -> jax.Array:
        layout = _layout(query, key_pages, key_pages.shape[2], page_table.shape[1])
        return _attend(query, key_pages, value_pages, page_table, start, stop, layout)

    rows = SMEM_BYTES // (4 * page_table.shape[1])  # of the batch, one call after another
    calls = (slice(at, at + rows) for at in range(0, len(query), rows))
    return jnp.concatenate([attend(query[call], page_table[call], start[call], stop[call]) for call in calls])


class TpuSpec(NamedTuple):
    """The properties of a chip on which the layout depends."""

    vmem: int  # bytes per core
    cores: int  # cores that share HBM and run one program


def _tpu_spec() -> TpuSpec:
    """Returns the spec of the chip that is compiled for; without a TPU, that of the smallest one."""
    if not pltpu.is_tpu_device():
        return TpuSpec(vmem=64 << 20, cores=1)
    info = pltpu.get_tpu_info()
    return TpuSpec(info.vmem_capacity_bytes, info.num_cores)


def _layout(query: jax.Array, key: jax.Array, page: int, row_pages: int) -> Layout:
    (batch, heads, length, _), kv_heads = query.shape, key.shape[1]
    groups = heads // kv_heads
    if length == 1:
        per_step = max(n for n in range(1, DECODE_HEADS + 1) if kv_heads % n == 0)
        block = blocks = 1
    else:
        per_step, largest = 1, max(ROWS // groups // 16 * 16, 16)
        blocks = pl.cdiv(length, largest)
        block = pl.cdiv(pl.cdiv(length, blocks), 16) * 16
        blocks = pl.cdiv(length, block)
    pages = max(TURN // page, 1)
    return Layout(batch, kv_heads, per_step, groups * block, block, blocks, page, row_pages, pages)


def _vmem_bytes(layout: Layout, head_dim: int) -> int:
    """Returns the bytes of VMEM for keys and values of two turns, blocks of queries and results, state and scores."""
    width, turn = pl.cdiv(head_dim, _LANES) * _LANES, layout.pages * layout.page
    rows = pl.cdiv(layout.rows, 16) * 16
    keys = 2 * 2 * layout.heads * turn * width * 2
    blocks = 2 * layout.heads * rows * width * (2 + 4)
    state = layout.heads * rows * (2 * _LANES + width) * 4 + 2 * rows * _LANES * 4
    scores = rows * ((layout.heads + 3) * turn + 3 * width) * 4
    return keys + blocks + state + scores


def _attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    page_table: jax.Array | None,
    start: jax.Array,
    stop: jax.Array,
    layout: Layout,
) -> jax.Array:
    """Returns the attention over pages [N, K, page, h] of a page table, or over keys [B, K, S / page, page, h]."""
    batch, heads, length, head_dim = query.shape
    groups, padding = heads // layout.kv_heads, layout.blocks * layout.length - length
    cores = min(_tpu_spec().cores, layout.steps)
    steps = pl.cdiv(layout.steps, cores)
    # padding reads what the last query reads, so that turns are read fully where they would be without it
    start, stop = (jnp.pad(x, [(0, 0), (0, padding)], mode="edge") for x in (start, stop))
    bounds = jnp.stack([start, stop], 1).reshape(batch, 2, layout.blocks, layout.length).swapaxes(1, 2)
    if length == 1:
        grouped = query.reshape(batch, layout.kv_heads, 1, groups, head_dim)
    else:
        grouped = query.reshape(batch, layout.kv_heads, groups, length, head_dim)
        grouped = jnp.pad(grouped, [(0, 0)] * 3 + [(0, padding), (0, 0)])
    per_block = 1 if length == 1 else groups, groups if length == 1 else layout.length

    def place(core: Any, turn: Any) -> tuple[Any, Any, Any]:
        return layout.place(jnp.minimum(core * steps + turn, layout.steps - 1))

    def at_block(core: Any, turn: Any, *_: Any) -> tuple[Any, ...]:
        row, head, block = place(core, turn)
        return row, head, 0, block, 0

    def at_bounds(core: Any, turn: Any, *_: Any) -> tuple[Any, ...]:
        row, _, block = place(core, turn)
        return row, block, 0, 0

    rows = layout.rows
    table = jnp.zeros(1, jnp.int32) if page_table is None else page_table.reshape(-1)
    scalars = *_limits(bounds), table
    arrays = bounds, grouped, key, value
    block_of_queries = pl.BlockSpec((None, layout.heads, *per_block, head_dim), at_block)
    keys = pltpu.VMEM((2, layout.heads, layout.pages * layout.page, head_dim), key.dtype)
    state = pltpu.VMEM((layout.heads, rows, _LANES), jnp.float32)
    of_rows = pltpu.VMEM((rows, _LANES), jnp.int32)
    out = pl.pallas_call(
        partial(_body, layout, page_table is not None),
        out_shape=sharded.result(grouped.shape, jnp.float32, *scalars, *arrays),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(cores, steps),
            in_specs=[
                pl.BlockSpec((None, None, 2, layout.length), at_bounds),
                block_of_queries,
                *[pl.BlockSpec(memory_space=pl.ANY)] * 2,
            ],
            out_specs=block_of_queries,
            scratch_shapes=[
                keys,
                keys,
                state,
                state,
                pltpu.VMEM((layout.heads, rows, head_dim), jnp.float32),
                of_rows,
                of_rows,
                pltpu.VMEM((layout.heads, rows, layout.pages * layout.page), jnp.float32),
                pltpu.SMEM((1,), jnp.int32),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        compiler_params=_compiler_params(_vmem_bytes(layout, head_dim)),
        name="attention_decode" if length == 1 else "attention_prefill",
    )(*scalars, *arrays)
    if length == 1:
        return out.reshape(batch, 1, heads, head_dim)
    return out[:, :, :, :length].reshape(batch, heads, length, head_dim).swapaxes(1, 2)


def _limits(bounds: jax.Array) -> tuple[jax.Array, ...]:
    """Returns int32 [B * blocks] four times: the first key and the one after the last that a query of a block [B,
    blocks, 2, T] reads, and the same of the keys that all of its queries read, except those that read nothing."""
    start, stop = bounds[:, :, 0], bounds[:, :, 1]
    reads = start < stop

    def over(reduce: Callable[..., jax.Array], bound: jax.Array, nothing: int) -> jax.Array:
        return reduce(jnp.where(reads, bound, nothing), axis=2).reshape(-1)

    largest = jnp.iinfo(jnp.int32).max
    first, last = over(jnp.min, start, largest), over(jnp.max, stop, 0)
    return jnp.minimum(first, last), last, over(jnp.max, start, 0), over(jnp.min, stop, largest)


def _body(
    layout: Layout,
    is_paged: bool,
    first_ref: Any,  # [B * blocks] the limits
    last_ref: Any,
    all_from_ref: Any,
    all_to_ref: Any,
    table_ref: Any,  # [B * P]
    bounds_ref: Any,  # [2, T of a block]
    query_ref: Any,  # [heads, G, T of a block, h], or [heads, 1, G, h] of one query
    key_hbm: Any,  # [N, K, page, h] or [B, K, S / page, page, h]
    value_hbm: Any,
    out_ref: Any,  # float32, the shape of query
    key_ref: Any,  # [2, heads, turn, h]
    value_ref: Any,
    maximum_ref: Any,  # float32 [heads, rows, lanes], all lanes equal
    total_ref: Any,
    weighted_ref: Any,  # float32 [heads, rows, h]
    start_ref: Any,  # int32 [rows, lanes], all lanes equal
    stop_ref: Any,
    scores_ref: Any,  # float32 [heads, rows, turn]
    slot_ref: Any,  # [1] the buffer of the next turn
    fetched: Any,  # DMA semaphores [2]
) -> None:
    steps = pl.num_programs(1)
    step = pl.program_id(0) * steps + pl.program_id(1)
    end = jnp.minimum((pl.program_id(0) + 1) * steps, layout.steps)
    size = layout.pages * layout.page

    def turns_of(step: Any) -> tuple[Any, Any]:
        row, _, block = layout.place(step)
        at = row * layout.blocks + block
        return first_ref[at] // size, pl.cdiv(last_ref[at], size)

    def for_pages(step: Any, turn: Any, do: Callable[[Any, Any], None]) -> None:
        """Calls do(page of the row, its place in the turn) for the pages of a turn that the step's queries read."""
        row, _, block = layout.place(step)
        at, before = row * layout.blocks + block, turn * layout.pages
        first = jnp.maximum(first_ref[at] // layout.page, before)
        last = jnp.minimum(pl.cdiv(last_ref[at], layout.page), before + layout.pages)
        pl.loop(first, last)(lambda page: do(page, page - before))

    def fetch(step: Any, turn: Any, slot: Any) -> None:
        row, group, _ = layout.place(step)
        heads = pl.ds(group * layout.heads, layout.heads)

        def start(page: Any, place: Any) -> None:
            at = (table_ref[row * layout.row_pages + page], heads) if is_paged else (row, heads, page)
            for source, target in ((key_hbm, key_ref), (value_hbm, value_ref)):
                target = target.at[slot, :, _keys_of(layout, place)]
                pltpu.make_async_copy(source.at[at], target, fetched.at[slot]).start()

        for_pages(step, turn, start)

    def wait(step: Any, turn: Any, slot: Any) -> None:
        def wait_for(_: Any, place: Any) -> None:
            for target in (key_ref, value_ref):
                target = target.at[slot, :, _keys_of(layout, place)]
                pltpu.make_async_copy(target, target, fetched.at[slot]).wait()

        for_pages(step, turn, wait_for)

    def fetch_next_step(slot: Any) -> None:
        pl.when(step + 1 < end)(lambda: fetch(step + 1, turns_of(step + 1)[0], slot))

    @pl.when(step < end)
    def _():
        first_turn, turns = turns_of(step)

        @pl.when(pl.program_id(1) == 0)
        def _():
            slot_ref[0] = 0
            fetch(step, first_turn, 0)

        maximum_ref[...] = jnp.full_like(maximum_ref, LOWEST)
        total_ref[...] = jnp.zeros_like(total_ref)
        weighted_ref[...] = jnp.zeros_like(weighted_ref)
        for i, ref in enumerate((start_ref, stop_ref)):
            ref[...] = _per_row(bounds_ref[i : i + 1], layout.rows)
        row, _, block = layout.place(step)
        at = row * layout.blocks + block
        all_from, all_to = all_from_ref[at], all_to_ref[at]
        pl.when(first_turn >= turns)(lambda: fetch_next_step(slot_ref[0]))

        @pl.loop(first_turn, turns)
        def _(turn: Any):
            slot = slot_ref[0]
            slot_ref[0] = 1 - slot
            pl.when(turn + 1 < turns)(lambda: fetch(step, turn + 1, 1 - slot))
            pl.when(turn + 1 >= turns)(lambda: fetch_next_step(1 - slot))
            wait(step, turn, slot)
            read_by_all = (turn * size >= all_from) & ((turn + 1) * size <= all_to)

            for head in range(layout.heads):
                query = query_ref[head].reshape(layout.rows, -1)
                scores_ref[head] = _dot(query, key_ref[slot, head], contracted=1) * query.shape[1] ** -0.5

            @pl.when(~read_by_all)
            def _():
                for head in range(layout.heads):
                    _mask(scores_ref.at[head], start_ref, stop_ref, turn * size)
                    _clear_unread(value_ref.at[slot, head], bounds_ref, turn * size)

            for head in range(layout.heads):
                state = maximum_ref.at[head], total_ref.at[head], weighted_ref.at[head]
                _read_turn(state, scores_ref[head], value_ref[slot, head])

        reads = start_ref[:, :1] < stop_ref[:, :1]
        for head in range(layout.heads):
            total = total_ref[head, :, :1]
            out = jnp.where(reads, weighted_ref[head] / jnp.where(total == 0, 1, total), 0)
            out_ref[head] = out.reshape(out_ref.shape[1:])


def _keys_of(layout: Layout, place: Any) -> Any:
    """Returns where in a turn's buffer a page lies."""
    return pl.ds(pl.multiple_of(place * layout.page, layout.page), layout.page)


def _per_row(bound: jax.Array, rows: int) -> jax.Array:
    """Returns int32 [rows, lanes] of int32 [1, T], once for each query head; each row is as many equal numbers."""
    pieces = []
    for at in range(0, bound.shape[1], _LANES):
        piece = bound[:, at : at + _LANES]
        square = piece.shape[1], piece.shape[1]
        # a row becomes a column by sums of one number each
        diagonal = _iota(square, 0) == _iota(square, 1)
        column = jnp.sum(jnp.where(diagonal, jnp.broadcast_to(piece, square), 0), axis=1, keepdims=True)
        pieces.append(jnp.broadcast_to(column, (piece.shape[1], _LANES)))
    column = jnp.concatenate(pieces)
    if bound.shape[1] == 1:
        return jnp.broadcast_to(column, (rows, _LANES))
    return jnp.concatenate([column] * (rows // bound.shape[1]))


def _mask(scores_ref: Any, start_ref: Any, stop_ref: Any, first: Any) -> None:
    """Sets the scores [rows, turn] of keys that a query doesn't read to LOWEST."""
    scores = scores_ref[...]
    slots = first + _iota(scores.shape, 1)
    scores_ref[...] = jnp.where((slots >= start_ref[:, :1]) & (slots < stop_ref[:, :1]), scores, LOWEST)


def _clear_unread(value_ref: Any, bounds_ref: Any, first: Any) -> None:
    """Sets the values [turn, h] that no query of the block reads to 0: their weight is 0, but 0 * NaN would be NaN."""
    value = value_ref[...]
    slots = first + _iota((value.shape[0], bounds_ref.shape[1]), 0)
    is_read = (slots >= bounds_ref[0:1]) & (slots < bounds_ref[1:2])
    is_read = jnp.max(is_read.astype(jnp.float32), axis=1, keepdims=True) > 0
    value_ref[...] = jnp.where(is_read, value.astype(jnp.float32), 0).astype(value.dtype)


def _read_turn(state: tuple[Any, Any, Any], scores: jax.Array, value: jax.Array) -> None:
    """Adds a turn's scores [rows, turn] and values [turn, h] to the state of its queries.

    A turn with and one without a mask take these same steps, so that a query's bits don't depend on which it was.
    """
    maximum_ref, total_ref, weighted_ref = state
    maximum, total, weighted = maximum_ref[...], total_ref[...], weighted_ref[...]
    highest = jnp.max(scores, axis=1, keepdims=True)
    new_maximum = jnp.maximum(maximum, highest)
    # kept above LOWEST, so that unreadable keys weigh 0 even if nothing was readable so far
    weights = jnp.exp(scores - jnp.maximum(new_maximum, LOWEST / 2)[:, :1])
    shrink = jnp.exp(maximum - new_maximum)
    new_total = total * shrink + jnp.sum(weights, axis=1, keepdims=True)
    new_weighted = weighted * shrink[:, :1] + _dot(weights.astype(value.dtype), value, contracted=0)
    reads = highest != LOWEST  # where nothing was read, 1 * x + 0 would not leave every bit of x
    maximum_ref[...] = new_maximum
    total_ref[...] = jnp.where(reads, new_total, total)
    weighted_ref[...] = jnp.where(reads, new_weighted, weighted)


def _dot(a: jax.Array, b: jax.Array, contracted: int) -> jax.Array:
    """Returns the product of bfloat16 over the columns of `a` and an axis of `b`, in float32."""
    dimensions = ((1,), (contracted,)), ((), ())
    return jax.lax.dot_general(
        a, b, dimensions, precision=jax.lax.Precision.DEFAULT, preferred_element_type=jnp.float32
    )


def _iota(shape: tuple[int, int], axis: int) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def _compiler_params(vmem: int) -> pltpu.CompilerParams:
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "arbitrary"),
        vmem_limit_bytes=vmem + vmem // 16 + (1 << 20),  # XLA keeps the rest
        disable_bounds_checks=True,  # page tables come from the caller, and each copy would be checked
    )
