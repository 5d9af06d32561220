"""Files written past the page cache hold what was written, on a disk and on a file system in memory."""

import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from deepstack_jax.checkpoints.direct_file import DirectFile, aligned_empty


@pytest.fixture(params=["disk", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    if request.param == "disk":
        yield tmp_path
    else:
        with tempfile.TemporaryDirectory(dir="/dev/shm") as shared:
            yield Path(shared)


@pytest.mark.parametrize("length", [0, 1, 4095, 4096, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, (5 << 20) + 777])
def test_the_file_holds_what_was_written_in_pieces_of_any_length(folder: Path, length: int):
    data = np.random.default_rng(length).integers(0, 256, length, np.uint8)
    with DirectFile(folder / "file") as file:
        for start in range(0, length, 300_007):
            file.write(data[start : start + 300_007])
    assert (folder / "file").read_bytes() == data.tobytes()


def test_aligned_and_other_arrays_follow_one_another(folder: Path):
    parts = [aligned_empty((n,), np.uint16) for n in (4096, 2048, 5, 4096)] + [np.empty(77, np.uint16)]
    for part in parts:
        part[:] = np.random.default_rng(len(part)).integers(0, 1 << 16, len(part))
    with DirectFile(folder / "file") as file:
        for part in parts:
            file.write(part)
    assert (folder / "file").read_bytes() == b"".join(part.tobytes() for part in parts)


def test_an_existing_file_is_left_alone(folder: Path):
    (folder / "file").write_text("mine")
    with pytest.raises(FileExistsError):
        DirectFile(folder / "file")
    assert (folder / "file").read_text() == "mine"


def test_an_error_inside_is_not_hidden_by_closing(folder: Path):
    def interrupted() -> None:
        with DirectFile(folder / "file") as file:
            file.write(np.zeros(10, np.uint8))
            raise OSError(errno.EIO, "stop")

    with pytest.raises(OSError, match="stop"):
        interrupted()
    open_files = {os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()}
    assert str(folder / "file") not in open_files
