"""A short run of `benchmarks/faults.py`, with each kind of fault once."""

from pathlib import Path

import pytest

from tests.fault_run import ENCODER_FAULTS, LANGUAGE_FAULTS, Plan, make_checkpoint, run

PLAN = Plan(requests=30, seed=1, pause=0.5, transfer_timeout=2.0, heartbeat_timeout=3.0)


@pytest.mark.slow
def test_every_request_ends_correctly_under_faults_of_processes_messages_and_writes(tmp_path: Path):
    report = run(PLAN, make_checkpoint(tmp_path), tmp_path)
    print(report.table())
    assert not report.failures
    kinds = {f"encode {how} {when}" for how, when in ENCODER_FAULTS}
    kinds |= {f"language {how} {when}" for how, when in LANGUAGE_FAULTS}
    assert set(report.process_faults) == kinds
    assert report.requests >= 30
