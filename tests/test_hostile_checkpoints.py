"""Checkpoints that were made to harm: each is refused in one line, or loads, before anything of its size is made."""

import copy
import json
import os
import shutil
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

import deepstack_jax as dsj
from converters.hf_to_orbax import convert
from converters.orbax_to_hf import export
from deepstack_jax.checkpoints.manifest import file_sum
from deepstack_jax.checkpoints.safetensors_file import read_entries
from deepstack_jax.cli import inspect
from deepstack_jax.config import read_sampling_defaults, read_special_tokens
from deepstack_jax.models.registry import parse_config, read_config
from deepstack_jax.processing.processor import Processor
from deepstack_jax.testing.random_checkpoint import tiny_config, write_random_checkpoint
from tests.cases import FAMILIES
from tests.test_checksums import with_sum

NASTY = (
    None, True, False, 0, 1, -1, 2, 3, 10**9, 2**31, 2**63, 10**400, 0.5, -0.5, 1e-300, 1e300, float("nan"),
    float("inf"), float("-inf"), "", "64", "NaN", "x" * 1000, "\ud800\n\0", [], [0], [10**9], [[]], [0] * 10_000, {},
    {"a": 1}, {"shortest_edge": 10**12}, {"type": "yarn", "factor": 1e300},
)  # fmt: skip
ROPE = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64, "beta_fast": 32, "mscale": 1.0}


