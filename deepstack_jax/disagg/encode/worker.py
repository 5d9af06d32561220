"""The thread that owns an encode node's device: images of several requests run together, and none is encoded twice."""

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
from deepstack_jax.errors import one_line
from deepstack_jax.generation import concat_rows, encode_images
from deepstack_jax.models.vision import VisualRows
from deepstack_jax.processing.batch import VisionInput

MAX_TOGETHER = 16  # requests whose images are encoded together


class Encoded(NamedTuple):
    """Rows of a request's images, and how long their encoding took."""

    rows: VisualRows
    seconds: float


@dataclass(frozen=True)
class _Job:
    visuals: Sequence[VisionInput]
    keys: Sequence[bytes] | None
    future: "Future[Encoded]" = field(default_factory=Future)


class EncodeWorker:
    """Encodes what requests bring, in the order in which they came.

    Attributes:
        encoded: images and videos that went through the encoder so far.
        found: those whose rows were in the cache, or were asked for twice at once.
        last_run: time.monotonic() when the device last gave rows back, None before the first.
        error: the line of the newest failure, None if the newest work went well.
    """

    def __init__(self, model: Model, cache_bytes: int = 1 << 30):
        """`model` needs its vision parameters alone."""
        # rows of images by content; only the thread uses it
        self.cache: LRUCache[bytes, jax.Array] = LRUCache(cache_bytes, getsizeof=lambda rows: rows.nbytes)
        self.encoded = self.found = 0
        self.last_run: float | None = None
        self.error: str | None = None
        self._model = model
        self._busy_since: float | None = None
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="encode", daemon=True)
        self._thread.start()

    @property
    def busy_seconds(self) -> float:
        """How long the device has been at work on what runs now; 0 when nothing runs."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    def submit(self, visuals: Sequence[VisionInput], keys: Sequence[bytes] | None = None) -> "Future[Encoded]":
        """Rows of one request's images and videos, one or more. Cancelling the future takes them out of the line.

        `keys` are their `content_key`s. Without them the encoder runs in any case, and nothing is kept: that shows
        whether the device works.
        """
        job = _Job(visuals, keys)
        self._jobs.put(job)
        return job.future

    def close(self) -> None:
        """Ends the thread after what is running."""
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            jobs, last = [job], False
            while len(jobs) < MAX_TOGETHER and not self._jobs.empty():
                if (job := self._jobs.get()) is None:
                    last = True
                    break
                jobs.append(job)
            wanted = [job for job in jobs if job.future.set_running_or_notify_cancel()]
            for group in ([job for job in wanted if job.keys], *([job] for job in wanted if not job.keys)):
                if group:
                    self._answer(group)
            if last:
                return

    def _answer(self, jobs: list["_Job"]) -> None:
        started = self._busy_since = time.monotonic()
        try:
            for job, rows in zip(jobs, self._encode(jobs), strict=True):
                job.future.set_result(Encoded(rows, time.monotonic() - started))
            self.last_run, self.error = time.monotonic(), None
        except Exception as error:
            self.error = f"{type(error).__name__}: {one_line(error)[:300]}"
            if len(jobs) == 1:
                # asyncio takes no StopIteration: a task that awaits the future would wait forever
                fails = RuntimeError(self.error) if isinstance(error, StopIteration) else error
                jobs[0].future.set_exception(fails)
            else:  # one of them is to blame: the others shall not pay for it
                for job in jobs:
                    self._answer([job])
        finally:
            self._busy_since = None

    def _encode(self, jobs: list["_Job"]) -> list[VisualRows]:
        """Each job's rows: of jobs that have keys, or of a single one that has none."""
        if not jobs[0].keys:
            parts = encode_images(self._model, jobs[0].visuals)
            return jax.block_until_ready([concat_rows(self._model.config, parts, jobs[0].visuals)])
        keys = [job.keys or () for job in jobs]
        wanted = {
            key: visual
            for job, of_job in zip(jobs, keys, strict=True)
            for key, visual in zip(of_job, job.visuals, strict=True)
        }
        there = {key: rows for key in wanted if (rows := self.cache.get(key)) is not None}
        missing = {key: visual for key, visual in wanted.items() if key not in there}
        there |= zip(missing, encode_images(self._model, list(missing.values())), strict=True)
        joined = [
            concat_rows(self._model.config, [there[key] for key in of_job], job.visuals)
            for job, of_job in zip(jobs, keys, strict=True)
        ]
        jax.block_until_ready(joined)
        for key in missing:
            if there[key].nbytes <= self.cache.maxsize:
                self.cache[key] = there[key]
        self.encoded += len(missing)
        self.found += sum(len(of_job) for of_job in keys) - len(missing)
        return joined


def content_key(visual: VisionInput) -> bytes:
    """Equal for images and videos of equal patches and equal grids."""
    digest = xxhash.xxh3_128(visual.pixel_values.data)
    for array in (visual.geometry.coordinates, visual.geometry.segment_stop):
        digest.update(np.asarray(array).data)
    return digest.digest()
