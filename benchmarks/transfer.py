"""Measures rows from one process's device to another's through the bridge, beside plain Mooncake writes.

    python benchmarks/transfer.py [--tokens 256 1024 4096 16384] [--rounds 7] [--pool-blocks N] [--json FILE]

The bridge's time extends from rows on the sender's device (the CPU, unless JAX_PLATFORMS says otherwise) to rows on the
receiver's, including checksums and grants. Plain writes send the same bytes in large segments from the rows' own memory
to one buffer. The benchmark waits for them both with the engine's blocking call and by polling, as the bridge does. The
line below the figures has the bridge with a key: with a tag in place of the checksum, and encrypted. Runs alternate,
and figures are medians.

"hidden" is the share of the stages' times that overlap hides from the wall time. "work" is the time for which all cores
together were busy, in milliseconds of one core, including the kernel. Linux counts it in steps of 10 ms, so it is not
precise for short runs. Divided by the number of cores it is a lower bound of the wall time. Other processes affect all
figures.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # two processes share a GPU

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from measured import chip_name

from deepstack_jax.disagg import MultimodalDataBuffers
from deepstack_jax.disagg.encode.bridge import BlockWrite, SendBridge
from deepstack_jax.disagg.encode.outgoing import OutgoingRequest
from deepstack_jax.disagg.language.bridge import ReceiveBridge
from deepstack_jax.disagg.language.incoming import BlockCopy, IncomingRequest
from deepstack_jax.disagg.transports import WriteSegment
from deepstack_jax.disagg.transports.mooncake import MooncakeTransport
from deepstack_jax.disagg.wire.layout import BufferLayout, checksum
from deepstack_jax.disagg.wire.seals import BlockSeal
from deepstack_jax.models.vision import VisualRows, separate_deepstack_embeds
from deepstack_jax.rounding import cdiv

HIDDEN, LEVELS, BLOCK = 2048, 3, int(os.environ.get("BLOCK", "128"))
ROW_BYTES = (1 + LEVELS) * HIDDEN * 2
IMAGE_TOKEN, TEXT_TOKENS = 151655, 16
SEGMENT_BYTES = 4 << 20  # per segment of a plain write


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024, 4096, 16384], help="visual tokens")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--pool-blocks", type=int, help="blocks of the receive pool; default: as many as the whole prompt takes"
    )
    parser.add_argument("--json", type=Path, help="file to which the figures are also written")
    parser.add_argument("--receive", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    blocks = options.pool_blocks or cdiv(max(options.tokens) + 2 * TEXT_TOKENS, BLOCK)
    if options.receive:
        receive(blocks, max(options.tokens) * ROW_BYTES)
        return
    print(f"{chip_name()}; jax {jax.__version__}, Mooncake {version('mooncake-transfer-engine-non-cuda')}")
    print(f"D={HIDDEN}, N={LEVELS}, bfloat16, blocks of {BLOCK} tokens, a pool of {blocks}; tcp over loopback\n")
    print("visual          bridge  plain GB/s, waited for    bridge to plain       milliseconds of", end="")
    print("                                              work, ms")
    print("tokens     MB     GB/s   blocking   polled     blocking     best", end="")
    print("    device     sums     wire  copying     wall   hidden   bridge  polled")
    command = [sys.executable, __file__, *sys.argv[1:], "--receive"]
    figures = []
    # a TPU belongs to one process
    environment = os.environ | ({"JAX_PLATFORMS": "cpu"} if jax.default_backend() == "tpu" else {})
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "env": environment}
    with subprocess.Popen(command, text=True, **pipes) as child:
        sender = Sender(child)
        for tokens in options.tokens:
            figures.append(measure(sender, tokens, options.rounds))
        sender.close()
    if options.json:
        options.json.write_text(
            json.dumps({"machine": chip_name(), "jax": jax.__version__, "figures": figures}, indent=1)
        )


class Sender:
    """The sending half of the measurement. It talks to `receive`, in a child process, through two pipes."""

    def __init__(self, child: subprocess.Popen[str]):
        self.child = child
        self._write_lock = threading.Lock()
        ready = self.answer()
        self.session, self.raw = ready["session"], ready["raw"]
        self.transport = MooncakeTransport("127.0.0.1")
        self.layout = BufferLayout(BLOCK, *map(tuple, ready["infos"]))
        self.bridges = {
            name: SendBridge(self.transport, self.session, self.layout, seal=seal)
            for name, seal in block_seals().items()
        }

    def tell(self, message: dict[str, Any]) -> None:
        with self._write_lock:
            assert self.child.stdin
            self.child.stdin.write(json.dumps(message) + "\n")
            self.child.stdin.flush()

    def answer(self) -> dict[str, Any]:
        assert self.child.stdout
        return json.loads(self.child.stdout.readline())

    def send(self, request: OutgoingRequest, seal: str = "checksum") -> float:
        """Sends a request as pool blocks become free; returns the receiver's copying time once the rows are there."""

        def written(blocks: list[BlockWrite]) -> None:
            self.tell({"written": [(b.token_block, b.pool_block, b.checksum.hex(), b.num_bytes) for b in blocks]})

        tokens = len(request.fill_ids)
        self.tell({"expect": tokens, "seal": seal})
        blocks = range(cdiv(tokens, BLOCK))
        seconds = 0.0
        for start in range(0, len(blocks), self.layout.num_blocks):  # one round if the pool holds the whole prompt
            self.bridges[seal].write(
                request, list(zip(blocks[start:], range(self.layout.num_blocks), strict=False)), written
            )
            answer = self.answer()
            if "error" in answer:
                raise RuntimeError(answer["error"])
            seconds = answer["seconds"]
        return seconds

    def write_blocking(self, rows: list[np.ndarray]) -> None:
        segments = self.segments(rows)
        columns = map(list, zip(*segments, strict=True))
        assert self.transport.engine.batch_transfer_sync_write(self.session, *columns) == 0

    def write_polled(self, rows: list[np.ndarray]) -> None:
        self.transport.submit(self.session, self.segments(rows)).result()

    def segments(self, rows: list[np.ndarray]) -> list[WriteSegment]:
        segments, destination = [], self.raw
        for array in rows:
            source = array.ctypes.data
            for start in range(0, array.nbytes, SEGMENT_BYTES):
                segments.append(
                    WriteSegment(source + start, destination + start, min(SEGMENT_BYTES, array.nbytes - start))
                )
            destination += array.nbytes
        return segments

    def close(self) -> None:
        for bridge in self.bridges.values():
            bridge.close()
        self.tell({"stop": True})
        self.child.wait()
        self.transport.close()


