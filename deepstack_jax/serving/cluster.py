"""What a node knows of itself and of those that it is linked with, for people who watch."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from deepstack_jax.disagg.encode.server import EncodeServer
from deepstack_jax.disagg.events import Event
from deepstack_jax.disagg.language.encoder_pool import EncoderPool
from deepstack_jax.disagg.wire.messages import NodeLoad
from deepstack_jax.engine.runner import Runner
from deepstack_jax.serving.readings import engine_readings


@dataclass(frozen=True)
class NodeStatus:
    """What is known of one node. None stands for what this node can't know.

    Attributes:
        since_seconds: how long it has been in its state.
        in_flight: requests that it works on.
        queue: requests in line for a slot, or images in line for the encoder.
        prefix_cache: `hits` and `queries` in tokens, `pages` that are kept.
        encoder_cache: `entries`, `bytes`, `hits` and `queries` of images and videos.
        transfer: `bytes` of rows, and `seconds` in which they came; `seconds` is None where only the other end knows.
        requests, failures: since its start, or since the link to it began.
    """

    name: str
    role: str
    state: Literal["ready", "loading", "draining", "unreachable", "unhealthy"]
    reason: str | None
    since_seconds: float
    in_flight: int | None = None
    queue: int | None = None
    slots: int | None = None
    slots_used: int | None = None
    pages: int | None = None
    pages_used: int | None = None
    prefix_cache: dict[str, int] | None = None
    encoder_cache: dict[str, int] | None = None
    transfer: dict[str, float | None] | None = None
    requests: int | None = None
    failures: int | None = None


@dataclass(frozen=True)
class Cluster:
    """What a node tells of itself beside its state, of the others, and of what happened."""

    own: dict[str, Any]
    others: Sequence[NodeStatus] = ()
    events: Sequence[Event] = ()


def language_cluster(runner: Runner, encoders: EncoderPool | None) -> Cluster:
    """Of a node with the text model and of the encode nodes that it uses."""
    read = {each.name: int(each.value) for each in engine_readings(runner)}
    own = {
        "queue": read["requests_waiting"],
        "slots": read["slots"],
        "slots_used": read["slots"] - read["free_slots"],
        "pages": read["kv_pages"],
        "pages_used": read["kv_pages_in_use"],
        "prefix_cache": {
            "hits": read["prefix_cache_hit_tokens"],
            "queries": read["prefix_cache_query_tokens"],
            "pages": read["kv_pages_cached"],
        },
    }
    if encoders is None:
        return Cluster(own)
    others, now = [], time.monotonic()
    for each in encoders.encoders:
        told: dict[str, Any] = {"requests": each.requests, "failures": each.failures}
        if (load := each.load) is not None:
            told |= {"in_flight": load.attempts, "queue": load.queue, "encoder_cache": _cache_fields(load)}
        told["transfer"] = {"bytes": each.num_bytes, "seconds": round(each.seconds, 6)}
        others.append(NodeStatus(each.name, "encode", each.state, each.reason, now - each.since, **told))
    received = [each.transfer for each in others if each.transfer]
    own["transfer"] = {what: sum(each[what] or 0 for each in received) for what in ("bytes", "seconds")}
    return Cluster(own, others, tuple(encoders.events))


def encode_cluster(server: EncodeServer) -> Cluster:
    """Of an encode node and of the language nodes that use it."""
    load, now = server.load, time.monotonic()
    own = {
        "in_flight": load.attempts,
        "queue": load.queue,
        "encoder_cache": _cache_fields(load),
        "transfer": {"bytes": server.bytes_written, "seconds": None},
        "requests": load.requests,
        "failures": load.failures,
    }
    others = [
        NodeStatus(
            peer.public_name,
            "language",
            "ready",
            None,
            now - peer.since,
            transfer={"bytes": peer.bytes_written, "seconds": None},
            requests=peer.num_requests,
            failures=peer.num_failures,
        )
        for peer in server.peers.values()
    ]
    return Cluster(own, others, tuple(server.events))


def _cache_fields(load: NodeLoad) -> dict[str, int]:
    return {name: getattr(load, f"cache_{name}") for name in ("entries", "bytes", "hits", "queries")}
