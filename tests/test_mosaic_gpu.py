"""The Hopper kernels in Pallas' interpreter, which raises on races, reads out of bounds and unsound barriers.

Memory that was never written reads as NaN there.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AxisType, PartitionSpec

from pallas_kernels import hopper
from pallas_kernels.deepstack_add import mosaic_gpu as deepstack_gpu
from pallas_kernels.deepstack_add import xla as deepstack_xla
from pallas_kernels.fused_moe import mosaic_gpu, xla
from pallas_kernels.fused_moe.arg_specs import ODD, ROUTINGS, TILED, ArgSpec
from tests.interpreters import on_gpu

pytestmark = pytest.mark.slow  # an interpreter takes seconds per call


@pytest.fixture(autouse=True)
def interpreter():
    with on_gpu():
        yield


def assert_like_the_plain_form(out: jax.Array, args: tuple[jax.Array, ...]) -> None:
    """Both round the activation to bfloat16 once; sums in another order flip some of those: 2**-8 of the largest."""
    expected = np.asarray(xla.fused_moe(*args), np.float32)
    assert out.dtype == args[0].dtype
    np.testing.assert_allclose(np.asarray(out, np.float32), expected, rtol=0, atol=2**-8 * np.abs(expected).max())


class TestRegimes:
    """Each regime by itself, on both sides of where it is chosen."""

    @pytest.mark.parametrize("tokens", [1, 9, 64])
    @pytest.mark.parametrize("routing", ROUTINGS)
    def test_decode(self, tokens: int, routing):
        args = replace(TILED, tokens=tokens, routing=routing).arrays("bfloat16")
        assert_like_the_plain_form(jax.jit(mosaic_gpu._decode)(*args), args)

    @pytest.mark.parametrize("routing", ROUTINGS)
    def test_prefill_of_64_rows_per_tile(self, routing):
        args = replace(TILED, tokens=70, routing=routing).arrays("bfloat16")
        assert_like_the_plain_form(jax.jit(mosaic_gpu._prefill)(*args), args)

    def test_prefill_of_128_rows_per_tile(self):
        args = replace(TILED, tokens=200).arrays("bfloat16", "bfloat16")  # 400 rows of 6 experts
        assert_like_the_plain_form(jax.jit(mosaic_gpu._prefill)(*args), args)

    def test_the_empty_half_of_an_experts_last_tile_is_neither_computed_nor_read(self):
        """What nobody wrote is NaN. Experts have 130, 64, 65 and 1 rows; tiles have 128."""
        spec = ArgSpec(260, width=128, experts=4, top_k=1, inner=128)
        hidden, gate_up, down, _, weights = spec.arrays("bfloat16")
        index = jnp.repeat(jnp.arange(4), jnp.array([130, 64, 65, 1]), total_repeat_length=260)[::-1, None]

        @jax.jit
        def products(hidden, gate_up, down, index, weights):
            rows = mosaic_gpu._sorted_rows(index, weights, 4, 128)
            inner = mosaic_gpu._prefill_gate_up(hidden.astype(gate_up.dtype), gate_up, rows, 2)
            return inner, mosaic_gpu._prefill_down(inner, down, rows, 2)

        args = hidden, gate_up, down, index.astype(jnp.int32), weights
        for product in products(*args):
            unwritten = np.isnan(np.asarray(product, np.float32)).reshape(-1, 64 * product.shape[1]).all(axis=1)
            assert np.flatnonzero(unwritten[:10]).tolist() == [3, 5, 9]  # the second tile's, the third's, the last's
        assert_like_the_plain_form(jax.jit(mosaic_gpu._prefill)(*args), args)

    def test_prefill_of_one_token(self):
        args = TILED.arrays("bfloat16")
        assert_like_the_plain_form(jax.jit(mosaic_gpu._prefill)(*args), args)

    @pytest.mark.parametrize("regime", [mosaic_gpu._decode, mosaic_gpu._prefill])
    def test_a_width_that_is_an_odd_multiple_of_128(self, regime):
        args = ArgSpec(3, width=384, experts=5, top_k=2, inner=128).arrays("bfloat16")
        assert_like_the_plain_form(jax.jit(regime)(*args), args)

    def test_more_items_than_blocks(self, monkeypatch):
        monkeypatch.setattr(hopper, "MULTIPROCESSORS", 2)
        args = replace(TILED, tokens=5).arrays("bfloat16")
        assert_like_the_plain_form(jax.jit(mosaic_gpu._prefill)(*args), args)

    @pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # inf * 0 in the interpreter
    def test_an_overflow_of_one_expert_stays_with_its_tokens(self):
        hidden, gate_up, down, index, weights = replace(TILED, tokens=4).arrays("bfloat16")
        index = jnp.array([[0, 1], [2, 3], [2, 4], [5, 3]], jnp.int32)
        down = down.at[0].set(jnp.inf)
        for regime in (mosaic_gpu._decode, mosaic_gpu._prefill):
            out = jax.jit(regime)(hidden, gate_up, down, index, weights)
            assert not jnp.isfinite(out[0]).any()
            assert jnp.isfinite(out[1:]).all()


class TestSlots:
    @pytest.mark.parametrize("routing", ROUTINGS)
    @pytest.mark.parametrize("tokens", [1, 40])
    def test_every_active_expert_has_a_slot(self, tokens: int, routing):
        spec = replace(ODD, tokens=tokens, routing=routing)
        index = np.asarray(spec.arrays("bfloat16")[3])
        slots = mosaic_gpu._slots(jnp.asarray(index), spec.experts)
        active = np.unique(index[index >= 0])
        *experts, count = np.asarray(slots.expert)
        assert len(experts) == min(spec.experts, index.size)
        assert count == len(active)
        np.testing.assert_array_equal(experts[:count], active)
        assert set(experts[count:]) <= {spec.experts}
        np.testing.assert_array_equal(slots.up_to(jnp.asarray(active)) - 1, np.arange(len(active)))


class TestSortedRows:
    @pytest.mark.parametrize("tile", [64, 128])
    @pytest.mark.parametrize("routing", ROUTINGS)
    @pytest.mark.parametrize("tokens", [1, 40, 700])
    def test_every_choice_has_a_row_of_a_tile_of_its_expert(self, tokens: int, routing, tile: int):
        spec = replace(ODD, tokens=tokens, routing=routing)
        *_, index, weights = spec.arrays("bfloat16")
        rows = mosaic_gpu._sorted_rows(index, weights, spec.experts, tile)
        token, choice = np.nonzero(np.asarray(index) >= 0)
        row, expert = rows.of_choice[token, choice], index[token, choice]
        assert len(np.unique(row)) == len(row)
        np.testing.assert_array_equal(rows.expert[row // tile], expert)
        np.testing.assert_array_equal(rows.token[row], token)
        assert np.sum(np.asarray(rows.token) >= 0) == len(row)
        np.testing.assert_array_equal(rows.share[row], weights[token, choice])
        counts = np.bincount(expert)
        assert rows.count.item() == np.sum(pl.cdiv(counts, tile)) == len(np.unique(row // tile))


class TestTransforms:
    SPEC = replace(TILED, tokens=2)

    def test_gradient_is_the_plain_forms(self):
        hidden, gate_up, down, index, weights = self.SPEC.arrays("bfloat16")

        def loss(moe, hidden, weights):
            return jnp.sum(moe(hidden, gate_up, down, index, weights) ** 2)

        of_kernel, of_plain = (
            jax.grad(loss, (1, 2))(moe, hidden, weights) for moe in (mosaic_gpu.fused_moe, xla.fused_moe)
        )
        for got, expected in zip(of_kernel, of_plain, strict=True):
            # the loss's derivative by the output, of which the kernel's differs as above
            np.testing.assert_allclose(got, expected, rtol=0, atol=2**-7 * np.abs(expected).max())

    def test_vmap_over_tokens(self):
        hidden, gate_up, down, index, weights = self.SPEC.arrays("bfloat16")
        batch = hidden[:, None], index[:, None], weights[:, None]
        run = jax.vmap(lambda h, i, w: mosaic_gpu.fused_moe(h, gate_up, down, i, w))
        assert_like_the_plain_form(run(*batch)[:, 0], (hidden, gate_up, down, index, weights))

    def test_in_a_loop(self):
        hidden, *rest = self.SPEC.arrays("bfloat16")

        @jax.jit
        def twice(hidden):
            return jax.lax.while_loop(
                lambda state: state[0] < 2,
                lambda state: (state[0] + 1, mosaic_gpu.fused_moe(state[1], *rest)),
                (0, hidden),
            )[1]

        assert_like_the_plain_form(twice(hidden), (xla.fused_moe(hidden, *rest), *rest))

    @pytest.mark.parametrize("tokens", [2, 65])
    def test_in_shard_map_with_experts_over_devices(self, tokens: int):
        """Each of the devices adds its own experts' part. One device is enough to check what varies over the axis."""
        args = replace(TILED, tokens=tokens).arrays("bfloat16")
        mesh = jax.make_mesh((1,), ("expert",), axis_types=(AxisType.Auto,))
        split, whole = PartitionSpec("expert"), PartitionSpec()

        def part(hidden, gate_up, down, index, weights):
            return jax.lax.psum(mosaic_gpu.fused_moe(hidden, gate_up, down, index, weights), "expert")

        with jax.set_mesh(mesh):
            run = jax.shard_map(part, in_specs=(whole, split, split, whole, whole), out_specs=whole)
            assert_like_the_plain_form(jax.jit(run)(*args), args)


