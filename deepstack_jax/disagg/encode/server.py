"""The encode node: answers language nodes' requests with rows of visual tokens.

`sender.Sender` decides what to do, and this module does it: control messages run in the event loop, preparation in
decoders and threads, the encoder in its own thread, and writes in one bridge per language node. Images are encoded one
after another, and the rows of each are written while the next one is encoded.
"""

import asyncio
import itertools
import logging
import secrets
import time
from collections.abc import Callable, Iterable
from concurrent.futures import CancelledError, Future
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
from deepstack_jax.disagg.events import Events
from deepstack_jax.disagg.tasks import Tasks
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
    MAX_MILLISECONDS,
    MAX_REASON,
    Accepted,
    Goodbye,
    Heartbeat,
    HeartbeatReply,
    Hello,
    ImageRows,
    Message,
    NodeLoad,
    Prepared,
    Refused,
    Welcome,
    WrittenBlock,
    refusal,
)
from deepstack_jax.disagg.wire.payload import unpack
from deepstack_jax.disagg.wire.prompt import pack_prompt
from deepstack_jax.disagg.wire.seals import BlockSeal, Purpose
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
from deepstack_jax.processing.daemon_threads import in_thread_or_here
from deepstack_jax.processing.media import MediaError
from deepstack_jax.processing.preparation import Preparation, Release

MAX_PEERS = 16  # language nodes; each has a thread and memory here
PEER_TIMEOUT_S = 10.0  # a language node counts as gone after this long without a message
POLL_INTERVAL_S = 1.0  # maximum interval between two checks of timers and peers
REMINDER_INTERVAL_S = 5.0  # interval between two messages about an attempt that waits for its language node

_log = logging.getLogger(__name__)


@dataclass
class _Peer:
    """A language node: one incarnation on one connection."""

    name: str
    connection: bytes
    hello: Hello
    bridge: SendBridge
    last_heard: float
    gone: "asyncio.Future[None]"  # ends when it leaves or is silent for too long
    number: int  # which of the language nodes that connected it is
    since: float = field(default_factory=lambda: time.monotonic())
    num_requests: int = 0
    num_failures: int = 0
    bytes_written: int = 0

    @property
    def public_name(self) -> str:
        """What clients are told of it, which is not its address."""
        return f"language {self.number}"

    @property
    def http_url(self) -> str:
        return self.hello.http_url


@dataclass
class _Attempt:
    """An attempt's preparation, its prompt, and its images that are not encoded yet."""

    task: "asyncio.Task[None] | None" = None
    request: OutgoingRequest | None = None
    images: list[OutgoingImage] = field(default_factory=list)
    encoding: "dict[int, Future[EncodedImage]]" = field(default_factory=dict)  # by the image's first row
    encode_seconds: float = 0.0
    release: Release = lambda: None  # gives back the memory of pixels


