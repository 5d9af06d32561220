"""One request's prompt and rows on their way from an encode node, as the language node's engine sees them."""

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from deepstack_jax.disagg.language.incoming import BlockRows, IncomingRequest
from deepstack_jax.disagg.wire.messages import Encoded, ImageRows, Prepared
from deepstack_jax.disagg.wire.transfer import from_ranges
from deepstack_jax.models.vision import VisualRows
from deepstack_jax.programs import PromptArrays

OnRows = Callable[[BlockRows, VisualRows], None]


class TransferFailedError(Exception):
    """A request's rows could not be fetched. `status` is the HTTP status, and the message is one line."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status = status


class NoEncoderError(Exception):
    """No encoder is left, and this node can encode the request itself."""


@dataclass
class Interval:
    """An activity between two times of time.monotonic(), for some token blocks of a request.

    Attributes:
        encoder: index of the encode node's endpoint.
        num_bytes: received in it.
    """

    start: float
    end: float = 0.0
    encoder: int = 0
    blocks: set[int] = field(default_factory=set)
    num_bytes: int = 0


@dataclass(frozen=True)
class KnownPrompt:
    """A prompt whose rows are still to come. Visual rows are numbered in the order of their tokens.

    Attributes:
        arrays: tokens and positions of one prompt of T tokens, without rows.
        images: its images and videos, in the order of their tokens.
        blocks: its token blocks that have visual rows; the rows of a block arrive together.
    """

    arrays: PromptArrays
    images: tuple[ImageRows, ...]
    blocks: dict[int, BlockRows]

    def blocks_after(self, tokens: int) -> list[int]:
        """The token blocks with visual rows that the first `tokens` tokens do not cover."""
        return [number for number, block in self.blocks.items() if block.stop_token > tokens]


@dataclass(eq=False)
class Fetch:
    """A prompt and its rows, as far as they have arrived. Use it in the event loop only.

    Attributes:
        prompt: resolved as soon as an encode node has prepared the request, before it encodes anything.
        done: resolved once all rows that are wanted have arrived. Both futures raise TransferFailedError with the
            reason, or NoEncoderError if no encoder is left and the settings say that this node can encode too.
        peer: which encoder has the request, as `Receiver` names it; "" before the first.
        encoder: index of the encode node's endpoint.
        prepared: when an encode node prepared the request, to the time of the message about it.
        encoded: when images were encoded, to the time of the message about it.
        rounds: from each grant of blocks to the arrival of its last one so far.
        num_bytes: received for the request.
    """

    on_rows: OnRows
    _want: Callable[[Iterable[int], bool], None]
    prompt: "asyncio.Future[KnownPrompt]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    done: "asyncio.Future[None]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    peer: str = ""
    encoder: int = 0
    prepared: Interval | None = None
    encoded: list[Interval] = field(default_factory=list)
    num_bytes: int = 0
    incoming: IncomingRequest | None = None
    _rounds: dict[int, Interval] = field(default_factory=dict)
    _encode_us: dict[int, int] = field(default_factory=dict)  # by attempt

    def want(self, cached_tokens: int, admitted: bool) -> None:
        """Says that the engine has the first `cached_tokens` tokens: images within them are not encoded.

        Until the engine has `admitted` the request, this is an estimate that starts the encoder; afterwards rows may
        arrive, and the number only grows. Call it when `prompt` is known.
        """
        self._want(self.prompt.result().blocks_after(cached_tokens), admitted)

    @property
    def rounds(self) -> list[Interval]:
        return [interval for interval in self._rounds.values() if interval.end]

    @property
    def timings(self) -> dict[str, float]:
        """Seconds of each stage. They overlap each other and prefill."""
        transfer = sum(interval.end - interval.start for interval in self.rounds)
        encode = sum(self._encode_us.values()) / 1e6
        prepare = self.prepared.end - self.prepared.start if self.prepared else 0.0
        return {"prepare": prepare, "encode": encode, "transfer": transfer}

    # events of the encoder pool

    def know(self, incoming: IncomingRequest, prepared: Prepared) -> None:
        """The prompt is known.

        Raises:
            ValueError: its tokens contradict its images.
        """
        index, count = incoming.visual_index, int((incoming.visual_index >= 0).sum())
        firsts = np.cumsum([0, *(image.rows for image in prepared.images)]).tolist()
        if count != prepared.visual_rows or firsts != [*(image.first_row for image in prepared.images), count]:
            raise ValueError(f"{count} visual tokens contradict the images and videos of {firsts[-1]} rows")
        arrays = PromptArrays(
            input_ids=incoming.input_ids[None],
            position_ids=incoming.mrope_positions[:, None],
            lengths=np.asarray([len(index)], np.int32),
            rope_deltas=np.asarray([prepared.rope_delta], np.int32),
            visual_index=index[None],
        )
        self.incoming = incoming
        if not self.prompt.done():
            self.prompt.set_result(KnownPrompt(arrays, prepared.images, incoming.blocks))

    def heard(self, message: Prepared | Encoded, encoder: int, now: float) -> None:
        """A message about the request has arrived from an encode node."""
        if isinstance(message, Prepared):
            self.encoder, self.prepared = encoder, Interval(now - message.prepare_us / 1e6, now, encoder)
        elif message.encode_us > self._encode_us.get(message.attempt, 0):
            seconds = (message.encode_us - self._encode_us.get(message.attempt, 0)) / 1e6
            known = set[int]().union(*(each.blocks for each in self.encoded if each.encoder == encoder))
            new = from_ranges(message.blocks, len(self.incoming.input_ids)) - known if self.incoming else set()
            self.encoded.append(Interval(now - seconds, now, encoder, new))
            self._encode_us[message.attempt] = message.encode_us

    def granted(self, round: int, now: float) -> None:
        """Blocks of the receive pool were granted."""
        self._rounds.setdefault(round, Interval(now, encoder=self.encoder))

    def copied(self, round: int, token_block: int, num_bytes: int, now: float) -> float:
        """A block was copied out of the receive pool; its rows are passed on, once. Returns the seconds that it took
        after the block before it."""
        assert self.incoming is not None
        interval = self._rounds.setdefault(round, Interval(now, encoder=self.encoder))
        seconds = now - (interval.end or interval.start)
        interval.end, interval.num_bytes = now, interval.num_bytes + num_bytes
        interval.blocks.add(token_block)
        self.num_bytes += num_bytes
        rows = self.incoming.take_rows(token_block)
        if rows is not None:
            self.on_rows(self.incoming.blocks[token_block], rows)
        return seconds

    def end(self) -> None:
        """All rows have arrived."""
        if not self.done.done():
            self.done.set_result(None)

    def fail(self, error: Exception) -> None:
        """The rows will not arrive."""
        for future in (self.prompt, self.done):
            if not future.done():
                future.set_exception(error)

    def close(self) -> None:
        """Nobody waits any more."""
        for future in (self.prompt, self.done):
            if not future.cancel() and not future.cancelled():
                future.exception()  # an error that nobody asked for is not logged
