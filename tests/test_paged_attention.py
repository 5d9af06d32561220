"""paged_attention against float64 softmax attention over the keys in order, and what a row's bits don't depend on."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels.attention import BACKENDS, paged_attention, ranged_attention
from pallas_kernels.attention.arg_specs import ODD, REAL_PAGED, SMALL_PAGED, TILED, PagedArgSpec
from tests.float64 import in_order
from tests.float64 import paged_attention as reference

Arrays = tuple[np.ndarray, ...]  # the arguments of paged_attention
DTYPES = ("float32", "bfloat16")


def assert_same_bits(found: jax.Array | np.ndarray, expected: np.ndarray) -> None:
    """As float32; 0 and -0 differ."""
    np.testing.assert_array_equal(np.asarray(found).view(np.int32), np.asarray(expected).view(np.int32))


@cache
def arrays(spec: PagedArgSpec, dtype: str) -> Arrays:
    return tuple(np.asarray(x) for x in spec.arrays(dtype))


@cache
def jitted() -> Callable[..., jax.Array]:
    return jax.jit(paged_attention)


@jax.jit
def in_a_program(query, key_pages, value_pages, page_table, start, stop) -> jax.Array:
    """With neighbours that XLA can fuse with it, twice in a loop as layers and steps are."""

    def step(_: int, query: jax.Array) -> jax.Array:
        out = paged_attention(jnp.tanh(query), key_pages, value_pages, page_table, start, stop)
        return (jnp.sin(out) + 1).swapaxes(1, 2).astype(query.dtype)

    return jax.lax.fori_loop(0, 2, step, query).swapaxes(1, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", SMALL_PAGED, ids=str)
def test_equals_float64_attention_within_each_querys_range(spec: PagedArgSpec, dtype: str):
    args = arrays(spec, dtype)
    assert [(x.shape, x.dtype) for x in args] == [(x.shape, x.dtype) for x in spec.shapes(dtype)]
    out = jitted()(*args)
    assert out.dtype == jnp.float32
    # float32: rounding of sums over up to 700 keys. bfloat16 also rounds each weight, by at most a 2^-8th of it
    query, key_pages, value_pages, *rest = args
    of_weights = 2**-8 * reference(query, key_pages, np.abs(value_pages), *rest) if dtype == "bfloat16" else 0
    error = np.abs(np.asarray(out, np.float64) - reference(*args))
    assert np.all(error <= 3e-6 + of_weights), np.max(error - of_weights)


@pytest.mark.parametrize("length", [1, 5])
def test_a_range_without_keys_gives_zero_and_reads_nothing(length: int):
    query, key_pages, value_pages, page_table, start, stop = arrays(replace(ODD, length=length), "float32")
    nan = np.full_like(key_pages, np.nan)
    empty = np.full_like(stop, 7)
    assert not np.any(jitted()(query, nan, nan, page_table, empty, empty))
    stop = stop.copy()
    stop[1] = start[1]
    out = np.asarray(jitted()(query, key_pages, value_pages, page_table, start, stop))
    assert not np.any(out[1])
    assert np.all(np.any(out[[0, 2]], axis=-1))


# One spec per kind of program: T, B, heads per key head, h and page differ.
PROMISES = (
    PagedArgSpec(1, 8, 2, 1, 700, 128),
    PagedArgSpec(4, 6, 2, 1, 300, 64, page=16),
    PagedArgSpec(4, 3, 3, 1, 300, 72, window=150),
    PagedArgSpec(8, 32, 4, 1, 700, 128),
    PagedArgSpec(1, 16, 4, 32, 600, 128),
    PagedArgSpec(4, 6, 3, 32, 300, 72, page=16, window=90),
    PagedArgSpec(1, 8, 1, 256, 700, 128),
    PagedArgSpec(4, 4, 2, 256, 600, 64),
    PagedArgSpec(2, 2, 1, 300, 600, 64),  # two blocks of queries
)
FORMS = {"jit": jitted(), "in a program": in_a_program}
# a program takes longer to compile
CASES = [("jit", spec) for spec in PROMISES] + [("in a program", PROMISES[i]) for i in (3, 4, 8)]


def moved(args: Arrays, pages: int, columns: int, rng: np.random.Generator) -> Arrays:
    """The same keys in other pages, of `pages` more, with a page table of `columns` more columns.

    All that a row doesn't read becomes NaN: pages of nobody and slots outside the row's ranges.
    """
    query, key_pages, value_pages, page_table, start, stop = args
    count, _, page, _ = key_pages.shape
    new_table = np.zeros((len(page_table), page_table.shape[1] + columns), np.int32)
    numbers = 1 + rng.permutation(count + pages - 1)[: page_table.size]
    new_table[:, : page_table.shape[1]] = numbers.reshape(page_table.shape)
    moved_pages = []
    for old in (key_pages, value_pages):
        new = np.full((count + pages, *old.shape[1:]), np.nan, old.dtype)
        for b, row in enumerate(page_table):
            for j, number in enumerate(row):
                slots = j * page + np.arange(page)
                read = (slots >= start[b].min()) & (slots < stop[b].max())
                new[new_table[b, j]][:, read] = old[number][:, read]
        moved_pages.append(new)
    return query, *moved_pages, new_table, start, stop


def with_other_neighbours(args: Arrays, row: int, slot: int, rng: np.random.Generator) -> Arrays:
    """The row at place `slot`, beside rows that have other queries, ranges and keys, or none."""
    query, key_pages, value_pages, page_table, start, stop = args
    batch, _, length, _ = query.shape
    capacity = page_table.shape[1] * key_pages.shape[2]
    others = [b for b in range(batch) if b != row]
    order = np.insert(rng.permutation(others), slot, row).astype(int)
    query, page_table = query[order].copy(), page_table[order]
    new_start, new_stop = np.sort(rng.integers(0, capacity + 1, (2, batch, length)), axis=0).astype(np.int32)
    new_stop = np.where(rng.random((batch, 1)) < 0.3, new_start, new_stop)
    new_start[slot], new_stop[slot] = start[row], stop[row]
    neighbours = np.arange(batch) != slot
    query[neighbours] = rng.standard_normal(query[neighbours].shape) * 30
    key_pages, value_pages = key_pages.copy(), value_pages.copy()
    foreign = np.setdiff1d(np.arange(len(key_pages)), page_table[slot])
    for pages in (key_pages, value_pages):
        pages[foreign] = rng.choice([np.nan, np.inf, 1e30, -3.0], pages.shape[1:])
    return query, key_pages, value_pages, page_table, new_start, new_stop


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("form", "spec"), CASES, ids=str)
class TestBits:
    """A row's bits are a function of the shapes and of what the row reads."""

    def test_do_not_depend_on_where_the_keys_lie_nor_on_how_many_pages_there_are(
        self, form: str, spec: PagedArgSpec, dtype: str
    ):
        args, run, rng = arrays(spec, dtype), FORMS[form], np.random.default_rng(0)
        expected = np.asarray(run(*args))
        assert np.all(np.isfinite(expected))
        for pages, columns in ((0, 0), (0, 0), (9, 5)):
            assert_same_bits(run(*moved(args, pages, columns, rng)), expected)

    def test_do_not_depend_on_the_slot_nor_on_the_other_rows(self, form: str, spec: PagedArgSpec, dtype: str):
        args, run, rng = arrays(spec, dtype), FORMS[form], np.random.default_rng(1)
        expected = np.asarray(run(*args))
        for row in range(spec.batch):
            for slot in rng.permutation(spec.batch)[:3]:
                out = np.asarray(run(*with_other_neighbours(args, row, slot, rng)))
                assert_same_bits(out[slot], expected[row])


