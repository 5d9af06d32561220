"""The machines of the cluster, each of which runs one node, again and again if it is killed."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from deepstack_jax.disagg.encode.sender import SenderSettings
from deepstack_jax.disagg.encode.server import EncodeServer, new_incarnation
from deepstack_jax.disagg.encode.worker import EncodeWorker
from deepstack_jax.disagg.keys.files import ClusterKey
from deepstack_jax.disagg.language.bridge import ReceiveBridge
from deepstack_jax.disagg.language.encoder_pool import EncoderPool
from deepstack_jax.disagg.language.fetch import TransferFailedError
from deepstack_jax.disagg.language.incoming import BlockRows
from deepstack_jax.disagg.language.pending import ReceiverSettings
from deepstack_jax.disagg.wire.buffers import MultimodalDataBuffers
from deepstack_jax.disagg.wire.control import Listener
from deepstack_jax.disagg.wire.messages import Hello
from deepstack_jax.models.vision import VisualRows
from deepstack_jax.processing.preparation import Preparation
from tests.simulation import model, threads
from tests.simulation.memory import SimulatedTransport
from tests.simulation.world import Process

if TYPE_CHECKING:
    from tests.simulation.clients import Call
    from tests.simulation.cluster import Cluster


KEY = ClusterKey(b"0" * 40, b"0" * 40)  # simulated sockets exchange none, but it makes nodes seal their blocks


class Machine:
    """A machine, and the node that runs on it now.

    Attributes:
        process: the newest one.
        starts: how often a node was started.
        stopping: whether it was told to stop.
    """

    kind = ""
    tells_loss = False  # whether callers learn from their connections that the process has ended

    def __init__(self, cluster: "Cluster", number: int):
        self.cluster, self.number = cluster, number
        self.name = f"{self.kind}{number}"
        self.starts = 0
        self.stopping = False
        self.process: Process

    @property
    def alive(self) -> bool:
        """Whether its process runs."""
        return self.process.alive

    def start(self) -> None:
        """Starts the node in a new process."""
        knobs, world = self.cluster.knobs, self.cluster.world
        self.starts += 1
        self.stopping = False
        self.process = Process(world, f"{self.name}#{self.starts}", knobs.slowness, knobs.hiccups)
        self.process.loop._default_executor = threads.ThreadPoolExecutor()  # type: ignore[assignment]
        self.cluster.processes.append(self.process)
        self.process.loop.call_soon(self._start)

    def run(self, work: Coroutine[Any, Any, None]) -> None:
        """Starts work in the process that has to succeed, unless the node is stopped."""
        process = self.process

        def ended(task: "asyncio.Task[None]") -> None:
            if not task.cancelled() and task.exception() is not None and not self.stopping:
                process.world.violated(process.name, "did not start:", repr(task.exception()))

        process.loop.create_task(work).add_done_callback(ended)

    def kill(self, silently: bool) -> None:
        """Ends the process without a word; if `silently`, nobody's connections notice."""
        self.process.kill()
        self.cluster.network.lose(self.process, silently)

    def stop(self, ended: Callable[[], None]) -> None:
        """Ends the node in order; then calls `ended`."""
        self.stopping = True
        process = self.process
        process.world.note("stop", process.name)

        def done(task: "asyncio.Task[None]") -> None:
            if error := task.exception():
                process.world.violated(process.name, "did not close:", repr(error))
            self.check_closed()
            process.kill()
            self.cluster.network.lose(process, silently=False)
            ended()

        process.loop.call_soon(lambda: process.loop.create_task(self.close()).add_done_callback(done))

    def check_closed(self) -> None:
        """After `close`: no thread is left."""
        if running := [thread.where for thread in self.process.threads if thread.where]:
            self.process.world.violated(self.process.name, "still has threads:", running)

    def _start(self) -> None:
        raise NotImplementedError

    async def close(self) -> None:
        """Closes the node."""
        raise NotImplementedError

    def unrest(self) -> str:
        """What the node still holds although nothing is asked of it, in words; "" for nothing."""
        raise NotImplementedError

    @property
    def _key(self) -> ClusterKey | None:
        return None if self.cluster.knobs.protection == "none" else KEY

    def _hello(self, role: Any, **fields: Any) -> Hello:
        return Hello(
            role=role,
            node_id=self.name,
            incarnation=new_incarnation(),
            model="fake",
            dtype="float32",
            hidden_size=model.WIDTH,
            num_deepstack_embeddings=model.CONFIG.num_deepstack_levels,
            block_size=self.cluster.knobs.block_size,
            encrypt_blocks=self.cluster.knobs.protection == "encryption",
            **fields,
        )


class EncodeMachine(Machine):
    """A machine with the transfer side of an encode node."""

    kind = "E"

    def __init__(self, cluster: "Cluster", number: int):
        super().__init__(cluster, number)
        self.endpoint = f"tcp://127.0.0.1:{7000 + number}"
        self.server: EncodeServer | None = None

    def _start(self) -> None:
        self._make_server()
        assert self.server is not None
        self.run(self.server.start())

    def _make_server(self) -> None:
        knobs = self.cluster.knobs
        self.transport = SimulatedTransport(self.cluster.memories, self.process, knobs.registered)
        fake = model.new_model(encodes=True)
        worker = EncodeWorker(fake, knobs.cache_bytes)
        preparation = Preparation(model.InlineDecoders())
        listener = Listener(self.endpoint, self._key)
        server = EncodeServer(fake, self._hello("encode"), listener, self.transport, worker, preparation)
        server.sender.settings = SenderSettings(knobs.block_size, knobs.max_attempts_at_once)
        self.server = server

    async def close(self) -> None:
        assert self.server is not None
        await self.server.close()

    def unrest(self) -> str:
        if (server := self.server) is None:
            return "not started"
        links = sum(machine.alive for machine in self.cluster.languages)
        held = {
            "attempts": server.num_attempts,
            "outgoing": len(server.sender.outgoing),
            "closing bridges": server.num_closing_bridges,
            "missing peers": links - len(server.peers),
            "missing peers of the sender": links - len(server.sender.peers),
            "images in line": server.worker.queued,
            "writes in flight": self.transport.in_flight,
            "missing rings": len(server.peers) - len(self.transport.registered),
            "slots in use": sum(self.cluster.knobs.slots - p.bridge._free.qsize() for p in server.peers.values()),
            str(server.failure): server.failure is not None,
        }
        return ", ".join(f"{count} {name}" for name, count in held.items() if count)


