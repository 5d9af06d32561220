"""Counts references to KV pages, and gives out free ones."""

from collections import Counter
from collections.abc import Iterable

TRASH_PAGE = 0  # takes what idle slots and padded rows write; nothing reads it


class OutOfPages(Exception):
    """More pages were asked for than are free."""


class PageLedger:
    """Reference counts of the pages 1 to num_pages - 1; page 0 is the one that must not be read.

    A page is free, or has one reference for each request that uses it and one for the prefix cache if that keeps it.
    """

    def __init__(self, num_pages: int):
        """
        Args:
            num_pages: pages of the pool, page 0 included.

        Raises:
            ValueError: no page is left beside page 0.
        """
        if num_pages < 2:
            raise ValueError(f"num_pages {num_pages} leaves no page to give out beside page 0: pass 2 or more")
        self.num_pages = num_pages
        self._counts = [0] * num_pages
        self._free = list(range(num_pages - 1, TRASH_PAGE, -1))  # the last one is given out first

    @property
    def capacity(self) -> int:
        """Pages that can be given out in all."""
        return self.num_pages - 1

    @property
    def free(self) -> int:
        """Pages without a reference."""
        return len(self._free)

    @property
    def in_use(self) -> int:
        """Pages with at least one reference."""
        return self.capacity - self.free

    def count(self, page: int) -> int:
        """References to a page; 0 if it is free."""
        return self._counts[page]

    def take(self, count: int) -> tuple[int, ...]:
        """Gives out free pages, with one reference each.

        Raises:
            OutOfPages: fewer are free; none is given out then.
        """
        if count > self.free:
            raise OutOfPages(f"{count} pages were asked for and {self.free} of {self.capacity} are free")
        pages = tuple(self._free.pop() for _ in range(count))
        for page in pages:
            self._counts[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Adds a reference to each of these pages.

        Raises:
            ValueError: one of them is free, or doesn't exist; nothing has changed then.
        """
        pages = tuple(pages)
        for page in pages:
            self._check_used(page, 1)
        for page in pages:
            self._counts[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Takes a reference from each of these pages; those without any are free again.

        Raises:
            ValueError: a page would be released more often than it was given; nothing has changed then.
        """
        pages = tuple(pages)
        for page, times in Counter(pages).items():
            self._check_used(page, times)
        for page in pages:
            self._counts[page] -= 1
            if not self._counts[page]:
                self._free.append(page)

    def assert_consistent(self) -> None:
        """For tests: every page is either free, once, or referred to."""
        free = set(self._free)
        assert len(free) == len(self._free), f"pages are free twice: {sorted(self._free)}"
        for page in range(1, self.num_pages):
            assert (self._counts[page] == 0) == (page in free), f"page {page}: {self._counts[page]} references"
            assert self._counts[page] >= 0, f"page {page}: {self._counts[page]} references"
        assert TRASH_PAGE not in free, "page 0 was set free"
        assert not self._counts[TRASH_PAGE], "page 0 is in use"

    def _check_used(self, page: int, times: int) -> None:
        if not 0 < page < self.num_pages:
            raise ValueError(f"page {page} is not one of 1 to {self.num_pages - 1}")
        if self._counts[page] < times:
            raise ValueError(f"page {page} has {self._counts[page]} references, and {times} are needed")
