"""What images and videos a server takes from outside, and how much of them."""

from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from pathlib import Path


class MediaError(ValueError):
    """An image or video that isn't taken; the message is one line with the reason, `status` what HTTP says."""

    def __init__(self, message: str, status: int = 400):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class MediaPolicy:
    """What is taken. The default takes data URIs alone. Amounts are those of all media of one request together."""

    allowed_domains: tuple[str, ...] = ()  # "example.org", "*.example.org" (not the apex), "*"
    allowed_folder: Path | None = None  # paths under it, symbolic links followed first
    allow_data: bool = True
    max_items: int = 32  # images and videos
    max_bytes: int = 32 << 20  # as they come, before decoding
    max_pixels: int = 64 << 20  # of images as they are, and of videos as they are resized for the encoder
    max_frames: int = 7200  # of videos, sampled or not: all up to the last sampled one are decoded
    max_seconds: float = 600.0  # of videos
    max_decoded_pixels: int = 8_000_000_000  # of all frames of videos: about two minutes of 1080p
    timeout: float = 20.0  # seconds for one URL, redirects included
    allowed_ports: tuple[int, ...] = (80, 443)
    allowed_networks: tuple[str, ...] = ()  # "10.1.2.0/24": not public, but URLs of allowed domains may lead there

    def __post_init__(self) -> None:
        for network in self.allowed_networks:
            ip_network(network)  # a ValueError that names it

    def allows_address(self, address: str) -> bool:
        """Whether an address is in one of the allowed networks."""
        return any(ip_address(address.partition("%")[0]) in ip_network(network) for network in self.allowed_networks)

    def allows_domain(self, host: str) -> bool:
        """Whether a host's name, in lower case and ASCII, is one of the allowed ones."""
        for pattern in self.allowed_domains:
            pattern = pattern.lower().rstrip(".")
            if pattern.startswith("*.") and host.endswith(pattern[1:]) and len(host) > len(pattern[1:]):
                return True
            if pattern in ("*", host):
                return True
        return False


class Budget:
    """What is left of a policy's amounts for one request."""

    def __init__(self, policy: MediaPolicy):
        self._most = {
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
        """Takes `count` of an amount for the source called `name`.

        Raises:
            MediaError: there is less left; status 413.
        """
        self._left[what] -= count
        if self._left[what] < 0:
            most = self._most[what]
            raise MediaError(f"{name} needs {count:g} {what}: a request's media may have {most:g}, send less", 413)
