"""Every test runs on the CPU, offline, with the shape annotations of models and kernels checked.

A session's processes share what they compile: the test processes, and the servers and commands that tests start.
Compilation takes most of the tests' time: modules that assert no numbers of their own leave most optimisations out.
"""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # PyTorch's threads burn a busy machine's time while they wait
programs = None
if "PYTEST_XDIST_WORKER" not in os.environ:  # a worker has its parent's environment
    programs = tempfile.TemporaryDirectory(prefix="deepstack-jax-programs-")
    os.environ |= {
        "XDG_CONFIG_HOME": f"{programs.name}/config",  # commands keep no key in the user's home
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

# What these assert of numbers holds at every optimisation: the same answer in several ways, answers with a wide margin.
QUICKLY_COMPILED = {
    "test_bench",
    "test_cli",
    "test_disagg_overlap",
    "test_disagg_split",
    "test_docs",
    "test_engine_core",
    "test_openai_api",
    "test_openai_tools",
    "test_packaging",
    "test_page",
    "test_public_surface",
    "test_resource_faults",
    "test_same_inputs",
    "test_serving_bodies",
    "test_serving_http",
    "test_serving_roles",
    "test_start_up",
    "test_structure",
    "test_tiny_vl_training",
}
# They take longest, with few tests in each: begun last, one of them would run while the other processes have ended.
FIRST = ("test_disagg_faults", "test_tiny_vl", "test_docs", "test_cli", "test_kernels", "test_real_widths")


def pytest_unconfigure() -> None:
    if programs:
        programs.cleanup()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Puts the longest files first; leaves out the exhaustive tests unless `-m` names them."""
    items.sort(key=lambda item: FIRST.index(item.path.stem) if item.path.stem in FIRST else len(FIRST))
    if "exhaustive" in config.option.markexpr:
        return
    left_out = [item for item in items if item.get_closest_marker("exhaustive")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(autouse=True, scope="session")
def _children_without_pytorch() -> None:
    """Not set for the worker processes themselves, which have begun."""
    folders = [str(Path(__file__).parent / "child_processes"), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(folders)


@pytest.fixture(autouse=True, scope="module")
def _compile_quickly(request: pytest.FixtureRequest) -> Iterator[None]:
    """For the process itself and for those that it starts."""
    quickly = request.path.stem in QUICKLY_COMPILED
    jax.config.update("jax_disable_most_optimizations", quickly)
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(int(quickly))
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(autouse=True, scope="module")
def _let_go_of_programs() -> Iterator[None]:
    """Each compiled program holds some memory maps, of which Linux gives a process 65530; LLVM crashes without."""
    yield
    jax.clear_caches()
