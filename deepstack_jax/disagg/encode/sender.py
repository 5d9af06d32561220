"""The encode node's side of transfers, as a state machine: what is prepared, what is written, what may be dropped.

A block is written once for each round that grants it. A Grant that comes again is answered from memory. After Abort the
answer is Aborted, once nothing of the attempt is being written and nothing of it can still land.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from deepstack_jax.disagg.wire.messages import (
    MAX_REASON,
    MAX_TOKENS,
    Abort,
    Aborted,
    Accepted,
    Error,
    Grant,
    Message,
    Prepared,
    Release,
    Submit,
    Written,
    WrittenBlock,
)
from deepstack_jax.disagg.wire.transfer import Action, Forget, Key, Prepare, Send, StartWrite, State

_REMEMBERED = 4096  # attempts that are over


@dataclass(frozen=True)
class SenderSettings:
    """Limits of an encode node's transfers."""

    block_size: int  # tokens a block
    max_requests: int = 256  # attempts at once; more are sent elsewhere


@dataclass
class Outgoing:
    """One attempt on its way out."""

    deadline: float
    state: State = State.BOOTSTRAPPING
    prepared: Prepared | None = None
    num_blocks: int = 0
    granted: dict[int, tuple[int, int]] = field(default_factory=dict)  # token block -> newest (round, pool block)
    writing: dict[int, int] = field(default_factory=dict)  # token block -> round
    written: dict[int, tuple[int, WrittenBlock]] = field(default_factory=dict)  # token block -> (round, what)
    error: Error | None = None
    aborted: bool = False
    clean: bool = True  # no write has failed: a failed one may still land


@dataclass(frozen=True)
class Over:
    """What is remembered of an attempt that is over, so that messages that come late don't start it anew."""

    error: Error | None
    clean: bool


