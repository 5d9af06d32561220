"""Control messages over ZeroMQ: an encode node binds a ROUTER socket, and each language node connects a DEALER to it.

With keys, both sides encrypt and authenticate each other (CURVE); a peer without one receives nothing, not even a
refusal. A key is required for every address that is not loopback. Where each node has a key of its own, nodes first
exchange certificates (see `introduction`). Sockets belong to the event loop's thread.
"""

import asyncio
import contextlib
import ipaddress
import logging
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import zmq
import zmq.asyncio
from zmq.utils import z85

from deepstack_jax.disagg.keys.certificates import SERIAL_LENGTH, Certificate, NodeKey
from deepstack_jax.disagg.keys.files import ClusterKey, Key
from deepstack_jax.disagg.wire.introduction import (
    INTRODUCTION_DOMAIN,
    MAX_INTRODUCTION,
    Introduction,
    introduction_pair,
    pack_introduction,
    unpack_introduction,
)
from deepstack_jax.disagg.wire.messages import MAX_MESSAGE, Message, Refused, pack_message, unpack_message

LINGER_MS = 100  # a closing socket may take this long to send its last messages
HANDSHAKE_TIMEOUT_MS = 5000
RECONNECT_MIN_MS, RECONNECT_MAX_MS = 100, 2000
INTRODUCTION_QUEUE = 4  # introductions that wait per connection
INTRODUCTION_TIMEOUT_S = 5.0  # an introduction without an answer is repeated after this long
INTRODUCTION_INTERVAL_S = 1.0  # pause after an introduction that failed
REFUSAL_INTERVAL_S = 0.002  # pause after the certificate of a language node was refused; checking one takes 0.1 ms

_ENDPOINT = re.compile(r"tcp://(?:\[(?P<six>[^\]]+)\]|(?P<host>[^:\[\]]+)):(?P<port>\d+|\*)")

_log = logging.getLogger(__name__)


def check_endpoint(endpoint: str, key: Key | None) -> None:
    """Checks that an endpoint is valid, and that it is loopback unless there is a key.

    Raises:
        ValueError: it is not; the message names the remedy.
    """
    match = _ENDPOINT.fullmatch(endpoint)
    if match is None:
        raise ValueError(
            f"{endpoint!r} is not a valid endpoint: expected tcp://host:port, tcp://[address]:port for IPv6"
        )
    if key is None and not is_loopback_host(match["six"] or match["host"]):
        raise ValueError(f"{endpoint} is not loopback: give --key, a file made with deepstack-jax keygen")


def is_loopback_host(host: str) -> bool:
    """Whether an address, or the name localhost, is this machine's own. Other names are not looked up."""
    try:
        return ipaddress.ip_address(host.strip("[]").partition("%")[0]).is_loopback
    except ValueError:
        return host == "localhost"


@dataclass(frozen=True)
class Introduced:
    """A language node has verified an encode node's certificate, and is connected to the node that it belongs to."""

    certificate: Certificate


