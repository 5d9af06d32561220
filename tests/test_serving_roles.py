"""The three roles over HTTP: real `deepstack-jax serve` processes, Mooncake between them, a client in front."""

import asyncio
import base64
import contextlib
import io
import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import av
import httpx
import numpy as np
import openai
import psutil
import pytest
from PIL import Image

from deepstack_jax.cli import main
from deepstack_jax.disagg.language.link import HEARTBEAT_TIMEOUT_S
from tests.api_server import client_of
from tests.films import shared_samples
from tests.nodes import BLOCK, CONFIG, POOL, TOKENS, ServeNode, serving, write_image_sensitive_checkpoint
from tests.waiting import until

MARKED = "<|vision_start|><|image_pad|><|vision_end|>"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("roles") / "tiny"
    write_image_sensitive_checkpoint(path, min_pixels=4096)
    return path


@pytest.fixture(scope="module")
def encode(checkpoint: Path) -> Iterator[ServeNode]:
    with serving(checkpoint, "--role", "encode", "--decoders", "2", *BLOCK) as node:
        yield node


@pytest.fixture(scope="module")
def language(checkpoint: Path, encode: ServeNode) -> Iterator[ServeNode]:
    options = "--role", "language", "--encoder", encode.control, "--research"
    with serving(checkpoint, *options, *BLOCK, *POOL) as node:
        node.ask_when_connected(text="Hello?", image_data=picture(0))
        yield node


@pytest.fixture(scope="module")
def unified(checkpoint: Path) -> Iterator[ServeNode]:
    with serving(checkpoint, "--decoders", "2", "--research") as node:
        yield node


def picture(seed: int, width: int = 64, height: int = 64) -> str:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def photograph() -> str:
    """As phones write them into .jpg: two pictures in one file."""
    file = io.BytesIO()
    first, second = (Image.effect_mandelbrot((64, 64), (-2, -1, 1, side), 20).convert("RGB") for side in (1, 2))
    first.save(file, "MPO", save_all=True, append_images=[second])
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def cut() -> str:
    """A picture that is damaged behind its header."""
    data = base64.b64decode(photograph().partition(",")[2])
    return "data:image/jpeg;base64," + base64.b64encode(data[:1200]).decode()


def clip() -> str:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for frame in np.random.default_rng(9).integers(0, 256, (8, 64, 96, 3), np.uint8):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return "data:video/mp4;base64," + base64.b64encode(file.getvalue()).decode()


REQUESTS: dict[str, dict[str, Any]] = {
    "text": {"text": "Who is there?"},
    "image": {"text": "What is this?", "image_data": picture(1)},
    "images": {"text": "Which one?", "image_data": [picture(1), picture(2, 96, 64), picture(3, 64, 128)]},
    "video": {"text": "What happens?", "video_data": clip()},
    "photograph": {"text": "What is this?", "image_data": photograph()},
    "frames": {"text": "What happens?", "video_data": [[picture(1), picture(2), photograph()]]},
    "messages": {
        "messages": [
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": ["This", {"type": "image_url", "image_url": {"url": picture(2)}}, "?"]},
        ]
    },
    # as the published design writes it
    "design": {
        "text": "What is this?",
        "image": picture(1),
        "max_tokens": 12,
        "sampling_params": {"ignore_eos": True},
    },
    "logprobs": {"text": "What is this?", "image_data": picture(1), "return_logprob": True, "top_logprobs_num": 2},
    "drawn": {
        "text": "What is this?",
        "image_data": picture(2),
        "sampling_params": TOKENS | {"temperature": 0.9, "seed": 5},
    },
}


@pytest.mark.parametrize("name", REQUESTS)
def test_all_roles_give_the_same_answer(unified: ServeNode, language: ServeNode, encode: ServeNode, name: str):
    whole, split, passed = (node.ask(**REQUESTS[name]) for node in (unified, language, encode))
    assert split["output_ids"] == whole["output_ids"]
    assert passed["output_ids"] == whole["output_ids"]
    assert split["text"] == passed["text"] == whole["text"]
    for figure in ("prompt_tokens", "output_token_logprobs", "output_top_logprobs"):
        assert split["meta_info"].get(figure) == passed["meta_info"].get(figure) == whole["meta_info"].get(figure)
    assert len(whole["meta_info"].get("output_top_logprobs", [])) == 12 * (name == "logprobs")
    assert len(whole["output_ids"]) == 12


