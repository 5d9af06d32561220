"""Decodes images and videos in processes of their own, which may be slow, large or hung without harm to others.

Each thread of the pool owns one process (`decoder_process.py`) and gives it one task at a time. A process is killed and
replaced if its task is cancelled, takes too much processor time or memory, or ends it. One of several processes only
takes what is small, so that nobody's large files hold up all pictures.
"""

import asyncio
import logging
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, cast

from deepstack_jax.errors import one_line, shortage
from deepstack_jax.processing.decoder_process import (
    CheckFrames,
    CheckImage,
    CheckVideo,
    Failed,
    Found,
    LimitedTask,
    LoadFrames,
    LoadImage,
    LoadVideo,
    Result,
    Task,
    perform,
    receive_answer,
    send_task,
)
from deepstack_jax.processing.media import Loaded, MediaError, MediaInput, video_of
from deepstack_jax.processing.sources import MediaFile, describe
from deepstack_jax.processing.videos import Video, VideoOptions, VideoSettings

MEMORY_BYTES = 2 << 30  # of one process
MAX_WAITING = 256  # tasks
IN_PROCESS_THREADS = 2

# What a task may take: many times what honest files took on one slow core.
_SECONDS = 10.0
_PIXELS_PER_SECOND = 4e6
_SMALL_SECONDS = 4.0  # at _PIXELS_PER_SECOND: photographs of 16 megapixels
_NICENESS = 10  # of processes that take all tasks, so that the server and small pictures come first
_START_SECONDS = 120.0  # a process needs about 1 s of an idle machine until it takes tasks

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Job:
    task: Task
    more_seconds: float  # than _SECONDS
    future: "Future[Result]" = field(default_factory=Future)
    decoder: "_Process | None" = None  # while it runs
    begun: float = 0.0

    @property
    def is_small(self) -> bool:
        return self.more_seconds <= _SMALL_SECONDS and not isinstance(self.task, CheckVideo | LoadVideo)


