"""The states and actions that both sides of a transfer share.

`receiver.Receiver` runs on the language node, `sender.Sender` on the encode node. Neither uses threads, sockets, memory
or a clock: each event (with a timestamp in monotonic seconds) returns a list of actions for the driver to perform. Any
message may be lost, duplicated, late or out of order; no event raises.

A peer is one incarnation of a node, named by an opaque string. A restarted node is a different peer, so a message from
its former incarnation can't be mistaken for a new one.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

from deepstack_jax.disagg.wire.messages import Message, Prepared


class State(IntEnum):
    """The state of a request on either side. It only increases, so FAILED wins."""

    BOOTSTRAPPING = 0  # the encode node is preparing it
    WAITING_FOR_INPUT = 1  # its prompt is known, and no block has been granted yet
    TRANSFERRING = 2
    SUCCESS = 3
    FAILED = 4


@dataclass(frozen=True)
class Send:
    """Send `message` to `peer`."""

    peer: str
    message: Message


# actions that the receiver returns


@dataclass(frozen=True)
class PromptKnown:
    """The request's prompt is known: call `Receiver.want`. It comes once per request."""

    request_id: str
    prepared: Prepared


@dataclass(frozen=True)
class CopyOut:
    """Copy token block `token_block` out of `pool_block`, then call `Receiver.copied` with the checksum of the COPY."""

    request_id: str
    attempt: int
    round: int
    token_block: int
    pool_block: int
    checksum: bytes  # reported by the sender; the receiver compares it
    num_bytes: int


@dataclass(frozen=True)
class Wipe:
    """Overwrite blocks that a peer may have written to and that nobody has copied, before others are granted them."""

    pool_blocks: tuple[int, ...]


@dataclass(frozen=True)
class EncodeLocally:
    """No encoder is left for the request, and the receiver has forgotten it: encode it on this node."""

    request_id: str
    reason: str


@dataclass(frozen=True)
class Ended:
    """The request has ended. On SUCCESS all blocks that it wants have been copied out, and `status` is 200."""

    request_id: str
    state: State
    status: int
    reason: str


# actions that the sender returns


@dataclass(frozen=True)
class AttemptKey:
    """Identifies one attempt of a request on the sender."""

    peer: str
    request_id: str
    attempt: int


@dataclass(frozen=True)
class Prepare:
    """Prepare the request, then call `Sender.prepared` or `Sender.failed`."""

    key: AttemptKey
    payload: bytes
    deadline: float


@dataclass(frozen=True)
class EncodeBlocks:
    """Encode the images that have rows in these token blocks, and call `Sender.encoded` after each.

    Images that an earlier EncodeBlocks of the attempt named and this one does not name are no longer needed.
    """

    key: AttemptKey
    blocks: tuple[tuple[int, int], ...]  # ascending ranges [start, stop)


@dataclass(frozen=True)
class StartWrite:
    """Write token blocks to the peer's pool blocks, then call `Sender.written` or `Sender.write_failed` for each.

    Call `Sender.may_write` just before starting. If it returns False, call `Sender.write_skipped` instead.
    """

    key: AttemptKey
    round: int
    blocks: tuple[tuple[int, int], ...]  # (token block, pool block)


@dataclass(frozen=True)
class Forget:
    """The attempt has ended: drop its rows and stop preparing it."""

    key: AttemptKey


Action = Send | PromptKnown | CopyOut | Wipe | EncodeLocally | Ended | Prepare | EncodeBlocks | StartWrite | Forget


def name_of(peer: str) -> str:
    """The part of a peer's name that errors show to clients: what is before its incarnation."""
    return peer.partition("/")[0]


def to_ranges(blocks: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """Ascending ranges [start, stop) of adjacent token blocks."""
    ranges: list[tuple[int, int]] = []
    for block in sorted(blocks):
        if ranges and ranges[-1][1] == block:
            ranges[-1] = (ranges[-1][0], block + 1)
        else:
            ranges.append((block, block + 1))
    return tuple(ranges)


def from_ranges(ranges: Iterable[tuple[int, int]], num_blocks: int) -> set[int]:
    """The token blocks below `num_blocks` in ranges [start, stop)."""
    return {block for start, stop in ranges for block in range(start, min(stop, num_blocks))}
