"""Carries rows from one node's device to another's: device -> host -> Mooncake -> host -> device, block by block.

While a group of blocks is on the wire, the sender computes its checksums and reads the next group, and the receiver
copies the previous one out. Rows are written directly from host-visible memory: on a CPU from the encoder's own arrays,
on an accelerator from pinned memory. Transports that need registered memory (rdma) send from a small ring of it. The
receiving host copies each row once, from the receive pool to the request's own memory, which on a CPU becomes an array
that prefill takes. Checksums of copied bytes are computed while the bytes are still in the CPU's cache.
"""

import contextlib
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from deepstack_jax.disagg.encode.outgoing import OutgoingRequest
from deepstack_jax.disagg.transports import Transport, WriteSegment
from deepstack_jax.disagg.wire.device_rows import page_aligned
from deepstack_jax.disagg.wire.layout import (
    AUX_DATAS,
    AUX_LENGTH,
    DEEPSTACK_EMBEDDINGS,
    FILL_IDS,
    INPUT_EMBEDDINGS,
    MROPE_POSITIONS,
    ROW_BUFFERS,
    BufferLayout,
    Span,
)
from deepstack_jax.disagg.wire.rows import StageTimes, block_runs, first_row
from deepstack_jax.disagg.wire.seals import NO_PURPOSE, BlockSeal, Purpose
from deepstack_jax.rounding import cdiv

_log = logging.getLogger(__name__)

SLOT_BYTES = 2 << 20  # bytes of rows per group: each group wakes every thread of the pipeline once
SLOTS = 4
FAILED_WRITE_HOLD_S = 60.0  # sources of a failed write stay alive this long: the engine may still read them


class WriteSkippedError(Exception):
    """The write was not started: it was no longer needed, or the bridge was closed."""


class BlockWrite(NamedTuple):
    """The outcome of writing one block."""

    token_block: int
    pool_block: int
    checksum: bytes
    num_bytes: int
    error: BaseException | None


OnWritten = Callable[[list[BlockWrite]], None]


