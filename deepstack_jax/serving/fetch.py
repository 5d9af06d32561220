"""Fetches URLs of requests: from allowed domains and checked addresses only, with bounds on bytes and time.

A name is resolved once and every address checked; the connection is made to a checked address, and TLS verifies the
name. Therefore a name that resolves differently the next time (DNS rebinding) gains nothing. Redirects are followed by
hand, each as if it were a new URL. Proxies of the environment are not used: they would resolve names themselves.
"""

import asyncio
import ipaddress
from collections.abc import Sequence

from deepstack_jax.processing.download import Resolve, fetch_body
from deepstack_jax.processing.resolver import resolve_name
from deepstack_jax.processing.urls import DownloadError, url_name
from deepstack_jax.serving.policy import Budget, MediaError, MediaPolicy

MAX_REDIRECTS = 3


async def fetch(url: str, policy: MediaPolicy, budget: Budget, resolve: Resolve = resolve_name) -> bytes:
    """The body behind a URL.

    Raises:
        MediaError: a domain, port or address that isn't allowed; too many bytes, redirects or seconds; no 200.
    """
    name = url_name(url)

    async def checked_addresses(host: str, port: int) -> Sequence[str]:
        _check_allowed(host, port, name, policy)
        addresses = await resolve(host, port)
        # all of them: a name with one good and one bad address is not an accident
        if not all(is_public(address) or policy.allows_address(address) for address in addresses):
            raise MediaError(f"{name}: {host!r} has an address that is not public: send a data URI", 403)
        return addresses

    try:
        async with asyncio.timeout(policy.timeout):
            return await fetch_body(url, name, budget, checked_addresses, MAX_REDIRECTS)
    except TimeoutError:
        remedy = "send a data URI, or start the server with a longer --url-timeout"
        raise MediaError(f"{name} did not arrive within {policy.timeout:g} s: {remedy}") from None
    except DownloadError as error:
        raise MediaError(str(error), error.status) from None


def is_public(address: str) -> bool:
    """Whether an address is one of the public Internet; if it stands for one of version 4, whether that one is."""
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


_NAT64 = ipaddress.ip_network("64:ff9b::/96")
# addresses that Python calls global and that are not public: Oracle's metadata (192.0.0.192) among the protocols'
# addresses, the host agent of Azure, relays of 6to4
_NEVER = tuple(map(ipaddress.ip_network, ("192.0.0.0/24", "168.63.129.16/32", "192.88.99.0/24")))


def _check_allowed(host: str, port: int, name: str, policy: MediaPolicy) -> None:
    if not policy.allows_domain(host):
        raise MediaError(f"{name} leads to {host!r}, which is not an allowed domain: send a data URI", 403)
    if port not in policy.allowed_ports:
        raise MediaError(f"{name} leads to port {port}, which is not allowed: use {policy.allowed_ports}", 403)
