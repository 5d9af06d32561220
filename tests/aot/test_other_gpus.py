"""NVIDIA chips other than Hopper take the plain forms, and XLA compiles them: here for a B200."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, Mesh

from pallas_kernels import aot
from pallas_kernels.attention import paged_attention, ranged_attention
from pallas_kernels.attention.arg_specs import PagedArgSpec, RangedArgSpec
from pallas_kernels.deepstack_add import arg_specs as add_specs
from pallas_kernels.deepstack_add import deepstack_add
from pallas_kernels.fused_moe import arg_specs, fused_moe

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    ("run", "shapes"),
    [
        (fused_moe, replace(arg_specs.QWEN3_VL_30B_A3B, tokens=1).shapes(jnp.bfloat16)),
        (fused_moe, replace(arg_specs.QWEN3_VL_30B_A3B, tokens=64).shapes(jnp.bfloat16)),
        (paged_attention, PagedArgSpec(8, 32, 4, 1, 4096, 128).shapes(jnp.bfloat16)),
        (ranged_attention, RangedArgSpec(1, 16, 16, 1024, 1024, 72).shapes(jnp.bfloat16)),
        (partial(deepstack_add, level=1), add_specs.REAL[1].shapes(jnp.float32, jnp.bfloat16)),
    ],
    ids=["experts of a token", "experts", "pages", "ranges", "deepstack_add"],
)
def test_a_b200_takes_the_plain_form(run: Any, shapes: Any):
    mesh = Mesh(aot.slice_devices("b200-1"), ("x",), axis_types=(AxisType.Auto,))
    assert aot.kernels(aot.compile_for(mesh, run, *shapes)) == []
