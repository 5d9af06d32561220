"""Control messages: which are read or refused, and 200,000 bad ones against the decoder and both state machines."""

import random
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepstack_jax.disagg.encode.sender import Sender, SenderSettings
from deepstack_jax.disagg.language.pending import ReceiverSettings
from deepstack_jax.disagg.language.receiver import Receiver
from deepstack_jax.disagg.wire.buffers import MultimodalDataBuffers
from deepstack_jax.disagg.wire.messages import (
    MAX_MESSAGE,
    MESSAGES,
    PROTOCOL,
    Abort,
    Aborted,
    Accepted,
    Encoded,
    Error,
    Goodbye,
    Grant,
    Heartbeat,
    HeartbeatReply,
    Hello,
    ImageRows,
    Message,
    NodeLoad,
    Prepared,
    Refused,
    Release,
    Submit,
    Want,
    Welcome,
    Written,
    WrittenBlock,
    pack_message,
    refusal,
    unpack_message,
)
from deepstack_jax.disagg.wire.transfer import (
    CopyOut,
    EncodeBlocks,
    EncodeLocally,
    Ended,
    Prepare,
    PromptKnown,
    Send,
    StartWrite,
    from_ranges,
)

NUM_FUZZED = 200_000
FINGERPRINT, CHECKSUM = b"a prompt", b"checksum"


def hello(**changed: Any) -> Hello:
    """The Hello of a language node."""
    pool = MultimodalDataBuffers(3, 16, 8, num_deepstack_embeddings=2)
    ptrs, total_lens, item_lens = map(tuple, pool.get_buf_infos())
    fields = {
        "role": "language",
        "node_id": "n1",
        "incarnation": "i1",
        "model": "Qwen/Qwen3-VL-30B-A3B-Instruct@1",
        "dtype": "bfloat16",
        "hidden_size": 8,
        "num_deepstack_embeddings": 2,
        "block_size": 16,
        "session": "[::1]:12345",
        "ptrs": ptrs,
        "total_lens": total_lens,
        "item_lens": item_lens,
    }
    return Hello(**(fields | changed))


def encoder_hello(**changed: Any) -> Hello:
    return hello(**({"role": "encode", "session": "", "ptrs": (), "total_lens": (), "item_lens": ()} | changed))


EXAMPLES: list[Message] = [
    hello(),
    Welcome(encoder_hello()),
    Refused("dtype is another"),
    Heartbeat(7),
    HeartbeatReply(7, "i1", 250),
    HeartbeatReply(7, "i1", 250, 3, NodeLoad(1, 2, 3, 4, 5, 6, 7, 8)),
    Goodbye("restarting"),
    Submit("r1", 2, 30_000, b"payload"),
    Accepted("r1", 2),
    Prepared("r1", 2, 3, 2, -37, FINGERPRINT, bytes(48), (ImageRows(0, 2, bytes(32)),), 1500),
    Want("r1", 2, 3, ((0, 2), (5, 6))),
    Encoded("r1", 2, ((0, 2),), 250_000),
    Grant("r1", 2, 3, ((0, 7), (1, 2))),
    Written("r1", 2, 3, (WrittenBlock(0, CHECKSUM, 123456),)),
    Release("r1", 2),
    Abort("r1", 2, "the client has gone"),
    Aborted("r1", 2),
    Error("r1", 2, 400, "no image"),
]


def frame(**fields: Any) -> bytes:
    return bytes((PROTOCOL,)) + msgspec.msgpack.encode(fields)


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_a_packed_message_is_unpacked_unchanged(message):
    assert unpack_message(pack_message(message)) == (message, "")


def test_there_is_an_example_of_every_message():
    assert {type(message) for message in EXAMPLES} == set(MESSAGES)


@pytest.mark.parametrize(
    "bad",
    [
        {"request_id": ""},
        {"request_id": "x" * 65},
        {"request_id": "r\n"},
        {"request_id": "r\x1b[2J"},
        {"attempt": -1},
        {"attempt": 2**63},
        {"attempt": 1.0},
        {"attempt": "1"},
        {"round": -1},
        {"blocks": []},
        {"blocks": [[0, 0]] * 4097},
        {"blocks": [[0]]},
        {"blocks": [[0, 1, 2]]},
        {"blocks": [[1 << 20, 0]]},
        {"blocks": [[0, 1 << 20]]},
        {"blocks": [[0, -1]]},
        {"blocks": {"0": 1}},
        {"more": 1},
        {"type": "Granted"},
        {"type": "Message"},
        {"type": 1},
    ],
    ids=str,
)
def test_a_field_out_of_bounds_is_refused(bad):
    good = {"type": "Grant", "request_id": "r", "attempt": 1, "round": 1, "blocks": [[0, 0]]}
    assert unpack_message(frame(**good)) == (Grant("r", 1, 1, ((0, 0),)), "")
    message, why = unpack_message(frame(**(good | bad)))
    assert message is None
    assert why
    assert "\n" not in why


