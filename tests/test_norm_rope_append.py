"""norm_rope_append: every backend at every small arg spec against float64, and which slots of the pages it writes.

The kernel for Hopper runs in Pallas' interpreter, which raises on races and out-of-bounds accesses.
"""

import contextlib
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from pallas_kernels import dispatch
from pallas_kernels import norm_rope_append as module
from pallas_kernels.norm_rope_append import mosaic_gpu, norm_rope_append
from pallas_kernels.norm_rope_append.arg_specs import CHUNK, ODD, REAL, TILED, WIDE, ArgSpec, at_slots
from tests import float64
from tests.interpreters import on_gpu

EPS = 1e-6
Arrays = tuple[jax.Array, ...]
H100 = dispatch.Chip("cuda", "NVIDIA H100 80GB HBM3")


@cache
def jitted(backend: str) -> Callable[..., tuple[jax.Array, jax.Array, jax.Array]]:
    return jax.jit(partial(norm_rope_append, eps=EPS, backend=backend))


def run(args: Arrays, backend: str = "mosaic_gpu") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    with on_gpu() if backend == "mosaic_gpu" else contextlib.nullcontext():
        query, keys, values = (np.asarray(x) for x in jitted(backend)(*args))
    return query, keys, values


def appended(pages: np.ndarray | jax.Array, args: Arrays) -> np.ndarray:
    return np.asarray(at_slots(jnp.asarray(pages), *args[-2:]))


def root_mean_square(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(x.astype(np.float64) ** 2)))


CASES = [
    (ODD, "xla", "float32"),
    (ODD, "xla", "bfloat16"),
    (CHUNK, "xla", "bfloat16"),
    (TILED, "mosaic_gpu", "float32"),
    (TILED, "mosaic_gpu", "bfloat16"),
    (WIDE, "mosaic_gpu", "bfloat16"),
]


@cache
def arrays(spec: ArgSpec, dtype: str) -> Arrays:
    return spec.arrays(dtype)


