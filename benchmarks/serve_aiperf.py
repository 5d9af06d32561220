"""`deepstack-jax bench serve` and aiperf on the same server with the same prompts, in alternating order.

    deepstack-jax serve tiny-vl --no-prefix-cache
    pip install aiperf                                  (in an environment of its own: it needs 1.2 GB)
    python benchmarks/serve_aiperf.py --aiperf ENVIRONMENT/bin/aiperf [--url ...] [--concurrency 1 4 16] [--rounds 3]
    python benchmarks/serve_aiperf.py --aiperf ENVIRONMENT/bin/aiperf --paced

With --paced the server is one of this program, which sends its events at known times: what the tools should find.

Both send the prompts that `bench serve` makes up, and count tokens as the server does. The server must not remember
prompts: the second tool would find them. Figures are medians of the rounds, as a Markdown table; aiperf's names of the
latencies are in docs/measuring.md.
"""

import argparse
import asyncio
import json
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from measured import chip_name
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from deepstack_jax.bench.prompts import PromptShape
from deepstack_jax.bundled import BUNDLED

# name, unit, where `bench serve --json` has it, and aiperf's summary
FIGURES: tuple[tuple[str, tuple[str, ...], tuple[str, str]], ...] = (
    ("requests/s", ("requests_per_s",), ("request_throughput", "avg")),
    ("output tokens/s", ("output_tokens_per_s",), ("output_token_throughput", "avg")),
    ("TTFT p50, ms", ("ttft_ms", "p50"), ("time_to_first_token", "p50")),
    ("TTFT p99, ms", ("ttft_ms", "p99"), ("time_to_first_token", "p99")),
    ("ITL p50, ms", ("itl_ms", "p50"), ("inter_chunk_latency", "p50")),
    ("TPOT p50, ms", ("tpot_ms", "p50"), ("inter_token_latency", "p50")),
    ("E2E p50, ms", ("e2e_ms", "p50"), ("request_latency", "p50")),
    ("E2E p99, ms", ("e2e_ms", "p99"), ("request_latency", "p99")),
)
CHUNK = "chat.completion.chunk"
PACED_FIRST_S, PACED_GAP_S, PACED_TOKENS = 0.5, 0.02, 32


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--aiperf", required=True, help="its program")
    arguments.add_argument("--url", default="http://127.0.0.1:8000")
    arguments.add_argument("--paced", action="store_true", help="measure a server of known times")
    arguments.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16])
    arguments.add_argument("--requests", type=int, default=96)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--words", type=int, default=64, help="of each prompt")
    arguments.add_argument("--image-side", type=int, default=448, help="pixels; 0 sends no pictures")
    arguments.add_argument("--output-tokens", type=int, default=32)
    options = arguments.parse_args()
    if options.paced:
        options.url = start_paced()
    model = httpx.get(f"{options.url}/v1/models").json()["data"][0]["id"]
    tools = {"bench serve": measure_ours, "aiperf": measure_aiperf}
    picture = f"a picture of {options.image_side}x{options.image_side}" if options.image_side else "no picture"
    peer = subprocess.run([options.aiperf, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    versions = f"deepstack-jax {version('deepstack-jax')}, aiperf {peer}"
    print(f"{chip_name()}, {platform.machine()}, {versions}; {time.strftime('%Y-%m-%d')}\n")
    print(
        f"{model}: {options.requests} requests of {options.words} words and {picture}, {options.output_tokens} tokens "
        f"each, medians of {options.rounds} rounds\n"
    )
    print("| at once | tool | " + " | ".join(name for name, *_ in FIGURES) + " |")
    print("|" + "---|" * (2 + len(FIGURES)))
    if options.paced:
        gap, whole = PACED_GAP_S * 1e3, PACED_FIRST_S + PACED_GAP_S * (PACED_TOKENS - 1)
        cells = ["", "", *[PACED_FIRST_S * 1e3] * 2, gap, gap, *[whole * 1e3] * 2]
        print("| | as sent | " + " | ".join(map(str, cells)) + " |")
    with tempfile.TemporaryDirectory() as folder:
        write_prompts(Path(folder), options)
        for concurrency in options.concurrency:
            rounds: dict[str, list[list[float]]] = {name: [] for name in tools}
            for number in range(options.rounds):
                for name, measure in list(tools.items())[:: -1 if number % 2 else 1]:
                    rounds[name].append(measure(Path(folder), model, concurrency, options))
            for name, found in rounds.items():
                figures = " | ".join(f"{statistics.median(each):.1f}" for each in zip(*found, strict=True))
                print(f"| {concurrency} | {name} | {figures} |", flush=True)


def write_prompts(folder: Path, options: argparse.Namespace) -> None:
    """Writes the same prompts for both, text first, as aiperf puts it."""
    shape = PromptShape(options.words, int(options.image_side > 0), (options.image_side,) * 2)
    with (folder / "ours.jsonl").open("w") as ours, (folder / "aiperf.jsonl").open("w") as theirs:
        for number in range(options.requests):
            (message,) = shape.messages(number)
            turn = {"text": message["content"]}
            if options.image_side:
                picture, text = message["content"]
                message["content"] = [text, picture]
                turn = {"text": text["text"], "image": picture["image_url"]["url"]}
            print(json.dumps([message]), file=ours)
            print(json.dumps(turn), file=theirs)


def measure_ours(folder: Path, model: str, concurrency: int, options: argparse.Namespace) -> list[float]:
    command = [sys.executable, "-m", "deepstack_jax", "bench", "serve", "--url", options.url, "--model", model]
    command += ["--prompts", str(folder / "ours.jsonl"), "--requests", str(options.requests), "--ignore-eos", "--json"]
    command += ["--concurrency", str(concurrency), "--warm-up", str(concurrency)]
    found = json.loads(run([*command, "--output-tokens", str(options.output_tokens)]))
    return [in_turn(found, keys) for _, keys, _ in FIGURES]


def measure_aiperf(folder: Path, model: str, concurrency: int, options: argparse.Namespace) -> list[float]:
    artifacts = folder / "aiperf"
    extra = {"ignore_eos": True, "temperature": 0, "max_tokens": options.output_tokens}
    command = [options.aiperf, "profile", "-m", model, "--url", options.url, "--endpoint-type", "chat", "--streaming"]
    command += ["--input-file", str(folder / "aiperf.jsonl"), "--custom-dataset-type", "single_turn"]
    command += ["--request-count", str(options.requests), "--concurrency", str(concurrency)]
    command += ["--warmup-request-count", str(concurrency), "--extra-inputs", json.dumps(extra)]
    command += [
        "--use-server-token-count",
        "--tokenizer",
        str(BUNDLED["tiny-vl"]),
        "--ui",
        "none",
        "--artifact-dir",
        str(artifacts),
    ]
    run(command)  # it loads a tokenizer, which it doesn't use
    found = json.loads((artifacts / "profile_export_aiperf.json").read_text())
    return [in_turn(found, keys) for *_, keys in FIGURES]


def start_paced() -> str:
    """The URL of a server in a thread, whose answers have one token per event, each at its time."""

    async def events() -> AsyncIterator[str]:
        start = asyncio.get_running_loop().time()
        for number in range(PACED_TOKENS):
            due = start + PACED_FIRST_S + number * PACED_GAP_S
            await asyncio.sleep(due - asyncio.get_running_loop().time())
            yield f"data: {json.dumps({'object': CHUNK, 'choices': [{'index': 0, 'delta': {'content': 'a '}}]})}\n\n"
        usage = {"prompt_tokens": 1, "completion_tokens": PACED_TOKENS, "total_tokens": 1 + PACED_TOKENS}
        yield f"data: {json.dumps({'object': CHUNK, 'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n"

    async def chat(request: Request) -> StreamingResponse:
        await request.body()
        return StreamingResponse(events(), media_type="text/event-stream")

    async def models(_request: Request) -> JSONResponse:
        return JSONResponse({"data": [{"id": "paced"}]})

    routes = [Route("/v1/chat/completions", chat, methods=["POST"]), Route("/v1/models", models)]
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(Starlette(routes=routes), http="h11", lifespan="off", log_config=None))
    threading.Thread(target=lambda: asyncio.run(server.serve([listener])), daemon=True).start()
    return f"http://127.0.0.1:{listener.getsockname()[1]}"


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command[0]} failed: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def in_turn(found: dict[str, Any], keys: tuple[str, ...]) -> float:
    for key in keys:
        found = found[key]
    return float(found)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
