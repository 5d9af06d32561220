"""Attention's TPU kernel in Pallas' interpreter, which sees races between copies and NaN where nothing was written."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels import attention as attention_module
from pallas_kernels import dispatch
from pallas_kernels.attention import mosaic_tpu, xla_paged, xla_ranged
from pallas_kernels.attention.arg_specs import PagedArgSpec, RangedArgSpec
from tests import float64
from tests.interpreters import on_tpu
from tests.test_attention import causal, segments
from tests.test_paged_attention import Arrays, assert_same_bits, moved, with_other_neighbours

pytestmark = pytest.mark.slow  # an interpreter takes seconds per call

FORMS = {"ranged": mosaic_tpu.ranged_attention, "paged": mosaic_tpu.paged_attention}
PLAIN = {"ranged": jax.jit(xla_ranged.ranged_attention), "paged": jax.jit(xla_paged.paged_attention)}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch):
    """Two blocks of queries and several turns of two pages need few keys then."""
    monkeypatch.setattr(mosaic_tpu, "TURN", 64)
    monkeypatch.setattr(mosaic_tpu, "PAGE", 32)
    monkeypatch.setattr(mosaic_tpu, "ROWS", 64)


@cache
def jitted(form: str) -> Callable[..., jax.Array]:
    return jax.jit(FORMS[form])


def run(form: str, *args: jax.Array | np.ndarray, cores: int = 1) -> np.ndarray:
    with on_tpu(cores):
        return np.asarray(jitted(form)(*args))


def root_mean_square(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


def check_error(out: np.ndarray, plain: jax.Array, exact: np.ndarray) -> None:
    assert out.dtype == np.float32
    # the same roundings in another order: a tenth of their root mean square
    assert root_mean_square(out - exact) <= 1.1 * root_mean_square(np.asarray(plain) - exact)


def bfloat16(*args: np.ndarray) -> Arrays:
    return tuple(np.asarray(jnp.asarray(x, jnp.bfloat16)) for x in args)


@pytest.mark.parametrize("ranges", [causal, segments])
@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "length", "capacity", "head_dim"),
    [(2, 6, 2, 40, 45, 72), (1, 4, 1, 70, 150, 128), (1, 3, 3, 130, 130, 64), (1, 2, 2, 9, 200, 80)],
)
def test_ranged_error_is_no_larger_than_the_plain_forms(
    ranges, batch: int, heads: int, kv_heads: int, length: int, capacity: int, head_dim: int
):
    rng = np.random.default_rng(length)
    query, keys = (batch, heads, length, head_dim), (batch, kv_heads, capacity, head_dim)
    args = *bfloat16(*(rng.standard_normal(shape) for shape in (query, keys, keys))), *ranges(batch, length, capacity)
    check_error(run("ranged", *args), PLAIN["ranged"](*args), float64.ranged_attention(*args))


SPECS = (
    PagedArgSpec(3, 8, 2, 1, 150, 128, page=32),
    PagedArgSpec(2, 5, 5, 1, 100, 128, page=16, window=40),
    PagedArgSpec(2, 4, 2, 20, 170, 128, page=32),
    PagedArgSpec(1, 8, 1, 33, 200, 256, page=16, window=70),
    PagedArgSpec(2, 2, 1, 70, 140, 128, page=128),
    PagedArgSpec(3, 4, 2, 1, 100, 72, page=16),
    PagedArgSpec(2, 4, 2, 20, 100, 96, page=32, window=50),
)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_paged_error_is_no_larger_than_the_plain_forms(spec: PagedArgSpec):
    args = tuple(np.asarray(x) for x in spec.arrays("bfloat16"))
    check_error(run("paged", *args), PLAIN["paged"](*args), float64.paged_attention(*args))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_rows_bits_depend_on_nothing_that_it_does_not_read(spec: PagedArgSpec):
    """Other pages, a longer table, another place beside other rows; what the row does not read is NaN or infinite."""
    args, rng = tuple(np.asarray(x) for x in spec.arrays("bfloat16")), np.random.default_rng(0)
    expected = run("paged", *args)
    assert np.all(np.isfinite(expected))
    for pages, columns in ((0, 0), (9, 5)):
        assert_same_bits(run("paged", *moved(args, pages, columns, rng)), expected)
    for row in range(spec.batch):
        slot = (row + 1) % spec.batch
        assert_same_bits(run("paged", *with_other_neighbours(args, row, slot, rng))[slot], expected[row])


def test_keys_between_the_ranges_of_a_block_may_be_nan():
    query, key_pages, value_pages, page_table, start, stop = (np.array(x) for x in SPECS[2].arrays("bfloat16"))
    start[:], stop[:] = 5, 9
    start[:, ::2], stop[:, ::2] = 140, 150
    for pages in (key_pages, value_pages):
        for row in page_table:
            pages[row[0], :, 9:], pages[row[1:4]], pages[row[4], :, : 140 - 128] = np.nan, np.nan, np.nan
    args = query, key_pages, value_pages, page_table, start, stop
    check_error(run("paged", *args), PLAIN["paged"](*args), float64.paged_attention(*args))


def test_a_querys_bits_do_not_depend_on_the_other_queries_of_its_block():
    """With or without a mask, a turn that a query reads fully gives the same bits."""
    spec = replace(SPECS[2], batch=1, length=32)
    query, key_pages, value_pages, page_table, start, stop = (np.asarray(x) for x in spec.arrays("bfloat16"))
    expected = run("paged", query, key_pages, value_pages, page_table, start, stop)
    query, start, stop = query.copy(), start.copy(), stop.copy()
    query[:, :, 20:], start[:, 20:] = np.nan, stop[:, 20:]  # they read nothing
    start[:, 5:10], stop[:, 5:10] = 70, 71
    out = run("paged", query, key_pages, value_pages, page_table, start, stop)
    assert_same_bits(out[:, :5], expected[:, :5])
    assert_same_bits(out[:, 10:20], expected[:, 10:20])
    assert not np.any(out[:, 20:])


def test_a_turn_that_a_query_reads_nothing_of_leaves_even_a_negative_zero():
    query = np.full((1, 1, 2, 64), 8)
    key, value = np.zeros((2, 1, 1, 192, 64))
    value[:, :, :64], key[:, :, 64:128] = -1e-30, 80 / 64
    args = *bfloat16(query, key, value), np.zeros((1, 2), np.int32)
    alone, beside = (run("ranged", *args, np.asarray([[128, stop]], np.int32))[0, 0] for stop in (128, 192))
    assert np.all(alone == 0)
    assert np.all(np.signbit(alone)), "the case is no longer the one that this test is about"
    assert_same_bits(beside, alone)


@pytest.mark.parametrize("length", [1, 20])
def test_ranges_without_keys_give_zero_and_read_nothing(length: int):
    spec = replace(SPECS[0], length=length)
    query, key_pages, _, page_table, start, stop = (np.asarray(x) for x in spec.arrays("bfloat16"))
    nan, empty = np.full_like(key_pages, np.nan), np.full_like(stop, 7)
    assert not np.any(run("paged", query, nan, nan, page_table, empty, empty))
    stop = stop.copy()
    stop[1] = start[1]
    out = run("paged", query, key_pages, key_pages, page_table, start, stop)
    assert not np.any(out[1])
    assert np.all(np.any(out[[0, 2]], axis=-1))


@pytest.mark.parametrize("spec", [SPECS[0], SPECS[2]], ids=str)
def test_two_cores_share_the_steps(spec: PagedArgSpec, monkeypatch: pytest.MonkeyPatch):
    args = tuple(np.asarray(x) for x in spec.arrays("bfloat16"))
    expected = run("paged", *args)
    monkeypatch.setattr(mosaic_tpu, "_tpu_spec", lambda: mosaic_tpu.TpuSpec(64 << 20, 2))
    with on_tpu(cores=2):
        out = np.asarray(jax.jit(lambda *args: mosaic_tpu.paged_attention(*args))(*args))
    assert_same_bits(out, expected)


def test_page_tables_that_do_not_fit_together_are_read_in_several_calls(monkeypatch: pytest.MonkeyPatch):
    args = tuple(np.asarray(x) for x in SPECS[0].arrays("bfloat16"))
    expected = run("paged", *args)
    monkeypatch.setattr(mosaic_tpu, "SMEM_BYTES", 8 * args[3].shape[1])  # two rows of three
    with on_tpu():
        out = np.asarray(jax.jit(lambda *args: mosaic_tpu.paged_attention(*args))(*args))
    assert_same_bits(out, expected)


def test_runs_within_shard_map():
    """A device computes its own heads."""
    mesh = jax.make_mesh((1,), ("tensor",), axis_types=(AxisType.Auto,))
    heads, none = P(None, "tensor"), P()
    for form, args in (
        ("paged", SPECS[2].arrays("bfloat16")),
        ("ranged", RangedArgSpec(1, 2, 1, 20, 30, 64).arrays("bfloat16")),
    ):
        specs = heads, heads, heads, *[none] * (len(args) - 3)
        over_heads = jax.shard_map(FORMS[form], mesh=mesh, in_specs=specs, out_specs=P(None, None, "tensor"))
        with on_tpu():
            out = np.asarray(jax.jit(over_heads)(*args))
        assert_same_bits(out, run(form, *args))


def test_a_copy_without_a_wait_is_seen(monkeypatch: pytest.MonkeyPatch):
    """The check for races can fail: without its waits the kernel reads keys on their way."""

    class Copy:
        def __init__(self, *args):
            self.copy = make(*args)

        def start(self) -> None:
            self.copy.start()

        def wait(self) -> None:
            pass

    make = mosaic_tpu.pltpu.make_async_copy
    monkeypatch.setattr(mosaic_tpu.pltpu, "make_async_copy", Copy)
    args = SPECS[0].arrays("bfloat16")
    with pytest.raises(Exception, match="RACE DETECTED"), on_tpu(dma_execution_mode="eager"):
        jax.block_until_ready(jax.jit(lambda *args: mosaic_tpu.paged_attention(*args))(*args))


def test_the_result_is_rounded_to_the_dtype():
    args = SPECS[0].arrays("bfloat16")
    with on_tpu():
        exact, rounded = (mosaic_tpu.paged_attention(*args, dtype=dtype) for dtype in (jnp.float32, jnp.bfloat16))
        assert rounded.dtype == jnp.bfloat16
        np.testing.assert_array_equal(rounded, exact.astype(jnp.bfloat16))


def test_gradient_and_vmap_are_the_plain_forms():
    args = RangedArgSpec(2, 2, 1, 20, 30, 64).arrays("bfloat16")

    def loss(attention, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(attention(query, key, value, *args[3:])))

    plain = jax.grad(loss, (1, 2, 3))(xla_ranged.ranged_attention, *args[:3])
    twice = [jnp.stack([x, x]) for x in args]
    with on_tpu():
        found = jax.grad(loss, (1, 2, 3))(mosaic_tpu.ranged_attention, *args[:3])
        both = jax.vmap(mosaic_tpu.ranged_attention)(*twice)
        one = mosaic_tpu.ranged_attention(*args)
    for ours, theirs in zip(found, plain, strict=True):
        # bfloat16 gradients of sums whose terms differ in the last bit of float32
        np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (ours, theirs)), rtol=2e-2, atol=1e-3)
    np.testing.assert_array_equal(both, jnp.stack([one, one]))


@pytest.mark.parametrize(
    ("spec", "dtype", "reason"),
    [
        (RangedArgSpec(1, 2, 1, 1, 64, 64), "bfloat16", "T = 1, for which XLA"),
        (RangedArgSpec(1, 2, 1, 8, 64, 20), "bfloat16", "h = 20 is not a multiple of 8"),
        (RangedArgSpec(1, 2, 1, 8, 64, 64), "float32", "query, keys and values are float32"),
        (RangedArgSpec(1, 16384, 1, 8, 64, 64), "bfloat16", "262144 rows don't fit into 64 MiB"),
        (PagedArgSpec(1, 2, 1, 1, 64, 20), "bfloat16", "h = 20 is not a multiple of 8"),
        (PagedArgSpec(1, 2, 1, 1, 64, 128, page=24), "bfloat16", "page = 24 is not a multiple of 16"),
        (PagedArgSpec(1, 2, 1, 1, 1 << 22, 128, page=16), "bfloat16", "a row's page table takes 1048576 bytes"),
    ],
    ids=str,
)
def test_says_why_it_refuses(spec: RangedArgSpec | PagedArgSpec, dtype: str, reason: str):
    op = "paged_attention" if isinstance(spec, PagedArgSpec) else "ranged_attention"
    args = spec.shapes(dtype)
    name, unsupported = attention_module.KERNELS["tpu"]
    assert getattr(unsupported, op)(*args).startswith(reason)
    assert attention_module._automatic(op, dispatch.Chip("tpu", "TPU v5 lite"), *args) == (
        "xla",
        getattr(unsupported, op)(*args),
    )
    with pytest.raises(NotImplementedError, match=reason):
        jax.eval_shape(lambda *args: getattr(attention_module, op)(*args, backend=name), *args)


@pytest.mark.parametrize("spec", [SPECS[0], RangedArgSpec(1, 2, 1, 8, 64, 64)], ids=str)
def test_a_tpu_gets_the_kernel(spec: RangedArgSpec | PagedArgSpec):
    op = "paged_attention" if isinstance(spec, PagedArgSpec) else "ranged_attention"
    for platform, expected in (("tpu", "mosaic_tpu"), ("cpu", "xla")):
        chip = dispatch.Chip(platform, platform)
        assert attention_module._automatic(op, chip, *spec.shapes("bfloat16"))[0] == expected
