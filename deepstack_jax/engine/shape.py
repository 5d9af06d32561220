"""The sizes that an engine compiles its programs for, on which the bits of its answers depend."""

from dataclasses import dataclass

from deepstack_jax.rounding import cdiv

_LEAST = {"slots": 1, "chunk": 1, "page": 1, "decode_steps": 1, "steps_beside_prefill": 0}
TAIL_DIVISORS = (8, 4, 2)  # of a chunk: the default widths of a prompt's last piece


@dataclass(frozen=True)
class EngineShape:
    """The sizes of an engine's programs.

    A prompt is prefilled in chunks of `chunk` tokens that start at multiples of `chunk`; its last piece runs in the
    smallest of a few widths that holds it. Every row decodes in one program of `slots` rows.

    Attributes:
        slots: rows of the decode program, which is how many requests run at once.
        chunk: tokens of a prefill chunk, a multiple of `page`.
        page: tokens per KV page.
        decode_steps: steps of one decode call at most.
        tail_rows: (width in tokens, requests that share one program of that width), with ascending widths; the last is
            (chunk, 1). By default an eighth, a quarter and a half of a chunk, of one request each, and the chunk.
        decode_widths: widths of decode programs, ascending; the last is `slots`, which is the only one by default. With
            several, the smallest that holds the running rows is taken, so bits depend on how many run.
        mesh: sizes of the mesh's axes `data` and `tensor`. Slots and pages are in `data` pools, and a prefill program
            has `tail_rows` requests of each pool.
        steps_beside_prefill: steps of a decode call in a turn that prefills too: bounds the gap between two tokens of
            a running stream while others prefill. 0 prefills first, for batches whose tokens are read only at the end.
    """

    slots: int
    chunk: int
    page: int = 128
    decode_steps: int = 8
    tail_rows: tuple[tuple[int, int], ...] = ()
    decode_widths: tuple[int, ...] = ()
    steps_beside_prefill: int = 2
    mesh: tuple[int, int] = (1, 1)

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: a size below one, a chunk that is not a multiple of `page`, or `tail_rows` in another form.
        """
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} {getattr(self, name)} is too small: pass {least} or more")
        if self.chunk % self.page:
            near = cdiv(self.chunk, self.page) * self.page
            raise ValueError(f"chunk {self.chunk} is not a multiple of page {self.page}: pass {near}, for example")
        if not self.tail_rows:
            object.__setattr__(self, "tail_rows", default_tail_rows(self.chunk))
        _check_tail_rows(self.tail_rows, self.chunk)
        if not self.decode_widths:
            object.__setattr__(self, "decode_widths", (self.slots,))
        if list(self.decode_widths) != sorted({*self.decode_widths, self.slots}) or self.decode_widths[0] < 1:
            raise ValueError(f"decode_widths {self.decode_widths} must ascend from 1 or more to slots {self.slots}")
        if self.slots % self.pools:
            near = cdiv(self.slots, self.pools) * self.pools
            raise ValueError(f"slots {self.slots} don't divide over data={self.pools}: pass {near}, for example")
        if self.pools > 1 and len(self.decode_widths) > 1:
            raise ValueError(f"decode_widths {self.decode_widths} need a mesh with data=1: leave them out")

    @property
    def pools(self) -> int:
        """Parts of the slots and of the KV pages; a request's pages are in its slot's part."""
        return self.mesh[0]

    def pool_of(self, slot: int) -> int:
        """The pool of a slot."""
        return slot * self.pools // self.slots

    @property
    def pages_per_chunk(self) -> int:
        """KV pages that one chunk fills."""
        return self.chunk // self.page

    def pages_of(self, tokens: int) -> int:
        """KV pages that `tokens` tokens of one request take."""
        return cdiv(tokens, self.page)

    def width_of(self, count: int) -> int:
        """The smallest width that holds `count` tokens, which depends on the prompt's own length only.

        Raises:
            ValueError: `count` is below one or above `chunk`.
        """
        if not 1 <= count <= self.chunk:
            raise ValueError(f"a piece of {count} tokens has no width: pass 1 to {self.chunk}")
        return next(width for width, _ in self.tail_rows if width >= count)

    def rows_of(self, width: int) -> int:
        """How many requests of each pool share one program of a width out of `tail_rows`."""
        return dict(self.tail_rows)[width]

    def decode_width(self, rows: int) -> int:
        """The smallest width of a decode program that holds `rows` rows."""
        return next(width for width in self.decode_widths if width >= rows)

    def name(self) -> str:
        """What bits depend on, in one line; the steps of a call and the number of pages don't belong to it.

        For example `slots=4,chunk=256,page=128,tails=32x8/64x4/128x2`.
        """
        tails = "/".join(f"{width}x{rows}" for width, rows in self.tail_rows[:-1]) or "none"
        widths = "/".join(map(str, self.decode_widths))
        slots = f"slots={self.slots}" + (f",decode={widths}" if self.decode_widths[1:] else "")
        mesh = "" if self.mesh == (1, 1) else f",data={self.mesh[0]},tensor={self.mesh[1]}"
        return f"{slots},chunk={self.chunk},page={self.page},tails={tails}{mesh}"


def default_tail_rows(chunk: int, slots: int = 1, shared_tokens: int = 1) -> tuple[tuple[int, int], ...]:
    """Widths of an eighth, a quarter and a half of a chunk, and the chunk.

    Up to `slots` requests share a program of one of the smaller widths, as long as it takes at most `shared_tokens`.
    """
    widths = sorted({chunk // divisor for divisor in TAIL_DIVISORS} - {0})
    return (*((width, min(slots, max(shared_tokens // width, 1))) for width in widths if width < chunk), (chunk, 1))


def _check_tail_rows(tail_rows: tuple[tuple[int, int], ...], chunk: int) -> None:
    widths = [width for width, _ in tail_rows]
    if widths != sorted(set(widths)) or widths[0] < 1:
        raise ValueError(f"tail_rows {tail_rows}: the widths must ascend from 1 or more: sort them")
    if any(rows < 1 for _, rows in tail_rows):
        raise ValueError(f"tail_rows {tail_rows}: each width takes 1 request or more: drop the others")
    if tail_rows[-1] != (chunk, 1):
        raise ValueError(f"tail_rows {tail_rows} must end with a whole chunk of one request: append ({chunk}, 1)")