class LanguageMachine(Machine):
    """A machine with the transfer side of a language node: what takes the rows makes an answer of them at once."""

    kind = "L"

    def __init__(self, cluster: "Cluster", number: int):
        super().__init__(cluster, number)
        self.encoders: EncoderPool | None = None
        self.session = ""
        self.calls: dict[int, Any] = {}

    def _start(self) -> None:
        self._make_encoders()
        assert self.encoders is not None
        self.run(self.encoders.start())

    def _make_encoders(self, http_url: str = "") -> None:
        knobs, machines = self.cluster.knobs, self.cluster.encoders
        self.calls = {}
        transport = SimulatedTransport(self.cluster.memories, self.process)
        self.transport, self.session = transport, transport.session
        levels = model.CONFIG.num_deepstack_levels
        pool = MultimodalDataBuffers(knobs.num_blocks, knobs.block_size, model.WIDTH, levels, np.float32)
        settings = ReceiverSettings(
            knobs.num_blocks,
            knobs.block_size,
            knobs.share,
            max_tokens=model.CONFIG.text.max_position_embeddings,
            retry_interval=knobs.retry_interval,
            transfer_timeout=knobs.transfer_timeout,
            max_attempts=knobs.max_attempts,
            max_damaged=knobs.max_damaged,
            encodes_locally=knobs.http and knobs.encode_here,
        )
        ptrs, total_lens, item_lens = (tuple(sizes) for sizes in pool.get_buf_infos())
        sizes = {"ptrs": ptrs, "total_lens": total_lens, "item_lens": item_lens}
        hello = self._hello("language", session=transport.session, http_url=http_url, **sizes)
        self.cluster.checker.pools[transport.session] = (self.name, pool.layout)
        bridge = ReceiveBridge(transport, pool)
        endpoints = [machine.endpoint for machine in machines]
        self.encoders = EncoderPool(model.CONFIG, hello, bridge, transport, settings, endpoints, self._key)

    async def close(self) -> None:
        assert self.encoders is not None
        await self.encoders.close()

    def unrest(self) -> str:
        if (encoders := self.encoders) is None:
            return "not started"
        pool, alive = encoders.receiver.pool, sum(machine.alive for machine in self.cluster.encoders)
        held = {
            "requests": len(encoders.receiver.requests),
            "fetches": encoders.num_fetches,
            "abandoned attempts": len(encoders.receiver.abandoned),
            "blocks in use": pool.num_used,
            "blocks in quarantine": pool.num_quarantined,
            "lost blocks": pool.num_blocks - pool.num_used - pool.num_quarantined - len(set(pool.free_blocks)),
            "missing encoders": alive - encoders.num_encoders,
            str(encoders.failure): encoders.failure is not None,
        }
        return ", ".join(f"{count} {name}" for name, count in held.items() if count)

    def take(self, call: "Call") -> None:
        """A client's request arrives."""
        task = self.process.loop.create_task(self._answer(call))
        self.calls[call.number] = task
        task.add_done_callback(partial(self._answered, call))

    def hang_up(self, call: "Call") -> None:
        """The client goes away."""
        if task := self.calls.get(call.number):
            self.process.loop.call_soon(task.cancel)

    def _answered(self, call: "Call", task: "asyncio.Task[tuple[int, Any]]") -> None:
        del self.calls[call.number]
        if not task.cancelled():
            call.answered = True
            self.process.world.after(0.0, call.end, *task.result())

    async def _answer(self, call: "Call") -> tuple[int, Any]:
        """The status, and the answer or the reason why there is none."""
        encoders, dice = self.encoders, self.process.world.dice
        prompt = model.catalogue()[call.prompt]
        deadline = time.monotonic() + call.timeout
        if encoders is None:
            return 503, "the node is starting"
        parts: dict[BlockRows, VisualRows] = {}

        def on_rows(block: BlockRows, rows: VisualRows) -> None:
            if block in parts:
                self.process.world.violated(self.process.name, "rows came twice")
            parts[block] = rows

        cached = dice.choice([0, 0, call.cached])
        try:
            async with encoders.fetch(f"r{call.number}", call.payload, deadline, on_rows) as fetch:
                known = await fetch.prompt
                fetch.want(dice.choice([0, cached]), admitted=False)
                await asyncio.sleep(dice.random() * 0.05)
                fetch.want(cached, admitted=True)
                await fetch.done
        except TransferFailedError as error:
            return error.status, str(error)
        rows = model.right_rows(prompt.number).copy()
        for number in known.blocks_after(cached):
            block = known.blocks[number]
            rows[block.first_row : block.first_row + block.rows] = model.joined(parts.pop(block), block.rows)
        if parts:
            self.process.world.violated(self.process.name, "rows came that nobody wanted")
        return 200, model.answer_to(known.arrays.input_ids, rows)