@pytest.mark.parametrize("field", ["type", "request_id", "attempt", "round", "blocks"])
def test_a_missing_field_is_refused(field):
    good = {"type": "Grant", "request_id": "r", "attempt": 1, "round": 1, "blocks": [[0, 0]]}
    del good[field]
    assert unpack_message(frame(**good))[0] is None


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "a message of 0 bytes"),
        (bytes((PROTOCOL,)), "a message of 1 bytes"),
        (bytes(MAX_MESSAGE + 1), f"expected 2 to {MAX_MESSAGE}"),
        (bytes((PROTOCOL, 0xDD, 255, 255, 255, 255)), "got `array`"),
        (bytes((PROTOCOL,)) + b"\x81\xa4type\xdb\xff\xff\xff\xff", "truncated"),
        (bytes((PROTOCOL,)) + b"\x91" * 100_000, "got `array`"),
        (pack_message(Aborted("r", 1)) + b"\x00", "trailing"),
    ],
    ids=["empty", "only the version", "too long", "huge array", "huge string", "deep", "two messages"],
)
def test_bytes_that_are_not_a_message_are_refused(data, why):
    message, reason = unpack_message(data)
    assert message is None
    assert why in reason


def test_huge_list_lengths_cost_no_memory():
    """A length prefix of 2**32 - 1 items after a valid start."""
    start = bytes((PROTOCOL,)) + b"\x82\xa4type\xa5Grant\xa6blocks\xdd\xff\xff\xff\xff"
    assert unpack_message(start)[0] is None
    assert unpack_message(start + b"\x92\x00\x00" * 1000)[0] is None


def test_nodes_of_different_versions_report_the_mismatch():
    other = bytes((PROTOCOL + 1,))
    newer = hello(protocol=PROTOCOL + 1)
    data = other + msgspec.msgpack.encode(msgspec.to_builtins(newer, builtin_types=(bytes,)) | {"a_new_field": 1})
    assert unpack_message(data) == (newer, "")
    assert refusal(newer, encoder_hello()) == (
        f"protocol is {PROTOCOL + 1} on the language node and {PROTOCOL} on the encode node: "
        "install the same release on both"
    )
    message, why = unpack_message(other + pack_message(Release("r", 1))[1:])
    assert message is None
    assert why.startswith(f"protocol {PROTOCOL + 1}, this node speaks {PROTOCOL}")


class TestRefusal:
    def test_compatible_nodes_are_not_refused(self):
        assert refusal(hello(), encoder_hello()) is None
        assert hello().layout.num_blocks == 3

    @pytest.mark.parametrize(
        ("changed", "reason"),
        [
            ({"model": "other"}, "model is 'Qwen/Qwen3-VL-30B-A3B-Instruct@1' on the language node and 'other'"),
            ({"dtype": "float32"}, "dtype is 'bfloat16' on the language node and 'float32' on the encode node"),
            ({"hidden_size": 9}, "hidden_size is 8"),
            ({"num_deepstack_embeddings": 3}, "num_deepstack_embeddings is 2"),
            ({"block_size": 32}, "block_size is 16 on the language node and 32 on the encode node: start both"),
            ({"role": "language"}, "node n1 has role language: expected role encode"),
        ],
    )
    def test_a_difference_is_named(self, changed, reason):
        why = refusal(hello(), encoder_hello(**changed))
        assert why is not None
        assert reason in why

    @pytest.mark.parametrize(
        ("changed", "reason"),
        [
            ({"item_lens": (256, 64, 192, 64, 500)}, "rows of [256, 64, 192, 64, 500] bytes do not fit the model"),
            ({"ptrs": (1, 2, 3, 4)}, "5 addresses"),
            ({"session": ""}, "needs a session"),
            ({"total_lens": (768, 192, 576, 192, 1024)}, "do not hold equal numbers of rows"),
            ({"total_lens": (768, 192, 576, 192, 1537)}, "do not hold equal numbers of rows"),
        ],
    )
    def test_a_pool_with_inconsistent_sizes_is_refused(self, changed, reason):
        why = refusal(hello(**changed), encoder_hello())
        assert why is not None
        assert reason in why


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data):
    message, why = unpack_message(data)
    assert (message is None) == bool(why)


