"""The TPU kernels in Pallas' interpreter, which sees races between copies and NaN where nothing was written.

The references are the plain forms, and float64 where the order of sums differs.
"""

from dataclasses import replace
from functools import partial
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from pallas_kernels.deepstack_add import mosaic_tpu as deepstack_add
from pallas_kernels.deepstack_add import xla as plain_deepstack_add
from pallas_kernels.fused_moe import mosaic_tpu as fused_moe
from pallas_kernels.fused_moe import tpu_prefill
from pallas_kernels.fused_moe import xla as plain_fused_moe
from pallas_kernels.fused_moe.arg_specs import ROUTINGS, TILED, ArgSpec, Routing
from pallas_kernels.fused_moe.tpu_prefill import Schedule, Tiles
from tests.interpreters import on_tpu
from tests.test_kernels import error_of, error_of_plain_form

pytestmark = pytest.mark.slow  # an interpreter takes seconds per call

REGIMES = {
    "decode": partial(fused_moe._decode, cores=1, block=384),
    "decode, blocks of F": partial(fused_moe._decode, cores=1, block=128),
    "decode, two cores": partial(fused_moe._decode, cores=2, block=128),
    **{
        f"prefill {form}{name}": partial(
            tpu_prefill.run, cores=cores, schedule=Schedule(form == "in VMEM", part, tiles)
        )
        for form in ("in VMEM", "by row copies")
        for name, cores, part, tiles in (
            ("", 1, 40, Tiles(512, 128, 384)),
            (", small tiles", 1, 40, Tiles(16, 8, 128)),
            # of three blocks of F, two cores can't take equal numbers
            (", two cores, in parts", 2, 6, Tiles(16, 16, 384 if form == "by row copies" else 192)),
        )
    },
}


def run(regime: str, *args: jax.Array, **options) -> jax.Array:
    with on_tpu(cores=2 if "two cores" in regime else 1, **options):
        return jax.block_until_ready(jax.jit(REGIMES[regime])(*args))


@pytest.mark.parametrize("regime", REGIMES)
class TestRegimesOfFusedMoe:
    @pytest.mark.parametrize("routing", ROUTINGS)
    @pytest.mark.parametrize("tokens", [1, 7, 40])
    def test_error_is_no_larger_than_the_plain_forms(self, tokens: int, routing: Routing, regime: str):
        spec = replace(TILED, tokens=tokens, routing=routing)
        out = run(regime, *spec.arrays("bfloat16"))
        assert out.dtype == jnp.float32
        # the same roundings in another order: a tenth of their root mean square
        assert error_of(out, spec, "bfloat16", "float32") <= 1.1 * error_of_plain_form(spec, "bfloat16", "float32")

    def test_float32_weights_keep_their_precision(self, regime: str):
        spec = replace(TILED, tokens=7)
        out = run(regime, *spec.arrays("float32"))
        # sums in another order; bfloat16's error is a thousand times as large
        assert error_of(out, spec, "float32", "float32") <= 2 * error_of_plain_form(spec, "float32", "float32")

    def test_hidden_of_bfloat16(self, regime: str):
        spec = replace(TILED, tokens=7)
        args = spec.arrays("bfloat16", "bfloat16")
        out = run(regime, *args)
        assert out.dtype == jnp.bfloat16
        # one rounding of a bfloat16 apart, where float32 sums fall on either side of the middle
        np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (out, plain_fused_moe.fused_moe(*args))), 1e-2)

    def test_idle_experts_and_other_tokens_experts_leave_no_trace(self, regime: str):
        hidden, gate_up, down, _, weights = replace(TILED, tokens=5).arrays("bfloat16")
        index = jnp.array([[0, 2], [2, 0], [3, 2], [0, 3], [2, 3]], jnp.int32)
        clean = run(regime, hidden, gate_up, down, index, weights)
        out = run(regime, hidden, gate_up.at[1].set(jnp.nan), down.at[0].set(jnp.inf), index, weights)
        assert not np.isfinite(out[jnp.array([0, 1, 3])]).any()
        np.testing.assert_array_equal(out[jnp.array([2, 4])], clean[jnp.array([2, 4])])

    def test_an_index_that_is_no_expert_adds_nothing(self, regime: str):
        args = list(replace(TILED, tokens=5).arrays("bfloat16"))
        args[3] = jnp.array([[0, -1], [6, 9], [-1, -1], [5, 1], [2, 6]], jnp.int32)
        # sums in another order
        np.testing.assert_allclose(run(regime, *args), plain_fused_moe.fused_moe(*args), atol=2e-6)
        nowhere = jnp.full_like(args[3], -1)
        np.testing.assert_array_equal(run(regime, *args[:3], nowhere, args[4]), jnp.zeros_like(args[0]))


