"""What the two TPU kernels of fused_moe share: the chip's sizes, blocks of weights, products."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128


class TpuSpec(NamedTuple):
    """The properties of a chip on which tile sizes depend."""

    vmem: int  # bytes per core
    cores: int  # cores that share HBM and run one program
    matrix_unit: int  # rows and columns of the matrix unit

    @property
    def room(self) -> int:
        """Bytes of VMEM for a kernel's arrays; the compiler may add 1/16 of that, and XLA has the rest."""
        return self.vmem * 13 // 16


def tpu_spec() -> TpuSpec:
    """Returns the spec of the chip that is compiled for; without a TPU, that of the smallest one."""
    if not pltpu.is_tpu_device():
        return TpuSpec(vmem=64 << 20, cores=1, matrix_unit=128)
    info = pltpu.get_tpu_info()
    return TpuSpec(info.vmem_capacity_bytes, info.num_cores, info.mxu_column_size)


def blocks(inner: int, cores: int = 1) -> list[int]:
    """Returns the sizes that divide F into equal blocks of whole lanes, the largest first.

    If the lanes allow it, each of `cores` has the same number of blocks.
    """
    most = inner // cores if inner % (cores * LANES) == 0 else inner
    return [b for b in range(most, 0, -LANES) if most % b == 0]


def bytes_of_values(rows: int, width: int, block: int, dtype: Any) -> int:
    """Returns the bytes of VMEM for the values of [rows, D]: gate, up, activation, result and sum, in float32."""
    passes = 4 if dtype == jnp.float32 else 1  # each float32 operand is split into three bfloat16 ones
    return passes * rows * (3 * block + 2 * width) * 4


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns a @ b in float32: bfloat16 products are exact; float32 takes several passes, summed in short pieces."""
    if a.dtype == jnp.bfloat16:
        return jnp.dot(a, b, precision=jax.lax.Precision.DEFAULT, preferred_element_type=jnp.float32)
    pieces = (slice(at, at + LANES) for at in range(0, a.shape[1], LANES))
    first, *rest = (jnp.dot(a[:, piece], b[piece], precision=jax.lax.Precision.HIGHEST) for piece in pieces)
    return sum(rest, first)


def dot_of_columns(columns: list[jax.Array], weights_ref: Any) -> jax.Array:
    """Returns x @ weights for an x that is given as one or two blocks of columns."""
    size = columns[0].shape[1]
    first, *rest = (dot(x, weights_ref[i * size : (i + 1) * size]) for i, x in enumerate(columns))
    return first + rest[0] if rest else first


def weight_specs(block_at: Callable[..., tuple[Any, Any]], width: int, inner: int, block: int) -> list[pl.BlockSpec]:
    """Returns block specs of gate, up and down; block_at(*grid indices, *scalars) returns the expert and block of F.

    Gate and up are blocks of the same array. A block that is the same as in the previous step isn't fetched again.
    """

    def columns(first: int) -> Callable[..., tuple[Any, ...]]:
        def index(*args: Any) -> tuple[Any, ...]:
            expert, number = block_at(*args)
            return expert, 0, first + number

        return index

    return [
        pl.BlockSpec((None, width, block), columns(0)),
        pl.BlockSpec((None, width, block), columns(inner // block)),
        pl.BlockSpec((None, block, width), lambda *args: (*block_at(*args), 0)),
    ]


def compiler_params(vmem: int) -> pltpu.CompilerParams:
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "arbitrary", "arbitrary"),
        vmem_limit_bytes=vmem + vmem // 16 + (1 << 20),  # XLA keeps the rest
        # every index comes from a sort of checked indices, and each row copy would be checked again
        disable_bounds_checks=True,
    )
