"""Which of Mooncake's wheels is for this machine. They hold the same module, so any of them serves."""

import ctypes.util
from importlib.util import find_spec

CUDA_13, CUDA_12, NO_CUDA = (f"mooncake-transfer-engine{suffix}" for suffix in ("-cuda13", "", "-non-cuda"))


def wheel_for_this_machine() -> str:
    """The wheel of the CUDA that jax brings, else of the system's; the one without CUDA where there is no driver."""
    if not ctypes.util.find_library("cuda"):
        return NO_CUDA
    for version, wheel in (("13", CUDA_13), ("12", CUDA_12)):
        if find_spec(f"jax_cuda{version}_plugin"):
            return wheel
    runtime = ctypes.util.find_library("cudart") or ""  # such as libcudart.so.12
    return {"13": CUDA_13, "12": CUDA_12}.get(runtime.rpartition(".so.")[2].partition(".")[0], NO_CUDA)


def explain(error: ImportError) -> str:
    """One line with the remedy for an error that importing `mooncake.engine` raised."""
    if isinstance(error, ModuleNotFoundError):
        return f"Mooncake isn't installed: pip install {wheel_for_this_machine()}"
    library = str(error).partition(":")[0]
    if library.startswith("libcu"):
        wheel = wheel_for_this_machine()
        return f"Mooncake needs {library}, which this machine lacks: install {wheel} in place of its other wheel"
    return f"Mooncake needs {library}: install the system package that has it (Debian: libibverbs1)"
