"""A language node's link to one encode node: says Hello, monitors heartbeats, and reconnects after an outage."""

import asyncio
import itertools
import logging
import secrets
from typing import Protocol

import msgspec

from deepstack_jax.disagg.keys.certificates import Certificate
from deepstack_jax.disagg.wire.control import Connection, Introduced
from deepstack_jax.disagg.wire.messages import (
    Goodbye,
    Heartbeat,
    HeartbeatReply,
    Hello,
    Message,
    NodeLoad,
    Refused,
    Welcome,
    refusal,
)
from deepstack_jax.disagg.wire.seals import KEY_BYTES, BlockSeal

HEARTBEAT_INTERVAL_S = 1.0
HEARTBEAT_TIMEOUT_S = 5.0  # an encoder counts as gone after this long without a reply, while this process runs
PREPARATION_SLOW_S = 15.0  # other encoders are preferred to one whose oldest preparation has run longer
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

    def peer_slow(self, peer: str, slow: bool) -> None:
        """A preparation of the encoder has run for long, or has ended since."""
        ...

    def peer_refused(self, link: "Link", reason: str) -> None:
        """The encoder and this node are incompatible; either of them may have found that."""
        ...

    def receive(self, peer: str, message: Message) -> None:
        """A message about a request has arrived."""
        ...


class Link:
    """One encode node, as this language node sees it. All methods must be called from the event loop's thread."""

    def __init__(self, listener: LinkListener, hello: Hello, connection: Connection, name: str):
        """
        Args:
            listener: receives the events.
            hello: introduces this node; its incarnation must be unique to this connection.
            connection: to the encode node; not closed by the link.
            name: what errors call the encode node. Clients see them, so it is not the address.
        """
        self.connection, self.name = connection, name
        self.seal = BlockSeal(hello.block_key, hello.encrypt_blocks)
        self._listener, self._hello = listener, hello
        self._peer: str | None = None
        self._incarnation = ""  # the encoder's
        self._certificate: Certificate | None = None  # of the latest encoder, where nodes have keys of their own
        self._unanswered = 0  # consecutive heartbeats without a reply
        self._unheard = 0  # consecutive messages of `keep_alive` without any message from the encoder
        self._stuck = False  # the node replies, but its device is stuck
        self._sequence = itertools.count()
        self.load: NodeLoad | None = None  # of the encoder, as it said last

    @property
    def connected(self) -> bool:
        """Whether a compatible encoder is connected and answers."""
        return self._peer is not None

    @property
    def stuck(self) -> bool:
        """Whether the encoder answers, but its device is stuck."""
        return self._stuck

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

    def drop_revoked(self) -> None:
        """Drops the encoder if it is revoked by now."""
        if certificate := self.connection.disconnect_revoked():
            _log.warning("%s, %s, is revoked, and is no longer used", self.name, certificate)
            self._stuck = False
            if self._peer is not None:
                self._mark_down(f"the key of {self.name} is revoked")

    def _send_heartbeat(self) -> None:
        # count heartbeats, not seconds: while this process is blocked, replies wait unread
        if self._peer is not None and self._unanswered >= HEARTBEAT_TIMEOUT_S / HEARTBEAT_INTERVAL_S - 1:
            self._mark_down(f"{self.name} has not replied for {HEARTBEAT_TIMEOUT_S:g} s")
        if self._unheard >= HEARTBEAT_TIMEOUT_S / HEARTBEAT_INTERVAL_S:
            self._unheard = 0
            self.connection.disconnect()  # a restarted encoder has to be shown this node's certificate again
        self._unheard += 1
        if self._peer is None and not self._stuck:
            self.connection.send(self._hello)
        else:
            self._unanswered += 1
            self.connection.send(Heartbeat(next(self._sequence)))

    def _receive(self, message: Message | Introduced) -> None:
        self._unheard = 0
        match message:
            case Introduced(certificate):
                self._stuck = False
                if certificate != self._certificate:
                    self._certificate = certificate
                    self._draw_block_key()
                self.connection.send(self._hello)
            case Welcome(hello):
                if reason := refusal(self._hello, hello):
                    self._listener.peer_refused(self, reason)
                    return
                peer = f"{self.name}/{hello.incarnation}"
                if self._peer not in (None, peer):
                    self._mark_down(f"{self.name} was restarted")
                self._unanswered = 0
                if self._peer is None:
                    self._peer, self._incarnation = peer, hello.incarnation
                    self._listener.peer_up(self, peer)
            case Refused(reason):
                self._listener.peer_refused(self, reason)
                if self._peer is not None:
                    self._mark_down(f"{self.name} refuses this node: {reason}")
            case Goodbye(reason):
                if self._peer is not None:
                    self._mark_down(f"{self.name} has left: {reason}" if reason else f"{self.name} has left")
                self._stuck = False
                self.connection.send(self._hello)
            case HeartbeatReply():
                self._receive_heartbeat_reply(message)
            case _ if self._peer is not None:
                self._listener.receive(self._peer, message)

    def _draw_block_key(self) -> None:
        """The encoder is another one than before, which may be stolen and still has the key of its blocks."""
        self._hello = msgspec.structs.replace(self._hello, block_key=secrets.token_bytes(KEY_BYTES))
        self.seal = BlockSeal(self._hello.block_key, self._hello.encrypt_blocks)

    def _receive_heartbeat_reply(self, reply: HeartbeatReply) -> None:
        busy_seconds, self.load = reply.work_age_ms / 1000, reply.load
        stuck = busy_seconds > DEVICE_STUCK_S
        if self._peer is None:
            if self._stuck and not stuck:
                self._stuck = False
                self.connection.send(self._hello)
        elif reply.incarnation != self._incarnation:
            self._mark_down(f"{self.name} was restarted")
            self.connection.send(self._hello)
        elif stuck:
            self._stuck = True
            self._mark_down(f"the device of {self.name} has been busy with one program for {busy_seconds:.0f} s")
        else:
            self._unanswered = 0
            self._listener.peer_slow(self._peer, reply.preparing_ms / 1000 > PREPARATION_SLOW_S)

    def _mark_down(self, reason: str) -> None:
        peer, self._peer = self._peer, None
        assert peer is not None
        self._listener.peer_down(peer, reason)
