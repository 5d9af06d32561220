"""Converting a Hugging Face checkpoint to a directory that loads fast and sharded.

The next group of parameters is read while the last one is written, so two groups are in memory: at most twice the
largest parameter. Everything is written into a hidden directory beside the target, which is renamed as the last step.
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

from converters.hf_checkpoint import HfCheckpoint, open_checkpoint, warn_non_finite
from converters.mapping import Parameter
from converters.orbax_checkpoint import (
    FORMAT_FILE,
    FORMAT_VERSION,
    GROUP_BYTES,
    OrbaxError,
    file_sizes,
    group_by_bytes,
    save_params,
)
from converters.safetensors_file import CheckpointError, FiniteCheck

Progress = Callable[[int, int], None]
_ALIGNMENT = 64  # of arrays within a buffer, in bytes

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
        dtype: float32 or bfloat16; None keeps each tensor's own, and `export` then gives back the same bits.
        expert_layout: hf4 or hf5, where the shapes can't tell.
        progress: called with (bytes converted, bytes in all).

    Raises:
        CheckpointError: the checkpoint can't be converted; nothing is written.
        OSError: the directory exists or can't be written; nothing is left behind.

    Warns `NonFiniteWarning` for weights that hold NaN or infinity.
    """
    hf_dir, out_dir = Path(hf_dir), Path(out_dir).absolute()
    kept = None if dtype is None else np.dtype(dtype)
    if kept is not None and kept.name not in ("float32", "bfloat16"):
        raise CheckpointError(f"dtype {kept.name!r} is not supported: expected float32 or bfloat16")
    refuse_existing(out_dir)
    checkpoint = open_checkpoint(hf_dir, expert_layout=expert_layout)
    nbytes = {p.path: p.size * (kept or checkpoint.dtype_of(p)).itemsize for p in checkpoint.parameters}
    with new_directory(out_dir, sum(nbytes.values())) as directory:
        with ThreadPoolExecutor(1, "read") as reader:
            save_params(directory, _read_ahead(reader, checkpoint, kept, nbytes, progress))
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
    for pattern in COMPANIONS:
        for file in sorted(source.glob(pattern)):
            if file.is_file():
                shutil.copyfile(file, target / file.name)


def set_config_dtype(file: Path, dtype: str) -> None:
    """Makes a config.json name the dtype that the weights now have, wherever it names one."""
    config = json.loads(file.read_text())
    for part in (config, config.get("text_config"), config.get("vision_config")):
        for key in ("dtype", "torch_dtype"):
            if isinstance(part, dict) and key in part:
                part[key] = dtype
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def _read_ahead(
    reader: ThreadPoolExecutor,
    checkpoint: HfCheckpoint,
    dtype: np.dtype | None,
    nbytes: dict[str, int],
    progress: Progress | None,
) -> Iterator[dict[str, np.ndarray]]:
    """Groups of parameters; the next one is read while the caller works on the last, valid until it asks again."""

    def read(group: dict[str, Parameter], memory: np.ndarray) -> tuple[dict[str, np.ndarray], list[Parameter]]:
        values, not_finite, start = {}, [], 0
        for path, parameter in group.items():
            check = FiniteCheck()
            out = memory[start : start + nbytes[path]].view(dtype or checkpoint.dtype_of(parameter))
            values[path] = checkpoint.read(parameter, out=out.reshape(parameter.shape), inspect=check)
            if check.failed:
                not_finite.append(parameter)
            start += -(-nbytes[path] // _ALIGNMENT) * _ALIGNMENT
        return values, not_finite

    total, done = sum(nbytes.values()), 0
    # groups as large as the largest parameter need no more memory than it does
    limit = max(GROUP_BYTES, *nbytes.values())
    groups = list(group_by_bytes(((p.path, p) for p in checkpoint.parameters), nbytes, limit))
    # Two buffers in turn: touching fresh memory for each group would cost as much as writing it.
    size = max(sum(nbytes[path] + _ALIGNMENT for path in group) for group in groups)
    buffers = [np.empty(size, np.uint8) for _ in groups[:2]]
    reading = reader.submit(read, groups[0], buffers[0])
    for i, group in enumerate(groups):
        values, not_finite = reading.result()
        if i + 1 < len(groups):
            reading = reader.submit(read, groups[i + 1], buffers[(i + 1) % 2])
        for parameter in not_finite:
            warn_non_finite(checkpoint, parameter)
        yield values
        done += sum(nbytes[path] for path in group)
        if progress:
            progress(done, total)


def _description(checkpoint: HfCheckpoint, dtype: np.dtype | None) -> dict[str, Any]:
    """What deepstack_jax.json says; `source` is what `export` needs to give back the same files."""
    dtypes = {p.path: checkpoint.dtype_of(p).name for p in checkpoint.parameters}
    kinds = sorted(set(dtypes.values()), key=list(dtypes.values()).count)
    source: dict[str, Any] = {"expert_layout": checkpoint.expert_layout, "dtype": kinds[-1], "files": checkpoint.files}
    if len(kinds) > 1:
        source["other_dtypes"] = {path: kind for path, kind in dtypes.items() if kind != kinds[-1]}
    return {"format_version": FORMAT_VERSION, "dtype": dtype.name if dtype else kinds[-1], "source": source}


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
    """Forces every file and directory below `directory` to disk."""
    for parent, _, files in os.walk(directory):
        for name in files:
            _sync_one(Path(parent) / name)
        _sync_one(Path(parent))


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
