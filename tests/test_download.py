"""Downloads against real servers on loopback: the library and the server get the same bytes, or refuse alike.

The reference for what a body means is the standard library's gzip and zlib, and RFC 9110 and 9112; for what a URL
becomes on its way, RFC 3986 and IDNA's published examples, written out.
"""

import asyncio
import base64
import gzip
import random
import re
import socket
import socketserver
import ssl
import subprocess
import threading
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deepstack_jax.cli import main
from deepstack_jax.processing import download as downloading
from deepstack_jax.processing.download import download
from deepstack_jax.processing.urls import ascii_host, parse_url
from deepstack_jax.serving.fetch import fetch
from deepstack_jax.serving.policy import OPTIONS, Budget, MediaError, MediaPolicy
from tests.loopback import running

TEXT = random.Random(0).randbytes(150_000) + bytes(50_000)  # part of it does not compress
LIMIT = 1 << 18


class Server(socketserver.ThreadingTCPServer):
    """Answers each request with the bytes that `answer` gives for its head, and closes."""

    daemon_threads = allow_reuse_address = True

    def __init__(self, answer: Callable[[str], bytes]):
        super().__init__(("127.0.0.1", 0), None)  # type: ignore[arg-type]
        self.answer = answer
        self.heads: list[str] = []

    @property
    def port(self) -> int:
        return self.server_address[1]

    @property
    def targets(self) -> list[str]:
        return [head.split(" ")[1] for head in self.heads]

    def finish_request(self, request: socket.socket, client_address: object) -> None:  # type: ignore[override]
        head = read_head(request)
        self.heads.append(head)
        request.sendall(self.answer(head))

    def handle_error(self, *args: object) -> None: ...  # clients that hang up are what these tests are about


def read_head(request: socket.socket) -> str:
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        piece = request.recv(1)
        if not piece:
            break
        head += piece
    return head.decode()


