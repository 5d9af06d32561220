"""What the engine asks of a grammar that an answer has to follow."""

from typing import Protocol

import numpy as np


class TokenGrammar(Protocol):
    """The state of one answer in a grammar. An error that it raises ends its own request only.

    Attributes:
        spec: what another process builds the same grammar from, at its beginning.
    """

    spec: str

    @property
    def finished(self) -> bool:
        """Whether an end token was accepted, or nothing was left to accept: the answer ends."""
        ...

    def fill(self, row: np.ndarray) -> None:
        """Writes which tokens may come next into `row`, int32 [W]: bit t % 32 of word t // 32 for each token t."""
        ...

    def accept(self, token: int) -> None:
        """Goes on by a token that `fill` allowed."""
        ...
