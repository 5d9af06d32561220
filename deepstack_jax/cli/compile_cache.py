"""Where compiled programs are kept between runs: JAX's persistent cache, set by its own environment variables.

Processes that a command starts share it.
"""

import hashlib
import os
import platform
import sys
import tempfile
from pathlib import Path

MAX_BYTES = 4 << 30  # of the default directory; jax removes what was not used for longest
NO_LIMIT = 1 << 60  # of one that the user names; with any limit jax locks the directory, without one it doesn't
HELP = "where compiled programs are kept between runs, or none; the user's cache directory by default"


def use(directory: str | None) -> None:
    """Keeps compiled programs in `directory`: "none" keeps none, None takes the user's cache directory.

    None leaves what the environment says: JAX_COMPILATION_CACHE_DIR, JAX_ENABLE_COMPILATION_CACHE. A directory that
    can't be written gives a warning. To be called before jax is imported.
    """
    if directory is None and not {"JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE"}.isdisjoint(os.environ):
        return
    if directory == "none":
        os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
        return
    try:
        path = Path(directory).expanduser().absolute() if directory else _default()
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home directory
        reason = getattr(error, "strerror", None) or error
        print(f"warning: compiled programs are not kept: {_named(error, directory)}: {reason}", file=sys.stderr)
        os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
        return
    os.environ |= {
        "JAX_COMPILATION_CACHE_DIR": str(path),
        "JAX_COMPILATION_CACHE_MAX_SIZE": str(NO_LIMIT if directory else MAX_BYTES),
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def _default() -> Path:
    """One directory per kind of processor: machines that share a home must not run each other's instructions."""
    root = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not root.is_absolute():  # as the XDG specification says
        root = Path.home() / ".cache"
    return root / "deepstack-jax" / f"programs-{platform.machine()}-{_processor()}"


def _processor() -> str:
    """A short name of the instructions that this processor has."""
    described = platform.processor()
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            described = next((line for line in lines if line.lower().startswith(("flags", "features"))), described)
    except OSError:
        pass  # not Linux
    return hashlib.sha256(described.encode()).hexdigest()[:8]


def _named(error: Exception, directory: str | None) -> str:
    return str(getattr(error, "filename", None) or directory or "the user's cache directory")
