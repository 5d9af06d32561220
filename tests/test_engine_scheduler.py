"""The engine's scheduler: each rule by itself. test_engine_schedules.py has them all together."""

import ast
from collections.abc import Iterable
from pathlib import Path

import pytest

import deepstack_jax.engine.scheduler
from deepstack_jax.engine.pages import PageLedger
from deepstack_jax.engine.prefix_cache import PrefixCache
from deepstack_jax.engine.scheduler import NeverFits, QueueFull, Scheduler
from deepstack_jax.engine.shape import EngineShape
from deepstack_jax.engine.turn import Decode, Ended, Job, Part, Turn

SHAPE = EngineShape(slots=4, chunk=8, page=2, decode_steps=4, tail_rows=((1, 1), (2, 3), (4, 1), (8, 1)))
FOREVER = 1e9


def scheduler(shape: EngineShape = SHAPE, num_pages: int = 101, **options: int) -> Scheduler:
    ledger = PageLedger(num_pages)
    return Scheduler(shape, (PrefixCache(ledger, shape.chunk, shape.page),), **options)


def job(
    id: int,
    prompt: int = 3,
    new: int = 2,
    tenant: str = "a",
    ready: int | None = None,
    keys: tuple[bytes, ...] = (),
    deadline: float = FOREVER,
    stepwise: bool = False,
) -> Job:
    return Job(id, prompt, new, deadline, tenant, keys, prompt if ready is None else ready, stepwise)


def submitted(jobs: Iterable[Job], it: Scheduler) -> Scheduler:
    for one in jobs:
        it.submit(one)
    return it


def admitted_ids(turn: Turn) -> list[int]:
    return [admitted.id for admitted in turn.admitted]


def parts_of(turn: Turn) -> tuple[Part, ...]:
    return turn.prefill.parts if turn.prefill else ()


def report(it: Scheduler, turn: Turn, ends: Iterable[int] = ()) -> None:
    """Reports a turn whose rows all make what they can, but those of `ends` end with it."""
    for part in parts_of(turn):
        it.prefilled(part.id)
    for _, id in turn.decode.rows if turn.decode else ():
        entry = it.running[id]
        it.decoded(id, min(entry.calls[0], entry.job.max_new_tokens - entry.made), id in ends)


class TestAdmission:
    def test_a_request_that_can_never_fit_is_refused_with_the_numbers(self):
        with pytest.raises(
            NeverFits, match=r"15 prompt tokens and 8 new ones need 11 KV pages of 2 .* holds 10 \(20 tok"
        ):
            scheduler(num_pages=11).submit(job(0, prompt=15, new=8))

    def test_the_last_new_token_needs_no_place(self):
        it = submitted([job(0, prompt=15, new=6)], scheduler(num_pages=11))
        (admitted,) = it.next_turn(0).admitted
        assert len(admitted.pages) == 10

    def test_a_full_line_takes_nobody(self):
        it = submitted([job(i) for i in range(3)], scheduler(max_waiting=3))
        with pytest.raises(QueueFull, match="3 requests are waiting"):
            it.submit(job(3))

    def test_tenants_take_turns_and_each_is_served_in_order(self):
        jobs = [job(i, tenant="greedy") for i in range(4)] + [
            job(4, tenant="b"),
            job(5, tenant="c"),
            job(6, tenant="b"),
        ]
        it, order = submitted(jobs, scheduler(EngineShape(slots=1, chunk=8, page=2))), []
        while not it.idle:
            turn = it.next_turn(0)
            order += admitted_ids(turn)
            report(it, turn)
        assert order == [0, 4, 5, 1, 6, 2, 3]

    @pytest.mark.parametrize("max_overtakes", [0, 1, 3])
    def test_a_request_that_waits_for_pages_is_overtaken_so_often_and_no_more(self, max_overtakes):
        it = submitted([job(0, prompt=2, new=7, tenant="first")], scheduler(num_pages=9, max_overtakes=max_overtakes))
        it.next_turn(0)  # holds half of the pages until its call is reported
        submitted([job(1, prompt=16, new=1, tenant="big")], it)
        submitted([job(2 + i, prompt=1, new=1, tenant="small") for i in range(9)], it)
        order = []
        for _ in range(20):
            turn = it.next_turn(0)
            order += admitted_ids(turn)
            for part in parts_of(turn):
                it.prefilled(part.id)
        assert order == list(range(2, 2 + max_overtakes))
        it.drop(0)
        assert admitted_ids(it.next_turn(0)) == [1]

    def test_nobody_behind_it_in_its_own_line_overtakes(self):
        it = submitted([job(0, prompt=2, new=7)], scheduler(num_pages=9))
        turn = it.next_turn(0)
        submitted([job(1, prompt=16, new=1), job(2, prompt=1, new=1)], it)
        order = []
        while not it.idle:
            report(it, turn)
            turn = it.next_turn(0)
            order += admitted_ids(turn)
        assert order == [1, 2]

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            (job(1, prompt=0), "pass 1 or more"),
            (job(1, new=0), "pass 1 or more"),
            (job(1, prompt=3, ready=4), "4 tokens are ready of 3"),
            (job(1, prompt=16, keys=(b"a",)), "1 keys for 2 whole chunks"),
            (job(0), "request 0 has not ended"),
        ],
        ids=["no prompt", "no new token", "more ready than there are", "too few keys", "an id in use"],
    )
    def test_wrong_requests_are_refused(self, wrong, message):
        with pytest.raises(ValueError, match=message):
            submitted([job(0)], scheduler()).submit(wrong)


