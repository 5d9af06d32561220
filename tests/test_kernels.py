"""The kernels' public functions: every backend, at every small arg spec, against float64.

Backends for TPU and NVIDIA chips run in Pallas' interpreters.
"""

import contextlib
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import deepstack_add as add_module
from pallas_kernels import dispatch
from pallas_kernels import fused_moe as moe_module
from pallas_kernels.deepstack_add import arg_specs as add_specs
from pallas_kernels.deepstack_add import deepstack_add
from pallas_kernels.fused_moe import fused_moe, mosaic_gpu, mosaic_tpu, tpu_prefill, xla
from pallas_kernels.fused_moe.arg_specs import (
    ODD,
    QWEN3_VL_30B_A3B,
    QWEN3_VL_235B_A22B,
    REAL,
    SMALL,
    TILED,
    ArgSpec,
)
from pallas_kernels.fused_moe.tpu_blocks import TpuSpec
from tests import float64
from tests.interpreters import on_gpu, on_tpu

INTERPRETED = {"mosaic_tpu": mosaic_tpu, "mosaic_gpu": mosaic_gpu}


def interpreter_of(backend: str | None) -> contextlib.AbstractContextManager[None]:
    """The interpreter that a chip's backend runs in here."""
    return {"mosaic_tpu": on_tpu, "mosaic_gpu": on_gpu}.get(backend or "", contextlib.nullcontext)()


@cache
def arrays(spec: ArgSpec, dtype: str, hidden_dtype: str) -> tuple[jax.Array, ...]:
    """The arguments, which all backends share."""
    return spec.arrays(dtype, hidden_dtype)


@cache
def exact(spec: ArgSpec, dtype: str, hidden_dtype: str) -> np.ndarray:
    """float64 of the arguments as they are stored."""
    return float64.fused_moe(*arrays(spec, dtype, hidden_dtype), read_as=jnp.dtype(dtype))


@cache
def error_of_plain_form(spec: ArgSpec, dtype: str, hidden_dtype: str) -> float:
    return error_of(jax.jit(xla.fused_moe)(*arrays(spec, dtype, hidden_dtype)), spec, dtype, hidden_dtype)


def error_of(out: jax.Array, spec: ArgSpec, dtype: str, hidden_dtype: str) -> float:
    """Root mean square."""
    return float(np.sqrt(np.mean((np.asarray(out, np.float64) - exact(spec, dtype, hidden_dtype)) ** 2)))


@cache
def jitted(backend: str | None) -> Callable[..., jax.Array]:
    """One function per backend, so that the routings of one shape share its compilation."""
    return jax.jit(partial(fused_moe, backend=backend))


def run(spec: ArgSpec, dtype: str, hidden_dtype: str, backend: str | None) -> jax.Array:
    with interpreter_of(backend):
        return jax.block_until_ready(jitted(backend)(*arrays(spec, dtype, hidden_dtype)))


def cases_of(backend: str | None) -> list[ArgSpec]:
    """All small specs, but for the GPU's interpreter, which takes 10 s for 200 tokens, only two routings of these."""
    if backend != "mosaic_gpu":
        return list(SMALL)
    return [spec for spec in SMALL if spec.tokens < 200 or spec.routing in ("random", "one expert")]


def marks_of(backend: str | None, spec: ArgSpec) -> list[pytest.MarkDecorator]:
    """An interpreter takes seconds per call: `make test` has only the smallest there."""
    return [pytest.mark.slow] if backend in INTERPRETED and spec.tokens > 2 else []


class TestFusedMoe:
    """What every backend must do, or refuse with its reason."""

    @pytest.mark.parametrize(("dtype", "hidden_dtype"), [("float32", "float32"), ("bfloat16", "float32")])
    @pytest.mark.parametrize(
        ("backend", "spec"),
        [
            pytest.param(backend, spec, id=f"{backend}-{spec}", marks=marks_of(backend, spec))
            for backend in (None, *moe_module.BACKENDS)
            for spec in cases_of(backend)
        ],
    )
    def test_error_is_no_larger_than_the_plain_forms(
        self, spec: ArgSpec, dtype: str, hidden_dtype: str, backend: str | None
    ):
        reason = refusal(spec, dtype, hidden_dtype, backend)
        if reason:
            with pytest.raises(NotImplementedError, match=re.escape(reason)):
                run(spec, dtype, hidden_dtype, backend)
            return
        out = run(spec, dtype, hidden_dtype, backend)
        assert out.dtype == hidden_dtype
        # the same roundings in another order: a tenth of their root mean square
        assert error_of(out, spec, dtype, hidden_dtype) <= 1.1 * error_of_plain_form(spec, dtype, hidden_dtype)


