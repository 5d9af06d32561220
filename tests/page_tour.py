"""A walk through the page's views, each with all that it can show."""

from collections.abc import Iterator
from pathlib import Path

from playwright.sync_api import Page

from tests.browser import ask, open_view

PICTURES = [Path(__file__).parent.parent / "docs" / "tiny-vl" / f"picture-{number}.png" for number in range(4)]


def tour(page: Page, url: str, picture: Path) -> Iterator[str]:
    """Opens each view of a server with --research in an encode node and a language node; yields its name."""
    open_view(page, url)
    ask(page, "Describe this picture.", picture)
    yield "chat"
    page.get_by_role("button", name="See its DeepStack").click()
    page.get_by_role("switch", name="level 2").uncheck()
    page.get_by_role("button", name="Ask with these levels").click()
    page.locator(".variant").nth(1).locator(".note").wait_for()
    yield "deepstack"
    page.get_by_role("tab", name="Tokens").click()
    page.locator("#view-tokens .experts").wait_for()
    yield "tokens"
    page.get_by_role("tab", name="Cluster").click()
    page.locator(".node").nth(1).wait_for()
    yield "cluster"
