"""Keeps the KV pages of prompts' whole chunks, and finds them again by what they were computed from.

A chunk's key is one SHA-256 over the key of the chunk before it, its token ids, and for its visual tokens which image
they show and where in it. Two chunks with one key therefore were computed from equal prompts up to their end, at equal
positions: M-RoPE's positions follow from the ids and the images' grids, and a grid is part of its image's digest. Only
whole chunks at multiples of the chunk are kept, so that a hit gives the bits that the same program would compute again.
vLLM's block hashes took the same form, a chain over parent, ids and (image, offset), after simpler ones had let prompts
with different images share pages.
"""

import hashlib
import itertools
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deepstack_jax.engine.pages import PageLedger
from deepstack_jax.rounding import cdiv

DIGEST_BYTES = hashlib.sha256().digest_size


@dataclass(frozen=True)
class ImageSpan:
    """The visual rows of one image or video of a prompt.

    Attributes:
        first: number of its first visual row among the prompt's.
        rows: how many visual rows it has. Text tokens may stand between them, as a video's timestamps do.
        digest: SHA-256 of its pixels, its grid and the processor's settings.
    """

    first: int
    rows: int
    digest: bytes

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: the span is empty, or its digest isn't a whole SHA-256.
        """
        if self.first < 0 or self.rows < 1:
            raise ValueError(f"{self.rows} visual rows from {self.first} are not a span: pass one row or more")
        if len(self.digest) != DIGEST_BYTES:
            raise ValueError(f"a digest of {len(self.digest)} bytes is not a SHA-256: pass all {DIGEST_BYTES}")


def chunk_keys(
    input_ids: NDArray[np.integer],
    visual_index: NDArray[np.integer],
    images: Sequence[ImageSpan],
    *,
    chunk: int,
    salt: bytes,
    shape: str,
) -> tuple[bytes, ...]:
    """The keys of a prompt's whole chunks, in order: T // chunk of 32 bytes each.

    Args:
        input_ids: integers [T].
        visual_index: integers [T]: the number of each visual token's row, -1 for text.
        images: what the visual rows show. Each row belongs to exactly one span.
        chunk: tokens per chunk.
        salt: keeps tenants apart: with other salts, nothing is shared.
        shape: `EngineShape.name()`, as bits depend on it.

    Raises:
        ValueError: arrays of other shapes, spans that overlap, or a visual token outside of all spans.
    """
    ids, visual = np.asarray(input_ids, "<i8"), np.asarray(visual_index, "<i8")
    if ids.ndim != 1 or visual.shape != ids.shape:
        raise ValueError(f"input_ids {list(ids.shape)} and visual_index {list(visual.shape)} must both be [T]")
    spans = _sorted_spans(images)
    owner = _owners(visual, spans)
    key, keys = _digest(b"deepstack-jax prefix", shape.encode(), salt, _number(chunk)), []
    for start in range(0, len(ids) - chunk + 1, chunk):
        piece = slice(start, start + chunk)
        key = _digest(key, ids[piece].tobytes(), *_visual_fields(visual[piece], owner[piece], spans))
        keys.append(key)
    return tuple(keys)


def _digest(*fields: bytes) -> bytes:
    """SHA-256 of the fields, each after its length, so that no two lists of fields are hashed from the same bytes."""
    return hashlib.sha256(b"".join(_number(len(field)) + field for field in fields)).digest()


def _number(value: int) -> bytes:
    return value.to_bytes(8, "little")


def _sorted_spans(images: Sequence[ImageSpan]) -> list[ImageSpan]:
    spans = sorted(images, key=lambda span: span.first)
    for one, other in itertools.pairwise(spans):
        if one.first + one.rows > other.first:
            raise ValueError(f"images overlap: rows {one.first} to {one.first + one.rows} and from {other.first}")
    return spans


def _owners(visual: NDArray[np.int64], spans: list[ImageSpan]) -> NDArray[np.intp]:
    """[T]: which span each visual token's row belongs to, -1 for text."""
    firsts = np.array([span.first for span in spans], np.int64)
    ends = firsts + np.array([span.rows for span in spans], np.int64)
    owner = np.searchsorted(firsts, visual, side="right") - 1
    outside = (visual >= 0) & ((owner < 0) | (visual >= np.append(ends, 0)[owner]))
    if outside.any():
        raise ValueError(f"visual row {visual[outside][0]} belongs to no image: give the spans of all images")
    return np.where(visual >= 0, owner, -1)


def _visual_fields(visual: NDArray[np.int64], owner: NDArray[np.intp], spans: list[ImageSpan]) -> Iterator[bytes]:
    """For each run of neighbouring rows of one image in a chunk: its place, length, image and offset in the image."""
    step = np.diff(visual, prepend=-2) != 1
    starts = np.flatnonzero((owner >= 0) & (step | (np.diff(owner, prepend=-2) != 0)))
    for start in starts.tolist():
        span, rest = spans[owner[start]], visual[start:]
        ongoing = (rest == rest[0] + np.arange(len(rest))) & (owner[start:] == owner[start])
        length = len(rest) if ongoing.all() else int(ongoing.argmin())
        yield _number(start) + _number(length) + span.digest + _number(int(visual[start]) - span.first)


@dataclass
class _Entry:
    pages: tuple[int, ...]
    parent: bytes | None
    children: int = 0


