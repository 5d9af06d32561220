"""The states and actions that both sides of a transfer share.

`receiver.Receiver` runs on the language node, `sender.Sender` on the encode node. Neither uses threads, sockets, memory
or a clock: each event (with a timestamp in monotonic seconds) returns a list of actions for the driver to perform. Any
message may be lost, duplicated, late or out of order; no event raises.

A peer is one incarnation of a node, named by an opaque string. A restarted node is a different peer, so a message from
its former incarnation can't be mistaken for a new one.
"""

from dataclasses import dataclass
from enum import IntEnum

from deepstack_jax.disagg.wire.messages import Message


class State(IntEnum):
    """The state of a request on either side. It only increases, so FAILED wins."""

    BOOTSTRAPPING = 0  # the encode node is preparing it
    WAITING_FOR_INPUT = 1  # it is prepared, and no block has been granted yet
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
    """The request's prompt is known. Discard blocks copied out earlier: they belong to a different prompt."""

    request_id: str
    total_tokens: int
    visual_rows: int
    rope_delta: int


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
class EncodeLocally:
    """No encoder is left for the request, and the receiver has forgotten it: encode it on this node."""

    request_id: str
    reason: str


@dataclass(frozen=True)
class Ended:
    """The request has ended. On SUCCESS all of its blocks have been copied out, and `status` is 200."""

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
    """Prepare and encode, then call `Sender.prepared` or `Sender.failed`.

    The token blocks in `have` need no rows if the prompt's fingerprint equals `fingerprint`.
    """

    key: AttemptKey
    payload: bytes
    deadline: float
    have: tuple[tuple[int, int], ...]
    fingerprint: bytes | None


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


Action = Send | PromptKnown | CopyOut | EncodeLocally | Ended | Prepare | StartWrite | Forget