class TestPrefill:
    def test_a_prompt_runs_in_aligned_chunks_and_a_tail_one_per_turn(self):
        it = submitted([job(0, prompt=19, new=1)], scheduler())
        turns = [it.next_turn(0) for _ in range(4)]
        seen = [(t.prefill.width, p.start, p.count, p.last) for t in turns[:3] if t.prefill for p in t.prefill.parts]
        assert seen == [(8, 0, 8, False), (8, 8, 8, False), (4, 16, 3, True)]
        assert turns[3].prefill is None

    @pytest.mark.parametrize(("prompt", "width"), [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (8, 8)])
    def test_the_prompt_s_own_length_chooses_the_width(self, prompt, width):
        it = submitted([job(0, prompt=prompt, new=1)], scheduler())
        prefill = it.next_turn(0).prefill
        assert prefill is not None
        assert prefill.width == width

    def test_one_whose_rows_have_not_arrived_yields_and_keeps_its_place(self):
        it = submitted([job(0, prompt=16, new=1, ready=7), job(1, prompt=24, new=1)], scheduler())
        assert [part.id for part in parts_of(it.next_turn(0))] == [1]
        it.arrived(0, 8)
        assert [(part.id, part.start) for part in parts_of(it.next_turn(0))] == [(0, 0)]
        assert [(part.id, part.start) for part in parts_of(it.next_turn(0))] == [(1, 8)]
        it.arrived(0, 16)
        assert [(part.id, part.start) for part in parts_of(it.next_turn(0))] == [(0, 8)]

    def test_tails_of_one_width_share_its_program_and_nobody_waits_for_company(self):
        jobs = [job(0, prompt=2), job(1, prompt=3), job(2, prompt=10), job(3, prompt=2)]
        it = submitted(jobs, scheduler())
        turns = [it.next_turn(0) for _ in range(4)]
        # 2 is not at its tail yet when 0 and 3 are
        assert [[part.id for part in parts_of(turn)] for turn in turns] == [[0, 3], [1], [2], [2]]

    def test_no_more_share_it_than_it_has_rows(self):
        it = submitted([job(i, prompt=2) for i in range(4)], scheduler())
        assert [[part.id for part in parts_of(it.next_turn(0))] for _ in range(2)] == [[0, 1, 2], [3]]

    def test_arrivals_only_grow(self):
        it = submitted([job(0, prompt=16, ready=8)], scheduler())
        for wrong in (7, 17):
            with pytest.raises(ValueError, match=f"ready {wrong} is not between 8, the last, and 16"):
                it.arrived(0, wrong)
        it.arrived(99, 5)  # has ended


