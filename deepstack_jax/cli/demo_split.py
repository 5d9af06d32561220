"""The demo's split: an encode process and a language process on this machine, asked over HTTP.

Both are ordinary `deepstack-jax serve` processes. They end with the demo, even if it is killed.
"""

import base64
import contextlib
import io
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from deepstack_jax.cli.timeline import Span

BLOCK_SIZE = 8  # tokens; a real cluster takes 128
POOL_BLOCKS = 8  # a request gets a quarter of them at once, so that a small picture takes several rounds
START_SECONDS = 300.0

# The kernel ends the node when the demo is killed: 1 is PR_SET_PDEATHSIG. A demo that was killed before that call is
# no longer the node's parent, so the node ends by itself.
_RUN = """
import ctypes, os, signal, sys
parent = int(sys.argv.pop(1))
ctypes.CDLL(None).prctl(1, signal.SIGTERM)
if os.getppid() != parent:
    sys.exit()
from deepstack_jax.cli import main
main()
"""


def missing() -> str | None:
    """What the split needs and this environment lacks, with the remedy, in one line; None if nothing is missing."""
    if not sys.platform.startswith("linux"):
        return "Mooncake runs only on Linux"
    for name in ("zmq", "xxhash", "starlette", "uvicorn", "httpx"):
        try:
            import_module(name)
        except ModuleNotFoundError as error:
            return f"{error.name} is missing: pip install 'deepstack-jax[mooncake,serve]'"
    from deepstack_jax.disagg.transports.mooncake_wheel import explain

    try:
        import_module("mooncake.engine")
    except ImportError as error:
        return explain(error)
    return None


class SplitNodes:
    """The two processes, from `with` to its end."""

    def __init__(self, checkpoint: Path):
        self._checkpoint = checkpoint
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "SplitNodes":
        """Starts both at once; `ask` waits until they are ready."""
        with contextlib.ExitStack() as stack:
            # A socket that is bound and doesn't listen keeps the port from others but not from the encode node.
            held = stack.enter_context(socket.socket())
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            held.bind(("127.0.0.1", 0))
            control = f"tcp://127.0.0.1:{held.getsockname()[1]}"
            # without a cache, so that a question asked again is encoded again
            shared = ["--block-size", str(BLOCK_SIZE), "--dtype", "float32"]
            options = ["--control", control, "--cache-bytes", "0"]
            self._encode = stack.enter_context(serve_process(self._checkpoint, "encode", shared + options))
            options = ["--encoder", control, "--pool-blocks", str(POOL_BLOCKS)]
            options += ["--max-bytes", str(1 << 30), "--max-pixels", str(1 << 30)]
            self._language = stack.enter_context(serve_process(self._checkpoint, "language", shared + options))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def wait(self) -> None:
        """Until both nodes are ready.

        Raises:
            ValueError: one of them ended, with its own line, or was not ready in time.
        """
        for node in (self._encode, self._language):
            node.wait()

    def ask(self, question: str, picture: Any, max_new_tokens: int) -> dict[str, Any]:
        """The language node's answer to a question about a picture, as `POST /generate` gives it.

        Raises:
            ValueError: it is not an answer; with the node's reason.
        """
        import httpx

        file = io.BytesIO()
        picture.save(file, "PNG")
        body = {
            "text": question,
            "image_data": "data:image/png;base64," + base64.b64encode(file.getvalue()).decode(),
            "sampling_params": {"max_new_tokens": max_new_tokens},
        }
        deadline = time.monotonic() + START_SECONDS
        while True:
            response = httpx.post(f"{self._language.url}/generate", json=body, timeout=START_SECONDS, trust_env=False)
            # until the two have met there is no encoder
            if response.status_code != 503 or time.monotonic() > deadline:
                break
            for node in (self._encode, self._language):
                node.look()
            time.sleep(0.1)
        if response.status_code != 200:
            raise ValueError(f"the language process answered {response.status_code}: {response.text[:300]}")
        return response.json()


def spans_of(meta: dict[str, Any]) -> list[Span]:
    """The stages of an answer of the split, from its `meta_info`.

    Rounds have the language node's clock. What was prepared and encoded before them is put right before the first, and
    prefill and decode at the end: the gaps are messages, the queue and HTTP.
    """
    timings, rounds = meta["timings"], meta["split"]["rounds"]
    first, end = rounds[0][0], meta["e2e_latency"]
    encode = max(first - timings["encode"], 0.0)
    decode = end - timings["decode"]
    return [
        Span("prepare", max(encode - timings["prepare"], 0.0), encode),
        Span("encode", encode, first),
        *(Span(f"round {number}", *seconds) for number, seconds in enumerate(rounds, 1)),
        Span("prefill", max(decode - timings["prefill"], rounds[-1][1]), decode),
        Span("decode", decode, end),
    ]


class ServeProcess:
    """A process of `deepstack-jax serve`, and what it has said."""

    def __init__(self, role: str, process: subprocess.Popen[bytes], output: int):
        self.role = role
        self.url: str | None = None  # once it is ready, as is `control`
        self.control = ""  # an encode node's
        self._process, self._output = process, output

    def wait(self) -> None:
        """Until it is ready.

        Raises:
            ValueError: it ended, with its own line, or was not ready in time.
        """
        deadline = time.monotonic() + START_SECONDS
        while self.url is None:
            self.look()
            if time.monotonic() > deadline:
                raise ValueError(f"the {self.role} process was not ready within {START_SECONDS:g} s: try again")
            time.sleep(0.05)

    def look(self) -> None:
        """Reads what it says.

        Raises:
            ValueError: it has ended.
        """
        lines = os.pread(self._output, 1 << 20, 0).decode(errors="replace").split("\n")
        for line in lines:
            if line.startswith("ready: "):
                self.url, _, self.control = line.strip().partition(" on ")[2].partition(", control ")
        if (code := self._process.poll()) is not None:
            said = next((line for line in reversed(lines) if line.strip()), "nothing")
            raise ValueError(f"the {self.role} process ended with code {code}: {said.removeprefix('error: ')}")


@contextlib.contextmanager
def serve_process(checkpoint: Path, role: str, options: list[str]) -> Iterator[ServeProcess]:
    """A `deepstack-jax serve` of that role with more options, on a free port; it ends with the `with`."""
    options = ["--role", role, "--port", "0", "--grace", "0", "--no-warm-up", *options]
    command = [sys.executable, "-P", "-c", _RUN, str(os.getpid()), "serve", str(checkpoint), *options]
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        try:
            yield ServeProcess(role, process, output.fileno())
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
