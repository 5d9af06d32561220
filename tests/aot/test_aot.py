"""What the compilers of TPUs and of NVIDIA's Hopper make of the kernels and of the whole model, without the chips.

Run by `make test-aot`, in an environment of its own that has those compilers.
"""

import re
from dataclasses import replace
from functools import cache, partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from deepstack_jax.config import ModelConfig, RopeConfig, TextConfig, VisionConfig
from deepstack_jax.models.parameters import abstract_params
from deepstack_jax.programs import EngineState, decode_loop, prefill_chunk
from deepstack_jax.testing.arg_specs import chunk_specs, decode_limits, state_specs
from pallas_kernels import aot, attention
from pallas_kernels.attention.arg_specs import REAL_PAGED, REAL_RANGED, PagedArgSpec, RangedArgSpec
from pallas_kernels.deepstack_add import arg_specs as add_specs
from pallas_kernels.deepstack_add import deepstack_add
from pallas_kernels.fused_moe import arg_specs, fused_moe
from pallas_kernels.fused_moe.arg_specs import REAL, ArgSpec
from pallas_kernels.fused_moe.mosaic_gpu import DECODE_TOKENS

MiB = 1 << 20
MODELS = {"30B-A3B": arg_specs.QWEN3_VL_30B_A3B, "235B-A22B": arg_specs.QWEN3_VL_235B_A22B}
HEADS = {"30B-A3B": 32, "235B-A22B": 64}
# libtpu serves one process at a time, so the two kinds can run side by side, each in one process
ON_TARGETS = [pytest.param(t, marks=pytest.mark.tpu if t in aot.TPUS else pytest.mark.gpu) for t in aot.TARGETS]

# every number of tokens on one chip of each kind, and the two forms of the kernel and their largest call on all
KERNEL_CASES = [
    pytest.param(spec, *target.values, marks=target.marks, id=f"{spec}-{target.values[0]}")
    for target in ON_TARGETS
    for specs in REAL.values()
    for spec in specs
    if target.values[0] in ("v5e", "h100") or spec.tokens in (8, 512, 16384)
]

# few and many rows of the batch, chunks of a prompt, a window, and the largest image
ATTENTION = [
    *(
        spec
        for spec in REAL_PAGED["30B-A3B"]
        if (spec.batch, spec.length, spec.context) in ((8, 1, 1000), (1, 1024, 32768))
    ),
    *(spec for spec in REAL_PAGED["235B-A22B"] if (spec.batch, spec.length, spec.context) == (64, 1, 4096)),
    REAL_RANGED["vision"][-1],
]


@cache
def mesh_of(target: str) -> jax.sharding.Mesh:
    return aot.mesh_of(target)


def kernel_of(target: str) -> str:
    return "mosaic_tpu" if target in aot.TPUS else "mosaic_gpu"


def size_of(*shapes: jax.ShapeDtypeStruct) -> int:
    return sum(prod(shape.shape) * shape.dtype.itemsize for shape in shapes)


def copies_of_weights(compiled: Any, spec: ArgSpec) -> list[str]:
    """Copies, transpositions and conversions of any shape that one expert's or all experts' weights have."""
    width, inner = spec.width, spec.inner
    matrices = [(width, 2 * inner), (2 * inner, width), (inner, width), (width, inner)]
    dims = [",".join(str(n) for n in matrix) for matrix in matrices]
    return [line for line in aot.copies(compiled, at_least=MiB) if any(f"{d}]" in line for d in dims)]


@pytest.mark.parametrize(("spec", "target"), KERNEL_CASES)
def test_fused_moe_compiles_within_its_memory(spec: ArgSpec, target: str):
    run = partial(fused_moe, backend=kernel_of(target))
    compiled = aot.compile_for(mesh_of(target), run, *spec.shapes(jnp.bfloat16))
    # what reaches device memory beside arguments and result: float32 rows [T*k, D] before they are summed, the hidden
    # states in the form that rows are read in, and the tables of the routing; on Hopper also the activations [T*k, F],
    # and the last tile of each expert is whole
    rows = spec.tokens * spec.top_k
    tables = 16 * rows * spec.experts
    if target in aot.GPUS:
        rows += 128 * spec.experts
    elif target in ("v5e", "v6e") and spec in REAL["30B-A3B"]:
        rows = 0  # all rows stay in the 128 MiB of VMEM
    bound = rows * (4 * spec.width + 2 * spec.inner) + 4 * spec.tokens * spec.width + tables + 16 * MiB
    assert compiled.memory_analysis().temp_size_in_bytes <= bound
    assert copies_of_weights(compiled, spec) == []
    if target in aot.GPUS:
        # the host would wait for the device at every turn of a loop, and each of the others takes several launches
        refused = "while|conditional" if spec.tokens > DECODE_TOKENS else "while|conditional|scatter|sort|reduce-window"
        assert not re.search(rf" ({refused})\(", compiled.as_text())


