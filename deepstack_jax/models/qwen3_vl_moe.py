"""The whole model of each family, and its parameters as one flat dictionary.

Parameters live outside the modules as `{dotted path: array}`, such as
`language_model.model.layers.0.self_attn.q_proj.weight`.
A pure function rebuilds the modules around them while it is traced, so everything jitted depends on `(config, params)`
alone, and a part of a model is a part of the dictionary.
"""

from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from deepstack_jax.config import ModelConfig
from deepstack_jax.models.qwen3_moe import KVCache, Qwen3MoeForCausalLM
from deepstack_jax.models.vision import PatchGeometry, VisionEncoder, VisualRows, separate_deepstack_embeds

Params = dict[str, jax.Array]


class Qwen3VLMoeForConditionalGeneration(nnx.Module):
    """A vision encoder beside the text model; text families have no `visual`."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        if config.vision:
            self.visual = VisionEncoder(config.vision, dtype=dtype, rngs=rngs)
        self.language_model = Qwen3MoeForCausalLM(config.text, dtype=dtype, rngs=rngs)
        self.num_deepstack_levels = config.num_deepstack_levels

    def get_image_features(self, pixel_values: Float[Array, "P C"], geometry: PatchGeometry) -> VisualRows:
        """The embeddings [M, D] and deepstack levels [M, N*D] of packed images and videos.

        Args:
            pixel_values: their patches [P, C*Tp*p*p], as a Hugging Face processor gives them.
            geometry: `patch_geometry(config.vision, grid_thw)`.
        """
        return separate_deepstack_embeds(self.visual(pixel_values, geometry), self.num_deepstack_levels)

    def __call__(
        self,
        input_ids: Int[Array, "B T"],
        position_ids: Int[Array, "3 B T"],
        *,
        pixel_values: Float[Array, "P C"] | None = None,
        geometry: PatchGeometry | None = None,
        visual_index: Int[Array, "B T"] | None = None,
        slots: Int[Array, "B T"] | None = None,
        cache: KVCache | None = None,
    ) -> tuple[Float[Array, "B T V"], KVCache | None]:
        """float32 logits, and the cache with these tokens in it: `Qwen3MoeForCausalLM` behind `get_image_features`.

        `visual_index` says which row of the features each visual token takes, -1 for text (processing/positions.py).

        Raises:
            ValueError: `pixel_values` without `geometry` or `visual_index`.
        """
        embeds = deepstack = None
        if pixel_values is not None:
            if geometry is None or visual_index is None:
                raise ValueError("pixel_values need their geometry and the visual_index of their tokens")
            embeds, deepstack = self.get_image_features(pixel_values, geometry)
        return self.language_model(
            input_ids,
            position_ids,
            slots=slots,
            cache=cache,
            input_embeds=embeds,
            input_deepstack_embeds=deepstack,
            visual_index=visual_index,
        )


def merge_params(config: ModelConfig, params: Params) -> Qwen3VLMoeForConditionalGeneration:
    """The modules around `params`. Parts whose parameters are missing are there in shape only and can't be run."""
    graphdef, declared = _declared(config)
    state = {path: variable.replace(params.get(_dotted(path), variable.get_value())) for path, variable in declared}
    return nnx.merge(graphdef, nnx.from_flat_state(state))


def abstract_params(config: ModelConfig, dtype: DTypeLike = jnp.float32) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every parameter, by dotted path."""
    shapes = ((path, variable.get_value().shape) for path, variable in _declared(config)[1])
    return {_dotted(path): jax.ShapeDtypeStruct(shape, dtype) for path, shape in shapes}


def logical_axes(config: ModelConfig) -> dict[str, tuple[str | None, ...]]:
    """The logical axes of every parameter, by dotted path."""
    return {_dotted(path): variable.get_metadata("out_sharding") for path, variable in _declared(config)[1]}


def init_params(config: ModelConfig, seed: int = 0, dtype: DTypeLike = jnp.float32) -> Params:
    """Random parameters, as each one's declaration says."""

    @jax.jit
    def init() -> Params:
        model = Qwen3VLMoeForConditionalGeneration(config, dtype=dtype, rngs=nnx.Rngs(seed))
        return {_dotted(path): variable[...] for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))}

    return init()


@lru_cache(maxsize=32)
def _declared(config: ModelConfig) -> tuple[nnx.GraphDef[Any], list[tuple[Any, Any]]]:
    """The modules without their parameters, and each parameter's path and declaration."""
    model = nnx.eval_shape(lambda: Qwen3VLMoeForConditionalGeneration(config, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(model)
    return graphdef, list(nnx.to_flat_state(state))


def _dotted(path: Any) -> str:
    return ".".join(str(key) for key in path)
