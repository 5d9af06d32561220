"""One call of the disk fails, or the machine loses power, at any point: nothing is left half done, or read wrong."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from converters.hf_to_orbax import convert
from deepstack_jax.testing.random_checkpoint import tiny_config, write_random_checkpoint
from tests.failing_calls import environment_of, library  # noqa: F401

pytestmark = pytest.mark.slow

# kind of call, errno (0: half of the bytes), and what the message says of it
WRITES = {
    "a write fails": ("w", errno.EIO, "Input/output error"),
    "the disk is full": ("w", errno.ENOSPC, "disk full"),
    "a write is short": ("w", 0, ""),
    "a sync fails": ("s", errno.EIO, "Input/output error"),
    "a rename fails": ("n", errno.EIO, "Input/output error"),
    "a truncation fails": ("t", errno.EIO, "Input/output error"),
}
READS = {
    "a read fails": ("r", errno.EIO, "Input/output error"),
    "a read is short": ("r", 0, ""),
    "a directory can't be read": ("d", errno.EIO, "Input/output error"),
}
AT_MOST = 3  # calls that fail, one per run, spread over all

# runs each work once to count its calls, then once for each call that is to fail
CHILD = """
import json, shutil, sys
from pathlib import Path
import numpy as np
import deepstack_jax as dsj
from converters.hf_to_orbax import convert
from converters.orbax_to_hf import export
from deepstack_jax.checkpoints.digests import model_digest, tensor_digests
from deepstack_jax.checkpoints.manifest import read_manifest
from deepstack_jax.cli.inspect import _verify
from deepstack_jax.errors import one_line
from tests.failing_calls import FailingCalls

library, folder = FailingCalls(sys.argv[1]), Path(sys.argv[2])
at_most, faults, works = int(sys.argv[3]), json.loads(sys.argv[4]), json.loads(sys.argv[5])

def load(source, target):
    model = dsj.load(source)
    model.processor.check_files()
    expected = dict(np.load(folder / "expected.npz"))
    assert model.params.keys() == expected.keys()
    for path, values in model.params.items():
        np.testing.assert_array_equal(np.asarray(values).view(np.uint8), expected[path])

def digests(source, target):
    assert model_digest(tensor_digests(source)) == digest

def verify(source, target):
    _verify(source, None)

functions = {"convert": convert, "export": export, "load": load, "digests": digests, "verify": verify}
digest = model_digest(tensor_digests(folder / "hf"))
params = dsj.load(folder / "hf").params
np.savez(folder / "expected.npz", **{path: np.asarray(values).view(np.uint8) for path, values in params.items()})

def attempt(function, source, target, kind, call, error, where=None, last=None):
    where = where or (source if kind in "rd" else target.parent)
    library.arm(where, kind, call, call if last is None else last, error)
    try:
        functions[function](source, target)
        said = None
    except (OSError, ValueError) as failure:
        said = one_line(failure)
    finally:
        calls = library.calls()
        library.arm("", "-")
    whole = model_digest(tensor_digests(target)) == digest if target.exists() else None
    left = sorted(entry.name for entry in target.parent.iterdir())
    return {"said": said, "calls": calls, "whole": whole, "left": left}

