"""Payloads of requests: an encode node prepares every file with the same bits as the whole model.

The reference is `processor.prepare` on the original request; `tests.test_disagg_split` sends some of the requests
through real nodes.
"""

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

from deepstack_jax.disagg.wire.payload import pack, unpack
from deepstack_jax.models.registry import read_config
from deepstack_jax.processing.images import ImageError
from deepstack_jax.processing.processor import Processor
from deepstack_jax.processing.sources import MediaFile
from deepstack_jax.testing.random_checkpoint import tiny_config, write_random_checkpoint
from tests.media import IMAGES, VIDEOS, opened, picture, saved

# the template renders everything that is passed beside the messages
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


def outcome(processor: Processor, prompt: Any, images: list[Any], videos: list[Any], options: Any) -> Any:
    try:
        return processor.prepare(prompt, images=images, videos=videos, **options)
    except ValueError as error:
        # the repr of an unnamed file contains its address
        return re.sub("0x[0-9a-f]+", "", f"{type(error).__name__}: {error}")


def assert_the_same(processor: Processor, make: Callable[[], tuple[Any, list[Any], list[Any], Any]]) -> Any:
    """Prepares a request directly and after packing, each from its own files, and compares; returns the arrays."""
    whole, split = outcome(processor, *make()), outcome(processor, *unpack(pack(*make())))
    if isinstance(whole, str):
        assert split == whole
        return whole
    assert list(split) == list(whole)
    for name, array in whole.items():
        np.testing.assert_array_equal(split[name], array, err_msg=name, strict=True)
    return whole


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_of_any_format_and_mode_arrives_unchanged(processor: Processor, name: str):
    data = IMAGES[name]()
    given = assert_the_same(processor, lambda: ("What is this?", [opened(data)], [], {}))
    if not isinstance(given, str):  # otherwise both refuse it with the same message
        part = {"type": "image", "image": None, "max_pixels": 4096}
        messages = [{"role": "user", "content": [part, "?"]}]

        def message() -> tuple[Any, list[Any], list[Any], Any]:
            part["image"] = opened(data)
            return messages, [], [], {}

        assert len(assert_the_same(processor, message)["pixel_values"]) <= len(given["pixel_values"])


def test_nearly_all_images_of_the_table_are_read(processor: Processor):
    """Otherwise equal refusals would prove nothing."""
    refused = {
        name for name, make in IMAGES.items() if isinstance(outcome(processor, "?", [opened(make())], [], {}), str)
    }
    assert refused <= {"TIFF F", "TIFF I", "TIFF LAB", "TIFF I;16", "PNG I;16"}


@pytest.mark.parametrize("name", VIDEOS)
def test_a_video_of_any_container_arrives_unchanged(processor: Processor, name: str):
    data = VIDEOS[name]()
    given = assert_the_same(processor, lambda: ("What happens?", [], [MediaFile(data)], {}))
    assert given["video_grid_thw"][0][0] >= 2, given
    part = {"type": "video", "fps": 2.5}
    content = lambda: [{"role": "user", "content": [part | {"video": MediaFile(data)}, "?"]}]  # noqa: E731
    assert_the_same(processor, lambda: (content(), [], [], {}))


@pytest.mark.parametrize("name", ["JPEG RGB", "MPO", "PNG RGBA", "WebP RGB", "GIF P", "TIFF CMYK", "AVIF RGB"])
@pytest.mark.parametrize("where", ["videos", "message"])
def test_a_video_of_images_arrives_unchanged(processor: Processor, name: str, where: str):
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
def test_options_arrive_unchanged(processor: Processor, options: dict[str, Any]):
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "video"}, "?"]}]
    image, video = IMAGES["MPO"](), VIDEOS["mp4"]()
    assert unpack(pack(messages, [], [], options))[3] == options
    given = assert_the_same(processor, lambda: (messages, [opened(image)], [MediaFile(video)], options))
    assert isinstance(given, str) == (options in REFUSED)


@pytest.mark.parametrize(
    "value",
    [
        *(2**63, 2**64 - 1, 2**64, -(2**63), -(2**63) - 1, 10**4000, -(10**4000), 255, -128, -129),
        *(True, None, 0.1, 1e308, -0.0, 5e-324, "", "\0", "\U0010ffff", "<|image_pad|>"),
        *([], {}, [[{"a": [10**20]}]], {"": {"\n": 2**70}}),
    ],
)
def test_values_arrive_unchanged(value: Any):
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
def test_deeply_nested_values_are_refused_in_one_line(depth: int):
    with pytest.raises(ValueError, match=r"^the request is nested too deeply: "):
        pack("text", [], [], {"tools": nested(depth)})


@pytest.mark.parametrize("image", [picture("RGB"), io.BytesIO(saved("RGB", "PNG"))])
def test_only_files_are_sent(image: Any):
    with pytest.raises(TypeError, match="can't be sent to an encode node"):
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
        (bytes_of("text", [], []), "at least length 4|length"),  # from an older release
        (bytes_of("text", [], [], []), "object"),
        (bytes_of(1, [], [], {}), "int"),
        (bytes_of("text", [ext(9, b"x")], [], {}), "extension type 9"),
        (b"\x94\xa1a" + b"\x91" * 100_000, "recursion"),
    ],
)
def test_an_invalid_payload_is_a_value_error_of_one_line(data: bytes, reason: str):
    with pytest.raises(ValueError, match=rf"^the encode node can't read the request: .*({reason})") as caught:
        unpack(data)
    assert "\n" not in str(caught.value)
    assert "0x" not in str(caught.value)


def test_an_image_is_opened_with_the_format_it_was_admitted_as(processor: Processor):
    for name in ("JPEG RGB", "MPO", "PNG RGB", "WebP RGB", "GIF P", "BMP RGB", "TIFF RGB", "AVIF RGB"):
        data = IMAGES[name]()
        _, (arrived,), _, _ = unpack(pack("text", [opened(data)], []))
        assert (arrived.format, arrived.data) == (opened(data).format, data)
        with pytest.raises(ImageError, match="is not an image"):
            processor.prepare("?", [MediaFile(data, "PNG" if arrived.format != "PNG" else "BMP")])
    for name in ("HEIF", "\ufffd", "JPEG2"):
        with pytest.raises(ImageError, match="are not supported here: send a PNG or JPEG"):
            processor.prepare("?", [MediaFile(data, name)])


def test_mpo_is_the_only_format_without_an_opener():
    """It is opened as JPEG. This test fails if another such format is added."""
    Image.init()
    names = {image.format for image in (opened(make()) for make in IMAGES.values())}
    assert names - set(Image.OPEN) == {"MPO"}