def reply(body: bytes, *headers: str, status: str = "HTTP/1.1 200 OK", length: int | None = -1) -> bytes:
    """A response; `length` -1 is the body's own, None leaves it out."""
    lines = [status, *headers]
    if length is not None:
        lines.append(f"Content-Length: {len(body) if length < 0 else length}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def chunked(body: bytes, size: int) -> bytes:
    pieces = [body[at : at + size] for at in range(0, len(body), size)]
    return b"".join(b"%x;a=b\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


def raw_deflate(data: bytes) -> bytes:
    stream = zlib.compressobj(wbits=-15)
    return stream.compress(data) + stream.flush()


def by_library(url: str, most: int = LIMIT, timeout: float = 20.0) -> bytes:
    return download(url, most, ValueError, timeout)


def by_server(url: str, most: int = LIMIT, timeout: float = 20.0) -> bytes:
    """As a server fetches that may reach 127.0.0.1, at the URL's port."""
    port = re.search(r":(\d+)", url)
    policy = MediaPolicy(
        allowed_domains=("127.0.0.1",),
        allowed_networks=("127.0.0.1/32",),
        allowed_ports=(int(port[1]) if port else 80,),
        max_bytes=most,
        timeout=timeout,
    )
    return asyncio.run(fetch(url, policy, Budget(policy)))


BOTH = pytest.mark.parametrize("get", [by_library, by_server])


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "no_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


# ---- bodies ----

GZIP, ZLIB, RAW = gzip.compress(TEXT), zlib.compress(TEXT), raw_deflate(TEXT)
STORED = zlib.compress(TEXT, 0)
CHUNKED = "Transfer-Encoding: chunked"
BODIES = {
    "plain": reply(TEXT),
    "identity": reply(TEXT, "Content-Encoding: identity"),
    "no encoding": reply(TEXT, "Content-Encoding:"),
    "until it closes": reply(TEXT, length=None),
    "HTTP/1.0": reply(TEXT, status="HTTP/1.0 200 OK", length=None),
    "HTTP/1.0 with a length": reply(TEXT, status="HTTP/1.0 200 OK"),
    "no reason phrase": reply(TEXT, status="HTTP/1.1 200 "),
    "more than its length": reply(TEXT + b"more", length=len(TEXT)),
    "chunked": reply(chunked(TEXT, 1000), CHUNKED, length=None),
    "after 100": b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" + reply(TEXT),
    "gzip": reply(GZIP, "Content-Encoding: gzip"),
    "x-gzip": reply(GZIP, "Content-Encoding: X-GZip"),
    "gzip in tiny chunks": reply(chunked(gzip.compress(TEXT[-60_000:]), 1), CHUNKED, "Content-Encoding: gzip"),
    "gzip of HTTP/1.0": reply(GZIP, "Content-Encoding: gzip", status="HTTP/1.0 200 OK", length=None),
    "gzip in members": reply(
        b"".join(gzip.compress(TEXT[at : at + 7777]) for at in range(0, len(TEXT), 7777)), "Content-Encoding: gzip"
    ),
    "gzip with padding": reply(GZIP + bytes(600), "Content-Encoding: gzip"),
    "gzip with one byte more": reply(GZIP + b"\x1f", "Content-Encoding: gzip"),
    "deflate": reply(ZLIB, "Content-Encoding: deflate"),
    "deflate, stored": reply(STORED, "Content-Encoding: deflate"),
    "deflate in tiny chunks": reply(chunked(zlib.compress(TEXT[-60_000:]), 1), CHUNKED, "Content-Encoding: deflate"),
    "deflate without a header": reply(RAW, "Content-Encoding: deflate"),
    "deflate without a header, stored": reply(STORED[2:-4], "Content-Encoding: deflate"),
    "gzip of deflate": reply(gzip.compress(ZLIB), "Content-Encoding: deflate, gzip"),
    "deflate of gzip": reply(raw_deflate(GZIP), "Content-Encoding: gzip", "Content-Encoding: identity, deflate"),
    "gzip of gzip": reply(gzip.compress(GZIP), "Content-Encoding: gzip,gzip"),
}
SHORT = {"gzip in tiny chunks": TEXT[-60_000:], "deflate in tiny chunks": TEXT[-60_000:]}
for _name in SHORT:  # chunked bodies have no length
    BODIES[_name] = b"\r\n".join(
        line for line in BODIES[_name].split(b"\r\n") if not line.startswith(b"Content-Length")
    )  # fmt: skip


@BOTH
@pytest.mark.parametrize("case", BODIES)
def test_a_body_is_what_its_server_meant(case: str, get: Callable[[str], bytes]):
    with running(Server(lambda _: BODIES[case])) as server:
        assert get(f"http://127.0.0.1:{server.port}/") == SHORT.get(case, TEXT)
    assert "accept-encoding: identity" in server.heads[0].lower()


ENCODED = "Content-Encoding: "
REFUSED = {
    "br": (reply(b"x", ENCODED + "br"), r"comes compressed \(br\)"),
    "zstd": (reply(b"x", ENCODED + "zstd"), r"comes compressed \(zstd\)"),
    "compress": (reply(b"x", ENCODED + "compress"), r"comes compressed \(compress\)"),
    "one of two": (reply(GZIP, ENCODED + "br, gzip"), r"comes compressed \(br\)"),
    "too deep": (reply(GZIP, ENCODED + ",".join(["gzip"] * 5)), "comes compressed 5 times"),
    "not gzip": (reply(TEXT, ENCODED + "gzip"), "damaged gzip body"),
    "not deflate": (reply(b"\xff" * 100, ENCODED + "deflate"), "damaged deflate body"),
    "gzip cut": (reply(GZIP[:-20], ENCODED + "gzip"), "ended early"),
    "gzip cut in its checksum": (reply(GZIP[:-1], ENCODED + "gzip"), "ended early"),
    "gzip of one byte": (reply(b"\x1f", ENCODED + "gzip"), "ended early"),
    "gzip with a wrong checksum": (reply(GZIP[:-8] + b"\0\0\0\0" + GZIP[-4:], ENCODED + "gzip"), "damaged gzip"),
    "deflate cut": (reply(RAW[:-20], ENCODED + "deflate"), "ended early"),
    "a cut inside": (reply(gzip.compress(GZIP[:-20]), ENCODED + "gzip, gzip"), "ended early"),
    "gzip of nothing": (reply(gzip.compress(b""), ENCODED + "gzip"), "empty body"),
    "gzip without a body": (reply(b"", ENCODED + "gzip"), "empty body"),
    "empty": (reply(b""), "empty body"),
    "empty chunked": (reply(b"0\r\n\r\n", CHUNKED, length=None), "empty body"),
    "204": (reply(b"", status="HTTP/1.1 204 No Content", length=None), r"answered 204 \(No Content\)"),
    "206": (reply(TEXT, "Content-Range: bytes 0-9/20", status="HTTP/1.1 206 Partial"), "answered 206"),
    "304": (reply(b"", status="HTTP/1.1 304 Not Modified", length=None), "answered 304"),
    "404": (reply(b"no", status="HTTP/1.1 404 Gone fishing"), r"answered 404 \(Not Found\)"),
    "599": (reply(b"no", status="HTTP/1.1 599 What"), "answered 599:"),
    "moved nowhere": (reply(b"", status="HTTP/1.1 302 Found"), "answered 302"),
    "short of its length": (reply(TEXT, length=len(TEXT) + 1), "the answer ended early"),
    "cut chunks": (reply(chunked(TEXT, 1000)[:-300], CHUNKED, length=None), "the answer ended early"),
    "two lengths": (reply(TEXT, "Content-Length: 5"), "not valid HTTP"),
    "a length that is none": (reply(TEXT, "Content-Length: many", length=None), "not valid HTTP"),
    "transfer compressed": (reply(GZIP, "Transfer-Encoding: gzip, chunked", length=None), "not valid HTTP"),
    "no HTTP": (b"220 mail.example.org ESMTP\r\n\r\n", "not valid HTTP"),
    "nothing": (b"", "ended early"),
    "half a head": (b"HTTP/1.1 200 OK\r\nContent-", "ended early"),
    "a loop": (reply(b"", "Location: /", status="HTTP/1.1 302 Found"), "redirects more than"),
    "to a file": (reply(b"", "Location: file:///etc/passwd", status="HTTP/1.1 302 Found"), "scheme 'file'"),
    "to ftp": (reply(b"", "Location: ftp://127.0.0.1/x", status="HTTP/1.1 302 Found"), "scheme 'ftp'"),
}  # fmt: skip


@BOTH
@pytest.mark.parametrize("case", REFUSED)
def test_an_answer_that_is_no_file_is_refused_with_its_reason(case: str, get: Callable[[str], bytes]):
    response, reason = REFUSED[case]
    with running(Server(lambda _: response)) as server, pytest.raises(ValueError, match=reason) as caught:
        get(f"http://127.0.0.1:{server.port}/")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"http://127.0.0.1:{server.port}/ ")


def endless_name() -> bytes:
    """gzip whose header has a file name of 100 MB, inside gzip: nothing comes out at the end."""
    outer = zlib.compressobj(wbits=31)
    head = b"\x1f\x8b\x08\x08\0\0\0\0\0\xff"
    return outer.compress(head) + outer.compress(b"a" * 100_000_000) + outer.flush()


TOO_MUCH = r"holds more than|bytes allowed|needs .* bytes|gzip members"
BOMBS = {
    "plain": lambda: reply(bytes(LIMIT + 1)),
    "said": lambda: reply(b"", length=10**12),
    "gzip": lambda: reply(gzip.compress(bytes(100_000_000)), ENCODED + "gzip"),
    "deflate": lambda: reply(zlib.compress(bytes(100_000_000)), ENCODED + "deflate"),
    "deflate without a header": lambda: reply(raw_deflate(bytes(100_000_000)), ENCODED + "deflate"),
    "nested": lambda: reply(gzip.compress(gzip.compress(bytes(100_000_000))), ENCODED + "gzip, gzip"),
    "one byte too much": lambda: reply(gzip.compress(bytes(LIMIT + 1)), ENCODED + "gzip"),
    "a name": lambda: reply(endless_name(), ENCODED + "gzip, gzip"),
    "empty members": lambda: reply(gzip.compress(gzip.compress(b"") * 50_000), ENCODED + "gzip, gzip"),
}


@BOTH
@pytest.mark.parametrize("case", BOMBS)
def test_what_inflates_is_bounded_in_bytes_and_memory(case: str, get: Callable[[str], bytes]):
    response = BOMBS[case]()
    with running(Server(lambda _: response)) as server:
        started = time.monotonic()
        tracemalloc.start()
        try:
            with pytest.raises(
                ValueError, match=r"holds more than|bytes allowed|needs .* bytes|gzip members"
            ) as caught:
                get(f"http://127.0.0.1:{server.port}/")
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    if isinstance(caught.value, MediaError):
        assert caught.value.status == 413
    # the body, which a bytearray makes room for by eighths, and pieces of 64 KB in each stage
    assert peak < LIMIT * 9 / 8 + (1 << 20)
    assert time.monotonic() - started < 10


NEVER_ENDING = {
    "early hints": b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" * 30_000,
    "chunks of one byte": reply(b"1;" + b"a" * 5000 + b"\r\nx\r\n", CHUNKED, length=None)
    + (b"1;" + b"a" * 5000 + b"\r\nx\r\n") * 300,
}


@BOTH
@pytest.mark.parametrize("case", NEVER_ENDING)
def test_bytes_around_a_body_count_as_well(case: str, get: Callable[[str], bytes]):
    response = NEVER_ENDING[case]
    assert len(response) > 2 * LIMIT + (1 << 16)  # what may arrive for a body of LIMIT
    with running(Server(lambda _: response)) as server, pytest.raises(ValueError, match="more than the bytes allowed"):
        get(f"http://127.0.0.1:{server.port}/")


@BOTH
def test_a_body_of_just_the_limit_is_taken(get: Callable[[str], bytes]):
    body = bytes(LIMIT)
    for response in (reply(body), reply(gzip.compress(body), ENCODED + "gzip")):
        with running(Server(lambda _, response=response: response)) as server:
            assert get(f"http://127.0.0.1:{server.port}/") == body


# ---- URLs ----


@BOTH
@pytest.mark.parametrize(
    ("url", "target"),
    [
        ("", "/"),
        ("/", "/"),
        ("/a.jpg#top", "/a.jpg"),
        ("/a.jpg?#", "/a.jpg"),
        ("/a%20b.jpg", "/a%20b.jpg"),
        ("/a b.jpg", "/a%20b.jpg"),
        ("/a  b/c d.jpg?x=1 2&y=ä", "/a%20%20b/c%20d.jpg?x=1%202&y=%C3%A4"),
        ("/straße/猫.jpg", "/stra%C3%9Fe/%E7%8C%AB.jpg"),
        ("/e\u0301.jpg", "/e%CC%81.jpg"),  # not normalised: the server's file may be named so
        ("/🐈.jpg", "/%F0%9F%90%88.jpg"),
        ("/%e7%8c%ab.jpg", "/%e7%8c%ab.jpg"),
        ("/%2F%2f%3F", "/%2F%2f%3F"),
        ("/100%.jpg", "/100%25.jpg"),
        ("/100%zz?p=5%", "/100%25zz?p=5%25"),
        ("/a+b;c=d,e@f:g!$&'()*~.jpg", "/a+b;c=d,e@f:g!$&'()*~.jpg"),
        ('/a"b<c>d|e^f`g{h}[i]', "/a%22b%3Cc%3Ed%7Ce%5Ef%60g%7Bh%7D%5Bi%5D"),
        ("/x?sig=a%2Bb%3D&list[]=1&url=http://h/?q", "/x?sig=a%2Bb%3D&list[]=1&url=http://h/?q"),
        ("?q=1", "/?q=1"),
        ("/a\u00a0b", "/a%C2%A0b"),
    ],
)
def test_a_url_travels_in_its_encoded_form(url: str, target: str, get: Callable[[str], bytes]):
    with running(Server(lambda _: reply(TEXT))) as server:
        assert get(f" \t\nHTTP://127.0.0.1:{server.port}{url}\r\n ") == TEXT
    assert server.targets == [target]


@BOTH
def test_redirects_may_be_relative_spaced_and_beyond_ascii(get: Callable[[str], bytes]):
    places = {"/": "/ä b", "/%C3%A4%20b": "c?猫=1#x", "/c?%E7%8C%AB=1": "//127.0.0.1:PORT/end"}

    def answer(head: str) -> bytes:
        there = places.get(head.split(" ")[1])
        if there is None:
            return reply(TEXT)
        status = "HTTP/1.1 308 Permanent Redirect"
        return f"{status}\r\nLocation: {there.replace('PORT', str(server.port))}\r\n\r\n".encode()

    with running(Server(answer)) as server:
        assert get(f"http://127.0.0.1:{server.port}/") == TEXT
    assert server.targets == [*places, "/end"]


@BOTH
@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://user:secret@127.0.0.1/", "holds a user name"),
        ("http://user@127.0.0.1/", "holds a user name"),
        ("http://@127.0.0.1/", "holds a user name"),
        ("http://127.0.0.1\\@example.org/", "characters that are not valid in a URL"),
        ("http://127.0.0.1/a\\b", "characters that are not valid in a URL"),
        ("http://127.0.0.1/a\nb", "characters that are not valid in a URL"),
        ("http://127.0.0.1\t/", "characters that are not valid in a URL"),
        ("http://127.0.0.1/\0", "characters that are not valid in a URL"),
        ("http://127.0.0.1/\x7f", "characters that are not valid in a URL"),
        ("http://127.0.0.1:99999/", "not a valid URL"),
        ("http://127.0.0.1:0/", "port 0"),
        ("http://127.0.0.1:x/", "not a valid URL"),
        ("http://[::1/", "not a valid URL"),
        ("http://\u2100.example.org/", "not a valid URL"),  # a/c once it is normalised
        ("http://127.0.0.1/\ud800", "not a valid URL"),
        ("http://", "no valid host name"),
        ("http:///x", "no valid host name"),
        ("http://exa mple.org/", "no valid host name"),
        ("http://example..org/", "no valid host name"),
        ("http://example.org%2eevil/", "no valid host name"),
        ("http://" + "a" * 64 + ".org/", "no valid host name"),
        ("http://" + "a." * 127 + "org/", "no valid host name"),
        ("http://☃.example.org/", "no valid host name"),
        ("http://[::1%25x]/", "no valid host name"),
        ("ftp://127.0.0.1/", "scheme 'ftp'"),
    ],
)
def test_urls_with_two_readings_are_refused(url: str, reason: str, get: Callable[[str], bytes]):
    with pytest.raises(ValueError, match=reason) as caught:
        get(url)
    assert all(character.isprintable() for character in str(caught.value))


