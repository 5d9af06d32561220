"""Several processes of one mesh on this machine: the same answer, each reads its part, and who is missing is said."""

import base64
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

import deepstack_jax as dsj
from deepstack_jax.cli.demo import DEFAULT_IMAGE as PICTURE
from deepstack_jax.cli.demo_split import serve_process
from deepstack_jax.testing.random_checkpoint import tiny_config, write_random_checkpoint

ROOT = Path(__file__).parent.parent
ASK = ("generate", "tiny-vl", "--prompt", "hi", "--max-new-tokens", "4", "--json")

# loads, compares what was read of the weights' file with what the devices hold, counted once, and answers
READS = """
import sys
import numpy as np
from deepstack_jax.processes import join
join(sys.argv[1], 2, int(sys.argv[2]))
import deepstack_jax as dsj
from deepstack_jax.checkpoints import safetensors_file
from tests.test_processes import ASKED, ONE, SAMPLED, SEVERAL

read = 0
plain = safetensors_file.TensorReader.read
def counted(self, *args):
    global read
    values = plain(self, *args)
    read += values.nbytes
    return values
safetensors_file.TensorReader.read = counted
model = dsj.load(sys.argv[3], mesh=dsj.make_mesh(sys.argv[5]))
held = 0
for array in model.params.values():
    pieces = {str(shard.index): shard.data.nbytes for shard in array.addressable_shards}
    held += sum(pieces.values())
alone, among = (dsj.generate(model, **asked, **ASKED, top_logprobs=2) for asked in (ONE, SEVERAL))
np.testing.assert_array_equal(among.logprobs[0], alone.logprobs[0])
np.testing.assert_array_equal(among.top_logprobs[0], alone.top_logprobs[0])
streamed = np.stack(list(dsj.stream(model, SEVERAL, **ASKED)), axis=1)
np.testing.assert_array_equal(streamed, among.tokens)
sampled = dsj.generate(model, **SEVERAL, **ASKED, **SAMPLED).tokens
logits = np.asarray(dsj.forward(model, **ONE))
np.savez(sys.argv[4], share=read / held, greedy=among.tokens, sampled=sampled, logits=logits)
"""
ONE = {"input_ids": np.arange(1, 9)[None]}
SEVERAL = {"input_ids": np.arange(1, 9) + np.array([[0], [7], [20]])}
ASKED: dict[str, Any] = {"max_new_tokens": 4, "eos_token_id": [], "slots": 4, "chunk": 128}
SAMPLED: dict[str, Any] = {"temperature": 1.0, "top_p": 0.9, "seed": [3, 4, 5]}


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


def start(*command: str, devices: int = 2) -> "subprocess.Popen[str]":
    flags = f"--xla_force_host_platform_device_count={devices}"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, *command], env=env, cwd=ROOT, text=True, **pipes)  # type: ignore[call-overload]


def finish(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    return process.returncode, out, err


@pytest.mark.slow
def test_two_processes_answer_as_one_and_one_of_them_speaks():
    where = f"127.0.0.1:{free_port()}"
    several = ("--mesh", "data=2,tensor=2", "--coordinator", where, "--num-processes", "2", "--process-id")
    processes = [start("-m", "deepstack_jax", *ASK, *several, str(number)) for number in (0, 1)]
    (code, said, err), (other_code, silent, other_err) = (finish(process) for process in processes)
    assert (code, other_code) == (0, 0), (err[-2000:], other_err[-2000:])
    assert silent == ""
    alone = json.loads(finish(start("-m", "deepstack_jax", *ASK))[1])
    assert json.loads(said)["token_ids"] == alone["token_ids"]


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "mesh"), [(2, "data=2,tensor=2"), (4, "data=4,tensor=2")])
def test_each_process_reads_what_its_devices_hold_and_all_answer_as_one_device(tmp_path: Path, devices: int, mesh: str):
    """Greedy, sampled and streamed; and a row has the same bits alone and among others."""
    # the experts are most of a real model
    text = {"num_experts": 16, "moe_intermediate_size": 512, "hidden_size": 128}
    write_random_checkpoint(tmp_path, tiny_config("qwen3_moe", **text), tokenizer=False)
    where = f"127.0.0.1:{free_port()}"
    files = [tmp_path / f"{number}.npz" for number in (0, 1)]
    processes = [
        start("-c", READS, where, str(i), str(tmp_path), str(file), mesh, devices=devices)
        for i, file in enumerate(files)
    ]
    results = [finish(process) for process in processes]
    assert [code for code, *_ in results] == [0, 0], [err[-2000:] for *_, err in results]
    model = dsj.load(tmp_path)
    logits = np.asarray(dsj.forward(model, **ONE))
    greedy = dsj.generate(model, **SEVERAL, **ASKED).tokens
    sampled = dsj.generate(model, **SEVERAL, **ASKED, **SAMPLED).tokens
    for file in files:
        found = np.load(file)
        assert found["share"] <= 1.05
        np.testing.assert_array_equal(found["greedy"], greedy)
        np.testing.assert_array_equal(found["sampled"], sampled)
        assert np.abs(found["logits"] - logits).max() <= 2e-5 * np.abs(logits).max()


