"""Reads animated pictures, from header to frames: GIF, WebP, PNG and AVIF.

Pillow decodes them. FFmpeg, which decodes videos, returns only the first picture of some of them and does not support
transparency.
"""

import io
import math
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

from PIL import Image

from deepstack_jax.errors import raise_shortage
from deepstack_jax.processing.containers import File, open_container, packets
from deepstack_jax.processing.images import MAX_IMAGE_PIXELS, ImageError, load_image

ANIMATIONS = ("GIF", "WEBP", "PNG", "AVIF")
# seconds; browsers and FFmpeg use this for a frame without a duration
DEFAULT_DELAY = 0.1


@dataclass(frozen=True)
class Header:
    """What a file says about its frames.

    Attributes:
        delays: for how many seconds each frame is shown, 0 if the file doesn't say; a still picture has one entry.
        width, height: the size of the largest frame in pixels.
        skipped: whether a picture that is not a frame precedes them.
    """

    delays: list[float]
    width: int
    height: int
    skipped: bool = False

    @property
    def fps(self) -> float:
        """Average frames per second."""
        seconds = math.fsum(delay if delay > 0 else DEFAULT_DELAY for delay in self.delays)
        return len(self.delays) / seconds if seconds else 1 / DEFAULT_DELAY


def picture_format(file: File) -> str | None:
    """Returns Pillow's name of a file's format if it is an animation or a picture that FFmpeg takes for a video."""
    with _reading(file) as content:
        start = content.read(32)
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return "WEBP"
    if start[4:8] == b"ftyp" and (b"avif" in start[8:] or b"avis" in start[8:]):
        return "AVIF"
    return next((kind for signature, kind in _SIGNATURES.items() if start.startswith(signature)), None)


_SIGNATURES = {
    b"GIF87a": "GIF",
    b"GIF89a": "GIF",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
}


def has_views(file: File) -> bool:
    """Whether a JPEG file is one photograph with previews or views behind it (MPO)."""
    try:
        with _opened(file, "JPEG", "MPO") as image:
            return image.format == "MPO"
    except Exception as error:  # decoders raise many types for damaged headers
        raise_shortage(error)
        return False


def read_header(file: File, kind: str) -> Header:
    """Reads the durations and sizes of an animation's frames without decoding any.

    Args:
        file: the file, at any position.
        kind: one of `ANIMATIONS`.

    Raises:
        struct.error, IndexError: the file ends too soon.
        av.error.FFmpegError: an AVIF file is damaged.
    """
    if kind == "AVIF":
        return _read_avif(file)
    with _reading(file) as content:
        return {"GIF": _read_gif, "WEBP": _read_webp, "PNG": _read_png}[kind](content)


def frames_of(file: File, kind: str) -> Iterator[Image.Image]:
    """Yields the frames of an animation in order, all of one size, up to the first damaged one.

    Raises:
        ImageError: the pixels have a form that `load_image` refuses.
    """
    try:
        yield from _png_frames(file) if kind == "PNG" else _pillow_frames(file, kind)
    except ImageError:
        raise
    except Exception as error:  # decoders raise many types; the frames before this one are good
        raise_shortage(error)


def _opened(file: File, *formats: str) -> Image.Image:
    if isinstance(file, io.BytesIO):
        file.seek(0)
    with warnings.catch_warnings():
        # the header's check covers sizes, and other problems that Pillow warns about show when frames are decoded
        warnings.simplefilter("ignore")
        return Image.open(file, formats=formats)


def _pillow_frames(file: File, kind: str) -> Iterator[Image.Image]:
    with _opened(file, kind) as image:
        size = image.size
        for number in range(1 << 31):
            image.seek(number)
            image.load()
            # a frame of a GIF may extend beyond its screen, and viewers crop it
            yield image.copy() if image.size == size else image.crop((0, 0, *size))


@contextmanager
def _reading(file: File) -> Iterator[BinaryIO]:
    if isinstance(file, io.BytesIO):
        file.seek(0)
        yield file
    else:
        with file.open("rb") as content:
            yield content


# ---- headers


def _read_gif(content: BinaryIO) -> Header:
    """Follows the GIF89a specification."""
    width, height, flags = struct.unpack("<6xHHB2x", content.read(13))
    delays, delay = [], 0.0
    _skip_palette(content, flags)
    while (block := content.read(1)) and block != b";":
        if block == b"!":
            label = content.read(1)
            data = next(pieces := _sub_blocks(content), b"")
            for _ in pieces:
                pass
            if label == b"\xf9" and len(data) >= 4:  # graphic control, which applies to the next frame
                delay = struct.unpack_from("<H", data, 1)[0] / 100
        elif block == b",":
            left, top, columns, rows, flags = struct.unpack("<HHHHB", content.read(9))
            width, height = max(width, left + columns), max(height, top + rows)
            _skip_palette(content, flags)
            content.read(1)
            for _ in _sub_blocks(content):
                pass
            delays.append(delay)
            delay = 0.0
    return Header(delays, width, height)


def _skip_palette(content: BinaryIO, flags: int) -> None:
    if flags & 0x80:
        content.seek(3 << ((flags & 7) + 1), io.SEEK_CUR)


def _sub_blocks(content: BinaryIO) -> Iterator[bytes]:
    while (size := content.read(1)) not in (b"", b"\0"):
        yield content.read(size[0])


