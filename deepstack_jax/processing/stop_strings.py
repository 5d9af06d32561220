"""Searches streamed text for stop strings: decides which text can be shown, and when the answer ends."""

import reprlib
from collections.abc import Sequence

MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 1024


class StopStrings:
    """Releases text up to the first stop string, as soon as the text can't be the beginning of one.

    The match that starts first in the text ends it. If several start there, the shortest wins, because it is complete
    first. It makes no difference how the text is divided into pieces. Strings are compared character by character,
    without Unicode normalization.

    Attributes:
        matched: the stop string that ended the text; None until then.
    """

    def __init__(self, stops: Sequence[str] = ()):
        self.matched: str | None = None
        self._searches = [_Search(stop) for stop in stops]
        self._held = ""  # the end of the text read so far, which was not released yet
        self._match: tuple[int, str] | None = None  # the first match so far, as (start in `_held`, stop string)

    @staticmethod
    def of(stop: str | Sequence[str] | None) -> "StopStrings":
        """Checks one stop string or several. Empty strings are ignored; None means no stop strings.

        Raises:
            ValueError: a value is not a string, there are more than 16, or one has more than 1024 characters.
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
        """Takes the next piece of text and returns what can be shown now; "" once a stop string has matched."""
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
        """Returns the rest of the text after the last piece."""
        if self._match is not None:
            start, self.matched = self._match
            shown, self._held, self._match = self._held[:start], "", None
            return shown
        return self._release(len(self._held))

    def _first_open(self, end: int) -> int:
        """Returns where the earliest beginning of a stop string starts in the text up to `end`."""
        return end - max((search.length for search in self._searches), default=0)

    def _release(self, count: int) -> str:
        if self._match is not None:
            self._match = self._match[0] - count, self._match[1]
        shown, self._held = self._held[:count], self._held[count:]
        return shown


class _Search:
    """The search for one stop string by Knuth, Morris and Pratt (1977): amortised constant time per character."""

    def __init__(self, stop: str):
        self.stop = stop
        self.length = 0  # the length of the longest proper prefix of `stop` that the text ends with
        # for each prefix of `stop`, the length of the longest shorter prefix that it ends with
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
