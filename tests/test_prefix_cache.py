"""Keys of chunks, against their definition and against what a prompt is; the cache, against a naive one."""

import hashlib
import itertools
import random
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepstack_jax.engine.pages import PageLedger
from deepstack_jax.engine.prefix_cache import ImageSpan, PrefixCache, chunk_keys
from deepstack_jax.engine.shape import EngineShape

CHUNK = 4
SHAPE = EngineShape(slots=2, chunk=CHUNK, page=2)
IMAGE = 7  # the token id in a visual token's place


def digest_of(pixels: np.ndarray, settings: bytes = b"") -> bytes:
    return hashlib.sha256(settings + pixels.tobytes()).digest()


DOG = np.zeros((8, 6), np.float32)
CAT = DOG.copy()
CAT[5, 3] = 1  # one pixel


def keys(tokens: str, *images: ImageSpan, salt: bytes = b"", shape: str = SHAPE.name()) -> tuple[bytes, ...]:
    """Of a prompt in which each letter is a text token and each `.` the next visual row."""
    visual = np.cumsum([token == "." for token in tokens], dtype=np.int32) - 1
    visual = np.where([token == "." for token in tokens], visual, -1).astype(np.int32)
    ids = np.array([IMAGE if token == "." else ord(token) for token in tokens], np.int32)
    return chunk_keys(ids, visual, images, chunk=CHUNK, salt=salt, shape=shape)


def span(pixels: np.ndarray, first: int, rows: int, settings: bytes = b"") -> ImageSpan:
    return ImageSpan(first, rows, digest_of(pixels, settings))


