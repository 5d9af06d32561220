"""Time to the first token: the whole model in one process, and the split in two, asked over HTTP.

    python benchmarks/first_token.py [--folder FOLDER] [--dtype bfloat16] [--sides 256 448 1024] [--rounds 7]

A made-up checkpoint of 600M parameters is asked one token about a picture that no node has seen. Rounds alternate;
medians. What the split adds is the difference of the two. Beside it stand the transfer, from the first grant to the
last row, and its bound: the same bytes in plain Mooncake writes of the same run. Encoder and text model have the
machine's cores in turn in both ways, so nothing is gained by having two processes.
"""

import argparse
import base64
import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import httpx
import jax
import numpy as np
from decode import CONFIG
from measured import chip_name
from PIL import Image
from transfer import ROW_BYTES, Sender

from deepstack_jax.cli.demo_split import ServeProcess, serve_process
from deepstack_jax.testing.random_checkpoint import write_random_checkpoint

QUESTION = "What is in this picture?"
HIDDEN, LEVELS = CONFIG["text_config"]["hidden_size"], len(CONFIG["vision_config"]["deepstack_visual_indexes"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the checkpoint is kept; a temporary one by default")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--sides", type=int, nargs="+", default=[256, 448, 1024], help="of square pictures, in pixels")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="writes the figures to this file too")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        checkpoint = folder / f"model-{options.dtype}"
        if not checkpoint.exists():
            write_random_checkpoint(checkpoint, CONFIG, dtype=options.dtype)
        whole = stack.enter_context(serve_process(checkpoint, "unified", []))
        encode = stack.enter_context(serve_process(checkpoint, "encode", ["--cache-bytes", "0"]))
        encode.wait()
        language = stack.enter_context(serve_process(checkpoint, "language", ["--encoder", encode.control]))
        for node in (whole, language):
            node.wait()
        print(f"{chip_name()}; jax {jax.__version__}, Mooncake {version('mooncake-transfer-engine-non-cuda')}")
        print(f"D={HIDDEN}, N={LEVELS}, {options.dtype}; tcp over loopback; milliseconds\n")
        print("pixels tokens    MB    whole    split    added  transfer    bound")
        figures = [measure(whole, language, side, options.rounds) for side in options.sides]
    if options.json:
        said = {"machine": chip_name(), "jax": jax.__version__, "dtype": options.dtype, "figures": figures}
        options.json.write_text(json.dumps(said, indent=1))


def measure(whole: ServeProcess, language: ServeProcess, side: int, rounds: int) -> dict[str, Any]:
    """One line of the table; all times in seconds."""
    seconds: dict[str, list[float]] = {"whole": [], "split": []}
    transfers, last = [], {}
    for number in range(rounds + 1):
        for name, node in (("whole", whole), ("split", language)):
            picture = picture_of(side, seed=2 * number + (name == "split"))
            took, answer = first_token(node, picture)
            if number:  # the first compiles
                seconds[name].append(took)
                if name == "split":
                    last = answer["meta_info"]
                    transfers.append(last["timings"]["transfer"])
    median = {name: statistics.median(values) for name, values in seconds.items()}
    bound = plain_write_seconds(last["split"]["bytes"], rounds)
    figures = {
        "pixels": side,
        "prompt_tokens": last["prompt_tokens"],
        "bytes": last["split"]["bytes"],
        **{f"{name}_seconds": value for name, value in median.items()},
        "added_seconds": median["split"] - median["whole"],
        "transfer_seconds": statistics.median(transfers),
        "bound_seconds": bound,
    }
    print(
        f"{side:6} {figures['prompt_tokens']:6} {figures['bytes'] / 2**20:5.1f} {median['whole'] * 1e3:8.0f}"
        f" {median['split'] * 1e3:8.0f} {figures['added_seconds'] * 1e3:8.0f} {figures['transfer_seconds'] * 1e3:9.1f}"
        f" {bound * 1e3:8.1f}",
        flush=True,
    )
    return figures


def first_token(node: ServeProcess, picture: str) -> tuple[float, dict[str, Any]]:
    """(seconds of a request for one token, its answer)."""
    body = {"text": QUESTION, "image_data": picture, "sampling_params": {"max_new_tokens": 1}}
    for _ in range(100):
        started = time.perf_counter()
        response = httpx.post(f"{node.url}/generate", json=body, timeout=600, trust_env=False)
        took = time.perf_counter() - started
        if response.status_code != 503:  # until the two nodes have met there is no encoder
            break
        time.sleep(0.1)
    response.raise_for_status()
    return took, response.json()


def plain_write_seconds(num_bytes: int, rounds: int) -> float:
    """Of Mooncake's own writes of so many bytes to another process, the median."""
    rows = np.ones(num_bytes, np.uint8)
    program, tokens = Path(__file__).with_name("transfer.py"), -(-num_bytes // ROW_BYTES)
    command = [sys.executable, str(program), "--tokens", str(tokens), "--receive"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        sender = Sender(child)
        sender.write_blocking([rows])
        times = []
        for _ in range(rounds):
            started = time.perf_counter()
            sender.write_blocking([rows])
            times.append(time.perf_counter() - started)
        sender.close()
    return statistics.median(times)


def picture_of(side: int, seed: int) -> str:
    """A picture that compresses little, as a data URI."""
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (side // 8, side // 8, 3), np.uint8)
    Image.fromarray(pixels).resize((side, side)).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


if __name__ == "__main__":
    main()
