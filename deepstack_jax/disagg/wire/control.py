"""Control messages over ZeroMQ: an encode node binds a ROUTER socket, and each language node connects a DEALER to it.

With a cluster key, both sides encrypt and authenticate each other (CURVE); a peer without the key receives nothing, not
even a refusal. The key is required for every address that is not loopback. Sockets belong to the event loop's thread.
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

from deepstack_jax.disagg.wire.messages import MAX_MESSAGE, Message, pack_message, unpack_message

LINGER_MS = 100  # a closing socket may take this long to send its last messages
HANDSHAKE_TIMEOUT_MS = 5000
RECONNECT_MIN_MS, RECONNECT_MAX_MS = 100, 2000

_ENDPOINT = re.compile(r"tcp://(?:\[(?P<six>[^\]]+)\]|(?P<host>[^:\[\]]+)):(?P<port>\d+|\*)")


@dataclass(frozen=True)
class ClusterKey:
    """The key pair that all nodes of a cluster share, encoded in Z85."""

    public: bytes
    secret: bytes


def make_key(path: str | Path) -> None:
    """Writes a new key file that only its owner can read.

    Raises:
        OSError: the file exists or can't be written.
    """
    public, secret = zmq.curve_keypair()
    content = json.dumps({"public": public.decode(), "secret": secret.decode()})
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(content + "\n")


def read_key(path: str | Path) -> ClusterKey:
    """Reads the key from a file that `make_key` wrote.

    Raises:
        ValueError: it is not a key file, or other users can read it.
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
    """Checks that an endpoint is valid, and that it is loopback unless there is a key.

    Raises:
        ValueError: it is not; the message names the remedy.
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
        raise ValueError(
            f"{endpoint} is not loopback: give --key, a file made once per cluster with deepstack-jax keygen"
        )


class Listener:
    """The encode node's socket. It exchanges messages with language nodes, each identified by its connection."""

    def __init__(self, endpoint: str, key: ClusterKey | None = None):
        """Binds `endpoint`, whose port may be `*`.

        Raises:
            ValueError: the endpoint can't be used.
        """
        check_endpoint(endpoint, key)
        self._context = zmq.asyncio.Context()
        self._authenticator: AsyncioAuthenticator | None = None
        self._socket = _socket(self._context, zmq.ROUTER, endpoint)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # sending to a peer that is gone is then an error
        if key is not None:
            self._authenticator = AsyncioAuthenticator(self._context)
            self._authenticator.start()
            self._authenticator.configure_curve_callback(credentials_provider=_ClusterMembers(key))
            self._socket.curve_server = True
            self._socket.curve_publickey, self._socket.curve_secretkey = key.public, key.secret
        try:
            self._socket.bind(endpoint)
        except zmq.ZMQError as error:
            self.close()
            raise ValueError(f"{endpoint} can't be used ({error.strerror}): choose another one") from None
        self.endpoint = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self.num_unreadable = 0  # messages that were dropped because they could not be read

    async def messages(self) -> AsyncIterator[tuple[bytes, Message]]:
        """Yields (connection, message) for each readable message. The others are counted and dropped."""
        while True:
            connection, *parts = await self._socket.recv_multipart()
            message = unpack_message(parts[0])[0] if len(parts) == 1 else None
            if message is None:
                self.num_unreadable += 1
            else:
                yield connection, message

    def send(self, connection: bytes, message: Message) -> None:
        """Sends the message, or drops it if the peer is gone or its queue is full; senders repeat lost messages."""
        _send(self._socket, [connection], pack_message(message))

    def close(self) -> None:
        """Closes the socket; its last messages have LINGER_MS to leave."""
        self._socket.close(linger=LINGER_MS)
        if self._authenticator is not None:
            self._authenticator.stop()
        self._context.destroy(linger=LINGER_MS)


class Connection:
    """A language node's socket to one encode node. ZeroMQ reconnects it automatically."""

    def __init__(self, endpoint: str, key: ClusterKey | None = None):
        """Starts connecting.

        Raises:
            ValueError: the endpoint can't be used.
        """
        check_endpoint(endpoint, key)
        self.endpoint = endpoint
        self._context = zmq.asyncio.Context()
        self._socket = _socket(self._context, zmq.DEALER, endpoint)
        self._socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MIN_MS)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, RECONNECT_MAX_MS)
        if key is not None:
            self._socket.curve_serverkey = key.public
            self._socket.curve_publickey, self._socket.curve_secretkey = key.public, key.secret
        try:
            self._socket.connect(endpoint)
        except zmq.ZMQError as error:
            self.close()
            raise ValueError(f"{endpoint} can't be used ({error.strerror}): check the encoder's address") from None
        self.num_unreadable = 0  # messages that were dropped because they could not be read

    async def messages(self) -> AsyncIterator[Message]:
        """Yields each readable message. The others are counted and dropped."""
        while True:
            parts = await self._socket.recv_multipart()
            message = unpack_message(parts[0])[0] if len(parts) == 1 else None
            if message is None:
                self.num_unreadable += 1
            else:
                yield message

    def send(self, message: Message) -> None:
        """Sends the message, or drops it if the queue is full."""
        _send(self._socket, [], pack_message(message))

    def close(self) -> None:
        """Closes the socket; its last messages have LINGER_MS to leave."""
        self._socket.close(linger=LINGER_MS)
        self._context.destroy(linger=LINGER_MS)


class _ClusterMembers:
    """Admits peers that have the cluster's key pair."""

    def __init__(self, key: ClusterKey):
        self._public = key.public

    def callback(self, _domain: str, key: bytes) -> bool:
        return key == self._public


def _socket(context: zmq.asyncio.Context, kind: int, endpoint: str) -> zmq.asyncio.Socket:
    socket = context.socket(kind)
    socket.setsockopt(zmq.IPV6, "[" in endpoint)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE)
    socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_TIMEOUT_MS)
    return socket


def _send(socket: Any, prefix: list[bytes], data: bytes) -> None:
    if socket.closed:
        return
    sent = socket.send_multipart([*prefix, data], flags=zmq.DONTWAIT)  # all or nothing, without waiting
    if sent.done():
        sent.exception()  # it is expected when a peer is gone; asyncio would log an exception that nothing retrieves
