"""The sizes and time-outs of a run, drawn from its seed, so that rare ones are tried as often as common ones."""

import random
from dataclasses import dataclass

from deepstack_jax.engine.shape import EngineShape
from tests.simulation.memory import Rates


@dataclass(frozen=True)
class Knobs:
    """What is drawn per run; times are in seconds."""

    encoders: int
    languages: int
    requests: int
    load_seconds: float  # within which requests arrive
    block_size: int
    num_blocks: int
    share: int
    retry_interval: float
    transfer_timeout: float
    max_attempts: int
    max_damaged: int
    max_attempts_at_once: int  # on an encode node
    cache_bytes: int
    slot_bytes: int
    slots: int
    registered: bool  # whether writes need registered sources
    latency: float
    slowness: float
    hiccups: float
    encode_seconds: float
    encode_failures: float  # probability
    incidents: int  # 0: no fault of any kind in this run
    writes: Rates
    short_timeouts: float  # the share of requests that have little time
    cancellations: float  # the share of requests whose client goes away
    http: bool  # whether nodes are whole, with HTTP and the engine; the fields below are for these runs
    http_timeout: float
    shape: EngineShape
    num_pages: int
    program_seconds: float
    overlap: bool
    max_waiting: int
    grace: float  # for what runs as a node is stopped
    protection: str  # of blocks on their way: "none", "tags" or "encryption"
    encode_here: bool  # whether language nodes with HTTP encode if no encoder is left


def draw(dice: random.Random, requests: int) -> Knobs:
    """The knobs of one run of about `requests` requests."""
    faulty = dice.random() < 0.8
    latency = dice.choice([1e-4, 2e-3, 5e-2])
    num_blocks = dice.choice([16, 40] if latency > 0.01 else [1, 2, 3, 5, 8, 16, 40])  # enough for the calls' time-outs
    encoders = dice.choice([1, 2, 2, 3, 4])
    aside = random.Random(dice.getstate()[1][0])  # leaves the other draws of a seed what they were before it had this
    return Knobs(
        encoders=encoders,
        languages=dice.choice([1, 2, 3]),
        requests=requests,
        load_seconds=dice.choice([2.0, 20.0, 60.0]) * requests / 200,
        block_size=dice.choice([1, 4, 8, 16]),
        num_blocks=num_blocks,
        share=dice.randint(1, num_blocks),
        retry_interval=dice.choice([0.3, 1.0, 1.0, 2.0]),
        transfer_timeout=dice.choice([2.0, 8.0, 30.0]),
        max_attempts=dice.choice([2, 4, 4, 6]),
        max_damaged=dice.choice([1, 3, 3]),
        max_attempts_at_once=dice.choice([60, 256, 256]),
        cache_bytes=dice.choice([0, 300, 1 << 20]),
        slot_bytes=dice.choice([1, 256, 2 << 20]),
        slots=dice.choice([1, 2, 4]),
        registered=dice.random() < 0.3,
        latency=latency,
        slowness=dice.choice([1e-5, 2e-4, 5e-3]),
        hiccups=dice.choice([0.0, 0.0, 0.01]) if faulty else 0.0,
        encode_seconds=dice.choice([1e-3, 1e-2, 5e-2]),
        encode_failures=dice.choice([0.0, 0.0, 0.03]) if faulty else 0.0,
        incidents=dice.randint(1, 7) if faulty else 0,
        writes=_writes(dice, faulty),
        short_timeouts=dice.choice([0.0, 0.0, 0.1]),
        cancellations=dice.choice([0.0, 0.05, 0.2]),
        http=dice.random() < 0.4,
        http_timeout=dice.choice([30.0, 60.0]),
        shape=EngineShape(dice.choice([2, 4, 8]), dice.choice([8, 16, 32]), page=dice.choice([4, 8]), decode_steps=4),
        num_pages=dice.choice([40, 100, 400]),
        program_seconds=dice.choice([1e-4, 1e-3]),
        overlap=dice.random() < 0.9,
        max_waiting=dice.choice([64, 1000]),
        grace=dice.choice([0.0, 0.5, 5.0]),
        protection=aside.choice(["none", "tags", "encryption"]),
        encode_here=aside.random() < 0.3,
    )


def _writes(dice: random.Random, faulty: bool) -> Rates:
    def rate() -> float:
        return dice.choice([0.0, 0.0, 0.01, 0.05]) if faulty else 0.0

    seconds = dice.choice([1e-4, 2e-3, 5e-2])
    return Rates(seconds, fail=rate(), late=rate(), drop=rate() / 2, damage=rate(), stall=rate() / 5)
