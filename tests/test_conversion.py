"""Conversion there and back: bits, names and files are kept, and PyTorch reads the result as it read the source."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from orbax.checkpoint import v1 as ocp
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from converters.hf_to_orbax import convert
from converters.orbax_to_hf import export
from deepstack_jax.checkpoints.hf_checkpoint import open_checkpoint, read_params
from deepstack_jax.checkpoints.mapping import canonical_shapes, hf_tensors
from deepstack_jax.checkpoints.orbax_checkpoint import read_orbax_params, restore_params
from deepstack_jax.models.parameters import abstract_params
from deepstack_jax.models.registry import parse_config, read_config
from deepstack_jax.testing.random_checkpoint import tiny_config, write_random_checkpoint
from tests.cases import FAMILIES

LAYOUTS = [(family, "hf4") for family in FAMILIES] + [
    (family, layout) for family in FAMILIES if "moe" in family for layout in ("hf5", "per_expert")
]
# What transformers reads: 5.x accepts fused experts for the vision family and single ones for the text family.
READABLE = [
    ("qwen3_vl_moe", "hf4"),
    ("qwen3_vl_moe", "hf5"),
    ("qwen3_moe", "per_expert"),
    ("qwen3_vl", "hf4"),
    ("qwen3", "hf4"),
]


def bits(directory: Path) -> dict[tuple[str, str], tuple[str, tuple[int, ...], bytes]]:
    """(file, name) -> (dtype, shape, bytes), read by the safetensors library."""
    return {
        (file.name, name): (str(values.dtype), values.shape, values.tobytes())
        for file in sorted(directory.glob("*.safetensors"))
        for name, values in load_file(file).items()
    }


def torch_model(directory: Path) -> torch.nn.Module:
    """What from_pretrained loads, with no tensor missing, left over or of another shape."""
    loader = AutoModelForImageTextToText if "_vl" in read_config(directory).model_type else AutoModelForCausalLM
    model, report = loader.from_pretrained(directory, dtype="auto", output_loading_info=True)
    assert not any(report.values()), report
    return model


def expected_params(model: torch.nn.Module, config) -> dict[str, np.ndarray]:
    """The parameters that a PyTorch model should become, from its state in memory (experts [E, 2F, D], [E, D, F])."""
    shapes, found = canonical_shapes(config), {}
    prefix = "model.language_model." if config.vision else "model."
    for name, tensor in model.state_dict().items():
        path = name.replace("model.visual.", "visual.").replace(prefix, "language_model.model.")
        path = "language_model.lm_head.weight" if name == "lm_head.weight" else path
        if path in shapes:  # not the head of tied embeddings
            if ".experts." in path:
                tensor = tensor.transpose(1, 2)
            found[path] = tensor.float().numpy().reshape(shapes[path])
    return found


def assert_same(ours, theirs) -> None:
    assert ours.keys() == theirs.keys()
    for path in theirs:
        np.testing.assert_array_equal(np.asarray(ours[path], np.float32), theirs[path], err_msg=path)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_the_mapping_names_exactly_the_models_parameters(family, tied, bias):
    text = {"attention_bias": bias, **({"mlp_only_layers": [1], "decoder_sparse_step": 2} if "moe" in family else {})}
    extra = {"text_config": text} if "_vl" in family else text
    config = parse_config(tiny_config(family, tie_word_embeddings=tied, **extra))
    assert canonical_shapes(config) == {path: leaf.shape for path, leaf in abstract_params(config).items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_tensor_names_and_shapes_are_transformers(family, tmp_path):
    raw = tiny_config(family)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    loader = AutoModelForImageTextToText if "_vl" in family else AutoModelForCausalLM
    with torch.device("meta"):
        model = loader.from_config(AutoConfig.from_pretrained(tmp_path))
    theirs = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert hf_tensors(parse_config(raw), "hf5") == theirs


@pytest.mark.parametrize(("family", "layout"), LAYOUTS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_round_trip_keeps_every_bit_name_and_file(family, layout, dtype, tmp_path):
    write_random_checkpoint(
        tmp_path / "a", tiny_config(family), dtype=dtype, expert_layout=layout, max_shard_bytes=300_000
    )
    convert(tmp_path / "a", tmp_path / "b")
    export(tmp_path / "b", tmp_path / "c")
    before = bits(tmp_path / "a")
    assert len({file for file, _ in before}) > 1
    assert bits(tmp_path / "c") == before
    index = json.loads((tmp_path / "a" / "model.safetensors.index.json").read_text())
    assert json.loads((tmp_path / "c" / "model.safetensors.index.json").read_text()) == index
    weights = {file for file, _ in before}
    for file in tmp_path.glob("a/*"):
        if file.name not in weights and not file.name.endswith("index.json"):
            assert (tmp_path / "c" / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize(("family", "layout"), READABLE)
def test_pytorch_loads_what_was_exported(family, layout, tmp_path):
    write_random_checkpoint(tmp_path / "a", tiny_config(family), expert_layout=layout, max_shard_bytes=10**6)
    convert(tmp_path / "a", tmp_path / "b")
    export(tmp_path / "b", tmp_path / "c")
    config = read_config(tmp_path / "b")
    theirs = torch_model(tmp_path / "c").state_dict()
    source = torch_model(tmp_path / "a")
    assert theirs.keys() == source.state_dict().keys()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in source.state_dict().items())
    assert_same(restore_params(tmp_path / "b", config), expected_params(source, config))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_what_transformers_saves_converts_and_comes_back(family, tied, tmp_path):
    layout = "per_expert" if family == "qwen3_moe" else "hf4"  # as transformers reads them
    config = tiny_config(family, tie_word_embeddings=tied)
    write_random_checkpoint(tmp_path / "made", config, dtype="bfloat16", expert_layout=layout)
    model = torch_model(tmp_path / "made")
    model.save_pretrained(tmp_path / "a", max_shard_size="300KB")
    convert(tmp_path / "a", tmp_path / "b")
    config = read_config(tmp_path / "b")
    assert config.text.tie_word_embeddings is tied
    assert_same(restore_params(tmp_path / "b", config), expected_params(model, config))
    assert_same(dict(read_params(tmp_path / "a")), expected_params(model, config))
    export(tmp_path / "b", tmp_path / "c")
    assert bits(tmp_path / "c") == bits(tmp_path / "a")


@pytest.mark.parametrize(
    ("given", "wanted"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("float16", "float32")]
)
def test_conversion_of_the_dtype_rounds_as_pytorch_does(given, wanted, tmp_path):
    for layout in ("hf4", "hf5"):
        write_random_checkpoint(tmp_path / layout, tiny_config(), dtype=given, expert_layout=layout)
        convert(tmp_path / layout, tmp_path / f"{layout}-ckpt", dtype=wanted)
        export(tmp_path / f"{layout}-ckpt", tmp_path / f"{layout}-back")
        source = load_file(tmp_path / layout / "model.safetensors")
        back = load_file(tmp_path / f"{layout}-back" / "model.safetensors")
        for name, values in source.items():
            expected = torch.from_numpy(values.astype(np.float32)).to(getattr(torch, wanted)).float().numpy()
            assert back[name].dtype.name == wanted
            np.testing.assert_array_equal(back[name].astype(np.float32), expected, err_msg=name)
    assert next(torch_model(tmp_path / "hf4-back").parameters()).dtype == getattr(torch, wanted)
    direct = dict(read_params(tmp_path / "hf5", dtype=wanted))
    stored = dict(read_orbax_params(tmp_path / "hf4-ckpt"))
    assert all(direct[path].tobytes() == stored[path].tobytes() for path in stored)


def test_restoring_converts_filters_and_shards(tmp_path):
    """On eight devices each holds its part alone; a process of its own, as the number is fixed at the start."""
    write_random_checkpoint(tmp_path / "a", tiny_config(), dtype="bfloat16")
    convert(tmp_path / "a", tmp_path / "b")
    program = """
