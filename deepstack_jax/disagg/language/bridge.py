"""The language node's end of the bridge: copies blocks out of the receive pool as soon as they have arrived."""

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from jax.sharding import Sharding

from deepstack_jax.disagg.language.incoming import BlockCopy, IncomingRequest
from deepstack_jax.disagg.transports import Transport
from deepstack_jax.disagg.wire.buffers import MultimodalDataBuffers
from deepstack_jax.disagg.wire.device_rows import HostMemory
from deepstack_jax.disagg.wire.rows import StageTimes
from deepstack_jax.disagg.wire.seals import NO_PURPOSE, BlockSeal, Purpose


class ReceiveBridge:
    """Registers a receive pool and copies blocks out of it, in one thread and in the requested order."""

    def __init__(self, transport: Transport, pool: MultimodalDataBuffers, sharding: Sharding | None = None):
        """`sharding` is where arrived rows are put: what the language programs take. None is the first device."""
        self.times = StageTimes()
        self._transport, self._pool, self._sharding = transport, pool, sharding
        for buffer in pool.arrays:
            transport.register(buffer)
        self._memory = HostMemory()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="receive")

    def expect(self, input_ids: np.ndarray, mrope_positions: np.ndarray, visual_ids: Sequence[int]) -> IncomingRequest:
        """A request whose rows are copied to memory of finished ones; for the arguments see `IncomingRequest`."""
        return IncomingRequest(self._pool, input_ids, mrope_positions, visual_ids, self._sharding, self._memory)

    def copy_out(
        self,
        request: IncomingRequest,
        token_block: int,
        pool_block: int,
        expected: BlockCopy,
        seal: BlockSeal | None = None,
        purpose: Purpose = NO_PURPOSE,
    ) -> "Future[BlockCopy]":
        """Runs `IncomingRequest.copy_out` in the bridge's thread."""

        def run() -> BlockCopy:
            started = time.perf_counter()
            copy = request.copy_out(token_block, pool_block, expected, seal, purpose)
            self.times.host += time.perf_counter() - started
            self.times.num_bytes += copy.num_bytes
            return copy

        return self._worker.submit(run)

    def wipe(self, blocks: Sequence[int]) -> None:
        """Overwrites blocks of the pool that nobody copies or is allowed to write to."""
        self._pool.wipe(blocks)

    @property
    def spare_bytes(self) -> int:
        """Bytes of finished requests' memory that later requests can reuse."""
        return self._memory.spare_bytes

    def close(self) -> None:
        """Finishes the requested copies, then closes the pool to peers."""
        self._worker.shutdown()
        for buffer in self._pool.arrays:
            self._transport.unregister(buffer)
