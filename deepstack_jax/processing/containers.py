"""Opens the containers of videos with FFmpeg, for a short list of codecs and within the file's own sizes."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import av
from av.container import InputContainer
from av.packet import Packet
from av.video.stream import VideoStream

# What cameras, phones, browsers and editors write. FFmpeg has many more decoders, which had far less scrutiny.
VIDEO_CODECS = (
    "h264",
    "hevc",
    "vp8",
    "vp9",
    "av1",
    "mpeg1video",
    "mpeg2video",
    "mpeg4",
    "mjpeg",
    "gif",
    "apng",
    "webp",
    "theora",
)
# FFmpeg prefers this library's decoder of AV1, under a name of its own
_DECODERS = (*VIDEO_CODECS, "libdav1d")

# A container may leave out the beginning that all packets of a track share, so that packets are larger than the file's.
_OMITTED_BYTES = 32
# Decoders check sizes that are rounded up to whole blocks, with a margin.
_BLOCK = 128

File = Path | io.BytesIO


class VideoError(ValueError):
    """A video can't be used; the message is one line with the remedy."""


@contextmanager
def open_container(file: File, max_pixels: int, formats: str | None = None) -> Iterator[InputContainer]:
    """Opens a file, of which FFmpeg may run the decoders of `VIDEO_CODECS` and no others.

    Args:
        file: a path, or bytes at any position.
        max_pixels: the size of the largest frame that may be decoded to find out what the header leaves open.
        formats: FFmpeg's names of the containers to accept, separated by commas; None accepts all.

    Raises:
        av.error.FFmpegError: it is not such a file.
    """
    options = {
        # an untrusted playlist must not make the decoder open other files or URLs
        "protocol_whitelist": "data" if isinstance(file, io.BytesIO) else "file",
        "codec_whitelist": ",".join(_DECODERS),
        "max_pixels": str(max_pixels),
    }
    if formats is not None:
        options["format_whitelist"] = formats
    if isinstance(file, io.BytesIO):
        file.seek(0)
    with av.open(file if isinstance(file, io.BytesIO) else str(file), mode="r", options=options) as container:
        yield container


def check_codec(stream: VideoStream, name: str) -> None:
    """
    Raises:
        VideoError: the stream's codec is not one of `VIDEO_CODECS`; `name` is the file's in the message.
    """
    context = stream.codec_context
    codec = context.codec.canonical_name if context else "an unknown one"
    if codec not in VIDEO_CODECS:
        raise VideoError(
            f"{name} has the video codec {codec}, which is not decoded: encode it as one of {', '.join(VIDEO_CODECS)}"
        )


def check_samples(stream: VideoStream, file: File, name: str) -> None:
    """Refuses a file whose header makes more frames of the same bytes than the file holds.

    Raises:
        VideoError: the frames that lie inside the file have more bytes than the file.
    """
    size = _size(file)
    inside = (entry.size for entry in stream.index_entries if 0 <= entry.pos <= size - entry.size)
    if sum(inside) > size:
        raise _shared_bytes(name)


def packets(container: InputContainer, stream: VideoStream, file: File, name: str) -> Iterator[Packet]:
    """Yields the packets of a stream, and the empty ones that end it.

    Raises:
        VideoError: they have more bytes than the file.
    """
    left = _size(file)
    for packet in container.demux(stream):
        left -= max(packet.size - _OMITTED_BYTES, 0)
        if left < 0:
            raise _shared_bytes(name)
        yield packet


def decoder_pixels(width: int, height: int) -> int:
    """Returns FFmpeg's `max_pixels` for frames of a size: no frame that is much larger gets any memory."""
    return (width + 2 * _BLOCK) * (height + 2 * _BLOCK)


def _size(file: File) -> int:
    return len(file.getbuffer()) if isinstance(file, io.BytesIO) else file.stat().st_size


def _shared_bytes(name: str) -> VideoError:
    return VideoError(f"{name} has frames that share their bytes, more than the file holds: encode it again")
