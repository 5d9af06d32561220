"""Decoder processes: the bits of the library, and limits that one bad file meets without harm to others."""

import asyncio
import io
import os
import signal
import struct
import subprocess
import sys
import zlib
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from deepstack_jax.processing import decoders as pools
from deepstack_jax.processing.decoders import Decoders
from deepstack_jax.processing.images import ImageOptions, ImageSettings
from deepstack_jax.processing.media import MediaError, MediaInput, load_media, prepared_bytes
from deepstack_jax.processing.preparation import ByteBudget
from deepstack_jax.processing.sources import MediaFile
from deepstack_jax.processing.videos import Video, VideoOptions, VideoSettings
from tests.films import film, picture, shared_samples
from tests.media import IMAGES, VIDEOS, opened

IMAGE, FILM = (ImageSettings(), ImageOptions()), (VideoSettings(), VideoOptions())
SMALL = MediaInput(opened(IMAGES["PNG RGB"]()), *IMAGE)


def with_decoders(work: Callable[[Decoders], Awaitable[Any]], **options: Any) -> Any:
    async def run() -> Any:
        decoders = Decoders(**{"processes": 1} | options)
        await decoders.start()
        try:
            return await asyncio.wait_for(work(decoders), 120)
        finally:
            decoders.close()
            for thread in decoders._threads:  # the next test counts processes
                await asyncio.to_thread(thread.join, 60)
                assert not thread.is_alive()

    return asyncio.run(run())


async def loaded(decoders: Decoders, media: MediaInput) -> Any:
    return await decoders.load(media, await decoders.check(media))


def processes() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "decoder_process" in " ".join(child.cmdline())]


