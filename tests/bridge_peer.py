"""A receiving process for tests of the bridge: a pool, told on stdin what to do, answering on stdout, line by line."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import ml_dtypes  # noqa: F401 (numpy knows bfloat16 by name)
import numpy as np

from deepstack_jax.disagg import MultimodalDataBuffers
from deepstack_jax.disagg.language.bridge import ReceiveBridge
from deepstack_jax.disagg.language.incoming import BlockCopy, IncomingPrompt
from deepstack_jax.disagg.transports.mooncake import MooncakeTransport
from deepstack_jax.disagg.wire.layout import BufferLayout
from tests.cases import side_by_side

ROOT = Path(__file__).parent.parent


class Peer:
    """The process as its parent sees it."""

    def __init__(self, process: subprocess.Popen[str]):
        self.process = process
        hello = self.ask()
        self.session = hello["session"]
        self.layout = BufferLayout(hello["block_size"], *map(tuple, hello["infos"]))

    def ask(self, **message: Any) -> Any:
        assert self.process.stdin
        assert self.process.stdout
        if message:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, "the peer is gone"
        return json.loads(line)

    def pool(self, folder: Path) -> list[np.ndarray]:
        """A copy of the pool's buffers: bytes [blocks, bytes of a row]."""
        self.ask(save_pool=str(folder / "pool.npz"))
        with np.load(folder / "pool.npz") as saved:
            return [saved[f"arr_{number}"] for number in range(len(saved))]

    def prompt(self, folder: Path) -> dict[str, np.ndarray]:
        """What has arrived; rows as bytes."""
        self.ask(save_prompt=str(folder / "prompt.npz"))
        with np.load(folder / "prompt.npz") as saved:
            return dict(saved)


@contextmanager
def peer(
    num_blocks: int, block_size: int, hidden: int, levels: int, dtype: str, host: str = "127.0.0.1", **environment: str
) -> Iterator[Peer]:
    """A peer with a pool filled with 0xEE."""
    command = [
        sys.executable,
        "-m",
        "tests.bridge_peer",
        host,
        *map(str, (num_blocks, block_size, hidden, levels)),
        dtype,
    ]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, **environment}
    )
    try:
        yield Peer(process)
    finally:
        process.kill()
        process.communicate()


def main() -> None:
    host, *sizes, dtype = sys.argv[1:]
    num_blocks, block_size, hidden, levels = map(int, sizes)
    transport = MooncakeTransport(host)
    pool = MultimodalDataBuffers(num_blocks, block_size, hidden, levels, np.dtype(dtype))
    buffers = [array.reshape(num_blocks, -1).view(np.uint8) for array in pool.arrays]
    for buffer in buffers:
        buffer.fill(0xEE)
    bridge = ReceiveBridge(transport, pool)
    prompt: IncomingPrompt | None = None
    answer({"session": transport.session, "block_size": block_size, "infos": pool.get_buf_infos()})
    for line in sys.stdin:
        match json.loads(line):
            case {"expect": [tokens, rows, visual_ids, num_rows]}:
                prompt = bridge.expect(tokens, rows, visual_ids, num_rows)
                answer({})
            case {"copy_out": blocks} if prompt is not None:
                copies = [
                    bridge.copy_out(prompt, token_block, pool_block, BlockCopy(bytes.fromhex(checksum), num_bytes))
                    for token_block, pool_block, checksum, num_bytes in blocks
                ]
                answer([(copy.result().checksum.hex(), copy.result().num_bytes) for copy in copies])
            case {"save_pool": path}:
                np.savez(path, *buffers)
                answer({})
            case {"save_prompt": path} if prompt is not None:
                np.savez(
                    path,
                    rows=side_by_side(prompt.rows()).view(np.uint8),
                    fill_ids=prompt.fill_ids,
                    mrope_positions=prompt.mrope_positions,
                    aux_datas=prompt.aux_datas,
                    visual_index=prompt.visual_index,
                )
                answer({})


def answer(message: Any) -> None:
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    main()
