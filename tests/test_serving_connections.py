"""Connections that keep the server waiting: each is bounded, and none keeps others out. All sockets are real."""

import asyncio
import contextlib
import errno
import json
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.responses import JSONResponse
from starlette.routing import Route

from deepstack_jax.cli.http_server import Shortages, Tls
from deepstack_jax.serving import bodies, connections, refusals
from deepstack_jax.serving.connections import ConnectionLimits, Gate
from deepstack_jax.serving.endpoint import Call, Endpoint, Reply
from deepstack_jax.serving.errors import RequestError
from deepstack_jax.serving.hosts import HostRule
from deepstack_jax.serving.http import create_app
from deepstack_jax.serving.policy import MediaPolicy
from tests.test_serving_access import certificate  # noqa: F401
from tests.test_serving_http import serving
from tests.waiting import until

LONG = 3600.0
SHORT = {"head": 0.3, "spare_head": 0.3, "rest": 0.3, "unread": 0.3, "closing": 0.3}
PATIENT = {"head": LONG, "spare_head": LONG, "rest": LONG, "unread": LONG, "closing": LONG}
HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


Connect = Callable[..., Any]


class App:
    """An application whose endpoints need no model: /echo counts a body, /hold waits, /flood never stops.

    /refuse refuses whatever comes.
    """

    def __init__(self, **options: Any):
        self.release = threading.Event()
        self.app = create_app(None, MediaPolicy(max_bytes=1), **options)
        self.service = self.app.state.service
        self.service.loaded = SimpleNamespace(role="unified", dead=lambda: None, load=dict)
        endpoints = {"/echo": self._echo, "/hold": self._hold, "/flood": self._flood, "/refuse": self._refuse}
        for path, respond in endpoints.items():
            self.app.router.routes.append(Route(path, Endpoint(self.service, respond), methods=["POST"]))

    async def _echo(self, call: Call, reply: Reply) -> None:
        await reply.whole(JSONResponse(len(call.body)))

    async def _hold(self, call: Call, reply: Reply) -> None:
        while not self.release.is_set():
            await asyncio.sleep(0.01)
        await reply.whole(JSONResponse("held"))

    async def _flood(self, call: Call, reply: Reply) -> None:
        while True:
            await reply.event("x" * 65536)
            await asyncio.sleep(0)

    async def _refuse(self, call: Call, reply: Reply) -> None:
        raise RequestError("no")

    def cuts(self) -> dict[str, float]:
        """How many connections were cut, by reason."""
        (family,) = self.service.metrics._cut.collect()
        samples = [sample for sample in family.samples if sample.name.endswith("_total")]
        return {sample.labels["reason"]: sample.value for sample in samples}


@contextlib.contextmanager
def server(
    limits: ConnectionLimits, tls: Tls | None = None, **options: Any
) -> Iterator[tuple[App, Callable[..., Any]]]:
    """An application, and a function that connects and sends bytes."""
    app = App(**options)
    gate = Gate(limits, tls and tls.context(), app.service.metrics.connection_cut)
    with serving(app.app, gate) as client, contextlib.ExitStack() as stack:

        def connect(data: bytes = b"") -> socket.socket:
            address = client.base_url.host, client.base_url.port or 0
            connection = stack.enter_context(socket.create_connection(address, timeout=30))
            connection.sendall(data)
            return connection

        try:
            yield app, connect
        finally:
            app.release.set()


def post(path: str, body: bytes = b"{}", *headers: str, length: int | None = None) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: x", f"Content-Length: {len(body) if length is None else length}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


def read(connection: socket.socket) -> tuple[int, dict[str, str], Any]:
    """One response: status, headers and JSON."""
    file = connection.makefile("rb")
    status = int(file.readline().split()[1])
    headers = {}
    while line := file.readline().strip().decode():
        name, _, value = line.partition(": ")
        headers[name.lower()] = value
    return status, headers, json.loads(file.read(int(headers["content-length"])))


