"""Prepares the prompts of a server: decoders load images and videos, threads do the rest, and memory is bounded."""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from deepstack_jax.processing.decoders import Decoders
from deepstack_jax.processing.media import MediaError, prepared_bytes
from deepstack_jax.processing.processor import Processor

# of two requests at the default limit of 64 Mi pixels, each with 3 bytes of pixels and 24 of patches
BYTES_PER_PIXEL = 27
PREPARED_BYTES = 2 * BYTES_PER_PIXEL * (64 << 20)
NUM_THREADS = 2

Release = Callable[[], None]


class Preparation:
    """What prepares prompts with images and videos.

    Attributes:
        decoders: `close` closes them.
        memory: the bytes of pixels and patches that wait to be encoded.
    """

    def __init__(self, decoders: Decoders | None = None, most_bytes: int = PREPARED_BYTES):
        """
        Args:
            decoders: None decodes in threads of this process.
            most_bytes: of the pixels and patches of all requests that wait to be encoded.
        """
        self.decoders = Decoders(0) if decoders is None else decoders
        self.memory = ByteBudget(most_bytes)
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="prepare")
        self._running: dict[object, float] = {}  # since when each call of a thread runs

    @property
    def busy_seconds(self) -> float:
        """How long the oldest call that runs in a thread of this process has run, cancelled ones included.

        Decoder processes don't count: their limits end what takes too long.
        """
        now = time.monotonic()
        return now - min((*self._running.copy().values(), now - self.decoders.busy_seconds))

    async def prepare(
        self, processor: Processor, prompt: Any, images: Sequence[Any], videos: Sequence[Any], options: dict[str, Any]
    ) -> tuple[dict[str, np.ndarray], Release]:
        """Makes the arrays of `Processor.prepare`, from media that are `MediaFile` or lists of them.

        Returns:
            The arrays, and what is to be called once their pixels are encoded. It may be called again.

        Raises:
            MediaError: an image or a video is refused, or there can't be memory enough.
            ValueError: as `Processor.prepare`.
        """
        parsed = await self.in_thread(lambda: processor.parse(prompt, images, videos, **options))
        found = [await self.decoders.check(one) for one in parsed.media]
        count = sum(prepared_bytes(*each) for each in zip(parsed.media, found, strict=True))
        release = await self.memory.take(count)
        try:
            # one after another, so that no request has more than one decoder
            loaded = [await self.decoders.load(*each) for each in zip(parsed.media, found, strict=True)]
            return await self.in_thread(lambda: processor.assemble(parsed, loaded)), release
        except BaseException:
            release()
            raise

    async def in_thread[T](self, call: Callable[[], T]) -> T:
        """Runs `call` in one of the threads."""

        def run() -> T:
            self._running[run] = time.monotonic()
            try:
                return call()
            finally:
                del self._running[run]

        return await asyncio.get_running_loop().run_in_executor(self._threads, run)

    def close(self) -> None:
        """Ends decoders and threads. Returns at once."""
        self.decoders.close()
        self._threads.shutdown(wait=False, cancel_futures=True)


class ByteBudget:
    """Memory that requests take in turn, in the order in which they ask."""

    def __init__(self, most: int):
        self.most, self.taken = most, 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def take(self, count: int) -> Release:
        """Waits until `count` bytes are free and takes them; returns what gives them back, once.

        Raises:
            MediaError: there are fewer in all.
        """
        if count > self.most:
            raise MediaError(
                f"the images and videos need {count >> 20} MiB of memory, more than the {self.most >> 20} MiB of this "
                "node: send fewer or smaller ones",
                413,
            )
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((count, turn))
        self._take_turns()
        taken = [count]

        def release() -> None:
            self.taken -= taken.pop() if taken else 0
            self._take_turns()

        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._take_turns()  # it may have been in the way of others
            else:
                release()
            raise
        return release

    def _take_turns(self) -> None:
        while self._waiting and (self._waiting[0][1].done() or self.taken + self._waiting[0][0] <= self.most):
            count, turn = self._waiting.popleft()
            if not turn.done():
                self.taken += count
                turn.set_result(None)
