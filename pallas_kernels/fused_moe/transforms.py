"""Adds JAX's transformations to a forward function of fused_moe: a gradient and vmap."""

from collections.abc import Callable
from typing import Any

import jax
from jax.custom_batching import custom_vmap

from pallas_kernels.fused_moe import xla

Forward = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


def differentiable(forward: Forward) -> Forward:
    """Gives `forward` the plain form's gradient and vmap.

    vmap over tokens folds the new axis into T, so the weights are still read once; vmap over weights runs one call
    after another.
    """

    @custom_vmap
    def batchable(*args: jax.Array) -> jax.Array:
        return forward(*args)

    @batchable.def_vmap
    def _(size: int, batched: list[bool], *args: jax.Array) -> tuple[jax.Array, bool]:
        if batched[1] or batched[2]:
            return _one_after_another(forward, batched, args), True
        hidden, _, _, index, weights = (
            x if is_batched else jax.numpy.broadcast_to(x, (size, *x.shape))
            for x, is_batched in zip(args, batched, strict=True)
        )
        tokens = (x.reshape(-1, x.shape[-1]) for x in (hidden, index, weights))
        folded_hidden, folded_index, folded_weights = tokens
        return batchable(folded_hidden, args[1], args[2], folded_index, folded_weights).reshape(hidden.shape), True

    @jax.custom_vjp
    def op(*args: jax.Array) -> jax.Array:
        return batchable(*args)

    op.defvjp(lambda *args: (batchable(*args), args), _backward)
    return op


def _one_after_another(forward: Forward, batched: list[bool], args: tuple[jax.Array, ...]) -> jax.Array:
    def one(mapped: list[jax.Array]) -> jax.Array:
        rest = iter(mapped)
        return forward(*(next(rest) if is_batched else x for x, is_batched in zip(args, batched, strict=True)))

    return jax.lax.map(one, [x for x, is_batched in zip(args, batched, strict=True) if is_batched])


def _backward(args: tuple[jax.Array, ...], gradient: jax.Array) -> tuple[Any, ...]:
    hidden, gate_up, down, top_k_index, top_k_weights = args
    _, vjp = jax.vjp(lambda h, g, d, w: xla.fused_moe(h, g, d, top_k_index, w), hidden, gate_up, down, top_k_weights)
    of_hidden, of_gate_up, of_down, of_weights = vjp(gradient)
    return of_hidden, of_gate_up, of_down, None, of_weights
