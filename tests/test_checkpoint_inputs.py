"""Checkpoints as other programs write them: what transformers loads of them is what loads here, or why it does not."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch_file
from safetensors.torch import save_file as save_torch_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

import deepstack_jax as dsj
from converters import hf_to_orbax
from converters.hf_to_orbax import convert
from converters.orbax_to_hf import export
from deepstack_jax.checkpoints.hf_checkpoint import NonFiniteWarning, open_checkpoint
from deepstack_jax.checkpoints.mapping import canonical_shapes
from deepstack_jax.checkpoints.orbax_checkpoint import Leaf, restore_params
from deepstack_jax.checkpoints.safetensors_file import CheckpointWarning
from deepstack_jax.cli import main
from deepstack_jax.models.registry import read_config
from deepstack_jax.testing.random_checkpoint import tiny_config, write_random_checkpoint
from tests.cases import FAMILIES

Tensors = dict[str, np.ndarray]
SMALL = {"num_hidden_layers": 2, "num_experts": 4}
BF16 = ml_dtypes.bfloat16


def small(family: str, **root: Any) -> dict[str, Any]:
    """A config of two layers."""
    text = SMALL if "moe" in family else {"num_hidden_layers": 2}
    if "_vl" not in family:
        return tiny_config(family, **text, **root)
    vision = {"depth": 2, "deepstack_visual_indexes": [0, 1]}
    return tiny_config(family, text_config=text, vision_config=vision, **root)


def write(directory: Path, family: str, dtype: str = "bfloat16", **root: Any) -> Path:
    """A checkpoint in one file, as transformers reads it: text experts one by one."""
    layout = "per_expert" if family == "qwen3_moe" else "hf4"
    write_random_checkpoint(directory, small(family, **root), dtype=dtype, expert_layout=layout)
    return directory


def edit_tensors(directory: Path, change: Callable[[Tensors], object]) -> None:
    file = directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def edit_json(directory: Path, name: str = "config.json", drop: tuple[str, ...] = (), **changes: Any) -> None:
    file = directory / name
    raw = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({key: value for key, value in (raw | changes).items() if key not in drop}))


def torch_model(directory: Path) -> Any:
    """What from_pretrained loads by itself."""
    loader = AutoModelForImageTextToText if read_config(directory).is_vision_language else AutoModelForCausalLM
    return loader.from_pretrained(directory).eval()


def bits_of(model: torch.nn.Module, directory: Path) -> dict[str, bytes]:
    """The parameters that a PyTorch model should become, as bytes by our paths."""
    config = read_config(directory)
    shapes, found = canonical_shapes(config), {}
    root = "model.language_model." if config.is_vision_language else "model."
    for name, tensor in model.state_dict().items():
        path = name.replace("model.visual.", "visual.").replace(root, "language_model.model.")
        path = "language_model.lm_head.weight" if name == "lm_head.weight" else path
        if path in shapes:  # not the head of tied embeddings
            tensor = tensor.transpose(1, 2) if ".experts." in path else tensor
            found[path] = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    return found


def our_bits(params: dict[str, Any]) -> dict[str, bytes]:
    return {path: np.asarray(values).tobytes() for path, values in params.items()}


def logits_of(model: dsj.Model, ids: np.ndarray) -> np.ndarray:
    return np.asarray(dsj.forward(model, input_ids=ids))


@torch.no_grad()
def torch_logits(model: Any, ids: np.ndarray) -> np.ndarray:
    return model(input_ids=torch.tensor(ids)).logits.float().numpy()


def assert_close(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Within 2e-5 of the largest |logit|, float32's bound in docs."""
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * np.abs(theirs).max())


IDS = np.arange(3, 3 + 11)[None]


def to(dtype: Any, *parts: str) -> Callable[[Tensors], object]:
    """Gives tensors whose names hold one of `parts` another dtype."""

    def change(tensors: Tensors) -> None:
        for name in tensors:
            if any(part in name for part in parts):
                tensors[name] = tensors[name].astype(dtype)

    return change


