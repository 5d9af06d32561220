"""Downloads over http and https; the library and the server share this code.

httpcore implements HTTP, TLS and proxies; this module opens connections, follows redirects and limits bytes.
`download` trusts its caller: it allows any address and port and uses the environment's proxies. The server
(`serving/fetch.py`) does not trust requests: it checks every host, port and address.
"""

import asyncio
import ssl
import zlib
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from functools import cache, partial
from http import HTTPStatus
from threading import Thread
from typing import Protocol
from urllib.parse import unquote, urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

import httpcore

from deepstack_jax.processing.resolver import resolve_name
from deepstack_jax.processing.urls import DownloadError, Target, parse_url, url_name

TIMEOUT_SECONDS = 20.0
MAX_REDIRECTS = 10
MAX_ENCODINGS = 4  # nested encodings of one body
MAX_MEMBERS = 4096  # members of a gzip file: empty ones cost time but yield no bytes to count
CONNECT_SECONDS = 5.0  # time-out for each address of a host except the last
_PIECE = 1 << 16
_HEADERS = {"User-Agent": "deepstack-jax", "Accept": "*/*", "Accept-Encoding": "identity", "Connection": "close"}
_REDIRECTS = (301, 302, 303, 307, 308)


class ByteBudget(Protocol):
    """How many bytes may still arrive."""

    @property
    def bytes(self) -> int: ...

    def spend(self, what: str, count: float, name: str) -> None:
        """Subtracts `count` of `what` ("bytes") for the source `name`; raises a ValueError if too few are left."""
        ...


Resolve = Callable[[str, int], Awaitable[Sequence[str]]]  # (host, port) to addresses


def download(url: str, max_bytes: int, error: type[ValueError], timeout: float = TIMEOUT_SECONDS) -> bytes:
    """Returns the body of an http or https URL, following redirects and using the environment's proxies.

    The call blocks. It may be made while an event loop runs, as in a notebook.

    Args:
        url: non-ASCII characters and spaces are encoded; percent-encoded ones stay as they are.
        max_bytes: the maximum size of the decompressed body.
        error: the exception raised, with one line that names the URL and the reason.
        timeout: seconds for the whole download.
    """
    name, result = url_name(url), Future[bytes]()

    async def run() -> None:
        try:
            async with asyncio.timeout(timeout):
                budget, find_proxy = _ByteLimit(max_bytes), partial(_proxy_of, name)
                result.set_result(await fetch_body(url, name, budget, resolve_name, MAX_REDIRECTS, find_proxy))
        except BaseException as reason:
            result.set_exception(reason)

    def in_loop() -> None:
        coroutine = run()
        try:
            asyncio.run(coroutine)
        except OSError as reason:  # a loop needs descriptors
            coroutine.close()
            result.set_exception(reason)

    # a daemon thread, because the caller may already run an event loop, and nobody joins it after an interrupt
    Thread(target=in_loop, name="download", daemon=True).start()
    try:
        return result.result()
    except TimeoutError:
        raise error(f"{name} did not arrive within {timeout:g} s: download it first and pass its path") from None
    except DownloadError as reason:
        raise error(str(reason)) from None


async def fetch_body(
    url: str,
    name: str,
    budget: ByteBudget,
    resolve: Resolve,
    max_redirects: int,
    find_proxy: Callable[[Target], httpcore.Proxy | None] = lambda target: None,
) -> bytes:
    """Returns the decompressed body of a URL.

    Args:
        url: the URL as the user wrote it.
        name: its name in messages.
        budget: bytes are subtracted from it as they arrive.
        resolve: called for each connection; returns the addresses that it may use, or raises if none is allowed.
        max_redirects: the maximum number of redirects.
        find_proxy: returns the proxy for a target, if any; the proxy's host is then resolved instead of the target's.

    Raises:
        DownloadError: the download failed. ValueErrors of `budget` and `resolve` are passed on.
    """
    url = url.strip()
    for _ in range(max_redirects + 1):
        target = parse_url(url, name)
        proxy = find_proxy(target)
        network = _Network(resolve, budget, name, "proxy" if proxy else "host")
        try:
            answer = await _exchange(target, proxy, network, name, budget)
        except (OSError, httpcore.RemoteProtocolError, httpcore.ProxyError) as error:
            way, remedy = (f" by proxy {proxy.url.host.decode()!r}", "both") if proxy else ("", "the URL")
            what = f"{name} can't be fetched{way} ({_explain(error, network.ended)})"
            raise DownloadError(f"{what}: check {remedy}") from None
        finally:
            await network.aclose()
        if isinstance(answer, bytes):
            return answer
        url = urljoin(url, answer)
    raise DownloadError(f"{name} redirects more than {max_redirects} times: give the final URL")