def any_message(rng: random.Random, live: list[tuple[str, int, int]]) -> Message:
    """A message within bounds, often about an attempt that is `live`: (request_id, attempt, round)."""
    name, attempt, round = rng.choice([*live, (f"r{rng.randrange(4)}", rng.randrange(20), rng.randrange(6))])
    round = max(0, round + rng.choice((0, 0, 0, -1, 1)))
    checksum = rng.choice((CHECKSUM, b"wrong..."))
    pairs = tuple((rng.randrange(5), rng.randrange(9)) for _ in range(rng.randint(1, 3)))
    reports = tuple(WrittenBlock(block, checksum, rng.choice((8, 9))) for block, _ in pairs)
    ranges = tuple((start, rng.choice((start + 1, 1, 1 << 20))) for start, _ in pairs)
    return rng.choice(
        (
            *EXAMPLES,
            Submit(name, attempt, rng.choice((0, 5, 3000)), rng.choice((None, b"x"))),
            Accepted(name, attempt),
            Prepared(name, attempt, rng.choice((1, 5, 9, 1 << 20)), 1, 0, rng.choice((FINGERPRINT, b"another prompt"))),
            Want(name, attempt, round, ranges),
            Encoded(name, attempt, ranges),
            Grant(name, attempt, round, pairs),
            Written(name, attempt, round, reports),
            Release(name, attempt),
            Abort(name, attempt),
            Aborted(name, attempt),
            Error(name, attempt, rng.choice((400, 503, 599)), "reason"),
        )
    )


def any_value(rng: random.Random, depth: int = 0) -> Any:
    """Any msgpack value, often an extreme one."""
    kind = rng.randrange(9 if depth < 3 else 7)
    if kind == 7:
        return [any_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 8:
        return {rng.choice(("type", "blocks", "x", 5)): any_value(rng, depth + 1) for _ in range(rng.randrange(4))}
    return (
        rng.choice((0, 1, -1, 2**31, 2**53, 2**63 - 1, -(2**63), 2**64 - 1)),
        rng.random() * 10 ** rng.randrange(-9, 300),
        rng.choice((float("nan"), float("inf"), None)),
        rng.random() < 0.5,
        rng.randbytes(rng.randrange(70)),
        "".join(map(chr, rng.choices(range(1, 0xD000), k=rng.randrange(70)))),
        f"r{rng.randrange(4)}",
    )[kind]


def bad_frame(rng: random.Random, live: list[tuple[str, int, int]]) -> bytes:
    """Bytes that a faulty peer might send: noise, changed messages, wrong fields, valid messages at wrong times."""
    kind = rng.randrange(10)
    if kind == 0:
        return rng.choice((b"", bytes((PROTOCOL,)))) + rng.randbytes(rng.randrange(60))
    message = any_message(rng, live)
    if kind <= 5:
        return pack_message(message)
    if kind <= 7:
        fields = msgspec.to_builtins(message)
        for name in rng.sample(sorted(fields), k=min(len(fields), rng.randint(1, 2))):
            fields[name] = any_value(rng)
        return bytes((PROTOCOL,)) + msgspec.msgpack.encode(fields)
    data = bytearray(pack_message(message))
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(data))
        match rng.randrange(5):
            case 0:
                data[place] ^= 1 << rng.randrange(8)
            case 1:
                data[place] = rng.randrange(256)
            case 2:
                data[place:place] = rng.randbytes(rng.randint(1, 4))
            case 3 if len(data) > 2:
                del data[place]
            case 4 if place:
                del data[place:]
    return bytes(data)


