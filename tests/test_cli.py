"""The command line as a person uses it: its output and its exit code, mostly from child processes."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import deepstack_jax as dsj
from deepstack_jax.cli import main
from deepstack_jax.programs import EngineState
from deepstack_jax.testing.random_checkpoint import tiny_config, write_random_checkpoint

PHOTO = Path(__file__).parent / "data" / "chelsea.jpg"
COMMANDS = (
    "convert",
    "export",
    "verify",
    "inspect",
    "generate",
    "serve",
    "bench serve",
    "bench decode",
    "keygen",
    "demo",
)


def deepstack(*args: object) -> subprocess.CompletedProcess[str]:
    """Runs `deepstack-jax` with these arguments."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "COLUMNS": "200"}
    command = [sys.executable, "-m", "deepstack_jax", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)


def in_process(capfd: pytest.CaptureFixture[str], *args: object) -> tuple[int, str]:
    """Exit code and output of `deepstack-jax` with these arguments, without a process of its own."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as end:
        main([*map(str, args)])
    return int(end.value.code or 0), capfd.readouterr().out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hf/ and ckpt/, what convert made of it."""
    path = tmp_path_factory.mktemp("cli")
    write_random_checkpoint(path / "hf", tiny_config(), seed=2)
    done = deepstack("convert", path / "hf", path / "ckpt")
    assert done.returncode == 0, done.stderr
    return path


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command: str):
    done = deepstack(*command.split(), "--help")
    assert done.returncode == 0
    assert f"Example: deepstack-jax {command}" in done.stdout


def test_generate_prints_what_the_library_answers(folder: Path, capfd: pytest.CaptureFixture[str]):
    options = ["--prompt", "Who is this?", "--image", PHOTO, "--max-new-tokens", 12]
    done = deepstack("generate", folder / "ckpt", *options, "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert set(answer) == {"text", "token_ids", "prompt_tokens", "timings"}

    model = dsj.load(folder / "ckpt")
    inputs = dsj.prepare(model, "Who is this?", images=[PHOTO])
    out = dsj.generate(model, **inputs, max_new_tokens=12)
    assert answer["token_ids"] == out.tokens[0, : out.lengths[0]].tolist()
    assert answer["text"] == dsj.decode(model, out)[0]
    assert answer["prompt_tokens"] == np.count_nonzero(inputs["attention_mask"])
    assert {"load", "prepare", "encode", "prefill", "decode"} <= set(answer["timings"])

    assert in_process(capfd, "generate", folder / "ckpt", *options) == (0, answer["text"] + "\n")


def test_export_gives_back_the_files_that_were_converted(folder: Path):
    done = deepstack("export", folder / "ckpt", folder / "back")
    assert done.returncode == 0, done.stderr
    assert (
        load_file(folder / "back" / "model.safetensors").keys() == load_file(folder / "hf" / "model.safetensors").keys()
    )
    for name, tensor in load_file(folder / "hf" / "model.safetensors").items():
        np.testing.assert_array_equal(load_file(folder / "back" / "model.safetensors")[name], tensor)


def test_inspect_counts_every_parameter(folder: Path):
    done = deepstack("inspect", folder / "ckpt")
    assert done.returncode == 0, done.stderr
    values = sum(array.size for array in dsj.load(folder / "ckpt").params.values())
    assert f"{values:,}" in done.stdout or str(values) in done.stdout


@pytest.mark.parametrize("kind", ["hf", "ckpt"])
def test_inspect_tells_what_the_pages_of_an_engine_take(folder: Path, capfd: pytest.CaptureFixture[str], kind: str):
    code, shown = in_process(capfd, "inspect", folder / kind)
    assert code == 0
    found = re.search(r"KV cache: ([\d,]+) bytes per token in float32; 1 GiB holds ([\d,]+) tokens in pages", shown)
    assert found, shown
    per_token, tokens = (int(number.replace(",", "")) for number in found.groups())
    cache = EngineState.empty(dsj.load(folder / kind).config, 1, num_pages=3, page=128).cache
    assert 3 * 128 * per_token == sum(array.nbytes for array in (*cache.keys, *cache.values))
    # no request gets the first page, and no further page has room
    assert tokens % 128 == 0
    assert (tokens + 128) * per_token <= 2**30 < (tokens + 2 * 128) * per_token


@pytest.mark.slow
def test_verify_passes_a_sound_checkpoint_and_fails_one_that_is_read_differently(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "200")
    done = deepstack("verify", folder / "hf", "--image", PHOTO)
    assert done.returncode == 0, done.stdout + done.stderr
    for stage in ("blocks.4", "merger", "deepstack.2", "embeddings", "layers.3", "logits", "greedy tokens"):
        assert stage in done.stdout

    # Where 2F == D transformers 5 takes gate_up to be in its own order, which in this checkpoint is wrong. Both sides
    # load without an error: only the numbers tell.
    square = tiny_config(text_config={"moe_intermediate_size": 32})
    write_random_checkpoint(folder / "square", square, expert_layout="hf4")
    code, shown = in_process(capfd, "verify", folder / "square", "--image", PHOTO, "--expert-layout", "hf4")
    assert code == 1
    verdicts = {line.split("│")[1].strip(): "FAILED" in line for line in shown.splitlines() if "│" in line}
    assert not verdicts["blocks.0"]
    assert not verdicts["embeddings"]
    assert verdicts["layers.0"]
    assert verdicts["logits"]


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["generate"], 2, "Missing argument"),
        (["generate", "CKPT", "--prompt", "x", "--top-p", "much"], 2, "Invalid value for '--top-p'"),
        (["sing"], 2, "No such command"),
        (["generate", "nowhere", "--prompt", "x"], 1, "error: no config.json in nowhere"),
        (["generate", "CKPT", "--prompt", ""], 1, "error: empty prompt"),
        (["generate", "CKPT", "--prompt", "x", "--image", "none.jpg"], 1, "error: no file none.jpg"),
        (["generate", "CKPT", "--prompt", "x", "--image", __file__], 1, "error: "),
        (["generate", "CKPT", "--prompt", "x", "--max-new-tokens", "0"], 1, "error: max_new_tokens 0 is out of range"),
        (["generate", "CKPT", "--prompt", "x", "--top-p", "1.5"], 1, "error: top_p 1.5 is out of range"),
        (["generate", "CKPT", "--prompt", "x", "--dtype", "int8"], 2, "Invalid value for '--dtype'"),
        (["convert", "HF", "CKPT"], 1, "error: "),
        (["export", "HF", "nowhere"], 1, "error: "),
        (["inspect", "nowhere"], 1, "error: "),
    ],
)
def test_failures_end_with_one_clear_line(
    folder: Path,
    args: list[str],
    code: int,
    message: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("COLUMNS", "200")
    places = {"CKPT": str(folder / "ckpt"), "HF": str(folder / "hf")}
    with pytest.raises(SystemExit) as end:
        main([places.get(arg, arg) for arg in args])
    assert_one_clear_line(end.value.code, capfd.readouterr().err, code, message)


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["generate", "nowhere", "--prompt", "x", "--top-p", "much"], 2, "Invalid value for '--top-p'"),
        (["generate", "nowhere", "--prompt", "x"], 1, "error: no config.json in nowhere"),
    ],
)
def test_so_do_the_processes_of_failed_commands(args: list[str], code: int, message: str):
    done = deepstack(*args)
    assert_one_clear_line(done.returncode, done.stderr, code, message)