@cache
def tls_context() -> ssl.SSLContext:
    """Returns a context that verifies certificates against the system's authorities."""
    return ssl.create_default_context()


# one request and its response


async def _exchange(
    target: Target, proxy: httpcore.Proxy | None, network: "_Network", name: str, budget: ByteBudget
) -> bytes | str:
    """Returns the body, or the location of a redirect."""
    headers = [("Host", target.authority), *_HEADERS.items()]
    tls = tls_context() if target.secure else None
    async with (
        httpcore.AsyncConnectionPool(tls, proxy, network_backend=network) as pool,
        pool.stream("GET", _httpcore_url(target), headers=headers) as response,
    ):
        answer = _checked(response, name, budget)
        if isinstance(answer, str):
            return answer
        decoders = [_Inflater(encoding, name, network.most) for encoding in reversed(answer)]
        return await _read_body(response, decoders, name, budget)


async def _read_body(response: httpcore.Response, decoders: "list[_Inflater]", name: str, budget: ByteBudget) -> bytes:
    body = bytearray()
    async for data in response.aiter_stream():
        for number, piece in enumerate(_decoded(decoders, data)):
            if number:  # let other tasks and the time-out run while a small input inflates to a large output
                await asyncio.sleep(0)
            budget.spend("bytes", len(piece), name)
            body += piece
    if not all(decoder.complete for decoder in decoders):
        raise DownloadError(f"{name} ended early: check the URL")
    if not body:
        raise DownloadError(f"{name} answered with an empty body: check the URL")
    return bytes(body)


def _httpcore_url(target: Target) -> httpcore.URL:
    """Returns the URL with brackets around an IPv6 address, which httpcore omits in requests to a proxy."""
    port = None if target.authority == target.url_host else target.port
    scheme = b"https" if target.secure else b"http"
    return httpcore.URL(scheme=scheme, host=target.url_host.encode(), port=port, target=target.path.encode())


def _checked(response: httpcore.Response, name: str, budget: ByteBudget) -> str | list[str]:
    """Checks a response's head; returns the location of a redirect, or the body's encodings in order of application."""
    fields: dict[str, list[str]] = {}
    for key, value in response.headers:
        fields.setdefault(key.decode("latin-1").lower(), []).append(_text(value))
    if response.status in _REDIRECTS and fields.get("location", [""])[0]:
        return fields["location"][0].strip()
    if response.status != 200:
        raise DownloadError(f"{name} answered {_status(response.status)}: check the URL")
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
        complete: whether the input so far is complete or empty.
    """

    def __init__(self, encoding: str, name: str, most: int):
        self.complete = True
        self._encoding, self._name, self._left = encoding, name, most
        self._waiting, self._members = b"", 0
        self._stream: zlib._Decompress | None = None

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Takes `data` and lazily yields the decompressed pieces."""
        data, self._waiting, full = self._waiting + data, b"", False
        while data or full:  # after a full piece, the decompressor may hold more output
            if self._stream is None:
                if len(data) < 2:  # it takes two bytes to recognise what follows
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
        """Returns (decompressed bytes, input that is left)."""
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
        """Returns a decompressor for the next member, or None if only padding follows."""
        self._members += 1
        if self._members > MAX_MEMBERS:
            raise DownloadError(f"{self._name} comes in more than {MAX_MEMBERS} gzip members: serve it as it is", 413)
        if self._encoding == "gzip":
            return zlib.decompressobj(31) if self._members == 1 or start.startswith(b"\x1f\x8b") else None
        if self._members > 1:
            return None
        # RFC 1950: the method is 8 and the two bytes are a multiple of 31; many servers send RFC 1951, without a header
        has_header = start[0] & 15 == 8 and int.from_bytes(start[:2], "big") % 31 == 0
        return zlib.decompressobj(15 if has_header else -15)


def _decoded(decoders: Sequence[_Inflater], data: bytes) -> Iterator[bytes]:
    if not decoders:
        yield data
        return
    for piece in decoders[0].feed(data):
        yield from _decoded(decoders[1:], piece)


