"""Animated GIF, WebP, PNG and AVIF files as videos: all frames, the right pixels, times, bounds, and bad files."""

import contextlib
import io
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image
from transformers.video_utils import VideoMetadata

from deepstack_jax.processing.moving_pictures import probe
from deepstack_jax.processing.videos import Video, VideoError, VideoOptions, VideoSettings, load_video
from tests.films import animation, film, hf_processor, picture, shared_samples

KINDS = ("GIF", "WEBP", "PNG", "AVIF")
SETTINGS = VideoSettings()
EVERY_FRAME = VideoOptions(do_sample_frames=False)


def flat(frames: int, height: int = 64, width: int = 96) -> np.ndarray:
    """Frames of few colours, so that a palette holds them all: a bright square that moves over stripes."""
    video = np.zeros((frames, height, width, 3), np.uint8)
    video[:, ::8, :, 1] = 200
    for i, frame in enumerate(video):
        frame[8 : 8 + 20, 4 * i : 4 * i + 20] = (250, 40, 10 * i)
    return video


def every_frame(content: bytes) -> Video:
    return load_video(content, SETTINGS, EVERY_FRAME)


# ---- frames and times


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [2, 5, 12])
def test_all_frames_come_with_the_pixels_that_were_written(kind: str, count: int):
    frames = flat(count)
    loaded = every_frame(animation(kind, frames, duration=100, loop=3))
    assert loaded.frame_indices == tuple(range(count))
    assert loaded.fps == pytest.approx(10)
    # AVIF turns colours into luma and chroma of a byte each, which loses up to two steps both ways
    assert np.abs(loaded.frames.astype(int) - frames).max() <= (4 if kind == "AVIF" else 0)


@pytest.mark.parametrize("kind", ["WEBP", "PNG"])
def test_photographs_come_without_loss(kind: str):
    np.testing.assert_array_equal(every_frame(animation(kind, film(6))).frames, film(6))


def test_frames_of_an_avif_are_those_of_the_decoder_of_videos():
    content = animation("AVIF", film(6), duration=100)
    with av.open(io.BytesIO(content)) as container:
        track = max(container.streams.video, key=lambda stream: stream.frames)
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(track)]
    difference = np.abs(every_frame(content).frames.astype(int) - decoded)
    assert difference.max() <= 2  # two programs that turn luma and chroma into colours


@pytest.mark.parametrize("kind", KINDS)
def test_an_animation_is_sampled_as_transformers_samples_a_file(kind: str):
    content = animation(kind, flat(20), duration=200)
    for options in ({}, {"fps": 1.0}, {"fps": 5.0}, {"num_frames": 7}):
        called = {"fps": None} | options if "num_frames" in options else options
        expected = hf_processor().sample_frames(VideoMetadata(total_num_frames=20, fps=5), **called)
        assert load_video(content, SETTINGS, VideoOptions.of(options)).frame_indices == tuple(expected)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
@pytest.mark.parametrize(
    ("durations", "seconds"),
    [([100, 200, 300, 400], 1.0), ([0, 0, 0, 0], 0.4), ([0, 50, 0, 50], 0.3), ([20, 20, 20, 20], 0.08),
     ([10_000, 30, 30, 40], 10.1)],
)  # fmt: skip
def test_the_rate_is_frames_over_seconds(kind: str, durations: list[int], seconds: float):
    """A frame without a time is shown for 100 ms."""
    content = animation(kind, flat(4), duration=durations)
    assert every_frame(content).fps == pytest.approx(4 / seconds)


def test_the_rate_of_an_avif_is_frames_over_seconds():
    assert every_frame(animation("AVIF", flat(4), duration=[100, 200, 300, 400])).fps == pytest.approx(4)


