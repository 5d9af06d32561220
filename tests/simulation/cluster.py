"""One run: a cluster and its clients, from one seed."""

import contextlib
import gc
import logging
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from deepstack_jax.disagg.encode import server, worker
from deepstack_jax.disagg.encode.bridge import SendBridge
from deepstack_jax.engine import core
from tests.simulation import clock, knobs, model, threads
from tests.simulation.checker import Checker, ErrorLog
from tests.simulation.clients import Call
from tests.simulation.faults import Faults
from tests.simulation.http import Transport
from tests.simulation.memory import Memories, Rates
from tests.simulation.network import Context, Network
from tests.simulation.nodes import EncodeMachine, LanguageMachine, Machine
from tests.simulation.patches import simulated
from tests.simulation.serving import EncodeHttpMachine, TextMachine
from tests.simulation.world import START_S, Process, World

REQUESTS = 200  # per run, unless a caller wants another number
EPILOGUE = 10  # calls after all faults are over, which all have to succeed
LOOK_S = 0.1  # between two looks whether something has come to its end
SETTLING_S = 20.0  # from the end of the last fault to these calls
TIMEOUT_S = 90.0  # of a call that has time, at most
LEAST_TIMEOUT_S = 14.0  # at least: an encoder that is silent is left after 5 s


@dataclass
class Outcome:
    """What happened in a run."""

    seed: int
    knobs: knobs.Knobs
    violations: list[str]
    statuses: Counter[str]
    incidents: Counter[str]
    write_faults: Counter[str]
    events: int
    seconds: float  # of virtual time
    digest: str
    trace: list[str] | None

    @property
    def requests(self) -> int:
        return sum(self.statuses.values())


class Cluster:
    """The machines, the network between them, and what is known about their faults."""

    def __init__(self, seed: int, requests: int, keep_trace: bool, chosen: Mapping[str, Any]):
        self.world = World(seed, keep_trace)
        self.knobs = replace(knobs.draw(self.world.dice, requests), **chosen)
        self.processes: list[Process] = []
        self.network = Context.network = Network(self.world)
        self.memories = Memories(self.world, self.knobs.writes)
        self.checker = Checker(self)
        self.faults = Faults(self)
        self.encode_failures = 0
        self.frozen_seconds = 0.0
        self.calls: list[Call] = []
        self.open_calls: set[int] = set()
        kinds = (EncodeHttpMachine, TextMachine) if self.knobs.http else (EncodeMachine, LanguageMachine)
        self.encoders: list[EncodeMachine] = [kinds[0](self, number) for number in range(self.knobs.encoders)]
        self.languages: list[LanguageMachine] = [kinds[1](self, number) for number in range(self.knobs.languages)]
        Transport.machines = {machine.name.lower(): machine for machine in self.languages}
        Transport.is_cut = self._is_cut
        self._failing = True
        self.network.watch, self.memories.watch = self.checker.message, self.checker.write
        for language in self.languages:
            for encoder in self.encoders:
                self.network.link(language.name, encoder.endpoint).latency = self.knobs.latency

    def _is_cut(self, process: Process, language: Machine) -> bool:
        """Whether nothing gets from an encode node's process to a language node."""
        encoder = next(each for each in self.encoders if each.process is process)
        return self.network.link(language.name, encoder.endpoint).cut

    def session_of(self, process: Process) -> str:
        """The session of a language node's process."""
        machine = next(each for each in self.languages if each.name == process.name.partition("#")[0])
        return machine.session

    def encode_images(self, fake: Any, visuals: Any) -> Any:
        """Stands for the functions of `encoding`: it takes time and fails as the knobs say."""
        dice = self.world.dice
        if visuals:
            threads.sleep(dice.random() * self.knobs.encode_seconds * len(visuals))
            is_test = visuals[0].pixel_values[0, 0] < 1  # of a node that starts
            if self._failing and not is_test and dice.random() < self.knobs.encode_failures:
                self.world.note("encoder failure", clock.process().name)
                self.encode_failures += 1
                raise RuntimeError("simulated failure of the device")
        return model.encode_images(fake, visuals)

    def run(self) -> None:
        """The whole course of events."""
        world, dice = self.world, self.world.dice
        for machine in [*self.encoders, *self.languages]:
            machine.start()
        self._wait(lambda: not self._unrest(), 30.0, "the cluster has not started")
        begin = world.now
        for number in range(self.knobs.requests):
            world.after(dice.random() * self.knobs.load_seconds, self._send, self._draw_call(number))
        self.faults.plan(self.knobs.incidents, self.knobs.load_seconds)
        self._wait(lambda: world.now >= begin + self.knobs.load_seconds and not self.faults.running, 600.0, "faults")
        self._failing, self.memories.rates = False, Rates(self.knobs.writes.seconds)
        self._wait(lambda: len(self.calls) == self.knobs.requests and not self.open_calls, 600.0, "calls are open")
        world.run(SETTLING_S + self.knobs.transfer_timeout)
        for number in range(EPILOGUE):
            call = Call(self.knobs.requests + number, dice.randrange(model.NUM_PROMPTS), self.knobs.http_timeout)
            world.after(dice.random(), self._send, call)
        total = self.knobs.requests + EPILOGUE
        self._wait(lambda: len(self.calls) == total and not self.open_calls, 100.0, "the last calls are open")
        for call in self.calls[-EPILOGUE:]:
            if call.replies[-1][0] != 200:
                world.violated("call", call.number, "failed after all faults were over:", *call.replies[-1])
        self._wait(lambda: not self._unrest(), 60.0, "something is left over")
        self.checker.replies(self.calls)
        self._close()

    def _close(self) -> None:
        machines, closed = [*self.languages, *self.encoders], []
        self.world.dice.shuffle(machines)
        for machine in machines:
            machine.stop(partial(closed.append, machine.name))
        self._wait(lambda: len(closed) == len(machines), 60.0, "nodes don't stop")
        for session in self.memories.open:
            self.world.violated("the transport", session, "is still open")

    def _unrest(self) -> str:
        return "; ".join(f"{m.name}: {what}" for m in [*self.encoders, *self.languages] if (what := m.unrest()))

    def _wait(self, condition: Any, seconds: float, what: str) -> None:
        limit = self.world.now + seconds
        while not condition():
            if self.world.now > limit:
                self.world.violated(f"after {seconds:g} s:", what, self._unrest(), sorted(self.open_calls))
                raise _GiveUp
            self.world.run(LOOK_S)

    def _draw_call(self, number: int) -> Call:
        dice, drawn = self.world.dice, self.knobs
        prompt = dice.randrange(model.NUM_PROMPTS)
        short = dice.random() < drawn.short_timeouts
        return Call(
            number,
            prompt,
            tokens=dice.randint(1, 12),
            stream=dice.random() < 0.5,
            timeout=drawn.http_timeout
            if drawn.http
            else dice.random() * 2
            if short
            else max(TIMEOUT_S * dice.random(), LEAST_TIMEOUT_S if drawn.load_seconds > 5 else 2 * LEAST_TIMEOUT_S),
            cached=dice.randrange(model.ids_of(prompt).shape[1]),
            cancel_after=dice.random() * 3 if dice.random() < drawn.cancellations else None,
            short=short and not drawn.http,
            valid=dice.random() > 0.02,
        )

    def _send(self, call: Call) -> None:
        self.calls.append(call)
        self.open_calls.add(call.number)
        call.on_end = self._ended
        machines = [machine for machine in self.languages if machine.alive] or self.languages
        if self.world.dice.random() < 0.05:  # clients don't always know which nodes live
            machines = self.languages
        if self.knobs.http and call.number < self.knobs.requests and self.world.dice.random() < 0.3:
            machines = self.encoders  # they pass it on
        call.send(self, self.world.dice.choice(machines))

    def _ended(self, call: Call) -> None:
        self.open_calls.discard(call.number)
        self.checker.ended(call)


