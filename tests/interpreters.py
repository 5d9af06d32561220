"""Pallas' interpreters of chips' kernels, made to raise where copies race and to fill unwritten memory with NaN."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as tpu_interpreter
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax._src.pallas.mosaic_gpu.interpret.shared_memory import GPULoggingInfo, HostAllocationKey
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
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_callbacks, "wgmma", _with_registers(gpu_callbacks.wgmma))
        with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
            yield


def _with_registers(wgmma: Callable[..., Any]) -> Callable[..., Any]:
    """Adds wgmma's form whose first operand is in registers, which the interpreter would take for a buffer's key."""

    def run(**operands: Any) -> Any:
        registers = np.asarray(operands["a_allocation_key_as_array"])
        if np.issubdtype(registers.dtype, np.integer):
            return wgmma(**operands)
        memory, thread = gpu_callbacks._get_shared_memory(), operands["thread"]
        info = GPULoggingInfo(operands["mesh_location"], thread, operands["source_info"])

        def buffer(name: str) -> tuple[Any, Any]:
            key = HostAllocationKey.from_array(operands[f"{name}_allocation_key_as_array"])
            transforms = gpu_callbacks._remove_noop_transforms(operands[f"{name}_transforms"])
            return key, memory.access(key, jax.tree.map(int, transforms))

        b, acc = (memory.get_buffer_content(*buffer(name), thread, logging_info=info)[0] for name in ("b", "acc"))
        assert b is not None
        assert acc is not None
        result = acc + np.matmul(registers, b, dtype=acc.dtype)
        memory.store_buffer_content(*buffer("acc"), result, thread, logging_info=info)
        return operands["token"]

    return run
