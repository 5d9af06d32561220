"""A process that decodes images and videos for a server: `python -m deepstack_jax.processing.decoder_process`.

It imports neither JAX nor the model. It gets one task at a time through a socket, under limits on memory and processor
time, and answers with what the functions of `media.py` return. `decoders.py` starts and kills such processes.
"""

import ctypes
import errno
import fcntl
import mmap
import os
import resource
import signal
import socket
import struct
import sys

import msgspec
import numpy as np
from PIL import Image

from deepstack_jax.errors import one_line, shortage
from deepstack_jax.processing.images import ImageOptions, ImageSettings
from deepstack_jax.processing.media import (
    IMAGE_FORMATS,
    Loaded,
    MediaError,
    MediaInput,
    checked_frames,
    checked_image,
    checked_video,
    load_media,
)
from deepstack_jax.processing.sources import MediaFile
from deepstack_jax.processing.videos import Video, VideoOptions, VideoSettings


class CheckImage(msgspec.Struct, frozen=True, tag=True):
    """Asks for `media.checked_image`."""

    data: bytes
    name: str
    image_format: str | None = None


class CheckVideo(msgspec.Struct, frozen=True, tag=True):
    """Asks for `media.checked_video`."""

    data: bytes
    name: str


class CheckFrames(msgspec.Struct, frozen=True, tag=True):
    """Asks for `media.checked_frames`."""

    pictures: list[bytes]
    formats: list[str | None]


class LoadImage(msgspec.Struct, frozen=True, tag=True):
    """Asks for `media.load_media` of an image in one format."""

    data: bytes
    image_format: str | None
    settings: ImageSettings
    options: ImageOptions


class LoadVideo(msgspec.Struct, frozen=True, tag=True):
    """Asks for `media.load_media` of a video."""

    data: bytes
    settings: VideoSettings
    options: VideoOptions


class LoadFrames(msgspec.Struct, frozen=True, tag=True):
    """Asks for `media.load_media` of a video whose frames are pictures, each in one format."""

    pictures: list[tuple[bytes, str | None]]
    settings: VideoSettings
    options: VideoOptions


Task = CheckImage | CheckVideo | CheckFrames | LoadImage | LoadVideo | LoadFrames
Result = list[MediaFile] | Loaded


class LimitedTask(msgspec.Struct, frozen=True):
    """A task, and how many seconds of processor time it may take."""

    task: Task
    seconds: float


class Found(msgspec.Struct, frozen=True, tag=True):
    """What headers say: the arguments of `MediaFile` after the data."""

    files: list[tuple[str | None, int, int, int, float]]


class Pixels(msgspec.Struct, frozen=True, tag=True):
    """The shape of the uint8 pixels that follow; of a video also when its frames are shown (see `Video`)."""

    shape: tuple[int, ...]
    fps: float = 0.0
    frame_indices: tuple[int, ...] = ()
    total_frames: int = 0


class Failed(msgspec.Struct, frozen=True, tag=True):
    """A `MediaError`, and the name of an exception that nobody expected."""

    message: str
    status: int = 400
    unexpected: str = ""


Answer = Found | Pixels | Failed

_ENCODER = msgspec.msgpack.Encoder()
_ANSWERS = msgspec.msgpack.Decoder(Answer)
_TASKS = msgspec.msgpack.Decoder(LimitedTask)
_LENGTHS = struct.Struct("<QQ")


def perform(task: Task) -> Result:
    """Runs a task in this process.

    Raises:
        MediaError, ImageError, VideoError: one line that names the problem and the remedy.
    """
    match task:
        case CheckImage(data, name, image_format):
            return [checked_image(data, name, image_format)]
        case CheckVideo(data, name):
            return [checked_video(data, name)]
        case CheckFrames(pictures, formats):
            return checked_frames(pictures, formats)
        case LoadImage(data, image_format, settings, options):
            return load_media(MediaInput(MediaFile(data, image_format), settings, options))
        case LoadVideo(data, settings, options):
            return load_media(MediaInput(MediaFile(data), settings, options))
        case LoadFrames(pictures, settings, options):
            return load_media(MediaInput([MediaFile(*each) for each in pictures], settings, options))


# ---- messages


def send_task(channel: socket.socket, task: LimitedTask) -> None:
    """Sends a task to a decoder process.

    Raises:
        OverflowError: an option is an integer of more than 64 bits.
        OSError: the process has ended.
    """
    _send(channel, _ENCODER.encode(task))


