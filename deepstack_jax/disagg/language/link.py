"""A language node's link to one encode node: says Hello, monitors heartbeats, and reconnects after an outage."""

import asyncio
import itertools
import logging
from typing import Protocol

from deepstack_jax.disagg.wire.control import Connection
from deepstack_jax.disagg.wire.messages import (
    Goodbye,
    Heartbeat,
    HeartbeatReply,
    Hello,
    Message,
    Refused,
    Welcome,
    refusal,
)

HEARTBEAT_INTERVAL_S = 1.0
HEARTBEAT_TIMEOUT_S = 5.0  # an encoder counts as gone after this long without a reply, while this process runs
DEVICE_STUCK_S = 120.0  # an encoder's device counts as stuck after this long in one program, compilation included

_log = logging.getLogger(__name__)


class LinkListener(Protocol):
    """Receives the events of a link; `EncoderPool` implements it."""

    def peer_up(self, link: "Link", peer: str) -> None:
        """A compatible encoder has connected; `peer` identifies this incarnation of it."""
        ...

    def peer_down(self, peer: str, reason: str) -> None:
        """The encoder has disconnected or stopped answering."""
        ...

    def peer_refused(self, link: "Link", reason: str) -> None:
        """The encoder and this node are incompatible; either of them may have found that."""
        ...

    def receive(self, peer: str, message: Message) -> None:
        """A message about a request has arrived."""
        ...


class Link:
    """One encode node, as this language node sees it. All methods must be called from the event loop's thread."""

    def __init__(self, listener: LinkListener, hello: Hello, connection: Connection):
        """`hello` introduces this node; its incarnation must be unique to this connection."""
        self.connection = connection
        self._listener, self._hello = listener, hello
        self._peer: str | None = None
        self._incarnation = ""  # the encoder's
        self._unanswered = 0  # consecutive heartbeats without a reply
        self._stuck = False  # the node replies, but its device is stuck
        self._sequence = itertools.count()

    async def listen(self) -> None:
        """Handles messages until it is cancelled."""
        async for message in self.connection.messages():
            try:
                self._receive(message)
            except Exception:  # no single message may end the link
                _log.exception("a message of type %s failed", type(message).__name__)

    async def keep_alive(self) -> None:
        """Sends Hello until it is answered, then heartbeats, until it is cancelled."""
        while True:
            try:
                self._send_heartbeat()
            except Exception:  # as in `listen`
                _log.exception("a heartbeat failed")
            await asyncio.sleep(HEARTBEAT_INTERVAL_S)

    def _send_heartbeat(self) -> None:
        # count heartbeats, not seconds: while this process is blocked, replies wait unread
        if self._peer is not None and self._unanswered >= HEARTBEAT_TIMEOUT_S / HEARTBEAT_INTERVAL_S - 1:
            self._mark_down(f"encoder {self.connection.endpoint} has not replied for {HEARTBEAT_TIMEOUT_S:g} s")
        if self._peer is None and not self._stuck:
            self.connection.send(self._hello)
        else:
            self._unanswered += 1
            self.connection.send(Heartbeat(next(self._sequence)))

    def _receive(self, message: Message) -> None:
        endpoint = self.connection.endpoint
        match message:
            case Welcome(hello):
                if reason := refusal(self._hello, hello):
                    self._listener.peer_refused(self, reason)
                    return
                peer = f"{endpoint}/{hello.incarnation}"
                if self._peer not in (None, peer):
                    self._mark_down(f"encoder {endpoint} was restarted")
                self._unanswered = 0
                if self._peer is None:
                    self._peer, self._incarnation = peer, hello.incarnation
                    self._listener.peer_up(self, peer)
            case Refused(reason):
                self._listener.peer_refused(self, reason)
                if self._peer is not None:
                    self._mark_down(f"encoder {endpoint} refuses this node: {reason}")
            case Goodbye(reason):
                if self._peer is not None:
                    self._mark_down(
                        f"encoder {endpoint} has left: {reason}" if reason else f"encoder {endpoint} has left"
                    )
                self._stuck = False
                self.connection.send(self._hello)
            case HeartbeatReply(_, incarnation, age):
                self._receive_heartbeat_reply(incarnation, age / 1000)
            case _ if self._peer is not None:
                self._listener.receive(self._peer, message)

    def _receive_heartbeat_reply(self, incarnation: str, busy_seconds: float) -> None:
        endpoint = self.connection.endpoint
        stuck = busy_seconds > DEVICE_STUCK_S
        if self._peer is None:
            if self._stuck and not stuck:
                self._stuck = False
                self.connection.send(self._hello)
        elif incarnation != self._incarnation:
            self._mark_down(f"encoder {endpoint} was restarted")
            self.connection.send(self._hello)
        elif stuck:
            self._stuck = True
            self._mark_down(f"the device of encoder {endpoint} has been busy with one program for {busy_seconds:.0f} s")
        else:
            self._unanswered = 0

    def _mark_down(self, reason: str) -> None:
        peer, self._peer = self._peer, None
        assert peer is not None
        self._listener.peer_down(peer, reason)
