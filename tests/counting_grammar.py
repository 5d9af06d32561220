"""A grammar for tests of the engine, which needs no tokenizer: each token of an answer has the next remainder."""

import json

import numpy as np

REMAINDERS = 3


class CountingGrammar:
    """Token s of an answer is one with t % 3 == (s + first) % 3, and after `length` tokens, one of the end tokens.

    It fails where it is told to: when it is asked what may come after `fails_after` tokens, or allows nothing then.
    """

    def __init__(
        self,
        first: int = 0,
        length: int = 1000,
        ends: tuple[int, ...] = (),
        fails_after: int | None = None,
        empty_after: int | None = None,
    ):
        self.spec = json.dumps([first, length, ends, fails_after, empty_after])
        self.first, self.length, self.ends = first, length, ends
        self.fails_after, self.empty_after = fails_after, empty_after
        self.taken: list[int] = []
        self.finished = False

    def allows(self, token: int) -> bool:
        step = len(self.taken)
        if step >= self.length:
            return token in self.ends
        return token % REMAINDERS == (step + self.first) % REMAINDERS and token not in self.ends

    def fill(self, row: np.ndarray) -> None:
        if len(self.taken) == self.fails_after:
            raise ValueError("the grammar fails here")
        allowed = np.array([self.allows(token) for token in range(32 * len(row))])
        if len(self.taken) == self.empty_after:
            allowed[:] = False
        row[:] = np.packbits(allowed, bitorder="little").view(np.int32)

    def accept(self, token: int) -> None:
        if not self.allows(token):
            raise ValueError(f"token {token} is not allowed after {self.taken}")
        self.finished = token in self.ends
        self.taken.append(token)