class PrefixCache:
    """Keeps the pages of whole chunks for prompts with the same beginning.

    It holds one reference of its own to each page that it keeps. Pages without another reference are reclaimable: they
    are given up, least recently used first, when the ledger runs short or `max_pages` is reached. A chunk is kept only
    as long as the chunk before it, so each is found from the start.

    Attributes:
        query_tokens: tokens of all prompts that were looked up by `match`.
        hit_tokens: how many of them it gave pages for.
    """

    def __init__(
        self, ledger: PageLedger, chunk: int, page: int, max_pages: int | None = None, *, enabled: bool = True
    ):
        """
        Args:
            ledger: where the pages are counted.
            chunk: tokens per chunk, a multiple of `page`.
            page: tokens per page.
            max_pages: pages to keep at most; None leaves it to the ledger.
            enabled: without it nothing is kept and nothing is found.
        """
        self.ledger = ledger
        self.chunk = chunk
        self.pages_per_chunk = chunk // page
        self.max_pages = ledger.capacity if max_pages is None else max_pages
        self.enabled = enabled
        self.query_tokens = 0
        self.hit_tokens = 0
        # least recently used first; a chunk always stands before its parent, which was used whenever it was
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()

    @property
    def pages(self) -> tuple[int, ...]:
        """The pages that are kept."""
        return tuple(page for entry in self._entries.values() for page in entry.pages)

    def __len__(self) -> int:
        """How many pages are kept."""
        return len(self._entries) * self.pages_per_chunk

    def __contains__(self, key: bytes) -> bool:
        """Whether the chunk with this key is kept."""
        return key in self._entries

    def find(self, keys: Sequence[bytes], prompt_tokens: int) -> tuple[bytes, ...]:
        """The longest run of a prompt's first keys that is kept. Its last token is never part of it.

        What comes after the last token has to be computed from it, so a prompt is never covered as a whole.
        """
        usable = keys[: max(prompt_tokens - 1, 0) // self.chunk]
        missing = next((i for i, key in enumerate(usable) if key not in self._entries), len(usable))
        return tuple(usable[:missing])

    def match(self, keys: Sequence[bytes], prompt_tokens: int, matched: int | None = None) -> tuple[int, ...]:
        """The pages of `find(keys, prompt_tokens)`, shared and marked as used.

        Args:
            keys: `chunk_keys` of the prompt.
            prompt_tokens: its length.
            matched: if this prompt was matched before, the tokens that it got then, so that it is counted once.
        """
        found = self.find(keys, prompt_tokens)
        pages = tuple(page for key in found for page in self._entries[key].pages)
        self.ledger.share(pages)
        if found:
            self._mark_used(found[-1])
        self.query_tokens += prompt_tokens if self.enabled and matched is None else 0
        self.hit_tokens += len(found) * self.chunk - (matched or 0)
        return pages

    def insert(self, key: bytes, pages: Sequence[int], parent: bytes | None) -> bool:
        """Keeps the pages of one chunk, with a reference of the cache's own.

        Args:
            key: the chunk's.
            pages: its pages in order, to which a request still has references.
            parent: the key of the chunk before it; None for a prompt's first.

        Returns:
            Whether these pages are kept: not if the chunk is kept already, if its parent isn't, or if there is no room.

        Raises:
            ValueError: not the pages of one chunk, or a free one.
        """
        if len(pages) != self.pages_per_chunk:
            raise ValueError(f"{len(pages)} pages are not one chunk's: pass {self.pages_per_chunk}")
        if key in self._entries:
            self._mark_used(key)
            return False
        if not self.enabled or (parent is not None and parent not in self._entries):
            return False
        if not self._shrink_to(self.max_pages - len(pages), parent):
            return False
        self.ledger.share(pages)
        self._entries[key] = _Entry(tuple(pages), parent)
        if parent is not None:
            self._entries[parent].children += 1
            self._mark_used(parent)
        return True

    def evict(self, count: int, keep: Collection[bytes] = ()) -> int:
        """Gives up least recently used chunks that no request uses, whole ones, until `count` pages are free.

        Args:
            count: pages that should become free.
            keep: keys that stay, with all their ancestors.

        Returns:
            How many pages became free: none if fewer than `count` could, so that nothing is given up in vain.
        """
        wanted = cdiv(max(count, 0), self.pages_per_chunk)
        victims = list(itertools.islice(self._evictable(keep), wanted)) if count <= len(self) else []
        if len(victims) < wanted:
            return 0
        for key in victims:
            self._drop(key)
        return len(victims) * self.pages_per_chunk

    def clear(self) -> None:
        """Forgets every chunk. Requests that use their pages keep them."""
        for key in list(self._entries):
            self._drop(key)

    def _mark_used(self, key: bytes) -> None:
        """Moves a chunk and then its ancestors to the recent end: each stays behind all its descendants."""
        ancestor: bytes | None = key
        while ancestor is not None:
            self._entries.move_to_end(ancestor)
            ancestor = self._entries[ancestor].parent

    def _evictable(self, keep: Collection[bytes]) -> Iterator[bytes]:
        """Chunks that could go one after another, in this order: descendants come before their ancestors."""
        gone: dict[bytes, int] = {}  # children that went before
        for key, entry in self._entries.items():
            # requests share and release whole chunks, so one page stands for all
            if key in keep or self.ledger.count(entry.pages[0]) > 1 or entry.children > gone.get(key, 0):
                continue
            if entry.parent is not None:
                gone[entry.parent] = gone.get(entry.parent, 0) + 1
            yield key

    def _shrink_to(self, pages: int, parent: bytes | None) -> bool:
        """Whether `pages` pages or fewer are kept after giving some up, the parent not among them."""
        keep = () if parent is None else (parent,)
        excess = len(self) - pages
        return pages >= 0 and (excess <= 0 or self.evict(excess, keep) > 0)

    def _drop(self, key: bytes) -> None:
        entry = self._entries.pop(key)
        self.ledger.release(entry.pages)
        if entry.parent is not None:
            self._entries[entry.parent].children -= 1
