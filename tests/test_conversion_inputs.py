"""What conversion refuses, and what it leaves behind when it can't finish: one clear line, and nothing that loads."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from converters.hf_to_orbax import convert
from converters.orbax_to_hf import export
from deepstack_jax.checkpoints.hf_checkpoint import NonFiniteWarning, open_checkpoint, read_params
from deepstack_jax.checkpoints.manifest import read_manifest, write_manifest
from deepstack_jax.checkpoints.orbax_checkpoint import restore_params
from deepstack_jax.checkpoints.safetensors_file import CheckpointError
from deepstack_jax.config import ConfigError
from deepstack_jax.models.registry import read_config
from deepstack_jax.testing.random_checkpoint import tiny_config, write_random_checkpoint

GATE_UP = "model.language_model.layers.1.mlp.experts.gate_up_proj"


@pytest.fixture
def source(tmp_path) -> Path:
    """A checkpoint in one file."""
    write_random_checkpoint(tmp_path / "source", tiny_config())
    return tmp_path / "source"


@pytest.fixture
def sharded(tmp_path) -> Path:
    """A checkpoint in several files."""
    write_random_checkpoint(tmp_path / "sharded", tiny_config(), max_shard_bytes=10**6)
    return tmp_path / "sharded"


@pytest.fixture
def converted(source, tmp_path) -> Path:
    convert(source, tmp_path / "converted")
    return tmp_path / "converted"


def weights(directory: Path) -> Path:
    return directory / "model.safetensors"


def edit(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """An edit of the tensors of a single file."""

    def apply(directory: Path) -> None:
        tensors = load_file(weights(directory))
        change(tensors)
        save_file(tensors, weights(directory))

    return apply


def edit_header(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """An edit of the JSON header of a single file; the data stay."""

    def apply(directory: Path) -> None:
        content = weights(directory).read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        weights(directory).write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])

    return apply


def edit_config(**changes: object) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        file = directory / "config.json"
        raw = json.loads(file.read_text())
        for key, value in changes.items():
            raw[key] = {**raw[key], **value} if isinstance(value, dict) else value
        file.write_text(json.dumps(raw))

    return apply


def truncate(nbytes: int) -> Callable[[Path], None]:
    return lambda directory: os.truncate(weights(directory), nbytes)


NORM = "model.language_model.norm.weight"


def overlap(header: dict) -> None:
    """Gives the first two tensors of one length the same place."""
    places = sorted((one["data_offsets"] for name, one in header.items() if name != "__metadata__"), key=lambda o: o[0])
    lengths = [end - start for start, end in places]
    i = next(i for i in range(1, len(places)) if lengths[i] == lengths[i - 1])
    places[i][:] = places[i - 1]


REFUSED = {
    "no weights": (lambda d: weights(d).unlink(), r"no model\.safetensors and no .*index\.json in .*: give a"),
    "no config": (lambda d: (d / "config.json").unlink(), r"no config\.json in .*: give the directory"),
    "another family": (edit_config(model_type="llama"), r"model_type 'llama' is not supported: expected one of"),
    "empty file": (truncate(0), r"model\.safetensors is not a safetensors file or is truncated .*: download it again"),
    "half a header": (
        truncate(1000),
        r"is not a safetensors file or is truncated \(invalid header length, in a file of 1000 bytes\): download",
    ),
    "half the data": (
        truncate(1_000_000),
        r"is truncated, .* \(.*not fully covered, in a file of 1000000 bytes\): download it again",
    ),
    "not safetensors": (
        lambda d: weights(d).write_bytes(b"<!DOCTYPE html><html></html>"),
        r"is not a safetensors file or is trunc",
    ),
    "header not JSON": (lambda d: weights(d).write_bytes(bytes([4, *[0] * 7]) + b"oops"), r"has a damaged header \("),
    "header not an object": (
        lambda d: weights(d).write_bytes(bytes([2, *[0] * 7]) + b"[]"),
        r"has a damaged header \(.*invalid type: sequence.*\): download it again",
    ),
    "wrong entry": (
        edit_header(lambda h: h[NORM].update(shape="64")),
        r'damaged header \(.*invalid type: string "64".*\): download it again',
    ),
    "overlapping extents": (edit_header(overlap), r"damaged header \(.*\): download it again"),
    "wrong extent": (
        edit_header(lambda h: h[NORM].update(shape=[65])),
        rf"header \(tensor .{NORM}. of dtype F32 and shape \[65\] has 256 bytes\): download it again",
    ),
    "float8": (
        edit_header(lambda h: h[NORM].update(dtype="F8_E4M3", shape=[256])),
        rf"{NORM} has dtype F8_E4M3, .*in bfloat16",
    ),
    "integers": (edit_header(lambda h: h[NORM].update(dtype="I32")), rf"{NORM} has dtype I32, .*: expected one of F32"),
    "missing tensor": (edit(lambda t: t.pop(NORM)), rf"lacks tensor {NORM}: download the checkpoint again"),
    "tensor twice": (
        edit(lambda t: t.update({"language_model.norm.weight": t[NORM].copy()})),
        r"norm\.weight is also in",
    ),
    "wrong shape": (
        edit(lambda t: t.update({NORM: t[NORM][:60].copy()})),
        rf"{NORM} has shape \[60\], expected \[64\]",
    ),
    "wrong experts": (
        edit(lambda t: t.update({GATE_UP.replace(".1.", ".0."): np.zeros((8, 9, 10), np.float32)})),
        r"gate_up_proj has shape \[8, 9, 10\], expected \[8, 64, 96\] or \[8, 96, 64\]",
    ),
    "mixed layouts": (
        edit(lambda t: t.update({GATE_UP: t[GATE_UP].transpose(0, 2, 1).copy()})),
        rf"{GATE_UP} has shape \[8, 96, 64\], expected \[8, 64, 96\]",
    ),
    "more layers": (
        edit_config(text_config={"num_hidden_layers": 5}),
        r"lacks tensor \S+layers\.4\.\S+ \(and \d+ others\): config\.json has num_hidden_layers 5 and the weights",
    ),
    "another head": (
        edit_config(tie_word_embeddings=True),
        r"lm_head\.weight differs from \S+embed_tokens\.weight although tie_word_embeddings is true: set it to false",
    ),
    "ambiguous": (
        edit_config(text_config={"moe_intermediate_size": 32}),
        r"^expert layout can't be told from shape \(2F == D == 64\): pass --expert-layout hf4\|hf5$",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_checkpoint_is_refused_in_one_line_before_anything_is_written(case, source, tmp_path):
    damage, message = REFUSED[case]
    damage(source)
    with pytest.raises((CheckpointError, ConfigError), match=message) as caught:
        convert(source, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
    with pytest.raises((CheckpointError, ConfigError), match=message):
        list(read_params(source))


def test_bad_indexes_are_refused(sharded, tmp_path):
    index = sharded / "model.safetensors.index.json"
    good = index.read_text()
    last = json.loads(good)["weight_map"]["lm_head.weight"]

    def refused(message: str) -> None:
        with pytest.raises(CheckpointError, match=message):
            convert(sharded, tmp_path / "out")

    index.write_text(good.replace(last, "model-00009-of-00009.safetensors"))
    refused(r"index\.json names model-00009-of-00009\.safetensors, which does not exist: download the missing file")
    index.write_text(good.replace(last, "../other.safetensors"))
    refused(r"names '\.\./other\.safetensors', which is not inside the directory")
    index.write_text('{"weight_map": ')
    refused(r"index\.json is damaged \(JSONDecodeError")
    index.write_text('{"metadata": {}}')
    refused(r"index\.json is damaged \(KeyError")
    moved = json.loads(good)
    moved["weight_map"]["lm_head.weight"] = "model-00001-of-00004.safetensors"
    index.write_text(json.dumps(moved))
    refused(r"model-00001-of-00004\.safetensors lacks tensor lm_head\.weight, which .* places there")
    index.write_text(good)
    (sharded / last).unlink()
    refused(rf"names {last}, which does not exist: download the missing file")
    assert not (tmp_path / "out").exists()


def test_a_wrong_layout_or_dtype_is_refused(source, tmp_path):
    with pytest.raises(CheckpointError, match=r"has layout hf4, not hf5: leave out --expert-layout"):
        convert(source, tmp_path / "out", expert_layout="hf5")
    with pytest.raises(CheckpointError, match=r"expert layout 'hf6' is unknown: expected one of hf4, hf5"):
        convert(source, tmp_path / "out", expert_layout="hf6")
    with pytest.raises(CheckpointError, match=r"dtype 'float16' is not supported: expected float32 or bfloat16"):
        convert(source, tmp_path / "out", dtype="float16")
    with pytest.raises(ValueError, match=r"expert layout 'hf6' is unknown"):
        write_random_checkpoint(tmp_path / "new", tiny_config(), expert_layout="hf6")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("layout", ["hf4", "hf5"])
def test_weights_that_are_not_finite_are_warned_of(dtype, value, layout, tmp_path):
    write_random_checkpoint(tmp_path / "a", tiny_config(), dtype=dtype, expert_layout=layout)
    tensors = load_file(weights(tmp_path / "a"))
    largest = ml_dtypes.finfo(tensors[NORM].dtype).max
    tensors[NORM][:2] = [-largest, largest]  # finite: no reason to warn
    tensors[GATE_UP][-1, -1, -1] = value
    save_file(tensors, weights(tmp_path / "a"))
    path = "language_model.model.layers.1.mlp.experts.gate_up_proj"
    with pytest.warns(NonFiniteWarning, match=rf"the weights of {path} hold NaN or infinity") as caught:
        convert(tmp_path / "a", tmp_path / "b")
    assert len(caught) == 1
    with pytest.warns(NonFiniteWarning) as caught:
        list(read_params(tmp_path / "a"))
    assert len(caught) == 1


def test_existing_output_is_refused_and_an_empty_directory_taken(source, converted, tmp_path):
    before = sorted(converted.rglob("*"))
    for make in (lambda out: convert(source, out), lambda out: export(converted, out)):
        with pytest.raises(FileExistsError, match=r"already exists and is not empty: give another directory"):
            make(converted)
        with pytest.raises(FileExistsError, match=r"already exists and is not empty"):
            make(source / "config.json")
    assert sorted(converted.rglob("*")) == before
    with pytest.raises(FileExistsError, match=r"already holds a checkpoint: give another directory"):
        write_random_checkpoint(source, tiny_config())
    (tmp_path / "empty").mkdir()
    convert(source, tmp_path / "empty")
    assert len(restore_params(tmp_path / "empty", read_config(source))) == 134


def test_a_second_conversion_to_the_same_place_waits_its_turn(source, tmp_path):
    busy = tmp_path / ".out.incomplete"
    busy.mkdir()
    (busy / "precious").touch()
    descriptor = os.open(busy, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(OSError, match=r"another process is writing .*out: wait for it, or give another directory"):
        convert(source, tmp_path / "out")
    assert (busy / "precious").exists()
    os.close(descriptor)
    convert(source, tmp_path / "out")
    assert not busy.exists()


CHILD = """
import resource, sys
from converters.hf_to_orbax import convert
from converters.orbax_to_hf import export
make = {"convert": convert, "export": export}[sys.argv[1]]
if (limit := int(sys.argv[4])):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
def progress(done, total):
    print("progress", flush=True)
    if not limit:
        sys.stdin.readline()  # wait here to be killed