@pytest.mark.parametrize(
    ("host", "encoded"),
    [
        ("Example.ORG.", "example.org"),
        ("my_bucket.s3.example.org", "my_bucket.s3.example.org"),
        ("bücher.example", "xn--bcher-kva.example"),  # Wikipedia, Internationalized domain name
        ("BÜCHER.example", "xn--bcher-kva.example"),
        ("faß.de", "xn--fa-hia.de"),  # UTS 46, nontransitional: not fass.de
        ("例え.テスト", "xn--r8jz45g.xn--zckzah"),  # IANA's test domain
        ("παράδειγμα.δοκιμή", "xn--hxajbheg2az3al.xn--jxalpdlp"),  # IANA's test domain
        ("bücher。example", "xn--bcher-kva.example"),
        ("ｅｘａｍｐｌｅ.org", "example.org"),
        ("xn--bcher-kva.example", "xn--bcher-kva.example"),
    ],
)
def test_hosts_beyond_ascii_are_encoded_by_idna(host: str, encoded: str):
    assert ascii_host(host) == encoded


# ---- time, loops and proxies ----


@BOTH
def test_time_is_bounded_while_bytes_drip_and_inflate(get: Callable[..., bytes]):
    def drip(_: str) -> bytes:
        time.sleep(3)
        return reply(TEXT)

    started = time.monotonic()
    with (
        running(Server(drip)) as server,
        pytest.raises(ValueError, match=r"did not arrive within 0\.3 s: "),
    ):
        get(f"http://127.0.0.1:{server.port}/", timeout=0.3)
    assert time.monotonic() - started < 2