class Nodes:
    """A language node and two encoders in one thread, which process requests while bad messages arrive."""

    def __init__(self, rng: random.Random):
        self.rng, self.now, self.submitted = rng, 0.0, 0
        limits = ReceiverSettings(8, 2, share=3, max_tokens=100, retry_interval=1, transfer_timeout=5, max_damaged=1)
        self.receiver = Receiver(limits)
        self.senders = {name: Sender(SenderSettings(block_size=2, max_requests=8)) for name in "ab"}
        self.actions: list[tuple[str, Any]] = []
        self.ended: list[Ended] = []
        for name, sender in self.senders.items():
            sender.peer_up("node", 8, 0)
            self.receiver.peer_up(name, 0)

    def deliver(self, target: str, source: str, message: Message) -> None:
        machine = self.receiver if target == "node" else self.senders[target]
        self.perform(target, machine.receive(source, message, self.now))

    def perform(self, name: str, actions: list) -> None:
        for action in actions:
            assert not isinstance(action, EncodeLocally)
            if isinstance(action, Ended):
                self.ended.append(action)
            elif isinstance(action, Send | CopyOut | StartWrite | Prepare | EncodeBlocks | PromptKnown):
                self.actions.append((name, action))
        pool = self.receiver.pool
        assert pool.num_free + pool.num_used + pool.num_quarantined == 8

    def step(self) -> None:
        """One valid event: a new request, passing time, or a pending action."""
        rng, now = self.rng, self.now
        if rng.random() < 0.05 and (name := f"r{rng.randrange(4)}") not in self.receiver.requests:
            self.submitted += 1
            self.perform("node", self.receiver.submit(name, b"payload", now + 20, now))
        if rng.random() < 0.05 or not self.actions:
            self.now = now = now + 0.5
            for name, machine in (("node", self.receiver), *self.senders.items()):
                self.perform(name, machine.tick(now))
        if not self.actions:
            return
        name, action = self.actions.pop(rng.randrange(len(self.actions)))
        match action:
            case Send(peer, message):
                again, why = unpack_message(pack_message(message))
                assert again == message, why
                self.deliver(peer, name, message)
            case Prepare(key):
                prompt = Prepared(key.request_id, key.attempt, 9, 9, 0, FINGERPRINT)
                self.perform(name, self.senders[name].prepared(key, prompt, now))
            case PromptKnown(request_id, prompt):
                blocks = range(rng.choice((0, 0, 0, 2)), 5)
                self.perform("node", self.receiver.want(request_id, blocks, rng.random() < 0.8, now))
                if rng.random() < 0.9:  # otherwise the engine never has a place for it
                    self.perform("node", self.receiver.want(request_id, blocks[rng.randrange(2) :], True, now))
            case EncodeBlocks(key, blocks):
                for block in from_ranges(blocks, 99):
                    self.perform(name, self.senders[name].encoded(key, [block], now))
            case StartWrite(key, round, blocks):
                reports = [WrittenBlock(block, CHECKSUM, 8) for block, _ in blocks]
                done, lost = (reports[:1], [block for block, _ in blocks[1:]]) if rng.random() < 0.03 else (reports, [])
                self.perform(name, self.senders[name].written(key, round, done, now))
                self.perform(name, self.senders[name].write_failed(key, round, lost, "refused", now))
            case CopyOut(request_id, attempt, round, block):
                self.perform("node", self.receiver.copied(request_id, attempt, round, block, CHECKSUM, 8, now))


def test_200_000_bad_messages_violate_no_invariant():
    rng = random.Random(5)
    nodes = Nodes(rng)
    read = refused = 0
    for _ in range(NUM_FUZZED):
        live = [(name, request.attempt, request.round) for name, request in nodes.receiver.requests.items()]
        message, why = unpack_message(bad_frame(rng, live))
        assert (message is None) == bool(why)
        if message is None:
            refused += 1
        else:
            read += 1
            nodes.deliver("node", rng.choice(("a", "b", "unknown")), message)
            nodes.deliver(rng.choice("ab"), rng.choice(("node", "unknown")), message)
        if rng.random() < 0.5:
            nodes.step()
    assert read > NUM_FUZZED // 2
    assert refused > NUM_FUZZED // 5

    # once the bad messages stop, everything in progress ends
    while nodes.actions or nodes.receiver.next_timer() is not None or any(s.outgoing for s in nodes.senders.values()):
        nodes.step()
        assert nodes.now < 1e6
    assert nodes.receiver.pool.num_free == 8
    assert len(nodes.ended) == nodes.submitted > 2000
    assert {200, 400, 502, 503, 504} <= {ended.status for ended in nodes.ended}
