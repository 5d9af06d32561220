"""Random schedules of the engine's scheduler, against a second account of what each turn must be.

`simulate` draws requests of several tenants with arrivals, prefixes, blocks that come late, early ends, cancellations,
deadlines, failed launches and results that are reported a turn late. A model of the device keeps what each page holds;
a model of the rules says what every turn has to be. Neither shares code with the scheduler.
"""

import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from deepstack_jax.engine.pages import OutOfPages, PageLedger
from deepstack_jax.engine.prefix_cache import PrefixCache
from deepstack_jax.engine.scheduler import NeverFits, QueueFull, Scheduler
from deepstack_jax.engine.turn import Admitted, Decode, Ended, Prefill, Turn
from tests.schedule_requests import Request, draw_request, draw_shape


class Violation(AssertionError):
    """A schedule broke a rule."""


def require(holds: bool, *what: object) -> None:
    if not holds:
        raise Violation(" ".join(map(str, what)))


@dataclass(frozen=True)
class Parts:
    """What is simulated; tests put faulty ones in their places."""

    ledger: Callable[[int], PageLedger] = PageLedger
    cache: type[PrefixCache] = PrefixCache
    scheduler: type[Scheduler] = Scheduler


@dataclass(frozen=True)
class Report:
    """What the device's owner reports of one part of a prompt, or of one row of a decode call."""

    request: Request
    decoded: bool
    made: int  # tokens
    ended: bool


@dataclass
class Head:
    """The first of a tenant's line."""

    request: Request
    bound: int  # how often it may be passed
    passed: int = 0


@dataclass
class Outcome:
    """What happened, so that a test can tell that the schedules reach what they should."""

    turns: int = 0
    cached_tokens: int = 0
    matched_again: int = 0
    passed: int = 0  # the most that a first of its tenant saw admitted before it
    at_bound: bool = False  # that was as often as the bound allows
    shared_programs: int = 0
    ends: set[str] = field(default_factory=set)


