"""The engine's scheduler in random schedules, and what planted faults look like in them."""

import itertools
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import replace

import pytest

from deepstack_jax.engine.pages import PageLedger
from deepstack_jax.engine.prefix_cache import PrefixCache
from deepstack_jax.engine.scheduler import Scheduler
from tests.schedules import Outcome, Parts, Violation, simulate


def simulate_all(seeds: Iterable[int], parts: Parts) -> list[Outcome]:
    return [simulate(seed, parts) for seed in seeds]


class TestRandomSchedules:
    """`simulate` says what holds in each of them."""

    def test_every_schedule_keeps_the_rules(self):
        outcomes = simulate_all(range(2000), Parts())
        ends = Counter(end for outcome in outcomes for end in outcome.ends)
        # they reach what they are for
        assert min(ends[end] for end in ("length", "stop", "deadline", "gone", "dropped")) > 50
        assert sum(outcome.cached_tokens > 0 for outcome in outcomes) > 500
        assert sum(outcome.matched_again > 0 for outcome in outcomes) > 50
        assert sum(outcome.shared_programs > 0 for outcome in outcomes) > 50
        assert sum(outcome.at_bound for outcome in outcomes) > 50
        assert max(outcome.passed for outcome in outcomes) >= 3

    @pytest.mark.exhaustive
    @pytest.mark.parametrize("part", range(10))
    def test_a_hundred_thousand_do(self, part):
        simulate_all(range(10_000 * part, 10_000 * (part + 1)), Parts())


class LosesAPage(PageLedger):
    def release(self, pages):
        super().release(tuple(pages)[1:])


class GivesAPageTwice(PageLedger):
    def take(self, count):
        pages = super().take(count)
        self._free += pages[-1:]
        return pages


class CoversTheWholePrompt(PrefixCache):
    def find(self, keys, prompt_tokens):
        return super().find(keys, prompt_tokens + 1)


class ForgetsParents(PrefixCache):
    def _evictable(self, keep):
        return iter([key for key in list(self._entries)[::-1] if key not in keep])


class LetsEverybodyOvertake(Scheduler):
    def _blocks(self, job):
        return False


class ServesTheNewestFirst(Scheduler):
    def submit(self, job):
        super().submit(job)
        self.waiting[job.tenant].rotate()


class FreesInFlight(Scheduler):
    def _settle(self, entry):
        if entry.over and entry.in_flight and entry.pages:
            entry.cache.ledger.release(entry.pages)
            self.free_slots.add(entry.slot)
            entry.pages = ()
        super()._settle(entry)


class FreesSlotsInFlight(Scheduler):
    def _settle(self, entry):
        if entry.over:
            self.free_slots.add(entry.slot)
        super()._settle(entry)


class KeepsWhatWasNotLaunched(Scheduler):
    def prefilled(self, id, ended=False):
        size = self.shape.pages_per_chunk
        for entry in self.running.values():
            for place, (parent, key) in enumerate(itertools.pairwise((None, *entry.job.keys))):
                entry.cache.insert(key, entry.pages[place * size : (place + 1) * size], parent)
        super().prefilled(id, ended)


class MatchesTooLate(Scheduler):
    def _match_again(self):
        for entry in self.running.values():
            entry.cached = entry.prefilled
        return super()._match_again()


class OutrunsArrivals(Scheduler):
    def _runnable(self):
        yield from (e for e in self.running.values() if not e.over and e.prefilled < e.job.prompt_tokens)


class MissesDeadlines(Scheduler):
    def _reason_to_end(self, job, now):
        return self.cancelled.get(job.id)


class ForgetsSteps(Scheduler):
    def _next_decode(self, prefills):
        for entry in self.running.values():
            entry.calls = deque(min(steps, 1) for steps in entry.calls)
        return super()._next_decode(prefills)


class RunsAheadOfTokens(Scheduler):
    def _next_decode(self, prefills):
        jobs = {id: entry.job for id, entry in self.running.items()}
        for entry in self.running.values():
            entry.job = replace(entry.job, stepwise=False)
        decode = super()._next_decode(prefills)
        for id, entry in self.running.items():
            entry.job = jobs[id]
        return decode


class TestPlantedFaults:
    @pytest.mark.parametrize(
        ("parts", "what"),
        [
            pytest.param(Parts(ledger=LosesAPage), "references", id="a page leaks"),
            pytest.param(Parts(ledger=GivesAPageTwice), "references", id="a page is given twice"),
            pytest.param(Parts(cache=CoversTheWholePrompt), "no token is left", id="no token is left to compute"),
            pytest.param(Parts(cache=ForgetsParents), "KeyError|OutOfPages", id="parents go before their children"),
            pytest.param(Parts(scheduler=LetsEverybodyOvertake), "starves", id="starvation by overtaking"),
            pytest.param(Parts(scheduler=ServesTheNewestFirst), "not the first of its tenant", id="newest first"),
            pytest.param(Parts(scheduler=FreesInFlight), "references", id="pages are freed while in flight"),
            pytest.param(Parts(scheduler=FreesSlotsInFlight), "a slot in use", id="slots are freed while in flight"),
            pytest.param(Parts(scheduler=KeepsWhatWasNotLaunched), "holds", id="a chunk is kept before its launch"),
            pytest.param(Parts(scheduler=MatchesTooLate), "matched again", id="pages are swapped after a launch"),
            pytest.param(Parts(scheduler=OutrunsArrivals), "width|prefill", id="a chunk runs before its rows"),
            pytest.param(Parts(scheduler=MissesDeadlines), "ended", id="deadlines are missed"),
            pytest.param(Parts(scheduler=ForgetsSteps), "rows|steps", id="issued steps are not counted"),
            pytest.param(Parts(scheduler=RunsAheadOfTokens), "rows|steps", id="a step is drawn without its mask"),
        ],
    )
    def test_the_simulation_finds_it(self, parts, what):
        with pytest.raises(Violation, match=what):
            simulate_all(range(1500), parts)
