"""A converted checkpoint: the parameters as one Orbax tree in `params/`, beside the files of the tokenizer and so on.

The tree's keys are the parameters' dotted paths, split at the dots. Arrays are stored in their canonical shape,
without compression: random-looking weights compress by a few percent and at a third of a disk's speed.
"""

import gc
import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike
from orbax.checkpoint import v1 as ocp

from converters.mapping import canonical_shapes
from converters.safetensors_file import CheckpointError
from deepstack_jax.config import ModelConfig

FORMAT_FILE = "deepstack_jax.json"
PARAMS = "params"
FORMAT_VERSION = 1
GROUP_BYTES = 256 << 20  # small arrays go through Orbax together: a call costs a twentieth of a second
_Keys = tuple[str, ...]


class OrbaxError(RuntimeError):
    """What Orbax said, in as many lines as it liked."""

    @property
    def first_line(self) -> str:
        return str(self).strip().splitlines()[0][:200]


def read_format(directory: str | Path) -> dict[str, Any]:
    """The contents of a converted checkpoint's deepstack_jax.json; raises `CheckpointError` where it is none."""
    file = Path(directory) / FORMAT_FILE
    try:
        found = json.loads(file.read_text())
        version = found["format_version"]
    except FileNotFoundError:
        raise CheckpointError(
            f"{directory} has no {FORMAT_FILE}: give a directory made by deepstack-jax convert"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        raise CheckpointError(f"{file} is damaged: convert the checkpoint again") from None
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{file} has format_version {version}, expected {FORMAT_VERSION}: convert again, or update deepstack-jax"
        )
    return found


def check_files(directory: str | Path) -> None:
    """Checks that every file of `directory/params` has the length it was written with; raises `CheckpointError`."""
    root = Path(directory) / PARAMS
    for name, expected in read_format(directory).get("params", {}).items():
        file = root / name
        size = file.stat().st_size if file.is_file() else None
        if size != expected:
            found = "is missing" if size is None else f"has {size} bytes, expected {expected}"
            raise CheckpointError(f"{file} {found}: the checkpoint is incomplete or damaged, convert again")


def file_sizes(directory: Path) -> dict[str, int]:
    """Length of every file of `directory/params`, by its path below there: what `check_files` looks for."""
    root = directory / PARAMS
    return {str(file.relative_to(root)): file.stat().st_size for file in sorted(root.rglob("*")) if file.is_file()}


def save_params(directory: Path, groups: Iterable[Mapping[str, np.ndarray]]) -> None:
    """Writes `directory/params` from groups of (dotted path -> array), without copying them.

    Orbax is done with a group when the next one is asked for. Raises `OrbaxError` where writing fails.
    """
    context = ocp.Context()
    context.array.saving.use_compression = False
    context.memory.deepcopy_host_arrays = False  # nobody writes to the arrays meanwhile
    with context:
        for group in groups:
            tree = _nested(group)
            _call(lambda: ocp.partial.save(_params(directory), tree))  # noqa: B023 (called at once)
            del group, tree
        _call(lambda: ocp.partial.finalize(_params(directory)))