def test_pictures_make_the_answers_differ(unified: ServeNode):
    """Otherwise equal answers would prove nothing about the rows."""
    one, other = (unified.ask(text="What is this?", image_data=picture(seed))["output_ids"] for seed in (1, 2))
    assert one != other


@pytest.mark.parametrize("role", ["language", "encode"])
def test_the_answer_tells_how_the_rows_came(language: ServeNode, encode: ServeNode, role: str):
    meta = {"language": language, "encode": encode}[role].ask(**REQUESTS["image"])["meta_info"]
    assert meta["timings"].keys() == {"prepare", "encode", "transfer", "queue", "prefill", "decode"}
    split = meta["split"]
    # the image's four rows lie in one or two blocks of four tokens, and a round has at most two blocks
    assert len(split["rounds"]) == 1
    assert len(split["encoded"]) <= 1  # none if the encode node still has its rows
    times = [time for begin_end in split["rounds"] for time in begin_end]
    assert times == sorted(times)
    assert times[0] > 0
    assert times[-1] < meta["e2e_latency"]
    # 64 x 64 pixels are four rows: an embedding and one deepstack level, float32; an id and three positions a token
    width = CONFIG["text_config"]["hidden_size"]
    ids_and_positions = split["bytes"] - 4 * 2 * width * 4
    assert ids_and_positions in (16 * 4, 16 * 8)  # of these blocks only
    text = language.ask(text="Who is there?")["meta_info"]
    assert "split" not in text


@pytest.mark.parametrize("role", ["language", "encode"])
def test_streams_go_through_both_roles(unified: ServeNode, language: ServeNode, encode: ServeNode, role: str):
    node = {"language": language, "encode": encode}[role]
    whole = unified.ask(**REQUESTS["image"])
    with node.client.stream(
        "POST", "/generate", json={"sampling_params": TOKENS, **REQUESTS["image"], "stream": True}
    ) as response:
        assert response.status_code == 200
        lines = [line[6:] for line in response.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    answers = [json.loads(line) for line in lines]
    assert len(answers) > 1
    assert answers[-1]["output_ids"] == whole["output_ids"]
    assert answers[-1]["text"] == whole["text"]


def test_deltas_go_through_the_encode_node(unified: ServeNode, language: ServeNode, encode: ServeNode):
    whole = unified.ask(**REQUESTS["image"])
    body = {"sampling_params": TOKENS, **REQUESTS["image"], "stream": True, "stream_deltas": True}
    with encode.client.stream("POST", "/generate", json=body) as response:
        events = [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: {")]
    assert [token for event in events for token in event["output_ids"]] == whole["output_ids"]
    assert "".join(event["text"] for event in events) == whole["text"]


def test_openais_api_is_the_same_on_all_roles(unified: ServeNode, language: ServeNode, encode: ServeNode):
    asked: list[Any] = [
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": picture(1)}},
                {"type": "text", "text": "What is this?"},
            ],
        }
    ]
    answers = []
    for node in (unified, language, encode):
        client = client_of(node.url)
        options: dict[str, Any] = {"model": "tiny", "messages": asked, "max_tokens": 12, "temperature": 0}
        whole = client.chat.completions.create(**options, logprobs=True, top_logprobs=2, extra_body={"regex": "[a-z]*"})
        events = list(client.chat.completions.create(**options, n=2, stream=True))
        texts = ["", ""]
        for event in events:
            texts[event.choices[0].index] += event.choices[0].delta.content or ""
        answers.append((whole.choices[0].model_dump(), texts))
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(**options | {"model": "other"})
    assert answers[0] == answers[1] == answers[2]
    assert answers[0][1][0] == answers[0][1][1] != ""


def conversation(*pictures: str) -> list[dict[str, Any]]:
    parts = [{"type": "image_url", "image_url": {"url": each}} for each in pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "What is this?"}]}]


