"""A timeline in a terminal: one bar per stage, to scale."""

from collections.abc import Sequence
from typing import NamedTuple

from rich.bar import Bar
from rich.table import Table
from rich.text import Text

COLORS = {"prepare": "blue", "encode": "magenta", "prefill": "cyan", "decode": "green"}
ROUND_COLOR = "yellow"
MAX_ROUNDS = 6  # in rows of their own


class Span(NamedTuple):
    """A stage, in seconds since the request's start."""

    stage: str
    begin: float
    end: float


def draw(spans: Sequence[Span], columns: int, ascii_only: bool = False) -> Table:
    """Rows of stage, milliseconds and a bar, together `columns` characters wide.

    All bars have one scale, the end of the last span; each is at least a cell long. Without Unicode a bar is made of #.
    """
    width = max(columns - 23, 10)
    total = max((span.end for span in spans), default=1.0)
    cell = total / width
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", width=9, no_wrap=True)
    table.add_column(justify="right", width=10, no_wrap=True)
    table.add_column(no_wrap=True)
    for stage, begin, end in _merged(spans):
        first = min(begin, total - cell)
        last = max(end, first + cell)
        color = COLORS.get(stage, ROUND_COLOR)
        if ascii_only:
            start = round(first / cell)
            bar = Text(" " * start + "#" * max(round(last / cell) - start, 1), color)
        else:
            bar = Bar(total, first, last, width=width, color=color)
        table.add_row(stage, f"{(end - begin) * 1e3:,.1f} ms", bar)
    return table


def _merged(spans: Sequence[Span]) -> list[Span]:
    """The spans, all rounds in one if they are many."""
    rounds = [span for span in spans if span.stage not in COLORS]
    if len(rounds) <= MAX_ROUNDS:
        return list(spans)
    all_rounds = Span(f"{len(rounds)} rounds", rounds[0].begin, rounds[-1].end)
    return [span for span in spans if span.stage in COLORS and span.begin <= all_rounds.begin] + [
        all_rounds,
        *(span for span in spans if span.stage in COLORS and span.begin > all_rounds.begin),
    ]
