"""Sends tokens to the devices of their experts, and the results back: for meshes on which a device has few experts.

Every pair of devices exchanges blocks of one size, in as many rounds as the fullest pair needs, so no token is ever
dropped. A row's bits don't depend on the number of rounds or on its place, because kernels promise that.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from deepstack_jax.rounding import cdiv
from deepstack_jax.sharding import MeshAxes
from pallas_kernels import sharded
from pallas_kernels.fused_moe import routing

GATHERED_WAYS = 16  # up to so many devices, a token's k experts are on most of them: each device takes all tokens
TOKENS_PER_DEVICE = 16  # below it, as in a decode step, gathering all tokens moves few bytes
_TILE = 16  # rows of a tile of bfloat16


def pays(tokens: int, ways: int) -> bool:
    """Whether `tokens` are exchanged among `ways` devices, rather than gathered by all."""
    return ways > GATHERED_WAYS and tokens % ways == 0 and tokens >= TOKENS_PER_DEVICE * ways


def block_rows(choices: int, ways: int) -> int:
    """Rows that a device sends to each other one in a round: twice the mean of its `choices`, and a tile for chance."""
    return cdiv(2 * choices, ways * _TILE) * _TILE + _TILE


def run_exchanged(
    compute: Callable[..., jax.Array],
    axes: MeshAxes,
    hidden: jax.Array,
    gate_up: jax.Array,
    down: jax.Array,
    top_k_index: jax.Array,
    top_k_weights: jax.Array,
) -> jax.Array:
    """Runs a device's tokens through the experts of all devices; call it inside `shard_map`.

    Args:
        compute: `pallas_kernels.fused_moe`, or a function like it.
        axes: the mesh axes over which experts and tokens are split.
        hidden, top_k_index, top_k_weights: of this device's tokens, [T, D] and [T, k]; a choice counts all experts.
        gate_up, down: this device's experts, [E / ways, D, 2F] and [E / ways, F, D].

    Returns:
        [T, D] in hidden's dtype: each token's results, summed in float32 in the order of its choices.
    """
    ways, here = jax.lax.axis_size(axes), jax.lax.axis_index(axes)
    (tokens, top_k), own = top_k_index.shape, len(gate_up)
    experts, block = ways * own, block_rows(tokens * top_k, ways)
    chosen = routing.nowhere_last(top_k_index, experts).reshape(-1)
    order = jnp.argsort(chosen)
    counts = jax.lax.all_gather(jnp.bincount(chosen, length=experts), axes).reshape(ways, ways, own)
    sent = jnp.sum(counts, axis=-1)  # [from, to]
    first = jnp.cumsum(sent[here]) - sent[here]  # of what goes to each device, in the sorted order
    arriving = jnp.cumsum(counts[:, here], axis=-1)  # [from, expert]: where the expert's rows end
    target = jnp.minimum(chosen // own, ways - 1)
    place = jnp.argsort(order) - first[target]  # of each choice, in what goes to its device
    rows = hidden.astype(gate_up.dtype)

    def swap(blocks: jax.Array) -> jax.Array:
        return jax.lax.all_to_all(blocks, axes, 0, 0, tiled=True)

    def run_round(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        number, results = state
        places = number * block + jnp.arange(block)
        # past a device's last row these are rows of others, which go nowhere
        sorted_place = jnp.minimum(first[:, None] + places, order.size - 1)
        received = swap(rows[order[sorted_place.reshape(-1)] // top_k])
        expert = jnp.sum(places[:, None] >= arriving[:, None, :], axis=-1, dtype=jnp.int32).reshape(-1, 1)
        ones = jnp.ones(expert.shape, jnp.float32)
        done = swap(compute(received.astype(jnp.float32), gate_up, down, expert, ones))
        slot = target * block + jnp.clip(place - number * block, 0, block - 1)
        return number + 1, jnp.where((place // block == number)[:, None], done[slot], results)

    results = sharded.zeros((tokens * top_k, hidden.shape[1]), jnp.float32, hidden, gate_up, top_k_index)
    rounds = (jnp.max(sent) + block - 1) // block  # the same on all devices
    number = sharded.zeros((), rounds.dtype, rounds)
    _, results = jax.lax.while_loop(lambda state: state[0] < rounds, run_round, (number, results))
    results = results.reshape(tokens, top_k, -1)
    return routing.weighted_sum(results, top_k_index, top_k_weights, experts).astype(hidden.dtype)


def with_gradient_of(plain: Callable[..., jax.Array], forward: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Returns `forward` with the gradient of `plain`, which computes the same: JAX can't differentiate the rounds."""

    @jax.custom_vjp
    def op(*args: jax.Array) -> jax.Array:
        return forward(*args)

    op.defvjp(lambda *args: (forward(*args), args), lambda args, gradient: jax.vjp(plain, *args)[1](gradient))
    return op
