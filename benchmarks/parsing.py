"""Measures what bodies cost that are expensive to read: the event loop's longest stall, the memory and the time.

    python benchmarks/parsing.py [--only WORD ...] [--timeout 60] [--tries 3]

A server of a tiny model with a context of 262,144 tokens runs in this process, with a heartbeat of 5 ms in its event
loop. Each body of `tests/hostile_bodies.py` is sent over a socket. The try with the shortest stall counts.
"""

import argparse
import os
import platform
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.hostile_bodies import BODIES, MIB, MeasuredServer, measured_server


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], help="words of the bodies' names")
    parser.add_argument("--tries", type=int, default=3)
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds that the server gives each answer")
    options = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} processors, Python {platform.python_version()}\n")
    print("| body | MiB | status | seconds | stall, ms | memory, MiB |\n|---|---|---|---|---|---|")
    with (
        tempfile.TemporaryDirectory() as folder,
        measured_server(Path(folder), timeout=options.timeout) as server,
    ):
        for name in BODIES:
            if any(word in name for word in options.only):
                measure(server, name, options.tries)


def measure(server: MeasuredServer, name: str, tries: int) -> None:
    """Sends one body and prints its row."""
    body = BODIES[name]
    content = body.build()
    best = min((server.post(body.path, content) for _ in range(tries)), key=lambda measured: measured.stall_seconds)
    print(
        f"| {name} | {len(content) / MIB:.1f} | {best.status} | {best.seconds:.2f} | {1000 * best.stall_seconds:.0f} "
        f"| {best.memory / MIB:.0f} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