class SendBridge:
    """Writes blocks of requests into one peer's receive pool; a thread prepares groups while the transport writes.

    Each peer has its own bridge, with its own thread and ring, so that a stopped peer delays no other.
    """

    def __init__(
        self,
        transport: Transport,
        session: str,
        layout: BufferLayout,
        slot_bytes: int = SLOT_BYTES,
        slots: int = SLOTS,
        seal: BlockSeal | None = None,
    ):
        """`session`, `layout` and `seal` are the peer's; up to `slots` groups of `slot_bytes` are in flight."""
        self.times = StageTimes()
        self._transport = transport
        self._session = session
        self._layout = layout
        self._widths = [length // layout.block_size for length in layout.item_lens]  # bytes per token
        self._widths[AUX_DATAS] = 4  # bytes per integer
        row_bytes = self._widths[INPUT_EMBEDDINGS] + sum(self._widths[DEEPSTACK_EMBEDDINGS:])
        self._seal = seal or BlockSeal()
        # encryption has to write somewhere
        self._staged = transport.needs_registered_sources or self._seal.encrypts
        self._slot_rows = max(layout.block_size, slot_bytes // row_bytes)
        self._slot_tokens = max(layout.block_size, slot_bytes // 128)
        staged_rows = self._slot_rows if self._staged else 0
        counts = [staged_rows, self._slot_tokens, self._slot_tokens, AUX_LENGTH, staged_rows]
        self._ring = page_aligned(slots * sum(n * w for n, w in zip(counts, self._widths, strict=False)))
        self._ring.fill(0)
        transport.register(self._ring)
        self._free: queue.SimpleQueue[list[np.ndarray] | None] = queue.SimpleQueue()  # None closes the bridge
        for slot in np.split(self._ring, slots):
            areas = np.split(slot, np.cumsum([n * w for n, w in zip(counts, self._widths, strict=False)])[:-1])
            self._free.put([area.reshape(-1, width) for area, width in zip(areas, self._widths, strict=True)])
        self._groups: queue.SimpleQueue[_Group | None] = queue.SimpleQueue()
        self._held: deque[tuple[float, object]] = deque()  # sources of failed writes, with the time of the failure
        self._lock = threading.Lock()
        self._in_flight, self._busy_since = 0, 0.0
        self._closed = self._unregistered = False
        self._thread = threading.Thread(target=self._run, name=f"send {session}", daemon=True)
        self._thread.start()

    def write(
        self,
        request: OutgoingRequest,
        blocks: Sequence[tuple[int, int]],
        on_end: OnWritten,
        should_write: Callable[[], bool] = lambda: True,
        purpose: Purpose = NO_PURPOSE,
    ) -> None:
        """Starts writing `blocks`, pairs (token block, pool block), and returns immediately.

        `on_end` receives every block once, in this order and several per call, when no part of them is in flight.
        `should_write` is called just before a group is read; if it returns False, the group's blocks end with
        `WriteSkippedError`. Both run in threads of the bridge and the transport, so they must be short. The peer opens
        blocks with the same `purpose`.

        Raises:
            ValueError: the prompt or the peer's pool has no such block; nothing has been written.
        """
        count = cdiv(len(request.fill_ids), self._layout.block_size)
        for token_block, pool_block in blocks:
            if not 0 <= token_block < count:
                raise ValueError(f"token block {token_block} is outside the prompt of {count} blocks")
            if not 0 <= pool_block < self._layout.num_blocks:
                raise ValueError(f"block {pool_block} is outside the pool of {self._layout.num_blocks} blocks")
        for group in self._group_blocks(_WriteCall(request, on_end, should_write, purpose), blocks):
            self._groups.put(group)
        if self._closed and not self._thread.is_alive():
            self._skip_all()

    @property
    def alive(self) -> bool:
        """Whether the thread runs, which it does until `close`."""
        return self._closed or self._thread.is_alive()

    def close(self) -> None:
        """Fails the blocks that are waiting. Writes in flight end by themselves, and their memory lives until then."""
        self._closed = True
        self._groups.put(None)
        self._free.put(None)
        self._thread.join()
        self._skip_all()
        self._unregister_when_idle()

    def _group_blocks(self, call: "_WriteCall", blocks: Sequence[tuple[int, int]]) -> Iterator["_Group"]:
        """Yields groups of blocks that are adjacent in both the prompt and the pool.

        The first groups are smaller to fill the pipeline quickly. The last ones are smaller because nothing overlaps
        with the final copy, which has to wait for its write.
        """
        size = self._layout.block_size
        group, rows, left = _Group(call), 0, len(blocks) * size
        rows_before = call.request.rows_before
        for token_block, pool_block in blocks:
            start = token_block * size
            stop = min(start + size, len(rows_before) - 1)
            block = _Block(token_block, pool_block, slice(start, stop), int(rows_before[stop] - rows_before[start]))
            max_rows = max(self._slot_rows >> 2, min(self._slot_rows >> max(0, 2 - group.number), left // 4))
            if group.blocks and (
                (group.blocks[-1].token_block + 1, group.blocks[-1].pool_block + 1) != (token_block, pool_block)
                or rows + block.num_rows > max_rows
                or (len(group.blocks) + 1) * size > self._slot_tokens
            ):
                yield group
                left -= size * len(group.blocks)
                group, rows = _Group(call, group.number + 1), 0
            group.blocks.append(block)
            rows += block.num_rows
        if group.blocks:
            yield group

    def _run(self) -> None:
        while self._send_next():  # a function of its own: an idle thread must not hold a request's rows
            pass

    def _send_next(self) -> bool:
        """Sends one group; returns False when the bridge closes."""
        if (group := self._groups.get()) is None:
            return False
        slot = self._free.get()
        while self._held and self._held[0][0] < time.monotonic() - FAILED_WRITE_HOLD_S:
            self._held.popleft()
        try:
            if slot is None or self._closed:
                raise WriteSkippedError(f"not written to {self._session}: the bridge was closed")
            if not group.call.should_write():
                raise WriteSkippedError(f"not written to {self._session}: the request no longer needs it")
            self._send(group, slot)
        except Exception as error:  # an encoder's failure surfaces here, when its rows are read
            if slot is not None:
                self._wipe(group, slot)
            self._free.put(slot)
            group.end(None, error)
        return True

    def _send(self, group: "_Group", slot: list[np.ndarray]) -> None:
        started, waited = time.perf_counter(), self.times.device
        segments, parts = self._build_segments(group, slot)
        sums = self._seals(group, parts) if self._staged else None  # this also fills the copies
        write, failure, blocks = self._submit(segments), None, None
        try:  # the write reads the slot from here on, so that only its end may give the slot back
            sums = sums or self._seals(group, parts)  # without copies, this overlaps with the write
            blocks = [
                BlockWrite(block.token_block, block.pool_block, digest, sum(each.target.nbytes for each in own), None)
                for block, digest, own in zip(group.blocks, sums, parts, strict=True)
            ]
        except Exception as error:
            failure = error
        self.times.host += time.perf_counter() - started - (self.times.device - waited)

        def ended(write: "Future[None]") -> None:
            error = write.exception() or failure
            if error and not self._staged:  # the engine may still read the sources
                self._held.append((time.monotonic(), parts))
            self._wipe(group, slot)
            self._free.put(slot)
            self._unregister_when_idle()
            group.end(blocks, error)

        write.add_done_callback(ended)

    def _wipe(self, group: "_Group", slot: list[np.ndarray]) -> None:
        """With a key, leaves nothing in the clear in the ring, which others may read."""
        if not self._seal.has_key or self._seal.encrypts:
            return
        tokens = max(len(group.blocks) * self._layout.block_size, AUX_LENGTH)
        rows = sum(block.num_rows for block in group.blocks)
        for buffer, area in enumerate(slot):
            area[: rows if buffer in ROW_BUFFERS else tokens] = 0

    def _seals(self, group: "_Group", parts: list[list["_Part"]]) -> list[bytes]:
        """Fills the targets of each block's parts, and returns its seal."""
        return [
            self._seal.seal(group.call.purpose, block.token_block, block.pool_block, own)
            for block, own in zip(group.blocks, parts, strict=True)
        ]

    def _build_segments(
        self, group: "_Group", slot: list[np.ndarray]
    ) -> tuple[list[WriteSegment], list[list["_Part"]]]:
        """Returns the group's segments, and the parts of each block in the order of `checksum`."""
        request, used = group.call.request, [0] * len(slot)
        segments: list[list[WriteSegment]] = [[] for _ in slot]

        def area(buffer: int, count: int) -> np.ndarray:
            used[buffer] += count
            return slot[buffer][used[buffer] - count : used[buffer]]

        def write(block: _Block, buffer: int, source: np.ndarray, offset: int) -> None:
            address, length = self._layout.locate(block.pool_block, Span(buffer, offset, offset + len(source)))
            segments[buffer].append(WriteSegment(source.ctypes.data, address, length))

        def parts(block: _Block) -> Iterator[_Part]:
            small = [
                (FILL_IDS, request.fill_ids[block.tokens, None]),
                (MROPE_POSITIONS, request.token_positions[block.tokens]),
            ]
            if block.token_block == 0:
                small.append((AUX_DATAS, request.aux_datas[:, None]))
            for buffer, values in small:
                target = area(buffer, len(values))
                target[...] = _bytes_of(values)
                write(block, buffer, target, 0)
                yield _Part(target, target)
            if not block.num_rows:
                return
            index = request.visual_index[block.tokens]
            visual = index >= 0
            first, rows = first_row(block_runs(visual)), index[visual]
            adjacent = np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1)
            for which, buffer in enumerate(ROW_BUFFERS[: 2 if len(self._widths) > DEEPSTACK_EMBEDDINGS else 1]):
                offset = first
                for source in self._read(request, which, adjacent):
                    target = area(buffer, len(source)) if self._staged else source
                    write(block, buffer, target, offset)
                    yield _Part(source, target)
                    offset += len(source)

        parts_by_block = [list(parts(block)) for block in group.blocks]
        return [merged for by_buffer in segments for merged in _merge_adjacent(by_buffer)], parts_by_block

    def _read(self, request: OutgoingRequest, which: int, adjacent: list[np.ndarray]) -> Iterator[np.ndarray]:
        """Yields the bytes of rows. Each array in `adjacent` indexes rows that are contiguous on the device."""
        for rows in adjacent:
            started = time.perf_counter()
            for part in request.read(int(rows[0]), int(rows[-1]) + 1, which):
                self.times.device += time.perf_counter() - started
                yield part
                started = time.perf_counter()

    def _submit(self, segments: list[WriteSegment]) -> "Future[None]":
        with self._lock:
            if not self._in_flight:
                self._busy_since = time.perf_counter()
            self._in_flight += 1
        self.times.num_bytes += sum(segment.num_bytes for segment in segments)
        self.times.num_segments += len(segments)

        def ended(_: "Future[None]") -> None:
            with self._lock:
                self._in_flight -= 1
                if not self._in_flight:
                    self.times.wire += time.perf_counter() - self._busy_since

        write = self._transport.submit(self._session, segments)
        write.add_done_callback(ended)
        return write

    def _skip_all(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                if group := self._groups.get_nowait():
                    group.end(None, WriteSkippedError(f"not written to {self._session}: the bridge was closed"))

    def _unregister_when_idle(self) -> None:
        """Unregisters the ring once the bridge is closed and nothing reads it."""
        with self._lock:
            idle = self._closed and not self._in_flight and not self._thread.is_alive() and not self._unregistered
            self._unregistered |= idle
        if idle:
            self._transport.unregister(self._ring)


@dataclass(frozen=True)
class _Block:
    token_block: int
    pool_block: int
    tokens: slice  # of the prompt
    num_rows: int  # visual tokens in the block


class _WriteCall:
    """The blocks of one call of `write`; reports their outcomes in order."""

    def __init__(self, request: OutgoingRequest, on_end: OnWritten, should_write: Callable[[], bool], purpose: Purpose):
        self.request, self.should_write, self.purpose = request, should_write, purpose
        self._on_end = on_end
        self._lock = threading.Lock()
        self._ended: dict[int, list[BlockWrite]] = {}  # by group number; reported once all earlier groups have ended
        self._reported = 0

    def end(self, number: int, blocks: list[BlockWrite]) -> None:
        with self._lock:
            self._ended[number] = blocks
            while blocks := self._ended.pop(self._reported, []):
                self._reported += 1
                try:
                    self._on_end(blocks)
                except Exception:
                    _log.exception("reporting blocks %s failed", [block.token_block for block in blocks])


class _Part(NamedTuple):
    """The bytes of `target` are written. If `target` is not `source`, it must first be filled from `source`."""

    source: np.ndarray
    target: np.ndarray


@dataclass
class _Group:
    """Blocks of one call that are read and written together."""

    call: _WriteCall
    number: int = 0
    blocks: list[_Block] = field(default_factory=list)

    def end(self, written: list[BlockWrite] | None, error: BaseException | None) -> None:
        if written is None:
            written = [BlockWrite(block.token_block, block.pool_block, b"", 0, error) for block in self.blocks]
        self.call.end(self.number, [block._replace(error=error) for block in written])


def _merge_adjacent(segments: list[WriteSegment]) -> Iterator[WriteSegment]:
    """Yields the same bytes in fewer segments: those that are adjacent at both ends become one."""
    merged: WriteSegment | None = None
    for segment in segments:
        if merged and (merged.source + merged.num_bytes, merged.destination + merged.num_bytes) == segment[:2]:
            merged = merged._replace(num_bytes=merged.num_bytes + segment.num_bytes)
        else:
            if merged:
                yield merged
            merged = segment
    if merged:
        yield merged


def _bytes_of(array: np.ndarray) -> np.ndarray:
    """Views int32 [n, k] as bytes [n, 4*k]."""
    return np.ascontiguousarray(array, np.int32).view(np.uint8)