class TestDecode:
    def test_a_request_decodes_in_the_turn_of_its_last_part_without_its_result(self):
        it = submitted([job(0, prompt=16, new=12)], scheduler())
        assert it.next_turn(0).decode is None
        assert it.next_turn(0).decode == Decode(((0, 0),), steps=2, leave_on_end=False)

    def test_calls_launched_ahead_never_exceed_the_limit(self):
        it = submitted([job(0, prompt=1, new=12)], scheduler())
        decodes = [it.next_turn(0).decode for _ in range(6)]
        assert [decode and decode.steps for decode in decodes] == [2, 4, 4, 1, None, None]  # and one by the prefill

    def test_a_call_that_left_early_is_made_up_for(self):
        it = submitted([job(0, prompt=1, new=9)], scheduler())
        it.next_turn(0), it.next_turn(0)
        it.prefilled(0)
        it.decoded(0, 1, False)  # of 2
        it.decoded(0, 4, False)
        decode = it.next_turn(0).decode
        assert decode is not None
        assert decode.steps == 3

    def test_calls_are_short_while_others_prefill(self):
        it = submitted([job(0, prompt=1, new=40), job(1, prompt=24, new=1)], scheduler())
        decodes = [it.next_turn(0).decode for _ in range(5)]
        assert [decode and decode.steps for decode in decodes] == [2, 2, 2, 2, 4]

    def test_without_steps_beside_a_prefill_all_prefill_first(self):
        shape = EngineShape(slots=3, chunk=8, page=2, decode_steps=4, steps_beside_prefill=0)
        it = submitted([job(0, prompt=1, new=40), job(1, prompt=17, new=1)], scheduler(shape))
        decodes = [it.next_turn(0).decode for _ in range(5)]
        assert [decode and decode.steps for decode in decodes] == [None, None, None, None, 4]

    def test_a_call_leaves_when_a_row_ends_only_if_somebody_waits(self):
        it = submitted([job(i, prompt=1, new=9) for i in range(5)], scheduler())
        assert [decode and decode.leave_on_end for decode in [it.next_turn(0).decode]] == [True]
        it.cancel(4)
        assert [decode and decode.leave_on_end for decode in [it.next_turn(0).decode]] == [False]

    def test_a_row_that_ended_is_left_out_and_held_until_its_calls_are_reported(self):
        it = submitted([job(0, prompt=1, new=30)], scheduler())
        it.next_turn(0), it.next_turn(0)
        it.prefilled(0)
        it.decoded(0, 1, True)
        assert it.next_turn(0).decode is None
        assert it.caches[0].ledger.in_use
        assert 0 not in it.free_slots
        it.decoded(0, 0, True)  # launched ahead
        assert it.idle
        assert not it.caches[0].ledger.in_use

    @pytest.mark.parametrize(("new", "ended"), [(1, False), (9, True)], ids=["at its limit", "by an end token"])
    def test_the_first_token_can_be_the_last(self, new, ended):
        it = submitted([job(0, prompt=16, new=new)], scheduler())
        it.next_turn(0), it.next_turn(0)
        it.prefilled(0)
        it.prefilled(0, ended)
        if new > 1:
            it.decoded(0, 0, True)
        assert it.idle


class TestEnds:
    def test_deadlines_and_cancellations_say_how_far_it_was(self):
        it = scheduler(EngineShape(slots=3, chunk=8, page=2), max_overtakes=0)
        submitted([job(0, prompt=1, new=9), job(1, deadline=5), job(2, prompt=16, ready=3), job(3, deadline=6)], it)
        report(it, it.next_turn(0))
        it.cancel(0, "stopping")
        it.cancel(2)
        assert it.next_turn(5).ended == (
            Ended(0, "stopping", "after 3 tokens"),
            Ended(1, "deadline", "after encoding"),
            Ended(2, "cancelled", "while encoding"),
        )

    def test_those_in_line_end_too(self):
        it = submitted([job(i, deadline=9) for i in range(6)], scheduler())
        it.next_turn(0)
        it.cancel(5)
        assert it.next_turn(8).ended == (Ended(5, "cancelled", "in line"),)
        assert it.next_turn(9).ended[0] == Ended(4, "deadline", "in line")

    def test_a_slot_is_given_again_in_the_same_turn_if_nothing_uses_it(self):
        it = submitted([job(i, ready=0) for i in range(5)], scheduler())
        it.next_turn(0)
        it.cancel(1)
        (admitted,) = it.next_turn(0).admitted
        assert (admitted.id, admitted.slot) == (4, 1)

    def test_what_has_ended_can_be_cancelled_and_its_id_given_again(self):
        it = submitted([job(0, prompt=1, new=1)], scheduler())
        it.next_turn(0)
        it.cancel(0)
        it.prefilled(0)  # before the turn that would have ended it
        it.cancel(0)
        it.submit(job(0))
        assert it.next_turn(0).ended == ()

    def test_each_launch_is_reported_once_and_in_order(self):
        it = submitted([job(0, prompt=1, new=9)], scheduler())
        with pytest.raises(ValueError, match="request 0 has no unreported part"):
            it.prefilled(0)
        it.next_turn(0)
        with pytest.raises(ValueError, match="request 0 has no unreported call"):
            it.decoded(0, 1, False)
        it.prefilled(0)
        with pytest.raises(ValueError, match="made 3 tokens in a call of 2 steps"):
            it.decoded(0, 3, False)
        it.decoded(0, 2, False)
        with pytest.raises(ValueError, match="request 0 has no unreported call"):
            it.decoded(0, 1, False)


