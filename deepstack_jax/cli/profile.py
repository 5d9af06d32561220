"""The option `--profile`: a trace of what a command runs, for XProf and Perfetto."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

ProfileDir = Annotated[
    Path | None,
    typer.Option("--profile", metavar="DIR", help="write a trace for XProf and Perfetto there, without compilation"),
]


def name_programs(directory: Path | None) -> None:
    """Lets compiled programs have the names of layers and kernels: those in the cache may be from before these."""
    if directory is not None:
        import jax

        jax.config.update("jax_compilation_cache_include_metadata_in_key", True)


@contextmanager
def traced(directory: Path | None) -> Iterator[None]:
    """Traces what runs meanwhile, if there is a directory, and says where the trace is.

    Raises:
        ValueError: the directory can't be written to.
    """
    if directory is None:
        yield
        return
    import jax

    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--profile {directory} can't be used ({error.strerror}): choose another directory") from None
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # every call of Python would hide the turns of the engine, and slow it
    with jax.profiler.trace(str(directory), create_perfetto_trace=True, profiler_options=options):
        yield
    print(
        f"profile: xprof {directory}, or open perfetto_trace.json.gz of {directory}/plugins/profile at ui.perfetto.dev",
        file=sys.stderr,
    )
