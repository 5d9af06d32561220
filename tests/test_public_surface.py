"""The public names as the documents give them: options, streaming by keywords, meshes."""

import dataclasses
import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import msgspec
import numpy as np
import pytest

import deepstack_jax as dsj
from deepstack_jax.cli import generate as cli_generate
from deepstack_jax.models.parameters import init_params
from deepstack_jax.models.registry import parse_config
from deepstack_jax.serving.requests import SamplingFields
from deepstack_jax.testing.random_checkpoint import tiny_config

DRAWN = {"max_new_tokens": 6, "temperature": 0.8, "top_k": 20, "seed": 3, "eos_token_id": []}
PROMPT = {"input_ids": [[5, 9, 2, 7], [3, 3, 8, 1]], "attention_mask": [[1, 1, 1, 1], [0, 1, 1, 1]]}


@pytest.fixture(scope="module")
def model() -> dsj.Model:
    config = parse_config(tiny_config("qwen3_moe"))
    return dsj.Model(config, init_params(config))


OTHERS = ("sampling", "slots", "chunk", "deepstack_scales")  # not options of how tokens are drawn
LIBRARY_ONLY = ("min_tokens", "logit_bias", "top_logprobs")  # neither fields of /generate nor options of the command


def options_of(function: Callable[..., Any]) -> dict[str, Any]:
    """The keyword-only options of a function and their defaults."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in OTHERS}


def test_the_library_the_server_and_the_command_have_the_same_options_and_defaults():
    defaults = {field.name: field.default for field in dataclasses.fields(dsj.SamplingOptions)}
    assert options_of(dsj.generate) == defaults
    defaults = {name: value for name, value in defaults.items() if name not in LIBRARY_ONLY}
    server = {field.name: field.default for field in msgspec.structs.fields(SamplingFields)}
    assert {name: server[name] for name in defaults if name != "eos_token_id"} == {
        name: value for name, value in defaults.items() if name != "eos_token_id"
    }
    command = inspect.signature(cli_generate.run).parameters
    for name, value in defaults.items():
        if name not in ("max_new_tokens", "eos_token_id"):  # a command answers longer; ends are the checkpoint's
            assert command[name].default == value


def test_options_may_be_given_together_or_one_by_one(model: dsj.Model):
    expected = dsj.generate(model, **PROMPT, **DRAWN)
    sampling = dsj.SamplingOptions(**DRAWN)
    np.testing.assert_array_equal(dsj.generate(model, **PROMPT, sampling=sampling).tokens, expected.tokens)
    for streamed in (
        dsj.stream(model, **PROMPT, **DRAWN),
        dsj.stream(model, PROMPT, **DRAWN),
        dsj.stream(model, inputs=PROMPT, **DRAWN),
        dsj.stream(model, **PROMPT, sampling=sampling),
        dsj.stream(model, {"input_ids": PROMPT["input_ids"]}, attention_mask=PROMPT["attention_mask"], **DRAWN),
    ):
        np.testing.assert_array_equal(np.stack(list(streamed), axis=1), expected.tokens)


def test_both_ways_at_once_are_refused(model: dsj.Model):
    for answer in (dsj.generate, dsj.stream):
        with pytest.raises(ValueError, match="top_k and sampling: both given"):
            answer(model, **PROMPT, top_k=3, sampling=dsj.SamplingOptions())
        with pytest.raises(TypeError, match=r"sampling {'top_k': 3} is not supported: give SamplingOptions"):
            answer(model, **PROMPT, sampling={"top_k": 3})


def test_a_stream_refuses_before_its_first_token(model: dsj.Model):
    for wrong, message in (
        ({"top_p": 2}, "top_p 2 is out of range"),
        ({"seed": [1, 2, 3]}, "3 seeds for a batch of 2"),
        ({"max_new_tokens": 10**6}, "exceed the model's"),
        ({"eos_token_id": ["x"]}, r"eos_token_id\[0\] 'x' is not a number"),
    ):
        with pytest.raises(ValueError, match=message):
            dsj.stream(model, **PROMPT, **wrong)
    with pytest.raises(TypeError, match="temprature"):
        dsj.stream(model, **PROMPT, temprature=1.0)


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        ({}, {"max_new_tokens": 64, "top_k": 0, "seed": 0, "eos_token_id": None}),
        ({"max_new_tokens": 8.0, "top_k": -1}, {"max_new_tokens": 8, "top_k": 0}),
        ({"max_new_tokens": None, "temperature": None, "seed": None}, {"max_new_tokens": 64, "seed": 0}),
        ({"eos_token_id": 7}, {"eos_token_id": (7,)}),
        ({"eos_token_id": np.array([7, 8])}, {"eos_token_id": (7, 8)}),
        ({"eos_token_id": []}, {"eos_token_id": ()}),
        ({"seed": np.array([1, 2])}, {"seed": (1, 2)}),
    ],
)
def test_options_are_stored_as_plain_numbers(given: dict[str, Any], stored: dict[str, Any]):
    options = dsj.SamplingOptions(**given)
    assert {name: getattr(options, name) for name in stored} == stored
    assert options == dsj.SamplingOptions(**dataclasses.asdict(options))
    assert isinstance(hash(options), int)
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.top_k = 5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens 0 is out of range: expected 1 or more"),
        ({"max_new_tokens": 2.5}, "max_new_tokens 2.5 is out of range"),
        ({"max_new_tokens": True}, "max_new_tokens True is not a number"),
        ({"eos_token_id": 1.5}, "eos_token_id 1.5 is out of range: expected a token id"),
        ({"eos_token_id": 2**31}, "eos_token_id 2147483648 is out of range: expected a token id"),
        ({"eos_token_id": "x"}, "eos_token_id 'x' is not a number"),
    ],
)
def test_options_out_of_range_are_named(given: dict[str, Any], message: str):
    with pytest.raises(ValueError) as error:
        dsj.SamplingOptions(**given)
    assert message in str(error.value)


def test_a_mesh_has_as_many_devices_as_asked_for():
    code = """
import deepstack_jax as dsj
for asked, found in ((None, 4), (1, 1), (4, 4), ("2", 2), ("tensor=2", 2), (" tensor=4 ", 4)):
    assert dict(dsj.make_mesh(asked).shape) == {"tensor": found}, asked
"""
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert child.returncode == 0, child.stderr


@pytest.mark.parametrize("asked", [0, -1, 10**6, "data=2,tensor=4", "data=2", "tensor=x", "tensor=-1", "", True, 1.0])
def test_a_mesh_that_cannot_be_is_refused_in_one_line(asked: Any):
    assert len(jax.devices()) < 10**6
    with pytest.raises(ValueError, match=r"^mesh [^\n]*: [^\n]*(ask for|give a number)[^\n]*$"):
        dsj.make_mesh(asked)