def test_a_gif_without_times_shows_ten_frames_per_second():
    """GIF87a has no place for them; frames that are the same are frames."""
    block = b"," + struct.pack("<HHHHB", 0, 0, 8, 8, 0) + b"\x02\x02\x4c\x01\0"  # LZW: clear, then the end
    content = b"GIF87a" + struct.pack("<HHBBB", 8, 8, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff" + 5 * block + b";"
    found = probe(io.BytesIO(content), "x")
    assert (found.frames, found.fps, found.width, found.height) == (5, 10, 8, 8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["path", "file", "BytesIO", "memoryview"])
def test_an_animation_may_come_in_any_form(kind: str, form: str, tmp_path):
    content = animation(kind, flat(5))
    path = tmp_path / "film"  # the name says nothing
    path.write_bytes(content)
    moved = io.BytesIO(content)
    moved.seek(7)
    with path.open("rb") as file:
        source: Any = {"path": path, "file": file, "BytesIO": moved, "memoryview": memoryview(content)}[form]
        np.testing.assert_array_equal(load_video(source, SETTINGS).frames, load_video(content, SETTINGS).frames)


# ---- composition


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def apng(size: tuple[int, int], frames: list[tuple[np.ndarray, tuple[int, int], int, int]], still: bool = False):
    """A PNG of RGBA frames, each with its place (x, y), disposal and blending, by the PNG specification."""
    content = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, 8, 6, 0, 0, 0))
    content += chunk(b"acTL", struct.pack(">II", len(frames), 0))
    number = 0
    if still:
        pixels = np.full((size[1], size[0], 4), 77, np.uint8)
        content += chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in pixels)))
    for i, (pixels, (x, y), dispose, blend) in enumerate(frames):
        height, width = pixels.shape[:2]
        place = struct.pack(">IIIIIHHBB", number, width, height, x, y, 1, 10, dispose, blend)
        content += chunk(b"fcTL", place)
        data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in pixels))
        number += 1
        if i or still:
            content += chunk(b"fdAT", struct.pack(">I", number) + data)
            number += 1
        else:
            content += chunk(b"IDAT", data)
    return b"\x89PNG\r\n\x1a\n" + content + chunk(b"IEND", b"")


def rgba(height: int, width: int, *colour: int) -> np.ndarray:
    return np.broadcast_to(np.array(colour, np.uint8), (height, width, 4))


def composed(size: tuple[int, int], frames: list[tuple[np.ndarray, tuple[int, int], int, int]]) -> np.ndarray:
    """What the specification says is seen, over white; opacities of 0 and 255 only, so that no rounding is open."""
    canvas = np.zeros((size[1], size[0], 4), np.uint8)
    seen = []
    for pixels, (x, y), dispose, blend in frames:
        place = np.s_[y : y + pixels.shape[0], x : x + pixels.shape[1]]
        before = canvas.copy()
        canvas[place] = np.where(pixels[..., 3:] > 0, pixels, canvas[place]) if blend else pixels
        seen.append(np.where(canvas[..., 3:] > 0, canvas[..., :3], 255))
        if dispose == 1:
            canvas[place] = 0
        elif dispose == 2:
            canvas = before
    return np.stack(seen).astype(np.uint8)


@pytest.mark.parametrize("still", [False, True])
@pytest.mark.parametrize("dispose", [0, 1, 2])
@pytest.mark.parametrize("blend", [0, 1])
def test_a_png_is_composed_as_its_specification_says(dispose: int, blend: int, still: bool):
    """The picture for programs that know no animations is not a frame of it."""
    hole = rgba(20, 20, 10, 20, 30, 255).copy()
    hole[5:15, 5:15] = 0
    frames = [(rgba(64, 64, 200, 0, 0, 255), (0, 0), 0, 0)]
    frames += [(hole, (8 * i, 16), dispose, blend) for i in range(4)]
    frames += [(rgba(10, 10, 0, 0, 250, 255), (40, 40), 0, 1)]
    loaded = every_frame(apng((64, 64), frames, still))
    np.testing.assert_array_equal(loaded.frames, composed((64, 64), frames))
    assert loaded.fps == pytest.approx(10)


def test_opacity_blended_over_nothing_is_kept():
    """By the specification's formula, the opacity of a pixel over a clear one is its own."""
    frames = [(rgba(64, 64, 0, 0, 0, 0), (0, 0), 0, 0), (rgba(64, 64, 200, 0, 100, 128), (0, 0), 0, 1)]
    seen = every_frame(apng((64, 64), frames)).frames[1].astype(int)
    over_white = [255 + (colour - 255) * 128 / 255 for colour in (200, 0, 100)]
    assert np.abs(seen - over_white).max() < 1


