"""Stop strings of an answer that is read piece by piece: what can be shown of it, and when it ends."""

import reprlib
from collections.abc import Sequence

MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 1024


class StopStrings:
    """Text up to the first stop string, given out as soon as it can't be the beginning of one.

    The match that starts first in the text ends it. Of those that start together it is the shortest, which is complete
    first. Borders between pieces make no difference. Strings are compared character by character, without Unicode
    normalization.

    Attributes:
        matched: the stop string that has ended the text; None until then.
    """

    def __init__(self, stops: Sequence[str] = ()):
        self.matched: str | None = None
        self._searches = [_Search(stop) for stop in stops]
        self._held = ""  # the end of the text read so far, not given out yet
        self._match: tuple[int, str] | None = None  # the first match so far and where it starts in `_held`

    @staticmethod
    def of(stop: str | Sequence[str] | None) -> "StopStrings":
        """Of one string or several. Empty ones are ignored; None is none.

        Raises:
            ValueError: something that is not a string, more than 16 of them, or one of more than 1024 characters.
        """
        listed = [] if stop is None else [stop] if isinstance(stop, str) else stop
        if not isinstance(listed, list | tuple):
            raise ValueError(f"stop {reprlib.repr(stop)} is not a string: give a string or a list of strings")
        for i, one in enumerate(listed):
            if not isinstance(one, str):
                raise ValueError(f"stop[{i}] {reprlib.repr(one)} is not a string: give a string or a list of strings")
            if len(one) > MAX_STOP_CHARACTERS:
                raise ValueError(
                    f"stop {reprlib.repr(one)} has {len(one)} characters: give at most {MAX_STOP_CHARACTERS}"
                )
        stops = list(dict.fromkeys(filter(None, listed)))
        if len(stops) > MAX_STOP_STRINGS:
            raise ValueError(f"stop {reprlib.repr(stops)} has {len(stops)} strings: give at most {MAX_STOP_STRINGS}")
        return StopStrings(stops)

    def feed(self, piece: str) -> str:
        """Takes the next piece of the text and gives what can be shown now; "" once a stop string has matched."""
        if self.matched is not None:
            return ""
        self._held += piece
        for end, character in enumerate(piece, len(self._held) - len(piece) + 1):
            starts = [end - len(search.stop) for search in self._searches if search.advance(character)]
            if starts:
                match = min(starts), self._held[min(starts) : end]
                self._match = min(self._match or match, match)
            if self._match is not None and self._match[0] <= self._first_open(end):
                return self.finish()
        return self._release(self._first_open(len(self._held)))

    def finish(self) -> str:
        """Gives the rest of the text, once its last piece was fed."""
        if self._match is not None:
            start, self.matched = self._match
            shown, self._held, self._match = self._held[:start], "", None
            return shown
        return self._release(len(self._held))

    def _first_open(self, end: int) -> int:
        """Where the earliest beginning of a stop string starts in the text up to `end`."""
        return end - max((search.length for search in self._searches), default=0)

    def _release(self, count: int) -> str:
        if self._match is not None:
            self._match = self._match[0] - count, self._match[1]
        shown, self._held = self._held[:count], self._held[count:]
        return shown


class _Search:
    """One stop string's search by Knuth, Morris and Pratt (1977): constant time per character, on average."""

    def __init__(self, stop: str):
        self.stop = stop
        self.length = 0  # of the longest proper beginning of `stop` that the text ends with
        # for each beginning of `stop`, the length of the longest shorter one that it ends with
        self._borders = [0]
        for character in stop[1:]:
            self._borders.append(self._longer(self._borders[-1], character))

    def advance(self, character: str) -> bool:
        """Whether the text ends with the stop string after this character."""
        self.length = self._longer(self.length, character)
        found = self.length == len(self.stop)
        if found:
            self.length = self._borders[-1]
        return found

    def _longer(self, length: int, character: str) -> int:
        while length and self.stop[length] != character:
            length = self._borders[length - 1]
        return length + (self.stop[length] == character)
