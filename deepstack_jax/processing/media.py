"""One image or video of a prompt, from its header to the frames that are cut into patches.

`checked_image` and `checked_video` read the headers of files that nobody vouches for, `load_media` decodes.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from deepstack_jax.errors import one_line, raise_shortage
from deepstack_jax.processing.images import (
    ImageOptions,
    ImageSettings,
    fit_image,
    fitted_size,
    load_image,
    openers,
)
from deepstack_jax.processing.moving_pictures import VideoError, probe
from deepstack_jax.processing.sources import MediaFile
from deepstack_jax.processing.videos import (
    Video,
    VideoOptions,
    VideoSettings,
    jpeg_frames,
    load_video,
    prepared_pixels,
)

# Pillow's other formats run programs (EPS), or have had little scrutiny.
IMAGE_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
# FFmpeg's, beside the animations that Pillow reads. No playlists: they name other files.
VIDEO_FORMATS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,mpegvideo,ogg,flv,asf,h264,hevc,mjpeg,jpeg_pipe"

Loaded = np.ndarray | Video


class MediaError(ValueError):
    """An image or video that isn't taken; the message is one line with the reason, `status` what HTTP says."""

    def __init__(self, message: str, status: int = 400):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class MediaInput:
    """One image or video of a prompt, and how it is loaded: for a video by `VideoSettings` and `VideoOptions`."""

    source: Any
    settings: ImageSettings
    options: ImageOptions | VideoOptions


def load_media(media: MediaInput) -> Loaded:
    """Decodes and resizes one image, to uint8 `[H, W, 3]`, or one video.

    Raises:
        ImageError, VideoError: as `load_image` and `load_video`.
    """
    if isinstance(media.settings, VideoSettings):
        assert isinstance(media.options, VideoOptions)
        return load_video(media.source, media.settings, media.options)
    assert isinstance(media.options, ImageOptions)
    return fit_image(load_image(media.source), media.settings, media.options)


def prepared_bytes(media: MediaInput, found: MediaFile) -> int:
    """Returns about how many bytes the pixels and patches of an image or a video take, by what its header says."""
    settings, options = media.settings, media.options
    if isinstance(options, VideoOptions):
        assert isinstance(settings, VideoSettings)
        pixels, copies = prepared_pixels(found, settings, options), 1
    else:
        height, width = fitted_size(found.height, found.width, settings, options)
        pixels, copies = height * width, settings.temporal_patch_size  # the frame is repeated to fill its patches
    return pixels * (3 + 3 * 4 * copies)


def checked_image(data: bytes, name: str, image_format: str | None = None) -> MediaFile:
    """Reads the header of a picture that is in one format, or by default in one of `IMAGE_FORMATS`.

    Raises:
        MediaError: it is not such a picture, or has several frames or pages; `name` is its name in the message.
    """
    formats = openers([image_format] if image_format else IMAGE_FORMATS, MediaError)
    try:
        image = Image.open(io.BytesIO(data), formats=formats)
        # a photograph of two views (MPO) is not a video; counting all frames would take a time that the file chooses
        several = image.format != "MPO" and getattr(image, "is_animated", False)
    except UnidentifiedImageError:
        raise MediaError(f"{name} is not an image that is read here: send one of {', '.join(IMAGE_FORMATS)}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise MediaError(f"{name} has more pixels than any image needs: scale it down", 413) from None
    except Exception as error:  # decoders raise many types for damaged headers
        raise_shortage(error)
        raise MediaError(f"{name} can't be read ({one_line(error)}): send an intact image") from None
    if several and image.format == "TIFF":
        raise MediaError(f"{name} has several pages: send the one that is meant as an image of its own")
    if several:
        raise MediaError(
            f'{name} is animated: send it as a video ({{"type": "video_url", ...}} or video_data), or one of its frames'
        )
    return MediaFile(data, image.format, *image.size)


def checked_video(data: bytes, name: str) -> MediaFile:
    """Reads the header of a video in one of `VIDEO_FORMATS`, of an animation, or of pictures in a data URI.

    Raises:
        MediaError: it is not one; `name` is its name in the message.
    """
    try:
        if (pictures := jpeg_frames(data)) is not None:
            return video_of(checked_frames(pictures), data)
        found = probe(io.BytesIO(data), name, VIDEO_FORMATS)
    except VideoError as error:
        raise MediaError(str(error)) from None
    return MediaFile(data, None, found.width, found.height, found.frames, found.fps)


def checked_frames(pictures: Sequence[bytes], formats: Sequence[str | None] = ()) -> list[MediaFile]:
    """Reads the headers of the pictures that are a video's frames; `formats` are empty, or those of `checked_image`.

    Raises:
        MediaError: as `checked_image`, with the number of the frame; there are none.
    """
    if not pictures:
        raise MediaError("a video of no frames: send at least one")
    count, pairs = len(pictures), zip(pictures, formats or [None] * len(pictures), strict=True)
    return [checked_image(data, f"frame {i} of {count} of a video", its) for i, (data, its) in enumerate(pairs, 1)]


def video_of(frames: Sequence[MediaFile], data: bytes = b"") -> MediaFile:
    """Returns what a header would say of a video of these frames: the largest one gives the size."""
    largest = max(frames, key=lambda frame: frame.width * frame.height)
    return MediaFile(data, None, largest.width, largest.height, len(frames))
