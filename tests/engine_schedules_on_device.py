"""Random schedules of a whole engine: whatever else it does, each request gets the bits that it has alone.

`simulate` asks some of a bench's questions in a random order, at random turns, in engines whose paces, pools and prefix
caches differ. It cancels some, breaks some, delays the rows of some, and has the rows of others sent by encode nodes of
which one may be gone in the middle. Nothing that it draws may show in an answer.
"""

import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import jax.numpy as jnp
import numpy as np

from deepstack_jax.engine.core import Engine, Event, Failed, NewTokens
from deepstack_jax.engine.prefix_cache import ImageSpan
from deepstack_jax.engine.request import Image, Request
from deepstack_jax.models.vision import separate_deepstack_embeds
from deepstack_jax.sampling import TokenLogprobs
from tests.engine_questions import Bench, Question, pages_of, read_kv_bits, scramble
from tests.split_requests import SplitRequest, can_be_split

MOST_TURNS = 400  # a request that needs more is not going to end
SALTS = (b"", b"", b"", b"another tenant")


class Violation(AssertionError):
    """A request whose answer shows what else the engine did."""


@dataclass(eq=False)
class Asked:
    """A request of the schedule, and what came of it."""

    question: Question
    request: Request
    arrives: int  # turn
    salt: bytes
    cancelled_at: int | None = None
    broken: bool = False  # its rows can't be used
    late: list[tuple[int, Image, int]] = field(default_factory=list)  # turn, image, its number in the question
    split: SplitRequest | None = None
    pages: tuple[int, ...] = ()
    matched_again: bool = False
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    end: str = ""


def simulate_all(bench: Bench, seeds: Iterable[int]) -> Counter[str]:
    """Counts what happened in the schedules.

    Raises:
        Violation: a request's bits are not those that it has alone; names the schedule's seed.
    """
    seen: Counter[str] = Counter()
    for seed in seeds:
        try:
            simulate(bench, seed, seen)
        except Violation as violation:
            raise Violation(f"schedule {seed}: {violation}") from None
    return seen


def simulate(bench: Bench, seed: int, seen: Counter[str]) -> None:
    rng = random.Random(seed)
    engine = _engine(bench, rng)
    held = _pages_in_use(engine)
    waiting = _schedule(bench, rng)
    asked = {each.request: each for each in waiting}
    for turn in range(MOST_TURNS):
        _interfere(engine, [each for each in waiting if not each.end], turn)
        before = set(engine.scheduler.running)
        events = engine.step()
        _note_pages(engine, waiting)  # while they run
        taken = _pages_taken(engine, before)
        for event in events:
            _hear(bench, engine, asked[event.request], event, taken)
        if engine.idle and all(each.end for each in waiting):
            break
    _check_whole(engine, waiting, held)
    _count(seen, waiting)


def _note_pages(engine: Engine, asked: list[Asked]) -> None:
    by_id = {each.request.id: each for each in asked}
    for id, entry in engine.scheduler.running.items():
        each = by_id[id]
        pages = pages_of(engine, entry)
        each.matched_again |= each.pages not in ((), pages)
        each.pages = pages