@pytest.mark.parametrize(("spec", "backend", "dtype"), CASES, ids=str)
class TestResults:
    def test_queries_keys_and_values(self, spec: ArgSpec, backend: str, dtype: str):
        args = arrays(spec, dtype)
        expected = float64.norm_rope_append(*args, eps=EPS)
        of_backend, of_plain = (
            (query, appended(keys, args), appended(values, args))
            for query, keys, values in (run(args, backend), jitted("xla")(*args))
        )
        active = np.asarray(args[-1])[:, 0] >= 0
        for found, plain, exact in zip(of_backend, of_plain, expected, strict=True):
            assert found.dtype == dtype
            errors = [root_mean_square((np.asarray(x) - exact)[active]) for x in (found, plain)]
            assert errors[0] <= 1.1 * errors[1]  # the same roundings in another order
            assert errors[1] <= (2**-8 if dtype == "bfloat16" else 2**-22) * root_mean_square(exact[active])

    def test_all_other_slots_stay_as_they_are(self, spec: ArgSpec, backend: str, dtype: str):
        args = arrays(spec, dtype)
        page_table, slots = (np.asarray(x) for x in args[-2:])
        page = spec.page
        kept = np.ones((len(args[7]), page), bool)
        kept[0] = False  # belongs to nobody
        for row, of_row in zip(page_table, slots, strict=True):
            if of_row[0] >= 0:
                count = 1 if spec.length == 1 else -(-spec.length // page) * page  # several tokens fill whole pages
                written = of_row[0] + np.arange(count)
                kept[row[written // page], written % page] = False
        for before, after in zip(args[7:9], run(args, backend)[1:], strict=True):
            before = np.asarray(before)
            np.testing.assert_array_equal(after.swapaxes(1, 2)[kept], before.swapaxes(1, 2)[kept])
        assert kept.mean() > 0.4


class TestBits:
    """A row's bits are a function of what belongs to the row."""

    @pytest.mark.parametrize("backend", module.BACKENDS)
    def test_do_not_depend_on_the_place_the_pages_or_the_other_rows(self, backend: str):
        args = [np.asarray(x) for x in arrays(TILED, "bfloat16")]
        query, keys, values = run(tuple(args), backend)
        order = np.asarray([3, 1, 0, 2])
        other = [x[order] if i not in (3, 4, 7, 8) else x for i, x in enumerate(args)]
        other[9] = np.random.default_rng(0).permutation(other[9].reshape(-1)).reshape(other[9].shape)
        mine = 2  # where row 0 is now; all others get other numbers
        for i in (0, 1, 2):
            other[i] = np.where(np.arange(4)[:, None, None, None] == mine, other[i], np.float32(np.nan))
        other[10] = np.where(np.arange(4)[:, None] == mine, other[10], 7)
        found = run(tuple(other), backend)
        np.testing.assert_array_equal(found[0][mine].view(np.int16), query[0].view(np.int16))
        for after, before in zip(found[1:], (keys, values), strict=True):
            after, before = appended(after, tuple(other))[mine], appended(before, tuple(args))[0]
            np.testing.assert_array_equal(after.view(np.int16), before.view(np.int16))

    def test_inactive_rows_write_nothing_on_hopper(self):
        *args, slots = arrays(TILED, "bfloat16")
        _, keys, values = run((*args, jnp.full_like(slots, -1)))
        np.testing.assert_array_equal(keys, args[7])
        np.testing.assert_array_equal(values, args[8])


@pytest.mark.parametrize("backend", module.BACKENDS)
def test_donated_pages_are_overwritten_and_others_kept(backend: str):
    args = arrays(TILED, "bfloat16")
    before = [np.array(x) for x in args[7:9]]
    run(args, backend)
    np.testing.assert_array_equal(args[7], before[0])
    np.testing.assert_array_equal(args[8], before[1])


def test_on_a_mesh_every_device_runs_the_plain_form_on_its_own_heads():
    mesh = jax.make_mesh((1,), ("tensor",), axis_types=(AxisType.Auto,))
    heads, pages, whole = PartitionSpec(None, None, "tensor"), PartitionSpec(None, "tensor"), PartitionSpec()
    specs = (*[heads] * 3, *[whole] * 4, *[pages] * 2, whole, whole)
    args, chosen = arrays(TILED, "bfloat16"), []

    def of_device(*args: jax.Array) -> tuple[jax.Array, ...]:
        chosen.append(module._automatic(H100, *args))
        return norm_rope_append(*args, eps=EPS)

    run = jax.jit(jax.shard_map(of_device, mesh=mesh, in_specs=specs, out_specs=(pages, pages, pages)))
    for out, expected in zip(run(*args), jitted("xla")(*args), strict=True):
        np.testing.assert_array_equal(out, expected)
    assert chosen == [("xla", "Pallas can't write in place into what differs between the devices of a mesh")]


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (ODD, "h = 20 is not a multiple of 128"),
        (replace(TILED, length=2), "T = 2 is not 1"),
        (replace(TILED, batch=0), "an argument is empty"),
    ],
)
def test_the_kernel_refuses_with_the_reason(spec: ArgSpec, reason: str):
    shapes = spec.shapes("bfloat16")
    with pytest.raises(NotImplementedError, match=reason):
        jax.eval_shape(partial(mosaic_gpu.norm_rope_append, eps=EPS), *shapes)
    assert module._automatic(H100, *shapes) == ("xla", mosaic_gpu.unsupported(*shapes))


def test_hopper_gets_the_kernel_in_decoding():
    for specs in REAL.values():
        names = [module._automatic(H100, *spec.shapes("bfloat16"))[0] for spec in specs]
        assert names == ["mosaic_gpu" if spec.length == 1 else "xla" for spec in specs]
    assert module._automatic(dispatch.Chip("tpu", "TPU v6 lite"), *TILED.shapes("bfloat16"))[0] == "xla"


@pytest.mark.parametrize(
    ("which", "name"),
    [(1, "key "), (3, "query_norm"), (6, "sin"), (8, "value_pages"), (9, "page_table"), (10, "slots")],
)
def test_an_argument_of_another_shape_is_named(which: int, name: str):
    shapes = list(TILED.shapes("bfloat16"))
    shapes[which] = jax.ShapeDtypeStruct((*shapes[which].shape, 1), shapes[which].dtype)
    with pytest.raises(ValueError, match=f"norm_rope_append: {name}"):
        jax.eval_shape(partial(norm_rope_append, eps=EPS), *shapes)
