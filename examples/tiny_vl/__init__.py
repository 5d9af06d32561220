"""A small Qwen3-VL-MoE that answers questions about drawn pictures: its data, its training and its evaluation."""
