"""Arguments with which ranged_attention and paged_attention are tested, compiled, measured and tuned."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.typing import DTypeLike


@dataclass(frozen=True)
class RangedArgSpec:
    """Shapes of one call: causal, where the last query reads the last key, or with S keys in equal `segments`."""

    batch: int  # B
    heads: int  # H
    kv_heads: int  # K
    length: int  # T
    capacity: int  # S
    head_dim: int  # h
    segments: int = 0  # 0: causal

    def __str__(self) -> str:
        kind = f"segments={self.segments}" if self.segments else "causal"
        return f"{_shape(self)} S={self.capacity} {kind}"

    def shapes(self, dtype: DTypeLike) -> tuple[jax.ShapeDtypeStruct, ...]:
        """(query, key, value, start, stop), the first three in `dtype`."""
        keys = jax.ShapeDtypeStruct((self.batch, self.kv_heads, self.capacity, self.head_dim), dtype)
        return _query(self, dtype), keys, keys, *[_bound(self)] * 2

    def arrays(self, dtype: DTypeLike, seed: int = 0) -> tuple[jax.Array, ...]:
        """Returns arrays of those shapes, the first three random."""
        token = jnp.broadcast_to(jnp.arange(self.length, dtype=jnp.int32), (self.batch, self.length))
        if self.segments:
            size = pl.cdiv(self.capacity, self.segments)
            start = token // size * size
            stop = jnp.minimum(start + size, self.capacity)
        else:
            start, stop = jnp.zeros_like(token), token + 1 + self.capacity - self.length
        return *_random(self.shapes(dtype)[:3], seed), start, stop


@dataclass(frozen=True)
class PagedArgSpec:
    """Shapes of one call: the last T queries of B causal rows of different lengths, the longest with `context` keys.

    A row's pages are scattered. All rows together use half of the N pages, and page 0 is unused.
    """

    batch: int  # B
    heads: int  # H
    kv_heads: int  # K
    length: int  # T
    context: int  # keys of the longest row
    head_dim: int  # h
    page: int = 128
    window: int = 0  # 0: a query reads all keys up to its own

    def __str__(self) -> str:
        window = f" window={self.window}" if self.window else ""
        return f"{_shape(self)} context={self.context} page={self.page}{window}"

    @property
    def pages_per_row(self) -> int:
        """P."""
        return pl.cdiv(self.context, self.page)

    def shapes(self, dtype: DTypeLike) -> tuple[jax.ShapeDtypeStruct, ...]:
        """(query, key_pages, value_pages, page_table, start, stop), the first three in `dtype`."""
        count = 2 * self.batch * self.pages_per_row
        pages = jax.ShapeDtypeStruct((count, self.kv_heads, self.page, self.head_dim), dtype)
        table = jax.ShapeDtypeStruct((self.batch, self.pages_per_row), jnp.int32)
        return _query(self, dtype), pages, pages, table, *[_bound(self)] * 2

    def arrays(self, dtype: DTypeLike, seed: int = 0) -> tuple[jax.Array, ...]:
        """Returns arrays of those shapes, the first three random. The shortest row has max(T, context / 2) keys."""
        shapes = self.shapes(dtype)
        table = shapes[3].shape
        numbers = 1 + jax.random.permutation(jax.random.key(seed + 1), shapes[1].shape[0] - 1)
        page_table = numbers[: table[0] * table[1]].reshape(table).astype(jnp.int32)
        shortest = max(self.length, self.context // 2)
        contexts = jnp.linspace(self.context, shortest, self.batch).astype(jnp.int32)
        stop = (contexts - self.length + 1)[:, None] + jnp.arange(self.length, dtype=jnp.int32)
        start = jnp.maximum(stop - self.window, 0) if self.window else jnp.zeros_like(stop)
        return *_random(shapes[:3], seed), page_table, start, stop


ArgSpec = RangedArgSpec | PagedArgSpec


def _shape(spec: ArgSpec) -> str:
    return f"B={spec.batch} H={spec.heads} K={spec.kv_heads} T={spec.length} h={spec.head_dim}"


def _query(spec: ArgSpec, dtype: DTypeLike) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((spec.batch, spec.heads, spec.length, spec.head_dim), dtype)


def _bound(spec: ArgSpec) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((spec.batch, spec.length), jnp.int32)


def _random(shapes: tuple[jax.ShapeDtypeStruct, ...], seed: int) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return [jax.random.normal(key, x.shape, x.dtype) for key, x in zip(keys, shapes, strict=True)]


HEADS = {"30B-A3B": 32, "235B-A22B": 64}
REAL_RANGED = {
    model: tuple(
        RangedArgSpec(batch, heads, 4, length, capacity, 128)
        for batch, length, capacity in ((1, 1, 1024), (8, 1, 1024), (1, 512, 512), (1, 4096, 4096))
    )
    for model, heads in HEADS.items()
} | {
    # one image of 1024 x 1024 pixels; eight frames of 512 x 512; the smallest and the largest image
    "vision": tuple(
        RangedArgSpec(1, 16, 16, patches, patches, 72, segments)
        for patches, segments in ((4096, 1), (8192, 8), (64, 1), (16384, 1))
    )
}
DECODE = ((1, 1000), (8, 1000), (64, 4096), (32, 8192), (32, 32768), (1, 262144))  # (B, context)
CHUNK = ((256, 256), (256, 4352), (1024, 1024), (1024, 32768), (2048, 131072), (1024, 262144))  # (T, context)
WINDOWS = ((32, 1), (1, 1024))  # (B, T) with windows of 4096 keys
REAL_PAGED = {
    model: tuple(PagedArgSpec(batch, heads, 4, 1, context, 128) for batch, context in DECODE)
    + tuple(PagedArgSpec(1, heads, 4, length, context, 128) for length, context in CHUNK)
    + tuple(PagedArgSpec(batch, heads, 4, length, 32768, 128, window=4096) for batch, length in WINDOWS)
    for model, heads in HEADS.items()
}

# No two sizes are equal. The first spec's are not multiples of any tile; the second's are those of the real models
# except for the counts.
ODD = PagedArgSpec(batch=3, heads=10, kv_heads=5, length=1, context=77, head_dim=72, page=16)
TILED = PagedArgSpec(batch=4, heads=6, kv_heads=2, length=1, context=700, head_dim=128)
SMALL_PAGED = (
    ODD,
    replace(ODD, batch=8, kv_heads=10, head_dim=64),  # one query per key head
    replace(ODD, length=37, window=20),
    TILED,
    replace(TILED, batch=1, context=128),
    replace(TILED, batch=8, window=130),
    replace(TILED, batch=1, length=32),
    replace(TILED, length=32, window=150, head_dim=64),
    replace(TILED, batch=1, length=256),
    replace(TILED, batch=2, length=300, page=16),  # two blocks of queries
)
SMALL_RANGED = (
    RangedArgSpec(3, 6, 3, 1, 40, 24),
    RangedArgSpec(2, 6, 2, 9, 13, 20),
    RangedArgSpec(1, 3, 3, 200, 200, 72, segments=3),
    RangedArgSpec(1, 4, 2, 259, 270, 12),
)
