"""Every test runs on the CPU, offline, with the shape annotations of models and kernels checked."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"

from jaxtyping import install_import_hook

install_import_hook(["deepstack_jax.models", "deepstack_jax.programs"], "beartype.beartype")
