"""The HTTP surface as a client sees it: a real server, a real client, a model in between."""

import asyncio
import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import httpx
import numpy as np
import pytest
import uvicorn
from PIL import Image
from starlette.applications import Starlette

import deepstack_jax as dsj
from deepstack_jax.cli import main
from deepstack_jax.engine.options import EngineOptions
from deepstack_jax.engine.runner import Chunk
from deepstack_jax.programs import EngineState
from deepstack_jax.serving import bodies
from deepstack_jax.serving import endpoint as serving_endpoint
from deepstack_jax.serving.connections import Gate
from deepstack_jax.serving.endpoint import NO_HEADERS
from deepstack_jax.serving.http import create_app
from deepstack_jax.serving.policy import MediaPolicy
from deepstack_jax.serving.requests import GenerateRequest
from deepstack_jax.serving.text_node import TextNode
from tests.nodes import write_image_sensitive_checkpoint
from tests.waiting import until

LONG = 1900  # tokens
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose answers depend on pictures, which take few tokens, and media/ with two of them."""
    path = tmp_path_factory.mktemp("serving")
    write_image_sensitive_checkpoint(path / "tiny", min_pixels=4096)
    (path / "media").mkdir()
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(pixels).save(path / "media" / f"{i}.png")
    (path / "secret.png").write_bytes((path / "media" / "0.png").read_bytes())
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> dsj.Model:
    return dsj.load(folder / "tiny")


@pytest.fixture(scope="module")
def policy(folder: Path) -> MediaPolicy:
    return MediaPolicy(allowed_folder=folder / "media", max_bytes=1 << 20, max_items=4)


class Watched:
    """The node under test, with a note of how each answer ended."""

    def __init__(self, node: TextNode):
        self._node = node
        self.role, self.model_names = node.role, node.model_names
        self.start, self.stop, self.close = node.start, node.stop, node.close
        self.dead, self.unable, self.self_test = node.dead, node.unable, node.self_test
        self.decode_stream, self.readings, self.describe = node.decode_stream, node.readings, node.describe
        self.max_model_len, self.load, self.config = node.max_model_len, node.load, node.config
        self.cluster = node.cluster
        self.ended: list[tuple[int, str | None]] = []  # tokens, and why it ended; None: it was closed before

    async def generate(
        self,
        request: GenerateRequest,
        deadline: float,
        tenant: str = "",
        headers: Mapping[str, str] = NO_HEADERS,
        ended: Collection[int] = (),
    ) -> AsyncGenerator[Chunk]:
        count, finish = 0, None
        answer = self._node.generate(request, deadline, tenant, headers, ended)
        try:
            async for chunk in answer:
                count += len(chunk.tokens)
                finish = chunk.finish_reason
                yield chunk
        finally:
            await answer.aclose()
            self.ended.append((count, finish))


@pytest.fixture(scope="module")
def node(model: dsj.Model, policy: MediaPolicy) -> Iterator[Watched]:
    node = TextNode(model, policy, name="tiny", engine=EngineOptions(slots=2, decode_steps=1), warm_up=False)
    yield Watched(node)
    node.stop(0)
    asyncio.run(node.close())


@contextmanager
def serving(app: Starlette, gate: Gate | None = None) -> Iterator[httpx.Client]:
    """A client of a server in a thread."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    http: Any = (gate or Gate()).protocol
    server = uvicorn.Server(uvicorn.Config(app, http=http, ws="none", lifespan="off", log_config=None))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        with httpx.Client(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=120) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join(60)


@pytest.fixture(scope="module")
def client(node: Watched, policy: MediaPolicy) -> Iterator[httpx.Client]:
    with serving(create_app(node, policy)) as client:
        yield client


def data_uri(file: Path | bytes) -> str:
    data = file if isinstance(file, bytes) else file.read_bytes()
    return "data:image/png;base64," + base64.b64encode(data).decode()


