"""The language node's side of transfers, as a state machine: the pool, its queue, rounds, failover, quarantine.

Blocks of the pool are a window. A request that waits for blocks holds none; it gets up to its share of them at once
and gives each back when it has been copied out. Oldest first, and the oldest waits until its share is free: so every
request waits for older ones alone, and they for nothing but their own writes or a deadline.
"""

import re
from collections import Counter
from dataclasses import dataclass, field

from deepstack_jax.disagg.wire.buffers import BlockAllocator
from deepstack_jax.disagg.wire.messages import (
    MAX_LIST,
    MAX_PAYLOAD,
    MAX_REASON,
    NAME_PATTERN,
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
from deepstack_jax.disagg.wire.transfer import Action, Began, CopyOut, EncodeHere, Ended, Send, State

_LONGEST_BUDGET_MS = 24 * 3600 * 1000


@dataclass(frozen=True)
class ReceiverSettings:
    """Limits of a language node's transfers. Times in seconds."""

    num_blocks: int  # of the pool
    block_size: int  # tokens a block
    share: int  # most blocks that a request gets at once
    max_tokens: int  # of a prompt
    retry: float = 1.0  # unanswered messages are sent again after this
    transfer_timeout: float = 30.0  # without progress; and the quarantine of blocks that may still be written
    max_attempts: int = 4  # with different encoders, or with the same one if there is no other
    max_damaged: int = 3  # blocks of a request with a wrong checksum before it fails
    encodes_here: bool = False  # this node has the vision weights

    def __post_init__(self):
        if not 1 <= self.share <= min(self.num_blocks, MAX_LIST):
            raise ValueError(f"share {self.share}: expected 1 to {min(self.num_blocks, MAX_LIST)} blocks")


@dataclass
class Request:
    """A request on its way in. Its attempt is with one peer; blocks are granted in one round at a time."""

    payload: bytes
    deadline: float
    state: State = State.BOOTSTRAPPING
    attempt: int = 0
    peer: str = ""
    accepted: bool = False
    prepared: bool = False
    resend_at: float = 0.0
    stalls_at: float = 0.0
    tried: dict[str, int] = field(default_factory=dict)  # attempts with each peer
    fingerprint: bytes = b""
    total_tokens: int = 0
    round: int = 0
    granted: dict[int, int] = field(default_factory=dict)  # token block -> pool block, of this round
    written: dict[int, WrittenBlock] = field(default_factory=dict)  # those of them that are being copied out
    received: set[int] = field(default_factory=set)  # token blocks
    damaged: int = 0
    failure: str = ""  # what an encoder said went wrong with this request, and with none of its others

    @property
    def waits_for_blocks(self) -> bool:
        return self.prepared and not self.granted

    @property
    def waits_for_peer(self) -> bool:
        return not self.prepared or len(self.written) < len(self.granted)


@dataclass
class Closing:
    """An attempt that was given up while its peer may still write to these blocks."""

    peer: str
    blocks: list[int]
    until: float
    resend_at: float


class Receiver:
    """Every method but `next_timer` takes the clock's reading and returns the actions to carry out, in order."""

    def __init__(self, settings: ReceiverSettings):
        self.settings = settings
        self.pool = BlockAllocator(settings.num_blocks, settings.block_size)
        self.peers: dict[str, None] = {}  # in the order they came
        self.requests: dict[str, Request] = {}  # in the order they came
        self.closing: dict[tuple[str, int], Closing] = {}
        self.attempts = 0  # numbers are never used again, so (request_id, attempt) is unique even if an id comes back
        self.dropped: Counter[str] = Counter()  # messages of no use, by type

    # what this node wants

    def submit(self, request_id: str, payload: bytes, deadline: float, now: float) -> list[Action]:
        """Asks an encoder for the request's rows; it ends by `deadline`.

        Raises:
            ValueError: a request of this id is under way, or the id or the payload is too long.
        """
        if request_id in self.requests:
            raise ValueError(f"request {request_id!r} is under way already: give each request an id of its own")
        if not re.fullmatch(NAME_PATTERN, request_id):
            raise ValueError(f"request id {request_id!r}: expected 1 to 64 printable ASCII characters without spaces")
        if len(payload) > MAX_PAYLOAD:
            raise ValueError(
                f"request {request_id!r} has {len(payload)} bytes: expected up to {MAX_PAYLOAD}, send less"
            )
        self.requests[request_id] = Request(payload, deadline)
        return self._next_attempt(request_id, "no encoder is connected", now)

    def abort(self, request_id: str, reason: str, now: float) -> list[Action]:
        """Ends the request, if it is under way: nobody waits for it any more."""
        return self._fail(request_id, 499, reason, now) + self._grant(now) if request_id in self.requests else []

    def copied(
        self,
        request_id: str,
        attempt: int,
        round: int,
        token_block: int,
        checksum: bytes,
        num_bytes: int,
        now: float,
    ) -> list[Action]:
        """A CopyOut is done; `checksum` and `num_bytes` are those of the copy.

        The block counts if they are what the sender said. Otherwise it is asked for again: whatever else was written
        there, late or damaged, is in the copy and not in the answer.
        """
        request = self.requests.get(request_id)
        if request is None or (request.attempt, request.round) != (attempt, round):
            return []
        if (said := request.written.pop(token_block, None)) is None:
            return []
        self.pool.free_block(request_id, request.granted.pop(token_block))
        actions: list[Action] = []
        if (said.checksum, said.num_bytes) == (checksum, num_bytes):
            request.received.add(token_block)
            if len(request.received) == self._num_blocks(request):
                del self.requests[request_id]
                request.state = State.SUCCESS
                actions += [Send(request.peer, Release(request_id, attempt)), Ended(request_id, State.SUCCESS, 200, "")]
        else:
            request.damaged += 1
            if request.damaged > self.settings.max_damaged:
                reason = f"{request.damaged} blocks arrived damaged from {request.peer}: check the network"
                actions += self._fail(request_id, 502, reason, now)
        return actions + self._grant(now)

    # what happens to this node

    def peer_up(self, peer: str, now: float) -> list[Action]:
        """An encoder that fits is connected."""
        self.peers[peer] = None
        return []

    def peer_down(self, peer: str, reason: str, now: float) -> list[Action]:
        """An encoder is gone, or seems to be: its requests go on with others."""
        self.peers.pop(peer, None)
        theirs = [request_id for request_id, request in self.requests.items() if request.peer == peer]
        actions = [action for request_id in theirs for action in self._next_attempt(request_id, reason, now)]
        return actions + self._grant(now)

    def receive(self, peer: str, message: Message, now: float) -> list[Action]:
        """A message has come from `peer`."""
        actions = None
        if isinstance(message, Aborted):
            closing = self.closing.get((message.request_id, message.attempt))
            if closing and closing.peer == peer:
                actions = self._release((message.request_id, message.attempt))
        elif isinstance(message, Accepted | Prepared | Written | Error):
            request = self.requests.get(message.request_id)
            if request and request.peer == peer and request.attempt == message.attempt:
                match message:
                    case Accepted():
                        request.accepted, actions = True, []
                    case Prepared():
                        actions = self._prepared(request, message, now)
                    case Written():
                        actions = self._written(request, message, now)
                    case Error(request_id, _, status, reason) if status < 500:
                        actions = self._fail(request_id, status, reason, now)
                    case Error(request_id, _, status, reason):
                        reason = f"{peer}: {reason}"
                        request.failure = reason if status == 500 else request.failure
                        actions = self._next_attempt(request_id, reason, now, status)
        if actions is None:
            self.dropped[type(message).__name__] += 1
            return []
        return actions + self._grant(now)

    def tick(self, now: float) -> list[Action]:
        """Does what is due; to be called at `next_timer` or later, any number of times."""
        actions: list[Action] = []
        for (request_id, attempt), closing in list(self.closing.items()):
            if closing.until <= now:
                actions += self._release((request_id, attempt))
            elif closing.resend_at <= now:
                closing.resend_at = now + self.settings.retry
                actions.append(Send(closing.peer, Abort(request_id, attempt)))
        for request_id, request in list(self.requests.items()):
            if request.deadline <= now:
                actions += self._fail(request_id, 504, f"deadline passed {self._doing(request)}", now)
            elif self._stalls(request) and request.stalls_at <= now:
                actions += self._next_attempt(request_id, f"{request.peer} stopped writing", now)
            elif request.waits_for_peer and request.resend_at <= now:
                actions.append(self._ask(request_id, request, now))
        return actions + self._grant(now)

    def next_timer(self) -> float | None:
        """When `tick` is due next; None if nothing is under way."""
        times = [time for closing in self.closing.values() for time in (closing.until, closing.resend_at)]
        for request in self.requests.values():
            times.append(request.deadline)
            times += [request.resend_at] if request.waits_for_peer else []
            times += [request.stalls_at] if self._stalls(request) else []
        return min(times, default=None)

    # attempts

    def _next_attempt(self, request_id: str, reason: str, now: float, status: int | None = None) -> list[Action]:
        """Gives up the attempt, if there is one, and goes on with the encoder tried least, then the least busy.

        `status` is the encoder's own, where it has said itself why.
        """
        request = self.requests[request_id]
        actions = self._abandon(request_id, request, reason, now)
        if not self.peers or sum(request.tried.values()) >= self.settings.max_attempts:
            if self.settings.encodes_here:
                del self.requests[request_id]
                return [*actions, EncodeHere(request_id, reason)]
            if request.failure:  # of encoders that went away meanwhile nothing is said: they were not to blame
                status, reason = 500, request.failure
            elif status is None and request.tried:
                reason = f"no encoder is left: {reason}"
            return actions + self._fail(request_id, status or 503, reason, now)
        busy = Counter(other.peer for other in self.requests.values())
        peer = min(self.peers, key=lambda peer: (request.tried.get(peer, 0), busy[peer]))
        again = peer in request.tried
        request.tried[peer] = request.tried.get(peer, 0) + 1
        self.attempts += 1
        request.peer, request.attempt = peer, self.attempts
        request.accepted = request.prepared = False
        if again:  # it has just failed: not before the next retry
            request.resend_at = now + self.settings.retry
            return actions
        return [*actions, self._ask(request_id, request, now)]

    def _abandon(self, request_id: str, request: Request, reason: str, now: float) -> list[Action]:
        """Parts from the request's peer, which may only seem dead; blocks that it may write to are put aside."""
        if not request.peer:
            return []
        if blocks := list(request.granted.values()):
            for block in blocks:
                self.pool.quarantine(request_id, block)
            until, resend_at = now + self.settings.transfer_timeout, now + self.settings.retry
            self.closing[request_id, request.attempt] = Closing(request.peer, blocks, until, resend_at)
        request.granted.clear()
        request.written.clear()
        peer, request.peer = request.peer, ""
        return [Send(peer, Abort(request_id, request.attempt, reason[:MAX_REASON]))]

    def _release(self, attempt: tuple[str, int]) -> list[Action]:
        for block in self.closing.pop(attempt).blocks:
            self.pool.release(block)
        return []

    def _fail(self, request_id: str, status: int, reason: str, now: float) -> list[Action]:
        request = self.requests[request_id]
        actions = self._abandon(request_id, request, reason, now)
        del self.requests[request_id]
        request.state = State.FAILED
        return [*actions, Ended(request_id, State.FAILED, status, reason)]

    def _ask(self, request_id: str, request: Request, now: float) -> Send:
        """What the peer has not answered yet: a Submit, or the Grant of blocks that are not written."""
        request.resend_at = now + self.settings.retry
        if request.prepared:
            missing = tuple(sorted(item for item in request.granted.items() if item[0] not in request.written))
            return Send(request.peer, Grant(request_id, request.attempt, request.round, missing))
        submit = Submit(
            request_id,
            request.attempt,
            budget_ms=min(max(0, int((request.deadline - now) * 1000)), _LONGEST_BUDGET_MS),
            payload=None if request.accepted else request.payload,
            have=_ranges(request.received),
            fingerprint=request.fingerprint or None,
        )
        return Send(request.peer, submit)

    # messages of the current attempt

    def _prepared(self, request: Request, message: Prepared, now: float) -> list[Action] | None:
        if request.prepared:
            return None
        limit = self.settings.max_tokens
        if message.total_tokens > limit:
            reason = f"the prompt has {message.total_tokens} tokens: expected up to {limit}"
            return self._fail(message.request_id, 400, reason, now)
        if message.visual_rows > message.total_tokens:
            reason = f"{request.peer} announced {message.visual_rows} visual rows for {message.total_tokens} tokens"
            return self._next_attempt(message.request_id, reason, now)
        request.accepted = request.prepared = True
        request.state = max(request.state, State.WAITING_FOR_INPUT)
        if (message.fingerprint, message.total_tokens) == (request.fingerprint, request.total_tokens):
            return []  # the blocks received from another encoder are of this prompt
        request.received.clear()
        request.fingerprint, request.total_tokens = message.fingerprint, message.total_tokens
        return [Began(message.request_id, message.total_tokens, message.visual_rows, message.rope_delta)]

    def _written(self, request: Request, message: Written, now: float) -> list[Action] | None:
        actions: list[Action] = []
        for block in message.blocks if message.round == request.round else ():
            index = block.token_block
            if index in request.granted and index not in request.written:
                request.written[index] = block
                place = (request.round, index, request.granted[index])
                actions.append(CopyOut(message.request_id, request.attempt, *place, block.checksum, block.num_bytes))
        request.stalls_at = now + self.settings.transfer_timeout if actions else request.stalls_at
        return actions or None

    # the pool

    def _grant(self, now: float) -> list[Action]:
        """Gives free blocks to those who wait, oldest first, a share or all that is missing to each."""
        actions: list[Action] = []
        for request_id, request in self.requests.items():
            if not self.pool.num_free:
                break
            if not request.waits_for_blocks:
                continue
            missing = [index for index in range(self._num_blocks(request)) if index not in request.received]
            usable = self.settings.num_blocks - self.pool.num_quarantined
            wanted = min(len(missing), self.settings.share, usable)
            if not wanted or self.pool.num_free < wanted:
                break  # nobody overtakes
            request.round += 1
            request.granted = dict(zip(missing, self.pool.take(request_id, wanted), strict=False))
            request.stalls_at = now + self.settings.transfer_timeout
            request.state = State.TRANSFERRING
            actions.append(self._ask(request_id, request, now))
        return actions

    def _num_blocks(self, request: Request) -> int:
        return -(-request.total_tokens // self.settings.block_size)

    def _stalls(self, request: Request) -> bool:
        return len(request.written) < len(request.granted)

    def _doing(self, request: Request) -> str:
        if not request.prepared:
            return f"while {request.peer} prepared and encoded"
        if request.waits_for_blocks:
            return "while the request waited for receive blocks"
        return f"during the transfer from {request.peer}"


def _ranges(blocks: set[int]) -> tuple[tuple[int, int], ...]:
    """Ascending ranges [start, stop) of neighbours, as many as a message takes."""
    ranges: list[tuple[int, int]] = []
    for block in sorted(blocks):
        if ranges and ranges[-1][1] == block:
            ranges[-1] = (ranges[-1][0], block + 1)
        else:
            ranges.append((block, block + 1))
    return tuple(ranges[:MAX_LIST])
