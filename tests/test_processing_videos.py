"""Videos: sampling, timestamps and arrays of transformers' video processor, files that PyAV encodes, and bad files."""

import base64
import io
import struct
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor, smart_resize
from transformers.video_utils import VideoMetadata
from transformers.video_utils import load_video as hf_load_video

from deepstack_jax.processing.videos import (
    VideoError,
    VideoOptions,
    VideoSettings,
    load_video,
    preprocess_videos,
    read_video_settings,
    sample_frames,
    smart_resize_video,
)
from tests.films import film, hf_processor, vision_config, write_video

SETTINGS = VideoSettings()


def decoded(path: Path) -> np.ndarray:
    """Every frame of a file, straight from PyAV."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


# ---- the rules, against transformers


@given(total=st.integers(1, 20000), video_fps=st.floats(0.5, 240), fps=st.floats(0.1, 30))
@settings(max_examples=300, deadline=None)
def test_sampled_frames_equal_transformers(total: int, video_fps: float, fps: float):
    metadata = VideoMetadata(total_num_frames=total, fps=video_fps)
    expected = hf_processor().sample_frames(metadata, fps=fps)
    np.testing.assert_array_equal(sample_frames(total, video_fps, SETTINGS, fps), expected)


@given(
    num_frames=st.integers(2, 800),
    height=st.integers(1, 3000),
    width=st.integers(1, 3000),
    max_pixels=st.sampled_from([32 * 32 * 768, 25165824]),
)
@example(3, 480, 480, 32 * 32 * 768)  # an odd number of frames is rounded to even: 3 to 4 ...
@example(5, 432, 432, 32 * 32 * 768)  # ... and 5 to 4, before the budget is compared
@settings(max_examples=300, deadline=None)
def test_sizes_of_frames_equal_transformers(num_frames: int, height: int, width: int, max_pixels: int):
    try:
        expected = smart_resize(num_frames, height, width, 2, 32, 4096, max_pixels)
    except ValueError:  # the aspect ratio, refused before by load_video
        return
    assert smart_resize_video(num_frames, height, width, SETTINGS, max_pixels) == expected


@pytest.mark.parametrize("frames", [2, 3, 7, 30, 61])
@pytest.mark.parametrize("sample", [True, False])
def test_frames_that_need_no_resizing_equal_transformers_bit_for_bit(frames: int, sample: bool):
    video = film(frames)
    loaded = load_video(video, SETTINGS, VideoOptions(do_sample_frames=sample))
    pixel_values, grid = preprocess_videos([loaded], SETTINGS)
    expected = hf_processor()([video], do_sample_frames=sample, return_metadata=True, return_tensors="np")
    metadata = expected["video_metadata"][0]
    assert list(loaded.frame_indices) == list(metadata.frames_indices)
    assert loaded.timestamps(2) == Qwen3VLProcessor._calculate_timestamps(
        None, list(metadata.frames_indices), metadata.fps or 24, 2
    )
    assert pixel_values.dtype == np.float32
    assert grid.dtype == np.int64
    np.testing.assert_array_equal(grid, expected["video_grid_thw"])
    np.testing.assert_array_equal(pixel_values, expected["pixel_values_videos"])


def test_videos_of_unlike_sizes_follow_one_another():
    videos = [film(4, 64, 96), film(9, 96, 64)]
    expected = hf_processor()(videos, do_sample_frames=False, return_tensors="np")
    loaded = [load_video(video, SETTINGS, VideoOptions(do_sample_frames=False)) for video in videos]
    pixel_values, grid = preprocess_videos(loaded, SETTINGS)
    np.testing.assert_array_equal(grid, expected["video_grid_thw"])
    np.testing.assert_array_equal(pixel_values, expected["pixel_values_videos"])


@pytest.mark.parametrize(("cap", "budget"), [(False, 300_000), (True, 300_000), (True, 30_000)])
def test_resized_frames_differ_from_torchvision_by_little(cap: bool, budget: int):
    """The sizes are equal. Bounds in steps of a byte, just above what was measured: 1 at most, 0.005 on average."""
    video = film(12, 250, 370)
    size = {"shortest_edge": 4096, "longest_edge": budget}
    options = VideoSettings(max_pixels=budget, cap_pixels_per_frame=cap, max_video_tokens=12)
    processor = hf_processor(size=size, cap_pixels_per_frame=cap)
    processor.max_video_tokens = 12
    expected = processor([video], do_sample_frames=False, return_tensors="np")
    pixel_values, grid = preprocess_videos([load_video(video, options, VideoOptions(do_sample_frames=False))], options)
    np.testing.assert_array_equal(grid, expected["video_grid_thw"])
    difference = np.abs(pixel_values - expected["pixel_values_videos"]) * 127.5
    assert difference.max() < 1.01
    assert difference.mean() < 0.01


# ---- files


@pytest.mark.parametrize(
    ("suffix", "codec"),
    [(".mp4", "libx264"), (".mkv", "libx264"), (".webm", "libvpx"), (".avi", "mpeg4"), (".ts", "mpeg4")],
)
def test_a_file_is_sampled_as_transformers_samples_it(suffix: str, codec: str, tmp_path: Path):
    """Matroska and MPEG-TS do not say how many frames they have; transformers' own reader needs that number."""
    path = write_video(tmp_path / f"film{suffix}", film(45), 25, codec)
    loaded = load_video(path, SETTINGS)
    assert loaded.total_frames == 45
    assert loaded.fps == pytest.approx(25)
    # 45 / 25 * 2 = 3.6 frames, raised to the least of 4
    assert loaded.frame_indices == (0, 15, 29, 44)
    if suffix == ".mp4":
        frames, _ = hf_load_video(
            str(path), backend="pyav", sample_indices_fn=lambda metadata: hf_processor().sample_frames(metadata)
        )
        np.testing.assert_array_equal(loaded.frames, frames)
    np.testing.assert_array_equal(loaded.frames, decoded(path)[[0, 15, 29, 44]])