def huge(mode: str, colours: int, depth: int, side: int = 8192) -> bytes:
    """A PNG of 64 megapixels in some 60 KB; all of its values are 0."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    row = bytes(1 + side * depth // 8 * {"grey": 1, "rgba": 4}[mode])
    packer = zlib.compressobj(9)
    data = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, depth, colours, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def test_a_decoder_gives_the_bits_of_the_library():
    kinds = ("JPEG CMYK", "JPEG rotated", "MPO", "PNG P, transparent", "WebP RGBA", "GIF P", "TIFF CMYK", "AVIF RGB")
    images = [MediaInput(opened(IMAGES[kind]()), *IMAGE) for kind in kinds]
    frames = [opened(picture("JPEG", frame)) for frame in film(6)]
    videos = [MediaInput(MediaFile(VIDEOS[kind]()), *FILM) for kind in ("mkv", "webm", "gif", "frames in a data URI")]
    videos.append(MediaInput(frames, FILM[0], VideoOptions(fps=2.5)))

    async def work(decoders: Decoders) -> list[Any]:
        return [await loaded(decoders, each) for each in images + videos]

    for each, found in zip(images + videos, with_decoders(work), strict=True):
        expected = load_media(each)
        if isinstance(expected, Video):
            assert (found.fps, found.frame_indices, found.total_frames) == (
                expected.fps,
                expected.frame_indices,
                expected.total_frames,
            )
            found, expected = found.frames, expected.frames
        np.testing.assert_array_equal(found, expected, strict=True)


def test_a_decoder_imports_no_model_and_keeps_no_secret():
    code = (
        "import sys, deepstack_jax.processing.decoder_process; print({'jax', 'transformers', 'flax'} & {*sys.modules})"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout.strip() == b"set()"
    os.environ["DEEPSTACK_JAX_API_KEY"] = "secret"

    async def work(_decoders: Decoders) -> None:
        assert all("secret" not in str(child.environ()) for child in processes())

    try:
        with_decoders(work)
    finally:
        del os.environ["DEEPSTACK_JAX_API_KEY"]


def test_a_refusal_is_one_line_and_the_decoder_goes_on():
    async def work(decoders: Decoders) -> None:
        (before,) = processes()
        for media, words in (
            (MediaInput(MediaFile(b"no picture", "PNG"), *IMAGE), "not an image"),
            (MediaInput(MediaFile(IMAGES["PPM"]()), *IMAGE), "not an image"),
            (MediaInput(opened(IMAGES["JPEG RGB"]()[:900]), *IMAGE), "damaged or truncated"),
            (MediaInput(MediaFile(b"\0\0\0\x18ftypisom"), *FILM), "not a video"),
            (MediaInput([], *FILM), "no frames"),
            (MediaInput(SMALL.source, IMAGE[0], ImageOptions(max_pixels=10**30)), "more than 64 bits"),
        ):
            with pytest.raises(MediaError, match=words) as caught:
                await loaded(decoders, media)
            assert "\n" not in str(caught.value)
            assert caught.value.status == 400
        await loaded(decoders, SMALL)
        assert processes() == [before]

    with_decoders(work)


def test_a_cancelled_request_ends_its_decoder_and_no_other(monkeypatch: pytest.MonkeyPatch):
    """One decoder is stopped, as one that hangs; the other one answers meanwhile."""

    async def work(decoders: Decoders) -> None:
        while sum(process.is_ready for process in decoders._alive) < 2:
            await asyncio.sleep(0.01)
        stopped, other = processes()
        stopped.suspend()
        tasks = []
        while not any(job.decoder and job.decoder.pid == stopped.pid for job in decoders._running):
            tasks.append(asyncio.create_task(loaded(decoders, SMALL)))
            await asyncio.sleep(0.01)
        while sum(not task.done() for task in tasks) > 1:
            await asyncio.sleep(0.01)
        for _ in range(5):
            await loaded(decoders, SMALL)
        (task,) = (task for task in tasks if not task.done())
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(task, 0.01)
        await asyncio.to_thread(psutil.wait_procs, [stopped])
        await asyncio.gather(*(loaded(decoders, SMALL) for _ in range(4)))
        assert other in processes()
        assert stopped not in processes()

    with_decoders(work, processes=2)


def test_too_much_time_or_memory_ends_only_the_request(monkeypatch: pytest.MonkeyPatch):
    large = MediaInput(opened(huge("rgba", 6, 8, 4096)), *IMAGE)

    async def memory(decoders: Decoders) -> None:
        (before,) = processes()
        with pytest.raises(MediaError, match="needs more than 100 MiB of memory, scale it down") as caught:
            await loaded(decoders, large)
        assert caught.value.status == 413
        await loaded(decoders, SMALL)
        assert before not in processes()

    with_decoders(memory, memory_bytes=100 << 20)
    monkeypatch.setattr(pools, "_SECONDS", 0.1)
    monkeypatch.setattr(pools, "_PIXELS_PER_SECOND", 1e12)

    async def time(decoders: Decoders) -> None:
        with pytest.raises(MediaError, match="takes more than 0 s, send a smaller") as caught:
            await loaded(decoders, MediaInput([large.source] * 8, VideoSettings(), VideoOptions(fps=2)))
        assert caught.value.status == 413
        await loaded(decoders, SMALL)

    with_decoders(time)


def test_large_files_of_others_do_not_hold_up_a_small_picture():
    large = MediaInput(opened(huge("grey", 0, 16)), *IMAGE)

    async def work(decoders: Decoders) -> None:
        ended: list[str] = []

        async def one(name: str, media: MediaInput) -> None:
            await decoders.load(media, await decoders.check(media))
            ended.append(name)

        others = [asyncio.create_task(one("large", large)) for _ in range(3)]
        while not (decoders._running and len(decoders._waiting) == 2):  # the headers of all are read
            await asyncio.sleep(0.01)
        await one("small", SMALL)
        assert ended.count("large") < 3
        niceness = psutil.Process().nice()
        assert sorted(process.nice() - niceness for process in processes()) == [0, 10]
        await asyncio.gather(*others)

    with_decoders(work, processes=2)


@pytest.mark.parametrize(("mode", "colours", "depth"), [("grey", 0, 16), ("rgba", 6, 8)])
def test_64_megapixels_of_any_mode_take_little_more_than_source_and_result(mode: str, colours: int, depth: int):
    """Pillow keeps 4 bytes per pixel of colours and 2 of 16-bit grey; the rest is the interpreter and one strip."""
    media = MediaInput(opened(huge(mode, colours, depth)), *IMAGE)

    async def work(decoders: Decoders) -> int:
        found = await loaded(decoders, media)
        (child,) = processes()
        status = await asyncio.to_thread(Path(f"/proc/{child.pid}/status").read_text)
        assert found.shape == (4096, 4096, 3)
        return int(status.partition("VmHWM:")[2].split()[0]) << 10

    source = {"rgba": 4, "grey": 2}[mode]
    assert with_decoders(work) < (source + 4) * (64 << 20) + 3 * 2 * 4096 * 4096 * 4 // 3 + (200 << 20)


def test_a_decoder_ends_with_its_server():
    code = (
        "import asyncio, sys; from deepstack_jax.processing.decoders import Decoders\n"
        "async def main():\n"
        "    await Decoders(2).start(); print('ready', flush=True); sys.stdin.read()\n"
        "asyncio.run(main())"
    )
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as server:
        assert server.stdout
        server.stdout.readline()
        children = psutil.Process(server.pid).children()
        for child in children:
            child.send_signal(signal.SIGTERM)  # it ends when the server does, not before
        server.kill()
    assert children
    assert not psutil.wait_procs(children, timeout=20)[1]


def test_a_full_or_closed_pool_refuses():
    async def work(decoders: Decoders) -> None:
        (stopped,) = processes()
        stopped.suspend()
        tasks = [asyncio.create_task(loaded(decoders, SMALL)) for _ in range(3)]
        refused, _waiting = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        assert all("wait to be decoded" in str(task.exception()) for task in refused)
        decoders.close()
        for error in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(error, MediaError)
            assert error.status == 503
        with pytest.raises(MediaError, match="the server is stopping"):
            await loaded(decoders, SMALL)

    with_decoders(work, max_waiting=1)


def test_a_decoder_that_does_not_start_is_not_waited_for(monkeypatch: pytest.MonkeyPatch):
    async def closed(decoders: Decoders) -> None:
        (process,) = decoders._alive
        stopped = psutil.Process(process.pid)
        process.kill()
        stopped.wait()
        with pytest.raises(MediaError, match="ended the decoder"):
            await loaded(decoders, SMALL)
        while not (found := processes()):  # the next one
            await asyncio.sleep(0.001)
        with suppress(psutil.NoSuchProcess):
            found[0].suspend()

    with_decoders(closed)
    monkeypatch.setattr(pools, "_START_SECONDS", 0.001)
    with pytest.raises(ValueError, match="did not start in 0 s"):
        with_decoders(closed)


def test_memory_is_taken_in_turn_and_given_back_once():
    async def work() -> None:
        budget = ByteBudget(100)
        first, second = await budget.take(60), await budget.take(40)
        large, small = (asyncio.ensure_future(budget.take(count)) for count in (90, 5))
        second()
        second()
        await asyncio.sleep(0)
        assert budget.taken == 60
        assert not small.done()  # it doesn't overtake
        large.cancel()
        with pytest.raises(asyncio.CancelledError):
            await large
        release = await small
        with pytest.raises(MediaError, match="send fewer or smaller ones") as caught:
            await budget.take(101)
        assert caught.value.status == 413
        first()
        release()
        assert budget.taken == 0

    asyncio.run(work())


def test_the_bytes_of_prepared_pixels_are_known_from_the_header():
    pixels = {"an image": SMALL, "a video": MediaInput(MediaFile(VIDEOS["mkv"]()), *FILM)}

    async def work(decoders: Decoders) -> None:
        for media in pixels.values():
            result = await loaded(decoders, media)
            count = result.size // 3 if isinstance(result, np.ndarray) else result.frames.size // 3
            copies = 2 if isinstance(result, np.ndarray) else 1
            assert prepared_bytes(media, await decoders.check(media)) == count * (3 + 12 * copies)

    with_decoders(work)


def test_large_frames_behind_a_small_header_are_refused_in_no_time():
    content = shared_samples(picture("JPEG", Image.new("L", (4000, 4000))), 7200)

    async def work(decoders: Decoders) -> None:
        for _ in range(3):
            with pytest.raises(MediaError, match="share their bytes"):
                await loaded(decoders, MediaInput(MediaFile(content), *FILM))

    with_decoders(work)
    assert len(io.BytesIO(content).getvalue()) < 1 << 20
