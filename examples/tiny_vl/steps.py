"""One step of training: the state, the optimizer, the learning rate."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

from deepstack_jax.config import ModelConfig
from deepstack_jax.models.parameters import Params, abstract_params, init_params
from tiny_vl.loss import HIDDEN, SIGHT_HEAD, loss_of
from tiny_vl.sight import CLASSES

PEAK, WARM_UP, FLOOR = 1.5e-3, 100, 0.02  # learning rate, its first steps, what is left of it at the end
MUON_RATE = 2.0  # of the matrices, against the others'
PATCH_RATE = 0.3  # of the patch embedding, whose many inputs are alike
WEIGHT_DECAY, CLIP = 0.05, 1.0
AVERAGE = 0.998  # decay of the moving average of the weights, which is what is exported


@jax.tree_util.register_dataclass
@dataclass
class TrainState:
    """Everything that a run carries from step to step, donated to the step."""

    params: Params
    average: Params
    optimizer: Any
    step: Any  # int32 []


def initial_state(config: ModelConfig, seed: int = 0) -> TrainState:
    """Random weights: the model's own, with smaller embeddings and with smaller products into the residual stream."""
    params = init_params(config, seed)
    assert config.vision is not None
    for name, value in params.items():
        if name.endswith("embed_tokens.weight"):
            params[name] = value * 0.5
        elif name.endswith(("o_proj.weight", "down_proj", "attn.proj.weight", "mlp.linear_fc2.weight")):
            depth = config.vision.depth if name.startswith("visual") else config.text.num_hidden_layers
            params[name] = value * (2 * depth) ** -0.5
    rows = (1 + config.num_deepstack_levels) * config.text.hidden_size
    params[SIGHT_HEAD] = jnp.zeros((sum(CLASSES), rows))
    return TrainState(params, jax.tree.map(jnp.copy, params), optimizer(config).init(params), jnp.zeros((), jnp.int32))


def optimizer(config: ModelConfig) -> optax.GradientTransformation:
    """Muon for the matrices, Adam for embeddings, routers and vectors; each step multiplies by the learning rate.

    Muon matters most where pixels come in: nearly all of their gradient says what color a patch has on average, and
    Muon's updates are as large in all directions, so that edges are learned too.
    """
    axes: Any = _muon_axes(abstract_params(config)) | {SIGHT_HEAD: None}
    muon = optax.contrib.muon(
        MUON_RATE,
        adam_learning_rate=1.0,
        adam_b2=0.98,
        weight_decay=WEIGHT_DECAY,
        consistent_rms=0.2,  # updates as large as Adam's
        muon_weight_dimension_numbers=axes,
    )

    def slower_patches(updates: Any, _: Any) -> Any:
        return {name: u * PATCH_RATE if "patch_embed" in name else u for name, u in updates.items()}

    slow = optax.stateless(slower_patches)
    return optax.chain(optax.clip_by_global_norm(CLIP), muon, slow)


def rate(step: int, progress: float) -> float:
    """The learning rate: a linear warm-up, then a cosine over `progress` from 0 to 1."""
    cosine = FLOOR + (1 - FLOOR) * 0.5 * (1 + np.cos(np.pi * min(progress, 1.0)))
    return PEAK * min(1.0, (step + 1) / WARM_UP) * float(cosine)


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def train_step(
    config: ModelConfig, state: TrainState, batch: dict[str, Any], learning_rate: jax.Array
) -> tuple[TrainState, dict[str, Any]]:
    """One step on `TrainingBatch.arrays()`, and what `loss_of` saw."""
    grad = jax.value_and_grad(lambda params: loss_of(config, params, batch, HIDDEN), has_aux=True)
    (_, seen), gradient = grad(state.params)
    updates, opt_state = optimizer(config).update(gradient, state.optimizer, state.params)
    params = jax.tree.map(lambda p, u: p + learning_rate * u, state.params, updates)
    # a young average follows quickly
    decay = jnp.minimum(AVERAGE, (1.0 + state.step) / (10.0 + state.step))
    average = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, state.average, params)
    seen = {name: seen[name] for name in ("answers", "balance", "load", "sight")}
    return TrainState(params, average, opt_state, state.step + 1), seen | {"gradient": optax.tree.norm(gradient)}


@partial(jax.jit, static_argnums=0)
def check_step(config: ModelConfig, params: Params, batch: dict[str, Any]) -> dict[str, Any]:
    """What `loss_of` sees of a batch, without a gradient."""
    return loss_of(config, params, batch)[1]


def _muon_axes(params: dict[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
    """Which axes of a parameter a matrix has (in, out), None for those that Adam updates."""
    adam = ("embed_tokens", "pos_embed", "lm_head", "gate.weight")
    axes: dict[str, Any] = {}
    for name, x in params.items():
        last = len(x.shape) - 1
        if last < 1 or any(part in name for part in adam):
            axes[name] = None
        else:
            order = (last - 1, last) if ".experts." in name else (last, last - 1)
            axes[name] = optax.contrib.MuonDimensionNumbers(*order)
    return axes
