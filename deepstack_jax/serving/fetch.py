"""Fetching a URL that a stranger named: allowed domains, checked addresses, bounded bytes and time.

A name is resolved once and every address checked; the connection is made to a checked address, and TLS verifies the
name. So a name that resolves differently the next time (DNS rebinding) gains nothing. Redirects are followed by hand,
each as if it were a new URL. Proxies of the environment are not used: they would resolve names themselves.
"""

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import cache
from urllib.parse import quote, urljoin, urlsplit

import h11

from deepstack_jax.processing.sources import describe
from deepstack_jax.serving.policy import Budget, MediaError, MediaPolicy

MAX_REDIRECTS = 3
_REDIRECTS = (301, 302, 303, 307, 308)
_PIECE = 1 << 16

Resolver = Callable[[str, int], Awaitable[list[str]]]


async def resolve_name(host: str, port: int) -> list[str]:
    """The addresses of a host, as the system's resolver gives them."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


async def fetch(url: str, policy: MediaPolicy, budget: Budget, resolve: Resolver = resolve_name) -> bytes:
    """The body behind a URL.

    Raises:
        MediaError: a domain, port or address that isn't allowed; too many bytes, redirects or seconds; no 200.
    """
    name = describe(url)
    try:
        async with asyncio.timeout(policy.timeout):
            for _ in range(MAX_REDIRECTS + 1):
                target = _target(url, name, policy)
                addresses = await _addresses(target, name, policy, resolve)
                answer = await _get(target, addresses, name, budget)
                if isinstance(answer, bytes):
                    return answer
                url = urljoin(url, answer.location)
    except TimeoutError:
        raise MediaError(f"{name} did not arrive within {policy.timeout:g} s: send a data URI") from None
    raise MediaError(f"{name} redirects more than {MAX_REDIRECTS} times: send the final URL")


def is_public(address: str) -> bool:
    """Whether an address is one of the public Internet; where it stands for one of version 4, whether that one is."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            return is_public(str(ip.ipv4_mapped))
        if ip in _NAT64:
            return is_public(str(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)))
        if ip.sixtofour is not None or ip.teredo is not None:  # tunnels, used by no server today
            return False
        if ip.is_site_local:
            return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved and not any(ip in net for net in _NEVER)


@dataclass(frozen=True)
class _Target:
    """A URL taken apart and found to be allowed."""

    secure: bool
    host: str
    port: int
    path: str


@dataclass(frozen=True)
class _Redirect:
    location: str


_NAT64 = ipaddress.ip_network("64:ff9b::/96")
# what Python calls global and is not for us: Oracle's metadata (192.0.0.192) among the protocols' addresses, the host
# agent of Azure, relays of 6to4
_NEVER = tuple(map(ipaddress.ip_network, ("192.0.0.0/24", "168.63.129.16/32", "192.88.99.0/24")))


def _target(url: str, name: str, policy: MediaPolicy) -> _Target:
    # urlsplit drops line ends and tabs, and others read a backslash as a slash: two readers, two hosts
    if any(character <= " " or character in "\x7f\\" for character in url):
        raise MediaError(f"{name} holds characters that no URL has: percent-encode them")
    try:
        parts = urlsplit(url)
        port = parts.port
        host = (parts.hostname or "").encode("idna").decode().lower().rstrip(".")
    except ValueError:
        raise MediaError(f"{name} is not a valid URL: check it") from None
    if parts.scheme not in ("http", "https"):
        raise MediaError(f"{name} leads to a URL of scheme {parts.scheme!r}: only http and https are allowed", 403)
    if parts.username is not None or parts.password is not None:
        raise MediaError(f"{name} holds a user name: leave it out")
    if not host or not policy.allows_domain(host):
        raise MediaError(f"{name} leads to {host!r}, which is not an allowed domain: send a data URI", 403)
    port = port or (443 if parts.scheme == "https" else 80)
    if port not in policy.allowed_ports:
        raise MediaError(f"{name} leads to port {port}, which is not allowed: use {policy.allowed_ports}", 403)
    path = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
    query = f"?{quote(parts.query, safe="/?%:@!$&'()*+,;=~-._[]")}" if parts.query else ""
    return _Target(parts.scheme == "https", host, port, path + query)