@BOTH
def test_a_closed_port_is_named(get: Callable[[str], bytes]):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(ValueError, match=r"no connection to .*Connect"):
            get(f"http://127.0.0.1:{taken.getsockname()[1]}/")


def test_the_next_address_is_tried_if_one_refuses():
    async def two_addresses(host: str, port: int) -> list[str]:
        return ["127.0.0.2", "127.0.0.1"]

    with running(Server(lambda _: reply(TEXT))) as server:
        policy = MediaPolicy(("media.example.org",), allowed_networks=("127.0.0.0/8",), allowed_ports=(server.port,))
        url = f"http://media.example.org:{server.port}/"
        assert asyncio.run(fetch(url, policy, Budget(policy), two_addresses)) == TEXT


def test_a_cancelled_fetch_closes_its_connection():
    asked, closed = threading.Event(), threading.Event()

    class Silent(Server):
        def finish_request(self, request: socket.socket, client_address: object) -> None:  # type: ignore[override]
            read_head(request)
            asked.set()
            if request.recv(1) == b"":
                closed.set()

    async def cancelled(url: str, policy: MediaPolicy) -> None:
        pending = asyncio.create_task(fetch(url, policy, Budget(policy)))
        assert await asyncio.to_thread(asked.wait, 5)
        pending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await pending
        assert await asyncio.to_thread(closed.wait, 5)

    with running(Silent(lambda _: b"")) as server:
        policy = MediaPolicy(("127.0.0.1",), allowed_networks=("127.0.0.1/32",), allowed_ports=(server.port,))
        asyncio.run(cancelled(f"http://127.0.0.1:{server.port}/", policy))


