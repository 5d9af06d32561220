"""The demo's timeline: bars stand where their spans do."""

import io

import pytest
from rich.console import Console

from deepstack_jax.cli.timeline import MAX_ROUNDS, Span, draw

WIDTH = 40
SPANS = [Span("prepare", 0, 1), Span("encode", 1, 4), Span("round 1", 4, 4.001), Span("decode", 6, 8)]


def rows(spans: list[Span], ascii_only: bool) -> dict[str, tuple[str, str]]:
    """(milliseconds, bar) of each stage."""
    console = Console(file=io.StringIO(), width=100, color_system=None)
    console.print(draw(spans, WIDTH + 23, ascii_only))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    return {line[:9].strip(): (line[11:21].strip(), line[23:].rstrip()) for line in lines if line.strip()}


@pytest.mark.parametrize("ascii_only", [False, True])
def test_bars_are_to_scale(ascii_only: bool):
    """8 seconds over 40 cells: five cells per second."""
    block = "#" if ascii_only else "█"
    assert rows(SPANS, ascii_only) == {
        "prepare": ("1,000.0 ms", block * 5),
        "encode": ("3,000.0 ms", " " * 5 + block * 15),
        "round 1": ("1.0 ms", " " * 20 + block),
        "decode": ("2,000.0 ms", " " * 30 + block * 10),
    }


@pytest.mark.parametrize("ascii_only", [False, True])
def test_every_span_shows_even_the_last_and_shortest(ascii_only: bool):
    found = rows([Span("decode", 0, 10), Span("end", 10, 10)], ascii_only)
    assert found["end"][1] == " " * (WIDTH - 1) + ("#" if ascii_only else "█")


def test_many_rounds_are_one_row():
    rounds = [Span(f"round {i}", i, i + 1) for i in range(1, MAX_ROUNDS + 2)]
    found = rows([Span("encode", 0, 1), *rounds, Span("decode", 8, 10)], False)
    assert list(found) == ["encode", f"{MAX_ROUNDS + 1} rounds", "decode"]
    assert found[f"{MAX_ROUNDS + 1} rounds"][1] == " " * 4 + "█" * 28
