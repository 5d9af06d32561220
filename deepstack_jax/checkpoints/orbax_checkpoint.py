"""Reads a converted checkpoint: one Orbax tree of parameters in `params/`, beside the tokenizer and config files.

The tree's keys are the parameters' dotted paths, split at the dots. `orbax_writer.py` writes the tree.
"""

import gc
import logging
import re
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

from deepstack_jax.checkpoints.hf_folder import refuse_larger_model
from deepstack_jax.checkpoints.manifest import PARAMS, Manifest, read_manifest
from deepstack_jax.checkpoints.mapping import canonical_shapes
from deepstack_jax.checkpoints.safetensors_file import DTYPES, CheckpointError, CheckpointWarning
from deepstack_jax.config import ModelConfig
from deepstack_jax.config_values import read_json_object
from deepstack_jax.errors import short, shortage
from deepstack_jax.sharding import bytes_held_here

GROUP_BYTES = 256 << 20  # arrays that one Orbax call reads, because each call costs about 50 ms
_Keys = tuple[str, ...]


class OrbaxError(RuntimeError):
    """An error of Orbax, or wrong values that it read back; the message may have many lines."""

    @property
    def first_line(self) -> str:
        # without the folders of files, which would leave no room for the cause behind them
        return re.sub(r"(?:/[^/\s\":]+)+/", "", str(self).strip().splitlines()[0])[:200]


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
    return _stored_params(read_manifest(directory))


def _stored_params(manifest: Manifest) -> dict[str, Leaf]:
    manifest.check_tree()
    stored = _guarded(manifest, lambda: load_leaves(manifest.directory))
    for path, names in manifest.pieces.items():
        _check_pieces(manifest, path, stored.get(path), names)
    return stored


def _check_pieces(manifest: Manifest, path: str, leaf: Leaf | None, names: Sequence[str]) -> None:
    """Raises `CheckpointError` unless an array's metadata, its files and Orbax's tree agree on what it holds."""
    file = (manifest.directory / names[0]).parent / "zarr.json"
    if leaf is None or leaf.shape[0] % len(names):
        raise CheckpointError(f"{file.parent} holds {len(names)} pieces of {leaf}: convert again")
    expected = zarr_metadata(leaf, leaf.shape[0] // len(names))
    found = read_json_object(file)
    for key in {**found, **expected}.keys() - {"attributes"}:
        if (value := found.get(key)) != (wanted := expected.get(key)):
            raise CheckpointError(f"{file} has {key} {short(value)}, expected {short(wanted)}: convert again")
    for name in names:
        if (size := manifest.files[name][0]) * len(names) != leaf.nbytes:
            raise CheckpointError(
                f"{manifest.directory / name} has {size} bytes, expected {leaf.nbytes // len(names)}: convert again"
            )


def zarr_metadata(leaf: Leaf, rows: int) -> dict[str, object]:
    """Returns the Zarr metadata of an array in pieces of `rows` rows."""
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(leaf.shape),
        "data_type": leaf.dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [rows, *leaf.shape[1:]]}},
        # flat names, so that no piece needs a directory of its own
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": 0.0,
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
    }


def check_model(
    directory: str | Path, config: ModelConfig, stored: Mapping[str, Leaf], prefixes: Sequence[str] | None = None
) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the parameters of `config` by dotted path, or of those that start with one of `prefixes`.

    Raises `CheckpointError` unless the stored parameters of `directory` have these shapes.
    """
    refuse_larger_model(Path(directory), config, len(stored))
    shapes = {
        path: shape
        for path, shape in canonical_shapes(config).items()
        if prefixes is None or path.startswith(tuple(prefixes))
    }
    for path, shape in shapes.items():
        if path not in stored or stored[path].shape != shape:
            found = list(stored[path].shape) if path in stored else "nothing"
            raise CheckpointError(
                f"{params_path(directory)} holds {found} for {path}, expected {list(shape)}: "
                "its config.json describes another model"
            )
    return shapes


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
        progress: called with (bytes restored, total bytes), of what this process's devices hold.

    Raises:
        CheckpointError: `directory` is not a converted checkpoint, is damaged, or holds a different model.
    """
    import jax

    manifest = read_manifest(directory)
    stored = _stored_params(manifest)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = check_model(directory, config, stored, prefixes)
    if dtype is None:
        dtype = _one_dtype(directory, config, stored)
    wanted = {
        path: jax.ShapeDtypeStruct(shape, np.dtype(dtype), sharding=shardings[path] if shardings else device)
        for path, shape in shapes.items()
    }
    nbytes = {path: Leaf(leaf.shape, leaf.dtype).nbytes for path, leaf in wanted.items()}
    held = {path: bytes_held_here(leaf, leaf.sharding) for path, leaf in wanted.items()}
    restored: dict[str, jax.Array] = {}
    done = 0
    for group in groups_of(nbytes):
        restored |= _load(manifest, {path: wanted[path] for path in group})
        done += sum(held[path] for path in group)
        if progress:
            progress(done, sum(held.values()))
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
    manifest = read_manifest(directory)
    stored = _stored_params(manifest)
    wanted = {path: stored[path] for path in (paths if paths is not None else stored)}
    for group in groups_of({path: leaf.nbytes for path, leaf in wanted.items()}):
        # np.empty takes no memory until it is written to, and Orbax reads only its type, shape and dtype
        loaded = _load(manifest, {path: np.empty(wanted[path].shape, wanted[path].dtype) for path in group})
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


def _load(manifest: Manifest, abstract: Mapping[str, Any]) -> dict[str, Any]:
    pieces = [
        name
        for path, leaf in abstract.items()
        for name in manifest.pieces_held(path, leaf.shape, getattr(leaf, "sharding", None))
    ]
    loaded = _guarded(manifest, lambda: load_arrays(manifest.directory, abstract), pieces)
    # after Orbax, which reads a cold disk faster: the files are then in the page cache
    manifest.check(pieces)
    return loaded


def load_arrays(directory: str | Path, abstract: Mapping[str, Any]) -> dict[str, Any]:
    """Loads the arrays at the paths of `abstract` through Orbax, each as its kind there; raises Orbax's errors."""
    from orbax.checkpoint import v1 as ocp

    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with context:
        loaded = dict(_flat(ocp.load(params_path(directory), nested(abstract))))
    return {path: loaded[path] for path in abstract}


def _guarded[T](manifest: Manifest, read: Callable[[], T], pieces: Sequence[str] = ()) -> T:
    """Returns the result of `read`, which reads the tree and `pieces`.

    Raises:
        CheckpointError, OSError: it names the file that is damaged or can't be read. Orbax takes some of them for
            missing ones.
    """
    try:
        return call_orbax(read)
    except OrbaxError as error:
        message = f"{params_path(manifest.directory)} can't be read ({error.first_line}): try again, or convert again"
        failure = CheckpointError(message)
    manifest.check_tree()
    manifest.check(pieces)
    raise failure


def call_orbax[T](function: Callable[[], T]) -> T:
    """Returns the result of `function`; turns Orbax's many error types into `OrbaxError` and keeps stderr quiet.

    An error of the process itself, which lacks memory, threads or descriptors, is raised as it is.
    """
    with _quiet():
        try:
            return function()
        except Exception as error:
            failure = error if shortage(error) else OrbaxError(f"{type(error).__name__}: {error}")
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
