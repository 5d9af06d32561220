"""`deepstack-jax verify`: JAX against PyTorch on one checkpoint and one prompt, stage by stage."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import typer

from deepstack_jax.cli.demo import DEFAULT_IMAGE
from deepstack_jax.cli.mesh import Coordinator, MeshShape, NumProcesses, ProcessId, open_mesh

TOLERANCE = 2e-5  # of the largest value of a stage, in float32


@dataclass
class Stage:
    """One row of the table. `error` is relative to the reference's largest value."""

    name: str
    largest_error: float
    error: float
    passed: bool


def run(
    checkpoint: Annotated[Path, typer.Argument(help="Hugging Face directory")],
    image: Annotated[list[str] | None, typer.Option(help="file, URL or data URI; a photograph by default")] = None,
    prompt: Annotated[str, typer.Option(help="the question")] = "Describe the picture.",
    max_new_tokens: Annotated[int, typer.Option(help="greedy tokens to compare")] = 16,
    expert_layout: Annotated[
        Literal["hf4", "hf5"] | None, typer.Option(help="only needed if shapes are ambiguous")
    ] = None,
    mesh: MeshShape = None,
    coordinator: Coordinator = None,
    num_processes: NumProcesses = None,
    process_id: ProcessId = None,
) -> None:
    """Compares every stage with transformers in float32: exit code 1 if one differs by more than 2e-5.

    Needs PyTorch (pip install 'deepstack-jax[test]') and memory for the model twice over. With several processes, the
    first compares, and the others end with its exit code.

    Example: deepstack-jax verify Qwen3-VL-30B-A3B-Instruct --image coffee.jpg
    """
    import jax.numpy as jnp
    from rich.console import Console

    import deepstack_jax as dsj
    from deepstack_jax.bundled import checkpoint_path
    from deepstack_jax.cli.progress import loading
    from deepstack_jax.processes import is_first, publish, wait_for_first

    checkpoint = checkpoint_path(checkpoint)
    placed = open_mesh(mesh, coordinator, num_processes, process_id)
    with loading(f"loading {checkpoint}") as progress:
        model = dsj.load(checkpoint, jnp.float32, placed, expert_layout=expert_layout, progress=progress)
    if image is None:
        image = [str(DEFAULT_IMAGE)] if model.config.vision else []
    inputs = dsj.prepare(model, prompt, images=image)
    found = jax_stages(model, inputs, max_new_tokens)
    if not is_first():
        raise typer.Exit(int(wait_for_first("verify")))
    failed = 1
    try:
        stages = list(compare(found, checkpoint, inputs, max_new_tokens))
        Console().print(_table(checkpoint, inputs, stages))
        failed = int(not all(stage.passed for stage in stages))
    finally:
        if coordinator is not None:
            publish("verify", str(failed))
    if failed:
        raise typer.Exit(1)


def compare(
    stages: tuple[dict[str, np.ndarray], np.ndarray], checkpoint: Path, inputs: dict[str, Any], max_new_tokens: int
) -> Iterator[Stage]:
    """Compares what `jax_stages` found, in the order in which a prompt passes the stages."""
    found, tokens = stages
    expected, expected_tokens = _torch_stages(_load_torch(checkpoint), inputs, max_new_tokens)
    for name, value in expected.items():
        error = float(np.abs(found[name] - value).max())
        relative = error / max(float(np.abs(value).max()), 1e-30)
        yield Stage(name, error, relative, bool(relative <= TOLERANCE))
    different = int((tokens != expected_tokens).sum())
    yield Stage("greedy tokens", different, different / expected_tokens.size, different == 0)


