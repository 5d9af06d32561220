"""Sends requests to encode and language processes while faults are injected, and checks that all invariants hold.

Processes are killed and stopped, and messages and writes are damaged. `benchmarks/faults.py` calls `run` for a long
run, and `tests/test_disagg_faults.py` for a short one.
"""

import asyncio
import base64
import io
import json
import random
import re
import signal
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from PIL import Image

import deepstack_jax as dsj
from deepstack_jax.disagg.language.link import HEARTBEAT_TIMEOUT_S
from deepstack_jax.testing.random_checkpoint import tiny_config
from tests.fault_node import MESSAGE_RATES, POOL_BLOCKS, WRITE_RATES
from tests.nodes import NodeProcess, write_image_sensitive_checkpoint

NEW_TOKENS = 5
LATE_ANSWER_S = 3.0  # an answer must reach the client within this time after the request's deadline
MAX_RSS_GROWTH = 64 << 20  # bytes per process
MAX_NEW_FDS, MAX_NEW_THREADS = 12, 8  # per process
STATE_POLL_S = 0.02
ENCODER_FAULTS = (("kill", "before"), ("kill", "during"), ("kill", "after"), ("stop", "during"))
LANGUAGE_FAULTS = (("kill", "granted"), ("stop", "granted"))
RETRYABLE = (502, 503, 504)  # statuses of failures that are not the request's fault
# name of a prompt -> sizes of its images
PROMPTS: dict[str, list[tuple[int, int]]] = {
    "one": [(256, 256)],
    "another": [(256, 256)],
    "large": [(320, 352)],
    "three": [(256, 256), (352, 224), (256, 320)],
    "text": [],
}


@dataclass(frozen=True)
class Plan:
    """The requests, the faults and the limits of a run."""

    requests: int  # at least; requests continue until every fault has occurred
    seed: int
    encoder_faults: tuple[tuple[str, str], ...] = ENCODER_FAULTS  # (signal, moment), one after another
    language_faults: tuple[tuple[str, str], ...] = LANGUAGE_FAULTS  # concurrent with the encoder faults
    encoders: int = 2
    languages: int = 1
    clients: int = 4
    pause: float = 1.0  # maximum seconds between two requests of a client
    timeout: float = 8.0  # seconds per request
    transfer_timeout: float = 3.0  # seconds without progress
    heartbeat_timeout: float = HEARTBEAT_TIMEOUT_S  # seconds; less than `timeout`, so that requests fail over


@dataclass
class Report:
    """The result of a run. `failures` is empty if all invariants held."""

    plan: Plan
    failures: list[str] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    process_faults: Counter[str] = field(default_factory=Counter)
    message_faults: Counter[str] = field(default_factory=Counter)
    write_faults: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)  # duration of each request, except those whose client left
    growth: dict[str, int] = field(default_factory=dict)  # bytes per process at the end
    wall: float = 0.0

    @property
    def requests(self) -> int:
        return sum(self.outcomes.values())

    def table(self) -> str:
        """The result as text."""
        seconds = sorted(self.seconds) or [0.0]
        rows = [
            ("requests", f"{self.requests} in {self.wall:.0f} s, seed {self.plan.seed}"),
            *((f"  {name}", str(count)) for name, count in self.outcomes.most_common()),
            ("seconds", f"median {seconds[len(seconds) // 2]:.2f}, longest {seconds[-1]:.2f}"),
            ("errors", ""),
            *((f"  {count}", reason) for reason, count in self.reasons.most_common()),
            ("processes", _listed(self.process_faults)),
            ("messages", _listed(self.message_faults)),
            ("writes", _listed(self.write_faults)),
            ("memory", ", ".join(f"{name} {grown / 2**20:+.0f} MB" for name, grown in self.growth.items())),
            *(("FAILED", failure) for failure in self.failures),
        ]
        return "\n".join(f"{name:<24}{value}" for name, value in rows)


def run(plan: Plan, checkpoint: Path, folder: Path) -> Report:
    """Starts the processes, injects the planned faults and checks the invariants. Logs are written to `folder`."""
    return asyncio.run(_Run(plan, checkpoint, folder).run())


def make_checkpoint(folder: Path) -> Path:
    """Writes a tiny model whose answers depend on the images."""
    vision = {"depth": 1, "deepstack_visual_indexes": [0]}
    text = {"num_hidden_layers": 2, "max_position_embeddings": 2048}
    path = folder / "model"
    write_image_sensitive_checkpoint(path, tiny_config(text_config=text, vision_config=vision))
    return path


