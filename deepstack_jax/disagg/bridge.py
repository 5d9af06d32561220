"""Rows from one node's device to another's: device -> host -> Mooncake -> host -> device, block by block.

While a group of blocks is on the wire, the sender stages the next and the receiver copies the last one out. The
sender's host reads each row once and writes it once, into a small ring; the receiver's reads it once in the pool and
writes it once, into the request's own memory; checksums are taken as these copies pass through the cache. On a CPU
that is all: rows are read where the encoder left them, and the request's memory becomes the array that prefill takes.
"""

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from jax.sharding import Sharding

from deepstack_jax.disagg.buffers import MultimodalDataBuffers
from deepstack_jax.disagg.device_rows import HostMemory, page_aligned
from deepstack_jax.disagg.prompts import CACHED_BYTES, BlockCopy, IncomingPrompt, OutgoingPrompt, place_of_rows, runs_of
from deepstack_jax.disagg.transport import Piece, Transport
from deepstack_jax.disagg.wire import (
    AUX_DATAS,
    AUX_LENGTH,
    DEEPSTACK_EMBEDDINGS,
    FILL_IDS,
    INPUT_EMBEDDINGS,
    MROPE_POSITIONS,
    BufferLayout,
    Span,
    checksum,
)

_LOG = logging.getLogger(__name__)

SLOT_BYTES = 4 << 20  # of rows in a group: each group wakes every thread on its way once
SLOTS = 4


@dataclass
class StageTimes:
    """Seconds that the stages of a bridge were at work, and what went through."""

    device: float = 0.0  # waiting for rows to come to the host, or sending them from it
    host: float = 0.0  # copies and checksums
    wire: float = 0.0  # at least one write in flight
    num_bytes: int = 0
    pieces: int = 0


class WriteSkippedError(Exception):
    """The write wasn't started: it was no longer wanted, or the bridge was closed."""


class BlockWrite(NamedTuple):
    """How the write of a block ended."""

    token_block: int
    pool_block: int
    checksum: bytes
    num_bytes: int
    error: BaseException | None


OnWritten = Callable[[list[BlockWrite]], None]


