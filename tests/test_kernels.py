"""The kernels' public functions: every backend, at every small arg spec, against float64.

Backends for TPU and NVIDIA chips run in Pallas' interpreters.
"""

import contextlib
import re
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import fused_moe as moe_module
from pallas_kernels.fused_moe import fused_moe, mosaic_gpu, mosaic_tpu, xla
from pallas_kernels.fused_moe.arg_specs import SMALL, TILED, ArgSpec

INTERPRETED = {"mosaic_tpu": mosaic_tpu, "mosaic_gpu": mosaic_gpu}


@contextlib.contextmanager
def interpreter_of(backend: str | None):
    """The interpreter that a chip's backend runs in here: with races between copies detected, and unwritten memory NaN."""
    if backend == "mosaic_tpu":
        with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")):
            yield
    elif backend == "mosaic_gpu":
        with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
            yield
    else:
        yield


@cache
def exact(spec: ArgSpec, dtype: str, hidden_dtype: str) -> np.ndarray:
    """float64 of the arguments as they are stored, token by token."""
    hidden, gate_up, down, index, weights = spec.arrays(dtype, hidden_dtype)
    hidden = hidden.astype(dtype)  # what a product reads
    hidden, gate_up, down, weights = (np.asarray(x, np.float64) for x in (hidden, gate_up, down, weights))
    out = np.zeros_like(hidden)
    for t, (experts, shares) in enumerate(zip(np.asarray(index), weights, strict=True)):
        for expert, share in zip(experts, shares, strict=True):
            gate, up = np.split(hidden[t] @ gate_up[expert], 2)
            out[t] += share * ((gate / (1 + np.exp(-gate)) * up) @ down[expert])
    return out


@cache
def error_of_plain_form(spec: ArgSpec, dtype: str, hidden_dtype: str) -> float:
    return error_of(jax.jit(xla.fused_moe)(*spec.arrays(dtype, hidden_dtype)), spec, dtype, hidden_dtype)


def error_of(out: jax.Array, spec: ArgSpec, dtype: str, hidden_dtype: str) -> float:
    """Root mean square."""
    return float(np.sqrt(np.mean((np.asarray(out, np.float64) - exact(spec, dtype, hidden_dtype)) ** 2)))


def run(spec: ArgSpec, dtype: str, hidden_dtype: str, backend: str | None) -> jax.Array:
    with interpreter_of(backend):
        return jax.jit(lambda *args: fused_moe(*args, backend=backend))(*spec.arrays(dtype, hidden_dtype))


@pytest.mark.parametrize("backend", [None, *moe_module.BACKENDS])
class TestFusedMoe:
    """What every backend must do, or refuse with its reason."""

    @pytest.mark.parametrize(("dtype", "hidden_dtype"), [("float32", "float32"), ("bfloat16", "float32")])
    @pytest.mark.parametrize("spec", SMALL, ids=str)
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
