"""Options of a video and the processor's own files: the arrays and times of transformers' video processor."""

import base64
import io
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor, smart_resize
from transformers.video_utils import load_video as hf_load_video

from deepstack_jax.processing.images import ImageError
from deepstack_jax.processing.videos import (
    VIDEO_OPTIONS,
    Video,
    VideoError,
    VideoOptions,
    VideoSettings,
    load_video,
    preprocess_videos,
    read_video_settings,
)
from tests.films import film, hf_processor, picture, vision_config, write_video

SETTINGS = VideoSettings()

# our options, and what says the same to transformers: what its processor is made with, and what it is called with
SAMPLING: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    ({}, {}, {}),
    ({"num_frames": 6}, {}, {"num_frames": 6, "fps": None}),
    ({"num_frames": 2}, {}, {"num_frames": 2, "fps": None}),
    ({"num_frames": 20}, {}, {"num_frames": 20, "fps": None}),
    ({"num_frames": 30}, {}, {"num_frames": 30, "fps": None}),  # above the video's 20: frames are repeated
    # a call's bounds don't reach transformers' sampling, which looks at those the processor was made with
    ({"min_frames": 9}, {"min_frames": 9}, {}),
    ({"max_frames": 2}, {"max_frames": 2}, {}),
    ({"min_frames": 3, "max_frames": 3}, {"min_frames": 3, "max_frames": 3}, {}),
    ({"min_frames": 1000}, {"min_frames": 1000}, {}),
    ({"do_sample_frames": False}, {}, {"do_sample_frames": False}),
    ({"do_sample_frames": True}, {}, {"do_sample_frames": True}),
    ({"do_sample_frames": False, "num_frames": 3}, {}, {"do_sample_frames": False, "num_frames": 3, "fps": None}),
    ({"num_frames": 6.0}, {}, {"num_frames": 6, "fps": None}),
    ({"num_frames": None, "fps": None, "min_pixels": None}, {}, {}),
]


def check(loaded: Video, expected: Any) -> None:
    """The arrays, the frames' numbers and the times of a call of transformers' processor."""
    pixel_values, grid = preprocess_videos([loaded], SETTINGS)
    metadata = expected["video_metadata"][0]
    indices = [int(i) for i in metadata.frames_indices]
    assert list(loaded.frame_indices) == indices
    assert loaded.timestamps(2) == Qwen3VLProcessor._calculate_timestamps(None, indices, metadata.fps or 24, 2)
    np.testing.assert_array_equal(grid, expected["video_grid_thw"])
    np.testing.assert_array_equal(pixel_values, expected["pixel_values_videos"])


@pytest.mark.parametrize("source_fps", [None, 4])
@pytest.mark.parametrize(("options", "made", "called"), SAMPLING)
def test_options_of_given_frames(options: dict, made: dict, called: dict, source_fps: int | None):
    """`fps` of given frames is their own rate, which transformers takes with the metadata."""
    video = film(20)
    if source_fps and options.get("num_frames"):
        source_fps = None  # the two exclude one another
    metadata = [{"total_num_frames": 20, "fps": source_fps, "frames_indices": list(range(20))}]
    expected = hf_processor(**made)(
        [video], video_metadata=metadata, return_metadata=True, return_tensors="np", **called
    )
    parsed = VideoOptions.of({**options, "fps": source_fps})
    check(load_video(video, SETTINGS, parsed), expected)
    check(load_video([Image.fromarray(frame) for frame in video], SETTINGS, parsed), expected)


@pytest.mark.parametrize(
    ("options", "made", "called"),
    [*SAMPLING, *[({"fps": fps}, {}, {"fps": fps}) for fps in (0.1, 0.5, 2, 3.3, 10, 24, 1e9)],
     ({"fps": 5, "max_frames": 4}, {"max_frames": 4}, {"fps": 5}),
     ({"fps": 5, "do_sample_frames": False}, {}, {"fps": 5, "do_sample_frames": False})],
)  # fmt: skip
def test_options_of_a_file(options: dict, made: dict, called: dict, tmp_path: Path):
    """transformers samples a file while it reads it, with the same function; `fps` is the rate of sampling."""
    path = write_video(tmp_path / "film.mp4", film(20), 10)
    processor = hf_processor(**made)
    sample = partial(processor.sample_frames, **{"num_frames": None, **called})
    if called.get("do_sample_frames") is False:
        sample = lambda metadata: np.arange(metadata.total_num_frames)  # noqa: E731
    frames, metadata = hf_load_video(str(path), backend="pyav", sample_indices_fn=sample)
    # its reader gives no frame twice
    frames = frames[np.unique(metadata.frames_indices, return_inverse=True)[1]]
    expected = processor([frames], do_sample_frames=False, return_tensors="np")
    expected["video_metadata"] = [metadata]
    check(load_video(path, SETTINGS, VideoOptions.of(options)), expected)


