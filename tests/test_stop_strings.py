"""Stop strings read piece by piece, against `str.find` on the whole text."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from deepstack_jax.processing.stop_strings import StopStrings


def shown_and_matched(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The text before the stop string that starts first, the shortest of several, and that string."""
    found = [(text.find(stop), stop) for stop in stops if stop and stop in text]
    if not found:
        return text, None
    start, stop = min(found, key=lambda match: (match[0], len(match[1])))
    return text[:start], stop


def certain(text: str, stops: list[str]) -> str:
    """What every continuation of `text` shows: all in front of the first place where a stop string may still start."""
    for start in range(len(text)):
        rest = text[start:]
        if any(stop and (rest.startswith(stop) or stop.startswith(rest)) for stop in stops):
            return text[:start]
    return text


def read(pieces: list[str], stop: str | list[str] | None) -> tuple[str, str | None]:
    stops = StopStrings.of(stop)
    shown = "".join([stops.feed(piece) for piece in pieces])
    return shown + stops.finish(), stops.matched


# few characters make many overlaps: two letters, one that is two code points, one outside the basic plane
texts = st.text(alphabet="abe\u0301\U0001f600", max_size=24)
stop_lists = st.lists(st.text(alphabet="abe\u0301\U0001f600", max_size=5), max_size=5)


@given(pieces=st.lists(texts, max_size=6), stops=stop_lists)
@example(pieces=["abcd", "efg"], stops=["bcd", "abcdefg"])
@example(pieces=["abcd", "efx"], stops=["bcd", "abcdefg", "cde"])
@example(pieces=["aab"] * 3, stops=["aabaaa", "abaac", "aac"])
def test_pieces_show_what_the_whole_text_shows(pieces: list[str], stops: list[str]):
    whole = "".join(pieces)
    assert read(pieces, stops) == shown_and_matched(whole, stops)
    assert read(list(whole), stops) == shown_and_matched(whole, stops)


@given(text=texts, stops=stop_lists)
def test_text_is_shown_as_soon_as_it_is_certain(text: str, stops: list[str]):
    reader, shown = StopStrings.of(stops), ""
    for end, character in enumerate(text, 1):
        shown += reader.feed(character)
        assert shown == certain(text[:end], stops)
        # a match is told as soon as no stop string that started before it can still be completed
        if reader.matched is not None:
            assert (shown, reader.matched) == shown_and_matched(text, stops)
        elif (match := shown_and_matched(text[:end], stops))[1] is not None:
            start = len(match[0])
            assert any(stop.startswith(text[i:end]) for stop in stops for i in range(start))


@pytest.mark.parametrize(
    ("pieces", "stop", "shown", "matched"),
    [
        (["Hello", " world"], None, "Hello world", None),
        (["Hello", " world"], [], "Hello world", None),
        (["Hello", " world"], "", "Hello world", None),
        (["Hello", " world"], ["", "o w"], "Hell", "o w"),
        (["Hello", " world"], "Hello", "", "Hello"),
        (["Hello", " world"], "world", "Hello ", "world"),
        (["Hello", " wor"], "world", "Hello wor", None),  # the beginning of one at the end of the text is text
        (["a\n", "\nb"], ["\n\n"], "a", "\n\n"),
        (["x", "", "", "yz"], "xy", "", "xy"),
        (["one. two. three"], ["three", "two"], "one. ", "two"),
        (["<|im_", "end|>"], ["<|im_end|>", "<|im"], "", "<|im"),
        (["日", "本", "語"], "本語", "日", "本語"),
        (["👩", "\u200d", "👩"], "\u200d👩", "👩", "\u200d👩"),
        (["e\u0301"], "\u00e9", "e\u0301", None),  # the same letter, but other characters
        (["STOP stop"], "stop", "STOP ", "stop"),
        (["aaaa"], ["aa", "aa", "aa"], "", "aa"),
        (["\ufffd", "a\ufffd"], "a\ufffd", "\ufffd", "a\ufffd"),
    ],
)
def test_stop_strings_end_a_text(pieces: list[str], stop: str | list[str] | None, shown: str, matched: str | None):
    assert read(pieces, stop) == (shown, matched)


def test_nothing_is_given_out_after_a_match():
    stops = StopStrings.of(("b",))
    assert (stops.feed("abc"), stops.feed("abc"), stops.finish(), stops.finish()) == ("a", "", "", "")
    assert stops.matched == "b"


def test_the_end_of_a_text_is_given_out_once():
    stops = StopStrings.of("abc")
    assert (stops.feed("xab"), stops.finish(), stops.finish()) == ("x", "ab", "")
    assert stops.matched is None


def test_a_match_that_waits_for_an_earlier_one_ends_the_text_where_that_fails():
    stops = StopStrings.of(["bc", "abcd"])
    assert (stops.feed("xabc"), stops.matched) == ("x", None)
    assert (stops.feed("x"), stops.matched) == ("a", "bc")
    stops = StopStrings.of(["bc", "abcd"])
    assert (stops.feed("xabc"), stops.finish(), stops.matched) == ("x", "a", "bc")


def test_as_many_and_as_long_stop_strings_as_there_may_be():
    longest = [chr(ord("a") + i) * 1023 + "." for i in range(16)]
    text = "-" + "a" * 1500 + "b" * 1022 + "." + longest[5] + "rest"
    expected = shown_and_matched(text, longest)
    assert expected[1] == longest[5]
    sizes = np.random.default_rng(0).integers(1, 40, len(text))
    ends = np.cumsum(sizes)
    pieces = [text[end - size : end] for end, size in zip(ends, sizes, strict=True) if end - size < len(text)]
    assert "".join(pieces) == text
    assert read(pieces, longest) == expected
    assert read(["ab"], ["", "", *longest, *longest]) == ("ab", None)  # empty ones and repetitions don't count


@pytest.mark.parametrize(
    ("stop", "message"),
    [
        (5, "stop 5 is not a string: give a string or a list of strings"),
        (b"end", "stop b'end' is not a string: give a string or a list of strings"),
        ({"a": 1}, "stop {'a': 1} is not a string"),
        (["a", None], "stop[1] None is not a string: give a string or a list of strings"),
        (["a", ["b"]], "stop[1] ['b'] is not a string"),
        (["a", "b" * 1025], "stop 'bbbbbbbbbbbb...bbbbbbbbbbbbb' has 1025 characters: give at most 1024"),
        ("b" * 1025, "has 1025 characters: give at most 1024"),
        ([str(i) for i in range(17)], "stop ['0', '1', '2', '3', '4', '5', ...] has 17 strings: give at most 16"),
    ],
)
def test_what_is_not_a_list_of_stop_strings_is_refused(stop: object, message: str):
    with pytest.raises(ValueError) as error:
        StopStrings.of(stop)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
