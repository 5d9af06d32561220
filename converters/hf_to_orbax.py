"""Converting a Hugging Face checkpoint to a directory that loads fast and sharded.

A few threads each read some rows, write them to a file and force it to disk, so that reading, writing and waiting for
the disk overlap, and the memory needed depends neither on the model nor on its largest tensor (an expert apart).
Everything goes into a hidden directory beside the target, which is renamed as the last step.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from deepstack_jax.checkpoints.direct_file import DirectFile
from deepstack_jax.checkpoints.hf_checkpoint import HfCheckpoint, open_checkpoint, warn_non_finite, warn_of_notes
from deepstack_jax.checkpoints.mapping import Parameter
from deepstack_jax.checkpoints.orbax_checkpoint import (
    FORMAT_FILE,
    FORMAT_VERSION,
    Leaf,
    OrbaxError,
    Piece,
    create_arrays,
    file_sizes,
    place_arrays,
    save_tree,
)
from deepstack_jax.checkpoints.safetensors_file import CheckpointError, FiniteCheck, refuse_lfs_pointer
from deepstack_jax.config import ModelConfig, read_special_tokens
from deepstack_jax.config_values import read_json_object
from deepstack_jax.shipped import checkpoint_path

Progress = Callable[[int, int], None]
THREADS = 6  # more than cores: most of their time is waiting for the disk

# What stands beside the weights: the tokenizer's, the processor's and the generation's files.
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
)


def convert(
    hf_dir: str | Path,
    out_dir: str | Path,
    dtype: DTypeLike | None = None,
    expert_layout: str | None = None,
    progress: Progress | None = None,
) -> None:
    """Converts the Hugging Face checkpoint in `hf_dir` to a new directory `out_dir`.

    Args:
        hf_dir: safetensors, whole or in shards, with config.json.
        out_dir: must not exist, or be empty.
        dtype: float32 or bfloat16; None keeps the checkpoint's, and `export` then gives back the same bits. Where its
            tensors differ, it is the one that transformers takes.
        expert_layout: hf4 or hf5, where the shapes can't tell.
        progress: called with (bytes converted, bytes in all).

    Raises:
        CheckpointError: the checkpoint can't be converted; nothing is written.
        ConfigError: a JSON file of the directory is damaged or holds a wrong value; nothing is written.
        OSError: the directory exists or can't be written; nothing is left behind.

    Warns `NonFiniteWarning` for weights that hold NaN or infinity, and `CheckpointWarning` for what is read otherwise
    than it is stored.
    """
    hf_dir, out_dir = checkpoint_path(hf_dir), Path(out_dir).absolute()
    kept = None if dtype is None else np.dtype(dtype)
    if kept is not None and kept.name not in ("float32", "bfloat16"):
        raise CheckpointError(f"dtype {kept.name!r} is not supported: expected float32 or bfloat16")
    refuse_existing(out_dir)
    checkpoint = open_checkpoint(hf_dir, expert_layout=expert_layout)
    _check_companions(hf_dir, checkpoint.config)
    warn_of_notes(checkpoint, kept)
    leaves = {
        parameter.path: Leaf(parameter.shape, checkpoint.dtype if kept is None else kept)
        for parameter in checkpoint.parameters
    }
    total = sum(leaf.nbytes for leaf in leaves.values())
    with new_directory(out_dir, total) as directory:
        _write_arrays(directory, checkpoint, leaves, lambda done: progress and progress(done, total))
        copy_companions(hf_dir, directory)
        if kept is not None:
            set_config_dtype(directory / "config.json", kept.name)
        description = {**_description(checkpoint, kept), "params": file_sizes(directory)}
        (directory / FORMAT_FILE).write_text(json.dumps(description, indent=1) + "\n")


def refuse_existing(directory: Path) -> None:
    """Raises `FileExistsError` unless `directory` is absent or empty."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise FileExistsError(f"{directory} already exists and is not empty: give another directory")


@contextmanager
def new_directory(target: Path, nbytes: int) -> Iterator[Path]:
    """A directory to write `nbytes` into that becomes `target`, durably, when the block ends, or else disappears.

    What a killed process left is removed first. Raises `OSError` where the disk has no room, is full, or another
    process writes the same target.
    """
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
            _sync_one(target.parent)
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)
            raise
    finally:
        os.close(lock)


