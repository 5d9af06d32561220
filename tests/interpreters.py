"""Pallas' interpreters of chips' kernels, made to raise where copies race and to fill unwritten memory with NaN."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as tpu_interpreter
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu


@contextlib.contextmanager
def on_tpu(cores: int = 1, **options: Any) -> Iterator[None]:
    """`cores` run side by side."""
    params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", num_cores_or_threads=cores, **options)
    try:
        with pltpu.force_tpu_interpret_mode(params):
            yield
            jax.effects_barrier()  # kernels run as callbacks
        # races are recorded, not raised, and in no public place; None where no kernel ran
        assert tpu_interpreter.races is not None
        assert not tpu_interpreter.races.races_found
    finally:
        pltpu.reset_tpu_interpret_mode_state()


@contextlib.contextmanager
def on_gpu() -> Iterator[None]:
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        yield
