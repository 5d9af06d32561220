"""The page in a real browser, against real servers of tiny-vl: a split pair, and a whole server with an API key."""

import io
import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from playwright.sync_api import Browser, Page, Route, expect

from deepstack_jax.demo.samples import sample
from tests.browser import (
    CHROMIUM,
    MISSING,
    SCHEMES,
    VIEWS,
    Watched,
    ask,
    axe_script,
    chromium,
    ended,
    open_view,
    watched,
)
from tests.films import write_video
from tests.nodes import ServeNode, serving
from tests.page_tour import PICTURES, tour

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=MISSING)

ROOT = Path(__file__).parent.parent
PICTURE = PICTURES[0]
STATIC = ROOT / "deepstack_jax" / "serving" / "page" / "static"
TINY = Path("tiny-vl")
KEY = "dsj-the-key-of-the-test"
MOST = 8_000_000  # bytes of media
LONG = 4000  # tokens of an answer that nobody waits for


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def encode() -> Iterator[ServeNode]:
    with serving(TINY, "--role", "encode") as node:
        yield node


@pytest.fixture(scope="module")
def language(encode: ServeNode) -> Iterator[ServeNode]:
    options = ("--encoder", encode.control, "--encode-here", "--research", "--max-bytes", str(MOST))
    with serving(TINY, "--role", "language", *options) as node:
        node.ask_when_connected(text="Hello?")
        yield node


@pytest.fixture(scope="module")
def split(language: ServeNode) -> str:
    """Its URL."""
    return language.url


@pytest.fixture(scope="module")
def locked() -> Iterator[str]:
    """A whole server with a key and without research."""
    with serving(TINY, "--api-key", KEY) as node:
        yield node.url


@pytest.fixture
def tab(browser: Browser, split: str) -> Iterator[Watched]:
    with watched(browser, split) as tab:
        open_view(tab.page, split)
        yield tab


