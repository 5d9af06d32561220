"""The encode node: answers language nodes' requests with rows of visual tokens.

`sender.Sender` decides what to do, and this module does it: control messages run in the event loop, preparation in a
pool of threads, the encoder in its own thread, and writes in one bridge per language node. Images are encoded one after
another, and the rows of each are written while the next one is encoded.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Iterable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from deepstack_jax.checkpoint import Model
from deepstack_jax.disagg.encode.bridge import BlockWrite, SendBridge, WriteSkippedError
from deepstack_jax.disagg.encode.images import OutgoingImage, images_of
from deepstack_jax.disagg.encode.outgoing import OutgoingRequest
from deepstack_jax.disagg.encode.sender import Sender, SenderSettings
from deepstack_jax.disagg.encode.worker import EncodedImage, EncodeWorker
from deepstack_jax.disagg.transports import TransferError, Transport
from deepstack_jax.disagg.wire.control import Listener
from deepstack_jax.disagg.wire.layout import (
    AUX_FORMAT_VERSION,
    AUX_LENGTH,
    AUX_ROPE_DELTA,
    AUX_TOTAL_TOKENS,
    AUX_VISUAL_ROWS,
    FORMAT_VERSION,
    fingerprint,
)
from deepstack_jax.disagg.wire.messages import (
    MAX_REASON,
    Accepted,
    Goodbye,
    Heartbeat,
    HeartbeatReply,
    Hello,
    ImageRows,
    Message,
    Prepared,
    Refused,
    Welcome,
    WrittenBlock,
    refusal,
)
from deepstack_jax.disagg.wire.payload import unpack
from deepstack_jax.disagg.wire.prompt import pack_prompt
from deepstack_jax.disagg.wire.transfer import (
    Action,
    AttemptKey,
    EncodeBlocks,
    Forget,
    Prepare,
    Send,
    StartWrite,
    from_ranges,
)
from deepstack_jax.errors import one_line
from deepstack_jax.processing.batch import prepare_batch

PEER_TIMEOUT_S = 10.0  # a language node counts as gone after this long without a message
POLL_INTERVAL_S = 1.0  # maximum interval between two checks of timers and peers
REMINDER_INTERVAL_S = 5.0  # interval between two messages about an attempt that waits for its language node
NUM_PREPARE_THREADS = 2  # they decode images and tokenize

_log = logging.getLogger(__name__)


@dataclass
class _Peer:
    """A language node: one incarnation on one connection."""

    name: str
    connection: bytes
    hello: Hello
    bridge: SendBridge
    last_heard: float


@dataclass
class _Attempt:
    """An attempt's preparation, its prompt, and its images that are not encoded yet."""

    task: "asyncio.Task[None] | None" = None
    request: OutgoingRequest | None = None
    images: list[OutgoingImage] = field(default_factory=list)
    encoding: "dict[int, Future[EncodedImage]]" = field(default_factory=dict)  # by the image's first row
    encode_seconds: float = 0.0


