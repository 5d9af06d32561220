"""Converts a Hugging Face checkpoint to a directory that loads fast and sharded.

A few threads each read some rows, write them to a file and force it to disk, so that reading, writing and waiting for
the disk overlap. The memory needed depends on the size of an expert, not on that of the model or its largest tensor.
Everything is written to a hidden directory beside the target, which is renamed in the last step.
"""

import fcntl
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import DTypeLike

from deepstack_jax.bundled import checkpoint_path
from deepstack_jax.checkpoints.direct_file import DirectFile
from deepstack_jax.checkpoints.hf_checkpoint import HfCheckpoint, open_checkpoint, warn_non_finite, warn_of_notes
from deepstack_jax.checkpoints.hf_folder import check_sums
from deepstack_jax.checkpoints.manifest import companions, walk, write_manifest
from deepstack_jax.checkpoints.mapping import Parameter
from deepstack_jax.checkpoints.orbax_checkpoint import (
    Leaf,
    OrbaxError,
    groups_of,
)
from deepstack_jax.checkpoints.orbax_writer import (
    REMEDY,
    Piece,
    check_tree,
    create_arrays,
    layout_difference,
    load_whole,
    mark_committed,
    orbax_version,
    place_arrays,
    read_back,
    save_groups,
    save_tree,
)
from deepstack_jax.checkpoints.safetensors_file import (
    CheckpointError,
    CheckpointWarning,
    FiniteCheck,
    refuse_lfs_pointer,
)
from deepstack_jax.config import ModelConfig, read_special_tokens
from deepstack_jax.config_values import read_json_object
from deepstack_jax.errors import naming

Progress = Callable[[int, int], None]
THREADS = 6  # may exceed the number of cores, because the threads mostly wait for the disk


def convert(
    hf_dir: str | Path,
    out_dir: str | Path,
    dtype: DTypeLike | None = None,
    expert_layout: str | None = None,
    progress: Progress | None = None,
) -> None:
    """Converts the Hugging Face checkpoint in `hf_dir` to a new directory `out_dir`.

    Args:
        hf_dir: a directory with config.json and safetensors files, or the name of a bundled checkpoint.
        out_dir: must not exist or must be empty.
        dtype: float32 or bfloat16; None keeps the checkpoint's, and `export` then restores the same bits. If its
            tensors differ, None takes the dtype that transformers chooses.
        expert_layout: hf4 or hf5; only needed if the shapes are ambiguous.
        progress: called with (bytes converted, total bytes).

    Raises:
        CheckpointError: the checkpoint can't be converted; nothing is written.
        ConfigError: a JSON file of the directory is damaged or holds a wrong value; nothing is written.
        OSError: the directory is not empty or can't be written, or Orbax reads other values back; nothing is left.

    Emits `NonFiniteWarning` for weights that hold NaN or infinity, and `CheckpointWarning` for anything that is read
    differently from how it is stored and if Orbax lays out its tree differently than expected.
    """
    hf_dir, out_dir = checkpoint_path(hf_dir), Path(out_dir).absolute()
    kept = None if dtype is None else np.dtype(dtype)
    if kept is not None and kept.name not in ("float32", "bfloat16"):
        raise CheckpointError(f"dtype {kept.name!r} is not supported: expected float32 or bfloat16")
    refuse_existing(out_dir)
    check_sums(hf_dir)
    checkpoint = open_checkpoint(hf_dir, expert_layout=expert_layout)
    check_companions(hf_dir, checkpoint.config)
    warn_of_notes(checkpoint, kept)
    leaves = {
        parameter.path: Leaf(parameter.shape, checkpoint.dtype if kept is None else kept)
        for parameter in checkpoint.parameters
    }
    total = sum(leaf.nbytes for leaf in leaves.values())
    with new_directory(out_dir, total) as directory:
        conversion = _Conversion(directory, checkpoint, leaves, lambda done: progress and progress(done, total))
        sums = _write_params(conversion)
        copy_companions(hf_dir, directory)
        if kept is not None:
            set_config_dtype(directory / "config.json", kept.name)
        write_manifest(directory, _description(checkpoint, kept), sums)


