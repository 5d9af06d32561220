"""The vision encoder: maps patches of images and video frames to visual rows with their DeepStack levels.

The patches of an image or a video form one packed sequence; each image, and each frame of a video, is a segment that
attends only to itself. Within a segment, patches are in merge blocks: those that become one visual token are adjacent.
References: transformers' qwen3_vl and qwen3_vl_moe; DeepStack (arXiv:2406.04334).
"""

from dataclasses import dataclass
from typing import NamedTuple, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from deepstack_jax.config import VisionConfig
from deepstack_jax.models.norm import LayerNorm
from deepstack_jax.models.param import AnyArray, Linear, param
from deepstack_jax.models.rope import Rotation, patch_rotation
from pallas_kernels.attention import ranged_attention
from pallas_kernels.norm_rope_append.xla import rotate


@no_type_check  # JAX puts shapes, specifications and placeholders into it as well
@jax.tree_util.register_dataclass
@dataclass
class PatchGeometry:
    """The positions and segments of P packed patches. Padding patches have the empty segment [0, 0)."""

    coordinates: Int[AnyArray, "P 2"]  # row and column in the image
    position_index: Int[AnyArray, "P 4"]  # four neighbours in the grid of learned position embeddings
    position_weight: Float[AnyArray, "P 4"]  # bilinear weights of the four
    segment_start: Int[AnyArray, " P"]
    segment_stop: Int[AnyArray, " P"]


def patch_geometry(config: VisionConfig, grid_thw: np.ndarray, num_patches: int | None = None) -> PatchGeometry:
    """Computes on the host the geometry of images and videos with grids `grid_thw` [n, 3] (time, height, width).

    Grids count patches. `num_patches` pads the result to that many patches.
    """
    parts = [_one_geometry(config, *(int(x) for x in grid)) for grid in grid_thw]
    fields = [np.concatenate(field) for field in zip(*(part[:-1] for part in parts), strict=True)]
    frames = np.concatenate([part[-1] for part in parts])
    stops = np.cumsum(frames)
    fields += [np.repeat(bound, frames).astype(np.int32) for bound in (stops - frames, stops)]
    padding = 0 if num_patches is None else num_patches - len(fields[0])
    return PatchGeometry(*(np.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1)) for x in fields))


