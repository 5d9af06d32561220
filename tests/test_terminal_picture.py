"""Pictures in the terminal: what a terminal is told shows the picture's colours in their places."""

import io
import re
from typing import Literal

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from deepstack_jax.cli.terminal_picture import SHADES, draw

COLORS = {"red": (255, 0, 0), "green": (0, 128, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}


def quarters(width: int = 80, height: int = 40) -> Image.Image:
    """Red and green above blue and white."""
    picture = Image.new("RGB", (width, height), "red")
    picture.paste(COLORS["green"], (width // 2, 0, width, height // 2))
    picture.paste(COLORS["blue"], (0, height // 2, width // 2, height))
    picture.paste(COLORS["white"], (width // 2, height // 2, width, height))
    return picture


def printed(text, color_system: Literal["truecolor", "standard"] | None = "truecolor") -> str:
    console = Console(
        file=io.StringIO(), force_terminal=True, color_system=color_system, width=200, legacy_windows=False
    )
    console.print(text)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def pixels_of(escaped: str) -> np.ndarray:
    """What a terminal would show: uint8 [2 * lines, columns, 3], read from the escape sequences."""
    rows = []
    for line in escaped.rstrip("\n").split("\n"):
        upper, lower = [], []
        for codes, blocks in re.findall(r"\x1b\[([\d;]+)m(▀+)", line):
            above, below = re.fullmatch(r"38;2;(\d+;\d+;\d+);48;2;(\d+;\d+;\d+)", codes).groups()  # type: ignore[union-attr]
            upper += [[int(level) for level in above.split(";")]] * len(blocks)
            lower += [[int(level) for level in below.split(";")]] * len(blocks)
        rows += [upper, lower]
    return np.array(rows, np.uint8)


def test_a_terminal_in_colour_shows_the_picture():
    shown = pixels_of(printed(draw(quarters(), 16)))
    assert shown.shape == (8, 16, 3)
    np.testing.assert_array_equal(shown, np.asarray(quarters(16, 8)))


def test_one_pixel_a_half_cell_is_exact():
    noise = np.random.default_rng(0).integers(0, 256, (12, 9, 3), np.uint8)
    np.testing.assert_array_equal(pixels_of(printed(draw(Image.fromarray(noise), 9))), noise)


@pytest.mark.parametrize(("size", "lines"), [((80, 40), 5), ((40, 80), 20), ((64, 64), 10), ((400, 2), 1)])
def test_the_aspect_is_kept_in_both_forms(size, lines):
    for color in (True, False):
        drawn = draw(Image.new("RGB", size), 20, color).plain.split("\n")
        assert [len(line) for line in drawn] == [20] * lines


def test_without_colour_lightness_becomes_ascii():
    drawn = draw(quarters(80, 80), 8, color=False)
    lines = drawn.plain.split("\n")
    assert printed(drawn, None) == drawn.plain + "\n"
    assert drawn.plain.isascii()
    assert lines == [lines[0]] * 2 + [lines[3]] * 2
    red, green, blue, white = (SHADES.index(lines[row][column]) for row in (0, 3) for column in (0, 7))
    assert blue < green <= red < white == len(SHADES) - 1


def test_a_terminal_of_sixteen_colours_gets_those_alone():
    # Colours of no other test: rich remembers the codes of a style, whatever console they were for.
    picture = Image.new("RGB", (8, 4), (201, 3, 7))
    assert printed(draw(picture, 8), "standard") == f"\x1b[31;41m{'▀' * 8}\x1b[0m\n" * 2


def test_transparent_is_white_and_a_turned_photograph_is_upright():
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert (pixels_of(printed(draw(clear, 4))) == 255).all()
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees: to be shown 8 wide and 16 high
    Image.new("RGB", (16, 8), "blue").save(file, "PNG", exif=exif)
    assert draw(Image.open(file), 8).plain.count("\n") + 1 == 8


@pytest.mark.parametrize("columns", [0, -3])
def test_fewer_than_one_column_is_refused(columns):
    with pytest.raises(ValueError, match=rf"{columns} columns"):
        draw(quarters(), columns)
