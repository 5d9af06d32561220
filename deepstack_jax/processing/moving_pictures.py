"""Files of moving pictures, from header to frames: videos that FFmpeg decodes, and the animations that Pillow decodes.

GIF, WebP, PNG and AVIF go through Pillow, which lays each frame over the ones before it as the formats say. FFmpeg
gives the first picture only of some of them, and knows no transparency.
"""

import io
import math
import struct
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import av
import av.error
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream
from PIL import Image

from deepstack_jax.processing.images import MAX_IMAGE_PIXELS, ImageError, load_image
from deepstack_jax.processing.sources import one_line

DEFAULT_FPS = 24.0
# what browsers and FFmpeg take for a frame of an animation that names no time
DEFAULT_DELAY = 0.1
ANIMATIONS = ("GIF", "WEBP", "PNG", "AVIF")

File = Path | io.BytesIO


class VideoError(ValueError):
    """A video that can't be used; the message is one line with the remedy."""


@dataclass(frozen=True)
class VideoProbe:
    """What the header of a file says, before a frame is decoded.

    Attributes:
        frames: how many there are; fewer may come out of a file that is damaged.
        width, height: of the largest frame.
        fps: frames per second, on average.
        animation: Pillow's name of the format, one of `ANIMATIONS`; None for a video.
        skipped: pictures before the first frame that don't belong to the animation.
    """

    frames: int
    width: int
    height: int
    fps: float
    animation: str | None = None
    skipped: int = 0


def probe(file: File, name: str, formats: str | None = None) -> VideoProbe:
    """Reads the frames' number, size and rate without decoding any.

    Args:
        file: a path, or bytes at any position.
        name: what messages call it.
        formats: FFmpeg's names of the containers that are read, with commas between; all of them without.

    Raises:
        VideoError: a still picture, no video, no video stream, or frames that are too large.
    """
    try:
        found = _probe_picture(file, name) or _probe_video(file, name, formats)
    except av.error.EOFError:  # the file ends after its header
        raise no_frames(name) from None
    except av.error.FFmpegError as error:
        raise VideoError(f"{name} is not a video that can be decoded ({error.strerror}): give an intact file") from None
    except OSError as error:
        raise VideoError(f"{name} can't be read ({one_line(error)}): give a file that can") from None
    if not found.frames:
        raise no_frames(name)
    if found.width * found.height > MAX_IMAGE_PIXELS:
        raise VideoError(f"{name} has frames of {found.width}x{found.height}, too large: scale it down")
    return found


def decode(file: File, found: VideoProbe, wanted: Collection[int], name: str) -> Iterator[np.ndarray | None]:
    """Frames in order, `[H, W, 3]` uint8 upright where wanted and None otherwise, up to the first that is damaged.

    Raises:
        VideoError: a frame larger than the header says, or one that can't be made RGB.
    """
    if found.animation:
        return _decode_animation(file, found, wanted, name)
    return _decode_video(file, found, wanted, name)


def no_frames(name: str) -> VideoError:
    """The error of a file in which no frame is whole."""
    return VideoError(f"{name} is a video with no frames that can be decoded: give an intact one with at least one")


# ---- videos


@contextmanager
def _open_video(file: File, formats: str | None = None) -> Iterator[InputContainer]:
    # a playlist from elsewhere must not make the decoder open files or URLs of its choice
    options = {"protocol_whitelist": "data" if isinstance(file, io.BytesIO) else "file"}
    if formats is not None:
        options["format_whitelist"] = formats
    if isinstance(file, io.BytesIO):
        file.seek(0)
    with av.open(file if isinstance(file, io.BytesIO) else str(file), mode="r", options=options) as container:
        yield container


def _video_stream(container: InputContainer) -> VideoStream | None:
    """The film of a file: not the cover of a piece of music, nor that of the film."""
    films = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    return films[0] if films else None


