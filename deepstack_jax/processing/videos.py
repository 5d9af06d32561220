"""Turns videos (files, URLs or frames) into sampled, timestamped, resized frames and their patches.

Sampling, size budget and timestamps follow transformers' Qwen3VLVideoProcessor and Qwen3VLProcessor. Frames are resized
with Pillow, not torchvision, which rounds the last bit of some pixels differently; frames that need no resizing give
the same arrays bit for bit.
"""

import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast
from urllib.parse import unquote

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image

from deepstack_jax.processing.images import (
    MAX_ASPECT_RATIO,
    MAX_IMAGE_PIXELS,
    ImageError,
    ImageSource,
    load_image,
    patchify,
    resize,
)
from deepstack_jax.processing.moving_pictures import DEFAULT_FPS, VideoError, VideoProbe, decode, no_frames, probe
from deepstack_jax.processing.sources import (
    MediaFile,
    MediaSource,
    decode_base64,
    describe,
    host_array,
    is_array,
    is_file,
    open_source,
)
from deepstack_jax.processing.video_settings import (
    MAX_FRAMES,
    VIDEO_OPTIONS,
    VideoOptions,
    VideoSettings,
    read_video_settings,
)
from deepstack_jax.rounding import cdiv

MAX_VIDEO_BYTES = 1 << 30
# vLLM's frame rate for frames that its clients send in one data URI
JPEG_FRAMES_FPS = 2.0

__all__ = [
    "VIDEO_OPTIONS",
    "Video",
    "VideoError",
    "VideoOptions",
    "VideoSettings",
    "VideoSource",
    "jpeg_frames",
    "load_video",
    "preprocess_videos",
    "read_video_settings",
    "sample_frames",
    "smart_resize_video",
]

VideoSource = MediaSource | ArrayLike | Sequence[ImageSource]


@dataclass(frozen=True)
class Video:
    """Sampled frames, uint8 `[F, H, W, 3]`, and their indices in the whole video of `total_frames` frames at `fps`."""

    frames: np.ndarray
    fps: float
    frame_indices: tuple[int, ...]
    total_frames: int

    def timestamps(self, temporal_patch_size: int) -> list[float]:
        """Returns the time of each temporal patch in seconds: the mean of the times of its first and last frame."""
        indices = list(self.frame_indices)
        indices += indices[-1:] * (-len(indices) % temporal_patch_size)
        times = [index / self.fps for index in indices]
        firsts, lasts = times[::temporal_patch_size], times[temporal_patch_size - 1 :: temporal_patch_size]
        return [(first + last) / 2 for first, last in zip(firsts, lasts, strict=True)]


def load_video(source: VideoSource, settings: VideoSettings, options: VideoOptions | None = None) -> Video:
    """Samples a video and resizes the sampled frames to the budget; no other frame is kept.

    Args:
        source: a path, an http(s) URL or data URI of a video or an animated picture (GIF, WebP, PNG, AVIF), its bytes,
            a file object, an array `[F, H, W, 3]` of any library, or a sequence of images as `load_image` takes them.
            `data:video/jpeg;base64,` followed by pictures in base64, separated by commas, holds frames that are already
            sampled at 2 per second.
        settings: the checkpoint's settings.
        options: the values that replace the settings for this video.

    Raises:
        VideoError: the file is missing or not a video, has no frames, or has frames that differ in size, are too large
            or are too narrow.
    """
    options = options or VideoOptions()
    if (frames := jpeg_frames(source)) is not None:
        options = replace(options, do_sample_frames=options.do_sample_frames or False)
        return _load_frames(frames, settings, options, JPEG_FRAMES_FPS)
    if is_file(source):
        return _load_file(cast(MediaSource, source), settings, options)
    return _load_frames(_frames(source), settings, options, DEFAULT_FPS)


def jpeg_frames(source: object) -> list[bytes] | None:
    """Returns the frames in a data URI (text or bytes) of the type video/jpeg, or None for any other source.

    Raises:
        VideoError: a frame is empty or not base64 (the message gives its number), or there are too many.
    """
    start, text = _text_of(source)
    head = re.match(r"\s*data:\s*video/jpe?g\s*(;[^,]*)?,", start, re.IGNORECASE)
    if head is None:
        return None
    pieces = text()[head.end() :].split(",")
    if len(pieces) > MAX_FRAMES:
        raise VideoError(f"data URI of {len(pieces)} frames, more than {MAX_FRAMES}: send fewer")
    return [_jpeg_frame(piece, number, len(pieces)) for number, piece in enumerate(pieces, 1)]


