"""Downloading over http and https: one exchange, which the library and the server share.

`download` trusts its caller: any address, any port, the environment's proxies. The server (`serving/fetch.py`) trusts
no request: it checks every URL and address, and opens its connections by itself.
"""

import asyncio
import re
import socket
import ssl
import zlib
from base64 import b64encode
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cache
from http import HTTPStatus
from ipaddress import IPv6Address
from threading import Thread
from typing import Any, NamedTuple, Protocol
from urllib.parse import quote, unquote, urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

import h11
import idna

TIMEOUT_SECONDS = 20.0
MAX_REDIRECTS = 10
MAX_ENCODINGS = 4  # of one body, one inside the other
MAX_MEMBERS = 4096  # of a gzip file: empty ones would cost time and give no bytes to count
CONNECT_SECONDS = 5.0  # for each address of a host but the last
_PIECE = 1 << 16
_REDIRECTS = (301, 302, 303, 307, 308)
_HOST = re.compile(r"(?=.{1,253}\Z)[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*")


class DownloadError(ValueError):
    """A download that failed; the message is one line with the reason, `status` what HTTP says of the request."""

    def __init__(self, message: str, status: int = 400):
        super().__init__(message)
        self.status = status


class ByteBudget(Protocol):
    """How much may still come."""

    @property
    def bytes(self) -> int: ...

    def spend(self, what: str, count: float, name: str) -> None:
        """Takes `count` of "bytes" for the source called `name`, or raises a ValueError that says what is too much."""
        ...


@dataclass(frozen=True)
class Target:
    """A URL taken apart; host and path are in the form in which they travel."""

    secure: bool
    host: str  # lower case ASCII, IPv6 addresses without brackets
    port: int
    path: str  # with the query

    @property
    def authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.secure else 80) else f"{host}:{self.port}"


class Stream(NamedTuple):
    """A connection on which a target can be asked for."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    request_target: str
    headers: tuple[tuple[str, str], ...] = ()  # sent beside the usual ones


Connect = Callable[[Target], Awaitable[Stream]]


def download(url: str, max_bytes: int, error: type[ValueError], timeout: float = TIMEOUT_SECONDS) -> bytes:
    """The body behind an http or https URL; redirects are followed, and the environment's proxies are used.

    It blocks, and it may be called while an event loop runs, as in a notebook.

    Args:
        url: characters beyond ASCII and spaces are encoded; what is percent-encoded already stays as it is.
        max_bytes: the most that the body may have once it is decompressed.
        error: the exception raised, with one line that names the URL and the reason.
        timeout: seconds for everything.
    """
    name, result = url_name(url), Future[bytes]()

    async def run() -> None:
        try:
            async with asyncio.timeout(timeout):
                connect = _direct_or_proxy(name)
                result.set_result(await fetch_body(url, name, _ByteLimit(max_bytes), connect, MAX_REDIRECTS))
        except BaseException as reason:
            result.set_exception(reason)

    # a daemon that is never joined: the system's resolver can't be interrupted, and may take longer than the time-out
    Thread(target=lambda: asyncio.run(run()), name="download", daemon=True).start()
    try:
        return result.result()
    except TimeoutError:
        raise error(f"{name} did not arrive within {timeout:g} s: download it first and pass its path") from None
    except DownloadError as reason:
        raise error(str(reason)) from None


async def fetch_body(url: str, name: str, budget: ByteBudget, connect: Connect, max_redirects: int) -> bytes:
    """The decompressed body behind a URL.

    Args:
        url: as its author wrote it.
        name: what messages call it.
        budget: what the body is taken from while it comes.
        connect: opens a connection for a target, or raises why that isn't allowed; asked again for each redirect.
        max_redirects: more are an error.

    Raises:
        DownloadError: with the reason; ValueErrors of `budget` and `connect` pass.
    """
    url = url.strip()
    for _ in range(max_redirects + 1):
        target = parse_url(url, name)
        stream = await connect(target)
        try:
            answer = await _exchange(target, stream, name, budget)
        except OSError as error:
            raise DownloadError(f"{name} can't be fetched ({explain(error)}): check the URL") from None
        finally:
            stream.writer.transport.abort()
        if isinstance(answer, bytes):
            return answer
        url = urljoin(url, answer.location)
    raise DownloadError(f"{name} redirects more than {max_redirects} times: give the final URL")


def url_name(url: str) -> str:
    """What messages call a URL: one line, never long."""
    url = url.strip()
    url = url if len(url) <= 120 else url[:60] + "..."
    return "".join(character if character.isprintable() else "?" for character in url)


def parse_url(url: str, name: str) -> Target:
    """Takes an http or https URL apart, and encodes its host by IDNA, its path and query as UTF-8 in %XX.

    Raises:
        DownloadError: what is wrong with it.
    """
    # urlsplit drops line ends and tabs, and others read a backslash as a slash: two readers, two hosts
    if any(character < " " or character in "\x7f\\" for character in url):
        raise DownloadError(f"{name} holds characters that no URL has: percent-encode them")
    try:
        parts = urlsplit(url)
        port, host = parts.port, parts.hostname or ""
        path = _percent_encoded(parts.path or "/", "/:@!$&'()*+,;=~")
        query = _percent_encoded(parts.query, "/?:@!$&'()*+,;=~[]")
    except ValueError:
        raise DownloadError(f"{name} is not a valid URL: check it") from None
    if parts.scheme not in ("http", "https"):
        raise DownloadError(f"{name} leads to a URL of scheme {parts.scheme!r}: only http and https are allowed", 403)
    if parts.username is not None or parts.password is not None:
        raise DownloadError(f"{name} holds a user name: leave it out")
    try:
        host = str(IPv6Address(host)) if ":" in host and "%" not in host else ascii_host(host)
    except ValueError:
        raise DownloadError(f"{name} has no valid host name ({host[:60]!r}): check the URL") from None
    secure = parts.scheme == "https"
    if port == 0:
        raise DownloadError(f"{name} leads to port 0, which does not exist: check the URL")
    return Target(secure, host, port or (443 if secure else 80), f"{path}?{query}" if query else path)


def ascii_host(host: str) -> str:
    """A host's name in lower case ASCII, without the dot at its end.

    Raises:
        ValueError: it isn't one.
    """
    # names of ASCII may have underscores, which IDNA refuses
    encoded = host.lower() if host.isascii() else idna.encode(host, uts46=True).decode()
    encoded = encoded.removesuffix(".")
    if not _HOST.fullmatch(encoded):
        raise ValueError(f"{host!r} is not a host name")
    return encoded


async def resolve_name(host: str, port: int) -> list[str]:
    """The addresses of a host, as the system's resolver gives them."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


