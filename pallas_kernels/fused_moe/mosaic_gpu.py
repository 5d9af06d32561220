"""fused_moe for Hopper (H100, H200): two pairs of Pallas kernels, selected by the number of tokens.

With few tokens (`_decode`), memory is the bottleneck: each active expert's weights are streamed once past all tokens.
With many (`_prefill`), the matrix units are: rows (token, expert) are sorted by expert and tiled, and the kernel
gathers each tile's tokens. In both pairs, the first kernel ends with the activation, the second writes each choice's
row, and XLA sums a token's rows in the order of its choices. Nothing here was timed on a chip: tile sizes follow from
counts of bytes and flops (docs/kernels.md).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper, sharded
from pallas_kernels.fused_moe import routing
from pallas_kernels.fused_moe.transforms import differentiable

# With T tokens, a streamed weight gives T flops per byte. 64 are 307 TFLOP/s at H200's 4.8 TB/s, a third of the peak of
# its matrix units, and a step of x is not larger than one of weights. Above, a tile of 64 rows pads no more than that.
DECODE_TOKENS = 64

# The depth of one step of a product: 128 bytes of bfloat16, the length of a row in shared memory.
K = 64


def unsupported(
    hidden: jax.Array, gate_up: jax.Array, down: jax.Array, top_k_index: jax.Array, top_k_weights: jax.Array
) -> str | None:
    """Returns why these arguments (or `jax.ShapeDtypeStruct`s) are not supported, or None."""
    for name, size in (("D", down.shape[2]), ("F", down.shape[1])):
        if size % 128:
            return f"{name} = {size} is not a multiple of 128"
    if gate_up.dtype != jnp.bfloat16 or down.dtype != jnp.bfloat16:
        return f"weights are {gate_up.dtype} and {down.dtype}, not bfloat16 (wgmma would round float32 to tf32)"
    return None


def fused_moe(
    hidden: jax.Array, gate_up: jax.Array, down: jax.Array, top_k_index: jax.Array, top_k_weights: jax.Array
) -> jax.Array:
    """See `pallas_kernels.fused_moe`."""
    reason = unsupported(hidden, gate_up, down, top_k_index, top_k_weights)
    if reason:
        raise NotImplementedError(reason)
    return _by_tokens(hidden, gate_up, down, top_k_index, top_k_weights)


@differentiable
def _by_tokens(
    hidden: jax.Array, gate_up: jax.Array, down: jax.Array, top_k_index: jax.Array, top_k_weights: jax.Array
) -> jax.Array:
    run = _decode if hidden.shape[0] <= DECODE_TOKENS else _prefill
    return run(hidden, gate_up, down, top_k_index, top_k_weights)


# ---- decode: the weights are wgmma's operand of 64 rows, the tokens (padded to 8) its columns ----


def _decode(
    hidden: jax.Array, gate_up: jax.Array, down: jax.Array, top_k_index: jax.Array, top_k_weights: jax.Array
) -> jax.Array:
    tokens, experts = hidden.shape[0], gate_up.shape[0]
    columns = pl.cdiv(tokens, 8) * 8
    x = jnp.pad(hidden.astype(gate_up.dtype), ((0, columns - tokens), (0, 0)))
    slots = _slots(top_k_index, experts)
    inner = _decode_gate_up(x, gate_up, slots.expert)
    out = _decode_down(inner, down, slots.expert)
    # Slots depend on the other tokens' experts; a token's sum over its own choices doesn't. XLA fuses gather and sum.
    slot = slots.up_to(top_k_index) - 1
    of_choice = out[jnp.maximum(slot, 0), :, jnp.arange(tokens)[:, None]]  # [T, k, D]
    return routing.weighted_sum(of_choice, top_k_index, top_k_weights, experts).astype(hidden.dtype)


class Slots(NamedTuple):
    """The active experts, by number. There is one slot per expert that can be active."""

    expert: jax.Array  # int32 [slots + 1]: E in slots that are not in use, and at the end the number of those in use
    active: jax.Array  # uint32 [E / 32]: bit e % 32 of word e // 32 is set for each active expert e

    def up_to(self, numbers: jax.Array) -> jax.Array:
        """Returns how many active experts have at most these numbers; an active e has slot up_to(e) - 1."""
        count = jnp.zeros_like(numbers)
        for i in range(len(self.active)):  # elementwise, so that XLA computes it where it is read
            beyond = 32 * i + 31 - numbers  # bits of the word that stand for higher numbers
            counted = jnp.uint32(0xFFFFFFFF) >> jnp.clip(beyond, 0, 31).astype(jnp.uint32)
            of_word = lax.population_count(self.active[i] & counted).astype(jnp.int32)
            count += jnp.where(beyond > 31, 0, of_word)
        return count


def _slots(top_k_index: jax.Array, experts: int) -> Slots:
    """Lists the active experts in two launches, a reduction and what is elementwise. A scatter or scan takes more."""
    choices, words = top_k_index.reshape(-1), jnp.arange(pl.cdiv(experts, 32), dtype=jnp.int32)[:, None]
    is_in_word = routing.is_expert(choices, experts) & (choices >> 5 == words)
    bits = jnp.where(is_in_word, jnp.uint32(1) << (choices & 31).astype(jnp.uint32), 0)
    number = jnp.arange(min(experts, choices.size) + 1, dtype=jnp.int32)
    slots = Slots(number, lax.reduce(bits, jnp.uint32(0), lax.bitwise_or, (1,)))
    expert = jnp.zeros_like(number)  # the active expert that has `number` active ones before it, by bisection
    for i in reversed(range((experts - 1).bit_length() + 1)):
        expert += jnp.where(slots.up_to(expert + (2**i - 1)) <= number, 2**i, 0)
    in_use = slots.up_to(jnp.full_like(number, experts - 1))
    return slots._replace(expert=jnp.where(number < number[-1], jnp.minimum(expert, experts), in_use))


def _decode_gate_up(x: jax.Array, gate_up: jax.Array, expert_of_slot: jax.Array) -> jax.Array:
    """[columns, D] -> [slots, columns, F] in the weights' dtype, for the slots in use.

    There is one block per slot and 64 columns of F: for one token of 30B-A3B, 96 blocks that stream 512 KiB each. A
    step holds 64 rows of 64 columns of the gate and of the up (8 KiB each) and 64 columns of x (1 to 8 KiB). Two blocks
    share a multiprocessor and keep at least 128 KiB of weights in flight; its share of 4.8 TB/s needs 36 KiB at a
    latency of 1 us.
    """
    columns, width = x.shape
    num_slots = len(expert_of_slot) - 1
    inner_width = gate_up.shape[2] // 2
    chunks = inner_width // K

    def body(x_ref: Any, weights_ref: Any, expert_ref: Any, inner_ref: Any, staged: Any) -> None:
        slot, chunk = lax.axis_index("slot"), lax.axis_index("chunk")

        @pl.when(slot < expert_ref[num_slots])
        def _() -> None:
            of_expert = weights_ref.at[expert_ref[slot]]

            def products(gate_acc: Any, up_acc: Any) -> tuple[jax.Array, jax.Array]:
                def step(_: Any, gate: Any, up: Any, x: Any) -> None:
                    plgpu.wgmma(gate_acc, gate.transpose((1, 0)), x.transpose((1, 0)))
                    plgpu.wgmma(up_acc, up.transpose((1, 0)), x.transpose((1, 0)))
                    plgpu.wgmma_wait(2)  # these may still run; the previous step is done, and its buffers are refilled

                block = partial(plgpu.BlockSpec, transforms=hopper.swizzled(K), delay_release=1)
                plgpu.emit_pipeline(
                    step,
                    grid=(width // K,),
                    in_specs=[
                        block((K, K), lambda k: (k, chunk)),
                        block((K, K), lambda k: (k, chunk + chunks)),
                        block((columns, K), lambda k: (0, k)),
                    ],
                    max_concurrent_steps=_buffers_of_two_blocks((2 * K + columns) * K * 2),
                )(of_expert, of_expert, x_ref)
                return gate_acc[...], up_acc[...]

            acc = plgpu.WGMMAAccumulatorRef((K, columns))
            gate, up = pl.run_scoped(products, acc, acc)
            staged.transpose((1, 0))[...] = _swiglu(gate, up).astype(x.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(staged, inner_ref.at[slot, :, pl.ds(chunk * K, K)])
            plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        body,
        out_type=sharded.result((num_slots, columns, inner_width), x.dtype, x, gate_up, expert_of_slot),
        grid=(num_slots, chunks),
        grid_names=("slot", "chunk"),
        scratch_types=(plgpu.SMEM((columns, K), x.dtype, transforms=hopper.swizzled(K)),),
        compiler_params=hopper.params(),
    )(x, gate_up, expert_of_slot)


def _decode_down(inner: jax.Array, down: jax.Array, expert_of_slot: jax.Array) -> jax.Array:
    """[slots, columns, F] -> float32 [slots, D, columns], not yet weighted, for the slots in use.

    There is one block per 64 columns of D and group of slots; it processes the group in one stream that doesn't stop
    between experts. 256 blocks are two per multiprocessor, and 8 groups at D = 2048. Each slot's result is written
    separately, because partial sums over a group would make the order of a token's sum depend on the other tokens'
    experts. At 64 tokens of 30B-A3B that is 67 MB beside 1208 MB of weights, and less in proportion to T below.
    """
    num_slots, columns, inner_width = inner.shape
    width = down.shape[2]
    steps_each = inner_width // K
    groups = min(num_slots, max(1, 256 * K // width))
    buffers = _buffers_of_two_blocks((K + columns) * K * 2)

    def body(*refs: Any) -> None:
        inner_ref, weights_ref, expert_ref, out_ref, weights, inners, arrived = refs
        group = lax.axis_index("group")
        of_d = pl.ds(lax.axis_index("chunk") * K, K)
        slots_here = lax.div(expert_ref[num_slots] - group + (groups - 1), groups)  # group, group + groups, ...
        steps = slots_here * steps_each

        def fetch(step: jax.Array) -> None:
            slot = group + lax.div(step, steps_each) * groups
            of_f = pl.ds(lax.rem(step, steps_each) * K, K)
            buffer = lax.rem(step, buffers)
            barrier = arrived.at[buffer]
            plgpu.copy_gmem_to_smem(weights_ref.at[expert_ref[slot], of_f, of_d], weights.at[buffer], barrier)
            plgpu.copy_gmem_to_smem(inner_ref.at[slot, :, of_f], inners.at[buffer], barrier)

        pl.loop(0, jnp.minimum(steps, buffers - 1))(fetch)

        @pl.loop(0, slots_here)
        def _(number: jax.Array) -> None:
            def product(acc: Any) -> jax.Array:
                @pl.loop(0, steps_each)
                def _(k: jax.Array) -> None:
                    step = number * steps_each + k
                    buffer = lax.rem(step, buffers)
                    plgpu.barrier_wait(arrived.at[buffer])
                    plgpu.wgmma(acc, weights.at[buffer].transpose((1, 0)), inners.at[buffer].transpose((1, 0)))
                    plgpu.wgmma_wait(1)  # the previous step is done, and its buffer is refilled
                    pl.when(step + (buffers - 1) < steps)(lambda: fetch(step + (buffers - 1)))

                return acc[...]

            out = pl.run_scoped(product, plgpu.WGMMAAccumulatorRef((K, columns)))
            out_ref[group + number * groups, of_d, :] = out

    return plgpu.kernel(
        body,
        out_type=sharded.result((num_slots, width, columns), jnp.float32, inner, down, expert_of_slot),
        grid=(groups, width // K),
        grid_names=("group", "chunk"),
        scratch_types=(
            plgpu.SMEM((buffers, K, K), down.dtype, transforms=hopper.swizzled(K)),
            plgpu.SMEM((buffers, columns, K), inner.dtype, transforms=hopper.swizzled(K)),
            plgpu.Barrier(num_arrivals=2, num_barriers=buffers),
        ),
        compiler_params=hopper.params(),
    )(inner, down, expert_of_slot)


def _buffers_of_two_blocks(step: int) -> int:
    """Returns how many steps of `step` bytes a block may hold so that two blocks fit 227 KiB; 9 KiB each are spare."""
    return min(8, (104 << 10) // step)


# ---- prefill: rows (token, expert) sorted by expert, in tiles of 64 or 128 rows of one expert ----


class Rows(NamedTuple):
    """Where the T * k rows are after sorting.

    Shapes are static, so there are as many tiles as any routing may need; kernels ignore those past `count`.
    """

    expert: jax.Array  # int32 [tiles]
    count: jax.Array  # int32 [1], tiles in use
    token: jax.Array  # int32 [tiles * rows]; -1 in rows past an expert's last row, which are never read
    share: jax.Array  # float32 [tiles * rows], the routing weight
    of_choice: jax.Array  # int32 [T, k], the row of a token's j-th expert; 0 for a choice that goes nowhere


def _prefill(
    hidden: jax.Array, gate_up: jax.Array, down: jax.Array, top_k_index: jax.Array, top_k_weights: jax.Array
) -> jax.Array:
    experts = gate_up.shape[0]
    # If experts have more than 64 rows, two warp groups of 64 rows halve the weights fetched per row.
    groups = 2 if top_k_index.size > 64 * experts else 1
    rows = _sorted_rows(top_k_index, top_k_weights, experts, 64 * groups)
    inner = _prefill_gate_up(hidden.astype(gate_up.dtype), gate_up, rows, groups)
    out = _prefill_down(inner, down, rows, groups)
    somewhere = routing.is_expert(top_k_index, experts)[..., None]
    # XLA fuses the gather into the sum and makes no [T, k, D]
    return jnp.sum(jnp.where(somewhere, out[rows.of_choice], 0), axis=1).astype(hidden.dtype)


def _sorted_rows(top_k_index: jax.Array, top_k_weights: jax.Array, experts: int, tile: int) -> Rows:
    tokens, top_k = top_k_index.shape
    choices = tokens * top_k
    tiles = (choices + min(experts, choices) * (tile - 1)) // tile
    expert_of_choice = routing.nowhere_last(top_k_index, experts).reshape(-1)
    order = jnp.argsort(expert_of_choice)
    counts = jnp.bincount(expert_of_choice, length=experts).astype(jnp.int32)
    tiles_each = pl.cdiv(counts, tile)
    next_tile = jnp.cumsum(tiles_each)
    tile_numbers = jnp.arange(tiles, dtype=jnp.int32)
    # by default, searchsorted is a loop whose every turn the host of an NVIDIA chip would wait for
    expert = jnp.searchsorted(next_tile, tile_numbers, side="right", method="compare_all")
    # an expert's sorted choices are contiguous: its first row moves to its first tile, and the others follow
    moves_by = (next_tile - tiles_each) * tile - (jnp.cumsum(counts) - counts)
    expert_of_row = expert_of_choice[order]
    row = jnp.arange(choices, dtype=jnp.int32) + moves_by[jnp.minimum(expert_of_row, experts - 1)]
    is_row = expert_of_row < experts
    row_or_none = jnp.where(is_row, row, tiles * tile)
    token, share = (order // top_k).astype(jnp.int32), top_k_weights.reshape(-1)[order].astype(jnp.float32)
    return Rows(
        expert=jnp.minimum(expert, experts - 1).astype(jnp.int32),
        count=next_tile[-1:],
        token=jnp.full(tiles * tile, -1, jnp.int32).at[row_or_none].set(token, mode="drop"),
        share=jnp.zeros(tiles * tile, jnp.float32).at[row_or_none].set(share, mode="drop"),
        of_choice=jnp.zeros(choices, jnp.int32).at[order].set(jnp.where(is_row, row, 0)).reshape(tokens, top_k),
    )


def _prefill_gate_up(x: jax.Array, gate_up: jax.Array, rows: Rows, groups: int) -> jax.Array:
    """[T, D] -> [tiles * rows, F] in the weights' dtype.

    An item of work is a tile of rows times 128 columns of the gate and of the up: 128 float32 registers per thread. One
    warp group streams weights, one gathers token rows, and the others (one per 64 rows) multiply.

    On Hopper, tensor copies can't take rows by index, and with one copy per row, each would cost the arrivals of 128
    threads at a barrier. So the gathering warp group loads 512 bytes of each of 64 rows into registers, with all loads
    in flight at once; stores them row by row; starts the loads of the next 64 rows; and copies the stored rows, 16
    bytes per thread, into the place and layout that wgmma reads.

    Shared memory at 128 rows: 3 steps of weights, 2 x 64 x 128 x 2 B; 5 steps of rows, 128 x 64 x 2 B; 64 x 256 x 2 B
    of gathered rows; 2 x 64 x 64 x 2 B of results: 224 KiB of 227.
    """
    width, inner_width = x.shape[1], gate_up.shape[2] // 2
    tile, tiles = 64 * groups, rows.expert.shape[0]
    columns = 128
    chunks, steps = inner_width // columns, width // K
    part = 256 if width % 256 == 0 else 128  # columns of a row: 4 or 2 bytes per gathering thread
    parts, steps_of_part = width // part, part // K
    weight_buffers, row_buffers = 5 - groups, 5
    blocks = min(hopper.multiprocessors(x, gate_up), tiles * chunks)  # each loops over its share

    def body(*refs: Any) -> None:
        x_ref, weights_ref, expert_ref, count_ref, token_ref, inner_ref, *scratch = refs
        weights, operands, gathered, staged, weights_arrived, weights_consumed, rows_arrived, rows_consumed = scratch
        role = lax.axis_index("role")
        items, place = _share_of_work(count_ref[0] * chunks, chunks, blocks)

        @pl.when(role == groups)
        def stream_weights() -> None:
            plgpu.set_max_registers(40 if groups == 2 else 64, action="decrease")

            @pl.loop(0, items * steps)
            def _(step: jax.Array) -> None:
                at, chunk = place(lax.div(step, steps))
                of_d = pl.ds(lax.rem(step, steps) * K, K)
                expert = expert_ref[at]
                buffer = lax.rem(step, weight_buffers)
                pl.when(step >= weight_buffers)(lambda: plgpu.barrier_wait(weights_consumed.at[buffer]))
                for i, first in enumerate((0, inner_width)):  # gate, up
                    source = weights_ref.at[expert, of_d, pl.ds(first + chunk * columns, columns)]
                    plgpu.copy_gmem_to_smem(source, weights.at[buffer, i], weights_arrived.at[buffer])

            hopper.wait_for_the_last(weights_consumed, items * steps, weight_buffers)

        @pl.when(role == groups + 1)
        def gather_rows() -> None:
            plgpu.set_max_registers(112, action="decrease")
            turns = items * (parts * groups)  # each is a part of 64 rows; the tile's warp groups alternate

            def load(turn: jax.Array) -> list[jax.Array]:
                at, _ = place(lax.div(turn, parts * groups))
                of_d = pl.ds(lax.rem(lax.div(turn, groups), parts) * part, part)
                first = at * tile + lax.rem(turn, groups) * 64
                return [x_ref[jnp.maximum(token_ref[first + i], 0), of_d] for i in range(64)]

            def hand_over(
                turn: jax.Array, state: tuple[list[jax.Array], jax.Array]
            ) -> tuple[list[jax.Array], jax.Array]:
                loaded, skipped = state
                at, _ = place(lax.div(turn, parts * groups))
                group = lax.rem(turn, groups)
                has_rows = _has_rows(token_ref, at * tile, group)

                @pl.when(has_rows)
                def store() -> None:
                    for i, row in enumerate(loaded):
                        gathered[i] = row
                    plgpu.commit_smem()

                following = load(jnp.minimum(turn + 1, turns - 1))  # the last loads its own again, unused

                @pl.when(has_rows)
                def copy() -> None:
                    for i in range(steps_of_part):
                        step = lax.div(turn, groups) * steps_of_part + i - jnp.where(group > 0, skipped, 0)
                        buffer = lax.rem(step, row_buffers)
                        own = group * row_buffers + buffer
                        pl.when(step >= row_buffers)(partial(plgpu.barrier_wait, rows_consumed.at[own]))
                        layout = plgpu.Layout.SMEM_GMEM_COPY((64, K), x.dtype, 128)
                        operands[group, buffer] = plgpu.load(gathered.at[:, pl.ds(i * K, K)], layout=layout)
                        plgpu.commit_smem()
                        plgpu.barrier_arrive(rows_arrived.at[own])

                return following, skipped + jnp.where(has_rows, 0, steps_of_part)

            _, skipped = lax.fori_loop(0, turns, hand_over, (load(jnp.int32(0)), jnp.int32(0)))
            for group in range(groups):
                of_group = items * steps - (skipped if group else 0)
                hopper.wait_for_the_last(rows_consumed, of_group, row_buffers, group * row_buffers)

        @pl.when(role < groups)
        def multiply() -> None:
            plgpu.set_max_registers(176, action="increase")

            def release(of_weights: jax.Array, of_rows: jax.Array) -> None:
                plgpu.barrier_arrive(weights_consumed.at[lax.rem(of_weights, weight_buffers)])
                plgpu.barrier_arrive(rows_consumed.at[role * row_buffers + lax.rem(of_rows, row_buffers)])

            def multiply_item(item: jax.Array, done: jax.Array) -> jax.Array:
                """Takes and returns the number of steps of rows that this warp group has multiplied."""
                at, chunk = place(item)

                def products(gate_acc: Any, up_acc: Any) -> tuple[jax.Array, jax.Array]:
                    @pl.loop(0, steps)
                    def _(k: jax.Array) -> None:
                        of_weights, of_rows = lax.rem(item * steps + k, weight_buffers), lax.rem(done + k, row_buffers)
                        plgpu.barrier_wait(rows_arrived.at[role * row_buffers + of_rows])
                        plgpu.barrier_wait(weights_arrived.at[of_weights])
                        plgpu.wgmma(gate_acc, operands.at[role, of_rows], weights.at[of_weights, 0])
                        plgpu.wgmma(up_acc, operands.at[role, of_rows], weights.at[of_weights, 1])
                        plgpu.wgmma_wait(2)  # these may still run; the previous step is done
                        pl.when(k > 0)(lambda: release(item * steps + k - 1, done + k - 1))

                    gate, up = gate_acc[...], up_acc[...]
                    release(item * steps + (steps - 1), done + (steps - 1))
                    return gate, up

                has_rows = _has_rows(token_ref, at * tile, role)

                @pl.when(has_rows)
                def _() -> None:
                    acc = plgpu.WGMMAAccumulatorRef((64, columns))
                    inner = _swiglu(*pl.run_scoped(products, acc, acc)).astype(x.dtype)
                    for first in range(0, columns, K):
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                        staged[role] = inner[:, first : first + K]
                        plgpu.commit_smem()
                        to = inner_ref.at[pl.ds(at * tile + role * 64, 64), pl.ds(chunk * columns + first, K)]
                        plgpu.copy_smem_to_gmem(staged.at[role], to)

                pl.when(~has_rows)(lambda: _pass_by(weights_arrived, weights_consumed, item * steps, steps))
                return done + jnp.where(has_rows, steps, 0)

            lax.fori_loop(0, items, multiply_item, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        body,
        out_type=sharded.result((tiles * tile, inner_width), x.dtype, x, gate_up, rows.expert),
        grid=(blocks,),
        grid_names=("block",),
        num_threads=groups + 2,
        thread_name="role",
        scratch_types=(
            plgpu.SMEM((weight_buffers, 2, K, columns), x.dtype, transforms=hopper.swizzled(K)),
            plgpu.SMEM((groups, row_buffers, 64, K), x.dtype, transforms=hopper.swizzled(K)),
            plgpu.SMEM((64, part), x.dtype),
            plgpu.SMEM((groups, 64, K), x.dtype, transforms=hopper.swizzled(K)),
            plgpu.Barrier(num_arrivals=2, num_barriers=weight_buffers),
            plgpu.Barrier(num_arrivals=groups, num_barriers=weight_buffers),
            plgpu.Barrier(num_barriers=groups * row_buffers),
            plgpu.Barrier(num_barriers=groups * row_buffers),
        ),
        compiler_params=hopper.params(hands_over_by_barrier=True),
    )(x, gate_up, rows.expert, rows.count, rows.token)


def _prefill_down(inner: jax.Array, down: jax.Array, rows: Rows, groups: int) -> jax.Array:
    """[tiles * rows, F] -> float32 [tiles * rows, D], weighted by routing.

    An item of work is a tile of rows times 256 columns of D: 128 float32 registers per thread. One warp group streams
    rows and weights, and the others multiply. Shared memory at 128 rows: 4 steps of (128 + 256) x 64 x 2 B, and
    2 x 2 x 64 x 32 x 4 B of results: 224 KiB of 227.
    """
    inner_width, width = down.shape[1:]
    tile, tiles = 64 * groups, rows.expert.shape[0]
    columns = 256 if width % 256 == 0 else 128
    chunks, steps = width // columns, inner_width // K
    buffers = 6 - groups
    blocks = min(hopper.multiprocessors(inner, down), tiles * chunks)
    piece = 32  # float32 values per copy of results: 128 bytes of a row

    def body(*refs: Any) -> None:
        inner_ref, weights_ref, expert_ref, count_ref, token_ref, share_ref, out_ref, *scratch = refs
        weights, inners, staged, arrived, consumed = scratch
        role = lax.axis_index("role")
        items, place = _share_of_work(count_ref[0] * chunks, chunks, blocks)

        @pl.when(role == groups)
        def stream() -> None:
            if groups == 2:  # with only two warp groups in all, each has as many registers as it can use
                plgpu.set_max_registers(40, action="decrease")

            @pl.loop(0, items * steps)
            def _(step: jax.Array) -> None:
                at, chunk = place(lax.div(step, steps))
                of_f, of_d = pl.ds(lax.rem(step, steps) * K, K), pl.ds(chunk * columns, columns)
                expert = expert_ref[at]
                buffer = lax.rem(step, buffers)
                barrier = arrived.at[buffer]
                pl.when(step >= buffers)(lambda: plgpu.barrier_wait(consumed.at[buffer]))
                plgpu.copy_gmem_to_smem(weights_ref.at[expert, of_f, of_d], weights.at[buffer], barrier)

                def fetch_rows(count: int) -> None:
                    source, target = inner_ref.at[pl.ds(at * tile, count), of_f], inners.at[buffer, pl.ds(0, count)]
                    plgpu.copy_gmem_to_smem(source, target, barrier)

                is_whole = _has_rows(token_ref, at * tile, groups - 1)
                pl.when(is_whole)(lambda: fetch_rows(tile))
                pl.when(~is_whole)(lambda: fetch_rows(64))

            hopper.wait_for_the_last(consumed, items * steps, buffers)

        @pl.when(role < groups)
        def multiply() -> None:
            if groups == 2:
                plgpu.set_max_registers(232, action="increase")

            def release(step: jax.Array) -> None:
                plgpu.barrier_arrive(consumed.at[lax.rem(step, buffers)])

            @pl.loop(0, items)
            def _(item: jax.Array) -> None:
                at, chunk = place(item)
                own = pl.ds(at * tile + role * 64, 64)

                def product(acc: Any) -> jax.Array:
                    @pl.loop(0, steps)
                    def _(k: jax.Array) -> None:
                        step = item * steps + k
                        buffer = lax.rem(step, buffers)
                        plgpu.barrier_wait(arrived.at[buffer])
                        plgpu.wgmma(acc, inners.at[buffer, pl.ds(role * 64, 64)], weights.at[buffer])
                        plgpu.wgmma_wait(1)  # this one may still run; the previous step is done
                        pl.when(k > 0)(lambda: release(step - 1))

                    out = acc[...]
                    release(item * steps + (steps - 1))
                    return out

                has_rows = _has_rows(token_ref, at * tile, role)

                @pl.when(has_rows)
                def _() -> None:
                    out = pl.run_scoped(product, plgpu.WGMMAAccumulatorRef((64, columns)))
                    of_row = plgpu.load(share_ref.at[own], layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)
                    out = out * lax.broadcast_in_dim(of_row, out.shape, [0])
                    for i in range(columns // piece):
                        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                        staged[role, i % 2] = out[:, i * piece : (i + 1) * piece]
                        plgpu.commit_smem()
                        to = out_ref.at[own, pl.ds(chunk * columns + i * piece, piece)]
                        plgpu.copy_smem_to_gmem(staged.at[role, i % 2], to)

                pl.when(~has_rows)(lambda: _pass_by(arrived, consumed, item * steps, steps))

            plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        body,
        out_type=sharded.result((tiles * tile, width), jnp.float32, inner, down, rows.expert),
        grid=(blocks,),
        grid_names=("block",),
        num_threads=groups + 1,
        thread_name="role",
        scratch_types=(
            plgpu.SMEM((buffers, K, columns), inner.dtype, transforms=hopper.swizzled(K)),
            plgpu.SMEM((buffers, tile, K), inner.dtype, transforms=hopper.swizzled(K)),
            plgpu.SMEM((groups, 2, 64, piece), jnp.float32, transforms=hopper.swizzled(piece, jnp.float32)),
            plgpu.Barrier(num_arrivals=2, num_barriers=buffers),
            plgpu.Barrier(num_arrivals=groups, num_barriers=buffers),
        ),
        compiler_params=hopper.params(hands_over_by_barrier=True),
    )(inner, down, rows.expert, rows.count, rows.token, rows.share)


def _share_of_work(
    items: jax.Array, chunks: int, blocks: int
) -> tuple[jax.Array, Callable[[jax.Array], tuple[jax.Array, jax.Array]]]:
    """Returns the number of items of this block, and a function that maps i to the (tile, chunk) of its i-th item.

    Chunks of one tile are neighbours, so blocks that run at the same time share rows, and mostly an expert, in the L2
    cache.
    """
    block = lax.axis_index("block")

    def place(number: jax.Array) -> tuple[jax.Array, jax.Array]:
        item = block + number * blocks
        return lax.div(item, chunks), lax.rem(item, chunks)

    return lax.div(items - block + (blocks - 1), blocks), place


def _has_rows(token_ref: Any, tile_start: jax.Array, group: jax.Array | int) -> jax.Array:
    """Returns whether a warp group's 64 rows of a tile that is in use hold any. Only an expert's last tile may lack."""
    return token_ref[tile_start + group * 64] >= 0


def _pass_by(arrived: Any, consumed: Any, first: jax.Array, steps: int) -> None:
    """Hands weights that another warp group multiplies back unread, as it waits for all warp groups of the block."""
    buffers = consumed.shape[0]

    @pl.loop(0, steps)
    def _(k: jax.Array) -> None:
        buffer = lax.rem(first + k, buffers)
        plgpu.barrier_wait(arrived.at[buffer])
        plgpu.barrier_arrive(consumed.at[buffer])


# ---- both ----


def _swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    return gate / (1.0 + jnp.exp(-gate)) * up
