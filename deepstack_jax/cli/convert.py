"""`deepstack-jax convert`: from a Hugging Face checkpoint to a directory that loads fast and sharded."""

import sys
import time
import warnings
from pathlib import Path
from typing import Annotated, Literal

import typer

from deepstack_jax.bundled import existing_checkpoint


def run(
    hf_dir: Annotated[Path, typer.Argument(help="Hugging Face checkpoint: config.json beside safetensors files")],
    ckpt_dir: Annotated[Path, typer.Argument(help="directory to make")],
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None, typer.Option(help="of the weights; the checkpoint's by default")
    ] = None,
    expert_layout: Annotated[
        Literal["hf4", "hf5"] | None,
        typer.Option(help="order of the expert weights, of transformers 4 or 5; only needed if shapes are ambiguous"),
    ] = None,
) -> None:
    """Converts a Hugging Face checkpoint, tensor by tensor.

    Example: deepstack-jax convert Qwen3-VL-30B-A3B-Instruct ckpt
    """
    existing_checkpoint(hf_dir)
    import jax

    from converters.hf_to_orbax import convert
    from deepstack_jax.cli.progress import loading

    jax.config.update("jax_platforms", "cpu")  # the weights only pass through memory
    started = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught, loading(f"converting {hf_dir}") as progress:
        warnings.simplefilter("always", UserWarning)
        convert(hf_dir, ckpt_dir, dtype=dtype, expert_layout=expert_layout, progress=progress)
    for warning in caught:
        print(f"warning: {warning.message}", file=sys.stderr)
    print(f"{ckpt_dir} made in {time.perf_counter() - started:.1f} s")
