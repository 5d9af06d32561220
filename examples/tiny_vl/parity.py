"""Asks PyTorch and JAX the same questions: `python -m tiny_vl.parity CHECKPOINT`.

transformers' `Qwen3VLMoeForConditionalGeneration` and this project load the same directory in float32, take the same
arrays, and must answer token for token alike: pictures, pairs and clips in turn, of seeds outside the training set. It
needs torch.
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import deepstack_jax as dsj
from deepstack_jax.demo.samples import KINDS, sample
from tiny_vl.evaluate import NEW_TOKENS, Case, batches_of, inputs_of


def cases_of_kinds(count: int, first_seed: int) -> list[Case]:
    """`count` questions: of pictures, pairs and clips in turn, one a sample, whichever comes first."""
    samples = [sample(first_seed + i, KINDS[i % len(KINDS)]) for i in range(count)]
    return [Case(one, one.exchanges[0]) for one in samples]


def load_torch(directory: Path) -> Any:
    """transformers' model in float32, every tensor of it from the checkpoint and none of the checkpoint's unused."""
    import torch
    from transformers import Qwen3VLMoeForConditionalGeneration

    loaded: Any = Qwen3VLMoeForConditionalGeneration.from_pretrained(
        directory, dtype=torch.float32, experts_implementation="eager", output_loading_info=True
    )
    model, report = loaded
    if report["missing_keys"] or report["unexpected_keys"]:
        raise ValueError(f"{directory} and transformers' model do not have the same tensors: {report}")
    return model.eval()


def torch_tokens(model: Any, inputs: dict[str, np.ndarray], max_new_tokens: int) -> np.ndarray:
    """Greedy tokens [B, at most max_new_tokens]; rows that ended are filled up with the pad token."""
    import torch

    model.model.rope_deltas = None  # those of the last prompt would be taken for this one's
    tensors = {
        name: torch.tensor(value, dtype=torch.long if value.dtype.kind == "i" else torch.float32)
        for name, value in inputs.items()
    }
    with torch.no_grad():
        out = model.generate(**tensors, max_new_tokens=max_new_tokens, do_sample=False)
    return out[:, inputs["input_ids"].shape[1] :].numpy()


def differing(model: dsj.Model, reference: Any, cases: Sequence[Case]) -> tuple[list[Case], Counter[str]]:
    """(cases whose answers are not the same tokens, how many were asked of each kind)."""
    found, asked = [], Counter()
    for batch, size in batches_of(cases):
        most = NEW_TOKENS[batch[0].is_long]
        # full batches compile once
        ours = dsj.generate(model, **inputs_of(model, batch), max_new_tokens=most)
        theirs = torch_tokens(reference, inputs_of(model, batch[:size]), most)
        for case, tokens, length, expected in zip(batch[:size], ours.tokens, ours.lengths, theirs, strict=False):
            asked[case.sample.kind] += 1
            # what follows an answer's end is padding on both sides
            if (
                not np.array_equal(tokens[:length], expected[:length])
                or (expected[length:] != model.pad_token_id).any()
            ):
                found.append(case)
    return found, asked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--first-seed", type=int, default=10_000)
    args = parser.parse_args()
    model = dsj.load(args.checkpoint, dtype="float32")
    found, asked = differing(model, load_torch(args.checkpoint), cases_of_kinds(args.prompts, args.first_seed))
    kinds = ", ".join(f"{count} of a {kind}" for kind, count in asked.items())
    print(f"{args.prompts} questions ({kinds}): {len(found)} answers differ")
    for case in found:
        print(f"  {case.sample.kind}: {case.exchange.question}")
    raise SystemExit(bool(found))


if __name__ == "__main__":
    main()
