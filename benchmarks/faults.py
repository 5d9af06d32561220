"""Sends requests through the split while processes are killed and stopped and messages and writes are damaged.

    python benchmarks/faults.py [--requests 500] [--seed 0] [--checkpoint DIR] [--logs DIR]

The processes are real, with Mooncake between them on loopback. Each request must end with the whole model's tokens or,
within its deadline, with one clear error. At the end all blocks must be free, and memory, threads and open files as at
the start. The benchmark prints a table, and exits with 1 if an invariant is violated. See `tests/fault_run.py`.
"""

import argparse
import os
import random
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
from measured import chip_name

from tests.fault_run import ENCODER_FAULTS, LANGUAGE_FAULTS, Plan, make_checkpoint, run

REQUESTS_PER_FAULT = 20  # of a process


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--encoders", type=int, default=2)
    parser.add_argument("--languages", type=int, default=2)
    parser.add_argument("--checkpoint", type=Path, help="default: a tiny random one")
    parser.add_argument("--logs", type=Path, help="folder for the logs of the processes; default: a temporary one")
    options = parser.parse_args()
    print(f"{chip_name()}; jax {jax.__version__}, Mooncake {version('mooncake-transfer-engine-non-cuda')}")
    rng, rounds = random.Random(options.seed), max(1, options.requests // REQUESTS_PER_FAULT // len(ENCODER_FAULTS))

    def shuffled(faults: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
        every = list(faults) * rounds
        rng.shuffle(every)
        return tuple(every)

    plan = Plan(
        options.requests,
        options.seed,
        shuffled(ENCODER_FAULTS),
        shuffled(LANGUAGE_FAULTS),
        encoders=options.encoders,
        languages=options.languages,
        clients=6,
        timeout=10.0,
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.logs or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        report = run(plan, options.checkpoint or make_checkpoint(Path(temporary)), folder)
    print(report.table())
    sys.exit(1 if report.failures else 0)


if __name__ == "__main__":
    main()