def ask(client: httpx.Client, **body: Any) -> dict[str, Any]:
    response = client.post("/generate", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def expected(
    model: dsj.Model, prompt: Any, images: Any = (), videos: Any = (), **options: Any
) -> tuple[str, list[int]]:
    inputs = dsj.prepare(model, prompt, images=images, videos=videos)
    out = dsj.generate(model, **inputs, **options)
    return dsj.decode(model, out)[0], out.tokens[0, : out.lengths[0]].tolist()


def check(answer: dict[str, Any], text: str, tokens: list[int]) -> None:
    assert answer["output_ids"] == tokens
    assert answer["text"] == text
    assert answer["meta_info"]["completion_tokens"] == len(tokens)


def events_of(lines: Iterator[str]) -> Iterator[Any]:
    for line in lines:
        if line:
            assert line.startswith("data: ")
            yield line[6:] if line == "data: [DONE]" else json.loads(line[6:])


# ---- answers ----


@pytest.mark.parametrize(
    "options",
    [{}, {"max_new_tokens": 50}, {"temperature": 0.8, "top_k": 9, "top_p": 0.95, "min_p": 0.01, "seed": 7},
     {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.25}],
)  # fmt: skip
def test_text_is_answered_as_the_library_answers(client: httpx.Client, model: dsj.Model, options: dict[str, Any]):
    answer = ask(client, text="Who is there?", sampling_params=options)
    check(answer, *expected(model, "Who is there?", **options))
    meta = answer["meta_info"]
    assert meta["prompt_tokens"] == dsj.prepare(model, "Who is there?")["input_ids"].shape[1]
    assert meta["timings"].keys() == {"queue", "encode", "prefill", "decode"}
    assert 0 < meta["timings"]["prefill"] < meta["e2e_latency"]
    assert meta["finish_reason"]["type"] in ("stop", "length")


def test_end_tokens_are_the_models_more_or_none(client: httpx.Client, model: dsj.Model):
    _, free = expected(model, "Who is there?", eos_token_id=[])
    more = ask(client, text="Who is there?", sampling_params={"stop_token_ids": [free[5]], "ignore_eos": True})
    assert more["output_ids"] == free[: free.index(free[5]) + 1]
    assert more["meta_info"]["finish_reason"] == {"type": "stop", "matched": free[5]}
    none = ask(client, text="Who is there?", sampling_params={"ignore_eos": True})
    assert none["output_ids"] == free
    assert none["meta_info"]["finish_reason"] == {"type": "length", "length": 64}


def test_pictures_come_as_path_data_and_parts_of_messages(client: httpx.Client, model: dsj.Model, folder: Path):
    first, second = (folder / "media" / f"{i}.png" for i in range(2))
    one = expected(model, "Which color?", images=[first])
    check(ask(client, text="Which color?", image_data="0.png"), *one)
    check(ask(client, text="Which color?", image_data=[data_uri(first)]), *one)
    check(ask(client, text="Which color?", image_data=f"file://{first}"), *one)
    other = expected(model, "Which color?", images=[second])
    assert other[1] != one[1]
    check(ask(client, text="Which color?", image_data=str(second)), *other)

    def messages(a: Any, b: Any) -> list[Any]:
        return [
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": a}}, "and",
                                         {"type": "image", "image": b}, {"type": "text", "text": "?"}]},
        ]  # fmt: skip

    two = expected(model, messages(str(first), str(second)))
    check(ask(client, messages=messages(data_uri(first), "1.png")), *two)
    raw = f"{IMAGE}Which color?"
    check(
        ask(client, text=raw, image_data="0.png"),
        *expected(model, raw, images=[first]),
    )
    # parts without a source take the next of image_data
    check(ask(client, messages=messages(data_uri(first), None), image_data="1.png"), *two)