def _read_webp(content: BinaryIO) -> Header:
    """Follows the WebP container specification."""
    delays: list[float] = []
    width = height = 0
    content.seek(12)
    while len(head := content.read(8)) == 8:
        kind, size = struct.unpack("<4sI", head)
        start = content.tell()
        if kind == b"VP8X":
            data = content.read(10)
            width, height = (1 + int.from_bytes(data[i : i + 3], "little") for i in (4, 7))
        elif kind == b"ANMF":
            delays.append(int.from_bytes(content.read(16)[12:15], "little") / 1000)
        content.seek(start + size + size % 2)
    return Header(delays or [0.0], width, height)


def _read_avif(file: File) -> Header:
    """Finds the frames' stream: FFmpeg lists the still picture, the frames and their opacity as separate streams."""
    with open_container(file, MAX_IMAGE_PIXELS) as container:
        streams = container.streams.video
        if not streams:
            return Header([0.0], 0, 0)
        track = max(streams, key=lambda stream: stream.frames)
        width, height = (max(getattr(stream, side) for stream in streams) for side in ("width", "height"))
        shown = [packet for packet in packets(container, track, file, "AVIF file") if packet.size]
        delays = [float((packet.duration or 0) * (packet.time_base or 0)) for packet in shown]
    return Header(delays, width, height)


# ---- PNG, by the third edition of its specification


def _png_chunks(content: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """Yields the kind and length of each chunk, with `content` positioned at its data."""
    content.seek(8)
    while len(head := content.read(8)) == 8:
        size, kind = struct.unpack(">I4s", head)
        start = content.tell()
        yield kind, size
        content.seek(start + size + 4)


def _read_png(content: BinaryIO) -> Header:
    delays: list[float] = []
    animated, skipped, width, height = False, False, 0, 0
    for kind, _ in _png_chunks(content):
        if kind == b"IHDR":
            width, height = struct.unpack(">II", content.read(8))
        elif kind == b"acTL":
            animated = struct.unpack(">I", content.read(4))[0] > 0
        elif kind == b"fcTL":
            numerator, denominator = struct.unpack(">20xHH", content.read(24))
            delays.append(numerator / (denominator or 100))
        elif kind == b"IDAT":
            if not animated:
                break
            skipped = skipped or not delays  # a picture for programs that don't support animations
    return Header(delays, width, height, skipped) if animated else Header([0.0], width, height)


def _png_frames(file: File) -> Iterator[Image.Image]:
    """Decodes the frames as separate pictures and composes them.

    Pillow's own composition neither undoes a blended frame nor keeps the opacity of one that is blended onto
    transparent pixels.
    """
    with _reading(file) as content:
        header, shared, exif = _png_header(content)
        canvas = Image.new("RGBA", struct.unpack_from(">II", header))
        for control, data in _png_pieces(content):
            width, height, x, y = struct.unpack_from(">IIII", control, 4)
            disposal, blending = control[24:26]
            if x + width > canvas.width or y + height > canvas.height:
                return
            piece = _png_piece(struct.pack(">II", width, height) + header[8:], shared, data)
            before = canvas.copy() if disposal == 2 else None
            if blending:
                canvas.alpha_composite(piece, (x, y))
            else:
                canvas.paste(piece, (x, y))
            frame = canvas.copy()
            frame.info = {"exif": exif} if exif else {}
            yield frame
            if disposal == 1:
                canvas.paste((0, 0, 0, 0), (x, y, x + width, y + height))
            canvas = before or canvas


def _png_header(content: BinaryIO) -> tuple[bytes, bytes, bytes]:
    """Returns the data of IHDR, the chunks that define what pixel values mean, and the EXIF data."""
    header, shared, exif = b"", b"", b""
    for kind, size in _png_chunks(content):
        if kind == b"IHDR":
            header = content.read(13)
        elif kind in (b"PLTE", b"tRNS"):
            shared += _png_chunk(kind, content.read(size))
        elif kind == b"eXIf":
            exif = b"Exif\0\0" + content.read(size)
    return header, shared, exif


def _png_pieces(content: BinaryIO) -> Iterator[tuple[bytes, bytearray]]:
    """Yields the control data of each frame and its compressed pixels."""
    control, data = b"", bytearray()
    for kind, size in _png_chunks(content):
        if kind in (b"fcTL", b"IEND"):
            if control:
                yield control, data
            control, data = content.read(26), bytearray()
        elif kind in (b"IDAT", b"fdAT") and control:
            skipped = 4 if kind == b"fdAT" else 0  # bytes of the chunk's sequence number
            data += content.read(size)[skipped:]
    if control and data:
        yield control, data  # the file is truncated; the decoder tells whether the frame is complete


def _png_piece(header: bytes, shared: bytes, data: bytearray) -> Image.Image:
    whole = _png_chunk(b"IHDR", header) + shared + _png_chunk(b"IDAT", bytes(data)) + _png_chunk(b"IEND", b"")
    with _opened(io.BytesIO(b"\x89PNG\r\n\x1a\n" + whole), "PNG") as piece:
        if piece.mode.startswith("I"):
            piece.load()
            return load_image(piece).convert("RGBA")  # raises the errors of a still picture
        return piece.convert("RGBA")


def _png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
