"""Rotary position embeddings: interleaved M-RoPE for text (1-D rope is the case without sections), 2-D for patches.

Both give float32 cosines and sines; `pallas_kernels.norm_rope_append` rotates by them. Sources: RoFormer
(arXiv:2104.09864), the interleaved M-RoPE of Qwen3-VL (arXiv:2511.21631), YaRN (arXiv:2309.00071).
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from deepstack_jax.config import RopeConfig

Rotation = tuple[Float[Array, "*batch T half"], Float[Array, "*batch T half"]]


def text_rotation(rope: RopeConfig, head_dim: int, position_ids: Int[Array, "3 B T"]) -> Rotation:
    """Returns (cos, sin), each float32 [B, T, head_dim/2], for positions (time, height, width)."""
    frequencies, scale = _inverse_frequencies(rope, head_dim)
    positions = jnp.moveaxis(position_ids, 0, -1)[..., _frequency_axis(rope, head_dim)]
    angles = positions.astype(jnp.float32) * frequencies
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def patch_rotation(theta: float, head_dim: int, coordinates: Int[Array, "P 2"]) -> Rotation:
    """Returns (cos, sin), each float32 [P, head_dim/2]: first the angles of the row, then those of the column."""
    quarter = np.arange(0, head_dim // 2, 2, dtype=np.float32) / (head_dim // 2)
    angles = coordinates.astype(jnp.float32)[..., None] * (1.0 / np.float32(theta) ** quarter)
    angles = angles.reshape(len(coordinates), -1)
    return jnp.cos(angles), jnp.sin(angles)


def _frequency_axis(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Returns which of (time, height, width) each frequency uses: T H W T H W ... until height and width run out.

    The result is int32 [head_dim/2]; the remaining frequencies use time.
    """
    axis = np.zeros(head_dim // 2, np.int32)
    if rope.mrope_section:
        for which in (1, 2):
            axis[which : 3 * rope.mrope_section[which] : 3] = which
    return axis


def _inverse_frequencies(rope: RopeConfig, head_dim: int) -> tuple[np.ndarray, float]:
    """Returns (frequencies float32 [head_dim/2], factor on cos and sin)."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    plain = (1.0 / np.float32(rope.theta) ** exponents).astype(np.float32)
    if rope.rope_type == "default":
        return plain, 1.0
    if rope.rope_type == "linear":
        return plain / np.float32(rope.factor), 1.0
    return _yarn(rope, head_dim, plain)


def _yarn(rope: RopeConfig, head_dim: int, plain: np.ndarray) -> tuple[np.ndarray, float]:
    """Keeps fast frequencies and divides slow ones by the factor, with a linear ramp between (arXiv:2309.00071)."""
    trained = rope.original_max_position_embeddings or 0

    def dimension_of(rotations: float) -> float:
        """Returns the dimension that makes this many full rotations over the trained context."""
        return head_dim * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low if high != low else 0.001
    slow = np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / width, 0, 1)
    attention = rope.attention_factor
    if attention is None and rope.mscale and rope.mscale_all_dim:
        attention = _yarn_scale(rope.factor, rope.mscale) / _yarn_scale(rope.factor, rope.mscale_all_dim)
    if attention is None:
        attention = _yarn_scale(rope.factor)
    return (plain / np.float32(rope.factor) * slow + plain * (1 - slow)).astype(np.float32), attention


def _yarn_scale(factor: float, mscale: float = 1.0) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0
