"""Reads a converted checkpoint: one Orbax tree of parameters in `params/`, beside the tokenizer and config files.

The tree's keys are the parameters' dotted paths, split at the dots. `orbax_writer.py` writes the tree.
"""

import gc
import json
import logging
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from numpy.typing import DTypeLike

from deepstack_jax.checkpoints.mapping import canonical_shapes
from deepstack_jax.checkpoints.safetensors_file import DTYPES, CheckpointError, CheckpointWarning
from deepstack_jax.config import ModelConfig

FORMAT_FILE = "deepstack_jax.json"
PARAMS = "params"
FORMAT_VERSION = 2
GROUP_BYTES = 256 << 20  # arrays that one Orbax call reads, because each call costs about 50 ms
_Keys = tuple[str, ...]


class OrbaxError(RuntimeError):
    """An error of Orbax, or wrong values that it read back; the message may have many lines."""

    @property
    def first_line(self) -> str:
        return str(self).strip().splitlines()[0][:200]


def read_format(directory: str | Path) -> dict[str, Any]:
    """Returns the contents of deepstack_jax.json; raises `CheckpointError` if that is missing, damaged or outdated."""
    file = Path(directory) / FORMAT_FILE
    try:
        found = json.loads(file.read_text())
        number = found["format_version"]
    except FileNotFoundError:
        raise CheckpointError(
            f"{directory} has no {FORMAT_FILE}: give a directory made by deepstack-jax convert"
        ) from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise CheckpointError(f"{file} is damaged: convert the checkpoint again") from None
    if number != FORMAT_VERSION:
        raise CheckpointError(
            f"{file} has format_version {number}, expected {FORMAT_VERSION}: convert again, or update deepstack-jax"
        )
    return found


def check_files(directory: str | Path) -> None:
    """Raises `CheckpointError` unless every file of `directory/params` has the length it was written with."""
    root = Path(directory) / PARAMS
    sizes = read_format(directory).get("params") or {}
    if not isinstance(sizes, dict):
        raise CheckpointError(f"{Path(directory) / FORMAT_FILE} is damaged: convert the checkpoint again")
    for name, expected in sizes.items():
        file = root / name
        size = file.stat().st_size if file.is_file() else None
        if size != expected:
            found = "is missing" if size is None else f"has {size} bytes, expected {expected}"
            raise CheckpointError(f"{file} {found}: the checkpoint is incomplete or damaged, convert again")


def file_sizes(directory: Path) -> dict[str, int]:
    """Returns the bytes of every file in `directory/params` by its path in there, as `check_files` expects them."""
    root = directory / PARAMS
    return {str(file.relative_to(root)): file.stat().st_size for file in sorted(root.rglob("*")) if file.is_file()}


class Leaf(NamedTuple):
    """Shape and dtype of a stored array."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


def stored_params(directory: str | Path) -> dict[str, Leaf]:
    """Returns shape and dtype of every parameter in `directory/params` by dotted path; raises `CheckpointError`."""
    check_files(directory)
    return _guarded(directory, lambda: load_leaves(directory))


def load_leaves(directory: str | Path) -> dict[str, Leaf]:
    """Returns shape and dtype of every array in `directory/params` by dotted path; raises Orbax's errors."""
    from orbax.checkpoint import v1 as ocp

    tree = ocp.metadata(params_path(directory)).metadata
    return {path: Leaf(tuple(leaf.shape), np.dtype(leaf.dtype)) for path, leaf in _flat(tree)}


def restore_params(
    directory: str | Path,
    config: ModelConfig,
    dtype: DTypeLike | None = None,
    prefixes: Sequence[str] | None = None,
    shardings: Mapping[str, jax.sharding.Sharding] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, jax.Array]:
    """Restores the parameters of a converted checkpoint by dotted path, each straight into its sharding.

    Args:
        directory: a directory made by `convert`.
        config: the model that the parameters must fit.
        dtype: converts while reading; None keeps the stored dtype, or takes config.json's if parameters differ.
        prefixes: restores only the paths that start with one of them, such as `("visual.",)`.
        shardings: by dotted path; None places everything on the first device.
        progress: called with (bytes restored, total bytes).

    Raises:
        CheckpointError: `directory` is not a converted checkpoint, is damaged, or holds a different model.
    """
    import jax

    stored = stored_params(directory)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    if dtype is None:
        dtype = _one_dtype(directory, config, stored)
    wanted: dict[str, jax.ShapeDtypeStruct] = {}
    for path, shape in canonical_shapes(config).items():
        if prefixes is not None and not path.startswith(tuple(prefixes)):
            continue
        if path not in stored or stored[path].shape != shape:
            found = list(stored[path].shape) if path in stored else "nothing"
            raise CheckpointError(
                f"{params_path(directory)} holds {found} for {path}, expected {list(shape)}: "
                "its config.json describes another model"
            )
        wanted[path] = jax.ShapeDtypeStruct(shape, np.dtype(dtype), sharding=shardings[path] if shardings else device)
    nbytes = {path: Leaf(leaf.shape, leaf.dtype).nbytes for path, leaf in wanted.items()}
    restored: dict[str, jax.Array] = {}
    done = 0
    for group in groups_of(nbytes):
        restored |= _load(directory, {path: wanted[path] for path in group})
        done += sum(nbytes[path] for path in group)
        if progress:
            progress(done, sum(nbytes.values()))
    return restored


