"""The whole model: a vision encoder beside the text model. Reference: transformers' qwen3_vl_moe."""

from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from deepstack_jax.config import ModelConfig
from deepstack_jax.models.qwen3_moe import KVCache, PagedKVCache, Qwen3MoeForCausalLM
from deepstack_jax.models.vision import PatchGeometry, VisionEncoder, VisualRows, separate_deepstack_embeds


class Qwen3VLMoeForConditionalGeneration(nnx.Module):
    """A vision encoder beside the text model. In text families, `visual` is absent."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        if config.vision:
            self.visual = VisionEncoder(config.vision, dtype=dtype, rngs=rngs)
        self.language_model = Qwen3MoeForCausalLM(config.text, dtype=dtype, rngs=rngs)
        self.num_deepstack_levels = config.num_deepstack_levels

    def get_image_features(self, pixel_values: Float[Array, "P C"], geometry: PatchGeometry) -> VisualRows:
        """Returns the embeddings [M, D] and DeepStack levels [M, N*D] of packed images and videos.

        Args:
            pixel_values: their patches [P, C*Tp*p*p], as returned by a Hugging Face processor.
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
        cache: KVCache | PagedKVCache | None = None,
    ) -> tuple[Float[Array, "B T V"], KVCache | PagedKVCache | None]:
        """Runs `get_image_features` and `Qwen3MoeForCausalLM`; returns float32 logits and the updated cache.

        `visual_index` is the row of the features that each visual token takes, -1 for text (processing/positions.py).
        The other arguments are those of the two.

        Raises:
            ValueError: `pixel_values` is given without `geometry` or `visual_index`.
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
