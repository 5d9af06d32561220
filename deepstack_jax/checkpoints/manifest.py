"""What a converted checkpoint consists of: deepstack_jax.json lists each of its files with its length and checksum.

A checksum is the XXH3-128 of a file, taken from the values as they are written. Loading checks every file that it
reads: of the parameters only the pieces (files of rows, see orbax_writer.py) whose rows the process holds, everything
else whole. The list has a checksum too. Files that the list lacks are refused where something would read them.

People edit some of the text files beside the parameters. An edited one is refused as a damaged one is, until
`accept_copies` takes it into the list.
"""

import json
import logging
import os
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import xxhash

from deepstack_jax.checkpoints.safetensors_file import CheckpointError
from deepstack_jax.config_values import unique_keys
from deepstack_jax.errors import naming, short
from deepstack_jax.rounding import cdiv

FORMAT_FILE = "deepstack_jax.json"
FORMAT_VERSION = 3
PARAMS = "params"
_WITHOUT_SUMS = 2  # the format version that has only the lengths of the parameters' files
_PIECE = re.compile(rf"{PARAMS}/state/(.+)/c\.(\d+)(?:\.0)*")
_SUM = re.compile(r"[0-9a-f]{32}")
_THREADS = 4
_READ = 1 << 18  # bytes per read, so that they are still in the processor's cache when they are summed

# Files that are copied with the weights: those of the configuration, the tokenizer and the processors.
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
)

_log = logging.getLogger(__name__)


def companions(directory: Path) -> list[Path]:
    """Returns the files of `directory` that `COMPANIONS` names."""
    names = sorted(os.listdir(directory))  # unlike glob, it raises if the directory can't be read
    matching = [name for pattern in COMPANIONS for name in names if fnmatchcase(name, pattern)]
    return [directory / name for name in matching if (directory / name).is_file()]


