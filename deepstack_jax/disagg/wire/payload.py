"""The payload of Submit: a request's prompt, images, videos and options, encoded as msgpack.

Images and videos are sent as their original files, and integers that msgpack can't represent as bytes. Every change of
this format must change `messages.PROTOCOL` too, so that nodes of different releases refuse each other at connect time.
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from PIL import Image

from deepstack_jax.errors import one_line

UserPrompt = str | list[dict[str, Any]]
Video = io.BytesIO | list[Image.Image]

_IMAGE, _VIDEO, _INTEGER = 1, 2, 3  # msgpack extension types


def pack(
    prompt: UserPrompt,
    images: Sequence[Image.Image],
    videos: Sequence[Video],
    options: Mapping[str, Any] | None = None,
) -> bytes:
    """Encodes a request as bytes.

    Args:
        prompt: text, or messages whose parts may contain images and videos of the kinds below.
        images: opened from an io.BytesIO and not yet decoded, because their files are sent.
        videos: files of any container, or lists of images.
        options: keyword arguments of `processor.prepare`.

    Raises:
        ValueError: lists or objects are nested too deeply.
        TypeError: a value is not text, a number, an image or a video.
    """
    request = (prompt, list(images), list(videos), dict(options or {}))
    try:
        try:
            return _ENCODER.encode(request)
        except OverflowError:
            return _ENCODER.encode(_with_large_integers(request))
    except RecursionError:
        raise ValueError("the request is nested too deeply: send flatter messages, tools and options") from None


def unpack(data: bytes) -> tuple[UserPrompt, list[Image.Image], list[Video], dict[str, Any]]:
    """Returns the arguments that `pack` received.

    Raises:
        ValueError: the bytes are not a request, or contain an image that this node's Pillow can't read.
    """
    try:
        return _DECODER.decode(data)
    except Exception as error:  # Pillow's plugins raise many types
        raise ValueError(f"the encode node can't read the request: {one_line(error)[:300]}") from None


def _to_ext(value: object) -> msgspec.msgpack.Ext:
    if isinstance(value, Image.Image):
        file = getattr(value, "fp", None)
        if not isinstance(file, io.BytesIO) or value.format is None:
            raise TypeError("an image that is already decoded can't be sent: open it from its bytes")
        return msgspec.msgpack.Ext(_IMAGE, value.format.encode().ljust(8) + file.getvalue())
    if isinstance(value, io.BytesIO):
        return msgspec.msgpack.Ext(_VIDEO, value.getvalue())
    raise TypeError(f"a value of type {type(value).__name__} can't be sent to an encode node")


def _with_large_integers(value: Any) -> Any:
    if isinstance(value, int) and not -(2**63) <= value < 2**64:
        return msgspec.msgpack.Ext(_INTEGER, value.to_bytes(value.bit_length() // 8 + 1, "big", signed=True))
    if isinstance(value, Mapping):
        return {key: _with_large_integers(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_with_large_integers(one) for one in value]
    return value


def _from_ext(code: int, data: memoryview) -> Image.Image | io.BytesIO | int:
    if code == _VIDEO:
        return io.BytesIO(data)
    if code == _IMAGE:
        return _open(bytes(data[:8]).decode("ascii", "replace").strip(), io.BytesIO(data[8:]))
    if code == _INTEGER:
        return int.from_bytes(data, "big", signed=True)
    raise ValueError(f"extension type {code} is unknown")


def _open(name: str, file: io.BytesIO) -> Image.Image:
    """Opens an image with the format that it was admitted as, and with no other that would also accept its bytes."""
    Image.init()
    # Pillow has no opener for MPO: its JPEG opener recognises it
    opener = "JPEG" if name == "MPO" else name
    if opener not in Image.OPEN:
        raise ValueError(f"images of format {name} are not supported by the encode node: send a PNG or JPEG")
    try:
        return Image.open(file, formats=[opener])
    except Exception as error:  # a codec is missing or has a different version
        reason = "it is not supported" if isinstance(error, Image.UnidentifiedImageError) else one_line(error)
        raise ValueError(f"an image of format {name} can't be opened ({reason}): send a PNG or JPEG") from None


_ENCODER = msgspec.msgpack.Encoder(enc_hook=_to_ext)
_DECODER = msgspec.msgpack.Decoder(
    tuple[str | list[dict[str, Any]], list[Any], list[Any], dict[str, Any]], ext_hook=_from_ext
)
