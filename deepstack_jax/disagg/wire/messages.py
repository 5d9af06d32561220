"""Control messages between nodes: msgspec structs as msgpack behind one byte that names the version.

Every field is bounded, so what has been decoded is of known size; what it means is checked by who receives it.
"""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from deepstack_jax.disagg.wire.layout import BufferLayout

PROTOCOL = 2  # of these messages, and of what a Submit's payload holds
MAX_PAYLOAD = 128 << 20  # bytes of one request's messages, images and videos
MAX_MESSAGE = MAX_PAYLOAD + (1 << 20)
MAX_TOKENS = 1 << 20  # of a prompt
MAX_BLOCKS = 1 << 20  # of a pool
MAX_LIST = 4096  # items of any list in a message
MAX_REASON = 500  # characters

NAME_PATTERN = r"\A[!-~]{1,64}\Z"  # of ids

Name = Annotated[str, Meta(pattern=NAME_PATTERN)]  # printable: it may stand in a log as it is
Text = Annotated[str, Meta(max_length=MAX_REASON)]
Counter = Annotated[int, Meta(ge=0, le=2**53)]
Tokens = Annotated[int, Meta(ge=1, le=MAX_TOKENS)]
TokenBlock = Annotated[int, Meta(ge=0, lt=MAX_TOKENS)]
PoolBlock = Annotated[int, Meta(ge=0, lt=MAX_BLOCKS)]
Milliseconds = Annotated[int, Meta(ge=0, le=24 * 3600 * 1000)]
Status = Annotated[int, Meta(ge=400, le=599)]
Digest = Annotated[bytes, Meta(min_length=8, max_length=64)]
Sizes = Annotated[tuple[Annotated[int, Meta(ge=1, le=2**62)], ...], Meta(max_length=5)]