@pytest.mark.slow
def test_verify_compares_in_process_zero_and_all_end_with_its_exit_code(tmp_path: Path):
    """Where 2F == D, transformers 5 reads a checkpoint of the older layout differently: only the numbers tell."""
    write_random_checkpoint(tmp_path, tiny_config(text_config={"moe_intermediate_size": 32}), expert_layout="hf4")
    where = f"127.0.0.1:{free_port()}"
    command = ("verify", str(tmp_path), "--expert-layout", "hf4", "--max-new-tokens", "2", "--mesh", "data=2,tensor=2")
    several = ("--coordinator", where, "--num-processes", "2", "--process-id")
    processes = [start("-m", "deepstack_jax", *command, *several, str(number)) for number in (0, 1)]
    (code, said, err), (other_code, silent, other_err) = (finish(process) for process in processes)
    assert (code, other_code) == (1, 1), (err[-2000:], other_err[-2000:])
    assert silent == ""
    verdicts = {line.split("│")[1].strip(): "FAILED" in line for line in said.splitlines() if "│" in line}
    assert not verdicts["embeddings"]
    assert verdicts["logits"]
    (read,) = (line for line in err.splitlines() if line.startswith("read "))
    assert re.fullmatch(r"read [\d.]+ [kM]B: process 0 [\d.]+ [kM]B, process 1 [\d.]+ [kM]B", read)


@pytest.mark.slow
class TestServer:
    """Two processes serve one model; process 0 speaks HTTP."""

    @pytest.fixture
    def server(self) -> Iterator[tuple[str, list["subprocess.Popen[str]"]]]:
        where, port = f"127.0.0.1:{free_port()}", free_port()
        command = ["-m", "deepstack_jax", "serve", "tiny-vl", "--dtype", "float32", "--port", str(port)]
        command += [
            "--slots",
            "4",
            "--chunk",
            "128",
            "--no-warm-up",
            "--mesh",
            "data=2,tensor=2",
            "--coordinator",
            where,
            "--num-processes",
            "2",
        ]
        processes = [start(*command, "--process-id", str(number)) for number in (0, 1)]
        try:
            for line in processes[0].stdout:
                if line.startswith("ready: "):
                    break
            else:
                pytest.fail(processes[0].stderr.read()[-2000:])
            yield f"http://127.0.0.1:{port}", processes
        finally:
            for process in processes:
                process.kill()
                process.communicate()

    def test_it_answers_many_at_once_as_one_device_and_ends_in_order(self, server):
        url, processes = server
        image = "data:image/png;base64," + base64.b64encode(PICTURE.read_bytes()).decode()
        asked = [
            {"text": text, "image_data": image, "sampling_params": {"max_new_tokens": 6, "ignore_eos": True}}
            for text in ("What is this?", "Which colors?", "How many?")
        ]
        with ThreadPoolExecutor(len(asked)) as pool:
            answers = list(pool.map(lambda body: httpx.post(f"{url}/generate", json=body, timeout=120).json(), asked))
        model = dsj.load("tiny-vl", "float32")
        for body, answer in zip(asked, answers, strict=True):
            inputs = dsj.prepare(model, body["text"], images=[str(PICTURE)])
            alone = dsj.generate(model, **inputs, max_new_tokens=6, eos_token_id=[], slots=4, chunk=128).tokens[0]
            assert answer["output_ids"] == alone.tolist()
        processes[0].terminate()
        assert [process.wait(60) for process in processes] == [0, 0]

    def test_a_process_that_dies_ends_the_other_after_health_has_said_so(self, server):
        url, (first, second) = server
        assert httpx.get(f"{url}/health", timeout=60).status_code == 200
        second.kill()
        deadline = time.monotonic() + 30
        while (answer := httpx.get(f"{url}/health", timeout=5)).status_code == 200 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert answer.status_code == 503
        assert "process 1 of the mesh is lost" in answer.text
        assert first.wait(60) == 1
        assert "error: process 1 of the mesh is lost: start all processes anew" in first.stderr.read().splitlines()

    def test_process_zero_that_dies_ends_the_other(self, server):
        _, (first, second) = server
        first.kill()
        assert second.wait(60) == 1
        assert "error: process 0 of the mesh is lost: start all processes anew" in second.stderr.read().splitlines()


