"""Parameters placed on a mesh give the answers of one device."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from deepstack_jax import sharding
from deepstack_jax.models.parameters import abstract_params, logical_axes
from deepstack_jax.models.registry import parse_config
from deepstack_jax.testing.random_checkpoint import tiny_config, write_random_checkpoint

CHILD = """
import sys
import jax, numpy as np
import deepstack_jax as dsj
from deepstack_jax.testing.random_checkpoint import tiny_config
from deepstack_jax.sharding import make_mesh
from tests.cases import IMAGE, batch_of

inputs = batch_of(tiny_config(), [[5, (IMAGE, (1, 4, 6)), 8], [4]])
whole, sharded = dsj.load(sys.argv[1]), dsj.load(sys.argv[1], mesh=make_mesh(2))
weight = sharded.params["language_model.model.layers.0.self_attn.q_proj.weight"]
assert weight.sharding.shard_shape(weight.shape) == (32, 64), weight.sharding
real = inputs["attention_mask"] == 1
expected, found = (np.asarray(dsj.forward(m, **inputs))[real] for m in (whole, sharded))
assert np.abs(found - expected).max() <= 2e-5 * np.abs(expected).max()
tokens = [dsj.generate(m, **inputs, max_new_tokens=8, eos_token_id=[]).tokens for m in (whole, sharded)]
np.testing.assert_array_equal(*tokens)
"""


def test_two_devices_give_the_answer_of_one(tmp_path: Path):
    write_random_checkpoint(tmp_path, tiny_config(), tokenizer=False)
    flags = "--xla_force_host_platform_device_count=2"
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        cwd=Path(__file__).parent.parent,
    )
    assert child.returncode == 0, child.stderr


def test_every_parameter_declares_an_axis_for_each_dimension():
    config = parse_config(tiny_config())
    shapes, axes = abstract_params(config), logical_axes(config)
    assert shapes.keys() == axes.keys()
    for path, names in axes.items():
        assert len(names) == len(shapes[path].shape), path
        assert set(names) - {None} <= sharding.RULES.keys(), path


def test_two_dimensions_on_one_mesh_axis_are_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sharding.RULES, "embed", "tensor")
    mesh = jax.make_mesh((1,), ("tensor",))
    with pytest.raises(ValueError, match="put two dimensions on one mesh axis"):
        sharding.param_shardings(parse_config(tiny_config()), mesh)
