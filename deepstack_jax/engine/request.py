"""A request in an engine: its prompt, from which chunks are cut, its images, and the state of its answer."""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepstack_jax.config import ModelConfig
from deepstack_jax.engine.grammar import TokenGrammar
from deepstack_jax.engine.prefix_cache import ImageSpan, chunk_keys
from deepstack_jax.engine.shape import EngineShape
from deepstack_jax.engine.turn import Prefill
from deepstack_jax.models.vision import VisualRows
from deepstack_jax.processing.batch import Batch, VisionInput
from deepstack_jax.programs import PromptArrays, PromptChunk, scale_deepstack, write_rows
from deepstack_jax.sampling import IN_PROMPT, SamplingParams, TokenMask


@dataclass(frozen=True)
class GenerationPlan:
    """How the prompts of a batch are answered, checked against the model."""

    sampling: SamplingParams
    max_new_tokens: int

    def row(self, row: int) -> "GenerationPlan":
        """The plan of one row."""
        return GenerationPlan(jax.tree.map(lambda x: x[row : row + 1], self.sampling), self.max_new_tokens)

    def with_room(self, end_tokens: int) -> "GenerationPlan":
        """The same plan with room for `end_tokens` end tokens, which is what an engine's rows have."""
        ends = self.sampling.end_token_ids
        if (missing := end_tokens - ends.shape[1]) < 1:
            return self
        ends = np.pad(ends, [(0, 0), (0, missing)], constant_values=-1)
        return replace(self, sampling=replace(self.sampling, end_token_ids=ends))

    @cached_property
    def ends(self) -> set[int]:
        """The end tokens of a plan of one row."""
        return {token for token in self.sampling.end_token_ids[0].tolist() if token >= 0}

    @cached_property
    def top_logprobs(self) -> int | None:
        """How many alternatives come with each token of a plan of one row, None for no log probabilities."""
        count = int(self.sampling.top_logprobs[0])
        return None if count < 0 else count


@dataclass(eq=False)
class Image:
    """One image or video of a prompt, or rows of one or several that come together.

    Attributes:
        first_row: number of its first visual row in the prompt.
        rows: how many it has.
        first_token, stop_token: the prompt tokens from its first visual token to after its last one.
        pixels: until it is encoded; None where the rows come from elsewhere.
        encoded: from then on, until its last row is in the KV pages.
    """

    first_row: int
    rows: int
    first_token: int
    stop_token: int
    pixels: VisionInput | None = None
    encoded: jax.Array | VisualRows | None = None


class Stage(NamedTuple):
    """What the device did for a request between two times of time.monotonic().

    Attributes:
        kind: "encode" an image, or "prefill" a piece of the prompt.
        first: the image's first visual row, or the piece's first token.
        count: how many of them.
    """

    kind: Literal["encode", "prefill"]
    begin: float
    end: float
    first: int
    count: int


