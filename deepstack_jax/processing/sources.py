"""Where images and videos come from: paths, file, http and https URLs, and data URIs."""

import base64
import binascii
import http.client
import io
import time
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import unquote, unquote_to_bytes, urlsplit

URL_TIMEOUT_SECONDS = 20.0


def open_source(source: str | Path | io.BytesIO, max_bytes: int, error: type[ValueError]) -> Path | io.BytesIO:
    """Gives the path of a local file as it is, and the bytes behind a URL or a data URI as a file object.

    Args:
        source: a path, a `file:`, `http:` or `https:` URL, or a `data:` URI; bytes already read are given back.
        max_bytes: the most that is read from a URL or a data URI.
        error: the exception raised, with one line naming the source, when it can't be read.
    """
    if isinstance(source, io.BytesIO):
        return source
    if isinstance(source, Path):
        return _existing(source, error)
    scheme = source[:8].lower()
    if scheme.startswith("data:"):
        return io.BytesIO(_decode_data_uri(source, max_bytes, error))
    if scheme.startswith(("http://", "https://")):
        return io.BytesIO(_download(source, max_bytes, error))
    if scheme.startswith("file://"):
        return _existing(Path(unquote(urlsplit(source).path)), error)
    return _existing(Path(source), error)


def describe(source: object) -> str:
    """A short name of a source for messages: never the whole of a data URI."""
    text = f"file of {len(source.getbuffer())} bytes" if isinstance(source, io.BytesIO) else str(source)
    return text if len(text) <= 120 else text[:60] + "..."


def one_line(error: BaseException) -> str:
    """An exception's message in one line; its type's name where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def _existing(path: Path, error: type[ValueError]) -> Path:
    try:
        if path.is_file():
            return path
    except OSError:  # a name longer than the file system allows, such as bare base64
        pass
    raise error(f"no file {describe(path)}: give an existing file, an http(s) URL or a data URI")


def _decode_data_uri(uri: str, max_bytes: int, error: type[ValueError]) -> bytes:
    header, comma, payload = uri.partition(",")
    if not comma:
        raise error(f"{describe(uri)} has no comma after its header: write data:image/png;base64,...")
    if len(payload) > max_bytes * 4 // 3 + 4:
        raise error(f"{describe(uri)} holds more than {max_bytes} bytes: send a smaller file")
    if not header.lower().endswith(";base64"):
        return unquote_to_bytes(payload)
    try:
        return base64.b64decode(unquote(payload), validate=True)
    except (binascii.Error, ValueError):
        raise error(f"{describe(uri)} is not valid base64: encode the file's bytes again") from None


def _download(url: str, max_bytes: int, error: type[ValueError]) -> bytes:
    try:
        content = _read_url(url, max_bytes)
    except urllib.error.HTTPError as reason:
        reason.close()
        raise error(f"{describe(url)} answered {reason.code} {reason.reason}: check the URL") from None
    except (OSError, ValueError, http.client.HTTPException) as reason:
        cause = getattr(reason, "reason", reason)  # URLError wraps what happened
        if isinstance(cause, TimeoutError):
            raise error(f"{describe(url)} did not arrive within {URL_TIMEOUT_SECONDS:g} s: download it first") from None
        raise error(f"{describe(url)} can't be fetched ({cause}): check the URL") from None
    if content is None:
        raise error(f"{describe(url)} holds more than {max_bytes} bytes: pass a smaller file")
    return content


def _read_url(url: str, max_bytes: int) -> bytes | None:
    """The body behind `url`, or None when it is larger than `max_bytes`."""
    deadline = time.monotonic() + URL_TIMEOUT_SECONDS
    request = urllib.request.Request(url, headers={"User-Agent": "deepstack-jax"})
    content = bytearray()
    with urllib.request.urlopen(request, timeout=URL_TIMEOUT_SECONDS) as response:
        if int(response.headers.get("Content-Length") or 0) > max_bytes:
            return None
        # read1 returns what has come, so a server that drips bytes meets the deadline too
        while chunk := response.read1(1 << 20):
            content += chunk
            if len(content) > max_bytes:
                return None
            if time.monotonic() > deadline:
                raise TimeoutError
    return bytes(content)