class SendBridge:
    """Writes prompts' blocks into one peer's pool; a thread stages while the transport writes.

    Each peer has a bridge of its own, with its own thread and staging ring: one that is stopped holds up no other.
    """

    def __init__(
        self, transport: Transport, session: str, layout: BufferLayout, slot_bytes: int = SLOT_BYTES, slots: int = SLOTS
    ):
        """`session` and `layout` are the peer's; memory for `slots` groups of `slot_bytes` is registered."""
        self.times = StageTimes()
        self._transport = transport
        self._session = session
        self._layout = layout
        self._widths = [length // layout.block_size for length in layout.item_lens]  # bytes a token
        self._widths[AUX_DATAS] = 4  # an integer
        row_bytes = self._widths[INPUT_EMBEDDINGS] + sum(self._widths[DEEPSTACK_EMBEDDINGS:])
        self._rows_at_a_time = max(1, CACHED_BYTES // row_bytes)
        self._slot_rows = max(layout.block_size, slot_bytes // row_bytes)
        self._slot_tokens = max(layout.block_size, slot_bytes // 64)
        counts = [self._slot_rows, self._slot_tokens, self._slot_tokens, AUX_LENGTH, self._slot_rows]
        self._ring = page_aligned(slots * sum(n * w for n, w in zip(counts, self._widths, strict=False)))
        self._ring.fill(0)
        transport.register(self._ring)
        self._free: queue.SimpleQueue[list[np.ndarray] | None] = queue.SimpleQueue()  # None: the bridge closes
        for slot in np.split(self._ring, slots):
            areas = np.split(slot, np.cumsum([n * w for n, w in zip(counts, self._widths, strict=False)])[:-1])
            self._free.put([area.reshape(-1, width) for area, width in zip(areas, self._widths, strict=True)])
        self._groups: queue.SimpleQueue[_Group | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._in_flight, self._busy_since = 0, 0.0
        self._closed = self._retired = False
        self._thread = threading.Thread(target=self._run, name=f"send {session}", daemon=True)
        self._thread.start()

    def write(
        self,
        prompt: OutgoingPrompt,
        blocks: Sequence[tuple[int, int]],
        on_end: OnWritten,
        wanted: Callable[[], bool] = lambda: True,
    ) -> None:
        """Starts writing `blocks`, pairs (token block, pool block), and returns at once.

        `on_end` gets every block once, some at a time and in this order, when nothing of them is in flight any more.
        `wanted` is asked just before a group is staged; blocks that aren't end with `WriteSkippedError`. Both run in
        threads of the bridge and the transport: they must be short.

        Raises:
            ValueError: the prompt or the peer's pool has no such block; nothing is written then.
        """
        count = -(-len(prompt.fill_ids) // self._layout.block_size)
        for token_block, pool_block in blocks:
            if not 0 <= token_block < count:
                raise ValueError(f"token block {token_block} is outside the prompt of {count} blocks")
            if not 0 <= pool_block < self._layout.num_blocks:
                raise ValueError(f"block {pool_block} is outside the pool of {self._layout.num_blocks} blocks")
        for group in self._grouped(_Batch(prompt, on_end, wanted), blocks):
            self._groups.put(group)
        if self._closed and not self._thread.is_alive():
            self._skip_all()

    def close(self) -> None:
        """Ends blocks that wait as failed. Writes in flight end by themselves; their memory lives as long."""
        self._closed = True
        self._groups.put(None)
        self._free.put(None)
        self._thread.join()
        self._skip_all()
        self._retire()

    def _grouped(self, batch: "_Batch", blocks: Sequence[tuple[int, int]]) -> Iterator["_Group"]:
        """Groups of blocks that follow each other in prompt and pool; the first are smaller, to fill the pipeline."""
        size = self._layout.block_size
        group = _Group(batch)
        for token_block, pool_block in blocks:
            here = batch.prompt.visual_index[token_block * size : (token_block + 1) * size]
            visual = here >= 0
            block = _Block(token_block, pool_block, len(here), runs_of(visual), here[visual])
            if group.blocks and (
                (group.blocks[-1].token_block + 1, group.blocks[-1].pool_block + 1) != (token_block, pool_block)
                or sum(len(each.rows) for each in group.blocks) + len(block.rows)
                > self._slot_rows >> max(0, 2 - group.number)
                or (len(group.blocks) + 1) * size > self._slot_tokens
            ):
                yield group
                group = _Group(batch, group.number + 1)
            group.blocks.append(block)
        if group.blocks:
            yield group

    def _run(self) -> None:
        while (group := self._groups.get()) is not None:
            slot = self._free.get()
            try:
                if slot is None or self._closed:
                    raise WriteSkippedError(f"not written to {self._session}: the bridge was closed")
                if not group.batch.wanted():
                    raise WriteSkippedError(f"not written to {self._session}: no longer wanted")
                blocks, pieces = self._stage(group, slot)
                self._submit(group, slot, blocks, pieces)
            except Exception as error:  # an encoder that failed shows here, when its rows are read
                self._free.put(slot)
                group.end(None, error)

    def _stage(self, group: "_Group", slot: list[np.ndarray]) -> tuple[list[BlockWrite], list[Piece]]:
        """Copies the group into the slot; what there is to say of its blocks, and what to write."""
        started, waited = time.perf_counter(), self.times.device
        used = [0] * len(slot)
        pieces: list[list[Piece]] = [[] for _ in slot]

        def area(buffer: int, block: _Block, place: int, count: int) -> np.ndarray:
            """Where to stage `count` tokens that go to `place` and on in a block."""
            start = used[buffer]
            used[buffer] += count
            target = slot[buffer][start : used[buffer]]
            address, length = self._layout.piece(block.pool_block, Span(buffer, place, place + count))
            pieces[buffer].append(Piece(target.ctypes.data, address, length))
            return target

        def parts(block: _Block) -> Iterator[np.ndarray]:
            prompt, start = group.batch.prompt, block.token_block * self._layout.block_size
            tokens = slice(start, start + block.num_tokens)
            small = [(FILL_IDS, prompt.fill_ids[tokens, None]), (MROPE_POSITIONS, prompt.token_positions[tokens])]
            if block.token_block == 0:
                small.append((AUX_DATAS, prompt.aux_datas[:, None]))
            for buffer, values in small:
                target = area(buffer, block, 0, len(values))
                target[...] = _bytes_of(values)
                yield target
            if len(block.rows):
                place, width, done = place_of_rows(block.runs), self._widths[INPUT_EMBEDDINGS], 0
                embeddings = area(INPUT_EMBEDDINGS, block, place, len(block.rows))
                levels = area(DEEPSTACK_EMBEDDINGS, block, place, len(block.rows)) if len(slot) > 4 else None
                for rows in self._rows_of(prompt, block):
                    embeddings[done : done + len(rows)] = rows[:, :width]
                    if levels is not None:
                        levels[done : done + len(rows)] = rows[:, width:]
                    done += len(rows)
                    yield rows

        done = []
        for block in group.blocks:
            before = sum(n * width for n, width in zip(used, self._widths, strict=True))
            digest = checksum(parts(block))
            after = sum(n * width for n, width in zip(used, self._widths, strict=True))
            done.append(BlockWrite(block.token_block, block.pool_block, digest, after - before, None))
        self.times.host += time.perf_counter() - started - (self.times.device - waited)
        return done, [piece for of_buffer in pieces for piece in _merged(of_buffer)]

    def _rows_of(self, prompt: OutgoingPrompt, block: "_Block") -> Iterator[np.ndarray]:
        if not len(block.rows):
            return
        ends = (*np.flatnonzero(block.rows[1:] - block.rows[:-1] != 1).tolist(), len(block.rows) - 1)
        begins = (0, *(end + 1 for end in ends[:-1]))
        for begin, end in zip(begins, ends, strict=True):  # neighbours on the device
            started = time.perf_counter()
            for rows in prompt.host_rows.read(int(block.rows[begin]), int(block.rows[end]) + 1):
                self.times.device += time.perf_counter() - started
                for start in range(0, len(rows), self._rows_at_a_time):
                    yield rows[start : start + self._rows_at_a_time]
                started = time.perf_counter()

    def _submit(self, group: "_Group", slot: list[np.ndarray], blocks: list[BlockWrite], pieces: list[Piece]) -> None:
        with self._lock:
            if not self._in_flight:
                self._busy_since = time.perf_counter()
            self._in_flight += 1
        self.times.num_bytes += sum(piece.num_bytes for piece in pieces)
        self.times.pieces += len(pieces)

        def ended(write: "Future[None]") -> None:
            with self._lock:
                self._in_flight -= 1
                if not self._in_flight:
                    self.times.wire += time.perf_counter() - self._busy_since
            self._free.put(slot)
            self._retire()
            group.end(blocks, write.exception())

        self._transport.submit(self._session, pieces).add_done_callback(ended)

    def _skip_all(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                if group := self._groups.get_nowait():
                    group.end(None, WriteSkippedError(f"not written to {self._session}: the bridge was closed"))

    def _retire(self) -> None:
        """Unregisters the ring when the bridge is closed and nothing reads it any more."""
        with self._lock:
            over = self._closed and not self._in_flight and not self._thread.is_alive() and not self._retired
            self._retired |= over
        if over:
            self._transport.unregister(self._ring)


class ReceiveBridge:
    """Registers a pool and copies blocks out of it, in a thread and in the order asked for."""

    def __init__(self, transport: Transport, pool: MultimodalDataBuffers):
        self.times = StageTimes()
        self._transport, self._pool = transport, pool
        for buffer in pool.arrays:
            transport.register(buffer)
        self._memory = HostMemory()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="receive")

    def expect(
        self,
        total_tokens: int,
        visual_rows: int,
        visual_ids: Sequence[int],
        num_rows: int | None = None,
        sharding: Sharding | None = None,
    ) -> IncomingPrompt:
        """Memory for a prompt, that of earlier ones where they are over; the arguments are `IncomingPrompt`'s."""
        return IncomingPrompt(
            self._pool, total_tokens, visual_rows, visual_ids, num_rows=num_rows, sharding=sharding, memory=self._memory
        )

    def copy_out(
        self, prompt: IncomingPrompt, token_block: int, pool_block: int, expected: BlockCopy
    ) -> "Future[BlockCopy]":
        """`IncomingPrompt.copy_out` in the bridge's thread."""

        def run() -> BlockCopy:
            started = time.perf_counter()
            copy = prompt.copy_out(token_block, pool_block, expected)
            self.times.host += time.perf_counter() - started
            self.times.num_bytes += copy.num_bytes
            return copy

        return self._worker.submit(run)

    def close(self) -> None:
        """Ends what has been asked for, then closes the pool to peers."""
        self._worker.shutdown()
        for buffer in self._pool.arrays:
            self._transport.unregister(buffer)


@dataclass(frozen=True)
class _Block:
    token_block: int
    pool_block: int
    num_tokens: int
    runs: tuple[tuple[int, int], ...]  # of visual tokens
    rows: np.ndarray  # [v], which rows they take


class _Batch:
    """The blocks of one call of `write`; reports on them in order."""

    def __init__(self, prompt: OutgoingPrompt, on_end: OnWritten, wanted: Callable[[], bool]):
        self.prompt, self.wanted = prompt, wanted
        self._on_end = on_end
        self._lock = threading.Lock()
        self._ended: dict[int, list[BlockWrite]] = {}  # groups that others are waited for before
        self._reported = 0

    def end(self, number: int, blocks: list[BlockWrite]) -> None:
        with self._lock:
            self._ended[number] = blocks
            while blocks := self._ended.pop(self._reported, []):
                self._reported += 1
                try:
                    self._on_end(blocks)
                except Exception:
                    _LOG.exception("reporting blocks %s failed", [block.token_block for block in blocks])


@dataclass
class _Group:
    """Blocks of a batch that are staged and written together."""

    batch: _Batch
    number: int = 0
    blocks: list[_Block] = field(default_factory=list)

    def end(self, written: list[BlockWrite] | None, error: BaseException | None) -> None:
        if written is None:
            written = [BlockWrite(block.token_block, block.pool_block, b"", 0, error) for block in self.blocks]
        self.batch.end(self.number, [block._replace(error=error) for block in written])


def _merged(pieces: list[Piece]) -> Iterator[Piece]:
    """The same bytes in fewer pieces: neighbours on both sides become one."""
    merged: Piece | None = None
    for piece in pieces:
        if merged and (merged.source + merged.num_bytes, merged.destination + merged.num_bytes) == piece[:2]:
            merged = merged._replace(num_bytes=merged.num_bytes + piece.num_bytes)
        else:
            if merged:
                yield merged
            merged = piece
    if merged:
        yield merged


def _bytes_of(array: np.ndarray) -> np.ndarray:
    """int32 [n, k] as bytes [n, 4*k]."""
    return np.ascontiguousarray(array, np.int32).view(np.uint8)
