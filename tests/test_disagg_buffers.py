"""The host buffers against plain arrays, the wire layout, and the block allocator against a dictionary."""

import ctypes
import mmap
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from deepstack_jax.disagg import BlockAllocator, MultimodalDataBuffers
from deepstack_jax.disagg.wire.buffers import BufferData
from deepstack_jax.disagg.wire.layout import (
    DEEPSTACK_EMBEDDINGS,
    FILL_IDS,
    Span,
    checksum,
    fingerprint,
    visual_runs,
)

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]
VISUAL = 7  # the placeholder's token id


def prompt(tokens: int, hidden: int, levels: int, dtype: type, seed: int = 0) -> dict[str, np.ndarray]:
    """Arguments of `set_buf`; about half of the tokens are visual."""
    rng = np.random.default_rng(seed)
    return {
        "input_embeddings": rng.standard_normal((tokens, hidden)).astype(dtype),
        "fill_ids": np.where(rng.random(tokens) < 0.5, VISUAL, rng.integers(10, 1000, tokens)),
        "mrope_positions": rng.integers(0, 5000, (3, tokens)),
        "aux_datas": rng.integers(-9, 9, 4),
        "deepstack_embeddings": rng.standard_normal((tokens, levels * hidden)).astype(dtype) if levels else None,
    }


def assert_same(found: BufferData, given: dict, tokens: int) -> None:
    """Asserts that the arrays are equal bit for bit, with aux_datas padded with zeros."""
    for name in ("input_embeddings", "fill_ids", "mrope_positions", "deepstack_embeddings"):
        expected, array = given[name], getattr(found, name)
        if expected is None:
            assert array is None
            continue
        expected = expected[..., :tokens] if name == "mrope_positions" else expected[:tokens]
        assert array.tobytes() == expected.astype(array.dtype).tobytes(), name
        assert array.shape == expected.shape
    np.testing.assert_array_equal(found.aux_datas, [*given["aux_datas"], *[0] * 12])


