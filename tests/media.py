"""Images and videos in many formats, as files that tests send to servers and encode nodes."""

import base64
import io
import warnings
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import av
import numpy as np
from PIL import Image

from deepstack_jax.processing.sources import MediaFile

VIDEO = "an .mp4 of eight frames"
CASES: dict[str, list[Any]] = {  # name of a prompt -> sizes of its images in pixels, or VIDEO
    "one image": [(160, 96)],
    "three images": [(64, 64), (200, 90), (64, 128)],
    "video": [VIDEO],
    "video and image": [(96, 64), VIDEO],
}

SIZE = (96, 64)
ROTATED = 0x0112, 6  # EXIF orientation: a quarter turn


def noise(seed: int = 0, channels: int = 3) -> np.ndarray:
    shape = (SIZE[1], SIZE[0], channels)[: 3 if channels > 1 else 2]
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


WIDE = {"I;16": np.uint16, "I": np.int32, "F": np.float32}


def picture(mode: str, seed: int = 0) -> Image.Image:
    if mode in WIDE:
        return Image.fromarray(noise(seed, 1).astype(WIDE[mode]))
    colours = Image.fromarray(noise(seed, 4), "RGBA")
    return colours if mode == "RGBA" else colours.convert(mode)


def saved(mode: str, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture(mode).save(file, form, **options)
    return file.getvalue()


def opened(data: bytes) -> MediaFile:
    """An image as the server admits it, with only its header read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = Image.open(io.BytesIO(data))
    return MediaFile(data, image.format, *image.size)


def rotated() -> Image.Exif:
    exif = Image.Exif()
    exif[ROTATED[0]] = ROTATED[1]
    return exif


def several(form: str, count: int = 4, **options: Any) -> bytes:
    return saved(
        "RGB", form, save_all=True, append_images=[picture("RGB", seed) for seed in range(1, count)], **options
    )


IMAGES: dict[str, Callable[[], bytes]] = {
    **{f"JPEG {mode}": lambda mode=mode: saved(mode, "JPEG") for mode in ("1", "L", "RGB", "CMYK", "YCbCr")},
    "JPEG rotated": lambda: saved("RGB", "JPEG", exif=rotated()),
    "JPEG progressive": lambda: saved("RGB", "JPEG", progressive=True),
    "MPO": lambda: several("MPO", 2),
    "MPO of three": lambda: several("MPO", 3),
    "MPO rotated": lambda: several("MPO", 2, exif=rotated()),
    **{f"PNG {mode}": lambda mode=mode: saved(mode, "PNG") for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")},
    "PNG P, transparent": lambda: saved("P", "PNG", transparency=0),
    "PNG rotated": lambda: saved("RGB", "PNG", exif=rotated()),
    **{f"WebP {mode}": lambda mode=mode: saved(mode, "WEBP") for mode in ("RGB", "RGBA")},
    "WebP lossless": lambda: saved("RGB", "WEBP", lossless=True),
    "WebP lossless RGBA": lambda: saved("RGBA", "WEBP", lossless=True),
    **{f"GIF {mode}": lambda mode=mode: saved(mode, "GIF") for mode in ("1", "L", "P", "RGB", "RGBA")},
    **{f"BMP {mode}": lambda mode=mode: saved(mode, "BMP") for mode in ("1", "L", "P", "RGB", "RGBA")},
    **{
        f"TIFF {mode}": lambda mode=mode: saved(mode, "TIFF")
        for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I;16", "I", "F")
    },
    "TIFF LZW": lambda: saved("RGB", "TIFF", compression="tiff_lzw"),
    "TIFF JPEG": lambda: saved("RGB", "TIFF", compression="jpeg"),
    "TIFF big": lambda: saved("RGB", "TIFF", big_tiff=True),
    **{f"AVIF {mode}": lambda mode=mode: saved(mode, "AVIF", speed=10) for mode in ("RGB", "RGBA", "L")},
    # Pillow reads these too; a server's policy decides what it admits
    "JPEG 2000": lambda: saved("RGB", "JPEG2000"),
    "ICO": lambda: saved("RGBA", "ICO"),
    "PPM": lambda: saved("RGB", "PPM"),
    "TGA": lambda: saved("RGB", "TGA"),
    "PCX": lambda: saved("RGB", "PCX"),
    "QOI": lambda: saved("RGB", "QOI"),
}


def film(container: str, codec: str, pixels: str = "yuv420p", frames: int = 6) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format=container) as out:
        stream = out.add_stream(codec, rate=4)
        stream.width, stream.height, stream.pix_fmt = *SIZE, pixels
        stream.time_base = Fraction(1, 4)
        for seed in range(frames):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(noise(seed), format="rgb24").reformat(format=pixels)))
        out.mux(stream.encode())
    return file.getvalue()


def jpeg_frames() -> bytes:
    frames = (base64.b64encode(saved("RGB", "JPEG")).decode() for _ in range(4))
    return b"data:video/jpeg;base64," + ",".join(frames).encode()


VIDEOS: dict[str, Callable[[], bytes]] = {
    "mp4": lambda: film("mp4", "mpeg4"),
    "mkv": lambda: film("matroska", "libx264"),
    "webm": lambda: film("webm", "libvpx"),
    "avi": lambda: film("avi", "mpeg4"),
    "mov": lambda: film("mov", "mpeg4"),
    "ts": lambda: film("mpegts", "mpeg2video"),
    "gif": lambda: several("GIF"),
    "webp": lambda: several("WEBP", duration=250),
    "png": lambda: several("PNG", duration=250),
    "avif": lambda: several("AVIF", duration=250, speed=10),
    "frames in a data URI": jpeg_frames,
}


def media(case: str) -> tuple[list[MediaFile], list[MediaFile]]:
    """The images and the videos of one of CASES, as an HTTP request brings them."""
    images, videos = [], []
    for number, kind in enumerate(CASES[case]):
        rng = np.random.default_rng(number)
        if kind == VIDEO:
            videos.append(_video(rng.integers(0, 255, (8, 64, 96, 3), np.uint8)))
            continue
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (kind[1], kind[0], 3), np.uint8)).save(file, "PNG")
        images.append(opened(file.getvalue()))
    return images, videos


def _video(frames: np.ndarray) -> MediaFile:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return MediaFile(file.getvalue())