@pytest.mark.parametrize("disposal", [0, 1, 2, 3])
def test_a_gif_is_composed_as_its_specification_says(disposal: int):
    """Opaque squares laid over a full first frame; 2 clears their place, 3 brings back what was there."""
    first = np.zeros((64, 64), np.uint8)
    palette = b"\xc8\0\0" + b"\0\xc8\0" + b"\0\0\xc8" + b"\xff\xff\xff"
    frames: list[tuple[np.ndarray, tuple[int, int], int]] = [(first, (0, 0), 1)]
    frames += [(np.full((16, 16), i, np.uint8), (16 * i, 8), disposal) for i in (1, 2)]
    frames += [(np.full((8, 8), 2, np.uint8), (0, 48), 1)]
    content = b"GIF89a" + struct.pack("<HHBBB", 64, 64, 0x81, 0, 0) + palette
    for indices, (x, y), method in frames:
        height, width = indices.shape
        # colour 3 is transparent: what is cleared shows the white behind
        content += b"!\xf9\x04" + struct.pack("<BHB", method << 2 | 1, 10, 3) + b"\0"
        content += b"," + struct.pack("<HHHHB", x, y, width, height, 0) + lzw(indices)
    colours = np.array([[200, 0, 0, 255], [0, 200, 0, 255], [0, 0, 200, 255]], np.uint8)
    apng_disposal = {0: 0, 1: 0, 2: 1, 3: 2}
    expected = composed((64, 64), [(colours[f], place, apng_disposal[m], 0) for f, place, m in frames])
    np.testing.assert_array_equal(every_frame(content + b";").frames, expected)


def lzw(indices: np.ndarray) -> bytes:
    """GIF's image data of 2-bit indices, with a clear code before every pair, so that all codes stay 3 bits wide."""
    codes = [code for i, index in enumerate(indices.ravel().tolist()) for code in ([4] if i % 2 == 0 else []) + [index]]
    bits = "".join(f"{code:03b}"[::-1] for code in [*codes, 5])
    data = bytes(int(bits[i : i + 8][::-1], 2) for i in range(0, len(bits), 8))
    blocks = [data[i : i + 255] for i in range(0, len(data), 255)]
    return b"\x02" + b"".join(bytes([len(block)]) + block for block in blocks) + b"\0"


@pytest.mark.parametrize("kind", ["WEBP", "PNG", "AVIF"])
def test_transparency_is_laid_on_white(kind: str):
    frames = [Image.new("RGBA", (64, 32), (200, 40, 20, opacity)) for opacity in (0, 64, 128, 255)]
    white = Image.new("RGBA", (64, 32), "white")
    expected = [np.asarray(Image.alpha_composite(white, frame).convert("RGB")).astype(int) for frame in frames]
    difference = np.abs(every_frame(animation(kind, frames)).frames - expected)
    assert difference.max() <= (4 if kind == "AVIF" else 1)


@pytest.mark.parametrize("kind", ["WEBP", "PNG"])  # Pillow crashes when it writes such an AVIF
@pytest.mark.parametrize(("orientation", "turn"), [(3, 2), (6, -1), (8, 1)])
def test_rotation_noted_in_exif_is_applied(kind: str, orientation: int, turn: int):
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = every_frame(animation(kind, flat(3), exif=exif)).frames
    stored = every_frame(animation(kind, flat(3))).frames
    np.testing.assert_array_equal(turned, np.rot90(stored, turn, axes=(1, 2)))


def test_a_png_of_16_bits_is_refused_as_a_picture_of_it_is():
    deep = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16
    content = animation("PNG", [Image.fromarray(deep), Image.fromarray(deep[::-1].copy())])
    with pytest.raises(VideoError, match=r"frame 1 of file of \d+ bytes: .* of mode I;16 has values 0 to 65520"):
        every_frame(content)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA"])
def test_a_png_of_any_mode_is_taken(mode: str):
    frames = [Image.fromarray(frame).convert(mode) for frame in flat(4)]
    expected = [np.asarray(frame.convert("RGB")) for frame in frames]
    np.testing.assert_array_equal(every_frame(animation("PNG", frames)).frames, expected)