@pytest.mark.parametrize(
    ("options", "size"),
    [({"min_pixels": 300_000}, (300_000, 25165824)), ({"max_pixels": 30_000}, (4096, 30_000)),
     ({"max_pixels": 3_000}, (4096, 3_000)), ({"min_pixels": 5_000, "max_pixels": 9_000}, (5_000, 9_000)),
     ({"max_pixels": 9_000.0}, (4096, 9_000))],
)  # fmt: skip
@pytest.mark.parametrize("cap", [False, True])
def test_bounds_of_pixels_are_the_edges_of_transformers_size(options: dict, size: tuple[int, int], cap: bool):
    video = film(10, 100, 150)
    edges = dict(zip(("shortest_edge", "longest_edge"), size, strict=True))
    processor = hf_processor(size=edges, cap_pixels_per_frame=cap, do_sample_frames=False)
    settings = VideoSettings(cap_pixels_per_frame=cap, do_sample_frames=False)
    loaded = load_video(video, settings, VideoOptions.of(options))
    check_resized(loaded, video, processor, settings)


def check_resized(loaded: Video, sampled: np.ndarray, processor: Any, settings: VideoSettings) -> None:
    """transformers' grid; and its arrays of the frames that Pillow resizes, as torchvision rounds otherwise."""
    pixel_values, grid = preprocess_videos([loaded], settings)
    expected = processor([sampled], do_sample_frames=False, return_tensors="np")
    np.testing.assert_array_equal(grid, expected["video_grid_thw"])
    height, width = (16 * int(side) for side in expected["video_grid_thw"][0][1:])
    frames = [Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC) for frame in sampled]
    resized = np.stack([np.asarray(frame) for frame in frames])
    expected = processor([resized], do_sample_frames=False, do_resize=False, return_tensors="np")
    np.testing.assert_array_equal(pixel_values, expected["pixel_values_videos"])


@pytest.mark.parametrize(("height", "width"), [(64, 64), (100, 50), (33, 200), (4000, 4000)])
def test_a_resized_size_is_that_of_frames_of_this_size(height: int, width: int):
    video = film(6)
    options = VideoOptions.of({"resized_height": height, "resized_width": width, "do_sample_frames": False})
    frames = load_video(video, SETTINGS, options).frames
    rows, columns = smart_resize(6, height, width, 2, 32, 4096, 25165824)
    resized = [Image.fromarray(frame).resize((columns, rows), Image.Resampling.BICUBIC) for frame in video]
    np.testing.assert_array_equal(frames, np.stack([np.asarray(frame) for frame in resized]))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"frames": 8}, "frames is not an option of a video: use fps, num_frames, min_frames"),
        ({"max_pixel": 8}, "max_pixel is not an option"),
        *[({key: 0}, f"{key} 0 of a video must be") for key in VIDEO_OPTIONS if key != "do_sample_frames"],
        *[({key: -1}, f"{key} -1 of a video must be") for key in VIDEO_OPTIONS if key != "do_sample_frames"],
        *[({key: True}, f"{key} True of a video must be") for key in VIDEO_OPTIONS if key != "do_sample_frames"],
        *[({key: "2"}, f"{key} '2' of a video must be") for key in VIDEO_OPTIONS],
        *[({key: float("nan")}, f"{key} nan of a video must be") for key in VIDEO_OPTIONS],
        ({"fps": float("inf")}, "fps inf of a video must be a number above 0"),
        ({"num_frames": 2.5}, "num_frames 2.5 of a video must be a whole number"),
        ({"num_frames": 10**12}, "num_frames 1000000000000 of a video is above 1000000"),
        ({"min_pixels": 10**12}, "min_pixels 1000000000000 of a video is above"),
        ({"do_sample_frames": 1}, "do_sample_frames 1 of a video must be true or false"),
        ({"fps": 2, "num_frames": 8}, "fps 2 and num_frames 8 of a video can't both be given: give one of them"),
        ({"min_frames": 8, "max_frames": 4}, "min_frames 8 of a video is above its max_frames 4"),
        ({"min_pixels": 8, "max_pixels": 4}, "min_pixels 8 of a video is above its max_pixels 4"),
        ({"resized_height": 8}, "resized_height 8 of a video needs resized_width beside it"),
        ({"resized_width": 8}, "resized_width 8 of a video needs resized_height beside it"),
        ({"resized_width": 8, "resized_height": 8000}, "aspect ratio above 200"),
    ],
)
def test_options_that_mean_nothing_are_refused_by_name(raw: dict, message: str):
    with pytest.raises(VideoError) as error:
        VideoOptions.of(raw)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_more_frames_than_memory_holds_are_refused():
    with pytest.raises(VideoError, match=r"1000000 frames of a video at 32x32 have more than \d+ pixels: sample fewer"):
        load_video(film(3), SETTINGS, VideoOptions(num_frames=1_000_000))


