"""Progress bars on stderr."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

_POLL_SECONDS = 0.2


@contextmanager
def loading(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar of bytes: yields a function that takes (done, total). Shown on a terminal only, gone when done.

    With several processes, process 0 shows the bytes of all, and prints how many each has read once all are done.
    """
    import jax

    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    console = Console(stderr=True)
    # elsewhere it would leave an empty line behind
    several = jax.distributed.is_initialized()
    speaks = not several or jax.process_index() == 0
    shown = speaks and console.is_terminal
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=not shown) as bar:
        task = bar.add_task(what, total=None)

        def show(done: int, total: int) -> None:
            if several:
                done, total = _of_all(done, total)
            bar.update(task, completed=done, total=total)

        yield show
        if not several or not speaks:
            return
        while len(found := _published()) < jax.process_count() or any(done < total for done, total in found):
            bar.update(task, completed=sum(done for done, _ in found))
            time.sleep(_POLL_SECONDS)
    each = ", ".join(f"process {process} {decimal(done)}" for process, (done, _) in enumerate(found))
    print(f"read {decimal(sum(done for done, _ in found))}: {each}", file=sys.stderr)


def _of_all(done: int, total: int) -> tuple[int, int]:
    """Tells the other processes what this one has read, and returns the sums over those that are known."""
    from deepstack_jax.processes import publish

    publish("loading", f"{done} {total}")
    found = _published()
    return sum(done for done, _ in found), sum(total for _, total in found)


def _published() -> list[tuple[int, int]]:
    from deepstack_jax.processes import published

    return [(int(done), int(total)) for done, total in (said.split() for said in published("loading") if said)]


@contextmanager
def counting(what: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar of things done: yields a function to call after each. Shown on a terminal only, gone when done."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)
