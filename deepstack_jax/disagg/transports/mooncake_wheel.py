"""Chooses the Mooncake wheel for this machine. All wheels contain the same module, so any installed one works."""

import ctypes.util
from importlib.util import find_spec

CUDA_13, CUDA_12, NO_CUDA = (f"mooncake-transfer-engine{suffix}" for suffix in ("-cuda13", "", "-non-cuda"))


def wheel_for_this_machine() -> str:
    """Returns the wheel for the CUDA version of jax or the system, or the one without CUDA if there is no driver."""
    if not ctypes.util.find_library("cuda"):
        return NO_CUDA
    for version, wheel in (("13", CUDA_13), ("12", CUDA_12)):
        if find_spec(f"jax_cuda{version}_plugin"):
            return wheel
    runtime = ctypes.util.find_library("cudart") or ""  # such as libcudart.so.12
    return {"13": CUDA_13, "12": CUDA_12}.get(runtime.rpartition(".so.")[2].partition(".")[0], NO_CUDA)


def explain(error: ImportError) -> str:
    """Explains an error from importing `mooncake.engine` in one line, with the remedy."""
    if isinstance(error, ModuleNotFoundError):
        return f"Mooncake isn't installed: pip install {wheel_for_this_machine()}"
    library = str(error).partition(":")[0]
    if library.startswith("libcu"):
        wheel = wheel_for_this_machine()
        return f"Mooncake needs {library}, which this machine lacks: replace the installed wheel by {wheel}"
    return f"Mooncake needs {library}: install the system package that contains it (Debian: libibverbs1)"