def assert_one_clear_line(found_code: object, errors: str, code: int, message: str) -> None:
    assert found_code == code
    assert message in errors
    assert "Traceback" not in errors
    if code == 1:
        assert len(errors.strip().splitlines()) == 1


def test_debug_shows_the_traceback():
    done = deepstack("generate", "nowhere", "--prompt", "x", "--debug")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "no config.json in nowhere" in done.stderr


@pytest.mark.slow
def test_the_demo_answers_the_same_whole_and_split():
    done = deepstack("demo", "--json", "--seed", 5, "--max-new-tokens", 12)
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert shown["missing"] is None
    assert shown["seed"] == 5
    assert len(shown["answers"]) == 3
    assert all(answer.keys() == {"question", "answer", "truth", "tokens"} for answer in shown["answers"])
    assert shown["tokens_split"] == shown["tokens_whole"] == [answer["tokens"] for answer in shown["answers"]]
    assert len({tuple(tokens) for tokens in shown["tokens_whole"]}) == 3
    assert shown["rounds"] > 1
    # rows of (1 + 3) * 160 float32 per visual token, an id and three positions per token of the 8-token blocks with
    # visual tokens, and aux_datas with the first block
    blocks, rest = divmod(shown["bytes_on_wire"] - shown["visual_tokens"] * 4 * 160 * 4, 16 * 8)
    assert shown["visual_tokens"] <= 8 * blocks < shown["visual_tokens"] + 16
    assert rest == 64
    stages = [span["stage"] for span in shown["timeline"]]
    rounds = [f"round {number}" for number in range(1, shown["rounds"] + 1)]
    assert stages == ["prepare", "encode", *rounds, "prefill", "decode"]
    times = [time for span in shown["timeline"] for time in (span["begin"], span["end"])]
    assert times == sorted(times)
    assert times[0] >= 0
    assert {"prepare", "encode", "prefill", "decode"} <= shown["timings"]["whole"].keys()
    assert {"prepare", "encode", "transfer", "prefill", "decode", "e2e"} <= shown["timings"]["split"].keys()


@pytest.mark.slow
def test_the_demo_shows_ones_own_picture_and_a_timeline():
    done = deepstack("demo", "--image", PHOTO, "--prompt", "What is this?", "--max-new-tokens", 4)
    assert done.returncode == 0, done.stderr
    for words in ("What is this?", "round 1", "prefill", "the same 4 tokens as the whole model", "knows nothing"):
        assert words in done.stdout


@pytest.mark.slow
def test_the_demo_runs_whole_where_mooncake_and_pytorch_are_missing():
    args = ["demo", "--seed=5", "--max-new-tokens=12"]
    hide = "import sys; sys.modules['mooncake'] = sys.modules['torch'] = None"
    code = f"{hide}; from deepstack_jax.cli import main; main({args})"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "COLUMNS": "200"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Mooncake isn't installed: pip install mooncake-transfer-engine" in done.stdout
    assert "round 1" not in done.stdout


def test_nothing_of_the_demo_outlives_it(tmp_path: Path):
    """Killed outright, which no handler sees: the kernel ends the two nodes."""
    import psutil

    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    demo = subprocess.Popen(
        [sys.executable, "-m", "deepstack_jax", "demo", "--json"], env=env, stdout=subprocess.DEVNULL
    )
    watched = psutil.Process(demo.pid)
    deadline = time.monotonic() + 120
    while len(nodes := watched.children()) < 2:
        assert demo.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)  # the second node has hardly started
    demo.kill()
    demo.wait()
    _, alive = psutil.wait_procs(nodes, timeout=30)
    assert not alive
