"""Videos: from a file, a URL or frames to sampled, timestamped, resized frames and their patches.

Sampling, size budget and timestamps follow transformers' Qwen3VLVideoProcessor and Qwen3VLProcessor. Frames are resized
with Pillow, not torchvision, which rounds the last bit of some pixels otherwise; frames that need no resizing give the
same arrays bit for bit.

`cap_pixels_per_frame` is off unless the checkpoint's file turns it on, as in transformers 5.23, which announces
another default for later versions.
"""

import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import av.error
import numpy as np
from av.container import InputContainer
from PIL import Image

from deepstack_jax.config import VisionConfig
from deepstack_jax.processing.images import (
    MAX_ASPECT_RATIO,
    MAX_IMAGE_PIXELS,
    ImageSettings,
    ImageSource,
    common_settings,
    load_image,
    patchify,
    read_processor_config,
    resize,
)
from deepstack_jax.processing.sources import describe, open_source

MAX_VIDEO_BYTES = 1 << 30
DEFAULT_FPS = 24.0

VideoSource = str | Path | io.BytesIO | np.ndarray | Sequence[ImageSource]


class VideoError(ValueError):
    """A video that can't be used; the message is one line with the remedy."""


@dataclass(frozen=True)
class VideoSettings(ImageSettings):
    """How a video becomes patches. `min_pixels` and `max_pixels` count the sampled frames together."""

    min_pixels: int = 4096
    max_pixels: int = 25165824
    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 768
    do_sample_frames: bool = True
    cap_pixels_per_frame: bool = False
    max_video_tokens: int = 768


@dataclass(frozen=True)
class Video:
    """Sampled frames `[F, H, W, 3]` uint8, their numbers in the whole video of `total_frames` frames at `fps`."""

    frames: np.ndarray
    fps: float
    frame_indices: tuple[int, ...]
    total_frames: int

    def timestamps(self, temporal_patch_size: int) -> list[float]:
        """Seconds of each temporal patch: the mean of its first and its last frame's time."""
        indices = list(self.frame_indices)
        indices += indices[-1:] * (-len(indices) % temporal_patch_size)
        times = [index / self.fps for index in indices]
        firsts, lasts = times[::temporal_patch_size], times[temporal_patch_size - 1 :: temporal_patch_size]
        return [(first + last) / 2 for first, last in zip(firsts, lasts, strict=True)]


def load_video(
    source: VideoSource,
    settings: VideoSettings,
    fps: float | None = None,
    do_sample_frames: bool | None = None,
) -> Video:
    """Samples a video and resizes the sampled frames to the budget; no other frame is kept.

    Args:
        source: a path, an http(s) URL or data URI of a video file, its bytes, an array `[F, H, W, 3]` uint8, or a
            sequence of images as `load_image` takes them.
        fps: of a file, how many frames a second to sample; of given frames, how many of them make a second (24).
        do_sample_frames: False keeps every frame.

    Raises:
        VideoError: no frames, not a video, a missing file, frames of unlike sizes, too large or too narrow.
    """
    if fps is not None and not fps > 0:
        raise VideoError(f"fps {fps} of a video must be above 0")
    sample = settings.do_sample_frames if do_sample_frames is None else do_sample_frames
    if isinstance(source, str | Path | io.BytesIO):
        return _load_file(source, settings, fps or settings.fps, sample)
    frames = _frames(source)
    fps = fps or DEFAULT_FPS
    indices = sample_frames(len(frames), fps, settings) if sample else range(len(frames))
    height, width = _target_size(len(indices), frames[0], settings)
    resized = [_resized(frames[i], height, width, settings) for i in indices]
    return Video(np.stack(resized), fps, tuple(map(int, indices)), len(frames))


