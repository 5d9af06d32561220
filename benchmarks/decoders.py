"""Measures how long a picture or a video takes to be decoded, in this process and in a decoder process of the server.

    python benchmarks/decoders.py [--rounds 9]

Rounds alternate between the two, and figures are medians. A decoder process reads the header first, as the server does,
then decodes and resizes; the difference is what the server pays for the process. The last figures are the resident
memory of an idle decoder process, and its peak for pictures of 64 megapixels.
"""

import argparse
import asyncio
import io
import os
import statistics
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import psutil
from PIL import Image

from deepstack_jax.processing.decoders import Decoders
from deepstack_jax.processing.images import ImageOptions, ImageSettings
from deepstack_jax.processing.media import MediaInput, checked_image, checked_video, load_media
from deepstack_jax.processing.sources import MediaFile
from deepstack_jax.processing.videos import VideoOptions, VideoSettings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    asyncio.run(measure(parser.parse_args().rounds))


async def measure(rounds: int) -> None:
    print(f"{os.cpu_count()} CPUs, Pillow {Image.__version__}, PyAV {av.__version__}, medians of {rounds} rounds")
    decoders = Decoders(1)
    await decoders.start()
    (process,) = psutil.Process().children()
    print(f"resident memory of an idle decoder: {process.memory_info().rss / 1e6:.0f} MB")
    for name, data in {
        "1 MP JPEG": jpeg(1152, 864),
        "12 MP JPEG": jpeg(4032, 3024),
        "h264, 10 s of 480p": film(),
    }.items():
        here, there = [], []
        for _ in range(rounds):
            begun = time.perf_counter()
            load_media(media_of(checked(data)))
            here.append(time.perf_counter() - begun)
            begun = time.perf_counter()
            found = await check(decoders, data)
            await decoders.load(media_of(found), found)
            there.append(time.perf_counter() - begun)
        before, after = (1e3 * statistics.median(times) for times in (here, there))
        print(f"{name}: {before:.1f} ms here, {after:.1f} ms in a decoder, {after - before:+.1f} ms")
    for mode in ("RGB", "I;16", "RGBA", "CMYK"):
        data = large(mode)
        found = await decoders.check_image(data, mode)
        Path(f"/proc/{process.pid}/clear_refs").write_text("5")  # forgets the peak so far
        await decoders.load(media_of(found), found)
        status = Path(f"/proc/{process.pid}/status").read_text()
        peak = int(status.partition("VmHWM:")[2].split()[0]) / 1e3
        print(f"{len(data) / 1e3:,.0f} KB of 64 megapixels, {mode}: peak of {peak:,.0f} MB")
    decoders.close()


def is_film(data: bytes) -> bool:
    return data[4:8] == b"ftyp"


def checked(data: bytes) -> MediaFile:
    return checked_video(data, "film") if is_film(data) else checked_image(data, "picture")


async def check(decoders: Decoders, data: bytes) -> MediaFile:
    return await (decoders.check_video if is_film(data) else decoders.check_image)(data, "media")


def media_of(file: MediaFile) -> MediaInput:
    if file.format is None:
        return MediaInput(file, VideoSettings(), VideoOptions())
    return MediaInput(file, ImageSettings(), ImageOptions())


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture that compresses about as a photograph does."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    return Image.fromarray(pixels).resize((width, height))


def jpeg(width: int, height: int) -> bytes:
    file = io.BytesIO()
    noise(width, height).save(file, "JPEG", quality=90)
    return file.getvalue()


def film() -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.width, stream.height, stream.pix_fmt, stream.time_base = 854, 480, "yuv420p", Fraction(1, 24)
        for seed in range(240):
            frame = av.VideoFrame.from_image(noise(854, 480, seed // 24))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def large(mode: str) -> bytes:
    file = io.BytesIO()
    Image.new(mode, (8192, 8192)).save(file, "TIFF" if mode == "CMYK" else "PNG", compression="tiff_adobe_deflate")
    return file.getvalue()


if __name__ == "__main__":
    main()
