"""What may come from outside: images and videos named or carried by requests, checked before anything is decoded.

Everything is refused unless a policy allows it. The library's own reader (`processing/sources.py`) trusts its caller;
this one trusts neither the request, nor the names in it, nor the servers that they lead to.
"""

import asyncio
import io
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit

from deepstack_jax.processing.daemon_threads import DaemonThreads
from deepstack_jax.processing.decoders import Decoders
from deepstack_jax.processing.images import ImageOptions, ImageSettings
from deepstack_jax.processing.media import video_of
from deepstack_jax.processing.sources import MediaFile, decode_base64, describe, looks_like_media, open_source
from deepstack_jax.processing.videos import VideoError, VideoOptions, VideoSettings, jpeg_frames
from deepstack_jax.serving.fetch import fetch
from deepstack_jax.serving.policy import Budget, MediaError, MediaPolicy

Admitted = MediaFile | list[MediaFile]

_file_threads = DaemonThreads("files", 8)  # a disk that hangs keeps only other files waiting
_IN_PROCESS = Decoders(0)


async def admit(
    kind: Literal["image", "video"],
    source: object,
    policy: MediaPolicy,
    budget: Budget | None = None,
    options: ImageOptions | VideoOptions | None = None,
    decoders: Decoders = _IN_PROCESS,
) -> Admitted:
    """Reads one source and checks what its header says; nothing else is decoded yet.

    Args:
        kind: what it is meant to be.
        source: a path, a `file:`, `http:` or `https:` URL, a `data:` URI, or base64; of a video also a list of these,
            each a picture.
        policy: what is allowed.
        budget: shared by the media of one request; one of its own without.
        options: with which it will be loaded; those that make it larger count.
        decoders: read the headers.

    Returns:
        The file of an image or a video, or of each of its frames: what `load_image` and `load_video` take.

    Raises:
        MediaError: one line that names the source, what is wrong and the remedy.
    """
    budget = budget or Budget(policy)
    of_video = options if isinstance(options, VideoOptions) else VideoOptions()
    if kind == "video" and isinstance(source, list | tuple):
        return await _admit_frames(source, policy, budget, of_video, decoders)
    if kind == "video" and (pictures := await asyncio.to_thread(_jpeg_frames, source, policy, budget)) is not None:
        frames = await _check_frames(pictures, budget, of_video, decoders)
        assert isinstance(source, str)
        return video_of(frames, source.encode())
    data, name = await read(source, policy, budget), describe(source)
    async with budget.turn:
        found = await (decoders.check_image if kind == "image" else decoders.check_video)(data, name)
    if kind == "image":
        spend_image(found, budget, name, options if isinstance(options, ImageOptions) else ImageOptions())
    else:
        spend_video(found, budget, name, of_video)
    return found


async def read(source: object, policy: MediaPolicy, budget: Budget) -> bytes:
    """The bytes behind a source that the policy allows."""
    if not isinstance(source, str) or not source:
        raise MediaError(f"an image or video is named by text, not {type(source).__name__}: send a URL or a data URI")
    name, scheme = describe(source), source.lstrip()[:8].lower()
    if scheme.startswith(("http://", "https://")):
        return await fetch(source, policy, budget)
    bare = _is_base64(source)
    if bare or scheme.startswith("data:"):
        if not policy.allow_data:
            raise MediaError("data URIs are not allowed here: send the URL of an allowed domain", 403)
        uri = f"data:;base64,{source}" if bare else source
        data = await asyncio.to_thread(open_source, uri, budget.bytes, MediaError)
        assert isinstance(data, io.BytesIO)
        content = data.getvalue()
        budget.spend("bytes", len(content), name)
        return content
    try:
        async with asyncio.timeout(policy.timeout):
            return await asyncio.wrap_future(_file_threads.submit(lambda: _read_file(source, policy, budget)))
    except TimeoutError:
        raise MediaError(f"{name} could not be read within {policy.timeout:g} s: try again later", 503) from None


