"""Checkpoints that come with the package. Their names are accepted wherever a checkpoint's path is."""

from pathlib import Path

from deepstack_jax.config import read_config_object

BUNDLED = {"tiny-vl": Path(__file__).parent / "data" / "tiny-vl"}


def checkpoint_path(path: str | Path) -> Path:
    """Returns `path` if it is a checkpoint, otherwise the bundled checkpoint of that name, if there is one."""
    given = Path(path)
    return given if (given / "config.json").exists() else BUNDLED.get(str(path), given)


def existing_checkpoint(path: str | Path) -> Path:
    """Returns `checkpoint_path` and checks that its config.json is readable. Commands call this before they import jax.

    Raises:
        ConfigError: there is no readable config.json; the message says what is there instead.
    """
    found = checkpoint_path(path)
    read_config_object(found)
    return found
