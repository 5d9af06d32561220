"""`deepstack-jax bench`: what it measures of a server whose events come at known times, and what it says of failures.

Latencies are measured on a clock that the scripted answers advance; everything else goes over loopback.
"""

import asyncio
import base64
import gzip
import io
import json
import socket
import statistics
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import jax
import numpy as np
import pytest
import uvicorn
from PIL import Image
from rich.console import Console
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from deepstack_jax.bench.load import Clients, RequestRecord, api_base, poisson_arrivals, run_load
from deepstack_jax.bench.prompts import PromptShape, read_prompts
from deepstack_jax.bench.report import histogram, samples, show, summary
from deepstack_jax.cli import main
from tests import nodes

Script = Sequence[tuple[float, bytes]]  # seconds to wait, and the bytes that come then


def event(content: str | None = None, **more: Any) -> bytes:
    """A chunk of Chat Completions; without content, one that begins an answer."""
    delta = {"role": "assistant", "content": ""} if content is None else {"content": content}
    return b"data: " + json.dumps({"choices": [{"index": 0, "delta": delta}]} | more).encode() + b"\n\n"


def usage(prompt: int, output: int, cached: int | None = None) -> bytes:
    details = None if cached is None else {"cached_tokens": cached}
    found = {"prompt_tokens": prompt, "completion_tokens": output, "prompt_tokens_details": details}
    return event(choices=[], usage=found)


DONE = b"data: [DONE]\n\n"
ANSWER = event() + event("a") + event("b") + usage(5, 2) + DONE


# ---- latencies


class Scripted(httpx.AsyncBaseTransport):
    """Answers each request with the next script; it is the clock too, and only scripts advance it."""

    def __init__(self, *scripts: Script):
        self.now, self.scripts = 10.0, iter(scripts)

    def __call__(self) -> float:
        return self.now

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, content=self._play(next(self.scripts)))

    async def _play(self, script: Script) -> AsyncIterator[bytes]:
        for seconds, data in script:
            self.now += seconds
            yield data


def records_of(*scripts: Script) -> list[RequestRecord]:
    """What becomes of requests that are answered so, one after another."""
    scripted = Scripted(*scripts)

    async def run() -> list[RequestRecord]:
        async with aclosing(Clients("http://scripted", transport=scripted)) as clients:
            return await run_load(clients, [b"{}"] * len(scripts), concurrency=1, clock=scripted)

    return asyncio.run(run())


def test_latencies_are_those_between_the_events():
    """TTFT leaves out the role; one event has four tokens; usage and [DONE] come after the answer's end."""
    first = [
        (0.25, event()),
        (0.25, event("a")),
        (0.125, event("bcde")),
        (0.5, event("f")),
        (1.0, usage(7, 6, 4) + DONE),
    ]
    second = [(1.0, event("only")), (0.5, usage(9, 1) + DONE)]
    records = records_of(first, second)
    found = {name: values.tolist() for name, values in samples(records).items()}
    assert found == {
        "ttft_ms": [500.0, 1000.0],
        "itl_ms": [125.0, 500.0],
        "tpot_ms": [625.0 / 5],  # the second request has one token
        "e2e_ms": [1125.0, 1000.0],
    }
    total = summary(records)
    assert total["duration_s"] == 2.125 + 1.5
    assert total["requests_per_s"] == 2 / 3.625
    assert total["output_tokens_per_s"] == 7 / 3.625
    assert [total[name] for name in ("prompt_tokens", "cached_prompt_tokens", "output_tokens")] == [16, 4, 7]
    assert total["without_usage"] == total["failed"] == 0


def test_events_are_found_wherever_the_stream_is_cut():
    """A line separator of Unicode inside a string ends no line; comments and other fields are no events."""
    stream = b": ping\n\nevent: message\n" + event("a\u2028b").replace(b"\\u2028", "\u2028".encode()) + ANSWER
    whole = records_of([(1.0, stream)])[0]
    assert (whole.error, whole.output_tokens, len(whole.content_times)) == (None, 2, 3)
    assert records_of([(1.0, b"")] + [(0.0, bytes([byte])) for byte in stream.replace(b"\n", b"\r\n")])[0] == whole


@pytest.mark.parametrize("part", ["reasoning_content", "tool_calls"])
def test_thoughts_and_tool_calls_are_a_part_of_the_answer(part: str):
    delta = [{"index": 0, "delta": {part: [{}] if part == "tool_calls" else "hm"}}]
    (record,) = records_of([(0.5, event()), (0.5, event(choices=delta)), (1.0, event("so")), (0.0, DONE)])
    assert record.content_times == [11.0, 12.0]


