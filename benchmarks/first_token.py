"""Measures the time to the first token over HTTP, of the whole model in one process and of the split in two.

    python benchmarks/first_token.py [--folder FOLDER] [--dtype bfloat16] [--sides 256 448 1024] [--rounds 7]

A random checkpoint of 600M parameters generates one token about an image that no node has seen. Rounds alternate, and
figures are medians. "added" is the difference between the split and the whole model. "transfer" is the sum of the
rounds, each from its grant to its last row, and "bound" is the time of the same bytes in plain Mooncake writes of the
same run. In both cases the encoder and the text model use the machine's cores in turn, so a second process gains
nothing. `overlap.py` measures prompts with many images.
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
from deepstack_jax.rounding import cdiv
from deepstack_jax.testing.random_checkpoint import write_random_checkpoint

QUESTION = "What is in this picture?"
HIDDEN, LEVELS = CONFIG["text_config"]["hidden_size"], len(CONFIG["vision_config"]["deepstack_visual_indexes"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="folder for the checkpoint; default: a temporary one")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument(
        "--sides", type=int, nargs="+", default=[256, 448, 1024], help="sides of the square images, in pixels"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="file to which the figures are also written")
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
        result = {"machine": chip_name(), "jax": jax.__version__, "dtype": options.dtype, "figures": figures}
        options.json.write_text(json.dumps(result, indent=1))


def measure(whole: ServeProcess, language: ServeProcess, side: int, rounds: int) -> dict[str, Any]:
    """Measures one line of the table; all times are in seconds."""
    seconds: dict[str, list[float]] = {"whole": [], "split": []}
    transfers, last = [], {}
    for number in range(rounds + 1):
        for name, node in (("whole", whole), ("split", language)):
            image = random_image(side, seed=2 * number + (name == "split"))
            took, answer = first_token(node, image)
            if number:  # the first round compiles
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


def first_token(node: ServeProcess, image: str) -> tuple[float, dict[str, Any]]:
    """Requests one token; returns the seconds that it took and the answer."""
    body = {"text": QUESTION, "image_data": image, "sampling_params": {"max_new_tokens": 1}}
    for _ in range(100):
        started = time.perf_counter()
        response = httpx.post(f"{node.url}/generate", json=body, timeout=600, trust_env=False)
        took = time.perf_counter() - started
        if response.status_code != 503:  # there is no encoder until the two nodes have connected
            break
        time.sleep(0.1)
    response.raise_for_status()
    return took, response.json()


def plain_write_seconds(num_bytes: int, rounds: int) -> float:
    """Returns the median time of plain Mooncake writes of `num_bytes` to another process."""
    rows = np.ones(num_bytes, np.uint8)
    program, tokens = Path(__file__).with_name("transfer.py"), cdiv(num_bytes, ROW_BYTES)
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


def random_image(side: int, seed: int) -> str:
    """Returns an image that compresses badly, as a data URI."""
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (side // 8, side // 8, 3), np.uint8)
    Image.fromarray(pixels).resize((side, side)).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


if __name__ == "__main__":
    main()
