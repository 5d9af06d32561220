"""Decides which requests run in the next turn: admission, prefill chunks, decode calls, cancellation and deadlines.

Pure bookkeeping: no thread, no clock, no device. The owner of the device calls `next_turn(now)`, launches what the turn
says in its order (the prefill, then the decode call), and reports each launched part and row with `prefilled` and
`decoded`, in order of launch. A report may come after the next turn was made, so one turn can be launched ahead, but
not while a request `waits` whose next step depends on its newest token.

Admission reserves a slot and every page that a request can ever need, so nothing is preempted. Within a tenant,
requests are admitted in order of submission. Tenants stand in a ring: the one that was served goes to its end. A
request whose pages aren't free keeps its tenant's place in the ring, and requests of tenants behind it may overtake it,
at most `max_overtakes` times; then no request behind it is admitted until it is. This gives the bound:

    Once a request is the first of its tenant, at most T - 1 + max_overtakes others are admitted before it, T being
    the number of tenants that were waiting when it became the first.

Each admitted request ends (by its limit, deadline or cancellation), so the pages that the first in the ring waits for
become free.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from deepstack_jax.engine.prefix_cache import PrefixCache
from deepstack_jax.engine.shape import EngineShape
from deepstack_jax.engine.turn import Admitted, Decode, Ended, Job, Part, Prefill, Turn


class NeverFits(ValueError):
    """The request needs more pages than the whole pool has."""


class QueueFull(Exception):
    """As many requests as allowed are waiting already."""


@dataclass
class Running:
    """An admitted request.

    Attributes:
        cache: that of its pool, whose ledger counts its pages.
        cached: prompt tokens that the prefix cache gave.
        prefilled: prompt tokens that are cached or in launched parts.
        parts: launched parts that were not reported yet.
        calls: steps of each launched decode call that was not reported yet.
        made: new tokens that were reported.
        over: nothing more is launched for it; its slot and pages are held until nothing of it is in flight.
    """

    job: Job
    slot: int
    cache: PrefixCache
    pages: tuple[int, ...]
    cached: int
    prefilled: int
    parts: deque[Part] = field(default_factory=deque)
    calls: deque[int] = field(default_factory=deque)
    made: int = 0
    over: bool = False

    @property
    def rest(self) -> int:
        """Decode steps that are not launched yet, if all launched ones are made. The prefill draws the first token."""
        return self.job.max_new_tokens - max(self.made, 1) - sum(self.calls)

    @property
    def decodes(self) -> bool:
        """Whether it belongs in the next decode call."""
        return self._has_steps and not self.waits

    @property
    def waits(self) -> bool:
        """Whether it would belong in the next decode call if its newest token were reported."""
        return self._has_steps and self.job.stepwise and self.in_flight

    @property
    def _has_steps(self) -> bool:
        return not self.over and self.prefilled == self.job.prompt_tokens and self.rest > 0

    @property
    def in_flight(self) -> bool:
        """Whether a launched part or call of it is unreported."""
        return bool(self.parts or self.calls)

    @property
    def where(self) -> str:
        """How far it has come, in words."""
        if self.made:
            return f"after {self.made} tokens"
        return "after encoding" if self.job.ready >= self.job.prompt_tokens else "while encoding"


@dataclass(eq=False)
class Scheduler:
    """The requests in line and in slots.

    Attributes:
        shape: sizes of the programs.
        caches: one for each pool of `shape`, made for its chunk and page: it keeps pages of whole chunks, and its
            ledger counts the pool's pages. Pools are of one size.
        max_waiting: requests in line at most.
        max_overtakes: how often later tenants overtake a request that waits for pages.
        waiting: the ring of tenants, each with its requests in order of submission.
        overtaken: how often each request in line was overtaken, by id.
        running: admitted requests by id, in order of admission.
        free_slots: slots that no request holds.
        cancelled: reasons by id, for the next turn.
    """

    shape: EngineShape
    caches: tuple[PrefixCache, ...]
    max_waiting: int = 64
    max_overtakes: int = 8
    waiting: dict[str, deque[Job]] = field(default_factory=dict)
    overtaken: dict[int, int] = field(default_factory=dict)
    running: dict[int, Running] = field(default_factory=dict)
    free_slots: set[int] = field(default_factory=set)
    cancelled: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.free_slots = set(range(self.shape.slots))

    @property
    def idle(self) -> bool:
        """Whether no request waits or runs."""
        return not self.waiting and not self.running

    @property
    def waits(self) -> bool:
        """Whether a request can't go on before everything that was launched is reported."""
        return any(entry.waits for entry in self.running.values())

    def submit(self, job: Job) -> None:
        """Puts a request in line, at the end of its tenant's.

        Raises:
            NeverFits: the pool is too small for it.
            QueueFull: `max_waiting` requests are in line.
            ValueError: a count below one, keys of another prompt, or an id that is in use.
        """
        self._check(job)
        self.check_fits(job.prompt_tokens, job.max_new_tokens)
        if len(self.overtaken) >= self.max_waiting:
            raise QueueFull(f"{self.max_waiting} requests are waiting already: try again later")
        self.waiting.setdefault(job.tenant, deque()).append(job)
        self.overtaken[job.id] = 0

    def check_fits(self, prompt_tokens: int, max_new_tokens: int) -> None:
        """Refuses a request that the empty pool could not hold, before anything is prepared for it.

        Raises:
            NeverFits: the whole pool is too small for such a request.
        """
        needed = self.shape.pages_of(prompt_tokens + max_new_tokens - 1)
        held = self.caches[0].ledger.capacity
        if needed > held:
            raise NeverFits(
                f"{prompt_tokens} prompt tokens and {max_new_tokens} new ones need {needed} KV pages of "
                f"{self.shape.page} tokens, and the pool holds {held} ({held * self.shape.page} tokens): "
                "shorten the prompt, ask for fewer tokens, or give the engine more memory for pages"
            )

    def arrived(self, id: int, ready: int) -> None:
        """Says that the embeddings of the first `ready` prompt tokens are available. Ignored if the request ended.

        Raises:
            ValueError: fewer than before, or more than the prompt has.
        """
        job = self._job(id)
        if job is None:
            return
        if not job.ready <= ready <= job.prompt_tokens:
            raise ValueError(
                f"ready {ready} is not between {job.ready}, the last, and {job.prompt_tokens}: pass what is"
            )
        job.ready = ready

    def cancel(self, id: int, reason: str = "cancelled") -> None:
        """Ends a request at the next turn. Ignored if it has ended."""
        if self._job(id) is not None:
            self.cancelled[id] = reason

    def next_turn(self, now: float) -> Turn:
        """Decides what to launch next, and counts it as launched."""
        ended = (*self._end_waiting(now), *self._end_running(now))
        self.cancelled.clear()
        admitted = (*self._match_again(), *self._admit_all())
        prefill = self._next_prefill()
        return Turn(ended, admitted, prefill, self._next_decode(prefill is not None))

    def prefilled(self, id: int, ended: bool = False) -> None:
        """Reports a request's oldest launched part. A whole chunk is kept in the prefix cache from here on.

        Later launches must be ordered after the part on the device. For the last part, wait for the first token.

        Args:
            id: the request.
            ended: the first token, drawn by the last part, ends the answer.

        Raises:
            ValueError: no part of it is unreported.
        """
        entry = self._in_flight(id, "part")
        part = entry.parts.popleft()
        self._keep(entry, part)
        if part.last and not entry.over:
            entry.made = 1
            entry.over = ended or entry.job.max_new_tokens == 1
        self._settle(entry)

    def decoded(self, id: int, made: int, ended: bool) -> None:
        """Reports a request's row of its oldest launched decode call.

        Args:
            id: the request.
            made: tokens that the row made, 0 if it had ended before.
            ended: the last of them ends the answer.

        Raises:
            ValueError: no call of it is unreported, or `made` is more than it could make.
        """
        entry = self._in_flight(id, "call")
        steps = entry.calls[0]
        if not 0 <= made <= steps:
            raise ValueError(f"request {id} made {made} tokens in a call of {steps} steps: report the call's own")
        if entry.made + made > entry.job.max_new_tokens:
            raise ValueError(f"request {id} made {made} tokens after {entry.made}, over {entry.job.max_new_tokens}")
        entry.calls.popleft()
        if not entry.over:
            entry.made += made
            entry.over = ended or entry.made == entry.job.max_new_tokens
        self._settle(entry)

    def drop(self, id: int) -> None:
        """Forgets a running request whose launch failed: nothing of it is in flight, and nothing more is reported."""
        entry = self.running[id]
        entry.parts.clear()
        entry.calls.clear()
        entry.over = True
        self._settle(entry)

    def _check(self, job: Job) -> None:
        if job.prompt_tokens < 1 or job.max_new_tokens < 1:
            raise ValueError(f"{job.prompt_tokens} prompt tokens and {job.max_new_tokens} new ones: pass 1 or more")
        if not 0 <= job.ready <= job.prompt_tokens:
            raise ValueError(f"{job.ready} tokens are ready of {job.prompt_tokens}: pass 0 to {job.prompt_tokens}")
        whole = job.prompt_tokens // self.shape.chunk
        if job.keys and len(job.keys) != whole:
            raise ValueError(f"{len(job.keys)} keys for {whole} whole chunks: pass one for each, or none")
        if job.id in self.overtaken or job.id in self.running:
            raise ValueError(f"request {job.id} has not ended: pass another id")

    def _job(self, id: int) -> Job | None:
        if id in self.running:
            return None if self.running[id].over else self.running[id].job
        if id in self.overtaken:
            return next(job for jobs in self.waiting.values() for job in jobs if job.id == id)
        return None

    def _in_flight(self, id: int, what: str) -> Running:
        entry = self.running.get(id)
        launched = entry and (entry.parts if what == "part" else entry.calls and not entry.parts)
        if entry is None or not launched:
            raise ValueError(f"request {id} has no unreported {what}: report each once, in order of launch")
        return entry

    def _reason_to_end(self, job: Job, now: float) -> str | None:
        return self.cancelled.get(job.id, "deadline" if now >= job.deadline else None)

    def _end_waiting(self, now: float) -> Iterator[Ended]:
        for tenant, jobs in list(self.waiting.items()):
            reasons = {job.id: reason for job in jobs if (reason := self._reason_to_end(job, now))}
            yield from (Ended(id, reason, "in line") for id, reason in reasons.items())
            for job in [job for job in jobs if job.id in reasons]:
                self._leave_line(tenant, job)

    def _end_running(self, now: float) -> Iterator[Ended]:
        for id, entry in list(self.running.items()):
            if not entry.over and (reason := self._reason_to_end(entry.job, now)):
                entry.over = True
                yield Ended(id, reason, entry.where)
                self._settle(entry)

    def _leave_line(self, tenant: str, job: Job) -> None:
        self.waiting[tenant].remove(job)
        del self.overtaken[job.id]
        if not self.waiting[tenant]:
            del self.waiting[tenant]

    def _match_again(self) -> Iterator[Admitted]:
        """Gives requests that wait for their first part what others have computed since their admission.

        Many requests with one beginning that come at once would all compute it otherwise.
        """
        for entry in self.running.values():
            job = entry.job
            untouched, cache = not entry.over and entry.prefilled == entry.cached, entry.cache
            if untouched and len(cache.find(job.keys, job.prompt_tokens)) * self.shape.chunk > entry.cached:
                shared = cache.match(job.keys, job.prompt_tokens, entry.cached)
                cache.ledger.release(entry.pages[: len(shared)])
                entry.pages = shared + entry.pages[len(shared) :]
                entry.cached = entry.prefilled = len(shared) * self.shape.page
                yield Admitted(job.id, entry.slot, entry.pages, entry.cached)

    def _admit_all(self) -> Iterator[Admitted]:
        while self.free_slots and (admitted := self._admit_one()):
            yield admitted

    def _admit_one(self) -> Admitted | None:
        """Admits the first of the first tenant whose first request fits."""
        passed = []
        for tenant, jobs in self.waiting.items():
            reserved = self._reserve(jobs[0])
            if reserved is not None:
                self._count_overtakes(passed)
                return self._admit(tenant, *reserved)
            if self._blocks(jobs[0]):
                return None
            passed.append(jobs[0].id)
        return None

    def _blocks(self, job: Job) -> bool:
        """Whether a request that waits for pages has been overtaken often enough."""
        return self.overtaken[job.id] >= self.max_overtakes

    def _count_overtakes(self, passed: list[int]) -> None:
        for id in passed:
            self.overtaken[id] += 1

    def _reserve(self, job: Job) -> tuple[int, tuple[int, ...], int] | None:
        """A slot and all pages of a request, and how many of them the cache gave; None as long as they aren't free.

        Of the pools with a free slot and enough pages, it takes the one that has computed most of the prompt, or else
        the one with the most free pages.
        """
        found = []
        for pool, cache in enumerate(self.caches):
            slot = min((slot for slot in self.free_slots if self.shape.pool_of(slot) == pool), default=None)
            if slot is not None:
                found.append((len(cache.find(job.keys, job.prompt_tokens)), cache.ledger.free, -slot, cache))
        for *_, negative, cache in sorted(found, key=lambda each: each[:3], reverse=True):
            if (pages := self._reserve_pages(job, cache)) is not None:
                return -negative, *pages
        return None

    def _reserve_pages(self, job: Job, cache: PrefixCache) -> tuple[tuple[int, ...], int] | None:
        kept = cache.find(job.keys, job.prompt_tokens)
        needed = self.shape.pages_of(job.tokens) - len(kept) * self.shape.pages_per_chunk
        missing = needed - cache.ledger.free
        if missing > 0 and not cache.evict(missing, kept):
            return None
        shared = cache.match(job.keys, job.prompt_tokens)
        return shared + cache.ledger.take(needed), len(shared)

    def _admit(self, tenant: str, slot: int, pages: tuple[int, ...], cached_pages: int) -> Admitted:
        job = self.waiting[tenant][0]
        self._leave_line(tenant, job)
        if tenant in self.waiting:  # to the ring's end
            self.waiting[tenant] = self.waiting.pop(tenant)
        self.free_slots.remove(slot)
        cached = cached_pages * self.shape.page
        cache = self.caches[self.shape.pool_of(slot)]
        self.running[job.id] = Running(job, slot, cache, pages, cached, prefilled=cached)
        return Admitted(job.id, slot, pages, cached)

    def _next_prefill(self) -> Prefill | None:
        """The oldest runnable request's next part, with parts of others as far as the width's program takes them."""
        runnable = self._runnable()
        first = next(runnable, None)
        if first is None:
            return None
        width, each = self._width(first), self.shape.rows_of(self._width(first))
        taken = [0] * self.shape.pools
        parts, rows = [], []
        for entry in (first, *runnable):
            pool = self.shape.pool_of(entry.slot)
            if taken[pool] < each and self._width(entry) == width:
                parts.append(self._launch_part(entry))
                rows.append(pool * each + taken[pool])
                taken[pool] += 1
        return Prefill(width, tuple(parts), tuple(rows))

    def _runnable(self) -> Iterator[Running]:
        for entry in self.running.values():
            rest = entry.job.prompt_tokens - entry.prefilled
            if not entry.over and rest and entry.prefilled + min(rest, self.shape.chunk) <= entry.job.ready:
                yield entry

    def _width(self, entry: Running) -> int:
        return self.shape.width_of(min(entry.job.prompt_tokens - entry.prefilled, self.shape.chunk))

    def _launch_part(self, entry: Running) -> Part:
        start, rest = entry.prefilled, entry.job.prompt_tokens - entry.prefilled
        count = min(rest, self.shape.chunk)
        part = Part(entry.job.id, entry.slot, start, count, count == rest, entry.pages)
        entry.parts.append(part)
        entry.prefilled += count
        return part

    def _next_decode(self, prefills: bool) -> Decode | None:
        entries = [entry for entry in self.running.values() if entry.decodes]
        limit = self.shape.steps_beside_prefill if prefills else self.shape.decode_steps
        if not entries or not limit:
            return None
        steps = min(limit, self.shape.decode_steps, max(entry.rest for entry in entries))
        if any(entry.job.stepwise for entry in entries):
            steps = 1
        for entry in entries:
            entry.calls.append(steps)
        rows = tuple(sorted((entry.slot, entry.job.id) for entry in entries))
        return Decode(rows, steps, leave_on_end=bool(self.waiting))

    def _keep(self, entry: Running, part: Part) -> None:
        """Keeps a whole chunk's pages: its launch is made, and whatever reads them comes after it on the device."""
        if part.count < self.shape.chunk or not entry.job.keys:
            return
        place, size = part.start // self.shape.chunk, self.shape.pages_per_chunk
        parent = entry.job.keys[place - 1] if place else None
        entry.cache.insert(entry.job.keys[place], part.pages[place * size : (place + 1) * size], parent)

    def _settle(self, entry: Running) -> None:
        """Takes back the slot and pages of a request that is over, unless something in flight uses them."""
        if entry.over and not entry.in_flight:
            entry.cache.ledger.release(entry.pages)
            self.free_slots.add(entry.slot)
            del self.running[entry.job.id]
            self.cancelled.pop(entry.job.id, None)
