"""Parses http and https URLs unambiguously, into the encoded form in which hosts, paths and queries are sent."""

import re
from dataclasses import dataclass
from ipaddress import IPv6Address
from urllib.parse import quote, urlsplit

import idna

_HOST = re.compile(r"(?=.{1,253}\Z)[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*")


class DownloadError(ValueError):
    """A URL or a download failed. The message is one line with the reason; `status` is the HTTP status to return."""

    def __init__(self, message: str, status: int = 400):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Target:
    """A parsed URL; host and path are encoded as they are sent."""

    secure: bool
    host: str  # in lower-case ASCII; IPv6 addresses have no brackets
    port: int
    path: str  # includes the query

    @property
    def url_host(self) -> str:
        """The host as in a URL, with brackets around an IPv6 address."""
        return f"[{self.host}]" if ":" in self.host else self.host

    @property
    def authority(self) -> str:
        """The value of the Host header: the host, with the port unless it is the scheme's default."""
        return self.url_host if self.port == (443 if self.secure else 80) else f"{self.url_host}:{self.port}"


def url_name(url: str) -> str:
    """Returns the name of a URL in messages: one short line."""
    url = url.strip()
    url = url if len(url) <= 120 else url[:60] + "..."
    return "".join(character if character.isprintable() else "?" for character in url)


def parse_url(url: str, name: str) -> Target:
    """Parses an http or https URL. The host is encoded by IDNA, path and query as percent-encoded UTF-8.

    Raises:
        DownloadError: the URL is not valid or not allowed.
    """
    # urlsplit drops line ends and tabs, and other parsers read a backslash as a slash, so they could see another host
    if any(character < " " or character in "\x7f\\" for character in url):
        raise DownloadError(f"{name} holds characters that are not valid in a URL: percent-encode them")
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
    """Returns a host name in lower-case ASCII without a trailing dot.

    Raises:
        ValueError: `host` is not a host name.
    """
    # ASCII names may have underscores, which IDNA refuses
    encoded = host.lower() if host.isascii() else idna.encode(host, uts46=True).decode()
    encoded = encoded.removesuffix(".")
    if not _HOST.fullmatch(encoded):
        raise ValueError(f"{host!r} is not a host name")
    return encoded


def _percent_encoded(text: str, safe: str) -> str:
    """Percent-encodes `text`. A `%` that does not begin a %XX is a literal one."""
    return quote(re.sub(r"%(?![0-9A-Fa-f]{2})", "%25", text), safe=safe + "%")