def test_videos_come_with_their_options(client: httpx.Client, model: dsj.Model, folder: Path):
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        stream = out.add_stream("mpeg4", rate=8)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        stream.time_base = Fraction(1, 8)
        for i in range(16):
            picture = np.full((64, 64, 3), 15 * i, np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(stream.encode())
    (folder / "media" / "clip.mp4").write_bytes(file.getvalue())
    path, data = str(folder / "media" / "clip.mp4"), data_uri(file.getvalue())
    options = {"max_new_tokens": 6}
    check(ask(client, text="What?", video_data=data, sampling_params=options),
          *expected(model, "What?", videos=[path], **options))  # fmt: skip

    def messages(video: str) -> list[Any]:
        return [{"role": "user", "content": [{"type": "video", "video": video, "fps": 1}, "What?"]}]

    check(ask(client, messages=messages("clip.mp4"), sampling_params=options),
          *expected(model, messages(path), **options))  # fmt: skip


def test_a_stream_grows_to_the_whole_answer_and_never_takes_text_back(client: httpx.Client, model: dsj.Model):
    options = {"max_new_tokens": 64, "temperature": 1.5, "seed": 4}
    text, tokens = expected(model, "Who is there?", **options)
    with client.stream(
        "POST", "/generate", json={"text": "Who is there?", "sampling_params": options, "stream": True}
    ) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        *answers, done = events_of(response.iter_lines())
    assert done == "[DONE]"
    assert len(answers) > 2
    for one, following in pairwise(answers):
        assert one["meta_info"]["finish_reason"] is None
        assert following["text"].startswith(one["text"])  # half a character would change when its rest comes
        assert len(following["output_ids"]) > len(one["output_ids"])
    check(answers[-1], text, tokens)
    assert len({answer["meta_info"]["id"] for answer in answers}) == 1


def test_thirty_two_at_once_are_all_right(client: httpx.Client, model: dsj.Model, folder: Path):
    questions = [f"Question {i:02}?" for i in range(32)]
    pictures = [None if i % 4 else folder / "media" / f"{i // 4 % 2}.png" for i in range(32)]
    options = [{"max_new_tokens": 64 - i // 2, "temperature": i % 3 * 0.7, "seed": i} for i in range(32)]

    def one(i: int) -> dict[str, Any]:
        body = {"text": questions[i], "sampling_params": options[i]}
        if pictures[i]:
            body["image_data"] = data_uri(pictures[i])
        if i % 5:
            return ask(client, **body)
        with client.stream("POST", "/generate", json=body | {"stream": True}) as response:
            return list(events_of(response.iter_lines()))[-2]

    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(one, range(32)))
    for i, answer in enumerate(answers):
        check(answer, *expected(model, questions[i], images=[p for p in pictures[i : i + 1] if p], **options[i]))


# ---- requests as people send them ----


def test_a_stream_of_deltas_adds_up_to_the_whole_answer(client: httpx.Client, model: dsj.Model):
    options = {"max_new_tokens": 64, "temperature": 1.5, "seed": 4}
    text, tokens = expected(model, "Who is there?", **options)
    body = {"text": "Who is there?", "sampling_params": options, "stream": True, "stream_deltas": True}
    with client.stream("POST", "/generate", json=body) as response:
        *events, done = events_of(response.iter_lines())
    assert done == "[DONE]"
    assert len(events) > 2
    assert "".join(event["text"] for event in events) == text
    assert [token for event in events for token in event["output_ids"]] == tokens
    assert events[-1]["meta_info"]["completion_tokens"] == len(tokens)
    assert [event["meta_info"]["finish_reason"] is None for event in events] == [True] * (len(events) - 1) + [False]


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_end_an_answer_before_them(client: httpx.Client, node: Watched, model: dsj.Model, stream: bool):
    """Against a search of the whole text; also where a stop string begins inside one token and ends in another."""
    options = {"max_new_tokens": 64, "temperature": 1.5, "seed": 4, "ignore_eos": True}
    inputs = dsj.prepare(model, "Who is there?")
    out = dsj.generate(model, **inputs, max_new_tokens=64, temperature=1.5, seed=4, eos_token_id=[])
    tokens, text = out.tokens[0].tolist(), dsj.decode(model, out)[0]
    stop = text[20:23]
    first = text.find(stop)
    for given in (stop, ["never said", stop, ""]):
        body = {"text": "Who is there?", "sampling_params": options | {"stop": given}, "stream": stream}
        if stream:
            with client.stream("POST", "/generate", json=body) as response:
                answers = list(events_of(response.iter_lines()))[:-1]
            assert all(text[:first].startswith(answer["text"]) for answer in answers)
            answer = answers[-1]
        else:
            answer = ask(client, **{key: value for key, value in body.items() if key != "stream"})
        assert answer["text"] == text[:first]
        assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
        # the token that made it whole is the last
        count = len(answer["output_ids"])
        assert answer["output_ids"] == tokens[:count]
        until_now = [model.processor.decode(np.array([tokens]), np.array([n]))[0] for n in (count - 1, count)]
        assert [stop in part for part in until_now] == [False, True]
        assert answer["meta_info"]["timings"].keys() == {"queue", "encode", "prefill", "decode"}
    until(lambda: node._node.runner.waiting == 0)
    never = ask(client, text="Who is there?", sampling_params=options | {"stop": "never said"})
    check(never, text, tokens)


def test_the_published_designs_example_works_as_it_stands(client: httpx.Client, model: dsj.Model, folder: Path):
    first, second = (folder / "media" / f"{i}.png" for i in range(2))
    answer = ask(client, text="Which color?", image=data_uri(first), max_tokens=9)
    check(answer, *expected(model, "Which color?", images=[first], max_new_tokens=9))
    answer = ask(client, text="Which?", images=[data_uri(first), "1.png"], max_tokens=9, temperature=0.7, seed=3)
    check(answer, *expected(model, "Which?", images=[first, second], max_new_tokens=9, temperature=0.7, seed=3))


@pytest.mark.parametrize(
    "body",
    [
        {"sampling_params": {"top_k": -1, "top_p": 1, "min_p": 0, "repetition_penalty": 1}},
        {"sampling_params": {"max_new_tokens": 64.0, "top_k": 0.0, "seed": 0.0, "temperature": 0}},
        {"sampling_params": None, "image_data": None, "video_data": None, "stream": None, "messages": None},
        {"sampling_params": {"temperature": None, "stop": None, "stop_token_ids": None, "max_new_tokens": None}},
        {"sampling_params": {"stop": "", "frequency_penalty": 0.0, "n": 1, "min_new_tokens": 0, "regex": None}},
        {"sampling_params": {"stop": [""], "skip_special_tokens": True, "json_schema": None, "no_stop_trim": False}},
        {"image_data": "", "video_data": [], "audio_data": "", "return_logprob": False, "logprob_start_len": -1},
        {"image_data": [""], "lora_path": None, "top_logprobs_num": 0, "modalities": ["image"], "session_params": None},
        {"tools": None, "chat_template_kwargs": None, "mm_processor_kwargs": None, "enable_thinking": None},
        {"tools": [], "chat_template_kwargs": {}, "mm_processor_kwargs": {"max_pixels": None, "fps": None}},
        {"input_ids": None, "return_hidden_states": False, "log_metrics": True, "rid": None},
    ],
)
def test_neutral_values_ask_for_nothing(client: httpx.Client, model: dsj.Model, body: dict[str, Any]):
    check(ask(client, text="Who is there?", **body), *expected(model, "Who is there?"))


def test_a_request_may_bring_its_id_and_an_empty_text(client: httpx.Client, model: dsj.Model, folder: Path):
    assert ask(client, text="Who?", rid="mine")["meta_info"]["id"] == "mine"
    first = folder / "media" / "0.png"
    check(ask(client, text="", image_data=data_uri(first)), *expected(model, "", images=[first]))
    messages = [{"role": "user", "content": "Who?"}]
    check(ask(client, text="", messages=messages), *expected(model, messages))
    bare = base64.b64encode(first.read_bytes()).decode()
    check(ask(client, text="Who?", image_data=bare), *expected(model, "Who?", images=[first]))


# ---- refusals ----


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"", 400, "not valid JSON"),
        (b"{", 400, "not valid JSON"),
        (b'{"text": "\xff"}', 400, "not valid JSON"),
        (rb'{"text": "\ud800"}', 400, ""),
        (b"[" * 100_000, 400, ""),
        (b"[]", 400, "expected object, got array"),
        ({}, 400, "text and messages: neither"),
        ({"text": "a", "messages": []}, 400, "text and messages: both"),
        ({"text": 7}, 400, "text 7: expected"),
        ({"text": ["a", "b"]}, 400, "text ['a', 'b']: expected"),
        ({"text": ""}, 400, "empty prompt"),
        ({"text": "a", "nonsense": 1}, 400, "unknown field nonsense: use text, messages"),
        ({"text": "a", "stream": "yes"}, 400, "stream 'yes': expected bool"),
        ({"text": "a", "sampling_params": {"max_tokens": 5}}, 400, "unknown field sampling_params.max_tokens"),
        ({"text": "a", "sampling_params": {"max_new_tokens": 0}}, 400, "sampling_params.max_new_tokens 0: expected"),
        ({"text": "a", "sampling_params": {"max_new_tokens": 1.5}}, 400, "max_new_tokens 1.5: expected int"),
        ({"text": "a", "sampling_params": {"max_new_tokens": True}}, 400, "max_new_tokens True: expected int"),
        ({"text": "a", "sampling_params": {"max_new_tokens": 2040}}, 400, "exceed the 2048 of this server"),
        ({"text": "a", "sampling_params": {"max_new_tokens": 10**30}}, 400, "max_new_tokens 1000"),
        ({"text": "a", "sampling_params": {"temperature": -1}}, 400, "temperature -1: expected"),
        (b'{"text": "a", "sampling_params": {"temperature": NaN}}', 400, "not valid JSON"),
        ({"text": "a", "sampling_params": {"temperature": 1e300}}, 400, "temperature 1e+300"),
        ({"text": "a", "sampling_params": {"logit_bias": {"1": 101}}}, 400, "logit_bias[1] 101"),
        ({"text": "a", "sampling_params": {"top_p": 0}}, 400, "top_p 0: expected"),
        ({"text": "a", "sampling_params": {"top_p": 1.01}}, 400, "top_p 1.01: expected"),
        ({"text": "a", "sampling_params": {"top_k": 2**40}}, 400, "top_k"),
        ({"text": "a", "sampling_params": {"seed": "x"}}, 400, "seed 'x': expected int"),
        ({"text": "a", "sampling_params": {"stop_token_ids": [-1]}}, 400, "stop_token_ids"),
        ({"text": "a", "sampling_params": {"stop_token_ids": list(range(17))}}, 400, "stop_token_ids"),
        ({"text": "long " * 500}, 400, "exceed the 2048"),
        ({"text": "long " * 2000}, 400, "10000 characters, too many for 2048 tokens"),
        ({"text": "x" * 200_000}, 400, "200000 characters"),
        ({"messages": []}, 400, "empty prompt"),
        ({"messages": [{"role": "robot", "content": "a"}]}, 400, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, 400, "content"),
        ({"messages": [{"role": "user", "content": 7}]}, 400, "messages[0].content 7: expected"),
        ({"messages": [{"role": "user", "content": "a", "tool": 1}]}, 400, "unknown field messages[0].tool: use role"),
        ({"messages": [{"role": "user", "content": [{"type": "sound"}]}]}, 400, "content part"),
        ({"messages": [{"role": "user", "content": [{"type": "video", "video": "x", "fps": "7"}]}]}, 400, "fps '7'"),
        ({"messages": [{"role": "user", "content": [{"type": "video", "video": [7]}]}]}, 400, "named by text"),
        ({"text": "a", "image_data": {"url": "x"}}, 400, "image_data"),
        ({"text": "a", "image": "0.png", "image_data": "0.png"}, 400, "image_data: both given"),
        ({"text": "a", "max_tokens": 3, "sampling_params": {"max_new_tokens": 3}}, 400, "max_new_tokens: both given"),
        ({"text": "a", "max_token": 3}, 400, "unknown field max_token: use text"),
        ({"text": "a", "max_token": None}, 400, "unknown field max_token: use text"),
        ({"text": "a", "sampling_params": {"top_k": -2}}, 400, "top_k -2: expected"),
        ({"text": "a", "sampling_params": {"top_k": -1.5}}, 400, "top_k -1.5: expected"),
        ({"text": "a", "sampling_params": {"n": 2}}, 400, "sampling_params.n 2 is not supported"),
        ({"text": "a", "sampling_params": {"n": True}}, 400, "sampling_params.n True is not supported"),
        ({"text": "a", "sampling_params": {"frequency_penalty": 1e31}}, 400, "frequency_penalty 1e+31: expected"),
        ({"text": "a", "input_ids": [1, 2]}, 400, "input_ids stand for the whole prompt"),
        ({"text": "a", "sampling_params": {"stop": [3]}}, 400, "stop"),
        ({"text": "a", "sampling_params": {"stop": [f"a{i}" for i in range(17)]}}, 400, "stop"),
        ({"text": "a", "sampling_params": {"stop": "a" * 2000}}, 400, "stop"),
        ({"text": "a", "mm_processor_kwargs": {"max_pixel": 3}}, 400, "unknown field mm_processor_kwargs.max_pixel"),
        ({"text": "a", "mm_processor_kwargs": {"tools": []}}, 400, "unknown field mm_processor_kwargs.tools"),
        ({"text": "a", "mm_processor_kwargs": {"max_pixels": 0}}, 400, "max_pixels 0"),
        ({"text": "a", "tools": [{}] * 257}, 400, "tools"),
        ({"text": "a", "rid": "x" * 200}, 400, "rid"),
        ({"text": "a", "image_data": "missing.png"}, 400, "missing.png can't be read"),
        ({"text": "a", "image_data": "../secret.png"}, 403, "outside the allowed folder"),
        ({"text": "a", "image_data": "/etc/passwd"}, 403, "outside the allowed folder"),
        ({"text": "a", "image_data": "http://127.0.0.1/x.png"}, 403, "not an allowed domain"),
        ({"text": "a", "image_data": "data:image/png;base64,aGVsbG8="}, 400, "not an image"),
        ({"text": "a", "image_data": "data:image/png;base64,!"}, 400, "not valid base64"),
        ({"text": "a", "image_data": ["0.png"] * 5}, 413, "more than 4 images and videos"),
        ({"text": "a", "video_data": "0.png"}, 400, "not a video"),
        ({"text": IMAGE}, 400, "1 image placeholders in the prompt, but 0 images"),
        ({"text": IMAGE, "image_data": ["0.png", "1.png"]}, 400, "1 image placeholders in the prompt, but 2"),
        ({"text": "<|image_pad|>?", "image_data": "0.png"}, 400, "the text holds <|image_pad|>"),
        ({"messages": [{"role": "user", "content": "a"}], "image_data": "0.png"}, 400, "0 image placeholders"),
    ],
)  # fmt: skip
def test_bad_requests_get_one_clear_line(client: httpx.Client, body: Any, status: int, words: str):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    for stream in (False, True):
        if stream and isinstance(body, dict) and "stream" not in body:
            content = json.dumps(body | {"stream": True}).encode()
        response = client.post("/generate", content=content)
        assert response.status_code == status, response.text
        error = response.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error"
        assert words in error["message"]
        assert "\n" not in error["message"]
        assert len(error["message"]) < 500