def test_the_library_downloads_inside_a_running_event_loop():
    async def notebook() -> bytes:
        return by_library(f"http://127.0.0.1:{server.port}/")

    with running(Server(lambda _: reply(TEXT))) as server:
        assert asyncio.run(notebook()) == TEXT


def test_the_error_is_of_the_type_asked_for():
    class OwnError(ValueError): ...

    with running(Server(lambda _: reply(b""))) as server, pytest.raises(OwnError, match="empty body"):
        download(f"http://127.0.0.1:{server.port}/", 10, OwnError)


@pytest.mark.parametrize("login", ["", "me:p%40ss@"])
def test_the_library_uses_the_proxy_of_the_environment(monkeypatch: pytest.MonkeyPatch, login: str):
    with running(Server(lambda _: reply(TEXT))) as proxy:
        monkeypatch.setenv("http_proxy", f"http://{login}127.0.0.1:{proxy.port}")
        monkeypatch.setenv("no_proxy", "127.0.0.1,.internal")
        assert by_library("http://Bücher.example/ä b") == TEXT
        assert proxy.targets == ["http://xn--bcher-kva.example/%C3%A4%20b"]
        assert "\r\nHost: xn--bcher-kva.example\r\n" in proxy.heads[0]
        expected = base64.b64encode(b"me:p@ss").decode() if login else None
        assert (f"Proxy-Authorization: Basic {expected}\r\n" in proxy.heads[0]) == bool(login)
        with running(Server(lambda _: reply(b"direct"))) as server:
            assert by_library(f"http://127.0.0.1:{server.port}/") == b"direct"
            assert by_server(f"http://127.0.0.1:{server.port}/") == b"direct"
        assert len(proxy.heads) == 1