# family, the edit of a bfloat16 checkpoint, config.json's keys for the dtype
MIXED = {
    "a float32 head": ("qwen3", to(np.float32, "lm_head"), {"dtype": "bfloat16"}),
    "merged in float32": ("qwen3", to(np.float32, "q_proj", "v_proj"), {"torch_dtype": "bfloat16"}),
    "config says float32": ("qwen3", to(np.float32, "lm_head"), {"dtype": "float32"}),
    "config says float16": ("qwen3_moe", to(np.float16, "mlp.gate."), {"dtype": "float16"}),
    "the newer key goes first": ("qwen3", to(np.float32, "norm"), {"dtype": "float32", "torch_dtype": "bfloat16"}),
    "null": ("qwen3", to(np.float32, "norm"), {"dtype": None, "torch_dtype": "bfloat16"}),
    "half by its short name": ("qwen3", to(np.float16, "norm"), {"dtype": "half"}),
    "no key, float32 head": ("qwen3", to(np.float32, "lm_head"), {}),
    "no key, float32 router": ("qwen3_moe", to(np.float32, "mlp.gate."), {}),
    "one expert": ("qwen3_moe", to(np.float32, "layers.1.mlp.experts.2."), {"dtype": "bfloat16"}),
    "half an expert": ("qwen3_moe", to(np.float32, "layers.0.mlp.experts.1.up_proj"), {}),
    "fused experts": ("qwen3_vl_moe", to(np.float32, "layers.0.mlp.experts.down_proj"), {"dtype": "bfloat16"}),
    "vision in float32": ("qwen3_vl", to(np.float32, "visual"), {"dtype": "bfloat16"}),
    "three dtypes": ("qwen3", lambda t: (to(np.float32, "norm")(t), to(np.float16, "q_proj")(t)), {}),
}


@pytest.mark.parametrize("case", MIXED)
def test_mixed_dtypes_become_the_one_that_transformers_takes(case: str, tmp_path: Path):
    family, change, keys = MIXED[case]
    source = write(tmp_path / "hf", family)
    edit_tensors(source, change)
    edit_json(source, drop=() if "dtype" in keys else ("dtype",), **keys)
    reference = torch_model(source)
    name = str(reference.dtype).removeprefix("torch.")
    with pytest.warns(
        CheckpointWarning, match=rf"different dtypes \(.*\): all are read as {name}, the dtype"
    ) as caught:
        model = dsj.load(source)
    assert len(caught) == 1
    assert {values.dtype.name for values in model.params.values()} == {name}
    assert our_bits(model.params) == bits_of(reference, source)
    with pytest.warns(CheckpointWarning, match="different dtypes") as caught:
        convert(source, tmp_path / "ckpt")
    assert len(caught) == 1
    assert our_bits(restore_params(tmp_path / "ckpt", read_config(source))) == bits_of(reference, source)
    export(tmp_path / "ckpt", tmp_path / "back")
    assert bits_of(torch_model(tmp_path / "back"), source) == bits_of(reference, source)


def test_what_mixed_dtypes_become_answers_as_pytorch(tmp_path: Path):
    source = write(tmp_path / "hf", "qwen3_moe")
    edit_tensors(source, to(np.float32, "lm_head"))
    edit_json(source, dtype="float32")
    with pytest.warns(CheckpointWarning, match="all are read as float32"):
        model = dsj.load(source)
    assert_close(logits_of(model, IDS), torch_logits(torch_model(source), IDS))
    edit_json(source, dtype="bfloat16")
    with pytest.warns(CheckpointWarning, match="all are read as bfloat16"):
        model = dsj.load(source)
    assert dsj.generate(model, **dsj.prepare(model, "Hello"), max_new_tokens=2).tokens.shape == (1, 2)


def test_a_dtype_that_was_asked_for_needs_no_warning(tmp_path: Path):
    source = write(tmp_path / "hf", "qwen3")
    edit_tensors(source, to(np.float32, "lm_head"))
    assert {values.dtype.name for values in dsj.load(source, "float32").params.values()} == {"float32"}
    convert(source, tmp_path / "ckpt", dtype="bfloat16")


def test_an_index_may_name_the_dtype(tmp_path: Path):
    source = tmp_path / "hf"
    write_random_checkpoint(source, small("qwen3"), dtype="bfloat16", max_shard_bytes=100_000)
    file = source / json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]["lm_head.weight"]
    save_file(load_file(file) | {"lm_head.weight": load_file(file)["lm_head.weight"].astype(np.float32)}, file)
    edit_json(source, drop=("dtype",))
    edit_json(source, "model.safetensors.index.json", metadata={"dtype": "float16"})
    reference = torch_model(source)
    assert reference.dtype == torch.float16
    with pytest.warns(CheckpointWarning, match="all are read as float16, the dtype of its index"):
        assert our_bits(dsj.load(source).params) == bits_of(reference, source)


