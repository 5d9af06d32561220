"""config.json: the same values as transformers' own config objects read from it, and clear refusals."""

import json

import pytest
from transformers import AutoConfig, Qwen3Config, Qwen3MoeConfig, Qwen3VLConfig, Qwen3VLMoeConfig
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextDecoderLayer

from converters.random_checkpoint import tiny_config
from deepstack_jax.config import FAMILIES, ConfigError, parse_config, read_config

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
    "heads": (tiny_config(text_config={"num_key_value_heads": 3}), r"4 attention heads are no multiple of 3 key-value"),
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