class TestKeys:
    def test_a_key_is_a_whole_sha256_of_its_parent_ids_and_runs_of_rows(self):
        def sha(*fields: bytes) -> bytes:
            return hashlib.sha256(b"".join(struct.pack("<Q", len(field)) + field for field in fields)).digest()

        found = keys("ab..c.def", span(DOG, 0, 1), span(CAT, 1, 9), salt=b"tenant")
        root = sha(b"deepstack-jax prefix", SHAPE.name().encode(), b"tenant", struct.pack("<Q", CHUNK))
        runs = [(2, 1, DOG, 0), (3, 1, CAT, 0)], [(1, 1, CAT, 1)]
        ids = [ord("a"), ord("b"), IMAGE, IMAGE], [ord("c"), IMAGE, ord("d"), ord("e")]
        for key, chunk_ids, chunk_runs in zip(found, ids, runs, strict=True):
            packed = [struct.pack("<QQ", a, n) + digest_of(d) + struct.pack("<Q", o) for a, n, d, o in chunk_runs]
            root = sha(root, struct.pack("<4q", *chunk_ids), *packed)
            assert key == root

    def test_only_whole_chunks_have_one(self):
        assert [len(keys("x" * length)) for length in (0, 3, 4, 7, 8)] == [0, 0, 1, 1, 2]

    def test_what_comes_later_changes_nothing(self):
        assert keys("abcdefgh")[0] == keys("abcdxxxxyyyy")[0] == keys("abcd....", span(DOG, 0, 4))[0]
        assert keys("a.......", span(DOG, 0, 3), span(CAT, 3, 4))[0] == keys("a...", span(DOG, 0, 3))[0]

    def test_what_came_before_changes_all_that_follow(self):
        assert not set(keys("abcdefgh")) & set(keys("xbcdefgh"))
        assert not set(keys(".bcdefgh", span(DOG, 0, 1))) & set(keys(".bcdefgh", span(CAT, 0, 1)))

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            pytest.param((span(DOG, 0, 4),), (span(CAT, 0, 4),), id="one pixel"),
            pytest.param((span(DOG, 0, 4),), (span(DOG, 0, 4, b"mean=0"),), id="processor settings"),
            pytest.param((span(DOG, 0, 2), span(CAT, 2, 2)), (span(CAT, 0, 2), span(DOG, 2, 2)), id="their order"),
            pytest.param((span(DOG, 0, 4),), (span(DOG, 0, 2), span(DOG, 2, 2)), id="two for one"),
            pytest.param((span(DOG, 0, 1), span(DOG, 1, 3)), (span(DOG, 0, 3), span(DOG, 3, 1)), id="where one ends"),
        ],
    )
    def test_other_images_of_the_same_size_have_other_keys(self, one, other):
        assert not set(keys("....", *one)) & set(keys("....", *other))
        assert not set(keys("....tail", *one)) & set(keys("....tail", *other))

    def test_an_image_at_another_offset_has_another_key(self):
        whole = keys("........", span(DOG, 0, 8))
        assert len(set(whole)) == 2
        assert keys("....", span(DOG, 0, 4))[0] == whole[0]
        rest = np.arange(4, 8, dtype=np.int32)  # the same ids and the same image, from its fifth row on
        ids = np.full(4, IMAGE, np.int32)
        (later,) = chunk_keys(ids, rest, [span(DOG, 0, 8)], chunk=CHUNK, salt=b"", shape=SHAPE.name())
        assert later not in whole

    def test_an_image_one_token_further_has_another_key(self):
        assert keys("..aa", span(DOG, 0, 2)) != keys("a..a", span(DOG, 0, 2))
        assert keys(".a.a", span(DOG, 0, 2)) != keys("..aa", span(DOG, 0, 2))

    def test_text_that_looks_like_an_image_has_another_key(self):
        text = chunk_keys(
            np.full(4, IMAGE), np.full(4, -1), [span(DOG, 0, 4)], chunk=CHUNK, salt=b"", shape=SHAPE.name()
        )
        assert text != keys("....", span(DOG, 0, 4))

    def test_other_tenants_and_other_engines_share_nothing(self):
        other = EngineShape(slots=3, chunk=CHUNK, page=2).name()
        found = [keys("abcd"), keys("abcd", salt=b"b"), keys("abcd", shape=other), keys("abcd", salt=b"b", shape=other)]
        assert len(set(itertools.chain.from_iterable(found))) == 4

    def test_a_field_never_runs_into_the_next(self):
        assert keys("abcd", salt=b"x", shape="slots=1") != keys("abcd", salt=b"1x", shape="slots=")
        assert keys("abcd", salt=b"slots=1", shape="") != keys("abcd", salt=b"", shape="slots=1")

    def test_a_video_s_rows_may_be_split_by_text(self):
        video = span(DOG, 0, 4)
        assert keys("a..b..cd", video) == keys("a..b..cd", video)
        assert keys("a..b..cd", video)[0] == keys("a..b....", ImageSpan(0, 6, video.digest))[0]
        assert keys("a..b..cd", video)[1] != keys("a..b..cd", span(DOG, 0, 2), span(DOG, 2, 2))[1]

    def test_the_order_of_the_spans_is_of_no_account(self):
        spans = span(DOG, 0, 2), span(CAT, 2, 2)
        assert keys("....", *spans) == keys("....", *spans[::-1])

    @pytest.mark.parametrize(
        ("images", "message"),
        [
            ((span(DOG, 0, 3),), "visual row 3 belongs to no image"),
            ((span(DOG, 1, 3),), "visual row 0 belongs to no image"),
            ((), "visual row 0 belongs to no image"),
            ((span(DOG, 0, 3), span(CAT, 2, 2)), "images overlap: rows 0 to 3 and from 2"),
        ],
        ids=["beyond", "before", "none", "overlap"],
    )
    def test_every_row_belongs_to_one_image(self, images, message):
        with pytest.raises(ValueError, match=message):
            keys("....", *images)

    def test_wrong_arrays_and_spans_are_refused(self):
        with pytest.raises(ValueError, match=r"input_ids \[4\] and visual_index \[3\] must both be \[T\]"):
            chunk_keys(np.zeros(4, int), np.zeros(3, int), (), chunk=CHUNK, salt=b"", shape="")
        with pytest.raises(ValueError, match="a digest of 16 bytes is not a SHA-256"):
            ImageSpan(0, 1, digest_of(DOG)[:16])
        with pytest.raises(ValueError, match="0 visual rows from 2 are not a span"):
            ImageSpan(2, 0, digest_of(DOG))

    # a prompt as (letter) for text and (image, offset) for a visual token, of a tiny world so that equal ones are met
    tokens = st.lists(st.sampled_from(["a", "b", "..", "...", "...."]), min_size=1, max_size=4)
    pictures = st.lists(st.sampled_from([DOG, CAT]).map(digest_of), min_size=4, max_size=4)

    @settings(deadline=None)
    @given(st.lists(st.tuples(tokens, pictures), min_size=2, max_size=6))
    def test_two_chunks_have_one_key_exactly_if_they_and_all_before_are_equal(self, prompts):
        seen: dict[bytes, tuple[object, ...]] = {}
        for tokens, pictures in prompts:
            firsts = itertools.accumulate((len(t) for t in tokens if t[0] == "."), initial=0)
            pairs = zip((t for t in tokens if t[0] == "."), firsts, pictures, strict=False)
            spans = [ImageSpan(first, len(token), digest) for token, first, digest in pairs]
            shown = iter(spans)
            content = [
                item
                for t in tokens
                for item in ([t] if t[0] != "." else [(s.digest, i) for s in [next(shown)] for i in range(s.rows)])
            ]
            found = keys("".join(tokens), *spans)
            for number, key in enumerate(found):
                prefix = tuple(content[: CHUNK * (number + 1)])
                assert seen.setdefault(key, prefix) == prefix
        assert len(set(seen.values())) == len(seen)


