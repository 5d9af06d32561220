"""Requests on their way to an encode node: every file that the whole model reads means the same there, bit for bit.

The reference is `processor.prepare` on the request as it came; `tests.test_disagg_split` sends some of them through
real nodes.
"""

import base64
import io
import re
import warnings
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import msgspec
import numpy as np
import pytest
from PIL import Image

from deepstack_jax.disagg.wire.payload import pack, unpack
from deepstack_jax.models.registry import read_config
from deepstack_jax.processing.processor import Processor
from deepstack_jax.testing.random_checkpoint import tiny_config, write_random_checkpoint

SIZE = (96, 64)
TURNED = 0x0112, 6  # EXIF: a quarter turn


# of what stands beside the messages, the template shows everything
TEMPLATE = (
    "{{ tools | tojson if tools else '' }}{{ a }}{{ b }}{{ enable_thinking }}{% for message in messages %}"
    "{% for part in message.content %}{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endfor %}"
)


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Processor:
    path: Path = tmp_path_factory.mktemp("payload") / "tiny"
    write_random_checkpoint(path, tiny_config(), seed=0)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return Processor.from_directory(path, read_config(path))


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


def opened(data: bytes) -> Image.Image:
    """As the server admits it: its header is read, and no pixel."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Image.open(io.BytesIO(data))


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[TURNED[0]] = TURNED[1]
    return exif


def several(form: str, count: int = 4, **options: Any) -> bytes:
    return saved(
        "RGB", form, save_all=True, append_images=[picture("RGB", seed) for seed in range(1, count)], **options
    )


IMAGES: dict[str, Callable[[], bytes]] = {
    **{f"JPEG {mode}": lambda mode=mode: saved(mode, "JPEG") for mode in ("1", "L", "RGB", "CMYK", "YCbCr")},
    "JPEG turned": lambda: saved("RGB", "JPEG", exif=turned()),
    "JPEG progressive": lambda: saved("RGB", "JPEG", progressive=True),
    "MPO": lambda: several("MPO", 2),
    "MPO of three": lambda: several("MPO", 3),
    "MPO turned": lambda: several("MPO", 2, exif=turned()),
    **{f"PNG {mode}": lambda mode=mode: saved(mode, "PNG") for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")},
    "PNG P, transparent": lambda: saved("P", "PNG", transparency=0),
    "PNG turned": lambda: saved("RGB", "PNG", exif=turned()),
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
    # Pillow reads these too; what a server admits is its policy's
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


def outcome(processor: Processor, prompt: Any, images: list[Any], videos: list[Any], options: Any) -> Any:
    try:
        return processor.prepare(prompt, images=images, videos=videos, **options)
    except ValueError as error:
        # names of files that have none hold their addresses
        return re.sub("0x[0-9a-f]+", "", f"{type(error).__name__}: {error}")


def assert_the_same(processor: Processor, make: Callable[[], tuple[Any, list[Any], list[Any], Any]]) -> Any:
    """Prepared as it came and after the journey: each from files of its own, as nodes have them."""
    whole, split = outcome(processor, *make()), outcome(processor, *unpack(pack(*make())))
    if isinstance(whole, str):
        assert split == whole
        return whole
    assert list(split) == list(whole)
    for name, array in whole.items():
        np.testing.assert_array_equal(split[name], array, err_msg=name, strict=True)
    return whole


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_of_any_format_and_mode_arrives_as_it_was(processor: Processor, name: str):
    data = IMAGES[name]()
    given = assert_the_same(processor, lambda: ("What is this?", [opened(data)], [], {}))
    if not isinstance(given, str):  # otherwise both refuse it, in the same words
        part = {"type": "image", "image": None, "max_pixels": 4096}
        messages = [{"role": "user", "content": [part, "?"]}]

        def message() -> tuple[Any, list[Any], list[Any], Any]:
            part["image"] = opened(data)
            return messages, [], [], {}

        assert len(assert_the_same(processor, message)["pixel_values"]) <= len(given["pixel_values"])


def test_the_table_of_images_is_read_with_few_exceptions(processor: Processor):
    """Otherwise equal refusals would say nothing."""
    refused = {
        name for name, make in IMAGES.items() if isinstance(outcome(processor, "?", [opened(make())], [], {}), str)
    }
    assert refused <= {"TIFF F", "TIFF I", "TIFF LAB", "TIFF I;16", "PNG I;16"}


@pytest.mark.parametrize("name", VIDEOS)
def test_a_video_of_any_container_arrives_as_it_was(processor: Processor, name: str):
    data = VIDEOS[name]()
    given = assert_the_same(processor, lambda: ("What happens?", [], [io.BytesIO(data)], {}))
    assert given["video_grid_thw"][0][0] >= 2, given
    part = {"type": "video", "fps": 2.5}
    content = lambda: [{"role": "user", "content": [part | {"video": io.BytesIO(data)}, "?"]}]  # noqa: E731
    assert_the_same(processor, lambda: (content(), [], [], {}))


@pytest.mark.parametrize("name", ["JPEG RGB", "MPO", "PNG RGBA", "WebP RGB", "GIF P", "TIFF CMYK", "AVIF RGB"])
@pytest.mark.parametrize("where", ["videos", "message"])
def test_a_video_of_pictures_arrives_as_it_was(processor: Processor, name: str, where: str):
    data = IMAGES[name]()

    def make() -> tuple[Any, list[Any], list[Any], Any]:
        frames = [opened(data) for _ in range(4)]
        if where == "videos":
            return "What happens?", [opened(data)], [frames], {}
        part = {"type": "video", "video": frames, "fps": 1.5}
        return [{"role": "user", "content": [part, {"type": "image"}, "?"]}], [opened(data)], [], {}

    assert assert_the_same(processor, make)["video_grid_thw"].shape == (1, 3)


REFUSED: list[dict[str, Any]] = [{"max_pixels": 0}, {"no_such_option": 1}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"maximum": 10**30, "minimum": -(2**63) - 1}}}


@pytest.mark.parametrize(
    "options",
    [
        {"max_pixels": 4096},
        {"min_pixels": 4096, "max_pixels": 8192},
        {"images_kwargs": {"max_pixels": 4096}, "videos_kwargs": {"num_frames": 4}},
        {"num_frames": 2},
        {"do_sample_frames": False},
        {"tools": [TOOL]},
        {"chat_template_kwargs": {"a": [1.5, None, "x\0y", -0.0], "b": {"c": 2**64}}},
        {"enable_thinking": False},
        *REFUSED,
    ],
)
def test_options_arrive_as_they_were(processor: Processor, options: dict[str, Any]):
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "video"}, "?"]}]
    image, video = IMAGES["MPO"](), VIDEOS["mp4"]()
    assert unpack(pack(messages, [], [], options))[3] == options
    given = assert_the_same(processor, lambda: (messages, [opened(image)], [io.BytesIO(video)], options))
    assert isinstance(given, str) == (options in REFUSED)


@pytest.mark.parametrize(
    "value",
    [
        *(2**63, 2**64 - 1, 2**64, -(2**63), -(2**63) - 1, 10**4000, -(10**4000), 255, -128, -129),
        *(True, None, 0.1, 1e308, -0.0, 5e-324, "", "\0", "\U0010ffff", "<|image_pad|>"),
        *([], {}, [[{"a": [10**20]}]], {"": {"\n": 2**70}}),
    ],
)
def test_values_arrive_as_they_were(value: Any):
    sent = [{"role": "user", "content": "a", "tool_calls": value}]
    for prompt, options in ((sent, {}), ("text", {"chat_template_kwargs": value})):
        prompt_again, _, _, options_again = unpack(pack(prompt, [], [], options))
        assert repr((prompt_again, options_again)) == repr((prompt, options))


def nested(depth: int) -> Any:
    value: Any = 10**30
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("depth", [100_000, 2_000])
def test_what_is_nested_too_deeply_is_refused_in_one_line(depth: int):
    with pytest.raises(ValueError, match=r"^the request is nested too deeply: "):
        pack("text", [], [], {"tools": nested(depth)})


def test_an_image_that_was_decoded_or_made_is_not_sent():
    decoded = opened(IMAGES["PNG RGB"]())
    decoded.load()
    for image in (decoded, picture("RGB")):
        with pytest.raises(TypeError, match="open it from its bytes"):
            pack("text", [image], [])


def bytes_of(*request: Any) -> bytes:
    return msgspec.msgpack.encode(request)


def ext(code: int, data: bytes) -> msgspec.msgpack.Ext:
    return msgspec.msgpack.Ext(code, data)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "truncated"),
        (b"\xc1", ""),
        (bytes_of("text", [], []), "at least length 4|length"),  # of an older release
        (bytes_of("text", [], [], []), "object"),
        (bytes_of(1, [], [], {}), "int"),
        (bytes_of("text", [ext(9, b"x")], [], {}), "extension type 9"),
        (bytes_of("text", [ext(1, b"PNG     " + b"not a picture")], [], {}), "format PNG can't be opened"),
        (bytes_of("text", [ext(1, b"PNG     " + saved("RGB", "BMP"))], [], {}), "format PNG can't be opened"),
        (bytes_of("text", [ext(1, b"MPO     " + saved("RGB", "PNG"))], [], {}), "format MPO can't be opened"),
        (bytes_of("text", [ext(1, b"HEIF    " + b"x" * 40)], [], {}), "format HEIF are not supported there"),
        (bytes_of("text", [ext(1, b"\xff\0")], [], {}), "not supported there"),
        (bytes_of("text", [ext(1, b"")], [], {}), "not supported there"),
        (b"\x94\xa1a" + b"\x91" * 100_000, "recursion"),
    ],
)
def test_what_is_no_request_is_a_value_error_of_one_line(data: bytes, reason: str):
    with pytest.raises(ValueError, match=rf"^the encode node can't read the request: .*({reason})") as caught:
        unpack(data)
    assert "\n" not in str(caught.value)
    assert "0x" not in str(caught.value)


def test_an_image_is_opened_as_what_it_was_admitted():
    for name in ("JPEG RGB", "MPO", "PNG RGB", "WebP RGB", "GIF P", "BMP RGB", "TIFF RGB", "AVIF RGB"):
        image = opened(IMAGES[name]())
        _, (arrived,), _, _ = unpack(pack("text", [image], []))
        assert (arrived.format, arrived.mode, arrived.size) == (image.format, image.mode, image.size)


def test_mpo_is_the_only_format_without_an_opener():
    """It is opened as JPEG; another one must be seen here."""
    Image.init()
    names = {image.format for image in (opened(make()) for make in IMAGES.values())}
    assert names - set(Image.OPEN) == {"MPO"}