@dataclass(eq=False)
class Request:
    """One prompt and how far its answer has come. `submitted` and the other times are those of time.monotonic()."""

    input_ids: np.ndarray  # int32 [T]
    position_ids: np.ndarray  # int32 [3, T]
    visual_index: np.ndarray  # int32 [T], -1 for text
    rope_delta: int
    images: list[Image]
    plan: GenerationPlan
    deadline: float = float("inf")
    tenant: str = ""
    salt: str = ""  # prompts share cached prefixes only with those of the same tenant and salt
    spans: tuple[ImageSpan, ...] | None = None  # for the prefix cache, where images have no pixels here
    grammar: TokenGrammar | None = None  # that the answer follows, at its beginning
    on_admitted: Callable[[int], None] | None = None  # called with `cached_tokens` whenever they are known
    id: int = -1
    submitted: float = field(default_factory=time.monotonic)
    admitted_at: float = 0.0
    first_token_at: float = 0.0
    last_token_at: float = 0.0
    encode_seconds: float = 0.0
    cached_tokens: int = 0
    made: int = 0
    # "stop" at an end token (included) or where the grammar ends, "length" at max_new_tokens
    finish_reason: Literal["stop", "length"] | None = None
    deepstack_scales: tuple[float, ...] = ()  # of the levels of its visual rows; () for none, see `checked_scales`
    stages: list[Stage] | None = None  # what was done for it, if somebody wants to know

    @staticmethod
    def of_row(prompt: Batch | PromptArrays, plan: GenerationPlan, row: int = 0, **options: Any) -> "Request":
        """One row of a batch, whose pixels are not encoded yet, or of a prompt that has its visual rows.

        The images of a batch stand in the order of its visual rows, which row after row of the batch counts through.
        """
        length = int(np.asarray(prompt.lengths)[row])
        ids = np.asarray(prompt.input_ids)[row, :length].astype(np.int32)
        index = prompt.visual_index
        index = np.full(length, -1, np.int32) if index is None else np.asarray(index)[row, :length]
        images = list(_images_of(prompt, index))
        return Request(
            ids,
            np.asarray(prompt.position_ids)[:, row, :length],
            index,
            int(np.asarray(prompt.rope_deltas)[row]),
            images,
            plan.row(row),
            **options,
        )

    @property
    def length(self) -> int:
        """Tokens of the prompt."""
        return len(self.input_ids)

    @property
    def ready(self) -> int:
        """Prompt tokens, from the first on, whose embeddings are there."""
        missing = [image.first_token for image in self.images if image.encoded is None]
        return max(min(missing, default=self.length), self.cached_tokens)

    @property
    def to_encode(self) -> list[Image]:
        """Images whose pixels are here and whose rows aren't; those that the prefix cache covers are not among them."""
        return [image for image in self.images if image.pixels is not None and image.stop_token > self.cached_tokens]

    def begin(self, cached_tokens: int) -> None:
        """Notes an admission, or that more of the prompt was found in the cache. Frees images in the cached tokens."""
        self.admitted_at, self.cached_tokens = self.admitted_at or time.monotonic(), cached_tokens
        self.images = [image for image in self.images if image.stop_token > cached_tokens]
        if self.on_admitted:
            self.on_admitted(cached_tokens)

    def add_rows(self, first_row: int, rows: VisualRows) -> None:
        """The rows of the image that begins with row `first_row` came from elsewhere; ignored if it was let go."""
        for image in self.images:
            if image.first_row == first_row:
                image.encoded = rows

    def add(self, tokens: tuple[int, ...]) -> None:
        """Counts new tokens of the answer, and passes them on to the grammar.

        Raises:
            Exception: from the grammar.
        """
        self.last_token_at = time.monotonic()
        self.first_token_at = self.first_token_at or self.last_token_at
        self.made += len(tokens)
        if tokens[-1] in self.plan.ends:
            self.finish_reason = "stop"
        elif self.made == self.plan.max_new_tokens:
            self.finish_reason = "length"
        elif self.grammar is not None:
            for token in tokens:
                self.grammar.accept(token)
            self.finish_reason = "stop" if self.grammar.finished else None

    def fill_mask(self, row: np.ndarray) -> None:
        """Writes the tokens that the grammar allows next into `row`, int32 [W].

        Raises:
            Exception: from the grammar, or because it allows none.
        """
        if self.grammar is not None:
            self.grammar.fill(row)
            if not row.any():
                raise ValueError(f"the grammar allows no token after {self.made}: check it, or ask without it")

    @property
    def timings(self) -> dict[str, float]:
        """Seconds of each stage, up to the newest token."""
        begin = self.admitted_at + self.encode_seconds
        return {
            "queue": self.admitted_at - self.submitted,
            "encode": self.encode_seconds,
            "prefill": self.first_token_at - begin,
            "decode": self.last_token_at - self.first_token_at,
        }

    def release_rows(self, prefilled: int) -> None:
        """Frees the rows that lie in the first `prefilled` tokens."""
        self.images = [image for image in self.images if image.stop_token > prefilled]

    @property
    def cache_salt(self) -> bytes:
        """What keeps the cached prefixes of tenants and salts apart."""
        return json.dumps([self.tenant, self.salt]).encode()

    def keys(self, shape: EngineShape, salt: bytes) -> tuple[bytes, ...]:
        """The keys of the whole chunks in the prefix cache; none if what the images show isn't known."""
        if self.length <= shape.chunk:
            return ()
        spans = self.spans
        if spans is None and all(image.pixels for image in self.images):
            spans = tuple(ImageSpan(im.first_row, im.rows, im.pixels.digest) for im in self.images if im.pixels)
        if spans is None:
            return ()
        if self.deepstack_scales:  # pages depend on them
            salt = json.dumps([salt.hex(), *self.deepstack_scales]).encode()
        return chunk_keys(self.input_ids, self.visual_index, spans, chunk=shape.chunk, salt=salt, shape=shape.name())


