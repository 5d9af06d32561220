"""Meshes: the answers of one device, the promise of the engine, and what doesn't divide is said."""

import base64
import contextlib
import json
import logging
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

import deepstack_jax as dsj
from deepstack_jax import sharding
from deepstack_jax.cli.demo import DEFAULT_IMAGE
from deepstack_jax.cli.demo_split import serve_process
from deepstack_jax.models.parameters import abstract_params, logical_axes, param_shardings
from deepstack_jax.models.registry import parse_config
from deepstack_jax.testing.random_checkpoint import tiny_config, write_random_checkpoint
from tests.engine_questions import CONFIG

ROOT = Path(__file__).parent.parent
EIGHT_DEVICES = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
EXPERTS = "language_model.model.layers.1.mlp.experts.gate_up_proj"


def run_process(*command: str) -> str:
    child = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        env={**os.environ, **EIGHT_DEVICES},
        cwd=ROOT,
        timeout=900,
    )
    assert child.returncode == 0, child.stderr[-3000:]
    return child.stdout


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    write_random_checkpoint(path, tiny_config(), tokenizer=False)
    return path


@pytest.mark.parametrize(
    "meshes",
    [
        ("data=2,tensor=4",),
        pytest.param(("tensor=2", "tensor=4", "tensor=8", "data=8"), marks=pytest.mark.slow),
    ],
    ids="; ".join,
)
def test_a_mesh_gives_the_answer_of_one_device(checkpoint: Path, meshes: tuple[str, ...]):
    """KV heads are split, repeated (tensor=4 of two) or whole (tensor=8)."""
    said = run_process("-m", "tests.mesh_process", str(checkpoint), *meshes)
    assert said.splitlines() == [f"{mesh} holds" for mesh in meshes]


@pytest.mark.slow
def test_tokens_that_go_to_their_experts_give_the_answer_of_one_device(checkpoint: Path):
    said = run_process("-m", "tests.mesh_process", str(checkpoint), "--exchange", "data=2,tensor=4")
    assert said == "data=2,tensor=4 holds\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "schedules"),
    [
        ("data=2,tensor=2", 150),
        ("data=4,tensor=2", 60),
    ],
)
def test_no_schedule_shows_in_an_answer_on_a_mesh(tmp_path: Path, mesh: str, schedules: int):
    write_random_checkpoint(tmp_path, CONFIG, seed=3, tokenizer=False)
    said = run_process("-m", "tests.mesh_process", str(tmp_path), "--schedules", str(schedules), mesh)
    assert said == f"{mesh} holds\n"


class TestCommands:
    @pytest.mark.slow  # several processes do the same in test_processes.py
    def test_generate_answers_on_a_mesh_as_on_one_device(self):
        ask = ["-m", "deepstack_jax", "generate", "tiny-vl", "--prompt", "hi", "--max-new-tokens", "4", "--json"]
        on_one, on_four = (json.loads(run_process(*ask, *mesh)) for mesh in ((), ("--mesh", "data=2,tensor=2")))
        assert on_four["token_ids"] == on_one["token_ids"]

    def test_inspect_counts_the_bytes_that_a_device_holds(self, checkpoint: Path):
        code = """
import sys, deepstack_jax as dsj
from deepstack_jax.cli import main
model = dsj.load(sys.argv[1], mesh=dsj.make_mesh("data=2,tensor=2"))
held = sum(x.addressable_shards[0].data.nbytes for x in model.params.values())
print(f"each of 4 devices holds {held:,} bytes of parameters")
main(["inspect", sys.argv[1], "--mesh", "data=2,tensor=2"])
"""
        counted, *inspected = run_process("-c", code, str(checkpoint)).splitlines()
        assert any(counted in line for line in inspected)

    @pytest.mark.slow
    def test_plan_says_what_a_run_takes(self):
        """For this machine's own devices, where the same engine also runs."""
        plan = ["-m", "deepstack_jax", "plan", "tiny-vl", "--target", "cpu-4", "--mesh", "data=2,tensor=2", "--json"]
        planned = json.loads(run_process(*plan, "--slots", "4", "--chunk", "512", "--kv-bytes", str(1 << 22)))
        code = """
import json, sys, deepstack_jax as dsj
from deepstack_jax.engine.options import EngineOptions
model = dsj.load("tiny-vl", mesh=dsj.make_mesh("data=2,tensor=2"))
engine = EngineOptions(slots=4, chunk=512, kv_bytes=1 << 22).build(model)
held = lambda arrays: sum(x.addressable_shards[0].data.nbytes for x in arrays)
pages = held((*engine._state.cache.keys, *engine._state.cache.values))
print(json.dumps([held(model.params.values()), pages, engine.token_capacity]))
"""
        weights, pages, tokens = json.loads(run_process("-c", code))
        assert planned["fits"]
        assert planned["mesh"] == "data=2,tensor=2"
        assert planned["bytes_per_device"]["weights"] == pytest.approx(weights, rel=0.05)
        assert planned["bytes_per_device"]["pages"] == pytest.approx(pages, rel=0.05)
        assert planned["kv_tokens"] == pytest.approx(tokens, rel=0.05)
        assert planned["collectives_per_layer"] <= 3


