"""Rows between a device and its host's memory: large steps, through pinned memory, one ahead of who waits.

On a CPU nothing is copied: the host reads a device's rows where they are, and memory that was filled on the host
becomes a device's rows.
"""

import contextlib
import mmap
import weakref
from collections import deque
from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

STEP_BYTES = 2 << 20  # a transfer between device and host
PINNED = "pinned_host"


def page_aligned(num_bytes: int) -> np.ndarray:
    """uint8 [num_bytes] of untouched memory at a page's start, so that a CPU device can take it as it is."""
    memory = np.empty(num_bytes + mmap.PAGESIZE, np.uint8)
    start = -memory.ctypes.data % mmap.PAGESIZE
    return memory[start : start + num_bytes]


class HostMemory:
    """Memory that is used again once nothing refers to it any more: fresh pages cost more than a copy into them.

    What JAX has made an array of stays referred to until the runtime has let go of it.
    """

    def __init__(self, keep_bytes: int = 1 << 30):
        """At most `keep_bytes` wait to be used again."""
        self._keep_bytes = keep_bytes
        self._free: deque[np.ndarray] = deque()  # oldest first; finalizers may run anywhere, so there is no lock

    def take(self, num_bytes: int) -> np.ndarray:
        """uint8 [num_bytes] of any content, at a page's start."""
        memory = self._kept(num_bytes)
        if memory is None:
            memory = page_aligned(num_bytes)
        lease = _Lease(memory)
        weakref.finalize(lease, self._give_back, memory)
        return np.frombuffer(lease, np.uint8)

    def _kept(self, num_bytes: int) -> np.ndarray | None:
        for _ in range(len(self._free)):
            with contextlib.suppress(IndexError):
                memory = self._free.popleft()
                if len(memory) == num_bytes:
                    return memory
                self._free.append(memory)
        return None

    def _give_back(self, memory: np.ndarray) -> None:
        self._free.append(memory)
        with contextlib.suppress(IndexError):
            while sum(len(free) for free in tuple(self._free)) > self._keep_bytes:
                self._free.popleft()


class _Lease:
    """Shows memory to numpy, and lives as long as any array on it."""

    def __init__(self, memory: np.ndarray):
        self._memory = memory

    def __buffer__(self, flags: int) -> memoryview:
        return memoryview(self._memory)


class HostRows:
    """Reads rows [M, W] of a device as bytes."""

    def __init__(self, rows: jax.Array, in_place: bool | None = None):
        """`in_place` None: on a CPU, where it costs nothing."""
        self._rows = rows
        self._here = is_on_cpu(rows.sharding) if in_place is None else in_place
        self._step = steps_of(rows.shape, rows.dtype)
        self._parts: dict[int, jax.Array] = {}  # in pinned memory, or on their way there
        self._in_place: np.ndarray | None = None

    def read(self, start: int, stop: int) -> Iterator[np.ndarray]:
        """uint8 [n, bytes of a row], part by part. Waits until the device has computed them."""
        if self._here:
            if self._in_place is None:
                self._in_place = self._bytes(self._rows)
            yield self._in_place[start:stop]
            return
        while start < stop:
            number, offset = divmod(start, self._step)
            parts = {number: self._parts.get(number)}
            if (number + 1) * self._step < len(self._rows):
                parts[number + 1] = self._parts.get(number + 1)
            self._parts = {n: self._fetch(n) if part is None else part for n, part in parts.items()}
            # the last part is as long as the others, and so begins before its place
            offset += number * self._step - self._begin(number)
            length = min(self._step, (number + 1) * self._step - start, stop - start)
            yield self._bytes(self._parts[number])[offset : offset + length]
            start += length

    def _begin(self, number: int) -> int:
        return min(number * self._step, len(self._rows) - self._step)

    def _fetch(self, number: int) -> jax.Array:
        part = _part(self._rows, self._begin(number), self._step)
        return jax.device_put(part, part.sharding.with_memory_kind(PINNED))

    @staticmethod
    def _bytes(rows: jax.Array) -> np.ndarray:
        return np.asarray(rows).view(np.uint8)


class DeviceRows:
    """Sends rows [M, W] to a device while they are being filled, from the first on."""

    def __init__(self, host: np.ndarray, sharding: Sharding | None = None, in_place: bool | None = None):
        """`host` is memory that begins at a page. `in_place` None: on a CPU, where `host` becomes the array."""
        self._host = host
        self._sharding = sharding or SingleDeviceSharding(jax.local_devices()[0])
        self._here = is_on_cpu(self._sharding) if in_place is None else in_place
        self._step = steps_of(host.shape, host.dtype)
        self._sent = 0
        self._rows = None if self._here else jnp.zeros(host.shape, host.dtype, device=self._sharding)

    def send(self, ready: int) -> None:
        """Rows before `ready` are there and will not change: starts to send them."""
        while self._rows is not None and self._sent + self._step <= ready:
            self._rows = self._place(self._rows, self._sent)
            self._sent += self._step

    def finish(self) -> jax.Array:
        """All rows, on the device. The host's memory can't be written afterwards."""
        self._host.flags.writeable = False
        if self._rows is None:
            return jax.device_put(self._host, self._sharding)
        self.send(len(self._host))
        if self._sent < len(self._host):
            self._rows = self._place(self._rows, len(self._host) - self._step)
            self._sent = len(self._host)
        return self._rows

    def _place(self, rows: jax.Array, start: int) -> jax.Array:
        pinned = jax.device_put(self._host[start : start + self._step], self._sharding.with_memory_kind(PINNED))
        return _update(rows, jax.device_put(pinned, self._sharding), start)


def is_on_cpu(sharding: Sharding) -> bool:
    return all(device.platform == "cpu" for device in sharding.device_set)


def steps_of(shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Rows that go at a time."""
    return min(shape[0], max(1, STEP_BYTES // (shape[1] * dtype.itemsize)))


@partial(jax.jit, static_argnums=2)
def _part(rows: jax.Array, start: int, length: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(rows, start, length)


@partial(jax.jit, donate_argnums=0)
def _update(rows: jax.Array, part: jax.Array, start: int) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(rows, part, start, axis=0)