def test_a_server_uses_no_proxy(monkeypatch: pytest.MonkeyPatch):
    with running(Server(lambda _: reply(b"proxy"))) as proxy, running(Server(lambda _: reply(b"direct"))) as server:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.port}")
        assert by_server(f"http://127.0.0.1:{server.port}/") == b"direct"


@pytest.mark.parametrize(
    ("proxy", "reason"),
    [("socks5://127.0.0.1:1", "proxy is not one of http"), ("http://", "proxy is not one of http"),
     ("http://127.0.0.1:x", "proxy is not one of http"), ("http://127.0.0.1:1", "no connection to the proxy")],
)  # fmt: skip
def test_a_proxy_that_cant_be_used_is_named(monkeypatch: pytest.MonkeyPatch, proxy: str, reason: str):
    monkeypatch.setenv("http_proxy", proxy)
    with pytest.raises(ValueError, match=reason):
        by_library("http://example.org/")


class Tunnel(Server):
    """A proxy that answers CONNECT by a connection to `port`, whatever host was asked for."""

    def __init__(self, port: int, status: str = "200 Connection established"):
        super().__init__(lambda _: b"")
        self.to, self.status = port, status

    def finish_request(self, request: socket.socket, client_address: object) -> None:  # type: ignore[override]
        self.heads.append(read_head(request))
        request.sendall(f"HTTP/1.1 {self.status}\r\n\r\n".encode())
        if not self.status.startswith("200"):
            return
        with socket.create_connection(("127.0.0.1", self.to)) as there:
            threading.Thread(target=pump, args=(request, there), daemon=True).start()
            pump(there, request)


