"""A node of the split as a process that fails on command: `python -m tests.fault_node JSON`, for `tests.fault_run`.

It spoils its own control messages and writes at given rates, and kills or stops itself at the moment that it is told,
which no other process could hit. Prints one line when it is ready; each line on standard input is a command, answered
by one line; it ends with its input.
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
from deepstack_jax.disagg.encode.server import EncodeServer
from deepstack_jax.disagg.language.encoders import EncoderLinks
from deepstack_jax.disagg.nodes import open_encode_server, open_encoder_links
from deepstack_jax.disagg.transports import Piece, mooncake
from deepstack_jax.disagg.transports.mooncake import MooncakeTransport
from deepstack_jax.disagg.wire.messages import Accepted, Grant, Written, decode
from deepstack_jax.serving.http import create_app
from deepstack_jax.serving.policy import MediaPolicy
from deepstack_jax.serving.text_node import TextNode
from tests.faults import Fault, FaultyTransport, random_faults, tamper_with_messages

BLOCK, POOL_BLOCKS, SHARE = 16, 9, 3  # tokens; a pool that fits three requests' shares
MESSAGE_RATES = {"drop": 0.04, "double": 0.04, "reorder": 0.06, "malformed": 0.04}
WRITE_RATES = {"delay": 0.1, "drop": 0.02, "fail": 0.02, "stall": 0.02, "late": 0.03, "corrupt": 0.03}
PR_SET_PDEATHSIG = 1
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


class Options(msgspec.Struct):
    """What the command line says, as JSON."""

    role: str
    checkpoint: str
    seed: int
    timeout: float  # seconds, of a request
    transfer_timeout: float  # seconds; late writes come within it
    endpoint: str = ""  # of an encode node
    encoders: tuple[str, ...] = ()  # of a language node


class Mischief:
    """What goes wrong in this process, while `wild`; and the moment at which it is to end or to stop, if any."""

    def __init__(self, options: Options):
        self.wild = False
        self.armed: tuple[str, str] | None = None  # (kill or stop, before or during or after a transfer)
        self.messages: Counter[str] = Counter()
        self._random = random.Random(options.seed)
        self._seconds = options.transfer_timeout / 2

    def tamper(self, data: bytes) -> list[tuple[float, bytes]]:
        """What goes out in place of a message, and when (see `tamper_with_messages`)."""
        message = decode(data)[0]
        if isinstance(message, Accepted):
            self.reached("before")
        elif isinstance(message, Written):
            asyncio.get_running_loop().call_later(0.01, self.reached, "after")
        elif isinstance(message, Grant):
            asyncio.get_running_loop().call_later(self._random.random() * 0.02, self.reached, "granted")
        kind = self._drawn()
        self.messages[kind] += 1
        delay = self._random.random() * self._seconds
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
        """The fate of each write: every kind of fault once soon, then as the rates say."""
        kinds = list(WRITE_RATES)
        self._random.shuffle(kinds)
        first = [fault for kind in kinds for fault in (None, None, Fault(kind, self._seconds))]
        for fault in itertools.chain(first, random_faults(seed, WRITE_RATES, self._seconds)):
            while not self.wild:
                yield None
            yield fault

    def reached(self, moment: str) -> None:
        """Ends or stops the process, if it is to do so now."""
        if self.armed and self.armed[1] == moment:
            how, self.armed = self.armed[0], None
            os.kill(os.getpid(), SIGNALS[how])

    def _drawn(self) -> str:
        place = self._random.random() if self.wild else 1.0
        for kind, rate in MESSAGE_RATES.items():
            if place < rate:
                return kind
            place -= rate
        return "none"

    def _malformed(self, data: bytes) -> bytes:
        """Something in its place that is no message: what can be read is taken at its word, and CURVE's business."""
        instead = self._random.choice(
            (
                data[: self._random.randrange(len(data))],
                self._random.randbytes(40),
                bytes(1) + data,
                data + b"\x00",
                data[:1] + msgspec.msgpack.encode({"type": "Grant", "request_id": ["x"] * 99, "attempt": -1}),
            )
        )
        assert decode(instead)[0] is None, instead
        return instead


