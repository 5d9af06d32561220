"""Bodies that are expensive to read get a clear refusal quickly, and hold up no other request."""

import json
import logging
import socket
from collections.abc import AsyncGenerator, Iterator
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.testclient import TestClient

from deepstack_jax.engine.runner import Chunk
from deepstack_jax.errors import short
from deepstack_jax.serving.errors import RequestError
from deepstack_jax.serving.http import create_app
from deepstack_jax.serving.logs import JsonFormatter, TextFormatter
from deepstack_jax.serving.parsing import check_body, parse_json, to_json
from deepstack_jax.serving.policy import MediaPolicy
from tests.hostile_bodies import BODIES, MIB, MeasuredServer, measured_server

STALL_SECONDS = 0.1
TRIES = 3  # other processes of the machine may hold one up
MEMORY = 128 * MIB  # beside three times the body: the tokens of two contexts take as much


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MeasuredServer]:
    with measured_server(tmp_path_factory.mktemp("bodies")) as server:
        yield server


@pytest.mark.parametrize("name", BODIES)
def test_a_body_holds_up_no_other_request(server: MeasuredServer, name: str):
    body = BODIES[name]
    content = body.build()
    for _ in range(TRIES):
        measured = server.post(body.path, content)
        assert measured.status == body.status, measured.text
        assert body.words in measured.text
        if body.status != 200:
            error = json.loads(measured.text)["error"]
            assert error.keys() == {"message", "type", "param", "code"}
            assert error["message"].isprintable()
            assert len(measured.text) < 2000
        if measured.stall_seconds <= STALL_SECONDS and measured.memory <= 3 * len(content) + MEMORY:
            return
    assert measured.stall_seconds <= STALL_SECONDS
    assert measured.memory <= 3 * len(content) + MEMORY


# ---- what is counted before a body is parsed ----

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


def counts(value: Any) -> tuple[int, int]:
    """How many lists, objects and keys a value has, and how many commas."""
    if isinstance(value, dict):
        inner = [counts(one) for one in value.values()]
        return 1 + len(value) + sum(one for one, _ in inner), max(len(value) - 1, 0) + sum(one for _, one in inner)
    if isinstance(value, list):
        inner = [counts(one) for one in value]
        return 1 + sum(one for one, _ in inner), max(len(value) - 1, 0) + sum(one for _, one in inner)
    return 0, 0


@settings(deadline=None, max_examples=50, derandomize=True, database=None)
@given(JSON, st.booleans(), st.integers(1, 40), st.sampled_from([None, 1]))
def test_what_stands_in_strings_is_not_counted(value: Any, ascii_only: bool, piece: int, indent: int | None):
    """Against a walk through the parsed value; strings and escapes may lie across the pieces that are counted."""
    body = json.dumps(value, ensure_ascii=ascii_only, indent=indent).encode(errors="surrogatepass")
    containers, commas = counts(value)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("deepstack_jax.serving.parsing._PIECE_BYTES", piece)
        patch.setattr("deepstack_jax.serving.parsing.MAX_CONTAINERS", containers)
        patch.setattr("deepstack_jax.serving.parsing.MAX_VALUES", commas)
        check_body(body)
        for bound, count in (("MAX_CONTAINERS", containers), ("MAX_VALUES", commas)):
            if count:
                with patch.context() as lower:
                    lower.setattr(f"deepstack_jax.serving.parsing.{bound}", count - 1)
                    with pytest.raises(RequestError, match=f"more than {count - 1} "):
                        check_body(body)


def test_the_deepest_body_that_passes_is_parsed():
    nested = b"[" * 100 + b"]" * 100
    assert parse_json(nested) == msgspec.json.decode(nested)
    with pytest.raises(RequestError, match="more than 100 levels"):
        parse_json(b"[" + nested + b"]")


def test_numbers_of_any_size_are_written_as_they_came():
    assert json.loads(to_json({"a": [10**30, "é\n"]})) == {"a": [10**30, "é\n"]}


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ({"a": [1, "b", None]}, "{'a': [1, 'b', None]}"),
        (("x", b"y"), "('x', b'y')"),
        ("a" * 100, "'" + "a" * 99 + "..."),
        ([[]] * 10**6, "[" + ("[], " * 25)[:-1] + "..."),
        ({i: {} for i in range(10**6)}, None),
    ],
)
def test_a_value_is_shown_by_its_beginning(value: Any, shown: str | None):
    assert short(value) == (shown or repr({i: {} for i in range(50)})[:100] + "...")


# ---- what is logged and answered where nothing expected an error ----

HOSTILE = "line\r\n\x1b[2J\u202e\u2028\x00" + "x" * 5000


class Broken:
    """A node of which everything fails with what the request said."""

    role, model_names, control, max_model_len = "unified", ["tiny"], None, 16

    def __getattr__(self, name: str) -> Any:
        raise LookupError(HOSTILE)


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/generate", {"text": HOSTILE}),
        ("POST", "/generate", {"text": HOSTILE, "stream": True}),
        ("GET", "/health", None),
        ("GET", "/metrics", None),
    ],
)
@pytest.mark.parametrize("formatter", [TextFormatter(), JsonFormatter()])
def test_an_error_that_nothing_expected_is_answered_and_logged_under_one_id(
    method: str, path: str, body: Any, formatter: logging.Formatter, caplog: pytest.LogCaptureFixture
):
    client = TestClient(app_of(Broken()), raise_server_exceptions=True)
    response = client.request(method, path, json=body)
    assert response.status_code == 500
    error = response.json()["error"]
    assert error["code"] == "internal_error"
    (record,) = [record for record in caplog.records if record.levelno >= logging.ERROR]
    line = formatter.format(record)
    assert len(line.splitlines()) == 1
    assert "xxx" not in line
    assert error["message"].split()[-1] in line
    assert "LookupError" in line
    assert "__getattr__" in line


