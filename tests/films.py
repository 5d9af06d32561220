"""Frames and files of videos that tests share, and transformers' video processor."""

import io
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
        stream.pix_fmt = {"gif": "rgb8", "ffv1": "bgr0"}.get(codec, "yuv420p")
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
