"""Images: from a path, URL, data URI, PIL image or array to the patches that the vision encoder takes.

Resizing, normalisation and the order of the patches follow transformers' Qwen2VLImageProcessor with its PIL back end;
the arrays are equal bit for bit. Frames of videos go through the same `patchify`.
"""

import json
import math
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image, ImageOps, UnidentifiedImageError

from deepstack_jax.config import VisionConfig
from deepstack_jax.processing.sources import (
    MediaSource,
    describe,
    host_array,
    is_array,
    one_line,
    open_source,
    option_values,
)

MAX_IMAGE_PIXELS = 100_000_000
MAX_IMAGE_BYTES = 64 << 20
MAX_ASPECT_RATIO = 200

ImageSource = MediaSource | Image.Image | ArrayLike


class ImageError(ValueError):
    """An image that can't be used; the message is one line with the remedy."""


@dataclass(frozen=True)
class ImageSettings:
    """How pixels become patches. The defaults are those of the Qwen3-VL checkpoints."""

    patch_size: int = 16
    temporal_patch_size: int = 2
    merge_size: int = 2
    min_pixels: int = 65536
    max_pixels: int = 16777216
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    rescale_factor: float = 1 / 255
    resample: int = Image.Resampling.BICUBIC

    @property
    def factor(self) -> int:
        """Both sides of a resized image are multiples of this."""
        return self.patch_size * self.merge_size


@dataclass(frozen=True)
class ImageOptions:
    """What one image's size may be, where it differs from the checkpoint's settings.

    Attributes:
        min_pixels: in place of the settings' bound, as in a call of transformers' image processor.
        max_pixels: the same. With only one of the two given, the settings' other bound stays in force.
        resized_height: with `resized_width`, the size that the image is resized to, rounded to whole merge blocks and
            kept within the bounds, as qwen-vl-utils does.
        resized_width: see `resized_height`.
    """

    min_pixels: int | None = None
    max_pixels: int | None = None
    resized_height: int | None = None
    resized_width: int | None = None

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> "ImageOptions":
        """Options by name, as a part of a message has them; null values are as if absent.

        Raises:
            ImageError: an unknown name, a value that isn't a whole number above 0, bounds that cross, a minimum above
                `MAX_IMAGE_PIXELS`, or a height without a width.
        """
        options = cls(**option_values(raw, dict.fromkeys(IMAGE_OPTIONS, int), "an image", ImageError))
        low, high, height, width = (getattr(options, name) for name in IMAGE_OPTIONS)
        if low and high and low > high:
            raise ImageError(f"min_pixels {low} of an image is above its max_pixels {high}: swap or lower it")
        if low and low > MAX_IMAGE_PIXELS:
            raise ImageError(f"min_pixels {low} of an image is above {MAX_IMAGE_PIXELS}: lower it")
        if (height is None) != (width is None):
            given, missing = ("height", "width") if width is None else ("width", "height")
            raise ImageError(f"resized_{given} {height or width} of an image needs resized_{missing} beside it")
        if height and width and max(height, width) > MAX_ASPECT_RATIO * min(height, width):
            raise ImageError(
                f"resized_height {height} and resized_width {width} of an image have an aspect ratio above "
                f"{MAX_ASPECT_RATIO}: give sides that are closer"
            )
        return options


IMAGE_OPTIONS: tuple[str, ...] = tuple(field.name for field in fields(ImageOptions))


