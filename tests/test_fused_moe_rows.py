"""fused_moe at one T: a token's bits depend on its own row, experts and weights only, and -1 goes nowhere.

Each form runs many batches over one pool of rows. Wherever a row stands and whatever stands beside it, its bits are
those of its first run.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.fused_moe import BACKENDS, mosaic_gpu, routing, xla
from pallas_kernels.fused_moe.arg_specs import ArgSpec
from tests.interpreters import on_gpu, on_tpu
from tests.test_mosaic_tpu import REGIMES

Interpreter = Callable[[], contextlib.AbstractContextManager[None]]

# four choices, because a sum of two has only one order
ODD = ArgSpec(1, width=36, experts=9, top_k=4, inner=20)
TILED = ArgSpec(1, width=256, experts=9, top_k=4, inner=384)
NARROW = ArgSpec(1, width=128, experts=9, top_k=4, inner=128)  # the GPU's interpreter takes seconds per call
WIDE = ArgSpec(1, width=1024, experts=9, top_k=4, inner=384)  # float32 sums differ between products of 2 and 8 rows
CROWDS = (1, 2, 12, 13, 100)  # tokens that choose the same experts


class Form(NamedTuple):
    """One way to compute fused_moe, and what it runs in here."""

    run: Callable[..., jax.Array]
    interpreter: Interpreter = contextlib.nullcontext


PLAIN = {name: Form(jax.jit(BACKENDS[name])) for name in ("xla", "cpu", "xla_grouped")}
ON_CHIPS = {
    **{
        f"mosaic_tpu, {name}": Form(jax.jit(run), partial(on_tpu, cores=2 if "two cores" in name else 1))
        for name, run in REGIMES.items()
    },
    "mosaic_gpu, decode": Form(jax.jit(mosaic_gpu._decode), on_gpu),
    "mosaic_gpu, prefill": Form(jax.jit(mosaic_gpu._prefill), on_gpu),
}


def pool_of(spec: ArgSpec, dtype: str) -> tuple[jax.Array, ...]:
    """Arguments of 3 T rows: T of mixed choices, some of them -1; T that choose the same experts; T that go nowhere."""
    hidden, gate_up, down, mixed, weights = replace(spec, tokens=3 * spec.tokens).arrays(dtype)
    row, choice = jnp.indices(mixed.shape)
    mixed = jnp.where((row % 4 == 1) & (choice == row % spec.top_k), -1, mixed)
    same = jnp.arange(spec.experts - spec.top_k, spec.experts, dtype=jnp.int32)
    kind = row // spec.tokens
    return hidden, gate_up, down, jnp.where(kind == 0, mixed, jnp.where(kind == 1, same, -1)), weights


def batches_of(tokens: int, slots: Iterable[int], crowds: Iterable[int]) -> Iterator[np.ndarray]:
    """Batches as the pool's rows, one per slot: permuted, thinned, alone in some slots, crowded, empty."""
    mixed, same, nowhere = np.arange(3 * tokens).reshape(3, tokens)
    yield mixed
    yield mixed[::-1]
    yield np.roll(mixed, 1)
    is_even = mixed % 2 == 0
    yield np.where(is_even, mixed, nowhere)
    yield np.roll(np.where(is_even, mixed, same), 1)
    for slot in slots:
        row = mixed[-1 - slot]
        yield np.where(mixed == slot, row, nowhere)
        yield np.where(mixed == slot, row, same)
    for crowd in crowds:
        yield np.where(mixed < crowd, same, nowhere)
        yield np.roll(np.where(mixed < crowd, same, mixed), 1)
    yield nowhere


def assert_bits_are_the_rows_own(form: Form, spec: ArgSpec, dtype: str) -> None:
    hidden, gate_up, down, index, weights = pool_of(spec, dtype)
    seen: dict[int, np.ndarray] = {}
    if form in ON_CHIPS.values():  # in an interpreter, which takes seconds
        slots, crowds = {spec.tokens // 2}, {spec.tokens - 1}
    else:
        slots = {0, spec.tokens // 2, spec.tokens - 1}
        crowds = {crowd for crowd in CROWDS if crowd <= spec.tokens}
    for rows in batches_of(spec.tokens, slots, crowds):
        with form.interpreter():
            out = form.run(hidden[rows], gate_up, down, index[rows], weights[rows])
            bits = np.asarray(out).view(np.uint32)
        expected = [seen.setdefault(int(row), of_row) for row, of_row in zip(rows, bits, strict=True)]
        np.testing.assert_array_equal(bits, expected)
    assert len(seen) == 3 * spec.tokens
    assert not any(seen[row].any() for row in range(2 * spec.tokens, 3 * spec.tokens))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", PLAIN)
class TestPlainForms:
    @pytest.mark.parametrize("tokens", [2, 8, 12, 13, 200])
    def test_bits_are_the_rows_own(self, tokens: int, form: str, dtype: str):
        assert_bits_are_the_rows_own(PLAIN[form], replace(TILED, tokens=tokens), dtype)

    @pytest.mark.parametrize("tokens", [7, 41])
    def test_at_sizes_that_fit_no_tile(self, tokens: int, form: str, dtype: str):
        assert_bits_are_the_rows_own(PLAIN[form], replace(ODD, tokens=tokens), dtype)

    @pytest.mark.parametrize("tokens", [8, 13, 128])
    def test_at_a_width_where_products_of_other_sizes_differ(self, tokens: int, form: str, dtype: str):
        assert_bits_are_the_rows_own(PLAIN[form], replace(WIDE, tokens=tokens), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("form", ON_CHIPS)
def test_bits_are_the_rows_own_on_chips(form: str):
    spec = NARROW if "mosaic_gpu" in form else TILED
    assert_bits_are_the_rows_own(ON_CHIPS[form], replace(spec, tokens=13), "bfloat16")


def summed_by_place(
    hidden: jax.Array, gate_up: jax.Array, down: jax.Array, top_k_index: jax.Array, top_k_weights: jax.Array
) -> jax.Array:
    """The mistake: the experts in use are dealt to two sums by their place in the list of them."""
    place = jnp.cumsum(routing.in_use(top_k_index, len(gate_up))) - 1
    sums = jnp.zeros((2, *hidden.shape))
    for number in range(len(gate_up)):
        index = jnp.where(top_k_index == number, number, -1)
        of_expert = xla.fused_moe(hidden, gate_up, down, index, top_k_weights)
        sums = sums.at[place[number] % 2].add(of_expert)
    return sums[0] + sums[1]


def minus_one_is_the_last_expert(
    hidden: jax.Array, gate_up: jax.Array, down: jax.Array, top_k_index: jax.Array, top_k_weights: jax.Array
) -> jax.Array:
    """The mistake: -1 indexes as Python's does."""
    return xla.fused_moe(hidden, gate_up, down, top_k_index % len(gate_up), top_k_weights)


@pytest.mark.parametrize("mistake", [summed_by_place, minus_one_is_the_last_expert])
def test_a_mistake_shows(mistake: Callable[..., jax.Array]):
    with pytest.raises(AssertionError):
        assert_bits_are_the_rows_own(Form(jax.jit(mistake)), replace(TILED, tokens=9), "float32")
