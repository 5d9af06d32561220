"""Runs simulations: `python -m tests.simulation --seed 7` replays one; with `--requests 100000`, many seeds run."""

import argparse
import contextlib
import os
import signal
import sys
import time
from collections import Counter

os.environ.setdefault("JAX_PLATFORMS", "cpu")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--requests", type=int, default=0, help="requests in all; without it, one seed runs")
    parser.add_argument("--minutes", type=float, default=1e9, help="of wall time, after which no seed begins")
    parser.add_argument(
        "--requests-per-seed", type=int, default=200, help="those before the last ten, which must succeed"
    )
    parser.add_argument("--digest", action="store_true", help="print a digest of the history and its length only")
    parser.add_argument("--trace", action="store_true", help="print the history")
    options = parser.parse_args()

    for number in (signal.SIGINT, signal.SIGTERM):  # a shell lets what runs in its background ignore SIGINT
        signal.signal(number, signal.default_int_handler)

    from tests.simulation.cluster import run

    totals = {name: Counter() for name in ("statuses", "incidents", "write_faults")}
    seed, failed, virtual, began = options.seed, [], 0.0, time.monotonic()
    with contextlib.suppress(KeyboardInterrupt):
        while totals["statuses"].total() < max(options.requests, 1) and time.monotonic() - began < options.minutes * 60:
            outcome = run(seed, options.requests_per_seed, options.trace)
            if options.digest:
                print(outcome.digest, outcome.events)
                return bool(outcome.violations)
            print("\n".join(outcome.trace or []), end="")
            for name, total in totals.items():
                total += getattr(outcome, name)
            virtual += outcome.seconds
            if outcome.violations:
                failed.append(seed)
                print(f"seed {seed}: {outcome.knobs}")
                print("\n".join(outcome.violations[:5]), flush=True)
            seed += 1
    wall = time.monotonic() - began
    print(f"seeds {options.seed} to {seed - 1}")
    for name, total in totals.items():
        print(f"{name}: {total.total()}, {dict(sorted(total.items()))}")
    print(f"virtual {virtual:.0f} s, wall {wall:.0f} s, {totals['statuses'].total() / wall:.0f} requests per second")
    print(f"seeds with violations: {failed}" if failed else "no violation")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