for function, source in works:
    work, source = f"{function} {source}", folder / source
    for name, (kind, error, _) in faults.items():
        target = folder / "out" / function
        target.parent.mkdir()
        count = attempt(function, source, target, kind, -1, 0)["calls"]
        chosen = sorted({i * (count - 1) // max(1, at_most - 1) for i in range(at_most)}) if count else []
        for call in chosen:
            shutil.rmtree(target.parent)
            target.parent.mkdir()
            found = attempt(function, source, target, kind, call, error)
            again = None
            if not target.exists() and function in ("convert", "export"):
                again = attempt(function, source, target, "-", 0, 0)
            print(json.dumps([work, name, call, found, again]), flush=True)
        shutil.rmtree(target.parent)
"""
# the same for each file that can't be read at all
FILES = (
    CHILD.partition("for function, source in works")[0].replace(
        "json.loads(sys.argv[4]), json.loads(sys.argv[5])", "None, json.loads(sys.argv[4])"
    )
    + """
for function, source in works:
    source, target = folder / source, folder / "out" / function
    files = sorted(file for file in source.rglob("*") if file.is_file())
    count = min(at_most, len(files))
    for number in sorted({i * (len(files) - 1) // (count - 1) for i in range(count)}):
        shutil.rmtree(target.parent, ignore_errors=True)
        target.parent.mkdir()
        found = attempt(function, source, target, "r", 0, 5, files[number], 1 << 30)
        print(json.dumps([function, str(files[number]), found]), flush=True)
"""
)
MAKING = [("convert", "hf"), ("export", "ckpt")]
READING = [*MAKING, ("load", "hf"), ("load", "ckpt"), ("verify", "ckpt")]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    config = tiny_config("qwen3_moe", num_hidden_layers=1)
    write_random_checkpoint(folder / "hf", config, dtype="bfloat16", max_shard_bytes=200_000)
    convert(folder / "hf", folder / "ckpt")
    return folder


def run(library: Path, code: str, *arguments: object) -> list[Any]:  # noqa: F811
    """The lines of JSON that a process prints which has the library."""
    done = subprocess.run(
        [sys.executable, "-c", code, str(library), *map(str, arguments)],
        env={**os.environ, "LD_PRELOAD": str(library), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=3000,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_write_that_fails_leaves_nothing_or_everything(made: Path, library: Path):  # noqa: F811
    check_writes(run(library, CHILD, made, AT_MOST, json.dumps(WRITES), json.dumps(MAKING)))


@pytest.mark.exhaustive
def test_any_write_that_fails_leaves_nothing_or_everything(made: Path, library: Path):  # noqa: F811
    check_writes(run(library, CHILD, made, 10_000, json.dumps(WRITES), json.dumps(MAKING)))


def check_writes(results: list[Any]) -> None:
    assert {(work, name) for work, name, *_ in results} >= {("convert hf", name) for name in WRITES}
    for work, name, call, found, again in results:
        case = f"{work}, {name} at call {call}: {found}"
        if found["said"] is None:  # Python copies a file of the sample in another way if the first one fails
            assert name in ("a write is short", "a write fails"), case
            assert found["whole"], case
            continue
        assert WRITES[name][2] in found["said"], case
        assert "[(" not in found["said"], case  # no list of Python's
        if found["whole"] is None:
            assert found["left"] == [], case
            assert again == {**again, "said": None, "whole": True}, f"{case}, then {again}"
        else:  # only the last sync failed, of the folder that holds the directory
            assert found["whole"], case
            assert name == "a sync fails", case


def test_a_read_that_fails_is_told_with_its_file(made: Path, library: Path):  # noqa: F811
    check_reads(made, run(library, CHILD, made, 2, json.dumps(READS), json.dumps([*MAKING, ("load", "ckpt")])))


@pytest.mark.exhaustive
def test_any_read_that_fails_is_told_with_its_file(made: Path, library: Path):  # noqa: F811
    works = [*READING, ("digests", "ckpt"), ("verify", "hf")]
    check_reads(made, run(library, CHILD, made, 10_000, json.dumps(READS), json.dumps(works)))


def check_reads(made: Path, results: list[Any]) -> None:
    """Either the work is done right, because something is read once more, or one line says which file failed."""
    lines = 0
    for work, name, call, found, again in results:
        case = f"{work}, {name} at call {call}: {found}"
        if found["said"] is None:
            assert found["whole"] in (True, None), case
            continue
        assert READS[name][1] != 0, case  # a short read is no error
        if "params can't be read" in found["said"]:  # by Orbax, which does not tell why, and only this once
            assert "try again" in found["said"], case
        else:
            assert READS[name][2] in found["said"], case
            source = made / work.split()[1]
            assert any(str(place) in found["said"] for place in [source, *source.rglob("*")]), case
        assert found["whole"] is None, case
        assert found["left"] == [], case
        assert again is None or again == {**again, "said": None, "whole": True}, f"{case}, then {again}"
        lines += 1
    assert lines > len(results) / 3


def test_a_file_that_cannot_be_read_is_named(made: Path, library: Path):  # noqa: F811
    check_files(made, run(library, FILES, made, 4, json.dumps(READING)))


@pytest.mark.exhaustive
def test_any_file_that_cannot_be_read_is_named(made: Path, library: Path):  # noqa: F811
    check_files(made, run(library, FILES, made, 10_000, json.dumps([*READING, ("digests", "ckpt")])))


def check_files(made: Path, results: list[Any]) -> None:
    assert sum(found["said"] is not None for *_, found in results) > len(results) / 2
    for work, file, found in results:
        case = f"{work}, {file}: {found}"
        if found["said"] is None:  # a file that this work does not read
            assert found["calls"] == 0, case
            continue
        assert "Input/output error" in found["said"] or "os error 5" in found["said"], case
        assert file in found["said"] or "the tokenizer in" in found["said"], case  # the latter is read by a library
        assert found["left"] == [], case


def test_a_command_tells_a_failed_read_in_one_line(made: Path, library: Path, tmp_path: Path):  # noqa: F811
    for command, file in (
        (["convert", made / "hf", tmp_path / "out"], "model-00001-of-00002.safetensors"),
        (["generate", made / "hf", "--prompt", "a", "--max-new-tokens", "1"], "tokenizer.json"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "deepstack_jax", *map(str, command)],
            env=environment_of(library, "r", 0, 1 << 30, errno.EIO, folder=command[1] / file),
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        (line,) = done.stderr.splitlines()
        assert done.returncode == 1
        assert line.startswith("error: "), line
        assert "nput/output error" in line, line
        assert file.partition(".")[0] in line, line
    assert not list(tmp_path.iterdir())


# ---- power losses

# runs one work and keeps what a power loss would leave before each sync and each rename, and at its end
LOSSES = """
import json, sys
from pathlib import Path
from converters.hf_to_orbax import convert
from converters.orbax_to_hf import export
from deepstack_jax.checkpoints.digests import model_digest, tensor_digests
from deepstack_jax.errors import one_line
from tests.failing_calls import FailingCalls
from tests.power_loss import Disk

library, folder, work, at_most = FailingCalls(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
function, source = {"convert": (convert, "hf"), "export": (export, "ckpt")}[work]
digest = model_digest(tensor_digests(folder / "hf"))
root = folder / f"disk-{work}"
root.mkdir()
disk = Disk(root)
library.arm(root, "-")
library.watch(disk.notice)
function(folder / source, root / "new" / "made")
library.watch(None)

def read(made):
    try:
        return model_digest(tensor_digests(made)) == digest
    except (OSError, ValueError) as error:
        return one_line(error)

at_end, count = disk.lose_power("at the end"), len(disk.images)
chosen = [disk.images[number] for number in sorted({i * (count - 1) // max(1, at_most - 1) for i in range(at_most)})]
for number, image in enumerate(at_end + chosen):
    place = folder / f"{work}-{number}"
    image.write(place)
    found = {made.name: read(made) for made in [*place.glob("new/*"), *place.glob("new/.*")]}
    print(json.dumps([image.name, found]), flush=True)
"""


@pytest.mark.parametrize("work", ["convert", "export"])
def test_after_a_power_loss_a_checkpoint_is_right_or_refused(made: Path, library: Path, work: str):  # noqa: F811
    check_losses(library, made, work, 4 * AT_MOST)


@pytest.mark.exhaustive
@pytest.mark.parametrize("work", ["convert", "export"])
def test_after_any_power_loss_a_checkpoint_is_right_or_refused(made: Path, library: Path, work: str):  # noqa: F811
    check_losses(library, made, work, 10_000)


def check_losses(library: Path, made: Path, work: str, at_most: int) -> None:  # noqa: F811
    results = run(library, LOSSES, made, work, at_most)
    assert len(results) >= 4 + min(at_most, 12)
    for name, found in results:
        for directory, said in found.items():
            assert said is True or (isinstance(said, str) and directory in said), f"{name}: {directory}: {said}"
        if name.startswith("at the end"):
            assert found == {"made": True}, name
    said = [one for _, found in results for one in found.values()]
    assert {type(one) for one in said} == {bool, str}  # some are whole, and some are refused
