"""An encode node in its own process: `python -m tests.encode_process CHECKPOINT DTYPE BLOCK_SIZE`.

It prints its endpoint, then serves until its standard input ends. It answers each line with its counters.
"""

import asyncio
import json
import sys

import deepstack_jax as dsj
from deepstack_jax.disagg.nodes import open_encode_server


async def main(checkpoint: str, dtype: str, block_size: str) -> None:
    model = dsj.load(checkpoint, dtype, parts=("visual.",))
    server = open_encode_server(model, block_size=int(block_size), cache_bytes=1 << 20)
    await server.start()
    print(json.dumps({"endpoint": server.listener.endpoint}), flush=True)
    while await asyncio.to_thread(sys.stdin.readline):
        worker = server.worker
        counters = {
            "encoded": worker.num_encoded,
            "found": worker.num_cached,
            "cached_bytes": worker.cache.currsize,
            "parameters": sorted(model.params),
            "jobs": len(server.sender.outgoing),
            "bytes": sum(peer.bridge.times.num_bytes for peer in server.peers.values()),
        }
        print(json.dumps(counters), flush=True)
    await server.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
