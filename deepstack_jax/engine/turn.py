"""The scheduler's view of a request, and the turns that it decides on."""

from dataclasses import dataclass


@dataclass
class Job:
    """A request, as far as the scheduler knows it.

    Attributes:
        id: unique among the requests that have not ended.
        prompt_tokens: length of the prompt.
        max_new_tokens: tokens to generate at most.
        deadline: on the clock of `next_turn`.
        tenant: whose request it is; tenants take turns.
        keys: `chunk_keys` of the prompt, all of them; empty for a prompt that must not be cached.
        ready: prompt tokens whose embeddings are available, counted from the start. Those that the prefix cache gives
            need not be.
        stepwise: whether each new token has to be known before the next one can be drawn, as in a grammar.
    """

    id: int
    prompt_tokens: int
    max_new_tokens: int
    deadline: float
    tenant: str
    keys: tuple[bytes, ...]
    ready: int
    stepwise: bool = False

    @property
    def tokens(self) -> int:
        """Tokens with a place in the KV cache; the last new token is not fed back."""
        return self.prompt_tokens + self.max_new_tokens - 1


@dataclass(frozen=True)
class Part:
    """A piece of one request's prompt: tokens `start` to `start + count`.

    `pages` are all pages of the request, in order of position. `last` says that this part draws the first new token.
    """

    id: int
    slot: int
    start: int
    count: int
    last: bool
    pages: tuple[int, ...]


@dataclass(frozen=True)
class Prefill:
    """One program of `width` tokens per row, and the row of each part.

    Only last pieces share a program, or pieces of requests in different pools.
    """

    width: int
    parts: tuple[Part, ...]
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Decode:
    """One decode call of up to `steps` steps for `rows`, pairs of (slot, id) in ascending order.

    Each row stops by itself at its own limit or end token. A call with a stepwise request has one step. With
    `leave_on_end` the call ends as soon as a row does.
    """

    rows: tuple[tuple[int, int], ...]
    steps: int
    leave_on_end: bool


@dataclass(frozen=True)
class Admitted:
    """A request that got a slot and its pages; the first `cached_tokens` of its prompt are in them already.

    It comes again, with the same slot, other pages and more cached tokens, if another request computed more of its
    prompt's beginning before anything of it was launched.
    """

    id: int
    slot: int
    pages: tuple[int, ...]
    cached_tokens: int


@dataclass(frozen=True)
class Ended:
    """A request that was ended before its answer was whole: by "deadline", or for the reason given to `cancel`."""

    id: int
    reason: str
    where: str  # how far it had come: "in line", "while encoding", "after encoding", "after 7 tokens"


@dataclass(frozen=True)
class Turn:
    """What happens next, in this order."""

    ended: tuple[Ended, ...]
    admitted: tuple[Admitted, ...]
    prefill: Prefill | None
    decode: Decode | None
