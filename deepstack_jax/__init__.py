"""Qwen3-VL-MoE in JAX: load a checkpoint, prepare prompts with pictures, and answer them.

import deepstack_jax as dsj
model = dsj.load("Qwen3-VL-30B-A3B-Instruct")
inputs = dsj.prepare(model, "What is on the table?", images=["coffee.jpg"])
print(dsj.decode(model, dsj.generate(model, **inputs))[0])
"""

from deepstack_jax.checkpoint import Model, load
from deepstack_jax.generation import GenerateOutput, decode, forward, generate, prepare, stream

__all__ = ["GenerateOutput", "Model", "decode", "forward", "generate", "load", "prepare", "stream"]
