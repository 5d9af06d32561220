"""The training loss: the model's own forward over a batch, cross-entropy of the answers, and the experts' balance.

The media's tokens run once and fill a cache; the rows of exchanges continue copies of it. That is the model's own way
of decoding, so nothing here knows how attention or DeepStack work. Views go through the encoder one by one in `vmap`.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from deepstack_jax.config import ModelConfig
from deepstack_jax.models.moe import SparseMoE
from deepstack_jax.models.param import product
from deepstack_jax.models.parameters import Params, merge_params
from deepstack_jax.models.qwen3_moe import KVCache
from deepstack_jax.models.vision import VisionEncoder, separate_deepstack_embeds
from pallas_kernels.fused_moe.xla import swiglu
from tiny_vl.sight import sight_loss

HIDDEN = 0.25  # share of the samples that train without embeddings, so that DeepStack has to say everything
BALANCE = 0.01  # weight of the load-balancing loss
SIGHT = 0.3  # weight of what the rows show, if `params` has a head for it
SIGHT_HEAD = "training.sight"  # its name among the parameters: no part of the model, left out of checkpoints
TILE = 64  # rows that one product of an expert takes


def loss_of(
    config: ModelConfig, params: Params, batch: dict[str, Any], hidden_share: float = 0.0
) -> tuple[jax.Array, dict[str, Any]]:
    """The loss, and what is worth knowing beside it.

    Args:
        batch: `TrainingBatch.arrays()`.
        hidden_share: of the samples, the first ones of the batch, the visual tokens' embeddings are zero.

    Returns:
        (loss, {"answers": mean cross-entropy per token, "balance": 1 if the load is even, "load": [L, E] share of the
        tokens' choices, "exact": {group: bool [R], whether the likeliest token is right all along the answer},
        "sight": share of the visual tokens with a thing on them whose kind the head of sight.py tells}).
    """
    model = merge_params(config, params)
    decoder = model.language_model.model
    for layer in decoder.layers:
        assert isinstance(layer.mlp, SparseMoE)
        layer.mlp.experts.compute = tiled_moe
    forward = nnx.capture(decoder, nnx.Intermediate)
    load = jnp.zeros((config.text.num_hidden_layers, 2, config.text.num_experts))  # choices and mean probabilities

    def run(mask: jax.Array, *args: jax.Array, **kwargs: Any) -> tuple[jax.Array, KVCache | None]:
        nonlocal load
        result, seen = forward(*args, **kwargs)
        load += jnp.stack([load_of(layer["mlp"], mask.reshape(-1)) for layer in seen["layers"].values()])
        return result

    visual = visual_rows(model.visual, batch["pixels"], batch["geometry"])
    embeds, deepstack = separate_deepstack_embeds(visual, config.num_deepstack_levels)
    sight, seen_right = jnp.zeros(()), jnp.zeros(())
    if SIGHT_HEAD in params:
        sight, seen_right = sight_loss(product(visual, params[SIGHT_HEAD]), jnp.asarray(batch["seen"]))
    lengths = jnp.asarray(batch["media_lengths"])
    samples, room = batch["media_ids"].shape
    embeds = embeds.at[: int(hidden_share * samples) * (len(embeds) // samples)].set(0)  # all have as many rows
    _, cache = run(
        jnp.arange(room) < lengths[:, None],
        jnp.asarray(batch["media_ids"]),
        jnp.asarray(batch["media_positions"]),
        cache=KVCache.empty(config.text, samples, room, embeds.dtype),
        input_embeds=embeds,
        input_deepstack_embeds=deepstack,
        visual_index=jnp.asarray(batch["visual_index"]),
    )
    total, count, exact = jnp.zeros(()), jnp.zeros(()), {}
    for name, rows in batch["rows"].items():
        ids, targets = jnp.asarray(rows["input_ids"]), jnp.asarray(rows["targets"])
        repeats, length = len(ids) // samples, ids.shape[1]
        continued = jax.tree.map(lambda x: _room_for(jnp.repeat(x, repeats, axis=0), length), cache)  # noqa: B023
        first = jnp.repeat(lengths, repeats)[:, None]
        positions = jnp.repeat(jnp.asarray(batch["next_positions"]), repeats)[:, None] + jnp.arange(length)
        is_answer = targets >= 0
        last = jnp.max(jnp.where(is_answer, rows["answer_at"], -1), axis=1, keepdims=True)
        hidden, _ = run(
            jnp.arange(length) <= last,
            ids,
            jnp.broadcast_to(positions, (3, *positions.shape)),
            slots=first + jnp.arange(length),
            cache=continued,
        )
        answers = jnp.take_along_axis(hidden, jnp.asarray(rows["answer_at"])[..., None], axis=1)
        logits = model.language_model.logits(answers)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(targets, 0))
        total += jnp.sum(jnp.where(is_answer, losses, 0))
        count += jnp.sum(is_answer)
        exact[name] = jnp.all((jnp.argmax(logits, axis=-1) == targets) | ~is_answer, axis=1)
    answers = total / count
    balance, shares = jnp.mean(balance_of(load)), load[:, 0] / jnp.sum(load[:, 0], axis=-1, keepdims=True)
    seen = {"answers": answers, "balance": balance, "load": shares, "exact": exact, "sight": seen_right}
    return answers + BALANCE * balance + SIGHT * sight, seen


@partial(jax.jit, static_argnums=0)
def expert_load(config: ModelConfig, params: Params, batch: dict[str, Any]) -> Float[Array, "L E"]:
    """Share of the choices of a batch's tokens, padding left out, that went to each expert of each layer."""
    return loss_of(config, params, batch)[1]["load"]


