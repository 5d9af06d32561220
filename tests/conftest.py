"""Every test runs on the CPU, offline, with the shape annotations of models and kernels checked."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Iterator

import jax
import pytest
from jaxtyping import install_import_hook

install_import_hook(["deepstack_jax.models", "deepstack_jax.programs"], "beartype.beartype")


@pytest.fixture(autouse=True, scope="module")
def _let_go_of_programs() -> Iterator[None]:
    """Each compiled program holds some memory maps, of which Linux gives a process 65530; LLVM crashes without."""
    yield
    jax.clear_caches()