def cache_of(num_pages: int = 21, max_pages: int | None = None, enabled: bool = True) -> PrefixCache:
    return PrefixCache(PageLedger(num_pages), chunk=CHUNK, page=2, max_pages=max_pages, enabled=enabled)


def keep(cache: PrefixCache, *chain: bytes) -> tuple[int, ...]:
    """Prefills a prompt of these chunks, which then ends; gives its pages."""
    pages = cache.ledger.take(2 * len(chain))
    for place, key in enumerate(chain):
        cache.insert(key, pages[2 * place : 2 * place + 2], chain[place - 1] if place else None)
    cache.ledger.release(pages)
    return pages


class TestCache:
    def test_a_prompt_finds_the_longest_run_of_chunks_from_its_start(self):
        cache = cache_of()
        pages = keep(cache, b"a", b"b", b"c")
        assert cache.match((b"a", b"b", b"x"), 13) == pages[:4]
        assert cache.match((b"x", b"b", b"c"), 13) == ()
        assert [cache.ledger.count(page) for page in pages] == [2, 2, 2, 2, 1, 1]

    @pytest.mark.parametrize(("prompt", "chunks"), [(13, 3), (12, 2), (9, 2), (8, 1), (4, 0), (1, 0)])
    def test_at_least_its_last_token_is_computed(self, prompt, chunks):
        cache = cache_of()
        pages = keep(cache, b"a", b"b", b"c")
        assert cache.match((b"a", b"b", b"c")[: prompt // CHUNK], prompt) == pages[: 2 * chunks]

    def test_tokens_are_counted(self):
        cache = cache_of()
        keep(cache, b"a", b"b")
        cache.match((b"a", b"b"), 9)
        cache.match((b"x", b"y"), 10)
        assert (cache.query_tokens, cache.hit_tokens) == (19, 8)

    def test_the_first_pages_of_a_chunk_stay(self):
        cache = cache_of()
        first = keep(cache, b"a")
        second = keep(cache, b"a", b"b")
        assert cache.match((b"a", b"b"), 9) == first + second[2:]
        assert cache.ledger.count(second[0]) == 0

    def test_the_least_recently_used_goes_first_and_leaves_before_their_parents(self):
        cache = cache_of()
        keep(cache, b"a", b"a1")
        keep(cache, b"b")
        keep(cache, b"a", b"a2")
        cache.ledger.release(cache.match((b"a", b"a1"), 9))
        gone = []
        for _ in range(4):
            before = [key for key in (b"a", b"a1", b"a2", b"b") if key in cache]
            assert cache.evict(1) == 2
            gone += [key for key in before if key not in cache]
        assert gone == [b"b", b"a2", b"a1", b"a"]
        assert cache.evict(1) == 0

    def test_what_is_used_stays_with_its_parents(self):
        cache = cache_of()
        keep(cache, b"a", b"b", b"c")
        used = cache.match((b"a", b"b"), 9)
        assert [cache.evict(count) for count in (3, 2, 1)] == [0, 2, 0]
        cache.ledger.release(used)
        assert [cache.evict(count, keep=(b"a",)) for count in (3, 2, 1)] == [0, 2, 0]
        assert cache.evict(2) == 2

    def test_nothing_is_given_up_in_vain(self):
        cache = cache_of()
        keep(cache, b"a", b"b")
        assert (cache.evict(5), len(cache)) == (0, 4)
        assert (cache.evict(3), len(cache)) == (4, 0)  # whole chunks

    def test_a_chunk_without_its_parent_is_not_kept(self):
        cache = cache_of()
        pages = cache.ledger.take(2)
        assert not cache.insert(b"b", pages, b"a")
        assert len(cache) == 0

    def test_max_pages_bounds_what_is_kept(self):
        cache = cache_of(max_pages=4)
        keep(cache, b"a", b"b", b"c")  # b can't go for c, nor can a
        assert cache.find((b"a", b"b", b"c"), 13) == (b"a", b"b")
        keep(cache, b"x", b"y")
        assert cache.find((b"x", b"y"), 9) == (b"x", b"y")
        assert (len(cache), cache.ledger.in_use) == (4, 4)

    def test_forgetting_all_leaves_users_their_pages(self):
        cache = cache_of()
        pages = keep(cache, b"a", b"b")
        used = cache.match((b"a",), 5)
        cache.clear()
        assert (len(cache), cache.pages) == (0, ())
        assert [cache.ledger.count(page) for page in pages] == [1, 1, 0, 0]
        cache.ledger.release(used)
        assert cache.ledger.in_use == 0

    def test_switched_off_it_keeps_nothing(self):
        cache = cache_of(enabled=False)
        keep(cache, b"a")
        assert cache.match((b"a",), 5) == ()
        assert (len(cache), cache.ledger.in_use, cache.query_tokens) == (0, 0, 0)

    def test_pages_of_one_chunk_are_kept_together(self):
        cache = cache_of()
        with pytest.raises(ValueError, match="3 pages are not one chunk's: pass 2"):
            cache.insert(b"a", cache.ledger.take(3), None)
        with pytest.raises(ValueError, match="page 9 has 0 references"):
            cache.insert(b"a", (9, 10), None)
        assert len(cache) == 0

    @pytest.mark.parametrize("seed", range(20))
    def test_it_keeps_what_a_naive_one_keeps(self, seed):
        """The naive one looks for the longest unused leaf each time that a page is missing."""
        rng = random.Random(seed)
        universe = [bytes(letters) for n in range(1, 5) for letters in itertools.product(b"ab", repeat=n)]
        cache, used, held = cache_of(max_pages=12), dict[bytes, int](), list[tuple[bytes, tuple[int, ...]]]()
        for now in range(300):
            chain = list(itertools.accumulate(rng.choice((b"a", b"b")) for _ in range(rng.randint(1, 4))))
            found = list(itertools.takewhile(used.__contains__, chain))
            if rng.random() < 0.3 and held:
                cache.ledger.release(held.pop(rng.randrange(len(held)))[1])
            elif rng.random() < 0.5:
                pages = cache.match(chain, 4 * len(chain) + 1)
                assert len(pages) == 2 * len(found)
                held += [(found[-1], pages)] if found else []
                used |= dict.fromkeys(found, now)
            else:
                keep(cache, *chain)
                for place, key in enumerate(chain):  # up to the first that isn't kept
                    if key not in used and not naive_room(used, held, key):
                        break
                    used |= dict.fromkeys(chain[: place + 1], now)
            assert {key for key in universe if key in cache} == set(used)


def naive_room(used: dict[bytes, int], held: list[tuple[bytes, tuple[int, ...]]], key: bytes) -> bool:
    """Makes room for a chunk by giving up the leaf that was used least recently, if there is one."""
    if len(used) < 6:
        return True
    parents = {other[:-1] for other in used} | {key[:-1]} | {user for user, _ in held}
    leaves = [other for other in used if other not in parents]
    if leaves:
        del used[min(leaves, key=lambda leaf: used[leaf])]
    return bool(leaves)
