"""What one honest client notices while connections that keep a server waiting are open.

    python benchmarks/connections.py [--connections 1100] [--bodies 200]

A server of tiny-vl is started on loopback. For each attack, its connections are opened, and an honest client asks for
`/health` and for a short answer. The table has the status and the seconds of both, and how many of the attack's
connections are still open after `WAIT_S`. The last line is a SIGTERM (`--grace 1`) while one connection of each attack
is open.
"""

import argparse
import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import httpx

WAIT_S = 15.0
SMALL = {"text": "Hello?", "sampling_params": {"max_new_tokens": 4}}
LONG = {"text": "Hello?", "sampling_params": {"max_new_tokens": 1000, "ignore_eos": True}, "stream": True}


def request(body: object = SMALL, missing: int = 0, head: bytes = b"") -> bytes:
    data = json.dumps(body).encode()
    length = head or b"Content-Length: %d" % (len(data) + missing)
    return b"POST /generate HTTP/1.1\r\nHost: localhost\r\n" + length + b"\r\n\r\n" + (b"" if head else data)


ATTACKS = {
    "silent connections": b"",
    "half a head": b"GET /health HT",
    "bodies that never come": request(missing=1000),
    "chunks of one byte": request(head=b"Transfer-Encoding: chunked") + b"1\r\n \r\n" * 100_000,
    "answers that nobody reads": request(LONG),
}
MANY = "silent connections", "half a head"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--connections", type=int, default=1100)
    parser.add_argument("--bodies", type=int, default=200)
    options = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with serving() as (process, url):
        print(f"| attack | /health | an answer | open after {WAIT_S:g} s |\n|---|---|---|---|")
        print(f"| none | {ask(url)} | {ask(url, SMALL)} | |", flush=True)
        address = httpx.URL(url).host, httpx.URL(url).port or 0
        for name, data in ATTACKS.items():
            count = options.connections if name in MANY else options.bodies
            with contextlib.ExitStack() as kept:
                attackers = [kept.enter_context(opened(address, data)) for _ in range(count)]
                until = time.monotonic() + WAIT_S
                seen = f"{ask(url)} | {ask(url, SMALL)}"
                time.sleep(max(until - time.monotonic(), 0))
                print(f"| {count} {name} | {seen} | {sum(map(is_open, attackers))} |", flush=True)
        with contextlib.ExitStack() as kept:
            for data in ATTACKS.values():
                kept.enter_context(opened(address, data))
            ask(url)
            started = time.monotonic()
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(60)
            print(f"\nSIGTERM: exit code {process.poll()} after {time.monotonic() - started:.1f} s (grace 1 s)")


@contextlib.contextmanager
def serving() -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, "-m", "deepstack_jax", "serve", "tiny-vl", "--port", "0", "--grace", "1"]
    env = {"JAX_PLATFORMS": "cpu", **os.environ}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env)
    assert process.stdout
    try:
        while not (line := process.stdout.readline()).startswith("ready: "):
            assert line, "the server has ended"
        yield process, line.split()[-1]
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def opened(address: tuple[str, int], data: bytes) -> Iterator[socket.socket]:
    with socket.create_connection(address, timeout=30) as connection:
        with contextlib.suppress(OSError):
            connection.setblocking(False)
            connection.send(data)
        yield connection


def ask(url: str, body: object = None) -> str:
    """What an honest client gets: status and seconds."""
    started = time.monotonic()
    try:
        with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
            answer = client.get("/health") if body is None else client.post("/generate", json=body)
            outcome = str(answer.status_code)
    except httpx.HTTPError as error:
        outcome = type(error).__name__
    return f"{outcome}, {time.monotonic() - started:.2f} s"


def is_open(connection: socket.socket) -> bool:
    """Whether the server has not closed the connection; what it has sent is thrown away."""
    try:
        while connection.recv(1 << 20):
            pass
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


if __name__ == "__main__":
    main()