def _probe_video(file: File, name: str, formats: str | None) -> VideoProbe:
    with _open_video(file, formats) as container:
        stream = _video_stream(container)
        if stream is None:
            raise VideoError(f"{name} has no video stream: give a video file")
        # Matroska and MPEG-TS do not say how many frames there are
        frames = stream.frames or sum(1 for packet in container.demux(stream) if packet.size)
        if frames == 1 and (kind := _picture_format(_start(file))):
            raise _still(name, kind)
        fps = float(stream.average_rate or stream.guessed_rate or DEFAULT_FPS)
        return VideoProbe(frames, stream.width, stream.height, fps)


def _decode_video(file: File, found: VideoProbe, wanted: Collection[int], name: str) -> Iterator[np.ndarray | None]:
    with _open_video(file) as container:
        stream = _video_stream(container)
        if stream is None:
            return
        stream.thread_type = "AUTO"
        stream.codec_context.options = {"max_pixels": str(2 * MAX_IMAGE_PIXELS)}
        try:
            for number, frame in enumerate(container.decode(stream)):
                if frame.width * frame.height > found.width * found.height:
                    raise VideoError(
                        f"{name} has frames of {frame.width}x{frame.height} after its header said "
                        f"{found.width}x{found.height}: encode it again with one size"
                    )
                # quarter turns that a phone notes beside the picture
                turns = round(frame.rotation / 90)
                yield np.rot90(frame.to_ndarray(format="rgb24"), turns) if number in wanted else None
        except av.error.FFmpegError:
            return  # a recording cut short still has what came before


# ---- animations


def _probe_picture(file: File, name: str) -> VideoProbe | None:
    """What an animation says of itself; None for what FFmpeg has to say."""
    kind = _picture_format(_start(file))
    if kind in ("BMP", "TIFF") or (kind == "JPEG" and _has_views(file)):
        raise _still(name, kind)
    if kind not in ANIMATIONS:
        return None  # photographs one after another are a film (motion JPEG)
    skipped = 0
    try:
        if kind == "AVIF":
            delays, width, height = _read_avif(file)
        else:
            with _reading(file) as content:
                delays, width, height, skipped = _READERS[kind](content)
    except (struct.error, IndexError):
        raise VideoError(f"{name} is damaged or cut short: give an intact {kind} file") from None
    if len(delays) == 1 and not skipped:
        raise _still(name, kind)
    seconds = math.fsum(delay if delay > 0 else DEFAULT_DELAY for delay in delays)
    return VideoProbe(len(delays), width, height, len(delays) / (seconds or DEFAULT_DELAY), kind, skipped)


def _decode_animation(file: File, found: VideoProbe, wanted: Collection[int], name: str) -> Iterator[np.ndarray | None]:
    image = _open_animation(file, found)
    if image is None:
        return
    with image:
        size = image.size
        for number in range(found.frames):
            try:
                image.seek(number + found.skipped)
                _load(image)
            except Exception:  # decoders raise many types; what came before is good
                return
            yield _upright(image, size, f"frame {number + 1} of {name}") if number in wanted else None


def _load(image: Image.Image) -> None:
    """Decodes the frame that `image` stands at.

    Pillow draws a PNG's frame that is blended into the very picture that it keeps to bring back when the frame is to be
    undone, so that nothing is undone: it is given a copy to keep.
    """
    kept = getattr(image, "_prev_im", None) if image.format == "PNG" else None
    copy = kept.copy() if kept is not None and image.tell() else None
    image.load()
    if copy is not None:
        vars(image)["_prev_im"] = copy


def _open_animation(file: File, found: VideoProbe) -> Image.Image | None:
    if isinstance(file, io.BytesIO):
        file.seek(0)
    assert found.animation
    try:
        with warnings.catch_warnings():
            # the size was checked by the header, and other doubts of Pillow's about it show when frames are decoded
            warnings.simplefilter("ignore")
            return Image.open(file, formats=[found.animation])
    except Exception:  # decoders raise many types for damaged headers
        return None


