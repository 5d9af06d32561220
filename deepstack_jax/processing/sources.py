"""Reads what callers pass: files, URLs, data URIs, base64, bytes, file objects, arrays of any library, and options."""

import base64
import io
import math
import numbers
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import unquote, unquote_to_bytes

import numpy as np

from deepstack_jax.errors import one_line

SNIFFED_BYTES = 192  # reaches the second packet of an MPEG transport stream


class MediaFile:
    """An image or a video in memory, and what its header says.

    Attributes:
        data: the bytes of the file.
        format: Pillow's name of an image's format, the only one that it is opened as; None for a video.
        width, height: the size of the largest frame in pixels, 0 if it isn't known yet.
        frames: the number of frames.
        fps: average frames per second; 0 for an image, and for a video whose frames were given one by one.
    """

    # not a dataclass: msgspec would pack one field by field, without asking the hook of a payload
    def __init__(
        self,
        data: bytes,
        format: str | None = None,
        width: int = 0,
        height: int = 0,
        frames: int = 1,
        fps: float = 0.0,
    ):
        self.data, self.format = data, format
        self.width, self.height, self.frames, self.fps = width, height, frames, fps


MediaSource = str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO | MediaFile

_GIVE = "give an existing file, an http(s) URL, a data URI or base64"


def open_source(source: MediaSource, max_bytes: int, error: type[ValueError]) -> Path | io.BytesIO:
    """Returns the path of a local file, or the bytes of any other source as a file object positioned at its start.

    Args:
        source: a path (`~` is the home folder), a `file:`, `http:` or `https:` URL, a `data:` URI, the base64 of a
            picture or video without a header, its bytes, a `MediaFile`, or a file object opened for reading bytes. A
            file object is read from its start, or from its current position if it can't seek.
        max_bytes: the maximum size of anything except a local file.
        error: the exception raised if the source can't be read, with one line that names it.
    """
    if isinstance(source, MediaFile):
        return io.BytesIO(source.data)
    if isinstance(source, bytes | bytearray | memoryview):
        return io.BytesIO(_media_bytes(bytes(source), describe(source), max_bytes, error))
    if hasattr(source, "read"):
        return _read_file_object(source, max_bytes, error)
    if isinstance(source, str):
        return _open_text(source, max_bytes, error)
    if isinstance(source, os.PathLike):
        return _existing([Path(os.fsdecode(source))], source, error)
    raise error(f"{type(source).__name__} is not a file, URL, bytes or file object: {_GIVE}")


def decode_base64(text: str) -> bytes:
    """Decodes base64 as tools write it: with line breaks, white space around lines or URL-safe letters, or unpadded.

    Raises:
        ValueError: any other character, letters of both alphabets, or an impossible length.
    """
    content = _decode_letters(text)
    assert content is not None  # it may have any size
    return content


def looks_like_media(first_bytes: bytes) -> bool:
    """Whether a file that starts like this (`SNIFFED_BYTES` of it, or all) is a picture or a video."""
    if len(first_bytes) < 12:
        return False
    if first_bytes.startswith(_PICTURES) or first_bytes[8:12] == b"WEBP" or first_bytes[4:8] == b"ftyp":
        return True
    if first_bytes[:2] == b"BM":
        return not any(first_bytes[6:10])
    return looks_like_video(first_bytes)


def looks_like_video(first_bytes: bytes) -> bool:
    """Whether a file that starts like this (`SNIFFED_BYTES` of it, or all) is a video container."""
    if first_bytes[4:8] == b"ftyp":
        return first_bytes[8:12] not in PICTURE_BRANDS
    if first_bytes[:4] == b"RIFF":
        return first_bytes[8:12] == b"AVI "
    # packets of an MPEG transport stream have 188 bytes
    packets = len(first_bytes) > 188 and first_bytes[0] == first_bytes[188] == 0x47
    return packets or first_bytes[4:8] in (b"moov", b"mdat", b"wide") or first_bytes.startswith(_VIDEOS)


