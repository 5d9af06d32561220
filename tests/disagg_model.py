"""A model of one Receiver, some Senders, an unreliable network and a receive pool, whose states can all be visited.

Every block of a request has an image of its own. The engine of the language node admits a request some time after its
prompt is known, and may find the rows of its first blocks in its prefix cache, then and once more.

The network delivers any message in flight, in any order. A world has a budget of faults: a lost or duplicated message,
a write that fails, lands late or is damaged, an encoder that dies or seems to, a client that disconnects, and time that
passes while another step is possible. All other steps are free.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

from deepstack_jax.disagg.encode.sender import Sender, SenderSettings
from deepstack_jax.disagg.language.pending import ReceiverSettings
from deepstack_jax.disagg.language.receiver import Receiver
from deepstack_jax.disagg.wire.messages import Abort, Encoded, Message, Prepared, Want, WrittenBlock
from deepstack_jax.disagg.wire.transfer import (
    Action,
    AttemptKey,
    CopyOut,
    EncodeBlocks,
    EncodeLocally,
    Ended,
    Forget,
    Prepare,
    PromptKnown,
    Send,
    StartWrite,
    State,
    from_ranges,
)

NODE = "node"  # the name of the language node
BLOCK_SIZE = 2
TORN = b"torn    "  # the content of a block after a damaged write
NETWORK_FAULTS = ("drop", "double")
FAULTS = (*NETWORK_FAULTS, "wait", "fail", "damage", "crash", "suspect", "flap", "cut", "abort")


class Violation(AssertionError):
    """The protocol has violated an invariant."""


@dataclass(frozen=True)
class Write:
    """One block of a StartWrite."""

    key: AttemptKey
    round: int
    token_block: int
    pool_block: int


@dataclass(frozen=True)
class Case:
    """The initial state and the limits of a world. Times are whole seconds."""

    blocks: tuple[int, ...]  # number of token blocks of each request
    pool: int
    share: int
    encoders: int = 1
    faults: int = 0
    kinds: tuple[str, ...] = FAULTS
    deadline: int = 12
    retry_interval: int = 2
    timeout: int = 5
    slow_copies: bool = False  # other steps may happen before a copy is done
    slow_preparation: bool = False
    slow_encoding: bool = False  # images are encoded one by one
    slow_admission: bool = False
    cached: tuple[int, ...] = (0,)  # the number of first blocks in the prefix cache: when asked first, then later
    slow_starts: bool = False  # writes wait in a queue before they start
    own_prompts: bool = False  # every encoder prepares a different prompt
    encodes_locally: bool = False
    receiver: type[Receiver] = Receiver
    sender: type[Sender] = Sender


class World:
    """One state. `steps` lists the possible next steps, and `take` performs one of them."""

    def __init__(self, case: Case):
        self.case = case
        self.now = 0
        self.used = 0  # number of faults so far
        self.harmless = True  # all faults so far were of the network
        settings = ReceiverSettings(
            num_blocks=case.pool,
            block_size=BLOCK_SIZE,
            share=case.share,
            max_tokens=99,
            retry_interval=case.retry_interval,
            transfer_timeout=case.timeout,
            max_attempts=2,
            max_damaged=1,
            encodes_locally=case.encodes_locally,
        )
        self.machines: dict[str, Any] = {NODE: case.receiver(settings)}
        self.machines |= {f"e{index}": case.sender(SenderSettings(BLOCK_SIZE)) for index in range(case.encoders)}
        self.hashes: dict[str, int] = {}  # of machines; only this world shares a machine without a hash
        self.mail: Counter[tuple[str, str, Message]] = Counter()  # (from, to, message)
        self.preparing: dict[Prepare, str] = {}
        self.encoding: dict[tuple[AttemptKey, int], str] = {}  # images that are waiting for the encoder
        self.admissions: dict[str, int] = {}  # requests in the engine's line -> how often it has looked into its cache
        self.wanted: dict[str, frozenset[int]] = {}
        self.queued: dict[Write, str] = {}  # writes that have been requested but have not started
        self.writing: dict[Write, str] = {}
        self.lost_writes: set[Write] = set()  # failed writes that may still land
        self.copying: set[CopyOut] = set()
        self.dead: set[str] = set()  # dead encoders that the receiver still considers connected
        self.pool: dict[int, bytes] = {}  # the content of each block
        self.arrived: dict[tuple[str, int], bytes] = {}  # the content that has been copied out and counted
        self.ended: dict[str, str] = {}
        self.expired: set[tuple[str, int]] = set()  # attempts whose quarantine has timed out
        self.started: Counter[tuple[str, int]] = Counter()
        for name in [*self.machines][1:]:
            self.notify(NODE, "peer_up", name)
            self.notify(name, "peer_up", NODE, case.pool)
        for index in range(len(case.blocks)):
            self.notify(NODE, "submit", f"r{index}", b"payload", case.deadline)
        self.check()

    @property
    def receiver(self) -> Receiver:
        return self.machines[NODE]

    def copy(self) -> "World":
        """Another world in this state. Both share machines and their hashes until one of them changes a machine."""
        world = object.__new__(World)
        for name, value in self.__dict__.items():
            world.__dict__[name] = value.copy() if type(value) in (dict, set, Counter) else value
        return world

    def key(self) -> int:
        """A hash that is equal for states from which the same steps are possible."""
        for name, machine in self.machines.items():
            if name not in self.hashes:
                self.hashes[name] = hash(frozen(machine))
        maps = (
            self.hashes,
            self.mail,
            self.preparing,
            self.encoding,
            self.admissions,
            self.wanted,
            self.queued,
            self.writing,
            self.pool,
        )
        maps += (self.arrived, self.ended, self.started)
        sets = (self.lost_writes, self.copying, self.dead, self.expired)
        return hash((self.now, self.used, self.harmless, *(frozenset(m.items()) for m in maps), *map(frozenset, sets)))

    # possible steps

    def steps(self) -> Iterator[tuple[str, Any]]:
        yield from (("deliver", letter) for letter in self.mail)
        yield from (("prepare", prepare) for prepare in self.preparing)
        yield from (("encode", image) for image in self.encoding)
        yield from (("admit", request_id) for request_id in self.admissions)
        yield from (("start", write) for write in self.queued)
        yield from (("write", write) for write in self.writing)
        yield from (("copy", copy) for copy in self.copying)
        yield from (("learn", name) for name in self.dead)
        yield from (("land", write) for write in self.lost_writes)
        if not self.busy() and self.timers():
            yield "time", None
        if self.used < self.case.faults:
            yield from (step for step in self.faults() if step[0] in self.case.kinds)

    def faults(self) -> Iterator[tuple[str, Any]]:
        for letter in self.mail:
            yield "drop", letter
            yield "double", letter
        for write in self.writing:
            yield "fail", write
            yield "damage", write
        for name in self.receiver.peers:
            if name not in self.dead:
                yield "crash", name
                yield "suspect", name
                yield "flap", name
                yield "cut", name
        for request_id in self.receiver.requests:
            yield "abort", request_id
        if self.busy() and self.timers():
            yield "wait", None

    def busy(self) -> bool:
        waiting = self.mail or self.preparing or self.encoding or self.admissions or self.queued
        return bool(waiting or self.writing or self.copying or self.dead)

    def timers(self) -> list[float]:
        return [time for machine in self.machines.values() if (time := machine.next_timer()) is not None]

    def take(self, step: tuple[str, Any]) -> None:
        kind, what = step
        if kind in FAULTS:
            self.used += 1
            self.harmless &= kind in NETWORK_FAULTS
        getattr(self, f"do_{kind}")(what)
        self.discard_useless()
        self.check()

    def do_deliver(self, letter: tuple[str, str, Message]) -> None:
        self.do_drop(letter)
        self.do_double(letter)

    def do_drop(self, letter: tuple[str, str, Message]) -> None:
        self.mail[letter] -= 1
        if not self.mail[letter]:
            del self.mail[letter]

    def do_double(self, letter: tuple[str, str, Message]) -> None:
        source, target, message = letter
        self.notify(target, "receive", source, message)

    def do_prepare(self, prepare: Prepare) -> None:
        name = self.preparing.pop(prepare)
        tokens = self.case.blocks[int(prepare.key.request_id[1:])] * BLOCK_SIZE - 1  # the last block is partial
        prompt = self.prompt(prepare.key.request_id, name).ljust(8)
        key = prepare.key
        self.notify(name, "prepared", key, Prepared(key.request_id, key.attempt, tokens, tokens, 0, prompt))

    def do_encode(self, image: tuple[AttemptKey, int]) -> None:
        key, block = image
        name = self.encoding.pop(image)
        self.notify(name, "encoded", key, [block])

    def do_admit(self, request_id: str) -> None:
        """The engine looks into its prefix cache: before it has a slot for the request, then once or more with it."""
        times = self.admissions.pop(request_id)
        cached = self.case.cached[min(times, len(self.case.cached) - 1)]
        blocks = range(self.case.blocks[int(request_id[1:])])
        self.wanted[request_id] = frozenset(blocks[cached:])
        if times < max(1, len(self.case.cached) - 1):
            self.admissions[request_id] = times + 1
        self.notify(NODE, "want", request_id, sorted(self.wanted[request_id]), times > 0)
        if request_id in self.admissions and not self.case.slow_admission:
            self.do_admit(request_id)

    def do_write(self, write: Write, content: bytes | None = None) -> None:
        name = self.writing.pop(write)
        right = self.content(write, name)
        self.land(write, right if content is None else content)
        self.notify(name, "written", write.key, write.round, [WrittenBlock(write.token_block, right, len(right))])

    def do_start(self, write: Write) -> None:
        name = self.queued.pop(write)
        if self.machines[name].may_write(write.key, self.now):
            self.writing[write] = name
        else:
            self.notify(name, "write_skipped", write.key, write.round, [write.token_block])

    def do_damage(self, write: Write) -> None:
        self.do_write(write, TORN)

    def do_fail(self, write: Write) -> None:
        self.lost_writes.add(write)
        name = self.writing.pop(write)
        self.notify(name, "write_failed", write.key, write.round, [write.token_block], "failed")

    def do_land(self, write: Write) -> None:
        self.lost_writes.remove(write)
        self.land(write, TORN)

    def do_copy(self, copy: CopyOut) -> None:
        self.copying.remove(copy)
        content = self.pool.get(copy.pool_block, b"")
        index = (copy.request_id, copy.token_block)

        def count(receiver: Receiver, before: Receiver) -> None:
            """Records a block that the receiver counts, and checks that it is right to."""
            was = before.requests.get(copy.request_id)
            request = receiver.requests.get(copy.request_id)
            if was is None or copy.token_block in was.received:
                return
            if request and copy.token_block not in request.received:
                return
            name = was.peer
            right = self.content(Write(AttemptKey(NODE, *index), copy.round, copy.token_block, copy.pool_block), name)
            if request is None and content != right:
                return  # the request has failed, as `ended` shows
            if content != right or index in self.arrived:
                raise Violation(f"{copy} counted {content!r}: expected {right!r}, once")
            self.arrived[index] = content

        args = (copy.request_id, copy.attempt, copy.round, copy.token_block, content, len(content))
        self.notify(NODE, "copied", *args, then=count)

    def do_crash(self, name: str) -> None:
        del self.machines[name]
        self.hashes.pop(name, None)
        self.dead.add(name)
        self.preparing = {prepare: at for prepare, at in self.preparing.items() if at != name}
        self.encoding = {image: at for image, at in self.encoding.items() if at != name}
        self.queued = {write: at for write, at in self.queued.items() if at != name}
        self.lost_writes |= {write for write, at in self.writing.items() if at == name}
        self.writing = {write: at for write, at in self.writing.items() if at != name}

    def do_learn(self, name: str) -> None:
        self.dead.remove(name)
        self.do_suspect(name)

    def do_suspect(self, name: str) -> None:
        self.notify(NODE, "peer_down", name, "heartbeats stopped")

    def do_flap(self, name: str) -> None:
        """The receiver considers the encoder dead and reconnects; the encoder has noticed nothing."""
        self.do_suspect(name)
        self.notify(NODE, "peer_up", name)

    def do_cut(self, name: str) -> None:
        """The encoder considers the receiver dead and reconnects; the receiver has noticed nothing."""
        self.notify(name, "peer_down", NODE)
        self.notify(name, "peer_up", NODE, self.case.pool)

    def do_abort(self, request_id: str) -> None:
        self.notify(NODE, "abort", request_id, "the client has disconnected")

    def do_time(self, _: None) -> None:
        self.now = min(self.timers())
        release_at = {key: attempt.release_at for key, attempt in self.receiver.abandoned.items()}
        self.expired |= {key for key, until in release_at.items() if until <= self.now}
        for name in self.machines:
            self.notify(name, "tick")

    do_wait = do_time

    # events and actions

    def notify(self, name: str, event: str, *args: Any, then: Callable[[Any, Any], None] | None = None) -> None:
        """Delivers an event to one machine, and performs the actions that it returns."""
        before = self.machines[name]
        machine = self.machines[name] = cloned(before)
        self.hashes.pop(name, None)
        actions = getattr(machine, event)(*args, self.now)
        if then:
            then(machine, before)
        old, new = (m.requests if name == NODE else m.outgoing for m in (before, machine))
        for key in old.keys() & new.keys():
            if new[key].state < old[key].state:
                raise Violation(f"{key} went back to {new[key].state.name}")
        for action in actions:
            self.perform(name, action)

    def perform(self, name: str, action: Action) -> None:
        match action:
            case Send(peer, message):
                # raises if a field is out of bounds
                msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=type(message))
                self.mail[name, peer, message] += 1
            case PromptKnown(request_id):
                if request_id in self.wanted:
                    raise Violation(f"{request_id} has a second prompt")
                self.admissions[request_id] = 0
                self.do_admit(request_id)
            case CopyOut():
                self.copying.add(action)
                if not self.case.slow_copies:
                    self.do_copy(action)
            case EncodeLocally(request_id):
                self.end(request_id, "encode locally")
            case Ended(request_id, state, status):
                if state == State.SUCCESS:
                    arrived = {index[1]: what for index, what in self.arrived.items() if index[0] == request_id}
                    if not self.wanted[request_id] <= arrived.keys():
                        raise Violation(f"{request_id} ended with only blocks {sorted(arrived)}")
                    if len({content[:5] for content in arrived.values()}) > 1:
                        raise Violation(f"{request_id} has blocks of two prompts")
                self.end(request_id, f"{state.name} {status}")
            case Prepare():
                self.preparing[action] = name
                if not self.case.slow_preparation:
                    self.do_prepare(action)
            case EncodeBlocks(key, blocks):
                self.encoding = {image: at for image, at in self.encoding.items() if (image[0], at) != (key, name)}
                images = dict.fromkeys(((key, block) for block in from_ranges(blocks, 99)), name)
                self.encoding |= images
                if images and not self.case.slow_encoding:
                    self.encoding = {image: at for image, at in self.encoding.items() if image not in images}
                    self.notify(name, "encoded", key, [block for _, block in images])
            case StartWrite(key, round, blocks):
                for block in blocks:
                    self.queue(Write(key, round, *block), name)
            case Forget(key):
                if any(write.key == key and at == name for write, at in self.writing.items()):
                    raise Violation(f"{key} forgotten while it is being written")
                self.preparing = {p: at for p, at in self.preparing.items() if (p.key, at) != (key, name)}
                self.encoding = {image: at for image, at in self.encoding.items() if (image[0], at) != (key, name)}

    def queue(self, write: Write, name: str) -> None:
        index = (write.key.request_id, write.token_block)
        if index[1] < self.case.cached[min(1, len(self.case.cached) - 1)]:
            raise Violation(f"{write}: written although the engine had it when it admitted the request")
        self.started[index] += 1
        if write in self.queued or write in self.writing or (self.harmless and self.started[index] > 1):
            raise Violation(f"{write}: written twice although no write was lost")
        self.queued[write] = name
        if not self.case.slow_starts:
            self.do_start(write)

    def discard_useless(self) -> None:
        """Delivers messages that have no effect, now or later: those of finished attempts, outdated ones, and those to
        dead encoders.

        This reduces the number of states. The method checks that they really have no effect.
        """
        for letter in list(self.mail):
            source, target, message = letter
            key = (message.request_id, message.attempt)
            machine = self.machines.get(target)
            if target == NODE:
                request = self.receiver.requests.get(message.request_id)
                current = request and (request.attempt, request.peer) == (message.attempt, source)
                useless = not current and key not in self.receiver.abandoned
                if current and isinstance(message, Encoded) and request.prepared:
                    useless = from_ranges(message.blocks, 99) <= request.encoded
            else:
                finished = machine and machine.finished.get(AttemptKey(NODE, *key))
                useless = not machine or (finished and not finished.error and not isinstance(message, Abort))
                outgoing = machine and machine.outgoing.get(AttemptKey(NODE, *key))
                if outgoing and not outgoing.error and isinstance(message, Want):
                    useless = message.version < outgoing.version
            if useless:
                del self.mail[letter]
                if machine and machine.receive(source, message, self.now):
                    raise Violation(f"{message} of a finished attempt had an effect")
        if not self.harmless:
            self.started.clear()

    def prompt(self, request_id: str, name: str) -> bytes:
        return f"{request_id}{name if self.case.own_prompts else ''}".encode()

    def content(self, write: Write, name: str) -> bytes:
        return self.prompt(write.key.request_id, name).ljust(5) + f"b{write.token_block:<2}".encode()

    def land(self, write: Write, content: bytes) -> None:
        """A write reaches the pool: in its own block or, only after its quarantine has timed out, in another's."""
        request_id, attempt = write.key.request_id, write.key.attempt
        request = self.receiver.requests.get(request_id)
        own = request and request.attempt == attempt and request.granted.get(write.token_block) == write.pool_block
        abandoned = self.receiver.abandoned.get((request_id, attempt))
        quarantined = abandoned and write.pool_block in abandoned.blocks
        if not (own or quarantined or (request_id, attempt) in self.expired):
            raise Violation(f"{write} landed in a block that was free or not its own")
        self.pool[write.pool_block] = content

    def end(self, request_id: str, how: str) -> None:
        if request_id in self.ended:
            raise Violation(f"{request_id} ended twice: {self.ended[request_id]} and {how}")
        self.ended[request_id] = how
        self.admissions.pop(request_id, None)

    def check(self) -> None:
        """Checks the invariants of every state."""
        receiver, pool = self.receiver, self.receiver.pool
        held = [block for request in receiver.requests.values() for block in request.granted.values()]
        quarantined = [block for attempt in receiver.abandoned.values() for block in attempt.blocks]
        if sorted(held + quarantined + pool.free_blocks) != list(range(self.case.pool)):
            raise Violation(f"blocks: granted {held}, in quarantine {quarantined}, free {pool.free_blocks}")
        if (pool.num_used, pool.num_quarantined) != (len(held), len(quarantined)):
            raise Violation("the allocator and the receiver disagree about the number of blocks")
        for request_id, request in receiver.requests.items():
            if len(request.granted) > self.case.share or request.deadline < self.now:
                raise Violation(f"{request_id} holds more than its share, or exists after its deadline")

    def check_end(self) -> None:
        """Checks the invariants of a final state."""
        if len(self.ended) != len(self.case.blocks):
            raise Violation(f"deadlock: {self.ended} ended, and no step is possible")
        if self.receiver.pool.num_free != self.case.pool or self.receiver.requests or self.receiver.abandoned:
            raise Violation("blocks or requests are left over")
        if any(name != NODE and machine.outgoing for name, machine in self.machines.items()):
            raise Violation("an encoder has not forgotten an attempt")
        if self.harmless and set(self.ended.values()) != {"SUCCESS 200"}:
            raise Violation(f"requests failed despite a lossy network only: {self.ended}")