def receive_answer(channel: socket.socket) -> tuple[Answer, np.ndarray | None] | None:
    """Returns the answer, and after `Pixels` also these, uint8 of its shape; None if the process has ended.

    Raises:
        ValueError: what it sent is not an answer.
        OSError, MemoryError: this process has no descriptor or memory for it.
    """
    if (message := _receive(channel)) is None:
        return None
    head, data = message
    answer = _ANSWERS.decode(head)
    return answer, np.frombuffer(data, np.uint8).reshape(answer.shape) if isinstance(answer, Pixels) else None


def _send(channel: socket.socket, head: bytes, pixels: np.ndarray | None = None) -> None:
    """Sends bytes and pixels through memory that both processes map, because pixels are many."""
    file = os.memfd_create("media", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        data = memoryview(b"" if pixels is None else np.ascontiguousarray(pixels)).cast("B")
        for piece in (memoryview(head), data):
            while piece:
                piece = piece[os.write(file, piece) :]
        socket.send_fds(channel, [_LENGTHS.pack(len(head), len(data))], [file])
    finally:
        os.close(file)


def _receive(channel: socket.socket) -> tuple[memoryview, memoryview] | None:
    message, files, _, _ = socket.recv_fds(channel, _LENGTHS.size, 1)
    if not message:
        return None
    if not files:  # the kernel drops what this process has no descriptor for
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    (file,) = files
    try:
        head, data = _LENGTHS.unpack(message)
        # memory that its sender may shorten would end the process that reads it
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        if os.fstat(file).st_size != head + data:
            raise ValueError("a message has another length than it says")
        flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
        view = memoryview(mmap.mmap(file, head + data, flags=flags, prot=mmap.PROT_READ))
    finally:
        os.close(file)
    return view[:head], view[head:]


# ---- the process


def main(channel: int, memory_bytes: int, niceness: int, parent: int) -> None:
    """Performs tasks until the socket is closed.

    Args:
        channel: file descriptor of the socket.
        memory_bytes: limit of the process's own memory.
        niceness: added to the parent's.
        parent: id of the process with which this one ends.
    """
    _end_with(parent)
    os.nice(niceness)
    for number in (signal.SIGINT, signal.SIGTERM):  # the parent decides when requests end
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # see _limit_time
    for limit, most in (
        (resource.RLIMIT_DATA, memory_bytes),
        (resource.RLIMIT_FSIZE, memory_bytes),  # of shared memory
        (resource.RLIMIT_CORE, 0),
    ):
        given = resource.getrlimit(limit)[1]  # only root may raise it
        most = most if given == resource.RLIM_INFINITY else min(most, given)
        resource.setrlimit(limit, (most, most))
    Image.init()
    for name in set(Image.OPEN) - set(IMAGE_FORMATS):
        Image.ID.remove(name)
        del Image.OPEN[name]
    with socket.socket(fileno=channel) as connection:
        _send(connection, _ENCODER.encode(Found([])))  # ready
        while (message := _receive(connection)) is not None:
            limited = _TASKS.decode(message[0])
            del message
            _limit_time(limited.seconds)
            _send(connection, *_answer(limited.task, memory_bytes))


def _answer(task: Task, memory_bytes: int) -> tuple[bytes, np.ndarray | None]:
    try:
        result = perform(task)
    except MediaError as error:
        return _ENCODER.encode(Failed(str(error), error.status)), None
    except ValueError as error:
        return _ENCODER.encode(Failed(one_line(error))), None
    except Exception as error:  # a damaged file can make decoders raise anything
        if (lacking := shortage(error)) == "memory":
            needs = f"decoding it needs more than {memory_bytes >> 20} MiB of memory"
            return _ENCODER.encode(Failed(f"an image or video can't be used: {needs}, scale it down", 413)), None
        if lacking:
            return _ENCODER.encode(Failed(f"a decoder is short of {lacking}: try again later", 503)), None
        message = f"an image or video can't be decoded ({type(error).__name__}): send an intact file"
        return _ENCODER.encode(Failed(message, unexpected=repr(error)[:1000])), None
    if isinstance(result, Video):
        shown = result.fps, result.frame_indices, result.total_frames
        return _ENCODER.encode(Pixels(result.frames.shape, *shown)), result.frames
    if isinstance(result, np.ndarray):
        return _ENCODER.encode(Pixels(result.shape)), result
    files = [(file.format, file.width, file.height, file.frames, file.fps) for file in result]
    return _ENCODER.encode(Found(files)), None


def _limit_time(seconds: float) -> None:
    """Lets the kernel end this process with SIGPROF after more seconds of processor time.

    RLIMIT_CPU would count from the process's start, by the kernel's ticks, which no call of this process reads:
    getrusage may tell half or twice as much, and the difference grows with every task.
    """
    signal.setitimer(signal.ITIMER_PROF, seconds)


def _end_with(parent: int) -> None:
    """Lets the kernel end this process with the thread that started it."""
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended already
        os._exit(0)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
