"""Connects the processes of a mesh that spans several hosts.

JAX aborts a process if another one doesn't come. Therefore all meet at the coordinator's address first, where it can be
said who is missing, and only then does JAX start its service there.
"""

import json
import socket
import time
from contextlib import ExitStack
from typing import Any

import jax

from deepstack_jax.errors import one_line

AUTO = "auto"
_RETRY_SECONDS = 0.2
_DAY_MS = 24 * 3600 * 1000
_joined: list[str] = []  # the coordinator's host, once this process has joined


def join(coordinator: str, num_processes: int | None, process_id: int | None, timeout: float = 60.0) -> None:
    """Makes the devices of all processes one list, `jax.devices()`. Call it before JAX is used.

    Args:
        coordinator: HOST:PORT of process 0, or "auto" on TPU pods, Slurm and Kubernetes indexed jobs, where JAX finds
            the others by the environment.
        num_processes, process_id: how many there are, and which one this is; None with "auto".
        timeout: seconds to wait for the others.

    Raises:
        ValueError: they don't meet within the time, or disagree; one line that says who is missing.
    """
    check(coordinator, num_processes, process_id)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # for devices that are CPUs
    if coordinator == AUTO:
        try:
            jax.distributed.initialize(initialization_timeout=int(timeout))
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"--coordinator auto found no cluster ({one_line(error)}): give HOST:PORT") from None
        return
    assert num_processes is not None
    assert process_id is not None
    address = _address(coordinator)
    meet = _wait_for_all if process_id == 0 else _report
    meet(address, num_processes, process_id, time.monotonic() + timeout)
    jax.distributed.initialize(coordinator, num_processes, process_id, initialization_timeout=int(timeout))
    _joined.append(address[0])


def check(coordinator: str, num_processes: int | None, process_id: int | None) -> None:
    """Raises a `ValueError` for arguments of `join` that don't belong together."""
    if coordinator == AUTO:
        if num_processes is not None or process_id is not None:
            raise ValueError("--coordinator auto takes the number of processes from the environment: leave it out")
        return
    if num_processes is None or process_id is None:
        raise ValueError(f"--coordinator {coordinator} needs --num-processes and --process-id")
    if not 0 <= process_id < num_processes:
        raise ValueError(f"--process-id {process_id} is not one of 0 to {num_processes - 1}")
    _address(coordinator)


def coordinator_host() -> str | None:
    """The host of the address at which the processes met; None if there is one, or with "auto"."""
    return _joined[0] if _joined else None


def is_first() -> bool:
    """Whether this is the process that speaks: process 0, or the only one."""
    return jax.process_index() == 0


def publish(name: str, value: str) -> None:
    """Makes a value of this process readable in all processes; it replaces an earlier one of that name."""
    _store().key_value_set(f"{name}/{jax.process_index()}", value, allow_overwrite=True)


def published(name: str) -> list[str | None]:
    """Returns the value that each process published last under a name, None for one that has not yet."""
    found = dict(_store().key_value_dir_get(f"{name}/"))
    return [found.get(f"{name}/{process}") for process in range(jax.process_count())]


def wait_for_first(name: str) -> str:
    """Returns what process 0 publishes under a name. JAX ends this process if process 0 is lost before that."""
    return _store().blocking_key_value_get(f"{name}/0", _DAY_MS)


def _store() -> Any:
    from jax._src.distributed import global_state  # jax has no public name for its service's key-value store

    return global_state.client


def _address(coordinator: str) -> tuple[str, int]:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise ValueError(f"--coordinator {coordinator} is not an address: give HOST:PORT of process 0, or auto")
    return host.strip("[]"), int(port)


def _wait_for_all(address: tuple[str, int], num_processes: int, _process_id: int, deadline: float) -> None:
    """Waits for a line of each other process, and answers all at once: an empty line, or what is wrong."""
    waiting = set(range(1, num_processes))
    with ExitStack() as stack:
        try:
            family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
            listener = stack.enter_context(socket.create_server(address, family=family))
        except OSError as error:
            raise ValueError(f"process 0 can't listen at {_text(address)}: {error.strerror}") from None
        came: list[socket.socket] = []
        refusal = ""
        while waiting and not refusal:
            listener.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                connection = stack.enter_context(listener.accept()[0])
                connection.settimeout(max(deadline - time.monotonic(), 0.001))
                found = json.loads(_read_line(connection))
            except TimeoutError:
                refusal = f"process {min(waiting)} of {num_processes} didn't come to {_text(address)} in time"
                break
            except (OSError, ValueError):
                continue  # not one of ours
            came.append(connection)
            if found.get("of") != num_processes:
                refusal = f"process {found.get('process')} was started for {found.get('of')} processes, process 0 for "
                refusal += str(num_processes)
            elif found.get("process") not in waiting:
                refusal = f"process {found.get('process')} was started twice"
            else:
                waiting.remove(found["process"])
        for connection in came:
            connection.sendall(f"{refusal}\n".encode())
    if refusal:
        raise ValueError(f"{refusal}: start each of them once, with the same --coordinator and --num-processes")


def _report(address: tuple[str, int], num_processes: int, process_id: int, deadline: float) -> None:
    """Sends process 0 a line, once it listens, and waits for its answer."""
    while True:
        try:
            left = deadline - time.monotonic()
            with socket.create_connection(address, timeout=max(left, 0.001)) as connection:
                connection.sendall(json.dumps({"process": process_id, "of": num_processes}).encode() + b"\n")
                connection.settimeout(max(deadline - time.monotonic(), 0.001) + 1.0)  # process 0 says more than we can
                answer = _read_line(connection)
        except OSError as error:
            if time.monotonic() + _RETRY_SECONDS < deadline:
                time.sleep(_RETRY_SECONDS)
                continue
            raise ValueError(
                f"process {process_id} can't reach process 0 at {_text(address)} ({error.strerror or 'no answer'}): "
                "check --coordinator, and that process 0 runs"
            ) from None
        if answer:
            raise ValueError(f"process 0 refused: {answer}")
        return


def _read_line(connection: socket.socket) -> str:
    """Returns what comes before the first newline, at most 1 KiB; raises `OSError` if the peer closes before that."""
    data = b""
    while not data.endswith(b"\n"):
        piece = connection.recv(1024)
        if not piece or len(data) > 1024:
            raise OSError("the connection was closed")
        data += piece
    return data.decode(errors="replace").strip()


def _text(address: tuple[str, int]) -> str:
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