class TestBuffers:
    @settings(max_examples=60, deadline=None)
    @given(data=st.data())
    def test_get_buf_returns_what_set_buf_wrote(self, data):
        num_blocks, size = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 9))
        hidden, levels = data.draw(st.integers(1, 6)), data.draw(st.integers(0, 3))
        dtype = data.draw(st.sampled_from(DTYPES))
        buffers = MultimodalDataBuffers(num_blocks, size, hidden, levels, dtype)
        blocks = data.draw(st.permutations(range(num_blocks)))[: data.draw(st.integers(1, num_blocks))]
        tokens = data.draw(st.integers(1, len(blocks) * size))
        given = prompt(tokens, hidden, levels, dtype, data.draw(st.integers(0, 9)))
        buffers.set_buf(blocks, **given)
        assert_same(buffers.get_buf(blocks, tokens), given, tokens)
        assert_same(buffers.get_buf(blocks, tokens // 2), given, tokens // 2)

    def test_omitted_arguments_change_nothing(self):
        buffers = MultimodalDataBuffers(3, 4, 5, 2, np.float32)
        given = prompt(10, 5, 2, np.float32)
        buffers.set_buf([2, 0, 1], **given)
        other = prompt(10, 5, 2, np.float32, seed=1)
        for name, value in other.items():
            buffers.set_buf([2, 0, 1], **{name: value})
            given[name] = value
            assert_same(buffers.get_buf([2, 0, 1], 10), given, 10)

    def test_other_blocks_stay_unchanged(self):
        buffers = MultimodalDataBuffers(4, 4, 5, 2, np.float32)
        first, second = prompt(7, 5, 2, np.float32), prompt(8, 5, 2, np.float32, seed=1)
        buffers.set_buf([3, 1], **first)
        buffers.set_buf([0, 2], **second)
        assert_same(buffers.get_buf([3, 1], 7), first, 7)
        assert_same(buffers.get_buf([0, 2], 8), second, 8)

    def test_copies_share_no_memory_with_the_buffers(self):
        buffers = MultimodalDataBuffers(1, 4, 5, 2, np.float32)
        given = prompt(4, 5, 2, np.float32)
        buffers.set_buf([0], **given)
        found = buffers.get_buf([0], 4)
        buffers.set_buf([0], **prompt(4, 5, 2, np.float32, seed=1))
        assert_same(found, given, 4)
        for array in found:
            assert not any(np.shares_memory(array, own) for own in buffers.arrays)

    @pytest.mark.parametrize("levels", [0, 3])
    def test_infos_describe_memory_that_another_program_can_write(self, levels):
        buffers = MultimodalDataBuffers(5, 16, 24, levels, ml_dtypes.bfloat16)
        ptrs, total_lens, item_lens = buffers.get_buf_infos()
        assert item_lens == [16 * 24 * 2, 16 * 4, 3 * 16 * 4, 16 * 4, 16 * 24 * levels * 2][: 5 if levels else 4]
        assert total_lens == [5 * length for length in item_lens]
        assert all(pointer % mmap.PAGESIZE == 0 for pointer in ptrs)
        ends = [pointer + total for pointer, total in zip(ptrs, total_lens, strict=True)]
        assert all(end <= start for end, start in zip(ends, ptrs[1:], strict=False))
        # block 3, tokens 2 and 3
        ids = np.array([VISUAL, 11], np.int32)
        address, length = buffers.layout.locate(3, Span(FILL_IDS, 2, 4))
        assert (address, length) == (ptrs[FILL_IDS] + 3 * 64 + 2 * 4, 8)
        ctypes.memmove(address, ids.ctypes.data, length)
        np.testing.assert_array_equal(buffers.get_buf([3], 4).fill_ids[2:], ids)

    def test_every_page_is_in_memory_from_the_start(self):
        """It runs in a separate process, because memory that was used before would hide a fault."""
        code = """if True:
            import resource
            from deepstack_jax.disagg import MultimodalDataBuffers
            buffers = MultimodalDataBuffers(64, 64, 1024, 3, "float32")
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for array in buffers.arrays:
                array.fill(1)
            faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
            assert sum(array.nbytes for array in buffers.arrays) > 64 << 20
            assert faults < 1000, faults
        """
        child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert child.returncode == 0, child.stderr

    @pytest.mark.parametrize(
        ("blocks", "changed", "reason"),
        [
            ([0, 3], {}, "block 3 is outside the pool of 3 blocks"),
            ([-1, 0], {}, "block -1 is outside"),
            ([1, 1], {}, r"\[1, 1\] name a block twice"),
            ([1], {}, "6 tokens do not fit in 1 blocks of 4 tokens"),
            ([1, 2], {"fill_ids": np.zeros(5, int)}, "different numbers of tokens"),
            ([1, 2], {"fill_ids": np.zeros((6, 1), int)}, r"fill_ids \[6, 1\] must be \[T\]"),
            ([1, 2], {"fill_ids": np.zeros(6)}, "fill_ids are float64: expected integers"),
            ([1, 2], {"fill_ids": np.full(6, 2**31)}, "do not fit in 32 bits"),
            ([1, 2], {"mrope_positions": np.zeros((6, 3), int)}, r"mrope_positions \[6, 3\] must be \[3, T\]"),
            ([1, 2], {"input_embeddings": np.zeros((6, 4), np.float32)}, r"input_embeddings \[6, 4\] must be \[T, 5\]"),
            (
                [1, 2],
                {"input_embeddings": np.zeros((6, 5))},
                "input_embeddings are float64, but the buffers are float32",
            ),
            ([1, 2], {"deepstack_embeddings": np.zeros((6, 5), np.float32)}, r"must be \[T, 10\]"),
            ([1, 2], {"aux_datas": np.zeros(17, int)}, r"aux_datas \[17\] must be up to 16 integers"),
            ([1, 2], {"aux_datas": np.zeros((2, 2), int)}, "must be up to 16 integers"),
            ([], dict.fromkeys(("input_embeddings", "fill_ids", "mrope_positions", "deepstack_embeddings")), "aux"),
        ],
    )
    def test_invalid_arguments_are_refused_and_nothing_is_written(self, blocks, changed, reason):
        buffers = MultimodalDataBuffers(3, 4, 5, 2, np.float32)
        with pytest.raises(ValueError, match=reason) as raised:
            buffers.set_buf(blocks, **(prompt(6, 5, 2, np.float32) | changed))
        assert "\n" not in str(raised.value)
        assert not any(array.any() for array in buffers.arrays)

    def test_invalid_reads_are_refused(self):
        buffers = MultimodalDataBuffers(3, 4, 5, 0, np.float32)
        for blocks, tokens, reason in (
            ([0], 5, "5 tokens"),
            ([0], -1, "-1 tokens"),
            ([3], 1, "block 3"),
            ([], 0, "empty"),
        ):
            with pytest.raises(ValueError, match=reason):
                buffers.get_buf(blocks, tokens)
        with pytest.raises(ValueError, match="these buffers have no deepstack_embeddings"):
            buffers.set_buf([0], deepstack_embeddings=np.zeros((1, 5), np.float32))
        for block, span, reason in (
            (3, Span(FILL_IDS, 0, 1), "block 3 is outside"),
            (0, Span(DEEPSTACK_EMBEDDINGS, 0, 1), "buffer 4 does not exist"),
            (0, Span(FILL_IDS, 3, 5), "fill_ids 3 to 5 is outside a row of 4"),
        ):
            with pytest.raises(ValueError, match=reason):
                buffers.layout.locate(block, span)

    @pytest.mark.parametrize(
        ("arguments", "reason"),
        [((0, 1, 1), "num_blocks 0"), ((1, 0, 1), "block_size 0"), ((1, 1, 1, -1), "num_deepstack_embeddings -1"),
         ((1, 1, 1, 1, np.int8), "dtype int8 is not supported")],
    )  # fmt: skip
    def test_invalid_sizes_are_refused(self, arguments, reason):
        with pytest.raises(ValueError, match=reason):
            MultimodalDataBuffers(*arguments)


class TestWire:
    def test_runs_are_the_ranges_of_visual_tokens(self):
        for text, runs in (
            ("", ()),
            ("0000", ()),
            ("1111", ((0, 4),)),
            ("0110", ((1, 3),)),
            ("1011001", ((0, 1), (2, 4), (6, 7))),
        ):
            assert visual_runs(np.array([letter == "1" for letter in text], bool)) == runs

    def test_checksums_are_xxh3_of_all_bytes_however_they_are_split(self):
        ids, rows = (
            np.arange(5, dtype=np.int32),
            np.arange(24, dtype=np.float32).astype(ml_dtypes.bfloat16).reshape(4, 6),
        )
        expected = xxhash.xxh3_64_digest(ids.tobytes() + rows.tobytes())
        assert checksum([ids, rows]) == checksum([ids[:2], ids[2:], rows[:3], rows[3:]]) == expected

    def test_a_changed_byte_anywhere_changes_the_checksum(self):
        data = np.arange(100, dtype=np.uint8)
        seen = {checksum([data])}
        for place in range(100):
            data[place] ^= 1
            seen.add(checksum([data]))
            data[place] ^= 1
        assert len(seen) == 101

    def test_fingerprints_distinguish_prompts_models_and_images(self):
        ids, positions = np.arange(6), np.arange(18).reshape(3, 6)
        prints = [
            fingerprint("m", ids, positions),
            fingerprint("n", ids, positions),
            fingerprint("m", ids[::-1], positions),
            fingerprint("m", ids, positions[::-1]),
            fingerprint("m", ids, positions, b"pixels"),
            fingerprint("mp", ids, positions, b"ixels"),
        ]
        assert len(set(prints)) == len(prints)
        assert fingerprint("m", ids.astype(np.int32), positions.astype(np.int32)) == prints[0]


class TestAllocator:
    def test_tokens_are_rounded_up_to_blocks(self):
        allocator = BlockAllocator(4, 16)
        assert allocator.alloc(17, "a") == [0, 1]
        assert allocator.alloc(33, "b") is None
        assert allocator.num_free == 2
        assert allocator.alloc(32, "a") == [2, 3]
        assert allocator.blocks_of("a") == [0, 1, 2, 3]
        assert allocator.free("a") == [0, 1, 2, 3]
        assert allocator.blocks_of("a") == []

    def test_blocks_are_adjacent_if_possible(self):
        allocator = BlockAllocator(12, 1)
        for name, count in (("a", 2), ("b", 1), ("c", 3), ("d", 1), ("e", 5)):
            allocator.alloc(count, name)
        for name in ("a", "c", "e"):
            allocator.free(name)  # 0 1, 3 4 5, 7 8 9 10 11 are free
        assert allocator.take("x", 3) == [3, 4, 5]
        assert allocator.take("y", 6) == [7, 8, 9, 10, 11, 0]
        assert allocator.take("z", 6) == [1]
        assert allocator.take("z", 6) == []

    @pytest.mark.parametrize(
        ("call", "reason"),
        [
            (lambda a: a.free("unknown"), "'unknown' holds no blocks"),
            (lambda a: [a.free("a"), a.free("a")], "'a' holds no blocks"),
            (lambda a: a.free_block("a", 3), r"'a' does not hold block 3: it holds \[0, 1\]"),
            (lambda a: [a.free_block("a", 1), a.free_block("a", 1)], "'a' does not hold block 1"),
            (lambda a: [a.free_block("a", 0), a.free_block("a", 1), a.free("a")], "'a' holds no blocks"),
            (lambda a: a.quarantine("b", 0), "'b' does not hold block 0"),
            (lambda a: [a.quarantine("a", 0), a.free_block("a", 0)], "'a' does not hold block 0"),
            (lambda a: a.release(0), "block 0 is not in quarantine"),
            (lambda a: a.alloc(0, "c"), "num_tokens 0 of request 'c'"),
            (lambda a: a.take("c", -1), "at_most -1 of request 'c'"),
            (lambda a: BlockAllocator(0, 1), "num_blocks 0"),
        ],
    )
    def test_misuse_raises_an_error_that_names_the_block(self, call, reason):
        allocator = BlockAllocator(4, 2)
        allocator.alloc(4, "a")
        allocator.alloc(2, "b")
        with pytest.raises(ValueError, match=reason):
            call(allocator)


class Allocations(RuleBasedStateMachine):
    """Compares the allocator with a dictionary of the state of each block."""

    NAMES = st.sampled_from("abc")

    def __init__(self):
        super().__init__()
        self.allocator = BlockAllocator(7, 3)
        self.blocks: dict[int, str] = dict.fromkeys(range(7), "free")

    def held(self, name: str) -> list[int]:
        return [block for block, state in self.blocks.items() if state == name]

    def mark_allocated(self, name: str, blocks: list[int]) -> None:
        for block in blocks:
            assert self.blocks[block] == "free"
            self.blocks[block] = name

    @rule(name=NAMES, tokens=st.integers(1, 25))
    def alloc(self, name, tokens):
        free, needed = len(self.held("free")), -(-tokens // 3)
        blocks = self.allocator.alloc(tokens, name)
        assert (blocks is None) == (needed > free)
        assert blocks is None or len(blocks) == needed
        self.mark_allocated(name, blocks or [])

    @rule(name=NAMES, at_most=st.integers(0, 8))
    def take(self, name, at_most):
        free = len(self.held("free"))
        blocks = self.allocator.take(name, at_most)
        assert len(blocks) == min(at_most, free)
        self.mark_allocated(name, blocks)

    @rule(name=NAMES)
    def free(self, name):
        held = self.held(name)
        if held:
            assert sorted(self.allocator.free(name)) == held
        else:
            with pytest.raises(ValueError, match="holds no blocks"):
                self.allocator.free(name)
        self.blocks |= dict.fromkeys(held, "free")

    @rule(name=NAMES, block=st.integers(-1, 7), quarantine=st.booleans())
    def return_block(self, name, block, quarantine):
        release = self.allocator.quarantine if quarantine else self.allocator.free_block
        if self.blocks.get(block) == name:
            release(name, block)
            self.blocks[block] = "quarantine" if quarantine else "free"
        else:
            with pytest.raises(ValueError, match="does not hold"):
                release(name, block)

    @precondition(lambda self: self.held("quarantine"))
    @rule(data=st.data())
    def release(self, data):
        block = data.draw(st.sampled_from(self.held("quarantine")))
        self.allocator.release(block)
        self.blocks[block] = "free"

    @invariant()
    def counts_add_up(self):
        allocator = self.allocator
        for name in "abc":
            assert sorted(allocator.blocks_of(name)) == self.held(name)
        counts = (allocator.num_free, allocator.num_used, allocator.num_quarantined)
        used = sum(len(self.held(name)) for name in "abc")
        assert counts == (len(self.held("free")), used, len(self.held("quarantine")))
        assert sum(counts) == 7


Allocations.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestAllocations = Allocations.TestCase
