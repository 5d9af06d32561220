"""The language node's side of the split: gets the rows of a request's images and videos from encode nodes.

`receiver.Receiver` decides; this carries out: control messages in the event loop, copies in the bridge's thread.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

import msgspec
import numpy as np

from deepstack_jax.config import ModelConfig
from deepstack_jax.disagg.language.bridge import ReceiveBridge
from deepstack_jax.disagg.language.incoming import BlockCopy, IncomingPrompt
from deepstack_jax.disagg.language.link import Link
from deepstack_jax.disagg.language.receiver import Receiver, ReceiverSettings
from deepstack_jax.disagg.transports import Transport
from deepstack_jax.disagg.wire.control import ClusterKey, Connection
from deepstack_jax.disagg.wire.layout import (
    AUX_FORMAT_VERSION,
    AUX_ROPE_DELTA,
    AUX_TOTAL_TOKENS,
    AUX_VISUAL_ROWS,
    FORMAT_VERSION,
)
from deepstack_jax.disagg.wire.messages import (
    Abort,
    Accepted,
    Goodbye,
    Grant,
    Hello,
    Message,
    Prepared,
    Written,
)
from deepstack_jax.disagg.wire.transfer import Action, Began, CopyOut, EncodeHere, Ended, Send, State
from deepstack_jax.processing.batch import bucket
from deepstack_jax.programs import PromptArrays

REPLY = 0.1  # seconds

_log = logging.getLogger(__name__)


class TransferFailedError(Exception):
    """A request's rows did not come; `status` is what HTTP says, the message one line."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status = status


class NoEncoderError(Exception):
    """No encoder is left, and this node can encode by itself."""


@dataclass
class Round:
    """One grant of blocks: seconds on time.monotonic()'s clock."""

    began: float
    blocks: int = 0
    ended: float = 0.0


@dataclass
class Arrival:
    """What has come for a request, and how."""

    prompt: PromptArrays
    encoder: int  # its place among the endpoints
    prepare_seconds: float
    encode_seconds: float
    rounds: list[Round]
    num_bytes: int

    @property
    def timings(self) -> dict[str, float]:
        """Seconds of each stage before prefill."""
        transfer = self.rounds[-1].ended - self.rounds[0].began if self.rounds else 0.0
        return {"prepare": self.prepare_seconds, "encode": self.encode_seconds, "transfer": transfer}


@dataclass
class _Pending:
    """A request under way."""

    future: "asyncio.Future[Arrival]"
    incoming: IncomingPrompt | None = None
    visual_rows: int = 0
    prepared: Prepared | None = None
    peer: str = ""
    encoder: int = 0
    rounds: dict[int, Round] = field(default_factory=dict)
    num_bytes: int = 0


