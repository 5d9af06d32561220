"""The language node's state machine for transfers: the receive pool, its queue, rounds, failover and quarantine.

The blocks of the pool are a sliding window. A request that waits for blocks holds none. It receives up to its share of
blocks at once, and returns each as soon as the block has been copied out. Blocks are granted to the oldest request
whose rows are encoded, which waits until its whole share is free. Every request therefore waits only for older ones,
and those wait only for their own writes or a deadline.

Rows come only in the token blocks that the node wants, which are decided twice: as soon as the prompt is known, so that
encoding starts, and when the engine admits the request. Blocks are granted from then on.
"""

import re
from collections import Counter
from collections.abc import Iterable

from deepstack_jax.disagg.language.pending import AbandonedAttempt, PendingRequest, ReceiverSettings
from deepstack_jax.disagg.wire.buffers import BlockAllocator
from deepstack_jax.disagg.wire.messages import (
    MAX_PAYLOAD,
    MAX_REASON,
    NAME_PATTERN,
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
)
from deepstack_jax.disagg.wire.transfer import (
    Action,
    CopyOut,
    EncodeLocally,
    Ended,
    PromptKnown,
    Send,
    State,
    Wipe,
    from_ranges,
    name_of,
    to_ranges,
)
from deepstack_jax.rounding import cdiv

_MAX_BUDGET_MS = 24 * 3600 * 1000


