"""The encode node's state machine for transfers: what to prepare, what to write and what to drop.

Images are encoded when the language node wants their rows. A block can be written as soon as all of its rows are
encoded, and is written once per round that grants it. A repeated Grant is answered from memory. Abort is confirmed with
Aborted as soon as no block of the attempt is being written and no failed write of it can still land.
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
    Encoded,
    Error,
    Grant,
    Message,
    Prepared,
    Release,
    Submit,
    Want,
    Written,
    WrittenBlock,
)
from deepstack_jax.disagg.wire.transfer import (
    Action,
    AttemptKey,
    EncodeBlocks,
    Forget,
    Prepare,
    Send,
    StartWrite,
    State,
    from_ranges,
    to_ranges,
)
from deepstack_jax.rounding import cdiv

_MAX_FINISHED = 4096  # finished attempts that are remembered


@dataclass(frozen=True)
class SenderSettings:
    """Limits of an encode node's transfers."""

    block_size: int  # tokens per block
    max_requests: int = 256  # attempts at once; the node refuses more, and language nodes try another encoder


@dataclass
class OutgoingAttempt:
    """One attempt to send a request's rows."""

    deadline: float
    state: State = State.BOOTSTRAPPING
    prepared: Prepared | None = None
    num_blocks: int = 0
    version: int = 0  # of the latest Want
    encoded: set[int] = field(default_factory=set)  # token blocks whose rows can be written
    encode_us: int = 0
    granted: dict[int, tuple[int, int]] = field(default_factory=dict)  # token block -> latest (round, pool block)
    writing: dict[int, int] = field(default_factory=dict)  # token block -> round
    written: dict[int, tuple[int, WrittenBlock]] = field(default_factory=dict)  # token block -> (round, report)
    error: Error | None = None
    aborted: bool = False
    clean: bool = True  # no write has failed; a failed write may still land


@dataclass(frozen=True)
class FinishedAttempt:
    """The memory of a finished attempt, so that late messages don't start it again."""

    error: Error | None
    clean: bool


