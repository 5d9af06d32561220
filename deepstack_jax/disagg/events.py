"""The latest things that happened to the nodes that this one knows, for people who watch."""

import time
from collections import deque
from dataclasses import dataclass

MAX_EVENTS = 50
MAX_TEXT = 300  # characters


@dataclass(frozen=True)
class Event:
    """What happened at a time of time.monotonic(), and to which node. Neither text has an address."""

    at: float
    node: str
    what: str


class Events(deque[Event]):
    """The newest events, oldest first."""

    def __init__(self) -> None:
        super().__init__(maxlen=MAX_EVENTS)

    def add(self, node: str, what: str) -> None:
        """Adds what happened now."""
        self.append(Event(time.monotonic(), node, what[:MAX_TEXT]))
