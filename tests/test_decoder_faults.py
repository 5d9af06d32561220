"""A decoder process lacks memory, threads or descriptors: its request is refused in one line, and all others go on."""

import asyncio
import errno
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deepstack_jax.processing.decoders import Decoders
from deepstack_jax.processing.media import MediaError, MediaInput, load_media
from deepstack_jax.processing.sources import MediaFile
from deepstack_jax.processing.videos import Video
from deepstack_jax.serving.errors import as_request_error
from tests.failing_calls import library  # noqa: F401
from tests.media import IMAGES, VIDEOS, opened
from tests.test_decoders import FILM, IMAGE, SMALL, loaded, processes, with_decoders

FOREVER = 1 << 30
# not H.264: FFmpeg leaves out frames for which it gets no memory, and says nothing
KINDS = ("JPEG progressive", "PNG RGBA", "WebP RGB", "GIF P", "TIFF CMYK", "AVIF RGB", "gif", "webm")


class Faults:
    """What fails in each task of the decoders that are started from here on."""

    def __init__(self, folder: Path, library: Path, monkeypatch: pytest.MonkeyPatch):  # noqa: F811
        self._armed, python = folder / "armed", folder / "python"
        run = f"{sys.executable} -P -m tests.faulty_decoder {library} {self._armed}"
        python.write_text(f'#!/bin/sh\nshift 3\nLD_PRELOAD={library} exec {run} "$@"\n')
        python.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(python))
        self.arm("-")

    def arm(self, kind: str, first: int = 0, last: int = FOREVER, error: int = 0) -> None:
        """Lets calls of a kind fail; of allocations those of 4 KiB and more."""
        armed = {"kind": kind, "first": first, "last": last, "error": error, "least": 1 << 12}
        self._armed.write_text(json.dumps(armed))


@pytest.fixture
def faults(tmp_path: Path, library: Path, monkeypatch: pytest.MonkeyPatch) -> Faults:  # noqa: F811
    return Faults(tmp_path, library, monkeypatch)


def media_of(kind: str) -> MediaInput:
    return (
        MediaInput(opened(IMAGES[kind]()), *IMAGE) if kind in IMAGES else MediaInput(MediaFile(VIDEOS[kind]()), *FILM)
    )


def pixels_of(result: Any) -> np.ndarray:
    return result.frames if isinstance(result, Video) else result


async def refusal(decoders: Decoders, media: MediaInput) -> int | None:
    """The status with which a file is refused, in one line; None if its pixels are right."""
    (found,) = await asyncio.gather(loaded(decoders, media), return_exceptions=True)
    if isinstance(found, MediaError):
        assert "\n" not in str(found)
        return found.status
    np.testing.assert_array_equal(pixels_of(found), pixels_of(load_media(media)), strict=True)
    return None


def check_allocations(faults: Faults, kind: str, numbers: list[int]) -> list[int | None]:
    media = media_of(kind)

    async def work(decoders: Decoders) -> list[int | None]:
        found = []
        for number in numbers:
            (before,) = decoders._alive
            faults.arm("m", number, number, errno.ENOMEM)
            found.append(await refusal(decoders, media))
            faults.arm("-")
            assert await refusal(decoders, SMALL) is None
            assert await refusal(decoders, media) is None
            assert (before in decoders._alive) == (found[-1] != 413)  # it may hold what it could not free
        return found

    return with_decoders(work)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_an_allocation_that_fails_refuses_its_file_only(kind: str, faults: Faults):
    found = check_allocations(faults, kind, [0, 3, 9])
    assert 413 in found
    assert {*found} <= {None, 400, 413}  # some libraries call it damage


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", KINDS)
def test_any_allocation_may_fail(kind: str, faults: Faults):
    assert {*check_allocations(faults, kind, list(range(40)))} <= {None, 400, 413}


def test_a_decoder_without_threads_refuses_and_another_one_answers(faults: Faults):
    async def work(decoders: Decoders) -> None:
        faults.arm("p", error=errno.EAGAIN)
        assert await refusal(decoders, media_of("webm")) == 503
        stuck, others = media_of("webm"), [media_of("PNG RGBA")] * 4  # these need no thread
        assert await asyncio.gather(*(refusal(decoders, one) for one in (stuck, *others))) == [503, *[None] * 4]
        faults.arm("-")
        assert await refusal(decoders, stuck) is None

    with_decoders(work)


def test_a_server_without_descriptors_does_not_blame_the_file():
    async def work(decoders: Decoders) -> None:
        (before,) = processes()
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
        try:
            with pytest.raises(OSError, match="Too many open files") as caught:
                await loaded(decoders, SMALL)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert as_request_error(caught.value).status == 503
        assert await refusal(decoders, SMALL) is None
        assert processes() == [before]

    with_decoders(work)


@pytest.mark.parametrize("option", ["v", "d"])
def test_a_limit_below_what_a_decoder_may_need_is_told_at_the_start(option: str):
    code = "import asyncio; from deepstack_jax.processing.decoders import Decoders; asyncio.run(Decoders(1).start())"
    command = ["sh", "-c", f'ulimit -{option} 2000000 && exec "$@"', "sh", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == (
        "ValueError: a decoder may need 2048 MiB of memory and gets 1953: raise the limit "
        f"(ulimit -{option}), or lower --max-pixels"
    )


def test_a_decoder_starts_below_a_hard_limit_of_the_server():
    """Only root may raise one, and not even root should."""
    code = (
        "import asyncio, resource, psutil; from deepstack_jax.processing.decoders import Decoders\n"
        "async def main():\n"
        "    pool = Decoders(1, 1 << 30); await pool.start(); (child,) = psutil.Process().children()\n"
        "    print(resource.prlimit(child.pid, resource.RLIMIT_FSIZE)); pool.close()\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20)); asyncio.run(main())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str((1 << 20, 1 << 20))
