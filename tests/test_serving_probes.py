"""What operators and their tools ask of the server: is it alive, is it ready, what is it, and what it has done."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

import deepstack_jax as dsj
from deepstack_jax.engine.options import EngineOptions
from deepstack_jax.serving.access import Access, Keys
from deepstack_jax.serving.http import create_app
from deepstack_jax.serving.metrics import OUTCOMES, VLLM_NAMES
from deepstack_jax.serving.policy import MediaPolicy
from deepstack_jax.serving.text_node import TextNode
from tests.nodes import write_image_sensitive_checkpoint
from tests.test_serving_http import LONG, Watched, ask, events_of, serving
from tests.test_serving_roles import picture
from tests.waiting import until

BOSS = {"authorization": "Bearer sk-boss"}
SMALL = {"text": "Who is there?", "sampling_params": {"max_new_tokens": 8, "ignore_eos": True}}
ENDLESS = {"text": "Who is there?", "sampling_params": {"max_new_tokens": LONG, "ignore_eos": True}, "stream": True}
DASHBOARD = Path(__file__).parent.parent / "deploy" / "grafana-dashboard.json"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("probes") / "tiny"
    write_image_sensitive_checkpoint(path, min_pixels=4096)
    return path


@pytest.fixture(scope="module")
def policy() -> MediaPolicy:
    return MediaPolicy()


@pytest.fixture(scope="module")
def node(checkpoint: Path, policy: MediaPolicy) -> Iterator[Watched]:
    engine = EngineOptions(slots=2, decode_steps=1)
    node = TextNode(dsj.load(checkpoint), policy, name="tiny", engine=engine, warm_up=False)
    yield Watched(node)
    node.stop(0)
    asyncio.run(node.close())


def test_while_the_model_loads_only_probes_are_answered(node: Watched, policy: MediaPolicy):
    app = create_app(None, policy, access=Access(Keys(["sk-key"])))
    key = {"authorization": "Bearer sk-key"}
    with serving(app) as client:
        health, ready, version = (client.get(path) for path in ("/health", "/ready", "/version"))
        assert (health.status_code, health.json()["status"]) == (200, "loading")
        assert (ready.status_code, ready.json()["status"]) == (503, "loading")
        assert (version.status_code, version.json()) == (200, {"version": dsj.__version__})
        assert client.post("/generate", json=SMALL).status_code == 401
        for method, path in (("POST", "/generate"), ("GET", "/v1/models"), ("GET", "/metrics")):
            response = client.request(method, path, json=SMALL, headers=key)
            assert response.status_code == 503
            assert int(response.headers["retry-after"]) > 0
            assert response.json()["error"]["code"] == "loading"
        app.state.service.open(node)
        assert client.get("/ready").json() == {"status": "ready", "role": "unified"}
        assert client.post("/generate", json=SMALL, headers=key).status_code == 200


def test_a_server_that_drains_finishes_what_it_has(node: Watched, policy: MediaPolicy):
    with serving(create_app(node, policy, access=Access(Keys(admin="sk-boss")))) as client:
        body = ENDLESS | {"sampling_params": {"max_new_tokens": 300, "ignore_eos": True}}
        with client.stream("POST", "/generate", json=body) as response:
            events = events_of(response.iter_lines())
            next(events)
            drained = client.post("/drain", headers=BOSS)
            assert drained.json() == {"status": "draining", "in_flight": 1}
            ready = client.get("/ready")
            assert (ready.status_code, ready.json()["status"]) == (503, "draining")
            assert client.get("/health").status_code == 200
            refused = client.post("/generate", json=SMALL)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "stopping")
            assert "retry-after" in refused.headers
            *_, last, done = events
        assert (done, len(last["output_ids"])) == ("[DONE]", 300)
        assert client.get("/server_info", headers=BOSS).json()["draining"]


def test_the_server_says_what_it_is(node: Watched, policy: MediaPolicy):
    options = {"port": 8000, "allow_folder": Path("media"), "cors_origin": None}
    with serving(create_app(node, policy, access=Access(Keys(admin="sk-boss")), options=options)) as client:
        info = client.get("/server_info", headers=BOSS).json()
    assert (info["role"], info["models"]) == ("unified", ["tiny"])
    assert info["engine_shape"] == node._node.engine_shape
    assert info["versions"].keys() >= {"deepstack-jax", "jax", "python"}
    assert info["options"] == {"port": 8000, "allow_folder": "media", "cors_origin": None}
    assert info["readings"]["slots"] == 2


def test_health_generate_runs_the_model(node: Watched, policy: MediaPolicy, monkeypatch: pytest.MonkeyPatch):
    runner = node._node.runner
    with serving(create_app(node, policy)) as client:
        monkeypatch.setattr(runner, "last_run", None)
        assert client.get("/health").status_code == 200
        assert runner.last_run is None
        assert client.get("/health_generate").json() == {"status": "ok", "role": "unified"}
        assert runner.last_run is not None


def test_what_cannot_go_on_is_not_alive(checkpoint: Path, policy: MediaPolicy):
    """A process of the mesh was lost, or a program never comes back."""
    engine = EngineOptions(slots=2, decode_steps=64)
    node = TextNode(dsj.load(checkpoint), policy, engine=engine, warm_up=False, stuck_after=0.0)
    with serving(create_app(node, policy)) as client:
        assert client.get("/health").status_code == 200
        with client.stream("POST", "/generate", json=ENDLESS):
            until(lambda: "busy with one program" in client.get("/health").text)
        node.runner.engine.lost = "process 1 is lost"
        for path in ("/health", "/ready", "/health_generate"):
            response = client.get(path)
            assert (response.status_code, response.json()["reason"]) == (503, "process 1 is lost")
    node.stop(0)
    asyncio.run(node.close())


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 130)])
def test_the_command_answers_probes_while_it_loads_and_ends_at_once(
    tmp_path: Path, checkpoint: Path, number: signal.Signals, code: int
):
    """The tokenizer is a pipe that nobody writes into, so that loading never ends."""
    for file in checkpoint.iterdir():
        if file.name != "tokenizer.json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    os.mkfifo(tmp_path / "tokenizer.json")
    command = [sys.executable, "-m", "deepstack_jax", "serve", tmp_path, "--port", "0"]
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as child:
        try:
            port: list[int] = []

            def listens() -> bool:
                assert child.poll() is None, child.communicate()[1]
                port[:] = ports_of(child.pid)
                return bool(port)

            until(listens)
            url = f"http://127.0.0.1:{port[0]}"
            assert httpx.get(f"{url}/health", trust_env=False).json() == {"status": "loading"}
            assert httpx.get(f"{url}/ready", trust_env=False).status_code == 503
            child.send_signal(number)
            assert child.wait(20) == code
            assert "Traceback" not in child.communicate()[1]
        finally:
            if child.poll() is None:
                child.kill()


def ports_of(pid: int) -> list[int]:
    """The ports that a process listens on."""
    import psutil

    with suppress(psutil.Error):
        connections = psutil.Process(pid).net_connections("tcp")
        return [each.laddr.port for each in connections if each.status == psutil.CONN_LISTEN]
    return []


# ---- metrics


def scrape(client: httpx.Client, accept: str = "") -> dict[str, float]:
    """The samples by name and labels, as Prometheus writes them."""
    response = client.get("/metrics", headers={"accept": accept})
    assert response.status_code == 200
    openmetrics = response.headers["content-type"].startswith("application/openmetrics-text")
    assert openmetrics == bool(accept)
    samples = {}
    for family in (parse_openmetrics if openmetrics else parse_text)(response.text):
        assert family.documentation
        for sample in family.samples:
            labels = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()))
            name = f"{sample.name}{{{labels}}}" if labels else sample.name
            assert name not in samples
            samples[name] = sample.value
    return samples


@pytest.mark.parametrize("count", [36, pytest.param(1000, marks=pytest.mark.slow)])
def test_the_counts_are_those_of_the_clients(node: Watched, policy: MediaPolicy, count: int):
    """Whole answers, streams, stop strings, pictures, clients that go away, refusals and deadlines."""
    ask_whole = {"text": "Who is there?", "sampling_params": {"max_new_tokens": 8, "ignore_eos": True}}

    def one(i: int) -> tuple[str, int, int]:
        """What became of it, and its tokens of prompt and answer."""
        body: dict[str, Any] = json.loads(json.dumps(ask_whole))
        match i % 6:
            case 0:
                with client.stream("POST", "/generate", json=ENDLESS) as response:
                    next(response.iter_lines())
                return "cancelled", 0, 0
            case 1:
                body["image_data"] = "data:image/png;base64,aGVsbG8="
                assert client.post("/generate", json=body).status_code == 400
                return "refused", 0, 0
            case 2:
                body["sampling_params"] |= {"stop": text[2:4], "max_new_tokens": 64}
            case 3:
                body["image_data"] = picture(i % 4)
        answer = ask(client, **body)
        meta = answer["meta_info"]
        return meta["finish_reason"]["type"], meta["prompt_tokens"], meta["completion_tokens"]

    with serving(create_app(node, policy)) as client:
        text = ask(client, **ask_whole)["text"]  # the tokens of this one are counted below
        first = scrape(client)
        node.ended.clear()
        with ThreadPoolExecutor(6) as pool:
            results = list(pool.map(one, range(count)))
        until(lambda: len(node.ended) == count)
        until(lambda: node._node.runner.waiting == 0)
        metrics = scrape(client)
        assert client.get("/nowhere").status_code == 404
        after = scrape(client)

    outcomes = Counter(outcome for outcome, *_ in results)
    assert outcomes.keys() == {"cancelled", "refused", "stop", "length"}

    def gained(name: str) -> float:
        return metrics[f"deepstack_jax_{name}"] - first[f"deepstack_jax_{name}"]

    for outcome in OUTCOMES:
        assert gained(f"requests_total{{outcome={outcome}}}") == outcomes[outcome], outcome
    whole = [result for result in results if result[0] in ("stop", "length")]
    cancelled = sum(tokens for tokens, finish in node.ended if finish is None) - sum(
        tokens for outcome, _, tokens in results if outcome == "stop"
    )
    assert gained("generation_tokens_total") - cancelled <= sum(tokens for *_, tokens in whole) + len(whole)
    assert gained("request_seconds_count") == len(whole)
    assert gained("request_prompt_tokens_sum") == sum(prompt for _, prompt, _ in whole)
    assert gained("time_to_first_token_seconds_count") == len(whole) + outcomes["cancelled"]
    assert gained("request_generation_tokens_sum") == sum(tokens for *_, tokens in whole)
    assert gained("http_requests_total{path=/generate,status=200}") >= len(whole)
    assert metrics["deepstack_jax_http_requests_total{path=/generate,status=400}"] == outcomes["refused"]
    assert after["deepstack_jax_http_requests_total{path=other,status=404}"] == 1
    assert (metrics["deepstack_jax_requests_running"], metrics["deepstack_jax_requests_waiting"]) == (0, 0)
    assert (metrics["deepstack_jax_slots"], metrics["deepstack_jax_free_slots"]) == (2, 2)
    assert metrics["deepstack_jax_kv_pages_in_use"] == 0
    assert gained("images_encoded_total") > 0
    assert gained("prefix_cache_query_tokens_total") > 0


def test_a_request_with_several_choices_is_one_answer(node: Watched, policy: MediaPolicy):
    with serving(create_app(node._node, policy)) as client:
        body = {"prompt": "Who is there?", "n": 3, "max_tokens": 8, "temperature": 1.0, "ignore_eos": True}
        response = client.post("/v1/completions", json=body)
        assert response.status_code == 200, response.text
        usage = response.json()["usage"]
        metrics = scrape(client)
    assert metrics["deepstack_jax_requests_total{outcome=length}"] == 1
    assert metrics["deepstack_jax_prompt_tokens_total"] == usage["prompt_tokens"]
    assert metrics["deepstack_jax_generation_tokens_total"] == usage["completion_tokens"] == 24
    assert metrics["deepstack_jax_request_generation_tokens_count"] == 3
    assert metrics["deepstack_jax_time_to_first_token_seconds_count"] == 1
    # at least the first token of each choice comes by itself
    assert metrics["deepstack_jax_inter_token_latency_seconds_count"] == 24 - 3


def test_a_running_request_shows_in_the_gauges(node: Watched, policy: MediaPolicy):
    with serving(create_app(node, policy)) as client:
        with client.stream("POST", "/generate", json=ENDLESS) as response:
            lines = response.iter_lines()  # closes the response once nobody holds it
            next(lines)
            metrics = scrape(client)
        assert metrics["deepstack_jax_requests_running"] == 1
        assert metrics["deepstack_jax_free_slots"] == 1
        # all pages that it can need are reserved
        tokens = dsj.prepare(node._node._model, ENDLESS["text"])["input_ids"].shape[1] + LONG - 1
        pages = -(-tokens // 128)
        assert metrics["deepstack_jax_kv_pages_in_use"] == pages
        assert metrics["vllm:kv_cache_usage_perc{engine=0,model_name=tiny}"] == pytest.approx(
            pages / metrics["deepstack_jax_kv_pages"]
        )
        until(lambda: scrape(client)["deepstack_jax_requests_running"] == 0)


def test_vllms_names_have_the_same_values_and_can_be_left_out(node: Watched, policy: MediaPolicy):
    with serving(create_app(node, policy)) as client:
        ask(client, **SMALL)
        for accept in ("", "application/openmetrics-text; version=1.0.0"):
            metrics = scrape(client, accept)
            for own, name in VLLM_NAMES.items():
                for suffix in ("", "_total", "_sum", "_count"):
                    if (sample := f"deepstack_jax_{own}{suffix}") in metrics:
                        assert metrics[f"vllm:{name}{suffix}{{engine=0,model_name=tiny}}"] == metrics[sample]
                        break
                else:
                    raise AssertionError(own)
            success = {key: value for key, value in metrics.items() if key.startswith("vllm:request_success_total")}
            assert {re.search(r"finished_reason=(\w+)", key)[1]: value for key, value in success.items()} == {  # type: ignore[index]
                "stop": 0,
                "length": 1,
                "abort": 0,
            }
            pages = int(metrics["deepstack_jax_kv_pages"])
            assert metrics[f"vllm:cache_config_info{{block_size=128,engine=0,num_gpu_blocks={pages}}}"] == 1
            assert not [name for name in metrics if name.endswith("_created")]
        assert client.get("/metrics", headers={"accept": "text/plain; version=x"}).status_code == 200
    with serving(create_app(node, policy, vllm_metrics=False)) as client:
        assert not [name for name in scrape(client) if name.startswith("vllm:")]


def test_programs_that_compile_once_the_server_is_ready_are_counted(node: Watched, policy: MediaPolicy):
    with serving(create_app(node, policy)) as client:
        ask(client, **SMALL)
        before = scrape(client)["deepstack_jax_programs_compiled_total"]
        ask(client, **SMALL)
        assert scrape(client)["deepstack_jax_programs_compiled_total"] == before
        ask(client, text="What?", image_data=picture(1, 96, 224), sampling_params=SMALL["sampling_params"])
        assert scrape(client)["deepstack_jax_programs_compiled_total"] > before  # the encoder of another size


def test_the_dashboard_shows_metrics_that_exist(node: Watched, policy: MediaPolicy):
    dashboard = json.loads(DASHBOARD.read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    assert len(expressions) >= 12
    with serving(create_app(node, policy)) as client:
        ask(client, **SMALL)
        text = client.get("/metrics").text
    here = {line.split("{")[0].split()[0] for line in text.splitlines() if not line.startswith("#")}
    named = {name for expression in expressions for name in re.findall(r"\b(?:deepstack_jax_|vllm:)\w+", expression)}
    assert named <= here | SPLIT_ONLY


SPLIT_ONLY = {
    f"deepstack_jax_{name}"
    for name in (
        "encoders_connected",
        "encoder_failovers_total",
        "encode_queue",
        "row_cache_hits_total",
        "row_cache_bytes",
        "blocks_written_total",
    )
}
