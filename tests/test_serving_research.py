"""Timelines, the cluster of one node, and research over HTTP: a real server and a small random model."""

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

import deepstack_jax as dsj
from deepstack_jax.encoding import encode_rows
from deepstack_jax.engine.options import EngineOptions
from deepstack_jax.processing.batch import prepare_batch
from deepstack_jax.research import MAX_TOKENS
from deepstack_jax.serving.http import create_app
from deepstack_jax.serving.policy import MediaPolicy
from deepstack_jax.serving.text_node import TextNode
from deepstack_jax.testing.random_checkpoint import tiny_config
from tests.nodes import write_image_sensitive_checkpoint
from tests.test_serving_http import events_of, serving
from tests.test_serving_roles import picture

CONFIG = tiny_config(  # the level is added after the first layer, and the second carries it to other tokens
    text_config={"num_hidden_layers": 2, "max_position_embeddings": 2048},
    vision_config={"depth": 1, "deepstack_visual_indexes": [0]},
)
ENGINE = {"slots": 2, "chunk": 128, "decode_steps": 4}
OPTIONS = {"temperature": 0, "max_tokens": 6, "ignore_eos": True, "return_token_ids": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> dsj.Model:
    path = tmp_path_factory.mktemp("research") / "tiny"
    write_image_sensitive_checkpoint(path, CONFIG, min_pixels=4096)
    return dsj.load(path)


@pytest.fixture(scope="module")
def client(model: dsj.Model) -> Iterator[httpx.Client]:
    """Of a server with research."""
    node = TextNode(model, MediaPolicy(), name="tiny", engine=EngineOptions(**ENGINE, research=True), warm_up=False)
    with serving(create_app(node, MediaPolicy(), research=True)) as client:
        yield client
    node.stop(0)
    asyncio.run(node.close())


def asked(*pictures: str, text: str = "What is this?") -> list[dict[str, Any]]:
    parts = [{"type": "image_url", "image_url": {"url": each}} for each in pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def chat(client: httpx.Client, messages: list[dict[str, Any]], **body: Any) -> dict[str, Any]:
    response = client.post("/v1/chat/completions", json={"messages": messages, **OPTIONS, **body})
    assert response.status_code == 200, response.text
    return response.json()


def error_of(response: httpx.Response) -> tuple[int, str | None, str]:
    error = response.json()["error"]
    return response.status_code, error["code"], error["message"]


# ---- timelines


def test_a_timeline_tells_every_stage_in_order_and_changes_nothing_else(client: httpx.Client):
    messages = asked(picture(1), picture(2, 96, 64), text="Which one? " * 40)
    usual, told = chat(client, messages), chat(client, messages, timeline=True, cache_salt="another")
    assert "timeline" not in usual
    timeline = told["timeline"]
    assert told["choices"] == usual["choices"]
    assert timeline["prompt_tokens"] == told["usage"]["prompt_tokens"] > 2 * 128
    assert (timeline["split"], timeline["bytes_on_wire"]) == (False, 0)
    assert timeline["nodes"] == [{"name": "unified", "role": "unified"}]
    spans = timeline["spans"]
    begins = [span["begin_ms"] for span in spans]
    assert begins == sorted(begins)
    assert all(0 <= span["begin_ms"] <= span["end_ms"] <= timeline["total_ms"] for span in spans)
    of = {stage: [span for span in spans if span["stage"] == stage] for stage in ("encode", "prefill", "decode")}
    assert sorted(span["label"] for span in of["encode"]) == ["image 1", "image 2"]
    pieces = [int(span["label"].split()[1]) for span in of["prefill"]]
    assert pieces == list(range(0, timeline["prompt_tokens"], 128))
    assert sum(span["tokens"] for span in of["prefill"]) == timeline["prompt_tokens"]
    assert [span["tokens"] for span in of["decode"]] == [OPTIONS["max_tokens"] - 1]


def test_cached_pieces_of_a_prompt_have_no_span(client: httpx.Client):
    messages = asked(picture(1), text="Again? " * 60)
    chat(client, messages)
    timeline = chat(client, messages, timeline=True)["timeline"]
    cached = timeline["cached_tokens"]
    assert cached >= 128
    stages = [(span["stage"], span["tokens"]) for span in timeline["spans"]]
    assert "encode" not in dict(stages)
    assert sum(tokens for stage, tokens in stages if stage == "prefill") == timeline["prompt_tokens"] - cached


def test_a_stream_has_its_timeline_beside_its_usage(client: httpx.Client):
    body = {"messages": asked(picture(1)), **OPTIONS, "stream": True, "timeline": True, "n": 2}
    body["stream_options"] = {"include_usage": True}
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        *events, last, done = events_of(response.iter_lines())
    assert done == "[DONE]"
    assert not any("timeline" in event for event in events)
    labels = [span["label"] for span in last["timeline"]["spans"] if span["stage"] == "decode"]
    assert sorted(labels) == ["tokens", "tokens, choice 2"]
    assert last["timeline"]["completion_tokens"] == 2 * OPTIONS["max_tokens"]


def test_other_endpoints_have_no_timeline(client: httpx.Client):
    status, _, message = error_of(client.post("/generate", json={"text": "a", "timeline": True}))
    assert (status, "/v1/chat/completions" in message) == (400, True)


# ---- scales


def test_scales_change_answers_as_the_library_does_and_ones_change_nothing(client: httpx.Client, model: dsj.Model):
    """Bit for bit: the random model's likeliest tokens may stay the same, their log probabilities don't."""
    messages = asked(picture(3))
    inputs = dsj.prepare(model, messages)
    sizes = {"max_new_tokens": OPTIONS["max_tokens"], "eos_token_id": [], "slots": 2, "chunk": 128, "top_logprobs": 0}

    def logprobs(**body: Any) -> list[float]:
        content = chat(client, messages, logprobs=True, **body)["choices"][0]["logprobs"]["content"]
        return [each["logprob"] for each in content]

    usual, off = logprobs(), logprobs(deepstack_scales=[0])
    assert logprobs(deepstack_scales=[1]) == usual
    assert off != usual
    out = dsj.generate(model, **inputs, **sizes, deepstack_scales=[0])
    assert out.logprobs is not None
    assert off == out.logprobs[0].tolist()
    sampling = {"max_new_tokens": OPTIONS["max_tokens"], "ignore_eos": True}
    native = {"messages": messages, "deepstack_scales": [0], "sampling_params": sampling, "return_logprob": True}
    meta = client.post("/generate", json=native).json()["meta_info"]
    assert [logprob for logprob, *_ in meta["output_token_logprobs"]] == off


def test_other_scales_compile_nothing_and_share_no_cached_pages(client: httpx.Client):
    messages = asked(picture(4), text="How many of them are there? " * 30)

    def compiled() -> float:
        families = text_string_to_metric_families(client.get("/metrics").text)
        (family,) = (each for each in families if each.name == "deepstack_jax_programs_compiled")
        return family.samples[0].value

    assert chat(client, messages, deepstack_scales=[2])["usage"]["prompt_tokens"] > 128
    before = compiled()
    cached = {
        scale: chat(client, messages, deepstack_scales=[scale])["usage"]["prompt_tokens_details"]["cached_tokens"]
        for scale in (2, 0.5, 0, 1)
    }
    assert cached[2] >= 128
    assert cached == {2: cached[2], 0.5: 0, 0: 0, 1: 0}
    usual = chat(client, messages)["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert usual == cached[2]  # those of scale 1
    assert compiled() == before


@pytest.mark.parametrize("scales", [[1, 1], [], [4.5], [-1], "all"])
def test_scales_that_the_model_has_not_are_refused(client: httpx.Client, scales: Any):
    response = client.post("/v1/chat/completions", json={"messages": asked(), "deepstack_scales": scales})
    status, _, message = error_of(response)
    assert (status, "deepstack_scales" in message) == (400, True)


def test_without_the_option_research_is_refused(client: httpx.Client, model: dsj.Model):
    node = TextNode(model, MediaPolicy(), engine=EngineOptions(**ENGINE), warm_up=False)
    with serving(create_app(node, MediaPolicy())) as plain:
        body = {"messages": asked(), "deepstack_scales": [1]}
        for path in ("/v1/chat/completions", "/generate", "/research/rows", "/research/tokens"):
            assert error_of(plain.post(path, json=body))[:2] == (400, "research_off"), path
        assert not plain.get("/page/info").json()["research"]
    node.stop(0)
    asyncio.run(node.close())
    assert client.get("/page/info").json()["research"]


# ---- rows and tokens


def test_norms_are_those_of_the_rows_and_grids_those_of_the_pictures(client: httpx.Client, model: dsj.Model):
    messages = asked(picture(1), picture(2, 96, 64), picture(3, 64, 128))
    inputs = dsj.prepare(model, messages)
    rows = encode_rows(model, prepare_batch(model.config, **inputs))
    assert rows is not None
    parts = [np.linalg.norm(np.asarray(part), axis=1) for part in rows if part is not None]
    images = client.post("/research/rows", json={"messages": messages}).json()["images"]
    merge = model.config.vision.spatial_merge_size
    first = 0
    for image, grid in zip(images, inputs["image_grid_thw"].tolist(), strict=True):
        assert image["kind"] == "image"
        assert image["grid"] == [grid[0], grid[1] // merge, grid[2] // merge]
        assert image["size"] == [grid[2] * model.config.vision.patch_size, grid[1] * model.config.vision.patch_size]
        count = int(np.prod(image["grid"]))
        for norms, expected in zip(image["norms"], parts, strict=True):
            np.testing.assert_allclose(norms, expected[first : first + count], rtol=1e-5, atol=1e-5)
        first += count
    assert client.post("/research/rows", json={"messages": asked()}).json() == {"images": []}


def test_tokens_have_the_probabilities_with_which_they_were_drawn(client: httpx.Client, model: dsj.Model):
    messages = asked(picture(1))
    answer = chat(client, messages, logprobs=True, top_logprobs=5)
    (choice,) = answer["choices"]
    body = {"messages": messages, "answer_ids": choice["token_ids"]}
    seen = client.post("/research/tokens", json=body).json()
    start, text = seen["answer_start"], model.config.text
    assert start == answer["usage"]["prompt_tokens"]
    assert [token["id"] for token in seen["tokens"]] == answer["prompt_token_ids"] + choice["token_ids"]
    visual = [token["id"] == model.config.image_token_id for token in seen["tokens"]]
    assert [token["visual"] for token in seen["tokens"]] == visual
    assert (seen["probability"][0], seen["alternatives"][0]) == (None, [])
    for place, told in enumerate(choice["logprobs"]["content"], start):
        assert seen["tokens"][place]["text"] == told["token"]
        # probabilities are shown with six digits
        assert seen["probability"][place] == pytest.approx(np.exp(told["logprob"]), rel=1e-4, abs=1e-6)
        likeliest = {each["token"] for each in told["top_logprobs"]}
        assert {each["text"] for each in seen["alternatives"][place]} == likeliest
    assert (seen["layers"], seen["experts"]) == (text.num_hidden_layers, text.num_experts)
    shape = len(seen["tokens"]), text.num_hidden_layers, text.num_experts_per_tok
    assert np.shape(seen["top_k"]) == np.shape(seen["weights"]) == shape


def test_scales_reach_what_is_looked_at(client: httpx.Client):
    messages = asked(picture(1))
    usual, off = (
        client.post("/research/rows", json={"messages": messages, "deepstack_scales": [scale]}).json()["images"][0]
        for scale in (1, 0)
    )
    assert off["norms"][0] == usual["norms"][0]
    assert set(off["norms"][1]) == {0}
    assert 0 not in usual["norms"][1]


def test_what_can_not_be_looked_at_is_refused(client: httpx.Client, model: dsj.Model):
    wrong = {"messages": asked(), "answer_ids": [model.config.text.vocab_size]}
    assert error_of(client.post("/research/tokens", json=wrong))[0] == 400
    long = {"messages": asked(), "answer_ids": [1] * MAX_TOKENS}
    assert error_of(client.post("/research/tokens", json=long))[0] == 413
    assert error_of(client.post("/research/rows", json={"messages": asked("data:image/png;base64,AAAA")}))[0] == 400
    assert client.post("/research/tokens", json={"messages": []}).status_code == 400


# ---- the cluster


def test_the_cluster_of_a_whole_model_is_itself(client: httpx.Client):
    before = client.get("/cluster").json()["nodes"][0]["requests"]
    chat(client, asked())
    cluster = client.get("/cluster").json()
    (node,) = cluster["nodes"]
    assert (cluster["role"], cluster["events"]) == ("unified", [])
    assert (node["role"], node["self"], node["state"], node["reason"]) == ("unified", True, "ready", None)
    assert node["requests"] == before + 1
    assert (node["slots"], node["slots_used"], node["in_flight"], node["failures"]) == (2, 0, 0, 0)
    assert node["prefix_cache"].keys() == {"hits", "queries", "pages"}
    assert node["encoder_cache"] is None


def test_a_node_that_loads_says_so_to_who_watches():
    with serving(create_app(None, MediaPolicy())) as client:
        cluster = client.get("/cluster").json()
    assert cluster["role"] is None
    assert [(node["self"], node["state"]) for node in cluster["nodes"]] == [(True, "loading")]