def test_bodies_are_bounded_encoded_plainly_and_from_no_other_site(client: httpx.Client):
    response = client.post("/generate", content=b" " * (18 << 20))
    assert response.status_code == 413
    assert "more than the" in response.json()["error"]["message"]
    assert client.post("/generate", content=b"", headers={"content-encoding": "gzip"}).status_code == 415
    assert client.post("/generate", json={"text": "a"}, headers={"origin": "http://evil.org"}).status_code == 403
    for origin in ("http://[x]/", "null", "", "http://[::1"):
        assert client.post("/generate", json={"text": "a"}, headers={"origin": origin}).status_code == 403
    own = str(client.base_url).rstrip("/")
    small = {"text": "a", "sampling_params": {"max_new_tokens": 64}}
    assert client.post("/generate", json=small, headers={"origin": own}).status_code == 200


def test_a_body_that_never_comes_is_not_waited_for(client: httpx.Client, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bodies, "BODY_SECONDS", 0.3)
    with socket.create_connection((client.base_url.host, client.base_url.port), timeout=30) as half:
        half.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        assert half.recv(100).startswith(b"HTTP/1.1 408 ")


def test_other_paths_and_methods_have_the_same_error_body(client: httpx.Client):
    for response, status in (
        (client.get("/generate"), 405),
        (client.post("/nowhere"), 404),
        (client.get("/docs"), 404),
    ):
        assert response.status_code == status
        assert "use POST /generate" in response.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/health", "/v1/models"])
