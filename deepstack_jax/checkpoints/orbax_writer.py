"""Writes the parameters of a converted checkpoint as one Orbax tree, one piece of an array at a time.

Orbax takes only whole arrays, and an array of experts has gigabytes. Therefore Orbax writes the tree with a one-value
stand-in for each array; this module writes the arrays beside the tree and moves them to the places of the stand-ins.
They are Zarr (version 3) without compression, like Orbax's own, but in pieces: a piece is a file of some rows, such as
an expert or a part of a large matrix. A device then reads only what it holds, pieces are written and forced to disk
concurrently, and a conversion needs memory for only a few of them.

If Orbax lays out a tree differently than expected (`layout_difference`), it writes the whole arrays itself. In both
cases Orbax must read back a sample of what was written.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np

from deepstack_jax.checkpoints.manifest import PARAMS
from deepstack_jax.checkpoints.orbax_checkpoint import (
    Leaf,
    OrbaxError,
    call_orbax,
    load_arrays,
    load_leaves,
    nested,
    params_path,
    zarr_metadata,
)

PIECE_BYTES = 32 << 20
SMALLEST_EXPERT = 1 << 20  # bytes; smaller experts share pieces
REMEDY = "check the disk, or install orbax-checkpoint 0.12.8, and convert again"
ARRAY_OPTIONS = {"use_compression": False, "use_ocdbt": False}  # Orbax's options for saving
_STAGE, _SAMPLE, _STATE, _ZARR, _CHUNKS = "arrays", "sample", "state", "zarr.json", "c"
_TREE = "_METADATA"  # Orbax's file beside the arrays
_COMMITTED = "commit_success.txt"
_TOP = {"_CHECKPOINT_METADATA", "orbax.checkpoint", _COMMITTED, _STATE}


@dataclass(frozen=True)
class Piece:
    """`count` rows of the first axis of parameter `path`, from row `first`; the file `name` holds only these rows."""

    path: str
    first: int
    count: int
    name: str

    def staged(self, directory: Path) -> Path:
        """Returns the file to create with the rows' values, little-endian in C order."""
        return directory / _STAGE / self.path / self.name

    @property
    def placed(self) -> str:
        """The path of that file in the finished checkpoint."""
        return f"{PARAMS}/{_STATE}/{self.path}/{self.name}"