# ---- frames that the client has sampled


def forms(frame: np.ndarray, folder: Path, number: int) -> dict[str, Any]:
    """One frame in every form that `load_image` takes."""
    png = picture("PNG", frame)
    path = folder / f"{number}.png"
    path.write_bytes(png)
    text = base64.b64encode(png).decode()
    return {
        "path": path,
        "name": str(path),
        "data URI": f"data:image/png;base64,{text}",
        "base64": text,
        "bytes": png,
        "file": io.BytesIO(png),
        "PIL": Image.fromarray(frame),
        "array": frame,
        "float": frame / np.float32(255),
    }


def test_frames_may_come_in_any_form_and_mixed(tmp_path: Path):
    video = film(10, 32, 64)
    every = [forms(frame, tmp_path, i) for i, frame in enumerate(video)]
    options = VideoOptions(fps=2)
    expected = load_video(video, SETTINGS, options)
    assert expected.frame_indices == tuple(range(10))  # sampled at 2 per second already
    assert expected.timestamps(2) == [0.25, 1.25, 2.25, 3.25, 4.25]
    mixed = [frame[form] for frame, form in zip(every, [*every[0], "path"], strict=True)]
    for frames in (*([frame[form] for frame in every] for form in every[0]), mixed):
        loaded = load_video(frames, SETTINGS, options)
        np.testing.assert_array_equal(loaded.frames, expected.frames)
        assert (loaded.fps, loaded.frame_indices) == (2, expected.frame_indices)


@pytest.mark.parametrize("form", ["[F, C, H, W]", "float", "torch", "torch [F, C, H, W]", "jax"])
def test_a_video_may_be_an_array_of_any_library(form: str):
    import jax.numpy as jnp
    import torch

    video = film(5)
    array: Any = {
        "[F, C, H, W]": video.transpose(0, 3, 1, 2),
        "float": video / np.float32(255),
        "torch": torch.from_numpy(video),
        "torch [F, C, H, W]": torch.from_numpy(video).permute(0, 3, 1, 2),
        "jax": jnp.asarray(video),
    }[form]
    np.testing.assert_array_equal(load_video(array, SETTINGS).frames, load_video(video, SETTINGS).frames)


def jpegs(count: int) -> list[bytes]:
    return [picture("JPEG", frame) for frame in film(count)]


def joined(frames: list[str], head: str = "data:video/jpeg;base64,") -> str:
    return head + ",".join(frames)


@pytest.mark.parametrize(
    "write",
    [
        joined,
        lambda frames: joined(frames, "DATA:video/JPEG;base64,"),
        lambda frames: joined(["\n".join(text[i : i + 76] for i in range(0, len(text), 76)) for text in frames]),
        lambda frames: joined([text.rstrip("=") for text in frames]),
        lambda frames: joined([text.replace("+", "%2B") for text in frames]),
        lambda frames: joined(frames).encode(),
        lambda frames: io.BytesIO(joined(frames).encode()),
    ],
)
def test_frames_in_one_data_uri_are_all_taken_at_2_per_second(write):
    """As vLLM takes them: it sets fps 2.0 and do_sample_frames False for video/jpeg."""
    content = jpegs(12)
    source = write([base64.b64encode(data).decode() for data in content])
    loaded = load_video(source, VideoSettings(max_frames=5))
    expected = [np.asarray(Image.open(io.BytesIO(data))) for data in content]
    np.testing.assert_array_equal(loaded.frames, expected)
    assert loaded.timestamps(2) == [0.25, 1.25, 2.25, 3.25, 4.25, 5.25]
    assert load_video(source, SETTINGS, VideoOptions(fps=4)).timestamps(2)[0] == 0.125
    assert len(load_video(source, SETTINGS, VideoOptions(num_frames=3, do_sample_frames=True)).frame_indices) == 3


@pytest.mark.parametrize("number", [1, 2, 4])
@pytest.mark.parametrize(
    ("bad", "message"), [("", "is empty"), ("!!!", "is not valid base64"), ("aGVsbG8gd29ybGQsIGhlbGxv", "not an image")]
)
def test_a_bad_frame_of_a_data_uri_is_named_by_its_number(bad: str, message: str, number: int):
    frames = [base64.b64encode(data).decode() for data in jpegs(4)]
    frames[number - 1] = bad
    with pytest.raises(VideoError, match=f"frame {number} of 4 .*{message}"):
        load_video(joined(frames), SETTINGS)