def preprocess_videos(videos: Sequence[Video], settings: VideoSettings) -> tuple[np.ndarray, np.ndarray]:
    """Turns loaded videos into `(pixel_values_videos [P, C*Tp*p*p] float32, video_grid_thw [n, 3] int64)`."""
    # like transformers' video processor, this divides once, by 255 times the deviation
    scale = np.float32(1 / settings.rescale_factor)
    mean, std = (np.array(values, np.float32)[:, None] * scale for values in (settings.mean, settings.std))
    table = (np.arange(256, dtype=np.float32) - mean) / std
    rows, grids = [], []
    for video in videos:
        rows.append(patchify(video.frames, table, settings))
        count, height, width, _ = video.frames.shape
        steps = cdiv(count, settings.temporal_patch_size)
        grids.append((steps, height // settings.patch_size, width // settings.patch_size))
    return rows[0] if len(rows) == 1 else np.concatenate(rows), np.array(grids, np.int64)


def sample_frames(total: int, video_fps: float, settings: VideoSettings, fps: float | None = None) -> np.ndarray:
    """Returns the indices of the frames sampled from `total`, int64 `[F]`.

    They are evenly spaced: `num_frames` of them, or `fps` per second within the settings' bounds. The rule is that of
    transformers' Qwen3VLVideoProcessor.
    """
    rate = settings.fps if fps is None else fps
    if fps is None and settings.num_frames is not None:
        count = settings.num_frames
    elif rate is None:
        count = min(max(total, settings.min_frames), settings.max_frames)
    else:
        wanted = int(min(total / video_fps * rate, total))
        count = min(max(wanted, settings.min_frames), settings.max_frames, total)
    return np.linspace(0, total - 1, max(count, 1)).round().astype(int)


def smart_resize_video(
    num_frames: int, height: int, width: int, settings: VideoSettings, max_pixels: int
) -> tuple[int, int]:
    """Returns the (height, width) that frames are resized to, by the rule of transformers' Qwen3VLVideoProcessor."""
    factor, tp = settings.factor, settings.temporal_patch_size
    if min(height, width) < factor:
        enlarge = max(factor / height, factor / width)
        height, width = int(height * enlarge), int(width * enlarge)
    rows, columns = round(height / factor) * factor, round(width / factor) * factor
    frames = round(num_frames / tp) * tp
    if frames * rows * columns > max_pixels:
        scale = math.sqrt(num_frames * height * width / max_pixels)
        rows = max(factor, math.floor(height / scale / factor) * factor)
        columns = max(factor, math.floor(width / scale / factor) * factor)
    elif frames * rows * columns < settings.min_pixels:
        scale = math.sqrt(settings.min_pixels / (num_frames * height * width))
        rows, columns = (math.ceil(side * scale / factor) * factor for side in (height, width))
    return rows, columns


def _in_force(settings: VideoSettings, options: VideoOptions) -> VideoSettings:
    """Returns the settings with the options in place of the checkpoint's values."""
    names = ("num_frames", "min_frames", "max_frames", "do_sample_frames", "min_pixels", "max_pixels")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    return replace(settings, **given)


def _sampling(settings: VideoSettings, options: VideoOptions) -> VideoSettings:
    """Returns the settings by which a file is sampled; `fps` says what a list of frames has, and what a file gets."""
    settings = _in_force(settings, options)
    return replace(settings, fps=options.fps, num_frames=None) if options.fps else settings


def _indices(total: int, video_fps: float, settings: VideoSettings) -> np.ndarray:
    return sample_frames(total, video_fps, settings) if settings.do_sample_frames else np.arange(total)


def prepared_pixels(video: MediaFile, settings: VideoSettings, options: VideoOptions) -> int:
    """Returns about how many pixels a video's sampled, resized frames will have together, by what its header says."""
    settings = _sampling(settings, options)
    if video.fps:
        count = len(_indices(video.frames, video.fps, settings))
    else:
        count = max(video.frames, settings.num_frames or 0)
    height, width = _fitted_size(count, video.height, video.width, settings, options)
    return cdiv(count, settings.temporal_patch_size) * settings.temporal_patch_size * height * width


# ---- files


def _load_file(source: MediaSource, settings: VideoSettings, options: VideoOptions) -> Video:
    name = describe(source)
    settings = _sampling(settings, options)
    file = open_source(source, MAX_VIDEO_BYTES, VideoError)
    found = probe(file, name)
    total = found.frames
    while total:
        indices = _indices(total, found.fps, settings)
        numbers, places = np.unique(indices, return_inverse=True)
        decoded, frames = _decode(file, found, numbers, len(indices), settings, options, name)
        if len(frames) == len(numbers):
            return Video(np.stack(frames)[places], found.fps, tuple(indices.tolist()), total)
        total = decoded  # the header announces more frames than the file holds: sample from those that are there
    raise no_frames(name)


def _decode(
    file: Path | io.BytesIO,
    found: VideoProbe,
    numbers: np.ndarray,
    count: int,
    settings: VideoSettings,
    options: VideoOptions,
    name: str,
) -> tuple[int, list[np.ndarray]]:
    """Decodes up to the last of `numbers`; returns how many frames it decoded, and the requested ones, resized."""
    wanted, last = set(numbers.tolist()), int(numbers[-1])
    frames: list[np.ndarray] = []
    size: tuple[int, int] | None = None
    decoded = 0
    for frame in decode(file, found, wanted, name):
        decoded += 1
        if frame is not None:
            size = size or _fitted_size(count, frame.shape[0], frame.shape[1], settings, options)
            frames.append(_resized(frame, *size, settings))
        if decoded > last:
            break
    return decoded, frames


# ---- frames


def _load_frames(
    frames: Sequence[ImageSource], settings: VideoSettings, options: VideoOptions, usual_fps: float
) -> Video:
    if not len(frames):
        raise VideoError("video with no frames: give at least one")
    settings = _in_force(settings, options)
    fps = options.fps or usual_fps
    indices = _indices(len(frames), fps, settings)
    numbers, places = np.unique(indices, return_inverse=True)
    wanted = set(numbers.tolist())
    resized: list[np.ndarray] = []
    size: tuple[int, int] | None = None
    for number, frame in enumerate(_loaded(frames)):
        size = size or _fitted_size(len(indices), frame.shape[0], frame.shape[1], settings, options)
        if number in wanted:
            resized.append(_resized(frame, *size, settings))
    return Video(np.stack(resized)[places], fps, tuple(indices.tolist()), len(frames))


def _loaded(frames: Sequence[ImageSource] | np.ndarray) -> Iterable[np.ndarray]:
    """Yields frames as RGB arrays of one size, one at a time, because a list of files may not fit in memory decoded."""
    if isinstance(frames, np.ndarray) and frames.dtype == np.uint8 and frames.shape[3] == 3:
        yield from frames
        return
    first = ""
    for number, frame in enumerate(frames, 1):
        try:
            image = load_image(frame)
        except ImageError as error:
            raise VideoError(f"frame {number} of {len(frames)} of a video: {error}") from None
        size = f"{image.width}x{image.height}"
        first = first or size
        if size != first:
            raise VideoError(
                f"video frames have different sizes, {first} of frame 1 and {size} of frame {number}: "
                "give all the same size"
            )
        yield np.asarray(image)


def _frames(source: object) -> Sequence[ImageSource]:
    if isinstance(source, list | tuple):
        return source
    if isinstance(source, Image.Image):
        raise VideoError("a PIL image is one picture: pass it as an image, a list of them, or the file of an animation")
    if not is_array(source):
        raise VideoError(
            f"a video can't be read from {type(source).__name__}: give a path, URL, bytes, file object, array or list "
            "of frames"
        )
    array = host_array(source, "a video", VideoError)
    if not array.size:
        raise VideoError(f"video with no frames (shape {list(array.shape)}): give at least one")
    if array.ndim != 4:
        raise VideoError(f"video array {list(array.shape)} of {array.dtype}: give [F, H, W, 3] of uint8")
    return cast(Sequence[ImageSource], array)


def _jpeg_frame(piece: str, number: int, count: int) -> bytes:
    try:
        content = decode_base64(unquote(piece))
    except ValueError:
        content = None
    if not content:
        problem = "is empty" if content is not None else "is not valid base64"
        raise VideoError(
            f"frame {number} of {count} of data:video/jpeg {problem}: write the base64 of each picture with one comma "
            "between two"
        )
    return content


def _text_of(source: object) -> tuple[str, Callable[[], str]]:
    """Returns the start of a source that is or holds text, and a function that returns the whole text."""
    if isinstance(source, str):
        return source[:200], lambda: source
    if isinstance(source, MediaFile):
        source = source.data
    if isinstance(source, io.BytesIO):
        source = source.getbuffer()
    if isinstance(source, bytes | bytearray | memoryview):
        content = memoryview(source).cast("B")
        return bytes(content[:200]).decode("latin-1"), lambda: bytes(content).decode("latin-1")
    return "", str


# ---- sizes


def _fitted_size(
    num_frames: int, height: int, width: int, settings: VideoSettings, options: VideoOptions
) -> tuple[int, int]:
    """Returns the (height, width) to which each of `num_frames` sampled frames of a size is resized."""
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise VideoError(
            f"video frames of {width}x{height} have an aspect ratio above {MAX_ASPECT_RATIO}: crop or pad them"
        )
    height, width = options.resized_height or height, options.resized_width or width
    # a single frame is repeated to fill its temporal patch, and each repetition counts
    num_frames = max(num_frames, settings.temporal_patch_size)
    max_pixels = settings.max_pixels
    if settings.cap_pixels_per_frame:
        cap = min(settings.max_video_tokens * settings.factor**2, settings.max_pixels // num_frames)
        max_pixels = max(cap, int(settings.min_pixels * 1.05)) * num_frames
    rows, columns = smart_resize_video(num_frames, height, width, settings, max_pixels)
    most = max(settings.max_pixels, settings.min_pixels, MAX_IMAGE_PIXELS)
    if num_frames * rows * columns > 2 * most:
        raise VideoError(
            f"{num_frames} frames of a video at {columns}x{rows} have more than {most} pixels: sample fewer of them"
        )
    return rows, columns


def _resized(frame: np.ndarray, height: int, width: int, settings: VideoSettings) -> np.ndarray:
    if frame.shape[:2] == (height, width):
        return frame
    return resize(Image.fromarray(np.ascontiguousarray(frame)), height, width, settings.resample)