def test_events_count_as_tokens_without_usage():
    (record,) = records_of([(1.0, event("a") + event("b")), (1.0, event("c")), (0.0, DONE)])
    assert record.tokens == 3
    found = summary([record])
    assert (found["output_tokens"], found["without_usage"], found["prompt_tokens"]) == (3, 1, 0)
    assert found["tpot_ms"]["mean"] == 500.0


def test_percentiles_are_in_proportion_between_values():
    """Those of the standard library, whose method "inclusive" has the smallest value as 0% and the largest as 100%."""
    times = np.random.default_rng(0).gamma(2.0, 1.0, 57)
    found = summary([RequestRecord(0.0, t, [t]) for t in times])["ttft_ms"]
    hundredths = statistics.quantiles(times * 1e3, n=100, method="inclusive")
    for percent in (50, 90, 95, 99):
        assert found[f"p{percent}"] == pytest.approx(hundredths[percent - 1], rel=1e-12)
    assert found["mean"] == pytest.approx(statistics.fmean(times * 1e3), rel=1e-12)
    assert (found["min"], found["max"]) == (min(times) * 1e3, max(times) * 1e3)
    assert summary([RequestRecord(0.0, 1.0, [1.0])])["itl_ms"] is None


def test_bars_stand_where_values_are():
    values = np.array([0.0, 0.0, 0.0, 0.0, 5.0, 9.0, 9.0])
    assert histogram(values, 0.0, 10.0, 10, height=2) == ["█         ", "█    ▄   █"]
    assert histogram(values, 0.0, 10.0, 10, ascii_only=True, height=2) == ["#         ", "#    #   #"]
    assert histogram(np.array([3.0, 3.0]), 3.0, 3.0, 4, height=1) == ["█   "]  # all alike


@pytest.mark.parametrize("ascii_only", [False, True])
def test_the_report_fits_the_terminal(ascii_only: bool):
    records = records_of(*[[(0.1 * n, event("a")), (0.1, event("b")), (0.0, usage(1, 2) + DONE)] for n in range(1, 9)])
    console = Console(file=io.StringIO(), width=80, color_system=None)
    console.print(show(summary(records), samples(records), 80, ascii_only))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= 80
    assert "8 of 8 requests succeeded" in text
    assert text.isascii() == ascii_only
    row = next(line for line in text.splitlines() if line.startswith("end-to-end latency"))
    assert row.split()[2:] == ["550.0", "550.0", "830.0", "865.0", "893.0", "200.0", "900.0"]


# ---- prompts and times


def test_arrivals_are_poisson():
    times = poisson_arrivals(4.0, 20_000, seed=1)
    gaps = np.diff(times)
    assert times[0] == 0.0
    assert gaps.min() >= 0
    # of an exponential distribution, mean and deviation are 1/rate: within five standard errors
    assert gaps.mean() == pytest.approx(0.25, abs=5 * 0.25 / 20_000**0.5)
    assert gaps.std() == pytest.approx(0.25, abs=5 * 0.25 * (2 / 20_000) ** 0.5)
    assert times.tolist() == poisson_arrivals(4.0, 20_000, seed=1).tolist()
    assert times.tolist() != poisson_arrivals(4.0, 20_000, seed=2).tolist()


def pictures(messages: list[dict[str, Any]]) -> list[bytes]:
    urls = [part["image_url"]["url"] for part in messages[0]["content"][:-1]]
    return [base64.b64decode(url.removeprefix("data:image/jpeg;base64,")) for url in urls]


def test_prompts_are_made_of_their_seed_and_number():
    shape = PromptShape(words=20, images=2, image_size=(96, 64), seed=3)
    assert shape.messages(0) == shape.messages(0)
    files = [file for number in range(3) for file in pictures(shape.messages(number))]
    assert len(set(files)) == 6
    assert [Image.open(io.BytesIO(file)).size for file in files] == [(96, 64)] * 6
    texts = [shape.messages(number)[0]["content"][-1]["text"] for number in range(3)]
    assert {len(text.split()) for text in texts} == {20}
    assert len(set(texts)) == 3
    same = PromptShape(words=20, images=2, image_size=(96, 64), same_image=True, seed=3)
    assert pictures(same.messages(0)) == pictures(same.messages(1))
    assert same.messages(0)[0]["content"][-1] != same.messages(1)[0]["content"][-1]