def test_turns_that_only_other_rows_need_leave_even_a_negative_zero():
    """The first page's values are tiny and negative; the second's weight makes an underflow of them, which is -0."""
    query = np.full((2, 1, 1, 64), 8, np.float32)
    key_pages, value_pages = np.zeros((2, 7, 1, 128, 64), np.float32)
    value_pages[1], key_pages[2] = -1e-30, 80 / 64
    page_table, start = np.asarray([[1, 2, 0, 0], [3, 4, 5, 6]], np.int32), np.zeros((2, 1), np.int32)
    outs = [
        np.asarray(jitted()(query, key_pages, value_pages, page_table, start, np.asarray([[256], [stop]], np.int32)))[0]
        for stop in (256, 512)
    ]
    assert np.all(outs[0] == 0)
    assert np.all(np.signbit(outs[0])), "the case is no longer the one that this test is about"
    assert_same_bits(outs[1], outs[0])


def test_another_dtype_is_the_float32_result_rounded():
    args = arrays(TILED, "bfloat16")
    rounded = jax.jit(partial(paged_attention, dtype=jnp.bfloat16))(*args)
    assert rounded.dtype == jnp.bfloat16
    np.testing.assert_array_equal(rounded, jitted()(*args).astype(jnp.bfloat16))


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_takes_the_dtype_of_its_result(backend: str):
    run = partial(paged_attention, dtype=jnp.bfloat16, backend=backend)
    assert jax.eval_shape(run, *REAL_PAGED["30B-A3B"][0].shapes("bfloat16")).dtype == jnp.bfloat16


