"""The encode node: answers language nodes' requests with rows of visual tokens.

`sender.Sender` decides; this carries out: control messages in the event loop, preparation in a pool of threads, the
encoder in a thread of its own, writes in one bridge a language node.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from deepstack_jax.checkpoint import Model
from deepstack_jax.disagg.encode.bridge import BlockWrite, SendBridge, WriteSkippedError
from deepstack_jax.disagg.encode.outgoing import OutgoingPrompt
from deepstack_jax.disagg.encode.sender import Sender, SenderSettings
from deepstack_jax.disagg.encode.worker import EncodeWorker, content_key
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
    Goodbye,
    Heartbeat,
    HeartbeatReply,
    Hello,
    Message,
    Refused,
    Welcome,
    WrittenBlock,
    refusal,
)
from deepstack_jax.disagg.wire.payload import unpack
from deepstack_jax.disagg.wire.transfer import Action, Forget, Key, Prepare, Send, StartWrite
from deepstack_jax.errors import one_line
from deepstack_jax.processing.batch import VisionInput, prepare_batch

PEER_SILENCE = 10.0  # seconds without a message after which a language node counts as gone
WATCH = 1.0  # seconds at most between two looks at timers and peers
REMIND = 5.0  # seconds between two messages about an attempt that nothing is asked of
PREPARERS = 2  # threads that decode pictures and tokenize

_log = logging.getLogger(__name__)


@dataclass
class _Peer:
    """A language node: one incarnation over one connection."""

    name: str
    connection: bytes
    hello: Hello
    bridge: SendBridge
    heard: float


@dataclass
class _Job:
    """An attempt's preparation, and what it has come to."""

    task: "asyncio.Task[None] | None" = None
    prompt: OutgoingPrompt | None = None