def test_a_dtype_that_is_not_read_is_refused_where_tensors_differ(tmp_path: Path):
    source = write(tmp_path / "hf", "qwen3")
    edit_json(source, dtype="float64")
    dsj.load(source)  # one dtype: it is kept
    edit_tensors(source, to(np.float32, "lm_head"))
    with pytest.raises(ValueError, match=r"config\.json has 'float64': set dtype in config\.json to one of "):
        dsj.load(source)


def test_values_that_overflow_in_the_narrower_dtype_are_told(tmp_path: Path):
    source = write(tmp_path / "hf", "qwen3", "float32")
    edit_json(source, dtype="float16")
    edit_tensors(source, lambda t: (to(np.float16, "lm_head")(t), t["model.norm.weight"].fill(1e6)))
    with pytest.warns(CheckpointWarning, match="all are read as float16"), pytest.warns(NonFiniteWarning, match="norm"):
        dsj.load(source)


def test_converted_checkpoints_of_several_dtypes_load_in_one(tmp_path: Path):
    """Conversions before this one kept every tensor's dtype."""
    source = write(tmp_path / "hf", "qwen3_moe")
    checkpoint = open_checkpoint(source)
    leaves = {
        parameter.path: Leaf(parameter.shape, np.dtype(np.float32 if "norm" in parameter.path else BF16))
        for parameter in checkpoint.parameters
    }
    with hf_to_orbax.new_directory(tmp_path / "ckpt", 0) as directory:
        hf_to_orbax._write_params(hf_to_orbax._Conversion(directory, checkpoint, leaves, lambda done: None))
        hf_to_orbax.copy_companions(source, directory)
        description = {"format_version": 2, **hf_to_orbax._description(checkpoint, None)}
        (directory / "deepstack_jax.json").write_text(json.dumps(description))
    for said, expected in (("float32", "float32"), (None, "bfloat16")):
        edit_json(tmp_path / "ckpt", dtype=said)
        with pytest.warns(CheckpointWarning, match=rf"\(bfloat16, float32\): all are read as {expected}"):
            model = dsj.load(tmp_path / "ckpt")
        assert {values.dtype.name for values in model.params.values()} == {expected}
    with pytest.warns(CheckpointWarning, match="all are read as bfloat16"):
        parts = dsj.load(tmp_path / "ckpt", parts=["language_model.lm_head"])
    assert {values.dtype.name for values in parts.params.values()} == {"bfloat16"}
    export(tmp_path / "ckpt", tmp_path / "back")
    assert {values.dtype.name for values in load_file(tmp_path / "back" / "model.safetensors").values()} == {
        "bfloat16",
        "float32",
    }


def only_head(tensors: Tensors) -> None:
    tensors["lm_head.weight"] = tensors.pop(embedding_of(tensors))


def both(tensors: Tensors) -> None:
    tensors["lm_head.weight"] = tensors[embedding_of(tensors)].copy()


def embedding_of(tensors: Tensors) -> str:
    return next(name for name in tensors if name.endswith("embed_tokens.weight"))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stored", [only_head, both, lambda tensors: None], ids=["head", "both", "embedding"])
def test_tied_weights_are_found_under_either_name(family: str, stored: Callable, tmp_path: Path):
    source = write(tmp_path / "hf", family, tie_word_embeddings=True)
    expected = bits_of(torch_model(source), source)
    edit_tensors(source, stored)
    assert bits_of(torch_model(source), source) == expected  # transformers reads all three alike
    assert our_bits(dsj.load(source).params) == expected
    convert(source, tmp_path / "ckpt")
    assert our_bits(restore_params(tmp_path / "ckpt", read_config(source))) == expected
    export(tmp_path / "ckpt", tmp_path / "back")
    assert load_file(tmp_path / "back" / "model.safetensors").keys() == load_file(source / "model.safetensors").keys()
    assert bits_of(torch_model(tmp_path / "back"), source) == expected


