"""Bounds on HTTP connections: how many there are, and how long a client may keep the server waiting.

uvicorn speaks HTTP, but waits for ever for a request's head and for clients that don't read. `Gate.protocol` makes its
connections with deadlines. At most `ConnectionLimits.most` are open. Beyond that, the one that has kept the server
waiting for longest makes room: silent clients are displaced by those that send something. If none waits, because all of
them send bodies or get answers, a few more connections may ask for probes.
"""

import asyncio
import heapq
import math
import resource
import ssl
import sys
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from deepstack_jax.errors import one_line
from deepstack_jax.serving.bodies import LEAST_RATE
from deepstack_jax.serving.errors import RequestError, error_response
from deepstack_jax.serving.probes import ONLY_PROBES

MAX_HEAD_BYTES = 32 << 10
MAX_HEADERS = 100
MAX_PIECES = 512  # of a body, unless they have SMALL_PIECE bytes on average: each takes time to parse
SMALL_PIECE = 64
EVENTS_PER_TURN = 32  # of one connection, before others and the timers have their turn
BODY_PATIENCE_S = 1.0  # a body that is later than this may be displaced
LAST_DESCRIPTORS = 8  # a connection that gets one of them leaves too few for files and decoders
NARROW_S = 10.0  # for which fewer connections are taken then
_OTHER_DESCRIPTORS = 48  # at least, for what is no connection


