"""The output of a response as OpenAI's Responses API builds it: items, and the events that tell of them."""

import itertools
import secrets
from collections.abc import Iterator
from typing import Any

from deepstack_jax.serving.openai.output_parser import CallDelta, Delta

Event = dict[str, Any]


class ResponseItems:
    """The items of one response: reasoning, messages and function calls, in the order in which they are written.

    Attributes:
        items: those that were begun; all but the last one are whole.
    """

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self._open = False  # whether the last item may still grow
        self._numbers = itertools.count()

    def event(self, kind: str, **fields: Any) -> Event:
        """One event with its number in the stream."""
        return {"type": f"response.{kind}", "sequence_number": next(self._numbers), **fields}

    def feed(self, new: Delta, logprobs: list[dict[str, Any]]) -> Iterator[Event]:
        """Takes what is new in the answer; yields the events that tell of it."""
        if new.reasoning:
            yield from self._text("reasoning", "reasoning_text", new.reasoning)
        if new.content:
            yield from self._text("message", "output_text", new.content, logprobs)
        for call in new.calls:
            yield from self._call(call)

    def finish(self, whole: bool) -> Iterator[Event]:
        """Ends the last item; `whole` says whether the answer came to its end."""
        yield from self._close("completed" if whole else "incomplete")

    def _text(
        self, kind: str, part_kind: str, text: str, logprobs: list[dict[str, Any]] | None = None
    ) -> Iterator[Event]:
        if not self._open or self.items[-1]["type"] != kind:
            yield from self._begin(_new_item(kind))
            part = {"type": part_kind, "text": ""} | ({} if logprobs is None else {"annotations": [], "logprobs": []})
            yield self._told("content_part.added", content_index=0, part=dict(part))
            self.items[-1]["content"].append(part)
        part = self.items[-1]["content"][0]
        part["text"] += text
        more = {}
        if logprobs is not None:
            part["logprobs"] += logprobs
            more = {"logprobs": logprobs}
        yield self._told(f"{part_kind}.delta", content_index=0, delta=text, **more)

    def _call(self, call: CallDelta) -> Iterator[Event]:
        if call.name:
            item = {"type": "function_call", "id": _id("fc"), "call_id": call.id, "name": call.name, "arguments": ""}
            yield from self._begin(item)
        if call.arguments:
            self.items[-1]["arguments"] += call.arguments
            yield self._told("function_call_arguments.delta", delta=call.arguments)

    def _begin(self, item: dict[str, Any]) -> Iterator[Event]:
        yield from self._close("completed")
        self.items.append(item | {"status": "in_progress"})
        self._open = True
        yield self.event("output_item.added", output_index=len(self.items) - 1, item=_copy(self.items[-1]))

    def _close(self, status: str) -> Iterator[Event]:
        if not self._open:
            return
        self._open, item = False, self.items[-1]
        if item["type"] == "function_call":
            yield self._told("function_call_arguments.done", name=item["name"], arguments=item["arguments"])
        for part in item.get("content", []):
            more = {"logprobs": part["logprobs"]} if "logprobs" in part else {}
            yield self._told(f"{part['type']}.done", content_index=0, text=part["text"], **more)
            yield self._told("content_part.done", content_index=0, part=dict(part))
        item["status"] = status
        yield self.event("output_item.done", output_index=len(self.items) - 1, item=_copy(item))

    def _told(self, kind: str, **fields: Any) -> Event:
        """An event about the last item."""
        return self.event(kind, item_id=self.items[-1]["id"], output_index=len(self.items) - 1, **fields)


def _new_item(kind: str) -> dict[str, Any]:
    if kind == "reasoning":
        return {"type": kind, "id": _id("rs"), "summary": [], "content": []}
    return {"type": kind, "id": _id("msg"), "role": "assistant", "content": []}


def _copy(item: dict[str, Any]) -> dict[str, Any]:
    return item | ({"content": [dict(part) for part in item["content"]]} if "content" in item else {})


def _id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(16)}"