def test_what_is_read_takes_only_get(client: httpx.Client, path: str):
    for method in ("HEAD", "POST", "PUT", "DELETE", "OPTIONS"):
        response = client.request(method, path)
        assert (response.status_code, response.headers["allow"]) == (405, "GET")


# ---- health, load, ends ----


def test_health_and_models(client: httpx.Client):
    response = client.get("/health")
    assert (response.status_code, response.json()) == (200, {"status": "ok", "role": "unified"})
    models = client.get("/v1/models").json()
    assert models["object"] == "list"
    assert [(one["id"], one["object"]) for one in models["data"]] == [("tiny", "model")]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_ends_its_work(client: httpx.Client, node: Watched, stream: bool):
    node.ended.clear()
    body = {"text": "Who is there?", "sampling_params": {"max_new_tokens": LONG, "ignore_eos": True}, "stream": stream}
    if stream:
        with client.stream("POST", "/generate", json=body) as response:
            next(response.iter_lines())
    else:
        with pytest.raises(httpx.ReadTimeout):
            client.post("/generate", json=body, timeout=httpx.Timeout(60, read=0.2))
    until(lambda: node.ended)
    count, finish = node.ended[0]
    assert finish is None
    assert count < LONG
    until(lambda: node._node.runner.waiting == 0)