def stored_params(directory: str | Path) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every parameter that `directory/params` holds, by dotted path."""
    check_files(directory)

    def read() -> dict[str, jax.ShapeDtypeStruct]:
        tree = ocp.metadata(_params(directory)).metadata
        return {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in _flat(tree)}

    return _guarded(directory, read)


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
        directory: made by `convert`.
        config: what the parameters must fit.
        dtype: converts while reading; None keeps what is stored.
        prefixes: limits to the paths that start with one of them, such as `("visual.",)`.
        shardings: by dotted path; None places everything on the default device.
        progress: called with (bytes restored, bytes in all).

    Raises:
        CheckpointError: no converted checkpoint, damaged, or of another model than `config`'s.
    """
    stored = stored_params(directory)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted: dict[str, jax.ShapeDtypeStruct] = {}
    for path, shape in canonical_shapes(config).items():
        if prefixes is not None and not path.startswith(tuple(prefixes)):
            continue
        if path not in stored or stored[path].shape != shape:
            found = list(stored[path].shape) if path in stored else "nothing"
            raise CheckpointError(
                f"{_params(directory)} holds {found} for {path}, expected {list(shape)}: "
                "the config.json is of another model"
            )
        kept = stored[path].dtype if dtype is None else np.dtype(dtype)
        wanted[path] = jax.ShapeDtypeStruct(shape, kept, sharding=shardings[path] if shardings else device)
    restored: dict[str, jax.Array] = {}
    total, done = sum(_nbytes(leaf) for leaf in wanted.values()), 0
    for group in group_by_bytes(wanted.items(), {path: _nbytes(leaf) for path, leaf in wanted.items()}):
        restored |= _load(directory, group)
        done += sum(_nbytes(leaf) for leaf in group.values())
        if progress:
            progress(done, total)
    return restored


def read_orbax_params(directory: str | Path, paths: Sequence[str] | None = None) -> Iterator[tuple[str, np.ndarray]]:
    """Reads a converted checkpoint as (dotted path, numpy array) in the order of `paths` (by default, as stored)."""
    stored = stored_params(directory)
    wanted = {path: stored[path] for path in (paths if paths is not None else stored)}
    for group in group_by_bytes(wanted.items(), {path: _nbytes(leaf) for path, leaf in wanted.items()}):
        # an empty array costs no memory before it is written to: Orbax only looks at its type, shape and dtype
        loaded = _load(directory, {path: np.empty(leaf.shape, leaf.dtype) for path, leaf in group.items()})
        for path in list(loaded):
            yield path, loaded.pop(path)


def group_by_bytes[T](
    items: Iterable[tuple[str, T]], nbytes: Mapping[str, int], limit: int = GROUP_BYTES
) -> Iterator[dict[str, T]]:
    """Gathers items in order into groups of at most `limit` bytes; what is larger stands alone."""
    group: dict[str, T] = {}
    held = 0
    for path, item in items:
        if group and held + nbytes[path] > limit:
            yield group
            group, held = {}, 0
        group[path] = item
        del item
        held += nbytes[path]
    if group:
        yield group


def _load(directory: str | Path, abstract: Mapping[str, Any]) -> dict[str, Any]:
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with context:
        loaded = dict(_flat(_guarded(directory, lambda: ocp.load(_params(directory), _nested(abstract)))))
    return {path: loaded[path] for path in abstract}


def _guarded[T](directory: str | Path, read: Callable[[], T]) -> T:
    """What `read` returns; its errors tell which checkpoint to convert again."""
    try:
        return _call(read)
    except OrbaxError as error:
        message = f"{_params(directory)} is incomplete or damaged ({error.first_line}): convert again"
        raise CheckpointError(message) from None


def _call[T](function: Callable[[], T]) -> T:
    """What `function` returns; turns Orbax's many kinds of errors into one and says nothing on stderr."""
    with _quiet():
        try:
            return function()
        except MemoryError:
            raise
        except Exception as error:
            failure = OrbaxError(f"{type(error).__name__}: {error}")
        gc.collect()  # arrays that failed beside it complain when they are collected: here, where nobody hears it
        raise failure


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps what fails inside Orbax from being told twice: as an error here, and with tracebacks on stderr."""
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
        # left in place after a failure: arrays written beside the failed one report to a loop that is gone by then
        sys.unraisablehook = before
    finally:
        for logger, value in zip(loggers, disabled, strict=True):
            logger.disabled = value


def _params(directory: str | Path) -> str:
    return str(Path(directory).absolute() / PARAMS)


def _nbytes(leaf: jax.ShapeDtypeStruct) -> int:
    return leaf.size * leaf.dtype.itemsize


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
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