async def open_stream(
    addresses: Sequence[str], port: int, tls: ssl.SSLContext | None, host: str
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connects to the first address that answers; TLS verifies `host`.

    Raises:
        OSError: the last one's.
    """
    for number, address in enumerate(addresses, 1):
        seconds = CONNECT_SECONDS if number < len(addresses) else None
        try:
            async with asyncio.timeout(seconds):
                return await asyncio.open_connection(address, port, ssl=tls, server_hostname=host if tls else None)
        except OSError:  # TLS's and the time-out's are OSErrors too
            if number == len(addresses):
                raise
    raise OSError(0, "the host has no address")


def explain(error: Exception) -> str:
    """What went wrong, without what the other side sent."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the certificate is not valid: {error.verify_message}"
    return (getattr(error, "strerror", None) or type(error).__name__)[:120]


@cache
def tls_context() -> ssl.SSLContext:
    """Verifies certificates against the system's authorities."""
    return ssl.create_default_context()


# one request and its answer


@dataclass(frozen=True)
class _Redirect:
    location: str


async def _exchange(target: Target, stream: Stream, name: str, budget: ByteBudget) -> bytes | _Redirect:
    connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=_PIECE)
    headers = [
        ("Host", target.authority),
        ("User-Agent", "deepstack-jax"),
        ("Accept", "*/*"),
        ("Accept-Encoding", "identity"),
        ("Connection", "close"),
        *stream.headers,
    ]
    request = h11.Request(method="GET", target=stream.request_target, headers=headers)
    for event in (request, h11.EndOfMessage()):
        stream.writer.write(connection.send(event) or b"")
    await stream.writer.drain()

    # of what comes, and of what each decoder but the last one gives
    most = 2 * budget.bytes + _PIECE
    body, raw, decoders = bytearray(), 0, []
    while True:
        event = _next_event(connection)
        if event is h11.NEED_DATA:
            piece = await stream.reader.read(_PIECE)
            raw += len(piece)
            if raw > most:  # headers, and the frames of tiny chunks, count as well
                raise DownloadError(f"{name} sends more than the bytes allowed: give a smaller file", 413)
            connection.receive_data(piece)
        elif isinstance(event, h11.Response):
            answer = _checked(event, name, budget)
            if isinstance(answer, _Redirect):
                return answer
            decoders = [_Inflater(encoding, name, most) for encoding in reversed(answer)]
        elif isinstance(event, h11.Data):
            for number, piece in enumerate(_decoded(decoders, bytes(event.data))):
                if number:  # a little that inflates to much leaves the loop to others, and to the time-out
                    await asyncio.sleep(0)
                budget.spend("bytes", len(piece), name)
                body += piece
        elif isinstance(event, h11.EndOfMessage):
            if not all(decoder.complete for decoder in decoders):
                raise DownloadError(f"{name} ended early: check the URL")
            if not body:
                raise DownloadError(f"{name} answered with an empty body: check the URL")
            return bytes(body)


