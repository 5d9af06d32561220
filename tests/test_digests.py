"""One model has one digest, in whichever form its checkpoint is."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from converters.hf_to_orbax import convert
from converters.orbax_to_hf import export
from deepstack_jax.checkpoints.digests import model_digest, tensor_digests
from deepstack_jax.cli import inspect
from deepstack_jax.testing.random_checkpoint import tiny_config, write_random_checkpoint
from tests.cases import FAMILIES


def tiny(family: str, tied: bool = False) -> dict:
    layers = {"num_hidden_layers": 1}
    vision = {"depth": 1, "deepstack_visual_indexes": [0]}
    if "_vl" in family:
        return tiny_config(family, text_config=layers, vision_config=vision, tie_word_embeddings=tied)
    return tiny_config(family, **layers, tie_word_embeddings=tied)


def lines_of(directory: Path) -> list[str]:
    return [str(tensor) for tensor in tensor_digests(directory)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", ["hf4", "hf5", "per_expert"])
def test_source_conversion_and_export_have_the_same_digests(family: str, layout: str, tmp_path: Path):
    raw = tiny(family, tied=layout == "hf5")
    write_random_checkpoint(tmp_path / "hf4", raw, dtype="bfloat16")
    write_random_checkpoint(
        tmp_path / "hf", raw, dtype="bfloat16", expert_layout=layout, max_shard_bytes=200_000, tokenizer=False
    )
    convert(tmp_path / "hf", tmp_path / "ckpt")
    export(tmp_path / "ckpt", tmp_path / "back")
    expected = lines_of(tmp_path / "hf4")
    assert [lines_of(tmp_path / name) for name in ("hf", "ckpt", "back")] == [expected] * 3


def test_a_digest_is_the_sha256_of_the_bytes_in_the_file(tmp_path: Path):
    """Layout hf4 is the canonical form: its tensors are digested as they are."""
    write_random_checkpoint(tmp_path, tiny("qwen3_vl_moe"))
    stored = load_file(tmp_path / "model.safetensors")
    found = {tensor.name: tensor for tensor in tensor_digests(tmp_path)}
    assert found.keys() == stored.keys()
    for name, values in stored.items():
        expected = name, values.dtype.name, values.shape, hashlib.sha256(values.tobytes()).hexdigest()
        assert found[name] == expected


def test_the_digest_of_the_model_depends_on_every_value(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_random_checkpoint(tmp_path, tiny("qwen3_moe"))
    inspect.run(tmp_path, digests=True)
    *lines, last = capsys.readouterr().out.splitlines()
    assert lines == lines_of(tmp_path)
    assert last == f"{hashlib.sha256(''.join(f'{line}\n' for line in by_name(lines)).encode()).hexdigest()}  the model"
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    for name in ("lm_head.weight", "model.layers.0.mlp.experts.down_proj"):
        changed = tensors | {name: tensors[name].copy()}
        changed[name].reshape(-1)[-1] = np.nextafter(changed[name].reshape(-1)[-1], np.float32(9))
        save_file(changed, file)
        assert f"{model_digest(tensor_digests(tmp_path))}  the model" != last


def by_name(lines: list[str]) -> list[str]:
    return sorted(lines, key=lambda line: line.rsplit("  ", 1)[1])
