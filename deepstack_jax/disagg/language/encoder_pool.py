"""The encode nodes that a language node uses: fetches the rows of a request's images and videos from them.

`receiver.Receiver` decides what to do, and this module does it: it sends and receives control messages in the event
loop, and copies rows in the bridge's thread.
"""

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from deepstack_jax.config import ModelConfig
from deepstack_jax.disagg.events import Events
from deepstack_jax.disagg.keys.certificates import NodeKey
from deepstack_jax.disagg.keys.files import Key
from deepstack_jax.disagg.language.bridge import ReceiveBridge
from deepstack_jax.disagg.language.fetch import Fetch, NoEncoderError, OnRows, TransferFailedError
from deepstack_jax.disagg.language.incoming import BlockCopy
from deepstack_jax.disagg.language.link import Link
from deepstack_jax.disagg.language.pending import ReceiverSettings
from deepstack_jax.disagg.language.receiver import Receiver
from deepstack_jax.disagg.tasks import Tasks
from deepstack_jax.disagg.transports import Transport
from deepstack_jax.disagg.wire.control import Connection
from deepstack_jax.disagg.wire.messages import (
    Abort,
    Accepted,
    Encoded,
    Error,
    Goodbye,
    Grant,
    Hello,
    Message,
    NodeLoad,
    Prepared,
    Submit,
    Written,
)
from deepstack_jax.disagg.wire.prompt import unpack_prompt
from deepstack_jax.disagg.wire.seals import KEY_BYTES, Purpose
from deepstack_jax.disagg.wire.transfer import (
    Action,
    CopyOut,
    EncodeLocally,
    Ended,
    PromptKnown,
    Send,
    State,
    Wipe,
    name_of,
)
from deepstack_jax.processing.daemon_threads import in_thread_or_here

REPLY_MARGIN_S = 0.1  # a fetch ends this long before its deadline, so that the caller can still report why
TIMER_RETRY_S = 1.0  # after a failure, timers are checked again after this long

_log = logging.getLogger(__name__)