def test_bits_outside_jit_are_as_independent():
    args, rng = arrays(TILED, "bfloat16"), np.random.default_rng(2)
    expected = np.asarray(paged_attention(*args))
    assert_same_bits(paged_attention(*moved(args, 3, 2, rng)), expected)
    for row, slot in ((0, 3), (2, 2), (3, 0)):
        out = np.asarray(paged_attention(*with_other_neighbours(args, row, slot, rng)))
        assert_same_bits(out[slot], expected[row])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_querys_bits_do_not_depend_on_the_other_queries_of_its_chunk(dtype: str):
    """The padding of a chunk, and what follows a query in it, change nothing."""
    query, key_pages, value_pages, page_table, start, stop = arrays(PagedArgSpec(1, 8, 2, 64, 300, 128), dtype)
    expected = np.asarray(jitted()(query, key_pages, value_pages, page_table, start, stop))[:, :40]
    query, stop = query.copy(), stop.copy()
    query[:, :, 40:], stop[:, 40:] = np.nan, start[:, 40:]
    out = np.asarray(jitted()(query, key_pages, value_pages, page_table, start, stop))
    assert_same_bits(out[:, :40], expected)
    assert not np.any(out[:, 40:])


def test_a_context_of_262144_keys_takes_no_memory_of_its_length():
    spec = PagedArgSpec(2, 8, 2, 1, 262144, 128)
    memory = [
        jitted().lower(*replace(spec, context=context).shapes("bfloat16")).compile().memory_analysis()
        for context in (1024, spec.context)
    ]
    table = 4 * spec.batch * spec.pages_per_row
    assert memory[1].temp_size_in_bytes <= memory[0].temp_size_in_bytes + table


def test_runs_within_shard_map():
    """A device computes its own heads; a loop's state must be typed as varying over the mesh."""
    mesh = jax.make_mesh((1,), ("tensor",), axis_types=(AxisType.Auto,))
    heads, none = P(None, "tensor"), P()
    for spec in (TILED, PagedArgSpec(2, 2, 1, 300, 300, 64)):
        args = arrays(spec, "float32")
        over_heads = jax.shard_map(
            paged_attention,
            mesh=mesh,
            in_specs=(heads, heads, heads, none, none, none),
            out_specs=P(None, None, "tensor"),
        )
        assert_same_bits(jax.jit(over_heads)(*args), jitted()(*args))
        query, key_pages, value_pages, page_table, start, stop = args
        args = query, in_order(key_pages, page_table), in_order(value_pages, page_table), start, stop
        over_heads = jax.shard_map(
            ranged_attention, mesh=mesh, in_specs=(heads, heads, heads, none, none), out_specs=P(None, None, "tensor")
        )
        assert_same_bits(jax.jit(over_heads)(*args), jax.jit(ranged_attention)(*args))


@pytest.mark.parametrize("spec", [spec for specs in REAL_PAGED.values() for spec in specs], ids=str)
def test_arguments_of_the_real_models_are_accepted(spec: PagedArgSpec):
    out = jax.eval_shape(paged_attention, *spec.shapes("bfloat16"))
    assert (out.shape, out.dtype) == ((spec.batch, spec.length, spec.heads, spec.head_dim), jnp.float32)