def app_of(node: Any) -> Starlette:
    return create_app(node, MediaPolicy())


class HalfBroken(Broken):
    """A node that fails once its answer has begun."""

    async def generate(self, *_: Any) -> AsyncGenerator[Chunk]:
        yield Chunk((1,), 1, None)
        raise LookupError(HOSTILE)

    def decode_stream(self) -> Any:
        return SimpleNamespace(feed=str)


def test_a_stream_that_has_begun_ends_with_the_error(caplog: pytest.LogCaptureFixture):
    client = TestClient(app_of(HalfBroken()))
    response = client.post("/generate", json={"text": "a", "stream": True})
    first, failed, done, rest = response.text.split("\n\n")
    assert json.loads(first.removeprefix("data: "))["text"] == "1"
    error = json.loads(failed.removeprefix("data: "))["error"]
    assert (done, rest) == ("data: [DONE]", "")
    assert error["code"] == "internal_error"
    assert "xxx" not in response.text + caplog.text
    assert error["message"].split()[-1] in JsonFormatter().format(caplog.records[-1])


@pytest.mark.parametrize("formatter", [TextFormatter(), JsonFormatter()])
def test_a_log_line_is_one_printable_line_of_bounded_length(formatter: logging.Formatter):
    record = logging.LogRecord("a", logging.ERROR, "a.py", 1, HOSTILE, None, None)
    record.fields = {"path": HOSTILE}
    line = formatter.format(record)
    assert line.isprintable()
    assert line.isascii()
    assert len(line) < 10_000


def test_what_a_client_names_is_bounded_in_lines_and_metrics(caplog: pytest.LogCaptureFixture):
    app = app_of(Broken())
    client = TestClient(app, raise_server_exceptions=False)
    with caplog.at_level(logging.INFO, "deepstack_jax.serving.logs.requests"):
        for number in range(5):
            client.request(
                "A" * 300,
                f"/{number}/" + "p" * 3000 + "?q=secret",
                headers={"x-request-id": "r" * 3000, "traceparent": "00-" + "a" * 3000, "user-agent": "agent\t\x7f"},
            )
    lines = [JsonFormatter().format(record) for record in caplog.records]
    assert len(lines) == 5
    for line in lines:
        assert len(line) < 1000
        assert line.isprintable()
        assert not any(word in line for word in ("secret", "agent", "rrr", "aaa"))
    samples = [sample for family in app.state.service.metrics.registry.collect() for sample in family.samples]
    assert len([sample for sample in samples if sample.labels.get("path")]) <= 2


@pytest.mark.parametrize(
    "headers",
    [
        "origin: http://[x]/",
        "origin: \x80\xff",
        "host: [",
        "authorization: Bearer \xe9",
        "x-request-id: \xff",
        "content-encoding: \xff\x80",
        "accept: \xff;;,",
        "content-type: \xff",
        "traceparent: \xff",
        "cookie: =;=",
    ],
)
def test_no_header_makes_the_server_fail(server: MeasuredServer, headers: str):
    for path in ("/generate", "/metrics", "/v1/models/\xff%ff%00", "/health"):
        with socket.create_connection(server.address, timeout=60) as connection:
            body = b'{"text":"a","max_tokens":1}'
            head = f"POST {path} HTTP/1.1\r\n{headers}\r\nconnection: close\r\ncontent-length: {len(body)}\r\n"
            head += "" if headers.startswith("host") else "host: a\r\n"
            connection.sendall((head + "\r\n").encode("latin-1") + body)
            status = connection.makefile("rb").readline().split()[1]
        assert status < b"500"


@pytest.mark.parametrize(
    "body",
    [
        {"text": "a", "`": 1},
        {"text": "a", " - at `$.text": 1},
        {"text": "a", "x\n\x1b[31m\u202e": 1},
        {"text": "a", "sampling_params": {" - at `key` in `$": 1}},
        {"text": "a", "sampling_params": {"logit_bias": {"\u00b2": 1}}},
        {"text": "a", "sampling_params": {"logit_bias": {"a`[0].b": "x"}}},
        {"text": "a", "chat_template_kwargs": {"`$[0]": 1, "messages": 2}},
        {"messages": [{"role": "user", "content": "a", "\x1b[0m": 1}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "\u2028": 1}]}]},
        {"text": "a", "rid": "\x1b" * 129},
    ],
)
def test_a_crafted_key_is_named_in_one_printable_line(server: MeasuredServer, body: Any):
    answer = server.post("/generate", json.dumps(body).encode())
    assert answer.status == 400
    error = json.loads(answer.text)["error"]
    assert error["message"].isprintable()
    assert (error["param"] or "").isprintable()
    assert len(error["message"]) < 1100