@dataclass
class EncoderStatus:
    """What this node knows of an encode node.

    Attributes:
        number: index of its endpoint.
        state: "unhealthy" is one that answers and can't be used.
        reason: why it isn't ready.
        since: time.monotonic() when it came into this state.
        known: whether it was connected before.
        load: what it said last of itself, None before and while it is gone.
        requests, failures: of this node, that it got and that it didn't fulfil.
        num_bytes, seconds: of rows that it sent to this node.
    """

    number: int
    name: str
    state: Literal["ready", "unreachable", "unhealthy"] = "unreachable"
    reason: str | None = "not connected yet"
    since: float = field(default_factory=lambda: time.monotonic())
    known: bool = False
    load: NodeLoad | None = None
    requests: int = 0
    failures: int = 0
    num_bytes: int = 0
    seconds: float = 0.0

    def become(self, state: Literal["ready", "unreachable", "unhealthy"], reason: str | None = None) -> None:
        """Changes the state."""
        if state != self.state:
            self.state, self.since = state, time.monotonic()
        self.reason = reason


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
        key: Key | None = None,
    ):
        """
        Args:
            config: the model's configuration.
            hello: introduces this node, with role "language" and its receive pool.
            bridge, transport: the receive pool's; `close` closes them.
            settings: of the receiver.
            endpoints: tcp://host:port of each encode node's control socket.
            key: of the cluster or of this node.

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
                msgspec.structs.replace(
                    hello,
                    incarnation=f"{hello.incarnation}.{number}",
                    block_key=b"" if key is None else secrets.token_bytes(KEY_BYTES),  # no other encoder can use it
                ),
                Connection(endpoint, key),
                f"encoder {number}",
            )
            for number, endpoint in enumerate(dict.fromkeys(endpoints))
        ]
        if isinstance(key, NodeKey):
            key.revoked.watch(self._drop_revoked)
        self.events = Events()
        self._status = {link: EncoderStatus(number, link.name) for number, link in enumerate(self._links)}
        self._by_peer: dict[str, Link] = {}
        self._fetches: dict[str, Fetch] = {}
        self._changed = asyncio.Event()
        self._tasks = Tasks()
        self._closed = False

    async def start(self) -> None:
        """Connects to all encode nodes, and reconnects until `close`."""
        self._loop = asyncio.get_running_loop()
        self._tasks.keep("the timers of transfers", self._run_timers())
        for link in self._links:
            self._tasks.keep(f"the listener for {link.name}", link.listen())
            self._tasks.keep(f"the heartbeat of {link.name}", link.keep_alive())

    async def close(self) -> None:
        """Fails the fetches in progress, says Goodbye to all encode nodes and closes the bridge and the transport."""
        self._closed = True
        for request_id in list(self._fetches):
            self._fail(request_id, TransferFailedError(503, "the server is stopping: try again later"))
            self._perform(self.receiver.abort(request_id, "the server is stopping", time.monotonic()))
        await self._tasks.cancel()
        for link in self._links:
            link.connection.send(Goodbye("the language node is stopping"))
        for link in self._links:
            link.connection.close()
        await in_thread_or_here(self._bridge.close)
        await in_thread_or_here(self._transport.close)

    @property
    def failure(self) -> str | None:
        """Why this node can't go on, None if it can: a task has ended that nothing restarts."""
        return self._tasks.failure

    @property
    def num_encoders(self) -> int:
        """The number of compatible encoders that are connected."""
        return len(self.receiver.peers)

    @property
    def encoders(self) -> list[EncoderStatus]:
        """What is known of each encode node, in the order of their endpoints."""
        for link, status in self._status.items():
            status.load = link.load if link.connected else None
        return list(self._status.values())

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

    @contextlib.asynccontextmanager
    async def fetch(self, request_id: str, payload: bytes, deadline: float, on_rows: OnRows) -> AsyncIterator[Fetch]:
        """Fetches a request's prompt and its rows. Leaving the context stops the encoder if it is still at work.

        The fetch ends at the latest REPLY_MARGIN_S before `deadline`, which is a time of time.monotonic().

        Args:
            on_rows: called in the event loop with the rows of each token block that has arrived, in any order.

        Raises:
            TransferFailedError: this node is stopping.
            ValueError: a request with this id is in progress, or the id or the payload is too long.
        """
        if self._closed:
            raise TransferFailedError(503, "the server is stopping: try again later")
        actions = self.receiver.submit(request_id, payload, deadline - REPLY_MARGIN_S, time.monotonic())
        fetch = Fetch(on_rows, lambda blocks, admitted: self._want(request_id, blocks, admitted))
        self._fetches[request_id] = fetch
        try:
            self._perform(actions)
            yield fetch
        finally:
            fetch.close()
            self._fetches.pop(request_id, None)
            self._perform(self.receiver.abort(request_id, "the result is no longer needed", time.monotonic()))

    def _want(self, request_id: str, blocks: Iterable[int], admitted: bool) -> None:
        self._perform(self.receiver.want(request_id, blocks, admitted, time.monotonic()))

    # performing actions

    def _perform(self, actions: Iterable[Action]) -> None:
        for action in actions:
            try:
                self._perform_action(action)
            except Exception as error:  # a failure of one request must not affect another
                _log.exception("an action of type %s failed", type(action).__name__)
                if isinstance(action, PromptKnown | CopyOut):  # otherwise the request would wait until its deadline
                    reason = f"the encoder's message can't be processed: {type(error).__name__}: {error}"
                    self._fail(action.request_id, TransferFailedError(502, " ".join(reason.split())))
        self._changed.set()

    def _perform_action(self, action: Action) -> None:
        match action:
            case Send(peer, message):
                if isinstance(message, Grant) and (fetch := self._fetches.get(message.request_id)):
                    fetch.granted(message.round, time.monotonic())
                if link := self._by_peer.get(peer):
                    if isinstance(message, Submit):
                        self._note_submit(link, peer, message.request_id)
                    link.connection.send(message)
            case PromptKnown(request_id, prepared):
                self._know_prompt(request_id, prepared)
            case CopyOut():
                self._copy_out(action)
            case Wipe(blocks):
                self._bridge.wipe(blocks)
            case EncodeLocally(request_id, reason):
                self.events.add(self._last_encoder(request_id), f"a request is encoded here: {reason}")
                self._fail(request_id, NoEncoderError(reason))
            case Ended(request_id, State.SUCCESS):
                if fetch := self._fetches.get(request_id):
                    fetch.end()
            case Ended(request_id, _, status, reason):
                if status >= 500:
                    self.events.add(self._last_encoder(request_id), f"a request failed: {reason}")
                self._fail(request_id, TransferFailedError(status, reason))

    def _note_submit(self, link: Link, peer: str, request_id: str) -> None:
        """Writes down that a request goes to an encoder, and whether it comes from another one."""
        fetch = self._fetches.get(request_id)
        if fetch is None or fetch.peer == peer:
            return
        self._status[link].requests += 1
        if fetch.peer:
            self.events.add(link.name, f"took over a request of {name_of(fetch.peer)}")
        fetch.peer = peer

    def _last_encoder(self, request_id: str) -> str:
        fetch = self._fetches.get(request_id)
        return name_of(fetch.peer) if fetch and fetch.peer else "encoders"

    def _fail(self, request_id: str, error: Exception) -> None:
        if fetch := self._fetches.get(request_id):
            fetch.fail(error)

    def _know_prompt(self, request_id: str, prepared: Prepared) -> None:
        if (fetch := self._fetches.get(request_id)) is None:
            return
        config = self._config
        ids, positions = unpack_prompt(prepared.prompt, prepared.total_tokens)
        if not ((ids >= 0) & (ids < config.text.vocab_size)).all():
            raise ValueError("token ids outside the vocabulary")
        incoming = self._bridge.expect(ids, positions, (config.image_token_id, config.video_token_id))
        fetch.know(incoming, prepared)

    def _copy_out(self, action: CopyOut) -> None:
        fetch = self._fetches[action.request_id]
        incoming = fetch.incoming
        assert incoming is not None
        expected = BlockCopy(action.checksum, action.num_bytes)
        link = self._by_peer[self.receiver.requests[action.request_id].peer]
        purpose = Purpose(action.request_id, action.attempt, action.round)
        copy = self._bridge.copy_out(incoming, action.token_block, action.pool_block, expected, link.seal, purpose)

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
            status = self._status[link]
            status.seconds += fetch.copied(action.round, action.token_block, found.num_bytes, now)
            status.num_bytes += found.num_bytes
            block = action.request_id, action.attempt, action.round, action.token_block
            self._perform(self.receiver.copied(*block, *found, now))

        copy.add_done_callback(ended)

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

    def _drop_revoked(self) -> None:
        for link in self._links:
            link.drop_revoked()

    # events of links

    def peer_up(self, link: Link, peer: str) -> None:
        _log.info("%s, %s, is connected", link.name, link.connection.endpoint)
        status = self._status[link]
        self.events.add(link.name, "is back" if status.known else "connected")
        status.known = True
        status.become("ready")
        self._by_peer[peer] = link
        self.refused.pop(link.connection.endpoint, None)
        self._perform(self.receiver.peer_up(peer, time.monotonic()))

    def peer_slow(self, peer: str, slow: bool) -> None:
        self.receiver.set_slow(peer, slow)

    def peer_refused(self, link: Link, reason: str) -> None:
        if self.refused.get(link.connection.endpoint) != reason:
            _log.warning("%s, %s, is not used: %s", link.name, link.connection.endpoint, reason)
            self.events.add(link.name, f"is not used: {reason}")
        self.refused[link.connection.endpoint] = reason
        self._status[link].become("unhealthy", reason)

    def peer_down(self, peer: str, reason: str) -> None:
        _log.info("%s", reason)
        if link := self._by_peer.get(peer):
            status = self._status[link]
            status.failures += sum(request.peer == peer for request in self.receiver.requests.values())
            status.become("unhealthy" if link.stuck else "unreachable", reason)
            self.events.add(link.name, reason)
        self._perform(self.receiver.peer_down(peer, reason, time.monotonic()))
        self._by_peer.pop(peer, None)

    def receive(self, peer: str, message: Message) -> None:
        """A message about a request."""
        now = time.monotonic()
        if self._is_finished(message):  # Release or Abort was lost; without this the encoder would keep the rows
            assert isinstance(message, Accepted | Prepared | Encoded | Written)
            self._by_peer[peer].connection.send(Abort(message.request_id, message.attempt))
            return
        if isinstance(message, Error) and message.status >= 500:
            self._status[self._by_peer[peer]].failures += 1
        if isinstance(message, Prepared | Encoded) and (fetch := self._fetches.get(message.request_id)):
            fetch.heard(message, self._links.index(self._by_peer[peer]), now)
        self._perform(self.receiver.receive(peer, message, now))

    def _is_finished(self, message: Message) -> bool:
        """Whether a message shows that an encoder still works on an attempt that has ended here."""
        if not isinstance(message, Accepted | Prepared | Encoded | Written):
            return False
        request = self.receiver.requests.get(message.request_id)
        return request is None or request.attempt != message.attempt
