"""Frames and files of videos that tests share, and transformers' video processor."""

import io
import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

from deepstack_jax.config import VisionConfig

DATA = Path(__file__).parent / "data"


def vision_config() -> VisionConfig:
    return VisionConfig(1, 16, 24, 2, 32, num_position_embeddings=16)


def hf_processor(**kwargs: Any) -> Qwen3VLVideoProcessor:
    half = [0.5, 0.5, 0.5]
    size = {"shortest_edge": 4096, "longest_edge": 25165824}
    defaults: dict[str, Any] = {"image_mean": half, "image_std": half, "size": size, "cap_pixels_per_frame": False}
    return Qwen3VLVideoProcessor(**(defaults | kwargs))


def film(frames: int, height: int = 64, width: int = 96) -> np.ndarray:
    """Frames `[F, H, W, 3]` that can be told apart: a photograph that grows brighter."""
    with Image.open(DATA / "astronaut.jpg") as image:
        picture = np.asarray(image.resize((width, height))).astype(np.float32)
    brightness = np.linspace(0.2, 1, frames)[:, None, None, None]
    return (picture * brightness).astype(np.uint8)


def write_video(path: Path, frames: np.ndarray, fps: Fraction | int = 10, codec: str = "libx264") -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = {"gif": "rgb8"}.get(codec, "yuv420p")
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def animation(kind: str, frames: Sequence[np.ndarray | Image.Image], **options: Any) -> bytes:
    """A GIF, WebP, PNG or AVIF file of all frames, without loss where the format can."""
    images = [frame if isinstance(frame, Image.Image) else Image.fromarray(frame) for frame in frames]
    best = {"WEBP": {"lossless": True, "exact": True}, "AVIF": {"quality": 100, "subsampling": "4:4:4"}}
    file = io.BytesIO()
    images[0].save(file, kind, **{"save_all": True, "append_images": images[1:]} | best.get(kind, {}) | options)
    return file.getvalue()


def picture(kind: str, image: np.ndarray | Image.Image, **options: Any) -> bytes:
    """A file of one picture."""
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
    return file.getvalue()


def shared_samples(sample: bytes, count: int, width: int = 64, height: int = 64, codec: bytes = b"jpeg") -> bytes:
    """A QuickTime file whose `count` frames are all the same bytes, behind a header of any size."""

    def box(kind: bytes, *content: bytes) -> bytes:
        return struct.pack(">I4s", 8 + sum(map(len, content)), kind) + b"".join(content)

    def numbers(*values: int) -> bytes:
        return struct.pack(f">{len(values)}I", *values)

    start = box(b"ftyp", b"qt  ", numbers(0), b"qt  ")
    offset = len(start) + 8
    entry = box(codec, bytes(6), b"\0\1", bytes(16), struct.pack(">HH", width, height),
                numbers(72 << 16, 72 << 16, 0), b"\0\1", bytes(32), b"\0\x18\xff\xff")  # fmt: skip
    table = box(
        b"stbl",
        box(b"stsd", numbers(0, 1), entry),
        box(b"stts", numbers(0, 1, count, 1)),
        box(b"stsc", numbers(0, 1, 1, 1, 1)),
        box(b"stsz", numbers(0, len(sample), count)),
        box(b"stco", numbers(0, count), numbers(offset) * count),
    )
    self_reference = box(b"dinf", box(b"dref", numbers(0, 1), box(b"url ", numbers(1))))
    media = box(
        b"mdia",
        box(b"mdhd", numbers(0, 0, 0, 24, count, 0)),
        box(b"hdlr", numbers(0), b"mhlrvide", bytes(13)),
        box(b"minf", box(b"vmhd", numbers(1, 0, 0)), self_reference, table),
    )
    unity = numbers(1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    track = box(b"tkhd", numbers(7, 0, 0, 1, 0, count), bytes(16), unity, numbers(width << 16, height << 16))
    header = box(b"mvhd", numbers(0, 0, 0, 24, count, 1 << 16), b"\1\0", bytes(10), unity, bytes(24), numbers(2))
    return start + box(b"mdat", sample) + box(b"moov", header, box(b"trak", track, media))