def create_arrays(directory: Path, leaves: Mapping[str, Leaf]) -> list[Piece]:
    """Creates empty arrays (dotted path -> shape and dtype) and returns the pieces that fill them."""
    pieces = []
    for path, leaf in leaves.items():
        array = directory / _STAGE / path
        array.mkdir(parents=True)
        rows = _rows_of_a_piece(path, leaf)
        (array / _ZARR).write_text(json.dumps(zarr_metadata(leaf, rows)))
        pieces += [
            Piece(path, first, rows, _chunk_name(first // rows, leaf)) for first in range(0, leaf.shape[0], rows)
        ]
    return pieces


def save_tree(directory: Path, leaves: Mapping[str, Leaf]) -> None:
    """Has Orbax write `directory/params` as a tree with one value in place of each array; raises `OrbaxError`."""
    from orbax.checkpoint import v1 as ocp

    stand_ins = nested({path: np.zeros(1, leaf.dtype) for path, leaf in leaves.items()})
    with _saving():
        call_orbax(lambda: ocp.save(params_path(directory), stand_ins))


def layout_difference(directory: Path, leaves: Mapping[str, Leaf]) -> str:
    """Returns how the tree that `save_tree` made differs from what `place_arrays` expects, or an empty string."""
    root = directory / PARAMS
    expected = {root: _TOP, root / _STATE: {*leaves, _TREE}}
    expected |= {root / _STATE / path: {_ZARR, _CHUNKS} for path in leaves}
    for folder, names in expected.items():
        found = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
        if lacking := names - found - {_COMMITTED}:  # only Orbax 0.12.3 and later write this marker
            return f"{folder.relative_to(directory)} lacks {min(lacking)}"
        if other := found - names:
            return f"{folder.relative_to(directory)} holds {min(other)}"
    return ""


def place_arrays(directory: Path, leaves: Mapping[str, Leaf]) -> None:
    """Moves the written arrays into the tree that `save_tree` made."""
    for path in leaves:
        place = directory / PARAMS / _STATE / path
        shutil.rmtree(place)
        os.rename(directory / _STAGE / path, place)
    (directory / _STAGE).rmdir()


def save_groups(directory: Path, groups: Iterable[Mapping[str, np.ndarray]]) -> None:
    """Has Orbax rewrite `directory/params` from whole arrays by dotted path, one group at a time."""
    from orbax.checkpoint import v1 as ocp

    for left in (PARAMS, _STAGE):
        shutil.rmtree(directory / left)
    with _saving():
        for group in groups:
            call_orbax(partial(ocp.partial.save, params_path(directory), nested(group)))
        call_orbax(lambda: ocp.partial.finalize(params_path(directory)))


def check_tree(directory: Path, leaves: Mapping[str, Leaf]) -> None:
    """Raises `OrbaxError` unless Orbax finds every array in the tree with its shape and dtype."""
    found = call_orbax(lambda: load_leaves(directory))
    if wrong := [path for path, leaf in leaves.items() if found.get(path) != leaf]:
        path = wrong[0]
        raise OrbaxError(f"{orbax_version()} finds {found.get(path)} at {path}, expected {leaves[path]}: {REMEDY}")


def read_back(directory: Path, piece: Piece, leaf: Leaf) -> np.ndarray:
    """Returns a piece of `directory/params` as Orbax reads it, an array `[piece.count, ...]`; raises `OrbaxError`.

    Orbax reads only whole arrays, so it is given a copy of the tree in which the piece is the whole array.
    """
    sample = directory / _SAMPLE
    array, shown = directory / PARAMS / _STATE / piece.path, sample / PARAMS / _STATE / piece.path
    try:
        shutil.copytree(directory / PARAMS, sample / PARAMS, ignore=_arrays)
    except shutil.Error as error:  # it lists (source, target, reason) of all files
        ((_, _, reason), *_) = error.args[0]
        raise OSError(reason) from None
    try:
        shown.mkdir()
        window = Leaf((piece.count, *leaf.shape[1:]), leaf.dtype)
        (shown / _ZARR).write_text(json.dumps(json.loads((array / _ZARR).read_text()) | {"shape": list(window.shape)}))
        shutil.copyfile(array / piece.name, shown / _chunk_name(0, leaf))
        return load_whole(sample, piece.path, window)
    finally:
        shutil.rmtree(sample)


def load_whole(directory: Path, path: str, leaf: Leaf) -> np.ndarray:
    """Returns the array at a dotted path of `directory/params` as Orbax reads it; raises `OrbaxError`."""
    return call_orbax(lambda: load_arrays(directory, {path: np.empty(leaf.shape, leaf.dtype)}))[path]


def mark_committed(directory: Path) -> None:
    """Rewrites Orbax's commit marker, if there is one, because it names a directory that will no longer exist."""
    mark = directory / PARAMS / _COMMITTED
    if mark.exists():
        mark.write_text("Checkpoint commit was successful\n")


def orbax_version() -> str:
    """Returns the installed version, for messages."""
    return f"Orbax {version('orbax-checkpoint')}"


@contextmanager
def _saving() -> Iterator[None]:
    """Has Orbax save with `ARRAY_OPTIONS`."""
    from orbax.checkpoint import v1 as ocp

    context = ocp.Context()
    for option, value in ARRAY_OPTIONS.items():
        setattr(context.array.saving, option, value)
    with context:
        yield


def _arrays(folder: str, names: list[str]) -> list[str]:
    """Returns the entries of a folder of the tree that are arrays."""
    return [name for name in names if (Path(folder) / name / _ZARR).exists()]


def _chunk_name(number: int, leaf: Leaf) -> str:
    return ".".join([_CHUNKS, str(number), *["0"] * (len(leaf.shape) - 1)])


def _rows_of_a_piece(path: str, leaf: Leaf) -> int:
    """Returns how many rows of the first axis one file holds: a divisor of their number."""
    rows = leaf.shape[0]
    if ".experts." in path and leaf.nbytes // rows >= SMALLEST_EXPERT:
        return 1
    most = max(1, PIECE_BYTES * rows // max(1, leaf.nbytes))
    return max(n for n in range(1, rows + 1) if rows % n == 0 and n <= most)
