"""Refuses requests that name another host: a page whose name was made to resolve to this server (DNS rebinding)."""

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from deepstack_jax.processing.urls import ascii_host
from deepstack_jax.serving.errors import RequestError, error_response

ANY = "*"
WILDCARDS = ("0.0.0.0", "::")


@dataclass(frozen=True)
class HostRule:
    """The names to which a server answers.

    Addresses need no entry, because a rebinding attack needs a name: a server on a loopback address answers to loopback
    addresses, another one to any.
    """

    names: frozenset[str]
    loopback: bool

    @staticmethod
    def of(host: str, loopback: bool, more: Iterable[str] = ()) -> "HostRule":
        """The rule of a server that listens on `host`; `more` names are allowed, "*" for all.

        Raises:
            ValueError: one of them is neither a name nor an address.
        """
        own = () if loopback or host in WILDCARDS else (host,)
        return HostRule(frozenset(map(_canonical, ("localhost", *own, *more))), loopback)

    def allows(self, host: str) -> bool:
        """Whether the server answers to a `Host` header."""
        if ANY in self.names:
            return True
        parts = _AUTHORITY.fullmatch(host)  # the whole of it: a name before an "@" or behind a "]" is another host
        try:
            name = _canonical(parts["bracketed"] or parts["name"]) if parts else ""
            return name in self.names or self._allows_address(ipaddress.ip_address(name))
        except ValueError:
            return False

    def _allows_address(self, address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
        if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
            address = address.ipv4_mapped
        return address.is_loopback or not self.loopback


_AUTHORITY = re.compile(r"(?:\[(?P<bracketed>[0-9A-Fa-f:.]*:[^\[\]]*)\]|(?P<name>[^\[\]:@/?#\\\s]+))(?::[0-9]*)?")


def _canonical(name: str) -> str:
    """A name or an address in the one form in which they are compared."""
    if name == ANY:
        return name
    try:
        return str(ipaddress.ip_address(name))
    except ValueError:
        pass
    try:
        return ascii_host(name)
    except ValueError:
        raise ValueError(f"{name!r} is neither a host name nor an address: leave out scheme, port and path") from None


class HostMiddleware:
    """Refuses what names another host. A request without `Host` comes from no browser."""

    def __init__(self, app: ASGIApp, rule: HostRule):
        self._app, self._rule = app, rule

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        host = Headers(scope=scope).get("host") if scope["type"] == "http" else None
        if host is not None and not self._rule.allows(host):
            message = f"host {host[:100]!r} is not this server's: use its address, or serve with --allow-host"
            await error_response(RequestError(message, 403, code="host_refused"))(scope, receive, send)
            return
        await self._app(scope, receive, send)
