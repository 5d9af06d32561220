"""What the compiler makes of attention on Hopper: kernels, and no score and no copy of a key in device memory."""

import re
from functools import partial
from math import prod

import jax.numpy as jnp
import pytest

from pallas_kernels import aot
from pallas_kernels.attention import paged_attention, ranged_attention
from pallas_kernels.attention.arg_specs import REAL_PAGED, REAL_RANGED, ArgSpec, PagedArgSpec, RangedArgSpec
from pallas_kernels.norm_rope_append import arg_specs as append_specs
from pallas_kernels.norm_rope_append import norm_rope_append

pytestmark = pytest.mark.gpu

MiB = 1 << 20
EVERY = [*REAL_PAGED["30B-A3B"], *REAL_RANGED["30B-A3B"], *REAL_RANGED["vision"]]
WIDEST = [max(REAL_PAGED["235B-A22B"], key=size) for size in (lambda x: x.batch, lambda x: x.length * x.context)]

# S, T and pages that fit no block; a short prompt; head dims that are swizzled otherwise, pages of less than a block
OTHERS = [
    RangedArgSpec(2, 8, 2, 301, 1001, 128),
    RangedArgSpec(2, 8, 2, 1, 1001, 96),
    RangedArgSpec(1, 32, 4, 13, 13, 128),
    PagedArgSpec(3, 8, 2, 1, 1000, 80, page=16),
    PagedArgSpec(1, 6, 2, 37, 1000, 96, page=8),
    PagedArgSpec(2, 5, 5, 130, 3000, 112, page=256, window=70),
]


@pytest.mark.parametrize(
    ("target", "spec"),
    [*(("h100", spec) for spec in EVERY + WIDEST + OTHERS), *(("h200", spec) for spec in WIDEST)],
    ids=str,
)
def test_compiles_within_its_memory(target: str, spec: ArgSpec):
    shapes = spec.shapes(jnp.bfloat16)
    is_paged = isinstance(spec, PagedArgSpec)
    compiled = aot.compile_for(target, paged_attention if is_paged else ranged_attention, *shapes)
    assert aot.kernels(compiled) == ["mosaic_gpu_v2"]
    # no loop that the host would drive
    assert not re.search(r" (while|conditional)\(", compiled.as_text())
    groups = spec.heads // spec.kv_heads
    rows, keys = spec.batch * spec.kv_heads * (spec.length * groups + 128), shapes[1]
    width = spec.head_dim + -spec.head_dim % 16
    if spec.length * groups <= 64:  # a result and 16 columns of logarithms per split; queries in tiles of 64 rows
        capacity = spec.context if is_paged else spec.capacity
        splits = min(capacity / 512, 32) + max(capacity - 16384, 0) / 2048 + 1
        bound = 4 * (width + 16) * splits * spec.batch * spec.heads + 2 * rows * width
    else:  # queries and results, ordered by key heads
        bound = 6 * rows * width
    if width > spec.head_dim or (not is_paged and spec.capacity % 8):  # padded keys and values, and padded results
        bound += 4 * prod(keys.shape[:3]) * width + 4 * rows * width
    assert compiled.memory_analysis().temp_size_in_bytes <= bound + MiB
    pages = f"[{','.join(str(n) for n in keys.shape)}]"
    assert [line for line in aot.copies(compiled, at_least=MiB) if pages in line] == []


@pytest.mark.parametrize("target", aot.GPUS)
@pytest.mark.parametrize("spec", [spec for specs in append_specs.REAL.values() for spec in specs], ids=str)
def test_tokens_are_appended_in_place(spec: append_specs.ArgSpec, target: str):
    shapes = spec.shapes(jnp.bfloat16)
    run = partial(norm_rope_append, eps=1e-6)
    compiled = aot.compile_for(target, run, *shapes, donate_argnums=(7, 8))
    assert aot.kernels(compiled) == (["mosaic_gpu_v2"] if spec.length == 1 else [])
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == 2 * prod(shapes[7].shape) * 2
    # products side by side, and float32 queries and keys of a chunk
    products = 4 * spec.batch * spec.length * (spec.heads + 2 * spec.kv_heads) * spec.head_dim
    assert memory.temp_size_in_bytes <= 2 * products + MiB