def expected_answers(checkpoint: Path) -> dict[str, list[int]]:
    """Returns the whole model's answer to each prompt.

    Raises:
        ValueError: two prompts have the same answer and can't be told apart.
    """
    model = dsj.load(checkpoint)
    answers = {}
    for name in PROMPTS:
        inputs = dsj.prepare(model, _question(name), images=[Image.open(io.BytesIO(png)) for png in _pictures(name)])
        out = dsj.generate(model, **inputs, max_new_tokens=NEW_TOKENS, eos_token_id=[])
        answers[name] = np.asarray(out.tokens)[0].tolist()
    if len({tuple(answer) for answer in answers.values()}) < len(answers):
        raise ValueError(f"answers {answers} are not all different: choose other images or another checkpoint")
    return answers


class Node:
    """One node of the split: the process of `tests.fault_node` that runs now, after others at the same address."""

    def __init__(self, name: str, options: dict[str, Any], log: Path):
        self.name, self.options, self.log = name, options, log
        self.up = False
        self.num_starts = 0
        self.down: list[tuple[str, float, float]] = []  # (kill or stop, from, to)
        self.past: list[dict[str, Any]] = []  # the last state of each former process
        self.state: dict[str, Any] = {}

    async def start(self) -> None:
        """Starts a process at the node's address, and waits until it is ready."""
        options = self.options | {"seed": self.options["seed"] + 1000 * self.num_starts}
        self.num_starts += 1
        env = {"JAX_COMPILATION_CACHE_DIR": str(self.log.parent / "programs")}
        env |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
        self.node = NodeProcess("tests.fault_node", json.dumps(options), log=self.log, **env)
        self.url = (await self._in_thread(self.node.read))["url"]
        self.up = True

    @property
    def process(self) -> subprocess.Popen[str]:
        return self.node.process

    async def command(self, **command: Any) -> dict[str, Any]:
        """Sends a command; returns the node's state after it."""
        self.state = await self._in_thread(lambda: self.node.command(**command))
        return self.state

    async def close(self) -> str | None:
        """Ends the node as its operator would; returns what went wrong."""
        if (code := self.process.poll()) is not None:
            return f"{self.name} had already ended, with {code}"
        code = await asyncio.to_thread(self.node.close)
        if code is None:
            return f"{self.name} did not end within 30 s"
        return f"{self.name} ended with {code}" if code else None

    def seconds_down(self, how: str, since: float, until: float) -> float:
        """Seconds of an interval in which the node was killed or stopped."""
        return sum(max(0.0, min(stop, until) - max(start, since)) for kind, start, stop in self.down if kind == how)

    async def _in_thread(self, call: Callable[[], Any]) -> Any:
        try:
            return await asyncio.wait_for(asyncio.to_thread(call), 120)
        except RuntimeError as error:
            raise RuntimeError(f"{self.name}: {error}, see {self.log}") from None