def option_values(
    raw: Mapping[str, Any], kinds: Mapping[str, type], what: str, error: type[ValueError]
) -> dict[str, Any]:
    """Checks options by name and returns them without those that are null.

    Args:
        raw: names and values, from a caller or from JSON.
        kinds: the options that exist, each `int`, `float` or `bool`. Numbers must be finite and above 0; a float
            without a fraction counts as an integer.
        what: what the options belong to, such as "an image", for messages.
        error: the exception raised; its message names the option, its value and what is allowed.
    """
    given = {name: value for name, value in raw.items() if value is not None}
    for name in given:
        if name not in kinds:
            raise error(f"{_shown(name)} is not an option of {what}: use {', '.join(kinds)}")
    return {name: _option(name, value, kinds[name], what, error) for name, value in given.items()}


def host_array(value: Any, name: str, error: type[ValueError]) -> np.ndarray:
    """Returns an array of any library, or nested lists, as a NumPy array in host memory.

    Torch tensors may be on any device, of any floating-point type, and part of an autograd graph. Floating-point types
    that NumPy lacks (bfloat16, float8) become float32.

    Raises:
        error: the values can't be read or aren't real numbers; the message is one line that names the array.
    """
    kind = type(value).__name__
    try:
        array = _to_numpy(value)
    except Exception as reason:  # each library raises its own types
        raise error(f"{name} can't be read from {kind} ({one_line(reason)[:160]}): give a NumPy array") from None
    if array.dtype.kind == "V" and array.dtype.type is not np.void:  # a dtype that ml_dtypes adds to NumPy
        array = array.astype(np.int32 if "int" in array.dtype.name else np.float32)
    if array.dtype.kind not in "biuf":
        raise error(f"{name} of type {kind} holds {array.dtype}, not real numbers: give integers or floating point")
    return array


def is_array(value: object) -> bool:
    """Whether `value` is an array of some library: NumPy, JAX, torch, or any that NumPy can read."""
    return not isinstance(value, type) and (hasattr(value, "__array__") or _is_torch(value))


def is_file(source: object) -> bool:
    """Whether `open_source` reads `source`."""
    return isinstance(source, str | os.PathLike | bytes | bytearray | memoryview | MediaFile) or hasattr(source, "read")


def describe(source: object) -> str:
    """Returns a short one-line name of a source for messages; a long data URI is truncated."""
    if isinstance(source, MediaFile):
        return f"file of {len(source.data)} bytes"
    if isinstance(source, io.BytesIO):
        return f"file of {len(source.getbuffer())} bytes"
    if isinstance(source, bytes | bytearray | memoryview):
        return f"file of {memoryview(source).nbytes} bytes"
    if hasattr(source, "read"):
        name = getattr(source, "name", None)
        return f"file {name}" if isinstance(name, str) and name else f"file object {type(source).__name__}"
    return _shown(source)


# ---- text


def _open_text(text: str, max_bytes: int, error: type[ValueError]) -> Path | io.BytesIO:
    stripped = text.strip()
    scheme = stripped[:8].lower()
    if scheme.startswith("data:"):
        return io.BytesIO(_decode_data_uri(stripped, max_bytes, error))
    if scheme.startswith(("http://", "https://")):
        # imported here because it loads slowly and most calls read files
        from deepstack_jax.processing.download import download

        return io.BytesIO(download(stripped, max_bytes, error))
    if scheme.startswith("file:"):
        # users write unquoted names, and two slashes before relative ones
        rest = re.sub("^//(localhost(?=/))?", "", stripped[5:])
        return _existing(
            [Path(name) for name in (rest, unquote(rest), unquote(re.split("[?#]", rest)[0]))], text, error
        )
    if not stripped:
        raise error(f"an empty text names no file: {_GIVE}")
    if (path := _found([Path(text)])) is not None:
        return path
    if (content := _bare_base64(text, max_bytes, error)) is not None:
        return io.BytesIO(content)
    if other := re.match(r"([a-z][a-z0-9+.-]+)://", stripped, re.IGNORECASE):
        raise error(f"{describe(text)} has the scheme {other[1]}, which is not read: {_GIVE}")
    return _existing([Path(text)], text, error)


