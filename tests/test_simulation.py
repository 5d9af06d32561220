"""Runs of a simulated cluster (see tests/simulation), and that they repeat exactly and find what they should."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from deepstack_jax.disagg.encode import server
from deepstack_jax.disagg.wire.seals import BlockSeal
from tests.simulation import knobs
from tests.simulation.cluster import Outcome, run
from tests.simulation.planted import PLANTED

SEEDS = 8  # of 210 requests each
EXHAUSTIVE_SEEDS = range(100, 196)  # 20,000 requests
MOST_SEEDS = 30  # within which a planted fault is found, from the first on that once found it

RARE = "silent encoders are waited for", "the newest request is served first"  # need several seeds


def check(outcome: Outcome) -> None:
    assert not outcome.violations, (
        f"python -m tests.simulation --seed {outcome.seed} --trace: {outcome.violations[:5]} with {outcome.knobs}"
    )


@pytest.mark.parametrize("seed", range(SEEDS))
def test_every_request_ends_rightly_whatever_fails(seed: int):
    check(run(seed))


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", EXHAUSTIVE_SEEDS)
def test_twenty_thousand_requests_end_rightly(seed: int):
    check(run(seed))


def test_a_seed_repeats_in_another_process_event_by_event():
    """Nothing depends on the hashes of strings, on addresses, or on the machine's speed."""
    here = run(12, requests=60)
    command = [sys.executable, "-m", "tests.simulation", "--seed", "12", "--requests-per-seed", "60", "--digest"]
    environment = {**os.environ, "PYTHONHASHSEED": "4321"}
    there = subprocess.run(
        command, env=environment, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=True
    )
    assert here.events > 1000
    assert there.stdout.split() == [here.digest, str(here.events)]
    assert run(12, requests=60).digest == here.digest
    assert run(13, requests=60).digest != here.digest


@pytest.mark.parametrize(
    ("protection", "expected"), [("none", (False, False)), ("tags", (True, False)), ("encryption", (True, True))]
)
def test_blocks_have_the_protection_that_is_drawn(protection: str, expected: tuple[bool, bool]):
    made: set[tuple[bool, bool]] = set()

    def seal(key: bytes, encrypt: bool) -> BlockSeal:
        made.add((bool(key), encrypt))
        return BlockSeal(key, encrypt)

    first, again = (run(3, 40, patches=[(server, "BlockSeal", seal)], protection=protection) for _ in range(2))
    check(first)
    assert first.digest == again.digest
    assert made == {expected}


def test_every_protection_is_drawn():
    drawn = {knobs.draw(random.Random(seed), 1).protection for seed in range(20)}
    assert drawn == {"none", "tags", "encryption"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.exhaustive] if name in RARE else []) for name in PLANTED]
)
def test_a_planted_fault_is_found(name: str):
    plant, chosen, first = PLANTED[name]
    found = any(run(seed, patches=plant(), **chosen).violations for seed in range(first, first + MOST_SEEDS))
    assert found, f"not found by seeds {first} to {first + MOST_SEEDS - 1}"
