"""A process with a receive pool, for tests of the bridge. It reads commands from standard input, one per line."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import ml_dtypes  # noqa: F401 (makes numpy know bfloat16 by name)
import numpy as np

from deepstack_jax.disagg import MultimodalDataBuffers
from deepstack_jax.disagg.language.bridge import ReceiveBridge
from deepstack_jax.disagg.language.incoming import BlockCopy, IncomingRequest
from deepstack_jax.disagg.transports.mooncake import MooncakeTransport
from deepstack_jax.disagg.wire.layout import BufferLayout
from tests.bridge_cases import arrived_rows
from tests.nodes import NodeProcess


class Peer(NodeProcess):
    """The process, as its parent sees it."""

    def __init__(self, *arguments: str, **environment: str):
        super().__init__("tests.bridge_peer", *arguments, **environment)
        ready = self.read()
        self.session = ready["session"]
        self.layout = BufferLayout(ready["block_size"], *map(tuple, ready["infos"]))

    def pool(self, folder: Path) -> list[np.ndarray]:
        """A copy of the pool's buffers: bytes [blocks, bytes per row]."""
        self.command(save_pool=str(folder / "pool.npz"))
        with np.load(folder / "pool.npz") as saved:
            return [saved[f"arr_{number}"] for number in range(len(saved))]

    def request(self, folder: Path) -> dict[str, np.ndarray]:
        """The arrays that have arrived; rows as bytes."""
        self.command(save_request=str(folder / "request.npz"))
        with np.load(folder / "request.npz") as saved:
            return dict(saved)


@contextmanager
def peer(
    num_blocks: int, block_size: int, hidden: int, levels: int, dtype: str, host: str = "127.0.0.1", **environment: str
) -> Iterator[Peer]:
    """A peer whose pool is filled with 0xEE."""
    process = Peer(host, *map(str, (num_blocks, block_size, hidden, levels)), dtype, **environment)
    try:
        yield process
    finally:
        process.kill()


def main() -> None:
    host, *sizes, dtype = sys.argv[1:]
    num_blocks, block_size, hidden, levels = map(int, sizes)
    transport = MooncakeTransport(host)
    pool = MultimodalDataBuffers(num_blocks, block_size, hidden, levels, np.dtype(dtype))
    buffers = [array.reshape(num_blocks, -1).view(np.uint8) for array in pool.arrays]
    for buffer in buffers:
        buffer.fill(0xEE)
    bridge = ReceiveBridge(transport, pool)
    request: IncomingRequest | None = None
    answer({"session": transport.session, "block_size": block_size, "infos": pool.get_buf_infos()})
    for line in sys.stdin:
        match json.loads(line):
            case {"expect": [ids, positions, visual_ids]}:
                request = bridge.expect(np.array(ids, np.int32), np.array(positions, np.int32), visual_ids)
                answer({})
            case {"copy_out": blocks} if request is not None:
                copies = [
                    bridge.copy_out(request, token_block, pool_block, BlockCopy(bytes.fromhex(checksum), num_bytes))
                    for token_block, pool_block, checksum, num_bytes in blocks
                ]
                answer([(copy.result().checksum.hex(), copy.result().num_bytes) for copy in copies])
            case {"save_pool": path}:
                np.savez(path, *buffers)
                answer({})
            case {"save_request": path} if request is not None:
                np.savez(path, rows=arrived_rows(request), visual_index=request.visual_index)
                answer({})


def answer(message: Any) -> None:
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    main()