def load_image(source: ImageSource, max_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """Loads one image as RGB, upright (EXIF rotation applied), transparency laid on white.

    Args:
        source: a path, an http(s) URL (at most 20 s and 64 MB), a data URI, a PIL image, or an array `[H, W, 3]`,
            `[H, W, 4]` or `[H, W]`, uint8 or floating point in [0, 1].
        max_pixels: checked from the header, before anything is decoded.

    Raises:
        ImageError: not an image, truncated, animated, too large, too narrow, empty, or missing.
    """
    if isinstance(source, Image.Image):
        return _finish(source, f"{source.mode} image {source.width}x{source.height}", max_pixels)
    if is_array(source):
        array = host_array(source, "an image", ImageError)
        return _finish(_from_array(array), f"array {list(array.shape)}", max_pixels)
    if isinstance(source, str | os.PathLike | bytes | bytearray | memoryview) or hasattr(source, "read"):
        file = open_source(cast(MediaSource, source), MAX_IMAGE_BYTES, ImageError)
        return _load_file(file, describe(source), max_pixels)
    raise ImageError(
        f"an image can't be read from {type(source).__name__}: give a path, URL, bytes, file object, PIL image or array"
    )


def preprocess_images(
    images: Sequence[Image.Image], settings: ImageSettings, options: Sequence[ImageOptions] = ()
) -> tuple[np.ndarray, np.ndarray]:
    """Turns RGB images into `(pixel_values [P, C*Tp*p*p] float32, image_grid_thw [n, 3] int64)`.

    The rows of one image come in the order of the merged 2x2 blocks, as the vision encoder expects them. `options` has
    an entry for each image, or none at all.
    """
    table = normalisation_table(settings)
    rows, grids = [], []
    for image, option in zip(images, options or [ImageOptions()] * len(images), strict=True):
        height, width = _target_size(image, settings, option)
        frame = resize(image, height, width, settings.resample)
        rows.append(patchify(frame[None], table, settings))
        grids.append((1, height // settings.patch_size, width // settings.patch_size))
    return np.concatenate(rows), np.array(grids, np.int64)


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The size an image is resized to: multiples of `factor`, `min_pixels` to `max_pixels`, near its own shape.

    The rule is that of transformers' Qwen2VLImageProcessor.
    """
    rows, columns = round(height / factor) * factor, round(width / factor) * factor
    if rows * columns > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        rows = max(factor, math.floor(height / scale / factor) * factor)
        columns = max(factor, math.floor(width / scale / factor) * factor)
    elif rows * columns < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        rows, columns = (math.ceil(side * scale / factor) * factor for side in (height, width))
    return max(rows, factor), max(columns, factor)


def resize(image: Image.Image, height: int, width: int, resample: int) -> np.ndarray:
    """`image` at the size given, as uint8 `[height, width, 3]`."""
    return np.asarray(image.resize((width, height), Image.Resampling(resample)))


def normalisation_table(settings: ImageSettings) -> np.ndarray:
    """The normalised value of each byte of each channel, float32 `[C, 256]`, rounded as transformers' PIL back end.

    A byte has 256 values, so looking them up costs less than arithmetic on the pixels and is exact.
    """
    scaled = (np.arange(256, dtype=np.float64) * settings.rescale_factor).astype(np.float32)
    mean, std = np.array(settings.mean, np.float32), np.array(settings.std, np.float32)
    return (scaled - mean[:, None]) / std[:, None]


def patchify(frames: np.ndarray, table: np.ndarray, settings: ImageSettings) -> np.ndarray:
    """Cuts uint8 frames `[F, H, W, C]` into normalised patches, float32 `[P, C*Tp*p*p]`.

    The last frame is repeated until F is a multiple of Tp: an image is one frame seen Tp times. H and W are multiples
    of `settings.factor`. P counts time first, then merge blocks by rows, then the patches of a block.
    """
    count, height, width, channels = frames.shape
    p, merge, tp = settings.patch_size, settings.merge_size, settings.temporal_patch_size
    steps = -(-count // tp)
    rows, columns = height // (p * merge), width // (p * merge)
    patches = np.empty((steps, rows, columns, merge, merge, channels, tp, p, p), np.float32)
    for i, frame in enumerate(frames):
        repeats = range(i, steps * tp) if i == count - 1 else (i,)
        for channel in range(channels):
            plane = table[channel].take(frame[..., channel])
            plane = plane.reshape(rows, merge, p, columns, merge, p).transpose(0, 3, 1, 4, 2, 5)
            for j in repeats:
                patches[j // tp, :, :, :, :, channel, j % tp] = plane
    return patches.reshape(-1, channels * tp * p * p)


def read_image_settings(directory: Path, vision: VisionConfig) -> ImageSettings:
    """The image settings of a checkpoint; without a file of them, Qwen3-VL's with the encoder's own patch sizes."""
    raw = read_processor_config(directory, "image_processor", ("preprocessor_config.json",))
    if raw is None:
        return ImageSettings(vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size)
    # what the file leaves out takes the value of transformers' class, so that both make the same arrays
    size = raw.get("size") or {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}
    if raw.get("min_pixels") is not None:
        size = size | {"shortest_edge": raw["min_pixels"]}
    if raw.get("max_pixels") is not None:
        size = size | {"longest_edge": raw["max_pixels"]}
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    return ImageSettings(**common_settings(raw, vision, size, mean, std))


def read_processor_config(directory: Path, key: str, names: Sequence[str]) -> dict[str, Any] | None:
    """`key` of processor_config.json (transformers 5), else the first of the files `names` that is there, else None."""
    for name in ("processor_config.json", *names):
        file = directory / name
        if not file.is_file():
            continue
        try:
            raw = json.loads(file.read_text())
            raw = raw.get(key) if name == "processor_config.json" else raw
            if raw is None:
                continue
            if not isinstance(raw, dict):
                raise ValueError(f"expected an object, found {type(raw).__name__}")
        except (ValueError, AttributeError) as error:
            raise ImageError(f"{file} can't be read ({error}): copy it from the checkpoint again") from None
        return raw
    return None


def common_settings(
    raw: dict[str, Any],
    vision: VisionConfig,
    size: dict[str, int],
    mean: Sequence[float],
    std: Sequence[float],
) -> dict[str, Any]:
    """The fields of `ImageSettings` from a processor's file; refuses what the encoder or this program can't serve."""
    geometry = {
        "patch_size": (raw.get("patch_size"), vision.patch_size),
        "temporal_patch_size": (raw.get("temporal_patch_size"), vision.temporal_patch_size),
        "merge_size": (raw.get("merge_size"), vision.spatial_merge_size),
    }
    for key, (found, expected) in geometry.items():
        if found not in (None, expected):
            raise ImageError(f"{key} {found} of the processor's file differs from the vision encoder's {expected}")
    for key in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
        if raw.get(key) is False:
            raise ImageError(f"{key} false in the processor's file is not supported: remove it or set it to true")
    if not size.get("shortest_edge") or not size.get("longest_edge"):
        raise ImageError(f"size {size} of the processor's file needs shortest_edge and longest_edge")
    return {
        **{key: expected for key, (_, expected) in geometry.items()},
        "min_pixels": int(size["shortest_edge"]),
        "max_pixels": int(size["longest_edge"]),
        "mean": tuple(raw.get("image_mean") or mean),
        "std": tuple(raw.get("image_std") or std),
        "rescale_factor": float(raw.get("rescale_factor") or 1 / 255),
        "resample": int(raw.get("resample") or Image.Resampling.BICUBIC),
    }


def _target_size(image: Image.Image, settings: ImageSettings, options: ImageOptions) -> tuple[int, int]:
    # With one bound given, transformers keeps its own other one, even where the two cross; smart_resize then looks at
    # the upper bound first, and so does transformers.
    low = settings.min_pixels if options.min_pixels is None else options.min_pixels
    high = settings.max_pixels if options.max_pixels is None else options.max_pixels
    height, width = options.resized_height or image.height, options.resized_width or image.width
    return smart_resize(height, width, settings.factor, low, high)


def _load_file(file: Any, name: str, max_pixels: int) -> Image.Image:
    try:
        with warnings.catch_warnings():
            # the bound below says the same with the size and the remedy
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(file)
    except UnidentifiedImageError:
        raise ImageError(
            f"{name} is not an image: give a JPEG, PNG, WebP or another format that Pillow reads"
        ) from None
    except Image.DecompressionBombError as error:
        pixels = re.search(r"\d+", str(error))
        raise ImageError(_too_large(name, f"{pixels[0] if pixels else 'too many'} pixels", max_pixels)) from None
    except Exception as error:  # decoders raise many types for damaged headers
        raise ImageError(f"{name} can't be read ({one_line(error)}): give an intact image file") from None
    with image:
        return _finish(image, name, max_pixels)


def _finish(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    """Checks an opened image by its header, then decodes it, turns it upright and makes it RGB."""
    width, height = image.size
    if not width or not height:
        raise ImageError(f"{name} is empty ({width}x{height}): give an image with at least one pixel")
    if width * height > max_pixels:
        raise ImageError(_too_large(name, f"{width}x{height} = {width * height} pixels", max_pixels))
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ImageError(f"{name} is {width}x{height}, an aspect ratio above {MAX_ASPECT_RATIO}: crop or pad it")
    try:
        # an MPO file is a photograph with a preview or a second view behind it, not an animation
        frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
        if frames == 1:
            image.load()
    except Exception as error:
        raise ImageError(f"{name} is damaged or truncated ({one_line(error)}): give an intact file") from None
    if frames > 1:
        raise ImageError(f"{name} is animated ({frames} frames): pass it as a video, or pass one of its frames")
    try:
        image = ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF says nothing about the rotation; the pixels are good
        image = image.copy()
    try:
        return _to_rgb(image, name)
    except (ValueError, OSError) as error:
        if isinstance(error, ImageError):
            raise
        raise ImageError(
            f"{name} of mode {image.mode} can't be made RGB ({one_line(error)}): convert it first"
        ) from None


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        # Pillow would clip 16 bits at 255 and make nearly every image white
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ImageError(
                f"{name} has values outside 16 bits ({values.min()} to {values.max()}): convert it to 8 bits"
            )
        return Image.fromarray(np.round(values / 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ImageError(f"{name} holds floating-point grey of unknown range: convert it to 8 bits")
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _from_array(array: np.ndarray) -> Image.Image:
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise ImageError(f"array of shape {list(array.shape)} is no image: give [H, W, 3], [H, W, 4] or [H, W]")
    if not array.size:
        raise ImageError(f"array of shape {list(array.shape)} is empty: give an image with at least one pixel")
    if np.issubdtype(array.dtype, np.floating):
        low, high = array.min(), array.max()
        if not (low >= 0 and high <= 1):  # NaN fails too
            raise ImageError(
                f"floating-point image with values {low:g} to {high:g}: scale them to 0 to 1, or give uint8"
            )
        array = np.round(array.astype(np.float32) * 255).astype(np.uint8)
    if array.dtype != np.uint8:
        raise ImageError(f"image array of dtype {array.dtype}: give uint8, or floating point in 0 to 1")
    return Image.fromarray(np.ascontiguousarray(array))


def _too_large(name: str, size: str, max_pixels: int) -> str:
    return f"{name} has {size}, more than the {max_pixels} allowed: scale it down"