class Decoders:
    """A pool of decoders. Tasks wait in one queue and start in order; any thread and event loop may use it.

    The last of several processes passes over tasks that are not small.
    """

    def __init__(self, processes: int, memory_bytes: int = MEMORY_BYTES, max_waiting: int = MAX_WAITING):
        """
        Args:
            processes: how many there are; with 0, threads of this process decode, without limits of time and memory.
            memory_bytes: what each process may allocate.
            max_waiting: tasks that wait for a decoder; more are refused.
        """
        self._processes, self._memory_bytes, self._max_waiting = processes, memory_bytes, max_waiting
        self._changed = threading.Condition()
        self._waiting: deque[_Job] = deque()
        self._running: set[_Job] = set()
        self._alive: set[_Process] = set()
        self._threads: list[threading.Thread] = []
        self._idle_for_small = False  # whether the process waits that only takes small tasks
        self._started: Future[None] = Future()  # of the first process
        self._closed = False

    async def start(self) -> None:
        """Starts the processes, so that the first request doesn't wait for one.

        Raises:
            ValueError: they don't start, or may not have the memory that is meant for them.
        """
        if self._processes:
            _check_limits(self._memory_bytes)
            with self._changed:
                self._start_threads()
            await asyncio.wrap_future(self._started)

    @property
    def busy_seconds(self) -> float:
        """How long the oldest task that a thread of this process decodes has run; 0 where processes decode."""
        if self._processes:
            return 0.0
        with self._changed:
            now = time.monotonic()
            return now - min((job.begun for job in self._running), default=now)

    async def check_image(self, data: bytes, name: str, image_format: str | None = None) -> MediaFile:
        """Runs `media.checked_image`.

        Raises:
            MediaError: it is refused, took too much time or memory, or the pool is full or closed.
        """
        return (await self._files([data], CheckImage(data, name, image_format)))[0]

    async def check_video(self, data: bytes, name: str) -> MediaFile:
        """Runs `media.checked_video`; the errors are those of `check_image`."""
        return (await self._files([data], CheckVideo(data, name)))[0]

    async def check_frames(self, pictures: list[bytes], formats: Sequence[str | None] = ()) -> list[MediaFile]:
        """Runs `media.checked_frames`; the errors are those of `check_image`."""
        return await self._files(pictures, CheckFrames(pictures, list(formats)))

    async def check(self, media: MediaInput) -> MediaFile:
        """Returns what the header of a `MediaFile`, or of a list of them, says, which is read unless it is known."""
        source = media.source
        if isinstance(source, list):
            if not source or not all(frame.width for frame in source):
                source = await self.check_frames([one.data for one in source], [one.format for one in source])
            return video_of(source)
        if source.width:
            return source
        name = describe(source)
        if isinstance(media.options, VideoOptions):
            return await self.check_video(source.data, name)
        return await self.check_image(source.data, name, source.format)

    async def load(self, media: MediaInput, found: MediaFile) -> Loaded:
        """Runs `media.load_media` on a `MediaFile`, or a list of them; `found` is what `check` returned.

        Cancelling it ends the process that works for it.

        Raises:
            MediaError: as `check_image`.
        """
        source, settings, options = media.source, media.settings, media.options
        if not isinstance(options, VideoOptions):
            task = LoadImage(source.data, source.format, settings, options)
        elif isinstance(source, list):
            pictures = [(frame.data, frame.format) for frame in source]
            task = LoadFrames(pictures, cast(VideoSettings, settings), options)
        else:
            task = LoadVideo(source.data, cast(VideoSettings, settings), options)
        result = await self._run(task, found.width * found.height * found.frames / _PIXELS_PER_SECOND)
        assert not isinstance(result, list)
        return result

    def close(self, grace: float = 0.0) -> None:
        """Ends all processes in `grace` seconds, from an event loop; tasks get errors then. Returns at once."""
        if grace > 0:
            asyncio.get_running_loop().call_later(grace, self.close)  # a timer would need a thread
            return
        with self._changed:
            self._closed = True
            for job in self._waiting:
                _finish(job.future, _stopping())
            self._waiting.clear()
            for process in self._alive:  # also those that are still starting
                process.kill()
            self._changed.notify_all()

    async def _files(self, data: list[bytes], task: Task) -> list[MediaFile]:
        found = await self._run(task, sum(map(len, data)) / _PIXELS_PER_SECOND)
        assert isinstance(found, list)
        for file, its in zip(found, data, strict=True):
            file.data = its
        return found

    async def _run(self, task: Task, more_seconds: float) -> Result:
        job = self._submit(_Job(task, more_seconds))
        try:
            return await asyncio.wrap_future(job.future)
        except asyncio.CancelledError:
            with self._changed:
                if job.decoder:
                    job.decoder.kill()
            raise

    def _submit(self, job: _Job) -> _Job:
        with self._changed:
            if self._closed:
                raise _stopping()
            if len(self._waiting) >= self._max_waiting:
                raise MediaError(f"{len(self._waiting)} images and videos wait to be decoded: try again later", 503)
            self._start_threads()
            self._waiting.append(job)
            self._changed.notify_all()
        return job

    def _start_threads(self) -> None:
        try:
            while len(self._threads) < (self._processes or IN_PROCESS_THREADS):
                # daemons, because the end of this process must not wait for a decoder
                only_small = 0 < len(self._threads) == self._processes - 1
                thread = threading.Thread(target=self._work, args=[only_small], name="decode", daemon=True)
                thread.start()
                self._threads.append(thread)
        except RuntimeError:  # no more can be started
            if not self._threads:
                raise

    def _work(self, only_small: bool) -> None:
        process: _Process | None = None
        while True:
            if self._processes and process is None and not self._closed:
                process = self._new_process(only_small)
            job = self._next(process, only_small)
            if job is None:
                break
            self._finish_job(job, process)
            del job  # whose pixels would be kept until the next one
            if process and process.ended:
                self._end(process)
                process = None
        if process:
            self._end(process)

    def _finish_job(self, job: _Job, process: "_Process | None") -> None:
        try:
            result: Any = self._perform(job, process)
        except Exception as error:
            result = error
        with self._changed:  # afterwards it is too late to kill the process for this job
            job.decoder = None
            self._running.discard(job)
        _finish(job.future, result)

    def _new_process(self, only_small: bool) -> "_Process | None":
        process: _Process | None = None
        try:
            process = _Process(self._memory_bytes, 0 if only_small or self._processes == 1 else _NICENESS)
            with self._changed:
                self._alive.add(process)
                if self._closed:
                    process.kill()
            process.wait_until_ready(_START_SECONDS)
        except Exception as error:
            if process:
                self._end(process)
            if not self._closed:
                _log.error("a decoder could not be started: %s", one_line(error))
            _finish(self._started, ValueError(f"a decoder could not be started ({one_line(error)}): free some memory"))
            return None
        _finish(self._started, None)
        return process

    def _end(self, process: "_Process") -> None:
        with self._changed:
            self._alive.discard(process)
        process.close()

    def _next(self, process: "_Process | None", only_small: bool) -> _Job | None:
        """Waits for a task and marks it as running; None if the pool is closed."""
        with self._changed:
            while not self._closed:
                self._idle_for_small |= only_small
                for job in [job for job in self._waiting if self._may_take(job, only_small)]:
                    self._waiting.remove(job)
                    if job.future.set_running_or_notify_cancel():
                        job.decoder, job.begun = process, time.monotonic()
                        self._running.add(job)
                        if only_small:
                            self._idle_for_small = False
                            self._changed.notify_all()
                        return job
                self._changed.wait()
        return None

    def _may_take(self, job: _Job, only_small: bool) -> bool:
        if not job.is_small:
            return not only_small
        return only_small or not self._idle_for_small  # processes of lower priority leave it to the idle one

    def _perform(self, job: _Job, process: "_Process | None") -> Result:
        if not self._processes:
            return perform(job.task)
        if process is None:
            raise MediaError("a decoder could not be started: try again later", 503)
        try:
            return process.perform(job.task, _SECONDS + job.more_seconds)
        except MediaError:
            if self._closed and process.ended:
                raise _stopping() from None
            raise


