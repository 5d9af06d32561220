"""`deepstack-jax plan`: whether a model fits a slice of chips that one doesn't have."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from deepstack_jax.config import ModelConfig
    from deepstack_jax.plan import Plan


def run(
    model: Annotated[str, typer.Argument(help="30b-a3b, 235b-a22b, a checkpoint, or a config.json")],
    target: Annotated[str, typer.Option(help="such as v5e-16, v6e-8, v5p-8, tpu7x-8, h100-4, h200-8, b200-8")],
    mesh: Annotated[str | None, typer.Option(help="the only mesh to try, such as data=4,tensor=4")] = None,
    slots: Annotated[int | None, typer.Option(min=1, help="requests that run at once; a server's default")] = None,
    chunk: Annotated[int | None, typer.Option(min=128, help="tokens of a prefill chunk; a server's default")] = None,
    kv_bytes: Annotated[
        int | None, typer.Option(min=1, help="memory of each device for keys and values; most of what is left")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Compiles the engine's programs for chips that need not be there: does the model fit, and on which mesh?

    Prints bytes per device, the KV tokens that remain, collectives, kernels, and the least time of a decode step and of
    a prefill chunk. Takes a minute or two per mesh; exit code 1 if nothing fits. For TPUs it needs pip install
    'deepstack-jax[aot]'.

    Example: deepstack-jax plan 30b-a3b --target v5e-8
    """
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing runs: a chip that is here is left alone
    from deepstack_jax.plan import plans

    config = _config(model)
    found: list[Plan] = []
    for plan in plans(config, target, mesh, slots, chunk, kv_bytes):
        found.append(plan)
        if not as_json:
            _show(plan)
        if plan.fits:
            break
    best = found[-1]
    if as_json:
        print(json.dumps({"model": model, **best.as_json()}))
    elif best.fits:
        print(f"use --mesh {best.mesh}")
    if not best.fits:
        raise typer.Exit(1)


def _config(model: str) -> "ModelConfig":
    from deepstack_jax.bundled import existing_checkpoint
    from deepstack_jax.known_models import KNOWN_MODELS
    from deepstack_jax.models.registry import parse_config, read_config

    known: dict[str, Any] | None = KNOWN_MODELS.get(model.lower())
    if known is not None:
        return parse_config(known)
    if Path(model).is_file():
        return read_config(Path(model).parent)
    return read_config(existing_checkpoint(Path(model)))


def _show(plan: "Plan") -> None:
    held = plan.bytes_per_device
    sizes = ", ".join(
        f"{name} {size / 1e9:.2f} GB"
        for name, size in (("weights", held.weights), ("pages", held.pages), ("temporaries", held.temporaries))
    )
    print(f"{plan.target}, mesh {plan.mesh}: {'fits' if plan.fits else 'does not fit: ' + plan.why}")
    print(f"  each device: {sizes}, of {plan.memory_per_device / 1e9:.2f} GB")
    print(f"  {plan.slots} slots, chunks of {plan.chunk} tokens, {plan.kv_tokens:,} tokens in KV pages")
    for name, unit in (("decode", "step"), ("prefill", "chunk")):
        if program := plan.programs.get(name):
            print(
                f"  {name}: at least {program.seconds * 1e3:.2f} ms per {unit}; {program.collectives_per_layer} "
                f"collectives per layer, {program.collective_bytes / 1e6:.1f} MB per {unit}; kernels "
                f"{', '.join(program.kernels) or 'none'}; compiled in {program.compile_seconds:.0f} s"
            )
            print(f"    {program.arithmetic}")