@dataclass
class Explored:
    """The result of a search."""

    states: int
    steps: int
    ends: Counter[str]


def explore(case: Case, max_states: int = 10**9) -> Explored:
    """Visits every state that the case can reach, each once.

    No state leads back to itself, and in every final state all requests have ended. Every run therefore ends, and none
    is stuck.

    Raises:
        Violation: an invariant does not hold; the message lists the steps that lead there.
        RuntimeError: there are more than `max_states` states.
    """
    start = World(case)
    done = {start.key(): False}  # whether all states after a state have been visited
    path = [(start.key(), start, start.steps(), ("start", case))]
    ends: Counter[str] = Counter()
    steps = 0
    while path:
        key, world, rest, _ = path[-1]
        step = next(rest, None)
        if step is None:
            done[key] = True
            path.pop()
            continue
        steps += 1
        after = world.copy()
        try:
            after.take(step)
            reached = after.key()
            if not done.get(reached, True):
                raise Violation("a cycle: the run may never end")
            if reached not in done and not after.busy() and not after.timers():
                after.check_end()
                ends[", ".join(after.ended[request_id] for request_id in sorted(after.ended))] += 1
        except Violation as violation:
            trace = [*(entry[-1] for entry in path), step]
            raise Violation("\n".join([str(violation), *(f"  {kind} {what}" for kind, what in trace)])) from None
        if reached not in done:
            done[reached] = False
            path.append((reached, after, after.steps(), step))
            if len(done) > max_states:
                raise RuntimeError(f"more than {max_states} states")
    return Explored(len(done), steps, ends)


