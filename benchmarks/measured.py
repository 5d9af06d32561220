"""What this machine can do, measured: the bounds that benchmarks print beside their figures."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def chip_name() -> str:
    """The accelerator's name, or the processor's with its number of cores."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} cores of {names[0]}" if names else "a CPU"


def median_seconds(run: Callable[[], Any], rounds: int = 5) -> float:
    """The median time of `rounds` runs after a warm-up, results waited for."""
    jax.block_until_ready(run())
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def bandwidth() -> float:
    """Bytes a second that a sum over half a GiB (on accelerators 8 GiB) reads: best of ten, as a bound should be."""
    size = 1 << 29 if jax.default_backend() == "cpu" else 1 << 33
    x = jnp.ones(size // 4, jnp.float32)
    total = jax.jit(jnp.sum)
    jax.block_until_ready(total(x))
    return size / min(median_seconds(lambda: total(x), 1) for _ in range(10))


def best_rate(dtype: DTypeLike) -> float:
    """Operations a second of a product of 2048^3 (on accelerators 8192^3) accumulated in float32, best of five."""
    side = 2048 if jax.default_backend() == "cpu" else 8192
    x = jnp.ones((side, side), dtype)
    product = jax.jit(lambda a, b: jnp.dot(a, b, preferred_element_type=jnp.float32))
    return 2 * side**3 / min(median_seconds(lambda: product(x, x), 1) for _ in range(5))