class Listener:
    """The encode node's socket. It exchanges messages with language nodes, each identified by its connection.

    Attributes:
        endpoint: the address that language nodes are given.
        num_unreadable: messages that were dropped because they could not be read.
        num_refused: introductions without a valid certificate, and messages of revoked nodes. Both were dropped.
    """

    def __init__(self, endpoint: str, key: Key | None = None):
        """Binds `endpoint`, whose port may be `*`. With a node's own key it also binds the next port, or any for `*`.

        Raises:
            ValueError: the endpoint can't be used.
        """
        check_endpoint(endpoint, key)
        self.has_key = key is not None
        self.node = key if isinstance(key, NodeKey) else None
        self.num_unreadable = self.num_refused = 0
        self._context = zmq.asyncio.Context()
        self._questions: zmq.asyncio.Socket | None = None  # of ZeroMQ, about the keys of peers
        self._introductions: zmq.asyncio.Socket | None = None
        self._members: dict[bytes, bytes] = {}  # public keys of admitted nodes, with what marks their messages
        self._nodes: dict[bytes, Certificate] = {}  # admitted nodes with keys of their own, by that mark: the serial
        self._reported: set[str] = set()  # serials of refused nodes
        self._socket = _socket(self._context, zmq.ROUTER, endpoint)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # sending to a peer that is gone is then an error
        if key is not None:
            self._questions = self._context.socket(zmq.REP)
            self._questions.bind("inproc://zeromq.zap.01")
            _serve_curve(self._socket, key.public, key.secret)
        if isinstance(key, ClusterKey):
            self._members[z85.decode(key.public)] = b""
        try:
            if self.node is None:
                self.endpoint = _bind(self._socket, endpoint)
            else:
                self._introductions = _socket(self._context, zmq.ROUTER, endpoint, MAX_INTRODUCTION)
                self._introductions.setsockopt(zmq.RCVHWM, INTRODUCTION_QUEUE)
                self._introductions.setsockopt(zmq.SNDHWM, INTRODUCTION_QUEUE)
                self._introductions.setsockopt(zmq.ZAP_DOMAIN, INTRODUCTION_DOMAIN)
                _serve_curve(self._introductions, *introduction_pair(self.node.authority))
                self.endpoint = _bind(self._introductions, endpoint)
                port = endpoint.rpartition(":")[2]
                next_port = port if port in ("*", "0") else int(port) + 1
                remedy = "with keys of nodes, the port after that of the endpoint has to be free too"
                self._control_port = _port_of(_bind(self._socket, _with_port(endpoint, next_port), remedy))
        except ValueError:
            self.close()
            raise

    async def check_keys(self) -> None:
        """Admits the nodes that may connect, until it is cancelled. No node connects while it doesn't run.

        It answers ZeroMQ's questions about peers' public keys (ZAP, rfc.zeromq.org/spec/27).
        """
        assert self._questions is not None
        while True:
            version, sequence, domain, *_, mechanism, key = await self._questions.recv_multipart()
            mark = b"" if domain == INTRODUCTION_DOMAIN else self._members.get(key)
            if mark and self._shut_out(mark):
                mark = None
            status = (
                (b"400", b"not a node of this cluster") if mechanism != b"CURVE" or mark is None else (b"200", b"OK")
            )
            await self._questions.send_multipart([version, sequence, *status, mark or b"", b""])

    async def introduce(self) -> None:
        """Exchanges certificates with language nodes, and admits those with a valid one, until it is cancelled."""
        assert self.node is not None
        assert self._introductions is not None
        answer = pack_introduction(Introduction(self.node.certificate, self._control_port))
        while True:
            connection, *parts = await self._introductions.recv_multipart()
            introduction = unpack_introduction(parts)
            if introduction is not None and self._admit(self.node, introduction.certificate):
                _send(self._introductions, [connection], answer)
            else:
                self.num_refused += 1
                await asyncio.sleep(REFUSAL_INTERVAL_S)

    def _admit(self, node: NodeKey, certificate: Certificate) -> bool:
        mark = certificate.serial.encode()
        admitted = self._nodes.get(mark) == certificate
        if not admitted and not node.certifies(certificate):
            return False
        if reason := node.shut_out(certificate) if admitted else node.refusal(certificate, "language"):
            if certificate.serial not in self._reported:
                _log.warning("a language node is refused: %s", reason)
            self._reported.add(certificate.serial)
            return False
        self._nodes[mark], self._members[certificate.public] = certificate, mark
        return True

    def _shut_out(self, mark: bytes) -> bool:
        """Whether an admitted node may not connect any more."""
        assert self.node is not None
        return self.node.shut_out(self._nodes[mark]) is not None

    def drop_revoked(self) -> None:
        """Stops exchanging messages with nodes that are revoked by now."""
        assert self.node is not None
        for certificate in self._nodes.values():
            if certificate in self.node.revoked:
                _log.warning("%s is revoked, and is no longer served", certificate)
        self._nodes = {mark: each for mark, each in self._nodes.items() if each not in self.node.revoked}
        self._members = {each.public: mark for mark, each in self._nodes.items()}

    def node_of(self, connection: bytes) -> Certificate | None:
        """The certificate of the language node behind a connection; None if nodes have none, or it is revoked."""
        return self._nodes.get(connection[-SERIAL_LENGTH:])

    async def messages(self) -> AsyncIterator[tuple[bytes, Message]]:
        """Yields (connection, message) for each readable message. The others are counted and dropped."""
        while True:
            if (received := await self._receive()) is None:
                self.num_refused += 1
                continue
            connection, *parts = received
            message = unpack_message(parts[0])[0] if len(parts) == 1 else None
            if message is None:
                self.num_unreadable += 1
            else:
                yield connection, message

    async def _receive(self) -> list[bytes] | None:
        """The connection and the parts of a message; None if it is from a revoked node.

        With certificates the connection ends with the node's serial: a peer can choose how ZeroMQ calls its connection,
        but not which key it has.
        """
        if self.node is None:
            return await self._socket.recv_multipart()
        named, *parts = await self._socket.recv_multipart(copy=False)
        connection = named.bytes + str(named.get("User-Id")).encode()
        return None if self.node_of(connection) is None else [connection, *(part.bytes for part in parts)]

    def send(self, connection: bytes, message: Message) -> None:
        """Sends the message, or drops it if the peer is gone or its queue is full; senders repeat lost messages."""
        if self.node is not None:
            if self.node_of(connection) is None:
                return
            connection = connection[:-SERIAL_LENGTH]
        _send(self._socket, [connection], pack_message(message))

    def close(self) -> None:
        """Closes the sockets; their last messages have LINGER_MS to leave."""
        self._socket.close(linger=LINGER_MS)
        for socket in (self._introductions, self._questions):
            if socket is not None:
                socket.close(linger=0)
        self._context.destroy(linger=LINGER_MS)


