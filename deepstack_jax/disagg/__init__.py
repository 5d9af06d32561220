"""The split: encode nodes run vision, language nodes run text, and rows of visual tokens move from one to the other."""

from deepstack_jax.disagg.wire.buffers import BlockAllocator, MultimodalDataBuffers

__all__ = ["BlockAllocator", "MultimodalDataBuffers"]
