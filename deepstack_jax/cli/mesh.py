"""The `--mesh` option of the commands that load a model."""

from typing import Annotated

import typer

MeshShape = Annotated[
    str | None, typer.Option("--mesh", help="devices by axis, such as data=2,tensor=4; one device by default")
]
