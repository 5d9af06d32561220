"""The version that is installed, which servers are asked for too often to read it from the files each time."""

from importlib.metadata import version

VERSION = version("deepstack-jax")