def _next_event(connection: h11.Connection) -> Any:
    try:
        event = connection.next_event()
    except h11.RemoteProtocolError:
        _, ended = connection.trailing_data
        raise OSError(0, "the answer ended early" if ended else "the answer is not valid HTTP") from None
    if isinstance(event, h11.ConnectionClosed):
        raise OSError(0, "the answer ended early")
    return event


def _checked(response: h11.Response, name: str, budget: ByteBudget) -> _Redirect | list[str]:
    """Refuses a response by its head. Gives a redirect, or the body's encodings in the order of their application."""
    fields: dict[str, list[str]] = {}
    for key, value in response.headers:
        fields.setdefault(key.decode("latin-1"), []).append(_text(value))
    if response.status_code in _REDIRECTS and fields.get("location", [""])[0]:
        return _Redirect(fields["location"][0].strip())
    if response.status_code != 200:
        raise DownloadError(f"{name} answered {_status(response.status_code)}: check the URL")
    named = [word.strip().lower() for value in fields.get("content-encoding", []) for word in value.split(",")]
    encodings = [encoding.removeprefix("x-") for encoding in named if encoding not in ("", "identity")]
    if unknown := [encoding for encoding in encodings if encoding not in ("gzip", "deflate")]:
        what = "".join(filter(str.isprintable, unknown[0][:20]))
        raise DownloadError(f"{name} comes compressed ({what}), and only gzip and deflate are read: serve it as it is")
    if len(encodings) > MAX_ENCODINGS:
        raise DownloadError(f"{name} comes compressed {len(encodings)} times: serve the file as it is")
    length = int(fields.get("content-length", ["0"])[0])  # h11 has checked that it is a number
    if not encodings and length > budget.bytes:
        budget.spend("bytes", length, name)
    return encodings


class _Inflater:
    """Decompresses gzip, or deflate with or without zlib's header, in pieces of bounded size.

    Attributes:
        complete: what has come is whole, or nothing has come.
    """

    def __init__(self, encoding: str, name: str, most: int):
        self.complete = True
        self._encoding, self._name, self._left = encoding, name, most
        self._waiting, self._members = b"", 0
        self._stream: zlib._Decompress | None = None

    def feed(self, data: bytes) -> Iterator[bytes]:
        """What comes out once `data` has gone in, as it is asked for."""
        data, self._waiting, full = self._waiting + data, b"", False
        while data or full:  # after a full piece there may be more of it inside
            if self._stream is None:
                if len(data) < 2:  # two bytes tell what follows
                    self._waiting, self.complete = data, self._members > 0
                    return
                self._stream = self._next_member(data)
                if self._stream is None:
                    return
                self.complete = False
            piece, data = self._inflate(self._stream, data)
            full = len(piece) == _PIECE and not self.complete
            yield piece

    def _inflate(self, stream: "zlib._Decompress", data: bytes) -> tuple[bytes, bytes]:
        """(what comes out, what is still to go in)."""
        try:
            piece = stream.decompress(data, _PIECE)
        except zlib.error:
            raise DownloadError(f"{self._name} has a damaged {self._encoding} body: check the URL") from None
        self._left -= len(piece)
        if self._left < 0:
            raise DownloadError(f"{self._name} inflates to more than the bytes allowed: give a smaller file", 413)
        if not stream.eof:
            return piece, stream.unconsumed_tail
        self._stream, self.complete = None, True
        return piece, stream.unused_data

    def _next_member(self, start: bytes) -> "zlib._Decompress | None":
        """None if what follows is padding."""
        self._members += 1
        if self._members > MAX_MEMBERS:
            raise DownloadError(f"{self._name} comes in more than {MAX_MEMBERS} gzip members: serve it as it is", 413)
        if self._encoding == "gzip":
            return zlib.decompressobj(31) if self._members == 1 or start.startswith(b"\x1f\x8b") else None
        if self._members > 1:
            return None
        # RFC 1950: the method is 8, and the two bytes are a multiple of 31; many servers send RFC 1951 without them
        has_header = start[0] & 15 == 8 and int.from_bytes(start[:2], "big") % 31 == 0
        return zlib.decompressobj(15 if has_header else -15)


