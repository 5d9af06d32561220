"""generate and its streaming form: programs compiled, memory, end tokens, sampling, independence of the batch."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import deepstack_jax as dsj
from deepstack_jax.models.parameters import abstract_params
from deepstack_jax.programs import EngineState, decode_loop, prefill_chunk
from deepstack_jax.sampling import TokenMask
from deepstack_jax.testing.random_checkpoint import tiny_config, write_random_checkpoint
from tests.cases import IMAGE, batch_of
from tests.torch_reference import load_reference, reference_tokens

compiled: list[str] = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, _seconds, **_: compiled.append(event) if event.endswith("backend_compile_duration") else None
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    write_random_checkpoint(path, tiny_config(), seed=3)
    return path


@pytest.fixture(scope="module")
def model(directory: Path) -> dsj.Model:
    return dsj.load(directory)


def text(*lengths: int, seed: int = 0) -> dict[str, np.ndarray]:
    return batch_of(tiny_config(), [[length] for length in lengths], seed=seed)


def test_ten_prompts_compile_one_program_per_width_and_a_second_call_none(model: dsj.Model):
    prompts = [text(length) for length in (5, 17, 31, 40, 63, 64, 65, 70, 82, 99)]

    programs = prefill_chunk._cache_size(), decode_loop._cache_size()
    first = [dsj.generate(model, **prompt, max_new_tokens=7).tokens for prompt in prompts]
    assert prefill_chunk._cache_size() - programs[0] == 2  # pieces of up to 64 tokens, and of up to 128
    assert decode_loop._cache_size() - programs[1] == 1

    compiled.clear()
    options = {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.2, "seed": 4}
    for prompt, tokens in zip(prompts, first, strict=True):
        np.testing.assert_array_equal(dsj.generate(model, **prompt, max_new_tokens=7).tokens, tokens)
        dsj.generate(model, **prompt, max_new_tokens=6, eos_token_id=[1, 2], **options)
        assert len(list(dsj.stream(model, prompt, max_new_tokens=7, eos_token_id=[]))) == 7
    assert not compiled


@pytest.mark.parametrize("dtype", [pytest.param(jnp.float32, marks=pytest.mark.slow), jnp.bfloat16])
def test_temporary_memory_of_decode_does_not_grow_with_the_cache_or_the_experts(model: dsj.Model, dtype: jnp.dtype):
    def memory(num_pages: int, experts: int):
        config = replace(model.config, vision=None, dtype=jnp.dtype(dtype).name)
        config = replace(config, text=replace(config.text, num_experts=experts))
        params = abstract_params(config, dtype)
        state = jax.eval_shape(lambda: EngineState.empty(config, 2, num_pages, 128))
        cache = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.cache))
        limits = np.ones(2, bool), np.int32(1), np.bool_(False), TokenMask.none(2, config.text.vocab_size)
        return decode_loop.lower(config, params, state, *limits).compile().memory_analysis(), cache

    (small, _), (long, cache), (many, _) = memory(16, 8), memory(64, 8), memory(16, 64)
    assert long.temp_size_in_bytes <= small.temp_size_in_bytes + 4096
    # the router's logits, float32 [2, experts], are all that may grow
    assert many.temp_size_in_bytes <= small.temp_size_in_bytes + 4 * 2 * 4 * 64
    assert long.alias_size_in_bytes >= cache  # the donated pages are the returned ones


def test_an_answer_stops_at_its_end_token_and_its_neighbours_go_on(model: dsj.Model):
    prompts = text(12, 7)
    free = dsj.generate(model, **prompts, max_new_tokens=12, eos_token_id=[])
    assert free.lengths.tolist() == [12, 12]
    end = int(free.tokens[0, 4])
    stop = int(np.flatnonzero(free.tokens[0] == end)[0]) + 1
    assert end not in free.tokens[1]

    out = dsj.generate(model, **prompts, max_new_tokens=12, eos_token_id=[end])
    assert out.lengths.tolist() == [stop, 12]
    np.testing.assert_array_equal(out.tokens[0, :stop], free.tokens[0, :stop])
    assert (out.tokens[0, stop:] == model.pad_token_id).all()
    np.testing.assert_array_equal(out.tokens[1], free.tokens[1])

    streamed = np.stack(list(dsj.stream(model, prompts, max_new_tokens=12, eos_token_id=end)), axis=1)
    np.testing.assert_array_equal(streamed[0], [*free.tokens[0, :stop], *[-1] * (12 - stop)])
    np.testing.assert_array_equal(streamed[1], free.tokens[1])


def test_the_checkpoints_own_end_tokens_are_taken_by_default(model: dsj.Model, directory: Path):
    assert model.eos_token_ids == (258,)
    free = dsj.generate(model, **text(9), max_new_tokens=10, eos_token_id=[]).tokens[0]
    other = dsj.Model(model.config, model.params, eos_token_ids=(int(free[3]),), pad_token_id=7)
    out = dsj.generate(other, **text(9), max_new_tokens=10)
    assert out.lengths[0] == np.flatnonzero(free == free[3])[0] + 1
    assert (out.tokens[0, out.lengths[0] :] == 7).all()


def test_seeds_reproduce_and_differ_and_a_row_depends_on_its_own_alone(model: dsj.Model):
    prompts = text(10, 14, 6)
    options = {"max_new_tokens": 12, "temperature": 1.5, "eos_token_id": []}
    drawn = dsj.generate(model, **prompts, **options, seed=11).tokens
    np.testing.assert_array_equal(drawn, dsj.generate(model, **prompts, **options, seed=11).tokens)
    assert (drawn != dsj.generate(model, **prompts, **options, seed=12).tokens).any(axis=1).all()
    for row in range(3):
        keep = prompts["attention_mask"][row] == 1
        alone = {"input_ids": prompts["input_ids"][row][keep][None]}
        np.testing.assert_array_equal(drawn[row], dsj.generate(model, **alone, **options, seed=11 + row).tokens[0])
    by_row = dsj.generate(model, **prompts, **options, seed=[5, 11, 99]).tokens
    keep = prompts["attention_mask"][1] == 1
    alone = {"input_ids": prompts["input_ids"][1][keep][None]}
    np.testing.assert_array_equal(by_row[1], dsj.generate(model, **alone, **options, seed=11).tokens[0])


def test_repetition_penalty_gives_the_greedy_tokens_of_pytorch(model: dsj.Model, directory: Path):
    prompts = batch_of(tiny_config(), [[8, (IMAGE, (1, 4, 4)), 6]], seed=5)
    penalty = 0.6  # below 1 it favours repetition, which random weights hardly show by themselves
    expected = reference_tokens(load_reference(directory), prompts, repetition_penalty=penalty)
    out = dsj.generate(model, **prompts, max_new_tokens=16, repetition_penalty=penalty, eos_token_id=[])
    np.testing.assert_array_equal(out.tokens, expected)
    assert (out.tokens != dsj.generate(model, **prompts, max_new_tokens=16, eos_token_id=[]).tokens).any()


def test_a_large_presence_penalty_never_repeats_a_token(model: dsj.Model):
    out = dsj.generate(model, **text(9, 9), max_new_tokens=40, presence_penalty=1e4, eos_token_id=[])
    assert all(len(set(row)) == 40 for row in out.tokens.tolist())


@pytest.mark.parametrize(
    "penalties", [{"frequency_penalty": -0.5}, {"frequency_penalty": 0.5, "presence_penalty": -0.7}]
)
def test_a_frequency_penalty_counts_the_tokens_of_the_answer(model: dsj.Model, penalties: dict[str, float]):
    ids = text(9)["input_ids"]
    out = dsj.generate(model, ids, max_new_tokens=14, eos_token_id=[], **penalties)
    answer: list[int] = []
    for _ in range(14):
        logits = np.float64(dsj.forward(model, np.concatenate([ids, [answer]], axis=1).astype(ids.dtype))[0, -1])
        for token in set(answer):
            logits[token] -= penalties.get("presence_penalty", 0) + answer.count(token) * penalties["frequency_penalty"]
        answer.append(int(logits.argmax()))
    assert out.tokens[0].tolist() == answer
    assert max(answer.count(token) for token in answer) > 1  # otherwise counts would play no part


# Rows of text and images; what is asserted of them are properties, so any small layout will do.
layouts = st.lists(
    st.lists(st.integers(1, 9) | st.sampled_from([(IMAGE, (1, 2, 4)), (IMAGE, (1, 4, 2))]), min_size=1, max_size=4),
    min_size=1,
    max_size=3,
)


@settings(max_examples=12, deadline=None)
@given(rows=layouts, seed=st.integers(0, 99), extra=st.integers(0, 40))
def test_the_answer_does_not_depend_on_padding_bucket_neighbours_or_order(
    model: dsj.Model, rows: list, seed: int, extra: int
):
    rows = [[2, *row] for row in rows]
    left, right = (batch_of(tiny_config(), rows, padding, seed) for padding in ("left", "right"))
    wider = {
        name: np.pad(value, [(0, 0), (extra, 0)]) if value.shape == left["input_ids"].shape else value
        for name, value in left.items()
    }
    tokens = greedy(model, left)
    np.testing.assert_array_equal(tokens, greedy(model, right))
    np.testing.assert_array_equal(tokens, greedy(model, wider))
    np.testing.assert_array_equal(tokens[::-1], greedy(model, take_rows(model, left, range(len(rows))[::-1])))
    for row in range(len(rows)):
        np.testing.assert_array_equal(tokens[row], greedy(model, take_rows(model, left, [row]))[0])


def greedy(model: dsj.Model, inputs: dict[str, np.ndarray]) -> np.ndarray:
    return dsj.generate(model, **inputs, max_new_tokens=8, eos_token_id=[]).tokens


def take_rows(model: dsj.Model, inputs: dict[str, np.ndarray], rows) -> dict[str, np.ndarray]:
    """These rows of a batch, in this order, each with its own images."""
    taken = {name: inputs[name][list(rows)] for name in ("input_ids", "attention_mask")}
    if "image_grid_thw" not in inputs:
        return taken
    unit = model.config.vision.merge_unit
    of_row = (inputs["input_ids"] == model.config.image_token_id).sum(axis=1)
    tokens_of_grid = inputs["image_grid_thw"].prod(axis=1) // unit
    # images stand in reading order, so their tokens fill the rows one after another
    row_of_grid = np.searchsorted(np.cumsum(of_row), np.cumsum(tokens_of_grid), side="left")
    grids, pixels = [], []
    ends = np.cumsum(tokens_of_grid * unit)
    for row in rows:
        for i in np.flatnonzero(row_of_grid == row):
            grids.append(inputs["image_grid_thw"][i])
            pixels.append(inputs["pixel_values"][ends[i] - tokens_of_grid[i] * unit : ends[i]])
    if grids:
        taken |= {"image_grid_thw": np.stack(grids), "pixel_values": np.concatenate(pixels)}
    return taken
