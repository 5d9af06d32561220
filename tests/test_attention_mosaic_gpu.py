"""Attention for Hopper in Pallas' interpreter, which raises on races, reads out of bounds and unsound barriers.

Memory that was never written reads as NaN there.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from pallas_kernels import attention, dispatch, hopper
from pallas_kernels.attention import mosaic_gpu, xla_paged, xla_ranged
from pallas_kernels.attention.arg_specs import ArgSpec, PagedArgSpec, RangedArgSpec
from tests import float64
from tests.interpreters import on_gpu
from tests.test_paged_attention import arrays, assert_same_bits, moved, with_other_neighbours

PAGED = {
    "decode": PagedArgSpec(2, 8, 2, 1, 700, 64),  # two splits
    "decode in a window": PagedArgSpec(3, 3, 3, 1, 300, 80, page=16, window=90),
    "a few tokens": PagedArgSpec(2, 8, 1, 7, 600, 128, page=256),
    "chunk": PagedArgSpec(1, 4, 2, 80, 300, 64),  # two tiles
    "chunk in a window": PagedArgSpec(2, 8, 1, 20, 200, 96, page=32, window=60),
}
RANGED = {
    "one token": RangedArgSpec(2, 6, 2, 1, 40, 128),
    "segments": RangedArgSpec(1, 3, 3, 150, 150, 72, segments=4),
    "causal": RangedArgSpec(1, 2, 2, 300, 300, 64),  # with blocks that all rows read whole
    "fewer keys than a block": RangedArgSpec(2, 6, 2, 9, 13, 20),
}
H100 = dispatch.Chip("cuda", "NVIDIA H100 80GB HBM3")


@pytest.fixture(autouse=True)
def interpreter() -> Iterator[None]:
    with on_gpu():
        yield


@cache
def jitted(paged: bool = True):
    return jax.jit(mosaic_gpu.paged_attention if paged else mosaic_gpu.ranged_attention)


def assert_as_exact_as_the_plain_form(spec: ArgSpec) -> None:
    """Beside float64. Both round the weights to bfloat16 once, and sums run in another order: a tenth is allowed."""
    args = spec.arrays("bfloat16")
    is_paged = isinstance(spec, PagedArgSpec)
    expected = (float64.paged_attention if is_paged else float64.ranged_attention)(*args)
    plain = (xla_paged.paged_attention if is_paged else xla_ranged.ranged_attention)(*args)
    out = jitted(is_paged)(*args)
    assert out.dtype == jnp.float32
    assert np.abs(out - expected).max() <= 1.1 * np.abs(plain - expected).max()


@pytest.mark.slow  # seconds per call
class TestResults:
    @pytest.mark.parametrize("name", PAGED)
    def test_paged(self, name: str):
        assert_as_exact_as_the_plain_form(PAGED[name])

    @pytest.mark.parametrize("name", RANGED)
    def test_ranged(self, name: str):
        assert_as_exact_as_the_plain_form(RANGED[name])

    @pytest.mark.parametrize("name", ["decode", "chunk"])
    def test_another_dtype_is_the_float32_result_rounded(self, name: str):
        args = PAGED[name].arrays("bfloat16")
        rounded = jax.jit(partial(mosaic_gpu.paged_attention, dtype=jnp.bfloat16))(*args)
        assert rounded.dtype == jnp.bfloat16
        np.testing.assert_array_equal(rounded, jitted()(*args).astype(jnp.bfloat16))

    @pytest.mark.parametrize("length", [2, 70])
    def test_keys_that_no_row_reads_may_be_nan_even_between_ranges(self, length: int):
        query, key, value, start, stop = RangedArgSpec(1, 2, 1, length, 300, 64).arrays("bfloat16")
        start, stop = jnp.full_like(start, 200), jnp.full_like(stop, 290)
        start, stop = start.at[0, 0].set(3), stop.at[0, 0].set(20)
        expected = float64.ranged_attention(query, key, value, start, stop)
        slot = jnp.arange(300)
        unread = ~(((slot >= 3) & (slot < 20)) | ((slot >= 200) & (slot < 290)))[:, None]
        key, value = (jnp.where(unread, jnp.nan, x) for x in (key, value))
        out = jitted(False)(query, key, value, start, stop)
        np.testing.assert_allclose(out, expected, rtol=0, atol=2**-7)  # weights rounded to bfloat16

    @pytest.mark.parametrize("name", ["decode", "chunk"])
    def test_a_range_without_keys_gives_zero_and_reads_nothing(self, name: str):
        query, key_pages, value_pages, page_table, start, stop = PAGED[name].arrays("bfloat16")
        nan = jnp.full_like(key_pages, jnp.nan)
        assert not np.any(jitted()(query, nan, nan, page_table, jnp.full_like(start, 7), jnp.full_like(stop, 7)))
        out = jitted()(query, key_pages, value_pages, page_table, start, stop.at[0, 0].set(0))
        assert not np.any(out[0, 0])
        assert np.all(np.any(out.reshape(-1, out.shape[-1])[out.shape[2] :], axis=-1))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")  # unread keys are infinite
class TestBits:
    """A row's bits are a function of the shapes and of what the row reads."""

    @pytest.mark.parametrize("name", ["decode", "a few tokens", "chunk in a window"])
    def test_do_not_depend_on_pages_slots_neighbours_or_capacity(self, name: str):
        args, rng = arrays(PAGED[name], "bfloat16"), np.random.default_rng(0)
        expected = np.asarray(jitted()(*args))
        assert np.all(np.isfinite(expected))
        assert_same_bits(jitted()(*moved(args, 9, 5, rng)), expected)
        for row, slot in ((0, 1), (1, 1)):
            out = np.asarray(jitted()(*with_other_neighbours(args, row, slot, rng)))
            assert_same_bits(out[slot], expected[row])

    def test_do_not_depend_on_the_other_queries_of_a_chunk(self):
        query, key_pages, value_pages, page_table, start, stop = arrays(PAGED["chunk"], "bfloat16")
        expected = np.asarray(jitted()(query, key_pages, value_pages, page_table, start, stop))[:, :40]
        query, stop = query.copy(), stop.copy()
        query[:, :, 40:], stop[:, 40:] = np.nan, start[:, 40:]
        out = np.asarray(jitted()(query, key_pages, value_pages, page_table, start, stop))
        assert_same_bits(out[:, :40], expected)
        assert not np.any(out[:, 40:])

    def test_do_not_depend_on_whether_the_other_queries_read_a_block_whole(self):
        query, key, value, start, stop = (np.asarray(x) for x in RANGED["causal"].arrays("bfloat16"))
        expected = np.asarray(jitted(False)(query, key, value, start, stop))
        other = start.copy()
        other[:, ::2] += 5 * (stop[:, ::2] > 5)
        out = np.asarray(jitted(False)(query, key, value, other, stop))
        assert_same_bits(out[:, 1::2], expected[:, 1::2])
        assert np.any(out[:, 10::2] != expected[:, 10::2])

    def test_a_split_that_only_another_token_reads_leaves_even_the_sign_of_zero(self):
        """The first page's values are tiny and negative; the second's weight makes an underflow of them."""
        query = jnp.full((1, 1, 2, 64), 8, jnp.bfloat16)
        key_pages, value_pages = jnp.zeros((2, 7, 1, 128, 64), jnp.bfloat16)
        key_pages, value_pages = key_pages.at[2].set(80 / 64), value_pages.at[1].set(-1e-30)
        page_table, start = jnp.asarray([[1, 2, 3, 4, 5]], jnp.int32), jnp.zeros((1, 2), jnp.int32)
        outs = [
            np.asarray(
                jitted()(query, key_pages, value_pages, page_table, start, jnp.asarray([[256, stop]], jnp.int32))
            )
            for stop in (256, 640)
        ]
        assert np.all(outs[0] == 0)
        assert_same_bits(outs[1][:, 0], outs[0][:, 0])


