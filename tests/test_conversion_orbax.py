"""What conversion asks of Orbax: a sample is read back through it, and another layout on disk is no reason to fail."""

from pathlib import Path

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp
from safetensors.numpy import load_file

from converters import hf_to_orbax
from converters.hf_to_orbax import convert
from converters.orbax_to_hf import export
from deepstack_jax.checkpoints import orbax_writer
from deepstack_jax.checkpoints.hf_checkpoint import read_params
from deepstack_jax.checkpoints.orbax_checkpoint import Leaf, load_arrays
from deepstack_jax.checkpoints.orbax_writer import create_arrays, layout_difference, place_arrays, read_back, save_tree
from deepstack_jax.checkpoints.safetensors_file import CheckpointWarning
from deepstack_jax.testing.random_checkpoint import tiny_config, write_random_checkpoint

EXPERTS = "language_model.model.layers.0.mlp.experts.down_proj"
SMALLEST = "language_model.model.layers.0.self_attn.k_norm.weight"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_random_checkpoint(tmp_path / "source", tiny_config("qwen3_moe"), dtype="bfloat16", expert_layout="hf5")
    return tmp_path / "source"


def tensors(directory: Path) -> dict[str, bytes]:
    """Name -> bytes, read by the safetensors library."""
    return {name: values.tobytes() for name, values in load_file(directory / "model.safetensors").items()}


def orbax_tree(directory: Path) -> dict[str, bytes]:
    """Dotted path -> bytes, read by Orbax without this project's code."""
    tree = ocp.load(directory / "params")
    return {".".join(key.key for key in keys): leaf.tobytes() for keys, leaf in jax.tree.leaves_with_path(tree)}


@pytest.mark.parametrize("path", [EXPERTS, SMALLEST])
@pytest.mark.parametrize("place", [0, -1])
def test_damage_on_the_way_to_disk_fails_the_conversion(path, place, source, tmp_path, monkeypatch):
    """One bit of one file changes after it was written, as a bad disk would do it."""

    def place_damaged(directory: Path, leaves: dict[str, Leaf]) -> None:
        place_arrays(directory, leaves)
        (file,) = (directory / "params" / "state" / path).glob("c.*")
        data = bytearray(file.read_bytes())
        data[place] ^= 1
        file.write_bytes(data)

    monkeypatch.setattr(hf_to_orbax, "place_arrays", place_damaged)
    message = rf"out could not be written \(Orbax \S+ reads other values of {path} than were written: check the disk"
    with pytest.raises(OSError, match=message) as caught:
        convert(source, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["source"]


def test_an_array_that_orbax_finds_in_another_shape_fails_the_conversion(source, tmp_path, monkeypatch):
    def place_another(directory: Path, leaves: dict[str, Leaf]) -> None:
        place_arrays(directory, leaves)
        file = directory / "params" / "state" / EXPERTS / "zarr.json"
        file.write_text(file.read_text().replace("[8, 48, 64]", "[8, 24, 64]"))

    monkeypatch.setattr(hf_to_orbax, "place_arrays", place_another)
    with pytest.raises(OSError, match=rf"finds Leaf\(shape=\(8, 24, 64\), .* at {EXPERTS}, expected Leaf"):
        convert(source, tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["source"]


def test_each_piece_of_an_array_is_read_back_by_itself(tmp_path):
    """Experts of 1 MiB are one piece each."""
    leaves = {"a.experts.up": Leaf((3, 512, 512), np.dtype(np.float32)), "a.norm.w": Leaf((5,), np.dtype(np.float32))}
    pieces = create_arrays(tmp_path, leaves)
    values = np.random.default_rng(0).standard_normal((3, 512, 512), np.float32)
    assert [(piece.path, piece.first, piece.count) for piece in pieces] == [
        *(("a.experts.up", i, 1) for i in range(3)),
        ("a.norm.w", 0, 5),
    ]
    for piece, written in zip(pieces, [*values, np.arange(5, dtype=np.float32)], strict=True):
        piece.staged(tmp_path).write_bytes(written.tobytes())
    save_tree(tmp_path, leaves)
    place_arrays(tmp_path, leaves)
    for piece in pieces[:3]:
        np.testing.assert_array_equal(read_back(tmp_path, piece, leaves[piece.path])[0], values[piece.first])
    np.testing.assert_array_equal(read_back(tmp_path, pieces[3], leaves["a.norm.w"]), np.arange(5))
    assert [entry.name for entry in tmp_path.iterdir()] == ["params"]
    whole = {path: np.empty(leaf.shape, leaf.dtype) for path, leaf in leaves.items()}
    np.testing.assert_array_equal(load_arrays(tmp_path, whole)["a.experts.up"], values)


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_another_layout_of_orbax_is_written_by_orbax_itself(dtype, source, tmp_path, monkeypatch):
    """OCDBT keeps all arrays in one database, so that no array has a directory to be replaced."""
    convert(source, tmp_path / "expected", dtype)
    monkeypatch.setitem(orbax_writer.ARRAY_OPTIONS, "use_ocdbt", True)
    steps: list[tuple[int, int]] = []
    with pytest.warns(CheckpointWarning, match=r"another layout than 0\.12\.8 \(params/state lacks .*\): whole arrays"):
        convert(source, tmp_path / "out", dtype, progress=lambda *step: steps.append(step))
    assert (tmp_path / "out" / "params" / "state" / "manifest.ocdbt").exists()
    assert orbax_tree(tmp_path / "out") == orbax_tree(tmp_path / "expected")
    assert orbax_tree(tmp_path / "out") == {path: v.tobytes() for path, v in read_params(source, dtype=dtype)}
    assert steps[-1][0] == steps[-1][1]
    assert {entry.name for entry in tmp_path.iterdir()} == {"expected", "out", "source"}
    for name in ("expected", "out"):
        export(tmp_path / name, tmp_path / f"{name}-back")
    assert tensors(tmp_path / "out-back") == tensors(tmp_path / "expected-back")
    if dtype is None:
        assert tensors(tmp_path / "out-back") == tensors(source)


def test_what_orbax_adds_to_its_layout_is_named(tmp_path):
    leaves = {"a.b": Leaf((3,), np.dtype(np.float32)), "a.c": Leaf((2,), np.dtype(np.float32))}
    save_tree(tmp_path, leaves)
    assert layout_difference(tmp_path, leaves) == ""
    checksums = tmp_path / "params" / "state" / "a.b" / "checksums.json"
    checksums.touch()
    assert layout_difference(tmp_path, leaves) == "params/state/a.b holds checksums.json"
    checksums.rename(tmp_path / "params" / "checksums.json")
    assert layout_difference(tmp_path, leaves) == "params holds checksums.json"


def test_no_file_names_the_directory_that_conversion_wrote_to(source, tmp_path):
    convert(source, tmp_path / "out")
    files = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert any(file.name == "commit_success.txt" for file in files)
    assert not [file for file in files if b".incomplete" in file.read_bytes() or bytes(tmp_path) in file.read_bytes()]
