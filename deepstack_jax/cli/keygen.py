"""`deepstack-jax keygen`: keys of the nodes of a split, and API keys."""

from pathlib import Path
from typing import Annotated, Literal

import typer


def run(
    file: Annotated[Path, typer.Argument(help="key file to make, or the file of API keys to add to")],
    authority: Annotated[
        bool, typer.Option("--authority", help="make the key of an authority, which signs the keys of nodes")
    ] = False,
    node: Annotated[
        str | None, typer.Option(metavar="NAME", help="make the key of a node with this name; needs --signed-by")
    ] = None,
    signed_by: Annotated[Path | None, typer.Option(help="with --node: the key file of the authority")] = None,
    role: Annotated[
        Literal["any", "encode", "language"] | None, typer.Option(help="with --node: the role it may have")
    ] = None,
    days: Annotated[
        int | None, typer.Option(min=1, max=36_500, help="with --node: when the key expires; never by default")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(metavar="NAME", help="draw an API key with this name; the file gets its hash only")
    ] = None,
) -> None:
    """Makes a key file for all nodes of a split: copy it to each of them, over a channel that you trust.

    With --authority and then --node, each node gets a key of its own, so that it can be shut out by itself. Keep the
    authority's key off the nodes.

    With --api-key it prints a new API key, and adds its hash to a file for serve --api-key-file.

    Example: deepstack-jax keygen cluster.key
    """
    if authority + (node is not None) + (api_key is not None) > 1:
        raise ValueError("--authority, --node and --api-key make different keys: give one of them")
    if (signed_by or role or days) and node is None:
        raise ValueError("--signed-by, --role and --days are for the key of a node: give --node as well")
    if api_key is not None:
        try:
            from deepstack_jax.serving.access import make_key as make_api_key
        except ImportError as missing:
            raise ValueError(f"API keys need {missing.name}: pip install 'deepstack-jax[serve]'") from None
        print(make_api_key(api_key, file))
        return
    try:
        from deepstack_jax.disagg.keys.files import make_authority, make_key, make_node_key
    except ImportError:
        raise ValueError("keygen needs pyzmq: pip install 'deepstack-jax[mooncake]'") from None
    made = ""
    if authority:
        make_authority(file)
        made = " for an authority: keep it off the nodes"
    elif node is not None:
        if signed_by is None:
            raise ValueError(f"--node {node} needs --signed-by: the file that keygen --authority made")
        certificate = make_node_key(file, node, signed_by, role or "any", days)
        made = f" for {certificate}" + (f", valid until {certificate.end}" if days else "")
    else:
        make_key(file)
    print(f"{file} made{made}; only you can read it")
