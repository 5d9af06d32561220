"""`python -m tests.fuzz SECONDS [TARGET...]`: searches each target, and keeps what it finds in tests/fuzz/corpus.

Each target is searched in a process of its own, which may crash, hang or run out of memory; the input is then kept too.
"""

import hashlib
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.fuzz.loop import Failure, read_corpus, search
from tests.fuzz.targets import IN_MEMORY, TARGETS

CORPUS = Path(__file__).parent / "corpus"
LARGEST_KEPT, LARGEST_CORPUS = 4 << 10, 150 << 10  # bytes of an input, and of a target's
MEMORY = 4 << 30
ONE = "--one"  # the process of one target


def keep(name: str, data: bytes, kind: str = "") -> Path:
    file = CORPUS / name / f"{kind}{hashlib.sha256(data).hexdigest()[:16]}"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)
    return file


def run(name: str, seconds: float, seed: int, last: Path) -> None:
    """Searches one target; exit code 1 for a failure. `last` is the file for the input that is being tried."""
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    target, folder = TARGETS[name], CORPUS / name
    if not folder.is_dir():
        for data in target.seeds():
            keep(name, data)
    corpus = read_corpus(folder)
    try:
        kept, tried = search(target, corpus, seconds, seed, last)
    except Failure as failure:
        last.unlink()
        print(f"{name}: {keep(name, failure.data, 'failed-')}: {failure}", flush=True)
        raise SystemExit(1) from failure
    last.unlink()
    room = LARGEST_CORPUS - sum(map(len, corpus))
    for data in kept:
        if len(data) <= min(room, LARGEST_KEPT):
            keep(name, data)
            room -= len(data)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(f"{name}: {tried:,} inputs, {len(kept)} of them reached new lines, {peak} MiB", flush=True)


def main(seconds: float, names: list[str]) -> int:
    """Returns the exit code."""
    failed, seed = 0, os.environ.get("SEED", "0")
    with tempfile.TemporaryDirectory(prefix="deepstack-jax-fuzz-", dir=IN_MEMORY) as folder:
        last = Path(folder) / "last"
        for name in names:
            each = seconds / len(names)
            command = [sys.executable, "-W", "ignore", "-m", "tests.fuzz", ONE, name, str(each), seed, str(last)]
            try:
                code = subprocess.run(command, timeout=each + 120, check=False).returncode
                said = f"exit code {code}"
            except subprocess.TimeoutExpired:
                code, said = 1, "it hangs"
            if last.exists():
                print(f"{name}: {keep(name, last.read_bytes(), 'failed-')}: {said}")
                last.unlink()
            failed += code != 0
    return 1 if failed else 0


if __name__ == "__main__":
    if sys.argv[1] == ONE:
        run(sys.argv[2], float(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5]))
    else:
        sys.exit(main(float(sys.argv[1]), sys.argv[2:] or list(TARGETS)))