def refuse_existing(directory: Path) -> None:
    """Raises `FileExistsError` unless `directory` is absent or empty."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise FileExistsError(f"{directory} already exists and is not empty: give another directory")


@contextmanager
def new_directory(target: Path, nbytes: int) -> Iterator[Path]:
    """Yields a directory to write `nbytes` into. It durably becomes `target` when the block ends.

    On an error it is removed. Files that a killed process left are removed first. Raises `OSError` if the disk has too
    little room or becomes full, or if another process is writing the same target.
    """
    made = [parent for parent in target.parents if not parent.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    directory = target.parent / f".{target.name}.incomplete"
    directory.mkdir(exist_ok=True)
    lock = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(f"another process is writing {target}: wait for it, or give another directory") from None
        try:
            for left in directory.iterdir():
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            if (free := shutil.disk_usage(directory).free) < nbytes:
                raise _no_room(target, nbytes, free)
            try:
                yield directory
                _sync(directory)
            except (OSError, OrbaxError) as error:
                raise _as_disk_error(error, target, nbytes) from error
            os.rename(directory, target)
            for parent in (target, *made):
                _sync_one(parent.parent)
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)
            raise
    finally:
        os.close(lock)


def copy_companions(source: Path, target: Path) -> None:
    """Copies the configuration, tokenizer and processor files of `source` to the directory `target`."""
    for file in companions(source):
        shutil.copyfile(file, target / file.name)


def set_config_dtype(file: Path, dtype: str) -> None:
    """Rewrites every dtype that a config.json names to the one that the weights now have."""
    config = json.loads(file.read_text())
    for part in (config, config.get("text_config"), config.get("vision_config")):
        for key in ("dtype", "torch_dtype"):
            if isinstance(part, dict) and key in part:
                part[key] = dtype
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def check_companions(directory: Path, config: ModelConfig) -> None:
    """Raises `ConfigError` or `CheckpointError` if a file that is copied beside the weights is damaged."""
    for file in companions(directory):
        if file.suffix == ".json":
            read_json_object(file)
        else:
            refuse_lfs_pointer(file)
    read_special_tokens(directory, config)


@dataclass(frozen=True)
class _Conversion:
    """A running conversion of `checkpoint` to `directory/params`, as arrays with the shapes and dtypes of `leaves`."""

    directory: Path
    checkpoint: HfCheckpoint
    leaves: Mapping[str, Leaf]
    progress: Callable[[int], object]  # called with the number of bytes on disk
    warned: set[str] = field(default_factory=set)

    @cached_property
    def parameters(self) -> dict[str, Parameter]:
        return {parameter.path: parameter for parameter in self.checkpoint.parameters}

    def stream(self, piece: Piece, inspect: Callable[[np.ndarray], None] | None = None) -> Iterator[np.ndarray]:
        """Yields the values of a piece as they are to be written, in small arrays."""
        dtype = self.leaves[piece.path].dtype
        return self.checkpoint.stream(self.parameters[piece.path], piece.first, piece.count, dtype, inspect)

    def report(self, path: str, finite: bool) -> None:
        """Warns once about a parameter that is not finite."""
        if not finite and path not in self.warned:
            self.warned.add(path)
            warn_non_finite(self.checkpoint, self.parameters[path])


def _write_params(conversion: _Conversion) -> dict[str, str]:
    """Writes `directory/params` and has Orbax read a sample of it back. Returns checksums by path in `directory`."""
    directory, leaves = conversion.directory, conversion.leaves
    pieces = create_arrays(directory, leaves)
    difference, sums = _write_pieces(conversion, pieces)
    if difference:
        message = (
            f"{orbax_version()} has another layout than 0.12.8 ({difference}): whole arrays are written through it, "
            "which takes more time and memory"
        )
        warnings.warn(message, CheckpointWarning, stacklevel=4)
        save_groups(directory, _groups(conversion))
    else:
        place_arrays(directory, leaves)
    check_tree(directory, leaves)
    for piece in _sample(leaves, pieces):
        leaf = leaves[piece.path]
        if difference:
            found = load_whole(directory, piece.path, leaf)[piece.first : piece.first + piece.count]
        else:
            found = read_back(directory, piece, leaf)
        _compare(conversion, piece, found)
    mark_committed(directory)
    return sums


def _write_pieces(conversion: _Conversion, pieces: list[Piece]) -> tuple[str, dict[str, str]]:
    """Writes the arrays beside Orbax's tree. Returns what is unexpected about the tree or "", and the checksums."""
    done, sums = 0, {}
    with ThreadPoolExecutor(THREADS, "convert") as pool:
        writing = [pool.submit(_write_piece, conversion, piece) for piece in pieces]
        try:
            save_tree(conversion.directory, conversion.leaves)
            if difference := layout_difference(conversion.directory, conversion.leaves):
                pool.shutdown(cancel_futures=True)
                return difference, {}
            for piece, written in zip(pieces, writing, strict=True):
                nbytes, finite, sums[piece.placed] = written.result()
                conversion.report(piece.path, finite)
                done += nbytes
                conversion.progress(done)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return "", sums