import sys, jax, numpy as np
from pathlib import Path
from deepstack_jax.checkpoints.orbax_checkpoint import restore_params
from deepstack_jax.checkpoints.hf_checkpoint import read_params
from deepstack_jax.models.registry import read_config
source, converted = Path(sys.argv[1]), Path(sys.argv[2])
mesh = jax.make_mesh((8,), ("x",))
config = read_config(converted)
expected = dict(read_params(source, dtype="float32", prefixes=["language_model."]))
spec = {path: jax.P("x") if ".experts." in path else jax.P() for path in expected}
shardings = {path: jax.NamedSharding(mesh, spec[path]) for path in expected}
seen = []
params = restore_params(converted, config, "float32", ("language_model.",), shardings, lambda *done: seen.append(done))
assert list(params) == list(expected) and seen[-1][0] == seen[-1][1] == sum(a.nbytes for a in expected.values()), seen
for path, array in params.items():
    assert array.sharding == shardings[path] and array.dtype == "float32", path
    np.testing.assert_array_equal(np.asarray(array), expected[path])
experts = params["language_model.model.layers.0.mlp.experts.gate_up_proj"]
assert {shard.data.shape for shard in experts.addressable_shards} == {(1, 64, 96)}
"""
    environment = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "PATH": ""}
    command = [sys.executable, "-c", program, str(tmp_path / "a"), str(tmp_path / "b")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_large_experts_are_stored_one_by_one_and_large_matrices_in_pieces(tmp_path):
    """So that a device reads what it holds. Here each has [512, 1024] and [512, 512] of float32, 2 and 1 MiB."""
    text = {"hidden_size": 512, "moe_intermediate_size": 512, "num_hidden_layers": 1, "num_experts": 3}
    config = tiny_config("qwen3_moe", **text, vocab_size=3 * 2**14)
    write_random_checkpoint(tmp_path / "a", config, expert_layout="hf5", repeat_values=True)
    convert(tmp_path / "a", tmp_path / "b")
    state = tmp_path / "b" / "params" / "state"

    def pieces(path: str) -> list[int]:
        return [file.stat().st_size for file in sorted((state / path).glob("c.*"))]

    assert pieces("language_model.model.layers.0.mlp.experts.gate_up_proj") == [2 << 20] * 3
    assert pieces("language_model.model.layers.0.mlp.experts.down_proj") == [1 << 20] * 3
    assert pieces("language_model.model.embed_tokens.weight") == [32 << 20] * 3
    assert pieces("language_model.model.layers.0.self_attn.q_proj.weight") == [64 * 512 * 4]
    export(tmp_path / "b", tmp_path / "c")
    assert bits(tmp_path / "c") == bits(tmp_path / "a")


def test_orbax_itself_reads_the_tree(tmp_path):
    """Without this project's code: a nested tree of arrays in the canonical shapes."""
    write_random_checkpoint(tmp_path / "a", tiny_config(), dtype="bfloat16")
    convert(tmp_path / "a", tmp_path / "b")
    tree = ocp.load(tmp_path / "b" / "params")
    found = {".".join(key.key for key in keys): leaf for keys, leaf in jax.tree.leaves_with_path(tree)}
    expected = dict(read_params(tmp_path / "a"))
    assert found.keys() == expected.keys()
    assert all(np.asarray(found[path]).tobytes() == values.tobytes() for path, values in expected.items())
    assert all(found[path].dtype == values.dtype for path, values in expected.items())