def _one_dtype(directory: str | Path, config: ModelConfig, stored: Mapping[str, Leaf]) -> np.dtype:
    """Returns the dtype of the parameters. If an old conversion kept several, config.json's or the most common."""
    counts = Counter(stored[path].dtype for path in canonical_shapes(config) if path in stored)
    if len(counts) < 2:
        return next(iter(counts), np.dtype(np.float32))
    dtype = next((dtype for dtype in DTYPES.values() if dtype.name == config.dtype), counts.most_common(1)[0][0])
    listed = ", ".join(sorted(kind.name for kind in counts))
    message = f"{directory}: parameters have different dtypes ({listed}): all are read as {dtype.name}"
    warnings.warn(message, CheckpointWarning, stacklevel=4)
    return dtype


def read_orbax_params(directory: str | Path, paths: Sequence[str] | None = None) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (dotted path, numpy array) of a converted checkpoint in the order of `paths` (by default, as stored).

    Raises `CheckpointError` if the directory is not a converted checkpoint or is damaged.
    """
    stored = stored_params(directory)
    wanted = {path: stored[path] for path in (paths if paths is not None else stored)}
    for group in groups_of({path: leaf.nbytes for path, leaf in wanted.items()}):
        # np.empty takes no memory until it is written to, and Orbax reads only its type, shape and dtype
        loaded = _load(directory, {path: np.empty(wanted[path].shape, wanted[path].dtype) for path in group})
        for path in group:
            yield path, loaded.pop(path)


def groups_of(nbytes: Mapping[str, int]) -> Iterator[list[str]]:
    """Yields paths (path -> bytes) in order in groups of at most `GROUP_BYTES`; a larger array is its own group."""
    group: list[str] = []
    held = 0
    for path, size in nbytes.items():
        if group and held + size > GROUP_BYTES:
            yield group
            group, held = [], 0
        group.append(path)
        held += size
    if group:
        yield group


def _load(directory: str | Path, abstract: Mapping[str, Any]) -> dict[str, Any]:
    return _guarded(directory, lambda: load_arrays(directory, abstract))


def load_arrays(directory: str | Path, abstract: Mapping[str, Any]) -> dict[str, Any]:
    """Loads the arrays at the paths of `abstract` through Orbax, each as its kind there; raises Orbax's errors."""
    from orbax.checkpoint import v1 as ocp

    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with context:
        loaded = dict(_flat(ocp.load(params_path(directory), nested(abstract))))
    return {path: loaded[path] for path in abstract}


def _guarded[T](directory: str | Path, read: Callable[[], T]) -> T:
    """Returns the result of `read`; raises a `CheckpointError` that names the checkpoint to convert again."""
    try:
        return call_orbax(read)
    except OrbaxError as error:
        message = f"{params_path(directory)} is incomplete or damaged ({error.first_line}): convert again"
        raise CheckpointError(message) from None


def call_orbax[T](function: Callable[[], T]) -> T:
    """Returns the result of `function`; turns Orbax's many error types into `OrbaxError` and keeps stderr quiet."""
    with _quiet():
        try:
            return function()
        except MemoryError:
            raise
        except Exception as error:
            failure = OrbaxError(f"{type(error).__name__}: {error}")
        gc.collect()  # other arrays that failed complain when they are collected: do it while that is silenced
        raise failure


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Orbax from printing tracebacks of errors that are raised here."""
    loggers, before = [logging.getLogger(name) for name in ("absl", "asyncio")], sys.unraisablehook
    disabled = [logger.disabled for logger in loggers]

    def ignore_late(late: Any) -> None:
        if str(late.exc_value) != "Event loop is closed":
            before(late)

    for logger in loggers:
        logger.disabled = True
    sys.unraisablehook = ignore_late
    try:
        yield
        # the hook stays after a failure, because arrays written concurrently still report to a loop that is closed
        sys.unraisablehook = before
    finally:
        for logger, value in zip(loggers, disabled, strict=True):
            logger.disabled = value


def params_path(directory: str | Path) -> str:
    """Returns the absolute path of the Orbax tree in `directory`."""
    return str(Path(directory).absolute() / PARAMS)


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Turns dotted paths into nested dictionaries."""
    root: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split(".")
        node = root
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return root


def _flat(tree: Any, prefix: _Keys = ()) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _flat(value, (*prefix, str(key)))
    else:
        yield ".".join(prefix), tree