def test_the_timeline_of_the_split_names_both_nodes_and_what_was_sent(language: ServeNode, encode: ServeNode):
    """Pictures that no other test sends: they are encoded for this one."""
    for node, seeds in ((language, (501, 502)), (encode, (503, 504))):
        body = {"messages": conversation(*map(picture, seeds)), "max_tokens": 4, "temperature": 0, "timeline": True}
        timeline = node.client.post("/v1/chat/completions", json=body | {"ignore_eos": True}).json()["timeline"]
        assert timeline["split"]
        assert [each["name"] for each in timeline["nodes"]] == ["language", "encoder 0"]
        assert [each["role"] for each in timeline["nodes"]] == ["language", "encode"]
        of = {each: [span for span in timeline["spans"] if span["stage"] == each] for each in ("encode", "transfer")}
        assert [span["label"] for span in of["encode"]] == ["image 1", "image 2"]
        rounds = of["transfer"]
        assert [span["label"] for span in rounds] == [f"round {number}" for number in range(1, len(rounds) + 1)]
        assert len(rounds) > 1
        assert timeline["bytes_on_wire"] == sum(span["bytes"] for span in rounds) > 0
        assert {span["node"] for span in (*of["encode"], *rounds)} == {1}
        here = {span["stage"] for span in timeline["spans"] if span["node"] == 0}
        assert here == {"prepare", "queue", "prefill", "decode"}
        assert all(span["begin_ms"] <= span["end_ms"] <= timeline["total_ms"] for span in timeline["spans"])


def test_all_roles_look_at_the_same_rows_and_tokens(unified: ServeNode, language: ServeNode, encode: ServeNode):
    body = {"messages": conversation(picture(1), picture(2, 96, 64)), "answer_ids": [5, 9, 2]}
    for path in ("/research/rows", "/research/tokens"):
        answers = [node.client.post(path, json=body) for node in (unified, language, encode)]
        assert [answer.status_code for answer in answers] == [200] * 3
        assert answers[0].json() == answers[1].json() == answers[2].json()
    scaled = body | {"deepstack_scales": [0], "max_tokens": 8, "temperature": 0, "logprobs": True}
    told = [node.client.post("/v1/chat/completions", json=scaled).json() for node in (unified, language, encode)]
    assert told[0]["choices"] == told[1]["choices"] == told[2]["choices"]


def test_each_node_knows_the_cluster_around_it(language: ServeNode, encode: ServeNode):
    language.ask(**REQUESTS["image"])
    ours, theirs = language.client.get("/cluster"), encode.client.get("/cluster")
    own, encoder = ours.json()["nodes"]
    assert (own["self"], own["role"], encoder["self"], encoder["role"]) == (True, "language", False, "encode")
    assert (encoder["name"], encoder["state"], encoder["reason"]) == ("encoder 0", "ready", None)
    assert encoder["requests"] > 0
    assert encoder["transfer"] == own["transfer"]
    assert encoder["transfer"]["bytes"] > 0
    until(lambda: (language.client.get("/cluster").json()["nodes"][1]["encoder_cache"] or {}).get("entries"))
    assert {"node": "encoder 0", "what": "connected"}.items() <= ours.json()["events"][0].items()
    itself, *others = theirs.json()["nodes"]
    assert (itself["role"], itself["state"]) == ("encode", "ready")
    assert itself["encoder_cache"]["entries"] > 0
    assert [(each["role"], each["state"]) for each in others] == [("language", "ready")]
    for response in (ours, theirs):
        assert not re.search(r"://|\d:\d|127\.0|localhost", response.text)


def test_every_role_is_healthy_and_says_which_it_is(unified: ServeNode, language: ServeNode, encode: ServeNode):
    for node, role in ((unified, "unified"), (language, "language"), (encode, "encode")):
        for path, status in (("/health", "ok"), ("/ready", "ready"), ("/health_generate", "ok")):
            response = node.client.get(path)
            load = {"preparing_seconds": 0.0} if (role, path) == ("encode", "/health") else {}
            assert (response.status_code, response.json()) == (200, {"status": status, "role": role, **load})
        assert node.client.get("/v1/models").json()["data"][0]["id"] == "tiny"


