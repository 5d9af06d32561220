"""Checkpoints that come with the package and are found by name wherever a checkpoint's path is taken."""

from pathlib import Path

from deepstack_jax.config import read_config_object

BUNDLED = {"tiny-vl": Path(__file__).parent / "data" / "tiny-vl"}


def checkpoint_path(path: str | Path) -> Path:
    """`path`, or the bundled checkpoint of that name; an existing checkpoint of the same name goes first."""
    given = Path(path)
    return given if (given / "config.json").exists() else BUNDLED.get(str(path), given)


def existing_checkpoint(path: str | Path) -> Path:
    """`checkpoint_path`, of a directory that has a readable config.json. Commands ask before they import jax.

    Raises:
        ConfigError: there is none; with what is there instead.
    """
    found = checkpoint_path(path)
    read_config_object(found)
    return found
