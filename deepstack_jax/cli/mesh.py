"""The options of the commands that load a model on a mesh."""

import os
import sys
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from jax.sharding import Mesh

MeshShape = Annotated[
    str | None, typer.Option("--mesh", help="devices by axis, such as data=2,tensor=4; one device by default")
]
Coordinator = Annotated[
    str | None, typer.Option(help="with several processes: HOST:PORT of process 0, or auto on TPU pods, Slurm and GKE")
]
NumProcesses = Annotated[int | None, typer.Option(min=1, help="how many processes the mesh spans")]
ProcessId = Annotated[int | None, typer.Option(min=0, help="which of them this is")]


def open_mesh(
    shape: str | None, coordinator: str | None, num_processes: int | None, process_id: int | None
) -> "Mesh | None":
    """The mesh of a command, after the other processes have come if there are several; None for one device.

    Raises:
        ValueError: no such mesh, or the processes don't meet.
    """
    from deepstack_jax.processes import check, join
    from deepstack_jax.sharding import make_mesh

    if coordinator is not None:
        if shape is None:
            raise ValueError(f"--coordinator {coordinator} needs --mesh: give data=2,tensor=4, for example")
        check(coordinator, num_processes, process_id)
        _keep_stdout()
        join(coordinator, num_processes, process_id)
    elif num_processes is not None or process_id is not None:
        raise ValueError("--num-processes and --process-id need --coordinator HOST:PORT of process 0")
    return None if shape is None else make_mesh(shape)


def _keep_stdout() -> None:
    """Sends what native code prints on stdout to stderr: Gloo, for CPUs, announces each connection there."""
    sys.stdout.flush()
    own = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(own, "w", buffering=1, encoding=sys.stdout.encoding)
