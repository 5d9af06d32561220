"""What can be read from a node at any time: sizes, loads and counts of its engine or of its encoder.

Other threads change what is read here. Each value is right by itself, but two of them may belong to different moments.
"""

import os
from collections.abc import Iterator
from typing import Literal, NamedTuple

from deepstack_jax.disagg.encode.server import EncodeServer
from deepstack_jax.disagg.language.encoder_pool import EncoderPool
from deepstack_jax.engine.runner import Runner


class Reading(NamedTuple):
    """One number of a node, named as its metric is without the prefix. A counter only grows."""

    name: str
    value: float
    help: str
    kind: Literal["gauge", "counter"] = "gauge"


def engine_readings(runner: Runner) -> Iterator[Reading]:
    """The readings of a node with the text model."""
    engine = runner.engine
    scheduler, caches = engine.scheduler, engine.prefix_caches
    running = list(scheduler.running.values())  # one step for the interpreter, so no other thread is in between
    in_use = sum(len(set().union(*(each.pages for each in running if each.cache is cache))) for cache in caches)
    total = sum(cache.ledger.capacity for cache in caches)
    yield Reading("requests_running", len(running), "Requests that have a slot.")
    yield Reading("requests_waiting", max(runner.waiting - len(running), 0), "Requests in line for a slot.")
    yield Reading("slots", engine.shape.slots, "Requests that can run at once.")
    yield Reading("free_slots", engine.free_slots, "Slots that no request has.")
    yield Reading("kv_pages", total, "KV pages of all pools.")
    yield Reading("kv_pages_in_use", in_use, "KV pages that requests with a slot use or have reserved.")
    yield Reading("kv_pages_cached", sum(map(len, caches)), "KV pages that the prefix cache keeps.")
    yield Reading("kv_cache_usage_ratio", in_use / total, "KV pages in use, from 0 to 1.")
    yield Reading("kv_page_tokens", engine.shape.page, "Tokens per KV page.")
    queries, hits = sum(cache.query_tokens for cache in caches), sum(cache.hit_tokens for cache in caches)
    yield Reading("prefix_cache_query_tokens", queries, "Prompt tokens looked up in the prefix cache.", "counter")
    yield Reading("prefix_cache_hit_tokens", hits, "Prompt tokens found in the prefix cache.", "counter")
    yield Reading("images_encoded", engine.images_encoded, "Images and videos that this node encoded.", "counter")
    yield Reading("encode_seconds", engine.encode_seconds, "Time in the vision encoder.", "counter")


def encoder_pool_readings(pool: EncoderPool) -> Iterator[Reading]:
    """The readings of a language node beside those of its engine."""
    receiver = pool.receiver
    yield Reading("encoders_connected", pool.num_encoders, "Encode nodes that are connected.")
    yield Reading("fetches", pool.num_fetches, "Requests whose rows are being fetched.")
    yield Reading("receive_blocks", receiver.settings.num_blocks, "Blocks of the receive pool.")
    yield Reading("receive_blocks_free", receiver.pool.num_free, "Blocks of the receive pool that are free.")
    quarantined = receiver.pool.num_quarantined
    yield Reading("receive_blocks_quarantined", quarantined, "Blocks that a lost encode node may still write to.")
    yield _open_descriptors()
    failovers = receiver.failovers
    yield Reading("encoder_failovers", failovers, "Times that a request went on to another encode node.", "counter")


def encode_readings(server: EncodeServer) -> Iterator[Reading]:
    """The readings of an encode node."""
    worker = server.worker
    yield Reading("language_nodes_connected", len(server.peers), "Language nodes that are connected.")
    refused = server.listener.num_refused
    yield Reading("refused_messages", refused, "Control messages of nodes that are not admitted.", "counter")
    yield Reading("encode_attempts", server.num_attempts, "Requests that are being prepared, encoded or sent.")
    seconds = server.preparing_seconds
    yield Reading("preparing_seconds", seconds, "How long the oldest preparation of a request has run.")
    yield Reading("encode_queue", worker.queued, "Images and videos in line for the encoder.")
    yield Reading("images_encoded", worker.num_encoded, "Images and videos that this node encoded.", "counter")
    yield Reading("encode_batches", worker.num_batches, "Runs of the vision encoder.", "counter")
    yield Reading("encode_seconds", worker.encode_seconds, "Time in the vision encoder.", "counter")
    yield Reading("row_cache_hits", worker.num_cached, "Images and videos whose rows were cached.", "counter")
    yield Reading("row_cache_entries", len(worker.cache), "Images and videos in the row cache.")
    yield Reading("row_cache_bytes", worker.cache.currsize, "Bytes of the row cache in use.")
    yield Reading("row_cache_max_bytes", worker.cache.maxsize, "Bytes of the row cache at most.")
    yield Reading("blocks_written", server.blocks_written, "Token blocks sent to language nodes.", "counter")
    yield Reading("written_bytes", server.bytes_written, "Bytes sent to language nodes.", "counter")
    engines = getattr(server.transport, "num_engines", None)  # of Mooncake; other transports have none
    if engines is not None:
        yield Reading("mooncake_engines", engines, "Mooncake's engines: one, and one per peer that is written to.")
    yield _open_descriptors()


def _open_descriptors() -> Reading:
    return Reading("open_descriptors", len(os.listdir("/proc/self/fd")), "Open files and sockets of this process.")
