"""Clients: each call is one request to a language node, with a time-out of its own."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

from deepstack_jax.disagg.wire.payload import pack
from deepstack_jax.processing.sources import MediaFile
from tests.simulation import model

if TYPE_CHECKING:
    from tests.simulation.cluster import Cluster

PATIENCE_S = 30.0  # a client gives up this long after its time-out if nothing has come
LOST = 0  # the status of a call whose connection was lost


@cache
def _payload(number: int, valid: bool) -> bytes:
    prompt = model.catalogue()[number]
    text = model.text_of(prompt) if valid else "nonsense"
    return pack(text, [], [MediaFile(file) for file in prompt.files])


@dataclass(eq=False)
class Call:
    """One request of a client.

    Attributes:
        prompt: its number in the catalogue.
        cached: tokens of it that the engine may have.
        timeout: seconds until the node has to answer.
        cancel_after: seconds until the client goes away, None if it stays.
        short: whether it is meant to have too little time.
        valid: whether it is a request that can be answered.
        tokens, stream: over HTTP, how long the answer is, and whether it comes as a stream.
        machine: to which it is sent.
        started, ended: on the world's clock.
        replies: what came back: (status, the answer or the reason).
        cancelled: whether the client went away.
        answered: whether the node has sent its answer.
    """

    number: int
    prompt: int
    timeout: float
    cached: int = 0
    cancel_after: float | None = None
    short: bool = False
    valid: bool = True
    tokens: int = 1
    stream: bool = False
    machine: Any = None
    process: Any = None
    started: float = 0.0
    ended: float | None = None
    cancelled: bool = False
    answered: bool = False
    replies: list[tuple[int, Any]] = field(default_factory=list)
    on_end: Callable[["Call"], None] = lambda _: None

    @property
    def payload(self) -> bytes:
        """What the node sends to encode nodes."""
        return _payload(self.prompt, self.valid)

    def send(self, cluster: "Cluster", machine: Any) -> None:
        """Sends the request to the node on a machine."""
        world = cluster.world
        self.machine, self.process, self.started = machine, machine.process, world.now
        world.note("call", self.number, machine.process.name, self.prompt, f"{self.timeout:.3f}")
        if not self.process.alive:
            self.end(LOST, "refused")
            return
        if machine.tells_loss:
            machine.take(self)
        else:
            self.process.at_kill.append(self._break)
            self.process.loop.call_soon(machine.take, self)
        if self.cancel_after is not None:
            world.after(self.cancel_after, self._cancel)
        world.after(self.timeout + PATIENCE_S + cluster.frozen_seconds, self._give_up)

    def _cancel(self) -> None:
        if self.ended is None and self.process.alive:
            self.cancelled = True
            self.process.world.note("cancel", self.number)
            self.machine.hang_up(self)
            self.ended = self.process.world.now
            self._leave()
            self.on_end(self)

    def lost(self) -> None:
        """The connection has broken before the answer was whole."""
        if self.ended is None:
            self.end(LOST, "the connection was lost")

    def _break(self) -> None:
        if not self.answered:
            self.process.world.after(0.0, self.lost)

    def _give_up(self) -> None:
        if self.ended is None:
            self.process.world.violated("call", self.number, "to", self.process.name, "got no answer at all")
            self.end(LOST, "no answer")

    def end(self, status: int, body: Any) -> None:
        """The answer has come, or the reason why there is none."""
        if self.cancelled:
            return
        self.replies.append((status, body))
        self.process.world.note("reply", self.number, status, body)
        if self.ended is None:
            self.ended = self.process.world.now
            self._leave()
            self.on_end(self)

    def _leave(self) -> None:
        if self.process.alive and not self.machine.tells_loss:
            self.process.at_kill.remove(self._break)
