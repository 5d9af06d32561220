"""Divides the text of an answer, as it comes, into reasoning, content and tool calls.

The format is that of Qwen's chat templates: reasoning ends at `</think>`, and each call of a tool is
`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`. How the text is cut into pieces makes no difference to what
comes out, apart from how it is divided over deltas.
"""

import json
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

THINK_START, THINK_END = "<think>", "</think>"
CALL_START, CALL_END = "<tool_call>", "</tool_call>"
_SPACE = " \t\r\n"
_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*(?=\{)')
_HEAD_CHARACTERS = 1024  # a call whose arguments don't begin by then is given out at its end


@dataclass
class CallDelta:
    """The next part of one tool call: its first delta has the id and the name, the others have arguments only."""

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""


@dataclass
class Delta:
    """What is new in an answer."""

    content: str = ""
    reasoning: str = ""
    calls: list[CallDelta] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.content or self.reasoning or self.calls)


class OutputParser:
    """Parses one answer.

    Attributes:
        calls: number of tool calls so far, the unfinished one included.
        calls_done: number of finished ones.
        reasoning: whether the text is reasoning now.
    """

    def __init__(self, *, thinks: bool = False, in_reasoning: bool = False, tools: bool = False):
        """
        Args:
            thinks: whether the model's template knows `<think>`; otherwise it is ordinary text.
            in_reasoning: whether the prompt already opened the reasoning.
            tools: whether the request has tools; otherwise `<tool_call>` is ordinary text.
        """
        self.calls, self.calls_done = 0, 0
        self.reasoning = in_reasoning
        self._tools = tools
        self._held = ""  # text that was read and whose place isn't known yet
        self._call = _Call(0)
        # each state takes from `_held`, and returns whether the next state may find more
        self._state: Callable[[Delta, bool], bool] = self._at_start if thinks else self._in_content
        if in_reasoning:
            self._begin(self._in_reasoning, "\n")

    def feed(self, text: str) -> Delta:
        """Takes the next piece and returns what can be told."""
        self._held += text
        return self._run(last=False)

    def finish(self) -> Delta:
        """Returns the rest, after the last piece."""
        return self._run(last=True)

    def _run(self, last: bool) -> Delta:
        delta = Delta()
        while self._state(delta, last):
            pass
        return delta

    def _begin(self, section: Callable[[Delta, bool], bool], skipped: str) -> None:
        """Makes `section` the next state, after characters of layout."""

        def skip(_delta: Delta, _last: bool) -> bool:
            self._held = self._held.lstrip(skipped)
            if self._held:
                self._state = section
            return bool(self._held)

        self._state = skip

    def _at_start(self, _delta: Delta, last: bool) -> bool:
        """Before anything was written: the model may open its reasoning by itself."""
        text = self._held.lstrip(_SPACE)
        if len(text) < len(THINK_START) and THINK_START.startswith(text) and not last:
            return False
        if text.startswith(THINK_START):
            self._held = text[len(THINK_START) :]
            self.reasoning = True
            self._begin(self._in_reasoning, "\n")
        else:
            self._state = self._in_content
        return True

    def _in_reasoning(self, delta: Delta, last: bool) -> bool:
        shown, ended = self._until(THINK_END, last)
        delta.reasoning += shown
        if ended:
            self.reasoning = False
            self._begin(self._in_content, "\n")
        return ended

    def _in_content(self, delta: Delta, last: bool) -> bool:
        if not self._tools:
            delta.content, self._held = delta.content + self._held, ""
            return False
        shown, ended = self._until(CALL_START, last)
        delta.content += shown
        if ended:
            self._call = _Call(self.calls)
            self.calls += 1
            self._state = self._in_call
        return ended

    def _in_call(self, delta: Delta, last: bool) -> bool:
        text, ended = self._until(CALL_END, last, trims=False)
        self._call.feed(text)
        if ended or last:
            if (text := self._call.finish()) is None:
                self.calls_done += 1
            else:
                self.calls -= 1
                delta.content += CALL_START + text + (CALL_END if ended else "")
            self._begin(self._in_content, _SPACE)
        delta.calls += self._call.take()
        return ended

    def _until(self, marker: str, last: bool, trims: bool = True) -> tuple[str, bool]:
        """Takes what precedes the marker from `_held`: (text, whether the marker came).

        What may be the marker's beginning stays, and so do the blanks before it, which are layout if it comes.
        """
        text, found, after = self._held.partition(marker)
        if found:
            self._held = after
            return text.rstrip(_SPACE) if trims else text, True
        shown = len(text) if last else len(text) - _overlap(text, marker)
        if trims and not last:
            shown = len(text[:shown].rstrip(_SPACE))
        self._held = text[shown:]
        return text[:shown], False


def _overlap(text: str, marker: str) -> int:
    """Returns the length of the longest end of `text` that begins `marker`."""
    longest = min(len(text), len(marker) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(marker[:n])), 0)


class _Call:
    """One tool call: its name is given out once, whole, and then its arguments as they are written.

    The arguments are the model's own characters. A call in which they come before the name, or as a string, is given
    out at its end.
    """

    def __init__(self, index: int):
        self._index = index
        self._text = ""
        self._deltas: list[CallDelta] = []
        self._named = False
        self._depth, self._quoted, self._escaped = 0, False, False  # of the arguments so far
        self._whole = False  # whether the arguments have ended

    def feed(self, text: str) -> None:
        if self._named:
            self._arguments(text)
            return
        self._text += text
        if len(self._text) - len(text) < _HEAD_CHARACTERS and (head := _HEAD.match(self._text)):
            self._name(json.loads(head[1], strict=False))
            self._arguments(self._text[head.end() :])

    def take(self) -> list[CallDelta]:
        """Returns the deltas since the last time."""
        deltas, self._deltas = self._deltas, []
        return deltas

    def finish(self) -> str | None:
        """Gives out the rest; returns the text if it is not a call."""
        if self._named:
            return None
        try:
            call = msgspec.json.decode(self._text)
            name, arguments = call["name"], call.get("arguments", {})
            if not isinstance(name, str):
                return self._text
        except (msgspec.DecodeError, KeyError, TypeError, AttributeError):
            return self._text
        self._name(name)
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        self._deltas.append(CallDelta(self._index, arguments=text))
        return None

    def _name(self, name: str) -> None:
        self._named = True
        self._deltas.append(CallDelta(self._index, f"call_{secrets.token_hex(12)}", name))

    def _arguments(self, text: str) -> None:
        """Gives out `text` up to the brace that closes the arguments."""
        if self._whole:
            return
        end = len(text)
        for place, character in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._quoted:
                self._escaped, self._quoted = character == "\\", character != '"'
            elif character == '"':
                self._quoted = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self._whole, end = True, place + 1
                    break
        if text[:end]:
            self._deltas.append(CallDelta(self._index, arguments=text[:end]))