@pytest.fixture
def page(tab: Watched) -> Page:
    return tab.page


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 MB that call themselves a picture."""
    path = tmp_path_factory.mktemp("large") / "photo.png"
    path.write_bytes(bytes(30_000_000))
    return path


def give_key(page: Page, key: str) -> None:
    page.locator("#key").fill(key)
    page.get_by_role("button", name="Use the key").click()


# ---- the chat


def test_a_picture_and_a_question_get_the_right_answer(page: Page):
    assert ask(page, "How many black shapes are there?", PICTURE) == "There are three."


def test_the_next_turn_sends_the_earlier_ones_again(page: Page):
    first = ask(page, "Read the number.", PICTURE)
    with page.expect_request("**/v1/chat/completions") as sent:
        assert ask(page, "<b>Is there a star?</b>")
    asked, *later = sent.value.post_data_json["messages"]
    picture, question = asked["content"]
    assert picture["image_url"]["url"].startswith("data:image/png;base64,")
    assert question == {"type": "text", "text": "Read the number."}
    assert later == [
        {"role": "assistant", "content": first},
        {"role": "user", "content": [{"type": "text", "text": "<b>Is there a star?</b>"}]},
    ]
    expect(page.locator("#welcome")).to_be_hidden()
    assert page.locator(".asked .text").all_inner_texts() == ["Read the number.", "<b>Is there a star?</b>"]


def test_two_pictures_are_one_question(page: Page):
    answer = ask(page, "Which picture shows more shapes?", PICTURES[0], PICTURES[3])
    assert answer == "The first."
    assert page.locator(".turn .asked img").count() == 2


def test_a_video_is_answered_and_its_frames_are_shown(page: Page, tmp_path: Path):
    clip = sample(1, "clip")
    asked = next(each for each in clip.exchanges if each.family == "clip_count")
    frames = np.stack([np.asarray(frame.convert("RGB")) for frame in clip.video])
    height, width = (size // 2 * 2 for size in frames.shape[1:3])  # the codec's pairs of pixels
    film = write_video(tmp_path / "clip.webm", frames[:, :height, :width], 4, "libvpx-vp9")
    assert ask(page, asked.question, film) == asked.answer
    page.get_by_role("button", name="See its DeepStack").click()
    page.get_by_label("Frame").fill("2")
    expect(page.locator(".heat label output")).to_have_text("2 of 2")
    page.locator(".heat .grid").nth(1).focus()
    expect(page.locator(".heat > .detail")).to_contain_text("row 0, column 0: embeddings ")


def test_pictures_come_by_drop_paste_camera_and_samples(page: Page):
    give = """([kind, bytes]) => {
        const files = new DataTransfer();
        files.items.add(new File([new Uint8Array(bytes)], kind + ".png", {type: "image/png"}));
        const event = kind === "drop" ? new DragEvent("drop", {dataTransfer: files, bubbles: true, cancelable: true})
            : new ClipboardEvent("paste", {clipboardData: files, bubbles: true, cancelable: true});
        document.querySelector("#question").dispatchEvent(event);
    }"""
    attached = page.locator("#attached img")
    for count, kind in enumerate(("drop", "paste"), 1):
        page.evaluate(give, [kind, list(PICTURE.read_bytes())])
        expect(attached).to_have_count(count)
    page.locator("#camera").click()
    expect(page.locator("#camera-video")).to_have_js_property("paused", False)
    page.wait_for_function("() => document.querySelector('#camera-video').videoWidth > 0")
    page.get_by_role("button", name="Take the picture").click()
    expect(attached).to_have_count(3)
    page.get_by_role("button", name="Remove camera.png").click()
    expect(attached).to_have_count(2)
    page.locator("#samples button").first.click()  # begins a new question
    expect(attached).to_have_count(1)
    expect(page.locator("#welcome")).to_be_visible()
    assert page.locator("#question").input_value() == "Describe the picture."


def test_a_drawn_picture_has_its_truth_beside_the_answer(page: Page):
    page.route("**/page/draw", lambda route: route.continue_(post_data='{"seed": 5}'))
    page.get_by_role("button", name="Draw me a new one").first.click()
    expect(page.locator("#attached img")).to_have_count(1)
    truth = next(each.answer for each in sample(5, "picture").exchanges if each.question == question_of(page))
    page.locator("#send").click()
    assert ended(page) == truth
    page.get_by_role("button", name="Draw me a new one").first.click()  # the same one again
    expect(page.locator("#attached img")).to_have_count(1)
    with page.expect_request("**/v1/chat/completions") as sent:
        page.locator("#send").click()
    assert len(sent.value.post_data_json["messages"]) == 1  # it begins a new chat
    expect(page.locator(".divider")).to_have_count(1)
    assert ended(page) == truth
    assert page.locator(".truth.right").last.inner_text() == f"✓ right The truth: {truth}"


def question_of(page: Page) -> str:
    return page.locator("#question").input_value()


def test_an_answer_streams_and_stops(page: Page, language: ServeNode):
    """The browser's request is changed to one for a long answer."""

    def longer(route: Route) -> None:
        body = json.loads(route.request.post_data or "")
        route.continue_(post_data=json.dumps(body | {"ignore_eos": True, "min_tokens": LONG, "max_tokens": LONG}))

    before = language.metrics()["generation_tokens_total"]
    page.route("**/v1/chat/completions", longer)
    page.locator("#files").set_input_files(PICTURE)
    page.locator("#attached img").wait_for()
    page.locator("#question").fill("Describe this picture.")
    page.locator("#send").click()
    text = page.locator(".answer > .text")
    expect(text).to_contain_text("A small black star")
    assert page.locator(".answer").get_attribute("aria-busy") == "true"
    page.get_by_role("button", name="Stop").click()
    expect(page.locator(".answer .note").first).to_have_text("Stopped.")
    stopped = text.inner_text()
    page.unroute("**/v1/chat/completions")
    assert ask(page, "Read the number.")
    assert page.locator(".answer > .text").first.inner_text() == stopped
    expect(page.locator("#announcer")).to_contain_text("Answer:")
    assert language.metrics()["generation_tokens_total"] - before < LONG  # the server has given it up too