def visual_rows(encoder: VisionEncoder, pixels: jax.Array, geometry: Any) -> Float[Array, "M R"]:
    """Rows of views [V, P, C*Tp*p*p] given as bytes, view after view; normalised as the processor does it."""
    values = (jnp.asarray(pixels).astype(jnp.float32) / 255 - 0.5) / 0.5
    rows = jax.vmap(encoder)(values, jax.tree.map(jnp.asarray, geometry))
    return rows.reshape(-1, rows.shape[-1])


def load_of(router: Any, mask: Float[Array, " T"]) -> Float[Array, "2 E"]:
    """What a captured router did with the tokens that count: choices of each expert, and summed probabilities."""
    logits, chosen = (router[name].get_value()[0] for name in ("router_logits", "top_k_index"))
    choices = jnp.sum(jax.nn.one_hot(chosen, logits.shape[-1]), axis=1)
    return jnp.einsum("t,cte->ce", mask.astype(jnp.float32), jnp.stack([choices, jax.nn.softmax(logits, axis=-1)]))


def balance_of(load: Float[Array, "*layers 2 E"]) -> Float[Array, "*layers"]:
    """E * sum(load * mean probability), 1 if both are even: Switch Transformers (arXiv:2101.03961), eq. 4."""
    choices, probabilities = jnp.moveaxis(load / jnp.sum(load, axis=-1, keepdims=True), -2, 0)
    return load.shape[-1] * jnp.sum(jax.lax.stop_gradient(choices) * probabilities, axis=-1)


def tiled_moe(
    hidden: Float[Array, "T D"],
    gate_up: Float[Array, "E D 2F"],
    down: Float[Array, "E F D"],
    top_k_index: Int[Array, "T k"],
    top_k_weights: Float[Array, "T k"],
    tile: int = TILE,
) -> Float[Array, "T D"]:
    """What `pallas_kernels.fused_moe` computes, with a gradient that costs what the chosen experts cost.

    The gradient of `fused_moe` runs all experts over all tokens, four times the work at 2 of 8. Here rows are sorted by
    expert into tiles of one expert each, so that forward and gradient are products of tiles.
    """
    tokens, top_k = top_k_index.shape
    experts, rows = len(gate_up), tokens * top_k
    expert_of_row = top_k_index.reshape(-1)
    order = jnp.argsort(expert_of_row)
    counts = jnp.bincount(expert_of_row, length=experts)
    tiles = (counts + tile - 1) // tile
    num_tiles = rows // tile + experts  # at most: each expert has one that isn't full
    first_row, first_tile = jnp.cumsum(counts) - counts, jnp.cumsum(tiles) - tiles
    sorted_expert = expert_of_row[order]
    slot = first_tile[sorted_expert] * tile + jnp.arange(rows) - first_row[sorted_expert]
    token_of_slot = jnp.full(num_tiles * tile, tokens).at[slot].set(order // top_k, unique_indices=True)
    slot_of_row = jnp.zeros(rows, slot.dtype).at[order].set(slot, unique_indices=True)
    of_tile = jnp.searchsorted(jnp.cumsum(tiles), jnp.arange(num_tiles), side="right")
    of_tile = jnp.minimum(of_tile, experts - 1)

    x = jnp.pad(hidden.astype(gate_up.dtype), ((0, 1), (0, 0)))[token_of_slot].reshape(num_tiles, tile, -1)
    inner = swiglu(jnp.einsum("ntd,ndf->ntf", x, gate_up[of_tile], preferred_element_type=jnp.float32))
    out = jnp.einsum("ntf,nfd->ntd", inner.astype(down.dtype), down[of_tile], preferred_element_type=jnp.float32)
    out = out.reshape(num_tiles * tile, -1)[slot_of_row].reshape(tokens, top_k, -1)
    return jnp.sum(out * top_k_weights[..., None], axis=1)


def _room_for(cached: Float[Array, "B K S h"], length: int) -> Float[Array, "B K S+T h"]:
    return jnp.pad(cached, ((0, 0), (0, 0), (0, length), (0, 0)))
