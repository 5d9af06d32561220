"""Every input that a search has kept is taken, or refused in one line by a declared error."""

import random

import pytest

from tests.fuzz.__main__ import CORPUS, LARGEST_CORPUS
from tests.fuzz.loop import mutate, read_corpus
from tests.fuzz.targets import TARGETS, check


@pytest.mark.parametrize("name", TARGETS)
def test_the_corpus_is_taken_or_refused_in_one_line(name: str):
    inputs = read_corpus(CORPUS / name)
    assert inputs
    assert sum(map(len, inputs)) < 2 * LARGEST_CORPUS
    for data in inputs:
        check(TARGETS[name], data)


@pytest.mark.parametrize("name", TARGETS)
def test_a_search_can_be_repeated(name: str):
    first, *_, last = read_corpus(CORPUS / name)
    structure = TARGETS[name].structure
    runs = [[mutate(random.Random(seed), first, last, structure) for seed in range(20)] for _ in range(2)]
    assert runs[0] == runs[1]
    assert len(set(runs[0])) > 10