def test_both_sides_of_the_split_count_what_goes_between_them(language: ServeNode, encode: ServeNode):
    before = [node.metrics() for node in (language, encode)]
    split = language.ask(text="What is this?", image_data=picture(77))["meta_info"]["split"]
    encode.ask(text="What is this?", image_data=picture(77))
    gained = [
        {name: value - old.get(name, 0) for name, value in node.metrics().items()}
        for node, old in zip((language, encode), before, strict=True)
    ]
    received, sent = gained
    assert received["transfer_rounds_total"] == 2
    assert received["transfer_bytes_total"] >= split["bytes"]
    assert sent["written_bytes_total"] == received["transfer_bytes_total"]
    assert sent["blocks_written_total"] >= 2
    assert (sent["images_encoded_total"], sent["row_cache_hits_total"]) == (1, 1)
    assert sent["row_cache_entries"] == 1
    assert received["requests_total"] == 2
    assert sent["requests_total"] == 1  # it passed one on
    assert language.metrics()["encoders_connected"] == encode.metrics()["language_nodes_connected"] == 1


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"text": "a", "image_data": "data:image/png;base64,aGVsbG8="}, 400, "not an image"),
        ({"text": "a", "image_data": cut()}, 400, "truncated"),
        ({"text": "a", "image_data": picture(1), "tools": [{"name": "f", "most": 10**30}]}, 400, "no chat template"),
        ({"text": "a", "image_data": [picture(1)] * 33}, 413, "--max-items"),
        ({"text": "a", "image_data": "http://127.0.0.1/x.png"}, 403, "not an allowed domain"),
        ({"text": MARKED, "image_data": [picture(1), picture(2)]}, 400, "1 image placeholders"),
        ({"text": "a", "image_data": picture(1), "sampling_params": {"max_new_tokens": 2040}}, 400, "exceed the 2048"),
        ({"text": "a", "sampling_params": {"top_p": 2}}, 400, "top_p"),
    ],
)
def test_refusals_are_the_same_on_all_roles(
    unified: ServeNode, language: ServeNode, encode: ServeNode, body: dict[str, Any], status: int, words: str
):
    for node in (unified, language, encode):
        response = node.client.post("/generate", json=body)
        assert response.status_code == status, (node.url, response.text)
        assert words in response.json()["error"]["message"]


@pytest.mark.parametrize("role", ["unified", "language"])
def test_pictures_are_answered_beside_attackers(unified: ServeNode, language: ServeNode, role: str):
    """Each sends hours of large frames in a small file."""
    node = {"unified": unified, "language": language}[role]
    sample = io.BytesIO()
    Image.new("L", (4000, 4000)).save(sample, "JPEG")
    attack = "data:video/quicktime;base64," + base64.b64encode(shared_samples(sample.getvalue(), 7200)).decode()
    expected = unified.ask(**REQUESTS["images"])["output_ids"]
    with ThreadPoolExecutor(12) as pool:
        bodies = [{"text": "a", "video_data": attack}] * 8
        attackers = [pool.submit(node.client.post, "/generate", json=body) for body in bodies]
        honest = [pool.submit(node.ask, **REQUESTS["images"]) for _ in range(4)]
        assert all(future.result()["output_ids"] == expected for future in honest)
    for future in attackers:
        assert future.result().status_code == 400
        assert "share their bytes" in future.result().json()["error"]["message"]
    assert all(child.memory_info().rss < 300 << 20 for child in node.decoders())


@pytest.mark.parametrize("role", ["unified", "encode"])
def test_a_hung_decoder_holds_up_one_request_only(
    unified: ServeNode, language: ServeNode, encode: ServeNode, role: str
):
    """Of four requests one gets the decoder that is stopped; its client goes away in the end."""
    node, asked = (unified, unified) if role == "unified" else (encode, language)
    expected = unified.ask(**REQUESTS["images"])["output_ids"]
    stopped = node.decoders()[0]
    stopped.suspend()

    async def work() -> None:
        async with httpx.AsyncClient(base_url=asked.url, timeout=120) as client:

            async def ask() -> list[int]:
                response = await client.post("/generate", json={"sampling_params": TOKENS, **REQUESTS["images"]})
                return response.json()["output_ids"]

            hung = {asyncio.create_task(ask()) for _ in range(4)}
            while len(hung) > 1:
                done, hung = await asyncio.wait(hung, return_when=asyncio.FIRST_COMPLETED)
                assert all(task.result() == expected for task in done)
            assert await ask() == expected
            (task,) = hung
            assert task.cancel()
            await asyncio.wait(hung)
            assert not (await asyncio.to_thread(psutil.wait_procs, [stopped], timeout=60))[1]
            assert [await ask() for _ in range(3)] == [expected] * 3

    asyncio.run(work())