@pytest.mark.slow
def test_a_split_over_meshes_answers_as_one_device(monkeypatch: pytest.MonkeyPatch):
    """Encode node and language node are processes with four devices each; rows go through Mooncake."""
    for name, value in EIGHT_DEVICES.items():
        monkeypatch.setenv(name, value)
    picture = Path(str(DEFAULT_IMAGE))
    on_mesh = ["--mesh", "data=2,tensor=2", "--dtype", "float32"]
    with (
        serve_process(Path("tiny-vl"), "encode", on_mesh) as encode,
        contextlib.ExitStack() as stack,
    ):
        encode.wait()
        engine = ["--slots", "4", "--chunk", "128", "--encoder", encode.control]
        language = stack.enter_context(serve_process(Path("tiny-vl"), "language", [*on_mesh, *engine]))
        language.wait()
        body = {
            "text": "What is this?",
            "image_data": "data:image/jpeg;base64," + base64.b64encode(picture.read_bytes()).decode(),
            "sampling_params": {"max_new_tokens": 6, "ignore_eos": True},
        }
        deadline = time.monotonic() + 120
        while (answer := httpx.post(f"{language.url}/generate", json=body, timeout=120)).status_code == 503:
            assert time.monotonic() < deadline, answer.text  # until the two have met
            time.sleep(0.2)
        model = dsj.load("tiny-vl", "float32")
        inputs = dsj.prepare(model, body["text"], images=[str(picture)])
        alone = dsj.generate(model, **inputs, max_new_tokens=6, eos_token_id=[], slots=4, chunk=128)
        assert answer.json()["output_ids"] == alone.tokens[0].tolist(), answer.text


class TestParameters:
    def test_every_one_declares_an_axis_for_each_dimension(self):
        config = parse_config(tiny_config())
        shapes, axes = abstract_params(config), logical_axes(config)
        assert shapes.keys() == axes.keys()
        for path, names in axes.items():
            assert len(names) == len(shapes[path].shape), path
            for name in names:
                assert name is None or isinstance(sharding.RULES.of(name), tuple), path

    def test_experts_are_split_over_both_axes_and_never_along_their_width(self):
        placed = param_shardings(parse_config(tiny_config()), sharding.abstract_mesh("data=2,tensor=2"))
        assert placed[EXPERTS].spec == PartitionSpec(("data", "tensor"), None, None)
        router = placed["language_model.model.layers.1.mlp.gate.weight"]
        assert router.is_fully_replicated
        assert all(leaf.is_fully_replicated for path, leaf in placed.items() if path.startswith("visual."))

    def test_what_does_not_divide_is_said_with_its_bytes(self, caplog: pytest.LogCaptureFixture):
        config = parse_config(tiny_config())
        with caplog.at_level(logging.WARNING, "deepstack_jax"):
            placed = param_shardings(config, sharding.abstract_mesh("tensor=8"))
        said = next(record.getMessage() for record in caplog.records if "kv_heads" in record.getMessage())
        paths = [path for path in placed if "k_proj" in path or "v_proj" in path]
        held = sum(4 * int(np.prod(abstract_params(config)[path].shape)) for path in paths)
        assert f"doesn't divide the 2 parts of kv_heads: each device holds {held:,} bytes of {paths[0]}" in said
        assert f"and {len(paths) - 1} more" in said

    def test_two_dimensions_on_one_mesh_axis_are_an_error(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(sharding, "RULES", replace(sharding.RULES, embed=("tensor",)))
        with pytest.raises(ValueError, match="put two dimensions on one mesh axis"):
            param_shardings(parse_config(tiny_config()), sharding.abstract_mesh("tensor=2"))


class TestMeshes:
    def test_axes_in_any_order_and_of_any_type_become_the_two(self):
        devices = np.asarray(jax.devices()[:1]).reshape(1, 1)
        mesh = sharding.canonical(Mesh(devices, ("tensor", "data"), axis_types=(AxisType.Explicit,) * 2))
        assert mesh.axis_names == ("data", "tensor")
        assert set(mesh.axis_types) == {AxisType.Auto}

    def test_another_axis_is_refused_by_name(self, checkpoint: Path):
        mesh = Mesh(np.asarray(jax.devices()[:1]), ("expert",))
        with pytest.raises(ValueError, match=r"mesh axis 'expert' doesn't exist: the axes are data and tensor"):
            dsj.load(checkpoint, mesh=mesh)

    @pytest.mark.parametrize("asked", ["expert=8", "data=2,data=2", "data=", "tensor=x", "data=0"])
    def test_what_is_no_mesh_is_refused(self, asked: Any):
        with pytest.raises(ValueError, match=r"^mesh [^\n]+$"):
            dsj.make_mesh(asked)

    def test_kv_heads_are_repeated_only_where_each_device_then_has_one(self):
        meshes = {tensor: sharding.abstract_mesh(f"tensor={tensor}") for tensor in (1, 2, 4, 8, 64)}
        repeats = {tensor: sharding.kv_repeats(32, 4, mesh) for tensor, mesh in meshes.items()}
        assert repeats == {1: 1, 2: 1, 4: 1, 8: 2, 64: 1}  # 32 heads are not divided by 64
