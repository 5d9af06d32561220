"""What is fuzzed: each target takes any bytes and may refuse them only by the errors that it declares."""

import io
import json
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import av.error
import msgspec

from deepstack_jax.checkpoints.hf_folder import weight_files
from deepstack_jax.checkpoints.manifest import read_manifest
from deepstack_jax.checkpoints.safetensors_file import CheckpointError, read_entries
from deepstack_jax.config import read_sampling_defaults, read_special_tokens
from deepstack_jax.config_values import ConfigError
from deepstack_jax.disagg.wire import messages
from deepstack_jax.models.registry import parse_config, read_config
from deepstack_jax.processing.animations import ANIMATIONS, frames_of, picture_format, read_header
from deepstack_jax.processing.images import ImageError, ImageOptions, load_image
from deepstack_jax.processing.media import checked_image, checked_video
from deepstack_jax.processing.messages import PromptError, parse_messages
from deepstack_jax.processing.processor import Processor
from deepstack_jax.processing.videos import VideoError, VideoOptions
from deepstack_jax.sampling_options import SamplingOptionError
from deepstack_jax.serving.errors import RequestError
from deepstack_jax.serving.media import spend_image, spend_video
from deepstack_jax.serving.openai.fields import ChatRequest, parse_body
from deepstack_jax.serving.openai.routes import BODIES
from deepstack_jax.serving.policy import Budget, MediaError, MediaPolicy
from deepstack_jax.serving.requests import parse_request
from deepstack_jax.testing.random_checkpoint import tiny_config
from tests import media
from tests.cases import FAMILIES

Json = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """`run` takes one input; `seeds` yields those that a search begins with. `structure` is how inputs are mutated."""

    run: Callable[[bytes], object]
    refusals: tuple[type[Exception], ...]
    seeds: Callable[[], Iterator[bytes]]
    structure: str = "bytes"


def check(target: Target, data: bytes) -> None:
    """Runs a target; raises whatever is not a declared refusal in one line."""
    try:
        target.run(data)
    except target.refusals as refusal:
        message = str(refusal)
        assert message, "a refusal without a message"
        assert "\n" not in message, f"a refusal of several lines: {message!r}"
        assert len(message) < 2000, f"a refusal of {len(message)} characters: {message[:200]!r}"


# ---- HTTP bodies