class Sender:
    """Every method but `next_timer` takes the clock's reading and returns the actions to carry out, in order."""

    def __init__(self, settings: SenderSettings):
        self.settings = settings
        self.peers: dict[str, int] = {}  # language nodes and the blocks of their pools
        self.outgoing: dict[Key, Outgoing] = {}
        self.over: dict[Key, Over] = {}  # oldest first
        self.dropped: Counter[str] = Counter()  # messages of no use, by type

    # what this node has done

    def prepared(
        self,
        key: Key,
        total_tokens: int,
        visual_rows: int,
        rope_delta: int,
        fingerprint: bytes,
        now: float,
        prepare_us: int = 0,
        encode_us: int = 0,
    ) -> list[Action]:
        """A Prepare is done: the prompt is known, its rows are there or follow."""
        outgoing = self.outgoing.get(key)
        if outgoing is None or outgoing.state != State.BOOTSTRAPPING:
            return []
        if not 1 <= total_tokens <= MAX_TOKENS:
            return self._fail(key, 400, f"the prompt has {total_tokens} tokens: expected 1 to {MAX_TOKENS}")
        outgoing.state = State.WAITING_FOR_INPUT
        outgoing.num_blocks = -(-total_tokens // self.settings.block_size)
        outgoing.prepared = Prepared(
            key.request_id, key.attempt, total_tokens, visual_rows, rope_delta, fingerprint, prepare_us, encode_us
        )
        return [Send(key.peer, outgoing.prepared)]

    def failed(self, key: Key, status: int, reason: str, now: float) -> list[Action]:
        """A Prepare has failed, or rows are lost; `status` as in `messages.Error`."""
        return self._fail(key, status, reason) if self._runs(key) else []

    def may_write(self, key: Key, now: float) -> bool:
        """Whether a write that was asked for should still start."""
        return self._runs(key) and now < self.outgoing[key].deadline

    def written(self, key: Key, round: int, blocks: Iterable[WrittenBlock], now: float) -> list[Action]:
        """Blocks of a StartWrite are in the pool, everything of them."""
        done = [block for block in blocks if self._stop_writing(key, round, block.token_block)]
        if not done:
            return []
        if not self._runs(key):
            return self._settle(key)
        self.outgoing[key].written |= {block.token_block: (round, block) for block in done}
        return [Send(key.peer, Written(key.request_id, key.attempt, round, tuple(done)))]

    def write_failed(self, key: Key, round: int, token_blocks: Iterable[int], reason: str, now: float) -> list[Action]:
        """Blocks of a StartWrite have failed; what was written of them, and what may still land, is unknown."""
        if not [block for block in token_blocks if self._stop_writing(key, round, block)]:
            return []
        self.outgoing[key].clean = False
        return self._fail(key, 503, reason) if self._runs(key) else self._settle(key)

    def write_skipped(self, key: Key, round: int, token_blocks: Iterable[int], now: float) -> list[Action]:
        """Blocks of a StartWrite have not been started, because `may_write` said no."""
        if not [block for block in token_blocks if self._stop_writing(key, round, block)]:
            return []
        return self._fail(key, 504, "deadline passed before the transfer") if self._runs(key) else self._settle(key)

    # what happens to this node

    def peer_up(self, peer: str, num_blocks: int, now: float) -> list[Action]:
        """A language node that fits is connected; its pool has `num_blocks`."""
        self.peers[peer] = num_blocks
        return []

    def peer_down(self, peer: str, now: float) -> list[Action]:
        """A language node is gone: nothing more is done for it."""
        self.peers.pop(peer, None)
        theirs = [key for key in self.outgoing if key.peer == peer and self._runs(key)]
        return [action for key in theirs for action in self._fail(key, 503, "the connection was lost")]

    def receive(self, peer: str, message: Message, now: float) -> list[Action]:
        """A message has come from `peer`."""
        if peer in self.peers and isinstance(message, Submit | Grant | Release | Abort):
            key = Key(peer, message.request_id, message.attempt)
            match message:
                case Submit():
                    return self._submit(key, message, now)
                case Grant():
                    return self._grant(key, message, now)
                case Abort():
                    return self._abort(key)
                case Release() if self._runs(key):
                    self.outgoing[key].state = State.SUCCESS
                    return self._settle(key)
        self.dropped[type(message).__name__] += 1
        return []

    def tick(self, now: float) -> list[Action]:
        """Does what is due; to be called at `next_timer` or later, any number of times."""
        due = [key for key, outgoing in self.outgoing.items() if self._runs(key) and outgoing.deadline <= now]
        return [action for key in due for action in self._fail(key, 504, "deadline passed on the encode node")]

    def next_timer(self) -> float | None:
        """When `tick` is due next; None if nothing is under way."""
        return min((outgoing.deadline for key, outgoing in self.outgoing.items() if self._runs(key)), default=None)

    # messages

    def _submit(self, key: Key, message: Submit, now: float) -> list[Action]:
        if answer := self._answer_again(key):
            return answer
        if outgoing := self.outgoing.get(key):
            return [Send(key.peer, outgoing.prepared or Accepted(key.request_id, key.attempt))]
        if key in self.over:
            return []
        if message.payload is None:
            return [self._unknown(key)]
        if len(self.outgoing) >= self.settings.max_requests:
            reason = f"the encode node has {len(self.outgoing)} requests: try again later"
            return [Send(key.peer, Error(key.request_id, key.attempt, 503, reason))]
        deadline = now + message.budget_ms / 1000
        self.outgoing[key] = Outgoing(deadline)
        accepted = Send(key.peer, Accepted(key.request_id, key.attempt))
        return [accepted, Prepare(key, message.payload, deadline, message.have, message.fingerprint)]

    def _grant(self, key: Key, message: Grant, now: float) -> list[Action]:
        if answer := self._answer_again(key):
            return answer
        if key in self.over:
            return []
        outgoing = self.outgoing.get(key)
        if outgoing is None:
            return [self._unknown(key)]
        starting: list[tuple[int, int]] = []
        again: list[WrittenBlock] = []
        for token_block, pool_block in message.blocks if self.may_write(key, now) else ():
            round, where = outgoing.granted.get(token_block, (-1, -1))
            fits = token_block < outgoing.num_blocks and pool_block < self.peers[key.peer]
            if fits and round < message.round and token_block not in outgoing.writing:
                outgoing.granted[token_block] = (message.round, pool_block)
                outgoing.writing[token_block] = message.round
                outgoing.state = State.TRANSFERRING
                starting.append((token_block, pool_block))
            elif (round, where) == (message.round, pool_block) and token_block not in outgoing.writing:
                again.append(outgoing.written[token_block][1])
        actions: list[Action] = []
        if starting:
            actions.append(StartWrite(key, message.round, tuple(starting)))
        if again:
            actions.append(Send(key.peer, Written(key.request_id, key.attempt, message.round, tuple(again))))
        return actions

    def _abort(self, key: Key) -> list[Action]:
        if outgoing := self.outgoing.get(key):
            outgoing.state, outgoing.aborted = State.FAILED, True
            return self._settle(key)
        over = self.over.get(key)
        if over is None:  # it has overtaken its Submit, which must not start anything then
            over = self._remember(key, Over(None, clean=True))
        return self._confirm(key, over)

    def _confirm(self, key: Key, over: Over) -> list[Action]:
        return [Send(key.peer, Aborted(key.request_id, key.attempt))] if over.clean else []

    # ends

    def _fail(self, key: Key, status: int, reason: str) -> list[Action]:
        outgoing = self.outgoing[key]
        outgoing.state = State.FAILED
        outgoing.error = Error(key.request_id, key.attempt, min(max(status, 400), 599), reason[:MAX_REASON])
        return [Send(key.peer, outgoing.error), *self._settle(key)]

    def _settle(self, key: Key) -> list[Action]:
        """Forgets an attempt that is over, as soon as nothing of it is being written."""
        outgoing = self.outgoing[key]
        if outgoing.writing:
            return []
        del self.outgoing[key]
        if key.peer in self.peers:
            self._remember(key, Over(outgoing.error, outgoing.clean))
        confirmed = (
            [Send(key.peer, Aborted(key.request_id, key.attempt))] if outgoing.aborted and outgoing.clean else []
        )
        return [Forget(key), *confirmed]

    def _remember(self, key: Key, over: Over) -> Over:
        self.over[key] = over
        if len(self.over) > _REMEMBERED:
            del self.over[next(iter(self.over))]
        return over

    def _answer_again(self, key: Key) -> list[Action]:
        """The error that the attempt has ended with, if it has."""
        ended = self.outgoing.get(key) or self.over.get(key)
        return [Send(key.peer, ended.error)] if ended and ended.error else []

    def _unknown(self, key: Key) -> Send:
        return Send(key.peer, Error(key.request_id, key.attempt, 503, "the encode node does not know the attempt"))

    def _runs(self, key: Key) -> bool:
        outgoing = self.outgoing.get(key)
        return outgoing is not None and outgoing.state < State.SUCCESS

    def _stop_writing(self, key: Key, round: int, token_block: int) -> bool:
        """Whether the write was under way."""
        outgoing = self.outgoing.get(key)
        if outgoing is None or outgoing.writing.get(token_block) != round:
            return False
        del outgoing.writing[token_block]
        return True