def test_a_tied_head_in_another_dtype_is_compared_in_the_one_that_is_read(tmp_path: Path):
    source = write(tmp_path / "hf", "qwen3", tie_word_embeddings=True)
    edit_tensors(source, lambda t: (both(t), to(np.float32, "lm_head")(t)))
    with pytest.warns(CheckpointWarning, match="all are read as bfloat16"):
        assert our_bits(dsj.load(source).params) == bits_of(torch_model(source), source)


@pytest.mark.parametrize("index", ['{"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}', "{"])
def test_an_index_beside_a_whole_file_is_left_over(index: str, tmp_path: Path):
    source = write(tmp_path / "hf", "qwen3")
    (source / "model.safetensors.index.json").write_text(index)
    assert our_bits(dsj.load(source).params) == bits_of(torch_model(source), source)
    convert(source, tmp_path / "ckpt")
    export(tmp_path / "ckpt", tmp_path / "back")
    assert not (tmp_path / "back" / "model.safetensors.index.json").exists()


OTHERS = {
    "rotary": {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)},
    "positions in integers": {"model.position_ids": np.arange(9), "model.mask": np.ones(2, bool)},
    "multi-token prediction": {"mtp.fc.weight": np.ones((4, 8), np.float32), "mtp.layers.0.mlp.experts.gate_up_proj":
                               np.ones((2, 3, 4), np.float32)},
    "value heads": {"v_head.summary.weight": np.ones((1, 64), np.float32), "score.weight": np.ones((2, 64), BF16)},
    "a layer too many": {"model.layers.7.mlp.gate.weight": np.ones((4, 64), BF16)},
    "many": {f"extra.{i}": np.ones(1, BF16) for i in range(12)},
}  # fmt: skip


@pytest.mark.parametrize("case", OTHERS)
def test_tensors_that_are_not_the_models_are_left_out_with_one_line(case: str, tmp_path: Path):
    source = write(tmp_path / "hf", "qwen3_moe")
    expected = bits_of(torch_model(source), source)
    edit_tensors(source, lambda tensors: tensors.update(OTHERS[case]))
    assert bits_of(torch_model(source), source) == expected
    names = sorted(OTHERS[case])
    count = "1 tensor is" if len(names) == 1 else f"{len(names)} tensors are"
    message = rf"{count} not part of qwen3_moe and left out: {', '.join(names[:8])}" + (
        " and 4 more$" if len(names) > 8 else "$"
    )
    with pytest.warns(CheckpointWarning, match=message) as caught:
        assert our_bits(dsj.load(source).params) == expected
    assert len(caught) == 1
    with pytest.warns(CheckpointWarning, match=message) as caught:
        convert(source, tmp_path / "ckpt")
    assert len(caught) == 1
    export(tmp_path / "ckpt", tmp_path / "back")
    assert not OTHERS[case].keys() & load_file(tmp_path / "back" / "model.safetensors").keys()
    assert bits_of(torch_model(tmp_path / "back"), source) == expected


def test_a_shard_of_nothing_but_other_tensors_is_not_given_back(tmp_path: Path):
    source = tmp_path / "hf"
    write_random_checkpoint(source, small("qwen3"), max_shard_bytes=100_000)
    save_file({"mtp.norm.weight": np.ones(64, np.float32)}, source / "model-mtp.safetensors")
    index = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    edit_json(source, "model.safetensors.index.json", weight_map=index | {"mtp.norm.weight": "model-mtp.safetensors"})
    with pytest.warns(CheckpointWarning, match="1 tensor is not part of qwen3 and left out"):
        convert(source, tmp_path / "ckpt")
    export(tmp_path / "ckpt", tmp_path / "back")
    assert not (tmp_path / "back" / "model-mtp.safetensors").exists()
    assert bits_of(torch_model(tmp_path / "back"), source) == bits_of(torch_model(source), source)


@pytest.mark.slow
def test_yarn_as_the_model_card_writes_it_allows_factor_times_the_original_positions(tmp_path: Path):
    source = write(tmp_path / "hf", "qwen3", "float32", max_position_embeddings=40)
    edit_json(source, rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32})
    ids = np.arange(100)[None]
    convert(source, tmp_path / "ckpt")
    for model in (dsj.load(source), dsj.load(tmp_path / "ckpt")):
        assert_close(logits_of(model, ids), torch_logits(torch_model(source), ids))
        assert dsj.generate(model, input_ids=ids, max_new_tokens=28).tokens.shape == (1, 28)
        with pytest.raises(ValueError, match=r"exceed the model's 128 positions"):
            dsj.generate(model, input_ids=ids, max_new_tokens=29)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
