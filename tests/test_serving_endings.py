"""SIGTERM and SIGINT end a server in time, whatever runs or hangs; all servers are real processes."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.nodes import serving, write_image_sensitive_checkpoint

STUCK = """
import asyncio, concurrent.futures, sys, threading, time
from deepstack_jax.cli import http_server
http_server.CLOSE_SECONDS = 0.3

async def main(ending, kind):
    stopped = asyncio.Event()
    ending.listen(stopped.set)
    if kind == "blocked":  # in a library's code, which never comes back
        print("ready", flush=True)
        threading.Lock().acquire() and time.sleep(3600)
    never = threading.Event()
    concurrent.futures.ThreadPoolExecutor(1).submit(never.wait)  # Python would join its thread
    asyncio.get_running_loop().run_in_executor(None, never.wait)
    print("ready", flush=True)
    await stopped.wait()
    if kind == "closing":
        await asyncio.sleep(3600)
    ending.close()

asyncio.run(main(http_server.Ending(float(sys.argv[2])), sys.argv[1]))
"""


@contextlib.contextmanager
def stuck(kind: str, grace: float) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", STUCK, kind, str(grace)]
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as child:
        try:
            assert child.stdout
            assert child.stdout.readline() == "ready\n"
            yield child
        finally:
            child.kill()


@pytest.mark.parametrize(("kind", "grace", "code"), [("blocked", 0.2, 1), ("closing", 0.2, 1), ("threads", 3600, 0)])
def test_a_process_that_cannot_close_ends_after_its_grace(kind: str, grace: float, code: int):
    with stuck(kind, grace) as child:
        child.send_signal(signal.SIGTERM)
        assert child.wait(20) == code
        assert child.stderr
        errors = child.stderr.read()
        assert errors.count("\n") == code, errors
        assert errors.startswith("the server did not close in time" if code else "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_the_process_at_once(number: signal.Signals):
    with stuck("closing", 3600) as child:
        child.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(0.2)
        child.send_signal(number)
        assert child.wait(20) == 128 + number


def test_a_server_ends_in_time_whatever_its_clients_do(tmp_path: Path):
    """A silent one, half a head, half a body, a fetch that hangs, a stream that nobody reads, and one that is read."""
    write_image_sensitive_checkpoint(tmp_path / "tiny", min_pixels=4096)
    media = socket.create_server(("127.0.0.1", 0))  # accepts, and never answers
    port = str(media.getsockname()[1])
    options = ("--allow-domain", "127.0.0.1", "--allow-network", "127.0.0.1/32", "--allow-port", port, "--grace", "1")
    endless = {"text": "Hello?", "sampling_params": {"max_new_tokens": 1900, "ignore_eos": True}, "stream": True}
    with media, serving(tmp_path / "tiny", *options) as node, contextlib.ExitStack() as stack:

        def connect(data: bytes) -> socket.socket:
            address = node.client.base_url.host, node.client.base_url.port or 0
            connection = stack.enter_context(socket.create_connection(address, timeout=30))
            connection.sendall(data)
            return connection

        def post(body: object, missing: int = 0) -> bytes:
            data = json.dumps(body).encode()
            return (
                b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % (len(data) + missing)
                + data
            )

        node.ask(text="Hello?")  # compiles
        connect(b"")
        connect(b"GET /hea")
        half = connect(post({"text": "a"}, missing=100))
        connect(post({"text": "a", "image_data": f"http://127.0.0.1:{port}/a.png"}))
        connect(post(endless))
        stack.enter_context(media.accept()[0])  # the fetch has begun
        with node.client.stream("POST", "/generate", json=endless) as response:
            next(response.iter_lines())
            node.process.send_signal(signal.SIGTERM)
            assert half.recv(100).startswith(b"HTTP/1.1 503 ")
            code = node.process.wait(15)  # sooner than the body's, the fetch's and the readers' own time-outs
            assert (code, node.process.stderr and node.process.stderr.read()) == (0, "")
