"""The split: vision on encode nodes, text on language nodes, rows of visual tokens carried from one to the other."""

from deepstack_jax.disagg.wire.buffers import BlockAllocator, MultimodalDataBuffers

__all__ = ["BlockAllocator", "MultimodalDataBuffers"]