def preprocess_videos(videos: Sequence[Video], settings: VideoSettings) -> tuple[np.ndarray, np.ndarray]:
    """Turns loaded videos into `(pixel_values_videos [P, C*Tp*p*p] float32, video_grid_thw [n, 3] int64)`."""
    # transformers' video processor divides once, by 255 times the deviation
    scale = np.float32(1 / settings.rescale_factor)
    mean, std = (np.array(values, np.float32)[:, None] * scale for values in (settings.mean, settings.std))
    table = (np.arange(256, dtype=np.float32) - mean) / std
    rows, grids = [], []
    for video in videos:
        rows.append(patchify(video.frames, table, settings))
        count, height, width, _ = video.frames.shape
        steps = -(-count // settings.temporal_patch_size)
        grids.append((steps, height // settings.patch_size, width // settings.patch_size))
    return np.concatenate(rows), np.array(grids, np.int64)


def sample_frames(total: int, video_fps: float, settings: VideoSettings, fps: float | None = None) -> np.ndarray:
    """Numbers of the frames sampled from `total`: evenly, `fps` a second, within the settings' bounds."""
    wanted = int(total / video_fps * (fps or settings.fps))
    count = min(max(wanted, settings.min_frames), settings.max_frames, total)
    return np.linspace(0, total - 1, count).round().astype(int)


def smart_resize_video(
    num_frames: int, height: int, width: int, settings: VideoSettings, max_pixels: int
) -> tuple[int, int]:
    """The size the frames are resized to; the rule is that of transformers' Qwen3VLVideoProcessor."""
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


def read_video_settings(directory: Path, vision: VisionConfig) -> VideoSettings:
    """The video settings of a checkpoint; without a file of them, Qwen3-VL's with the encoder's own patch sizes."""
    names = ("video_preprocessor_config.json", "preprocessor_config.json")
    raw = read_processor_config(directory, "video_processor", names)
    if raw is None:
        return VideoSettings(vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size)
    # what the file leaves out takes the value of transformers' class, so that both make the same arrays
    size = raw.get("size") or {"shortest_edge": 128 * 32 * 32, "longest_edge": 32 * 32 * 768}
    chosen = {key: raw[key] for key in ("fps", "min_frames", "max_frames", "max_video_tokens") if raw.get(key)}
    chosen |= {key: raw[key] for key in ("do_sample_frames", "cap_pixels_per_frame") if raw.get(key) is not None}
    return VideoSettings(**common_settings(raw, vision, size, (0.5,) * 3, (0.5,) * 3), **chosen)


def _load_file(source: str | Path | io.BytesIO, settings: VideoSettings, fps: float, sample: bool) -> Video:
    name = describe(source)
    file = open_source(source, MAX_VIDEO_BYTES, VideoError)
    try:
        total, video_fps = _probe(file, name)
        while total:
            indices = sample_frames(total, video_fps, settings, fps) if sample else np.arange(total)
            decoded, frames = _decode(file, indices, settings)
            if len(frames) == len(indices):
                return Video(np.stack(frames), video_fps, tuple(indices.tolist()), total)
            total = decoded  # the header promised more than the file holds: sample what is there
    except av.error.EOFError:
        pass  # the file ends after its header
    except av.error.FFmpegError as error:
        raise VideoError(f"{name} is not a video that can be decoded ({error.strerror}): give an intact file") from None
    raise VideoError(f"{name} is a video with no frames: give one with at least one frame")


def _open(file: Path | io.BytesIO) -> InputContainer:
    if isinstance(file, io.BytesIO):
        file.seek(0)
        # a playlist from elsewhere must not make the decoder open files or URLs of its choice
        return av.open(file, mode="r", options={"protocol_whitelist": "data"})
    return av.open(str(file), mode="r", options={"protocol_whitelist": "file"})


def _probe(file: Path | io.BytesIO, name: str) -> tuple[int, float]:
    """The number of frames and frames a second, without decoding."""
    with _open(file) as container:
        if not container.streams.video:
            raise VideoError(f"{name} has no video stream: give a video file")
        stream = container.streams.video[0]
        if stream.width * stream.height > MAX_IMAGE_PIXELS:
            raise VideoError(f"{name} has frames of {stream.width}x{stream.height}, too large: scale it down")
        # Matroska, GIF and MPEG-TS do not say how many frames there are
        total = stream.frames or sum(1 for packet in container.demux(stream) if packet.size)
        return total, float(stream.average_rate or stream.guessed_rate or DEFAULT_FPS)


def _decode(file: Path | io.BytesIO, indices: np.ndarray, settings: VideoSettings) -> tuple[int, list[np.ndarray]]:
    """Decodes up to the last index; gives how many frames that took and those asked for, resized."""
    wanted, last = set(indices.tolist()), int(indices[-1])
    frames: list[np.ndarray] = []
    size: tuple[int, int] | None = None
    decoded = 0
    with _open(file) as container:
        container.streams.video[0].thread_type = "AUTO"
        for number, frame in enumerate(_decodable(container)):
            decoded = number + 1
            if number in wanted:
                # quarter turns that a phone notes beside the picture
                image = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
                size = size or _target_size(len(indices), image, settings)
                frames.append(_resized(image, *size, settings))
            if number == last:
                break
    return decoded, frames


def _decodable(container: InputContainer) -> Iterator[av.VideoFrame]:
    """Decoded frames up to the first that is damaged: a recording cut short still has what came before."""
    try:
        yield from container.decode(video=0)
    except av.error.InvalidDataError:
        return


def _frames(source: np.ndarray | Sequence[ImageSource]) -> np.ndarray:
    if isinstance(source, np.ndarray):
        if source.ndim != 4 or source.shape[3] != 3 or source.dtype != np.uint8:
            raise VideoError(f"video array {list(source.shape)} of {source.dtype}: give [F, H, W, 3] of uint8")
        frames = source
    elif isinstance(source, list | tuple):
        images = [np.asarray(load_image(frame)) for frame in source]
        sizes = {image.shape[:2] for image in images}
        if len(sizes) > 1:
            raise VideoError(f"video frames have unlike sizes {sorted(sizes)}: give frames of one size")
        frames = np.stack(images) if images else np.empty((0, 1, 1, 3), np.uint8)
    else:
        raise VideoError(
            f"a video can't be read from {type(source).__name__}: give a path, URL, array or list of frames"
        )
    if not frames.size:
        raise VideoError(f"video with no frames (shape {list(frames.shape)}): give at least one")
    return frames


def _target_size(num_frames: int, frame: np.ndarray, settings: VideoSettings) -> tuple[int, int]:
    height, width = frame.shape[:2]
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise VideoError(
            f"video frames of {width}x{height} have an aspect ratio above {MAX_ASPECT_RATIO}: crop or pad them"
        )
    # a single frame is repeated to fill its temporal patch, and counts as often
    num_frames = max(num_frames, settings.temporal_patch_size)
    max_pixels = settings.max_pixels
    if settings.cap_pixels_per_frame:
        cap = min(settings.max_video_tokens * settings.factor**2, settings.max_pixels // num_frames)
        max_pixels = max(cap, int(settings.min_pixels * 1.05)) * num_frames
    return smart_resize_video(num_frames, height, width, settings, max_pixels)


def _resized(frame: np.ndarray, height: int, width: int, settings: VideoSettings) -> np.ndarray:
    if frame.shape[:2] == (height, width):
        return frame
    return resize(Image.fromarray(np.ascontiguousarray(frame)), height, width, settings.resample)
