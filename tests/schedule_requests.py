"""The requests and engine shapes of random schedules."""

import math
import random
from collections import deque
from dataclasses import dataclass, field

from deepstack_jax.engine.shape import EngineShape
from deepstack_jax.engine.turn import Job


@dataclass(eq=False)
class Request:
    """A request of the schedule, and the second account of where it stands."""

    job: Job
    arrives: int  # turn of its submission
    length: int  # tokens until it ends by itself
    speed: int  # prompt tokens that arrive at once, at most
    cancel_at: float  # turn
    slot: int = -1
    pages: tuple[int, ...] = ()
    cached: int = 0  # prompt tokens that the cache gave
    launched: int = 0  # prompt tokens in launched parts or given by the cache
    unreported: int = 0  # launched parts and rows
    calls: deque[int] = field(default_factory=deque)  # steps of the unreported rows
    on_device: int = 0  # tokens that the device has made
    made: int = 0  # tokens that were reported
    over: bool = False

    @property
    def rest(self) -> int:
        return self.job.max_new_tokens - 1 - max(self.made - 1, 0) - sum(self.calls)

    @property
    def holds(self) -> bool:
        return not self.over or self.unreported > 0

    @property
    def next_count(self) -> int:
        return self.job.prompt_tokens - self.launched

    def page_content(self, place: int, shape: EngineShape) -> tuple[object, int]:
        """What a page of its prompt holds: of a whole chunk with a key, what every prompt with that key has there."""
        chunk, within = divmod(place, shape.chunk // shape.page)
        return (self.job.keys[chunk], within) if chunk < len(self.job.keys) else (self.job.id, place)


def draw_shape(rng: random.Random) -> EngineShape:
    page = rng.choice((1, 2))
    chunk = page * rng.choice((2, 4))
    tails = tuple((width, rng.randint(1, 3)) for width in (1, chunk // 2) if width < chunk)
    pools = rng.choice((1, 1, 2))
    return EngineShape(
        slots=pools * rng.randint(1, 4 // pools),
        chunk=chunk,
        page=page,
        decode_steps=rng.randint(1, 5),
        tail_rows=(*sorted(dict(tails).items()), (chunk, 1)),
        steps_beside_prefill=rng.randint(0, 3),
        mesh=(pools, 1),
    )


def draw_request(rng: random.Random, id: int, shape: EngineShape, tenants: int) -> Request:
    prompt, limit = rng.randint(1, 4 * shape.chunk), rng.choice((1, 2, 5, rng.randint(1, 24)))
    key, keys = b"", []
    for _ in range(prompt // shape.chunk if rng.random() < 0.8 else 0):
        key += bytes([rng.random() < 0.2])  # most prompts begin alike
        keys.append(key)
    arrives, never_whole = rng.randint(0, 24), rng.random() < 0.05
    ready = prompt if rng.random() < 0.5 else rng.randint(0, prompt)
    stepwise = rng.random() < 0.2
    deadline = arrives + rng.randint(0, 30) if never_whole or rng.random() < 0.15 else math.inf
    return Request(
        Job(id, prompt, limit, deadline, f"tenant {rng.randrange(tenants)}", tuple(keys), ready, stepwise),
        arrives,
        length=rng.randint(1, limit) if rng.random() < 0.4 else limit,
        speed=0 if never_whole else rng.choice((1, shape.chunk)),
        cancel_at=arrives + rng.randint(0, 20) if rng.random() < 0.15 else math.inf,
    )
