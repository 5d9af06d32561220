"""Checkpoints that come with the package and are found by name wherever a checkpoint's path is taken."""

from pathlib import Path

SHIPPED = {"tiny-vl": Path(__file__).parent / "data" / "tiny-vl"}


def checkpoint_path(path: str | Path) -> Path:
    """`path`, or the shipped checkpoint of that name; an existing directory of the same name goes first."""
    given = Path(path)
    return given if given.exists() else SHIPPED.get(str(path), given)
