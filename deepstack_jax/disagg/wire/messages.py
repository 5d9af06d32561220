"""Control messages between nodes: msgspec structs, encoded as msgpack after one byte for the protocol version.

Every field is bounded, so an unpacked message has a known maximum size. The receiver checks its meaning.
"""

import re
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from deepstack_jax.disagg.wire.layout import BufferLayout

PROTOCOL = 5  # version of these messages and of the payload of Submit
MAX_PAYLOAD = 128 << 20  # bytes per request, images and videos included
MAX_MESSAGE = MAX_PAYLOAD + (1 << 20)
MAX_TOKENS = 1 << 20  # per prompt
MAX_BLOCKS = 1 << 20  # per pool
MAX_LIST = 4096  # items per list in a message
MAX_REASON = 500  # characters
MAX_MILLISECONDS = 24 * 3600 * 1000

NAME_PATTERN = r"\A[!-~]{1,64}\Z"  # of ids

Name = Annotated[str, Meta(pattern=NAME_PATTERN)]  # printable, so that logs can show it unchanged
Text = Annotated[str, Meta(max_length=MAX_REASON)]
Counter = Annotated[int, Meta(ge=0, le=2**53)]
Tokens = Annotated[int, Meta(ge=1, le=MAX_TOKENS)]
TokenBlock = Annotated[int, Meta(ge=0, lt=MAX_TOKENS)]
PoolBlock = Annotated[int, Meta(ge=0, lt=MAX_BLOCKS)]
Milliseconds = Annotated[int, Meta(ge=0, le=MAX_MILLISECONDS)]
Status = Annotated[int, Meta(ge=400, le=599)]
Digest = Annotated[bytes, Meta(min_length=8, max_length=64)]
Sha256 = Annotated[bytes, Meta(min_length=32, max_length=32)]
Ranges = Annotated[tuple[tuple[TokenBlock, Tokens], ...], Meta(max_length=MAX_TOKENS // 2)]  # [start, stop), ascending
Sizes = Annotated[tuple[Annotated[int, Meta(ge=1, le=2**62)], ...], Meta(max_length=5)]


class Message(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Any control message; the name of its class is its tag."""


class Hello(Message, frozen=True, forbid_unknown_fields=False):
    """The first message of either side. The encode side has no receive pool, so its sizes are empty."""

    role: Literal["encode", "language"]
    node_id: Name
    incarnation: Name  # unique to this start of the node
    model: Annotated[str, Meta(min_length=1, max_length=200)]  # identifies weights and tokenizer
    dtype: Literal["float32", "bfloat16", "float16"]
    hidden_size: Annotated[int, Meta(ge=1, le=1 << 20)]
    num_deepstack_embeddings: Annotated[int, Meta(ge=0, le=64)]
    block_size: Annotated[int, Meta(ge=1, le=1 << 20)]
    session: Annotated[str, Meta(max_length=300)] = ""  # the name under which the transport reaches the receive pool
    ptrs: Sizes = ()
    total_lens: Sizes = ()
    item_lens: Sizes = ()
    http_url: Annotated[str, Meta(max_length=300)] = ""  # URL of a language node's HTTP server
    block_key: Annotated[bytes, Meta(max_length=32)] = b""  # of the language node, for the seals of its blocks
    encrypt_blocks: bool = False
    protocol: Annotated[int, Meta(ge=0, le=255)] = PROTOCOL

    @property
    def layout(self) -> BufferLayout:
        """The layout of the language node's receive pool. `refusal` checks its sizes."""
        return BufferLayout(self.block_size, self.ptrs, self.total_lens, self.item_lens)


class Welcome(Message, frozen=True):
    """Answers a compatible Hello with the node's own."""

    hello: Hello


class Refused(Message, frozen=True, forbid_unknown_fields=False):
    """Answers an incompatible Hello."""

    reason: Text


class Heartbeat(Message, frozen=True):
    """Asks whether the node and its worker are alive."""

    sequence: Counter


class NodeLoad(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What an encode node has to do and has done since its start."""

    attempts: Counter  # that are being prepared, encoded or sent
    queue: Counter  # images and videos in line for the encoder
    requests: Counter
    failures: Counter  # of requests, by this node's fault
    cache_entries: Counter  # images and videos in the row cache
    cache_bytes: Counter
    cache_hits: Counter
    cache_queries: Counter


class HeartbeatReply(Message, frozen=True):
    """Answers a Heartbeat."""

    sequence: Counter
    incarnation: Name
    work_age_ms: Milliseconds  # how long the worker has run its current program, 0 when idle
    preparing_ms: Milliseconds = 0  # how long the oldest request that is being prepared has been, 0 when none is
    load: NodeLoad | None = None


class Goodbye(Message, frozen=True):
    """The node disconnects."""

    reason: Text = ""


class Submit(Message, frozen=True):
    """language -> encode: prepare this request. It is repeated without `payload` once it was accepted."""

    request_id: Name
    attempt: Counter
    budget_ms: Milliseconds  # time until the language node abandons the request
    payload: Annotated[bytes, Meta(max_length=MAX_PAYLOAD)] | None = None


class Accepted(Message, frozen=True):
    """encode -> language: the Submit has arrived, and Prepared follows."""

    request_id: Name
    attempt: Counter


class ImageRows(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One image or video of a prompt. Visual rows are numbered in the order of their tokens."""

    first_row: Annotated[int, Meta(ge=0, lt=MAX_TOKENS)]
    rows: Tokens
    digest: Sha256  # of the patches as the encoder takes them, and of their grid


class Prepared(Message, frozen=True):
    """encode -> language: the prompt, whose images are not encoded yet. Equal fingerprints mean equal prompts."""

    request_id: Name
    attempt: Counter
    total_tokens: Tokens
    visual_rows: Annotated[int, Meta(ge=0, le=MAX_TOKENS)]
    rope_delta: Annotated[int, Meta(ge=-(2**31), lt=2**31)]
    fingerprint: Digest
    prompt: Annotated[bytes, Meta(max_length=16 * MAX_TOKENS)] = b""  # `pack_prompt` of ids and positions
    images: Annotated[tuple[ImageRows, ...], Meta(max_length=MAX_TOKENS)] = ()  # in the order of their tokens
    prepare_us: Counter = 0  # a duration in microseconds, which the answer reports


class Want(Message, frozen=True):
    """language -> encode: encode the images that have rows in these token blocks, and no others.

    It is repeated until all of them are encoded. The one with the highest version counts.
    """

    request_id: Name
    attempt: Counter
    version: Counter
    blocks: Ranges


class Encoded(Message, frozen=True):
    """encode -> language: all rows of these token blocks are encoded. Each message has all such blocks."""

    request_id: Name
    attempt: Counter
    blocks: Ranges
    encode_us: Counter = 0  # microseconds that the request's images have taken so far


class Grant(Message, frozen=True):
    """language -> encode: write these token blocks to these pool blocks."""

    request_id: Name
    attempt: Counter
    round: Counter
    blocks: Annotated[tuple[tuple[TokenBlock, PoolBlock], ...], Meta(min_length=1, max_length=MAX_LIST)]


class WrittenBlock(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One token block, as the sender wrote it. `checksum` is its seal (see `seals`)."""

    token_block: TokenBlock
    checksum: Annotated[bytes, Meta(min_length=8, max_length=64)]
    num_bytes: Annotated[int, Meta(ge=1, le=2**40)]


class Written(Message, frozen=True):
    """encode -> language: these blocks of the round are in the receive pool."""

    request_id: Name
    attempt: Counter
    round: Counter
    blocks: Annotated[tuple[WrittenBlock, ...], Meta(min_length=1, max_length=MAX_LIST)]


class Release(Message, frozen=True):
    """language -> encode: all blocks have arrived."""

    request_id: Name
    attempt: Counter


class Abort(Message, frozen=True):
    """language -> encode: stop the attempt."""

    request_id: Name
    attempt: Counter
    reason: Text = ""


class Aborted(Message, frozen=True):
    """encode -> language: no block of the attempt is being written or will be."""

    request_id: Name
    attempt: Counter


class Error(Message, frozen=True):
    """encode -> language: the attempt has failed.

    4xx: it would fail on any encoder. 5xx: another encoder may succeed. 500 is a failure of this request, other 5xx are
    caused by the state of the node.
    """

    request_id: Name
    attempt: Counter
    status: Status
    reason: Text


MESSAGES = (Hello, Welcome, Refused, Heartbeat, HeartbeatReply, Goodbye, Submit, Accepted, Prepared, Want, Encoded,
            Grant, Written, Release, Abort, Aborted, Error)  # fmt: skip

_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(Hello | Welcome | Refused | Heartbeat | HeartbeatReply | Goodbye | Submit | Accepted
                                   | Prepared | Want | Encoded | Grant | Written | Release | Abort | Aborted
                                   | Error)  # fmt: skip
_VERSION_DECODER = msgspec.msgpack.Decoder(Hello | Refused)


def pack_message(message: Message) -> bytes:
    """Returns the version byte followed by the message as msgpack."""
    return bytes((PROTOCOL,)) + _ENCODER.encode(message)


def unpack_message(data: bytes) -> tuple[Message | None, str]:
    """Returns (message, "") or (None, the reason why it can't be read). It raises for no input.

    Of other versions only Hello and Refused are read, so that nodes of different versions can report the mismatch.
    """
    if not 2 <= len(data) <= MAX_MESSAGE:
        return None, f"a message of {len(data)} bytes: expected 2 to {MAX_MESSAGE}"
    decoder = _DECODER if data[0] == PROTOCOL else _VERSION_DECODER
    try:
        return decoder.decode(memoryview(data)[1:]), ""
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, OverflowError) as error:
        version = "" if data[0] == PROTOCOL else f"protocol {data[0]}, this node speaks {PROTOCOL}: "
        return None, f"{version}{str(error)[:MAX_REASON]}"


def refusal(language: Hello, encode: Hello) -> str | None:
    """Explains in one line why a language node and an encode node are incompatible; None if they are compatible."""
    for hello, role in ((language, "language"), (encode, "encode")):
        if hello.role != role:
            return f"node {hello.node_id} has role {hello.role}: expected role {role}"
    for name, remedy in (
        ("protocol", "install the same release on both"),
        ("model", "load the same checkpoint on both"),
        ("dtype", "load both with the same dtype"),
        ("hidden_size", "load the same checkpoint on both"),
        ("num_deepstack_embeddings", "load the same checkpoint on both"),
        ("block_size", "start both with the same block size"),
        ("encrypt_blocks", "start both with --encrypt-blocks, or neither"),
    ):
        ours, theirs = getattr(language, name), getattr(encode, name)
        if ours != theirs:
            return f"{name} is {ours!r} on the language node and {theirs!r} on the encode node: {remedy}"
    if language.http_url and not _HTTP_URL.fullmatch(language.http_url):
        return f"the URL {language.http_url[:100]!r} is not of the form http://host:port or https://host:port"
    if len(language.block_key) not in (0, 32) or (language.encrypt_blocks and not language.block_key):
        return f"a key of {len(language.block_key)} bytes for blocks: expected 32, or none and no encryption"
    return _broken_pool(language)


_HTTP_URL = re.compile(r"https?://(\[[0-9a-fA-F:.]+(%\w+)?\]|[\w.-]+):\d{1,5}", re.ASCII)


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
        return f"buffers of {list(hello.total_lens)} bytes do not hold equal numbers of rows of {list(expected)} bytes"
    return None
