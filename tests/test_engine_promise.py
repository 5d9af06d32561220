"""The engine's promise: a request's tokens, keys and values are, bit for bit, those that it has alone.

Each planted mistake breaks it, and the random schedules find that. The requests' own answers are computed by the
mistaken programs as well: what is found is what depends on others.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deepstack_jax as dsj
from deepstack_jax import programs
from deepstack_jax.engine import core, prefix_cache
from deepstack_jax.engine.shape import EngineShape
from deepstack_jax.models import moe, qwen3_moe
from deepstack_jax.models.parameters import _declared
from deepstack_jax.processing.batch import VisionInput, prepare_batch
from deepstack_jax.testing.random_checkpoint import write_random_checkpoint
from tests.cases import IMAGE
from tests.engine_questions import (
    CONFIG,
    SHAPE,
    Bench,
    Inputs,
    ask,
    ask_batch,
    inputs_of,
    small_bench,
    two_halves,
    with_one_pixel_changed,
)
from tests.engine_schedules_on_device import Violation, simulate_all
from tests.test_fused_moe_rows import summed_by_place


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> dsj.Model:
    path = tmp_path_factory.mktemp("checkpoint")
    write_random_checkpoint(path, CONFIG, seed=3, tokenizer=False)
    return dsj.load(path)


@pytest.fixture(scope="module")
def bench(model: dsj.Model) -> Bench:
    return small_bench(model)


class TestSmallEngine:
    @pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.slow) for part in (1, 2, 3))])
    def test_no_schedule_shows_in_an_answer(self, bench: Bench, part: int):
        seen = simulate_all(bench, range(500 * part, 500 * (part + 1)))
        # they reach what they are for
        often = {"length", "stop", "cancelled", "failed", "late", "cached", "cached with images", "matched again"}
        often |= {"split", "failed over", "cached in a split", "masked"}
        assert {what for what in often if seen[what] < 10} == set()

    @pytest.mark.slow
    def test_nor_with_one_request_per_program(self, model: dsj.Model):
        simulate_all(small_bench(model, EngineShape(slots=4, chunk=32, page=16)), range(100))

    @pytest.mark.exhaustive
    @pytest.mark.parametrize("part", range(10))
    def test_twenty_thousand_do_not(self, bench: Bench, part: int):
        simulate_all(bench, range(2000 * (part + 1), 2000 * (part + 2)))


@pytest.fixture
def retraced() -> Iterator[None]:
    """Programs that are traced with what a test plants, and again without it."""
    _forget_programs()
    yield
    _forget_programs()


def _forget_programs() -> None:
    _declared.cache_clear()  # modules hold the function of their experts
    for program in (programs.prefill_chunk, programs.decode_loop):
        program.clear_cache()


def scalar_step(logits: jax.Array, seen: jax.Array, params: Any, step: jax.Array, *others: Any) -> jax.Array:
    return sample(logits, seen, params, jnp.max(step), *others)


def one_key_too_many(query: jax.Array, *cached: jax.Array, dtype: Any) -> jax.Array:
    *pages, start, stop = cached
    return attention(query, *pages, start, jnp.where(stop > 0, stop + 1, 0), dtype=dtype)


def one_row_begins_late(query: jax.Array, *cached: jax.Array, dtype: Any) -> jax.Array:
    *pages, start, stop = cached
    later = (jnp.arange(len(start)) == 1)[:, None] & (stop > 1)
    return attention(query, *pages, start + later, stop, dtype=dtype)


def all_rows_run(config: Any, params: Any, state: Any, running: np.ndarray, *others: Any) -> Any:
    return programs.decode_loop(config, params, state, np.ones_like(running), *others)


def sparse_moe_without_activity(self: moe.SparseMoE, hidden: jax.Array, active: jax.Array | None = None) -> jax.Array:
    del active
    return sparse_moe(self, hidden)


# what the mistakes are made of
sample, attention, sparse_moe = programs.sample, qwen3_moe.paged_attention, moe.SparseMoE.__call__
digest, visual_fields = VisionInput.digest.func, prefix_cache._visual_fields


@pytest.mark.slow
class TestPlantedMistakes:
    @pytest.mark.parametrize(
        ("where", "name", "mistake"),
        [
            pytest.param(programs, "sample", scalar_step, id="all rows draw at one step"),
            pytest.param(moe, "fused_moe", summed_by_place, id="experts are summed by place"),
            pytest.param(qwen3_moe, "paged_attention", one_key_too_many, id="a query reads one key too many"),
            pytest.param(qwen3_moe, "paged_attention", one_row_begins_late, id="one row begins a key too late"),
            pytest.param(core, "decode_loop", all_rows_run, id="rows without a request decode"),
        ],
    )
    def test_the_schedules_find_it(
        self,
        model: dsj.Model,
        monkeypatch: pytest.MonkeyPatch,
        retraced: None,
        where: Any,
        name: str,
        mistake: Callable[..., Any],
    ):
        monkeypatch.setattr(where, name, mistake)
        bench = small_bench(model)
        with pytest.raises(Violation):
            simulate_all(bench, range(200))

    def test_a_short_hash_of_images(self, model: dsj.Model, monkeypatch: pytest.MonkeyPatch):
        """One byte of it is equal for two of the pictures."""
        monkeypatch.setattr(VisionInput, "digest", property(lambda pixels: digest(pixels)[:1] + bytes(31)))
        inputs = inputs_of(3, (IMAGE, (1, 4, 8)), 45, seed=1)
        changed = (with_one_pixel_changed(inputs, value) for value in range(5000))
        twin = next(each for each in changed if first_byte(model, each) == first_byte(model, inputs))
        bench = Bench(model, SHAPE, [ask(model, inputs), ask(model, twin)])
        with pytest.raises(Violation, match=r"cached|tokens"):
            simulate_all(bench, range(50))

    def test_keys_without_the_place_in_an_image(self, bench: Bench, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(prefix_cache, "_visual_fields", lambda *args: (f[:-8] for f in visual_fields(*args)))
        halves = Bench(bench.model, bench.shape, [ask_batch(bench.model, each) for each in two_halves(bench.model)])
        with pytest.raises(Violation, match=r"cached|tokens"):
            simulate_all(halves, range(50))

    def test_padding_that_goes_to_experts_changes_nothing(
        self, model: dsj.Model, monkeypatch: pytest.MonkeyPatch, retraced: None
    ):
        """An expert takes all tokens that choose it: padding costs time, and no token is left out for it."""
        monkeypatch.setattr(moe.SparseMoE, "__call__", sparse_moe_without_activity)
        simulate_all(small_bench(model), range(50))


def first_byte(model: dsj.Model, inputs: Inputs) -> int:
    """Of the hash of a prompt's image."""
    return digest(prepare_batch(model.config, **inputs).visuals[0])[0]