def _upright(image: Image.Image, size: tuple[int, int], name: str) -> np.ndarray:
    frame = image.copy()  # of the frame alone: `load_image` takes no animations
    if frame.size != size:
        frame = frame.crop((0, 0, *size))  # a GIF's frame beyond its screen, which viewers cut off
    try:
        return np.asarray(load_image(frame))
    except ImageError as error:
        raise VideoError(f"{name}: {error}") from None


# ---- headers of pictures


def _picture_format(start: bytes) -> str | None:
    """Pillow's name of the format of a file that starts so, of those that are mistaken for videos or are some."""
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


def _start(file: File) -> bytes:
    with _reading(file) as content:
        return content.read(32)


@contextmanager
def _reading(file: File) -> Iterator[BinaryIO]:
    if isinstance(file, io.BytesIO):
        file.seek(0)
        yield file
    else:
        with file.open("rb") as content:
            yield content


def _has_views(file: File) -> bool:
    """Whether a JPEG file is one photograph with previews or views behind it (MPO)."""
    if isinstance(file, io.BytesIO):
        file.seek(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(file, formats=["JPEG", "MPO"]) as image:
                return image.format == "MPO"
    except Exception:  # decoders raise many types for damaged headers
        return False


def _still(name: str, kind: str | None) -> VideoError:
    return VideoError(
        f"{name} is a still picture ({kind}), not a video: pass it as an image, or in a list of frames as a video"
    )


Header = tuple[list[float], int, int, int]


def _read_gif(content: BinaryIO) -> Header:
    """Delays in seconds, the largest width and height, and 0, by the GIF89a specification."""
    width, height, flags = struct.unpack("<6xHHB2x", content.read(13))
    delays, delay = [], 0.0
    _skip_palette(content, flags)
    while (block := content.read(1)) and block != b";":
        if block == b"!":
            label = content.read(1)
            data = next(pieces := _sub_blocks(content), b"")
            for _ in pieces:
                pass
            if label == b"\xf9" and len(data) >= 4:  # graphic control: what holds for the next frame
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
    return delays, width, height, 0


def _skip_palette(content: BinaryIO, flags: int) -> None:
    if flags & 0x80:
        content.seek(3 << ((flags & 7) + 1), io.SEEK_CUR)


def _sub_blocks(content: BinaryIO) -> Iterator[bytes]:
    while (size := content.read(1)) not in (b"", b"\0"):
        yield content.read(size[0])


def _read_webp(content: BinaryIO) -> Header:
    """The same of a WebP file, by its container specification; one delay for a file without animation."""
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
    return delays or [0.0], width, height, 0


def _read_png(content: BinaryIO) -> Header:
    """The same of an animated PNG, by the third edition of the PNG specification; one delay without animation."""
    delays: list[float] = []
    animated, skipped, width, height = False, 0, 0, 0
    content.seek(8)
    while len(head := content.read(8)) == 8:
        size, kind = struct.unpack(">I4s", head)
        start = content.tell()
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
            skipped = skipped or int(not delays)  # a picture for programs that know no animations
        content.seek(start + size + 4)
    return (delays, width, height, skipped) if animated else ([0.0], width, height, 0)


def _read_avif(file: File) -> tuple[list[float], int, int]:
    """The same of an AVIF file; FFmpeg lists its still, its frames and its opacities as streams of their own."""
    with _open_video(file) as container:
        streams = container.streams.video
        if not streams:
            return [0.0], 0, 0
        track = max(streams, key=lambda stream: stream.frames)
        width, height = (max(getattr(stream, side) for stream in streams) for side in ("width", "height"))
        delays = [
            float((packet.duration or 0) * (packet.time_base or 0)) for packet in container.demux(track) if packet.size
        ]
    return delays, width, height


_READERS: dict[str, Callable[[BinaryIO], Header]] = {"GIF": _read_gif, "WEBP": _read_webp, "PNG": _read_png}
