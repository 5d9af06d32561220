"""The encode nodes that a language node uses: fetches the rows of a request's images and videos from them.

`receiver.Receiver` decides what to do, and this module does it: it sends and receives control messages in the event
loop, and copies rows in the bridge's thread.
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
from deepstack_jax.disagg.language.incoming import BlockCopy, IncomingRequest
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
from deepstack_jax.disagg.wire.transfer import Action, CopyOut, EncodeLocally, Ended, PromptKnown, Send, State
from deepstack_jax.processing.batch import bucket
from deepstack_jax.programs import PromptArrays

REPLY_MARGIN_S = 0.1  # a fetch ends this long before its deadline, so that the caller can still report why
TIMER_RETRY_S = 1.0  # after a failure, timers are checked again after this long

_log = logging.getLogger(__name__)


class TransferFailedError(Exception):
    """A request's rows could not be fetched. `status` is the HTTP status, and the message is one line."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status = status


class NoEncoderError(Exception):
    """No encoder is left, and this node can encode the request itself."""


@dataclass
class Round:
    """One grant of blocks; times are those of time.monotonic()."""

    start: float
    num_blocks: int = 0
    end: float = 0.0


@dataclass
class FetchedPrompt:
    """A request's prompt with its rows, and how they were fetched."""

    prompt: PromptArrays
    encoder: int  # index of the encode node's endpoint
    prepare_seconds: float
    encode_seconds: float
    rounds: list[Round]
    num_bytes: int

    @property
    def timings(self) -> dict[str, float]:
        """Seconds of each stage before prefill."""
        transfer = self.rounds[-1].end - self.rounds[0].start if self.rounds else 0.0
        return {"prepare": self.prepare_seconds, "encode": self.encode_seconds, "transfer": transfer}


@dataclass
class _Fetch:
    """A call of `fetch` in progress."""

    future: "asyncio.Future[FetchedPrompt]"
    incoming: IncomingRequest | None = None
    visual_rows: int = 0
    prepared: Prepared | None = None
    peer: str = ""
    encoder: int = 0
    rounds: dict[int, Round] = field(default_factory=dict)
    num_bytes: int = 0


