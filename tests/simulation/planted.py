"""Faults of the product that a run has to find: each replaces one function by a wrong one."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from deepstack_jax.disagg.encode.bridge import SendBridge
from deepstack_jax.disagg.encode.sender import Sender
from deepstack_jax.disagg.encode.server import EncodeServer
from deepstack_jax.disagg.language import encoder_pool
from deepstack_jax.disagg.language.fetch import TransferFailedError
from deepstack_jax.disagg.language.link import Link
from deepstack_jax.disagg.language.receiver import Receiver
from deepstack_jax.disagg.wire import seals
from deepstack_jax.disagg.wire.buffers import BlockAllocator
from deepstack_jax.disagg.wire.messages import Grant
from deepstack_jax.disagg.wire.transfer import Action, AttemptKey, StartWrite
from deepstack_jax.engine.pages import PageLedger
from deepstack_jax.engine.request import Request
from tests.simulation.memory import Rates

Patch = tuple[Any, str, Any]


def _keep_quarantine() -> list[Patch]:
    def release(self: BlockAllocator, block: int) -> None:
        pass

    return [(BlockAllocator, "release", release)]


def _keep_slots() -> list[Patch]:
    right = SendBridge._submit

    def submit(self: SendBridge, segments: Any) -> Any:
        write = right(self, segments)
        write.add_done_callback(lambda write: self._free.get_nowait() if write.exception() else None)
        return write

    return [(SendBridge, "_submit", submit)]


def _trust_checksums() -> list[Patch]:
    def checksum(parts: Iterable[Any]) -> bytes:
        for _ in parts:
            pass
        return bytes(8)

    return [(seals, "checksum", checksum)]


def _write_again() -> list[Patch]:
    right = Sender._grant

    def grant(self: Sender, key: AttemptKey, message: Grant, now: float) -> list[Action]:
        outgoing = self.outgoing.get(key)
        known = {} if outgoing is None else dict(outgoing.written)
        actions = right(self, key, message, now)
        again = tuple(pair for pair in message.blocks if known.get(pair[0], (None,))[0] == message.round)
        return [*actions, StartWrite(key, message.round, again)] if again else actions

    return [(Sender, "_grant", grant)]


def _forget_deadlines() -> list[Patch]:
    right = Receiver.submit

    def submit(self: Receiver, request_id: str, payload: bytes, deadline: float, now: float) -> list[Action]:
        return right(self, request_id, payload, deadline + 1000, now)

    return [(Receiver, "submit", submit)]


def _wait_for_the_dead() -> list[Patch]:
    right = Link._send_heartbeat

    def send_heartbeat(self: Link) -> None:
        self._unanswered = 0
        right(self)

    return [(Link, "_send_heartbeat", send_heartbeat)]


def _newest_first() -> list[Patch]:
    right = Receiver._grant

    def grant(self: Receiver, now: float) -> list[Action]:
        self.requests = dict(reversed(self.requests.items()))
        actions = right(self, now)
        self.requests = dict(reversed(self.requests.items()))
        return actions

    return [(Receiver, "_grant", grant)]


def _mix_rows() -> list[Patch]:
    right = SendBridge._read

    def read(self: SendBridge, request: Any, which: int, adjacent: Any) -> Any:
        parts = list(right(self, request, which, adjacent))
        return reversed(parts)

    return [(SendBridge, "_read", read)]


def _lose_tasks() -> list[Patch]:
    async def run_timers(self: EncodeServer) -> None:
        pass

    return [(EncodeServer, "_run_timers", run_timers)]


def _keep_pages() -> list[Patch]:
    return [(PageLedger, "release", lambda self, pages: None)]


def _wait_for_nothing() -> list[Patch]:
    return [(Request, "ready", property(lambda self: self.length))]


def _never_encode_here() -> list[Patch]:
    return [(encoder_pool, "NoEncoderError", partial(TransferFailedError, 503))]


_CROWD = {"incidents": 0, "load_seconds": 2.0, "num_blocks": 2, "share": 1, "max_attempts_at_once": 256}
_OUTAGES = {"incidents": 8, "load_seconds": 100.0, "encoders": 2, "languages": 1, "writes": Rates()}

# each with the knobs that it needs, and the first seed that finds it
PLANTED: dict[str, tuple[Callable[[], list[Patch]], dict[str, Any], int]] = {
    "quarantined blocks are never freed": (_keep_quarantine, {}, 3),
    "slots of failed writes are lost": (_keep_slots, {}, 3),
    "checksums are not compared": (_trust_checksums, {"protection": "none"}, 8),
    "deadlines are forgotten": (_forget_deadlines, {}, 2),
    "rows of two images change places": (_mix_rows, {}, 0),
    "timers of the encode node end": (_lose_tasks, {}, 0),
    "a repeated grant is written again": (_write_again, {"retry_interval": 0.3, "incidents": 12}, 1),
    "silent encoders are waited for": (_wait_for_the_dead, _OUTAGES | {"http": False, "protection": "none"}, 21),
    "the newest request is served first": (_newest_first, _CROWD, 3),
    "KV pages are never freed": (_keep_pages, {"http": True}, 0),
    "prefill does not wait for rows": (_wait_for_nothing, {"http": True}, 0),
    "a node that could encode does not": (_never_encode_here, _OUTAGES | {"http": True, "encode_here": True}, 0),
}
