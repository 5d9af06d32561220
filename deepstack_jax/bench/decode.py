"""The speed of a model on this machine's devices: prefill and decode of `generate`, timed by its engine."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from deepstack_jax.checkpoint import Model
from deepstack_jax.generation import GenerateOutput, generate


def measure(
    model: Model,
    batch: int,
    prompt_tokens: int,
    steps: int,
    rounds: int = 5,
    around: AbstractContextManager[None] | None = None,
) -> dict[str, Any]:
    """Runs a batch of random prompts `rounds` times after a first time that compiles; returns medians of the rounds.

    Args:
        batch: prompts that run at once.
        prompt_tokens: tokens of each.
        steps: tokens that each prompt gets after its first one, which prefill draws.
        around: in which the rounds run, but not the time before that compiles.

    Raises:
        ValueError: prompt and answer exceed the model's positions.
    """
    ids = random_ids(model, batch, prompt_tokens)

    def run() -> GenerateOutput:
        return generate(model, ids, max_new_tokens=1 + steps, eos_token_id=())

    run()
    with around or nullcontext():
        runs = [run() for _ in range(rounds)]
    found = {}
    for stage, tokens in (("prefill", batch * prompt_tokens), ("decode", batch * steps)):
        seconds = [run.timings[stage] for run in runs]
        middle = float(np.median(seconds))
        found[stage] = {
            "tokens": tokens,
            "seconds": middle,
            "seconds_min": min(seconds),
            "seconds_max": max(seconds),
            "tokens_per_s": tokens / middle,
        }
    return found


def random_ids(model: Model, batch: int, tokens: int) -> np.ndarray:
    """Token ids [batch, tokens] of the whole vocabulary, except those that stand for images and videos."""
    config = model.config
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    ordinary = np.setdiff1d(np.arange(config.text.vocab_size), [getattr(config, name, None) or -1 for name in names])
    return np.random.default_rng(0).choice(ordinary, (batch, tokens))
