"""Control messages over ZeroMQ: an encode node binds a ROUTER, each language node connects a DEALER to it.

With a cluster's key file both sides encrypt and prove who they are (CURVE): a peer without it gets nothing, not even a
refusal. It is required for every address that isn't loopback. Sockets belong to the event loop's thread.
"""

import ipaddress
import json
import os
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zmq
import zmq.asyncio
from zmq.auth.asyncio import AsyncioAuthenticator

from deepstack_jax.disagg.wire.messages import MAX_MESSAGE, Message, decode, encode

LINGER = 100  # milliseconds

_ENDPOINT = re.compile(r"tcp://(?:\[(?P<six>[^\]]+)\]|(?P<host>[^:\[\]]+)):(?P<port>\d+|\*)")


@dataclass(frozen=True)
class ClusterKey:
    """The key pair that all nodes of a cluster share, in Z85."""

    public: bytes
    secret: bytes


def make_key(path: str | Path) -> None:
    """Writes a new key file that its owner alone can read.

    Raises:
        OSError: the file exists, or can't be written.
    """
    public, secret = zmq.curve_keypair()
    content = json.dumps({"public": public.decode(), "secret": secret.decode()})
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(content + "\n")


def read_key(path: str | Path) -> ClusterKey:
    """The key of a file that `make_key` wrote.

    Raises:
        ValueError: it is not a key file, or others can read it.
    """
    path = Path(path)
    if path.stat().st_mode & 0o077:
        raise ValueError(f"key file {path} can be read by others: chmod 600 {path}")
    try:
        raw = json.loads(path.read_text())
        key = ClusterKey(raw["public"].encode(), raw["secret"].encode())
        if zmq.curve_public(key.secret) != key.public:
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, zmq.ZMQError):
        raise ValueError(f"{path} is not a key file: make one with deepstack-jax keygen {path}") from None
    return key


def check_endpoint(endpoint: str, key: ClusterKey | None) -> None:
    """Refuses what is not a valid endpoint, and one in reach of others where there is no key.

    Raises:
        ValueError: with the remedy.
    """
    match = _ENDPOINT.fullmatch(endpoint)
    if match is None:
        raise ValueError(
            f"{endpoint!r} is not a valid endpoint: expected tcp://host:port, tcp://[address]:port for IPv6"
        )
    host = match["six"] or match["host"]
    try:
        local = ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        local = host == "localhost"
    if key is None and not local:
        raise ValueError(f"{endpoint} is not loopback: give --key, made once a cluster with deepstack-jax keygen")


class Listener:
    """The encode node's socket: messages from language nodes, by the name of their connection."""

    def __init__(self, endpoint: str, key: ClusterKey | None = None):
        """Binds `endpoint`, whose port may be `*`.

        Raises:
            ValueError: the endpoint can't be used.
        """
        check_endpoint(endpoint, key)
        self._context = zmq.asyncio.Context()
        self._guard: AsyncioAuthenticator | None = None
        self._socket = _socket(self._context, zmq.ROUTER, endpoint)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # a peer that is gone is an error, not silence
        if key is not None:
            self._guard = AsyncioAuthenticator(self._context)
            self._guard.start()
            self._guard.configure_curve_callback(credentials_provider=_Members(key))
            self._socket.curve_server = True
            self._socket.curve_publickey, self._socket.curve_secretkey = key.public, key.secret
        try:
            self._socket.bind(endpoint)
        except zmq.ZMQError as error:
            self.close()
            raise ValueError(f"{endpoint} can't be used ({error.strerror}): choose another one") from None
        self.endpoint = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self.dropped = 0  # messages that could not be read

    async def messages(self) -> AsyncIterator[tuple[bytes, Message]]:
        """(connection, message) of each message that can be read; the others are counted and dropped."""
        while True:
            connection, *parts = await self._socket.recv_multipart()
            message = decode(parts[0])[0] if len(parts) == 1 else None
            if message is None:
                self.dropped += 1
            else:
                yield connection, message

    def send(self, connection: bytes, message: Message) -> None:
        """Sends, or drops the message where the peer is gone or takes nothing: who needs an answer asks again."""
        _send(self._socket, [connection], encode(message))

    def close(self) -> None:
        """What was sent last has a moment to leave."""
        self._socket.close(linger=LINGER)
        if self._guard is not None:
            self._guard.stop()
        self._context.destroy(linger=LINGER)


class Connection:
    """A language node's socket to one encode node. ZeroMQ connects again by itself."""

    def __init__(self, endpoint: str, key: ClusterKey | None = None):
        """Starts to connect.

        Raises:
            ValueError: the endpoint can't be used.
        """
        check_endpoint(endpoint, key)
        self.endpoint = endpoint
        self._context = zmq.asyncio.Context()
        self._socket = _socket(self._context, zmq.DEALER, endpoint)
        self._socket.setsockopt(zmq.RECONNECT_IVL, 100)  # milliseconds
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 2000)
        if key is not None:
            self._socket.curve_serverkey = key.public
            self._socket.curve_publickey, self._socket.curve_secretkey = key.public, key.secret
        try:
            self._socket.connect(endpoint)
        except zmq.ZMQError as error:
            self.close()
            raise ValueError(f"{endpoint} can't be used ({error.strerror}): check the encoder's address") from None
        self.dropped = 0

    async def messages(self) -> AsyncIterator[Message]:
        """Each message that can be read; the others are counted and dropped."""
        while True:
            parts = await self._socket.recv_multipart()
            message = decode(parts[0])[0] if len(parts) == 1 else None
            if message is None:
                self.dropped += 1
            else:
                yield message

    def send(self, message: Message) -> None:
        """Sends, or drops the message where the queue is full."""
        _send(self._socket, [], encode(message))

    def close(self) -> None:
        """What was sent last has a moment to leave."""
        self._socket.close(linger=LINGER)
        self._context.destroy(linger=LINGER)


class _Members:
    """Lets in who has the cluster's key pair."""

    def __init__(self, key: ClusterKey):
        self._public = key.public

    def callback(self, _domain: str, key: bytes) -> bool:
        return key == self._public


def _socket(context: zmq.asyncio.Context, kind: int, endpoint: str) -> zmq.asyncio.Socket:
    socket = context.socket(kind)
    socket.setsockopt(zmq.IPV6, "[" in endpoint)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE)
    socket.setsockopt(zmq.HANDSHAKE_IVL, 5000)
    return socket


def _send(socket: Any, prefix: list[bytes], data: bytes) -> None:
    if socket.closed:
        return
    sent = socket.send_multipart([*prefix, data], flags=zmq.DONTWAIT)  # all or nothing, and over at once
    if sent.done():
        sent.exception()  # a peer that is gone is no news; unread, asyncio would log it
