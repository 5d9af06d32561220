"""`deepstack-jax demo --page`: an encode node and a language node on this machine, and the page in the browser."""

import contextlib
import os
import socket
import time
import webbrowser
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from deepstack_jax.cli.demo_split import BLOCK_SIZE, POOL_BLOCKS, ServeProcess, missing, serve_process

LOOK_SECONDS = 0.5
_COMMON = ["--dtype", "float32", "--research", "--grace", "2"]


def show_page(checkpoint: Path, browser: bool) -> None:
    """Serves until Ctrl-C, or until the node that answers ends.

    Args:
        browser: whether the page is opened; its URL is printed in any case.

    Raises:
        ValueError: a node ended, with its own line, or was not ready in time.
    """
    with contextlib.suppress(KeyboardInterrupt), _nodes(checkpoint) as (answering, encoding):
        print("starting, which takes up to a minute the first time ...", flush=True)
        for node in (answering, *encoding):
            node.wait()
        assert answering.url is not None
        print(f"page: {answering.url}/ ({answering.role} node); Ctrl-C ends it", flush=True)
        for node in encoding:
            print(f"      {node.url}/ ({node.role} node)", flush=True)
        if browser:
            webbrowser.open(answering.url)
        while True:
            time.sleep(LOOK_SECONDS)
            answering.look()


@contextlib.contextmanager
def _nodes(checkpoint: Path) -> Iterator[tuple[ServeProcess, list[ServeProcess]]]:
    """The node that answers, and the one that encodes for it where this machine can have two."""
    lacking = missing() or ("a TPU takes one process" if _has_tpu() else None)
    with contextlib.ExitStack() as stack:
        if lacking:
            print(f"one node answers and encodes: {lacking}", flush=True)
            yield stack.enter_context(serve_process(checkpoint, "unified", _COMMON)), []
            return
        # a socket that is bound and doesn't listen keeps the port from others but not from the encode node
        held = stack.enter_context(socket.socket())
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        control = f"tcp://127.0.0.1:{held.getsockname()[1]}"
        shared = [*_COMMON, "--block-size", str(BLOCK_SIZE)]
        encoding = stack.enter_context(serve_process(checkpoint, "encode", [*shared, "--control", control]))
        options = ["--encoder", control, "--pool-blocks", str(POOL_BLOCKS), "--encode-here", "--warm-up"]
        yield stack.enter_context(serve_process(checkpoint, "language", [*shared, *options])), [encoding]


def _has_tpu() -> bool:
    """Whether jax would take a TPU, which this process must not do itself."""
    return find_spec("libtpu") is not None and os.environ.get("JAX_PLATFORMS", "tpu").startswith("tpu")
