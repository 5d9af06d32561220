"""Rows from one node's device to another's: device -> host -> Mooncake -> host -> device, block by block.

While a group of blocks is on the wire, the sender takes its checksums and reads the next, and the receiver copies the
last one out. Rows are written from where the host finds them: on a CPU where the encoder left them, elsewhere in
pinned memory. Transports that need registered memory (rdma) get them through a small ring. The receiver's host copies
each row once, from the pool to the request's own memory, which on a CPU becomes the array that prefill takes. Checksums
of what is copied are taken as it passes through the cache.
"""

import contextlib
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from deepstack_jax.disagg.encode.outgoing import OutgoingPrompt
from deepstack_jax.disagg.transports import Piece, Transport
from deepstack_jax.disagg.wire.device_rows import HostRows, page_aligned
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
    checksum,
)
from deepstack_jax.disagg.wire.rows import StageTimes, copied, place_of_rows, runs_of

_LOG = logging.getLogger(__name__)

SLOT_BYTES = 2 << 20  # of rows in a group: each group wakes every thread on its way once
SLOTS = 4
UNSURE_SECONDS = 60.0  # that the engine may go on reading what it has reported as failed


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
    """Writes prompts' blocks into one peer's pool; a thread prepares groups of them while the transport writes.

    Each peer has a bridge of its own, with its own thread and ring: one that is stopped holds up no other.
    """

    def __init__(
        self, transport: Transport, session: str, layout: BufferLayout, slot_bytes: int = SLOT_BYTES, slots: int = SLOTS
    ):
        """`session` and `layout` are the peer's; `slots` groups of `slot_bytes` may be on their way."""
        self.times = StageTimes()
        self._transport = transport
        self._session = session
        self._layout = layout
        self._widths = [length // layout.block_size for length in layout.item_lens]  # bytes a token
        self._widths[AUX_DATAS] = 4  # an integer
        row_bytes = self._widths[INPUT_EMBEDDINGS] + sum(self._widths[DEEPSTACK_EMBEDDINGS:])
        self._staged = transport.needs_registered_sources
        self._slot_rows = max(layout.block_size, slot_bytes // row_bytes)
        self._slot_tokens = max(layout.block_size, slot_bytes // 128)
        staged_rows = self._slot_rows if self._staged else 0
        counts = [staged_rows, self._slot_tokens, self._slot_tokens, AUX_LENGTH, staged_rows]
        self._ring = page_aligned(slots * sum(n * w for n, w in zip(counts, self._widths, strict=False)))
        self._ring.fill(0)
        transport.register(self._ring)
        self._free: queue.SimpleQueue[list[np.ndarray] | None] = queue.SimpleQueue()  # None: the bridge closes
        for slot in np.split(self._ring, slots):
            areas = np.split(slot, np.cumsum([n * w for n, w in zip(counts, self._widths, strict=False)])[:-1])
            self._free.put([area.reshape(-1, width) for area, width in zip(areas, self._widths, strict=True)])
        self._groups: queue.SimpleQueue[_Group | None] = queue.SimpleQueue()
        self._unsure: deque[tuple[float, object]] = deque()  # sources of writes that failed, and when
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
        `wanted` is asked just before a group is read; blocks that aren't end with `WriteSkippedError`. Both run in
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
        """Groups of blocks that follow each other in prompt and pool.

        The first are smaller, to fill the pipeline, and the last, to empty it: the copy of the last one waits for its
        write, and nothing goes on beside it.
        """
        size = self._layout.block_size
        group, rows, left = _Group(batch), 0, len(blocks) * size
        rows_before = batch.prompt.rows_before
        for token_block, pool_block in blocks:
            start = token_block * size
            stop = min(start + size, len(rows_before) - 1)
            block = _Block(token_block, pool_block, slice(start, stop), int(rows_before[stop] - rows_before[start]))
            most = max(self._slot_rows >> 2, min(self._slot_rows >> max(0, 2 - group.number), left // 4))
            if group.blocks and (
                (group.blocks[-1].token_block + 1, group.blocks[-1].pool_block + 1) != (token_block, pool_block)
                or rows + block.num_rows > most
                or (len(group.blocks) + 1) * size > self._slot_tokens
            ):
                yield group
                left -= size * len(group.blocks)
                group, rows = _Group(batch, group.number + 1), 0
            group.blocks.append(block)
            rows += block.num_rows
        if group.blocks:
            yield group

    def _run(self) -> None:
        while self._send_next():  # in a function, so that nothing holds a prompt's rows while there is nothing to do
            pass

    def _send_next(self) -> bool:
        """False when the bridge closes."""
        if (group := self._groups.get()) is None:
            return False
        slot = self._free.get()
        while self._unsure and self._unsure[0][0] < time.monotonic() - UNSURE_SECONDS:
            self._unsure.popleft()
        try:
            if slot is None or self._closed:
                raise WriteSkippedError(f"not written to {self._session}: the bridge was closed")
            if not group.batch.wanted():
                raise WriteSkippedError(f"not written to {self._session}: no longer wanted")
            self._send(group, slot)
        except Exception as error:  # an encoder that failed shows here, when its rows are read
            self._free.put(slot)
            group.end(None, error)
        return True

    def _send(self, group: "_Group", slot: list[np.ndarray]) -> None:
        started, waited = time.perf_counter(), self.times.device
        pieces, parts = self._lay_out(group, slot)
        sums = list(map(_checksum, parts)) if self._staged else None  # the copies, too
        write = self._submit(pieces)
        sums = sums or list(map(_checksum, parts))  # with nothing to copy, while the bytes are on their way
        blocks = [
            BlockWrite(block.token_block, block.pool_block, digest, sum(part.target.nbytes for part in of_block), None)
            for block, digest, of_block in zip(group.blocks, sums, parts, strict=True)
        ]
        self.times.host += time.perf_counter() - started - (self.times.device - waited)

        def ended(write: "Future[None]") -> None:
            error = write.exception()
            if error and not self._staged:  # the engine may still read them
                self._unsure.append((time.monotonic(), parts))
            self._free.put(slot)
            self._retire()
            group.end(blocks, error)

        write.add_done_callback(ended)

    def _lay_out(self, group: "_Group", slot: list[np.ndarray]) -> tuple[list[Piece], list[list["_Part"]]]:
        """What to write of the group, and the parts of each block in the order of `checksum`."""
        prompt, used = group.batch.prompt, [0] * len(slot)
        pieces: list[list[Piece]] = [[] for _ in slot]

        def area(buffer: int, count: int) -> np.ndarray:
            used[buffer] += count
            return slot[buffer][used[buffer] - count : used[buffer]]

        def write(block: _Block, buffer: int, source: np.ndarray, place: int) -> None:
            address, length = self._layout.piece(block.pool_block, Span(buffer, place, place + len(source)))
            pieces[buffer].append(Piece(source.ctypes.data, address, length))

        def parts(block: _Block) -> Iterator[_Part]:
            small = [
                (FILL_IDS, prompt.fill_ids[block.tokens, None]),
                (MROPE_POSITIONS, prompt.token_positions[block.tokens]),
            ]
            if block.token_block == 0:
                small.append((AUX_DATAS, prompt.aux_datas[:, None]))
            for buffer, values in small:
                target = area(buffer, len(values))
                target[...] = _bytes_of(values)
                write(block, buffer, target, 0)
                yield _Part(target, target)
            if not block.num_rows:
                return
            index = prompt.visual_index[block.tokens]
            visual = index >= 0
            first, rows = place_of_rows(runs_of(visual)), index[visual]
            neighbours = np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1)
            for buffer, host_rows in zip(ROW_BUFFERS, prompt.host_rows, strict=False):
                place = first
                for source in self._read(host_rows, neighbours):
                    target = area(buffer, len(source)) if self._staged else source
                    write(block, buffer, target, place)
                    yield _Part(source, target)
                    place += len(source)

        of_blocks = [list(parts(block)) for block in group.blocks]
        return [piece for of_buffer in pieces for piece in _merged(of_buffer)], of_blocks

    def _read(self, host_rows: HostRows, neighbours: list[np.ndarray]) -> Iterator[np.ndarray]:
        """The bytes of rows, those that are neighbours on the device together."""
        for rows in neighbours:
            started = time.perf_counter()
            for part in host_rows.read(int(rows[0]), int(rows[-1]) + 1):
                self.times.device += time.perf_counter() - started
                yield part
                started = time.perf_counter()

    def _submit(self, pieces: list[Piece]) -> "Future[None]":
        with self._lock:
            if not self._in_flight:
                self._busy_since = time.perf_counter()
            self._in_flight += 1
        self.times.num_bytes += sum(piece.num_bytes for piece in pieces)
        self.times.pieces += len(pieces)

        def ended(_: "Future[None]") -> None:
            with self._lock:
                self._in_flight -= 1
                if not self._in_flight:
                    self.times.wire += time.perf_counter() - self._busy_since

        write = self._transport.submit(self._session, pieces)
        write.add_done_callback(ended)
        return write

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


@dataclass(frozen=True)
class _Block:
    token_block: int
    pool_block: int
    tokens: slice  # of the prompt
    num_rows: int  # visual ones among them


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


class _Part(NamedTuple):
    """Bytes to write are those of `target`. Another array than `source` has to be filled from it first."""

    source: np.ndarray
    target: np.ndarray


def _checksum(parts: Iterable[_Part]) -> bytes:
    """Of a block; fills the targets."""
    return checksum(
        piece for source, target in parts for piece in ((target,) if target is source else copied(source, target))
    )


@dataclass
class _Group:
    """Blocks of a batch that are read and written together."""

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