@dataclass(frozen=True)
class Manifest:
    """The contents of deepstack_jax.json.

    Attributes:
        directory: the converted checkpoint.
        contents: the whole object, without its checksum.
        files: path in the directory -> (bytes, checksum); the checksum is empty in a checkpoint of format version 2.
    """

    directory: Path
    contents: dict[str, Any]
    files: dict[str, tuple[int, str]]

    @property
    def has_sums(self) -> bool:
        return self.contents["format_version"] != _WITHOUT_SUMS

    @property
    def nbytes(self) -> int:
        """The bytes of all files together."""
        return sum(size for size, _ in self.files.values())

    @cached_property
    def pieces(self) -> dict[str, list[str]]:
        """The files of each parameter that is stored in pieces, by dotted path and in the order of their rows."""
        numbered: dict[str, dict[int, str]] = {}
        for name in self.files:
            if match := _PIECE.fullmatch(name):
                numbered.setdefault(match[1], {})[int(match[2])] = name
        return {path: [names[number] for number in sorted(names)] for path, names in numbered.items()}

    @property
    def arrays(self) -> int:
        """The number of parameters that are arrays of their own; 0 if Orbax keeps them in another way."""
        return sum(name.endswith("/zarr.json") for name in self.files)

    def check_copies(self) -> None:
        """Checks the files beside the parameters, those of the configuration, tokenizer and processors.

        Logs a warning if the checkpoint has no checksums.
        """
        if not self.has_sums:
            message = "%s has no checksums, so damaged weights would go unnoticed: convert again to get them"
            _log.warning(message, self.directory)
            return
        self.check(self.copies)
        if added := [file for file in companions(self.directory) if file.name not in self.files]:
            raise CheckpointError(f"{added[0]} was added after the conversion: {self._remedy(added[0].name)}")

    @property
    def copies(self) -> list[str]:
        """The files beside the parameters."""
        return [name for name in self.files if not _is_stored(name)]

    def check_tree(self) -> None:
        """Checks the parameters' files: the lengths of all, and the contents of those that are not pieces."""
        stored = [name for name in self.files if _is_stored(name)]
        for name in stored:
            self._check_length(name)
        if self.has_sums and (added := _files(self.directory, self.directory / PARAMS) - {*stored}):
            raise CheckpointError(f"{self.directory / min(added)} was added after the conversion: remove it")
        self.check(name for name in stored if not _PIECE.fullmatch(name))

    def pieces_held(self, path: str, shape: tuple[int, ...], sharding: jax.sharding.Sharding | None) -> list[str]:
        """Returns the pieces of a parameter with rows that this process's devices hold; without a sharding, all."""
        names = self.pieces.get(path, [])
        if sharding is not None and names:
            rows = shape[0] // len(names)
            indices = sharding.addressable_devices_indices_map(shape).values()
            held = {index[0].indices(shape[0])[:2] if index else (0, shape[0]) for index in indices}
            wanted = {number for first, end in held for number in range(first // rows, cdiv(end, rows))}
            names = [names[number] for number in sorted(wanted)]
        return names

    def check(self, names: Iterable[str], progress: Callable[[int], object] | None = None) -> None:
        """Raises `CheckpointError` unless each of the named files is as it was written.

        `progress` is called with the number of bytes checked so far.
        """
        done = 0
        with ThreadPoolExecutor(_THREADS, "checksum") as pool:
            for size in pool.map(self._check_one, names):
                done += size
                if progress:
                    progress(done)

    def accept_copies(self) -> list[str]:
        """Takes the files beside the parameters as they are now into deepstack_jax.json, which is replaced at once.

        Returns a line for each file that differs from the list. The caller checks that the files are valid.
        """
        now = {file.name: _measured(file) for file in companions(self.directory)}
        before = {name: self.files[name] for name in self.copies}
        changes = [
            f"{name} was {'removed' if name not in now else 'changed' if name in before else 'added'}"
            for name in sorted({*now, *before})
            if now.get(name) != before.get(name)
        ]
        if changes:
            _write(self.directory, self.contents, {n: f for n, f in self.files.items() if _is_stored(n)} | now)
        return changes

    def _check_one(self, name: str) -> int:
        self._check_length(name)
        size, expected = self.files[name]
        if expected and file_sum(self.directory / name) != expected:
            raise self._refusal(name, "is not what was written (its checksum differs)")
        return size

    def _check_length(self, name: str) -> None:
        file, expected = self.directory / name, self.files[name][0]
        size = file.stat().st_size if file.is_file() else None
        if size != expected:
            raise self._refusal(name, "is missing" if size is None else f"has {size} bytes, expected {expected}")

    def _refusal(self, name: str, fault: str) -> CheckpointError:
        return CheckpointError(f"{self.directory / name} {fault}: {self._remedy(name)}")

    def _remedy(self, name: str) -> str:
        if _is_stored(name):
            return "the checkpoint is incomplete or damaged, convert again"
        command = f"deepstack-jax inspect {shlex.quote(str(self.directory))} --accept-edits"
        return f"where that was done on purpose, run {command}, otherwise convert again"


def read_manifest(directory: str | Path) -> Manifest:
    """Reads deepstack_jax.json; raises `CheckpointError` if that is missing, damaged or of another format version."""
    file = Path(directory) / FORMAT_FILE
    try:
        with naming(file):
            data = file.read_bytes()
        contents = json.loads(data, object_pairs_hook=unique_keys)
        number, given = contents["format_version"], contents.pop("xxh3_128", None)
        if given is not None and given != _sum_of_list(contents):
            raise ValueError("the checksum differs")
    except FileNotFoundError:
        raise CheckpointError(
            f"{directory} has no {FORMAT_FILE}: give a directory made by deepstack-jax convert"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise _damaged(file) from None
    if number not in (_WITHOUT_SUMS, FORMAT_VERSION):
        raise CheckpointError(
            f"{file} has format_version {short(number)}, expected {FORMAT_VERSION}: "
            "convert again, or update deepstack-jax"
        )
    if number == _WITHOUT_SUMS:
        sizes = contents.get("params") or {}
        if given is not None or "files" in contents or not isinstance(sizes, dict):
            raise _damaged(file)
        entries = {f"{PARAMS}/{name}": {"bytes": size} for name, size in sizes.items()}
        return Manifest(Path(directory), contents, {n: _entry(file, n, one, False) for n, one in entries.items()})
    if given is None:
        raise CheckpointError(f"{file} has no checksum of its own: convert the checkpoint again")
    files = contents.get("files")
    if not isinstance(files, dict) or not files:
        raise CheckpointError(f"{file} lists no files: convert the checkpoint again")
    return Manifest(Path(directory), contents, {name: _entry(file, name, one, True) for name, one in files.items()})


def write_manifest(directory: Path, description: Mapping[str, Any], sums: Mapping[str, str]) -> None:
    """Writes deepstack_jax.json for the files in `directory`; `sums` has the checksums already known, by path."""
    _write(directory, description, {name: _measured(directory / name, sums.get(name)) for name in _files(directory)})


def file_sum(file: Path) -> str:
    """Returns the XXH3-128 of a file as 32 hexadecimal digits; raises `OSError` that names it."""
    digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(_READ))
    with naming(file), file.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def _measured(file: Path, digest: str | None = None) -> tuple[int, str]:
    """Returns (bytes, checksum); `digest` is the checksum where it is known."""
    return file.stat().st_size, digest or file_sum(file)


def walk(directory: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """`os.walk`, which raises `OSError` where that would leave out a directory that can't be read."""

    def refuse(error: OSError) -> None:
        raise error

    return os.walk(directory, onerror=refuse)


def _is_stored(name: str) -> bool:
    return name.startswith(f"{PARAMS}/")


def _files(directory: Path, under: Path | None = None) -> set[str]:
    """Returns the paths, relative to `directory`, of all its files except for hidden ones, or of those in `under`."""
    found = ((Path(parent), names) for parent, _, names in walk(under or directory))
    paths = ((parent / name).relative_to(directory).as_posix() for parent, names in found for name in names)
    return {path for path in paths if not any(part.startswith(".") for part in path.split("/"))}


def _write(directory: Path, description: Mapping[str, Any], files: Mapping[str, tuple[int, str]]) -> None:
    """Replaces deepstack_jax.json in one step, and forces it to disk."""
    listed = {name: {"bytes": size, "xxh3_128": digest} for name, (size, digest) in sorted(files.items())}
    contents = {**description, "format_version": FORMAT_VERSION, "files": listed}
    text = json.dumps({**contents, "xxh3_128": _sum_of_list(contents)}, indent=1)
    staged = directory / f".{FORMAT_FILE}.{os.getpid()}"
    try:
        with naming(staged), staged.open("w") as stream:
            stream.write(text + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(staged, directory / FORMAT_FILE)
    finally:
        staged.unlink(missing_ok=True)


def _sum_of_list(contents: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(contents, sort_keys=True).encode())


def _entry(file: Path, name: str, one: Any, has_sum: bool) -> tuple[int, str]:
    if Path(name).is_absolute() or ".." in Path(name).parts:
        message = f"{file} lists {short(name)}, which is not inside the directory: convert the checkpoint again"
        raise CheckpointError(message)
    match one:
        case {"bytes": bool()}:
            pass
        case {"bytes": int(size), "xxh3_128": str(digest)} if has_sum and _SUM.fullmatch(digest):
            return size, digest
        case {"bytes": int(size)} if not has_sum:
            return size, ""
    raise CheckpointError(f"{file} has no length or checksum of {short(name)[1:-1]}: convert the checkpoint again")


def _damaged(file: Path) -> CheckpointError:
    return CheckpointError(f"{file} is damaged: convert the checkpoint again")
