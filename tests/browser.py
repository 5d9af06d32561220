"""Chromium for the tests of the page, and what they watch wherever it is open: errors, other origins, the policy."""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from playwright.sync_api import Browser, ConsoleMessage, Page, Request, expect, sync_playwright

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MISSING = "no chromium in PATH: install it (Debian: apt-get install --yes chromium)"
AXE = "axe-core@4.10.3"
AXE_CACHE = Path(__file__).parent.parent / "build" / "axe-core"
TIMEOUT_MS = 120_000  # servers compile on their first requests, on machines that are busy
VIEWS = ("chat", "deepstack", "tokens", "cluster")
SCHEMES: tuple[Literal["light", "dark"], ...] = ("light", "dark")
REFUSED = "Failed to load resource: the server responded with a status of "


@contextmanager
def chromium() -> Iterator[Browser]:
    """Debian's browser, without a window; its camera shows a test picture."""
    camera = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    expect.set_options(timeout=TIMEOUT_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=camera)
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Watched:
    """A tab, and what went wrong in it.

    Attributes:
        refusals: statuses of failed answers that the test asks for; all others are errors.
    """

    page: Page
    origin: str
    errors: list[str] = field(default_factory=list)
    refusals: tuple[int, ...] = ()

    def on_console(self, message: ConsoleMessage) -> None:
        """Violations of the policy come here too."""
        expected = any(message.text.startswith(f"{REFUSED}{status}") for status in self.refusals)
        if message.type in ("error", "warning") and not expected:
            self.errors.append(message.text)

    def on_request(self, request: Request) -> None:
        parts = urlsplit(request.url)
        if parts.scheme not in ("data", "blob") and f"{parts.scheme}://{parts.netloc}" != self.origin:
            self.errors.append(f"a request to {request.url[:100]}")


@contextmanager
def watched(browser: Browser, url: str, **options: Any) -> Iterator[Watched]:
    """A tab of a new profile, not yet opened on the page. At its end nothing may have gone wrong in it."""
    context = browser.new_context(**{"viewport": {"width": 1180, "height": 820}} | options)
    context.set_default_timeout(TIMEOUT_MS)
    tab = Watched(context.new_page(), url)
    tab.page.on("console", tab.on_console)
    tab.page.on("pageerror", lambda error: tab.errors.append(str(error)))
    tab.page.on("request", tab.on_request)
    try:
        yield tab
    finally:
        context.close()
    assert not tab.errors


def open_view(page: Page, url: str, view: str = "chat") -> None:
    """Opens the page on one of its views, and waits until it knows its server."""
    page.goto(f"{url}/#{view}")
    page.wait_for_selector("body[data-ready]")


def ask(page: Page, question: str, *pictures: Path | dict[str, Any]) -> str:
    """Asks in the chat and returns the answer, once it has ended."""
    if pictures:
        page.locator("#files").set_input_files(list(pictures))
        page.locator("#attached li").nth(len(pictures) - 1).wait_for()
    page.locator("#question").fill(question)
    page.locator("#send").click()
    page.locator(".turn .answer").last.wait_for()
    return ended(page)


def ended(page: Page) -> str:
    """The text of the last answer of the chat, once it has ended."""
    page.locator(".turn").last.locator(".answer.done").wait_for()
    return page.locator(".turn").last.locator(".answer > .text").inner_text()


def axe_script() -> str | None:
    """The script of axe-core, None if npm is missing. It is downloaded once."""
    script = AXE_CACHE / "node_modules" / "axe-core" / "axe.min.js"
    if not script.exists():
        npm = shutil.which("npm")
        if npm is None:
            return None
        command = [npm, "install", "--prefix", str(AXE_CACHE), "--ignore-scripts", "--no-audit", "--no-fund", AXE]
        subprocess.run(command, check=True, capture_output=True)
    return script.read_text()