def test_a_bad_frame_of_a_list_is_named_by_its_number(tmp_path: Path):
    frames: list[Any] = list(film(6))
    # looked at although it is not among the four that are sampled
    for bad, message in (
        (picture("JPEG", frames[1])[:700], "damaged or truncated"),
        (tmp_path / "none.png", "no file"),
        (b"text", "not an image"),
        (frames[1][:, :64], "different sizes, 96x64 of frame 1 and 64x64 of frame 2"),
    ):
        with pytest.raises(VideoError, match=message) as error:
            load_video([frames[0], bad, *frames[2:]], SETTINGS)
        assert "frame 2" in str(error.value)


# ---- the processor's own files

SIZE = {"shortest_edge": 4096, "longest_edge": 25165824}


@pytest.mark.parametrize(
    "file", ["video_preprocessor_config.json", "preprocessor_config.json", "processor_config.json"]
)
@pytest.mark.parametrize(
    "raw",
    [
        {"fps": None, "num_frames": 7},
        {"fps": None, "num_frames": 17},
        {"fps": None, "num_frames": None},
        {"fps": None, "max_frames": 5},
        {"fps": 12},
        {"fps": 0},
        {"fps": 7.5, "num_frames": None},
        {"min_frames": 8},
        {"max_frames": 3, "fps": 24},
        {"min_frames": 8, "max_frames": 3},
        {"min_frames": 0, "fps": 12},
        {"do_sample_frames": False},
        {"do_sample_frames": None},
        {"do_sample_frames": False, "num_frames": 4, "fps": None},
        {"cap_pixels_per_frame": True, "max_video_tokens": 3},
        {"cap_pixels_per_frame": True, "max_video_tokens": 0},
        {"size": {"shortest_edge": 400_000, "longest_edge": 30_000}},
        {"min_pixels": 10, "max_pixels": 3_000},  # no keys of transformers' video processor
        {"image_mean": 0.25, "image_std": [0.5, 0.25, 1.0], "rescale_factor": 0.01},
    ],
)
def test_files_make_the_arrays_that_transformers_makes_of_them(raw: dict, file: str, tmp_path: Path):
    raw = {"cap_pixels_per_frame": False, "size": SIZE} | raw
    text = json.dumps({"video_processor": raw} if file == "processor_config.json" else raw)
    (tmp_path / file).write_text(text)
    processor = Qwen3VLVideoProcessor.from_pretrained(tmp_path)
    video = film(12)
    metadata = processor([video], return_metadata=True, return_tensors="np")["video_metadata"][0]  # type: ignore
    settings = read_video_settings(tmp_path, vision_config())
    loaded = load_video(video, settings)
    assert list(loaded.frame_indices) == [int(i) for i in metadata.frames_indices]
    check_resized(loaded, video[list(loaded.frame_indices)], processor, settings)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"fps": "2"}, "fps '2' of FILE must be a number"),
        ({"fps": True}, "fps True of FILE must be a number"),
        ({"fps": -1}, "fps -1 of FILE must be a number, 0 or more"),
        ({"fps": 2, "num_frames": 8}, "fps 2 and num_frames 8 of FILE can't both be given"),
        ({"num_frames": 0}, "num_frames 0 of FILE must be a whole number"),
        ({"num_frames": 2.5}, "num_frames 2.5 of FILE"),
        ({"max_frames": 0}, "max_frames 0 of FILE"),
        ({"max_frames": [4]}, r"max_frames [4] of FILE"),
        ({"min_frames": -1}, "min_frames -1 of FILE"),
        ({"max_video_tokens": "768"}, "max_video_tokens '768' of FILE"),
        ({"do_sample_frames": "no"}, "do_sample_frames 'no' of FILE must be true or false"),
        ({"cap_pixels_per_frame": 1}, "cap_pixels_per_frame 1 of FILE must be true or false"),
        ({"rescale_factor": 0}, "rescale_factor 0 of FILE"),
        ({"size": {"shortest_edge": 4096}}, "FILE"),
        ({"size": 64}, "FILE"),
    ],
)
def test_files_that_mean_nothing_are_refused_by_file_and_key(raw: dict, message: str, tmp_path: Path):
    file = tmp_path / "video_preprocessor_config.json"
    file.write_text(json.dumps(raw))
    with pytest.raises((VideoError, ImageError)) as error:
        read_video_settings(tmp_path, vision_config())
    assert message.replace("FILE", str(file)) in str(error.value)
    assert next(iter(raw)) in str(error.value)


def test_options_of_a_call_go_before_the_files():
    settings = VideoSettings(fps=None, num_frames=5)
    assert len(load_video(film(20), settings).frame_indices) == 5
    assert len(load_video(film(20), settings, VideoOptions(num_frames=7)).frame_indices) == 7