def mutations(raw: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """`raw` with each of its values, at any depth, replaced by each of the nasty ones, and with each key removed."""
    for path in paths_of(raw):
        for value in (..., *NASTY):
            changed = copy.deepcopy(raw)
            *parents, last = path
            part = changed
            for key in parents:
                part = part[key]
            if value is ...:
                del part[last]
            else:
                part[last] = value
            yield f"{path} {str(value)[:40]}", changed


def paths_of(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from paths_of(inner, (*path, key))


def refused_or_read(read: Callable[[], object], case: str) -> bool:
    """Whether it is read; asserts that a refusal is one line of the project's errors."""
    refusal: ValueError | None = None
    try:
        read()
    except ValueError as error:
        refusal = error
    if refusal is None:
        return True
    assert type(refusal).__module__.startswith("deepstack_jax"), f"{case}: {refusal!r}"
    assert str(refusal).isprintable(), f"{case}: {refusal}"
    assert len(str(refusal)) < 500, f"{case}: {refusal}"
    return False


@pytest.mark.parametrize("family", FAMILIES)
def test_every_value_of_a_config_is_typed_and_bounded(family: str):
    raw = tiny_config(family)
    raw.get("text_config", raw).update(layer_types=["full_attention"] * 4, sliding_window=8, max_window_layers=2)
    raw |= {"use_sliding_window": True, "pad_token_id": 3, "rope_scaling": ROPE} if family == "qwen3" else {}
    tracemalloc.start()
    counts = [refused_or_read(lambda raw=changed: parse_config(raw), case) for case, changed in mutations(raw)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20
    assert min(counts.count(True), counts.count(False)) > 100


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one layer and of one vision block, and its conversion."""
    folder = tmp_path_factory.mktemp("made")
    vision = {"depth": 1, "deepstack_visual_indexes": [0]}
    config = tiny_config("qwen3_vl_moe", text_config={"num_hidden_layers": 1}, vision_config=vision)
    write_random_checkpoint(folder / "hf", config, dtype="bfloat16")
    convert(folder / "hf", folder / "ckpt")
    return folder


@pytest.fixture
def source(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made / "hf", tmp_path / "hf")


@pytest.fixture
def converted(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made / "ckpt", tmp_path / "ckpt")


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("generation_config.json", {"temperature": 0.5, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.0}),
        ("preprocessor_config.json", {"resample": 3, "rescale_factor": 0.004, "do_resize": True, "min_pixels": 1024}),
        ("video_preprocessor_config.json", {"fps": 2, "min_frames": 4, "max_frames": 8, "max_video_tokens": 64}),
    ],
)
def test_every_value_of_the_other_files_is_typed_and_bounded(name: str, extra: dict[str, Any], source: Path):
    config, file = read_config(source), source / name
    size = {"shortest_edge": 1024, "longest_edge": 4096}
    channels = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": size}
    raw = {"eos_token_id": [1, 2], "pad_token_id": 0, **extra} if name.startswith("gen") else {**channels, **extra}

    def read() -> None:
        read_special_tokens(source, config)
        read_sampling_defaults(source)
        processor = Processor(source, config)
        assert processor.image_settings.max_pixels + processor.video_settings.max_pixels

    for case, changed in mutations(raw):
        file.write_text(json.dumps(changed))
        refused_or_read(read, case)
    file.write_text(json.dumps(raw))
    read()


@pytest.mark.parametrize("key", ["added_tokens", "model", "pre_tokenizer", "decoder", "version"])
def test_a_tokenizer_with_a_wrong_value_is_refused_in_one_line(key: str, source: Path):
    file, config = source / "tokenizer.json", read_config(source)
    raw = json.loads(file.read_text())
    for value in (10**400, [1], "x", {"type": "Nothing"}):
        file.write_text(json.dumps(raw | {key: value}))
        refused_or_read(lambda: Processor(source, config).check_files(), f"{key} {value}")


LARGER = {
    "layers": ({"text_config": {"num_hidden_layers": 512}}, r"num_hidden_layers 512 and the weights have only \d+ "),
    "blocks": ({"vision_config": {"depth": 512}}, r"vision_config\.depth 512 and the weights have only \d+ tensors"),
    "more": ({"text_config": {"num_hidden_layers": 10**9}}, r"num_hidden_layers 1000000000 is above 512, the most "),
    "experts": ({"text_config": {"num_experts": 10**9}}, r"num_experts 1000000000 is above 16384, the most that is"),
    "vocabulary": ({"text_config": {"vocab_size": 1 << 24}}, r"\[300, 64\]|shape"),
}


@pytest.mark.parametrize("case", LARGER)
def test_a_config_of_a_larger_model_is_refused_before_its_parameters_are_listed(
    case: str, source: Path, converted: Path
):
    changes, message = LARGER[case]
    for directory in (source, converted):
        raw = json.loads((directory / "config.json").read_text())
        for part, values in changes.items():
            raw[part] |= values
        (directory / "config.json").write_text(json.dumps(raw))
    sign(converted)
    out = source.parent / "out"
    ways: list[tuple[Callable[..., object], Path]] = [(dsj.load, source), (dsj.load, converted)]
    ways += [(inspect.run, source), (inspect.run, converted), (convert, source), (export, converted)]
    for command, one in ways:
        given = (one, out) if command in (convert, export) else (one,)
        with pytest.raises(ValueError, match=message) as caught:
            command(*given)
        assert "\n" not in str(caught.value)


def test_experts_in_tensors_of_their_own_are_counted(tmp_path: Path):
    write_random_checkpoint(tmp_path, tiny_config("qwen3_moe", num_hidden_layers=1), expert_layout="per_expert")
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"num_experts": 16384}))
    with pytest.raises(ValueError, match=r"num_experts 16384 and the weights have only 3\d tensors: correct it"):
        dsj.load(tmp_path)


def tensor(shape: list[Any], start: Any, stop: Any, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


TWICE = b'{"a":%s,"a":%s}' % ((json.dumps(tensor([2], 0, 8)).encode(),) * 2)
# a file of 16 bytes of data: the header, and what is said of it
HEADERS: dict[str, tuple[Any, str]] = {
    "a gap": ({"a": tensor([1], 0, 4), "b": tensor([2], 8, 16)}, r"tensor 'b' has the bytes 8 to 16, expected .* at 4"),
    "an overlap": ({"a": tensor([3], 0, 12), "b": tensor([2], 8, 16)}, r"'b' has the bytes 8 to 16, .* start at 12"),
    "the same bytes twice": (
        {"a": tensor([4], 0, 16), "b": tensor([4], 0, 16)},
        r"'b' has the bytes 0 to 16, .* at 16",
    ),
    "beyond the end": ({"a": tensor([5], 0, 20)}, r"is truncated, or longer than its tensors"),
    "bytes of no tensor": ({"a": tensor([3], 0, 12)}, r"is truncated, or longer than its tensors"),
    "a negative offset": ({"a": tensor([4], -16, 0)}, r"'a' has the bytes -16 to 0, expected to start at 0"),
    "reversed": ({"a": tensor([4], 0, 16), "b": tensor([4], 16, 0)}, r"has the bytes 16 to 0"),
    "a huge offset": ({"a": tensor([4], 0, 2**64)}, r"'a' of dtype F32 and shape \[4\] has 18446744073709551616 bytes"),
    "a huge shape": ({"a": tensor([2**62, 16], 0, 16)}, r"shape \[4611686018427387904, 16\] has 16 bytes"),
    "a negative shape": ({"a": tensor([-2, -2], 0, 16)}, r"damaged header \(invalid JSON .* `-2`"),
    "a shape of fractions": ({"a": tensor([4.0], 0, 16)}, r"damaged header \(invalid JSON .* `4\.0`"),
    "a shape of flags": ({"a": tensor([True, 4], 0, 16)}, r"damaged header \(invalid JSON .* `true`"),
    "a shape of texts": ({"a": tensor(["a", 10**30], 0, 16)}, r"damaged header \(invalid JSON"),
    "a shape of many axes": ({"a": tensor([2**62] * 100_000, 0, 16)}, r"'a' has 100000 axes, expected at most 64"),
    "another dtype's bytes": ({"a": tensor([4], 0, 16, "F16")}, r"'a' of dtype F16 and shape \[4\] has 16 bytes"),
    "an unknown dtype": ({"a": tensor([4], 0, 16, "F33")}, r"'a' of dtype F33 and shape"),
    "the same name twice": (TWICE, r"the key 'a' occurs twice\): download it again"),
    "a line in a name": ({"a\nb": tensor([4], 0, 16)}, r"tensor 'a\\nb' has a name of 3 characters, expected at most"),
    "a long name": ({"a" * 10_000: tensor([4], 0, 16)}, r"has a name of 10000 characters"),
    "a list": ([], r"damaged header"),
    "depth": (b"[" * 100_000, r"damaged header"),
    "not UTF-8": (b'{"\xff": 1}', r"damaged header \(invalid UTF-8"),
    "nothing": (b"", r"damaged header \(invalid JSON in header: EOF"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_does_not_tile_the_data_is_refused(case: str, tmp_path: Path):
    header, message = HEADERS[case]
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    with pytest.raises(ValueError, match=message) as caught:
        read_entries(file)
    assert str(caught.value).startswith(str(file))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("length", [69, 10**6, 101 * 10**6, 2**40, 2**63, 2**64 - 1])
def test_a_header_longer_than_its_file_is_refused(length: int, tmp_path: Path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(length.to_bytes(8, "little") + b"{}" + bytes(16))
    with pytest.raises(ValueError, match=r"is not a safetensors file or is truncated \(.*, in a file of 26 bytes\)"):
        read_entries(file)


@pytest.mark.parametrize(
    "name", ["../hf/model.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "a\n", "b" * 300]
)
def test_an_index_names_only_files_of_its_directory(name: str, source: Path):
    with safe_open(source / "model.safetensors", "numpy") as tensors:
        weight_map = dict.fromkeys(tensors.keys(), name)
    (source / "model.safetensors").rename(source / "moved.safetensors")
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=r"index\.json names '.*, which is not inside the directory") as caught:
        dsj.load(source)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


def test_a_file_may_be_a_link_as_in_the_hubs_cache(source: Path):
    (source / "model.safetensors").rename(source.parent / "blob")
    (source / "model.safetensors").symlink_to(source.parent / "blob")
    dsj.load(source)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors"])
def test_a_pipe_in_the_place_of_a_file_is_refused(name: str, source: Path):
    (source / name).unlink()
    os.mkfifo(source / name)
    with pytest.raises(ValueError, match=rf"{name} is .*pipe"):
        dsj.load(source)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json"])
def test_a_key_that_occurs_twice_is_refused(name: str, source: Path):
    (source / "model.safetensors").rename(source / "moved.safetensors")
    (source / name).write_text('{"vocab_size": 300, "vocab_size": 301}')
    with pytest.raises(ValueError, match=rf"{name} is .*the key 'vocab_size' occurs twice"):
        dsj.load(source)


def sign(directory: Path, **changes: Any) -> None:
    """Gives a converted checkpoint the checksums of what its files hold now."""
    file = directory / "deepstack_jax.json"
    contents = json.loads(file.read_text())
    del contents["xxh3_128"]
    contents = {**contents, **changes}
    for name, listed in contents["files"].items():
        listed |= {"bytes": (directory / name).stat().st_size, "xxh3_128": file_sum(directory / name)}
    file.write_text(with_sum(contents))


ARRAYS: dict[str, tuple[Any, str]] = {
    "another shape": ({"shape": [600, 64]}, r"holds \[600, 64\] for .*, expected \[300, 64\]|zarr\.json has"),
    "a huge shape": ({"shape": [2**62, 64]}, r"holds|zarr\.json has|pieces of|can't be read"),
    "larger chunks": (
        {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [2**40, 64]}}},
        r"zarr\.json has chunk_grid .*, expected .*: convert again",
    ),
    "another dtype": ({"data_type": "float32"}, r"zarr\.json has|pieces of|bytes, expected"),
    "a codec": (
        {"codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "gzip"}]},
        r"zarr\.json has codecs .*, expected|can't be read",
    ),
    "big-endian": ({"codecs": [{"name": "bytes", "configuration": {"endian": "big"}}]}, r"zarr\.json has codecs"),
    "another key encoding": ({"chunk_key_encoding": {"name": "v2"}}, r"zarr\.json has chunk_key_encoding"),
    "an unknown key": ({"storage_transformers": [1]}, r"zarr\.json has storage_transformers|can't be read"),
}


@pytest.mark.parametrize("case", ARRAYS)
def test_metadata_of_an_array_that_contradicts_its_files_is_refused(case: str, converted: Path):
    changes, message = ARRAYS[case]
    (array,) = converted.glob("params/state/*embed_tokens.weight")
    file = array / "zarr.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    sign(converted)
    with pytest.raises(ValueError, match=message) as caught:
        dsj.load(converted)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "files", [{"../x.safetensors": []}, {"/x.safetensors": []}, {"a": 1}, {"a": [1]}, [], None, 5, "x"], ids=str
)
def test_a_manifest_that_would_write_elsewhere_is_refused(files: Any, converted: Path):
    contents = json.loads((converted / "deepstack_jax.json").read_text())
    sign(converted, source={**contents["source"], "files": files})
    with pytest.raises(ValueError, match=r"deepstack_jax\.json does not say what it was converted from"):
        export(converted, converted.parent / "out")
    assert [entry.name for entry in converted.parent.iterdir()] == ["ckpt"]