GENERATE: Json = {
    "text": "a",
    "input_ids": [1, 2],
    "image_data": ["data:image/png;base64,AAAA"],
    "sampling_params": {"temperature": 0.5, "max_new_tokens": 4, "stop": ["a"], "top_p": 0.9, "logit_bias": {"1": 2}},
    "stream": True,
    "rid": "1",
}
CHAT: Json = {
    "model": "tiny",
    "messages": [
        {"role": "system", "content": "a"},
        {"role": "user", "content": [{"type": "text", "text": "b"}, {"type": "image_url", "image_url": {"url": "c"}}]},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "1", "content": "d"},
    ],
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}],
    "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}},
    "stream_options": {"include_usage": True},
    "logit_bias": {"1": -1},
    "stop": ["a", "b"],
    "n": 2,
}  # fmt: skip
RESPONSE: Json = {
    "input": [
        {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": "a"},
    ],
    "tools": [{"type": "function", "name": "f", "parameters": {}}],
    "text": {"format": {"type": "text"}},
    "reasoning": {"effort": "low"},
}
OTHERS: tuple[Json, ...] = (
    {"prompt": ["a", "b"], "logprobs": 2, "echo": True},
    {"prompt": [[1, 2], [3]]},
    {"prompt": "a", "add_special_tokens": True, "messages": []},
    {"tokens": [1, 2, 3]},
)


def run_openai(data: bytes) -> None:
    for kind in list(BODIES.values())[1:]:
        with suppress(RequestError, SamplingOptionError):
            parse_body(data, kind)
    body = parse_body(data, ChatRequest)
    parse_messages(body.messages)


# ---- control messages


def message_seeds() -> Iterator[bytes]:
    for kind in messages.MESSAGES:
        fields = {field.name: _value_of(field) for field in msgspec.structs.fields(kind)}
        yield bytes((messages.PROTOCOL,)) + msgspec.msgpack.encode({"type": kind.__name__, **fields})


def _value_of(field: Any) -> Any:
    kind = str(field.type)
    return next(
        (v for name, v in (("bytes", b"12345678"), ("tuple", []), ("str", "a"), ("float", 0.5)) if name in kind), 1
    )


def run_message(data: bytes) -> None:
    found, reason = messages.unpack_message(data)
    assert (found is None) == bool(reason)
    if found is not None:
        assert messages.unpack_message(messages.pack_message(found)) == (found, "")


# ---- files of a checkpoint

# in memory, as a disk takes longer than the search
IN_MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None
_FOLDER = tempfile.TemporaryDirectory(prefix="deepstack-jax-fuzz-", dir=IN_MEMORY)


def in_file(name: str, read: Callable[[Path], object]) -> Callable[[bytes], object]:
    """Gives the input to `read` as a file of its own folder."""

    def run(data: bytes) -> None:
        folder = Path(_FOLDER.name) / name
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
        read(folder)

    return run


def with_header(header: Any, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def safetensors_seeds() -> Iterator[bytes]:
    one = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
    other = {"dtype": "BF16", "shape": [4], "data_offsets": [16, 24]}
    yield with_header({"__metadata__": {"format": "pt"}, "a": one, "b": other}, bytes(24))
    yield with_header({"a": {"dtype": "F8_E4M3", "shape": [0], "data_offsets": [0, 0]}})


def read_others(folder: Path) -> None:
    """The same contents as each of the other JSON files."""
    config = parse_config(tiny_config())
    data = (folder / "config.json").read_bytes()
    for name in ("generation_config.json", "preprocessor_config.json", "video_preprocessor_config.json"):
        (folder / name).write_bytes(data)
    processor = Processor(folder, config)
    for read in (
        lambda: read_special_tokens(folder, config),
        lambda: read_sampling_defaults(folder),
        lambda: processor.image_settings,
        lambda: processor.video_settings,
    ):
        with suppress(ConfigError, ImageError, VideoError):
            read()


def read_index(folder: Path) -> None:
    weight_files(folder)


def manifest_seeds() -> Iterator[bytes]:
    yield b'{"format_version": 2, "dtype": "float32", "params": {"state/a/c.0": 4}, "source": {"files": {"a": ["b"]}}}'
    listed = {"config.json": {"bytes": 2, "xxh3_128": "0" * 32}}
    yield json.dumps({"format_version": 3, "files": listed, "xxh3_128": "0" * 32}).encode()


OTHER_FILES: tuple[Json, ...] = (
    {"eos_token_id": [1, 2], "pad_token_id": 0, "temperature": 0.5, "top_p": 0.9, "top_k": 20, "do_sample": True},
    {"size": {"shortest_edge": 1024, "longest_edge": 4096}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
     "resample": 3, "rescale_factor": 0.004, "do_resize": True, "min_pixels": 1024, "fps": 2.0, "min_frames": 4,
     "max_frames": 8, "patch_size": 16, "merge_size": 2, "do_sample_frames": True},
)  # fmt: skip


# ---- images and videos

POLICY = MediaPolicy(max_pixels=1 << 20, max_frames=64)
PICTURES = ("JPEG RGB", "PNG P, transparent", "PNG I;16", "WebP RGBA", "GIF P", "BMP P", "TIFF LZW", "AVIF RGB", "MPO")
FILMS = ("mp4", "mkv", "avi", "ts", "gif", "webp", "png", "avif")


def small(make: dict[str, Callable[[], bytes]], names: tuple[str, ...]) -> Iterator[bytes]:
    """Files of few pixels: their headers matter."""
    size, media.SIZE = media.SIZE, (16, 16)
    try:
        for name in names:
            yield make[name]()
    finally:
        media.SIZE = size


def run_image(data: bytes) -> None:
    found = checked_image(data, "image")
    spend_image(found, Budget(POLICY), "image", ImageOptions())
    load_image(found)


def run_video(data: bytes) -> None:
    spend_video(checked_video(data, "video"), Budget(POLICY), "video", VideoOptions())


def run_animation(data: bytes) -> None:
    file = io.BytesIO(data)
    kind = picture_format(file)
    if kind in ANIMATIONS:
        header = read_header(file, kind)
        if header.width * header.height <= POLICY.max_pixels:
            for _ in islice(frames_of(file, kind), 4):
                pass


def dumped(*values: Json) -> Callable[[], Iterator[bytes]]:
    return lambda: (json.dumps(value).encode() for value in values)


TARGETS = {
    "generate": Target(parse_request, (RequestError,), dumped(GENERATE), "json"),
    "openai": Target(
        run_openai, (RequestError, SamplingOptionError, PromptError), dumped(CHAT, RESPONSE, *OTHERS), "json"
    ),
    "message": Target(run_message, (), message_seeds, "message"),
    "safetensors": Target(
        in_file("model.safetensors", lambda folder: read_entries(folder / "model.safetensors")),
        (CheckpointError,),
        safetensors_seeds,
        "safetensors",
    ),
    "config": Target(
        in_file("config.json", read_config),
        (ConfigError,),
        dumped(*(tiny_config(family) for family in FAMILIES)),
        "json",
    ),
    "settings": Target(in_file("config.json", read_others), (), dumped(*OTHER_FILES), "json"),
    "index": Target(
        in_file("model.safetensors.index.json", read_index),
        (CheckpointError,),
        dumped({"metadata": {"total_size": 1}, "weight_map": {"a": "model.safetensors", "b": "b.safetensors"}}),
        "json",
    ),
    "manifest": Target(in_file("deepstack_jax.json", read_manifest), (CheckpointError,), manifest_seeds, "json"),
    "image": Target(run_image, (MediaError, ImageError), lambda: small(media.IMAGES, PICTURES)),
    "animation": Target(
        run_animation,
        (ImageError, VideoError, struct.error, IndexError, av.error.FFmpegError),
        lambda: small(media.VIDEOS, FILMS[4:]),
    ),
    # FFmpeg gives no file a block of 2 GiB; clients get a 413 for it (see `processing.decoders`)
    "video": Target(run_video, (MediaError, av.error.MemoryError), lambda: small(media.VIDEOS, FILMS)),
}