class TestUnsupported:
    @pytest.mark.parametrize(
        ("spec", "dtype", "reason"),
        [
            (ODD, "bfloat16", "D = 36 is not a multiple of 128"),
            (replace(TILED, inner=200), "bfloat16", "F = 200 is not a multiple of 128"),
            (TILED, "float32", "not bfloat16"),
        ],
    )
    def test_reason_names_the_size(self, spec: ArgSpec, dtype: str, reason: str):
        assert reason in mosaic_gpu.unsupported(*spec.shapes(dtype))
        with pytest.raises(NotImplementedError, match=reason):
            mosaic_gpu.fused_moe(*spec.arrays(dtype))


class TestDeepstackAdd:
    INDEX = jnp.array([-1, 0, 1, -1, 4, 3, 2, -1, -1], jnp.int32)

    def args(self, dtype: str, rows_dtype: str = "bfloat16") -> tuple[jax.Array, jax.Array, jax.Array]:
        hidden = jax.random.normal(jax.random.key(0), (9, 384), dtype)
        return hidden, jax.random.normal(jax.random.key(1), (5, 3 * 384), rows_dtype), self.INDEX

    @pytest.mark.parametrize("level", [0, 1, 2])
    @pytest.mark.parametrize(("dtype", "rows_dtype"), [("float32", "bfloat16"), ("bfloat16", "float32")])
    def test_equals_the_plain_form(self, level: int, dtype: str, rows_dtype: str):
        args = self.args(dtype, rows_dtype)
        out = jax.jit(deepstack_gpu.deepstack_add, static_argnums=3)(*args, level)
        assert out.dtype == dtype
        np.testing.assert_array_equal(out, deepstack_xla.deepstack_add(*args, level))  # one addition: bit for bit

    def test_overwrites_its_argument_only_where_donated(self):
        hidden, rows, index = self.args("float32")
        before = np.array(hidden)
        deepstack_gpu.deepstack_add(hidden, rows, index, 1)
        np.testing.assert_array_equal(hidden, before)

    def test_gradient_and_vmap(self):
        hidden, rows, index = self.args("float32", "float32")

        def loss(add, hidden, rows):
            return jnp.sum(jax.vmap(lambda h: add(h, rows, index, 1))(jnp.stack([hidden, 2 * hidden])) ** 2)

        of_kernel, of_plain = (
            jax.grad(loss, (1, 2))(add, hidden, rows)
            for add in (deepstack_gpu.deepstack_add, deepstack_xla.deepstack_add)
        )
        for got, expected in zip(of_kernel, of_plain, strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-6)  # sums of two in another order

    def test_refuses_with_the_size(self):
        hidden, rows, index = jnp.zeros((4, 36)), jnp.zeros((2, 72)), jnp.zeros(4, jnp.int32)
        with pytest.raises(NotImplementedError, match="D = 36 is not a multiple of 128"):
            deepstack_gpu.deepstack_add(hidden, rows, index, 0)
