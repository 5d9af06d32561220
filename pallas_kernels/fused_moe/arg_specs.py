"""Arguments with which fused_moe is tested, compiled, measured and tuned."""

from dataclasses import dataclass, replace
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

Routing = Literal["random", "one expert", "one token per expert", "half of the experts empty", "a third nowhere"]
ROUTINGS: tuple[Routing, ...] = get_args(Routing)


@dataclass(frozen=True)
class ArgSpec:
    """Shapes of one call, and how its tokens are routed."""

    tokens: int  # T
    width: int  # D
    experts: int  # E
    top_k: int  # k
    inner: int  # F
    routing: Routing = "random"

    def __str__(self) -> str:
        shapes = f"T={self.tokens} D={self.width} E={self.experts} k={self.top_k} F={self.inner}"
        return shapes if self.routing == "random" else f"{shapes}, {self.routing}"

    def shapes(self, dtype: DTypeLike, hidden_dtype: DTypeLike = jnp.float32) -> tuple[jax.ShapeDtypeStruct, ...]:
        """(hidden, gate_up, down, top_k_index, top_k_weights), the weights in `dtype`."""
        return (
            jax.ShapeDtypeStruct((self.tokens, self.width), hidden_dtype),
            jax.ShapeDtypeStruct((self.experts, self.width, 2 * self.inner), dtype),
            jax.ShapeDtypeStruct((self.experts, self.inner, self.width), dtype),
            jax.ShapeDtypeStruct((self.tokens, self.top_k), jnp.int32),
            jax.ShapeDtypeStruct((self.tokens, self.top_k), jnp.float32),
        )

    def arrays(
        self, dtype: DTypeLike, hidden_dtype: DTypeLike = jnp.float32, seed: int = 0
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
        """Returns random arrays of those shapes. Products keep their input's variance; routing weights sum to one."""
        of_hidden, of_gate_up, of_down, of_index, of_weights = jax.random.split(jax.random.key(seed), 5)
        weights = jax.nn.softmax(jax.random.normal(of_weights, (self.tokens, self.top_k)))
        return (
            jax.random.normal(of_hidden, (self.tokens, self.width), hidden_dtype),
            jax.random.normal(of_gate_up, (self.experts, self.width, 2 * self.inner), dtype)
            * jnp.asarray(self.width**-0.5, dtype),
            jax.random.normal(of_down, (self.experts, self.inner, self.width), dtype)
            * jnp.asarray(self.inner**-0.5, dtype),
            self._index(of_index),
            weights,
        )

    def _index(self, key: jax.Array) -> jax.Array:
        """Returns int32 [T, k], distinct per token; with "a third nowhere", every third choice and token is -1."""
        shape = self.tokens, self.top_k
        if self.routing == "one expert":  # all tokens share one expert, and also the k - 1 others
            return jnp.broadcast_to(jnp.arange(self.top_k, dtype=jnp.int32), shape)
        if self.routing == "one token per expert":
            return (jnp.arange(self.tokens * self.top_k, dtype=jnp.int32) % self.experts).reshape(shape)
        half = self.routing == "half of the experts empty"
        pool = max(self.experts // 2, self.top_k) if half else self.experts
        scores = jax.random.uniform(key, (self.tokens, pool))
        index = jax.lax.top_k(scores, self.top_k)[1].astype(jnp.int32) + (self.experts - pool)
        if self.routing != "a third nowhere":
            return index
        token, choice = jnp.indices(shape)
        return jnp.where(((token * self.top_k + choice) % 3 == 0) | (token % 3 == 2), -1, index)


TOKENS = (1, 2, 8, 64, 512, 4096, 16384)
QWEN3_VL_30B_A3B = ArgSpec(1, width=2048, experts=128, top_k=8, inner=768)
QWEN3_VL_235B_A22B = ArgSpec(1, width=4096, experts=128, top_k=8, inner=1536)
REAL = {
    "30B-A3B": tuple(replace(QWEN3_VL_30B_A3B, tokens=tokens) for tokens in TOKENS),
    "235B-A22B": tuple(replace(QWEN3_VL_235B_A22B, tokens=tokens) for tokens in TOKENS),
}

# No two sizes are equal, so a transposition can't go unnoticed. The first spec's are not multiples of any tile. The
# second's are multiples that matrix units need, with an F that is not a multiple of 256.
ODD = ArgSpec(1, width=36, experts=10, top_k=3, inner=20)
TILED = ArgSpec(1, width=256, experts=6, top_k=2, inner=384)
SMALL = tuple(
    replace(spec, tokens=tokens, routing=routing)
    for spec in (ODD, TILED)
    for tokens in (1, 2, 7, 40, 200)
    for routing in ROUTINGS
)