def test_prompts_of_a_file_are_lists_of_messages(tmp_path: Path):
    file, one = tmp_path / "prompts.jsonl", [{"role": "user", "content": "Hi"}]
    file.write_text(f"{json.dumps(one)}\n\n{json.dumps({'messages': one})}\n")
    assert read_prompts(file) == [one, one]
    for text, message in (
        ("{}", "line 1 has no messages"),
        ("[]\n", "line 1"),
        ("x", "not JSON"),
        ("\n", "no prompts"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_prompts(file)


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("http://h:1", "http://h:1/v1"),
        ("http://h:1/v1/", "http://h:1/v1"),
        ("http://h:1/v1/chat/completions", "http://h:1/v1"),
        ("https://h/api/v1", "https://h/api/v1"),
        ("https://h/v1beta/openai/chat/completions", "https://h/v1beta/openai"),
    ],
)
def test_a_url_may_be_that_of_the_server_or_of_its_endpoint(url: str, base: str):
    assert api_base(url) == base


# ---- over loopback


class Server:
    """A server that answers by a function, and remembers bodies, headers and how many requests it had at once."""

    def __init__(self, answer: Callable[[int], Response], models: Sequence[str] = ("m",), at_once: int = 1):
        """It answers only when `at_once` requests are there, and from then on at once."""
        self.answer, self.models, self.at_once = answer, models, at_once
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.running = self.most = 0

    async def chat(self, request: Request) -> Response:
        number = len(self.bodies)
        self.bodies.append(await request.json())
        self.keys.add(request.headers.get("authorization"))
        self.running += 1
        self.most = max(self.most, self.running)
        if self.running == self.at_once:
            self.met.set()
        await self.met.wait()
        self.running -= 1
        return self.answer(number)

    async def list(self, request: Request) -> Response:
        return JSONResponse({"data": [{"id": name} for name in self.models]})

    async def tokenize(self, request: Request) -> Response:
        """Each word has two tokens."""
        return JSONResponse({"tokens": [0] * 2 * len((await request.json())["prompt"].split())})

    async def run(self, listener: socket.socket) -> None:
        self.met = asyncio.Event()
        routes = [Route("/v1/chat/completions", self.chat, methods=["POST"]), Route("/v1/models", self.list)]
        app = Starlette(routes=[*routes, Route("/tokenize", self.tokenize, methods=["POST"])])
        # a logging configuration of its own would close absl's stream, which may be pytest's
        config = uvicorn.Config(app, http="h11", ws="none", lifespan="off", log_config=None)
        self.server = uvicorn.Server(config)
        await self.server.serve([listener])


@contextmanager
def serving(server: Server) -> Iterator[str]:
    """The server's URL, while it runs in a thread."""
    listener = socket.create_server(("127.0.0.1", 0))  # connections wait in line until it is there
    thread = threading.Thread(target=lambda: asyncio.run(server.run(listener)))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.server.should_exit = True
        thread.join(60)


def streamed(data: bytes = ANSWER) -> Response:
    return StreamingResponse(iter([data]), media_type="text/event-stream")


