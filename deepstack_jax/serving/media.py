"""What may come from outside: images and videos named or carried by requests, checked before anything is decoded.

Everything is refused unless a policy allows it. The library's own reader (`processing/sources.py`) trusts its caller;
this one trusts nobody: neither the request, nor the names in it, nor the servers that they lead to.
"""

import asyncio
import io
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit

import av
import av.error
from PIL import Image, UnidentifiedImageError

from deepstack_jax.processing.sources import describe, one_line, open_source
from deepstack_jax.processing.videos import DEFAULT_FPS, VideoSettings
from deepstack_jax.serving.fetch import fetch
from deepstack_jax.serving.policy import Budget, MediaError, MediaPolicy

# Pillow's other formats run programs (EPS), or have had little scrutiny.
IMAGE_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
# No playlists: they name other files.
VIDEO_FORMATS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,mpegvideo,ogg,flv,asf,gif,h264,hevc"


async def admit(
    kind: Literal["image", "video"],
    source: object,
    policy: MediaPolicy,
    budget: Budget | None = None,
) -> Image.Image | io.BytesIO:
    """Reads one source and checks what its header says; nothing is decoded yet.

    Args:
        kind: what it is meant to be.
        source: a path, a `file:`, `http:` or `https:` URL, or a `data:` URI.
        policy: what is allowed.
        budget: shared by the media of one request; one of its own without.

    Returns:
        An opened image, whose pixels are decoded when it is used, or the bytes of a video: what `load_image` and
        `load_video` take.

    Raises:
        MediaError: one line that names the source, what is wrong and the remedy.
    """
    budget = budget or Budget(policy)
    data = io.BytesIO(await read(source, policy, budget))
    check = check_image if kind == "image" else check_video
    return await asyncio.to_thread(check, data, budget, describe(source))


async def read(source: object, policy: MediaPolicy, budget: Budget) -> bytes:
    """The bytes behind a source that the policy allows."""
    if not isinstance(source, str) or not source:
        raise MediaError(f"an image or video is named by text, not {type(source).__name__}: send a URL or a data URI")
    name, scheme = describe(source), source[:8].lower()
    if scheme.startswith(("http://", "https://")):
        return await fetch(source, policy, budget)
    if scheme.startswith("data:"):
        if not policy.allow_data:
            raise MediaError("data URIs are not allowed here: send the URL of an allowed domain", 403)
        data = open_source(source, budget.bytes, MediaError)
        assert isinstance(data, io.BytesIO)
        budget.spend("bytes", len(data.getbuffer()), name)
        return data.getvalue()
    return await asyncio.to_thread(_read_file, source, policy, budget)


def check_image(data: io.BytesIO, budget: Budget, name: str) -> Image.Image:
    """Opens an image and checks its format and size by its header."""
    Image.init()
    try:
        image = Image.open(data, formats=[name for name in IMAGE_FORMATS if name in Image.OPEN])
        # a photograph of two views (MPO) is none; counting all frames would take a time that the file chooses
        animated = image.format != "MPO" and getattr(image, "is_animated", False)
    except UnidentifiedImageError:
        raise MediaError(f"{name} is not an image that is read here: send one of {', '.join(IMAGE_FORMATS)}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise MediaError(f"{name} has more pixels than any image needs: scale it down", 413) from None
    except Exception as error:  # decoders raise many types for damaged headers
        raise MediaError(f"{name} can't be read ({one_line(error)}): send an intact image") from None
    if animated:
        raise MediaError(f"{name} is animated: send it as a video, or one of its frames")
    budget.spend("pixels", image.width * image.height, name)
    return image


def check_video(data: io.BytesIO, budget: Budget, name: str) -> io.BytesIO:
    """Checks a video's container, frame size, number of frames and length, without decoding a frame."""
    options = {"protocol_whitelist": "data", "format_whitelist": VIDEO_FORMATS}
    try:
        with av.open(data, mode="r", options=options) as container:
            if not container.streams.video:
                raise MediaError(f"{name} has no video stream: send a video")
            stream = container.streams.video[0]
            rate = float(stream.average_rate or stream.guessed_rate or DEFAULT_FPS)
            # some containers don't say how many frames there are
            frames = stream.frames or sum(1 for packet in container.demux(stream) if packet.size)
            pixels = stream.width * stream.height
    except av.error.FFmpegError as error:
        raise MediaError(f"{name} is not a video that is read here ({error.strerror}): send an intact one") from None
    budget.spend("frames", frames, name)
    budget.spend("seconds", frames / rate, name)
    budget.spend("pixels", max(pixels, min(pixels * frames, VideoSettings.max_pixels)), name)
    budget.spend("decoded pixels", pixels * frames, name)
    data.seek(0)
    return data


def _read_file(source: str, policy: MediaPolicy, budget: Budget) -> bytes:
    name = describe(source)
    if policy.allowed_folder is None:
        raise MediaError(f"{name}: files of the server are not allowed here: send a data URI", 403)
    if source[:5].lower() == "file:":
        parts = urlsplit(source)
        if parts.netloc not in ("", "localhost"):
            raise MediaError(f"{name} names a file of another machine: send a data URI", 403)
        source = unquote(parts.path)
    try:
        folder = policy.allowed_folder.resolve(strict=True)
        path = (folder / source).resolve()
    except (OSError, RuntimeError, ValueError):  # a loop of links, a name with a NUL
        raise MediaError(f"{name} is not a name of a file: send a path under the allowed folder") from None
    # one answer for all outside, so that nothing is learnt about what is there
    if path == folder or not path.is_relative_to(folder):
        raise MediaError(f"{name} is outside the allowed folder: send a path under it, or a data URI", 403)
    try:
        with open(_open_beneath(folder, path.relative_to(folder).parts), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            budget.spend("bytes", size, name)
            data = file.read(size + 1)
    except OSError as error:
        raise MediaError(f"{name} can't be read ({error.strerror}): give an existing file") from None
    if len(data) > size:
        raise MediaError(f"{name} grows while it is read: send a finished file")
    return data


def _open_beneath(folder: Path, parts: Sequence[str]) -> int:
    """Opens a regular file step by step from the folder. Links were resolved before: one that is met was put there
    since, and is refused."""
    here = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for part in parts[:-1]:
            below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=here)
            os.close(here)
            here = below
        # opening a device or a pipe may do something: look first, and again at what was opened
        if not stat.S_ISREG(os.stat(parts[-1], dir_fd=here, follow_symlinks=False).st_mode):
            raise OSError(0, "not a regular file")
        file = os.open(parts[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=here)
    finally:
        os.close(here)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise OSError(0, "not a regular file")
    return file