@pytest.mark.slow
def test_the_gradient_is_the_plain_forms():
    *arrays, start, stop = RangedArgSpec(1, 4, 2, 40, 40, 64).arrays("bfloat16")
    weight = jax.random.normal(jax.random.key(3), (1, 40, 4, 64))  # the loss's derivative, whatever the output

    def gradient(form):
        return jax.grad(lambda *x: jnp.sum(form.ranged_attention(*x, start, stop) * weight), (0, 1, 2))(*arrays)

    for got, expected in zip(gradient(mosaic_gpu), gradient(xla_ranged), strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("name", ["decode", "chunk"])
def test_a_result_varies_over_the_mesh_as_the_plain_forms_does(name: str):
    """Otherwise a program that has both, one for each platform, isn't valid in shard_map."""
    mesh = jax.make_mesh((1,), ("tensor",), axis_types=(AxisType.Auto,))
    heads, none = PartitionSpec(None, "tensor"), PartitionSpec()
    types = []

    def both(*args):
        outs = [form(*args) for form in (mosaic_gpu.paged_attention, xla_paged.paged_attention)]
        types.extend(jax.typeof(out) for out in outs)
        return outs[0]

    specs = {"in_specs": (heads, heads, heads, none, none, none), "out_specs": PartitionSpec(None, None, "tensor")}
    jax.eval_shape(jax.shard_map(both, mesh=mesh, **specs), *PAGED[name].shapes("bfloat16"))
    assert types[0] == types[1]
    assert types[0].manual_axis_type.varying == {"tensor"}


class TestUnsupported:
    @pytest.mark.parametrize(
        ("spec", "dtype", "reason"),
        [
            (PAGED["decode"], "float32", "queries are float32, not bfloat16"),
            (replace(PAGED["decode"], context=0), "bfloat16", "are empty"),
            (replace(PAGED["decode"], head_dim=72), "bfloat16", "h = 72 is not a multiple of 16"),
            (replace(PAGED["decode"], head_dim=256), "bfloat16", "h = 256 is more than 128"),
            (replace(PAGED["decode"], page=48), "bfloat16", "page = 48 is neither"),
            (replace(PAGED["decode"], page=4), "bfloat16", "page = 4 is neither"),
            (RANGED["causal"], "float32", "not bfloat16"),
            (replace(RANGED["causal"], head_dim=144), "bfloat16", "h = 144 is more than 128"),
            (replace(RANGED["causal"], capacity=0), "bfloat16", "are empty"),
        ],
    )
    def test_the_reason_names_the_value(self, spec: ArgSpec, dtype: str, reason: str):
        op = "paged_attention" if isinstance(spec, PagedArgSpec) else "ranged_attention"
        with pytest.raises(NotImplementedError, match=reason):
            jax.eval_shape(getattr(mosaic_gpu, op), *spec.shapes(dtype))
        found = []
        jax.eval_shape(lambda *args: found.append(attention._automatic(op, H100, *args)), *spec.shapes(dtype))
        assert reason in found[0][1]


@pytest.mark.parametrize(
    ("chip", "is_hopper"),
    [
        (dispatch.Chip("cuda", "NVIDIA H200"), True),
        (dispatch.Chip("cuda", "NVIDIA H20", "9.0"), True),
        (dispatch.Chip("cuda", "a chip of that generation", "9.0"), True),
        (dispatch.Chip("cuda", "NVIDIA B200", "10.0"), False),
        (dispatch.Chip("cuda", "NVIDIA A100-SXM4-80GB"), False),
        (dispatch.Chip("tpu", "TPU v5 lite"), False),
    ],
)
def test_hopper_is_known_by_its_name_or_capability(chip: dispatch.Chip, is_hopper: bool):
    assert hopper.is_hopper(chip) == is_hopper
    name, why = attention._automatic("paged_attention", chip, *PAGED["decode"].arrays("bfloat16"))
    assert (name == "mosaic_gpu") == is_hopper, why
