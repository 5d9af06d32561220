"""The world that runs now, and the clocks that the product reads in it."""

from tests.simulation.world import Process, World

_world: World | None = None


def enter(world: World | None) -> None:
    """Makes this the world whose clocks are read; None for none."""
    global _world
    _world = world


def world() -> World:
    """The world that runs."""
    assert _world is not None, "no world runs"
    return _world


def process() -> Process:
    """The process whose code runs."""
    current = world().current
    assert current is not None, "no process runs"
    return current


def monotonic() -> float:
    """As `time.monotonic`, in the process that runs."""
    if _world is None:
        return 0.0
    return _world.now + (0.0 if _world.current is None else _world.current.offset)


def wall() -> float:
    """As `time.time`."""
    return 0.0 if _world is None else 1.8e9 + _world.now


def token_bytes(num_bytes: int = 32) -> bytes:
    """As `secrets.token_bytes`, from the world's dice."""
    return world().dice.randbytes(num_bytes)


def token_hex(num_bytes: int = 32) -> str:
    """As `secrets.token_hex`, from the world's dice."""
    return world().dice.randbytes(num_bytes).hex()