def test_fps_of_a_file_is_the_rate_of_sampling(tmp_path: Path):
    path = write_video(tmp_path / "film.mp4", film(40), 10)
    assert len(load_video(path, SETTINGS).frame_indices) == 8
    assert len(load_video(path, SETTINGS, VideoOptions(fps=5)).frame_indices) == 20
    assert load_video(path, SETTINGS, VideoOptions(do_sample_frames=False)).frame_indices == tuple(range(40))


def test_fps_of_frames_is_their_own_rate():
    video = film(40)
    assert load_video(video, SETTINGS).timestamps(2)[0] == pytest.approx(13 / 24 / 2)  # frames 0 and 13 of 4 sampled
    loaded = load_video(video, SETTINGS, VideoOptions(fps=10))
    assert len(loaded.frame_indices) == 8
    assert loaded.timestamps(2)[0] == pytest.approx(6 / 10 / 2)


def test_an_ntsc_rate_is_not_rounded(tmp_path: Path):
    path = write_video(tmp_path / "film.mp4", film(10), Fraction(30000, 1001))
    assert load_video(path, SETTINGS).fps == 30000 / 1001


@pytest.mark.parametrize("form", ["uri", "file-uri"])
def test_a_file_may_come_as_a_uri(form: str, tmp_path: Path):
    path = write_video(tmp_path / "film.mp4", film(12))
    data = "data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode()
    loaded = load_video(data if form == "uri" else path.as_uri(), SETTINGS)
    np.testing.assert_array_equal(loaded.frames, load_video(path, SETTINGS).frames)


def test_an_animation_is_a_video(tmp_path: Path):
    path = write_video(tmp_path / "film.gif", film(12), 10, "gif")
    assert load_video(path, SETTINGS, VideoOptions(do_sample_frames=False)).frames.shape == (12, 64, 96, 3)


def test_lists_of_images_are_frames():
    video = film(5)
    expected = load_video(video, SETTINGS).frames
    np.testing.assert_array_equal(load_video(list(video), SETTINGS).frames, expected)
    np.testing.assert_array_equal(load_video([Image.fromarray(frame) for frame in video], SETTINGS).frames, expected)