def bench(capfd: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    """Exit code, output and errors of `deepstack-jax bench serve`."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as end:
        main(["bench", "serve", *map(str, args)])
    return int(end.value.code or 0), *capfd.readouterr()


@pytest.fixture(autouse=True)
def _without_key_and_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def test_a_load_sends_what_it_is_asked_for(capfd: pytest.CaptureFixture[str]):
    server = Server(lambda _: streamed())
    options = [
        "--requests",
        6,
        "--warm-up",
        2,
        "--input-tokens",
        20,
        "--output-tokens",
        9,
        "--ignore-eos",
        "--images",
        1,
    ]
    more = ["--image-size", "32x24", "--api-key", "k", "--body", '{"temperature": null, "top_p": 0.5}', "--json"]
    with serving(server) as url:
        began = time.perf_counter()
        code, out, errors = bench(capfd, "--url", url, *options, *more)
        longest = 1e3 * (time.perf_counter() - began)
    assert (code, errors) == (0, "")
    assert len(server.bodies) == 8
    assert server.keys == {"Bearer k"}
    for body in server.bodies:
        (message,) = body.pop("messages")
        assert len(message["content"][1]["text"].split()) == 10  # of two tokens each
        assert Image.open(io.BytesIO(pictures([message])[0])).size == (32, 24)
        assert body == {
            "model": "m",
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": 9,
            "ignore_eos": True,
            "top_p": 0.5,
        }
    found = json.loads(out)
    assert (found["requests"], found["failed"], found["output_tokens"], found["prompt_tokens"]) == (6, 0, 12, 30)
    assert (found["model"], found["url"], found["errors"]) == ("m", url, [])
    assert 0 < found["ttft_ms"]["min"] <= found["ttft_ms"]["max"] <= found["e2e_ms"]["max"] < longest


def test_as_many_requests_run_as_the_user_says(capfd: pytest.CaptureFixture[str]):
    """With a concurrency, no more; with a rate, however many have not been answered."""
    for pace, expected in (("--concurrency", 3), ("--rate", 7)):
        server = Server(lambda _: streamed(), at_once=expected)
        given = 3 if pace == "--concurrency" else 500
        with serving(server) as url:
            code, out, _ = bench(capfd, "--url", url, pace, given, "--requests", 7, "--warm-up", 0)
        assert code == 0
        assert "7 of 7 requests succeeded" in out
        assert server.most == expected


def test_prompts_of_a_file_are_used_in_turn(capfd: pytest.CaptureFixture[str], tmp_path: Path):
    prompts = [[{"role": "user", "content": text}] for text in ("one", "two")]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    server = Server(lambda _: streamed())
    with serving(server) as url:
        options = ["--requests", 3, "--warm-up", 0, "--concurrency", 1]
        assert bench(capfd, "--url", url, "--prompts", tmp_path / "prompts.jsonl", *options)[0] == 0
    assert [body["messages"] for body in server.bodies] == [prompts[0], prompts[1], prompts[0]]


def refused(status: int, body: Any) -> Response:
    return JSONResponse(body, status)


def test_failures_are_counted_by_what_they_say(capfd: pytest.CaptureFixture[str]):
    busy = refused(429, {"error": {"message": "too\nbusy", "type": "server_error"}})

    def answers() -> list[Response]:
        return [
            streamed(),
            busy,
            refused(500, "broken"),
            busy,
            streamed(event("a")),  # neither a reason to finish nor [DONE]
            streamed(event("a") + b'data: {"error": {"message": "out of pages"}}\n\n' + DONE),
            streamed(b'data: "text"\n\n' + DONE),
            JSONResponse({"choices": []}),
            streamed(event("a") + event(choices=[{"delta": {}, "finish_reason": "stop"}])),
        ]

    options = ["--requests", 9, "--warm-up", 0, "--concurrency", 1]
    with serving(Server(lambda number: answers()[number % 9])) as url:
        code, out, errors = bench(capfd, "--url", url, *options, "--json")
        shown = bench(capfd, "--url", url, *options)[1]
    found = json.loads(out)
    assert code == 1
    assert errors == "error: 7 of 9 requests failed; 429 too busy\n"
    assert (found["failed"], found["output_tokens"]) == (7, 3)
    assert [(each["count"], each["status"], each["message"]) for each in found["errors"]] == [
        (2, 429, "429 too busy"),
        (1, 500, "500 broken"),
        (1, 200, "the stream broke off"),
        (1, 200, "out of pages"),
        (1, 200, 'an event is not a chunk of Chat Completions: "text"'),
        (1, 200, "the answer is not a stream of events"),
    ]
    assert "500 broken" in shown


async def breaks() -> AsyncIterator[bytes]:
    yield event("a")
    raise ConnectionResetError


async def never_ends() -> AsyncIterator[bytes]:
    yield event("a")
    await asyncio.Event().wait()


@pytest.mark.parametrize(
    ("answer", "options", "message"),
    [
        (breaks, [], "the connection failed: "),
        (never_ends, ["--timeout", 0.2], "no whole answer within 0.2 s"),
    ],
)
def test_an_answer_without_an_end_has_failed(
    answer: Callable[[], AsyncIterator[bytes]],
    options: list[object],
    message: str,
    capfd: pytest.CaptureFixture[str],
):
    with serving(Server(lambda _: StreamingResponse(answer()))) as url:
        code, out, _ = bench(capfd, "--url", url, "--model", "m", "--requests", 1, "--warm-up", 0, "--json", *options)
    (error,) = json.loads(out)["errors"]
    assert code == 1
    assert error["message"].startswith(message)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (refused(401, {"error": {"message": "no key"}}), "401 no key (give --api-key, or set OPENAI_API_KEY)"),
        (refused(404, {"detail": "no such model"}), "404 no such model (check --url and --model)"),
        (Response(status_code=308, headers={"location": "https://there/"}), "308 redirected to https://there/"),
        (Response("<html>", 502), "502 Bad Gateway"),
    ],
)
def test_a_first_request_that_fails_is_one_line(answer: Response, message: str, capfd: pytest.CaptureFixture[str]):
    with serving(Server(lambda _: answer)) as url:
        assert bench(capfd, "--url", url) == (1, "", f"error: {url}/v1/chat/completions: {message}\n")


def test_a_server_that_is_not_there_is_one_line(capfd: pytest.CaptureFixture[str]):
    with socket.create_server(("127.0.0.1", 0)) as gone:
        url = f"http://127.0.0.1:{gone.getsockname()[1]}"
    for options in ([], ["--model", "m"]):
        code, out, errors = bench(capfd, "--url", url, *options)
        assert (code, out, len(errors.splitlines())) == (1, "", 1)
        assert f"{url}/ can't be reached" in errors


@pytest.mark.parametrize(
    ("path", "models", "message"),
    [
        ("", (), "/v1/models lists no model: pass --model"),
        ("", ("a", "b"), "/v1/models lists 2 models (a, b): pass --model"),
        ("/wrong", ("a",), "/wrong/v1/models: 404 Not Found (check --url and --model)"),
    ],
)
def test_a_model_that_is_not_clear_is_one_line(
    path: str, models: Sequence[str], message: str, capfd: pytest.CaptureFixture[str]
):
    with serving(Server(lambda _: streamed(), models)) as url:
        code, out, errors = bench(capfd, "--url", url + path)
    assert (code, out, len(errors.splitlines())) == (1, "", 1)
    assert message in errors


@pytest.mark.parametrize(
    "args",
    [
        ["--url", "127.0.0.1:8000"],
        ["--rate", 2, "--concurrency", 2],
        ["--image-size", "448"],
        ["--body", "[]"],
        ["--requests", 0],
    ],
)
def test_what_makes_no_sense_is_a_usage_error(args: list[object], capfd: pytest.CaptureFixture[str]):
    code, _, errors = bench(capfd, *args)
    assert code == 2
    assert args[0] in " ".join(errors.split())


def test_the_projects_own_server_gives_all_that_is_reported(capfd: pytest.CaptureFixture[str]):
    options = ["--requests", 3, "--warm-up", 1, "--concurrency", 1, "--images", 1, "--image-size", "64x64", "--json"]
    lengths = ["--input-tokens", 20, "--output-tokens", 9, "--ignore-eos"]
    with nodes.serving(Path("tiny-vl"), "--slots", "1") as server:
        code, out, errors = bench(capfd, "--url", server.url, *options, *lengths)
        prompt = PromptShape(images=1, image_size=(64, 64)).messages(0)
        empty = [{"role": "user", "content": [prompt[0]["content"][0], {"type": "text", "text": ""}]}]
        answer = server.client.post("/v1/chat/completions", json={"model": "tiny-vl", "messages": empty})
    assert (code, errors) == (0, "")
    found = json.loads(out)
    assert (found["model"], found["failed"], found["output_tokens"], found["without_usage"]) == ("tiny-vl", 0, 27, 0)
    # the template and the picture, and in each request about 20 tokens of text: whole words, of up to four tokens
    text = found["prompt_tokens"] / 3 - answer.json()["usage"]["prompt_tokens"]
    assert text == pytest.approx(20, abs=8)
    assert 0 < found["ttft_ms"]["min"] < found["e2e_ms"]["min"]
    assert found["tpot_ms"]["mean"] > 0


def test_decode_measures_both_stages_and_traces_them(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    capfd.readouterr()
    sizes = ["--batch", "1", "--prompt-tokens", "9", "--steps", "3", "--rounds", "3"]
    with pytest.raises(SystemExit):
        main(["bench", "decode", "tiny-vl", *sizes, "--json", "--profile", str(tmp_path)])
    jax.config.update("jax_compilation_cache_include_metadata_in_key", False)
    found = json.loads(capfd.readouterr().out)
    assert (found["prefill"]["tokens"], found["decode"]["tokens"]) == (9, 3)
    for stage in (found["prefill"], found["decode"]):
        assert 0 < stage["seconds_min"] <= stage["seconds"] <= stage["seconds_max"]
        assert stage["tokens_per_s"] == stage["tokens"] / stage["seconds"]
    (folder,) = tmp_path.glob("plugins/profile/*")
    with gzip.open(folder / "perfetto_trace.json.gz") as file:
        events = [event.get("name") for event in json.load(file)["traceEvents"]]
    assert [events.count(name) for name in ("prefill", "decode")] == [3, 3]  # one of each round
    assert events.count("engine turn") >= 6
    assert not [name for name in events if name and name.startswith("$")]  # no calls of Python
    (programs,) = folder.glob("*.xplane.pb")
    for scope in (b"layer1/attention/paged_attention", b"layer1/mlp/fused_moe", b"lm_head", b"sample"):
        assert scope in programs.read_bytes()