def test_a_head_beside_tied_embeddings_is_dropped_and_given_back(tmp_path):
    write_random_checkpoint(tmp_path / "a", tiny_config("qwen3_vl", tie_word_embeddings=True))
    file = tmp_path / "a" / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.language_model.embed_tokens.weight"].copy()
    save_file(tensors, file)
    convert(tmp_path / "a", tmp_path / "b")
    assert not any("lm_head" in path for path, _ in read_orbax_params(tmp_path / "b"))
    export(tmp_path / "b", tmp_path / "c")
    assert bits(tmp_path / "c") == bits(tmp_path / "a")


@pytest.mark.parametrize(
    ("family", "old", "new"),
    [
        ("qwen3_vl_moe", "model.visual.", "visual."),
        ("qwen3_vl_moe", "model.language_model.", "language_model."),
        ("qwen3_vl_moe", "model.language_model.", "language_model.model."),
        ("qwen3_vl", "model.language_model.", "model."),
        ("qwen3", "model.", ""),
    ],
)
def test_other_spellings_of_the_roots_are_read_and_given_back(family, old, new, tmp_path):
    write_random_checkpoint(tmp_path / "a", tiny_config(family))
    config = read_config(tmp_path / "a")
    expected = dict(read_params(tmp_path / "a"))
    file = tmp_path / "a" / "model.safetensors"
    save_file({new + n[len(old) :] if n.startswith(old) else n: v for n, v in load_file(file).items()}, file)
    convert(tmp_path / "a", tmp_path / "b")
    assert_same(restore_params(tmp_path / "b", config), expected)
    export(tmp_path / "b", tmp_path / "c")
    assert bits(tmp_path / "c") == bits(tmp_path / "a")


