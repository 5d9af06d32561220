"""A request on its way from a language node to an encode node: prompt, images and videos as they came, as msgpack."""

import io
from typing import Any

import msgspec
from PIL import Image

from deepstack_jax.processing.sources import one_line

_IMAGE, _VIDEO = 1, 2  # msgpack extension types


def pack(prompt: str | list[dict[str, Any]], images: list[Image.Image], videos: list[io.BytesIO]) -> bytes:
    """The request as bytes. Images must have been opened from bytes and not decoded: their files are what travels."""
    return _ENCODER.encode((prompt, images, videos))


def unpack(data: bytes) -> tuple[str | list[dict[str, Any]], list[Image.Image], list[io.BytesIO]]:
    """What `pack` was given.

    Raises:
        ValueError: the bytes are no request.
    """
    try:
        prompt, images, videos = _DECODER.decode(data)
    except (msgspec.MsgspecError, RecursionError, OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"the request can't be read: {one_line(error)[:200]}") from None
    return prompt, images, videos


def _to_ext(value: object) -> msgspec.msgpack.Ext:
    if isinstance(value, Image.Image):
        file = getattr(value, "fp", None)
        if not isinstance(file, io.BytesIO) or value.format is None:
            raise TypeError("an image that was decoded already can't be sent: open it from its bytes")
        return msgspec.msgpack.Ext(_IMAGE, value.format.encode().ljust(8) + file.getvalue())
    if isinstance(value, io.BytesIO):
        return msgspec.msgpack.Ext(_VIDEO, value.getvalue())
    raise TypeError(f"a {type(value).__name__} can't be sent to an encode node")


def _from_ext(code: int, data: memoryview) -> Image.Image | io.BytesIO:
    if code == _VIDEO:
        return io.BytesIO(data)
    if code == _IMAGE:
        # as what it was admitted, and as nothing else that its bytes could be taken for
        return Image.open(io.BytesIO(data[8:]), formats=[bytes(data[:8]).decode("ascii", "replace").strip()])
    raise ValueError(f"extension type {code} is not known")


_ENCODER = msgspec.msgpack.Encoder(enc_hook=_to_ext)
_DECODER = msgspec.msgpack.Decoder(tuple[str | list[dict[str, Any]], list[Any], list[Any]], ext_hook=_from_ext)