class Connection:
    """A language node's socket to one encode node. ZeroMQ reconnects it automatically.

    Attributes:
        endpoint: the address that the node was given.
        encoder: the certificate of the encode node that it is connected to, where nodes have keys of their own. Nothing
            is sent before one was verified.
        num_unreadable: messages that were dropped because they could not be read.
    """

    def __init__(self, endpoint: str, key: Key | None = None):
        """Starts connecting.

        Raises:
            ValueError: the endpoint can't be used.
        """
        check_endpoint(endpoint, key)
        self.endpoint = endpoint
        self.encoder: Certificate | None = None
        self.num_unreadable = 0
        self._node = key if isinstance(key, NodeKey) else None
        self._waiting: asyncio.Timeout | None = None  # for a message; `disconnect` ends it
        self._context = zmq.asyncio.Context()
        try:
            if self._node is None:
                self._socket = self._connect(endpoint, key and key.public, key)
            else:
                self._socket = self._connect_for_introduction(self._node)
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise ValueError(f"{endpoint} can't be used ({error.strerror}): check the encoder's address") from None

    async def messages(self) -> AsyncIterator[Message | Introduced]:
        """Yields each readable message. The others are counted and dropped.

        With a key of its own, the node first introduces itself, and again after each `disconnect`, with a new socket.
        Each success is yielded, and as Refused each refusal of the encode node's certificate.
        """
        while True:
            if self._node is not None and self.encoder is None:
                yield (met := await self._introduce(self._node))
                if isinstance(met, Refused):
                    await asyncio.sleep(INTRODUCTION_INTERVAL_S)
                continue
            if (parts := await self._receive()) is None:
                continue
            message = unpack_message(parts[0])[0] if len(parts) == 1 else None
            if message is None:
                self.num_unreadable += 1
            else:
                yield message

    async def _receive(self) -> list[bytes] | None:
        """The parts of the next message; None after `disconnect`."""
        if self._node is None:
            return await self._socket.recv_multipart()
        try:
            async with asyncio.timeout(None) as self._waiting:
                parts = await self._socket.recv_multipart()
        except TimeoutError:
            return None
        finally:
            self._waiting = None
        return None if self.encoder is None else parts

    async def _introduce(self, node: NodeKey) -> Introduced | Refused:
        """Sends this node's certificate until it gets another. If that is valid, connects to the node that owns it."""
        while (introduction := await self._ask(node)) is None:
            await asyncio.sleep(INTRODUCTION_INTERVAL_S)
        if reason := node.refusal(introduction.certificate, "encode"):
            return Refused(reason)
        endpoint, public = _with_port(self.endpoint, introduction.port), z85.encode(introduction.certificate.public)
        self._socket.close(linger=0)
        self._socket = self._connect(endpoint, public, node)
        self.encoder = introduction.certificate
        return Introduced(introduction.certificate)

    async def _ask(self, node: NodeKey) -> Introduction | None:
        self._socket.close(linger=0)
        self._socket = self._connect_for_introduction(node)
        try:
            async with asyncio.timeout(INTRODUCTION_TIMEOUT_S):
                await self._socket.send(pack_introduction(Introduction(node.certificate)))
                return unpack_introduction(await self._socket.recv_multipart())
        except TimeoutError:
            return None

    def _connect_for_introduction(self, node: NodeKey) -> zmq.asyncio.Socket:
        anybody = ClusterKey(*zmq.curve_keypair())
        return self._connect(self.endpoint, introduction_pair(node.authority)[0], anybody, MAX_INTRODUCTION)

    def _connect(
        self, endpoint: str, server: bytes | None, key: Key | None, max_message: int = MAX_MESSAGE
    ) -> zmq.asyncio.Socket:
        socket = _socket(self._context, zmq.DEALER, endpoint, max_message)
        socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MIN_MS)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, RECONNECT_MAX_MS)
        if key is not None:
            socket.curve_serverkey = server
            socket.curve_publickey, socket.curve_secretkey = key.public, key.secret
        socket.connect(endpoint)
        return socket

    def disconnect(self) -> None:
        """Exchanges nothing more with the encode node until `messages` has introduced this one again.

        Without a key of the node's own it does nothing: ZeroMQ reconnects.
        """
        self.encoder = None
        if self._waiting is not None:
            with contextlib.suppress(RuntimeError):  # it is ending already
                self._waiting.reschedule(0)

    def disconnect_revoked(self) -> Certificate | None:
        """Disconnects the encode node if it is revoked by now, and returns its certificate then."""
        encoder = self.encoder
        if self._node is None or encoder is None or encoder not in self._node.revoked:
            return None
        self.disconnect()
        return encoder

    def send(self, message: Message) -> None:
        """Sends the message, or drops it if the queue is full or the encode node has yet to show its certificate."""
        if self._node is None or self.encoder is not None:
            _send(self._socket, [], pack_message(message))

    def close(self) -> None:
        """Closes the socket; its last messages have LINGER_MS to leave."""
        self._socket.close(linger=LINGER_MS)
        self._context.destroy(linger=LINGER_MS)


