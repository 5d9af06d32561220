"""Choosing a backend of an op."""

from collections.abc import Callable, Mapping

import jax

Backend = Callable[..., jax.Array]


def choose(op: str, backends: Mapping[str, Backend], name: str | None) -> Backend:
    """The backend called `name`, or the first one where `name` is None; an unknown name is an error."""
    if name is None:
        return next(iter(backends.values()))
    if name not in backends:
        raise ValueError(f"{op} has no backend {name!r}: expected one of {', '.join(backends)}")
    return backends[name]
