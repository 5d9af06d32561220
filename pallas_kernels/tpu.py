"""What the TPU kernels share: rows that can be copied one by one."""

from typing import Any

import jax
import jax.numpy as jnp


def pack_bf16_pairs(x: jax.Array, dtype: Any) -> jax.Array:
    """[T, D] in `dtype` as 32-bit words, since a copy can't start at every row of 16-bit numbers.

    float32 [T, D], or uint32 [T, D / 2] with column c of bfloat16 in the low half and column D / 2 + c in the high one.
    """
    if dtype == jnp.float32:
        return x.astype(dtype)

    def rounded(x: jax.Array) -> jax.Array:
        """bfloat16 in the high half of 32 bits, the low half 0. XLA would make extra passes of 16-bit steps."""
        x = jax.lax.reduce_precision(x.astype(jnp.float32), exponent_bits=8, mantissa_bits=7)
        return jax.lax.bitcast_convert_type(x, jnp.uint32)

    half = x.shape[1] // 2
    return rounded(x[:, :half]) >> 16 | rounded(x[:, half:])


def unpack_bf16_pairs(words: jax.Array) -> tuple[jax.Array, ...]:
    """The columns that `pack_bf16_pairs` packed, in float32: ([T, D],), or both halves of them."""
    if words.dtype == jnp.float32:
        return (words,)
    # a bfloat16 is the high half of the float32 of the same value
    halves = words << 16, words & jnp.uint32(0xFFFF0000)
    return tuple(jax.lax.bitcast_convert_type(half, jnp.float32) for half in halves)