def test_an_encoder_that_dies_is_replaced_and_at_last_reported(checkpoint: Path, unified: ServeNode):
    """Two encoders: the second goes on when the first is gone; with none 503, and texts are answered all the same."""
    right = unified.ask(**REQUESTS["image"])["output_ids"]
    with contextlib.ExitStack() as stack:
        encoders = [ServeNode(checkpoint, "--role", "encode", *BLOCK) for _ in range(2)]
        for encoder in encoders:
            stack.callback(encoder.close)
        for encoder in encoders:
            encoder.wait()
        options = [option for encoder in encoders for option in ("--encoder", encoder.control)]
        node = stack.enter_context(serving(checkpoint, "--role", "language", *options, *BLOCK, *POOL))
        first = node.ask_when_connected(**REQUESTS["image"])
        assert first["output_ids"] == right
        # one request at a time goes to the first; of four at once some go to the second, once it has been met
        used: set[int] = set()
        deadline = time.monotonic() + 60
        with ThreadPoolExecutor(4) as pool:
            while len(used) < 2:
                assert time.monotonic() < deadline
                for answer in pool.map(lambda _: node.ask(**REQUESTS["image"]), range(4)):
                    assert answer["output_ids"] == right
                    used.add(answer["meta_info"]["split"]["encoder"])

        encoders[0].process.kill()
        after = node.ask(**REQUESTS["image"])
        assert after["output_ids"] == right
        # whoever watches sees it within the deadline of heartbeats, and what became of its requests
        until(lambda: node.client.get("/cluster").json()["nodes"][1]["state"] == "unreachable")
        cluster = node.client.get("/cluster").json()
        assert cluster["nodes"][1]["reason"] == f"encoder 0 has not replied for {HEARTBEAT_TIMEOUT_S:g} s"
        assert cluster["nodes"][1]["encoder_cache"] is None
        assert cluster["nodes"][2]["state"] == "ready"
        happened = [(event["node"], event["what"]) for event in cluster["events"]]
        assert happened[-1] == ("encoder 0", cluster["nodes"][1]["reason"]) or happened[-1][0] == "encoder 1"

        assert encoders[1].terminate()[0] == 0
        response = node.client.post("/generate", json={"sampling_params": TOKENS, **REQUESTS["image"]})
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) >= 1
        assert response.json()["error"]["message"].startswith("no encoder is ")
        assert not re.search(r"://|\d:\d|127\.0", response.text)
        assert node.ask(text="Who is there?")["output_ids"] == unified.ask(text="Who is there?")["output_ids"]
        code, errors = node.terminate()
        assert (code, errors) == (0, "")


def test_a_language_node_that_dies_ends_its_streams_at_once_and_others_go_on(
    checkpoint: Path, encode: ServeNode, language: ServeNode
):
    body = {"text": "Hello?", "stream": True, "sampling_params": TOKENS | {"max_new_tokens": 1900}}
    with (
        serving(checkpoint, "--role", "language", "--encoder", encode.control, *BLOCK, *POOL) as other,
        contextlib.ExitStack() as stack,
    ):
        other.ask_when_connected(**REQUESTS["image"])
        streams = [stack.enter_context(encode.client.stream("POST", "/generate", json=body)) for _ in range(2)]
        texts = [stream.iter_lines() for stream in streams]
        for lines in texts:  # both nodes answer
            assert json.loads(next(lines).removeprefix("data: "))["meta_info"]["finish_reason"] is None
        other.process.kill()
        ends = [[line for line in lines if line] for lines in texts]
        assert [end[-1] for end in ends] == ["data: [DONE]"] * 2
        lasts = sorted((json.loads(end[-2].removeprefix("data: ")) for end in ends), key=lambda last: "error" in last)
        assert lasts[0]["meta_info"]["completion_tokens"] == 1900
        assert lasts[1]["error"]["message"] == "the language node ended its answer early: try again"
        for _ in range(4):  # half of them would go to the dead one, which still counts as connected
            assert len(encode.ask(**REQUESTS["text"])["output_ids"]) == 12


def test_a_language_node_with_vision_weights_encodes_when_nobody_else_does(checkpoint: Path, unified: ServeNode):
    with serving(checkpoint, "--role", "language", "--encoder", "tcp://127.0.0.1:9", "--encode-here", *BLOCK) as node:
        answer = node.ask(**REQUESTS["images"])
        assert answer["output_ids"] == unified.ask(**REQUESTS["images"])["output_ids"]
        assert "split" not in answer["meta_info"]
        cluster = node.client.get("/cluster").json()
        assert (cluster["nodes"][1]["state"], cluster["nodes"][1]["reason"]) == ("unreachable", "not connected yet")
        assert "a request is encoded here" in cluster["events"][-1]["what"]
        assert node.terminate()[0] == 0


def test_texts_are_answered_while_no_encoder_was_ever_there(checkpoint: Path, unified: ServeNode):
    with serving(checkpoint, "--role", "language", "--encoder", "tcp://127.0.0.1:9", *BLOCK) as node:
        assert node.ask(text="Who is there?")["output_ids"] == unified.ask(text="Who is there?")["output_ids"]
        assert node.client.get("/health").status_code == 200
        refused = node.client.post("/generate", json=REQUESTS["image"])
        assert refused.status_code == 503
        assert "no encoder is connected" in refused.json()["error"]["message"]