class StandsStill(Watched):
    """The process stands still for longer than a request may take, which then needs some turns of the loop to end."""

    async def generate(
        self,
        request: GenerateRequest,
        deadline: float,
        tenant: str = "",
        headers: Mapping[str, str] = NO_HEADERS,
        ended: Collection[int] = (),
    ) -> AsyncGenerator[Chunk]:
        try:
            async with aclosing(super().generate(request, deadline, tenant, headers, ended)) as chunks:
                async for chunk in chunks:
                    yield chunk
                    if (left := deadline - time.monotonic()) > 0:
                        time.sleep(left + 1)
        finally:
            await asyncio.sleep(0.1)


def test_a_process_that_stood_still_until_the_deadline_was_over_says_so(
    client: httpx.Client, node: Watched, policy: MediaPolicy, monkeypatch: pytest.MonkeyPatch
):
    ask(client, text="Who is there?")  # compiles
    monkeypatch.setattr(serving_endpoint, "SLACK_SECONDS", 0.2)
    body = {"text": "Who is there?", "sampling_params": {"max_new_tokens": LONG, "ignore_eos": True}}
    with serving(create_app(StandsStill(node._node), policy, timeout=1.0)) as other:
        response = other.post("/generate", json=body)
        assert response.status_code == 504
        assert response.json()["error"]["code"] == "deadline"