ALONE = r"holds no lm_head\.weight: the embeddings are used as the head, which is right only where the whole model tied"


@pytest.mark.parametrize("family", ["qwen3_vl_moe", "qwen3_vl"])
@pytest.mark.parametrize("rope", [None, pytest.param(YARN, marks=pytest.mark.slow)])
def test_the_text_model_of_a_vision_language_checkpoint_answers_by_itself(family: str, rope: Any, tmp_path: Path):
    whole = write(tmp_path / "whole", family, "float32")
    config = json.loads((whole / "config.json").read_text())
    config["text_config"]["rope_scaling"] |= rope or {}
    (whole / "config.json").write_text(json.dumps(config))
    text = tmp_path / "text"
    torch_model(whole).model.language_model.save_pretrained(text)
    reference = AutoModel.from_pretrained(text).eval()
    assert type(reference).__name__ in ("Qwen3VLMoeTextModel", "Qwen3VLTextModel")
    with torch.no_grad():
        hidden = reference(input_ids=torch.tensor(IDS)).last_hidden_state
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (text / file).write_bytes((whole / file).read_bytes())
    with pytest.warns(CheckpointWarning, match=ALONE):
        model = dsj.load(text)
    theirs = (hidden @ reference.embed_tokens.weight.T).detach().numpy()
    assert_close(logits_of(model, IDS), theirs)
    answer = dsj.generate(model, **dsj.prepare(model, "Hello"), max_new_tokens=2)
    assert len(dsj.decode(model, answer)) == 1
    with pytest.warns(CheckpointWarning, match=ALONE):
        convert(text, tmp_path / "ckpt")
    assert_close(logits_of(dsj.load(tmp_path / "ckpt"), IDS), theirs)
    export(tmp_path / "ckpt", tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").read_bytes()
    again = AutoModel.from_pretrained(tmp_path / "back").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in reference.state_dict().items())
    # with the head of the whole model, it answers as the whole one
    head = load_file(whole / "model.safetensors")["lm_head.weight"]
    edit_tensors(text, lambda tensors: tensors.update({"lm_head.weight": head}))
    edit_json(text, tie_word_embeddings=False)
    assert_close(logits_of(dsj.load(text), IDS), torch_logits(torch_model(whole), IDS))


@pytest.mark.parametrize("root", ["model.language_model.", "language_model.model.", "language_model.", "model.", ""])
def test_a_text_model_may_keep_the_names_that_it_had_in_the_whole_one(root: str, tmp_path: Path):
    whole = write(tmp_path / "hf", "qwen3_vl", "float32")
    expected = our_bits(dsj.load(whole, parts=["language_model."]).params)
    edit_tensors(whole, lambda t: [t.pop(name) for name in list(t) if ".visual." in name])
    old = "model.language_model."

    def rename(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith(old)]:
            tensors[root + name.removeprefix(old)] = tensors.pop(name)

    edit_tensors(whole, rename)
    config = json.loads((whole / "config.json").read_text())["text_config"] | {"tie_word_embeddings": False}
    (whole / "config.json").write_text(json.dumps(config))
    assert our_bits(dsj.load(whole).params) == expected


def quantized(**settings: Any) -> Callable[[Path], None]:
    return lambda directory: edit_json(directory, quantization_config=settings)


def tensors(**changed: np.ndarray) -> Callable[[Path], None]:
    """Adds tensors; `__` in a name stands for a dot."""
    named = {name.replace("__", "."): values for name, values in changed.items()}
    return lambda directory: edit_tensors(directory, lambda found: found.update(named))


def rename_weights(name: str, content: bytes | None = None) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        file = (directory / "model.safetensors").rename(directory / name)
        if content is not None:
            file.write_bytes(content)

    return apply


def touch(name: str, content: str = "{}") -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        (directory / name).write_text(content)

    return apply


def drop(*names: str) -> Callable[[Path], None]:
    return lambda directory: edit_tensors(directory, lambda found: [found.pop(name) for name in names])


