"""The thread that owns an encode node's device: it encodes one image after another, and none that it still knows."""

import queue
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple

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


@dataclass(frozen=True)
class _EncodeRequest:
    visual: VisionInput
    key: bytes | None
    future: "Future[EncodedImage]" = field(default_factory=Future)


class EncodeWorker:
    """Encodes images and videos, first come first served.

    Each runs by itself, so that its rows can be sent while the next one is encoded: the encoder's program takes one
    image after another in any case.

    Attributes:
        num_encoded: images and videos that went through the encoder so far.
        num_cached: images and videos whose rows were cached.
        last_run: time.monotonic() when the device last returned rows, None before the first.
        error: the latest failure in one line, None if the latest image succeeded.
    """

    def __init__(self, model: Model, cache_bytes: int = 1 << 30):
        """`model` needs only its vision parameters."""
        # rows by digest; only the worker's thread uses it
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
        """Encodes one image; returns False when the worker closes."""
        if (request := self._queue.get()) is None:
            return False
        if not request.future.set_running_or_notify_cancel():
            return True
        started = self._busy_since = time.monotonic()
        try:
            rows = jax.block_until_ready(self._rows(request))
            self.last_run, self.error = time.monotonic(), None
        except Exception as error:
            self.error = f"{type(error).__name__}: {one_line(error)[:300]}"
            # asyncio does not accept StopIteration: a task that awaits the future would wait forever
            request.future.set_exception(RuntimeError(self.error) if isinstance(error, StopIteration) else error)
        else:
            request.future.set_result(EncodedImage(rows, self.last_run - started))
        finally:
            self._busy_since = None
        return True

    def _rows(self, request: _EncodeRequest) -> VisualRows:
        joined = None if request.key is None else self.cache.get(request.key)
        if joined is None:
            (joined,) = encode_images(self._model, [request.visual])
            if request.key is not None:
                self.num_encoded += 1
                if jax.block_until_ready(joined).nbytes <= self.cache.maxsize:
                    self.cache[request.key] = joined
        else:
            self.num_cached += 1
        return separate_deepstack_embeds(joined, self._model.config.num_deepstack_levels)