@dataclass(frozen=True)
class ConnectionLimits:
    """What connections may take; times are in seconds.

    Attributes:
        most: connections at once.
        spare: more of them, which may only ask for probes.
        head: from the connection, or the first byte after an answer, to the end of a request's head; a TLS handshake
            has the same time.
        spare_head: the same on a spare connection.
        rest: for what is left of a body once its request is answered; it is read, because a client that is still
            sending would otherwise not see the answer.
        unread: within which a client has to take `read_rate` bytes per second of what waits for it.
        closing: for a closed connection to take what was sent.
    """

    most: int = 1024
    spare: int = 32
    head: float = 10.0
    spare_head: float = 2.0
    rest: float = 2.0
    unread: float = 20.0
    read_rate: int = 1 << 10
    closing: float = 5.0

    @staticmethod
    def within(descriptors: float) -> "ConnectionLimits":
        """The limits of a process with so many file descriptors, some of which files, sockets and fetches need."""
        default = ConnectionLimits()
        most = int(min(default.most, max(1, descriptors - max(_OTHER_DESCRIPTORS, min(512, descriptors / 2)))))
        return ConnectionLimits(most=most, spare=min(default.spare, max(4, most // 4)))


class Gate:
    """The connections of a server."""

    def __init__(
        self,
        limits: ConnectionLimits | None = None,
        tls: ssl.SSLContext | None = None,
        on_cut: Callable[[str], None] = lambda reason: None,
    ):
        """
        Args:
            limits: the bounds.
            tls: for HTTPS; uvicorn gets no certificate then.
            on_cut: called with the reason when a connection is cut: "displaced", "full", "head", "unread",
                "unfinished", "invalid" or "stopping".
        """
        self.limits, self.tls, self.on_cut = limits or ConnectionLimits(), tls, on_cut
        self._open: set[Connection] = set()
        self._spare: set[Connection] = set()
        self._most = self.limits.most
        self._sweeping = False

    def protocol(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> "Connection":
        """A connection: for `http` of uvicorn's `Config`."""
        return Connection(self, config, server_state, app_state, _loop)

    def enter(self, connection: "Connection") -> None:
        """Counts a new connection, and makes room for it."""
        limits, loop = self.limits, connection.loop
        if connection.descriptor >= _descriptor_limit() - LAST_DESCRIPTORS:
            self.narrow(loop)
        for places, most in ((self._open, self._most), (self._spare, limits.spare)):
            if len(places) >= most:
                self._displace(places, max(1, most // 64), loop.time())
            if len(places) < most:
                break
        else:
            connection.cut("full")
            return
        places.add(connection)
        connection.only_probes = places is self._spare
        if not self._sweeping:
            self._sweeping = True
            loop.call_later(self._interval, self._sweep, loop)

    def leave(self, connection: "Connection") -> None:
        """The connection is closed."""
        self._open.discard(connection)
        self._spare.discard(connection)

    def narrow(self, loop: asyncio.AbstractEventLoop) -> None:
        """Makes room where descriptors run out: fewer connections are taken for a while, and the latest are cut."""
        most = min(ConnectionLimits.within(_descriptor_limit()).most, 3 * len(self._open) // 4)
        self._most = max(1, most)
        self._displace(self._open, len(self._open) - self._most, loop.time())
        loop.call_later(NARROW_S, self._widen)

    def _widen(self) -> None:
        self._most = self.limits.most

    def close_waiting(self) -> None:
        """Cuts the connections that have no request."""
        for connection in self._open | self._spare:
            if connection.phase == "head":
                connection.cut("stopping")

    def close(self) -> None:
        """Cuts all connections."""
        for connection in self._open | self._spare:
            connection.cut("stopping")

    @property
    def _interval(self) -> float:
        return min(1.0, self.limits.head / 4, self.limits.rest / 2)

    def _displace(self, places: "set[Connection]", count: int, now: float) -> None:
        """Cuts the connections that have kept the server waiting for longest; several, because it looks at all."""
        waiting = [each for each in places if each.is_late(now)]
        for connection in heapq.nlargest(count, waiting, lambda each: each.lateness(now)):
            connection.cut("displaced")

    def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        now = loop.time()
        for connection in self._open | self._spare:
            connection.check(now)
        self._sweeping = bool(self._open or self._spare)
        if self._sweeping:
            loop.call_later(self._interval, self._sweep, loop)


def _descriptor_limit() -> float:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return math.inf if limit == resource.RLIM_INFINITY else limit


class Connection(H11Protocol):
    """One connection, from `Gate.protocol`.

    Attributes:
        phase: "head" until a request's head is whole, "body" until its body is, "answer" until it is answered, and
            "rest" if the body is not whole then.
    """

    def __init__(
        self,
        gate: Gate,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        loop: asyncio.AbstractEventLoop | None,
    ):
        super().__init__(config, server_state, app_state, loop)
        self.conn = self._http = _StrictHttp(h11.SERVER, MAX_HEAD_BYTES)
        self.phase, self.only_probes = "head", False
        self._gate, self._since = gate, self.loop.time()
        self._raw: asyncio.Transport | None = None
        self._early, self._refused = b"", False
        self._unread: tuple[float, int] | None = None  # since when bytes wait for the client, and what it had taken
        self._closing: float | None = None

    # what the transport calls

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The client has connected."""
        self._raw = transport
        self._gate.enter(self)
        if transport.is_closing():
            return
        if self._gate.tls is None:
            self._begin(transport)
        else:
            transport.pause_reading()
            self._handshake = self.loop.create_task(self._shake_hands(transport, self._gate.tls))

    def data_received(self, data: bytes) -> None:
        """Some bytes have come."""
        if self.transport is None:  # directly behind the handshake
            self._early += data
        elif not self._refused:
            if self.timeout_keep_alive_task is not None:
                self._since = self.loop.time()  # the first byte after an answer
            super().data_received(data)
            self._note_phase()

    def handle_events(self) -> None:
        """Handles what has come, and the rest of it in another turn of the loop if it is much."""
        self._http.allowed = EVENTS_PER_TURN
        super().handle_events()
        if self._http.allowed == 0:
            self.loop.call_soon(self._go_on)

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is closed."""
        self._gate.leave(self)
        if self.transport is not None:
            super().connection_lost(exc)
            self._unset_keepalive_if_required()

    def on_response_complete(self) -> None:
        """The answer is whole."""
        super().on_response_complete()
        self._note_phase()

    def send_400_response(self, msg: str) -> None:
        """Answers what is not valid HTTP; uvicorn calls it where it handles the error."""
        error = sys.exception()
        status = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400
        reason = one_line(error)[:200] if error else msg
        self._refuse(RequestError(f"the request is not valid HTTP ({reason}): correct it", status), "invalid")

    # what the gate asks

    @property
    def descriptor(self) -> int:
        """The number of the socket's descriptor, the lowest that was free."""
        assert self._raw
        return self._raw.get_extra_info("socket").fileno()

    def is_late(self, now: float) -> bool:
        """Whether the server waits for the client, so that another one may take its place."""
        return self.phase == "head" or (self.phase in ("body", "rest") and self.lateness(now) > BODY_PATIENCE_S)

    def lateness(self, now: float) -> float:
        """For how many seconds the server has been waiting, less those that the bytes of the body have earned."""
        return now - self._since - (self._http.body_bytes / LEAST_RATE if self.phase == "body" else 0.0)

    def check(self, now: float) -> None:
        """Cuts the connection if its time is over."""
        limits = self._gate.limits
        if self.transport is None:
            if now - self._since > limits.head:
                self.cut("head")
            return
        if self.transport.is_closing():
            self._closing = self._closing or now
            if now - self._closing > limits.closing:
                self.cut("unread")
        elif self._takes_too_little(now):
            self.cut("unread")
        elif self.phase == "head" and now - self._since > (limits.spare_head if self.only_probes else limits.head):
            if self._http.trailing_data[0]:
                self._refuse(RequestError("the head of the request did not arrive in time: send it again", 408), "head")
            else:
                self.cut("head")
        elif self.phase == "rest" and now - self._since > limits.rest:
            if not self._refused:
                self._gate.on_cut("unfinished")
            self.transport.close()

    def cut(self, reason: str) -> None:
        """Closes the connection without another byte."""
        self._gate.on_cut(reason)
        self._gate.leave(self)
        assert self._raw
        self._raw.abort()

    # the rest

    def _begin(self, transport: asyncio.Transport) -> None:
        if self.only_probes:
            self.app_state = {**self.app_state, ONLY_PROBES: True}
        assert self._raw
        super().connection_made(_CountingTransport(transport, self._raw))  # type: ignore[arg-type]

    async def _shake_hands(self, raw: asyncio.Transport, tls: ssl.SSLContext) -> None:
        limits = self._gate.limits
        try:
            transport = await self.loop.start_tls(
                raw,
                self,
                tls,
                server_side=True,
                ssl_handshake_timeout=limits.head,
                ssl_shutdown_timeout=limits.closing,
            )
        except OSError:  # TLS errors and time-outs are among them
            self._gate.leave(self)
            return
        if transport is None or transport.is_closing():
            self._gate.leave(self)
            return
        self._since = self.loop.time()
        self._begin(transport)
        early, self._early = self._early, b""
        if early:
            self.data_received(early)

    def _go_on(self) -> None:
        if not self._refused and not self.transport.is_closing():
            self.handle_events()
            self._note_phase()

    def _note_phase(self) -> None:
        if self._http.their_state is h11.IDLE:
            phase = "head"
        elif self.cycle is not None and self.cycle.response_complete:
            phase = "rest"
        elif self._http.their_state is h11.SEND_BODY:
            phase = "body"
        else:
            phase = "answer"
        if phase != self.phase:
            self.phase, self._since = phase, self.loop.time()

    def _takes_too_little(self, now: float) -> bool:
        """Whether bytes have been waiting for the client, which takes hardly any of them."""
        limits, transport = self._gate.limits, self.transport
        assert isinstance(transport, _CountingTransport)
        if not transport.waiting:
            self._unread = None
            return False
        if self._unread is None:
            self._unread = now, transport.taken
        since, taken = self._unread
        if now - since < limits.unread:
            return False
        self._unread = now, transport.taken
        return transport.taken - taken < limits.read_rate * (now - since)

    def _refuse(self, error: RequestError, reason: str) -> None:
        """Answers with an error, unless an answer has begun, and takes no more requests."""
        self._gate.on_cut(reason)
        self._unset_keepalive_if_required()
        if self._http.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()
            return
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        response = error_response(error)
        headers = [*response.raw_headers, (b"connection", b"close")]
        head = h11.Response(status_code=error.status, headers=headers, reason=HTTPStatus(error.status).phrase.encode())
        for event in (head, h11.Data(data=bytes(response.body)), h11.EndOfMessage()):
            self.transport.write(self._http.send(event) or b"")
        if self.transport.can_write_eof():
            self.transport.write_eof()
        # what else the client sends is thrown away, until it closes: reset at once, it might not see the answer
        self._refused = True
        self.phase, self._since = "rest", self.loop.time()


class _StrictHttp(h11.Connection):
    """h11 that also refuses what is ambiguous, or costs more to parse than to send.

    Attributes:
        body_bytes: of the current request's body, so far.
        allowed: events that it still gives out in this turn of the loop.
    """

    def __init__(self, role: type[h11.SERVER], max_incomplete_event_size: int):
        super().__init__(role, max_incomplete_event_size)
        self.body_bytes = self._pieces = self.allowed = 0

    def next_event(self) -> Any:
        """The next event, as h11 has it."""
        if self.allowed == 0:
            return h11.NEED_DATA
        event = super().next_event()
        self.allowed -= 1
        if isinstance(event, h11.Request):
            self.body_bytes = self._pieces = 0
            return _checked(event)
        if isinstance(event, h11.Data):
            self.body_bytes += len(event.data)
            self._pieces += 1
            if self._pieces > max(MAX_PIECES, self.body_bytes / SMALL_PIECE):
                raise h11.RemoteProtocolError("the body comes in pieces that are too small", 400)
        return event


def _checked(request: h11.Request) -> h11.Request:
    names = [name for name, _ in request.headers]
    if len(names) > MAX_HEADERS:
        raise h11.RemoteProtocolError(f"more than {MAX_HEADERS} headers", 431)
    if b"transfer-encoding" in names and (b"content-length" in names or request.http_version < b"1.1"):
        # a proxy in front may see another end of the body, and take what follows for a request of its own
        raise h11.RemoteProtocolError("the length of the body is ambiguous", 400)
    scheme, separator, rest = request.target.partition(b"://")
    if not separator or scheme.lower() not in (b"http", b"https"):
        return request
    # the absolute form, whose host counts instead of the header's (RFC 9112, 3.2.2)
    host, slash, path = rest.partition(b"/")
    headers = [(b"Host", host), *(header for header in request.headers if header[0] != b"host")]
    return h11.Request(
        method=request.method, target=slash + path or b"/", headers=headers, http_version=request.http_version
    )


class _CountingTransport:
    """A transport that counts what the client has taken."""

    def __init__(self, transport: asyncio.Transport, raw: asyncio.Transport):
        self._transport, self._raw, self._written = transport, raw, 0

    def write(self, data: bytes) -> None:
        self._written += len(data)
        self._transport.write(data)

    @property
    def waiting(self) -> int:
        """Bytes that the client has not taken; beneath TLS a little more than those that were written."""
        waiting = self._transport.get_write_buffer_size()
        return waiting if self._transport is self._raw else waiting + self._raw.get_write_buffer_size()

    @property
    def taken(self) -> int:
        """Bytes that it has taken."""
        return self._written - self.waiting

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)