try:
    make(sys.argv[2], sys.argv[3], progress=progress)
except (OSError, ValueError) as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


def start(*arguments: object, limit: int = 0) -> subprocess.Popen:
    command = [sys.executable, "-c", CHILD, *map(str, arguments), str(limit)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"}, **pipes)


@pytest.mark.parametrize("kind", ["convert", "export"])
def test_a_killed_process_leaves_nothing_that_loads_and_the_next_one_succeeds(kind, source, converted, tmp_path):
    origin, make = (source, convert) if kind == "convert" else (converted, export)
    child = start(kind, origin, tmp_path / "out")
    assert child.stdout is not None
    assert child.stdout.readline() == "progress\n"  # weights are on disk
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert (tmp_path / ".out.incomplete").exists()
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError):
        read_config(tmp_path / ".out.incomplete")
    make(origin, tmp_path / "out")
    assert not (tmp_path / ".out.incomplete").exists()
    assert (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("kind", ["convert", "export"])
def test_a_write_that_fails_is_one_line_and_leaves_nothing(kind, source, converted, tmp_path):
    """A limit on the size of files makes the system refuse a write half-way, as a full disk does."""
    child = start(kind, source if kind == "convert" else converted, tmp_path / "out", limit=200_000)
    _, errors = child.communicate()
    assert child.returncode == 1
    line = [line for line in errors.splitlines() if line][-1]
    assert line.startswith("OSError: disk full: "), errors
    assert line.endswith("are free: make room, or give another disk")
    assert len(errors.strip().splitlines()) == 1, errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["converted", "source"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MiB, where this process may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", disk]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system needs root")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_is_told_before_and_while_writing(source, small_disk):
    (small_disk / "other").write_bytes(bytes(2 << 20))
    with pytest.raises(OSError, match=r"^disk full: .*out needs 0\.00301 GB, 0\.0021 GB are free: make room"):
        convert(source, small_disk / "out")
    (small_disk / "other").unlink()
    (source / "tokenizer.model").write_bytes(bytes(2 << 20))  # room for the weights, but not for this
    with pytest.raises(OSError, match=r"^disk full: .*out needs 0\.00301 GB, \S+ GB are free: make room"):
        convert(source, small_disk / "out")
    assert list(small_disk.iterdir()) == []


def data_file(converted: Path) -> Path:
    """The file of the largest array."""
    return max((converted / "params" / "state").rglob("c.*"), key=lambda file: file.stat().st_size)


def metadata_file(converted: Path) -> Path:
    return converted / "params" / "state" / "_METADATA"


DAMAGED = {
    "truncated": (lambda d: os.truncate(data_file(d), 1000), r"has 1000 bytes, expected \d+"),
    "data missing": (lambda d: data_file(d).unlink(), "is missing"),
    "array missing": (lambda d: shutil.rmtree(next((d / "params").rglob("*gate_up_proj"))), "is missing"),
    "metadata damaged": (lambda d: metadata_file(d).write_text("{"), r"has 1 bytes, expected \d+"),
    "no parameters": (lambda d: shutil.rmtree(d / "params"), "is missing"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_directory_is_told_in_one_line(case, converted, tmp_path):
    damage, reason = DAMAGED[case]
    damage(converted)
    message = rf"params/\S+ {reason}.*: the checkpoint is incomplete or damaged, convert again$"
    with pytest.raises(CheckpointError, match=message):
        restore_params(converted, read_config(converted))
    with pytest.raises(CheckpointError, match=message):
        export(converted, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out.incomplete").exists()


def test_what_orbax_can_not_read_is_told_in_one_line(converted):
    """Files that differ from Orbax's, with the lengths and checksums that they were given."""
    metadata = metadata_file(converted)
    metadata.write_text("x" * metadata.stat().st_size)
    (converted / "deepstack_jax.json").unlink()
    write_manifest(converted, {}, {})
    with pytest.raises(
        CheckpointError, match=r"params can\'t be read \(\w+: .*\): try again, or convert again$"
    ) as caught:
        restore_params(converted, read_config(converted))
    assert "\n" not in str(caught.value)


def test_other_formats_and_other_models_are_refused(source, converted):
    with pytest.raises(
        CheckpointError, match=r"has no deepstack_jax\.json: give a directory made by deepstack-jax convert"
    ):
        export(source, source.parent / "out")
    edit_config(text_config={"vocab_size": 301})(converted)
    with pytest.raises(CheckpointError, match=r"holds \[300, 64\] for .*embed_tokens\.weight, expected \[301, 64\]"):
        restore_params(converted, read_config(converted))
    file = converted / "deepstack_jax.json"
    file.write_text('{"format_version": 4}')
    with pytest.raises(
        CheckpointError, match=r"has format_version 4, expected 3: convert again, or update deepstack-jax"
    ):
        read_manifest(converted)
    file.write_text("{}")
    with pytest.raises(CheckpointError, match=r"deepstack_jax\.json is damaged: convert the checkpoint again"):
        read_manifest(converted)


def test_a_file_that_shrinks_while_it_is_read_is_told(source):
    checkpoint = open_checkpoint(source)
    os.truncate(weights(source), 100_000)
    with pytest.raises(CheckpointError, match=r"model\.safetensors changed while it was read: convert or load again"):
        list(map(checkpoint.read, checkpoint.parameters))