def copy_companions(source: Path, target: Path) -> None:
    """Copies the files of the tokenizer, the processor and the configuration that `source` has."""
    for file in _companions(source):
        shutil.copyfile(file, target / file.name)


def set_config_dtype(file: Path, dtype: str) -> None:
    """Makes a config.json name the dtype that the weights now have, wherever it names one."""
    config = json.loads(file.read_text())
    for part in (config, config.get("text_config"), config.get("vision_config")):
        for key in ("dtype", "torch_dtype"):
            if isinstance(part, dict) and key in part:
                part[key] = dtype
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def _companions(directory: Path) -> Iterator[Path]:
    for pattern in COMPANIONS:
        yield from (file for file in sorted(directory.glob(pattern)) if file.is_file())


def _check_companions(directory: Path, config: ModelConfig) -> None:
    """Raises `ConfigError` where a file that is copied beside the weights is damaged."""
    for file in _companions(directory):
        if file.suffix == ".json":
            read_json_object(file)
        else:
            refuse_lfs_pointer(file)
    read_special_tokens(directory, config)


def _write_arrays(
    directory: Path,
    checkpoint: HfCheckpoint,
    leaves: dict[str, Leaf],
    progress: Callable[[int], object],
) -> None:
    """Writes `directory/params`; calls `progress` with the bytes that are on disk."""
    parameters = {parameter.path: parameter for parameter in checkpoint.parameters}
    pieces = create_arrays(directory, leaves)
    done, warned = 0, set()
    with ThreadPoolExecutor(THREADS, "convert") as pool:
        writing = [pool.submit(_write_piece, checkpoint, parameters[p.path], p, leaves[p.path].dtype) for p in pieces]
        try:
            save_tree(directory, leaves)
            for piece, written in zip(pieces, writing, strict=True):
                nbytes, finite = written.result()
                if not finite and piece.path not in warned:
                    warned.add(piece.path)
                    warn_non_finite(checkpoint, parameters[piece.path])
                done += nbytes
                progress(done)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    place_arrays(directory, leaves)


def _write_piece(checkpoint: HfCheckpoint, parameter: Parameter, piece: Piece, dtype: np.dtype) -> tuple[int, bool]:
    """Writes one piece to disk; returns its bytes and whether all values are finite."""
    check, nbytes = FiniteCheck(), 0
    with DirectFile(piece.file) as file:
        for values in checkpoint.stream(parameter, piece.first, piece.count, dtype, check):
            file.write(values)
            nbytes += values.nbytes
    return nbytes, not check.failed


def _description(checkpoint: HfCheckpoint, dtype: np.dtype | None) -> dict[str, Any]:
    """What deepstack_jax.json says; `source` is what `export` needs to give back the same files."""
    source = {"expert_layout": checkpoint.expert_layout, "dtype": checkpoint.dtype.name, "files": checkpoint.files}
    return {"format_version": FORMAT_VERSION, "dtype": (dtype or checkpoint.dtype).name, "source": source}


def _as_disk_error(error: OSError | OrbaxError, target: Path, nbytes: int) -> OSError:
    """Finds a full disk behind what the system or Orbax said."""
    if any(sign in str(error) for sign in ("No space left", "Disk quota exceeded", "File too large")):
        return _no_room(target, nbytes, shutil.disk_usage(target.parent).free)
    if isinstance(error, OSError):
        return error
    return OSError(f"{target} could not be written ({error.first_line})")


def _no_room(target: Path, nbytes: int, free: int) -> OSError:
    needed, available = f"{nbytes / 1e9:.3g} GB", f"{free / 1e9:.3g} GB"
    return OSError(f"disk full: {target} needs {needed}, {available} are free: make room, or give another disk")


def _sync(directory: Path) -> None:
    """Forces to disk what is below `directory`, but for weights, which are there already."""
    for parent, _, files in os.walk(directory):
        for name in files:
            if not name.startswith("c.") and not name.endswith(".safetensors"):
                _sync_one(Path(parent) / name)
        _sync_one(Path(parent))


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
