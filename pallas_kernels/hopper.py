"""What the kernels for NVIDIA's Hopper share."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from pallas_kernels.dispatch import Chip, target_chip

# The number of H100 SXM and H200, assumed where there is no chip (the interpreter).
MULTIPROCESSORS = 132

_KINDS = ("H100", "H200", "GH200", "H800", "H20")


def is_hopper(chip: Chip) -> bool:
    """Whether a chip has wgmma. A described chip has a name only (aot.py), a present one also its capability."""
    return chip.platform == "cuda" and (chip.capability == "9.0" or any(kind in chip.kind for kind in _KINDS))


def multiprocessors(*args: jax.Array) -> int:
    """Returns the number of multiprocessors of the chip that a kernel of `args` is compiled for."""
    return target_chip(*args).multiprocessors or MULTIPROCESSORS


def swizzled(row: int, dtype: DTypeLike = jnp.bfloat16) -> tuple[Any, ...]:
    """Returns the transforms that wgmma and tensor copies (TMA) call swizzle, for rows of 32, 64 or 128 bytes.

    Eight rows form a tile, in which 16-byte pieces are permuted so that neither a row's nor a column's share a bank.
    """
    tiling = plgpu.TilingTransform((8, row))  # pyright: ignore[reportAbstractUsage]
    return tiling, plgpu.SwizzleTransform(row * jnp.dtype(dtype).itemsize)  # pyright: ignore[reportAbstractUsage]


def wait_for_the_last(consumed: Any, steps: jax.Array, buffers: int, first: int = 0) -> None:
    """Waits for the barriers' last phases, for which no copy waited: a kernel must not end while they are pending."""

    @pl.loop(jnp.maximum(steps - buffers, 0), steps)
    def _(step: jax.Array) -> None:
        plgpu.barrier_wait(consumed.at[first + jax.lax.rem(step, buffers)])


def params(hands_over_by_barrier: bool = False, approximate: bool = False) -> Any:
    """Returns the compiler's parameters.

    By default, the threads of a warp group synchronise around each store and before each copy into shared memory. A
    kernel doesn't need that if every buffer passes from its writers to its readers, and back, by a barrier, or by a
    commit_smem or wait_smem_to_gmem (which end with one).

    Args:
        hands_over_by_barrier: the kernel hands over every buffer in that way.
        approximate: exponentials and logarithms are the chip's instructions, whose relative error is about 2**-22.
    """
    return plgpu.CompilerParams(
        lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
        unsafe_no_auto_barriers=hands_over_by_barrier,
        approx_math=approximate,
    )
