"""The faults of a run: what fails, when, and for how long. The checker reads the record of them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.simulation.network import Link
from tests.simulation.nodes import Machine

if TYPE_CHECKING:
    from tests.simulation.cluster import Cluster

KINDS = ("kill", "lose", "stop", "freeze", "cut", "flap", "stall up", "stall down", "stall both", "slow")
SETTLED_S = 12.0  # after a fault has ended, links are up again within this time: heart-beats, and back-off


@dataclass
class Incident:
    """A fault of one machine, or of the link between a language node and an encode node.

    Attributes:
        machines: the names of the machines it concerns; both ends of a link.
        start, end: on the world's clock; `end` is infinite until it is over.
    """

    kind: str
    machines: tuple[str, ...]
    start: float
    end: float = float("inf")

    def touches(self, encoder: str, language: str) -> bool:
        """Whether it disturbs what happens between two machines."""
        return set(self.machines) <= {encoder, language}


class Faults:
    """Draws incidents and makes them happen."""

    def __init__(self, cluster: "Cluster"):
        self.cluster = cluster
        self.incidents: list[Incident] = []
        self.running = 0

    def plan(self, count: int, seconds: float) -> None:
        """Spreads incidents over the next seconds."""
        dice = self.cluster.world.dice
        for _ in range(count):
            kind = dice.choice(KINDS)
            self.cluster.world.after(dice.random() * seconds, self._begin, kind)
            self.running += 1

    def _begin(self, kind: str) -> None:
        cluster, world, dice = self.cluster, self.cluster.world, self.cluster.world.dice
        machine: Machine = dice.choice([*cluster.encoders, *cluster.encoders, *cluster.languages])
        seconds = dice.choice([0.05, 0.5, 2.0, 5.0, 15.0]) * (0.5 + dice.random())
        if kind in ("kill", "lose", "stop", "freeze"):
            if not machine.alive or machine.stopping:
                self.running -= 1
                return
            incident = self._record(kind, (machine.name,))
            if kind == "freeze":
                machine.process.freeze(seconds)
                cluster.frozen_seconds += seconds
                world.after(seconds, self._end, incident)
            elif kind == "stop":
                machine.stop(lambda: world.after(seconds, self._restart, machine, incident))
            else:
                machine.kill(silently=kind == "lose")
                world.after(seconds, self._restart, machine, incident)
            return
        encoder, language = dice.choice(cluster.encoders), dice.choice(cluster.languages)
        link = cluster.network.link(language.name, encoder.endpoint)
        incident = self._record(kind, (encoder.name, language.name))
        if kind == "slow":
            link.latency = dice.random() * 2.0
            world.after(seconds, self._mend, link, incident)
        elif kind == "flap":
            self._flap(link, incident, dice.randint(2, 6))
        else:
            if kind == "cut":
                cluster.network.cut(link)
            else:
                link.stalled_up |= kind in ("stall up", "stall both")
                link.stalled_down |= kind in ("stall down", "stall both")
            world.after(seconds, self._mend, link, incident)

    def _flap(self, link: Link, incident: Incident, times: int) -> None:
        world, network = self.cluster.world, self.cluster.network
        if not times:
            self._end(incident)
            return
        network.cut(link)
        world.after(world.dice.random(), network.heal, link)
        world.after(1.0 + world.dice.random() * 2, self._flap, link, incident, times - 1)

    def _mend(self, link: Link, incident: Incident) -> None:
        """Ends an incident, and what others still do to the link: each would otherwise bring back the other's state."""
        link.latency = self.cluster.knobs.latency
        self.cluster.network.heal(link)
        self._end(incident)

    def _restart(self, machine: Machine, incident: Incident) -> None:
        machine.start()
        self._end(incident)

    def _record(self, kind: str, machines: tuple[str, ...]) -> Incident:
        self.cluster.world.note("incident", kind, *machines)
        self.incidents.append(Incident(kind, machines, self.cluster.world.now))
        return self.incidents[-1]

    def _end(self, incident: Incident) -> None:
        incident.end = self.cluster.world.now
        self.cluster.world.note("over", incident.kind, *incident.machines)
        self.running -= 1