def jax_stages(model: Any, inputs: dict[str, Any], max_new_tokens: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Returns (values by stage, greedy tokens) of one prompt; every process of a mesh calls it."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    import deepstack_jax as dsj
    from deepstack_jax import sharding
    from deepstack_jax.generation import encode_prompt
    from deepstack_jax.models.parameters import merge_params
    from deepstack_jax.processing.batch import prepare_batch
    from deepstack_jax.programs import language_inputs, precision_of

    batch = prepare_batch(model.config, **inputs)
    config = model.config

    @sharding.on_mesh_of(0)
    @jax.jit
    def stages_of_vision(params: Any, pixel_values: Any, geometry: Any) -> dict[str, jax.Array]:
        with precision_of(config):
            rows, seen = nnx.capture(merge_params(config, params).visual, nnx.Intermediate)(pixel_values, geometry)
        blocks = {f"blocks.{i}": hidden for i, hidden in enumerate(seen["hidden_states"].get_value())}
        merged, *levels = jnp.split(rows, 1 + config.num_deepstack_levels, axis=-1)
        stages = blocks | {"merger": merged} | {f"deepstack.{i}": level for i, level in enumerate(levels)}
        return jax.tree.map(sharding.constrain, stages)

    @sharding.on_mesh_of(0)
    @jax.jit
    def stages_of_text(params: Any, prompt: Any) -> dict[str, jax.Array]:
        with precision_of(config):
            forward = nnx.capture(merge_params(config, params).language_model, nnx.Intermediate)
            (logits, _), seen = forward(**language_inputs(prompt))
        embeddings, *layers = seen["model"]["hidden_states"].get_value()
        stages = {"embeddings": embeddings} | {f"layers.{i}": hidden for i, hidden in enumerate(layers)}
        return jax.tree.map(sharding.constrain, stages | {"logits": logits})

    found: dict[str, np.ndarray] = {}
    parts: dict[str, list[np.ndarray]] = {}
    for visual in batch.visuals:
        for name, value in stages_of_vision(model.vision_params, visual.pixel_values, visual.geometry).items():
            count = visual.num_rows * (config.vision.merge_unit if name.startswith("blocks") else 1)
            parts.setdefault(name, []).append(np.asarray(value)[:count])
    found |= {name: np.concatenate(part) for name, part in parts.items()}
    of_text = stages_of_text(model.text_params, encode_prompt(model, batch))
    found |= {name: np.asarray(value)[:, : batch.lengths[0]] for name, value in of_text.items()}
    return found, dsj.generate(model, **inputs, max_new_tokens=max_new_tokens, eos_token_id=[]).tokens


def _load_torch(checkpoint: Path) -> Any:
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    except ImportError:
        raise ValueError("verify needs PyTorch: pip install 'deepstack-jax[test]'") from None
    from transformers.utils import logging

    from deepstack_jax.models.registry import family_of, read_config

    logging.disable_progress_bar()
    config = read_config(checkpoint)
    if family_of(config).is_text_part:
        raise ValueError(f"{config.model_type} has no head in transformers: verify the whole checkpoint")
    auto = AutoModelForImageTextToText if config.vision else AutoModelForCausalLM
    return auto.from_pretrained(checkpoint, dtype=torch.float32).eval()


def _torch_stages(model: Any, inputs: dict[str, Any], max_new_tokens: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Hooks every stage of transformers' model; names are those of `jax_stages`."""
    import torch

    found: dict[str, np.ndarray] = {}

    def keep(name: str) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            found[name] = (output[0] if isinstance(output, tuple) else output).detach().numpy().copy()

        return hook

    def keep_input(name: str) -> Any:
        def hook(_module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            found[name] = (args[0] if args else kwargs["hidden_states"]).detach().numpy().copy()

        return hook

    text = getattr(model.model, "language_model", model.model)
    # layer i's output with its deepstack level added is what layer i + 1, or the last norm, is given
    names = ["embeddings", *(f"layers.{i}" for i in range(len(text.layers)))]
    hooks = [
        module.register_forward_pre_hook(keep_input(name), with_kwargs=True)
        for name, module in zip(names, [*text.layers, text.norm], strict=True)
    ]
    if "pixel_values" in inputs:
        visual = model.model.visual
        hooks += [block.register_forward_hook(keep(f"blocks.{i}")) for i, block in enumerate(visual.blocks)]
        hooks.append(visual.merger.register_forward_hook(keep("merger")))
        levels = sorted(range(len(visual.deepstack_merger_list)), key=lambda i: visual.deepstack_visual_indexes[i])
        for level, which in enumerate(levels):
            merger = visual.deepstack_merger_list[which]
            hooks.append(merger.register_forward_hook(keep(f"deepstack.{level}")))
    tensors = {
        name: torch.tensor(value, dtype=torch.long if value.dtype.kind == "i" else torch.float32)
        for name, value in inputs.items()
    }
    with torch.no_grad():
        logits = model(**tensors).logits.numpy()
        for hook in hooks:
            hook.remove()
        tokens = model.generate(
            **tensors, max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    order = ["blocks", "merger", "deepstack", "embeddings", "layers"]
    found = dict(sorted(found.items(), key=lambda item: order.index(item[0].split(".")[0])))
    return found | {"logits": logits}, tokens[:, inputs["input_ids"].shape[1] :].numpy()


def _table(checkpoint: Path, inputs: dict[str, Any], stages: list[Stage]) -> Any:
    from rich.table import Table

    tokens = int(inputs["attention_mask"].sum())
    table = Table(title=f"{checkpoint.name}: JAX against PyTorch, float32, {tokens} prompt tokens")
    table.add_column("stage")
    table.add_column("largest error", justify="right")
    table.add_column("relative", justify="right")
    table.add_column("verdict")
    for stage in stages:
        verdict = "[green]ok[/green]" if stage.passed else "[red]FAILED[/red]"
        table.add_row(stage.name, f"{stage.largest_error:.3g}", f"{stage.error:.2g}", verdict)
    return table