def test_a_single_frame_is_repeated_to_fill_its_temporal_patch():
    video = film(1)
    loaded = load_video(video, SETTINGS)
    pixel_values, grid = preprocess_videos([loaded], SETTINGS)
    assert grid.tolist() == [[1, 4, 6]]
    assert loaded.timestamps(2) == [0]
    twice = hf_processor()([np.concatenate([video, video])], do_sample_frames=False, return_tensors="np")
    np.testing.assert_array_equal(pixel_values, twice["pixel_values_videos"])


def rotate_track(path: Path, matrix: tuple[int, ...]) -> None:
    """Writes a display matrix into the track header of an MP4, where a phone notes how it was held."""
    content = bytearray(path.read_bytes())
    start = content.index(b"tkhd") + 4 + 40  # version 0: 40 bytes of times, volume and layers stand before it
    content[start : start + 36] = struct.pack(">9i", *(value << 16 for value in matrix[:8]), 1 << 30)
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("matrix", "turns"),
    [
        pytest.param((0, 1, 0, -1, 0, 0, 64, 0), -1, id="clockwise"),
        pytest.param((0, -1, 0, 1, 0, 0, 0, 96), 1, id="counterclockwise"),
        pytest.param((-1, 0, 0, 0, -1, 0, 96, 64), 2, id="upside-down"),
    ],
)
def test_rotation_noted_in_a_file_is_applied(matrix: tuple[int, ...], turns: int, tmp_path: Path):
    """By ISO 14496-12, the matrix maps the point (x, y) to (a x + c y, b x + d y)."""
    path = write_video(tmp_path / "film.mp4", film(4))
    stored = load_video(path, SETTINGS).frames
    rotate_track(path, matrix)
    np.testing.assert_array_equal(load_video(path, SETTINGS).frames, np.rot90(stored, turns, axes=(1, 2)))


def test_a_recording_cut_short_is_sampled_as_far_as_it_goes(tmp_path: Path):
    path = write_video(tmp_path / "film.avi", film(60, 256, 384), 10, "mpeg4")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    loaded = load_video(path, VideoSettings(fps=5))
    rest = decoded(path)
    assert 10 < loaded.total_frames == len(rest) < 50
    assert len(loaded.frame_indices) == loaded.total_frames // 2
    assert loaded.frame_indices[-1] == loaded.total_frames - 1
    np.testing.assert_array_equal(loaded.frames, rest[list(loaded.frame_indices)])


def test_a_long_film_is_never_in_memory_whole(tmp_path: Path):
    """300 frames of 1280x720 are 790 MB; what is kept after resizing is 10 MB."""
    path = tmp_path / "film.mp4"
    frame = film(1, 720, 1280)[0]
    write_video(path, np.broadcast_to(frame, (300, *frame.shape)), 30, "mpeg4")
    code = (
        "import resource, sys\n"
        "from deepstack_jax.processing.videos import VideoOptions, VideoSettings, load_video\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "video = load_video(sys.argv[1], VideoSettings(max_pixels=2**22), VideoOptions(do_sample_frames=False))\n"
        "assert video.frames.shape[0] == 300, video.frames.shape\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)\n"
    )
    run = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert float(run.stdout) < 200


# ---- bad videos


@pytest.mark.parametrize("content", [b"", b"hello, I am text", bytes(5000)])
def test_files_that_are_no_videos_are_refused(content: bytes, tmp_path: Path):
    path = tmp_path / "film.mp4"
    path.write_bytes(content)
    with pytest.raises(VideoError, match=r"film\.mp4 is not a video that can be decoded") as error:
        load_video(path, SETTINGS)
    assert "\n" not in str(error.value)


def test_a_truncated_mp4_is_refused(tmp_path: Path):
    path = write_video(tmp_path / "film.mp4", film(20))
    path.write_bytes(path.read_bytes()[:-500])  # its table of contents stands at the end
    with pytest.raises(VideoError, match="is not a video that can be decoded"):
        load_video(path, SETTINGS)