class VisionEncoder(nnx.Module):
    """Maps `pixel_values` and their geometry to rows [M, (1+N)*D]: visual embeddings and N DeepStack levels."""

    def __init__(self, config: VisionConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.config, self.dtype = config, jnp.dtype(dtype)
        self.patch_embed = PatchEmbed(config, dtype=dtype, rngs=rngs)
        self.pos_embed = PositionEmbedding(config, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List([VisionBlock(config, dtype=dtype, rngs=rngs) for _ in range(config.depth)])
        self.merger = PatchMerger(config, norm_after_merge=False, dtype=dtype, rngs=rngs)
        self.deepstack_merger_list = nnx.List(
            [
                PatchMerger(config, norm_after_merge=True, dtype=dtype, rngs=rngs)
                for _ in config.deepstack_visual_indexes
            ]
        )

    def __call__(self, pixel_values: Float[Array, "P C"], geometry: PatchGeometry) -> Float[Array, "M R"]:
        """Maps pixel_values [P, C*Tp*p*p] to rows [P / merge^2, (1+N)*D] in the model's dtype.

        `nnx.capture` collects its `hidden_states` after each block.
        """
        hidden = self.patch_embed(pixel_values) + self.pos_embed(geometry)
        rotation = patch_rotation(self.config.rope_theta, self.config.head_dim, jnp.asarray(geometry.coordinates))
        bounds = jnp.asarray(geometry.segment_start), jnp.asarray(geometry.segment_stop)
        levels = []
        for i, block in enumerate(self.blocks):
            with jax.named_scope(f"block{i}"):
                hidden = block(hidden, rotation, *bounds)
            self.sow(nnx.Intermediate, "hidden_states", hidden, capture_noop=True)
            if i in self.config.deepstack_visual_indexes:
                which = self.config.deepstack_visual_indexes.index(i)
                levels.append(self.deepstack_merger_list[which](hidden))
        rows = [self.merger(hidden), *levels]
        return jnp.concatenate(rows, axis=-1).astype(self.dtype)


@no_type_check  # JAX puts shapes, specifications and placeholders into it as well
class VisualRows(NamedTuple):
    """Visual rows in two arrays, as the language model takes them and as they are transferred."""

    embeds: Float[Array, "M D"]
    deepstack: Float[Array, "M ND"] | None = None  # None if N is 0


def separate_deepstack_embeds(rows: Float[Array, "M R"], num_deepstack_embeddings: int) -> VisualRows:
    """Splits rows [M, (1+N)*D] into embeddings [M, D] and DeepStack levels [M, N*D] (None if N is 0)."""
    width = rows.shape[-1] // (1 + num_deepstack_embeddings)
    return VisualRows(rows[:, :width], rows[:, width:] if num_deepstack_embeddings else None)


class PatchEmbed(nnx.Module):
    """The convolution over patches, computed as a product because its stride equals its kernel size."""

    def __init__(self, config: VisionConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        shape = config.hidden_size, config.patch_dim
        self.proj = Linear(*shape, ("vision_embed", "patch"), bias=True, dtype=dtype, rngs=rngs)

    def __call__(self, pixel_values: Float[Array, "P C"]) -> Float[Array, "P D"]:
        return self.proj(pixel_values)


class PositionEmbedding(nnx.Module):
    """A square grid of learned embeddings with bilinear interpolation between its points."""

    def __init__(self, config: VisionConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        shape = config.num_position_embeddings, config.hidden_size
        self.weight = param(rngs, shape, (None, "vision_embed"), dtype, nnx.initializers.normal(stddev=0.02))

    def __call__(self, geometry: PatchGeometry) -> Float[Array, "P D"]:
        neighbours = self.weight[...][jnp.asarray(geometry.position_index)].astype(jnp.float32)
        return jnp.sum(neighbours * jnp.asarray(geometry.position_weight)[..., None], axis=1)


class VisionAttention(nnx.Module):
    """Attention within segments with 2-D rope: [P, D] to float32 [P, D]."""

    def __init__(self, config: VisionConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        width = config.hidden_size  # also the width of all heads together
        self.head_dim, self.dtype = config.head_dim, jnp.dtype(dtype)
        self.qkv = Linear((3, width), width, (None, "vision_heads", "vision_embed"), bias=True, dtype=dtype, rngs=rngs)
        self.proj = Linear(width, width, ("vision_embed", "vision_heads"), bias=True, dtype=dtype, rngs=rngs)

    def __call__(
        self, hidden: Float[Array, "P D"], rotation: Rotation, start: jax.Array, stop: jax.Array
    ) -> Float[Array, "P D"]:
        query, key, value = jnp.moveaxis(self.qkv(hidden).reshape(len(hidden), 3, -1, self.head_dim), 1, 0)
        query, key = rotate(query, *rotation), rotate(key, *rotation)
        query, key, value = (x.astype(self.dtype).swapaxes(0, 1)[None] for x in (query, key, value))
        return self.proj(ranged_attention(query, key, value, start[None], stop[None])[0].reshape(len(hidden), -1))


class VisionMLP(nnx.Module):
    """Two products around a tanh-approximated GELU."""

    def __init__(self, config: VisionConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        embed, inner = config.hidden_size, config.intermediate_size
        self.linear_fc1 = Linear(inner, embed, ("vision_mlp", "vision_embed"), bias=True, dtype=dtype, rngs=rngs)
        self.linear_fc2 = Linear(embed, inner, ("vision_embed", "vision_mlp"), bias=True, dtype=dtype, rngs=rngs)

    def __call__(self, hidden: Float[Array, "P D"]) -> Float[Array, "P D"]:
        return self.linear_fc2(jax.nn.gelu(self.linear_fc1(hidden), approximate=True))


class VisionBlock(nnx.Module):
    """Attention and feed-forward, each behind a norm and around a residual."""

    def __init__(self, config: VisionConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.norm1 = LayerNorm(config.hidden_size, dtype=dtype, rngs=rngs)
        self.norm2 = LayerNorm(config.hidden_size, dtype=dtype, rngs=rngs)
        self.attn = VisionAttention(config, dtype=dtype, rngs=rngs)
        self.mlp = VisionMLP(config, dtype=dtype, rngs=rngs)

    def __call__(
        self, hidden: Float[Array, "P D"], rotation: Rotation, start: jax.Array, stop: jax.Array
    ) -> Float[Array, "P D"]:
        hidden = hidden + self.attn(self.norm1(hidden), rotation, start, stop)
        return hidden + self.mlp(self.norm2(hidden))


class PatchMerger(nnx.Module):
    """Merges merge x merge adjacent patches into one visual token; DeepStack levels are normalised after the merge."""

    def __init__(self, config: VisionConfig, *, norm_after_merge: bool, dtype: DTypeLike, rngs: nnx.Rngs):
        merged = config.hidden_size * config.merge_unit
        self.merge_unit = config.merge_unit
        self.norm_after_merge = norm_after_merge
        self.norm = LayerNorm(merged if norm_after_merge else config.hidden_size, dtype=dtype, rngs=rngs)
        self.linear_fc1 = Linear(merged, merged, ("vision_mlp", None), bias=True, dtype=dtype, rngs=rngs)
        self.linear_fc2 = Linear(
            config.out_hidden_size, merged, ("embed", "vision_mlp"), bias=True, dtype=dtype, rngs=rngs
        )

    def __call__(self, hidden: Float[Array, "P D"]) -> Float[Array, "M O"]:
        merged_shape = len(hidden) // self.merge_unit, -1
        if self.norm_after_merge:
            merged = self.norm(hidden.reshape(merged_shape))
        else:
            merged = self.norm(hidden).reshape(merged_shape)
        return self.linear_fc2(jax.nn.gelu(self.linear_fc1(merged), approximate=False))


def _one_geometry(config: VisionConfig, frames: int, height: int, width: int) -> tuple[np.ndarray, ...]:
    """Returns (coordinates, position_index, position_weight, patches per frame) of one image or video."""
    merge = config.spatial_merge_size
    rows, columns = np.indices((height, width), dtype=np.int32)
    blocks = height // merge, merge, width // merge, merge
    coordinates = np.stack([x.reshape(blocks).swapaxes(1, 2).ravel() for x in (rows, columns)], axis=1)

    side = round(config.num_position_embeddings**0.5)
    low, high, fraction = [], [], []
    for axis, size in enumerate((height, width)):
        at = coordinates[:, axis].astype(np.float32) * np.float32(side - 1) / np.float32(max(size - 1, 1))
        floor = np.floor(at).astype(np.int32)
        low.append(floor)
        high.append(np.minimum(floor + 1, side - 1))
        fraction.append(at - floor)
    (low_h, low_w), (high_h, high_w), (part_h, part_w) = low, high, fraction
    index = [low_h * side + low_w, low_h * side + high_w, high_h * side + low_w, high_h * side + high_w]
    weight = [(1 - part_h) * (1 - part_w), (1 - part_h) * part_w, part_h * (1 - part_w), part_h * part_w]
    fields = coordinates, np.stack(index, axis=1), np.stack(weight, axis=1)
    return *(np.tile(x, (frames, 1)) for x in fields), np.full(frames, height * width)