def pump(source: socket.socket, sink: socket.socket) -> None:
    try:
        while piece := source.recv(65536):
            sink.sendall(piece)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        pass


@pytest.fixture
def secure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server of https://media.example.org, whose certificate is trusted."""
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
         "-keyout", key, "-out", certificate, "-days", "2", "-subj", "/CN=media.example.org",
         "-addext", "subjectAltName=DNS:media.example.org,IP:127.0.0.1,IP:::1"],
        check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server = Server(lambda _: reply(TEXT))
    server.socket = context.wrap_socket(server.socket, server_side=True)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    downloading.tls_context.cache_clear()
    with running(server):
        yield server
    downloading.tls_context.cache_clear()


def test_https_through_a_proxy_is_a_tunnel_whose_end_is_verified(secure: Server, monkeypatch: pytest.MonkeyPatch):
    with running(Tunnel(secure.port)) as proxy:
        monkeypatch.setenv("https_proxy", f"http://me:secret@127.0.0.1:{proxy.port}")
        assert by_library("https://media.example.org/a b") == TEXT
        assert proxy.targets == ["media.example.org:443"]
        assert "Proxy-Authorization" in proxy.heads[0]
        assert secure.targets == ["/a%20b"]
        assert "Proxy-Authorization" not in secure.heads[0]
        with pytest.raises(ValueError, match="certificate is not valid"):
            by_library("https://other.example.org/")
    with running(Tunnel(secure.port, "407 Proxy Authentication Required")) as proxy:
        monkeypatch.setenv("https_proxy", f"127.0.0.1:{proxy.port}")
        with pytest.raises(ValueError, match=r"by proxy '127.0.0.1' \(it answered 407 \(Proxy Auth") as caught:
            by_library("https://media.example.org/")
    assert "secret" not in str(caught.value)


def test_https_through_a_proxy_that_is_itself_reached_by_https(secure: Server, monkeypatch: pytest.MonkeyPatch):
    assert isinstance(secure.socket, ssl.SSLSocket)
    proxy = Tunnel(secure.port)
    proxy.socket = secure.socket.context.wrap_socket(proxy.socket, server_side=True)
    with running(proxy):
        monkeypatch.setenv("https_proxy", f"https://127.0.0.1:{proxy.port}")
        assert by_library("https://media.example.org/") == TEXT
    assert proxy.targets == ["media.example.org:443"]
    assert secure.targets == ["/"]


def test_a_proxy_is_asked_for_ipv6_addresses_in_brackets(secure: Server, monkeypatch: pytest.MonkeyPatch):
    """RFC 9112, 3.2.2 and 3.2.3, with the host of RFC 3986, 3.2.2."""
    with running(Tunnel(secure.port)) as tunnel, running(Server(lambda _: reply(TEXT))) as proxy:
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{tunnel.port}")
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.port}")
        for url in ("https://[::1]:8443/a", "http://[0:0::1]/a", "http://[::1]:81/a"):
            assert by_library(url) == TEXT
    assert tunnel.targets == ["[::1]:8443"]
    assert "\r\nHost: [::1]:8443\r\n" in secure.heads[0]
    assert proxy.targets == ["http://[::1]/a", "http://[::1]:81/a"]


def test_https_without_a_proxy(secure: Server):
    assert by_library(f"https://127.0.0.1:{secure.port}/") == TEXT
    with pytest.raises(ValueError, match="certificate is not valid"):
        by_library(f"https://localhost:{secure.port}/")


