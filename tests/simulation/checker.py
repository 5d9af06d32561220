"""What must hold in every run, told from outside: from calls and replies, messages and writes, never from the product.

A right answer is computed from the catalogue of prompts. A failure is justified only by recorded faults.
"""

import logging
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from deepstack_jax.disagg.transports import WriteSegment
from deepstack_jax.disagg.wire.layout import FILL_IDS, BufferLayout
from deepstack_jax.disagg.wire.messages import Grant, unpack_message
from tests.simulation import engine, model
from tests.simulation.clients import LOST, Call
from tests.simulation.faults import SETTLED_S, Incident
from tests.simulation.world import Process

if TYPE_CHECKING:
    from tests.simulation.cluster import Cluster

SLACK_S = 1.0  # after its time-out, a call's answer comes within this time, and that for which its node was frozen
FAIR = 40  # later calls of the same size or larger that may end before one, in a run without faults


class Checker:
    """Watches one run.

    Attributes:
        pools: (name of the machine, layout) of receive pools, by session.
        outcomes: how many calls ended with each status.
    """

    def __init__(self, cluster: "Cluster"):
        self.cluster = cluster
        self.pools: dict[str, tuple[str, BufferLayout]] = {}
        self.outcomes: Counter[str] = Counter()
        self._granted: dict[tuple[str, str, int], set[tuple[str, int, int]]] = defaultdict(set)
        self._written: Counter[tuple[str, str, int]] = Counter()
        self.most_overtaken = 0

    # what crosses between nodes

    def message(self, sender: Process, receiver: Process, data: bytes) -> None:
        """A control message is delivered."""
        self.cluster.world.note("message", sender.name, receiver.name, len(data))
        if b"Grant" in data[:20]:
            grant, _ = unpack_message(data)
            assert isinstance(grant, Grant)
            session = self.cluster.session_of(sender)
            for _, pool_block in grant.blocks:
                round = grant.request_id, grant.attempt, grant.round
                self._granted[receiver.name, session, pool_block].add(round)

    def write(self, process: Process, session: str, segments: Sequence[WriteSegment]) -> None:
        """A write begins: no block is written more often than it was granted to this process."""
        self.cluster.world.note("write", process.name, session, len(segments))
        _, layout = self.pools[session]
        start, row = layout.ptrs[FILL_IDS], layout.item_lens[FILL_IDS]
        blocks = {
            block
            for _, destination, num_bytes in segments
            if start <= destination < start + layout.total_lens[FILL_IDS]
            for block in range((destination - start) // row, (destination - start + num_bytes - 1) // row + 1)
        }
        for block in blocks:
            place = process.name, session, block
            self._written[place] += 1
            if self._written[place] > len(self._granted[place]):
                self.cluster.world.violated(process.name, "wrote block", block, "of", session, "without a grant")

    # calls

    def ended(self, call: Call) -> None:
        """A call has ended, or its client has gone away."""
        violated = self.cluster.world.violated
        if call.cancelled:
            self.outcomes["cancelled"] += 1
            return
        status, body = call.replies[-1]
        self.outcomes[str(status or "lost")] += 1
        assert call.machine is not None
        assert call.ended is not None
        name = f"call {call.number} to {call.process.name}"
        seconds = call.ended - call.started
        if status != LOST and seconds > call.timeout + SLACK_S + self._frozen(call):
            violated(name, "ended", f"{seconds - call.timeout:.3f} s after its time-out with", status)
        if status == 200:
            prompt = model.catalogue()[call.prompt]
            if self.cluster.knobs.http:
                right: object = engine.right_tokens(prompt.number, call.tokens)
            else:
                right = model.answer_to(model.ids_of(prompt.number), model.right_rows(prompt.number))
            if body != right:
                violated(name, "got a wrong answer")
            if not call.valid:
                violated(name, "is not valid and was answered")
        elif reason := self._unjustified(call, status, str(body)):
            violated(name, f"failed after {seconds:.3f} s with", status, repr(body), "although", reason)

    def replies(self, calls: Sequence[Call]) -> None:
        """After the end: every call had one reply."""
        for call in calls:
            if len(call.replies) != (not call.cancelled):
                self.cluster.world.violated("call", call.number, "got", len(call.replies), "replies")
        self._fairness([call for call in calls if not call.cancelled])

    def _fairness(self, calls: Sequence[Call]) -> None:
        """Without faults, a call ends before later ones to its node that need as many blocks or more, about."""
        knobs = self.cluster.knobs
        if knobs.incidents or knobs.max_attempts_at_once < len(calls):  # refused ones come back later
            return
        by_node: dict[object, list[Call]] = defaultdict(list)
        for call in calls:
            if call.replies[-1][0] == 200:
                by_node[call.process].append(call)
        for same in by_node.values():
            for place, call in enumerate(same):
                rows = len(model.right_rows(call.prompt))
                later = sum(
                    len(model.right_rows(other.prompt)) >= rows and other.ended < call.ended  # type: ignore[operator]
                    for other in same[place + 1 :]
                )
                self.most_overtaken = max(self.most_overtaken, later)
                if later > FAIR:
                    self.cluster.world.violated("call", call.number, "was overtaken by", later, "calls like it")

    def _frozen(self, call: Call) -> float:
        """Seconds for which the node of a call was frozen while it ran."""
        assert call.machine is not None
        assert call.ended is not None
        return sum(
            min(each.end, call.ended) - max(each.start, call.started)
            for each in self.cluster.faults.incidents
            if each.kind == "freeze"
            and each.machines == (call.machine.name,)
            and each.start < call.ended
            and each.end > call.started
        )

    def _unjustified(self, call: Call, status: int, reason: str) -> str:
        """Why a failure has no excuse, in words; "" if it has one."""
        assert call.machine is not None
        assert call.ended is not None
        knobs, cluster, language = self.cluster.knobs, self.cluster, call.machine.name
        own = [each for each in self._recent(call) if each.machines == (language,)]
        if status == LOST:
            return "" if own else "its node was not killed"
        if not call.valid:
            return "" if status in (400, 503, 504) else "it is not valid"
        if call.machine in cluster.encoders:  # it has passed the request on to any language node
            causes = self._recent(call) or cluster.memories.when or cluster.encode_failures
            overload = self._at_once(call) >= min(knobs.max_waiting, knobs.max_attempts_at_once)
            return "" if causes or overload else "nothing was disturbed"
        if "waiting already" in reason and self._at_once(call) >= knobs.max_waiting:
            return ""
        if own and any(text in reason for text in ("is starting", "is stopping", "takes no more", "stopped")):
            return ""
        writes = self._write_faults(call)
        if status == 502:
            return "" if "damaged" in reason and writes > knobs.max_damaged else f"only {writes} blocks were harmed"
        if status == 500:
            return "" if cluster.encode_failures else "no encoder failed"
        if status not in (503, 504):
            return "this status is never expected"
        if status == 503 and knobs.encode_here and knobs.http and not own:
            return "it could have encoded the pictures itself"
        if own or writes or cluster.encode_failures or (status == 504 and call.short):
            return ""
        overload = self._at_once(call) >= knobs.max_attempts_at_once if status == 503 else self._has_slow_writes(call)
        if overload:
            return ""
        ill = [machine.name for machine in cluster.encoders if self._disturbed(machine.name, language, call)]
        # an encoder that is ill may hold all blocks of a small pool in quarantine
        excused = len(ill) > 1 or (ill and (len(cluster.encoders) == 1 or (status == 504 and knobs.num_blocks < 8)))
        return "" if excused else f"other encoders than {ill} were not disturbed"

    def _recent(self, call: Call) -> list[Incident]:
        """Incidents that a call may feel."""
        assert call.ended is not None
        return [
            each
            for each in self.cluster.faults.incidents
            if each.start <= call.ended and each.end + SETTLED_S >= call.started
        ]

    def _disturbed(self, encoder: str, language: str, call: Call) -> bool:
        return any(each.touches(encoder, language) for each in self._recent(call))

    def _write_faults(self, call: Call) -> int:
        """Blocks that faulty writes to the call's node may have harmed, in its time and a little before."""
        assert call.machine is not None
        assert call.ended is not None
        quarantine = self.cluster.knobs.transfer_timeout
        sessions = [session for session, (name, _) in self.pools.items() if name == call.machine.name]
        return sum(
            weight
            for time, weight, session in self.cluster.memories.when
            if session in sessions and call.started - SETTLED_S - quarantine <= time <= call.ended
        )

    def _has_slow_writes(self, call: Call) -> bool:
        """Whether the calls to a node ask for more blocks than can be written in half of the call's time."""
        knobs = self.cluster.knobs
        same = (other for other in self.cluster.calls if other.process is call.process)
        blocks = sum(1 + len(model.right_rows(other.prompt)) // knobs.block_size for other in same)
        return blocks * knobs.writes.seconds / 2 / min(knobs.slots, knobs.num_blocks) > call.timeout / 2

    def _at_once(self, call: Call) -> int:
        """Calls that were open while this one was."""
        assert call.ended is not None
        return sum(
            other.started <= call.ended and (other.ended is None or other.ended + SETTLED_S >= call.started)
            for other in self.cluster.calls
        )


class ErrorLog(logging.Handler):
    """Errors in the log of the product; a run has none, except where an encoder failed."""

    def __init__(self, cluster: "Cluster"):
        super().__init__(logging.ERROR)
        self.cluster = cluster

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if "simulated failure" not in repr(error):
            self.cluster.world.violated("logged:", record.getMessage(), repr(error))