class Message(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Any control message; the name of its class is its tag."""


class Hello(Message, frozen=True, forbid_unknown_fields=False):
    """First message of either side. The encode side has no pool: its sizes are empty."""

    role: Literal["encode", "language"]
    node_id: Name
    incarnation: Name  # drawn anew at every start of the node
    model: Annotated[str, Meta(min_length=1, max_length=200)]  # identity of weights and tokenizer
    dtype: Literal["float32", "bfloat16", "float16"]
    hidden_size: Annotated[int, Meta(ge=1, le=1 << 20)]
    num_deepstack_embeddings: Annotated[int, Meta(ge=0, le=64)]
    block_size: Annotated[int, Meta(ge=1, le=1 << 20)]
    session: Annotated[str, Meta(max_length=300)] = ""  # where Mooncake reaches the pool
    ptrs: Sizes = ()
    total_lens: Sizes = ()
    item_lens: Sizes = ()
    http_url: Annotated[str, Meta(max_length=300)] = ""  # of a language node: where it takes requests
    protocol: Annotated[int, Meta(ge=0, le=255)] = PROTOCOL

    @property
    def layout(self) -> BufferLayout:
        """The language node's pool. `refusal` says whether its sizes make sense."""
        return BufferLayout(self.block_size, self.ptrs, self.total_lens, self.item_lens)


class Welcome(Message, frozen=True):
    """Answers a Hello that fits with one's own."""

    hello: Hello


class Refused(Message, frozen=True, forbid_unknown_fields=False):
    """Answers a Hello that doesn't fit."""

    reason: Text


class Heartbeat(Message, frozen=True):
    """Asks whether the node and its worker live."""

    sequence: Counter


class HeartbeatReply(Message, frozen=True):
    """Answers a Heartbeat."""

    sequence: Counter
    incarnation: Name
    work_age_ms: Milliseconds  # how long the worker has been busy with one piece of work, 0 when idle


class Goodbye(Message, frozen=True):
    """The node leaves."""

    reason: Text = ""


class Submit(Message, frozen=True):
    """language -> encode: prepare and encode this request. Repeated without `payload` once it has been accepted.

    `have` are ranges of token blocks that need not come.
    """

    request_id: Name
    attempt: Counter
    budget_ms: Milliseconds  # until the language node gives up
    payload: Annotated[bytes, Meta(max_length=MAX_PAYLOAD)] | None = None
    have: Annotated[tuple[tuple[TokenBlock, Tokens], ...], Meta(max_length=MAX_LIST)] = ()  # [start, stop)
    fingerprint: Digest | None = None  # of the prompt that `have` belongs to


class Accepted(Message, frozen=True):
    """encode -> language: the Submit has arrived; Prepared follows."""

    request_id: Name
    attempt: Counter


class Prepared(Message, frozen=True):
    """encode -> language: the prompt's size. Equal fingerprints are the same prompt."""

    request_id: Name
    attempt: Counter
    total_tokens: Tokens
    visual_rows: Annotated[int, Meta(ge=0, le=MAX_TOKENS)]
    rope_delta: Annotated[int, Meta(ge=-(2**31), lt=2**31)]
    fingerprint: Digest
    prepare_us: Counter = 0  # microseconds that it took, for the timings of the answer
    encode_us: Counter = 0


class Grant(Message, frozen=True):
    """language -> encode: write these token blocks to these pool blocks."""

    request_id: Name
    attempt: Counter
    round: Counter
    blocks: Annotated[tuple[tuple[TokenBlock, PoolBlock], ...], Meta(min_length=1, max_length=MAX_LIST)]


class WrittenBlock(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One token block as the sender wrote it."""

    token_block: TokenBlock
    checksum: Annotated[bytes, Meta(min_length=8, max_length=8)]
    num_bytes: Annotated[int, Meta(ge=1, le=2**40)]


class Written(Message, frozen=True):
    """encode -> language: these blocks of the round are in the pool."""

    request_id: Name
    attempt: Counter
    round: Counter
    blocks: Annotated[tuple[WrittenBlock, ...], Meta(min_length=1, max_length=MAX_LIST)]


class Release(Message, frozen=True):
    """language -> encode: everything has arrived."""

    request_id: Name
    attempt: Counter


class Abort(Message, frozen=True):
    """language -> encode: stop the attempt."""

    request_id: Name
    attempt: Counter
    reason: Text = ""


class Aborted(Message, frozen=True):
    """encode -> language: nothing of the attempt is being written or will be."""

    request_id: Name
    attempt: Counter


class Error(Message, frozen=True):
    """encode -> language: the attempt has failed.

    4xx: so it would anywhere. 5xx: another encoder may do better; 500 is of this request, others of the node's state.
    """

    request_id: Name
    attempt: Counter
    status: Status
    reason: Text


MESSAGES = (Hello, Welcome, Refused, Heartbeat, HeartbeatReply, Goodbye, Submit, Accepted, Prepared, Grant, Written,
            Release, Abort, Aborted, Error)  # fmt: skip

_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(Hello | Welcome | Refused | Heartbeat | HeartbeatReply | Goodbye | Submit | Accepted
                                   | Prepared | Grant | Written | Release | Abort | Aborted | Error)  # fmt: skip
_OLD_DECODER = msgspec.msgpack.Decoder(Hello | Refused)


def encode(message: Message) -> bytes:
    """The version's byte and the message as msgpack."""
    return bytes((PROTOCOL,)) + _ENCODER.encode(message)


def decode(data: bytes) -> tuple[Message | None, str]:
    """(message, "") or (None, why not). Raises nothing, whatever the bytes.

    Of other versions Hello and Refused alone are read, so that nodes of different versions can part with a reason.
    """
    if not 2 <= len(data) <= MAX_MESSAGE:
        return None, f"a message of {len(data)} bytes: expected 2 to {MAX_MESSAGE}"
    decoder = _DECODER if data[0] == PROTOCOL else _OLD_DECODER
    try:
        return decoder.decode(memoryview(data)[1:]), ""
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, OverflowError) as error:
        version = "" if data[0] == PROTOCOL else f"protocol {data[0]}, this node speaks {PROTOCOL}: "
        return None, f"{version}{str(error)[:MAX_REASON]}"


def refusal(language: Hello, encode: Hello) -> str | None:
    """Why a language node and an encode node can't work together, in one line; None if they can."""
    for hello, role in ((language, "language"), (encode, "encode")):
        if hello.role != role:
            return f"node {hello.node_id} is of role {hello.role}: expected role {role}"
    for name, remedy in (
        ("protocol", "install the same release on both"),
        ("model", "load the same checkpoint on both"),
        ("dtype", "load both with the same dtype"),
        ("hidden_size", "load the same checkpoint on both"),
        ("num_deepstack_embeddings", "load the same checkpoint on both"),
        ("block_size", "start both with the same block size"),
    ):
        ours, theirs = getattr(language, name), getattr(encode, name)
        if ours != theirs:
            return f"{name} is {ours!r} on the language node and {theirs!r} on the encode node: {remedy}"
    return _broken_pool(language)


def _broken_pool(hello: Hello) -> str | None:
    itemsize = 4 if hello.dtype == "float32" else 2
    row = hello.block_size * hello.hidden_size * itemsize
    expected = (row, hello.block_size * 4, hello.block_size * 12, 64, row * hello.num_deepstack_embeddings)
    expected = expected[: 5 if hello.num_deepstack_embeddings else 4]
    if hello.item_lens != expected:
        return f"rows of {list(hello.item_lens)} bytes do not fit the model: expected {list(expected)}"
    if not len(hello.ptrs) == len(hello.total_lens) == len(expected) or not hello.session:
        return f"the pool needs a session and {len(expected)} addresses and sizes"
    counts = {divmod(total, item) for total, item in zip(hello.total_lens, expected, strict=True)}
    if len(counts) != 1 or next(iter(counts))[1] or not 1 <= next(iter(counts))[0] <= MAX_BLOCKS:
        return f"buffers of {list(hello.total_lens)} bytes do not hold one number of rows of {list(expected)} bytes"
    return None