_LEAVES = (int, str, bytes, float, bool, tuple, type(None), State)
_CONSTANT = ("settings",)
_IGNORED = ("settings", "ignored")  # attributes that don't affect later steps
_ORDERED = ("requests", "peers")  # attributes whose order affects later steps


def cloned(value: Any) -> Any:
    """A copy of a machine that shares its immutable parts."""
    kind = type(value)
    if kind in _LEAVES:
        return value
    if kind is dict:
        return {key: cloned(item) for key, item in value.items()} if value else {}
    if kind in (list, set, Counter):
        return value.copy()
    if _unchanging(value):
        return value
    copy = object.__new__(kind)
    for name, item in value.__dict__.items():
        copy.__dict__[name] = item if name in _CONSTANT else cloned(item)
    return copy


def frozen(value: Any) -> Any:
    """A machine's state as a hashable value."""
    kind = type(value)
    if kind in _LEAVES:
        return value
    if kind is dict:
        return frozenset([(key, frozen(item)) for key, item in value.items()]) if value else ()
    if kind is set:
        return frozenset(value)
    if kind is list:
        return tuple(value)
    if _unchanging(value):
        return value
    return tuple([
        (tuple(item), frozen(item)) if name in _ORDERED else frozen(item)
        for name, item in value.__dict__.items()
        if name not in _IGNORED
    ])  # fmt: skip


def _unchanging(value: Any) -> bool:
    """Whether a value is a message or a frozen dataclass."""
    parameters = getattr(value, "__dataclass_params__", None)
    return isinstance(value, msgspec.Struct) or (parameters is not None and parameters.frozen)