# ---- what is refused


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_a_still_picture_is_refused_with_the_remedy(kind: str, tmp_path):
    path = tmp_path / "film.mp4"
    path.write_bytes(picture(kind, flat(1)[0]))
    with pytest.raises(VideoError) as error:
        load_video(path, SETTINGS)
    assert f"is a still picture ({kind}), not a video: pass it as an image, or in a list of frames" in str(error.value)
    assert load_video([path], SETTINGS).frames.shape == (1, 64, 96, 3)


@pytest.mark.parametrize("kind", ["MPO", "TIFF"])
def test_views_and_pages_are_not_frames(kind: str):
    with pytest.raises(VideoError, match="is a still picture"):
        load_video(animation(kind, flat(3)), SETTINGS)


def test_a_png_that_names_no_frames_is_a_still_picture():
    content = animation("PNG", flat(3))
    start = content.index(b"acTL") - 4
    none = content[:start] + chunk(b"acTL", bytes(8)) + content[start + 20 :]
    with pytest.raises(VideoError, match="is a still picture"):
        load_video(none, SETTINGS)


@pytest.mark.parametrize("kind", ["GIF", "PNG"])
def test_an_animation_cut_short_is_sampled_as_far_as_it_goes(kind: str):
    frames = flat(20)
    content = animation(kind, frames, duration=100)
    loaded = every_frame(content[: len(content) * 2 // 3])
    assert 5 < len(loaded.frames) < 20
    np.testing.assert_array_equal(loaded.frames, frames[: len(loaded.frames)])


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_animations_are_refused_or_taken(kind: str):
    """Cut anywhere, and with any byte changed: frames, or VideoError."""
    content = animation(kind, flat(4, 32, 32))
    random = np.random.default_rng(0)
    damaged = [content[:stop] for stop in range(0, len(content), len(content) // 40 + 1)]
    for place in random.integers(0, len(content), 60):
        damaged.append(content[:place] + bytes([random.integers(256)]) + content[place + 1 :])
    for one in damaged:
        with contextlib.suppress(VideoError):
            load_video(one, SETTINGS)


def gif_header(width: int, height: int, extent: tuple[int, int]) -> bytes:
    frame = b"," + struct.pack("<HHHHB", 0, 0, *extent, 0) + b"\x02\x02\x4c\x01\0"
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6) + 2 * frame + b";"


def webp_header(width: int, height: int) -> bytes:
    sides = b"".join((side - 1).to_bytes(3, "little") for side in (width, height))
    frame = b"ANMF" + struct.pack("<I", 16) + bytes(16)
    body = b"VP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + sides + 2 * frame
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


@pytest.mark.parametrize(
    "content",
    [gif_header(60_000, 60_000, (8, 8)), gif_header(8, 8, (60_000, 60_000)), webp_header(16_000, 16_000),
     apng((30_000, 30_000), [(rgba(1, 1, 0, 0, 0, 0), (0, 0), 0, 0)] * 2)],
    ids=["GIF", "GIF frame", "WEBP", "PNG"],
)  # fmt: skip
def test_sizes_are_bounded_before_anything_is_decoded(content: bytes):
    started = time.monotonic()
    with pytest.raises(VideoError, match=r"has frames of \d+x\d+, too large: scale it down"):
        load_video(content, SETTINGS)
    assert time.monotonic() - started < 1


def test_a_frame_beyond_the_screen_of_a_gif_is_cut_off():
    frames = flat(3, 64, 64)
    content = bytearray(animation("GIF", frames))
    content[6:10] = struct.pack("<HH", 40, 32)
    loaded = every_frame(bytes(content))
    assert len({frame.shape for frame in loaded.frames}) == 1


def test_photographs_one_after_another_are_a_film():
    """In grey, as decoders spread chroma over its pixels in ways of their own."""
    frames = [picture("JPEG", Image.fromarray(frame).convert("L")) for frame in film(8)]
    expected = [np.asarray(Image.open(io.BytesIO(frame)).convert("RGB")).astype(int) for frame in frames]
    assert np.abs(every_frame(b"".join(frames)).frames - expected).max() <= 2


def test_a_cover_is_not_a_film(tmp_path):
    film_path, song_path = tmp_path / "film.mp4", tmp_path / "song.mp4"
    for path, has_film in ((film_path, True), (song_path, False)):
        with av.open(str(path), "w") as container:
            cover = container.add_stream("mjpeg", rate=1)
            cover.width, cover.height, cover.pix_fmt = 320, 320, "yuvj420p"
            cover.disposition = av.stream.Disposition.attached_pic
            sound = container.add_stream("aac", rate=8000)
            sound.layout = "mono"
            track = container.add_stream("mpeg4", rate=10) if has_film else None
            if track:
                track.width, track.height, track.pix_fmt = 96, 64, "yuv420p"
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            silence.sample_rate = 8000
            container.mux(sound.encode(silence))
            for stream, frames in ((cover, film(1, 320, 320)), (track, film(6))):
                for frame in frames if stream else ():
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
                container.mux(stream.encode() if stream else [])
            container.mux(sound.encode())
    assert load_video(film_path, SETTINGS, EVERY_FRAME).frames.shape == (6, 64, 96, 3)
    with pytest.raises(VideoError, match="has no video stream"):
        load_video(song_path, SETTINGS)


@pytest.mark.parametrize(("size", "found"), [((80, 96), "96x80"), ((640, 960), "another size")])
def test_frames_that_grow_beyond_the_header_are_refused(size: tuple[int, int], found: str):
    small, large = (b"".join(picture("JPEG", frame) for frame in film(3, *size)) for size in ((64, 96), size))
    with pytest.raises(VideoError, match=f"has frames of {found} after its header said 96x64: encode it again"):
        every_frame(small + large)


def test_frames_that_share_their_bytes_are_refused():
    """The frames' own size is far beyond the header's, and a short file would make hours of decoding."""
    for side, count in ((64, 7200), (2000, 7200), (2000, 2)):
        content = shared_samples(picture("JPEG", Image.new("L", (side, side))), count)
        with pytest.raises(VideoError, match="has frames that share their bytes, more than the file holds"):
            every_frame(content)
    frame = film(1)[0]
    assert every_frame(shared_samples(picture("JPEG", frame), 1, 96, 64)).frames.shape == (1, 64, 96, 3)


def test_a_frame_is_bounded_before_it_gets_memory():
    """FFmpeg decodes the first frame to learn what the header leaves open."""
    content = shared_samples(picture("JPEG", Image.new("L", (10_500, 10_500))), 1)
    code = (
        "import io, sys; from deepstack_jax.processing.moving_pictures import VideoError, probe\n"
        "try: probe(io.BytesIO(sys.stdin.buffer.read()), 'film')\n"
        "except VideoError as error: print(error)\n"
        "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    lines = subprocess.run([sys.executable, "-c", code], input=content, capture_output=True, check=True).stdout.split(
        b"\n"
    )
    assert lines[0] == b"film has frames of an unknown size, perhaps too large: scale it down"
    assert int(lines[1].split()[1]) << 10 < 10_500**2


@pytest.mark.parametrize("codec", ["ffv1", "rawvideo", "png", "flv", "msmpeg4v2", "dvvideo", "huffyuv", "wmv2"])
def test_a_codec_that_is_not_on_the_list_is_refused(codec: str, tmp_path: Path):
    path = tmp_path / "film.mkv"
    with av.open(str(path), "w", format="nut") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height = (720, 576) if codec == "dvvideo" else (96, 64)
        stream.pix_fmt = {"png": "rgb24", "huffyuv": "yuv422p"}.get(codec, "yuv420p")
        for frame in film(2, stream.height, stream.width):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format=stream.pix_fmt)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    name = {"flv": "flv1"}.get(codec, codec)
    with pytest.raises(
        VideoError, match=f"has the video codec {name}, which is not decoded: encode it as one of h264,"
    ):
        load_video(path, SETTINGS)


def test_no_decoder_beside_the_list_is_opened():
    """FFmpeg itself says which it refused: it would run them to find out what a header leaves open."""
    av.logging.set_level(av.logging.ERROR)
    try:
        with av.logging.Capture() as lines, pytest.raises(VideoError, match="codec png"):
            probe(io.BytesIO(shared_samples(picture("PNG", film(1)[0]), 1, codec=b"png ")), "film")
    finally:
        av.logging.set_level(None)
    assert any("not on whitelist" in text for _, _, text in lines)
