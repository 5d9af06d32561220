"""Nodes in processes of their own, and checkpoints whose answers depend on images."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families
from safetensors.numpy import load_file, save_file

from deepstack_jax.testing.random_checkpoint import tiny_config, write_random_checkpoint

ROOT = Path(__file__).parent.parent
BLOCK = ("--block-size", "4")
POOL = ("--pool-blocks", "8")  # a request holds at most two, so a small image takes several rounds
CONFIG = tiny_config(
    text_config={"num_hidden_layers": 1, "max_position_embeddings": 2048},
    vision_config={"depth": 1, "deepstack_visual_indexes": [0]},
)
TOKENS = {"max_new_tokens": 12, "ignore_eos": True}  # the default sampling parameters of requests


class NodeProcess:
    """A test module in its own process, which is told what to do in JSON, line by line.

    The module prints one line of JSON when it is ready and one after each command, and ends with its standard input.
    """

    def __init__(self, module: str, *arguments: str, log: Path | None = None, **environment: str):
        """Starts `python -m module`; its standard error is appended to `log` if that is given."""
        env = {**os.environ, "JAX_PLATFORMS": "cpu", **environment}
        with contextlib.ExitStack() as stack:
            errors = stack.enter_context(log.open("ab")) if log else None
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                cwd=ROOT,
                env=env,
            )

    def read(self) -> Any:
        """The next line that the process prints.

        Raises:
            RuntimeError: the process has ended.
        """
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.process.args} has ended")
        return json.loads(line)

    def command(self, **message: Any) -> Any:
        """Sends a command and returns the answer."""
        assert self.process.stdin
        print(json.dumps(message), file=self.process.stdin, flush=True)
        return self.read()

    def close(self, seconds: float = 30.0) -> int | None:
        """Ends the process; returns its exit code, or None if it had to be killed after `seconds`."""
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            self.kill()

    def kill(self) -> None:
        """Kills the process if it is still running."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


class EncodeProcess(NodeProcess):
    """An encode node: `tests.encode_process`."""

    def __init__(self, checkpoint: Path, dtype: str, block_size: int):
        super().__init__("tests.encode_process", str(checkpoint), dtype, str(block_size))
        self.endpoint: str = self.read()["endpoint"]


@contextlib.contextmanager
def encode_process(checkpoint: Path, dtype: str, block_size: int) -> Iterator[EncodeProcess]:
    """An encode node that ends with the block."""
    node = EncodeProcess(checkpoint, dtype, block_size)
    try:
        yield node
    finally:
        node.close()


class ServeNode:
    """One `deepstack-jax serve` process, and a client for it."""

    def __init__(self, checkpoint: Path, *options: str):
        serve = [sys.executable, "-m", "deepstack_jax", "serve", str(checkpoint)]
        command = [*serve, "--port", "0", "--no-warm-up", *options]
        env = {**os.environ, "JAX_PLATFORMS": "cpu"}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)

    def wait(self) -> Self:
        """Waits until the server is ready, and reads its addresses from the line that it prints."""
        assert self.process.stdout
        assert self.process.stderr
        while not (line := self.process.stdout.readline()).startswith("ready: "):
            assert line, self.process.stderr.read()
        addresses = line.strip().partition(" on ")[2]
        self.url, _, self.control = addresses.partition(", control ")
        self.client = httpx.Client(base_url=self.url, timeout=120, trust_env=False)
        return self

    def ask(self, **body: Any) -> dict[str, Any]:
        """Returns the answer to `POST /generate`, which must succeed."""
        response = self.client.post("/generate", json={"sampling_params": TOKENS} | body)
        assert response.status_code == 200, response.text
        return response.json()

    def ask_when_connected(self, **body: Any) -> dict[str, Any]:
        """Returns the first answer that is not 503, because nodes take a moment to connect to each other."""
        deadline = time.monotonic() + 60
        body = {"sampling_params": TOKENS} | body
        while (response := self.client.post("/generate", json=body)).status_code == 503:
            assert time.monotonic() < deadline, response.text
            time.sleep(0.1)
        assert response.status_code == 200, response.text
        return response.json()

    def metrics(self) -> dict[str, float]:
        """Our own metrics by name without the prefix; those with labels are added up."""
        totals: dict[str, float] = {}
        for family in text_string_to_metric_families(self.client.get("/metrics").text):
            for sample in family.samples:
                name = sample.name.removeprefix("deepstack_jax_")
                if name != sample.name:
                    totals[name] = totals.get(name, 0) + sample.value
        return totals

    def decoders(self) -> list[psutil.Process]:
        """The processes that decode this node's images and videos."""
        children = psutil.Process(self.process.pid).children()
        return [child for child in children if "decoder_process" in " ".join(child.cmdline())]

    def terminate(self) -> tuple[int, str]:
        """Sends SIGTERM; returns the exit code and standard error. No child process may be left."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(signal.SIGTERM)
        _, errors = self.process.communicate(timeout=60)
        assert not psutil.wait_procs(children, timeout=5)[1]
        return self.process.returncode, errors.strip()

    def close(self) -> None:
        """Kills the process if it is still running."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()
        if hasattr(self, "client"):
            self.client.close()


@contextlib.contextmanager
def serving(checkpoint: Path, *options: str) -> Iterator[ServeNode]:
    """A server that is ready, and ends with the block."""
    node = ServeNode(checkpoint, *options)
    try:
        yield node.wait()
    finally:
        node.close()


def write_image_sensitive_checkpoint(
    path: Path, config: dict[str, Any] = CONFIG, min_pixels: int | None = None
) -> None:
    """Writes a random checkpoint whose answers depend on the images in the prompt.

    The attention of a random model is nearly uniform, so one image's answer would equal another's. Larger weights make
    it attend. A small `min_pixels`, the size below which the processor enlarges images, lets images take few tokens.
    """
    write_random_checkpoint(path, config, seed=3)
    weights = load_file(path / "model.safetensors")
    for name, scale in (("self_attn.o_proj.weight", 8), ("self_attn.q_norm.weight", 3)):
        weights |= {key: scale * weight for key, weight in weights.items() if key.endswith(name)}
    save_file(weights, path / "model.safetensors")
    if min_pixels is not None:
        settings = path / "preprocessor_config.json"
        settings.write_text(settings.read_text().replace("65536", str(min_pixels)))