def chunk_of(
    config: ModelConfig,
    shape: EngineShape,
    prefill: Prefill,
    requests: Mapping[int, Request],
    no_rows: VisualRows | None,
    table_width: int,
    mask: TokenMask,
) -> PromptChunk:
    """The arrays of one prefill program: each part in its row, the other rows unused.

    Args:
        requests: those of the parts, by id.
        no_rows: visual rows of a chunk that has none, None for a text model.
        table_width: P, pages of the longest context.
        mask: which tokens the rows may draw.
    """
    width, count = prefill.width, shape.pools * shape.rows_of(prefill.width)
    ids, positions = np.zeros((count, width), np.int32), np.zeros((3, count, width), np.int32)
    index = np.full((count, width), -1, np.int32)
    table = np.zeros((count, table_width), np.int32)
    seen = np.zeros((count, config.text.vocab_size), np.uint8)
    starts, counts, deltas, limits = (np.zeros(count, np.int32) for _ in range(4))
    rows = np.full(count, shape.slots, np.int32)
    visual_rows, taken = no_rows, 0
    scaled: list[tuple[slice, tuple[float, ...]]] = []
    options = [requests[prefill.parts[0].id].plan.sampling] * count
    for row, part in zip(prefill.rows, prefill.parts, strict=True):
        request = requests[part.id]
        options[row] = request.plan.sampling
        piece = slice(part.start, part.start + part.count)
        ids[row, : part.count] = request.input_ids[piece]
        positions[:, row, : part.count] = request.position_ids[:, piece]
        table[row, : len(part.pages)] = part.pages
        starts[row], counts[row], deltas[row] = part.start, part.count, request.rope_delta
        limits[row] = request.plan.max_new_tokens
        if part.last:
            rows[row] = part.slot
            seen[row, request.input_ids] = IN_PROMPT
        for tokens, image, skip in _visual_runs(request, piece):
            if visual_rows is no_rows:
                visual_rows = jax.tree.map(jnp.zeros_like, no_rows)
            assert visual_rows is not None
            assert image.encoded is not None
            index[row, tokens] = taken + np.arange(len(tokens))
            place = (np.int32(x) for x in (taken, skip, len(tokens)))
            visual_rows = write_rows(config, visual_rows, image.encoded, *place)
            if request.deepstack_scales:
                scaled.append((slice(taken, taken + len(tokens)), request.deepstack_scales))
            taken += len(tokens)
    return PromptChunk(
        ids,
        positions,
        starts,
        counts,
        table,
        rows,
        deltas,
        limits,
        seen,
        jax.tree.map(lambda *arrays: np.concatenate(arrays), *options),
        mask,
        None if no_rows is None else index,
        _scale(visual_rows, scaled),
    )


def _scale(rows: VisualRows | None, scaled: Sequence[tuple[slice, tuple[float, ...]]]) -> VisualRows | None:
    """A chunk's visual rows, some of whose DeepStack levels are multiplied by scales: one program for any of them."""
    if not scaled or rows is None or rows.deepstack is None:
        return rows
    scales = np.ones((len(rows.embeds), len(scaled[0][1])), np.float32)
    for place, of_request in scaled:
        scales[place] = of_request
    return rows._replace(deepstack=scale_deepstack(rows.deepstack, scales))


def _visual_runs(request: Request, piece: slice) -> Iterator[tuple[np.ndarray, Image, int]]:
    """Runs of a piece's visual tokens whose rows follow each other in one image: their places in the piece, the image,
    and the row of the image that the first of them takes."""
    local = request.visual_index[piece]
    tokens = np.flatnonzero(local >= 0)
    for image in request.images:
        own = tokens[(local[tokens] >= image.first_row) & (local[tokens] < image.first_row + image.rows)]
        for run in np.split(own, np.flatnonzero(np.diff(local[own]) != 1) + 1):
            if len(run):
                yield run, image, int(local[run[0]]) - image.first_row


def _images_of(prompt: Batch | PromptArrays, index: np.ndarray) -> list[Image]:
    """The images whose rows `index` [T] names, in order."""
    visual = np.flatnonzero(index >= 0)
    if not len(visual):
        return []
    if isinstance(prompt, PromptArrays):
        return [Image(0, int(index.max()) + 1, int(visual[0]), int(visual[-1]) + 1, encoded=prompt.rows)]
    images, first = [], 0
    for pixels in prompt.visuals:
        tokens = np.flatnonzero((index >= first) & (index < first + pixels.num_rows))
        if len(tokens):
            images.append(Image(first, pixels.num_rows, int(tokens[0]), int(tokens[-1]) + 1, pixels))
        first += pixels.num_rows
    return images
