"""A node of the split that fails on command: `python -m tests.fault_node JSON`, for `tests.fault_run`.

It damages its own control messages and writes at given rates, and kills or stops itself at a requested moment, which is
more precise than another process could be. It prints one line when it is ready, answers each line of its standard input
with one line, and ends with its input.
"""

import asyncio
import contextlib
import ctypes
import gc
import itertools
import json
import logging
import os
import random
import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import msgspec
import psutil

import deepstack_jax as dsj
from deepstack_jax.disagg.encode import server as encode_server
from deepstack_jax.disagg.encode.server import EncodeServer
from deepstack_jax.disagg.language import link
from deepstack_jax.disagg.language.encoder_pool import EncoderPool
from deepstack_jax.disagg.nodes import open_encode_server, open_encoder_pool
from deepstack_jax.disagg.transports import WriteSegment, mooncake
from deepstack_jax.disagg.transports.mooncake import MooncakeTransport
from deepstack_jax.disagg.wire.messages import Accepted, Grant, Written, unpack_message
from deepstack_jax.serving.http import create_app
from deepstack_jax.serving.policy import MediaPolicy
from deepstack_jax.serving.text_node import TextNode
from tests.faults import Fault, FaultyTransport, inject_message_faults, random_faults

BLOCK, POOL_BLOCKS, SHARE = 16, 9, 3  # tokens, blocks, blocks: the pool has room for the shares of three requests
MESSAGE_RATES = {"drop": 0.04, "double": 0.04, "reorder": 0.06, "malformed": 0.04}
WRITE_RATES = {"delay": 0.1, "drop": 0.02, "fail": 0.02, "stall": 0.02, "late": 0.03, "corrupt": 0.03}
PR_SET_PDEATHSIG = 1
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


class Options(msgspec.Struct):
    """The command line's argument, as JSON."""

    role: str
    checkpoint: str
    seed: int
    timeout: float  # seconds per request
    transfer_timeout: float  # seconds; late writes land within it
    heartbeat_timeout: float  # seconds, for either side to consider the other gone
    endpoint: str = ""  # control endpoint of an encode node
    encoders: tuple[str, ...] = ()  # encode nodes of a language node


class FaultInjector:
    """Draws the faults of this process while `active`, and kills or stops it at the moment for which it is armed."""

    def __init__(self, options: Options):
        self.active = False
        self.armed: tuple[str, str] | None = None  # (kill or stop, the moment)
        self.messages: Counter[str] = Counter()
        self._random = random.Random(options.seed)
        self._max_delay_s = options.transfer_timeout / 2

    def replace(self, data: bytes) -> list[tuple[float, bytes]]:
        """Returns what to send instead of a message, and when (see `inject_message_faults`)."""
        message = unpack_message(data)[0]
        if isinstance(message, Accepted):
            self.reached("before")
        elif isinstance(message, Written):
            asyncio.get_running_loop().call_later(0.01, self.reached, "after")
        elif isinstance(message, Grant):
            asyncio.get_running_loop().call_later(self._random.random() * 0.02, self.reached, "granted")
        kind = self._draw()
        self.messages[kind] += 1
        delay = self._random.random() * self._max_delay_s
        match kind:
            case "drop":
                return []
            case "double":
                return [(0.0, data), (delay, data)]
            case "reorder":
                return [(delay, data)]
            case "malformed":
                return [(0.0, self._malformed(data))]
        return [(0.0, data)]

    def faults(self, seed: int) -> Iterator[Fault | None]:
        """Yields the fault of each write: first every kind once, then random ones at WRITE_RATES."""
        kinds = list(WRITE_RATES)
        self._random.shuffle(kinds)
        first = [fault for kind in kinds for fault in (None, None, Fault(kind, self._max_delay_s))]
        for fault in itertools.chain(first, random_faults(seed, WRITE_RATES, self._max_delay_s)):
            while not self.active:
                yield None
            yield fault

    def reached(self, moment: str) -> None:
        """Kills or stops the process if it is armed for this moment."""
        if self.armed and self.armed[1] == moment:
            how, self.armed = self.armed[0], None
            os.kill(os.getpid(), SIGNALS[how])

    def _draw(self) -> str:
        place = self._random.random() if self.active else 1.0
        for kind, rate in MESSAGE_RATES.items():
            if place < rate:
                return kind
            place -= rate
        return "none"

    def _malformed(self, data: bytes) -> bytes:
        """Returns bytes that are not a message. Forged but readable messages are out of scope: CURVE prevents them."""
        instead = self._random.choice(
            (
                data[: self._random.randrange(len(data))],
                self._random.randbytes(40),
                bytes(1) + data,
                data + b"\x00",
                data[:1] + msgspec.msgpack.encode({"type": "Grant", "request_id": ["x"] * 99, "attempt": -1}),
            )
        )
        assert unpack_message(instead)[0] is None, instead
        return instead