def _explain(error: Exception, ended: bool = False) -> str:
    """Describes an error without repeating what the server sent; `ended` tells whether it closed the connection."""
    if isinstance(error, httpcore.ProxyError):  # its message begins with the status
        return f"it answered {_status(int(str(error).split()[0]))}"
    if isinstance(error, httpcore.RemoteProtocolError):
        return "the answer ended early" if ended else "the answer is not valid HTTP"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the certificate is not valid: {error.verify_message}"
    return (getattr(error, "strerror", None) or type(error).__name__)[:120]


def _text(value: bytes) -> str:
    """Decodes a header's value: as UTF-8, which many servers send, otherwise as Latin-1."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1")


def _status(code: int) -> str:
    try:
        return f"{code} ({HTTPStatus(code).phrase})"
    except ValueError:
        return str(code)


# connections


class _Network(httpcore.AsyncNetworkBackend):
    """Opens the connection of one exchange, to an address that `resolve` returns.

    Attributes:
        most: how many bytes may arrive, including headers and the framing of chunks.
    """

    def __init__(self, resolve: Resolve, budget: ByteBudget, name: str, role: str):
        self.most = 2 * budget.bytes + _PIECE
        self._resolve, self._name, self._role = resolve, name, role
        self._stream: _Stream | None = None

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        host = host.strip("[]")
        addresses = await self._addresses(host, port)
        for number, address in enumerate(addresses, 1):
            last = number == len(addresses)
            try:
                async with asyncio.timeout(None if last else CONNECT_SECONDS):
                    opened = await asyncio.open_connection(address, port)
                self._stream = _Stream(*opened, self.most, self._name)
                return self._stream
            except OSError as error:  # includes TimeoutError
                if last:
                    reason = f"no connection to the {self._role} {host!r} port {port} ({_explain(error)})"
                    raise self._error(f" can't be fetched: {reason}") from None
        raise self._error(f": the {self._role} {host!r} can't be resolved")

    @property
    def ended(self) -> bool:
        """Whether the other side has closed the connection."""
        return self._stream is not None and self._stream.ended

    async def aclose(self) -> None:
        """Closes the connection: httpcore leaves it open if TLS fails."""
        if self._stream:
            await self._stream.aclose()

    async def _addresses(self, host: str, port: int) -> Sequence[str]:
        try:
            return await self._resolve(host, port)
        except (OSError, UnicodeError):
            return ()

    def _error(self, reason: str) -> DownloadError:
        remedy = "URL" if self._role == "host" else "environment's http_proxy and https_proxy"
        return DownloadError(f"{self._name}{reason}: check the {remedy}")


class _Stream(httpcore.AsyncNetworkStream):
    """An asyncio connection. It ignores httpcore's time-outs, because one time-out limits the whole download."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, most: int, name: str):
        self.ended = False
        self._reader, self._writer, self._left, self._name = reader, writer, most, name

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        piece = await self._reader.read(max_bytes)
        self.ended = not piece
        self._left -= len(piece)
        if self._left < 0:
            raise DownloadError(f"{self._name} sends more than the bytes allowed: give a smaller file", 413)
        return piece

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._writer.write(buffer)
        await self._writer.drain()

    async def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.AsyncNetworkStream:
        await self._writer.start_tls(ssl_context, server_hostname=(server_hostname or "").strip("[]"))
        return self

    async def aclose(self) -> None:
        self._writer.transport.abort()


# used only by the library


class _ByteLimit:
    def __init__(self, most: int):
        self.bytes, self._most = most, most

    def spend(self, what: str, count: float, name: str) -> None:
        self.bytes -= int(count)
        if self.bytes < 0:
            raise DownloadError(f"{name} holds more than {self._most} {what}: pass a smaller file", 413)


def _proxy_of(name: str, target: Target) -> httpcore.Proxy | None:
    """Returns the environment's proxy for a target (`http_proxy`, `https_proxy`, `no_proxy`), if any."""
    setting = getproxies().get("https" if target.secure else "http")
    if not setting or proxy_bypass(target.authority):
        return None
    try:
        parts = urlsplit(setting if "://" in setting else f"http://{setting}")
        proxy = parse_url(f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}", name)
    except ValueError:
        remedy = "correct http_proxy, https_proxy or no_proxy"
        raise DownloadError(f"{name}: the environment's proxy is not one of http: {remedy}") from None
    login = unquote(parts.username or "").encode(), unquote(parts.password or "").encode()
    tls = tls_context() if proxy.secure else None
    return httpcore.Proxy(_httpcore_url(proxy), None if parts.username is None else login, ssl_context=tls)
