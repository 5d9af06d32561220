"""What has two forms, one for NVIDIA, which no test runs on its chip, and one for all others: both are right."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepstack_jax.models import moe
from pallas_kernels.norm_rope_append import xla


@pytest.mark.parametrize("shape", [(2, 3, 5, 16), (7, 1, 72)])
def test_both_forms_are_the_pairs_rotated_by_their_angles(shape: tuple[int, ...]):
    x, angles = (jax.random.normal(jax.random.key(i), shape) for i in range(2))
    cos, sin = (of(angles)[..., :1, : shape[-1] // 2] for of in (jnp.cos, jnp.sin))
    (first, second), c, s = np.split(np.asarray(x, np.float64), 2, axis=-1), np.asarray(cos), np.asarray(sin)
    expected = np.concatenate([first * c - second * s, second * c + first * s], axis=-1)
    for form in (xla._rotate_halves, xla._rotate_whole):
        # two products and a sum in float32 of values below 5
        np.testing.assert_allclose(form(x, cos, sin), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("choices", [1, 2, 8])
def test_both_forms_sum_each_tokens_routing_weights(choices: int):
    weights = jax.random.uniform(jax.random.key(0), (5, choices))
    expected = np.asarray(weights, np.float64).sum(axis=1)
    for form in (moe._sum_over_choices, moe._sum_by_additions):
        np.testing.assert_allclose(form(weights), expected, rtol=1e-6)  # at most seven additions in float32
