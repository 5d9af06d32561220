"""Adds the gradient to a chip's form of ranged_attention."""

from collections.abc import Callable
from typing import Any

import jax

from pallas_kernels.attention import xla_ranged

Forward = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


def differentiable(forward: Forward) -> Forward:
    """Gives `forward` the plain form's gradient."""

    @jax.custom_vjp
    def op(*args: jax.Array) -> jax.Array:
        return forward(*args)

    op.defvjp(lambda *args: (forward(*args), args), _backward)
    return op


def _backward(args: tuple[jax.Array, ...], gradient: jax.Array) -> tuple[Any, ...]:
    query, key, value, start, stop = args
    _, vjp = jax.vjp(lambda q, k, v: xla_ranged.ranged_attention(q, k, v, start, stop), query, key, value)
    return *vjp(gradient), None, None
