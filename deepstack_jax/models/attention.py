"""Re-exports attention from its former location; see `pallas_kernels.attention`."""

from pallas_kernels.attention import ranged_attention

__all__ = ["ranged_attention"]