def _check_limits(memory_bytes: int) -> None:
    """Refuses limits under which a decoder might get less memory: a library that lacks some may give wrong pixels."""
    soft, hard = 0, 1  # a decoder sets the second limit by itself
    for limit, which, option in ((resource.RLIMIT_AS, soft, "v"), (resource.RLIMIT_DATA, hard, "d")):
        most = resource.getrlimit(limit)[which]
        if most != resource.RLIM_INFINITY and most < memory_bytes:
            raise ValueError(
                f"a decoder may need {memory_bytes >> 20} MiB of memory and gets {most >> 20}: raise the limit "
                f"(ulimit -{option}), or lower --max-pixels"
            )


def _stopping() -> MediaError:
    return MediaError("the server is stopping: send the request to another one", 503)


def _finish(future: "Future[Any]", result: Any) -> None:
    """Sets a future's result, or its exception, unless it has one or was cancelled."""
    with suppress(InvalidStateError):
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)


class _Process:
    """One decoder process, and the socket to it.

    Attributes:
        is_ready: whether it has said that it takes tasks.
        ended: whether it can take no more tasks.
    """

    def __init__(self, memory_bytes: int, niceness: int):
        """
        Raises:
            OSError: it can't be started.
        """
        self.is_ready = self.ended = False
        self._memory_bytes = memory_bytes
        self._channel, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        arguments = (there.fileno(), memory_bytes, niceness, os.getpid())
        # no keys, and nothing from the directory in which the server runs
        environment = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
        with there:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "deepstack_jax.processing.decoder_process", *map(str, arguments)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[there.fileno()],
                env=environment | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OPENBLAS_NUM_THREADS": "1"},
            )

    def wait_until_ready(self, seconds: float) -> None:
        """
        Raises:
            ValueError: it ended, or takes longer.
        """
        self._channel.settimeout(seconds)
        try:
            self.is_ready = receive_answer(self._channel) is not None
            how = "ended at its start"
        except TimeoutError:
            how = f"did not start in {seconds:.0f} s"
        if not self.is_ready:
            raise ValueError(f"a decoder process {how} (exit code {self.close()}): see that memory is free")
        self._channel.settimeout(None)

    def perform(self, task: Task, seconds: float) -> Result:
        """Runs a task.

        Raises:
            MediaError: it is refused, or the process ended with it.
            OSError, MemoryError: this process is short of open files or memory.
        """
        try:
            send_task(self._channel, LimitedTask(task, seconds))
        except OverflowError:
            raise MediaError("an option of an image or video is a number of more than 64 bits: lower it") from None
        except OSError as error:
            if shortage(error):  # of this process: nothing was sent
                raise
            self.ended = True
        received = None if self.ended else self._receive()
        if received is None:
            raise MediaError(f"an image or video can't be used: {self._why(seconds)}", 413)
        answer, pixels = received
        if isinstance(answer, Failed):
            if answer.unexpected:
                _log.warning("a decoder failed: %s", answer.unexpected)
            self.ended = answer.status == 413  # it may hold the memory that was too much
            raise MediaError(answer.message, answer.status)
        if isinstance(answer, Found):
            return [MediaFile(b"", *file) for file in answer.files]
        if pixels.ndim == 4:
            return Video(pixels, answer.fps, answer.frame_indices, answer.total_frames)
        return pixels

    @property
    def pid(self) -> int:
        return self._process.pid

    def kill(self) -> None:
        """Ends the process at once; `perform` in another thread raises."""
        self.ended = True
        self._process.kill()

    def close(self) -> int:
        """Ends the process and frees what belongs to it; returns its exit code."""
        self._process.kill()
        self._channel.close()
        return self._process.wait()

    def _receive(self) -> Any:
        try:
            received = receive_answer(self._channel)
        except (OSError, ValueError, MemoryError) as error:
            self.ended = True  # amid an answer, or the answer can't be trusted, or is lost
            if shortage(error):
                raise
            received = None
        self.ended = self.ended or received is None
        return received

    def _why(self, seconds: float) -> str:
        """Says why the process ended."""
        self._process.kill()
        code = self._process.wait()
        if code == -signal.SIGPROF:
            return f"decoding it takes more than {seconds:.0f} s, send a smaller or shorter one"
        return f"decoding it ended the decoder (exit code {code}), send an intact and smaller file"
