"""Qwen3-VL-MoE in JAX: load a checkpoint, prepare prompts with pictures, and answer them.

import deepstack_jax as dsj
model = dsj.load("Qwen3-VL-30B-A3B-Instruct")
inputs = dsj.prepare(model, "What is on the table?", images=["coffee.jpg"])
print(dsj.decode(model, dsj.generate(model, **inputs))[0])
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deepstack_jax.checkpoint import Model, load
    from deepstack_jax.generation import GenerateOutput, decode, forward, generate, prepare, stream

__all__ = ["GenerateOutput", "Model", "decode", "forward", "generate", "load", "prepare", "stream"]


def __getattr__(name: str) -> Any:
    """Imports the models when they are first asked for: conversion and the command line's help do without."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "checkpoint" if name in ("Model", "load") else "generation"
    return getattr(import_module(f"{__name__}.{home}"), name)
