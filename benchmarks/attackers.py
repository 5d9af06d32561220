"""What honest clients notice while attackers send all that they can to the same server.

    python benchmarks/attackers.py [--requests 10000] [--concurrency 64] [--split] [--without NAME ...]

A server of tiny-vl is started on loopback (with --split an encode node and a language node; requests go to the encode
node). Honest clients send texts and pictures, first alone and then beside the attackers, who run in a process of their
own. Every honest answer has to equal the one that the undisturbed server gave. The table has the latencies of both
runs, and the nodes' memory, threads and open files. The program exits with 1 if an honest request failed, if its p99
more than doubled, or if a node did not go back to where it was. The nodes have one half of the cores; clients and
attackers have the other, so that what attacks cost their senders takes no time from anybody's answers.
"""

import argparse
import asyncio
import base64
import contextlib
import io
import itertools
import json
import os
import random
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import httpx
import numpy as np
import psutil
from measured import chip_name
from PIL import Image

from deepstack_jax.bench.prompts import PromptShape

TEXTS, PICTURES = 12, 4  # different honest requests; each answer is known from the undisturbed server
PICTURE_SIDE = 224
TOKENS = 8
START_S, SETTLE_S = 600.0, 60.0
READINGS = ("memory, MiB", "threads", "open files")
MAX_GROWTH = {"memory, MiB": 256, "threads": 8, "open files": 16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--split", action="store_true")
    parser.add_argument("--without", nargs="*", default=[], choices=ATTACKS, help="attacks to leave out")
    parser.add_argument("--attack", metavar="URL", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.attack:
        asyncio.run(attack(options.attack, options.without))
    else:
        sys.exit(asyncio.run(compare(options)))


# ---- honest clients


@dataclass
class Run:
    """Latencies of one run in seconds, those of pictures among them, and what went wrong."""

    seconds: list[float] = field(default_factory=list)
    of_pictures: list[float] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)


def percentile(seconds: list[float], percent: float) -> float:
    return float(np.percentile(seconds, percent)) if seconds else float("nan")


async def compare(options: argparse.Namespace) -> int:
    with serving(options.split) as (url, nodes):
        async with client_of(url) as client:
            bodies = honest_bodies((await client.get("/v1/models")).json()["data"][0]["id"])
            answers = [await answer(client, body) for body in bodies]
        await send_all(url, bodies, answers, options.concurrency * 4, options.concurrency)  # compiles what is left
        before = readings(nodes)
        alone = await send_all(url, bodies, answers, options.requests, options.concurrency)
        command = [sys.executable, __file__, "--attack", url, "--without", *options.without]
        attackers = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        peak = {}
        sampler = asyncio.create_task(sample(nodes, peak))
        disturbed = await send_all(url, bodies, answers, options.requests, options.concurrency)
        report, _ = await asyncio.to_thread(attackers.communicate)
        sampler.cancel()
        after = await settle(nodes, before)
    print(f"{chip_name()}; {options.requests} requests, {options.concurrency} at once; {time.strftime('%Y-%m-%d')}\n")
    print("| run | right answers | p50, s | p90, s | p99, s | longest, s | p99 of pictures, s |\n" + "|---" * 7 + "|")
    for name, run in (("alone", alone), ("beside attackers", disturbed)):
        figures = " | ".join(f"{percentile(run.seconds, percent):.2f}" for percent in (50, 90, 99, 100))
        print(f"| {name} | {len(run.seconds)} | {figures} | {percentile(run.of_pictures, 99):.2f} |")
    ratio = percentile(disturbed.seconds, 99) / percentile(alone.seconds, 99)
    print(f"\np99 beside attackers is {ratio:.2f} of that alone.\n")
    print("| node | reading | before | most | after |\n|---|---|---|---|---|")
    failed = bool(disturbed.failures or alone.failures) or ratio > 2
    for node, reading in itertools.product(before, READINGS):
        values = [figures[node][reading] for figures in (before, peak, after)]
        print(f"| {node} | {reading} | " + " | ".join(f"{value:.0f}" for value in values) + " |")
        failed |= values[2] > values[0] + MAX_GROWTH[reading]
    print("\n| attack | times | what came of it |\n|---|---|---|")
    for name, outcomes in json.loads(report).items():
        told = ", ".join(f"{what}: {count}" for what, count in sorted(outcomes.items()))
        print(f"| {name} | {sum(outcomes.values())} | {told} |")
    for failure, count in (alone.failures + disturbed.failures).most_common(20):
        print(f"\nfailed {count} times: {failure}")
    return int(failed)


def honest_bodies(model: str) -> list[dict[str, Any]]:
    shapes = [PromptShape(48)] * TEXTS + [PromptShape(16, 1, (PICTURE_SIDE, PICTURE_SIDE))] * PICTURES
    common = {"model": model, "temperature": 0, "max_tokens": TOKENS, "ignore_eos": True}
    return [{"messages": shape.messages(number), **common} for number, shape in enumerate(shapes)]


async def send_all(url: str, bodies: list[dict[str, Any]], answers: list[str], requests: int, concurrency: int) -> Run:
    """Sends requests in turn, `concurrency` at once, each client on a connection of its own."""
    run, numbers = Run(), iter(range(requests))

    async def send() -> None:
        async with client_of(url) as client:
            for number in numbers:
                which = number % len(bodies)
                begun = time.perf_counter()
                try:
                    found = await answer(client, bodies[which])
                except (httpx.HTTPError, KeyError, ValueError) as error:
                    run.failures[f"{type(error).__name__}: {str(error)[:200]}"] += 1
                    continue
                if found == answers[which]:
                    run.seconds.append(time.perf_counter() - begun)
                    run.of_pictures += run.seconds[-1:] if which >= TEXTS else []
                else:
                    run.failures[f"{found!r} in place of {answers[which]!r}"] += 1

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(send())
    return run


async def answer(client: httpx.AsyncClient, body: dict[str, Any]) -> str:
    response = await client.post("/v1/chat/completions", json=body)
    if response.status_code != httpx.codes.OK:
        raise ValueError(f"{response.status_code} {response.text[:300]}")
    return response.json()["choices"][0]["message"]["content"]


def client_of(url: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=url, timeout=120, limits=httpx.Limits(keepalive_expiry=2))


# ---- nodes


@contextlib.contextmanager
def serving(split: bool) -> Iterator[tuple[str, dict[str, psutil.Process]]]:
    """The URL that clients call, and the processes of the nodes by their role."""
    serve = [sys.executable, "-m", "deepstack_jax", "serve", "tiny-vl", "--allow-domain", "never.invalid"]
    serve += ["--max-waiting", "256"]  # so that the attackers, who ask too, do not fill the line
    cores = sorted(os.sched_getaffinity(0))
    with contextlib.ExitStack() as stack:
        stack.callback(os.sched_setaffinity, 0, cores)
        if len(cores) > 1:  # who asks and who attacks takes no time from the nodes
            os.sched_setaffinity(0, cores[: len(cores) // 2])  # which they inherit

        def start(port: int, *more: str) -> psutil.Process:
            process = subprocess.Popen([*serve, "--port", str(port), *more], stderr=subprocess.DEVNULL)
            stack.callback(process.wait, 30)
            stack.callback(process.terminate)
            wait_for(f"http://127.0.0.1:{port}/ready", process)
            return psutil.Process(process.pid)

        port, control = free_port(), f"tcp://127.0.0.1:{free_port()}"
        if split:
            nodes = {"encode": start(port, "--role", "encode", "--control", control)}
            nodes["language"] = start(free_port(), "--role", "language", "--encoder", control)
        else:
            nodes = {"unified": start(port)}
        os.sched_setaffinity(0, cores[len(cores) // 2 :])
        yield f"http://127.0.0.1:{port}", nodes


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(url, timeout=5).is_success:
                return
        time.sleep(0.2)
    raise SystemExit(f"{url} did not answer with 200")


def readings(nodes: dict[str, psutil.Process]) -> dict[str, dict[str, float]]:
    """Each node's figures; memory includes that of its child processes."""
    found = {}
    for name, node in nodes.items():
        memory = node.memory_info().rss
        for child in node.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                memory += child.memory_info().rss
        found[name] = dict(zip(READINGS, (memory / 2**20, node.num_threads(), node.num_fds()), strict=True))
    return found


async def sample(nodes: dict[str, psutil.Process], peak: dict[str, dict[str, float]]) -> None:
    """Keeps the highest figures of each node in `peak`."""
    while True:
        for name, figures in readings(nodes).items():
            kept = peak.setdefault(name, dict(figures))
            kept.update({reading: max(value, kept[reading]) for reading, value in figures.items()})
        await asyncio.sleep(0.5)


async def settle(nodes: dict[str, psutil.Process], before: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """The figures once they are back to those of before, or after `SETTLE_S`."""
    end = time.monotonic() + SETTLE_S
    while True:
        now = readings(nodes)
        pairs = itertools.product(before, READINGS)
        if all(now[node][reading] <= before[node][reading] + MAX_GROWTH[reading] for node, reading in pairs):
            return now
        if time.monotonic() > end:
            return now
        await asyncio.sleep(1)


# ---- attackers

Outcomes = Counter[str]
Attack = Callable[[str, int, Outcomes], Awaitable[None]]


async def attack(url: str, without: list[str]) -> None:
    """Runs all attacks until standard input ends, then prints what came of them as JSON."""
    host, port = url.removeprefix("http://").split(":")
    outcomes: dict[str, Outcomes] = {name: Counter() for name in ATTACKS if name not in without}

    async def repeat(name: str, run: Attack) -> None:
        while True:
            try:
                await run(host, int(port), outcomes[name])
            except (OSError, httpx.HTTPError, asyncio.IncompleteReadError) as error:
                outcomes[name][type(error).__name__] += 1
                await asyncio.sleep(0.1)

    tasks = []
    for name, (run, copies) in ATTACKS.items():
        if name not in without:
            tasks += [asyncio.create_task(repeat(name, run)) for _ in range(copies)]
    await asyncio.to_thread(sys.stdin.read)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    print(json.dumps(outcomes))


def posting(make: Callable[[], bytes], headers: dict[str, str] | None = None) -> Attack:
    """Posts one body again and again; the outcome is the status."""
    body: list[bytes] = []

    async def run(host: str, port: int, outcomes: Outcomes) -> None:
        if not body:
            body.append(await asyncio.to_thread(make))
        async with httpx.AsyncClient(base_url=f"http://{host}:{port}", timeout=60) as client:
            while True:
                sent = {"content-type": "application/json", **(headers or {})}
                response = await client.post("/v1/chat/completions", content=body[0], headers=sent)
                outcomes[str(response.status_code)] += 1

    return run


def holding(first: bytes, drip: bytes = b"", every: float = 1.0) -> Attack:
    """Opens a connection, sends `first`, then `drip` again and again, until the server has enough of it."""

    async def run(host: str, port: int, outcomes: Outcomes) -> None:
        async with connection(host, port) as (reader, writer):
            writer.write(first)
            answered = asyncio.ensure_future(reader.read(1000))
            while not answered.done():
                await asyncio.wait([answered], timeout=every)
                writer.write(drip)
                await writer.drain()
            outcomes[status_of(await answered)] += 1

    return run


async def leave_unread(host: str, port: int, outcomes: Outcomes) -> None:
    """Asks for a long stream and never reads it."""
    body = json.dumps({**ask("Tell a story."), "stream": True, "max_tokens": 512, "ignore_eos": True}).encode()
    async with connection(host, port) as (_, writer):
        writer.write(head(len(body)) + body)
        await writer.drain()
        await asyncio.sleep(20)
        outcomes["left"] += 1


async def cancel(host: str, port: int, outcomes: Outcomes) -> None:
    """Asks, and goes away at a random time before the answer."""
    body = json.dumps({**ask("Tell a story."), "max_tokens": 256, "ignore_eos": True}).encode()
    async with connection(host, port) as (_, writer):
        writer.write(head(len(body)) + body)
        await writer.drain()
        await asyncio.sleep(random.uniform(0, 1))
        outcomes["left"] += 1


@contextlib.asynccontextmanager
async def connection(host: str, port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection(host, port, limit=2**16)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def status_of(answer: bytes) -> str:
    return answer.split(b" ", 2)[1].decode() if answer.startswith(b"HTTP/") else "closed"


def head(length: int, host: str = "localhost") -> bytes:
    lines = [
        "POST /v1/chat/completions HTTP/1.1",
        f"Host: {host}",
        "Content-Type: application/json",
        f"Content-Length: {length}",
    ]
    return "\r\n".join([*lines, "", ""]).encode()


def ask(text: str, *parts: dict[str, Any]) -> dict[str, Any]:
    content = [*parts, {"type": "text", "text": text}]
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 1}


def picture(data: bytes, kind: str = "image") -> dict[str, Any]:
    url = f"data:{kind}/x;base64,{base64.b64encode(data).decode()}"
    return {"type": f"{kind}_url", f"{kind}_url": {"url": url}}


def large_grey() -> bytes:
    """A picture of 64 megapixels in 16-bit grey, of 100 KB or so."""
    file = io.BytesIO()
    Image.fromarray(np.zeros((8192, 8191), np.uint16)).save(file, "PNG")
    return json.dumps(ask("?", picture(file.getvalue()))).encode()


def never_resolved() -> bytes:
    return json.dumps(ask("?", {"type": "image_url", "image_url": {"url": "http://never.invalid/a.png"}})).encode()


# name -> attack, and how many run at once
ATTACKS: dict[str, tuple[Attack, int]] = {
    "silent connections": (holding(b""), 128),
    "half heads": (holding(b"POST /v1/chat/completions HTTP/1.1\r\nHost: loc"), 64),
    "heads that drip": (holding(b"GET /health HTTP/1.1\r\nHost: localhost\r\n", b"x-a: b\r\n", 0.5), 32),
    "bodies that never come": (holding(head(1 << 20)), 128),
    "bodies that drip": (holding(head(1 << 20), b" ", 0.5), 32),
    "streams nobody reads": (leave_unread, 4),
    "clients that go away": (cancel, 4),
    "64 megapixels of 16-bit grey": (posting(large_grey), 2),
    "names that never resolve": (posting(never_resolved), 8),
    "foreign names": (posting(lambda: json.dumps(ask("?")).encode(), {"host": "evil.example"}), 2),
    "malformed origins": (posting(lambda: json.dumps(ask("?")).encode(), {"origin": "http://[x]/"}), 2),
    "many small things": (posting(lambda: b'{"messages":[' + b"[]," * (5 << 20) + b"[]]}"), 2),
    "deep nesting": (posting(lambda: b'{"messages":' + b"[" * (8 << 20)), 1),
}

if __name__ == "__main__":
    main()
