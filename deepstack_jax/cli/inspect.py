"""`deepstack-jax inspect`: what a checkpoint holds."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import typer

from deepstack_jax.bundled import existing_checkpoint
from deepstack_jax.cli.mesh import MeshShape
from deepstack_jax.config import ModelConfig, TextConfig

if TYPE_CHECKING:
    import numpy as np
    from jax.sharding import AbstractMesh


class _Leaf(NamedTuple):
    path: str
    size: int
    dtype: str
    nbytes: int


def run(
    checkpoint: Annotated[Path, typer.Argument(help="directory made by convert, or a Hugging Face directory")],
    expert_layout: Annotated[
        Literal["hf4", "hf5"] | None,
        typer.Option(help="order of a Hugging Face checkpoint's expert weights; only needed if shapes are ambiguous"),
    ] = None,
    mesh: MeshShape = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="first read every file of a converted checkpoint and check its checksum")
    ] = False,
    accept_edits: Annotated[
        bool,
        typer.Option(
            "--accept-edits",
            help="take edited configuration, tokenizer and processor files of a converted checkpoint into its list of "
            "checksums, if all of them are valid and the weights are whole",
        ),
    ] = False,
    digests: Annotated[
        bool,
        typer.Option(
            "--digests",
            help="print the SHA-256 of each tensor and of the model instead: the same before and after convert",
        ),
    ] = False,
) -> None:
    """Prints a checkpoint's configuration, the memory that its KV cache takes, and its parameters.

    Reads no weights, except with --verify, --accept-edits and --digests. With --mesh, which needs no devices, also what
    each device would hold.

    Example: deepstack-jax inspect ckpt --mesh data=2,tensor=4
    """
    checkpoint = existing_checkpoint(checkpoint)
    import jax
    import numpy as np
    from rich.console import Console
    from rich.table import Table

    from deepstack_jax.checkpoints.mapping import group_of
    from deepstack_jax.models.registry import read_config
    from deepstack_jax.sharding import abstract_mesh

    jax.config.update("jax_platforms", "cpu")  # looking needs no accelerator
    placed = abstract_mesh(mesh) if mesh else None
    verified = _accept_edits(checkpoint) if accept_edits else []
    verified += [_verify(checkpoint, expert_layout)] if verify else []
    if digests:
        _print_digests(checkpoint, expert_layout)
        return
    config = read_config(checkpoint)
    kind, dtype, leaves = _leaves(checkpoint, config, expert_layout)
    table = Table("group", "tensors", "parameters", "dtype", "bytes", box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    groups: dict[str, list[_Leaf]] = {}
    for leaf in leaves:
        groups.setdefault(group_of(leaf.path), []).append(leaf)
    for name, members in [*groups.items(), ("all", leaves)]:
        dtypes = "/".join(sorted({leaf.dtype for leaf in members}))
        size, nbytes = sum(leaf.size for leaf in members), sum(leaf.nbytes for leaf in members)
        table.add_row(name, str(len(members)), f"{size:,}", dtypes, f"{nbytes:,}")
    console = Console(highlight=False, soft_wrap=True)
    for line in verified:
        console.print(line)
    console.print(f"{checkpoint}: {kind}")
    for line in _summary(config):
        console.print(line)
    console.print(_cache_line(config.text, np.dtype(dtype)))
    if placed:
        console.print(_mesh_line(config, leaves, np.dtype(dtype), placed))
    console.print(table)


def _verify(checkpoint: Path, expert_layout: str | None) -> str:
    """Checks all that can be checked and returns what that was, in one line; raises `CheckpointError`."""
    from deepstack_jax.checkpoints.hf_checkpoint import open_checkpoint
    from deepstack_jax.checkpoints.hf_folder import SUMS, check_sums
    from deepstack_jax.checkpoints.manifest import FORMAT_FILE, read_manifest
    from deepstack_jax.cli.progress import loading

    if not (checkpoint / FORMAT_FILE).exists():
        summed = check_sums(checkpoint)
        names = open_checkpoint(checkpoint, expert_layout=expert_layout).files
        if summed:
            nbytes = sum((checkpoint / name).stat().st_size for name in summed)
            return f"OK: checksums of {len(summed)} files, {nbytes:,} bytes, by {SUMS}" + (
                f"; it does not list {min(names.keys() - summed)}" if names.keys() - summed else ""
            )
        nbytes = sum((checkpoint / name).stat().st_size for name in names)
        return (
            f"OK: headers and lengths of {len(names)} safetensors files, {nbytes:,} bytes; the format has no "
            f"checksums and there is no {SUMS}, so damaged values would go unnoticed"
        )
    manifest = read_manifest(checkpoint)
    with loading(f"verifying {checkpoint}") as progress:
        manifest.check(manifest.files, lambda done: progress(done, manifest.nbytes))
    if not manifest.has_sums:
        return (
            f"OK: lengths of {len(manifest.files)} files, {manifest.nbytes:,} bytes; this checkpoint has no checksums, "
            "convert again to get them"
        )
    return f"OK: checksums of {len(manifest.files)} files, {manifest.nbytes:,} bytes"


def _print_digests(checkpoint: Path, expert_layout: str | None) -> None:
    from deepstack_jax.checkpoints.digests import model_digest, tensor_digests
    from deepstack_jax.cli.progress import loading

    with loading(f"reading {checkpoint}") as progress:
        found = list(tensor_digests(checkpoint, expert_layout, progress))
    for tensor in found:
        print(tensor)
    print(f"{model_digest(found)}  the model")


def _accept_edits(checkpoint: Path) -> list[str]:
    """Takes the text files as they are now into the list of checksums. Returns what has changed, one line each.

    Raises `CheckpointError` if another file is damaged, and `ValueError` if a text file is not valid or does not fit.
    """
    from converters.hf_to_orbax import check_companions
    from deepstack_jax.checkpoints.manifest import FORMAT_FILE, read_manifest
    from deepstack_jax.checkpoints.orbax_checkpoint import check_model, stored_params
    from deepstack_jax.checkpoints.safetensors_file import CheckpointError
    from deepstack_jax.cli.progress import loading
    from deepstack_jax.config import read_sampling_defaults
    from deepstack_jax.models.registry import read_config
    from deepstack_jax.processing.processor import Processor

    if not (checkpoint / FORMAT_FILE).exists():
        raise CheckpointError(
            f"{checkpoint} has no {FORMAT_FILE}, so its files may be edited: leave --accept-edits out"
        )
    manifest = read_manifest(checkpoint)
    if not manifest.has_sums:
        raise CheckpointError(
            f"{checkpoint} has no checksums, so its text files may be edited: leave --accept-edits out"
        )
    config = read_config(checkpoint)
    check_companions(checkpoint, config)
    read_sampling_defaults(checkpoint)
    Processor.from_directory(checkpoint, config).check_files()
    check_model(checkpoint, config, stored_params(checkpoint))
    stored = [name for name in manifest.files if name not in manifest.copies]
    with loading(f"verifying {checkpoint}") as progress:
        manifest.check(stored, lambda done: progress(done, manifest.nbytes))
    return [f"{line}: accepted" for line in manifest.accept_copies()] or ["no text file was edited"]


def _leaves(checkpoint: Path, config: ModelConfig, expert_layout: str | None) -> tuple[str, str, list[_Leaf]]:
    """What the checkpoint is, the dtype that `load` gives the model, and the parameters in order."""
    from deepstack_jax.checkpoints.hf_checkpoint import open_checkpoint
    from deepstack_jax.checkpoints.manifest import FORMAT_FILE, read_manifest
    from deepstack_jax.checkpoints.orbax_checkpoint import check_model, stored_params

    if (checkpoint / FORMAT_FILE).exists():
        stored = stored_params(checkpoint)
        order = {path: i for i, path in enumerate(check_model(checkpoint, config, stored))}
        source = read_manifest(checkpoint).contents.get("source", {})
        kind = f"converted, from expert layout {source.get('expert_layout')} in {len(source.get('files', ()))} files"
        leaves = [_Leaf(p, leaf.size, leaf.dtype.name, leaf.size * leaf.dtype.itemsize) for p, leaf in stored.items()]
        return kind, _most_used(leaves, config), sorted(leaves, key=lambda leaf: order.get(leaf.path, len(order)))
    found = open_checkpoint(checkpoint, config, expert_layout)
    kind = f"Hugging Face, expert layout {found.expert_layout} in {len(found.files)} files"
    dtypes = {parameter.path: found.dtype_of(parameter) for parameter in found.parameters}
    leaves = [_Leaf(p.path, p.size, dtypes[p.path].name, p.size * dtypes[p.path].itemsize) for p in found.parameters]
    return kind, found.dtype.name, leaves


def _most_used(leaves: list[_Leaf], config: ModelConfig) -> str:
    """The dtype of the parameters; if they have several, config.json's or the most frequent one."""
    counts = Counter(leaf.dtype for leaf in leaves)
    return config.dtype if config.dtype and counts[config.dtype] else counts.most_common(1)[0][0]