@pytest.mark.parametrize("target", [target for target in ON_TARGETS if target.values[0] in aot.TPUS])
@pytest.mark.parametrize("spec", ATTENTION, ids=str)
def test_attention_keeps_scores_and_copies_of_keys_out_of_device_memory(
    spec: PagedArgSpec | RangedArgSpec, target: str
):
    query, keys, *rest = spec.shapes(jnp.bfloat16)
    run = attention.paged_attention if isinstance(spec, PagedArgSpec) else attention.ranged_attention
    compiled = aot.compile_for(mesh_of(target), run, query, keys, *rest)
    assert aot.kernels(compiled) == ["attention_decode" if spec.length == 1 else "attention_prefill"]
    # the float32 result before heads and tokens change places; heads that don't fill 128 lanes are also laid out anew
    lanes, tokens = -(-spec.head_dim // 128) * 128, spec.batch * spec.heads * spec.length
    bound = 4 * lanes * tokens + MiB
    if spec.head_dim == lanes:
        assert aot.copies(compiled, at_least=size_of(keys) // 2) == []
    else:
        bound += 2 * lanes * (tokens + 2 * size_of(keys) // (2 * spec.head_dim))
    assert compiled.memory_analysis().temp_size_in_bytes <= bound


@pytest.mark.parametrize("target", ON_TARGETS)
@pytest.mark.parametrize("spec", add_specs.REAL, ids=str)
def test_deepstack_add_compiles_in_place(spec: add_specs.ArgSpec, target: str):
    hidden, rows, index = spec.shapes(jnp.float32, jnp.bfloat16)
    run = partial(deepstack_add, level=1, backend=kernel_of(target))
    compiled = aot.compile_for(mesh_of(target), run, hidden, rows, index, donate_argnums=0)
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == size_of(hidden)
    # the visual tokens' places, and the level's rows in the form that a TPU copies one by one
    assert memory.temp_size_in_bytes <= 64 * spec.tokens + size_of(rows) // spec.levels + MiB


@pytest.mark.parametrize("target", ON_TARGETS)
@pytest.mark.parametrize("model", MODELS)
class TestWholeModel:
    """The programs of the real models, cut to four layers, on one chip."""

    def test_decode(self, model: str, target: str):
        config, params = config_and_params(model, layers_on(target, model))
        state = state_specs(config, slots=8, num_pages=256)
        compiled = aot.compile_for(mesh_of(target), decode_loop, config, params, state, *decode_limits(config, 8))
        # logits, one block of keys and values, the experts' activations
        bound = 64 * MiB
        if target == "tpu7x":  # there XLA lays embeddings out anew for the sparse cores, and attention's weights
            moved = ("embed_tokens.weight", "q_proj.weight", "o_proj.weight")
            bound += size_of(*(leaf for path, leaf in params.items() if path.endswith(moved)))
        check_pages_in_place(compiled, state, bound)
        assert copies_of_weights(compiled, MODELS[model]) == []
        assert target not in aot.TPUS or "attention_decode" in aot.kernels(compiled)

    def test_prefill(self, model: str, target: str):
        config, params = config_and_params(model, layers_on(target, model))
        state, width = state_specs(config, slots=8, num_pages=256), 1024
        chunk = chunk_specs(config, state, width)
        compiled = aot.compile_for(mesh_of(target), prefill_chunk, config, params, state, chunk)
        spec = replace(MODELS[model], tokens=width)
        # a few float32 arrays of the width of the hidden states for each of a token's experts, and of the heads
        bound = 4 * width * (3 * spec.top_k * spec.width + 8 * HEADS[model] * 128) + 64 * MiB
        check_pages_in_place(compiled, state, bound)
        assert copies_of_weights(compiled, spec) == []
        assert target not in aot.TPUS or "attention_prefill" in aot.kernels(compiled)


def check_pages_in_place(compiled: Any, state: EngineState, bound: int) -> None:
    """The pages that come in are those that go out, none is copied, and temporaries stay below `bound` bytes."""
    memory = compiled.memory_analysis()
    pages = size_of(*state.cache.keys, *state.cache.values)
    assert memory.alias_size_in_bytes >= pages
    assert memory.temp_size_in_bytes <= bound
    dims = ",".join(str(n) for n in state.cache.keys[0].shape)
    assert [line for line in aot.copies(compiled, at_least=MiB) if f"[{dims}]" in line] == []


def layers_on(target: str, model: str) -> int:
    """Four; two of 235B-A22B, each of 4.8 GB, on a v5e of 16 GB."""
    return 2 if (target, model) == ("v5e", "235B-A22B") else 4


@cache
def config_and_params(model: str, layers: int) -> tuple[ModelConfig, dict[str, jax.ShapeDtypeStruct]]:
    spec = MODELS[model]
    text = TextConfig(
        vocab_size=151936,
        hidden_size=spec.width,
        intermediate_size=6144,
        num_hidden_layers=layers,
        num_attention_heads=HEADS[model],
        num_key_value_heads=4,
        head_dim=128,
        rope=RopeConfig(5e6, mrope_section=(24, 20, 20)),
        max_position_embeddings=262144,
        num_experts=spec.experts,
        num_experts_per_tok=spec.top_k,
        moe_intermediate_size=spec.inner,
        sparse_layers=(True,) * layers,
        sliding_windows=(None,) * layers,
    )
    vision = VisionConfig(
        depth=4,
        hidden_size=1152,
        intermediate_size=4304,
        num_heads=16,
        out_hidden_size=spec.width,
        num_position_embeddings=2304,
        deepstack_visual_indexes=(0, 1, 2),
    )
    config = ModelConfig("qwen3_vl_moe", text, vision, dtype="bfloat16")
    params = abstract_params(config, jnp.bfloat16)
    return config, {path: leaf for path, leaf in params.items() if path.startswith("language_model.")}