class Transport(FaultyTransport):
    """Faulty, and tells when a write has begun."""

    def __init__(self, mischief: Mischief, seed: int):
        super().__init__(MooncakeTransport("127.0.0.1"), mischief.faults(seed), seed)
        self._mischief = mischief

    def submit(self, session: str, pieces: Sequence[Piece]) -> "Future[None]":
        write = super().submit(session, pieces)
        self._mischief.reached("during")
        return write


class Errors(logging.Handler):
    """Keeps what is logged as an error: nothing that happens here should be one."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        self.lines.append(f"{record.name}: {record.getMessage()}" + (f" ({error!r})" if error else ""))


def used(errors: Errors, mischief: Mischief) -> dict[str, Any]:
    """What every process says of itself."""
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
        "messages": mischief.messages,
    }


def encode_state(server: EncodeServer, transport: Transport) -> dict[str, Any]:
    """What an encode node holds."""
    return {
        "outgoing": len(server.sender.outgoing),
        "jobs": len(server._jobs),
        "peers": len(server.peers),
        "closing": len(server._closing),
        "malformed": server.listener.dropped,
        "writes": transport.counts,
    }


def language_state(links: EncoderLinks) -> dict[str, Any]:
    """What a language node holds."""
    pool = links.receiver.pool
    return {
        "requests": len(links.receiver.requests),
        "pending": len(links._pending),
        "closing": len(links.receiver.closing),
        "free": sorted(pool._free),
        "used": pool.num_used,
        "quarantined": pool.num_quarantined,
        "encoders": links.num_encoders,
        "malformed": sum(link.connection.dropped for link in links._links),
        "memory": sum(len(free) for free in links._bridge._memory._free),
    }


async def commands(mischief: Mischief, state: Any) -> None:
    """Answers lines until there are no more."""
    while line := await asyncio.to_thread(sys.stdin.readline):
        command = json.loads(line)
        mischief.wild = command.get("wild", mischief.wild)
        if "arm" in command:
            mischief.armed = tuple(command["arm"]) if command["arm"] else None
        print(json.dumps(state()), flush=True)


async def encode_node(options: Options, errors: Errors) -> None:
    mischief = Mischief(options)
    transport = Transport(mischief, options.seed)
    model = dsj.load(options.checkpoint, parts=("visual.",))
    tamper_with_messages(mischief.tamper).start()
    server = open_encode_server(model, endpoint=options.endpoint, block_size=BLOCK, transport=transport)
    await server.start()
    print(json.dumps({"url": server.listener.endpoint}), flush=True)
    await commands(mischief, lambda: used(errors, mischief) | encode_state(server, transport))
    await server.close()


async def language_node(options: Options, errors: Errors) -> None:
    import uvicorn

    mischief = Mischief(options)
    model = dsj.load(options.checkpoint, parts=("language_model.",))
    links = open_encoder_links(
        model,
        options.encoders,
        block_size=BLOCK,
        num_blocks=POOL_BLOCKS,
        share=SHARE,
        transfer_timeout=options.transfer_timeout,
    )
    tamper_with_messages(mischief.tamper).start()
    policy = MediaPolicy()
    node = TextNode(model, policy, encoders=links)
    await node.start()
    app = create_app(node, policy, timeout=options.timeout)
    config = uvicorn.Config(app, port=0, http="h11", ws="none", lifespan="off", log_config=None, access_log=False)
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    print(json.dumps({"url": f"http://127.0.0.1:{port}"}), flush=True)
    await commands(mischief, lambda: used(errors, mischief) | language_state(links))
    server.should_exit = True
    await serving
    node.stop(0.0)
    await node.close()


def main() -> None:
    with contextlib.suppress(AttributeError):  # Linux: a stopped process would outlive its parent
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    options = msgspec.json.decode(sys.argv[1], type=Options)
    errors = Errors()
    logging.getLogger().addHandler(errors)
    logging.getLogger().addHandler(logging.StreamHandler())
    mooncake.IDLE_SECONDS = 2.0  # so that a thread which is left over can be told from one that still waits
    asyncio.run({"encode": encode_node, "language": language_node}[options.role](options, errors))


if __name__ == "__main__":
    main()