class FaultyMooncake(FaultyTransport):
    """Mooncake with injected faults; reports the start of each write to the injector."""

    def __init__(self, injector: FaultInjector, seed: int):
        super().__init__(MooncakeTransport("127.0.0.1"), injector.faults(seed), seed)
        self._mischief = injector

    def submit(self, session: str, segments: Sequence[WriteSegment]) -> "Future[None]":
        write = super().submit(session, segments)
        self._mischief.reached("during")
        return write


class ErrorLog(logging.Handler):
    """Collects log records of level ERROR; no fault may cause one."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        self.lines.append(f"{record.name}: {record.getMessage()}" + (f" ({error!r})" if error else ""))


def process_state(errors: ErrorLog, injector: FaultInjector) -> dict[str, Any]:
    """The resources, errors and message faults of this process."""
    gc.collect()
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    process = psutil.Process()
    return {
        "rss": process.memory_info().rss,
        "native_threads": process.num_threads(),
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "fds": process.num_fds(),
        "errors": errors.lines,
        "messages": injector.messages,
    }


def encode_state(server: EncodeServer, transport: FaultyMooncake) -> dict[str, Any]:
    """The requests, peers and write faults of an encode node."""
    return {
        "outgoing": len(server.sender.outgoing),
        "attempts": server.num_attempts,
        "peers": len(server.peers),
        "closing_bridges": server.num_closing_bridges,
        "malformed": server.listener.num_unreadable,
        "writes": transport.counts,
    }


def language_state(encoders: EncoderPool) -> dict[str, Any]:
    """The requests, blocks and encoders of a language node."""
    pool = encoders.receiver.pool
    return {
        "requests": len(encoders.receiver.requests),
        "fetches": encoders.num_fetches,
        "abandoned": len(encoders.receiver.abandoned),
        "free": pool.free_blocks,
        "used": pool.num_used,
        "quarantined": pool.num_quarantined,
        "encoders": encoders.num_encoders,
        "malformed": encoders.num_unreadable,
        "memory": encoders.spare_bytes,
    }


async def commands(injector: FaultInjector, state: Any) -> None:
    """Executes commands until standard input ends, and answers each with the state."""
    while line := await asyncio.to_thread(sys.stdin.readline):
        command = json.loads(line)
        injector.active = command.get("inject", injector.active)
        if "arm" in command:
            injector.armed = tuple(command["arm"]) if command["arm"] else None
        print(json.dumps(state()), flush=True)


async def encode_node(options: Options, errors: ErrorLog) -> None:
    injector = FaultInjector(options)
    transport = FaultyMooncake(injector, options.seed)
    model = dsj.load(options.checkpoint, parts=("visual.",))
    inject_message_faults(injector.replace).start()
    server = open_encode_server(model, endpoint=options.endpoint, block_size=BLOCK, transport=transport)
    await server.start()
    print(json.dumps({"url": server.listener.endpoint}), flush=True)
    await commands(injector, lambda: process_state(errors, injector) | encode_state(server, transport))
    await server.close()


async def language_node(options: Options, errors: ErrorLog) -> None:
    import uvicorn

    injector = FaultInjector(options)
    model = dsj.load(options.checkpoint, parts=("language_model.",))
    encoders = open_encoder_pool(
        model,
        options.encoders,
        block_size=BLOCK,
        num_blocks=POOL_BLOCKS,
        share=SHARE,
        transfer_timeout=options.transfer_timeout,
    )
    inject_message_faults(injector.replace).start()
    policy = MediaPolicy()
    node = TextNode(model, policy, encoders=encoders, warm_up=False)
    await node.start()
    app = create_app(node, policy, timeout=options.timeout)
    config = uvicorn.Config(app, port=0, http="h11", ws="none", lifespan="off", log_config=None, access_log=False)
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    print(json.dumps({"url": f"http://127.0.0.1:{port}"}), flush=True)
    await commands(injector, lambda: process_state(errors, injector) | language_state(encoders))
    server.should_exit = True
    await serving
    node.stop(0.0)
    await node.close()


def main() -> None:
    with contextlib.suppress(AttributeError):  # only on Linux; a stopped process would outlive its parent
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    options = msgspec.json.decode(sys.argv[1], type=Options)
    errors = ErrorLog()
    logging.getLogger().addHandler(errors)
    logging.getLogger().addHandler(logging.StreamHandler())
    link.HEARTBEAT_TIMEOUT_S = options.heartbeat_timeout
    encode_server.PEER_TIMEOUT_S = 2 * options.heartbeat_timeout
    mooncake.IDLE_TIMEOUT_S = 2.0  # so that idle threads end soon, and any that remain are leaks
    asyncio.run({"encode": encode_node, "language": language_node}[options.role](options, errors))


if __name__ == "__main__":
    main()