# ---- limits as options of the server ----


def policy_of(*options: str) -> MediaPolicy:
    """The policy that `deepstack-jax serve` makes of its options, for every role the same."""
    caught = []

    def keep(**arguments: object) -> MediaPolicy:
        caught.append(MediaPolicy(**arguments))  # type: ignore[arg-type]
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("deepstack_jax.serving.policy.MediaPolicy", keep)
        with pytest.raises(SystemExit) as end:
            main(["serve", "tiny-vl", *options])
    assert end.value.code == 130
    return caught[0]


LIMITS = ["--max-seconds", "7.5", "--max-decoded-pixels", "1000", "--max-items", "3", "--url-timeout", "0.25"]


@pytest.mark.parametrize("role", ["unified", "language", "encode"])
def test_limits_are_options_of_every_role(role: str):
    assert policy_of("--role", role) == MediaPolicy()
    changed = policy_of("--role", role, *LIMITS, "--max-bytes", "5", "--max-pixels", "6", "--max-frames", "7")
    assert changed == MediaPolicy(
        max_seconds=7.5,
        max_decoded_pixels=1000,
        max_items=3,
        timeout=0.25,
        max_bytes=5,
        max_pixels=6,
        max_frames=7,
    )


@pytest.mark.parametrize("option", OPTIONS.values())
@pytest.mark.parametrize("value", ["0", "-1", "nan", "many"])
def test_a_limit_that_is_not_above_zero_is_a_usage_error(option: str, value: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        main(["serve", "nowhere", option, value])
    assert end.value.code == 2
    assert option in capsys.readouterr().err


@pytest.mark.parametrize("field", OPTIONS)
@pytest.mark.parametrize("value", [0, -1, float("nan")])
def test_a_policy_has_no_limit_that_is_not_above_zero(field: str, value: float):
    with pytest.raises(ValueError, match=f"{OPTIONS[field]} .* is not above 0"):
        MediaPolicy(**{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("what", ["items", "bytes", "pixels", "frames", "seconds", "decoded pixels"])
def test_what_is_too_much_names_the_option_that_raises_the_limit(what: str):
    field = "max_" + what.replace(" ", "_")
    budget = Budget(MediaPolicy(**{field: 10}))  # type: ignore[arg-type]
    budget.spend(what, 10, "a.mp4")
    with pytest.raises(MediaError, match=rf"a\.mp4 needs 1 {what}: .* may have 10, .* a larger {OPTIONS[field]}$"):
        budget.spend(what, 1, "a.mp4")


def test_a_url_that_takes_too_long_names_the_option():
    with (
        running(Server(lambda _: time.sleep(2) or b"")) as server,
        pytest.raises(MediaError, match=r"did not arrive within 0\.2 s: .* a longer --url-timeout"),
    ):
        by_server(f"http://127.0.0.1:{server.port}/", timeout=0.2)


@pytest.mark.parametrize(
    ("pattern", "host", "allowed"),
    [
        ("bücher.example", "http://xn--bcher-kva.example/", True),
        ("xn--bcher-kva.example", "http://BÜCHER.example/", True),
        ("*.bücher.example", "http://a.bücher.example/", True),
        ("*.bücher.example", "http://bücher.example/", False),
        ("Example.ORG.", "http://example.org./", True),
        ("example.org", "http://example.org.evil.org/", False),
        ("[::1]", "http://[0:0::1]/", True),
        ("*", "http://例え.テスト/", True),
    ],
)
def test_allowed_domains_may_be_written_as_people_read_them(pattern: str, host: str, allowed: bool):
    policy = MediaPolicy(allowed_domains=(pattern,))
    assert policy.allows_domain(parse_url(host, host).host) is allowed


@pytest.mark.parametrize("pattern", ["", "*.", "https://example.org", "example.org/x", "example.org:80", "a b", "*.*"])
def test_what_is_no_domain_is_refused_when_the_server_starts(pattern: str):
    with pytest.raises(ValueError, match=r"is not a domain: write example\.org"):
        MediaPolicy(allowed_domains=(pattern,))