async def _addresses(target: _Target, name: str, policy: MediaPolicy, resolve: Resolver) -> list[str]:
    try:
        addresses = await resolve(target.host, target.port)
    except (OSError, UnicodeError):
        addresses = []
    if not addresses:
        raise MediaError(f"{name}: the host {target.host!r} can't be resolved: check the URL")
    # all of them: a name with one good and one bad address is no accident
    if not all(is_public(address) or policy.allows_address(address) for address in addresses):
        raise MediaError(f"{name}: {target.host!r} has an address that is not public: send a data URI", 403)
    return addresses


async def _get(target: _Target, addresses: list[str], name: str, budget: Budget) -> bytes | _Redirect:
    reason: Exception | None = None
    for address in addresses:
        try:
            reader, writer = await asyncio.open_connection(
                address,
                target.port,
                ssl=_tls() if target.secure else None,
                server_hostname=target.host if target.secure else None,
            )
        except (OSError, ssl.SSLError) as error:
            reason = error
            continue
        try:
            return await _exchange(target, reader, writer, name, budget)
        except (OSError, h11.ProtocolError) as error:
            raise MediaError(f"{name} can't be fetched ({_short(error)}): check the URL") from None
        finally:
            writer.transport.abort()
    raise MediaError(f"{name}: no connection to {target.host!r} ({_short(reason)}): check the URL")


async def _exchange(
    target: _Target, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, name: str, budget: Budget
) -> bytes | _Redirect:
    connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=_PIECE)
    host = f"[{target.host}]" if ":" in target.host else target.host
    default = target.port == (443 if target.secure else 80)
    headers = {
        "Host": host if default else f"{host}:{target.port}",
        "User-Agent": "deepstack-jax",
        "Accept-Encoding": "identity",
        "Connection": "close",
    }
    request = h11.Request(method="GET", target=target.path, headers=list(headers.items()))
    for event in (request, h11.EndOfMessage()):
        writer.write(connection.send(event) or b"")
    await writer.drain()

    body, raw, most = bytearray(), 0, 2 * budget.bytes + _PIECE
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            piece = await reader.read(_PIECE)
            raw += len(piece)
            if raw > most:  # headers, and the frames of tiny chunks, count as well
                raise MediaError(f"{name} sends more than the bytes allowed: send a smaller file", 413)
            connection.receive_data(piece)
        elif isinstance(event, h11.Response):
            if isinstance(answer := _checked(event, name, budget), _Redirect):
                return answer
        elif isinstance(event, h11.Data):
            budget.spend("bytes", len(event.data), name)
            body += event.data
        elif isinstance(event, h11.EndOfMessage):
            return bytes(body)
        elif not isinstance(event, h11.InformationalResponse):
            raise MediaError(f"{name} ended early: check the URL")


def _checked(response: h11.Response, name: str, budget: Budget) -> _Redirect | None:
    """Refuses a response by its head; a redirect is given back."""
    headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in response.headers}
    if response.status_code in _REDIRECTS and headers.get("location"):
        return _Redirect(headers["location"])
    if response.status_code != 200:
        raise MediaError(f"{name} answered {response.status_code}: check the URL")
    if headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
        raise MediaError(f"{name} comes compressed ({headers['content-encoding'][:20]}): serve the file as it is")
    if int(headers.get("content-length", 0)) > budget.bytes:  # h11 has checked that it is a number
        budget.spend("bytes", int(headers["content-length"]), name)
    return None


@cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


def _short(error: Exception | None) -> str:
    """What went wrong, without what the other side sent."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the certificate is not valid: {error.verify_message}"
    return (getattr(error, "strerror", None) or type(error).__name__)[:120]