class EncodeServer:
    """Serves language nodes until it is closed. All methods are for the event loop's thread."""

    def __init__(self, model: Model, hello: Hello, listener: Listener, transport: Transport, worker: EncodeWorker):
        """
        Args:
            model: with vision parameters; no others are used.
            hello: what this node says of itself, of role encode.
            listener, transport, worker: closed by `close`.
        """
        self.hello, self.listener, self.worker = hello, listener, worker
        self.sender = Sender(SenderSettings(hello.block_size))
        self.peers: dict[bytes, _Peer] = {}  # by connection
        self._model, self._transport = model, transport
        self._names: dict[str, _Peer] = {}
        self._jobs: dict[Key, _Job] = {}
        self._pool = ThreadPoolExecutor(PREPARERS, thread_name_prefix="prepare")
        self._changed = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._closing: set[asyncio.Future[None]] = set()

    async def start(self) -> None:
        """Reads the tokenizer, then begins to serve."""
        self._loop = asyncio.get_running_loop()
        # here, and not in the threads that prepare: two of them at once can't import it
        await asyncio.to_thread(lambda: self._model.processor.tokenizer)
        self._tasks = [asyncio.create_task(self._listen()), asyncio.create_task(self._watch())]

    async def close(self) -> None:
        """Says goodbye and frees everything."""
        for peer in self.peers.values():
            self.listener.send(peer.connection, Goodbye("the encode node is stopping"))
        await asyncio.sleep(0)
        for task in [*self._tasks, *(job.task for job in self._jobs.values() if job.task)]:
            task.cancel()
        for connection in list(self.peers):
            self._drop(connection)
        await asyncio.gather(*self._closing, return_exceptions=True)
        self.listener.close()
        self._pool.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self.worker.close)
        await asyncio.to_thread(self._transport.close)

    # what comes in

    async def _listen(self) -> None:
        async for connection, message in self.listener.messages():
            try:
                self._receive(connection, message)
            except Exception:  # nothing that one message does may end the node
                _log.exception("a message of type %s failed", type(message).__name__)

    def _receive(self, connection: bytes, message: Message) -> None:
        if isinstance(message, Hello):
            self._greet(connection, message)
            return
        peer = self.peers.get(connection)
        if peer is None:
            self.listener.send(connection, Goodbye("say hello first"))
            return
        peer.heard = time.monotonic()
        if isinstance(message, Heartbeat):
            age = self.worker.busy_seconds
            reply = HeartbeatReply(message.sequence, self.hello.incarnation, int(age * 1000))
            self.listener.send(connection, reply)
        elif isinstance(message, Goodbye):
            self._drop(connection)
        else:
            self._do(self.sender.receive(peer.name, message, time.monotonic()))

    def _greet(self, connection: bytes, hello: Hello) -> None:
        name = f"{hello.node_id}/{hello.incarnation}"
        known = self.peers.get(connection)
        if known is not None and known.name == name and known.hello == hello:
            known.heard = time.monotonic()
            self.listener.send(connection, Welcome(self.hello))
            return
        if reason := refusal(hello, self.hello):
            self.listener.send(connection, Refused(reason[:MAX_REASON]))
            return
        for old in [c for c, peer in self.peers.items() if c == connection or peer.name == name]:
            self._drop(old)
        try:
            bridge = SendBridge(self._transport, hello.session, hello.layout)
        except (TransferError, MemoryError) as error:
            _log.exception("no bridge to %s", name)
            self.listener.send(
                connection, Refused(f"the encode node has no memory for another peer: {error}"[:MAX_REASON])
            )
            return
        self.peers[connection] = peer = _Peer(name, connection, hello, bridge, time.monotonic())
        self._names[name] = peer
        self._do(self.sender.peer_up(name, hello.layout.num_blocks, time.monotonic()))
        self.listener.send(connection, Welcome(self.hello))

    def _drop(self, connection: bytes) -> None:
        peer = self.peers.pop(connection)
        self._names.pop(peer.name, None)
        self._do(self.sender.peer_down(peer.name, time.monotonic()))
        # it waits for the group that is being staged
        closing = asyncio.ensure_future(asyncio.to_thread(peer.bridge.close))
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)

    async def _watch(self) -> None:
        """Timers of the machine, peers that have fallen silent, and attempts that they may have forgotten."""
        last = reminded = time.monotonic()
        while True:
            now = time.monotonic()
            due = None
            try:
                if now - last > 2 * WATCH:  # this process was held up: what they said waits to be read
                    for peer in self.peers.values():
                        peer.heard += now - last
                last = now
                for connection in [c for c, peer in self.peers.items() if now - peer.heard > PEER_SILENCE]:
                    self._drop(connection)
                self._do(self.sender.tick(now))
                if now - reminded > REMIND:
                    reminded = now
                    self._remind()
                due = self.sender.next_timer()
            except Exception:  # deadlines hang on this loop
                _log.exception("the timers failed")
            self._changed.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), WATCH if due is None else min(max(due - now, 0), WATCH))

    def _remind(self) -> None:
        """Repeats what is known of attempts: where nobody waits for one, its language node answers with Abort."""
        for key, outgoing in self.sender.outgoing.items():
            if outgoing.prepared and not outgoing.writing and (peer := self._names.get(key.peer)):
                self.listener.send(peer.connection, outgoing.prepared)

    # what goes out

    def _do(self, actions: Iterable[Action]) -> None:
        for action in actions:
            try:
                self._carry_out(action)
            except Exception:  # one request's trouble must not be another's
                _log.exception("an action of type %s failed", type(action).__name__)
        self._changed.set()

    def _carry_out(self, action: Action) -> None:
        match action:
            case Send(peer, message):
                if known := self._names.get(peer):
                    self.listener.send(known.connection, message)
            case Prepare(key):
                self._jobs[key] = job = _Job()
                job.task = asyncio.create_task(self._prepare(action))
            case StartWrite(key, round, blocks):
                try:
                    self._write(action)
                except Exception as error:  # then nothing of it was started
                    _log.exception("a write failed to start")
                    now, reason = time.monotonic(), f"the write failed to start ({type(error).__name__})"
                    self._do(self.sender.failed(key, 503, reason, now))
                    self._do(self.sender.write_skipped(key, round, [block for block, _ in blocks], now))
            case Forget(key):
                if (job := self._jobs.pop(key, None)) and job.task:
                    job.task.cancel()

    async def _prepare(self, action: Prepare) -> None:
        """Prepares and encodes one request. Whatever goes wrong with it is said of it, and of nothing else."""
        key, stage = action.key, "preparing the request"
        try:
            began = time.monotonic()
            try:
                prompt, visuals, keys = await self._loop.run_in_executor(self._pool, self._read, action.payload)
            except ValueError as error:  # only here: a ValueError of the encoder is none of the request
                self._do(self.sender.failed(key, 400, one_line(error), time.monotonic()))
                return
            prepared, stage = time.monotonic(), "encoding the images and videos"
            encoded = await asyncio.wrap_future(self.worker.submit(visuals, keys)) if visuals else None
            if (job := self._jobs.get(key)) is None:
                return
            job.prompt = OutgoingPrompt(**prompt, rows=encoded.rows if encoded else None)
            aux, ids, positions = (prompt[name] for name in ("aux_datas", "fill_ids", "mrope_positions"))
            actions = self.sender.prepared(
                key,
                len(ids),
                int(aux[AUX_VISUAL_ROWS]),
                int(aux[AUX_ROPE_DELTA]),
                fingerprint(self.hello.model, ids, positions, xxhash.xxh3_128(b"".join(keys)).digest()),
                time.monotonic(),
                prepare_us=int((prepared - began) * 1e6),
                encode_us=int((time.monotonic() - prepared) * 1e6),
            )
        except Exception as error:
            _log.exception("%s failed", stage)
            reason = f"{stage} failed ({type(error).__name__}): {one_line(error)[:300]}"
            self._do(self.sender.failed(key, 500, reason, time.monotonic()))
            return
        self._do(actions)

    def _read(self, payload: bytes) -> tuple[dict[str, Any], tuple[VisionInput, ...], list[bytes]]:
        """(an OutgoingPrompt's arrays, the images and videos, their keys)."""
        prompt, images, videos, options = unpack(payload)
        arrays = self._model.processor.prepare(prompt, images=images, videos=videos, **options)
        batch = prepare_batch(self._model.config, **arrays)
        count = int(batch.lengths[0])
        aux = np.zeros(AUX_LENGTH, np.int32)
        aux[AUX_TOTAL_TOKENS], aux[AUX_ROPE_DELTA] = count, batch.rope_deltas[0]
        aux[AUX_VISUAL_ROWS], aux[AUX_FORMAT_VERSION] = batch.num_visual_tokens, FORMAT_VERSION
        index = np.full(count, -1, np.int32) if batch.visual_index is None else batch.visual_index[0, :count]
        prompt_arrays = {
            "fill_ids": batch.input_ids[0, :count],
            "mrope_positions": np.ascontiguousarray(batch.position_ids[:, 0, :count]),
            "aux_datas": aux,
            "visual_index": index,
        }
        return prompt_arrays, batch.visuals, [content_key(visual) for visual in batch.visuals]

    def _write(self, action: StartWrite) -> None:
        """Hands blocks to the peer's bridge."""
        key, round = action.key, action.round
        job, peer = self._jobs.get(key), self._names.get(key.peer)
        if job is None or job.prompt is None or peer is None:
            self._do(self.sender.write_skipped(key, round, [block for block, _ in action.blocks], time.monotonic()))
            return

        def ended(blocks: list[BlockWrite]) -> None:
            with suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._written, key, round, blocks)

        # asked in the bridge's thread: a look at a dictionary and a clock
        peer.bridge.write(job.prompt, action.blocks, ended, lambda: self.sender.may_write(key, time.monotonic()))

    def _written(self, key: Key, round: int, blocks: list[BlockWrite]) -> None:
        """Blocks of one group: they have one fate."""
        now, numbers, error = time.monotonic(), [block.token_block for block in blocks], blocks[0].error
        if error is None:
            done = [WrittenBlock(block.token_block, block.checksum, block.num_bytes) for block in blocks]
            self._do(self.sender.written(key, round, done, now))
        elif isinstance(error, WriteSkippedError):
            self._do(self.sender.write_skipped(key, round, numbers, now))
        else:
            self._do(self.sender.write_failed(key, round, numbers, one_line(error), now))


def new_incarnation() -> str:
    """A name that no other start of any node has."""
    return secrets.token_hex(8)