class TestPrefixes:
    KEYS = (b"a", b"b")

    def prefilled_once(self, **options: int) -> Scheduler:
        it = submitted([job(0, prompt=19, new=1, keys=self.KEYS)], scheduler(**options))
        while not it.idle:
            report(it, it.next_turn(0))
        return it

    def test_a_prompt_that_begins_alike_starts_after_what_is_kept(self):
        it = self.prefilled_once()
        it.submit(job(1, prompt=20, new=1, keys=self.KEYS, ready=0))
        turn = it.next_turn(0)
        assert [admitted.cached_tokens for admitted in turn.admitted] == [16]
        assert turn.prefill is None
        it.arrived(1, 20)
        assert [(part.start, part.count) for part in parts_of(it.next_turn(0))] == [(16, 4)]

    def test_the_last_token_is_always_computed(self):
        it = self.prefilled_once()
        it.submit(job(1, prompt=16, new=1, keys=self.KEYS))
        assert [admitted.cached_tokens for admitted in it.next_turn(0).admitted] == [8]

    def test_of_those_that_come_at_once_one_computes_the_common_beginning(self):
        it = submitted([job(i, prompt=19, new=1, keys=self.KEYS) for i in range(3)], scheduler())
        matched, computed = [], []
        while not it.idle:
            turn = it.next_turn(0)
            matched += [(admitted.id, admitted.cached_tokens) for admitted in turn.admitted]
            computed += [(part.id, part.start) for part in parts_of(turn)]
            report(it, turn)
        assert computed == [(0, 0), (0, 8), (0, 16), (1, 16), (2, 16)]
        assert matched == [(0, 0), (1, 0), (2, 0), (1, 8), (2, 8), (1, 16), (2, 16)]
        assert (it.caches[0].query_tokens, it.caches[0].hit_tokens) == (3 * 19, 2 * 16)

    def test_one_that_has_begun_computes_the_rest_itself(self):
        jobs = [job(0, prompt=19, new=1, keys=self.KEYS, ready=8), job(1, prompt=19, new=1, keys=(b"x", b"y"), ready=8)]
        it = submitted(jobs, scheduler())
        for _ in range(2):
            report(it, it.next_turn(0))
        it.submit(job(2, prompt=19, new=1, keys=self.KEYS))
        report(it, it.next_turn(0))  # computes b, after a from the cache
        assert b"b" in it.caches[0]
        pages = it.running[0].pages
        it.arrived(0, 19)
        turn = it.next_turn(0)
        assert turn.admitted == ()
        assert [(part.id, part.start, part.pages) for part in parts_of(turn)] == [(0, 8, pages)]

    def test_kept_pages_make_room_for_those_who_need_them(self):
        it = self.prefilled_once(num_pages=11)
        assert (it.caches[0].ledger.in_use, len(it.caches[0])) == (8, 8)
        it.submit(job(1, prompt=13, new=8))
        assert len(it.next_turn(0).admitted) == 1
        assert len(it.caches[0]) == 0

    def test_they_stay_if_that_would_not_make_room_enough(self):
        it = submitted([job(1, prompt=1, new=4)], self.prefilled_once(num_pages=13))
        it.next_turn(0)
        it.submit(job(2, prompt=20, new=5))
        assert it.next_turn(0).admitted == ()
        assert len(it.caches[0]) == 8

    def test_a_chunk_is_kept_if_it_was_launched_before_the_cancellation_and_not_otherwise(self):
        it = submitted([job(0, prompt=19, new=1, keys=self.KEYS)], scheduler())
        it.next_turn(0)
        it.cancel(0)
        it.next_turn(0)
        it.prefilled(0)
        assert it.idle
        assert it.caches[0].find(self.KEYS, 19) == (b"a",)

    def test_a_chunk_whose_launch_failed_is_not_kept(self):
        it = submitted([job(0, prompt=19, new=1, keys=self.KEYS)], scheduler())
        it.next_turn(0)
        it.drop(0)
        assert it.idle
        assert not it.caches[0].ledger.in_use


def test_the_engine_s_bookkeeping_knows_no_device_no_thread_and_no_clock():
    folder = Path(deepstack_jax.engine.scheduler.__file__).parent
    for name in ("pages", "prefix_cache", "scheduler", "shape", "turn"):
        tree = ast.parse((folder / f"{name}.py").read_text())
        modules = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        modules |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        allowed = ("collections", "dataclasses", "hashlib", "itertools", "numpy")
        allowed += ("deepstack_jax.engine.", "deepstack_jax.rounding")
        assert all(module.startswith(allowed) for module in modules), (name, modules)
