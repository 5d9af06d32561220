"""Moves rows between a device and its host's memory, in large steps through pinned memory, one ahead of the reader.

On a CPU nothing is copied: the host reads the device's arrays in place, and memory that the host has filled becomes the
device's array.
"""

import contextlib
import mmap
import weakref
from collections import deque
from collections.abc import Iterator
from functools import partial

import jax
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

STEP_BYTES = 2 << 20  # per transfer between device and host
PINNED = "pinned_host"


def page_aligned(num_bytes: int) -> np.ndarray:
    """Allocates uint8 [num_bytes] of untouched memory at a page boundary, so that a CPU device can use it in place."""
    memory = np.empty(num_bytes + mmap.PAGESIZE, np.uint8)
    start = -memory.ctypes.data % mmap.PAGESIZE
    return memory[start : start + num_bytes]


class HostMemory:
    """Reuses memory once nothing refers to it, because fresh pages cost more than a copy into them.

    Memory that JAX has made an array of stays in use until the runtime has released it.
    """

    def __init__(self, keep_bytes: int = 1 << 30):
        """At most `keep_bytes` are kept for reuse."""
        self._keep_bytes = keep_bytes
        self._free: deque[np.ndarray] = deque()  # oldest first; without a lock, because finalizers may run anywhere

    @property
    def spare_bytes(self) -> int:
        """Bytes that are kept for reuse."""
        return sum(len(free) for free in tuple(self._free))

    def take(self, num_bytes: int) -> np.ndarray:
        """Returns uint8 [num_bytes] with arbitrary content that starts at a page."""
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
            while self.spare_bytes > self._keep_bytes:
                self._free.popleft()


class _Lease:
    """Exposes memory to NumPy, and lives as long as any array on that memory."""

    def __init__(self, memory: np.ndarray):
        self._memory = memory

    def __buffer__(self, flags: int) -> memoryview:
        return memoryview(self._memory)


class HostRows:
    """Reads rows [M, W] on a device as bytes."""

    def __init__(self, rows: jax.Array, in_place: bool | None = None):
        """`in_place` reads the device's memory directly; None does so on a CPU. Of a mesh, one device is read."""
        self._rows = rows = rows.addressable_data(0) if rows.is_fully_replicated else rows
        self._reads_in_place = is_on_cpu(rows.sharding) if in_place is None else in_place
        self._step = rows_per_step(rows.shape, rows.dtype)
        self._parts: dict[int, jax.Array] = {}  # in pinned memory, or being copied there
        self._in_place: np.ndarray | None = None

    def read(self, start: int, stop: int) -> Iterator[np.ndarray]:
        """Yields uint8 [n, bytes per row], part by part. Waits until the device has computed the rows."""
        if self._reads_in_place:
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
            # the last part has the same length as the others, so it starts before its own step
            offset += number * self._step - self._part_start(number)
            length = min(self._step, (number + 1) * self._step - start, stop - start)
            yield self._bytes(self._parts[number])[offset : offset + length]
            start += length

    def _part_start(self, number: int) -> int:
        return min(number * self._step, len(self._rows) - self._step)

    def _fetch(self, number: int) -> jax.Array:
        part = _part(self._rows, self._part_start(number), self._step)
        return jax.device_put(part, part.sharding.with_memory_kind(PINNED))

    @staticmethod
    def _bytes(rows: jax.Array) -> np.ndarray:
        return np.asarray(rows).view(np.uint8)


def to_device(host: np.ndarray, sharding: Sharding | None = None, in_place: bool | None = None) -> jax.Array:
    """Sends rows [M, W] to a device, the first one by default. The host's memory becomes read-only.

    `host` must start at a page. `in_place` makes it the device's array; None does so on a CPU. Otherwise the rows go
    through pinned memory, and the call does not wait for them.
    """
    sharding = sharding or SingleDeviceSharding(jax.local_devices()[0])
    host.flags.writeable = False
    if is_on_cpu(sharding) if in_place is None else in_place:
        return jax.device_put(host, sharding)
    return jax.device_put(jax.device_put(host, sharding.with_memory_kind(PINNED)), sharding)


def is_on_cpu(sharding: Sharding) -> bool:
    return all(device.platform == "cpu" for device in sharding.device_set)


def rows_per_step(shape: tuple[int, ...], dtype: np.dtype) -> int:
    """The number of rows per transfer between device and host."""
    return min(shape[0], max(1, STEP_BYTES // (shape[1] * dtype.itemsize)))


@partial(jax.jit, static_argnums=2)
def _part(rows: jax.Array, start: int, length: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(rows, start, length)
