"""`deepstack-jax export`: back from a converted directory to a Hugging Face checkpoint."""

import time
from pathlib import Path
from typing import Annotated

import typer


def run(
    ckpt_dir: Annotated[Path, typer.Argument(help="directory made by convert")],
    hf_dir: Annotated[Path, typer.Argument(help="directory to make")],
) -> None:
    """Gives back the Hugging Face checkpoint that a directory was converted from, for from_pretrained.

    Example: deepstack-jax export ckpt Qwen3-VL-30B-A3B-Instruct-copy
    """
    if not ckpt_dir.is_dir():
        raise ValueError(f"no directory {ckpt_dir}: give one made by deepstack-jax convert")
    import jax

    from converters.orbax_to_hf import export
    from deepstack_jax.cli.progress import loading

    jax.config.update("jax_platforms", "cpu")  # the weights only pass through memory
    started = time.perf_counter()
    with loading(f"exporting {ckpt_dir}") as progress:
        export(ckpt_dir, hf_dir, progress=progress)
    print(f"{hf_dir} made in {time.perf_counter() - started:.1f} s")
