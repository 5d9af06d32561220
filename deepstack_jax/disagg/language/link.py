"""A language node's link to one encode node: greets it, watches that it lives, and greets it again when it is back."""

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

HEARTBEAT = 1.0  # seconds between two
SILENCE = 5.0  # without an answer, after which an encoder counts as gone; while this process itself runs
STUCK = 120.0  # of one program on an encoder's device, its compilation included

_log = logging.getLogger(__name__)


class Owner(Protocol):
    """What a link tells: `language.EncoderLinks`."""

    def peer_up(self, link: "Link", peer: str) -> None:
        """An encoder that fits is there, under a name that no other start of it has."""
        ...

    def peer_down(self, peer: str, reason: str) -> None: ...

    def refuses(self, link: "Link", reason: str) -> None:
        """The encoder doesn't fit, or says that this node doesn't."""
        ...

    def receive(self, peer: str, message: Message) -> None:
        """A message about a request."""
        ...


class Link:
    """All methods are for the event loop's thread."""

    def __init__(self, owner: Owner, hello: Hello, connection: Connection):
        """`hello` is what this node says of itself over this connection; its incarnation belongs to no other one."""
        self.connection = connection
        self._owner, self._hello = owner, hello
        self._peer: str | None = None
        self._incarnation = ""  # the encoder's
        self._unanswered = 0  # heartbeats in a row
        self._stuck = False  # it answers, and its device doesn't
        self._numbers = itertools.count()

    async def listen(self) -> None:
        """Takes what comes, for ever."""
        async for message in self.connection.messages():
            try:
                self._receive(message)
            except Exception:  # nothing that one message does may end the link
                _log.exception("a message of type %s failed", type(message).__name__)

    async def keep(self) -> None:
        """Says hello until it is welcome, then asks for signs of life, for ever."""
        while True:
            try:
                self._beat()
            except Exception:  # as in `listen`
                _log.exception("a heartbeat failed")
            await asyncio.sleep(HEARTBEAT)

    def _beat(self) -> None:
        # heartbeats are counted, not seconds: answers may wait unread while this process is held up
        if self._peer is not None and self._unanswered >= SILENCE / HEARTBEAT - 1:
            self._lose(f"encoder {self.connection.endpoint} has been silent for {SILENCE:g} s")
        if self._peer is None and not self._stuck:
            self.connection.send(self._hello)
        else:
            self._unanswered += 1
            self.connection.send(Heartbeat(next(self._numbers)))

    def _receive(self, message: Message) -> None:
        where = self.connection.endpoint
        match message:
            case Welcome(hello):
                if reason := refusal(self._hello, hello):
                    self._owner.refuses(self, reason)
                    return
                peer = f"{where}/{hello.incarnation}"
                if self._peer not in (None, peer):
                    self._lose(f"encoder {where} was restarted")
                self._unanswered = 0
                if self._peer is None:
                    self._peer, self._incarnation = peer, hello.incarnation
                    self._owner.peer_up(self, peer)
            case Refused(reason):
                self._owner.refuses(self, reason)
                if self._peer is not None:
                    self._lose(f"encoder {where} refuses this node: {reason}")
            case Goodbye(reason):
                if self._peer is not None:
                    self._lose(f"encoder {where} has left: {reason}" if reason else f"encoder {where} has left")
                self._stuck = False
                self.connection.send(self._hello)
            case HeartbeatReply(_, incarnation, age):
                self._heartbeat(incarnation, age / 1000)
            case _ if self._peer is not None:
                self._owner.receive(self._peer, message)

    def _heartbeat(self, incarnation: str, busy_seconds: float) -> None:
        where = self.connection.endpoint
        stuck = busy_seconds > STUCK
        if self._peer is None:
            if self._stuck and not stuck:
                self._stuck = False
                self.connection.send(self._hello)
        elif incarnation != self._incarnation:
            self._lose(f"encoder {where} was restarted")
            self.connection.send(self._hello)
        elif stuck:
            self._stuck = True
            self._lose(f"the device of encoder {where} has been busy with one program for {busy_seconds:.0f} s")
        else:
            self._unanswered = 0

    def _lose(self, reason: str) -> None:
        peer, self._peer = self._peer, None
        assert peer is not None
        self._owner.peer_down(peer, reason)
