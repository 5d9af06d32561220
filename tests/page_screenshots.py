"""Makes the screenshots of docs/page.md: the four views, in light and dark, of a split pair with tiny-vl.

make screenshots
"""

import io
from pathlib import Path

from PIL import Image

from tests.browser import chromium, watched
from tests.nodes import serving
from tests.page_tour import PICTURES, tour

FOLDER = Path(__file__).parent.parent / "docs" / "page"
SIZE = {"width": 1000, "height": 760}
MOST_BYTES = 200_000


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    with (
        serving(Path("tiny-vl"), "--role", "encode") as encode,
        serving(Path("tiny-vl"), "--role", "language", "--encoder", encode.control, "--research") as language,
        chromium() as browser,
    ):
        language.ask_when_connected(text="Hello?")
        with watched(browser, language.url) as tab:  # compiles the programs, which would take most of the timeline
            list(tour(tab.page, language.url, PICTURES[2]))
        for scheme, picture in (("light", PICTURES[0]), ("dark", PICTURES[1])):
            with watched(browser, language.url, viewport=SIZE, color_scheme=scheme) as tab:
                for view in tour(tab.page, language.url, picture):
                    save(tab.page.screenshot(), FOLDER / f"{view}-{scheme}.webp")


def save(png: bytes, path: Path) -> None:
    with Image.open(io.BytesIO(png)) as image:
        image.save(path, "WEBP", lossless=True, quality=100, method=6)
    assert path.stat().st_size < MOST_BYTES, path
    print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
