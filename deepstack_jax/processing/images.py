"""Turns images (paths, URLs, data URIs, PIL images or arrays) into the patches that the vision encoder takes.

Resizing, normalisation and the order of the patches follow transformers' Qwen2VLImageProcessor with its PIL back end;
the arrays are equal bit for bit. Video frames use the same `patchify`.
"""

import io
import json
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import ArrayLike
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from deepstack_jax.config import VisionConfig
from deepstack_jax.config_values import read_json_object
from deepstack_jax.errors import one_line, raise_shortage, short
from deepstack_jax.processing.sources import (
    HEIC_BRANDS,
    SNIFFED_BYTES,
    MediaFile,
    MediaSource,
    describe,
    host_array,
    is_array,
    is_file,
    looks_like_video,
    open_source,
    option_values,
)
from deepstack_jax.rounding import cdiv

MAX_IMAGE_PIXELS = 100_000_000
MAX_IMAGE_BYTES = 64 << 20
MAX_ASPECT_RATIO = 200
LARGEST_SCALE, SMALLEST_DEVIATION = 1e6, 1e-6  # of values from 0 to 255, so that pixels stay finite in float32

# formats in which previews, second views or layers follow the picture itself
_STILLS = ("MPO", "PSD")
_STRIP_PIXELS = 1 << 20
_ANIMATIONS = ("GIF", "PNG", "WEBP", "AVIF", "FLI")

ImageSource = MediaSource | Image.Image | ArrayLike


class ImageError(ValueError):
    """An image can't be used; the message is one line with the remedy."""


@dataclass(frozen=True)
class ImageSettings:
    """How pixels become patches. The defaults are those of the Qwen3-VL checkpoints; sizes are in pixels."""

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
        """The number of pixels of which both sides of a resized image are multiples."""
        return self.patch_size * self.merge_size


@dataclass(frozen=True)
class ImageOptions:
    """Bounds on the size of one image that replace the checkpoint's settings.

    Attributes:
        min_pixels: replaces the settings' bound, as in a call of transformers' image processor.
        max_pixels: the same. If only one of the two is given, the settings' other bound stays in force.
        resized_height: with `resized_width`, the size that the image is resized to, rounded to whole merge blocks and
            kept within the bounds, as in qwen-vl-utils.
        resized_width: see `resized_height`.
    """

    min_pixels: int | None = None
    max_pixels: int | None = None
    resized_height: int | None = None
    resized_width: int | None = None

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> "ImageOptions":
        """Reads options by name, as given in a part of a message. Null values count as absent.

        Raises:
            ImageError: an unknown name, a value that isn't a whole number above 0, bounds that cross, a minimum above
                `MAX_IMAGE_PIXELS`, or a height without a width.
        """
        options = cls(**option_values(raw, dict.fromkeys(IMAGE_OPTIONS, int), "an image", ImageError))
        check_order(options.min_pixels, options.max_pixels, "pixels", "an image", ImageError)
        if (options.min_pixels or 0) > MAX_IMAGE_PIXELS:
            raise ImageError(f"min_pixels {options.min_pixels} of an image is above {MAX_IMAGE_PIXELS}: lower it")
        check_resized(options.resized_height, options.resized_width, "an image", ImageError)
        return options


def check_order(least: int | None, most: int | None, unit: str, what: str, error: type[ValueError]) -> None:
    """Raises `error` if min_`unit` of an image or a video is above its max_`unit`."""
    if least and most and least > most:
        raise error(f"min_{unit} {least} of {what} is above its max_{unit} {most}: swap or lower it")


def check_resized(height: int | None, width: int | None, what: str, error: type[ValueError]) -> None:
    """Raises `error` if only one of resized_height and resized_width is given, or if their ratio is too large."""
    if (height is None) != (width is None):
        given, missing = ("height", "width") if width is None else ("width", "height")
        raise error(f"resized_{given} {height or width} of {what} needs resized_{missing} beside it")
    if height and width and max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise error(
            f"resized_height {height} and resized_width {width} of {what} have an aspect ratio above "
            f"{MAX_ASPECT_RATIO}: give sides that are closer"
        )