TPUS = {
    "v5e": TpuSpec(128 << 20, cores=1, matrix_unit=128),
    "v6e": TpuSpec(128 << 20, cores=1, matrix_unit=256),
    "v5p": TpuSpec(64 << 20, cores=2, matrix_unit=128),
    "tpu7x": TpuSpec(64 << 20, cores=1, matrix_unit=256),
}


def schedule_of(spec: ArgSpec, chip: str) -> tpu_prefill.Schedule:
    _, _, down, index, _ = spec.shapes("bfloat16")
    schedule = tpu_prefill.schedule(index, down, TPUS[chip])
    assert schedule is not None
    return schedule


class TestScheduleOnTpu:
    """How the TPU's prefill divides its work, from bytes alone."""

    @pytest.mark.parametrize(
        ("model", "tokens", "experts", "chip", "in_vmem", "parts"),
        [
            (QWEN3_VL_30B_A3B, 4096, 128, "v5e", True, 1),
            (QWEN3_VL_30B_A3B, 4096, 16, "v5p", True, 2),  # 151 MB of weights once more, or a pass of 268
            (QWEN3_VL_30B_A3B, 4096, 128, "v5p", False, 1),  # 1208
            (QWEN3_VL_30B_A3B, 16384, 128, "v6e", True, 3),
            (QWEN3_VL_235B_A22B, 1024, 16, "v5p", True, 1),
            (QWEN3_VL_235B_A22B, 2048, 16, "v5p", False, 1),
            (QWEN3_VL_235B_A22B, 2048, 16, "v5e", True, 1),
            (replace(QWEN3_VL_30B_A3B, width=2176), 1024, 16, "v5e", False, 1),  # rows of eight and a half lines
        ],
    )
    def test_rows_stay_in_vmem_where_that_moves_fewer_bytes(
        self, model: ArgSpec, tokens: int, experts: int, chip: str, in_vmem: bool, parts: int
    ):
        schedule = schedule_of(replace(model, tokens=tokens, experts=experts), chip)
        assert schedule.in_vmem == in_vmem
        assert -(-tokens // schedule.part) == parts

    @pytest.mark.parametrize("chip", TPUS)
    @pytest.mark.parametrize("spec", [spec for specs in REAL.values() for spec in specs], ids=str)
    def test_no_kernel_has_more_rows_than_indices_or_memory_for_them(self, spec: ArgSpec, chip: str):
        in_vmem, part, tiles = schedule_of(spec, chip)
        assert part * spec.top_k <= tpu_prefill.MAX_ROWS
        assert spec.inner % tiles.block == tiles.block % 128 == 0
        if in_vmem:
            assert 6 * spec.width * (part + tiles.rows) + 12 * spec.width * tiles.block <= TPUS[chip].vmem
            assert spec.inner // tiles.block % TPUS[chip].cores == 0


def refusal(spec: ArgSpec, dtype: str, hidden_dtype: str, backend: str | None) -> str | None:
    """Why a backend that runs in an interpreter refuses these arguments: only the odd ones, whose D fits no tile."""
    if backend not in INTERPRETED:
        return None
    reason = INTERPRETED[backend].unsupported(*spec.shapes(dtype, hidden_dtype))
    if replace(spec, tokens=1, routing="random") == TILED and (backend, dtype) != ("mosaic_gpu", "float32"):
        assert reason is None
    else:
        assert reason
    return reason


class TestDerivatives:
    """The gradient of every backend is the plain form's, which is held against finite differences in float64."""

    @pytest.mark.parametrize(
        "tokens",
        [3, pytest.param(40, marks=pytest.mark.slow)],
        # both forms of each: idle experts indexed, and scanned
    )
    def test_fused_moe_agrees_with_finite_differences(self, tokens: int):
        spec = replace(ODD, tokens=tokens, routing="a third nowhere")
        with jax.enable_x64(True):
            hidden, gate_up, down, index, weights = (jnp.asarray(x) for x in spec.arrays("float64", "float64"))

            @jax.jit
            def loss(hidden: jax.Array, gate_up: jax.Array, down: jax.Array, weights: jax.Array) -> jax.Array:
                out = exact_in_float64(hidden, gate_up, down, index, weights)
                return jnp.sum(jnp.sin(out))

            args = hidden, gate_up, down, weights.astype(jnp.float64)
            expected = jax.jit(jax.grad(loss, argnums=range(4)))(*args)
            rng = np.random.default_rng(0)
            for number, arg in enumerate(args):  # the reference itself, along one random direction of each argument
                direction = jnp.asarray(rng.standard_normal(arg.shape))
                moved = [[*args[:number], arg + sign * 1e-6 * direction, *args[number + 1 :]] for sign in (1, -1)]
                slope = (loss(*moved[0]) - loss(*moved[1])) / 2e-6
                np.testing.assert_allclose(jnp.sum(expected[number] * direction), slope, rtol=1e-6)

            args, expected = ([np.asarray(x) for x in arrays] for arrays in (args, expected))

        def loss_of(backend: str | None, hidden: jax.Array, gate_up: jax.Array, down: jax.Array, weights: jax.Array):
            return jnp.sum(jnp.sin(fused_moe(hidden, gate_up, down, index, weights, backend=backend)))

        index = np.asarray(index)
        for backend in (None, "xla", "cpu", "xla_grouped"):
            found = jax.jit(jax.grad(partial(loss_of, backend), argnums=range(4)))(*(x.astype("float32") for x in args))
            for ours, theirs in zip(found, expected, strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=0, atol=5e-6 * np.abs(theirs).max())
            of_hidden, _, _, of_weights = found
            assert not of_weights[index < 0].any()
            assert not of_hidden[(index < 0).all(axis=1)].any()

    def test_deepstack_add_is_linear(self):
        hidden, rows, index = add_specs.ODD.arrays("float32", "float32")
        weights = jax.random.normal(jax.random.key(1), hidden.shape)
        of_hidden, of_rows = jax.grad(lambda h, r: jnp.sum(weights * deepstack_add(h, r, index, 1)), (0, 1))(
            hidden, rows
        )
        np.testing.assert_array_equal(of_hidden, weights)
        expected = np.zeros_like(rows)
        expected[np.asarray(index)[index >= 0], 6:12] = weights[index >= 0]
        np.testing.assert_array_equal(of_rows, expected)


def exact_in_float64(
    hidden: jax.Array, gate_up: jax.Array, down: jax.Array, index: jax.Array, weights: jax.Array
) -> jax.Array:
    """Every token through every expert."""
    gate, up = jnp.split(jnp.einsum("td,edf->tef", hidden, gate_up), 2, axis=-1)
    outs = jnp.einsum("tef,efd->ted", gate / (1 + jnp.exp(-gate)) * up, down)
    chose = jax.nn.one_hot(index, len(gate_up), dtype=hidden.dtype)  # zeros for -1
    return jnp.einsum("ted,tke,tk->td", outs, chose, weights)


class TestTransforms:
    """vmap, shard_map over two devices, donation: on the backends that run here without an interpreter."""

    @pytest.mark.parametrize("backend", [None, "xla", "cpu", "xla_grouped"])
    def test_vmap_over_tokens_and_over_layers(self, backend: str | None):
        call = partial(fused_moe, backend=backend)
        hidden, gate_up, down, index, weights = replace(ODD, tokens=8, routing="a third nowhere").arrays("float32")
        halves = [x.reshape(2, 4, -1) for x in (hidden, index, weights)]
        over_tokens = jax.vmap(call, (0, None, None, 0, 0))(halves[0], gate_up, down, *halves[1:])
        np.testing.assert_allclose(over_tokens.reshape(8, -1), call(hidden, gate_up, down, index, weights), atol=1e-6)
        layers = jax.vmap(call, (None, 0, 0, None, None))(
            hidden, jnp.stack([gate_up, 2 * gate_up]), jnp.stack([down, down]), index, weights
        )
        np.testing.assert_allclose(layers[1], call(hidden, 2 * gate_up, down, index, weights), atol=1e-5)

    @pytest.mark.slow
    def test_shard_map_over_two_devices(self):
        flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
        code = Path(__file__).with_name("sharded_kernels.py")
        child = subprocess.run(
            [sys.executable, str(code)],
            env={**os.environ, **flags},
            capture_output=True,
            text=True,
            cwd=code.parent.parent,
        )
        assert child.returncode == 0, child.stderr

    def test_donated_hidden_states_are_overwritten(self):
        args = replace(ODD, tokens=40).arrays("float32")
        compiled = jax.jit(fused_moe, donate_argnums=0).lower(*args).compile()
        assert compiled.memory_analysis().alias_size_in_bytes == args[0].nbytes
        hidden, rows, index = add_specs.TILED.arrays("float32", "bfloat16")
        add = jax.jit(deepstack_add, static_argnums=3, donate_argnums=0)
        assert add.lower(hidden, rows, index, 1).compile().memory_analysis().alias_size_in_bytes == hidden.nbytes


class TestDeepstackAdd:
    @pytest.mark.parametrize("backend", [None, *add_module.BACKENDS])
    @pytest.mark.parametrize("rows_dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("level", [0, 2])
    @pytest.mark.parametrize("spec", add_specs.SMALL, ids=str)
    def test_adds_its_level_to_visual_tokens_only(
        self, spec: add_specs.ArgSpec, level: int, rows_dtype: str, backend: str | None
    ):
        hidden, rows, index = spec.arrays("float32", rows_dtype)
        index = jnp.where(index < 0, index, spec.visual - 1 - index)  # any row may belong to any token
        expected = np.array(hidden)
        for token, row in enumerate(np.asarray(index)):
            if row >= 0:
                expected[token] += np.asarray(rows[row], np.float32)[level * spec.width : (level + 1) * spec.width]
        call = jax.jit(deepstack_add, static_argnums=3, static_argnames="backend")
        if spec == add_specs.ODD and backend in INTERPRETED:
            with pytest.raises(NotImplementedError, match="D = 6 is not a multiple of 128"):
                call(hidden, rows, index, level, backend=backend)
            return
        with interpreter_of(backend):
            out = jax.block_until_ready(call(hidden, rows, index, level, backend=backend))
        np.testing.assert_array_equal(out, expected)


class TestDispatch:
    def test_the_automatic_choice_is_logged_once(self, caplog: pytest.LogCaptureFixture):
        dispatch.log_choice.cache_clear()
        args = replace(ODD, tokens=3).arrays("float32")
        with caplog.at_level(logging.DEBUG, "pallas_kernels"):
            fused_moe(*args)
            fused_moe(*args)
        (record,) = caplog.records
        assert "hidden (3, 36)" in record.getMessage()
        assert "cpu (the form for XLA on CPU)" in record.getMessage()

    @pytest.mark.parametrize(
        ("platform", "kind", "spec", "expected"),
        [
            ("tpu", "TPU v5 lite", TILED, "mosaic_tpu"),
            ("tpu", "TPU v5 lite", ODD, "xla"),
            ("cuda", "NVIDIA H200", TILED, "mosaic_gpu"),
            ("cuda", "NVIDIA H100 80GB HBM3", ODD, "xla_grouped"),
            ("cuda", "NVIDIA A100-SXM4-80GB", TILED, "xla_grouped"),
            ("cuda", "NVIDIA B200", TILED, "xla_grouped"),
            ("cpu", "cpu", TILED, "cpu"),
            ("rocm", "gfx942", TILED, "xla"),
        ],
    )
    def test_a_chip_gets_its_form(
        self, platform: str, kind: str, spec: ArgSpec, expected: str, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr(moe_module, "target_chip", lambda *args: dispatch.Chip(platform, kind))
        assert moe_module._automatic(*spec.arrays("bfloat16"))[0] == expected

    def test_a_program_that_xla_splits_gets_no_kernel(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(moe_module, "target_chip", lambda *args: dispatch.Chip("tpu", "TPU v5 lite"))
        mesh = jax.sharding.AbstractMesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
        found = []

        def traced(*args: jax.Array) -> jax.Array:
            found.append(moe_module._automatic(*args))
            return args[0]

        on_mesh = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        for sharding in (on_mesh, None):  # by where the arguments lie, and by the mesh in use
            args = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in TILED.shapes("bfloat16")]
            with contextlib.nullcontext() if sharding else jax.sharding.use_abstract_mesh(mesh):
                jax.eval_shape(traced, *args)
        assert [name for name, _ in found] == ["xla", "xla"]
        assert all("shard_map" in why for _, why in found)

    @pytest.mark.parametrize(("multiprocessors", "blocks"), [(114, 114), (None, 132)])
    def test_a_hopper_kernel_starts_a_block_on_each_multiprocessor(self, multiprocessors: int | None, blocks: int):
        chip = jax.sharding.AbstractDevice(device_kind="NVIDIA H100", num_cores=multiprocessors, platform="gpu")
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), abstract_device=chip)):
            run = partial(fused_moe, backend="mosaic_gpu")
            traced = jax.make_jaxpr(run)(*replace(TILED, tokens=4096).shapes("bfloat16"))
        assert re.findall(r"grid=(.*?), grid_names=\('block'", str(traced))[0] == f"({blocks},)"

    def test_what_does_not_fit_is_refused_with_its_shapes(self):
        hidden, gate_up, down, index, weights = ArgSpec(4, 12, 5, 2, 8).arrays("float32")
        with pytest.raises(ValueError, match=r"gate_up \(5, 16, 12\)"):
            fused_moe(hidden, gate_up.swapaxes(1, 2), down, index, weights)
        with pytest.raises(ValueError, match=r"must both be \[4, k\]"):
            fused_moe(hidden, gate_up, down, index[:3], weights)
        with pytest.raises(ValueError, match="no backend 'triton': expected one of xla, cpu"):
            fused_moe(hidden, gate_up, down, index, weights, backend="triton")
        rows = np.zeros((3, 24), np.float32)
        with pytest.raises(ValueError, match="level 2 is not among the 2 levels"):
            deepstack_add(hidden, rows, np.zeros(4, np.int32), 2)
        with pytest.raises(ValueError, match=r"rows \(3, 23\)"):
            deepstack_add(hidden, rows[:, 1:], np.zeros(4, np.int32), 0)
