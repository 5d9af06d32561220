"""The kernels' public functions, every backend, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import deepstack_add as deepstack_module
from pallas_kernels import fused_moe as moe_module
from pallas_kernels.deepstack_add import deepstack_add
from pallas_kernels.fused_moe import fused_moe

ROUTINGS = ("random", "one expert", "one token an expert", "half of the experts empty")


def moe_arrays(tokens: int, width: int, experts: int, top_k: int, inner: int, routing: str, seed: int = 0):
    rng = np.random.default_rng(seed)
    if routing == "one expert":
        index = np.broadcast_to(np.arange(top_k), (tokens, top_k))
    elif routing == "one token an expert":
        index = np.arange(tokens * top_k).reshape(tokens, top_k) % experts
    else:
        pool = experts if routing == "random" else max(experts // 2, top_k)
        index = np.stack([rng.permutation(pool)[:top_k] for _ in range(tokens)])
    weights = rng.random((tokens, top_k))
    return (
        rng.standard_normal((tokens, width)).astype(np.float32),
        (rng.standard_normal((experts, width, 2 * inner)) / np.sqrt(width)).astype(np.float32),
        (rng.standard_normal((experts, inner, width)) / np.sqrt(inner)).astype(np.float32),
        index.astype(np.int32),
        (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32),
    )


def moe_reference(hidden, gate_up, down, index, weights) -> np.ndarray:
    """float64, token by token."""
    hidden, gate_up, down, weights = (np.asarray(x, np.float64) for x in (hidden, gate_up, down, weights))
    out = np.zeros_like(hidden)
    for t, (experts, shares) in enumerate(zip(index, weights, strict=True)):
        for expert, share in zip(experts, shares, strict=True):
            gate, up = np.split(hidden[t] @ gate_up[expert], 2)
            out[t] += share * ((gate / (1 + np.exp(-gate)) * up) @ down[expert])
    return out


@pytest.mark.parametrize("backend", [None, *moe_module.BACKENDS])
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("tokens", [1, 2, 7, 40, 200])
def test_fused_moe_equals_float64(tokens: int, routing: str, backend: str | None):
    arrays = moe_arrays(tokens, 36, 10, 3, 20, routing)
    out = jax.jit(fused_moe, static_argnames="backend")(*arrays, backend=backend)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, moe_reference(*arrays), atol=2e-6)  # float32 sums of up to 36 terms


@pytest.mark.parametrize("backend", list(moe_module.BACKENDS))
def test_fused_moe_in_bfloat16_rounds_products_operands_only(backend: str):
    arrays = moe_arrays(9, 64, 8, 2, 24, "random")
    hidden, gate_up, down = (jnp.asarray(x, jnp.bfloat16) for x in arrays[:3])
    exact = moe_reference(*(np.asarray(x, np.float32) for x in (hidden, gate_up, down)), *arrays[3:])
    out = fused_moe(hidden.astype(jnp.float32), gate_up, down, *arrays[3:], backend=backend)
    # the inner activation is rounded to 8 bits once: 2**-9 of values of about 1, averaged over 24 terms
    assert np.abs(out - exact).max() <= 2**-8
    assert fused_moe(hidden, gate_up, down, *arrays[3:], backend=backend).dtype == jnp.bfloat16


@pytest.mark.parametrize("backend", list(moe_module.BACKENDS))
def test_fused_moe_gradients_are_those_of_the_dense_sum(backend: str):
    hidden, gate_up, down, index, weights = moe_arrays(6, 12, 5, 2, 8, "random")

    def dense(hidden, gate_up, down, weights):
        gate, up = jnp.split(jnp.einsum("td,edf->tef", hidden, gate_up), 2, axis=-1)
        outs = jnp.einsum("tef,efd->ted", jax.nn.silu(gate) * up, down)
        share = jnp.zeros((6, 5)).at[jnp.arange(6)[:, None], index].add(weights)
        return jnp.sum(jnp.sin(jnp.einsum("ted,te->td", outs, share)))

    def fused(hidden, gate_up, down, weights):
        return jnp.sum(jnp.sin(fused_moe(hidden, gate_up, down, jnp.asarray(index), weights, backend=backend)))

    expected = jax.grad(dense, argnums=range(4))(hidden, gate_up, down, weights)
    for ours, theirs in zip(jax.grad(fused, argnums=range(4))(hidden, gate_up, down, weights), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-6)


@pytest.mark.parametrize("backend", [None, *deepstack_module.BACKENDS])
@pytest.mark.parametrize("level", [0, 1, 2])
def test_deepstack_add_adds_its_level_to_visual_tokens_alone(level: int, backend: str | None):
    rng = np.random.default_rng(level)
    hidden = rng.standard_normal((11, 6)).astype(np.float32)
    rows = rng.standard_normal((5, 18)).astype(np.float32)
    index = np.asarray([-1, 3, 0, -1, -1, 4, 2, 1, -1, -1, -1], np.int32)
    expected = hidden.astype(np.float64)
    for token, row in enumerate(index):
        if row >= 0:
            expected[token] += rows[row, 6 * level : 6 * level + 6]
    add = jax.jit(deepstack_add, static_argnums=3, static_argnames="backend")
    out = add(hidden, rows, index, level, backend=backend)
    np.testing.assert_allclose(out, expected, atol=1e-6)
    np.testing.assert_array_equal(out[index < 0], hidden[index < 0])


def test_what_does_not_fit_is_refused_with_its_shapes():
    hidden, gate_up, down, index, weights = moe_arrays(4, 12, 5, 2, 8, "random")
    with pytest.raises(ValueError, match=r"gate_up \(5, 16, 12\)"):
        fused_moe(hidden, gate_up.swapaxes(1, 2), down, index, weights)
    with pytest.raises(ValueError, match=r"must both be \[4, k\]"):
        fused_moe(hidden, gate_up, down, index[:3], weights)
    with pytest.raises(ValueError, match="no backend 'cuda': expected one of xla, cpu"):
        fused_moe(hidden, gate_up, down, index, weights, backend="cuda")
    rows = np.zeros((3, 24), np.float32)
    with pytest.raises(ValueError, match="level 2 is not among the 2 levels"):
        deepstack_add(hidden, rows, np.zeros(4, np.int32), 2)
    with pytest.raises(ValueError, match=r"rows \(3, 23\)"):
        deepstack_add(hidden, rows[:, 1:], np.zeros(4, np.int32), 0)