def test_a_file_with_sound_alone_is_refused(tmp_path: Path):
    path = tmp_path / "song.wav"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    with pytest.raises(VideoError, match="has no video stream"):
        load_video(path, SETTINGS)


@pytest.mark.parametrize("suffix", [".avi", ".mkv"])
def test_a_file_with_no_frames_is_refused(suffix: str, tmp_path: Path):
    path = tmp_path / f"film{suffix}"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        container.start_encoding()
    with pytest.raises(VideoError, match="is a video with no frames"):
        load_video(path, SETTINGS)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no/film.mp4", "no file no/film.mp4"),
        ([], "video with no frames"),
        (np.zeros((0, 8, 8, 3), np.uint8), "video with no frames"),
        (np.zeros((3, 8, 8), np.uint8), r"video array \[3, 8, 8\] of uint8: give \[F, H, W, 3\]"),
        (np.full((4, 8, 8, 3), 2, np.float32), "frame 1 of 4 of a video: .*floating"),
        ([np.zeros((8, 8, 3), np.uint8), np.zeros((8, 9, 3), np.uint8)], "different sizes"),
        (np.zeros((4, 2, 402, 3), np.uint8), "402x2 have an aspect ratio above 200"),
        (7, "can't be read from int"),
        (Image.new("RGB", (64, 64)), "a PIL image is one picture: pass it as an image, a list of them"),
    ],
)
def test_sources_that_hold_no_video_are_refused(source, message: str):
    with pytest.raises(VideoError, match=message):
        load_video(source, SETTINGS)


def test_an_impossible_rate_is_refused():
    with pytest.raises(VideoError, match="fps 0 of a video must be a number above 0"):
        load_video(film(4), SETTINGS, VideoOptions(fps=0))


def test_a_playlist_from_elsewhere_opens_no_local_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_video(tmp_path / "secret.mp4", film(4))
    monkeypatch.chdir(tmp_path)
    playlist = b"ffconcat version 1.0\nfile secret.mp4\n"
    with av.open(io.BytesIO(playlist)) as container:  # what the decoder does when nobody forbids it
        assert container.streams.video[0].width == 96
    with pytest.raises(VideoError, match="is not a video that can be decoded"):
        load_video("data:video/mp4;base64," + base64.b64encode(playlist).decode(), SETTINGS)


# ---- settings of a checkpoint


def test_without_a_file_the_settings_are_those_of_qwen3_vl(tmp_path: Path):
    assert read_video_settings(tmp_path, vision_config()) == VideoSettings()


def test_a_file_that_transformers_wrote_is_read(tmp_path: Path):
    size = {"shortest_edge": 2048, "longest_edge": 99999}
    hf_processor(size=size, fps=3, min_frames=2, max_frames=9, cap_pixels_per_frame=True).save_pretrained(tmp_path)
    settings = read_video_settings(tmp_path, vision_config())
    assert settings == VideoSettings(
        min_pixels=2048, max_pixels=99999, fps=3, min_frames=2, max_frames=9, cap_pixels_per_frame=True
    )


def test_without_a_file_of_its_own_the_images_file_counts_and_class_defaults_fill_it(tmp_path: Path):
    """As transformers reads the same directory."""
    (tmp_path / "preprocessor_config.json").write_text('{"patch_size": 16, "image_mean": [0.2, 0.3, 0.4]}')
    video = film(6)
    settings = read_video_settings(tmp_path, vision_config())
    expected = Qwen3VLVideoProcessor.from_pretrained(tmp_path, cap_pixels_per_frame=False)([video], return_tensors="np")
    pixel_values, grid = preprocess_videos([load_video(video, settings)], settings)
    np.testing.assert_array_equal(grid, expected["video_grid_thw"])
    # the frames are enlarged: one step of a byte between the two back ends, over a deviation of 0.5
    assert np.abs(pixel_values - expected["pixel_values_videos"]).max() < 1.01 / 127.5