class _GiveUp(Exception):
    """The run can't go on."""


def run(
    seed: int,
    requests: int = REQUESTS,
    keep_trace: bool = False,
    patches: Sequence[tuple[Any, str, Any]] = (),
    **chosen: Any,
) -> Outcome:
    """One run; the same arguments give the same outcome.

    Args:
        requests: before the last ones, which have to succeed.
        patches: (owner, name, value), which change the product.
        chosen: fields of `Knobs` in place of drawn ones.
    """
    gc.collect()
    gc.freeze()  # what was there before is not looked at again
    gc.disable()  # finalizers run after the run
    try:
        return _run(Cluster(seed, requests, keep_trace, chosen), patches)
    finally:
        clock.enter(None)
        gc.enable()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tasks of killed nodes that never began
            gc.collect()


def _run(cluster: Cluster, patches: Sequence[tuple[Any, str, Any]]) -> Outcome:
    world, drawn = cluster.world, cluster.knobs
    bridge = partial(SendBridge, slot_bytes=drawn.slot_bytes, slots=drawn.slots)
    log, handler = logging.getLogger(), ErrorLog(cluster)
    log.addHandler(handler)
    clock.enter(world)
    try:
        with simulated(
            (worker, "encode_images", cluster.encode_images),
            (core, "encode_group", cluster.encode_images),
            (server, "SendBridge", bridge),
            *patches,
        ):
            with contextlib.suppress(_GiveUp):
                cluster.run()
            for process in cluster.processes:
                process.kill()
                process.loop._closed = True  # type: ignore[attr-defined]
    finally:
        log.removeHandler(handler)
    return Outcome(
        world.seed,
        drawn,
        world.violations,
        cluster.checker.outcomes,
        Counter(each.kind for each in cluster.faults.incidents),
        Counter(cluster.memories.faults),
        world.num_events,
        world.now - START_S,
        world.digest,
        world.trace,
    )
