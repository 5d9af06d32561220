"""config.json: the same values as transformers' own config objects read from it, and clear refusals."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoConfig, Qwen3Config, Qwen3MoeConfig, Qwen3VLConfig, Qwen3VLMoeConfig
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import (
    Qwen3VLMoeTextDecoderLayer,
    Qwen3VLMoeTextRotaryEmbedding,
)

from deepstack_jax.config import ConfigError
from deepstack_jax.models.registry import parse_config, read_config
from deepstack_jax.models.rope import text_rotation
from deepstack_jax.testing.random_checkpoint import tiny_config
from tests.cases import FAMILIES

CLASSES = {
    "qwen3_vl_moe": Qwen3VLMoeConfig,
    "qwen3_vl": Qwen3VLConfig,
    "qwen3_moe": Qwen3MoeConfig,
    "qwen3": Qwen3Config,
}
TEXT_FIELDS = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "max_position_embeddings", "rms_norm_eps", "attention_bias",
)  # fmt: skip
VISION_FIELDS = (
    "depth", "hidden_size", "intermediate_size", "num_heads", "out_hidden_size", "num_position_embeddings",
    "in_channels", "patch_size", "temporal_patch_size", "spatial_merge_size", "hidden_act",
)  # fmt: skip
TOKENS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


def assert_equal(ours, theirs) -> None:
    """Our values against those of a transformers config object."""
    text = theirs.get_text_config()
    for name in TEXT_FIELDS:
        # Qwen3MoeConfig need not have a head dim: its model then divides the hidden size
        default = text.hidden_size // text.num_attention_heads if name == "head_dim" else None
        assert getattr(ours.text, name) == getattr(text, name, default), name
    assert ours.text.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.text.rope.theta == text.rope_parameters["rope_theta"]
    assert ours.text.rope.rope_type == text.rope_parameters["rope_type"]
    if "moe" in theirs.model_type:
        for name in ("num_experts", "num_experts_per_tok", "moe_intermediate_size"):
            assert getattr(ours.text, name) == getattr(text, name), name
        dense = set(text.mlp_only_layers or ())
        sparse = [i not in dense and (i + 1) % text.decoder_sparse_step == 0 for i in range(text.num_hidden_layers)]
        assert list(ours.text.sparse_layers) == sparse
    else:
        assert not any(ours.text.sparse_layers)
        assert ours.text.intermediate_size == text.intermediate_size
    if "_vl" in theirs.model_type:
        # the default is in the model: its rotary embedding falls back to these sections
        assert list(ours.text.rope.mrope_section) == text.rope_parameters.get("mrope_section", [24, 20, 20])
        for name in VISION_FIELDS:
            assert getattr(ours.vision, name) == getattr(theirs.vision_config, name), name
        assert list(ours.vision.deepstack_visual_indexes) == list(theirs.vision_config.deepstack_visual_indexes)
        assert [getattr(ours, name) for name in TOKENS] == [getattr(theirs, name) for name in TOKENS]
    else:
        assert ours.vision is None
        assert ours.text.rope.mrope_section is None


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", ["plain", "tied", "bias", "no head dim", "dense layers", "yarn"])
def test_old_keys_and_what_transformers_writes_of_them_parse_alike(family, variant, tmp_path):
    text = {
        "plain": {},
        "tied": {},
        "bias": {"attention_bias": True, "rms_norm_eps": 1e-5},
        "no head dim": {"hidden_size": 64, "num_attention_heads": 4},
        "dense layers": {"mlp_only_layers": [2], "decoder_sparse_step": 2},
        "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}},
    }[variant]
    if variant == "yarn" and "_vl" in family:
        text["rope_scaling"] |= {"mrope_section": [4, 2, 2], "mrope_interleaved": True}
    tied = {"tie_word_embeddings": variant == "tied"}
    old = tiny_config(family, **tied, **({"text_config": text} if "_vl" in family else text))
    if variant == "no head dim" and "moe" in family:
        del (old["text_config"] if "_vl" in family else old)["head_dim"]
    (tmp_path / "config.json").write_text(json.dumps(old))
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(theirs, CLASSES[family])
    ours = read_config(tmp_path)
    assert_equal(ours, theirs)
    theirs.save_pretrained(tmp_path / "new")
    written = json.loads((tmp_path / "new" / "config.json").read_text())
    assert "rope_theta" not in (written.get("text_config") or written)  # the new keys are in use
    new = read_config(tmp_path / "new")
    assert_equal(new, theirs)
    assert (new.text, new.vision) == (ours.text, ours.vision)


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_are_transformers(family, tmp_path):
    """Every key that may be left out."""
    # the two parts' own defaults do not fit each other
    width = CLASSES[family]().get_text_config().hidden_size
    theirs = CLASSES[family](**({"vision_config": {"out_hidden_size": width}} if "_vl" in family else {}))
    theirs.save_pretrained(tmp_path)
    assert_equal(read_config(tmp_path), theirs)
    kept = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"}
    kept |= {"num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size"}
    kept |= {"depth", "num_heads", "out_hidden_size", "model_type", "num_key_value_heads"}
    raw = json.loads((tmp_path / "config.json").read_text())
    bare = {key: value for key, value in raw.items() if key in kept}
    for part in ("text_config", "vision_config"):
        if part in raw:
            bare[part] = {key: value for key, value in raw[part].items() if key in kept}
    assert_equal(parse_config(bare), CLASSES[family].from_dict(bare))


def test_sparse_layers_are_those_that_transformers_builds():
    raw = tiny_config(text_config={"num_hidden_layers": 6, "mlp_only_layers": [3], "decoder_sparse_step": 2})
    theirs = Qwen3VLMoeConfig.from_dict(raw).text_config
    layers = [Qwen3VLMoeTextDecoderLayer(theirs, i) for i in range(6)]
    built = tuple(type(layer.mlp).__name__ == "Qwen3VLMoeTextSparseMoeBlock" for layer in layers)
    assert parse_config(raw).text.sparse_layers == built == (False, True, False, False, False, True)


def test_token_ids_and_dtype():
    config = parse_config(tiny_config(torch_dtype="bfloat16", pad_token_id=256))
    assert (config.eos_token_ids, config.pad_token_id, config.dtype) == ((258,), 256, "bfloat16")
    assert parse_config(tiny_config("qwen3", eos_token_id=[5, 6])).eos_token_ids == (5, 6)
    assert parse_config(tiny_config(eos_token_id=7)).eos_token_ids == (7,)
    assert parse_config(tiny_config()).num_deepstack_levels == 3
    assert parse_config(tiny_config()).text_only().vision is None


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
DEFAULT = {"rope_type": "default", "rope_theta": 5e6}
# What the text config gets, and how many positions it then allows: factor x original ones. The model card's is first.
ROPES = {
    "yarn": ({"rope_scaling": YARN}, 4096),
    "positions left at the native ones": ({"rope_scaling": YARN, "max_position_embeddings": 1280}, 4096),
    "positions of a longer model": ({"rope_scaling": YARN, "max_position_embeddings": 8192}, 4096),
    "no original positions": ({"rope_scaling": {"rope_type": "yarn", "factor": 2.5}}, 10240),
    "old spelling": ({"rope_scaling": {**YARN, "rope_type": None, "type": "yarn"}}, 4096),
    "both spellings": ({"rope_scaling": {**YARN, "type": "linear"}}, 4096),
    "today's keys": ({"rope_parameters": {**YARN, "rope_theta": 1e5}, "rope_theta": None}, 4096),
    "theta inside and outside": ({"rope_scaling": {**YARN, "rope_theta": 777.0}}, 4096),
    "scaling goes before parameters": ({"rope_scaling": YARN, "rope_parameters": {"rope_type": "default"}}, 4096),
    "empty scaling": ({"rope_scaling": {}, "rope_parameters": DEFAULT}, 4096),
    "original positions outside": ({"rope_scaling": YARN, "original_max_position_embeddings": 2048}, 8192),
    "mscale": ({"rope_scaling": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3}}, 4096),
    "one mscale": ({"rope_scaling": {**YARN, "mscale": 0.7}}, 4096),
    "mscale of 0": ({"rope_scaling": {**YARN, "mscale": 0.7, "mscale_all_dim": 0}}, 4096),
    "attention factor of 0": ({"rope_scaling": {**YARN, "attention_factor": 0}}, 4096),
    "attention factor goes before mscale": (
        {"rope_scaling": {**YARN, "attention_factor": 1.5, "mscale": 0.7, "mscale_all_dim": 1.3}},
        4096,
    ),
    "betas": ({"rope_scaling": {**YARN, "beta_fast": 8, "beta_slow": 2.5}}, 4096),
    "not truncated": ({"rope_scaling": {**YARN, "truncate": False, "beta_fast": 20}}, 4096),
    "nulls": ({"rope_scaling": {**YARN, "attention_factor": None, "beta_fast": None, "mscale": None}}, 4096),
    "factor of null": ({"rope_scaling": {**YARN, "factor": None}}, 4096),
    "factor below 1": ({"rope_scaling": {**YARN, "factor": 0.5}}, 512),
    "linear": ({"rope_scaling": {"type": "linear", "factor": 3}}, 12288),
    "whole partial factor": ({"rope_scaling": YARN, "partial_rotary_factor": 1.0}, 4096),
    "no scaling": ({"rope_scaling": None}, 4096),
}


@pytest.mark.parametrize("family", ["qwen3", "qwen3_vl_moe"])
@pytest.mark.parametrize("case", ROPES)
@pytest.mark.filterwarnings("ignore")
def test_rope_scaling_has_transformers_numbers(family, case, tmp_path):
    """cos and sin of positions up to 500, whose angles have errors of 500 * 2**-24 radians in float32."""
    keys, positions = ROPES[case]
    raw = tiny_config(family)
    text = raw.get("text_config", raw)
    text.pop("rope_scaling", None)
    text.update(json.loads(json.dumps(keys)))
    if family == "qwen3_vl_moe" and (rope := text.get("rope_scaling") or text.get("rope_parameters")):
        rope["mrope_section"] = [4, 2, 2]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    ours = parse_config(raw).text
    assert ours.max_position_embeddings == positions
    # transformers takes no null for a type, a theta or an original length, and spells a ratio in today's keys only
    (tmp_path / "config.json").write_text(
        json.dumps(raw).replace('"rope_type": null, ', "").replace('"rope_theta": null', '"rope_theta": 1e5')
    )
    theirs = AutoConfig.from_pretrained(tmp_path).get_text_config()
    ids = torch.tensor([[[0, 3, 500], [0, 7, 400], [0, 5, 300]]]).transpose(0, 1)  # [3, 1, 3]
    if family == "qwen3":
        ids = ids[:1].expand(3, -1, -1)
        cos, sin = Qwen3RotaryEmbedding(theirs)(torch.zeros(1), ids[0])
    else:
        cos, sin = Qwen3VLMoeTextRotaryEmbedding(theirs)(torch.zeros(1), ids)
    half = cos.shape[-1] // 2
    for mine, reference in zip(text_rotation(ours.rope, ours.head_dim, jnp.asarray(ids)), (cos, sin), strict=True):
        np.testing.assert_allclose(np.asarray(mine), reference[..., :half].numpy(), rtol=0, atol=6e-5)


ROPES_REFUSED = {
    "longrope": (
        {"rope_type": "longrope", "long_factor": [1.0]},
        r"asks for rope type 'longrope': expected one of def",
    ),
    "llama3": (
        {"rope_type": "llama3", "low_freq_factor": 1.0},
        r"asks for rope type 'llama3': expected one of default",
    ),
    "dynamic": (
        {"type": "dynamic", "factor": 2.0},
        r"asks for rope type 'dynamic': expected one of default, linear, yarn",
    ),
    "no type": (
        {"factor": 4.0},
        r"rope_scaling\.factor 4\.0 is not read by rope type 'default': correct the rope_type",
    ),
    "another type's key": (
        {**YARN, "long_factor": [1.0]},
        r"\.long_factor \[1\.0\] is unknown to rope type 'yarn': corr",
    ),
    "llama3's key": ({**YARN, "low_freq_factor": 0}, r"\.low_freq_factor 0 is unknown to rope type 'yarn'"),
    "misspelt": ({**YARN, "beta_fats": 32}, r"\.beta_fats 32 is unknown to rope type 'yarn': .*, or remove beta_fats"),
    "yarn's key in linear": (
        {"type": "linear", "factor": 2, "mscale": 1},
        r"\.mscale 1 is not read by rope type 'linear'",
    ),
    "part of a head": (
        {**YARN, "partial_rotary_factor": 0.5},
        r"partial_rotary_factor 0\.5 is not supported: expected 1",
    ),
    "yarn without factor": ({"type": "yarn"}, r"rope_scaling of rope type 'yarn' has no factor: add one"),
    "linear without factor": ({"type": "linear", "factor": None}, r"rope type 'linear' has no factor"),
    "factor of 0": ({**YARN, "factor": 0}, r"rope_scaling\.factor must be a number above 0, found 0"),
    "factor as text": ({**YARN, "factor": "4.0"}, r"factor must be a number above 0, found '4\.0'"),
    "factor not a number": ({**YARN, "factor": float("nan")}, r"factor must be a number above 0, found nan"),
    "infinite factor": ({**YARN, "factor": float("inf")}, r"factor must be a number above 0, found inf"),
    "huge factor": ({**YARN, "factor": 10**400}, r"factor must be a number above 0, found 1000"),
    "factor as flag": ({**YARN, "factor": True}, r"factor must be a number above 0, found True"),
    "original positions": (
        {**YARN, "original_max_position_embeddings": 0},
        r"original_max_position_embeddings must be a pos",
    ),
    "beta of 0": ({**YARN, "beta_fast": 0}, r"beta_fast must be a number above 0, found 0"),
    "negative attention": (
        {**YARN, "attention_factor": -1},
        r"attention_factor must be a number of at least 0, found -1",
    ),
    "truncate as text": ({**YARN, "truncate": "false"}, r"truncate must be true or false, found 'false'"),
    "type as number": ({"rope_type": 4}, r"rope_type must be a string, found 4"),
    "a list": ([4.0], r"rope_scaling must be an object, found \[4\.0\]"),
    "a word": ("yarn", r"rope_scaling must be an object, found 'yarn'"),
    "a theta of 0": ({**YARN, "rope_theta": 0}, r"rope_theta must be a number above 1, found 0"),
    "per layer type": ({"full_attention": YARN}, r"full_attention .* is unknown to rope type 'default'"),
}


@pytest.mark.parametrize("family", ["qwen3", "qwen3_vl"])
@pytest.mark.parametrize("case", ROPES_REFUSED)
def test_what_is_not_computed_of_a_rope_is_refused_by_name(family, case):
    scaling, message = ROPES_REFUSED[case]
    keys = {"rope_scaling": scaling}
    with pytest.raises(ConfigError, match=message) as caught:
        parse_config(tiny_config(family, **({"text_config": keys} if "_vl" in family else keys)))
    assert "\n" not in str(caught.value)


def test_a_scaling_where_nothing_reads_it_is_refused():
    with pytest.raises(ConfigError, match=r"config\.json has rope_scaling beside text_config, .*: move it there"):
        parse_config(tiny_config(rope_scaling=YARN))
    both = {"rope_scaling": YARN, "rope_parameters": DEFAULT, "rope_theta": None}
    with pytest.raises(
        ConfigError, match=r"only the latter has rope_theta 5000000\.0: put all keys into rope_parameters"
    ):
        parse_config(tiny_config("qwen3", **both))
    with pytest.raises(ConfigError, match=r"mrope_interleaved false is not supported"):
        parse_config(tiny_config(text_config={"rope_scaling": {"mrope_interleaved": False}}))


# Keys that hold what they can't: (part of the config, value, what is expected).
INTEGER, COUNT, NUMBER, FLAG = (
    "a positive integer",
    "an integer of at least 0",
    "a number of at least 0",
    "true or false",
)
WRONG_TYPES = [
    *(("text_config", key, value, INTEGER)
      for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "max_position_embeddings",
                  "num_key_value_heads", "decoder_sparse_step", "num_experts_per_tok", "moe_intermediate_size")
      for value in ("64", 0, -1, 1.5, True, [64], {"a": 1}, float("nan"))),
    *(("vision_config", key, value, INTEGER)
      for key in ("depth", "hidden_size", "num_heads", "patch_size", "in_channels", "spatial_merge_size",
                  "temporal_patch_size", "num_position_embeddings", "out_hidden_size", "intermediate_size")
      for value in ("64", 0, [16, 16])),
    *(("text_config", "num_experts", value, COUNT) for value in ("8", -1, 2.5, False)),
    *(("text_config", "rms_norm_eps", value, NUMBER) for value in ("1e-6", -1e-6, float("nan"), float("inf"), True)),
    *(("text_config", "attention_bias", value, FLAG) for value in ("false", 0, 1, [], "")),
    *((None, "tie_word_embeddings", value, FLAG) for value in ("false", 1, [])),
    *((None, key, value, COUNT) for key in ("image_token_id", "vision_end_token_id", "pad_token_id")
      for value in ("1", -1, [1], 1.0)),
    *((None, "eos_token_id", value, "a token id or a list of them") for value in ("1", -1, [1, None], True, 1.0)),
    ("text_config", "eos_token_id", "1", "a token id or a list of them"),
    *(("text_config", "mlp_only_layers", value, "a list of integers of at least 0") for value in (1, "1", [-1], [1.0])),
    *(("vision_config", "deepstack_visual_indexes", value, "a list of integers of at least 0") for value in (1, ["1"])),
    *(("text_config", "hidden_act", value, "a string") for value in (1, ["silu"])),
    *((None, "dtype", value, "a string") for value in (32, ["float32"], {"": "float32"})),
    ("text_config", "rope_theta", "1e6", "a number above 1"),
    ("text_config", "use_sliding_window", "yes", FLAG),
]  # fmt: skip


@pytest.mark.parametrize(("part", "key", "value", "expected"), WRONG_TYPES)
def test_values_of_the_wrong_type_are_refused_by_name(part, key, value, expected):
    raw = tiny_config("qwen3_vl_moe" if key != "use_sliding_window" else "qwen3")
    raw.get(part, raw)[key] = value
    where = part if part in raw else r"config\.json"
    with pytest.raises(ConfigError, match=rf"^{where}\.{key} must be {expected}, found ") as caught:
        parse_config(raw)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_null_is_as_if_absent(family):
    """For every key that may be left out."""
    raw = tiny_config(family)
    part = raw.get("text_config", raw)
    optional = ("rms_norm_eps", "attention_bias", "head_dim", "max_position_embeddings", "rope_theta", "rope_scaling",
                "hidden_act", "num_key_value_heads", "eos_token_id", "mlp_only_layers", "norm_topk_prob")  # fmt: skip
    for key in optional:
        part.pop(key, None)
    absent = parse_config(raw)
    part.update(dict.fromkeys(optional))
    raw.update(dict.fromkeys(("pad_token_id", "dtype", "torch_dtype", "image_token_id", "quantization_config")))
    raw.pop("image_token_id")
    null = parse_config(raw)
    assert (null.text, null.eos_token_ids, null.dtype) == (absent.text, absent.eos_token_ids, absent.dtype)


def test_a_zero_is_a_value():
    config = parse_config(
        tiny_config(image_token_id=0, eos_token_id=0, pad_token_id=0, text_config={"rms_norm_eps": 0})
    )
    assert (config.image_token_id, config.eos_token_ids, config.pad_token_id) == (0, (0,), 0)
    assert config.text.rms_norm_eps == 0
    assert (
        parse_config(tiny_config("qwen3", use_sliding_window=True, max_window_layers=0)).text.sliding_windows[0] == 4096
    )


def drop(key: str) -> dict:
    raw = tiny_config()
    del raw["text_config"][key]
    return raw


REFUSED = {
    "another family": (
        {"model_type": "qwen2_vl"},
        r"^model_type 'qwen2_vl' is not supported: expected one of qwen3_vl_moe",
    ),
    "no family": ({}, r"^model_type None is not supported"),
    "no text": ({"model_type": "qwen3_vl"}, r"needs an object text_config, found None"),
    "no vision": ({"model_type": "qwen3_vl", "text_config": {}}, r"needs an object vision_config, found None"),
    "no size": (drop("hidden_size"), r"^text_config\.hidden_size must be a positive integer, found None$"),
    "bad size": (tiny_config("qwen3", vocab_size="300"), r"^config\.json\.vocab_size must be .*, found '300'$"),
    "no experts": (drop("num_experts"), r"^text_config has neither num_experts nor num_local_experts$"),
    "top k": (
        tiny_config(text_config={"num_experts_per_tok": 9}),
        r"num_experts_per_tok 9 must lie between 1 and num_experts 8",
    ),
    "heads": (
        tiny_config(text_config={"num_key_value_heads": 3}),
        r"4 attention heads are not a multiple of 3 key-value",
    ),
    "activation": (tiny_config("qwen3_moe", hidden_act="gelu"), r"hidden_act 'gelu' is not supported: expected 'silu'"),
    "rope type": (
        tiny_config("qwen3", rope_scaling={"rope_type": "longrope"}),
        r"asks for rope type 'longrope': expected one of default, linear, yarn",
    ),
    "sections": (
        tiny_config(text_config={"rope_scaling": {"mrope_section": [4, 4]}}),
        r"mrope_section \[4, 4\] must be three counts \(time, height, width\)",
    ),
    "widths": (
        tiny_config(vision_config={"out_hidden_size": 65}),
        r"out_hidden_size 65 differs from text_config\.hidden_size 64",
    ),
    "taps": (
        tiny_config(vision_config={"deepstack_visual_indexes": [1, 5]}),
        r"deepstack_visual_indexes \[1, 5\] must be distinct blocks of 0 to 4",
    ),
    "positions": (
        tiny_config(vision_config={"num_position_embeddings": 150}),
        r"num_position_embeddings 150 (is not a|must be a) square",
    ),
    "vision heads": (
        tiny_config(vision_config={"num_heads": 5}),
        r"48 over 5 heads must give a head dim divisible by 4",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_supported_config_is_refused_in_one_line(case, tmp_path):
    raw, message = REFUSED[case]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match=message) as caught:
        read_config(tmp_path)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_config_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"no config\.json in .*: give the directory of"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(ConfigError, match=r"config\.json is not valid JSON \(.*\): download it again"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"config\.json holds list, not an object: download it again"):
        read_config(tmp_path / "config.json")
