"""Runs a checkpoint on meshes of this process's devices and compares it with one device. Run by test_sharding.py.

    python -m tests.mesh_process CHECKPOINT [--schedules N | --exchange] MESH ...

With --schedules, it runs random schedules of the engine instead (`tests.engine_schedules_on_device`), for a checkpoint
of `tests.engine_questions.CONFIG`. With --exchange, tokens go to the devices of their experts, as they do on larger
meshes. Prints one line per mesh; an assertion that fails ends the process.
"""

import argparse
import logging
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import deepstack_jax as dsj
from deepstack_jax import sharding
from deepstack_jax.engine.options import EngineOptions, page_bytes
from deepstack_jax.engine.shape import EngineShape
from deepstack_jax.models import expert_exchange
from deepstack_jax.models.moe import Experts
from deepstack_jax.models.registry import parse_config
from deepstack_jax.testing.random_checkpoint import tiny_config
from pallas_kernels.fused_moe import fused_moe
from tests.cases import IMAGE, batch_of
from tests.engine_questions import SHAPE, small_bench
from tests.engine_schedules_on_device import simulate_all

PROMPTS = [[5, (IMAGE, (1, 4, 6)), 8], [4, 7, 9, 3], [6, (IMAGE, (1, 2, 4)), 7]]
SAMPLED = {"temperature": 1.0, "top_p": 0.9, "seed": [3, 4, 5]}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("meshes", nargs="+")
    parser.add_argument("--schedules", type=int, default=0)
    parser.add_argument("--exchange", action="store_true")
    options = parser.parse_args()
    if options.exchange:
        expert_exchange.GATHERED_WAYS = expert_exchange.TOKENS_PER_DEVICE = 1
    logging.basicConfig(level=logging.ERROR)  # what doesn't divide is tested elsewhere
    one = dsj.load(options.checkpoint)
    for shape in options.meshes:
        model = dsj.load(options.checkpoint, mesh=dsj.make_mesh(shape))
        if options.schedules:
            check_promise(model, options.schedules)
        elif options.exchange:
            check_exchange(model)
            compare_greedy(one, model)
        else:
            compare(one, model)
            check_placement(model)
        print(shape, "holds", flush=True)


def compare(one: dsj.Model, model: dsj.Model) -> None:
    """Logits within 2e-5 of the largest one; greedy, streamed and sampled tokens equal."""
    inputs = batch_of(tiny_config(), PROMPTS)
    real = inputs["attention_mask"] == 1
    expected, found = (np.asarray(dsj.forward(m, **inputs))[real] for m in (one, model))
    assert np.abs(found - expected).max() <= 2e-5 * np.abs(expected).max()
    asked = {"max_new_tokens": 8, "eos_token_id": []}
    for options in ({}, SAMPLED):
        tokens, others = (dsj.generate(m, **inputs, **asked, **options).tokens for m in (one, model))
        np.testing.assert_array_equal(others, tokens)
        streamed = np.stack(list(dsj.stream(model, inputs, **asked, **options)), axis=1)
        np.testing.assert_array_equal(streamed, tokens)


def compare_greedy(one: dsj.Model, model: dsj.Model) -> None:
    inputs = batch_of(tiny_config(), PROMPTS)
    tokens, others = (dsj.generate(m, **inputs, max_new_tokens=4, eos_token_id=[]).tokens for m in (one, model))
    np.testing.assert_array_equal(others, tokens)


def check_placement(model: dsj.Model) -> None:
    """Experts, heads and pages are split as far as they divide, and what the host reads is on every device."""
    mesh = model.mesh
    assert mesh is not None
    data, tensor = sharding.sizes(mesh)
    text = model.config.text
    experts = model.params["language_model.model.layers.1.mlp.experts.gate_up_proj"]
    assert experts.sharding.shard_shape(experts.shape)[0] == max(text.num_experts // mesh.size, 1)
    engine = EngineOptions(slots=8, kv_bytes=20 * page_bytes(model, 128)).build(model)
    pages = engine._state.cache.keys[0]
    heads = text.num_key_value_heads * sharding.kv_repeats(text.num_attention_heads, text.num_key_value_heads, mesh)
    split = tensor if heads % tensor == 0 else 1
    assert pages.sharding.shard_shape(pages.shape) == (engine.num_pages, heads // split, 128, text.head_dim)
    held = sum(x.addressable_shards[0].data.nbytes for x in (*engine._state.cache.keys, *engine._state.cache.values))
    assert held == engine.num_pages * page_bytes(model, 128)
    assert engine._state.last.sharding.shard_shape((8,)) == (8 // data,)


def check_exchange(model: dsj.Model) -> None:
    """A layer's experts against one device: any choices, in one round or several; and no row depends on another."""
    config = parse_config(tiny_config("qwen3_moe", num_experts=16)).text
    experts = Experts(config, dtype=jnp.float32, rngs=nnx.Rngs(0))
    draw, (tokens, top_k) = np.random.default_rng(0), (512, 2)
    hidden = draw.normal(size=(tokens, config.hidden_size)).astype(np.float32)
    shares = draw.uniform(size=(tokens, top_k)).astype(np.float32)
    spread = np.stack([draw.permutation(16)[:top_k] for _ in hidden]).astype(np.int32)
    some = np.where(draw.uniform(size=spread.shape) < 0.4, -1, spread)
    skewed = np.where(np.arange(tokens)[:, None] < 3, spread, [[7, 6]]).astype(np.int32)
    of_device = tokens * top_k // 8
    assert of_device > 2 * expert_exchange.block_rows(of_device, 8)  # all to one device: three rounds

    def loss(experts: Experts, hidden: jax.Array, shares: jax.Array) -> jax.Array:
        return jnp.sum(experts(hidden, some, shares) ** 2)

    found = {}
    expected_gradient = nnx.jit(nnx.grad(loss, argnums=(0, 1, 2)))(experts, hidden, shares)
    with jax.set_mesh(model.mesh):
        assert experts.exchanged_over(tokens)
        run = nnx.jit(lambda experts, *args: experts(*args))
        for name, chosen in {"spread": spread, "some": some, "skewed": skewed}.items():
            found[name] = np.asarray(run(experts, hidden, chosen, shares))
        others = np.concatenate([hidden[:3], 2 * hidden[3:]])
        np.testing.assert_array_equal(np.asarray(run(experts, others, skewed, shares))[:3], found["spread"][:3])
        gradient = nnx.jit(nnx.grad(loss, argnums=(0, 1, 2)))(experts, hidden, shares)
    weights = experts.gate_up_proj[...], experts.down_proj[...]
    for name, chosen in {"spread": spread, "some": some, "skewed": skewed}.items():
        expected = np.asarray(fused_moe(hidden, *weights, chosen, shares, backend="xla"))
        assert np.abs(found[name] - expected).max() <= 2e-6 * np.abs(expected).max(), name
    for one, several in zip(jax.tree.leaves(expected_gradient), jax.tree.leaves(gradient), strict=True):
        assert np.abs(several - one).max() <= 2e-6 * np.abs(one).max()


def check_promise(model: dsj.Model, count: int) -> None:
    """Random schedules give each request, bit for bit, what it has alone on the same mesh."""
    data, _ = sizes = sharding.sizes(model.mesh)
    shape: EngineShape = replace(SHAPE, slots=max(2 * data, 4), decode_widths=(), mesh=sizes)
    seen = simulate_all(small_bench(model, shape), range(count))
    assert {what for what in ("length", "late", "cached", "split") if not seen[what]} == set(), seen


if __name__ == "__main__":
    main()