class Sender:
    """Every method except `next_timer` takes the current time and returns the actions to perform, in order."""

    def __init__(self, settings: SenderSettings):
        self.settings = settings
        self.peers: dict[str, int] = {}  # language nodes, with the number of blocks in their pools
        self.outgoing: dict[AttemptKey, OutgoingAttempt] = {}
        self.finished: dict[AttemptKey, FinishedAttempt] = {}  # oldest first
        self.ignored: Counter[str] = Counter()  # messages that were ignored, by type

    # events of this node

    def prepared(self, key: AttemptKey, message: Prepared, now: float) -> list[Action]:
        """A Prepare is done: the prompt is known. Its images are encoded when the language node wants their rows."""
        outgoing = self.outgoing.get(key)
        if outgoing is None or outgoing.state != State.BOOTSTRAPPING:
            return []
        if not 1 <= message.total_tokens <= MAX_TOKENS:
            return self._fail(key, 400, f"the prompt has {message.total_tokens} tokens: expected 1 to {MAX_TOKENS}")
        outgoing.state = State.WAITING_FOR_INPUT
        outgoing.num_blocks = cdiv(message.total_tokens, self.settings.block_size)
        outgoing.prepared = message
        return [Send(key.peer, message)]

    def encoded(self, key: AttemptKey, blocks: Iterable[int], now: float, encode_us: int = 0) -> list[Action]:
        """All rows of these token blocks are encoded, after `encode_us` microseconds for the request so far."""
        if not self._is_active(key) or self.outgoing[key].prepared is None:
            return []
        outgoing = self.outgoing[key]
        outgoing.encoded |= set(blocks)
        outgoing.encode_us = encode_us
        return self._report_encoded(key, outgoing)

    def failed(self, key: AttemptKey, status: int, reason: str, now: float) -> list[Action]:
        """A Prepare or the encoder has failed, or rows are lost; `status` is that of `messages.Error`."""
        return self._fail(key, status, reason) if self._is_active(key) else []

    def may_write(self, key: AttemptKey, now: float) -> bool:
        """Whether a requested write should still start."""
        return self._is_active(key) and now < self.outgoing[key].deadline

    def written(self, key: AttemptKey, round: int, blocks: Iterable[WrittenBlock], now: float) -> list[Action]:
        """Blocks of a StartWrite are in the pool, with all of their bytes."""
        done = [block for block in blocks if self._stop_writing(key, round, block.token_block)]
        if not done:
            return []
        if not self._is_active(key):
            return self._forget_if_idle(key)
        self.outgoing[key].written |= {block.token_block: (round, block) for block in done}
        return [Send(key.peer, Written(key.request_id, key.attempt, round, tuple(done)))]

    def write_failed(
        self, key: AttemptKey, round: int, token_blocks: Iterable[int], reason: str, now: float
    ) -> list[Action]:
        """Blocks of a StartWrite have failed. Any part of them may be in the pool or may still land there."""
        if not [block for block in token_blocks if self._stop_writing(key, round, block)]:
            return []
        self.outgoing[key].clean = False
        return self._fail(key, 503, reason) if self._is_active(key) else self._forget_if_idle(key)

    def write_skipped(self, key: AttemptKey, round: int, token_blocks: Iterable[int], now: float) -> list[Action]:
        """Blocks of a StartWrite were not started, because `may_write` returned False."""
        if not [block for block in token_blocks if self._stop_writing(key, round, block)]:
            return []
        return (
            self._fail(key, 504, "deadline passed before the transfer")
            if self._is_active(key)
            else self._forget_if_idle(key)
        )

    # events from other nodes and the clock

    def peer_up(self, peer: str, num_blocks: int, now: float) -> list[Action]:
        """A compatible language node has connected; its pool has `num_blocks` blocks."""
        self.peers[peer] = num_blocks
        return []

    def peer_down(self, peer: str, now: float) -> list[Action]:
        """A language node is gone; its attempts fail."""
        self.peers.pop(peer, None)
        keys = [key for key in self.outgoing if key.peer == peer and self._is_active(key)]
        return [action for key in keys for action in self._fail(key, 503, "the connection was lost")]

    def receive(self, peer: str, message: Message, now: float) -> list[Action]:
        """A message has arrived from `peer`."""
        if peer in self.peers and isinstance(message, Submit | Want | Grant | Release | Abort):
            key = AttemptKey(peer, message.request_id, message.attempt)
            match message:
                case Submit():
                    return self._submit(key, message, now)
                case Want():
                    return self._want(key, message)
                case Grant():
                    return self._grant(key, message, now)
                case Abort():
                    return self._abort(key)
                case Release() if self._is_active(key):
                    self.outgoing[key].state = State.SUCCESS
                    return self._forget_if_idle(key)
        self.ignored[type(message).__name__] += 1
        return []

    def tick(self, now: float) -> list[Action]:
        """Handles expired timers. Call it at `next_timer` or later, any number of times."""
        due = [key for key, outgoing in self.outgoing.items() if self._is_active(key) and outgoing.deadline <= now]
        return [action for key in due for action in self._fail(key, 504, "deadline passed on the encode node")]

    def next_timer(self) -> float | None:
        """The time at which `tick` is due next, or None if no attempt is active."""
        return min((outgoing.deadline for key, outgoing in self.outgoing.items() if self._is_active(key)), default=None)

    # messages of language nodes

    def _submit(self, key: AttemptKey, message: Submit, now: float) -> list[Action]:
        if error := self._repeat_error(key):
            return error
        if outgoing := self.outgoing.get(key):
            return [Send(key.peer, outgoing.prepared or Accepted(key.request_id, key.attempt))]
        if key in self.finished:
            return []
        if message.payload is None:
            return [self._unknown_attempt(key)]
        if len(self.outgoing) >= self.settings.max_requests:
            reason = f"the encode node has {len(self.outgoing)} requests: try again later"
            return [Send(key.peer, Error(key.request_id, key.attempt, 503, reason))]
        deadline = now + message.budget_ms / 1000
        self.outgoing[key] = OutgoingAttempt(deadline)
        accepted = Send(key.peer, Accepted(key.request_id, key.attempt))
        return [accepted, Prepare(key, message.payload, deadline)]

    def _find(self, key: AttemptKey) -> tuple[OutgoingAttempt | None, list[Action]]:
        """The attempt that a message is about, or the answer to a message about one that is over or unknown."""
        if error := self._repeat_error(key):
            return None, error
        if key in self.finished:
            return None, []
        outgoing = self.outgoing.get(key)
        return outgoing, [] if outgoing else [self._unknown_attempt(key)]

    def _want(self, key: AttemptKey, message: Want) -> list[Action]:
        outgoing, answer = self._find(key)
        if outgoing is None:
            return answer
        if not self._is_active(key) or outgoing.prepared is None:
            return []
        if message.version < outgoing.version:
            return []
        actions: list[Action] = []
        if message.version > outgoing.version:
            outgoing.version = message.version
            wanted = from_ranges(message.blocks, outgoing.num_blocks)
            actions.append(EncodeBlocks(key, to_ranges(wanted - outgoing.encoded)))
        return actions + self._report_encoded(key, outgoing)

    def _report_encoded(self, key: AttemptKey, outgoing: OutgoingAttempt) -> list[Action]:
        if not outgoing.encoded:
            return []
        blocks = to_ranges(outgoing.encoded)
        return [Send(key.peer, Encoded(key.request_id, key.attempt, blocks, outgoing.encode_us))]

    def _grant(self, key: AttemptKey, message: Grant, now: float) -> list[Action]:
        outgoing, answer = self._find(key)
        if outgoing is None:
            return answer
        starting: list[tuple[int, int]] = []
        repeated: list[WrittenBlock] = []
        for token_block, pool_block in message.blocks if self.may_write(key, now) else ():
            round, granted_block = outgoing.granted.get(token_block, (-1, -1))
            is_valid = token_block in outgoing.encoded and pool_block < self.peers[key.peer]
            if is_valid and round < message.round and token_block not in outgoing.writing:
                outgoing.granted[token_block] = (message.round, pool_block)
                outgoing.writing[token_block] = message.round
                outgoing.state = State.TRANSFERRING
                starting.append((token_block, pool_block))
            elif (round, granted_block) == (message.round, pool_block) and token_block not in outgoing.writing:
                repeated.append(outgoing.written[token_block][1])
        actions: list[Action] = []
        if starting:
            actions.append(StartWrite(key, message.round, tuple(starting)))
        if repeated:
            actions.append(Send(key.peer, Written(key.request_id, key.attempt, message.round, tuple(repeated))))
        return actions

    def _abort(self, key: AttemptKey) -> list[Action]:
        if outgoing := self.outgoing.get(key):
            outgoing.state, outgoing.aborted = State.FAILED, True
            return self._forget_if_idle(key)
        finished = self.finished.get(key)
        if finished is None:  # the Abort overtook its Submit, which must not start anything when it arrives
            finished = self._remember(key, FinishedAttempt(None, clean=True))
        return self._confirm_abort(key, finished)

    def _confirm_abort(self, key: AttemptKey, finished: FinishedAttempt) -> list[Action]:
        return [Send(key.peer, Aborted(key.request_id, key.attempt))] if finished.clean else []

    # how attempts end

    def _fail(self, key: AttemptKey, status: int, reason: str) -> list[Action]:
        outgoing = self.outgoing[key]
        outgoing.state = State.FAILED
        outgoing.error = Error(key.request_id, key.attempt, min(max(status, 400), 599), reason[:MAX_REASON])
        return [Send(key.peer, outgoing.error), *self._forget_if_idle(key)]

    def _forget_if_idle(self, key: AttemptKey) -> list[Action]:
        """Forgets a finished attempt, unless a block of it is still being written."""
        outgoing = self.outgoing[key]
        if outgoing.writing:
            return []
        del self.outgoing[key]
        if key.peer in self.peers:
            self._remember(key, FinishedAttempt(outgoing.error, outgoing.clean))
        confirmed = (
            [Send(key.peer, Aborted(key.request_id, key.attempt))] if outgoing.aborted and outgoing.clean else []
        )
        return [Forget(key), *confirmed]

    def _remember(self, key: AttemptKey, finished: FinishedAttempt) -> FinishedAttempt:
        self.finished[key] = finished
        if len(self.finished) > _MAX_FINISHED:
            del self.finished[next(iter(self.finished))]
        return finished

    def _repeat_error(self, key: AttemptKey) -> list[Action]:
        """Repeats the error with which the attempt failed, if it did."""
        attempt = self.outgoing.get(key) or self.finished.get(key)
        return [Send(key.peer, attempt.error)] if attempt and attempt.error else []

    def _unknown_attempt(self, key: AttemptKey) -> Send:
        return Send(key.peer, Error(key.request_id, key.attempt, 503, "the encode node does not know the attempt"))

    def _is_active(self, key: AttemptKey) -> bool:
        outgoing = self.outgoing.get(key)
        return outgoing is not None and outgoing.state < State.SUCCESS

    def _stop_writing(self, key: AttemptKey, round: int, token_block: int) -> bool:
        """Marks a write as ended; returns whether it was in progress."""
        outgoing = self.outgoing.get(key)
        if outgoing is None or outgoing.writing.get(token_block) != round:
            return False
        del outgoing.writing[token_block]
        return True