def test_an_encode_node_without_a_language_node_says_so_and_all_end_cleanly(
    checkpoint: Path, tmp_path: Path, unified: ServeNode
):
    """With a key file, and blocks that are encrypted with it: the rows are the same."""
    key = tmp_path / "cluster.key"
    main_ok(["keygen", str(key)])
    options = ("--key", str(key), "--encrypt-blocks", "--grace", "1", "--decoders", "1", *BLOCK)
    with serving(checkpoint, "--role", "encode", *options) as node:
        refused = node.client.post("/generate", json=REQUESTS["text"])
        assert refused.status_code == 503
        assert "no language node is connected" in refused.json()["error"]["message"]
        with (
            serving(checkpoint, "--role", "language", "--encoder", node.control, *options) as language,
            ThreadPoolExecutor(2) as pool,
        ):
            answer = language.ask_when_connected(**REQUESTS["image"])
            assert answer["output_ids"] == unified.ask(**REQUESTS["image"])["output_ids"]
            # requests that hang in the decoders of both nodes don't hold up their end
            for hanging in (node, language):
                (decoder,) = hanging.decoders()
                decoder.suspend()
                pool.submit(language.client.post, "/generate", json=REQUESTS["photograph"])
            code, errors = language.terminate()
            assert (code, errors) == (0, "")
        code, errors = node.terminate()
        assert (code, errors) == (0, "")


def test_keys_and_request_ids_go_through_the_encode_node(checkpoint: Path, tmp_path: Path):
    """The language node asks for a key and the encode node doesn't: clients give it to either."""
    with (
        serving(checkpoint, "--role", "encode", *BLOCK) as encode,
        serving(checkpoint, "--role", "language", "--encoder", encode.control, "--api-key", "sk-1", "--log-json",
                *BLOCK, *POOL) as language,
    ):  # fmt: skip
        language.client.headers["authorization"] = encode.client.headers["authorization"] = "Bearer sk-1"
        language.ask_when_connected(**REQUESTS["image"])
        trace = f"00-{'a' * 32}-{'b' * 16}-01"
        encode.client.headers.update({"x-request-id": "through-both", "traceparent": trace})
        assert encode.ask_when_connected(**REQUESTS["image"])["meta_info"]["id"] == "through-both"
        del encode.client.headers["authorization"]
        refused = encode.client.post("/generate", json=REQUESTS["text"])
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
        code, errors = language.terminate()
    assert code == 0
    lines = [json.loads(line) for line in errors.splitlines()]
    (line,) = [line for line in lines if line.get("request_id") == "through-both" and line["status"] == 200]
    assert (line["traceparent"], line["tenant"][:4]) == (trace, "key-")
    assert "sk-1" not in errors


def main_ok(args: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(args)
    assert end.value.code == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--encoder", "tcp://127.0.0.1:9"], "--encoder tcp://127.0.0.1:9 is for --role language"),
        (["--role", "encode", "--encoder", "tcp://127.0.0.1:9"], "is for --role language"),
        (["--role", "language"], "--role language needs --encoder tcp://host:port of an encode node, or --encode-here"),
        (["--role", "language", "--encoder", "127.0.0.1:9"], "is not a valid endpoint: expected tcp://host:port"),
        (["--role", "language", "--encoder", "tcp://10.0.0.1:9"], "tcp://10.0.0.1:9 is not loopback: give --key"),
        (["--role", "encode", "--control", "tcp://0.0.0.0:*"], "is not loopback: give --key"),
        (
            ["--role", "encode", "--host", "0.0.0.0"],
            "--host 0.0.0.0 is not an address that others can reach: give --node-address",
        ),
        (["--role", "encode", "--key", "OPEN"], "can be read by others: chmod 600"),
        (["--role", "encode", "--key", "nowhere.key"], "nowhere.key"),
    ],
)
def test_options_that_do_not_fit_are_refused_in_one_line(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str
):
    (tmp_path / "open.key").write_text("{}")
    (tmp_path / "open.key").chmod(0o644)
    places = {"OPEN": str(tmp_path / "open.key")}
    with pytest.raises(SystemExit) as end:
        main(["serve", str(checkpoint), "--port", "0", *(places.get(option, option) for option in options)])
    assert end.value.code == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1
    assert words in lines[0]
