"""Reads moving pictures, from header to frames: videos, which FFmpeg decodes, and animations (`animations.py`)."""

import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import av.error
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream

from deepstack_jax.errors import one_line, raise_shortage
from deepstack_jax.processing.animations import ANIMATIONS, frames_of, has_views, picture_format, read_header
from deepstack_jax.processing.containers import (
    File,
    VideoError,
    check_codec,
    check_samples,
    decoder_pixels,
    open_container,
    packets,
)
from deepstack_jax.processing.images import MAX_IMAGE_PIXELS, ImageError, load_image

DEFAULT_FPS = 24.0


@dataclass(frozen=True)
class VideoProbe:
    """What the header of a file says, before any frame is decoded.

    Attributes:
        frames: the number of frames; a damaged file may yield fewer.
        width, height: the size of the largest frame in pixels.
        fps: average frames per second.
        animation: Pillow's name of the format, one of `ANIMATIONS`; None for a video.
    """

    frames: int
    width: int
    height: int
    fps: float
    animation: str | None = None


def probe(file: File, name: str, formats: str | None = None) -> VideoProbe:
    """Reads the number, size and rate of the frames without decoding any.

    Args:
        file: a path, or bytes at any position.
        name: its name in messages.
        formats: FFmpeg's names of the containers to accept, separated by commas; None accepts all.

    Raises:
        VideoError: the file is a still picture, is not a video, has no video stream, or has frames that are too large.
    """
    try:
        found = _probe_picture(file, name) or _probe_video(file, name, formats)
    except av.error.EOFError:  # the file ends after its header
        raise no_frames(name) from None
    except av.error.FFmpegError as error:
        raise _undecodable(name, error, formats) from None
    except OSError as error:
        raise_shortage(error)
        raise VideoError(f"{name} can't be read ({one_line(error)}): give a readable file") from None
    if not found.frames:
        raise no_frames(name)
    if not 0 < found.width * found.height <= MAX_IMAGE_PIXELS:
        size = f"{found.width}x{found.height}, too large" if found.width else "an unknown size, perhaps too large"
        raise VideoError(f"{name} has frames of {size}: scale it down")
    return found


def decode(file: File, found: VideoProbe, wanted: Collection[int], name: str) -> Iterator[np.ndarray | None]:
    """Yields the frames in order up to the first damaged one: upright uint8 `[H, W, 3]` if wanted, otherwise None.

    Raises:
        VideoError: a frame is larger than the header says, or can't be converted to RGB.
    """
    if found.animation:
        return _decode_animation(file, found, wanted, name)
    return _decode_video(file, found, wanted, name)


def no_frames(name: str) -> VideoError:
    """Returns the error for a file without a complete frame."""
    return VideoError(f"{name} is a video with no frames that can be decoded: give an intact one with at least one")


def _undecodable(name: str, error: av.error.FFmpegError, formats: str | None = None) -> VideoError:
    raise_shortage(error)
    known = f", one of {formats.replace(',', ', ')} or an animated {', '.join(ANIMATIONS)}" if formats else ""
    return VideoError(f"{name} is not a video that can be decoded ({error.strerror}): give an intact file{known}")


# ---- videos


def _video_stream(container: InputContainer, name: str) -> VideoStream | None:
    """Returns the first video stream that is not a cover picture.

    Raises:
        VideoError: its codec is not one that is decoded.
    """
    for stream in container.streams.video:
        if not stream.disposition & Disposition.attached_pic:
            check_codec(stream, name)
            return stream
    return None


def _probe_video(file: File, name: str, formats: str | None) -> VideoProbe:
    with open_container(file, MAX_IMAGE_PIXELS, formats) as container:
        stream = _video_stream(container, name)
        if stream is None:
            raise VideoError(f"{name} has no video stream: give a video file")
        check_samples(stream, file, name)
        # Matroska and MPEG-TS do not say how many frames there are
        frames = stream.frames or sum(1 for packet in packets(container, stream, file, name) if packet.size)
        if frames == 1 and (kind := picture_format(file)):
            raise _still(name, kind)
        fps = float(stream.average_rate or stream.guessed_rate or DEFAULT_FPS)
        return VideoProbe(frames, stream.width, stream.height, fps)


def _decode_video(file: File, found: VideoProbe, wanted: Collection[int], name: str) -> Iterator[np.ndarray | None]:
    pixels = decoder_pixels(found.width, found.height)
    with open_container(file, pixels) as container:
        stream = _video_stream(container, name)
        if stream is None:
            return
        stream.thread_type = "AUTO"
        stream.codec_context.options = {"max_pixels": str(pixels)}
        number = 0
        try:
            for packet in packets(container, stream, file, name):
                for frame in packet.decode():
                    if frame.width * frame.height > found.width * found.height:
                        raise _other_size(name, found, f"{frame.width}x{frame.height}")
                    # a phone stores the rotation, in quarter turns, beside the picture
                    turns = round(frame.rotation / 90)
                    yield np.rot90(frame.to_ndarray(format="rgb24"), turns) if number in wanted else None
                    number += 1
        except av.error.InvalidDataError:
            return  # the frames before the damage are good
        except av.error.ArgumentError:  # so FFmpeg refuses a frame that is beyond its `max_pixels`
            raise _other_size(name, found, "another size") from None
        except av.error.FFmpegError as error:
            raise _undecodable(name, error) from None


def _other_size(name: str, found: VideoProbe, size: str) -> VideoError:
    header = f"{found.width}x{found.height}"
    return VideoError(f"{name} has frames of {size} after its header said {header}: encode it again with one size")


# ---- animations


def _probe_picture(file: File, name: str) -> VideoProbe | None:
    """Returns the probe of an animation, or None for a file that FFmpeg has to read."""
    kind = picture_format(file)
    if kind in ("BMP", "TIFF") or (kind == "JPEG" and has_views(file)):
        raise _still(name, kind)
    if kind not in ANIMATIONS:
        return None  # consecutive photographs in one file are a video (motion JPEG)
    try:
        header = read_header(file, kind)
    except (struct.error, IndexError):
        raise VideoError(f"{name} is damaged or cut short: give an intact {kind} file") from None
    if len(header.delays) == 1 and not header.skipped:
        raise _still(name, kind)
    return VideoProbe(len(header.delays), header.width, header.height, header.fps, kind)


def _decode_animation(file: File, found: VideoProbe, wanted: Collection[int], name: str) -> Iterator[np.ndarray | None]:
    assert found.animation
    number = 0
    try:
        for frame in frames_of(file, found.animation):
            if frame.width * frame.height > found.width * found.height:
                raise _other_size(name, found, f"{frame.width}x{frame.height}")
            yield np.asarray(load_image(frame)) if number in wanted else None
            number += 1
    except ImageError as error:
        raise VideoError(f"frame {number + 1} of {name}: {error}") from None


def _still(name: str, kind: str | None) -> VideoError:
    return VideoError(
        f"{name} is a still picture ({kind}), not a video: pass it as an image, or in a list of frames as a video"
    )