def spend_image(image: MediaFile, budget: Budget, name: str, options: ImageOptions) -> None:
    """Takes what an image comes to, by its header."""
    resized = (options.resized_height or 0) * (options.resized_width or 0)
    most = options.max_pixels or ImageSettings.max_pixels
    budget.spend("pixels", max(image.width * image.height, options.min_pixels or 0, min(resized, most)), name)


def spend_video(video: MediaFile, budget: Budget, name: str, options: VideoOptions) -> None:
    """Takes what a video comes to, by its header."""
    budget.spend("seconds", video.frames / video.fps, name)
    _spend_frames(video.frames, video.width * video.height, budget, name, options)
    budget.spend("decoded pixels", video.width * video.height * video.frames, name)


# ---- videos as frames


async def _admit_frames(
    sources: Sequence[object], policy: MediaPolicy, budget: Budget, options: VideoOptions, decoders: Decoders
) -> list[MediaFile]:
    frames: list[bytes] = []
    budget.spend("frames", len(sources), f"a video of {len(sources)} frames")
    for number, source in enumerate(sources, 1):
        if isinstance(source, str) and source.lstrip()[:4].lower() == "http":
            budget.spend("items", 1, describe(source))  # each takes a connection, and time
        try:
            frames.append(await read(source, policy, budget))
        except MediaError as error:
            raise MediaError(f"frame {number} of {len(sources)} of a video: {error}", error.status) from None
    return await _check_frames(frames, budget, options, decoders, counted=True)


def _jpeg_frames(source: object, policy: MediaPolicy, budget: Budget) -> list[bytes] | None:
    """The frames of a data URI of the type video/jpeg; None for another source."""
    if not isinstance(source, str) or source.lstrip()[:5].lower() != "data:":
        return None
    # as many characters as the bytes make in percent signs are surely too many
    too_long = len(source) > 4 * budget.bytes + 1000
    try:
        frames = None if too_long else jpeg_frames(source)
    except VideoError as error:
        raise MediaError(str(error)) from None
    if frames is None:
        return None
    if not policy.allow_data:
        raise MediaError("data URIs are not allowed here: send the URL of an allowed domain", 403)
    budget.spend("bytes", sum(map(len, frames)), describe(source))
    return frames


async def _check_frames(
    pictures: list[bytes], budget: Budget, options: VideoOptions, decoders: Decoders, counted: bool = False
) -> list[MediaFile]:
    async with budget.turn:
        frames = await decoders.check_frames(pictures)
    name, sizes = f"a video of {len(frames)} frames", [frame.width * frame.height for frame in frames]
    budget.spend("decoded pixels", sum(sizes), name)
    _spend_frames(len(frames), max(sizes), budget, name, options, counted)
    return frames


def _spend_frames(
    frames: int, pixels: int, budget: Budget, name: str, options: VideoOptions, counted: bool = False
) -> None:
    """Takes what `frames` frames of `pixels` pixels come to, once they are sampled and resized."""
    wanted = max(frames, options.num_frames or 0)
    budget.spend("frames", wanted - counted * frames, name)
    resized = (options.resized_height or 0) * (options.resized_width or 0)
    most = options.max_pixels or VideoSettings.max_pixels
    budget.spend("pixels", max(pixels, options.min_pixels or 0, min(max(pixels, resized) * wanted, most)), name)


# ---- data and files


def _is_base64(source: str) -> bool:
    """Whether a source is the base64 of a picture or video, without a header."""
    letters = "".join(source[:1000].split())[:400]
    try:
        return looks_like_media(decode_base64(letters.rstrip("=")[: len(letters.rstrip("=")) // 4 * 4]))
    except ValueError:
        return False


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
        raise MediaError(f"{name} is not a file name: send a path under the allowed folder") from None
    # one error for all outside paths, so that it doesn't reveal what exists
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
        # opening a device or a pipe may have effects: check before, and check again what was opened
        if not stat.S_ISREG(os.stat(parts[-1], dir_fd=here, follow_symlinks=False).st_mode):
            raise OSError(0, "not a regular file")
        file = os.open(parts[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=here)
    finally:
        os.close(here)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise OSError(0, "not a regular file")
    return file