class Receiver:
    """Every method except `next_timer` takes the current time and returns the actions to perform, in order."""

    def __init__(self, settings: ReceiverSettings):
        self.settings = settings
        self.pool = BlockAllocator(settings.num_blocks, settings.block_size)
        self.peers: dict[str, None] = {}  # in order of connection
        self.slow: set[str] = set()  # peers that get new requests only if all are among them
        self.requests: dict[str, PendingRequest] = {}  # in order of submission
        self.abandoned: dict[tuple[str, int], AbandonedAttempt] = {}
        self.attempts = 0  # numbers are never reused, so (request_id, attempt) is unique even if an id is reused
        self.failovers = 0  # attempts after the first of their request
        self.ignored: Counter[str] = Counter()  # messages that were ignored, by type

    # events of this node

    def submit(self, request_id: str, payload: bytes, deadline: float, now: float) -> list[Action]:
        """Starts fetching the request's rows from an encoder. The request ends by `deadline`.

        Raises:
            ValueError: a request with this id is in progress, or the id or the payload is too long.
        """
        if request_id in self.requests:
            raise ValueError(f"request {request_id!r} is already in progress: give each request a unique id")
        if not re.fullmatch(NAME_PATTERN, request_id):
            raise ValueError(f"request id {request_id!r}: expected 1 to 64 printable ASCII characters without spaces")
        if len(payload) > MAX_PAYLOAD:
            raise ValueError(f"request {request_id!r} has {len(payload)} bytes: send at most {MAX_PAYLOAD}")
        self.requests[request_id] = PendingRequest(payload, deadline)
        return self._next_attempt(request_id, "no encoder is connected", now)

    def want(self, request_id: str, blocks: Iterable[int], admitted: bool, now: float) -> list[Action]:
        """Says which token blocks need rows, of a request whose prompt is known; blocks out of the prompt count not.

        Once `admitted`, rows may arrive, and the request ends as soon as they have: a later call may leave blocks out,
        and not add any.
        """
        request = self.requests.get(request_id)
        if request is None or not request.fingerprint:
            return []
        before, request.admitted = request.wanted, request.admitted or admitted
        request.wanted = {block for block in blocks if 0 <= block < self._num_blocks(request)}
        actions = self._end_if_complete(request_id, request)
        if not actions and request.wanted != before:
            request.version += 1
            actions += [self._send_want(request_id, request, now)] if request.prepared else []
        return actions + self._grant(now)

    def abort(self, request_id: str, reason: str, now: float) -> list[Action]:
        """Ends the request if it is in progress, because its result is no longer needed."""
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

        The block counts if both match the sender's report. Otherwise it is requested again: late or damaged writes
        reach the copy but never the answer.
        """
        request = self.requests.get(request_id)
        if request is None or (request.attempt, request.round) != (attempt, round):
            return []
        if (reported := request.written.pop(token_block, None)) is None:
            return []
        self.pool.free_block(request_id, request.granted.pop(token_block))
        if (reported.checksum, reported.num_bytes) == (checksum, num_bytes):
            request.received.add(token_block)
        else:
            request.num_damaged += 1
            if request.num_damaged > self.settings.max_damaged:
                who = name_of(request.peer)
                reason = f"{request.num_damaged} blocks arrived damaged from {who}: check the network"
                return self._fail(request_id, 502, reason, now) + self._grant(now)
        return self._end_if_complete(request_id, request) + self._grant(now)

    # events from other nodes and the clock

    def peer_up(self, peer: str, now: float) -> list[Action]:
        """A compatible encoder has connected."""
        self.peers[peer] = None
        return []

    def peer_down(self, peer: str, reason: str, now: float) -> list[Action]:
        """An encoder is gone or seems to be: its requests continue with other encoders."""
        self.peers.pop(peer, None)
        self.slow.discard(peer)
        affected = [request_id for request_id, request in self.requests.items() if request.peer == peer]
        actions = [action for request_id in affected for action in self._next_attempt(request_id, reason, now)]
        return actions + self._grant(now)

    def set_slow(self, peer: str, slow: bool) -> None:
        """An encoder's preparation seems stuck, or goes on again: requests prefer the others."""
        (self.slow.add if slow and peer in self.peers else self.slow.discard)(peer)

    def receive(self, peer: str, message: Message, now: float) -> list[Action]:
        """A message has arrived from `peer`."""
        actions = None
        if isinstance(message, Aborted):
            abandoned = self.abandoned.get((message.request_id, message.attempt))
            if abandoned and abandoned.peer == peer:
                actions = self._release((message.request_id, message.attempt))
        elif isinstance(message, Accepted | Prepared | Encoded | Written | Error):
            request = self.requests.get(message.request_id)
            if request and request.peer == peer and request.attempt == message.attempt:
                match message:
                    case Accepted():
                        request.accepted, actions = True, []
                    case Prepared():
                        actions = self._prepared(request, message, now)
                    case Encoded():
                        actions = self._encoded(request, message)
                    case Written():
                        actions = self._written(request, message, now)
                    case Error(request_id, _, status, reason) if status < 500:
                        actions = self._fail(request_id, status, reason, now)
                    case Error(request_id, _, status, reason):
                        reason = f"{name_of(peer)}: {reason}"
                        request.failure = reason if status == 500 else request.failure
                        actions = self._next_attempt(request_id, reason, now, status)
        if actions is None:
            self.ignored[type(message).__name__] += 1
            return []
        return actions + self._grant(now)

    def tick(self, now: float) -> list[Action]:
        """Handles expired timers. Call it at `next_timer` or later, any number of times."""
        actions: list[Action] = []
        for (request_id, attempt), abandoned in list(self.abandoned.items()):
            if abandoned.release_at <= now:
                actions += self._release((request_id, attempt))
            elif abandoned.resend_at <= now:
                abandoned.resend_at = now + self.settings.retry_interval
                actions.append(Send(abandoned.peer, Abort(request_id, attempt)))
        for request_id, request in list(self.requests.items()):
            if request.deadline <= now:
                actions += self._fail(request_id, 504, f"deadline passed {self._describe_wait(request)}", now)
            elif self._awaits_writes(request) and request.stall_deadline <= now:
                actions += self._next_attempt(request_id, f"{name_of(request.peer)} stopped writing", now)
            elif request.waits_for_peer and request.resend_at <= now:
                actions += self._send_unanswered(request_id, request, now)
        return actions + self._grant(now)

    def next_timer(self) -> float | None:
        """The time at which `tick` is due next, or None if nothing is in progress."""
        times = [time for abandoned in self.abandoned.values() for time in (abandoned.release_at, abandoned.resend_at)]
        for request in self.requests.values():
            times.append(request.deadline)
            times += [request.resend_at] if request.waits_for_peer else []
            times += [request.stall_deadline] if self._awaits_writes(request) else []
        return min(times, default=None)

    # attempts

    def _next_attempt(self, request_id: str, reason: str, now: float, status: int | None = None) -> list[Action]:
        """Abandons the current attempt, if any, and starts one with the best encoder.

        That is the one that the request has tried least often, then one that isn't slow, then the least busy.
        `status` is the one that the encoder reported, if it reported one.
        """
        request = self.requests[request_id]
        actions = self._abandon(request_id, request, reason, now)
        if not self.peers or sum(request.attempts_by_peer.values()) >= self.settings.max_attempts:
            if self.settings.encodes_locally:
                del self.requests[request_id]
                return [*actions, EncodeLocally(request_id, reason)]
            if request.failure:  # report this, not that other encoders went away since: they did not cause the failure
                status, reason = 500, request.failure
            elif status is None and request.attempts_by_peer:
                reason = f"no encoder is left: {reason}"
            return actions + self._fail(request_id, status or 503, reason, now)
        busy = Counter(other.peer for other in self.requests.values())
        tried = request.attempts_by_peer
        peer = min(self.peers, key=lambda peer: (tried.get(peer, 0), peer in self.slow, busy[peer]))
        self.failovers += bool(request.attempts_by_peer)
        is_retry = peer in request.attempts_by_peer
        request.attempts_by_peer[peer] = request.attempts_by_peer.get(peer, 0) + 1
        self.attempts += 1
        request.peer, request.attempt = peer, self.attempts
        request.accepted = request.prepared = False
        request.encoded.clear()
        if is_retry:  # it has just failed: wait for the retry interval
            request.resend_at = now + self.settings.retry_interval
            return actions
        return actions + self._send_unanswered(request_id, request, now)

    def _abandon(self, request_id: str, request: PendingRequest, reason: str, now: float) -> list[Action]:
        """Leaves the request's peer, which may only seem dead, and quarantines blocks that it may still write to."""
        if not request.peer:
            return []
        if blocks := list(request.granted.values()):
            for block in blocks:
                self.pool.quarantine(request_id, block)
            release_at, resend_at = now + self.settings.transfer_timeout, now + self.settings.retry_interval
            self.abandoned[request_id, request.attempt] = AbandonedAttempt(request.peer, blocks, release_at, resend_at)
        request.granted.clear()
        request.written.clear()
        peer, request.peer = request.peer, ""
        return [Send(peer, Abort(request_id, request.attempt, reason[:MAX_REASON]))]

    def _release(self, attempt: tuple[str, int]) -> list[Action]:
        blocks = self.abandoned.pop(attempt).blocks
        for block in blocks:
            self.pool.release(block)
        return [Wipe(tuple(blocks))]

    def _fail(self, request_id: str, status: int, reason: str, now: float) -> list[Action]:
        request = self.requests[request_id]
        actions = self._abandon(request_id, request, reason, now)
        del self.requests[request_id]
        request.state = State.FAILED
        return [*actions, Ended(request_id, State.FAILED, status, reason)]

    def _end_if_complete(self, request_id: str, request: PendingRequest) -> list[Action]:
        """Ends the request if all that it wants has been received and nothing is in flight."""
        if not request.admitted or request.missing or request.granted:
            return []
        del self.requests[request_id]
        request.state = State.SUCCESS
        # an encoder that has not answered may have no Submit yet, which Abort would overtake
        kind = Release if request.prepared else Abort
        return [Send(request.peer, kind(request_id, request.attempt)), Ended(request_id, State.SUCCESS, 200, "")]

    def _send_unanswered(self, request_id: str, request: PendingRequest, now: float) -> list[Send]:
        """Sends what the peer has not answered yet: a Submit, a Want, or the Grant of blocks that are not written."""
        request.resend_at = now + self.settings.retry_interval
        if not request.prepared:
            budget_ms = min(max(0, int((request.deadline - now) * 1000)), _MAX_BUDGET_MS)
            payload = None if request.accepted else request.payload
            return [Send(request.peer, Submit(request_id, request.attempt, budget_ms, payload))]
        actions = [self._send_grant(request_id, request, now)] if self._awaits_writes(request) else []
        if request.waits_for_rows:
            actions.append(self._send_want(request_id, request, now))
        return actions

    def _send_grant(self, request_id: str, request: PendingRequest, now: float) -> Send:
        request.resend_at = now + self.settings.retry_interval
        missing = tuple(sorted(item for item in request.granted.items() if item[0] not in request.written))
        return Send(request.peer, Grant(request_id, request.attempt, request.round, missing))

    def _send_want(self, request_id: str, request: PendingRequest, now: float) -> Send:
        request.resend_at = now + self.settings.retry_interval
        wanted = to_ranges(request.missing)
        return Send(request.peer, Want(request_id, request.attempt, request.version, wanted))

    # messages of the current attempt

    def _prepared(self, request: PendingRequest, message: Prepared, now: float) -> list[Action] | None:
        if request.prepared:
            return None
        limit = self.settings.max_tokens
        if message.total_tokens > limit:
            reason = f"the prompt has {message.total_tokens} tokens: expected up to {limit}"
            return self._fail(message.request_id, 400, reason, now)
        if message.visual_rows > message.total_tokens:
            rows, tokens = message.visual_rows, message.total_tokens
            reason = f"{name_of(request.peer)} announced {rows} visual rows for {tokens} tokens"
            return self._next_attempt(message.request_id, reason, now)
        known = request.fingerprint, request.total_tokens
        if request.fingerprint and known != (message.fingerprint, message.total_tokens):
            # the engine has the first prompt, and may have computed a part of it
            who = name_of(request.peer)
            reason = f"{who} prepared another prompt than the encoder before it: install one release on all"
            return self._next_attempt(message.request_id, reason, now, 502)
        request.accepted = request.prepared = True
        request.state = max(request.state, State.WAITING_FOR_INPUT)
        if not request.fingerprint:
            request.fingerprint, request.total_tokens = message.fingerprint, message.total_tokens
            return [PromptKnown(message.request_id, message)]
        return [] if request.wanted is None else [self._send_want(message.request_id, request, now)]

    def _encoded(self, request: PendingRequest, message: Encoded) -> list[Action] | None:
        new = from_ranges(message.blocks, self._num_blocks(request)) - request.encoded
        if not request.prepared or not new:
            return None
        request.encoded |= new
        return []

    def _written(self, request: PendingRequest, message: Written, now: float) -> list[Action] | None:
        actions: list[Action] = []
        for block in message.blocks if message.round == request.round else ():
            index = block.token_block
            if index in request.granted and index not in request.written:
                request.written[index] = block
                blocks = (request.round, index, request.granted[index])
                actions.append(CopyOut(message.request_id, request.attempt, *blocks, block.checksum, block.num_bytes))
        request.stall_deadline = now + self.settings.transfer_timeout if actions else request.stall_deadline
        return actions or None

    # the receive pool

    def _grant(self, now: float) -> list[Action]:
        """Grants free blocks to waiting requests, oldest first: a share each, or all that can be sent if fewer."""
        actions: list[Action] = []
        for request_id, request in self.requests.items():
            if not self.pool.num_free:
                break
            if not request.waits_for_blocks:
                continue
            missing = sorted(request.missing & request.encoded)
            usable = self.settings.num_blocks - self.pool.num_quarantined
            count = min(len(missing), self.settings.share, usable)
            if not count or self.pool.num_free < count:
                break  # no request overtakes an older one
            request.round += 1
            request.granted = dict(zip(missing, self.pool.take(request_id, count), strict=False))
            request.stall_deadline = now + self.settings.transfer_timeout
            request.state = State.TRANSFERRING
            actions.append(self._send_grant(request_id, request, now))
        return actions

    def _num_blocks(self, request: PendingRequest) -> int:
        return cdiv(request.total_tokens, self.settings.block_size)

    def _awaits_writes(self, request: PendingRequest) -> bool:
        return len(request.written) < len(request.granted)

    def _describe_wait(self, request: PendingRequest) -> str:
        peer = name_of(request.peer)
        if not request.prepared:
            return f"while {peer} prepared the request"
        if not request.admitted:
            return "while the request waited for the engine"
        if not request.granted and request.waits_for_rows:
            return f"while {peer} encoded the images and videos"
        if request.waits_for_blocks:
            return "while the request waited for receive blocks"
        return f"during the transfer from {peer}"
