"""Qwen3-VL-MoE in JAX: load a checkpoint, prepare prompts with images, and answer them.

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
    from deepstack_jax.sampling_options import SamplingOptions
    from deepstack_jax.sharding import make_mesh

    __version__: str

__all__ = [
    "GenerateOutput",
    "Model",
    "SamplingOptions",
    "__version__",
    "decode",
    "forward",
    "generate",
    "load",
    "make_mesh",
    "prepare",
    "stream",
]

_HOMES = {"Model": "checkpoint", "load": "checkpoint", "make_mesh": "sharding", "SamplingOptions": "sampling_options"}


def __getattr__(name: str) -> Any:
    """Imports the models on first use, because conversion and the command line's help don't need them."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "__version__":
        return import_module("importlib.metadata").version("deepstack-jax")
    return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'generation')}"), name)


def __dir__() -> list[str]:
    return list(__all__)