@pytest.mark.slow
def test_a_language_node_of_two_processes_answers_as_one_device(monkeypatch: pytest.MonkeyPatch):
    """The rows that an encode node sends to process 0 reach the other one."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    several = ["--mesh", "data=2,tensor=2", "--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", "2"]
    options = ["--dtype", "float32", "--slots", "4", "--chunk", "128", *several]
    body = {
        "text": "What is this?",
        "image_data": "data:image/jpeg;base64," + base64.b64encode(PICTURE.read_bytes()).decode(),
        "sampling_params": {"max_new_tokens": 6, "ignore_eos": True},
    }
    tiny = Path("tiny-vl")
    with serve_process(tiny, "encode", ["--dtype", "float32"]) as encode:
        encode.wait()
        options += ["--encoder", encode.control]
        command = ("serve", "tiny-vl", "--role", "language", "--no-warm-up", *options, "--process-id", "1")
        follower = start("-m", "deepstack_jax", *command)
        try:
            with serve_process(tiny, "language", [*options, "--process-id", "0"]) as language:
                language.wait()
                deadline = time.monotonic() + 120
                while (answer := httpx.post(f"{language.url}/generate", json=body, timeout=120)).status_code == 503:
                    assert time.monotonic() < deadline, answer.text  # until the two have met
                    time.sleep(0.2)
            assert follower.wait(60) == 0
        finally:
            follower.kill()
            follower.communicate()
    model = dsj.load("tiny-vl", "float32")
    inputs = dsj.prepare(model, body["text"], images=[str(PICTURE)])
    alone = dsj.generate(model, **inputs, max_new_tokens=6, eos_token_id=[], slots=4, chunk=128)
    assert answer.json()["output_ids"] == alone.tokens[0].tolist(), answer.text


class TestMeeting:
    """Without a model: each process says in one line what is wrong, and JAX has not started."""

    JOIN = """
import sys
from deepstack_jax.processes import join
try:
    join(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), timeout=float(sys.argv[4]))
except ValueError as error:
    print(error)
"""

    def meet(self, *processes: tuple[int, int], timeout: float = 20.0) -> list[str]:
        where = f"127.0.0.1:{free_port()}"
        started = [start("-c", self.JOIN, where, str(of), str(number), str(timeout)) for number, of in processes]
        return [finish(process)[1] for process in started]

    def test_one_that_does_not_come(self):
        (said,) = self.meet((0, 2), timeout=1.0)
        assert "process 1 of 2 didn't come to 127.0.0.1:" in said

    def test_no_process_zero(self):
        (said,) = self.meet((1, 2), timeout=1.0)
        assert "process 1 can't reach process 0 at 127.0.0.1:" in said

    def test_another_number_of_processes(self):
        for said in self.meet((0, 2), (1, 3)):
            assert "process 1 was started for 3 processes, process 0 for 2" in said

    @pytest.mark.parametrize(
        ("arguments", "what"),
        [
            (("--coordinator", "localhost"), "--coordinator localhost needs --mesh"),
            (("--mesh", "tensor=2", "--coordinator", "localhost:1"), "needs --num-processes and --process-id"),
            (("--mesh", "tensor=2", "--num-processes", "2"), "need --coordinator HOST:PORT of process 0"),
        ],
    )
    def test_options_that_do_not_belong_together(
        self, arguments: tuple[str, ...], what: str, capsys: pytest.CaptureFixture[str]
    ):
        from deepstack_jax.cli import main

        with pytest.raises(SystemExit) as ended:
            main([*ASK, *arguments])
        assert ended.value.code == 1
        assert what in capsys.readouterr().err