def _write_piece(conversion: _Conversion, piece: Piece) -> tuple[int, bool, str]:
    """Writes one piece to disk; returns its size in bytes, whether all values are finite, and its checksum."""
    check, digest, nbytes = FiniteCheck(), xxhash.xxh3_128(), 0
    with DirectFile(piece.staged(conversion.directory)) as file:
        for values in conversion.stream(piece, check):
            file.write(values)
            digest.update(values.reshape(-1).view(np.uint8))
            nbytes += values.nbytes
    return nbytes, not check.failed, digest.hexdigest()


def _groups(conversion: _Conversion) -> Iterator[dict[str, np.ndarray]]:
    """Yields the whole arrays by dotted path, one group at a time."""
    done = 0
    for paths in groups_of({path: leaf.nbytes for path, leaf in conversion.leaves.items()}):
        group = {}
        for path in paths:
            check = FiniteCheck()
            parameter, dtype = conversion.parameters[path], conversion.leaves[path].dtype
            group[path] = conversion.checkpoint.read(parameter, dtype, check)
            conversion.report(path, not check.failed)
        yield group
        done += sum(values.nbytes for values in group.values())
        conversion.progress(done)


def _sample(leaves: Mapping[str, Leaf], pieces: Sequence[Piece]) -> list[Piece]:
    """Returns the first piece of the smallest array, and the middle piece of an array of experts if there is one."""
    smallest = min(leaves, key=lambda path: leaves[path].nbytes)
    experts = next((path for path in leaves if ".experts." in path), None)
    of_experts = [piece for piece in pieces if piece.path == experts]
    return [next(piece for piece in pieces if piece.path == smallest), *of_experts[len(of_experts) // 2 :][:1]]


def _compare(conversion: _Conversion, piece: Piece, found: np.ndarray) -> None:
    """Raises `OrbaxError` unless `found` has the same bits as the source of the piece."""
    flat, done = found.reshape(-1), 0
    for values in conversion.stream(piece):
        if flat[done : done + values.size].tobytes() != values.tobytes():
            raise OrbaxError(f"{orbax_version()} reads other values of {piece.path} than were written: {REMEDY}")
        done += values.size


def _description(checkpoint: HfCheckpoint, dtype: np.dtype | None) -> dict[str, Any]:
    """Returns what deepstack_jax.json says of the source; `export` needs `source` to restore the same files."""
    source = {"expert_layout": checkpoint.expert_layout, "dtype": checkpoint.dtype.name, "files": checkpoint.files}
    return {"dtype": (dtype or checkpoint.dtype).name, "source": source}


def _as_disk_error(error: OSError | OrbaxError, target: Path, nbytes: int) -> OSError:
    """Turns an error of the system or of Orbax into one that names a full disk, or the target."""
    if any(sign in str(error) for sign in ("No space left", "Disk quota exceeded", "File too large")):
        return _no_room(target, nbytes, shutil.disk_usage(target.parent).free)
    if isinstance(error, OSError):
        if error.filename is None and error.errno is not None:
            error.filename = str(target)
        return error
    return OSError(f"{target} could not be written ({error.first_line})")


def _no_room(target: Path, nbytes: int, free: int) -> OSError:
    needed, available = f"{nbytes / 1e9:.3g} GB", f"{free / 1e9:.3g} GB"
    return OSError(f"disk full: {target} needs {needed}, {available} are free: make room, or give another disk")


def _sync(directory: Path) -> None:
    """Forces everything in `directory` to disk, except for the weights, which already are there."""
    for parent, _, files in walk(directory):
        for name in files:
            if not name.startswith("c.") and not name.endswith(".safetensors"):
                _sync_one(Path(parent) / name)
        _sync_one(Path(parent))


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