def is_closed(connection: socket.socket) -> bool:
    """Waits until the server closes the connection; nothing else may come."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def check_refusal(connection: socket.socket, status: int, code: str | None = None) -> dict[str, str]:
    got, headers, body = read(connection)
    assert got == status, body
    assert body["error"].keys() == {"message", "type", "param", "code"}
    assert "\n" not in body["error"]["message"]
    assert body["error"]["code"] == code
    return headers


# ---- heads and bodies that don't come


def test_a_head_that_never_comes_is_not_waited_for():
    with server(ConnectionLimits(**SHORT)) as (app, connect):
        assert is_closed(connect())
        half = connect(b"GET /health HT")
        assert check_refusal(half, 408)["connection"] == "close"
        assert is_closed(half)
        again = connect(HEALTH)
        assert read(again)[0] == 200
        again.sendall(b"GET /hea")
        check_refusal(again, 408)
        assert app.cuts() == {"head": 3}


@pytest.mark.parametrize("drip", [b"", b" " * 50])
def test_a_body_has_to_come_at_a_least_rate(monkeypatch: pytest.MonkeyPatch, drip: bytes):
    monkeypatch.setattr(bodies, "GRACE_SECONDS", 0.2)
    monkeypatch.setattr(bodies, "LEAST_RATE", 1000)
    with server(ConnectionLimits(**PATIENT)) as (_, connect):
        half = connect(post("/echo", b"{" + drip, length=1 << 20))
        check_refusal(half, 408)
        assert read(connect(post("/echo", b" " * (1 << 20))))[2] == 1 << 20


def test_what_is_left_of_a_body_after_its_answer_is_not_waited_for():
    with server(ConnectionLimits(**SHORT)) as (app, connect):
        for path, status in (("/nowhere", 404), ("/generate", 415)):
            half = connect(post(path, b"{", "Content-Encoding: gzip", length=1 << 20))
            assert read(half)[0] == status
            assert is_closed(half)
        whole = connect(post("/nowhere"))  # a body that has come keeps its connection
        assert read(whole)[0] == 404
        whole.sendall(HEALTH)
        assert read(whole)[0] == 200
        assert app.cuts() == {"unfinished": 2}


def test_a_body_that_is_too_large_is_refused_before_it_comes():
    with server(ConnectionLimits(**SHORT)) as (_, connect):
        check_refusal(connect(post("/echo", b"", "Expect: 100-continue", length=1 << 40)), 413, "body_too_large")


def test_bodies_that_never_come_keep_nobody_out():
    with server(ConnectionLimits(**PATIENT), max_requests=2) as (app, connect):
        half = [connect(post("/echo", b"{", length=100)) for _ in range(8)]
        assert read(connect(post("/echo")))[0] == 200
        until(lambda: app.service.in_flight == 0)
        held = [connect(post("/hold")) for _ in range(2)]
        until(lambda: app.service.in_flight == 2)
        assert int(check_refusal(connect(post("/echo")), 503, "queue_full")["retry-after"]) >= 1
        half[0].sendall(b" " * 99)  # its body is whole now, and it counts
        check_refusal(half[0], 503, "queue_full")
        app.release.set()
        assert [read(each)[2] for each in held] == ["held"] * 2
        until(lambda: app.service.in_flight == 0)
        half[1].sendall(b" " * 99)
        assert read(half[1])[2] == 100


def test_the_largest_body_makes_room_where_all_hold_too_much(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bodies, "BODIES_AT_ONCE", 1)
    with server(ConnectionLimits(**PATIENT)) as (app, connect):
        most = app.service.bodies._most
        large = connect(post("/echo", b" " * (most // 4 * 3), length=most))
        until(lambda: app.service.bodies._held == most // 4 * 3)
        small = connect(post("/echo", b" " * (most // 3), length=most // 2))
        check_refusal(large, 503, "queue_full")
        small.sendall(b" " * (most // 2 - most // 3))
        assert read(small)[2] == most // 2
        until(lambda: app.service.bodies._held == 0)


def test_bodies_that_arrive_are_refused_once_the_server_drains():
    with server(ConnectionLimits(**PATIENT)) as (app, connect):
        half = connect(post("/echo", b"{", length=100))
        until(lambda: app.service.bodies._held)
        asyncio.run(drained(app))
        check_refusal(half, 503, "stopping")


async def drained(app: App) -> None:
    """Drains from the server's own loop, as the endpoint and SIGTERM do."""
    (body,) = app.service.bodies._arriving
    body.bound._task.get_loop().call_soon_threadsafe(app.service.drain)


# ---- many connections


def test_the_connection_that_was_silent_for_longest_makes_room():
    with server(ConnectionLimits(most=4, **PATIENT)) as (app, connect):
        silent = [connect(b"GET /hea" if number % 2 else b"") for number in range(4)]
        for number in range(3):
            assert read(connect(HEALTH))[0] == 200
            assert is_closed(silent[number])
        assert app.cuts() == {"displaced": 3}


