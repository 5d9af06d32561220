"""`deepstack-jax keygen`: the key that the nodes of a cluster share."""

from pathlib import Path
from typing import Annotated

import typer


def run(file: Annotated[Path, typer.Argument(help="key file to make")]) -> None:
    """Makes a key file for a cluster: copy it to every node, over a channel that you trust.

    Example: deepstack-jax keygen cluster.key
    """
    try:
        from deepstack_jax.disagg.wire.control import make_key
    except ImportError:
        raise ValueError("keygen needs pyzmq: pip install 'deepstack-jax[mooncake]'") from None
    make_key(file)
    print(f"{file} made; only you can read it")
