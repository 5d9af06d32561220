"""What the two sides of a transfer have in common: states, and the actions that their machines ask for.

`receiver.Receiver` runs on the language node, `sender.Sender` on the encode node. Neither knows threads, sockets,
memory or time: an event comes in with the clock's reading (seconds, monotonic), a list of actions comes out, and who
drives them carries the actions out. Any message may be lost, doubled, late or out of order; no event raises.

A peer is one incarnation of a node, named by an opaque string: a node that was restarted is another peer. Nothing that
a former incarnation sent can then be taken for the new one's.
"""

from dataclasses import dataclass
from enum import IntEnum

from deepstack_jax.disagg.wire.messages import Message


class State(IntEnum):
    """Of a request, on either side. A state is followed by greater ones alone, so Failed wins."""

    BOOTSTRAPPING = 0  # being prepared
    WAITING_FOR_INPUT = 1  # prepared; no block has been granted yet
    TRANSFERRING = 2
    SUCCESS = 3
    FAILED = 4


@dataclass(frozen=True)
class Send:
    """Send `message` to `peer`."""

    peer: str
    message: Message


# actions of the receiver


@dataclass(frozen=True)
class Began:
    """The request's prompt is known. Blocks copied out before belong to another prompt: forget them."""

    request_id: str
    total_tokens: int
    visual_rows: int
    rope_delta: int


@dataclass(frozen=True)
class CopyOut:
    """Copy token block `token_block` out of `pool_block`, then call `Receiver.copied` with what the COPY has."""

    request_id: str
    attempt: int
    round: int
    token_block: int
    pool_block: int
    checksum: bytes  # as the sender says; the receiver compares
    num_bytes: int


@dataclass(frozen=True)
class EncodeHere:
    """No encoder is left for the request; the machine has forgotten it: encode it on this node."""

    request_id: str
    reason: str


@dataclass(frozen=True)
class Ended:
    """The request is over. On SUCCESS all of its blocks have been copied out; `status` is then 200."""

    request_id: str
    state: State
    status: int
    reason: str


# actions of the sender


@dataclass(frozen=True)
class Key:
    """One attempt of a request, as the sender names it."""

    peer: str
    request_id: str
    attempt: int


@dataclass(frozen=True)
class Prepare:
    """Prepare and encode, then call `Sender.prepared` or `Sender.failed`.

    `have` are token blocks that need no rows, if the prompt's fingerprint turns out to be `fingerprint`.
    """

    key: Key
    payload: bytes
    deadline: float
    have: tuple[tuple[int, int], ...]
    fingerprint: bytes | None


@dataclass(frozen=True)
class StartWrite:
    """Write token blocks to the peer's pool blocks, then call `Sender.written` or `Sender.write_failed` for each.

    Ask `Sender.may_write` at the moment of starting, and call `Sender.write_skipped` if it says no.
    """

    key: Key
    round: int
    blocks: tuple[tuple[int, int], ...]  # (token block, pool block)


@dataclass(frozen=True)
class Forget:
    """Nothing more is asked of the attempt: drop its rows, and stop preparing it."""

    key: Key


Action = Send | Began | CopyOut | EncodeHere | Ended | Prepare | StartWrite | Forget
