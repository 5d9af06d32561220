"""The payload of Submit: a request's prompt, images, videos and options, encoded as msgpack.

Images and videos are sent as their original files, and integers that msgpack can't represent as bytes. Every change of
this format must change `messages.PROTOCOL` too, so that nodes of different releases refuse each other at connect time.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from deepstack_jax.errors import one_line
from deepstack_jax.processing.sources import MediaFile

UserPrompt = str | list[dict[str, Any]]
Video = MediaFile | list[MediaFile]

_IMAGE, _VIDEO, _INTEGER = 1, 2, 3  # msgpack extension types
_FORMAT_BYTES = 8  # of the name of an image's format, before its data


def pack(
    prompt: UserPrompt,
    images: Sequence[MediaFile],
    videos: Sequence[Video],
    options: Mapping[str, Any] | None = None,
) -> bytes:
    """Encodes a request as bytes.

    Args:
        prompt: text, or messages whose parts may contain images and videos of the kinds below.
        images: files whose format is known.
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


def unpack(data: bytes) -> tuple[UserPrompt, list[MediaFile], list[Video], dict[str, Any]]:
    """Returns the arguments that `pack` received.

    Raises:
        ValueError: the bytes are not a request.
    """
    try:
        return _DECODER.decode(data)
    except Exception as error:
        raise ValueError(f"the encode node can't read the request: {one_line(error)[:300]}") from None


def _to_ext(value: object) -> msgspec.msgpack.Ext:
    if not isinstance(value, MediaFile):
        raise TypeError(f"a value of type {type(value).__name__} can't be sent to an encode node")
    if value.format is None:
        return msgspec.msgpack.Ext(_VIDEO, value.data)
    return msgspec.msgpack.Ext(_IMAGE, value.format.encode().ljust(_FORMAT_BYTES) + value.data)


def _with_large_integers(value: Any) -> Any:
    if isinstance(value, int) and not -(2**63) <= value < 2**64:
        return msgspec.msgpack.Ext(_INTEGER, value.to_bytes(value.bit_length() // 8 + 1, "big", signed=True))
    if isinstance(value, Mapping):
        return {key: _with_large_integers(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_with_large_integers(one) for one in value]
    return value


def _from_ext(code: int, data: memoryview) -> MediaFile | int:
    if code == _VIDEO:
        return MediaFile(bytes(data))
    if code == _IMAGE:
        return MediaFile(bytes(data[_FORMAT_BYTES:]), bytes(data[:_FORMAT_BYTES]).decode("ascii", "replace").strip())
    if code == _INTEGER:
        return int.from_bytes(data, "big", signed=True)
    raise ValueError(f"extension type {code} is unknown")


_ENCODER = msgspec.msgpack.Encoder(enc_hook=_to_ext)
_DECODER = msgspec.msgpack.Decoder(
    tuple[str | list[dict[str, Any]], list[Any], list[Any], dict[str, Any]], ext_hook=_from_ext
)
