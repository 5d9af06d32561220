"""The ledger of KV pages, against counts kept apart, and the sizes of an engine."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepstack_jax.engine.pages import OutOfPages, PageLedger
from deepstack_jax.engine.shape import EngineShape, cdiv


class TestLedger:
    def test_every_page_but_page_0_is_given_out_once(self):
        ledger = PageLedger(6)
        assert sorted(ledger.take(2) + ledger.take(3)) == [1, 2, 3, 4, 5]
        assert (ledger.free, ledger.in_use, ledger.capacity) == (0, 5, 5)
        with pytest.raises(OutOfPages, match="1 pages were asked for and 0 of 5 are free"):
            ledger.take(1)

    def test_a_shared_page_is_free_once_all_have_released_it(self):
        ledger = PageLedger(4)
        pages = ledger.take(2)
        ledger.share(pages[:1])
        ledger.release(pages)
        assert [ledger.count(page) for page in pages] == [1, 0]
        ledger.release(pages[:1])
        assert ledger.free == 3

    @pytest.mark.parametrize("pages", [(1, 1), (2,), (0,), (4,), (-1,), (1, 3)])
    def test_nothing_changes_if_one_page_can_not_be_released(self, pages):
        ledger = PageLedger(4)
        assert ledger.take(1) == (1,)
        with pytest.raises(ValueError, match="page"):
            ledger.release(pages)
        assert (ledger.count(1), ledger.free) == (1, 2)
        ledger.assert_consistent()

    @pytest.mark.parametrize("pages", [(2,), (1, 2), (0,), (4,)])
    def test_only_pages_in_use_are_shared(self, pages):
        ledger = PageLedger(4)
        ledger.take(1)
        with pytest.raises(ValueError, match="page"):
            ledger.share(pages)
        assert ledger.count(1) == 1

    def test_a_pool_has_a_page_beside_page_0(self):
        with pytest.raises(ValueError, match="num_pages 1 leaves no page to give out"):
            PageLedger(1)

    @settings(deadline=None)
    @given(st.lists(st.tuples(st.sampled_from(["take", "share", "release"]), st.integers(0, 3)), max_size=40))
    def test_any_order_of_operations_keeps_the_counts(self, operations):
        ledger, counts = PageLedger(8), Counter[int]()
        for name, number in operations:
            held = sorted(counts)[:number]
            if name == "take" and number <= 7 - len(counts):
                taken = ledger.take(number)
                assert not counts.keys() & set(taken)
                counts.update(taken)
            elif name == "share":
                ledger.share(held)
                counts.update(held)
            elif name == "release":
                ledger.release(held)
                counts = +(counts - Counter(held))
            assert [ledger.count(page) for page in range(8)] == [counts[page] for page in range(8)]
            counts = +counts
            assert (ledger.free, ledger.in_use) == (7 - len(counts), len(counts))
            ledger.assert_consistent()


class TestShape:
    def test_default_tails_are_an_eighth_a_quarter_and_a_half(self):
        shape = EngineShape(slots=4, chunk=256)
        assert shape.tail_rows == ((32, 1), (64, 1), (128, 1), (256, 1))
        assert EngineShape(slots=1, chunk=4, page=4).tail_rows == ((1, 1), (2, 1), (4, 1))
        assert EngineShape(slots=1, chunk=1, page=1).tail_rows == ((1, 1),)

    def test_the_name_says_what_bits_depend_on(self):
        tails = ((32, 8), (64, 4), (128, 2), (256, 1))
        shape = EngineShape(4, 256, tail_rows=tails, decode_steps=3, steps_beside_prefill=1)
        assert shape.name() == "slots=4,chunk=256,page=128,tails=32x8/64x4/128x2"
        assert shape.name() == EngineShape(4, 256, tail_rows=tails).name()
        assert EngineShape(1, 128, tail_rows=((128, 1),)).name() == "slots=1,chunk=128,page=128,tails=none"

    def test_a_width_is_the_smallest_that_holds_the_tokens(self):
        shape = EngineShape(slots=4, chunk=256, tail_rows=((32, 8), (128, 2), (256, 1)))
        widths = [shape.width_of(count) for count in (1, 32, 33, 128, 129, 256)]
        assert widths == [32, 32, 128, 128, 256, 256]
        assert [shape.rows_of(width) for width in (32, 128, 256)] == [8, 2, 1]
        for count in (0, 257):
            with pytest.raises(ValueError, match=f"a piece of {count} tokens has no width: pass 1 to 256"):
                shape.width_of(count)

    def test_pages_are_counted_whole(self):
        shape = EngineShape(slots=4, chunk=256)
        assert [shape.pages_of(tokens) for tokens in (1, 128, 129)] == [1, 1, 2]
        assert shape.pages_per_chunk == 2
        assert [cdiv(a, 4) for a in (0, 1, 4, 5)] == [0, 1, 1, 2]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"slots": 0}, "slots 0 is too small: pass 1 or more"),
            ({"decode_steps": 0}, "decode_steps 0 is too small"),
            ({"steps_beside_prefill": -1}, "steps_beside_prefill -1 is too small: pass 0 or more"),
            ({"chunk": 192}, "chunk 192 is not a multiple of page 128: pass 256"),
            ({"tail_rows": ((64, 1), (32, 1), (256, 1))}, "must ascend"),
            ({"tail_rows": ((0, 1), (256, 1))}, "must ascend"),
            ({"tail_rows": ((32, 0), (256, 1))}, "takes 1 request or more"),
            ({"tail_rows": ((32, 1),)}, r"append \(256, 1\)"),
            ({"tail_rows": ((256, 2),)}, r"append \(256, 1\)"),
        ],
        ids=lambda value: str(value)[:60] if isinstance(value, dict) else "",
    )
    def test_wrong_sizes_are_refused(self, options, message):
        with pytest.raises(ValueError, match=message):
            EngineShape(**({"slots": 4, "chunk": 256} | options))
