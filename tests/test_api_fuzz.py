"""Bodies made from the server's published schema: each gets an answer or a clear refusal, never a 500, never a hang.

The schema says what is well formed; values, and the bodies that break the schema, are hypothesis's.
"""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode

import deepstack_jax as dsj
from deepstack_jax.engine.options import EngineOptions
from deepstack_jax.serving.openai.routes import BODIES
from deepstack_jax.serving.openapi import openapi
from tests.api_server import api_server, write_thinking_checkpoint

SCHEMA = schemathesis.openapi.from_dict(openapi(BODIES, "test"))
FEW, MANY = 8, 3400  # of each kind, for each of the six endpoints: 20,400 in all


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    path = tmp_path_factory.mktemp("fuzz") / "tiny"
    write_thinking_checkpoint(path)
    options = EngineOptions(slots=8, chunk=128)
    with (
        api_server(dsj.load(path), "tiny", options, timeout=300.0, max_context=128) as url,
        httpx.Client(base_url=url, timeout=310) as client,
    ):
        yield client


def check(client: httpx.Client, path: str, body: Any) -> None:
    """Sends a body; the answer must be one, or a refusal in OpenAI's shape."""
    if isinstance(body, dict) and isinstance(body.get("n"), int) and 4 < body["n"] <= 128:
        body["n"] = 4  # more choices take longer and tell nothing new
    content = body if isinstance(body, bytes) else json.dumps(body, default=str)
    response = client.post(path, content=content, headers={"content-type": "application/json"})
    assert response.status_code < 500, (response.status_code, response.text, body)
    if response.status_code != 200:
        error = response.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert "\n" not in error["message"]
        return
    if response.headers["content-type"].startswith("text/event-stream"):
        lines = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
        assert lines
        assert all(json.loads(line) for line in lines if line != "[DONE]")
        assert not [line for line in lines if '"server_error"' in line], (lines[-3:], body)
    else:
        response.json()


def bodies(path: str, mode: GenerationMode) -> st.SearchStrategy[Any]:
    operation = SCHEMA[path]["POST"]
    return operation.as_strategy(generation_mode=mode).map(lambda case: case.body)


def search(client: httpx.Client, path: str, mode: GenerationMode, examples: int) -> None:
    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=examples == FEW,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    @given(bodies(path, mode))
    def run(body: Any) -> None:
        check(client, path, body)

    run()


@pytest.mark.parametrize("path", BODIES)
def test_bodies_of_the_schema_get_an_answer_or_a_refusal(client: httpx.Client, path: str) -> None:
    search(client, path, GenerationMode.POSITIVE, FEW)


@pytest.mark.parametrize("path", BODIES)
def test_bodies_that_break_the_schema_do_too(client: httpx.Client, path: str) -> None:
    search(client, path, GenerationMode.NEGATIVE, FEW)


@pytest.mark.exhaustive
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
@pytest.mark.parametrize("path", BODIES)
def test_thousands_of_bodies(client: httpx.Client, path: str, mode: GenerationMode) -> None:
    search(client, path, mode, MANY // 2)
