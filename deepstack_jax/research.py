"""Looks into the text model: which tokens it finds likely at each place of a prompt, and which experts it chooses.

No program of the engine computes any of this. A prompt runs as a whole, padded to one of a few widths.
"""

from functools import partial
from typing import Any, NamedTuple, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Int

from deepstack_jax import sharding
from deepstack_jax.checkpoint import Model
from deepstack_jax.config import ModelConfig
from deepstack_jax.models.param import AnyArray
from deepstack_jax.models.parameters import Params, merge_params
from deepstack_jax.programs import PromptArrays, empty_rows, language_inputs, precision_of

ALTERNATIVES = 5  # tokens that are shown in each place
MAX_TOKENS = 4096
_LEAST_WIDTH = 128  # widths double from here on, so at most six programs are compiled
_BLOCK = 64  # places whose logits exist at once


@no_type_check  # JAX puts shapes and placeholders into it as well
class TokenChoices(NamedTuple):
    """What the model thinks of each token of a prompt. L counts only layers with experts.

    Attributes:
        probability: float32 [T]: of the token that is there, 0 for the first one.
        top_ids, top_probabilities: [T, 5]: the likeliest tokens in its place; of no meaning for the first one.
        experts, weights: [T, L, k]: what its own hidden states are sent to.
    """

    probability: Float[AnyArray, " T"]
    top_ids: Int[AnyArray, "T 5"]
    top_probabilities: Float[AnyArray, "T 5"]
    experts: Int[AnyArray, "T L k"]
    weights: Float[AnyArray, "T L k"]


def token_choices(model: Model, prompt: PromptArrays) -> TokenChoices:
    """Runs a prompt of one row, and returns numpy arrays.

    Raises:
        ValueError: it has more than MAX_TOKENS tokens.
    """
    length = int(np.asarray(prompt.lengths)[0])
    if length > MAX_TOKENS:
        raise ValueError(f"the prompt has {length} tokens: give at most {MAX_TOKENS}")
    choices = _choices(model.config, model.text_params, _padded(model, prompt, length))
    return TokenChoices(*(np.asarray(each)[:length] for each in choices))


def _padded(model: Model, prompt: PromptArrays, length: int) -> PromptArrays:
    """The prompt in the smallest width that holds it, with as many visual rows, zeros behind its own."""
    width = _LEAST_WIDTH
    while width < length:
        width *= 2

    def wide(array: Any, fill: int = 0) -> np.ndarray:
        array = np.asarray(array)[..., :length]
        return np.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, width - length)], constant_values=fill)

    index, rows = prompt.visual_index, None
    if model.config.vision is not None:
        index = np.full((1, length), -1, np.int32) if index is None else index
        rows = empty_rows(model.config, width, model.mesh)
        if prompt.rows is not None:
            rows = jax.tree.map(_put, rows, prompt.rows)
    return PromptArrays(
        wide(prompt.input_ids),
        wide(prompt.position_ids),
        prompt.lengths,
        prompt.rope_deltas,
        None if index is None else wide(index, -1),
        rows,
    )


def _put(empty: jax.Array, given: jax.Array) -> np.ndarray:
    count = min(len(given), len(empty))  # the rest is padding
    whole = np.zeros(empty.shape, empty.dtype)
    whole[:count] = np.asarray(given)[:count]
    return whole


@sharding.on_mesh_of(argument=1)
@partial(jax.jit, static_argnums=0)
def _choices(config: ModelConfig, params: Params, prompt: PromptArrays) -> TokenChoices:
    with precision_of(config):
        model = merge_params(config, params).language_model
        run: Any = nnx.capture(model.model, nnx.Intermediate)
        (hidden, _), seen = run(**language_inputs(prompt))
        ids = jnp.asarray(prompt.input_ids)[0]

        def judged(block: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
            states, following = block
            probabilities = jax.nn.softmax(model.logits(states), axis=-1)
            values, likeliest = jax.lax.top_k(probabilities, ALTERNATIVES)
            return jnp.take_along_axis(probabilities, following[:, None], axis=1)[:, 0], likeliest, values

        blocks = hidden[0].reshape(-1, _BLOCK, hidden.shape[-1]), jnp.roll(ids, -1).reshape(-1, _BLOCK)
        of_next = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), jax.lax.map(judged, blocks))
        # what is said after a token is of the next one
        probability, top_ids, top_values = (jnp.roll(x, 1, axis=0) for x in of_next)
        experts, weights = _routing(config, seen, len(ids))
    return TokenChoices(*map(sharding.constrain, (probability.at[0].set(0), top_ids, top_values, experts, weights)))


def _routing(config: ModelConfig, seen: Any, length: int) -> tuple[jax.Array, jax.Array]:
    """The experts of each token and their weights, [T, L, k] each, as `SparseMoE` computes them."""
    experts, weights = [], []
    for layer, sparse in enumerate(config.text.sparse_layers):
        if sparse:
            mlp = seen["layers"][layer]["mlp"]
            (logits,), (chosen,) = (mlp[name].get_value() for name in ("router_logits", "top_k_index"))
            weight = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), chosen, axis=-1)
            if config.text.norm_topk_prob:
                weight = weight / jnp.sum(weight, axis=-1, keepdims=True)
            experts.append(chosen)
            weights.append(weight)
    if not experts:
        return jnp.zeros((length, 0, 0), jnp.int32), jnp.zeros((length, 0, 0), jnp.float32)
    return jnp.stack(experts, axis=1), jnp.stack(weights, axis=1)