class Simulation:
    """One schedule. `run` raises `Violation` where it breaks a rule."""

    def __init__(self, seed: int, parts: Parts):
        self.rng = rng = random.Random(seed)
        self.shape = shape = draw_shape(rng)
        tenants = rng.randint(1, 4)
        self.requests = {i: draw_request(rng, i, shape, tenants) for i in range(rng.randint(2, 12))}
        self.num_pages = 1 + rng.randint(6, 40 // shape.page)
        max_pages = rng.choice((None, 4 * shape.pages_per_chunk))
        enabled = rng.random() < 0.8
        self.caches = tuple(
            parts.cache(parts.ledger(self.num_pages), shape.chunk, shape.page, max_pages, enabled=enabled)
            for _ in range(shape.pools)
        )
        self.max_waiting, self.max_overtakes = rng.randint(3, 12), rng.randint(0, 3)
        self.scheduler = parts.scheduler(shape, self.caches, self.max_waiting, self.max_overtakes)
        self.lateness = rng.choice((0.0, 0.5, 1.0))
        self.failures = rng.choice((0.0, 0.0, 0.02))
        self.line: dict[str, list[Request]] = {}
        self.heads: dict[str, Head] = {}
        self.running: list[Request] = []  # in order of admission
        self.content: dict[tuple[int, int], tuple[object, int]] = {}  # by pool and page
        self.backlog: list[list[Report]] = []
        self.outcome = Outcome()

    def run(self) -> Outcome:
        to_come = sorted(self.requests.values(), key=lambda request: request.arrives)
        last = to_come[-1].arrives
        limit = last + 40 + sum(10 * r.job.prompt_tokens + 3 * r.job.max_new_tokens for r in to_come)
        while to_come or self.line or self.running:
            now = self.outcome.turns
            require(now <= limit, "requests don't end:", self.line, self.running)
            while to_come and to_come[0].arrives <= now:
                self.submit(to_come.pop(0))
            self.hear_of_the_world(now)
            self.turn(now)
            self.outcome.turns += 1
        self.check_the_end()
        return self.outcome

    def submit(self, request: Request) -> None:
        job = request.job
        needed = math.ceil((job.prompt_tokens + job.max_new_tokens - 1) / self.shape.page)
        waiting = sum(map(len, self.line.values()))
        try:
            self.scheduler.submit(job)
        except NeverFits:
            require(needed > self.num_pages - 1, "refused though it fits:", job)
        except QueueFull:
            require(waiting == self.max_waiting, "the queue is not full:", waiting)
        else:
            require(needed < self.num_pages and waiting < self.max_waiting, "was not refused:", job)
            self.line.setdefault(job.tenant, []).append(request)
            self.note_heads()

    def hear_of_the_world(self, now: int) -> None:
        """Embeddings arrive, and clients go away."""
        for request in [*self.running, *(r for line in self.line.values() for r in line)]:
            job = request.job
            if request.cancel_at == now:
                self.scheduler.cancel(job.id, "gone")
            if job.ready < job.prompt_tokens and request.speed and self.rng.random() < 0.4:
                more = self.rng.randint(1, request.speed)
                self.scheduler.arrived(job.id, min(job.ready + more, job.prompt_tokens))

    def turn(self, now: int) -> None:
        due = self.due_to_end(now)
        found_since = self.found_since(due)
        turn = self.scheduler.next_turn(now)
        self.check_ends(turn.ended, due)
        again = [admitted for admitted in turn.admitted if self.requests[admitted.id] in self.running]
        require([one.id for one in again] == found_since, "matched again:", again, "instead of", found_since)
        for admitted in again:
            self.check_match(self.requests[admitted.id], admitted)
        for admitted in turn.admitted[len(again) :]:
            self.check_admission(admitted)
        reports = self.prefill(turn.prefill)
        reports += self.decode(turn)
        self.check_progress(turn)
        self.check_pages()
        hits = sum(cache.hit_tokens for cache in self.caches)
        require(hits == self.outcome.cached_tokens, "hits are miscounted:", hits)
        reports = self.fail(turn, reports)
        self.backlog.append(reports)
        self.deliver(1 if self.rng.random() < self.lateness else 0)
        self.check_pages()

    def due_to_end(self, now: int) -> dict[int, tuple[str, str]]:
        due = {}
        waiting = [r for line in self.line.values() for r in line]
        for request in [*waiting, *(r for r in self.running if not r.over)]:
            job = request.job
            encoding = "after encoding" if job.ready == job.prompt_tokens else "while encoding"
            where = f"after {request.made} tokens" if request.made else encoding
            if request.cancel_at == now or job.deadline <= now:
                reason = "gone" if request.cancel_at == now else "deadline"
                due[job.id] = (reason, "in line" if request in waiting else where)
        return due

    def check_ends(self, ended: Sequence[Ended], due: dict[int, tuple[str, str]]) -> None:
        require({end.id: (end.reason, end.where) for end in ended} == due, "ended", ended, "instead of", due)
        for end in ended:
            self.end(self.requests[end.id], end.reason)
            for tenant, line in list(self.line.items()):
                self.line[tenant] = [request for request in line if request.job.id != end.id]
        self.note_heads()

    def end(self, request: Request, how: str) -> None:
        request.over = True
        self.outcome.ends.add(how)
        self.let_go()

    def let_go(self) -> None:
        self.running = [request for request in self.running if request.holds]

    def note_heads(self) -> None:
        """From now on, the first of each tenant may be passed T - 1 + max_overtakes times."""
        self.line = {tenant: line for tenant, line in self.line.items() if line}
        for tenant, line in self.line.items():
            if tenant not in self.heads or self.heads[tenant].request is not line[0]:
                self.heads[tenant] = Head(line[0], len(self.line) - 1 + self.max_overtakes)
        self.heads = {tenant: head for tenant, head in self.heads.items() if tenant in self.line}

    def check_admission(self, admitted: Admitted) -> None:
        request = self.requests[admitted.id]
        line = self.line.get(request.job.tenant, [])
        require(line[:1] == [request], "request", admitted.id, "is not the first of its tenant")
        del line[0], self.heads[request.job.tenant]
        for head in self.heads.values():
            head.passed += 1
            require(head.passed <= head.bound, "request", head.request.job.id, "starves behind", admitted.id)
            self.outcome.passed = max(self.outcome.passed, head.passed)
            self.outcome.at_bound |= head.passed == head.bound
        self.note_heads()
        self.check_slot_and_pages(request, admitted)
        request.slot, request.pages = admitted.slot, admitted.pages
        request.cached = request.launched = admitted.cached_tokens
        self.running.append(request)
        self.outcome.cached_tokens += admitted.cached_tokens

    def found_since(self, due: dict[int, tuple[str, str]]) -> list[int]:
        """The running requests without a launched part for which the cache has more than when they were admitted."""
        found = []
        for request in self.running:
            keys = request.job.keys[: (request.job.prompt_tokens - 1) // self.shape.chunk]
            cache = self.caches[self.shape.pool_of(request.slot)]
            tokens = self.shape.chunk * sum(1 for _ in itertools.takewhile(cache.__contains__, keys))
            untouched = not request.over and request.launched == request.cached
            if untouched and tokens > request.cached and request.job.id not in due:
                found.append(request.job.id)
        return found

    def check_match(self, request: Request, admitted: Admitted) -> None:
        require(admitted.slot == request.slot, "another slot:", admitted)
        own = admitted.cached_tokens // self.shape.page
        require(admitted.pages[own:] == request.pages[own:], "other pages after the cached ones:", admitted)
        self.check_content(request, admitted.pages, admitted.cached_tokens, admitted.slot)
        self.outcome.matched_again += 1
        self.outcome.cached_tokens += admitted.cached_tokens - request.cached
        request.pages = admitted.pages
        request.cached = request.launched = admitted.cached_tokens

    def check_slot_and_pages(self, request: Request, admitted: Admitted) -> None:
        job, shape = request.job, self.shape
        require(admitted.slot in range(shape.slots), "no such slot:", admitted)
        require(admitted.slot not in {r.slot for r in self.running}, "a slot in use was given:", admitted)
        needed = math.ceil((job.prompt_tokens + job.max_new_tokens - 1) / shape.page)
        require(len(set(admitted.pages)) == len(admitted.pages) == needed, "not the pages it needs:", admitted, needed)
        require(admitted.cached_tokens % shape.chunk == 0, "a part of a chunk is cached:", admitted)
        require(admitted.cached_tokens < job.prompt_tokens, "no token is left to compute:", admitted)
        fresh = admitted.pages[admitted.cached_tokens // shape.page :]
        pool = shape.pool_of(admitted.slot)
        beside = [other for other in self.running if shape.pool_of(other.slot) == pool]
        used = {page for other in beside for page in other.pages} | set(self.caches[pool].pages)
        require(used.isdisjoint(fresh), "pages in use were given:", sorted(used & set(fresh)))
        require(0 not in admitted.pages, "page 0 was given")
        for page in fresh:
            self.content.pop((pool, page), None)
        self.check_content(request, admitted.pages, admitted.cached_tokens, admitted.slot)

    def check_content(self, request: Request, pages: Sequence[int], tokens: int, slot: int) -> None:
        for place in range(math.ceil(tokens / self.shape.page)):
            found, wanted = (
                self.content.get((self.shape.pool_of(slot), pages[place])),
                request.page_content(place, self.shape),
            )
            require(found == wanted, "page", pages[place], "holds", found, "instead of", wanted)

    def runnable(self) -> list[Request]:
        chunk = self.shape.chunk
        waiting = [request for request in self.running if not request.over and request.next_count]
        return [r for r in waiting if r.launched + min(chunk, r.next_count) <= r.job.ready]

    def prefill(self, prefill: Prefill | None) -> list[Report]:
        """Checks that the oldest that can prefill does, with those beside it that may, and runs it."""
        if prefill is None:
            require(not self.runnable(), "nothing prefills though", self.runnable(), "could")
            return []
        expected, rows, width = self.expected_prefill()
        require(prefill.width == width, "width", prefill.width, "instead of", width)
        parts = [(part.id, part.slot, part.start, part.count, part.last, part.pages) for part in prefill.parts]
        require(parts == expected, "prefill of", parts, "instead of", expected)
        require(list(prefill.rows) == rows, "rows", prefill.rows, "instead of", rows)
        self.outcome.shared_programs += len(parts) > 1
        return [self.run_part(self.requests[part.id], part.start, part.count) for part in prefill.parts]

    def expected_prefill(self) -> tuple[list[tuple[int, int, int, int, bool, tuple[int, ...]]], list[int], int]:
        chosen, places, room, width = [], [], 1, 0
        for request in self.runnable():
            count = min(request.next_count, self.shape.chunk)
            fit, rows = next(tail for tail in self.shape.tail_rows if tail[0] >= count)
            if not chosen:
                width, room = fit, rows
            pool = self.shape.pool_of(request.slot)
            place = next((row for row in range(pool * room, (pool + 1) * room) if row not in places), None)
            if fit == width and place is not None:
                places.append(place)
                last = request.launched + count == request.job.prompt_tokens
                chosen.append((request.job.id, request.slot, request.launched, count, last, request.pages))
        return chosen, places, width

    def run_part(self, request: Request, start: int, count: int) -> Report:
        shape = self.shape
        require(start % shape.chunk == 0, "a chunk starts at", start)
        self.check_content(request, request.pages, start, request.slot)
        for place in range(start // shape.page, math.ceil((start + count) / shape.page)):
            self.content[shape.pool_of(request.slot), request.pages[place]] = request.page_content(place, shape)
        request.launched += count
        request.unreported += 1
        request.on_device = int(not request.next_count)
        return Report(request, False, request.on_device, request.on_device == request.length)

    def decode(self, turn: Turn) -> list[Report]:
        """Checks that every row that can decode does, with the steps that the rules say, and runs the call."""
        shape = self.shape
        ready = [r for r in self.running if not r.over and not r.next_count and r.rest > 0]
        ready = [r for r in ready if not (r.job.stepwise and r.unreported)]
        if turn.decode is None:
            waits = turn.prefill is not None and not shape.steps_beside_prefill
            require(not ready or waits, "nothing decodes though", ready, "could")
            return []
        decode = turn.decode
        require(list(decode.rows) == sorted((r.slot, r.job.id) for r in ready), "rows", decode.rows, "of", ready)
        limit = min(shape.decode_steps, max(r.rest for r in ready))
        limit = min(limit, shape.steps_beside_prefill) if turn.prefill else limit
        limit = min(limit, 1) if any(r.job.stepwise for r in ready) else limit
        require(decode.steps == limit, "steps", decode.steps, "instead of", limit)
        require(decode.leave_on_end == bool(self.line), "leaves when a row ends:", decode.leave_on_end)
        for request in ready:
            written = request.job.prompt_tokens + request.on_device - 1
            self.check_content(request, request.pages, written, request.slot)
        return self.run_rows(ready, decode)

    def run_rows(self, rows: list[Request], decode: Decode) -> list[Report]:
        made = {request.job.id: 0 for request in rows}
        for _ in range(decode.steps):
            live = [request for request in rows if request.on_device < request.length]
            for request in live:
                place = (request.job.prompt_tokens + request.on_device - 1) // self.shape.page
                self.content[self.shape.pool_of(request.slot), request.pages[place]] = request.page_content(
                    place, self.shape
                )
                request.on_device += 1
                made[request.job.id] += 1
            if decode.leave_on_end and any(request.on_device == request.length for request in live):
                break
        for request in rows:
            request.unreported += 1
            request.calls.append(decode.steps)
        return [Report(r, True, made[r.job.id], r.on_device == r.length < r.job.max_new_tokens) for r in rows]

    def fail(self, turn: Turn, reports: list[Report]) -> list[Report]:
        """Sometimes a launch fails, so nothing of its requests is in flight any more."""
        if turn.prefill is None or self.rng.random() >= self.failures:
            return reports
        failed = {part.id for part in turn.prefill.parts}
        for part in turn.prefill.parts:
            first, end = part.start // self.shape.page, math.ceil((part.start + part.count) / self.shape.page)
            for page in part.pages[first:end]:
                self.content.pop((self.shape.pool_of(part.slot), page), None)
            self.requests[part.id].unreported = 0
            self.end(self.requests[part.id], "dropped")
            self.scheduler.drop(part.id)
        self.backlog = [[r for r in batch if r.request.job.id not in failed] for batch in self.backlog]
        return [report for report in reports if report.request.job.id not in failed]

    def deliver(self, left: int) -> None:
        """Reports all turns but the newest `left`; of those, at times, the parts that draw no token."""
        while len(self.backlog) > left:
            for report in self.backlog.pop(0):
                self.report(report)
        for batch in self.backlog if self.rng.random() < 0.5 else ():
            for report in [report for report in batch if not report.decoded and not report.made]:
                batch.remove(report)
                self.report(report)

    def report(self, report: Report) -> None:
        request = report.request
        request.unreported -= 1
        if report.decoded:
            request.calls.popleft()
            self.scheduler.decoded(request.job.id, report.made, report.ended)
        else:
            self.scheduler.prefilled(request.job.id, report.ended)
        request.made += 0 if request.over else report.made
        if not request.over and request.made == request.length:
            self.end(request, "length" if request.length == request.job.max_new_tokens else "stop")
        self.let_go()

    def check_progress(self, turn: Turn) -> None:
        require(bool(self.running) or not self.line, "nothing runs though requests wait:", turn)

    def check_pages(self) -> None:
        """Every page has exactly the references of those who use it, and each kept chunk has its parent."""
        for pool, cache in enumerate(self.caches):
            users = [0] * self.num_pages
            for request in self.running:
                for page in request.pages if self.shape.pool_of(request.slot) == pool else ():
                    users[page] += 1
            for page in cache.pages:
                users[page] += 1
            counts = [cache.ledger.count(page) for page in range(self.num_pages)]
            require(counts == users, "references", counts, "instead of", users)
            cache.ledger.assert_consistent()

    def check_the_end(self) -> None:
        self.deliver(0)
        require(self.scheduler.idle, "the scheduler is not idle")
        for cache in self.caches:
            require(cache.ledger.in_use == len(cache), "pages are lost:", cache.ledger.in_use, len(cache))
            cache.clear()
            require(cache.ledger.free == self.num_pages - 1, "pages are lost in the cache")


def simulate(seed: int, parts: Parts = Parts()) -> Outcome:
    """Runs the schedule with this number.

    Raises:
        Violation: it broke a rule. The message names the number.
    """
    try:
        return Simulation(seed, parts).run()
    except (AssertionError, ValueError, KeyError, OutOfPages) as error:
        raise Violation(f"schedule {seed}: {type(error).__name__}: {error}") from error