def test_bodies_that_are_late_make_room(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(connections, "BODY_PATIENCE_S", 0.0)
    with server(ConnectionLimits(most=4, **PATIENT)) as (app, connect):
        half = [connect(post("/echo", b"{", length=100)) for _ in range(4)]
        until(lambda: app.service.bodies._held == 4)
        assert read(connect(post("/echo")))[0] == 200
        assert is_closed(half[0])


def test_probes_are_answered_where_no_connection_is_left():
    with server(ConnectionLimits(most=4, spare=2, **PATIENT)) as (app, connect):
        held = [connect(post("/hold")) for _ in range(4)]
        until(lambda: app.service.in_flight == 4)
        for path, status in (("/health", 200), ("/version", 200)):
            probe = connect(HEALTH.replace(b"/health", path.encode()))
            got, headers, _ = read(probe)
            assert (got, headers["connection"]) == (status, "close")
            assert is_closed(probe)
        for request in (post("/echo"), HEALTH.replace(b"/health", b"/v1/models")):
            other = connect(request)
            headers = check_refusal(other, 503, "queue_full")
            assert headers["connection"] == "close"
            assert int(headers["retry-after"]) >= 1
            assert is_closed(other)
        spare = [connect() for _ in range(3)]  # the third takes the place of the first
        assert is_closed(spare[0])
        app.release.set()
        assert [read(each)[2] for each in held] == ["held"] * 4
        assert read(connect(post("/echo")))[0] == 200


def test_the_limits_leave_descriptors_for_other_files():
    most = {number: ConnectionLimits.within(number).most for number in (64, 256, 1024, 4096, 1 << 16)}
    assert most == {64: 16, 256: 128, 1024: 512, 4096: 1024, 1 << 16: 1024}


def test_descriptors_that_run_out_are_logged_once_per_second(caplog: pytest.LogCaptureFixture):
    clock = SimpleNamespace(now=100.0)
    loop: Any = SimpleNamespace(
        time=lambda: clock.now, default_exception_handler=lambda context: others.append(context)
    )
    others: list[Any] = []
    errors = Shortages(lambda: rooms.append(clock.now))
    rooms: list[float] = []
    context = {"message": "socket.accept() out of system resource", "exception": OSError(errno.EMFILE, "too many")}
    for now in (0.0, 0.5, 0.9, 1.1):
        clock.now = 100 + now
        for _ in range(100):
            errors.handle(loop, context)
    errors.handle(loop, other := {"message": "another error"})
    assert [record.levelno for record in caplog.records] == [logging.ERROR] * 2
    assert others == [other]
    assert rooms == [100.0, 101.1]


# ---- clients that don't read


def test_a_client_that_never_reads_does_not_hold_its_request():
    with server(ConnectionLimits(**SHORT)) as (app, connect):
        connect(post("/flood"))
        until(lambda: app.cuts() == {"unread": 1})
        until(lambda: app.service.in_flight == 0)


def test_a_client_that_reads_slowly_is_waited_for():
    with server(ConnectionLimits(**SHORT | {"read_rate": 1000})) as (app, connect):
        slow = connect(post("/flood"))
        until(lambda: app.service.in_flight == 1)
        read, event = 0, threading.Event()
        for _ in range(20):
            event.wait(0.05)
            read += len(slow.recv(1 << 20))
        assert (app.cuts(), app.service.in_flight) == ({}, 1)


def test_refusals_wait_for_each_other_while_a_request_is_answered(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(refusals, "AT_ONCE", 2)
    monkeypatch.setattr(refusals, "PER_SECOND", 1e-4)
    monkeypatch.setattr(refusals, "LONGEST_S", LONG)
    with server(ConnectionLimits(**PATIENT)) as (app, connect):
        for _ in range(4):  # nothing else is answered
            check_refusal(connect(post("/refuse")), 400)
        held = connect(post("/hold"))
        until(lambda: app.service.in_flight == 1)
        for _ in range(2):
            check_refusal(connect(post("/refuse")), 400)
        monkeypatch.setattr(refusals, "LONGEST_S", 1.0)
        began = time.monotonic()
        waiting = [connect(post("/refuse")) for _ in range(3)]
        assert read(connect(HEALTH))[0] == 200
        for each in waiting:
            check_refusal(each, 400)
        assert time.monotonic() - began >= 1.0
        assert app.service.in_flight == 1  # they have given back their places
        app.release.set()
        assert read(held)[2] == "held"


# ---- requests that are not valid, ambiguous or dear

HOST = b"POST /echo HTTP/1.1\r\nHost: x\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),  # TLS to a server without it
        (b"GET /health HTTP/1.1\r\n\r\n", 400),  # no Host
        (b"GET /health HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n", 400),
        (HOST + CHUNKED + b"Content-Length: 2\r\n\r\n{}", 400),
        (b"POST /echo HTTP/1.0\r\nHost: x\r\n" + CHUNKED + b"\r\n2\r\n{}\r\n0\r\n\r\n", 400),
        (HOST + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}", 400),
        (HOST + b"Content-Length: -1\r\n\r\n{}", 400),
        (HOST + b"Transfer-Encoding: gzip\r\n\r\n{}", 501),
        (HOST + b"a : b\r\n\r\n", 400),
        (HOST + b"".join(b"h%d: v\r\n" % number for number in range(200)) + b"\r\n", 431),
        (HOST + b"h: " + b"v" * 100_000, 431),
        (HOST + CHUNKED + b"\r\n" + 5000 * b"1\r\nx\r\n", 400),
        (HOST + CHUNKED + b"\r\nxyz\r\n", 400),
        (HOST + CHUNKED + b"\r\n2;" + b"e" * 100_000, 431),
        (HOST + CHUNKED + b"\r\n0\r\n" + b"t: v\r\n" * 20_000, 431),
    ],
)
def test_what_is_not_valid_http_gets_one_clear_line(request_bytes: bytes, status: int):
    with server(ConnectionLimits(**SHORT)) as (app, connect):
        bad = connect(request_bytes)
        assert check_refusal(bad, status)["connection"] == "close"
        assert is_closed(bad)
        until(lambda: app.cuts() == {"invalid": 1})
        assert read(connect(HEALTH))[0] == 200