def _decoded(decoders: Sequence[_Inflater], data: bytes) -> Iterator[bytes]:
    if not decoders:
        yield data
        return
    for piece in decoders[0].feed(data):
        yield from _decoded(decoders[1:], piece)


def _percent_encoded(text: str, safe: str) -> str:
    """A `%` that begins no %XX is one that was meant as it stands."""
    return quote(re.sub(r"%(?![0-9A-Fa-f]{2})", "%25", text), safe=safe + "%")


def _text(value: bytes) -> str:
    """A header as its server meant it: many write UTF-8."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1")


def _status(code: int) -> str:
    try:
        return f"{code} ({HTTPStatus(code).phrase})"
    except ValueError:
        return str(code)


# what only the library does


class _ByteLimit:
    def __init__(self, most: int):
        self.bytes, self._most = most, most

    def spend(self, what: str, count: float, name: str) -> None:
        self.bytes -= int(count)
        if self.bytes < 0:
            raise DownloadError(f"{name} holds more than {self._most} {what}: pass a smaller file", 413)


def _direct_or_proxy(name: str) -> Connect:
    """Opens connections as the environment says (`http_proxy`, `https_proxy`, `no_proxy`)."""
    proxies = getproxies()

    async def connect(target: Target) -> Stream:
        proxy = proxies.get("https" if target.secure else "http")
        tls = tls_context() if target.secure else None
        if not proxy or proxy_bypass(target.authority):
            return Stream(*await _open(target.host, target.port, tls, "host", name), target.path)
        host, port, proxy_tls, headers = _parse_proxy(proxy, name)
        if tls is None:
            url = f"http://{target.authority}{target.path}"
            return Stream(*await _open(host, port, proxy_tls, "proxy", name), url, headers)
        reader, writer = await _open(host, port, None, "proxy", name)
        try:
            await _tunnel(reader, writer, target, headers)
            await writer.start_tls(tls, server_hostname=target.host)
        except OSError as error:
            writer.transport.abort()
            raise DownloadError(f"{name} can't be fetched by proxy {host!r} ({explain(error)}): check both") from None
        except BaseException:
            writer.transport.abort()
            raise
        return Stream(reader, writer, target.path)

    return connect


async def _open(
    host: str, port: int, tls: ssl.SSLContext | None, what: str, name: str
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    try:
        addresses = await resolve_name(host, port)
    except (OSError, UnicodeError):
        raise DownloadError(f"{name}: the {what} {host!r} can't be resolved: check the {_REMEDY[what]}") from None
    try:
        return await open_stream(addresses, port, tls, host)
    except OSError as error:
        reason = f"no connection to the {what} {host!r} port {port} ({explain(error)})"
        raise DownloadError(f"{name} can't be fetched: {reason}: check the {_REMEDY[what]}") from None


_REMEDY = {"host": "URL", "proxy": "environment's http_proxy and https_proxy"}


def _parse_proxy(proxy: str, name: str) -> tuple[str, int, ssl.SSLContext | None, tuple[tuple[str, str], ...]]:
    """(host, port, TLS to it for a plain URL, headers)."""
    try:
        parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        host, port = parts.hostname or "", parts.port
    except ValueError:
        host, port, parts = "", None, urlsplit("http://")
    if parts.scheme not in ("http", "https") or not host:
        raise DownloadError(f"{name}: the environment's proxy is not one of http: set http_proxy or no_proxy anew")
    headers = ()
    if parts.username is not None:
        user = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        headers = (("Proxy-Authorization", "Basic " + b64encode(user.encode()).decode()),)
    secure = parts.scheme == "https"
    return host, port or (443 if secure else 80), tls_context() if secure else None, headers


async def _tunnel(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, target: Target, headers: tuple[tuple[str, str], ...]
) -> None:
    """Asks a proxy for a connection to the target."""
    connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=_PIECE)
    host = f"[{target.host}]" if ":" in target.host else target.host
    there = f"{host}:{target.port}"
    request = h11.Request(method="CONNECT", target=there, headers=[("Host", there), *headers])
    for event in (request, h11.EndOfMessage()):
        writer.write(connection.send(event) or b"")
    await writer.drain()
    while not isinstance(event := _next_event(connection), h11.Response):
        if event is h11.NEED_DATA:
            connection.receive_data(await reader.read(_PIECE))
    if not 200 <= event.status_code < 300:
        raise OSError(0, f"it answered {_status(event.status_code)}")
