"""What the receiver knows of a request whose rows are being fetched, and its limits."""

from dataclasses import dataclass, field

from deepstack_jax.disagg.wire.messages import MAX_LIST, WrittenBlock
from deepstack_jax.disagg.wire.transfer import State


@dataclass(frozen=True)
class ReceiverSettings:
    """Limits of a language node's transfers. Times are in seconds."""

    num_blocks: int  # in the receive pool
    block_size: int  # tokens per block
    share: int  # maximum blocks that one request holds at once
    max_tokens: int  # per prompt
    retry_interval: float = 1.0  # unanswered messages are repeated at this interval
    transfer_timeout: float = 30.0  # limit without progress, and the quarantine of blocks that may still be written
    max_attempts: int = 4  # per request, with different encoders as far as there are any
    max_damaged: int = 3  # a request fails after more blocks with a wrong checksum
    encodes_locally: bool = False  # this node has loaded the vision weights

    def __post_init__(self):
        if not 1 <= self.share <= min(self.num_blocks, MAX_LIST):
            raise ValueError(f"share {self.share}: expected 1 to {min(self.num_blocks, MAX_LIST)} blocks")


@dataclass
class PendingRequest:
    """A request whose rows are being fetched. It has one attempt with one peer at a time, and one round of blocks."""

    payload: bytes
    deadline: float
    state: State = State.BOOTSTRAPPING
    attempt: int = 0
    peer: str = ""
    accepted: bool = False
    prepared: bool = False
    resend_at: float = 0.0
    stall_deadline: float = 0.0
    attempts_by_peer: dict[str, int] = field(default_factory=dict)  # number of attempts per peer
    fingerprint: bytes = b""
    total_tokens: int = 0
    wanted: set[int] | None = None  # token blocks whose rows are needed; None until `want`
    version: int = 0  # of `wanted`
    admitted: bool = False  # `wanted` is final, or can only shrink
    encoded: set[int] = field(default_factory=set)  # token blocks whose rows this attempt's encoder has
    round: int = 0
    granted: dict[int, int] = field(default_factory=dict)  # token block -> pool block, in this round
    written: dict[int, WrittenBlock] = field(default_factory=dict)  # granted blocks that are being copied out
    received: set[int] = field(default_factory=set)  # token blocks
    num_damaged: int = 0
    failure: str = ""  # the last status 500, an encoder's failure that concerns only this request

    @property
    def missing(self) -> set[int]:
        """The wanted token blocks that have not been received."""
        return (self.wanted or set()) - self.received

    @property
    def waits_for_blocks(self) -> bool:
        return self.prepared and self.admitted and not self.granted and bool(self.missing & self.encoded)

    @property
    def waits_for_rows(self) -> bool:
        return self.prepared and bool(self.missing - self.encoded)

    @property
    def waits_for_peer(self) -> bool:
        return not self.prepared or self.waits_for_rows or len(self.written) < len(self.granted)


@dataclass
class AbandonedAttempt:
    """An abandoned attempt whose peer may still write to these blocks."""

    peer: str
    blocks: list[int]
    release_at: float
    resend_at: float