class _Run:
    def __init__(self, plan: Plan, checkpoint: Path, folder: Path):
        self.plan, self.report = plan, Report(plan)
        self.random = random.Random(plan.seed)
        self.expected = expected_answers(checkpoint)
        self.bodies = {name: _body(name) for name in PROMPTS}
        self.breaking = True
        common = {"checkpoint": str(checkpoint), "timeout": plan.timeout, "transfer_timeout": plan.transfer_timeout}
        common["heartbeat_timeout"] = plan.heartbeat_timeout

        def node(role: str, number: int, **options: Any) -> Node:
            name = f"{role} {number}"
            seed = plan.seed + 100 * number + (role == "language")
            return Node(name, common | {"role": role, "seed": seed, **options}, folder / f"{role}{number}.log")

        addresses = [f"tcp://127.0.0.1:{_free_port()}" for _ in range(plan.encoders)]
        self.encoders = [node("encode", i, endpoint=address) for i, address in enumerate(addresses)]
        self.languages = [node("language", i, encoders=addresses) for i in range(plan.languages)]
        self.nodes = self.encoders + self.languages
        self.baseline: dict[Node, dict[str, Any]] = {}

    async def run(self) -> Report:
        try:
            # one connection per request: the server might close a kept one just when it is reused
            limits = httpx.Limits(max_keepalive_connections=0)
            async with httpx.AsyncClient(timeout=None, trust_env=False, limits=limits) as self.http:
                await asyncio.gather(*(node.start() for node in self.nodes))
                await self.work()
            ends = await asyncio.gather(*(node.close() for node in self.nodes))
            self.report.failures += [end for end in ends if end]
        finally:
            for node in self.nodes:
                if hasattr(node, "node"):
                    node.node.kill()
        return self.report

    async def work(self) -> None:
        await self.warm_up()
        began = time.monotonic()
        for node in self.nodes:
            self.baseline[node] = await node.command(inject=True)
        clients = [asyncio.create_task(self.client()) for _ in range(self.plan.clients)]
        await asyncio.gather(
            self.break_all(self.encoders, self.plan.encoder_faults),
            self.break_all(self.languages, self.plan.language_faults),
        )
        self.breaking = False
        await asyncio.gather(*clients)
        for node in self.nodes:
            await node.command(inject=False)
        self.report.wall = time.monotonic() - began
        await self.settle()
        for name in PROMPTS:  # all of them must still work
            for node in self.languages:
                if (outcome := await self.request(node, name)) != "answered":
                    self.report.failures.append(f"after the faults: {name} on {node.name} {outcome}")
        self.judge()

    async def warm_up(self) -> None:
        """Compiles all programs and lets all buffers grow before memory is measured."""
        for node in self.languages:
            while (await node.command())["encoders"] < len(self.encoders):
                await asyncio.sleep(0.1)
        for _ in range(2):
            for name in PROMPTS:  # some answers may be late here, because the servers compile
                await asyncio.gather(*(self.ask(node, name) for node in self.languages for _ in range(2)))

    # requests

    async def client(self) -> None:
        while self.breaking or self.report.requests < self.plan.requests:
            ready = [node for node in self.languages if node.up]
            if ready:
                node, name = self.random.choice(ready), self.random.choice(list(PROMPTS))
                patience = self.random.random() * 0.5 if self.random.random() < 0.1 else None
                outcome = await self.request(node, name, patience, stream=self.random.random() < 0.3)
                self.report.outcomes[outcome] += 1
            await asyncio.sleep(self.random.random() * self.plan.pause)

    async def request(self, node: Node, name: str, patience: float | None = None, stream: bool = False) -> str:
        """Sends a request and checks its end, which it returns. The client disconnects after `patience` seconds."""
        began, plan = time.monotonic(), self.plan
        try:
            async with asyncio.timeout(patience):
                status, tokens, reason = await self.ask(node, name, stream)
        except TimeoutError:
            return "abandoned by the client"
        took = time.monotonic() - began
        # the node may answer later by the time for which it was stopped
        late_s = took - node.seconds_down("stop", began, time.monotonic()) - plan.timeout - LATE_ANSWER_S
        self.report.seconds.append(took)
        if late_s > 0:
            self.report.failures.append(f"{name} on {node.name} ended after {took:.1f} s: {status} {reason}")
        if tokens is not None:
            if tokens == self.expected[name]:
                return "answered"
            self.report.failures.append(f"WRONG ANSWER to {name}: {tokens}, expected {self.expected[name]}")
            return "answered wrongly"
        self.report.reasons[f"{status}: {re.sub(r'[0-9a-f]{8,}|[0-9]+', '#', reason)}"] += 1
        if status is None:
            await asyncio.sleep(0.5)  # until the end of the process is known
            killed = node.seconds_down("kill", began - 1, time.monotonic() + 1) or node.process.poll() is not None
            if not killed:
                self.report.failures.append(
                    f"{name} on {node.name}: the connection broke although the node was not killed"
                )
            return "lost with its node"
        if status not in RETRYABLE or not reason or "\n" in reason:
            self.report.failures.append(f"{name} on {node.name} ended with an unexpected error: {status} {reason!r}")
        return "refused with a reason"

    async def ask(self, node: Node, name: str, stream: bool = False) -> tuple[int | None, list[int] | None, str]:
        """Returns (status, tokens, reason): tokens of a complete answer, and no status if the connection broke."""
        body = self.bodies[name] | {"stream": stream}
        try:
            response = await self.http.post(f"{node.url}/generate", json=body)
            if response.status_code != 200:
                return response.status_code, None, response.json()["error"]["message"]
            if not stream:
                return 200, response.json()["output_ids"], ""
            events = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
            if "error" in events[-1]:  # the status 200 was sent earlier
                is_late = "no answer" in events[-1]["error"]["message"]
                return 504 if is_late else 500, None, events[-1]["error"]["message"]
            return 200, events[-1]["output_ids"], ""
        except httpx.TransportError as error:
            return None, None, type(error).__name__

    # faults of whole processes

    async def break_all(self, nodes: list[Node], faults: tuple[tuple[str, str], ...]) -> None:
        for how, moment in faults:
            await asyncio.sleep(self.random.random())
            await self.break_one(self.random.choice(nodes), how, moment)

    async def break_one(self, node: Node, how: str, moment: str) -> None:
        """Kills the node and restarts it, or stops it until the deadlines of its requests have passed."""
        state = await node.command(arm=[how, moment])
        process = psutil.Process(node.process.pid)
        async with asyncio.timeout(120):  # until a request reaches the moment
            while node.process.poll() is None and process.status() != psutil.STATUS_STOPPED:
                await asyncio.sleep(STATE_POLL_S)
        since = time.monotonic()
        if how == "kill":
            node.up = False
            node.node.kill()  # it has ended; this closes its pipes
            node.past.append(state)
            node.down.append((how, since, float("inf")))
            await asyncio.sleep(self.random.random())
            await node.start()
            node.down[-1] = how, since, time.monotonic()
            await node.command(inject=True)
        else:
            node.down.append((how, since, float("inf")))
            await asyncio.sleep(self.plan.timeout + 1)
            process.send_signal(signal.SIGCONT)
            node.down[-1] = how, since, time.monotonic()
        kind = "encode" if node in self.encoders else "language"
        self.report.process_faults[f"{kind} {how} {moment}"] += 1

    # invariants at the end

    async def settle(self) -> None:
        """Waits until all nodes are idle and connected to each other; anything that remains is a failure."""
        until = time.monotonic() + self.plan.timeout + self.plan.transfer_timeout + 20
        while left := [problem for node in self.nodes for problem in self.unsettled(node, await node.command())]:
            if time.monotonic() > until:
                self.report.failures += left
                return
            await asyncio.sleep(0.5)

    def unsettled(self, node: Node, state: dict[str, Any]) -> list[str]:
        """Lists what is still in progress on a node."""
        threads = Counter(re.split(r"[^A-Za-z]", name)[0] for name in state["threads"])
        if node in self.encoders:
            expected = {"outgoing": 0, "attempts": 0, "closing_bridges": 0, "peers": len(self.languages)}
            max_threads = {"send": len(self.languages), "mooncake": 0, "prepare": 2, "encode": 1, "Thread": 0}
        else:
            expected = {"requests": 0, "fetches": 0, "abandoned": 0, "encoders": len(self.encoders)}
            expected |= {"free": list(range(POOL_BLOCKS)), "used": 0, "quarantined": 0}
            max_threads = {"receive": 1, "Thread": 0}
        found = [f"{name} {state[name]}, expected {value}" for name, value in expected.items() if state[name] != value]
        found += [
            f"{threads[name]} threads {name!r}, expected {most}"
            for name, most in max_threads.items()
            if threads[name] > most
        ]
        return [f"{node.name} at the end: {problem}" for problem in found]

    def judge(self) -> None:
        report, failures = self.report, self.report.failures
        for node in self.nodes:
            for state in [*node.past, node.state]:
                report.message_faults.update(state["messages"])
                report.write_faults.update(state.get("writes", {}))
                failures += [f"{node.name} logged an error: {line}" for line in state["errors"]]
            # compare restarted processes with those of the same role at the start
            alike = [
                self.baseline[other] for other in self.nodes if (other in self.encoders) == (node in self.encoders)
            ]
            report.growth[node.name] = grown = node.state["rss"] - max(state["rss"] for state in alike)
            if grown > MAX_RSS_GROWTH:
                failures.append(f"{node.name} has grown by {grown / 2**20:.0f} MB")
            for name, bound in (("fds", MAX_NEW_FDS), ("native_threads", MAX_NEW_THREADS)):
                if (more := node.state[name] - max(state[name] for state in alike)) > bound:
                    failures.append(f"{node.name} has {more} {name} more than at the start")
        missing = [kind for kind in MESSAGE_RATES if not report.message_faults[kind]]
        missing += [kind for kind in (*WRITE_RATES, "late landed") if not report.write_faults[kind]]
        failures += [f"no fault of kind {kind!r} has occurred" for kind in missing]
        if 4 * report.outcomes["answered"] < report.requests:
            failures.append("less than a quarter of the requests were answered, too few for a meaningful result")


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))


def _question(name: str) -> str:
    return f"What is this, number {name}?"


def _pictures(name: str) -> list[bytes]:
    """PNG files."""
    made = []
    for number, (width, height) in enumerate(PROMPTS[name]):
        pixels = np.random.default_rng([len(name), number]).integers(0, 256, (height // 16, width // 16, 3), np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels.repeat(16, 0).repeat(16, 1)).save(file, "PNG")
        made.append(file.getvalue())
    return made


def _body(name: str) -> dict[str, Any]:
    pictures = [f"data:image/png;base64,{base64.b64encode(png).decode()}" for png in _pictures(name)]
    sampling = {"max_new_tokens": NEW_TOKENS, "ignore_eos": True}
    return {"text": _question(name), "image_data": pictures or None, "sampling_params": sampling}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