@pytest.mark.parametrize(
    ("target", "host", "status"),
    [
        ("/health", "localhost", 200),
        ("http://localhost/health", "localhost", 200),
        ("HTTP://localhost:80/health", "evil.org", 200),  # the header's host doesn't count then
        ("http://evil.org/health", "localhost", 403),
        ("http://localhost@evil.org/health", "localhost", 403),
        ("http:///health", "localhost", 403),
        ("/health", "localhost@evil.org", 403),
        ("/health", "", 403),
    ],
)
def test_the_host_of_an_absolute_target_counts(target: str, host: str, status: int):
    with server(ConnectionLimits(**SHORT), hosts=HostRule.of("127.0.0.1", True)) as (_, connect):
        answered = connect(f"GET {target} HTTP/1.1\r\nHost: {host}\r\nX-Forwarded-Host: localhost\r\n\r\n".encode())
        assert read(answered)[0] == status


def test_http_1_0_pipelines_and_expectations_are_answered():
    with server(ConnectionLimits(**SHORT)) as (_, connect):
        old = connect(b"GET /health HTTP/1.0\r\n\r\n")
        assert read(old)[0] == 200
        assert is_closed(old)
        pipe = connect(HEALTH + post("/echo", b" " * 9) + HEALTH.replace(b"Host", b"Connection: close\r\nHost"))
        responses = pipe.makefile("rb").read()
        assert responses.count(b"HTTP/1.1 200 OK\r\n") == 3
        assert b"\r\n\r\n9HTTP/1.1" in responses
        expecting = connect(post("/echo", b"", "Expect: 100-continue", length=3))
        assert expecting.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        expecting.sendall(b"{ }")
        assert read(expecting)[2] == 3


# ---- TLS


def test_a_handshake_that_never_ends_is_not_waited_for(certificate: Tls):  # noqa: F811
    with server(ConnectionLimits(**SHORT), certificate) as (app, connect):
        assert is_closed(connect())
        assert is_closed(connect(b"\x16\x03\x01"))
        until(lambda: not app.service.in_flight)


def test_handshakes_make_room_and_deadlines_hold_behind_them(certificate: Tls):  # noqa: F811
    trust = ssl.create_default_context(cafile=certificate.cert)
    with server(ConnectionLimits(most=2, **PATIENT), certificate) as (_, connect):
        silent = [connect() for _ in range(2)]
        with trust.wrap_socket(connect(), server_hostname="localhost") as secure:
            assert is_closed(silent[0])
            secure.sendall(HEALTH)
            assert read(secure)[0] == 200
    with server(ConnectionLimits(**SHORT), certificate) as (app, connect), contextlib.ExitStack() as stack:
        half, flood = (stack.enter_context(trust.wrap_socket(connect(), server_hostname="localhost")) for _ in range(2))
        half.sendall(b"GET /hea")
        flood.sendall(post("/flood"))
        check_refusal(half, 408)
        until(lambda: app.cuts() == {"head": 1, "unread": 1})
        until(lambda: app.service.in_flight == 0)