def measure(sender: Sender, tokens: int, rounds: int) -> dict[str, Any]:
    both = jax.random.normal(jax.random.key(tokens), (tokens, (1 + LEVELS) * HIDDEN), jnp.bfloat16)
    rows = jax.block_until_ready(separate_deepstack_embeds(both, LEVELS))
    host = [np.asarray(array) for array in rows]
    num_bytes = both.nbytes
    total = tokens + 2 * TEXT_TOKENS
    ids, positions = prompt_of(total)
    index = np.where(ids == IMAGE_TOKEN, np.arange(total, dtype=np.int32) - TEXT_TOKENS, -1)
    request = OutgoingRequest(
        fill_ids=ids,
        mrope_positions=positions,
        aux_datas=np.zeros(16, np.int32),
        visual_index=index,
        rows=rows,
    )
    ways: dict[str, Callable[[], Any]] = {
        "bridge": lambda: sender.send(request),
        "blocking": lambda: sender.write_blocking(host),
        "polled": lambda: sender.write_polled(host),
        "tag": lambda: sender.send(request, "tag"),
        "encryption": lambda: sender.send(request, "encryption"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    busy_s = dict.fromkeys(ways, 0.0)
    stages: list[list[float]] = []
    for round in range(rounds + 1):
        for name, run in ways.items():
            times = sender.bridges.get(name, sender.bridges["checksum"]).times
            before = times.device, times.host, times.wire
            busy, started = core_seconds(), time.perf_counter()
            received: float | None = run()
            took, busy = time.perf_counter() - started, core_seconds() - busy
            if received is not None:
                sender.tell({"digest": True})
                assert sender.answer()["digest"] == digest(host), "the rows arrived changed"
            if round:  # the first round is a warm-up
                seconds[name].append(took)
                busy_s[name] += busy / rounds
                if name == "bridge" and received is not None:
                    after = (times.device, times.host, times.wire)
                    stages.append([*(end - start for end, start in zip(after, before, strict=True)), received, took])
    median = {name: statistics.median(values) for name, values in seconds.items()}
    device, sums, wire, copying, wall = (statistics.median(column) for column in zip(*stages, strict=True))
    figures = {
        "tokens": tokens,
        "bytes": num_bytes,
        **{f"{name}_gb_s": num_bytes / value / 1e9 for name, value in median.items()},
        "ratio": min(median["blocking"], median["polled"]) / median["bridge"],
        "ratio_to_blocking": median["blocking"] / median["bridge"],
        "stage_seconds": {"device": device, "checksums": sums, "wire": wire, "copying_out": copying, "wall": wall},
        "hidden": max(0.0, 1 - wall / (device + sums + wire + copying)),
        "core_seconds": busy_s,
    }
    print(
        f"{tokens:6} {num_bytes / 2**20:6.0f} {figures['bridge_gb_s']:8.2f} {figures['blocking_gb_s']:10.2f}"
        f" {figures['polled_gb_s']:8.2f} {figures['ratio_to_blocking']:12.0%} {figures['ratio']:9.0%}"
        f" {device * 1e3:9.1f} {sums * 1e3:8.1f} {wire * 1e3:8.1f} {copying * 1e3:8.1f} {wall * 1e3:8.1f}"
        f" {figures['hidden']:8.0%} {busy_s['bridge'] * 1e3:8.0f} {busy_s['polled'] * 1e3:7.0f}",
        flush=True,
    )
    print("  with a key:", end="")
    for name in ("tag", "encryption"):
        print(f"  {name} {figures[f'{name}_gb_s']:.2f} GB/s, {median['bridge'] / median[name]:.0%}", end="")
    print(" of the bridge with checksums")
    return figures


def prompt_of(tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and positions of an image between two short texts."""
    ids = np.full(tokens, IMAGE_TOKEN, np.int32)
    ids[:TEXT_TOKENS] = ids[-TEXT_TOKENS:] = 7
    return ids, np.tile(np.arange(tokens, dtype=np.int32), (3, 1))


def core_seconds() -> float:
    """The seconds that all cores together have been busy since the machine started."""
    user, nice, system, _, _, irq, softirq = map(int, Path("/proc/stat").read_text().split(maxsplit=9)[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def receive(num_blocks: int, raw_bytes: int) -> None:
    """The receiving half: a pool and a bridge, which read messages from stdin and answer on stdout."""
    transport = MooncakeTransport("127.0.0.1")
    pool = MultimodalDataBuffers(num_blocks, BLOCK, HIDDEN, LEVELS, ml_dtypes.bfloat16)
    bridge, seals = ReceiveBridge(transport, pool), block_seals()
    seal = seals["checksum"]
    raw = np.zeros(raw_bytes, np.uint8)
    raw.fill(1)
    transport.register(raw)
    request: IncomingRequest | None = None
    rows: list[VisualRows] = []  # of one token block after another
    before, num_copied = 0.0, 0

    def answer(message: dict[str, Any]) -> None:
        print(json.dumps(message), flush=True)

    def copied(token_block: int, expected: BlockCopy, copy: "Future[BlockCopy]") -> None:
        """Runs in the bridge's thread. A round ends with the prompt or with the pool."""
        nonlocal num_copied
        assert request
        if copy.result() != expected:
            answer({"error": f"token block {token_block} arrived damaged"})
        num_copied += 1
        if (of_block := request.take_rows(token_block)) is not None:
            rows.append(
                VisualRows(*(array[: request.blocks[token_block].rows] for array in of_block if array is not None))
            )
        complete = num_copied == cdiv(len(request.input_ids), BLOCK)
        if complete:
            jax.block_until_ready(rows)
        if complete or (token_block + 1) % num_blocks == 0:
            answer({"seconds": bridge.times.host - before})

    answer({"session": transport.session, "raw": raw.ctypes.data, "infos": pool.get_buf_infos()})
    for line in sys.stdin:
        message = json.loads(line)
        if "expect" in message:
            seal = seals[message["seal"]]
            request = None  # so that its memory is reused
            rows.clear()
            before, num_copied = bridge.times.host, 0
            request = bridge.expect(*prompt_of(message["expect"]), visual_ids=[IMAGE_TOKEN])
        elif "written" in message:
            assert request
            for token_block, pool_block, checksum, num_bytes in message["written"]:
                expected = BlockCopy(bytes.fromhex(checksum), num_bytes)
                copy = bridge.copy_out(request, token_block, pool_block, expected, seal)
                copy.add_done_callback(partial(copied, token_block, expected))
        elif "digest" in message:
            answer({"digest": digest([np.asarray(array) for buffer in zip(*rows, strict=True) for array in buffer])})
        else:
            break
    bridge.close()
    transport.close()


def block_seals() -> dict[str, BlockSeal]:
    """What stands for the bytes of a block: a checksum, or with a key a tag over the block or over its ciphertext."""
    return {"checksum": BlockSeal(), "tag": BlockSeal(bytes(32)), "encryption": BlockSeal(bytes(32), encrypts=True)}


def digest(rows: list[np.ndarray]) -> str:
    return checksum(rows).hex()


if __name__ == "__main__":
    main()