IMAGE_OPTIONS: tuple[str, ...] = tuple(field.name for field in fields(ImageOptions))


def load_image(source: ImageSource, max_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """Loads one image as upright RGB: the EXIF rotation is applied, and transparency is blended with white.

    Args:
        source: a path (`~` is the home folder), a file:, http: or https: URL (at most 20 s and 64 MB), a data URI,
            base64 without a header, the bytes of a file, a file object, a PIL image, or an array of NumPy, JAX, torch
            or any library that NumPy can read. Arrays are `[H, W]`, `[H, W, C]` or `[C, H, W]`, where C is 1, 3 or 4
            (with transparency), and hold integers from 0 to 255 or floating point from 0 to 1.
        max_pixels: the maximum number of pixels; the header is checked before anything is decoded.

    Raises:
        ImageError: the source is missing, not an image, truncated, animated, of several pages, too large, too narrow or
            empty, or its values don't fit 8 bits.
    """
    if isinstance(source, Image.Image):
        return _finish(source, f"PIL image {source.width}x{source.height}", max_pixels)
    if is_array(source):
        array = host_array(source, "an image", ImageError)
        return _finish(_from_array(array), f"array {list(array.shape)}", max_pixels)
    if is_file(source):
        file = open_source(cast(MediaSource, source), MAX_IMAGE_BYTES, ImageError)
        return _load_file(file, describe(source), max_pixels, source.format if isinstance(source, MediaFile) else None)
    raise ImageError(
        f"an image can't be read from {type(source).__name__}: give a path, URL, bytes, file object, PIL image or array"
    )


def openers(formats: Sequence[str], error: type[ValueError]) -> list[str]:
    """Returns the names under which Pillow opens images of formats, those that it supports.

    Raises:
        error: it supports none of them.
    """
    Image.init()
    # there is no opener for MPO: that for JPEG recognises it
    found = [name for name in ("JPEG" if name == "MPO" else name for name in formats) if name in Image.OPEN]
    if not found:
        raise error(f"images of format {', '.join(formats)} are not supported here: send a PNG or JPEG")
    return found


def preprocess_images(
    images: Sequence[Image.Image], settings: ImageSettings, options: Sequence[ImageOptions] = ()
) -> tuple[np.ndarray, np.ndarray]:
    """Turns RGB images into `(pixel_values [P, C*Tp*p*p] float32, image_grid_thw [n, 3] int64)`.

    The rows of one image are in the order of the merged blocks, as the vision encoder expects them. `options` has one
    entry per image, or is empty.
    """
    pairs = zip(images, options or [ImageOptions()] * len(images), strict=True)
    return image_patches([fit_image(image, settings, its) for image, its in pairs], settings)


def fit_image(image: Image.Image, settings: ImageSettings, options: ImageOptions) -> np.ndarray:
    """Resizes an RGB image to the size at which it is encoded; returns uint8 `[H, W, 3]`."""
    return resize(image, *fitted_size(image.height, image.width, settings, options), settings.resample)


def fitted_size(height: int, width: int, settings: ImageSettings, options: ImageOptions) -> tuple[int, int]:
    """Returns the (height, width) to which an image of a size is resized."""
    # If only one bound is given, transformers keeps its own other bound even if the two cross. smart_resize then checks
    # the upper bound first, as transformers does.
    low = settings.min_pixels if options.min_pixels is None else options.min_pixels
    high = settings.max_pixels if options.max_pixels is None else options.max_pixels
    height, width = options.resized_height or height, options.resized_width or width
    return smart_resize(height, width, settings.factor, low, high)


def image_patches(frames: Sequence[np.ndarray], settings: ImageSettings) -> tuple[np.ndarray, np.ndarray]:
    """Turns images as `fit_image` returns them into the arrays of `preprocess_images`."""
    table = normalisation_table(settings)
    rows = [patchify(frame[None], table, settings) for frame in frames]
    grids = [(1, *(side // settings.patch_size for side in frame.shape[:2])) for frame in frames]
    return rows[0] if len(rows) == 1 else np.concatenate(rows), np.array(grids, np.int64)


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Returns the (height, width) that an image is resized to.

    Both are multiples of `factor`, close to the image's aspect ratio, with `min_pixels` to `max_pixels` pixels. The
    rule is `smart_resize` of transformers' Qwen2VLImageProcessor.
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
    """Resizes `image` with a filter of Pillow; returns uint8 `[height, width, 3]`."""
    return np.asarray(image.resize((width, height), Image.Resampling(resample)))


def normalisation_table(settings: ImageSettings) -> np.ndarray:
    """Returns the normalised value of each byte in each channel, float32 `[C, 256]`.

    The values are rounded as in transformers' PIL back end. A lookup costs less than arithmetic on the pixels, and is
    exact because a byte has only 256 values.
    """
    scaled = (np.arange(256, dtype=np.float64) * settings.rescale_factor).astype(np.float32)
    mean, std = np.array(settings.mean, np.float32), np.array(settings.std, np.float32)
    return (scaled - mean[:, None]) / std[:, None]


def patchify(frames: np.ndarray, table: np.ndarray, settings: ImageSettings) -> np.ndarray:
    """Cuts uint8 frames `[F, H, W, C]` into normalised patches, float32 `[P, C*Tp*p*p]`.

    The last frame is repeated until F is a multiple of Tp, so an image is one frame repeated Tp times. H and W must be
    multiples of `settings.factor`. Patches are ordered by time, then by merge block (row by row), then within a block.
    """
    count, height, width, channels = frames.shape
    p, merge, tp = settings.patch_size, settings.merge_size, settings.temporal_patch_size
    steps = cdiv(count, tp)
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


# in transformers, null turns these off
_NULL_IS_VALUE = ("do_resize", "do_rescale", "do_normalize")


class ProcessorConfig(dict[str, Any]):
    """The contents of a processor's file, with its path (for messages) and the keys whose value is null.

    Null counts as absent, except for keys for which null has a meaning in transformers. A value of 0 is a value.
    """

    def __init__(self, values: Mapping[str, Any], file: Path | str = "the processor's file"):
        super().__init__({key: value for key, value in values.items() if value is not None or key in _NULL_IS_VALUE})
        self.file = file
        self.nulls = frozenset(key for key, value in values.items() if value is None)


def read_image_settings(directory: Path, vision: VisionConfig) -> ImageSettings:
    """Returns the image settings of a checkpoint.

    If it has no file of them, they are Qwen3-VL's, with the encoder's patch sizes. The errors are those of
    `read_processor_config` and `common_settings`.
    """
    raw = read_processor_config(directory, "image_processor", ("preprocessor_config.json",))
    if raw is None:
        return ImageSettings(vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size)
    # missing keys take the defaults of transformers' class, so that both make the same arrays
    size = raw.get("size", {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280})
    if isinstance(size, dict):
        for key, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
            if key in raw:
                size = {name: value for name, value in size.items() if name != key} | {edge: raw[key]}
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    return ImageSettings(**common_settings(raw, vision, size, mean, std))


def read_processor_config(directory: Path, key: str, names: Sequence[str]) -> ProcessorConfig | None:
    """Returns `key` of processor_config.json (transformers 5), otherwise the first of the files `names`, or None.

    Raises:
        ConfigError: a file is not valid JSON (the message gives the position), or does not hold an object.
        ImageError: `key` isn't an object.
    """
    for name in ("processor_config.json", *names):
        file = directory / name
        if not file.is_file():
            continue
        raw = read_json_object(file)
        if name == "processor_config.json":
            raw = raw.get(key)
            if raw is None:
                continue
        if not isinstance(raw, dict):
            raise ImageError(f"{file} can't be read: expected an object, found {type(raw).__name__}")
        return ProcessorConfig(raw, file)
    return None


def common_settings(
    raw: Mapping[str, Any],
    vision: VisionConfig,
    size: Any,
    mean: Sequence[float],
    std: Sequence[float],
) -> dict[str, Any]:
    """Returns the fields of `ImageSettings` from a processor's file.

    Raises:
        ImageError: a setting is not supported; the message names the file, the key, its value and what is allowed.
    """
    raw = raw if isinstance(raw, ProcessorConfig) else ProcessorConfig(raw)
    geometry = {
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.spatial_merge_size,
    }
    for key, expected in geometry.items():
        if raw.get(key, expected) != expected:
            raise ImageError(f"{key} {short(raw[key])} of {raw.file} differs from the vision encoder's {expected}")
    for key in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
        if (value := raw.get(key, True)) is not True:
            raise ImageError(
                f"{key} {json.dumps(value)[:80]} of {raw.file} is not supported: remove it or set it to true"
            )
    min_pixels, max_pixels = _size_bounds(raw, size)
    deviations = _channels(raw, "image_std", std)
    if min(map(abs, deviations)) < SMALLEST_DEVIATION:
        raise ImageError(f"image_std {list(deviations)} of {raw.file} divides by 0: give numbers other than 0")
    resample = _number(raw, "resample", Image.Resampling.BICUBIC)
    if resample not in (filters := sorted(map(int, Image.Resampling))):
        raise ImageError(
            f"resample {resample:g} of {raw.file} is not one of Pillow's filters: give {filters[0]} to {filters[-1]}"
        )
    return {
        **geometry,
        "min_pixels": min_pixels,
        "max_pixels": max_pixels,
        "mean": _channels(raw, "image_mean", mean),
        "std": deviations,
        "rescale_factor": float(_number(raw, "rescale_factor", 1 / 255)),
        "resample": int(resample),
    }


def _size_bounds(raw: ProcessorConfig, size: Any) -> tuple[int, int]:
    """Returns the bounds on pixels. Any other form of `size` makes transformers fail at the first image."""
    edges = ("shortest_edge", "longest_edge")
    values = {key: value for key, value in size.items() if value is not None} if isinstance(size, dict) else {}
    if values.keys() != set(edges):
        raise ImageError(f"size {short(size)} of {raw.file} needs shortest_edge and longest_edge, and nothing else")
    for key, value in values.items():
        number = _as_number(value)
        if not number >= 1 or number != int(number):
            raise ImageError(f"size {key} {short(value)} of {raw.file} must be a whole number of pixels above 0")
    least, most = (int(values[edge]) for edge in edges)
    if least > MAX_IMAGE_PIXELS:
        raise ImageError(f"size shortest_edge {short(least)} of {raw.file} is above {MAX_IMAGE_PIXELS}: lower it")
    return least, most


def _channels(raw: ProcessorConfig, key: str, default: Sequence[float]) -> tuple[float, ...]:
    """Returns one number per channel; as in transformers, a single number stands for all three."""
    value = raw.get(key, list(default))
    numbers = [_as_number(one) for one in (value if isinstance(value, list) else [value] * 3)]
    if len(numbers) != 3 or not all(abs(number) <= LARGEST_SCALE for number in numbers):
        raise ImageError(f"{key} {short(value)} of {raw.file} must be a number or three, one per channel")
    return tuple(numbers)


def _number(raw: ProcessorConfig, key: str, default: float) -> float:
    number = _as_number(value := raw.get(key, default))
    if not abs(number) <= LARGEST_SCALE:
        raise ImageError(f"{key} {short(value)} of {raw.file} must be a number")
    return number


def _as_number(value: Any) -> float:
    """Returns `value` if it is a number that fits a float, otherwise NaN."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
    return value if number else math.nan


def _load_file(file: Path | io.BytesIO, name: str, max_pixels: int, image_format: str | None) -> Image.Image:
    formats = openers([image_format], ImageError) if image_format else None
    try:
        with warnings.catch_warnings():
            # the check below reports this with the size and the remedy
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(file, formats=formats)
    except UnidentifiedImageError:
        raise ImageError(_unidentified(file, name)) from None
    except Image.DecompressionBombError as error:
        pixels = re.search(r"\d+", str(error))
        raise ImageError(_too_large(name, f"{pixels[0] if pixels else 'too many'} pixels", max_pixels)) from None
    except Exception as error:  # decoders raise many types for damaged headers
        raise_shortage(error)
        raise ImageError(f"{name} can't be read ({one_line(error)}): give an intact image file") from None
    with image:
        return _finish(image, name, max_pixels, in_place=True)


def _finish(image: Image.Image, name: str, max_pixels: int, in_place: bool = False) -> Image.Image:
    """Checks the header of an opened image, decodes it, turns it upright and converts it to RGB.

    `in_place` lets go of the decoded pixels as soon as they are turned.
    """
    width, height = image.size
    if not width or not height:
        raise ImageError(f"{name} is empty ({width}x{height}): give an image with at least one pixel")
    if width * height > max_pixels:
        raise ImageError(_too_large(name, f"{width}x{height} = {width * height} pixels", max_pixels))
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ImageError(f"{name} is {width}x{height}, an aspect ratio above {MAX_ASPECT_RATIO}: crop or pad it")
    try:
        frames = 1 if image.format in _STILLS else getattr(image, "n_frames", 1)
        if frames == 1:
            image.load()
    except Exception as error:
        raise_shortage(error)
        if "closed" in str(error) or (isinstance(error, AssertionError) and getattr(image, "fp", error) is None):
            raise ImageError(f"{name} was closed before it was decoded: call its load() before closing it") from None
        raise ImageError(f"{name} is damaged or truncated ({one_line(error)}): give an intact file") from None
    if frames > 1:
        raise ImageError(_several(name, image.format or "", frames))
    try:
        # without a rotation, exif_transpose would copy the image
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            image = ImageOps.exif_transpose(image, in_place=in_place) or image
    except Exception as error:  # damaged EXIF doesn't give the rotation, but the pixels are good
        raise_shortage(error)
    try:
        return _to_rgb(image, name)
    except (ValueError, OSError) as error:
        if isinstance(error, ImageError):
            raise
        raise_shortage(error)
        raise ImageError(
            f"{name} of mode {image.mode} can't be made RGB ({one_line(error)}): convert it first"
        ) from None


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Converts an opened image as transformers does: transparency is blended with white, Pillow does the rest.

    Conversions take several copies of what they convert, so they run over strips of the image.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith(("I", "F")):
        _check_wide(image, name)
    if image.mode == "La":
        raise ImageError(f'{name} is of mode La, which has no conversion to RGB: pass image.convert("LA")')
    rgb = Image.new("RGB", image.size)
    for top, strip in _strips(image):
        if "A" in strip.getbands() or strip.info.get("transparency") is not None:
            strip = strip.convert("RGBA")
            strip = Image.alpha_composite(Image.new("RGBA", strip.size, "white"), strip)
        rgb.paste(strip.convert("RGB"), (0, top))
    return rgb


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Yields the image in strips of a few rows, each with the number of its first row."""
    rows = max(_STRIP_PIXELS // image.width, 1)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _check_wide(image: Image.Image, name: str) -> None:
    """Refuses grey values that Pillow, and so transformers, would clip to 0 and 255: most such pictures turn white."""
    arrays = (np.asarray(strip) for _, strip in _strips(image))
    bounds = [bound.item() for values in arrays for bound in (values.min(), values.max())]
    low, high = np.min(bounds).item(), np.max(bounds).item()  # NaN if any value is
    if not np.isfinite([low, high]).all():
        raise ImageError(f"{name} has values that are not finite: replace them, as numpy.nan_to_num does")
    if low < 0 or high > 255 or (image.mode == "F" and high <= 1):
        raise ImageError(
            f"{name} of mode {image.mode} has values {low} to {high}, not 0 to 255: "
            f"pass PIL.Image.fromarray({_to_8_bits(low, high)})"
        )


def _to_8_bits(low: float, high: float) -> str:
    """Returns an expression that converts `image` to 8 bits; the full range of fractions and 16 bits is kept."""
    whole = next((top for top in (1, 65535) if 0 <= low <= high <= top), None)
    span = (0, whole) if whole else (low, high)
    return f"numpy.interp(image, {span}, (0, 255)).round().astype('uint8')"


def _from_array(array: np.ndarray) -> Image.Image:
    array = _channels_last(array)
    if not array.size:
        raise ImageError(f"array of shape {list(array.shape)} is empty: give an image with at least one pixel")
    if array.dtype == bool:
        raise ImageError("image array of dtype bool: give integers in 0 to 255, or floating point in 0 to 1")
    low, high = array.min().item(), array.max().item()
    if np.issubdtype(array.dtype, np.floating):
        if not (low >= 0 and high <= 1):  # NaN fails too
            raise ImageError(
                f"floating-point image with values {low:g} to {high:g}: scale them to 0 to 1, or give uint8"
            )
        array = np.round(array.astype(np.float32) * 255)
    elif low < 0 or high > 255:
        raise ImageError(
            f"array of {array.dtype} has values {low} to {high}, not 0 to 255: pass {_to_8_bits(low, high)}"
        )
    return Image.fromarray(np.ascontiguousarray(array.astype(np.uint8)))


def _channels_last(array: np.ndarray) -> np.ndarray:
    """Returns `[H, W]` or `[H, W, C]` for an array of these shapes or `[C, H, W]`."""
    shape = list(array.shape)
    if array.ndim == 3:
        first, last = shape[0] in (1, 3, 4), shape[2] in (1, 3, 4)
        # one row of coloured pixels is more likely than a grey picture that is three or four pixels wide
        if first and last and not (shape[0] == 1 and shape[2] > 1):
            raise ImageError(
                f"array of shape {shape} is ambiguous, [H, W, C] or [C, H, W]: pass PIL.Image.fromarray of [H, W, C]"
            )
        if first and not last:
            array = np.moveaxis(array, 0, 2)
        if first or last:
            return array[..., 0] if array.shape[2] == 1 else array
    elif array.ndim == 2:
        return array
    remedy = "give [H, W, C] or [C, H, W] with C 1, 3 or 4, or [H, W]"
    if array.ndim == 1 and array.dtype == np.uint8:
        remedy = "pass the bytes of a file as array.tobytes()"
    raise ImageError(f"array of shape {shape} is not an image: {remedy}")


def _several(name: str, file_format: str, frames: int) -> str:
    if file_format in _ANIMATIONS:
        remedy = 'pass it as a video ({"type": "video", ...} or videos=[...]), or pass one of its frames'
        return f"{name} is animated ({frames} frames): {remedy}"
    return f"{name} has {frames} pages: pass each as an image, as PIL.ImageSequence.all_frames(image) gives them"


def _unidentified(file: Path | io.BytesIO, name: str) -> str:
    with file.open("rb") if isinstance(file, Path) else nullcontext(file) as opened:
        opened.seek(0)
        start = opened.read(SNIFFED_BYTES)
    if start[4:8] == b"ftyp" and start[8:12] in HEIC_BRANDS:
        return f"{name} is a HEIC photograph, which Pillow doesn't read: convert it to JPEG"
    if looks_like_video(start):
        return f'{name} is a video, not an image: pass it as a video ({{"type": "video", ...}} or videos=[...])'
    return f"{name} is not an image: give a JPEG, PNG, WebP or another format that Pillow reads"


def _too_large(name: str, size: str, max_pixels: int) -> str:
    return f"{name} has {size}, more than the {max_pixels} allowed: scale it down"