def _cache_line(text: TextConfig, dtype: "np.dtype") -> str:
    """What one token of the KV cache takes, and how many tokens 1 GiB holds, the default of a server on a CPU."""
    from deepstack_jax.engine.options import CPU_KV_BYTES, token_bytes
    from deepstack_jax.engine.shape import EngineShape

    each, page = token_bytes(text, dtype), EngineShape.page
    pages = max(CPU_KV_BYTES // (each * page) - 1, 0)  # no request gets page 0
    return f"KV cache: {each:,} bytes per token in {dtype}; 1 GiB holds {pages * page:,} tokens in pages of {page}"


def _mesh_line(config: ModelConfig, leaves: list[_Leaf], dtype: "np.dtype", mesh: "AbstractMesh") -> str:
    """What each device of a mesh holds of the parameters, and of each token in its part of the KV cache."""
    from math import prod

    from deepstack_jax.engine.options import token_bytes
    from deepstack_jax.models.parameters import abstract_params, param_shardings
    from deepstack_jax.sharding import describe

    shapes, shardings = abstract_params(config), param_shardings(config, mesh, dtype)
    parts = {
        path: prod(shape.shape) // prod(shardings[path].shard_shape(shape.shape)) for path, shape in shapes.items()
    }
    held = sum(leaf.nbytes // parts[leaf.path] for leaf in leaves)
    return (
        f"mesh {describe(mesh)}: each of {mesh.size} devices holds {held:,} bytes of parameters, and "
        f"{token_bytes(config.text, dtype, mesh):,} bytes per token in its part of the KV cache"
    )


def _summary(config: ModelConfig) -> Iterator[str]:
    text, vision = config.text, config.vision
    yield (
        f"{config.model_type}: {text.num_hidden_layers} layers of {text.hidden_size}, {text.num_attention_heads} heads "
        f"of {text.head_dim} over {text.num_key_value_heads}, vocabulary {text.vocab_size}"
        f"{', embeddings tied' if text.tie_word_embeddings else ''}"
    )
    if sparse := sum(text.sparse_layers):
        yield (
            f"experts: {text.num_experts} of width {text.moe_intermediate_size}, {text.num_experts_per_tok} per token, "
            f"in {sparse} layers"
        )
    if vision:
        taps = ", ".join(str(i) for i in vision.deepstack_visual_indexes) or "none"
        yield (
            f"vision: {vision.depth} blocks of {vision.hidden_size}, {vision.num_heads} heads of {vision.head_dim}, "
            f"patches of {vision.patch_size}, deepstack taps {taps}"
        )