class TestFusedMoe:
    @pytest.mark.parametrize(
        ("regime", "rows", "blocks"),
        [
            ("decode", 40, 1),
            ("decode, blocks of F", 40, 3),
            ("prefill in VMEM", 512, 1),
            ("prefill in VMEM, small tiles", 16, 3),
            ("prefill by row copies", 512, 1),
            ("prefill by row copies, small tiles", 16, 3),
        ],
    )
    def test_only_work_that_there_is_takes_a_step(self, regime: str, rows: int, blocks: int):
        """Each chosen expert, or each of its tiles of `rows`, takes one step per block of F."""
        args = replace(TILED, tokens=40, routing="half of the experts empty").arrays("bfloat16")
        seen = []

        def record(token, point, core):
            seen.append(tuple(map(int, point)))
            return token

        run(regime, *args, grid_point_recorder=record)
        assert len(set(seen)) == len(seen) == blocks * np.sum(pl.cdiv(np.bincount(np.ravel(args[3])), rows))

    def test_a_copy_without_a_wait_is_seen(self, monkeypatch: pytest.MonkeyPatch):
        """The check for races can fail: without its waits the kernel reads rows on their way."""
        monkeypatch.setattr(tpu_prefill, "_wait_for_rows", lambda *args: None)
        args = replace(TILED, tokens=6).arrays("bfloat16")
        with pytest.raises(Exception, match="RACE DETECTED"):
            run("prefill by row copies, small tiles", *args, dma_execution_mode="eager")

    @pytest.mark.parametrize(("limit", "owner", "regime"), [(256, fused_moe, "_decode"), (6, tpu_prefill, "run")])
    def test_the_number_of_tokens_takes_the_regime(
        self, limit: int, owner: ModuleType, regime: str, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr(fused_moe, "DECODE_TOKENS", limit)
        monkeypatch.setattr(owner, regime, lambda hidden, *args, **tiles: hidden + len(args))
        args = replace(TILED, tokens=7).arrays("bfloat16")
        np.testing.assert_array_equal(fused_moe.fused_moe(*args), args[0] + 4)

    def test_gradient_vmap_and_while_loop(self):
        hidden, gate_up, down, index, weights = replace(TILED, tokens=6).arrays("bfloat16")
        folded = (x.reshape(2, 3, -1) for x in (hidden, index, weights))

        def looped(moe, hidden: jax.Array) -> jax.Array:
            step = lambda state: (state[0] + 1, moe(state[1], gate_up, down, index, weights))  # noqa: E731
            return jax.lax.while_loop(lambda state: state[0] < 2, step, (0, hidden))[1]

        def loss(moe, hidden: jax.Array, gate_up: jax.Array) -> jax.Array:
            return jnp.sum(jnp.sin(moe(hidden, gate_up, down, index, weights)))

        plain = plain_fused_moe.fused_moe
        with on_tpu():
            axes = (0, None, None, 0, 0)
            by_two, by_three, by_four = folded
            batched = jax.vmap(fused_moe.fused_moe, axes)(by_two, gate_up, down, by_three, by_four)
            twice = jax.jit(partial(looped, fused_moe.fused_moe))(hidden)
            gradients = jax.grad(partial(loss, fused_moe.fused_moe), (0, 1))(hidden, gate_up)
        # sums in another order
        one = plain(hidden, gate_up, down, index, weights)
        np.testing.assert_allclose(batched.reshape(one.shape), one, atol=2e-6)
        np.testing.assert_allclose(twice, looped(plain, hidden), atol=1e-4)
        for gradient, expected in zip(gradients, jax.grad(partial(loss, plain), (0, 1))(hidden, gate_up), strict=True):
            np.testing.assert_allclose(
                np.asarray(gradient, np.float32), np.asarray(expected, np.float32), rtol=1e-2, atol=1e-4
            )

    @pytest.mark.parametrize(
        ("spec", "dtypes", "reason"),
        [
            (replace(TILED, width=200), ("bfloat16", "float32"), "D = 200 is not a multiple of 128"),
            (replace(TILED, inner=36), ("bfloat16", "float32"), "F = 36 is not a multiple of 128"),
            (TILED, ("float16", "float32"), "weights are float16 and float16"),
            (TILED, ("bfloat16", "float16"), "hidden is float16"),
            (replace(TILED, width=1 << 16), ("float32", "float32"), "tiles of D = 65536 don't fit into 64 MiB"),
        ],
    )
    def test_says_why_it_refuses(self, spec: ArgSpec, dtypes: tuple[str, str], reason: str):
        args = spec.shapes(*dtypes)
        assert fused_moe.unsupported(*args).startswith(reason)
        with pytest.raises(NotImplementedError, match=reason):
            jax.eval_shape(fused_moe.fused_moe, *args)


def deepstack_args(tokens: int, visual: int, rows: int, dtype: str) -> tuple[jax.Array, jax.Array, jax.Array]:
    """hidden [T, 256], rows [M, 3 * 256] and visual_index, `visual` tokens of it in no order."""
    of_hidden, of_rows, of_place, of_index = jax.random.split(jax.random.key(tokens), 4)
    places = jax.random.permutation(of_place, tokens)[:visual]
    index = jnp.full(tokens, -1, jnp.int32).at[places].set(jax.random.permutation(of_index, rows)[:visual])
    return jax.random.normal(of_hidden, (tokens, 256)), jax.random.normal(of_rows, (rows, 768), dtype), index


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
class TestDeepstackAdd:
    @pytest.mark.parametrize("level", [0, 2])
    @pytest.mark.parametrize(("tokens", "visual"), [(1, 1), (5, 0), (40, 31), (40, 32), (80, 33), (130, 130)])
    def test_is_the_plain_form_exactly(self, tokens: int, visual: int, level: int, dtype: str):
        args = deepstack_args(tokens, visual, 131, dtype)
        with on_tpu():
            out = jax.jit(deepstack_add.deepstack_add, static_argnums=3, donate_argnums=0)(
                args[0].copy(), *args[1:], level
            )
        np.testing.assert_array_equal(out, plain_deepstack_add.deepstack_add(*args, level))

    def test_reads_no_other_level(self, dtype: str):
        hidden, rows, index = deepstack_args(6, 4, 5, dtype)
        with on_tpu():
            out = deepstack_add.deepstack_add(hidden, rows.at[:, :256].set(jnp.nan).at[:, 512:].set(jnp.nan), index, 1)
        assert jnp.isfinite(out).all()

    def test_gradient_and_vmap(self, dtype: str):
        hidden, rows, index = deepstack_args(6, 4, 5, dtype)
        batches = hidden.reshape(2, 3, -1), jnp.stack([rows, -rows]), index.reshape(2, 3)

        def loss(add, hidden: jax.Array, rows: jax.Array) -> jax.Array:
            return jnp.sum(jnp.sin(jax.vmap(partial(add, level=1))(hidden, rows, batches[2])))

        plain = jax.value_and_grad(partial(loss, plain_deepstack_add.deepstack_add), (0, 1))(*batches[:2])
        with on_tpu():
            out = jax.value_and_grad(
                partial(loss, lambda *args, level: deepstack_add.deepstack_add(*args, level)), (0, 1)
            )(*batches[:2])
        jax.tree.map(np.testing.assert_array_equal, out, plain)

    def test_says_why_it_refuses(self, dtype: str):
        hidden, rows, index = deepstack_args(6, 4, 5, dtype)
        for args, reason in [
            ((hidden[:, :120], rows, index), "D = 120 is not a multiple of 128"),
            ((hidden.astype("bfloat16"), rows, index), "hidden is bfloat16, not float32"),
            ((hidden, rows.astype("float16"), index), "rows are float16"),
            ((jnp.zeros((70000, 256)), rows, jnp.zeros(70000, jnp.int32)), "T = 70000 is more than 65536"),
        ]:
            assert deepstack_add.unsupported(*args, 0).startswith(reason)
            with pytest.raises(NotImplementedError, match=reason):
                deepstack_add.deepstack_add(*args, 0)
