"""Every test runs on the CPU, offline, with the shape annotations of models and kernels checked.

A session's processes share what they compile: the test processes, and the servers and commands that tests start.
"""

import os
import tempfile
from collections.abc import Iterator

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # PyTorch's threads burn a busy machine's time while they wait
programs = None
if "PYTEST_XDIST_WORKER" not in os.environ:  # a worker has its parent's environment
    programs = tempfile.TemporaryDirectory(prefix="deepstack-jax-programs-")
    os.environ |= {
        "JAX_COMPILATION_CACHE_DIR": programs.name,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        # jax locks a cache that has a limit: without a lock another process reads half a file
        "JAX_COMPILATION_CACHE_MAX_SIZE": str(1 << 40),
    }

import jax  # noqa: E402  reads the environment
import pytest  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

install_import_hook(["deepstack_jax.models", "deepstack_jax.programs"], "beartype.beartype")


def pytest_unconfigure() -> None:
    if programs:
        programs.cleanup()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out the exhaustive tests unless `-m` names them."""
    if "exhaustive" in config.option.markexpr:
        return
    left_out = [item for item in items if item.get_closest_marker("exhaustive")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(autouse=True, scope="module")
def _let_go_of_programs() -> Iterator[None]:
    """Each compiled program holds some memory maps, of which Linux gives a process 65530; LLVM crashes without."""
    yield
    jax.clear_caches()
