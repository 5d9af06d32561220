"""How videos are sampled and resized: the settings in a checkpoint's files, and the options of one video.

The names, meanings and defaults are those of transformers' Qwen3VLVideoProcessor. `cap_pixels_per_frame` is off unless
the checkpoint's file turns it on, as in transformers 5.23, which announces a different default for later versions.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeGuard

from deepstack_jax.config import VisionConfig
from deepstack_jax.config_values import MAX_NUMBER
from deepstack_jax.errors import short
from deepstack_jax.processing.images import (
    MAX_IMAGE_PIXELS,
    ImageSettings,
    ProcessorConfig,
    check_order,
    check_resized,
    common_settings,
    read_processor_config,
)
from deepstack_jax.processing.moving_pictures import VideoError
from deepstack_jax.processing.sources import option_values

# more than any video needs, and few enough for a list of their numbers to fit in memory
MAX_FRAMES = 1_000_000


@dataclass(frozen=True)
class VideoSettings(ImageSettings):
    """How a video becomes patches. `min_pixels` and `max_pixels` count the pixels of all sampled frames together.

    If `num_frames` is set, that many frames are sampled at any rate. If neither it nor `fps` is set, all frames are
    sampled, within `min_frames` and `max_frames`.
    """

    min_pixels: int = 4096
    max_pixels: int = 25165824
    fps: float | None = 2.0
    num_frames: int | None = None
    min_frames: int = 4
    max_frames: int = 768
    do_sample_frames: bool = True
    cap_pixels_per_frame: bool = False
    max_video_tokens: int = 768


@dataclass(frozen=True)
class VideoOptions:
    """How one video is sampled and resized; replaces the checkpoint's settings.

    The names and meanings are those of transformers' video processor. `min_pixels` and `max_pixels` are the two edges
    of its `size` and count the pixels of all sampled frames together.

    Attributes:
        fps: for a file, how many frames are sampled per second; for given frames, their own rate (24 by default).
        num_frames: how many frames are sampled; if the video has fewer, frames are repeated.
        min_frames, max_frames: bounds on the number of frames that `fps` gives.
        do_sample_frames: False keeps every frame, regardless of the other options.
        min_pixels, max_pixels: if only one of the two is given, the settings' other bound stays in force.
        resized_height, resized_width: the size that the frames are resized to, rounded to whole merge blocks and kept
            within the bounds.

    Raises:
        VideoError: a value is not a number above 0 or is too large, or options are mutually exclusive.
    """

    fps: float | None = None
    num_frames: int | None = None
    min_frames: int | None = None
    max_frames: int | None = None
    do_sample_frames: bool | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    resized_height: int | None = None
    resized_width: int | None = None

    def __post_init__(self) -> None:
        option_values(asdict(self), _OPTION_KINDS, "a video", VideoError)
        if self.fps and self.num_frames:
            raise VideoError(
                f"fps {self.fps:g} and num_frames {self.num_frames} of a video can't both be given: give one of them"
            )
        for name, most in _MOST.items():
            if (value := getattr(self, name) or 0) > most:
                raise VideoError(f"{name} {value} of a video is above {most}: lower it")
        check_order(self.min_frames, self.max_frames, "frames", "a video", VideoError)
        check_order(self.min_pixels, self.max_pixels, "pixels", "a video", VideoError)
        check_resized(self.resized_height, self.resized_width, "a video", VideoError)

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> "VideoOptions":
        """Reads options by name, as given in a part of a message. Null values count as absent.

        Raises:
            VideoError: an unknown name, or a value that the class refuses.
        """
        return cls(**option_values(raw, _OPTION_KINDS, "a video", VideoError))


_OPTION_KINDS: dict[str, type] = {
    field.name: {"fps": float, "do_sample_frames": bool}.get(field.name, int) for field in fields(VideoOptions)
}
_MOST = {"num_frames": MAX_FRAMES, "min_pixels": MAX_IMAGE_PIXELS}
VIDEO_OPTIONS: tuple[str, ...] = tuple(_OPTION_KINDS)


def read_video_settings(directory: Path, vision: VisionConfig) -> VideoSettings:
    """Returns the video settings of a checkpoint; without a file, they are Qwen3-VL's with the encoder's patch sizes.

    Raises:
        ConfigError: a file is not valid JSON.
        ImageError, VideoError: a setting is not supported; the message names the file, the key, its value and what is
            allowed.
    """
    names = ("video_preprocessor_config.json", "preprocessor_config.json")
    raw = read_processor_config(directory, "video_processor", names)
    if raw is None:
        return VideoSettings(vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size)
    # missing keys take the defaults of transformers' class, so that both make the same arrays
    size = raw.get("size", {"shortest_edge": 128 * 32 * 32, "longest_edge": 32 * 32 * 768})
    common = common_settings(raw, vision, size, (0.5,) * 3, (0.5,) * 3)
    if not common["rescale_factor"]:
        raise VideoError(f"rescale_factor 0 of {raw.file} makes every frame black: remove it")
    return VideoSettings(**common, **_sampling(raw))


_LEAST = {"num_frames": 1, "min_frames": 0, "max_frames": 1, "max_video_tokens": 0}


def _sampling(raw: ProcessorConfig) -> dict[str, Any]:
    """Returns the fields that `VideoSettings` adds to those of `ImageSettings`, if a file has them."""
    chosen: dict[str, Any] = {}
    for key in ("do_sample_frames", "cap_pixels_per_frame"):
        if key in raw:
            if not isinstance(raw[key], bool):
                raise VideoError(f"{key} {short(raw[key])} of {raw.file} must be true or false")
            chosen[key] = raw[key]
    for key, least in _LEAST.items():
        if key in raw:
            if not _is_number(raw[key]) or raw[key] != int(raw[key]) or not least <= raw[key] <= MAX_FRAMES:
                raise VideoError(
                    f"{key} {short(raw[key])} of {raw.file} must be a whole number, {least} to {MAX_FRAMES}"
                )
            chosen[key] = int(raw[key])
    if "fps" in raw:
        if not _is_number(raw["fps"]) or raw["fps"] < 0:
            raise VideoError(f"fps {short(raw['fps'])} of {raw.file} must be a number, 0 or more")
        chosen["fps"] = float(raw["fps"])
        if "num_frames" in raw:
            raise VideoError(
                f"fps {short(raw['fps'])} and num_frames {raw['num_frames']} of {raw.file} can't both be given: "
                "drop one"
            )
    # for these two, transformers distinguishes null from an absent key
    read_as = {"fps": None, "do_sample_frames": False}
    return chosen | {key: value for key, value in read_as.items() if key in raw.nulls}


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= MAX_NUMBER
