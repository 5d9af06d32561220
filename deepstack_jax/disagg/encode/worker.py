"""The thread that owns an encode node's devices: it encodes images as they come, and none that it still knows."""

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
from cachetools import LRUCache

from deepstack_jax.checkpoint import Model
from deepstack_jax.encoding import encode_images
from deepstack_jax.errors import one_line
from deepstack_jax.models.vision import VisualRows, separate_deepstack_embeds
from deepstack_jax.processing.batch import VisionInput


class EncodedImage(NamedTuple):
    """Rows of an image or video, with rows of padding after them, and how long the encoder took."""

    rows: VisualRows
    seconds: float


@dataclass(frozen=True, eq=False)
class _EncodeRequest:
    visual: VisionInput
    key: bytes | None
    future: "Future[EncodedImage]" = field(default_factory=Future)


class EncodeWorker:
    """Encodes images and videos, first come first served.

    On one device, each runs by itself, so that its rows can be sent while the next one is encoded: the encoder's
    program takes one image after another in any case. On a mesh, each device takes one of those that wait.

    Attributes:
        num_encoded: images and videos that went through the encoder so far.
        num_cached: images and videos whose rows were cached.
        num_batches, encode_seconds: runs of the encoder, and what they took.
        last_run: time.monotonic() when the device last returned rows, None before the first.
        error: the latest failure in one line, None if the latest image succeeded.
    """

    def __init__(self, model: Model, cache_bytes: int = 1 << 30):
        """`model` needs only its vision parameters."""
        # rows by digest; only the worker's thread uses it
        self.cache: LRUCache[Any, jax.Array] = LRUCache(cache_bytes, getsizeof=lambda rows: rows.nbytes)
        self.num_encoded = self.num_cached = self.num_batches = 0
        self.encode_seconds = 0.0
        self.last_run: float | None = None
        self.error: str | None = None
        self._model = model
        self._busy_since: float | None = None
        self._queue: queue.SimpleQueue[_EncodeRequest | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="encode", daemon=True)
        self._thread.start()

    @property
    def busy_seconds(self) -> float:
        """How long the current program has run on the device; 0 when the device is idle."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def queued(self) -> int:
        """Images and videos in line, cancelled ones included."""
        return self._queue.qsize()

    def submit(self, visual: VisionInput, key: bytes | None = None) -> "Future[EncodedImage]":
        """Queues an image or video. Cancelling the future removes it from the queue.

        `key` is its digest. Without a key the encoder always runs and nothing is cached, which shows whether the device
        works.
        """
        request = _EncodeRequest(visual, key)
        self._queue.put(request)
        return request.future

    def close(self) -> None:
        """Ends the thread after the images that are queued."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while self._encode_next():  # a function of its own: an idle thread must not hold pixels or rows
            pass

    def _encode_next(self) -> bool:
        """Encodes one image, or on a mesh as many as wait, up to one per device; False when the worker closes."""
        if (first := self._queue.get()) is None:
            return False
        taken = [each for each in (first, *self._waiting()) if each.future.set_running_or_notify_cancel()]
        if not taken:
            return True
        self._busy_since = time.monotonic()
        try:
            self._answer(taken)
        except Exception as error:
            for each in taken:
                try:
                    self._answer([each]) if taken[1:] else self._fail(each, error)
                except Exception as own:  # one by one: only images that can't be encoded fail
                    self._fail(each, own)
        finally:
            self._busy_since = None
        return True

    def _waiting(self) -> Iterator[_EncodeRequest]:
        """Further requests of the queue, for the mesh's other devices."""
        for _ in range(0 if self._model.mesh is None else self._model.mesh.size - 1):
            try:
                request = self._queue.get_nowait()
            except queue.Empty:
                return
            if request is None:
                self._queue.put(None)  # closing comes after what was taken
                return
            yield request

    def _answer(self, requests: Sequence[_EncodeRequest]) -> None:
        started = time.monotonic()
        rows = jax.block_until_ready(self._rows(requests))
        self.last_run, self.error = time.monotonic(), None
        for request, each in zip(requests, rows, strict=True):
            request.future.set_result(EncodedImage(each, self.last_run - started))

    def _fail(self, request: _EncodeRequest, error: Exception) -> None:
        self.error = f"{type(error).__name__}: {one_line(error)[:300]}"
        # asyncio does not accept StopIteration: a task that awaits the future would wait forever
        request.future.set_exception(RuntimeError(self.error) if isinstance(error, StopIteration) else error)

    def _rows(self, requests: Sequence[_EncodeRequest]) -> list[VisualRows]:
        names = [each if each.key is None else each.key for each in requests]
        found = {name: self.cache[name] for name in names if name in self.cache}
        new = {name: each for name, each in zip(names, requests, strict=True) if name not in found}
        started = time.monotonic()
        encoded = jax.block_until_ready(encode_images(self._model, [each.visual for each in new.values()]))
        self.num_batches += bool(new)
        self.encode_seconds += time.monotonic() - started
        for (name, request), joined in zip(new.items(), encoded, strict=True):
            found[name] = joined
            if request.key is not None:
                self.num_encoded += 1
                if joined.nbytes <= self.cache.maxsize:
                    self.cache[request.key] = joined
        self.num_cached += len(requests) - len(new)
        levels = self._model.config.num_deepstack_levels
        return [separate_deepstack_embeds(found[name], levels) for name in names]