class EncoderPool:
    """The encode nodes that a language node uses, and the fetches in progress.

    All methods must be called from the event loop's thread.
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
            config: the model's configuration.
            hello: introduces this node, with role "language" and its receive pool.
            bridge, transport: the receive pool's; `close` closes them.
            settings: of the receiver.
            endpoints: tcp://host:port of each encode node's control socket.
            key: the cluster's key.

        Raises:
            ValueError: an endpoint can't be used.
        """
        self.hello = hello
        self.receiver = Receiver(settings)
        self.refused: dict[str, str] = {}  # endpoint -> why its node is incompatible
        self._config, self._bridge, self._transport = config, bridge, transport
        self._links = [
            # one incarnation per link: an encoder that is reached under two addresses sees two distinct nodes
            Link(
                self,
                msgspec.structs.replace(hello, incarnation=f"{hello.incarnation}.{number}"),
                Connection(endpoint, key),
            )
            for number, endpoint in enumerate(dict.fromkeys(endpoints))
        ]
        self._by_peer: dict[str, Link] = {}
        self._fetches: dict[str, _Fetch] = {}
        self._changed = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._closed = False

    async def start(self) -> None:
        """Connects to all encode nodes, and reconnects until `close`."""
        self._loop = asyncio.get_running_loop()
        self._tasks = [asyncio.create_task(self._run_timers())]
        self._tasks += [
            asyncio.create_task(task) for link in self._links for task in (link.listen(), link.keep_alive())
        ]

    async def close(self) -> None:
        """Fails the fetches in progress, says Goodbye to all encode nodes and closes the bridge and the transport."""
        self._closed = True
        for request_id in list(self._fetches):
            self._resolve(request_id, TransferFailedError(503, "the server is stopping: try again later"))
            self._perform(self.receiver.abort(request_id, "the server is stopping", time.monotonic()))
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
        """The number of compatible encoders that are connected."""
        return len(self.receiver.peers)

    @property
    def num_fetches(self) -> int:
        """The number of calls of `fetch` in progress."""
        return len(self._fetches)

    @property
    def num_unreadable(self) -> int:
        """The number of messages dropped because they could not be read."""
        return sum(link.connection.num_unreadable for link in self._links)

    @property
    def spare_bytes(self) -> int:
        """Bytes of host memory of finished requests that later ones can reuse."""
        return self._bridge.spare_bytes

    async def fetch(self, request_id: str, payload: bytes, deadline: float) -> FetchedPrompt:
        """Returns a request's prompt with its rows, as an encoder prepared it. Cancelling also stops the encoder.

        The call ends at the latest REPLY_MARGIN_S before `deadline`, which is a time of time.monotonic().

        Raises:
            TransferFailedError: the fetch failed; the message gives the reason.
            NoEncoderError: no encoder is left and the settings say that this node can encode too.
            ValueError: a request with this id is in progress, or the id or the payload is too long.
        """
        if self._closed:
            raise TransferFailedError(503, "the server is stopping: try again later")
        actions = self.receiver.submit(request_id, payload, deadline - REPLY_MARGIN_S, time.monotonic())
        self._fetches[request_id] = fetch = _Fetch(self._loop.create_future())
        try:
            self._perform(actions)
            return await fetch.future
        finally:
            self._fetches.pop(request_id, None)
            self._perform(self.receiver.abort(request_id, "the result is no longer needed", time.monotonic()))

    # performing actions

    def _perform(self, actions: Iterable[Action]) -> None:
        for action in actions:
            try:
                self._perform_action(action)
            except Exception as error:  # a failure of one request must not affect another
                _log.exception("an action of type %s failed", type(action).__name__)
                if isinstance(action, PromptKnown | CopyOut):  # otherwise the request would wait until its deadline
                    reason = f"the encoder's message can't be processed: {type(error).__name__}: {error}"
                    self._resolve(action.request_id, TransferFailedError(502, " ".join(reason.split())))
        self._changed.set()

    def _perform_action(self, action: Action) -> None:
        match action:
            case Send(peer, message):
                if isinstance(message, Grant) and (fetch := self._fetches.get(message.request_id)):
                    fetch.rounds.setdefault(message.round, Round(time.monotonic()))
                if link := self._by_peer.get(peer):
                    link.connection.send(message)
            case PromptKnown(request_id, total_tokens, visual_rows):
                self._allocate(request_id, total_tokens, visual_rows)
            case CopyOut():
                self._copy_out(action)
            case EncodeLocally(request_id, reason):
                self._resolve(request_id, NoEncoderError(reason))
            case Ended(request_id, State.SUCCESS):
                fetch = self._fetches[request_id]
                try:
                    self._resolve(request_id, self._fetched_prompt(fetch))
                except (ValueError, RuntimeError) as error:
                    self._resolve(request_id, TransferFailedError(502, f"{fetch.peer} sent an invalid prompt: {error}"))
            case Ended(request_id, _, status, reason):
                self._resolve(request_id, TransferFailedError(status, reason))

    def _resolve(self, request_id: str, result: FetchedPrompt | Exception) -> None:
        fetch = self._fetches.get(request_id)
        if fetch is None or fetch.future.done():
            return
        if isinstance(result, Exception):
            fetch.future.set_exception(result)
        else:
            fetch.future.set_result(result)

    def _allocate(self, request_id: str, total_tokens: int, visual_rows: int) -> None:
        fetch, config = self._fetches[request_id], self._config
        ids = config.image_token_id, config.video_token_id
        num_rows = bucket(visual_rows) if visual_rows else 0
        fetch.incoming = self._bridge.expect(total_tokens, visual_rows, ids, num_rows)
        fetch.visual_rows = visual_rows

    def _copy_out(self, action: CopyOut) -> None:
        fetch = self._fetches[action.request_id]
        assert fetch.incoming is not None
        expected = BlockCopy(action.checksum, action.num_bytes)
        copy = self._bridge.copy_out(fetch.incoming, action.token_block, action.pool_block, expected)

        def ended(_: object) -> None:
            with contextlib.suppress(RuntimeError):  # the event loop is closed
                self._loop.call_soon_threadsafe(copied)

        def copied() -> None:
            now = time.monotonic()
            if (error := copy.exception()) is not None:  # the encoder's rows contradict its Prepared message
                _log.warning("request %s: %s", action.request_id, error)
                found = BlockCopy(b"", 0)
            else:
                found = copy.result()
            round = fetch.rounds.setdefault(action.round, Round(now))
            round.num_blocks, round.end = round.num_blocks + 1, now
            fetch.num_bytes += found.num_bytes
            block = action.request_id, action.attempt, action.round, action.token_block
            self._perform(self.receiver.copied(*block, *found, now))

        copy.add_done_callback(ended)

    def _fetched_prompt(self, fetch: _Fetch) -> FetchedPrompt:
        """Returns the prompt as the prefill program takes it, padded to the same buckets as by `prepare_batch`."""
        incoming, prepared, config = fetch.incoming, fetch.prepared, self._config
        assert incoming is not None
        ids, index, aux = incoming.fill_ids, incoming.visual_index, incoming.aux_datas
        count, rows = len(ids), incoming.visual_rows
        if (aux[AUX_FORMAT_VERSION], aux[AUX_TOTAL_TOKENS], aux[AUX_VISUAL_ROWS]) != (FORMAT_VERSION, count, rows):
            raise ValueError(f"aux_datas {aux[:4].tolist()} contradict {count} tokens and {rows} rows")
        if not ((ids >= 0) & (ids < config.text.vocab_size)).all() or int((index >= 0).sum()) != rows:
            raise ValueError(
                "token ids outside the vocabulary, or a number of visual tokens that differs from the rows"
            )
        pad = bucket(count) - count
        prompt = PromptArrays(
            input_ids=np.pad(ids, (0, pad))[None],
            position_ids=np.pad(incoming.mrope_positions, [(0, 0), (0, pad)])[:, None],
            lengths=np.asarray([count], np.int32),
            rope_deltas=aux[AUX_ROPE_DELTA : AUX_ROPE_DELTA + 1].copy(),
            visual_index=np.pad(index, (0, pad), constant_values=-1)[None] if rows else None,
            rows=incoming.rows() if rows else None,
        )
        rounds = list(fetch.rounds.values())
        prepare_s, encode_s = (prepared.prepare_us / 1e6, prepared.encode_us / 1e6) if prepared else (0.0, 0.0)
        return FetchedPrompt(prompt, fetch.encoder, prepare_s, encode_s, rounds, fetch.num_bytes)

    async def _run_timers(self) -> None:
        while True:
            try:
                self._perform(self.receiver.tick(time.monotonic()))
                due = self.receiver.next_timer()
            except Exception:  # deadlines depend on this loop
                _log.exception("the timers failed")
                due = time.monotonic() + TIMER_RETRY_S
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), None if due is None else max(due - time.monotonic(), 0))

    # events of links

    def peer_up(self, link: Link, peer: str) -> None:
        self._by_peer[peer] = link
        self.refused.pop(link.connection.endpoint, None)
        self._perform(self.receiver.peer_up(peer, time.monotonic()))

    def peer_refused(self, link: Link, reason: str) -> None:
        self.refused[link.connection.endpoint] = reason

    def peer_down(self, peer: str, reason: str) -> None:
        self._perform(self.receiver.peer_down(peer, reason, time.monotonic()))
        self._by_peer.pop(peer, None)

    def receive(self, peer: str, message: Message) -> None:
        """A message about a request."""
        now = time.monotonic()
        if self._is_finished(message):  # Release or Abort was lost; without this the encoder would keep the rows
            assert isinstance(message, Accepted | Prepared | Written)
            self._by_peer[peer].connection.send(Abort(message.request_id, message.attempt))
            return
        if isinstance(message, Prepared) and (fetch := self._fetches.get(message.request_id)):
            fetch.prepared, fetch.peer = message, peer
            fetch.encoder = self._links.index(self._by_peer[peer])
        self._perform(self.receiver.receive(peer, message, now))

    def _is_finished(self, message: Message) -> bool:
        """Whether a message shows that an encoder still works on an attempt that has ended here."""
        if not isinstance(message, Accepted | Prepared | Written):
            return False
        request = self.receiver.requests.get(message.request_id)
        return request is None or request.attempt != message.attempt