def test_too_many_requests_get_503_and_slow_ones_504(node: Watched, policy: MediaPolicy):
    body = {"text": "Who is there?", "sampling_params": {"max_new_tokens": LONG, "ignore_eos": True}}
    with serving(create_app(node, policy, max_requests=2, timeout=0.4)) as client, ThreadPoolExecutor(6) as pool:
        responses = list(pool.map(lambda _: client.post("/generate", json=body), range(6)))
        for response in responses:
            error = response.json()["error"]
            if response.status_code == 503:
                assert int(response.headers["retry-after"]) >= 1
                assert (error["code"], error["type"]) == ("queue_full", "overloaded_error")
            else:
                assert response.status_code == 504
                assert (error["code"], error["type"]) == ("deadline", "timeout_error")
        counts = [response.status_code for response in responses]
        assert counts.count(504) >= 2
        assert counts.count(503) >= 1
        # in the middle of a stream the status is out: the error is an event
        with client.stream("POST", "/generate", json=body | {"stream": True}) as response:
            if response.status_code == 200:
                *_, last, done = events_of(response.iter_lines())
                assert last["error"]["code"] == "deadline"
                assert done == "[DONE]"


def test_a_node_that_stops_says_so(model: dsj.Model, policy: MediaPolicy):
    node = TextNode(model, policy)
    with serving(create_app(node, policy)) as client:
        # it runs its self-test for that, and compiles
        until(lambda: client.get("/health_generate").status_code == 200)
        node.stop(0)
        ready = client.get("/ready")
        assert ready.status_code == 503
        assert ready.json()["reason"] == "the server is stopping"
        assert client.get("/health").status_code == 200  # it can still finish what it has
        response = client.post("/generate", json={"text": "a"})
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "stopping"
    asyncio.run(node.close())


