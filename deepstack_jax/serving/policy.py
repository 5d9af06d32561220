"""Limits on the images and videos that a server accepts."""

import asyncio
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address, ip_network
from pathlib import Path

from deepstack_jax.processing.media import MediaError
from deepstack_jax.processing.urls import ascii_host

# fields of a MediaPolicy that bound something, and the server's options that set them
OPTIONS = {
    "max_items": "--max-items",
    "max_bytes": "--max-bytes",
    "max_pixels": "--max-pixels",
    "max_frames": "--max-frames",
    "max_seconds": "--max-seconds",
    "max_decoded_pixels": "--max-decoded-pixels",
    "timeout": "--url-timeout",
}


@dataclass(frozen=True)
class MediaPolicy:
    """What is taken. The default takes only data URIs. Amounts are those of all media of one request together."""

    allowed_domains: tuple[str, ...] = ()  # "example.org", "*.example.org" (not the apex), "*"
    allowed_folder: Path | None = None  # paths under it, symbolic links followed first
    allow_data: bool = True
    max_items: int = 32  # images and videos
    max_bytes: int = 32 << 20  # as they come, before decoding
    max_pixels: int = 64 << 20  # of images as they are, and of videos as they are resized for the encoder
    max_frames: int = 7200  # of videos, sampled or not: all up to the last sampled one are decoded
    max_seconds: float = 600.0  # of videos
    max_decoded_pixels: int = 8_000_000_000  # of all frames of videos: about two minutes of 1080p
    timeout: float = 20.0  # seconds per URL, redirects included
    allowed_ports: tuple[int, ...] = (80, 443)
    allowed_networks: tuple[str, ...] = ()  # "10.1.2.0/24": not public, but URLs of allowed domains may lead there

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: an amount that isn't above 0, or a domain or network that isn't one.
        """
        for name, option in OPTIONS.items():
            if not getattr(self, name) > 0:  # NaN isn't above 0 either
                raise ValueError(f"{option} {getattr(self, name)} is not above 0: choose another one")
        for network in self.allowed_networks:
            ip_network(network)  # a ValueError that names it
        domains = tuple(_ascii_pattern(pattern) for pattern in self.allowed_domains)
        object.__setattr__(self, "allowed_domains", domains)

    def allows_address(self, address: str) -> bool:
        """Whether an address is in one of the allowed networks."""
        return any(ip_address(address.partition("%")[0]) in ip_network(network) for network in self.allowed_networks)

    def allows_domain(self, host: str) -> bool:
        """Whether a host's name, in lower case and ASCII, is one of the allowed ones."""
        for pattern in self.allowed_domains:
            if pattern.startswith("*.") and host.endswith(pattern[1:]) and len(host) > len(pattern[1:]):
                return True
            if pattern in ("*", host):
                return True
        return False


def _ascii_pattern(pattern: str) -> str:
    """A domain as hosts are compared: hosts beyond ASCII are in IDNA's form."""
    wild, domain = ("*.", pattern[2:]) if pattern.startswith("*.") else ("", pattern)
    try:
        if ":" in domain:
            return str(IPv6Address(domain.strip("[]")))
        return pattern if pattern == "*" else wild + ascii_host(domain)
    except ValueError:
        raise ValueError(
            f"{pattern!r} is not a domain: write example.org, '*.example.org' or '*', without a scheme, port or path"
        ) from None


class Budget:
    """What is left of a policy's amounts for one request.

    Attributes:
        turn: held while a header of the request is read, so that no request has more than one decoder.
    """

    def __init__(self, policy: MediaPolicy):
        self.turn = asyncio.Lock()
        self._most = {
            "items": policy.max_items,
            "bytes": policy.max_bytes,
            "pixels": policy.max_pixels,
            "frames": policy.max_frames,
            "seconds": policy.max_seconds,
            "decoded pixels": policy.max_decoded_pixels,
        }
        self._left = dict(self._most)

    @property
    def bytes(self) -> int:
        """Bytes that may still come."""
        return int(self._left["bytes"])

    def spend(self, what: str, count: float, name: str) -> None:
        """Takes `count` of the items, bytes, pixels, frames, seconds or decoded pixels for the source called `name`.

        Raises:
            MediaError: there is less left; status 413.
        """
        self._left[what] -= count
        if self._left[what] < 0:
            most = self._most[what]
            remedy = f"send less, or start the server with a larger {OPTIONS[f'max_{what.replace(" ", "_")}']}"
            raise MediaError(f"{name} needs {count:g} {what}: a request's media may have {most:g}, {remedy}", 413)