def test_requests_are_copied_as_programs_that_run(browser: Browser, split: str):
    with watched(browser, split, permissions=["clipboard-read", "clipboard-write"]) as tab:
        open_view(tab.page, split)
        answer = ask(tab.page, "Read the number.", PICTURE)
        copied = {}
        for name in ("curl", "Python", "JSON"):
            tab.page.get_by_role("button", name=f"Copy as {name}").click()
            expect(tab.page.locator("#announcer")).to_have_text(f"Copied as {name}.")
            copied[name] = tab.page.evaluate("navigator.clipboard.readText()")
    body = json.loads(copied["JSON"])
    assert [part["type"] for part in body["messages"][0]["content"]] == ["image_url", "text"]
    printed = io.StringIO()
    with redirect_stdout(printed):
        exec(compile(copied["Python"], "copied", "exec"), {})
    assert printed.getvalue().strip() == answer
    if shutil.which("curl"):
        shell = subprocess.run(["sh", "-c", copied["curl"]], capture_output=True, text=True, check=True)
        assert json.loads(shell.stdout)["choices"][0]["message"]["content"] == answer


# ---- errors


def test_a_tab_in_which_something_goes_wrong_fails_its_test(browser: Browser, split: str):
    """Otherwise the other tests would prove less: an error, a style that the policy forbids, another origin."""

    def run(script: str) -> None:
        with watched(browser, split) as tab:
            open_view(tab.page, split)
            tab.page.evaluate(script)
            while not tab.errors:  # it comes in a moment, and the test's time-out ends the wait
                tab.page.wait_for_timeout(10)

    wrong = (
        "() => { setTimeout(() => missing()); }",
        "() => document.body.setAttribute('style', 'color: red')",
        "() => fetch('http://127.0.0.1:9/').catch(() => null)",
    )
    for script in wrong:
        with pytest.raises(AssertionError):
            run(script)


def test_a_picture_that_is_too_large_is_refused_before_it_is_sent(tab: Watched, large: Path):
    sent: list[str] = []
    tab.page.on("request", lambda request: sent.append(request.url))
    tab.page.locator("#files").set_input_files(large)
    expect(tab.page.locator("#composer-error")).to_have_text(
        "Too large: photo.png has 30 MB, and the server takes 8 MB per request. "
        "Attach a smaller file, or start the server with a larger --max-bytes."
    )
    assert not [url for url in sent if url.startswith("http")]


def test_the_servers_own_refusal_of_a_large_picture_is_a_sentence(browser: Browser, split: str, tmp_path: Path):
    """It comes while the browser is still sending."""

    def without_limit(route: Route) -> None:
        route.fulfill(json=route.fetch().json() | {"max_bytes": 10**9})

    with watched(browser, split) as tab:
        tab.refusals = (413,)
        tab.page.route("**/page/info", without_limit)
        open_view(tab.page, split)
        larger = tmp_path / "photo.png"
        larger.write_bytes(bytes(21_000_000))  # as base64 more than a body may have
        ask(tab.page, "What is this?", larger)
        expect(tab.page.locator(".answer .error")).to_contain_text("bytes allowed: send less.")


def test_what_the_server_refuses_is_a_sentence_and_can_be_asked_again(tab: Watched):
    tab.refusals = (400,)
    ask(tab.page, "What is this?", {"name": "no.png", "mimeType": "image/png", "buffer": b"not a picture"})
    expect(tab.page.locator(".answer .error")).to_contain_text("not an image")
    assert question_of(tab.page) == "What is this?"
    assert tab.page.locator("#attached img").count() == 1


def test_a_server_that_is_gone_is_told(browser: Browser, split: str):
    with watched(browser, split) as tab:
        open_view(tab.page, split)
        tab.page.context.set_offline(True)
        ask(tab.page, "Are you there?")
        expect(tab.page.locator(".answer .error")).to_contain_text("The server can't be reached")
        tab.errors[:] = [error for error in tab.errors if "ERR_INTERNET_DISCONNECTED" not in error]


