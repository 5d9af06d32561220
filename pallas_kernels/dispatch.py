"""Finding a backend of an op."""

from collections.abc import Callable, Mapping

import jax

Backend = Callable[..., jax.Array]


def named(op: str, backends: Mapping[str, Backend], name: str) -> Backend:
    """The backend called `name`; a `ValueError` lists those that there are."""
    if name not in backends:
        raise ValueError(f"{op} has no backend {name!r}: expected one of {', '.join(backends)}")
    return backends[name]
