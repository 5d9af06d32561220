"""Adds JAX's transformations to a forward function of deepstack_add: a gradient and vmap."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from pallas_kernels.deepstack_add import xla

Forward = Callable[[jax.Array, jax.Array, jax.Array, int], jax.Array]


def differentiable(forward: Forward) -> Forward:
    """Gives `forward(hidden, rows, visual_index, level)`, level static, the plain form's gradient and vmap.

    vmap folds the new axis into T, so one call serves all. If rows have the axis too, it is folded into M and the
    indices are shifted accordingly.
    """

    def of_level(level: int) -> Callable[..., jax.Array]:
        @custom_vmap
        def batchable(hidden: jax.Array, rows: jax.Array, visual_index: jax.Array) -> jax.Array:
            return forward(hidden, rows, visual_index, level)

        @batchable.def_vmap
        def _(
            size: int, batched: list[bool], hidden: jax.Array, rows: jax.Array, visual_index: jax.Array
        ) -> tuple[jax.Array, bool]:
            if not batched[0]:
                hidden = jnp.broadcast_to(hidden, (size, *hidden.shape))
            if not batched[2]:
                visual_index = jnp.broadcast_to(visual_index, (size, *visual_index.shape))
            if batched[1]:
                first_row = jnp.arange(size, dtype=visual_index.dtype)[:, None] * rows.shape[1]
                visual_index = jnp.where(visual_index < 0, visual_index, visual_index + first_row)
                rows = rows.reshape(-1, rows.shape[-1])
            out = batchable(hidden.reshape(-1, hidden.shape[-1]), rows, visual_index.reshape(-1))
            return out.reshape(hidden.shape), True

        return batchable

    @partial(jax.custom_vjp, nondiff_argnums=(3,))
    def op(hidden: jax.Array, rows: jax.Array, visual_index: jax.Array, level: int) -> jax.Array:
        return of_level(level)(hidden, rows, visual_index)

    def forward_keeping(
        hidden: jax.Array, rows: jax.Array, visual_index: jax.Array, level: int
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        return op(hidden, rows, visual_index, level), (rows, visual_index)  # linear, so hidden may be overwritten

    op.defvjp(forward_keeping, _backward)
    return op


def _backward(level: int, kept: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array | None, ...]:
    rows, visual_index = kept
    # only the shape and dtype of the first primal matter, and they equal the gradient's
    _, vjp = jax.vjp(lambda h, r: xla.deepstack_add(h, r, visual_index, level), gradient, rows)
    of_hidden, of_rows = vjp(gradient)
    return of_hidden, of_rows, None