class EncodeServer:
    """Serves language nodes until it is closed. All methods must be called from the event loop's thread."""

    def __init__(
        self,
        model: Model,
        hello: Hello,
        listener: Listener,
        transport: Transport,
        worker: EncodeWorker,
        preparation: Preparation,
        max_peers: int = MAX_PEERS,
    ):
        """
        Args:
            model: provides the vision parameters; no others are used.
            hello: introduces this node, with role "encode".
            listener, transport, worker, preparation: `close` closes them.
            max_peers: language nodes that may be connected at once; more are refused.
        """
        self.hello, self.listener, self.worker = hello, listener, worker
        self._max_peers = max_peers
        self.sender = Sender(SenderSettings(hello.block_size))
        self.peers: dict[bytes, _Peer] = {}  # by connection
        self.blocks_written = self.bytes_written = 0
        self.num_requests = self.num_failures = 0
        self.events = Events()
        self._numbers = itertools.count(1)
        self._model, self.transport = model, transport
        self._names: dict[str, _Peer] = {}
        self._attempts: dict[AttemptKey, _Attempt] = {}
        self._preparation = preparation
        self._changed = asyncio.Event()
        self._tasks, self._preparing, self._closing_bridges = Tasks(), Tasks(), Tasks()

    async def start(self) -> None:
        """Loads the tokenizer, then starts serving."""
        self._loop = asyncio.get_running_loop()
        # load it here, because two preparing threads can't import it at once
        await asyncio.to_thread(lambda: self._model.processor.tokenizer)
        await self._preparation.decoders.start()
        self._tasks.keep("the listener for language nodes", self._listen())
        self._tasks.keep("the timers of transfers", self._run_timers())
        if self.listener.has_key:
            self._tasks.keep("the check of keys", self.listener.check_keys())
        if self.listener.node is not None:
            self._tasks.keep("the check of certificates", self.listener.introduce())
            self.listener.node.revoked.watch(self._drop_revoked)

    @property
    def num_attempts(self) -> int:
        """The number of attempts that are being prepared or whose rows are kept."""
        return len(self._attempts)

    @property
    def load(self) -> NodeLoad:
        """What this node has to do and has done."""
        worker = self.worker
        encoded, cached = worker.num_encoded, worker.num_cached
        sizes = len(worker.cache), int(worker.cache.currsize), cached, encoded + cached
        return NodeLoad(self.num_attempts, worker.queued, self.num_requests, self.num_failures, *sizes)

    @property
    def failure(self) -> str | None:
        """Why this node can't go on, None if it can: a task or a thread has ended that nothing restarts."""
        if not self.worker.alive:
            return "the encoder's thread has ended: restart the node"
        if not all(peer.bridge.alive for peer in self.peers.values()):
            return "a thread that sends rows has ended: restart the node"
        return self._tasks.failure

    @property
    def preparing_seconds(self) -> float:
        """How long the oldest preparation that runs in a thread has run, cancelled ones included; 0 if none does."""
        return self._preparation.busy_seconds

    @property
    def num_closing_bridges(self) -> int:
        """The number of bridges to former peers that are still closing."""
        return len(self._closing_bridges)

    async def close(self) -> None:
        """Says Goodbye to all language nodes and frees everything."""
        for peer in self.peers.values():
            self.listener.send(peer.connection, Goodbye("the encode node is stopping"))
        await asyncio.sleep(0)
        await self._tasks.cancel()
        await self._preparing.cancel()
        for connection in list(self.peers):
            self._disconnect(connection)
        await self._closing_bridges.join()
        self.listener.close()
        self._preparation.close()
        await in_thread_or_here(self.worker.close)
        await in_thread_or_here(self.transport.close)

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
            busy_ms = min(int(self.worker.busy_seconds * 1000), MAX_MILLISECONDS)
            preparing_ms = min(int(self.preparing_seconds * 1000), MAX_MILLISECONDS)
            reply = HeartbeatReply(message.sequence, self.hello.incarnation, busy_ms, preparing_ms, self.load)
            self.listener.send(connection, reply)
        elif isinstance(message, Goodbye):
            self._disconnect(connection)
        else:
            self._perform(self.sender.receive(peer.name, message, time.monotonic()))

    def _receive_hello(self, connection: bytes, hello: Hello) -> None:
        certificate = self.listener.node_of(connection)
        # a node can't take the place of another one: what it says of itself only tells its own incarnations apart
        node = hello.node_id if certificate is None else f"{certificate.name}-{certificate.serial}"
        name = f"{node}/{hello.incarnation}"
        known = self.peers.get(connection)
        if known is not None and known.name == name and known.hello == hello:
            known.last_heard = time.monotonic()
            self.listener.send(connection, Welcome(self.hello))
            return
        reason = refusal(hello, self.hello)
        if self.listener.has_key and not hello.block_key:
            reason = "the language node gives no key for its blocks: start it with --key"
        if reason:
            self.listener.send(connection, Refused(reason[:MAX_REASON]))
            return
        for former in [c for c, peer in self.peers.items() if c == connection or peer.name == name]:
            self._disconnect(former)
        if len(self.peers) >= self._max_peers:
            reason = f"the encode node has {len(self.peers)} language nodes: start it with a higher --max-peers"
            self.listener.send(connection, Refused(reason))
            return
        try:
            seal = BlockSeal(hello.block_key, hello.encrypt_blocks)
            bridge = SendBridge(self.transport, hello.session, hello.layout, seal=seal)
        except (TransferError, MemoryError) as error:
            _log.exception("a bridge to %s could not be opened", name)
            kind = type(error).__name__
            self.listener.send(connection, Refused(f"the encode node can't allocate memory for another peer ({kind})"))
            return
        self.peers[connection] = peer = _Peer(
            name, connection, hello, bridge, time.monotonic(), self._loop.create_future(), next(self._numbers)
        )
        self.events.add(peer.public_name, "connected")
        self._names[name] = peer
        self._perform(self.sender.peer_up(name, hello.layout.num_blocks, time.monotonic()))
        self.listener.send(connection, Welcome(self.hello))

    def _disconnect(self, connection: bytes, reason: str = "left") -> None:
        peer = self.peers.pop(connection)
        self.events.add(peer.public_name, reason)
        self._names.pop(peer.name, None)
        peer.gone.set_result(None)
        self._perform(self.sender.peer_down(peer.name, time.monotonic()))
        # in a thread, because it waits for the group that is being sent
        self._closing_bridges.run(f"closing the bridge to {peer.name}", in_thread_or_here(peer.bridge.close))

    def _drop_revoked(self) -> None:
        """Ends everything that is done for nodes that are revoked by now."""
        self.listener.drop_revoked()
        for connection in [each for each in self.peers if self.listener.node_of(each) is None]:
            self._disconnect(connection)

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
                    self._disconnect(connection, f"has sent nothing for {PEER_TIMEOUT_S:g} s")
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
                self.num_requests += 1
                if peer := self._names.get(key.peer):
                    peer.num_requests += 1
                attempt.task = self._preparing.run("preparing a request", self._prepare(action))
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
                    attempt.release()
                    for future in attempt.encoding.values():
                        future.cancel()
                    if attempt.task:
                        attempt.task.cancel()

    async def _prepare(self, action: Prepare) -> None:
        """Prepares one request. A failure is reported for this request only."""
        key, started = action.key, time.monotonic()
        try:
            parts = await self._preparation.in_thread(lambda: unpack(action.payload))
            arrays, release = await self._preparation.prepare(self._model.processor, *parts)
            if (attempt := self._attempts.get(key)) is None:
                release()
                return
            attempt.release = release
            request, images = await self._preparation.in_thread(lambda: self._outgoing(arrays))
            attempt.request, attempt.images = request, images
            prepared = self._describe(key, request, images, time.monotonic() - started)
        except MediaError as error:
            self._perform(self.sender.failed(key, error.status, one_line(error), time.monotonic()))
        except ValueError as error:  # only here does a ValueError mean that the request is invalid
            self._perform(self.sender.failed(key, 400, one_line(error), time.monotonic()))
        except Exception as error:
            self._report_failure(key, "preparing the request", error)
        else:
            self._perform(self.sender.prepared(key, prepared, time.monotonic()))

    def _outgoing(self, arrays: dict[str, np.ndarray]) -> tuple[OutgoingRequest, list[OutgoingImage]]:
        """Returns a request whose rows are still to be added, and its images and videos."""
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
        if not attempt.images:
            attempt.release()
        attempt.encode_seconds += seconds
        incomplete = {block for other in attempt.images for block in other.blocks}
        now, encode_us = time.monotonic(), int(attempt.encode_seconds * 1e6)
        self._perform(self.sender.encoded(key, image.blocks - incomplete, now, encode_us))

    def _report_failure(self, key: AttemptKey, stage: str, error: BaseException) -> None:
        _log.error("%s failed", stage, exc_info=error)
        reason = f"{stage} failed ({type(error).__name__}): see the encode node's log"  # clients get the reason
        self.num_failures += 1
        if peer := self._names.get(key.peer):
            peer.num_failures += 1
            self.events.add(peer.public_name, f"a request failed here: {reason}")
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
        may_write = lambda: self.sender.may_write(key, time.monotonic())  # noqa: E731
        peer.bridge.write(attempt.request, action.blocks, ended, may_write, Purpose(key.request_id, key.attempt, round))

    def _written(self, key: AttemptKey, round: int, blocks: list[BlockWrite]) -> None:
        """Reports the outcome of one group; all of its blocks share it."""
        now, token_blocks, error = time.monotonic(), [block.token_block for block in blocks], blocks[0].error
        if error is None:
            done = [WrittenBlock(block.token_block, block.checksum, block.num_bytes) for block in blocks]
            self.blocks_written += len(done)
            num_bytes = sum(block.num_bytes for block in done)
            self.bytes_written += num_bytes
            if peer := self._names.get(key.peer):
                peer.bytes_written += num_bytes
            self._perform(self.sender.written(key, round, done, now))
        elif isinstance(error, WriteSkippedError):
            self._perform(self.sender.write_skipped(key, round, token_blocks, now))
        else:
            _log.warning("a write to %s failed: %s", key.peer, one_line(error))
            reason = f"a write failed ({type(error).__name__}): see the encode node's log"
            self._perform(self.sender.write_failed(key, round, token_blocks, reason, now))


def new_incarnation() -> str:
    """Draws a name that is unique to this start of this node."""
    return secrets.token_hex(8)
