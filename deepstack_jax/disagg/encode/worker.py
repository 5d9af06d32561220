"""The thread that owns an encode node's device: it encodes images of several requests together, and none twice."""

import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import numpy as np
import xxhash
from cachetools import LRUCache

from deepstack_jax.checkpoint import Model
from deepstack_jax.encoding import concat_rows, encode_images
from deepstack_jax.errors import one_line
from deepstack_jax.models.vision import VisualRows
from deepstack_jax.processing.batch import VisionInput

MAX_TOGETHER = 16  # maximum requests whose images are encoded together


class Encoded(NamedTuple):
    """Rows of a request's images and videos, and how long their encoding took."""

    rows: VisualRows
    seconds: float


@dataclass(frozen=True)
class _EncodeRequest:
    visuals: Sequence[VisionInput]
    keys: Sequence[bytes] | None
    future: "Future[Encoded]" = field(default_factory=Future)


class EncodeWorker:
    """Encodes the images and videos of requests, first come first served.

    Attributes:
        num_encoded: images and videos that went through the encoder so far.
        num_cached: images and videos whose rows were cached, or were requested twice at once.
        last_run: time.monotonic() when the device last returned rows, None before the first.
        error: the latest failure in one line, None if the latest request succeeded.
    """

    def __init__(self, model: Model, cache_bytes: int = 1 << 30):
        """`model` needs only its vision parameters."""
        # rows by content key; only the worker's thread uses it
        self.cache: LRUCache[bytes, jax.Array] = LRUCache(cache_bytes, getsizeof=lambda rows: rows.nbytes)
        self.num_encoded = self.num_cached = 0
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

    def submit(self, visuals: Sequence[VisionInput], keys: Sequence[bytes] | None = None) -> "Future[Encoded]":
        """Queues one request's images and videos, at least one. Cancelling the future removes them from the queue.

        `keys` are their `content_key`s. Without keys the encoder always runs and nothing is cached, which shows
        whether the device works.
        """
        request = _EncodeRequest(visuals, keys)
        self._queue.put(request)
        return request.future

    def close(self) -> None:
        """Ends the thread after the requests that are queued."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (request := self._queue.get()) is not None:
            requests, last = [request], False
            while len(requests) < MAX_TOGETHER and not self._queue.empty():
                if (request := self._queue.get()) is None:
                    last = True
                    break
                requests.append(request)
            active = [request for request in requests if request.future.set_running_or_notify_cancel()]
            with_keys = [request for request in active if request.keys]
            for group in (with_keys, *([request] for request in active if not request.keys)):
                if group:
                    self._encode_group(group)
            if last:
                return

    def _encode_group(self, requests: list[_EncodeRequest]) -> None:
        started = self._busy_since = time.monotonic()
        try:
            for request, rows in zip(requests, self._encode(requests), strict=True):
                request.future.set_result(Encoded(rows, time.monotonic() - started))
            self.last_run, self.error = time.monotonic(), None
        except Exception as error:
            self.error = f"{type(error).__name__}: {one_line(error)[:300]}"
            if len(requests) == 1:
                # asyncio does not accept StopIteration: a task that awaits the future would wait forever
                failure = RuntimeError(self.error) if isinstance(error, StopIteration) else error
                requests[0].future.set_exception(failure)
            else:  # one of them caused it: encode each by itself, so that the others succeed
                for request in requests:
                    self._encode_group([request])
        finally:
            self._busy_since = None

    def _encode(self, requests: list[_EncodeRequest]) -> list[VisualRows]:
        """Returns each request's rows, either of requests that all have keys or of a single one without."""
        if not requests[0].keys:
            parts = encode_images(self._model, requests[0].visuals)
            return jax.block_until_ready([concat_rows(self._model.config, parts, requests[0].visuals)])
        keys = [request.keys or () for request in requests]
        visuals_by_key = {
            key: visual
            for request, of_request in zip(requests, keys, strict=True)
            for key, visual in zip(of_request, request.visuals, strict=True)
        }
        rows_by_key = {key: rows for key in visuals_by_key if (rows := self.cache.get(key)) is not None}
        missing = {key: visual for key, visual in visuals_by_key.items() if key not in rows_by_key}
        rows_by_key |= zip(missing, encode_images(self._model, list(missing.values())), strict=True)
        joined = [
            concat_rows(self._model.config, [rows_by_key[key] for key in of_request], request.visuals)
            for request, of_request in zip(requests, keys, strict=True)
        ]
        jax.block_until_ready(joined)
        for key in missing:
            if rows_by_key[key].nbytes <= self.cache.maxsize:
                self.cache[key] = rows_by_key[key]
        self.num_encoded += len(missing)
        self.num_cached += sum(len(of_request) for of_request in keys) - len(missing)
        return joined


def content_key(visual: VisionInput) -> bytes:
    """Returns 16 bytes that are equal for images and videos with equal patches and equal grids."""
    digest = xxhash.xxh3_128(visual.pixel_values.data)
    for array in (visual.geometry.coordinates, visual.geometry.segment_stop):
        digest.update(np.asarray(array).data)
    return digest.digest()