# ---- the key


def test_the_key_is_asked_for_and_forgotten_with_the_page(browser: Browser, locked: str):
    with watched(browser, locked) as tab:
        page, tab.refusals = tab.page, (401,)
        open_view(page, locked)
        page.locator("#question").fill("Hello?")
        page.locator("#send").click()
        expect(page.locator("#key-message")).to_have_text("This server answers only with an API key.")
        give_key(page, "dsj-another-key")
        expect(page.locator("#key-message")).to_have_text("The server does not know this key: type another one.")
        give_key(page, KEY)
        assert ended(page)
        assert page.locator(".timeline.whole .badge").inner_text() == "whole, on one node"
        page.reload()
        page.wait_for_selector("body[data-ready]")
        assert page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]
        assert page.context.cookies() == []
        assert KEY not in page.content()
        assert page.locator("#key").input_value() == ""
        page.locator("#question").fill("Hello?")
        page.locator("#send").click()
        expect(page.locator("#key-dialog")).to_be_visible()  # it is not known any more
        page.get_by_role("button", name="Cancel").click()
        expect(page.locator(".answer .error")).to_contain_text("needs an API key")


def test_views_that_are_off_say_how_to_switch_them_on(browser: Browser, locked: str):
    with watched(browser, locked) as tab:
        tab.refusals = (401,)
        open_view(tab.page, locked, "deepstack")
        expect(tab.page.locator("#view-deepstack .off")).to_contain_text("start the server with --research")
        tab.page.get_by_role("tab", name="Cluster").click()
        tab.page.get_by_role("button", name="Type the API key").click()
        give_key(tab.page, KEY)
        expect(tab.page.locator(".node")).to_have_count(1)
        tab.page.get_by_role("tab", name="Tokens").click()
        expect(tab.page.locator("#view-tokens .off")).to_contain_text("start the server with --research")
        tab.page.locator(
            "#view-tokens .token[aria-pressed=true]"
        ).wait_for()  # the answer's tokens are there all the same
        assert tab.page.locator(".likeliest li").count() == 5


# ---- what happened where


def test_the_timeline_of_a_split_answer_has_both_nodes(page: Page):
    ask(page, "Read the number.", PICTURE)
    figure = page.locator(".timeline.split")
    expect(figure.locator("svg .lane")).to_have_count(2)
    assert figure.locator(".badge").inner_text() == "split over 2 nodes"
    assert "on the wire" in figure.locator("figcaption").inner_text()
    figure.locator(".span.decode").first.hover()
    assert "token" in figure.locator(".detail").inner_text()
    figure.get_by_text("As a table").click()
    stages = " ".join(figure.locator("tbody th").all_inner_texts())
    assert figure.locator("tbody tr").count() == figure.locator("svg .span").count()
    assert stages


def test_a_token_of_the_picture_shows_its_numbers(page: Page):
    ask(page, "Describe this picture.", PICTURE)
    page.get_by_role("button", name="See its DeepStack").click()
    grids = page.locator("#view-deepstack .grid")
    expect(grids).to_have_count(5)  # the picture, the embeddings, three levels
    grids.nth(2).focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    readout = page.locator("#view-deepstack .heat .detail")
    expect(readout).to_contain_text("row 1, column 1: embeddings ")
    expect(readout).to_contain_text("level 2 ")
    grids.nth(1).hover(position={"x": 3, "y": 3})
    expect(readout).to_contain_text("row 0, column 0")