class EncodeServer:
    """Serves language nodes until it is closed. All methods must be called from the event loop's thread."""

    def __init__(self, model: Model, hello: Hello, listener: Listener, transport: Transport, worker: EncodeWorker):
        """
        Args:
            model: provides the vision parameters; no others are used.
            hello: introduces this node, with role "encode".
            listener, transport, worker: `close` closes them.
        """
        self.hello, self.listener, self.worker = hello, listener, worker
        self.sender = Sender(SenderSettings(hello.block_size))
        self.peers: dict[bytes, _Peer] = {}  # by connection
        self._model, self._transport = model, transport
        self._names: dict[str, _Peer] = {}
        self._attempts: dict[AttemptKey, _Attempt] = {}
        self._pool = ThreadPoolExecutor(NUM_PREPARE_THREADS, thread_name_prefix="prepare")
        self._changed = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._closing_bridges: set[asyncio.Future[None]] = set()

    async def start(self) -> None:
        """Loads the tokenizer, then starts serving."""
        self._loop = asyncio.get_running_loop()
        # load it here, because two preparing threads can't import it at once
        await asyncio.to_thread(lambda: self._model.processor.tokenizer)
        self._tasks = [asyncio.create_task(self._listen()), asyncio.create_task(self._run_timers())]

    @property
    def num_attempts(self) -> int:
        """The number of attempts that are being prepared or whose rows are kept."""
        return len(self._attempts)

    @property
    def num_closing_bridges(self) -> int:
        """The number of bridges to former peers that are still closing."""
        return len(self._closing_bridges)

    async def close(self) -> None:
        """Says Goodbye to all language nodes and frees everything."""
        for peer in self.peers.values():
            self.listener.send(peer.connection, Goodbye("the encode node is stopping"))
        await asyncio.sleep(0)
        for task in [*self._tasks, *(attempt.task for attempt in self._attempts.values() if attempt.task)]:
            task.cancel()
        for connection in list(self.peers):
            self._disconnect(connection)
        await asyncio.gather(*self._closing_bridges, return_exceptions=True)
        self.listener.close()
        self._pool.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self.worker.close)
        await asyncio.to_thread(self._transport.close)

    # incoming messages

    async def _listen(self) -> None:
        async for connection, message in self.listener.messages():
            try:
                self._receive(connection, message)
            except Exception:  # no single message may end the node
                _log.exception("a message of type %s failed", type(message).__name__)

    def _receive(self, connection: bytes, message: Message) -> None:
        if isinstance(message, Hello):
            self._receive_hello(connection, message)
            return
        peer = self.peers.get(connection)
        if peer is None:
            self.listener.send(connection, Goodbye("send Hello first"))
            return
        peer.last_heard = time.monotonic()
        if isinstance(message, Heartbeat):
            busy_ms = int(self.worker.busy_seconds * 1000)
            reply = HeartbeatReply(message.sequence, self.hello.incarnation, busy_ms)
            self.listener.send(connection, reply)
        elif isinstance(message, Goodbye):
            self._disconnect(connection)
        else:
            self._perform(self.sender.receive(peer.name, message, time.monotonic()))

    def _receive_hello(self, connection: bytes, hello: Hello) -> None:
        name = f"{hello.node_id}/{hello.incarnation}"
        known = self.peers.get(connection)
        if known is not None and known.name == name and known.hello == hello:
            known.last_heard = time.monotonic()
            self.listener.send(connection, Welcome(self.hello))
            return
        if reason := refusal(hello, self.hello):
            self.listener.send(connection, Refused(reason[:MAX_REASON]))
            return
        for former in [c for c, peer in self.peers.items() if c == connection or peer.name == name]:
            self._disconnect(former)
        try:
            bridge = SendBridge(self._transport, hello.session, hello.layout)
        except (TransferError, MemoryError) as error:
            _log.exception("a bridge to %s could not be opened", name)
            self.listener.send(
                connection, Refused(f"the encode node can't allocate memory for another peer: {error}"[:MAX_REASON])
            )
            return
        self.peers[connection] = peer = _Peer(name, connection, hello, bridge, time.monotonic())
        self._names[name] = peer
        self._perform(self.sender.peer_up(name, hello.layout.num_blocks, time.monotonic()))
        self.listener.send(connection, Welcome(self.hello))

    def _disconnect(self, connection: bytes) -> None:
        peer = self.peers.pop(connection)
        self._names.pop(peer.name, None)
        self._perform(self.sender.peer_down(peer.name, time.monotonic()))
        # in a thread, because it waits for the group that is being sent
        closing = asyncio.ensure_future(asyncio.to_thread(peer.bridge.close))
        self._closing_bridges.add(closing)
        closing.add_done_callback(self._closing_bridges.discard)

    async def _run_timers(self) -> None:
        """Handles the timers of `Sender`, disconnects silent peers and sends reminders, until it is cancelled."""
        last = reminded = time.monotonic()
        while True:
            now = time.monotonic()
            due = None
            try:
                if now - last > 2 * POLL_INTERVAL_S:  # this process was blocked: messages of its peers wait unread
                    for peer in self.peers.values():
                        peer.last_heard += now - last
                last = now
                for connection in [c for c, peer in self.peers.items() if now - peer.last_heard > PEER_TIMEOUT_S]:
                    self._disconnect(connection)
                self._perform(self.sender.tick(now))
                if now - reminded > REMINDER_INTERVAL_S:
                    reminded = now
                    self._send_reminders()
                due = self.sender.next_timer()
            except Exception:  # deadlines depend on this loop
                _log.exception("the timers failed")
            self._changed.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(
                    self._changed.wait(), POLL_INTERVAL_S if due is None else min(max(due - now, 0), POLL_INTERVAL_S)
                )

    def _send_reminders(self) -> None:
        """Repeats Accepted for idle attempts. A language node that has ended such an attempt answers with Abort."""
        for key, outgoing in self.sender.outgoing.items():
            if outgoing.prepared and not outgoing.writing and (peer := self._names.get(key.peer)):
                self.listener.send(peer.connection, Accepted(key.request_id, key.attempt))

    # performing actions

    def _perform(self, actions: Iterable[Action]) -> None:
        for action in actions:
            try:
                self._perform_action(action)
            except Exception:  # a failure of one request must not affect another
                _log.exception("an action of type %s failed", type(action).__name__)
        self._changed.set()

    def _perform_action(self, action: Action) -> None:
        match action:
            case Send(peer, message):
                if connected := self._names.get(peer):
                    self.listener.send(connected.connection, message)
            case Prepare(key):
                self._attempts[key] = attempt = _Attempt()
                attempt.task = asyncio.create_task(self._prepare(action))
            case EncodeBlocks(key, blocks):
                self._encode(key, blocks)
            case StartWrite(key, round, blocks):
                try:
                    self._write(action)
                except Exception as error:  # nothing has been started in this case
                    _log.exception("a write failed to start")
                    now, reason = time.monotonic(), f"the write failed to start ({type(error).__name__})"
                    self._perform(self.sender.failed(key, 503, reason, now))
                    self._perform(self.sender.write_skipped(key, round, [block for block, _ in blocks], now))
            case Forget(key):
                if attempt := self._attempts.pop(key, None):
                    for future in attempt.encoding.values():
                        future.cancel()
                    if attempt.task:
                        attempt.task.cancel()

    async def _prepare(self, action: Prepare) -> None:
        """Prepares one request. A failure is reported for this request only."""
        key, started = action.key, time.monotonic()
        try:
            request, images = await self._loop.run_in_executor(self._pool, self._prepare_inputs, action.payload)
            if (attempt := self._attempts.get(key)) is None:
                return
            attempt.request, attempt.images = request, images
            prepared = self._describe(key, request, images, time.monotonic() - started)
        except ValueError as error:  # only here does a ValueError mean that the request is invalid
            self._perform(self.sender.failed(key, 400, one_line(error), time.monotonic()))
        except Exception as error:
            self._report_failure(key, "preparing the request", error)
        else:
            self._perform(self.sender.prepared(key, prepared, time.monotonic()))

    def _prepare_inputs(self, payload: bytes) -> tuple[OutgoingRequest, list[OutgoingImage]]:
        """Returns a request whose rows are still to be added, and its images and videos."""
        prompt, images, videos, options = unpack(payload)
        arrays = self._model.processor.prepare(prompt, images=images, videos=videos, **options)
        batch = prepare_batch(self._model.config, **arrays)
        count = int(batch.lengths[0])
        aux = np.zeros(AUX_LENGTH, np.int32)
        aux[AUX_TOTAL_TOKENS], aux[AUX_ROPE_DELTA] = count, batch.rope_deltas[0]
        aux[AUX_VISUAL_ROWS], aux[AUX_FORMAT_VERSION] = batch.num_visual_tokens, FORMAT_VERSION
        index, outgoing = images_of(batch, self.hello.block_size)
        positions = np.ascontiguousarray(batch.position_ids[:, 0, :count])
        return OutgoingRequest(batch.input_ids[0, :count], positions, aux, index), outgoing

    def _describe(
        self, key: AttemptKey, request: OutgoingRequest, images: list[OutgoingImage], seconds: float
    ) -> Prepared:
        ids, positions, aux = request.fill_ids, request.mrope_positions, request.aux_datas
        digests = b"".join(image.digest for image in images)
        return Prepared(
            key.request_id,
            key.attempt,
            len(ids),
            int(aux[AUX_VISUAL_ROWS]),
            int(aux[AUX_ROPE_DELTA]),
            fingerprint(self.hello.model, ids, positions, digests),
            pack_prompt(ids, positions),
            tuple(ImageRows(image.first_row, image.rows, image.digest) for image in images),
            prepare_us=int(seconds * 1e6),
        )

    def _encode(self, key: AttemptKey, ranges: Iterable[tuple[int, int]]) -> None:
        """Queues the images that have rows in the blocks, and takes others out of the queue."""
        attempt = self._attempts[key]
        assert attempt.request is not None
        wanted = from_ranges(ranges, len(attempt.request.fill_ids))
        for image in attempt.images:
            future, is_wanted = attempt.encoding.get(image.first_row), not wanted.isdisjoint(image.blocks)
            if is_wanted and future is None:
                attempt.encoding[image.first_row] = future = self.worker.submit(image.visual, image.digest)
                future.add_done_callback(lambda future, image=image: self._in_loop(self._encoded, key, image, future))
            elif future is not None and not is_wanted and future.cancel():
                del attempt.encoding[image.first_row]

    def _encoded(self, key: AttemptKey, image: OutgoingImage, future: "Future[EncodedImage]") -> None:
        """Adds the rows of an image to its request, and reports the blocks that are complete with them."""
        attempt = self._attempts.get(key)
        if attempt is None or attempt.request is None or attempt.encoding.get(image.first_row) is not future:
            return
        try:
            rows, seconds = future.result()
        except (Exception, CancelledError) as error:
            self._report_failure(key, "encoding the images and videos", error)
            return
        attempt.request.add_rows(image.first_row, image.rows, rows)
        attempt.images.remove(image)  # its pixels are no longer needed
        attempt.encode_seconds += seconds
        incomplete = {block for other in attempt.images for block in other.blocks}
        now, encode_us = time.monotonic(), int(attempt.encode_seconds * 1e6)
        self._perform(self.sender.encoded(key, image.blocks - incomplete, now, encode_us))

    def _report_failure(self, key: AttemptKey, stage: str, error: BaseException) -> None:
        _log.error("%s failed", stage, exc_info=error)
        reason = f"{stage} failed ({type(error).__name__}): {one_line(error)[:300]}"
        self._perform(self.sender.failed(key, 500, reason, time.monotonic()))

    def _in_loop(self, call: Callable[..., None], *args: Any) -> None:
        """Runs `call` in the event loop, unless it is closed; any thread may call it."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(call, *args)

    def _write(self, action: StartWrite) -> None:
        """Starts writing blocks through the peer's bridge."""
        key, round = action.key, action.round
        attempt, peer = self._attempts.get(key), self._names.get(key.peer)
        if attempt is None or attempt.request is None or peer is None:
            self._perform(
                self.sender.write_skipped(key, round, [block for block, _ in action.blocks], time.monotonic())
            )
            return

        def ended(blocks: list[BlockWrite]) -> None:
            self._in_loop(self._written, key, round, blocks)

        # the bridge's thread calls `may_write`, which only reads a dictionary and a clock
        peer.bridge.write(attempt.request, action.blocks, ended, lambda: self.sender.may_write(key, time.monotonic()))

    def _written(self, key: AttemptKey, round: int, blocks: list[BlockWrite]) -> None:
        """Reports the outcome of one group; all of its blocks share it."""
        now, token_blocks, error = time.monotonic(), [block.token_block for block in blocks], blocks[0].error
        if error is None:
            done = [WrittenBlock(block.token_block, block.checksum, block.num_bytes) for block in blocks]
            self._perform(self.sender.written(key, round, done, now))
        elif isinstance(error, WriteSkippedError):
            self._perform(self.sender.write_skipped(key, round, token_blocks, now))
        else:
            self._perform(self.sender.write_failed(key, round, token_blocks, one_line(error), now))


def new_incarnation() -> str:
    """Draws a name that is unique to this start of this node."""
    return secrets.token_hex(8)
