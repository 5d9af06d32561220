"""Arguments with which deepstack_add is tested, compiled and measured."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


@dataclass(frozen=True)
class ArgSpec:
    """Shapes of one call: T tokens, of which M are visual, in `runs` contiguous runs."""

    tokens: int  # T
    visual: int  # M
    width: int  # D
    levels: int  # N
    runs: int = 1

    def __str__(self) -> str:
        return f"T={self.tokens} M={self.visual} D={self.width} N={self.levels} runs={self.runs}"

    def shapes(
        self, hidden_dtype: DTypeLike, rows_dtype: DTypeLike
    ) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        """(hidden, rows, visual_index)."""
        return (
            jax.ShapeDtypeStruct((self.tokens, self.width), hidden_dtype),
            jax.ShapeDtypeStruct((self.visual, self.levels * self.width), rows_dtype),
            jax.ShapeDtypeStruct((self.tokens,), jnp.int32),
        )

    def arrays(
        self, hidden_dtype: DTypeLike, rows_dtype: DTypeLike, seed: int = 0
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns random arrays of those shapes; text is spread before, between and after the runs of visual tokens."""
        of_hidden, of_rows = jax.random.split(jax.random.key(seed))
        hidden, rows, _ = self.shapes(hidden_dtype, rows_dtype)
        number = jnp.arange(self.visual, dtype=jnp.int32)
        gap = (self.tokens - self.visual) // (self.runs + 1)
        places = number + gap * (1 + number * self.runs // max(self.visual, 1))
        index = jnp.full(self.tokens, -1, jnp.int32).at[places].set(number)
        return (
            jax.random.normal(of_hidden, hidden.shape, hidden_dtype),
            jax.random.normal(of_rows, rows.shape, rows_dtype),
            index,
        )


REAL = tuple(
    ArgSpec(tokens, visual, width, levels=3, runs=runs)
    for width in (2048, 4096)
    for tokens, visual, runs in ((512, 256, 1), (4096, 1024, 4), (16384, 8192, 64))
)
# No two sizes are equal. The first spec's are not multiples of any tile; the second's fit the lanes of a TPU.
ODD = ArgSpec(11, 5, 6, levels=3, runs=2)
TILED = ArgSpec(37, 12, 256, levels=3, runs=4)
SMALL = (ODD, TILED, replace(TILED, visual=2, runs=1), replace(TILED, visual=36, runs=1))
