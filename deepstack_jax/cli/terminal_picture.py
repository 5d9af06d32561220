"""Pictures in a terminal: two pixels per character cell, in 24-bit colour, or in shades if there is no colour."""

from itertools import groupby

import numpy as np
from PIL import Image
from rich.color import Color
from rich.style import Style
from rich.text import Text

from deepstack_jax.processing.images import load_image

UPPER_HALF = "▀"
SHADES = " .:-=+*#%@"  # from dark to light, for light letters on a dark ground


def draw(image: Image.Image, columns: int, color: bool = True) -> Text:
    """The picture as lines of text, `columns` characters wide, its aspect kept (a cell is twice as high as wide).

    In colour a cell is an upper half block: its letter colour is the upper pixel, its ground the lower one. The colours
    have 24 bits; rich brings them down to what its console can show. Pass `color=console.color_system is not None`:
    without colour a cell is one of ten ASCII characters, by lightness. Transparent is white, as the model sees it.

    Raises ValueError for fewer than one column, ImageError for what `load_image` refuses.
    """
    if columns < 1:
        raise ValueError(f"a picture of {columns} columns can't be drawn: give 1 or more")
    picture = load_image(image)
    rows = max(round(columns * picture.height / picture.width / 2), 1)
    if color:
        return _half_blocks(picture.resize((columns, 2 * rows), Image.Resampling.BOX))
    return _shades(picture.convert("L").resize((columns, rows), Image.Resampling.BOX))


def _half_blocks(picture: Image.Image) -> Text:
    lines = []
    pixels = np.asarray(picture).tolist()
    for upper, lower in zip(pixels[::2], pixels[1::2], strict=True):
        line = Text(no_wrap=True)
        for (above, below), cells in groupby(zip(upper, lower, strict=True)):  # one escape sequence a run of cells
            style = Style(color=Color.from_rgb(*above), bgcolor=Color.from_rgb(*below))
            line.append(UPPER_HALF * len(list(cells)), style)
        lines.append(line)
    return Text("\n", no_wrap=True).join(lines)


def _shades(picture: Image.Image) -> Text:
    levels, width = picture.tobytes(), picture.width
    text = "".join(SHADES[level * len(SHADES) // 256] for level in levels)
    return Text("\n".join(text[start : start + width] for start in range(0, len(text), width)), no_wrap=True)
