"""`deepstack-jax demo`: a checkpoint, a photograph and an answer, from nothing, on any machine."""

import json
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

DEFAULT_IMAGE = Path(__file__).parent.parent / "data" / "coffee.jpg"


def run(
    image: Annotated[str, typer.Option(help="file, URL or data URI")] = str(DEFAULT_IMAGE),
    prompt: Annotated[str, typer.Option(help="the question")] = "What is in the picture?",
    max_new_tokens: Annotated[int, typer.Option(help="length of the answer")] = 24,
    seed: Annotated[int, typer.Option(help="of the random weights")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Makes a small random checkpoint, converts it, encodes a photograph, generates, and shows what happened.

    Its weights are random, so the answer says nothing: the demo shows the path that a real checkpoint takes.

    Example: deepstack-jax demo --image holiday.jpg
    """
    with tempfile.TemporaryDirectory(prefix="deepstack-jax-demo-") as folder:
        shown = _walk(Path(folder), image, prompt, max_new_tokens, seed)
    if as_json:
        print(json.dumps(shown, ensure_ascii=False))
    else:
        _print(shown)


def _walk(folder: Path, image: str, prompt: str, max_new_tokens: int, seed: int) -> dict[str, Any]:
    """The whole path: {"stages": [{"stage", "seconds", "result"}], "tokens", "text", ...}."""
    started = time.perf_counter()
    stages: list[dict[str, Any]] = []

    def lap(stage: str, result: str, seconds: float | None = None) -> None:
        nonlocal started
        now = time.perf_counter()
        stages.append({"stage": stage, "seconds": now - started if seconds is None else seconds, "result": result})
        started = now

    import jax

    import deepstack_jax as dsj
    from converters.hf_to_orbax import convert
    from converters.random_checkpoint import tiny_config, write_random_checkpoint
    from deepstack_jax.generation import encode_rows
    from deepstack_jax.processing.batch import arrange

    device = jax.devices()[0]
    lap("start", f"jax {jax.__version__} on {device.device_kind}")
    write_random_checkpoint(folder / "hf", tiny_config(), seed=seed)
    config = tiny_config()["text_config"]
    experts = f"{config['num_experts']} experts, {config['num_experts_per_tok']} a token"
    lap("make", f"Hugging Face checkpoint: {config['num_hidden_layers']} layers of {config['hidden_size']}, {experts}")
    convert(folder / "hf", folder / "ckpt")
    lap("convert", "Hugging Face safetensors -> Orbax")
    model = dsj.load(folder / "ckpt")
    parameters = sum(array.size for array in model.params.values())
    lap("load", f"{len(model.params)} parameters, {parameters:,} values")

    inputs = dsj.prepare(model, prompt, images=[image])
    grid = inputs["image_grid_thw"][0].tolist()
    tokens = int(inputs["attention_mask"].sum())
    visual = int((inputs["mm_token_type_ids"] == 1).sum())
    lap("prepare", f"grid {grid[1]} x {grid[2]} patches -> {visual} visual tokens in a prompt of {tokens}")

    arrays = {name: value for name, value in inputs.items() if name != "mm_token_type_ids"}
    batch = arrange(model.config, **arrays)
    rows = jax.block_until_ready(encode_rows(model, batch))
    assert rows is not None
    levels, width = model.config.num_deepstack_levels, model.config.text.hidden_size
    lap("encode (compiling)", f"rows [{visual}, {rows.shape[1]}] = embedding of {width} + {levels} deepstack levels")
    dsj.generate(model, **inputs, max_new_tokens=max_new_tokens, eos_token_id=[])
    buckets = f"{rows.shape[0]} visual tokens, prompt of {batch.input_ids.shape[1]}"
    lap("generate (compiling)", f"one program a bucket: {buckets}")
    out = dsj.generate(model, **inputs, max_new_tokens=max_new_tokens, eos_token_id=[])
    lap("encode", f"{grid[1] * grid[2]} patches", out.timings["encode"])
    lap("prefill", f"{tokens} tokens; level i added after layer i for i < {levels}", out.timings["prefill"])
    rate = (max_new_tokens - 1) / out.timings["decode"] if max_new_tokens > 1 else 0.0
    lap("decode", f"{max_new_tokens} tokens in one loop on the device, {rate:.0f} a second", out.timings["decode"])
    return {
        "image": image,
        "prompt": prompt,
        "stages": stages,
        "prompt_tokens": tokens,
        "visual_tokens": visual,
        "tokens": out.tokens[0].tolist(),
        "text": dsj.decode(model, out)[0],
    }


def _print(shown: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    console.print(f"\n[bold]deepstack-jax[/bold]  {Path(shown['image']).name}: {shown['prompt']}\n")
    table = Table(box=None, pad_edge=False)
    table.add_column("stage", style="cyan")
    table.add_column("time", justify="right")
    table.add_column("what it made")
    for stage in shown["stages"]:
        table.add_row(stage["stage"], f"{stage['seconds'] * 1e3:,.0f} ms", stage["result"])
    console.print(table)
    console.print("\n[bold]tokens[/bold]", *shown["tokens"])
    console.print("[bold]text[/bold]  ", escape(repr(shown["text"])))
    console.print("\nThe weights are random, so is the answer. With a real checkpoint:", style="dim")
    console.print("  deepstack-jax convert HF_DIR CKPT_DIR", style="dim")
    console.print("  deepstack-jax generate CKPT_DIR --image photo.jpg --prompt 'What is this?'", style="dim")
