"""The page's files and what it asks of the server: headers, rights, bounds, drawn pictures."""

import asyncio
import base64
import io
from collections.abc import Iterator

import httpx
import pytest
from PIL import Image

import deepstack_jax as dsj
from deepstack_jax.demo.samples import sample
from deepstack_jax.engine.options import EngineOptions
from deepstack_jax.serving.access import Access, Keys
from deepstack_jax.serving.hosts import HostRule
from deepstack_jax.serving.http import create_app
from deepstack_jax.serving.page import files
from deepstack_jax.serving.page.files import static_files
from deepstack_jax.serving.policy import MediaPolicy
from deepstack_jax.serving.text_node import TextNode
from tests.test_serving_http import serving

KEY = {"authorization": "Bearer sk-page"}
ACCESS = Access(Keys(["sk-page"]))


@pytest.fixture(scope="module")
def node() -> Iterator[TextNode]:
    model = dsj.load("tiny-vl", "float32")
    node = TextNode(model, MediaPolicy(), name="tiny-vl", engine=EngineOptions(slots=2), warm_up=False)
    yield node
    node.stop(0)
    asyncio.run(node.close())


@pytest.fixture(scope="module")
def client(node: TextNode) -> Iterator[httpx.Client]:
    with serving(create_app(node, MediaPolicy(max_bytes=1 << 20), access=ACCESS)) as client:
        yield client


def test_the_page_and_its_files_come_with_headers_that_keep_other_sites_out(client: httpx.Client):
    paths = ["/", *(f"/page/{name}" for name in static_files())]
    for path in paths:
        response = client.get(path)
        assert response.status_code == 200, path
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["cross-origin-resource-policy"] == "same-origin"
        assert "access-control-allow-origin" not in response.headers
        again = client.get(path, headers={"if-none-match": response.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
    assert client.get("/").headers["content-type"].startswith("text/html")


@pytest.mark.parametrize(
    "name",
    ["none.js", "../files.py", "%2e%2e/files.py", "..%2ffiles.py", "/etc/passwd", "static/index.html", "index.html/"],
)
def test_only_files_of_the_page_are_served(client: httpx.Client, name: str):
    assert client.get(f"/page/{name}").status_code in (401, 404)
    assert client.get(f"/page/{name}", headers=KEY).status_code == 404


def test_without_the_page_there_is_nothing(node: TextNode):
    with serving(create_app(node, MediaPolicy(), page=False)) as client:
        for path in ("/", "/page/info", "/page/index.html"):
            assert client.get(path).status_code == 404
        assert client.post("/page/draw", json={}).status_code == 404


def test_a_name_that_leads_here_by_rebinding_gets_no_page(node: TextNode):
    app = create_app(node, MediaPolicy(), hosts=HostRule.of("127.0.0.1", True))
    with serving(app) as client:
        assert client.get("/").status_code == 200
        for path in ("/", "/page/info"):
            assert client.get(path, headers={"host": "evil.example"}).status_code == 403


def test_the_page_learns_what_it_needs_and_the_models_name_only_with_a_key(client: httpx.Client, node: TextNode):
    info = client.get("/page/info", headers=KEY).json()
    assert info == {
        "version": dsj.__version__,
        "research": False,
        "max_items": 32,
        "max_bytes": 1 << 20,
        "role": "unified",
        "model": "tiny-vl",
        "loading": False,
        "demo": True,
        "max_model_len": node.max_model_len,
        "deepstack_levels": 3,
        "video": True,
        "samples": info["samples"],
        "needs_key": True,
    }
    assert client.get("/page/info").json() == info | {"model": None}
    for each in info["samples"]:
        response = client.get(each["url"])
        assert response.headers["content-type"] == "image/png"
        assert Image.open(io.BytesIO(response.content)).size[0] > 32
        assert each["question"]
    kept = files._sample_file.cache_info().currsize
    for number in range(20):  # names that requests choose are not kept
        assert client.get(f"/page/samples/drawing-{number * 1000}").status_code == 404
    assert files._sample_file.cache_info().currsize == kept


def test_while_the_model_loads_the_page_is_there():
    with serving(create_app(None, MediaPolicy())) as client:
        assert client.get("/").status_code == 200
        info = client.get("/page/info").json()
        assert (info["role"], info["loading"], info["needs_key"]) == (None, True, False)


def test_pictures_are_drawn_with_a_question_and_its_answer(client: httpx.Client):
    drawn = client.post("/page/draw", json={"seed": 5}, headers=KEY).json()
    picture = Image.open(io.BytesIO(base64.b64decode(drawn["image"].removeprefix("data:image/png;base64,"))))
    expected = sample(5, "picture")
    assert picture.tobytes() == expected.images[0].tobytes()
    asked = {(each.question, each.answer, each.family) for each in expected.exchanges}
    assert (drawn["question"], drawn["answer"], drawn["family"]) in asked
    assert client.post("/page/draw", json={"seed": 5}, headers=KEY).json() == drawn
    others = [client.post("/page/draw", json={}, headers=KEY).json()["seed"] for _ in range(3)]
    assert len(set(others)) > 1
    for seed in (-1, 2**53, "x"):
        assert client.post("/page/draw", json={"seed": seed}, headers=KEY).status_code == 400
    assert client.post("/page/draw", json={}).status_code == 401
    stranger = KEY | {"origin": "https://evil.example"}
    assert client.post("/page/draw", json={}, headers=stranger).status_code == 403