def test_without_a_level_the_description_changes_and_differences_are_marked(page: Page):
    ask(page, "Describe this picture.", PICTURE)
    page.get_by_role("button", name="See its DeepStack").click()
    page.get_by_role("switch", name="level 2").uncheck()
    page.get_by_role("button", name="Ask with these levels").click()
    all_levels, without = page.locator(".variant").nth(0), page.locator(".variant").nth(1)
    expect(without.locator(".note")).to_have_text("differences are marked")
    description = (
        "A small black star, a large orange square, a small black cross, a small black circle and a number.",
        "A small black star, a large orange square, a small black cross, a small black ring and a number.",
    )
    assert all_levels.locator(".text").inner_text() == description[0]
    assert without.locator("h3").inner_text() == "without level 2"
    assert without.locator(".text").inner_text() == description[1]
    assert without.locator("mark").all_inner_texts() == ["ring"]
    page.locator("#view-deepstack").get_by_role("button", name="Draw me a new one").click()
    expect(page.locator(".variant")).to_have_count(0)  # they were about another picture


def test_a_token_shows_what_else_was_likely_and_its_experts(page: Page):
    ask(page, "Read the number.", PICTURE)
    page.get_by_role("button", name="See its tokens").click()
    view = page.locator("#view-tokens")
    view.locator("section", has_text="Answer").get_by_text("7", exact=True).click()
    assert view.locator(".likeliest li").count() == 5
    assert view.locator(".likeliest .taken code").inner_text() == "7"
    squares = view.locator(".experts .chosen").count()
    view.get_by_text("As a table").click()
    assert squares == 2 * view.locator(".token-detail tbody tr").count() > 0
    expect(view.locator("summary", has_text="visual tokens")).to_have_count(1)
    view.locator("section", has_text="Prompt").locator("> .run > .token").first.focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.classList.contains('token')")


def test_the_cluster_is_polled_only_while_it_is_seen(browser: Browser, split: str):
    with watched(browser, split) as tab:
        page, polls = tab.page, []
        page.clock.install()
        page.on("request", lambda request: polls.append(request.url) if request.url.endswith("/cluster") else None)
        open_view(page, split, "cluster")
        expect(page.locator(".node[data-state=ready]")).to_have_count(2)
        with page.expect_response("**/cluster"):
            page.clock.run_for(1500)
        page.evaluate("Object.defineProperty(document, 'hidden', {value: true, configurable: true})")
        page.clock.run_for(1500)  # the wait that had begun ends
        seen = len(polls)
        page.clock.run_for(10_000)
        assert len(polls) == seen
        page.evaluate("delete document.hidden; document.dispatchEvent(new Event('visibilitychange'))")
        with page.expect_response("**/cluster"):
            page.clock.run_for(1500)


def test_differences_are_the_least_words_that_explain_them(page: Page):
    compare = "async ([base, text]) => (await import('/page/words.js')).compareWords(base, text)"
    same, new = True, False
    assert page.evaluate(compare, ["a ring and a star.", "a ring, a cat."]) == [
        ["", "a", same],
        [" ", "ring", same],
        ["", ",", new],
        [" ", "a", same],
        [" ", "cat", new],
        ["", ".", same],
    ]
    assert page.evaluate(compare, ["", "new"]) == [["", "new", new]]


def test_stages_that_ran_at_once_are_counted_once(page: Page):
    spans = [
        ("encode", 0, 10),
        ("encode", 5, 20),
        ("transfer", 18, 30),
        ("prefill", 8, 12),
        ("prefill", 10, 19),
        ("decode", 40, 50),
    ]
    some = [{"stage": stage, "begin_ms": begin, "end_ms": end} for stage, begin, end in spans]
    overlap = "async (spans) => (await import('/page/timeline.js')).overlap(spans, ['encode', 'transfer'], ['prefill'])"
    assert page.evaluate(overlap, some) == 11


# ---- everybody


def test_the_page_waits_until_the_model_is_loaded(browser: Browser, split: str):
    loading = ["true"]

    def answer(route: Route) -> None:
        route.fulfill(json={"role": None, "loading": True}) if loading else route.continue_()

    with watched(browser, split) as tab:
        tab.page.route("**/page/info", answer)
        tab.page.goto(split)
        expect(tab.page.locator("#banner")).to_have_text("The model is loading: the page opens as soon as it is ready.")
        loading.clear()
        expect(tab.page.locator("#server")).to_contain_text("tiny-vl · language")
        expect(tab.page.locator("#banner")).to_be_hidden()