def test_the_command_serves_until_it_is_told_to_end(model: dsj.Model, folder: Path):
    command = [sys.executable, "-m", "deepstack_jax", "serve", folder / "tiny", "--port", "0", "--name", "small",
               "--allow-folder", folder / "media", "--max-context", "2000", "--grace", "30"]  # fmt: skip
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    try:
        assert child.stdout is not None
        before = ""
        while (line := child.stdout.readline()) and not line.startswith("ready"):
            before += line
        assert line.startswith("ready: unified node of small on http://127.0.0.1:"), (
            child.stderr and child.stderr.read()
        )
        # 4 slots of 2000 tokens: 16 pages each, and page 0 beside them
        pages = EngineState.empty(model.config, 4, num_pages=65, page=128).cache
        mebibytes = sum(array.nbytes for array in (*pages.keys, *pages.values)) / 2**20
        size = f"64 KV pages of 128 (8,192 tokens, {mebibytes:.1f} MiB)"
        assert before == f"engine: 4 slots, chunks of 512 tokens, {size}\n"
        with httpx.Client(base_url=line.split()[-1], timeout=120) as client:
            assert client.get("/health").status_code == 200
            assert client.get("/v1/models").json()["data"][0]["id"] == "small"
            too_long = client.post("/generate", json={"text": "a", "sampling_params": {"max_new_tokens": 2000}})
            assert "exceed the 2000 of this server" in too_long.json()["error"]["message"]
            assert client.post("/generate", json={"text": "a", "image_data": "../secret.png"}).status_code == 403

            # in the middle of an answer: it is finished, and the exit code is 0
            options = {"max_new_tokens": LONG, "temperature": 1.0}
            body = {"text": "Who is there?", "sampling_params": options | {"ignore_eos": True}, "stream": True}
            with client.stream("POST", "/generate", json=body) as response:
                events = events_of(response.iter_lines())
                next(events)
                child.send_signal(signal.SIGTERM)
                *_, last, done = events
            assert done == "[DONE]"
            check(last, *expected(model, "Who is there?", **options, eos_token_id=[]))
        assert child.wait(60) == 0
        assert child.stderr is not None
        assert "Traceback" not in child.stderr.read()
    finally:
        if child.poll() is None:
            child.kill()
        child.communicate()


def test_the_command_says_what_is_wrong_before_it_loads(folder: Path, capsys: pytest.CaptureFixture[str]):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for options, words in (
            (["--port", port], f"port {port} can't be used"),
            (["--allow-folder", str(folder / "nothing")], "is not a directory"),
            (["--allow-network", "10.0.0.0/33"], "10.0.0.0/33"),
        ):
            with pytest.raises(SystemExit) as end:
                main(["serve", str(folder / "tiny"), *options])
            assert end.value.code == 1
            message = capsys.readouterr().err
            assert words in message
            assert message.count("\n") == 1


def test_log_probabilities_of_a_stream_add_up_to_those_of_a_whole_answer(client: httpx.Client):
    body = {"text": "Hello?", "sampling_params": {"max_new_tokens": 6, "ignore_eos": True}, "return_logprob": True}
    body["top_logprobs_num"] = 2
    whole = client.post("/generate", json=body).json()["meta_info"]

    def streamed(**more: Any) -> list[dict[str, Any]]:
        lines = client.post("/generate", json=body | {"stream": True} | more).text.splitlines()
        return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]

    events, deltas = streamed(), streamed(stream_deltas=True)
    assert len(events) > 1
    for name in ("output_token_logprobs", "output_top_logprobs"):
        assert len(whole[name]) == 6
        assert [event["meta_info"][name] for event in events] == [
            whole[name][: event["meta_info"]["completion_tokens"]] for event in events
        ]
        assert [len(event["meta_info"][name]) for event in deltas] == [len(event["output_ids"]) for event in deltas]
        assert [entry for event in deltas for entry in event["meta_info"][name]] == whole[name]


def test_more_log_probabilities_than_a_request_may_have_are_refused(client: httpx.Client):
    body = {"text": "Hello?", "return_logprob": True, "top_logprobs_num": 20}
    response = client.post("/generate", json=body | {"sampling_params": {"max_new_tokens": 12484}})
    assert response.status_code == 400
    assert "are 1 x 12484 x 21 = 262164, and a request may have 262144 log probabilities" in response.text