def _found(paths: list[Path]) -> Path | None:
    for path in paths:
        try:
            if path.is_file():
                return path
            if path.parts[:1] and path.parts[0].startswith("~") and (home := path.expanduser()).is_file():
                return home
        except (OSError, RuntimeError):  # the name is too long for the file system, or there is no such user
            continue
    return None


def _existing(paths: list[Path], source: object, error: type[ValueError]) -> Path:
    if (path := _found(paths)) is None:
        raise error(f"no file {describe(source)}: {_GIVE}")
    return path


def _bare_base64(text: str, max_bytes: int, error: type[ValueError]) -> bytes | None:
    """Returns the bytes of a picture or video in base64 without a header, or None for any other text."""
    try:
        start = _base64_letters(text[: 2 * SNIFFED_BYTES]).rstrip("=")[: SNIFFED_BYTES // 3 * 4]
        if not looks_like_media(decode_base64(start[: len(start) // 4 * 4])):
            return None
    except ValueError:
        return None
    return _decode_bounded(text, 0, describe(text), max_bytes, error)


def _decode_data_uri(uri: str, max_bytes: int, error: type[ValueError]) -> bytes:
    comma, name = uri.find(","), describe(uri)
    if comma < 0:
        raise error(f"{name} has no comma after its header: write data:image/png;base64,...")
    parameters = [parameter.strip().lower() for parameter in uri[5:comma].split(";")]
    if "base64" in parameters:
        return _decode_bounded(uri, comma + 1, name, max_bytes, error)
    payload = uri[comma + 1 :]
    if len(payload) - 2 * payload.count("%") > 2 * max_bytes + SNIFFED_BYTES:  # twice: it may be base64
        raise error(_too_long(name, max_bytes))
    if payload.count("%") > _MAX_ESCAPES:
        raise error(f"{name} has more than {_MAX_ESCAPES} characters in %XX: send it as data:image/png;base64,...")
    content = unquote_to_bytes(payload)
    decoded = _base64_of_media(content, max_bytes, error)  # some tools omit ";base64"
    return _bounded(content if decoded is None else decoded, name, max_bytes, error)


def _decode_bounded(text: str, start: int, name: str, max_bytes: int, error: type[ValueError]) -> bytes:
    """Decodes the base64 that starts at `start`, behind the header of a data URI if there is one."""
    try:
        content = _decode_letters(text, start, max_bytes, escaped=start > 0)
    except ValueError:
        raise error(f"{name} is not valid base64: encode the file's bytes again") from None
    if content is None:
        raise error(_too_long(name, max_bytes))
    return content


def _decode_letters(text: str, start: int = 0, max_bytes: int = sys.maxsize, escaped: bool = False) -> bytes | None:
    """Decodes base64, perhaps escaped as in a URI, from `start` on; None if it has more than `max_bytes`.

    It goes piece by piece, because other threads can't run while one piece is read.

    Raises:
        ValueError: it isn't valid.
    """
    if 3 * sum(len(piece.rstrip("=")) for piece in _pieces(text, start, escaped)) // 4 > max_bytes:
        return None
    decoded, rest, padding = io.BytesIO(), "", 0
    web = plain = False  # which alphabet the letters are of
    for letters in _pieces(text, start, escaped):
        digits = letters.rstrip("=")
        web, plain = web or "-" in digits or "_" in digits, plain or "+" in digits or "/" in digits
        if "=" in digits or (web and plain) or (padding and digits):
            raise ValueError("not valid base64")
        padding += len(letters) - len(digits)
        digits = rest + digits.replace("-", "+").replace("_", "/")
        whole = len(digits) // 4 * 4
        rest = digits[whole:]
        decoded.write(_decode_whole(digits[:whole]))
    if padding not in (0, -len(rest) % 4):
        raise ValueError("not valid base64")
    decoded.write(_decode_whole(rest + "=" * (-len(rest) % 4)))
    return decoded.getvalue()


def _decode_whole(letters: str) -> bytes:
    try:
        return base64.b64decode(letters, validate=True)
    except ValueError:  # binascii.Error is one
        raise ValueError("not valid base64") from None


def _pieces(text: str, start: int, escaped: bool) -> Iterator[str]:
    """The letters of base64 from `start` on, in pieces; none of them is cut inside an escape."""
    while start < len(text):
        end = start + _PIECE_CHARACTERS
        end += next((i for i in (2, 1) if escaped and text[end + i - 3 : end + i] in _LETTER_OF), 0)
        piece = text[start:end]
        if escaped and "%" in piece:
            for escape, letter in _LETTER_OF.items():
                piece = piece.replace(escape, letter)
        yield _base64_letters(piece)
        start = end


def _base64_letters(text: str) -> str:
    """Returns a piece of base64 without line breaks and the white space around lines.

    White space inside a line is refused, because a web form may have turned each "+" into a space.
    """
    if (" " in text or "\t" in text) and re.search(r"\S[ \t]++\S", text):
        raise ValueError("not valid base64")
    return text.translate(_WHITE_SPACE) if any(space in text for space in " \t\r\n") else text


_PIECE_CHARACTERS = 1 << 20
_WHITE_SPACE = dict.fromkeys(map(ord, " \t\r\n"))
# what tools escape in base64; unquoting every %XX of a large text would take many times its memory
_ESCAPED = ("2B", "2b", "2F", "2f", "3D", "3d", "2D", "2d", "5F", "5f", "0A", "0a", "0D", "0d", "09", "20")
_LETTER_OF = {"%" + code: chr(int(code, 16)) for code in _ESCAPED}
_MAX_ESCAPES = 1 << 20


# ---- bytes and file objects


def _media_bytes(content: bytes, name: str, max_bytes: int, error: type[ValueError]) -> bytes:
    """Returns `content`, decoded if it is the text of a data URI or base64 such as `base64.b64encode` returns."""
    if content[:SNIFFED_BYTES].lstrip()[:5].lower() == b"data:":
        return _decode_data_uri(content.decode("latin-1").strip(), max_bytes, error)
    decoded = _base64_of_media(content, max_bytes, error)
    return _bounded(content if decoded is None else decoded, name, max_bytes, error)


def _base64_of_media(content: bytes, max_bytes: int, error: type[ValueError]) -> bytes | None:
    start = content[: 2 * SNIFFED_BYTES]
    if looks_like_media(start[:SNIFFED_BYTES]) or not start.isascii():
        return None
    return _bare_base64(content.decode("latin-1"), max_bytes, error)


def _bounded(content: bytes, name: str, max_bytes: int, error: type[ValueError]) -> bytes:
    if len(content) > max_bytes:
        raise error(_too_long(name, max_bytes))
    return content


def _read_file_object(file: Any, max_bytes: int, error: type[ValueError]) -> io.BytesIO:
    name = describe(file) if not getattr(file, "closed", False) else f"{type(file).__name__}"
    try:
        if _can_seek(file):
            file.seek(0)
        if isinstance(file, io.BytesIO):
            content = file.getvalue()
            decoded = _media_bytes(content, name, max_bytes, error)
            return file if decoded is content else io.BytesIO(decoded)
        content = _read_up_to(file, max_bytes + 1)
    except error:
        raise
    except UnicodeDecodeError:
        raise error(f'{name} was opened as text: open it with mode "rb"') from None
    except Exception as reason:  # read() may raise anything
        raise error(f"{name} can't be read ({one_line(reason)}): give an open file, or its bytes") from None
    if isinstance(content, str):
        raise error(f'{name} was opened as text: open it with mode "rb"')
    if not isinstance(content, bytes | bytearray | memoryview):
        raise error(f"read() of {name} gives {type(content).__name__}, not bytes: give the file's bytes")
    return io.BytesIO(_media_bytes(bytes(content), name, max_bytes, error))


def _can_seek(file: Any) -> bool:
    seekable = getattr(file, "seekable", None)
    return bool(seekable()) if callable(seekable) else hasattr(file, "seek")


def _read_up_to(file: Any, count: int) -> Any:
    """Reads up to `count` bytes, in several reads if needed, as for a pipe. Returns a non-bytes result unchanged."""
    content = bytearray()
    while len(content) < count:
        piece = file.read(count - len(content))
        if not isinstance(piece, bytes | bytearray | memoryview):
            return piece if piece is not None else bytes(content)
        if not piece:
            break
        content += piece
    return content


def _too_long(name: str, max_bytes: int) -> str:
    return f"{name} holds more than {max_bytes} bytes: pass a smaller file"


# ---- arrays and options


def _to_numpy(value: Any) -> np.ndarray:
    if _is_torch(value):
        return _torch_to_numpy(value)
    if isinstance(value, list | tuple) and any(map(_is_torch, value)):
        return np.stack([_to_numpy(one) for one in value])
    return np.asarray(value)


def _is_torch(value: Any) -> bool:
    # decided by the type's name, because importing torch takes seconds and it may not be installed
    return any(base.__module__.partition(".")[0] == "torch" and base.__name__ == "Tensor" for base in type(value).mro())


def _torch_to_numpy(tensor: Any) -> np.ndarray:
    tensor = tensor.detach()
    if tensor.device.type == "meta":
        raise ValueError("a tensor on the device meta has no values")
    tensor = tensor.cpu()
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    if str(tensor.layout) != "torch.strided":
        tensor = tensor.to_dense()
    if tensor.is_floating_point() and str(tensor.dtype) not in ("torch.float16", "torch.float32", "torch.float64"):
        tensor = tensor.float()
    return tensor.resolve_conj().resolve_neg().numpy()


def _option(name: str, value: Any, kind: type, what: str, error: type[ValueError]) -> Any:
    shown = repr(value[:100]) if isinstance(value, str) else _shown(value)
    if kind is bool:
        if not isinstance(value, bool | np.bool_):
            raise error(f"{name} {shown} of {what} must be true or false")
        return bool(value)
    number = math.nan if isinstance(value, bool) or not isinstance(value, numbers.Real) else cast(Any, value)
    if not 0 < number < math.inf or (kind is int and number != int(number)):
        whole = "a whole number" if kind is int else "a number"
        raise error(f"{name} {shown} of {what} must be {whole} above 0")
    return kind(number)


def _shown(value: object) -> str:
    """Returns a value as messages show it: short and on one line."""
    text = str(value) if isinstance(value, str | os.PathLike | numbers.Number) else repr(value)
    text = text if len(text) <= 120 else text[:60] + "..."
    return text if text.isprintable() else repr(text)[1:-1]


_PICTURES = (
    b"\xff\xd8\xff",  # JPEG
    b"\x89PNG",
    b"GIF8",
    b"II*\0",  # TIFF
    b"MM\0*",
    b"II+\0",  # BigTIFF
    b"MM\0+",
    b"\0\0\0\x0cjP  ",  # JPEG 2000
    b"\xff\x4f\xff\x51",
    b"\0\0\1\0",  # ICO
    b"8BPS",
)
_VIDEOS = (
    b"\x1aE\xdf\xa3",  # Matroska, WebM
    b"OggS",
    b"FLV\1",
    b"\x30\x26\xb2\x75\x8e\x66\xcf\x11",  # ASF
    b"\0\0\1\xba",  # MPEG
    b"\0\0\1\xb3",
)
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1")
PICTURE_BRANDS = (*HEIC_BRANDS, b"avif", b"avis", b"jxl ", b"crx ")