class EncoderLinks:
    """The encode nodes that a language node uses, and the requests under way to them.

    All methods are for the event loop's thread.
    """

    def __init__(
        self,
        config: ModelConfig,
        hello: Hello,
        bridge: ReceiveBridge,
        transport: Transport,
        settings: ReceiverSettings,
        endpoints: Iterable[str],
        key: ClusterKey | None = None,
    ):
        """
        Args:
            config: the model's.
            hello: what this node says of itself, of role language, with its pool.
            bridge, transport: over the pool; closed by `close`.
            settings: of the receiver.
            endpoints: tcp://host:port of each encode node's control socket.
            key: the cluster's.

        Raises:
            ValueError: an endpoint that can't be used.
        """
        self.hello = hello
        self.receiver = Receiver(settings)
        self.refused: dict[str, str] = {}  # endpoint -> why its node doesn't fit
        self._config, self._bridge, self._transport = config, bridge, transport
        self._links = [
            # to one encoder under two names this node is two, rather than one that keeps changing its connection
            Link(
                self,
                msgspec.structs.replace(hello, incarnation=f"{hello.incarnation}.{number}"),
                Connection(endpoint, key),
            )
            for number, endpoint in enumerate(dict.fromkeys(endpoints))
        ]
        self._by_peer: dict[str, Link] = {}
        self._pending: dict[str, _Pending] = {}
        self._changed = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._closed = False

    async def start(self) -> None:
        """Connects, and keeps connected until `close`."""
        self._loop = asyncio.get_running_loop()
        self._tasks = [asyncio.create_task(self._watch())]
        self._tasks += [asyncio.create_task(job) for link in self._links for job in (link.listen(), link.keep())]

    async def close(self) -> None:
        """Says goodbye; requests under way fail."""
        self._closed = True
        for request_id in list(self._pending):
            self._settle(request_id, TransferFailedError(503, "the server is stopping: try again later"))
            self._do(self.receiver.abort(request_id, "the server is stopping", time.monotonic()))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for link in self._links:
            link.connection.send(Goodbye("the language node is stopping"))
        for link in self._links:
            link.connection.close()
        await asyncio.to_thread(self._bridge.close)
        await asyncio.to_thread(self._transport.close)

    @property
    def num_encoders(self) -> int:
        """Encoders that are connected and fit."""
        return len(self.receiver.peers)

    async def fetch(self, request_id: str, payload: bytes, deadline: float) -> Arrival:
        """The prompt of a request with its rows, as an encoder prepared it. Cancelling ends the work everywhere.

        It ends REPLY seconds before `deadline` (on time.monotonic()'s clock), so that who waits until then can say why.

        Raises:
            TransferFailedError: with the reason.
            NoEncoderError: with the reason; where the settings say that this node encodes too.
            ValueError: a request of this id is under way, or the id or the payload is too long.
        """
        if self._closed:
            raise TransferFailedError(503, "the server is stopping: try again later")
        actions = self.receiver.submit(request_id, payload, deadline - REPLY, time.monotonic())
        self._pending[request_id] = pending = _Pending(self._loop.create_future())
        try:
            self._do(actions)
            return await pending.future
        finally:
            self._pending.pop(request_id, None)
            self._do(self.receiver.abort(request_id, "nobody waits for the answer", time.monotonic()))

    # carrying out

    def _do(self, actions: Iterable[Action]) -> None:
        for action in actions:
            try:
                self._carry_out(action)
            except Exception as error:  # one request's trouble must not be another's
                _log.exception("an action of type %s failed", type(action).__name__)
                if isinstance(action, Began | CopyOut):  # else it would be waited for until its deadline
                    reason = f"what the encoder announced can't be taken: {type(error).__name__}: {error}"
                    self._settle(action.request_id, TransferFailedError(502, " ".join(reason.split())))
        self._changed.set()

    def _carry_out(self, action: Action) -> None:
        match action:
            case Send(peer, message):
                if isinstance(message, Grant) and (pending := self._pending.get(message.request_id)):
                    pending.rounds.setdefault(message.round, Round(time.monotonic()))
                if link := self._by_peer.get(peer):
                    link.connection.send(message)
            case Began(request_id, total_tokens, visual_rows):
                self._begin(request_id, total_tokens, visual_rows)
            case CopyOut():
                self._copy_out(action)
            case EncodeHere(request_id, reason):
                self._settle(request_id, NoEncoderError(reason))
            case Ended(request_id, State.SUCCESS):
                pending = self._pending[request_id]
                try:
                    self._settle(request_id, self._arrival(pending))
                except (ValueError, RuntimeError) as error:
                    self._settle(request_id, TransferFailedError(502, f"what {pending.peer} sent is wrong: {error}"))
            case Ended(request_id, _, status, reason):
                self._settle(request_id, TransferFailedError(status, reason))

    def _settle(self, request_id: str, result: Arrival | Exception) -> None:
        pending = self._pending.get(request_id)
        if pending is None or pending.future.done():
            return
        if isinstance(result, Exception):
            pending.future.set_exception(result)
        else:
            pending.future.set_result(result)

    def _begin(self, request_id: str, total_tokens: int, visual_rows: int) -> None:
        pending, config = self._pending[request_id], self._config
        ids = config.image_token_id, config.video_token_id
        num_rows = bucket(visual_rows) if visual_rows else 0
        pending.incoming = self._bridge.expect(total_tokens, visual_rows, ids, num_rows)
        pending.visual_rows = visual_rows

    def _copy_out(self, action: CopyOut) -> None:
        pending = self._pending[action.request_id]
        assert pending.incoming is not None
        expected = BlockCopy(action.checksum, action.num_bytes)
        copy = self._bridge.copy_out(pending.incoming, action.token_block, action.pool_block, expected)

        def ended(_: object) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(copied)

        def copied() -> None:
            now = time.monotonic()
            if (error := copy.exception()) is not None:  # what the encoder announced and what it sent don't fit
                _log.warning("request %s: %s", action.request_id, error)
                found = BlockCopy(b"", 0)
            else:
                found = copy.result()
            round = pending.rounds.setdefault(action.round, Round(now))
            round.blocks, round.ended = round.blocks + 1, now
            pending.num_bytes += found.num_bytes
            place = action.request_id, action.attempt, action.round, action.token_block
            self._do(self.receiver.copied(*place, *found, now))

        copy.add_done_callback(ended)

    def _arrival(self, pending: _Pending) -> Arrival:
        """The prompt as the prefill program takes it: in the buckets in which `prepare_batch` would have put it."""
        incoming, said, config = pending.incoming, pending.prepared, self._config
        assert incoming is not None
        ids, index, aux = incoming.fill_ids, incoming.visual_index, incoming.aux_datas
        count, rows = len(ids), incoming.visual_rows
        if (aux[AUX_FORMAT_VERSION], aux[AUX_TOTAL_TOKENS], aux[AUX_VISUAL_ROWS]) != (FORMAT_VERSION, count, rows):
            raise ValueError(f"aux_datas {aux[:4].tolist()} for {count} tokens and {rows} rows")
        if not ((ids >= 0) & (ids < config.text.vocab_size)).all() or int((index >= 0).sum()) != rows:
            raise ValueError("token ids that the model doesn't have, or another number of visual ones than rows")
        pad = bucket(count) - count
        prompt = PromptArrays(
            input_ids=np.pad(ids, (0, pad))[None],
            position_ids=np.pad(incoming.mrope_positions, [(0, 0), (0, pad)])[:, None],
            lengths=np.asarray([count], np.int32),
            rope_deltas=aux[AUX_ROPE_DELTA : AUX_ROPE_DELTA + 1].copy(),
            visual_index=np.pad(index, (0, pad), constant_values=-1)[None] if rows else None,
            rows=incoming.rows() if rows else None,
        )
        rounds = list(pending.rounds.values())
        prepare, encode = (said.prepare_us / 1e6, said.encode_us / 1e6) if said else (0.0, 0.0)
        return Arrival(prompt, pending.encoder, prepare, encode, rounds, pending.num_bytes)

    async def _watch(self) -> None:
        while True:
            try:
                self._do(self.receiver.tick(time.monotonic()))
                due = self.receiver.next_timer()
            except Exception:  # deadlines hang on this loop
                _log.exception("the timers failed")
                due = time.monotonic() + 1.0
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), None if due is None else max(due - time.monotonic(), 0))

    # called by links

    def peer_up(self, link: Link, peer: str) -> None:
        self._by_peer[peer] = link
        self.refused.pop(link.connection.endpoint, None)
        self._do(self.receiver.peer_up(peer, time.monotonic()))

    def refuses(self, link: Link, reason: str) -> None:
        self.refused[link.connection.endpoint] = reason

    def peer_down(self, peer: str, reason: str) -> None:
        self._do(self.receiver.peer_down(peer, reason, time.monotonic()))
        self._by_peer.pop(peer, None)

    def receive(self, peer: str, message: Message) -> None:
        """A message about a request."""
        now = time.monotonic()
        if self._is_over(message):  # the encoder would keep its rows: Release or Abort was lost
            assert isinstance(message, Accepted | Prepared | Written)
            self._by_peer[peer].connection.send(Abort(message.request_id, message.attempt))
            return
        if isinstance(message, Prepared) and (pending := self._pending.get(message.request_id)):
            pending.prepared, pending.peer = message, peer
            pending.encoder = self._links.index(self._by_peer[peer])
        self._do(self.receiver.receive(peer, message, now))

    def _is_over(self, message: Message) -> bool:
        """Whether an encoder is at work for an attempt that nobody waits for."""
        if not isinstance(message, Accepted | Prepared | Written):
            return False
        request = self.receiver.requests.get(message.request_id)
        return request is None or request.attempt != message.attempt