def _pages_taken(engine: Engine, before: set[int]) -> set[int]:
    """Pages that requests admitted in this turn have for themselves: where a turn reads first, another's may be in them
    whose end is among the turn's events."""
    new = [entry for id, entry in engine.scheduler.running.items() if id not in before]
    return {page for entry in new for page in pages_of(engine, entry)[entry.cached // engine.shape.page :]}


def _engine(bench: Bench, rng: random.Random) -> Engine:
    """An engine of the bench's shape: its pace, its pool and what lies in it are not part of the shape."""
    shape = replace(
        bench.shape, decode_steps=rng.choice((1, 2, 3, 8)), steps_beside_prefill=rng.choice((0, 1, 2, 2, 5))
    )
    engine = Engine(bench.model, shape, bench.num_pages, prefix_cache=rng.random() < 0.85)
    scramble(engine, np.random.default_rng(rng.randrange(2**32)))
    longest = max(shape.pages_of(_tokens_of(question)) for question in bench.questions)
    _shuffle_pages(engine, rng, rng.choice((longest, longest + 2, 2 * longest, bench.num_pages - 1)))
    return engine


def _shuffle_pages(engine: Engine, rng: random.Random, count: int) -> None:
    """Leaves `count` pages, which are given out in a random order: another pool would be another program."""
    for ledger in (cache.ledger for cache in engine.prefix_caches):
        pages = list(ledger.take(ledger.free))
        rng.shuffle(pages)
        for page in pages[:count]:
            ledger.release([page])


def _pages_in_use(engine: Engine) -> int:
    return sum(cache.ledger.in_use for cache in engine.prefix_caches)


def _tokens_of(question: Question) -> int:
    return int(question.batch.lengths[0]) + question.plan.max_new_tokens - 1


def _schedule(bench: Bench, rng: random.Random) -> list[Asked]:
    questions = list(bench.questions)
    repeats = rng.random() < 0.5  # prefixes are met again, most of them after they were computed
    if repeats:
        long = [question for question in questions if question.batch.lengths[0] > bench.shape.chunk]
        questions = rng.sample(long, 2)
    arrivals = [rng.choice((0, 1, rng.randint(0, 20 if repeats else 10))) for _ in range(rng.randint(2, 6))]
    return [_ask(bench, rng.choice(questions), rng, arrives) for arrives in arrivals]


def _ask(bench: Bench, question: Question, rng: random.Random, arrives: int) -> Asked:
    whole = rng.random() < 0.3
    split = None
    if not whole and can_be_split(question) and rng.random() < 0.5:
        split = SplitRequest(bench.model, question, arrives, rng)
    form = question.prompt if whole else question.batch
    request = split.request if split else Request.of_row(form, question.plan)
    request.grammar = question.grammar()
    asked = Asked(question, request, arrives, rng.choice(SALTS), split=split)
    if rng.random() < 0.15:
        asked.cancelled_at = arrives + rng.randint(0, 8)
    if split or not question.has_images:
        return asked
    if not whole and rng.random() < 0.5:
        _delay(asked, rng)
    elif rng.random() < 0.05:
        asked.broken = True
        for image in request.images:
            image.pixels, image.encoded = None, jnp.zeros((16, 3), jnp.float32)
    return asked


def _delay(asked: Asked, rng: random.Random) -> None:
    """The rows of each image come by themselves, in any order, as they do from encode nodes."""
    request = asked.request
    spans = (ImageSpan(image.first_row, image.rows, image.pixels.digest) for image in request.images if image.pixels)
    request.spans = tuple(spans)
    for number, image in enumerate(request.images):
        image.pixels = None
        asked.late.append((asked.arrives + rng.randint(0, 9), image, number))


def _interfere(engine: Engine, left: list[Asked], turn: int) -> None:
    """What comes from outside before a turn: requests, rows, cancellations."""
    for each in left:
        if each.arrives == turn:
            engine.add(each.request, each.salt)
        if each.split and each.arrives <= turn:
            each.split.deliver(engine, turn)
        for at, image, number in each.late:
            if at == turn:
                _deliver(engine, each, image, number)
        if each.cancelled_at == turn:
            engine.cancel(each.request)


def _deliver(engine: Engine, asked: Asked, image: Image, number: int) -> None:
    rows = asked.question.rows[number]
    parts = separate_deepstack_embeds(rows, engine.model.config.num_deepstack_levels)
    image.encoded = rows if number % 2 else parts
    engine.scheduler.arrived(asked.request.id, asked.request.ready)


def _hear(bench: Bench, engine: Engine, asked: Asked, event: Event, taken: set[int]) -> None:
    expected = bench.answer(asked.question)
    if isinstance(event, Failed):
        if not asked.broken:
            raise Violation(f"it failed with {event.error!r}")
        asked.end = "failed"
    elif not isinstance(event, NewTokens):
        asked.end = event.reason
    else:
        asked.tokens += event.tokens
        if asked.tokens != expected.tokens[: len(asked.tokens)]:
            raise Violation(f"tokens {asked.tokens}, alone {expected.tokens}")
        asked.logprobs += event.logprobs
        if asked.logprobs != expected.logprobs[: len(asked.tokens)]:
            raise Violation(f"log probabilities {asked.logprobs}, alone {expected.logprobs}")
        if event.finish_reason:
            asked.end = event.finish_reason
            _compare_kv(engine, asked, expected.kv_bits, taken)


def _compare_kv(engine: Engine, asked: Asked, expected: np.ndarray, taken: set[int]) -> None:
    length = asked.request.length + len(asked.tokens) - 1
    found = read_kv_bits(engine, asked.pages, length)
    left = np.repeat([page not in taken for page in asked.pages], engine.shape.page)[:length]
    if found.shape != expected.shape or not (found == expected)[:, left].all():
        raise Violation(f"keys and values of {length} tokens, {asked.request.cached_tokens} of them cached, differ")


def _check_whole(engine: Engine, asked: list[Asked], held: int) -> None:
    if left := [each for each in asked if not each.end]:
        raise Violation(f"{len(left)} requests have not ended after {MOST_TURNS} turns")
    for cache in engine.prefix_caches:
        cache.ledger.assert_consistent()
    used, kept = _pages_in_use(engine) - held, sum(map(len, engine.prefix_caches))
    if used != kept or engine.free_slots != engine.shape.slots:
        raise Violation(f"{used} pages are in use and {kept} in the caches, {engine.free_slots} free slots")


def _count(seen: Counter[str], asked: list[Asked]) -> None:
    seen.update(each.end for each in asked)
    for what in _happenings(asked):
        seen[what] += 1


def _happenings(asked: list[Asked]) -> Iterator[str]:
    for each in asked:
        if each.request.grammar and each.end in ("length", "stop"):
            yield "masked"
        if each.request.cached_tokens:
            yield "cached"
            if each.question.has_images:
                yield "cached with images"
            if each.late:
                yield "cached while its rows were awaited"
        if each.matched_again:
            yield "matched again"
        if each.late and each.end in ("length", "stop"):
            yield "late"
        if each.split and each.end in ("length", "stop"):
            yield "split"
            if len(each.split.encoders) > 1:
                yield "failed over"
        if each.split and each.request.cached_tokens:
            yield "cached in a split"
