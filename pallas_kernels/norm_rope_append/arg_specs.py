"""Arguments with which norm_rope_append is tested, compiled and measured."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


@dataclass(frozen=True)
class ArgSpec:
    """Shapes of one call: T consecutive tokens of each of B rows, which begin in different pages.

    A row's pages are scattered, page 0 is unused, and every third row is inactive.
    """

    batch: int  # B
    heads: int  # H
    kv_heads: int  # K
    head_dim: int  # h
    page: int = 128
    pages_per_row: int = 8  # P
    length: int = 1  # T

    def __str__(self) -> str:
        sizes = f"B={self.batch} H={self.heads} K={self.kv_heads} T={self.length} h={self.head_dim}"
        return f"{sizes} page={self.page} P={self.pages_per_row}"

    def shapes(self, dtype: DTypeLike) -> tuple[jax.ShapeDtypeStruct, ...]:
        """The arguments in order; norms and pages are in `dtype`, the products of the hidden states in float32."""

        def shape(dtype: DTypeLike, *dims: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(dims, dtype)

        tokens, float32, int32 = (self.batch, self.length), jnp.float32, jnp.int32
        new = shape(float32, *tokens, self.kv_heads, self.head_dim)
        pages = shape(dtype, 1 + self.batch * self.pages_per_row, self.kv_heads, self.page, self.head_dim)
        return (
            shape(float32, *tokens, self.heads, self.head_dim),
            *[new] * 2,
            *[shape(dtype, self.head_dim)] * 2,
            *[shape(float32, *tokens, self.head_dim // 2)] * 2,
            *[pages] * 2,
            shape(int32, self.batch, self.pages_per_row),
            shape(int32, *tokens),
        )

    def arrays(self, dtype: DTypeLike, seed: int = 0) -> tuple[jax.Array, ...]:
        """Returns arrays of those shapes; all but the page table and the slots are random."""
        shapes = self.shapes(dtype)
        *of_shapes, of_angles, of_pages = jax.random.split(jax.random.key(seed), len(shapes))
        random = [jax.random.normal(each, x.shape, x.dtype) for each, x in zip(of_shapes, shapes[:9], strict=True)]
        angles = jax.random.uniform(of_angles, shapes[5].shape, maxval=2 * jnp.pi)
        random[5:7] = jnp.cos(angles), jnp.sin(angles)
        numbers = 1 + jax.random.permutation(of_pages, shapes[7].shape[0] - 1).astype(jnp.int32)
        row = jnp.arange(self.batch, dtype=jnp.int32)
        first = row % self.pages_per_row * self.page
        if self.length == 1:  # anywhere in a page; several tokens begin a page
            first += row * 5 % self.page
        slots = first[:, None] + jnp.arange(self.length, dtype=jnp.int32)
        slots = jnp.where((row % 3 == 1)[:, None], -1, slots)
        return *random, numbers.reshape(self.batch, -1), slots


def at_slots(pages: jax.Array, page_table: jax.Array, slots: jax.Array) -> jax.Array:
    """Returns what is in the tokens' slots: [B, K, T, h]. Inactive tokens give slot 0."""
    page, place = pages.shape[2], jnp.maximum(slots, 0)
    number = jnp.take_along_axis(page_table, place // page, axis=1)
    return pages[number, :, place % page].swapaxes(1, 2)


HEADS = {"30B-A3B": 32, "235B-A22B": 64}
REAL = {
    model: (*(ArgSpec(batch, heads, 4, 128) for batch in (1, 8, 64)), ArgSpec(1, heads, 4, 128, length=256))
    for model, heads in HEADS.items()
}
# No two sizes are equal. The first spec's are not multiples of any tile; the second's fit a chip's.
ODD = ArgSpec(5, 6, 3, 20, page=16, pages_per_row=4)
TILED = ArgSpec(4, 6, 3, 128, page=16, pages_per_row=5)
WIDE = ArgSpec(1, 4, 1, 256, page=8, pages_per_row=2)
CHUNK = ArgSpec(3, 3, 3, 128, page=32, pages_per_row=4, length=37)
SMALL = ODD, TILED, WIDE, CHUNK