def adapter_only(directory: Path) -> None:
    for name in ("model.safetensors", "config.json"):
        (directory / name).unlink()
    (directory / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (directory / "adapter_model.safetensors").write_bytes(b"")


def float8(directory: Path) -> None:
    found = load_torch_file(directory / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    save_torch_file(found | {name: found[name].to(torch.float8_e4m3fn)}, directory / "model.safetensors")


def untied_without_head(directory: Path) -> None:
    model = AutoModel.from_pretrained(directory)  # the base model
    model.save_pretrained(directory)


def several(*edits: Callable[[Path], object]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        for edit in edits:
            edit(directory)

    return apply


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
ONE = np.ones(1, np.float32)
BYTES = np.ones((4, 4), np.uint8)
REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "an adapter": (adapter_only, r"holds an adapter \(adapter_config\.json\): merge it into its base model first"),
    "an adapter beside weights": (touch("adapter_config.json"), r"holds an adapter .*, or remove the adapter's files"),
    "an adapter inside": (
        tensors(model__layers__0__self_attn__q_proj__lora_A__default__weight=ONE),
        r"lora_A\.default\.weight belongs to an adapter that is not merged: merge it into its base model first",
    ),
    "AWQ": (quantized(quant_method="awq", bits=4), r"quantised with awq, 4 bits, .*: give the checkpoint in bfloat16"),
    "GPTQ": (quantized(quant_method="gptq", bits=8), r"quantised with gptq, 8 bits"),
    "bitsandbytes": (quantized(quant_method="bitsandbytes", load_in_4bit=True), r"with bitsandbytes, 4 bits"),
    "bitsandbytes of old": (quantized(load_in_8bit=True), r"with bitsandbytes, 8 bits"),
    "compressed": (quantized(quant_method="compressed-tensors", format="pack"), r"with compressed-tensors, which"),
    "FP8": (
        quantized(quant_method="fp8", fmt="e4m3"),
        r"quantised with fp8, which is not supported: give the .*bfloat16",
    ),
    "MLX": (lambda d: edit_json(d, quantization={"bits": 4, "group_size": 64}), r"quantised with MLX, 4 bits"),
    "a wrong quantization_config": (lambda d: edit_json(d, quantization_config=[4]), r"with an unknown method"),
    "GPTQ by its tensors": (tensors(model__a__qweight=BYTES, model__a__g_idx=ONE), r"g_idx says .* with GPTQ"),
    "AWQ by its tensors": (tensors(model__a__qweight=BYTES, model__a__qzeros=BYTES), r"with AWQ or GPTQ"),
    "bitsandbytes by its tensors": (
        tensors(model__a__weight__quant_state__bitsandbytes__nf4=BYTES),
        r"quantised with bitsandbytes, which is not supported: give the checkpoint in bfloat16",
    ),
    "compressed by its tensors": (tensors(model__a__weight_packed=BYTES), r"with compressed-tensors"),
    "FP8 by its tensors": (tensors(model__a__weight_scale_inv=ONE), r"quantised with FP8 or int8"),
    "FP8 by its dtype": (float8, r"has dtype F8_E4M3, .* quantised, give a checkpoint in bfloat16"),
    "no head": (untied_without_head, r"lacks tensor lm_head\.weight: a base model was saved without its head, so save"),
    "no embedding": (
        drop("model.embed_tokens.weight"),
        r"set tie_word_embeddings to true in config\.json where",
    ),
    "one tensor fewer": (
        drop("model.norm.weight"),
        r"lacks tensor model\.norm\.weight: download the checkpoint",
    ),
    "another model": (
        lambda d: save_file({"roberta.x": ONE}, d / "model.safetensors"),
        r"weights are of another model than its config\.json \(1 tensor is not part of qwen3 and left out: roberta",
    ),
    "PyTorch's format": (
        several(rename_weights("pytorch_model.bin"), touch("training_args.bin")),
        r"holds its weights as pytorch_model\.bin and no model\.safetensors: save them as safetensors first",
    ),
    "PyTorch's other ending": (rename_weights("consolidated.00.pth"), r"holds its weights as consolidated\.00\.pth"),
    "training's rest": (
        several(rename_weights("optimizer.pt"), touch("rng_state.pth")),
        r"no model\.safetensors and no model\.safetensors\.index\.json in .*: give a",
    ),
    "GGUF": (rename_weights("model-Q4_K_M.gguf"), r"Q4_K_M\.gguf is a GGUF file: give the Hugging Face checkpoint"),
    "GGUF alone": (
        several(rename_weights("model.gguf"), lambda d: (d / "config.json").unlink()),
        r"model\.gguf is a GGUF file: give the Hugging Face checkpoint in safetensors that it was made from",
    ),
    "another name": (
        rename_weights("pytorch_model.safetensors"),
        r"rename it to model\.safetensors where it is",
    ),
    "no index": (rename_weights("model-00001-of-00001.safetensors"), r"without model\.safetensors\.index\.json, which"),
    "LFS weights": (
        rename_weights("model.safetensors", LFS),
        r"model\.safetensors is a Git LFS pointer.*: run git",
    ),
    "LFS config": (touch("config.json", LFS.decode()), r"config\.json is a Git LFS pointer, not the file itself: run"),
    "LFS index": (
        several(
            rename_weights("model-00001-of-00001.safetensors"), touch("model.safetensors.index.json", LFS.decode())
        ),
        r"index\.json is a Git LFS pointer",
    ),
    "damaged config": (
        touch("config.json", '{\n "a": 1,\n "b"}'),
        r"config\.json is not valid JSON \(.*line 3 column ",
    ),
    "empty config": (touch("config.json", " "), r"config\.json is not valid JSON \(it is empty\)"),
    "config in Latin-1": (
        lambda d: (d / "config.json").write_bytes(b'{\n"name": "\xe9"}'),
        r"config\.json is not valid JSON \(invalid continuation byte at line 2, byte 11\)",
    ),
    "deep config": (touch("config.json", "[" * 100_000), r"config\.json is not valid JSON \(nested too deeply\)"),
    "config of digits": (touch("config.json", "1" * 5000), r"config\.json is not valid JSON \(Exceeds the limit"),
    "damaged index": (
        several(rename_weights("model-00001-of-00001.safetensors"), touch("model.safetensors.index.json", '{"a":\n}')),
        r"index\.json is damaged \(JSONDecodeError: .*line 2 column 1 ",
    ),
    "index of another type": (
        several(rename_weights("a.safetensors"), touch("model.safetensors.index.json", '{"weight_map": {"a": 1}}')),
        r"index\.json is damaged \(TypeError: weight_map must map names of tensors to names of files\)",
    ),
    "index of null": (
        several(rename_weights("a.safetensors"), touch("model.safetensors.index.json", '{"weight_map": null}')),
        r"index\.json is damaged",
    ),
    "damaged generation": (touch("generation_config.json", '{"a" 1}'), r"generation_config\.json .* line 1 column 6 "),
    "generation list": (touch("generation_config.json", "[]"), r"generation_config\.json holds list, not an object"),
    **{
        f"end tokens {value}": (
            touch("generation_config.json", json.dumps({"eos_token_id": value})),
            r"generation_config\.json\.eos_token_id must be a token id or a list of them, found",
        )
        for value in ("2", [1, "2"], [[1]], True, 1.5, -1, {"a": 1}, [None], float("nan"))
    },
    **{
        f"pad token {value}": (
            touch("generation_config.json", json.dumps({"pad_token_id": value})),
            r"generation_config\.json\.pad_token_id must be an integer of at least 0, found",
        )
        for value in ("2", [1], True, 1.5, -1)
    },
}


def refusals(directory: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """What each way in says of a directory."""
    said = {}
    ways: dict[str, Callable[[], object]] = {
        "load": lambda: dsj.load(directory),
        "convert": lambda: convert(directory, directory.parent / "out"),
    }
    for name, way in ways.items():
        with pytest.raises(ValueError) as caught:
            way()
        said[name] = str(caught.value)
    commands = {
        "deepstack-jax generate": ["generate", str(directory), "--prompt", "x"],
        "deepstack-jax convert": ["convert", str(directory), str(directory.parent / "out")],
    }
    for name, command in commands.items():
        with pytest.raises(SystemExit) as ended:
            main(command)
        assert ended.value.code == 1
        said[name] = capsys.readouterr().err.strip().removeprefix("error: ")
    return said


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_a_checkpoint_is_told_alike_in_one_line(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    damage, message = REFUSED[case]
    source = write(tmp_path / "hf", "qwen3")
    damage(source)
    capsys.readouterr()
    for way, said in refusals(source, capsys).items():
        assert "\n" not in said, way
        with pytest.raises(ValueError, match=message):
            raise ValueError(said)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_weights_of_the_text_model_under_the_whole_ones_config_say_so(tmp_path: Path):
    source = write(tmp_path / "hf", "qwen3_vl")
    edit_tensors(source, lambda t: [t.pop(name) for name in list(t) if ".visual." in name])
    with pytest.raises(ValueError, match=r"model only, .* text_config its config\.json \(model_type qwen3_vl_text\)"):
        dsj.load(source)
    config = json.loads((source / "config.json").read_text())["text_config"]
    (source / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    assert dsj.load(source).config.vision is None


def test_shards_beside_a_file_that_is_not_whole_say_which_is_read(tmp_path: Path):
    source = tmp_path / "hf"
    write_random_checkpoint(source, small("qwen3"), max_shard_bytes=100_000)
    save_file({"model.norm.weight": np.ones(64, np.float32)}, source / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors is read before .*index\.json, so remove it"):
        dsj.load(source)
    (source / "model.safetensors").unlink()
    dsj.load(source)


def test_an_index_that_places_a_tensor_elsewhere_is_to_be_corrected(tmp_path: Path):
    source = tmp_path / "hf"
    write_random_checkpoint(source, small("qwen3"), max_shard_bytes=100_000)
    index = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    first = min(index.values())
    for name in ("model.layers.1.self_attn.q_proj.weight", "lm_head.weight"):  # the head has a file of its own
        edit_json(source, "model.safetensors.index.json", weight_map=index | {name: first})
        with pytest.raises(ValueError, match=rf"lacks tensor {name}.*: it is in {index[name]}, .*correct the index"):
            dsj.load(source)
    edit_json(source, "model.safetensors.index.json", weight_map=index | {"gone.weight": first})
    dsj.load(source)  # what is not the model's isn't missed


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
def test_convert_refuses_damaged_files_that_it_would_copy(name: str, tmp_path: Path):
    source = write(tmp_path / "hf", "qwen3")
    for content, message in (('{"a": [1,}', "line 1 column 10"), (LFS.decode(), "is a Git LFS pointer")):
        (source / name).write_text(content)
        with pytest.raises(ValueError, match=rf"{name} .*{message}"):
            convert(source, tmp_path / "ckpt")
    assert not (tmp_path / "ckpt").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "model.gguf"])
def test_a_file_in_the_place_of_its_directory_is_told(name: str, tmp_path: Path):
    (tmp_path / name).write_bytes(bytes(9))
    with pytest.raises(ValueError, match=rf"{name} is a file of weights: give the directory of a Hugging Face or"):
        dsj.load(tmp_path / name)


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": 0, "pad_token_id": 0}, {}, ((0,), 0)),  # 0 is a token
        ({"eos_token_id": [7, 5]}, {"pad_token_id": None}, ((7, 5), 7)),
        ({"eos_token_id": None, "pad_token_id": None}, {"eos_token_id": 3, "pad_token_id": 4}, ((3,), 4)),
        ({}, {"eos_token_id": [], "pad_token_id": None}, ((), 0)),
    ],
)
def test_special_tokens_are_read_where_null_is_as_if_absent(generation, config, expected, tmp_path: Path):
    source = write(tmp_path / "hf", "qwen3")
    (source / "generation_config.json").write_text(json.dumps(generation))
    edit_json(source, **config)
    model = dsj.load(source)
    assert (model.eos_token_ids, model.pad_token_id) == expected


def test_the_command_converts_with_one_line_for_each_thing_read_otherwise(tmp_path: Path, capsys):
    source = write(tmp_path / "hf", "qwen3")
    edit_tensors(source, lambda t: (to(np.float32, "lm_head")(t), t.update(v_head=ONE)))
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        with pytest.raises(SystemExit) as ended:
            main(["convert", str(source), str(tmp_path / "ckpt")])
    assert ended.value.code == 0
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 2
    assert lines[0].endswith("1 tensor is not part of qwen3 and left out: v_head")
    assert "all are read as bfloat16" in lines[1]
