"""Packing that the TPU kernels share, so that rows can be copied one by one."""

from typing import Any

import jax
import jax.numpy as jnp


def pack_bf16_pairs(x: jax.Array, dtype: Any) -> jax.Array:
    """Returns [T, D] in `dtype` as 32-bit words, because a copy can't start at every row of 16-bit numbers.

    The result is float32 [T, D]; for bfloat16 it is uint32 [T, D / 2], with column c in the low half and column
    D / 2 + c in the high half.
    """
    if dtype == jnp.float32:
        return x.astype(dtype)

    def rounded(x: jax.Array) -> jax.Array:
        """Returns bfloat16 in the high half of 32 bits, the low half 0. 16-bit steps would take XLA extra passes."""
        x = jax.lax.reduce_precision(x.astype(jnp.float32), exponent_bits=8, mantissa_bits=7)
        return jax.lax.bitcast_convert_type(x, jnp.uint32)

    half = x.shape[1] // 2
    return rounded(x[:, :half]) >> 16 | rounded(x[:, half:])


def unpack_bf16_pairs(words: jax.Array) -> tuple[jax.Array, ...]:
    """Returns the columns that `pack_bf16_pairs` packed, in float32: ([T, D],), or both halves of them."""
    if words.dtype == jnp.float32:
        return (words,)
    # a bfloat16 is the high half of the float32 of the same value
    halves = words << 16, words & jnp.uint32(0xFFFF0000)
    return tuple(jax.lax.bitcast_convert_type(half, jnp.float32) for half in halves)