def test_tabs_and_theme_work_with_the_keyboard(page: Page):
    page.get_by_role("tab", name="Chat").focus()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("tab", name="DeepStack")).to_be_focused()
    expect(page.get_by_role("tabpanel", name="DeepStack")).to_be_visible()
    page.keyboard.press("End")
    expect(page.get_by_role("tabpanel", name="Cluster")).to_be_visible()
    ground = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(ground)
    theme = page.locator("#theme")
    theme.press("Enter")
    theme.press("Enter")
    expect(theme).to_have_text("Theme: dark")
    assert page.evaluate(ground) != light


WIDTH_IN_NEXT_FRAME = """() => new Promise((tell) => {
    requestAnimationFrame(() => requestAnimationFrame(() => tell(document.documentElement.scrollWidth)));
})"""


@dataclass
class Seen:
    """What was found in one view.

    Attributes:
        serious: the rules of axe-core that are broken, with the first element, by colour scheme.
        phone: pixels that the view is wide where the window has 360.
    """

    serious: dict[str, list[tuple[str, str]]]
    phone: int


@pytest.fixture(scope="module")
def seen(browser: Browser, split: str) -> dict[str, Seen]:
    """Each view with all that it can show."""
    found, script = {}, axe_script()
    with watched(browser, split) as tab:
        if script:
            tab.page.context.add_init_script(script)
        for view in tour(tab.page, split, PICTURE):
            serious = {scheme: serious_violations(tab.page, scheme) if script else [] for scheme in SCHEMES}
            tab.page.set_viewport_size({"width": 360, "height": 740})
            found[view] = Seen(serious, tab.page.evaluate(WIDTH_IN_NEXT_FRAME))
            tab.page.set_viewport_size({"width": 1180, "height": 820})
    return found


def serious_violations(page: Page, scheme: Literal["light", "dark"]) -> list[tuple[str, str]]:
    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")  # a colour that fades in has no contrast yet
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
    return [(each["id"], each["nodes"][0]["html"]) for each in found if each["impact"] in ("serious", "critical")]


@pytest.mark.parametrize("view", VIEWS)
def test_no_view_is_wider_than_a_phone(seen: dict[str, Seen], view: str):
    assert seen[view].phone == 360


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("view", VIEWS)
def test_axe_finds_nothing_serious(seen: dict[str, Seen], view: str, scheme: str):
    if axe_script() is None:
        pytest.skip("no npm in PATH, which downloads axe-core")
    assert not seen[view].serious[scheme]


def test_the_page_is_small_and_loads_nothing_from_elsewhere():
    files = [path for path in STATIC.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 200_000
    for path in files:
        text = path.read_text()
        assert not [word for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "eval(") if word in text], path
        addresses = {part.split('"')[0] for part in text.split("http")[1:] if part.startswith(("://", "s://"))}
        assert addresses <= {"://www.w3.org/2000/svg"}, path


# ---- the last one, as it ends the encode node


def test_a_dead_encoder_turns_red_and_answers_still_come(page: Page, encode: ServeNode):
    page.get_by_role("tab", name="Cluster").click()
    node = page.locator(".node", has=page.locator("h3", has_text="encode"))
    expect(node).to_have_attribute("data-state", "ready")
    colour = "node => getComputedStyle(node).borderTopColor"
    alive = node.evaluate(colour)
    encode.process.kill()
    expect(node).to_have_attribute("data-state", "unreachable")
    assert node.evaluate(colour) != alive
    expect(node.locator(".badge")).to_have_text("✗ unreachable")
    expect(page.locator(".events li").first).to_contain_text("encode")
    page.get_by_role("tab", name="Chat").click()
    assert ask(page, "Tell me the color of the square.", PICTURE) == "It is orange."
    page.get_by_role("tab", name="Cluster").click()
    expect(page.locator(".events li", has_text="encoded here")).not_to_have_count(0)