def _socket(
    context: zmq.asyncio.Context, kind: int, endpoint: str, max_message: int = MAX_MESSAGE
) -> zmq.asyncio.Socket:
    socket = context.socket(kind)
    socket.setsockopt(zmq.IPV6, "[" in endpoint)
    socket.setsockopt(zmq.MAXMSGSIZE, max_message)
    socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_TIMEOUT_MS)
    return socket


def _serve_curve(socket: zmq.asyncio.Socket, public: bytes, secret: bytes) -> None:
    socket.curve_server = True
    socket.curve_publickey, socket.curve_secretkey = public, secret


def _bind(socket: zmq.asyncio.Socket, endpoint: str, remedy: str = "choose another one") -> str:
    try:
        socket.bind(endpoint)
    except zmq.ZMQError as error:
        raise ValueError(f"{endpoint} can't be used ({error.strerror}): {remedy}") from None
    return socket.getsockopt_string(zmq.LAST_ENDPOINT)


def _port_of(endpoint: str) -> int:
    return int(endpoint.rpartition(":")[2])


def _with_port(endpoint: str, port: int | str) -> str:
    return f"{endpoint.rpartition(':')[0]}:{port}"


def _send(socket: Any, prefix: list[bytes], data: bytes) -> None:
    if socket.closed:
        return
    sent = socket.send_multipart([*prefix, data], flags=zmq.DONTWAIT)  # all or nothing, without waiting
    if sent.done():
        sent.exception()  # it is expected when a peer is gone; asyncio would log an exception that nothing retrieves
