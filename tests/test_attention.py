"""ranged_attention against float64 softmax attention, and its memory on the largest images."""

import os
import re
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import paged_attention, ranged_attention
from pallas_kernels.attention.arg_specs import REAL_RANGED, SMALL_RANGED, RangedArgSpec
from pallas_kernels.attention.xla_ranged import BLOCK
from tests.float64 import ranged_attention as reference


def arrays(seed: int, batch: int, heads: int, kv_heads: int, length: int, capacity: int, head_dim: int):
    rng = np.random.default_rng(seed)
    query, key = (batch, heads, length, head_dim), (batch, kv_heads, capacity, head_dim)
    return [rng.standard_normal(shape).astype(np.float32) for shape in (query, key, key)]


def causal(batch: int, length: int, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    slots = np.arange(length) + (capacity - length) // 2
    return np.zeros((batch, length), np.int32), np.broadcast_to(slots + 1, (batch, length)).astype(np.int32)


def segments(batch: int, length: int, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Unequal segments and, at the end, queries that read nothing."""
    cuts = np.asarray([0, capacity // 7, capacity // 3, capacity - 5])
    which = np.clip(np.searchsorted(cuts, np.arange(length), side="right") - 1, 0, 3)
    start = np.broadcast_to(cuts[which], (batch, length))
    stop = np.broadcast_to(np.append(cuts[1:], cuts[3])[which], (batch, length))
    return start.astype(np.int32), stop.astype(np.int32)


@pytest.mark.parametrize("ranges", [causal, segments])
@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "length", "capacity", "head_dim"),
    [
        (2, 6, 2, 9, 13, 20),
        (1, 3, 3, 200, 200, 72),
        (2, 4, 1, 33, BLOCK + 1, 8),
        (1, 4, 2, BLOCK + 3, BLOCK + 3, 12),
        (1, 2, 1, 2 * BLOCK + 17, 3 * BLOCK - 7, 16),
        (3, 6, 3, 1, 40, 24),
        (2, 4, 2, 1, 3 * BLOCK + 5, 16),
    ],
)
def test_equals_float64_attention_within_each_querys_range(ranges, batch, heads, kv_heads, length, capacity, head_dim):
    query, key, value = arrays(length, batch, heads, kv_heads, length, capacity, head_dim)
    start, stop = ranges(batch, length, capacity)
    out = jax.jit(ranged_attention)(query, key, value, start, stop)
    assert out.dtype == jnp.float32
    # float32 rounding of sums over up to 1500 keys
    np.testing.assert_allclose(out, reference(query, key, value, start, stop), atol=3e-6)


@pytest.mark.parametrize("backend", [None, "xla"])
@pytest.mark.parametrize("spec", SMALL_RANGED, ids=str)
def test_equals_float64_attention_at_every_small_spec(spec: RangedArgSpec, backend: str | None):
    args = spec.arrays("float32")
    assert [(x.shape, x.dtype) for x in args] == [(x.shape, x.dtype) for x in spec.shapes("float32")]
    out = jax.jit(partial(ranged_attention, backend=backend))(*args)
    np.testing.assert_allclose(out, reference(*args), atol=3e-6)  # as above


@pytest.mark.parametrize("spec", [spec for specs in REAL_RANGED.values() for spec in specs], ids=str)
def test_arguments_of_the_real_models_are_accepted(spec: RangedArgSpec):
    out = jax.eval_shape(ranged_attention, *spec.shapes("bfloat16"))
    assert (out.shape, out.dtype) == ((spec.batch, spec.length, spec.heads, spec.head_dim), jnp.float32)


class TestRefusals:
    """Both ops name what doesn't fit."""

    def test_an_unknown_backend_is_named_beside_the_known_ones(self):
        query, keys, bounds = jnp.zeros((2, 4, 3, 8)), jnp.zeros((2, 2, 5, 8)), jnp.zeros((2, 3), jnp.int32)
        with pytest.raises(ValueError, match="ranged_attention has no backend 'mosaic': expected one of xla"):
            ranged_attention(query, keys, keys, bounds, bounds, backend="mosaic")
        with pytest.raises(ValueError, match="paged_attention has no backend 'mosaic': expected one of xla"):
            paged_attention(query, keys, keys, bounds, bounds, bounds, backend="mosaic")

    @pytest.mark.parametrize(
        "misfit",
        [
            {"query": (2, 3, 3, 8)},  # H is not a multiple of K
            {"query": (2, 4, 3, 7)},
            {"query": (2, 4, 8)},
            {"key": (2, 2, 6, 8)},
            {"start": (2, 4)},
            {"stop": (3, 3)},
            {"page_table": (3, 5)},
            {"page_table": (2,)},
        ],
        ids=str,
    )
    def test_shapes_that_do_not_fit_together_are_named(self, misfit: dict[str, tuple[int, ...]]):
        fitting = {
            "query": (2, 4, 3, 8),
            "key": (2, 2, 5, 8),
            "value": (2, 2, 5, 8),
            "page_table": (2, 6),
            "start": (2, 3),
            "stop": (2, 3),
        }
        query, key, value, table, start, stop = (jnp.zeros(shape, jnp.int32) for shape in (fitting | misfit).values())
        shape = ".*".join(re.escape(str(shape)) for shape in misfit.values())
        with pytest.raises(ValueError, match=f"paged_attention: .*{shape}"):
            paged_attention(query, key, value, table, start, stop)
        if "page_table" not in misfit:
            with pytest.raises(ValueError, match=f"ranged_attention: .*{shape}"):
                ranged_attention(query, key, value, start, stop)

    def test_keys_of_another_batch_are_refused(self):
        query, keys, bounds = jnp.zeros((2, 4, 3, 8)), jnp.zeros((1, 2, 5, 8)), jnp.zeros((2, 3), jnp.int32)
        with pytest.raises(ValueError, match="ranged_attention"):
            ranged_attention(query, keys, keys, bounds, bounds)


def test_the_gradient_through_blocks_is_that_of_plain_attention():
    length = BLOCK + 40
    query, key, value = arrays(0, 1, 2, 1, length, length, 8)
    start, stop = segments(1, length, length)

    def plain(query, key, value):
        key, value = (jnp.repeat(x, 2, axis=1) for x in (key, value))
        scores = jnp.einsum("bhtd,bhsd->bhts", query, key) / jnp.sqrt(8.0)
        slots = jnp.arange(length)
        readable = ((slots >= start[..., None]) & (slots < stop[..., None]))[:, None]
        weights = jnp.where(readable, jax.nn.softmax(jnp.where(readable, scores, -1e30), axis=-1), 0)
        return jnp.einsum("bhts,bhsd->bhtd", weights, value).swapaxes(1, 2)

    def loss(attention):
        return lambda *x: jnp.sum(jnp.sin(attention(*x)))

    expected = jax.grad(loss(plain), argnums=(0, 1, 2))(query, key, value)
    bounds = jnp.asarray(start), jnp.asarray(stop)
    found = jax.grad(loss(lambda *x: ranged_attention(*x, *bounds)), argnums=(0, 1, 2))(query, key, value)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


LAYER = """
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from deepstack_jax.config import VisionConfig
from deepstack_jax.models.rope import patch_rotation
from deepstack_jax.models.vision import VisionBlock, patch_geometry

config = VisionConfig(depth=1, hidden_size=288, intermediate_size=1076, num_heads=4, out_hidden_size=2048,
                      num_position_embeddings=2304)
graphdef, state = nnx.split(VisionBlock(config, dtype=jnp.float32, rngs=nnx.Rngs(0)))
geometry = patch_geometry(config, np.asarray([[1, 128, 128]]))

@jax.jit
def layer(state, hidden, geometry):
    rotation = patch_rotation(config.rope_theta, config.head_dim, jnp.asarray(geometry.coordinates))
    bounds = jnp.asarray(geometry.segment_start), jnp.asarray(geometry.segment_stop)
    return nnx.merge(graphdef, state)(hidden, rotation, *bounds)

hidden = jax.random.normal(jax.random.key(0), (16384, 288))
out = layer(state, hidden, geometry)
assert bool(jnp.isfinite(out).all())
# not getrusage: its maximum includes the parent's memory from before exec
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.slow
def test_a_vision_layer_over_2048_by_2048_pixels_runs_within_1_gib():
    child = subprocess.run(
        [sys.executable, "-c", LAYER], capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"}
    )
    assert child.returncode == 0, child.stderr
    assert int(child.stdout) * 1024 <= 2**30  # the scores of 4 heads alone would take 4 GiB