@pytest.mark.parametrize("layout", ["hf4", "hf5"])
def test_a_given_layout_settles_what_shapes_leave_open(layout, tmp_path):
    config = tiny_config(text_config={"moe_intermediate_size": 32})  # 2F == D == 64
    write_random_checkpoint(tmp_path / "reference", config, expert_layout="per_expert")
    write_random_checkpoint(tmp_path / "a", config, expert_layout=layout)
    convert(tmp_path / "a", tmp_path / "b", expert_layout=layout)
    export(tmp_path / "b", tmp_path / "c")
    assert_same(restore_params(tmp_path / "b", read_config(tmp_path / "b")), dict(read_params(tmp_path / "reference")))
    assert bits(tmp_path / "c") == bits(tmp_path / "a")
    assert open_checkpoint(tmp_path / "c", expert_layout=layout).expert_layout == layout


@st.composite
def _configs(draw):
    family = draw(st.sampled_from(FAMILIES))
    layers, heads, tied = draw(st.integers(1, 3)), draw(st.sampled_from([2, 3])), draw(st.booleans())
    kv = heads * draw(st.integers(1, 2))
    text = {
        "num_hidden_layers": layers,
        "num_attention_heads": kv,
        "num_key_value_heads": heads,
        "vocab_size": draw(st.integers(5, 9)),
        "hidden_size": (d := 8 * draw(st.integers(1, 3))),
        "intermediate_size": draw(st.integers(3, 9)),
        "attention_bias": draw(st.booleans()),
    }
    layout = "hf4"
    if "moe" in family:
        layout = draw(st.sampled_from(["hf4", "hf5", "per_expert"]))
        width = draw(st.integers(3, 9))
        text |= {
            "num_experts": draw(st.integers(2, 5)),
            "moe_intermediate_size": width + (2 * width == d),
            "mlp_only_layers": draw(st.lists(st.integers(0, layers - 1), unique=True)),
            "decoder_sparse_step": draw(st.integers(1, 2)),
        }
    if "_vl" not in family:
        return tiny_config(family, tie_word_embeddings=tied, **text), layout
    depth = draw(st.integers(1, 3))
    taps = draw(st.lists(st.integers(0, depth - 1), unique=True))
    vision = {"depth": depth, "deepstack_visual_indexes": taps, "out_hidden_size": d, "hidden_size": 12}
    vision |= {"intermediate_size": draw(st.integers(3, 9)), "patch_size": draw(st.integers(1, 3))}
    return tiny_config(family, tie_word_embeddings=tied, text_config=text, vision_config=vision), layout


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    made=_configs(),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    shard=st.integers(200, 20_000),
    seed=st.integers(0, 99),
)
def test_exporting_what_was_converted_is_the_identity(made, dtype, shard, seed, tmp_path_factory):
    config, layout = made
    folder = tmp_path_factory.mktemp("identity")
    write_random_checkpoint(folder / "a", config, seed, dtype, layout, max_shard_bytes=shard)
    convert(folder / "a", folder / "b")
    export(folder / "b", folder / "c")
    assert bits(folder / "c") == bits(folder / "a")


def test_values_do_not_depend_on_how_they_are_stored(tmp_path):
    """The random checkpoint: one seed is one model in every layout, division into files and, up to rounding, dtype."""
    expected = None
    for layout in ("hf4", "hf5", "per_expert"):
        for dtype, shard in (("float32", 10**9), ("bfloat16", 200_000)):
            folder = tmp_path / f"{layout}-{dtype}"
            write_random_checkpoint(folder, tiny_config(), 7, dtype, layout, max_shard_bytes=shard)
            found = dict(read_params(folder))
            expected = expected or found
            for path, values in expected.items():
                np.testing.assert_array_equal(
                    found[path], values.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
                )
    write_random_checkpoint(tmp_path / "other", tiny_config(), 8)
    assert not np.array_equal(
        dict(read_params(tmp_path / "other"))["visual.pos_embed.weight"], expected["visual.pos_embed.weight"]
    )
    assert jax.tree.all(jax.tree.map(lambda values: values.std() > 0, expected))
