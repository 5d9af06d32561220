"""The fake device of a language node: the engine's own code runs, and its two programs are replaced.

The KV pages hold a hash of each token, and of its visual row. A token of an answer is a function of what lies in the
pages of its request, so a row that came late, a page of somebody else or a wrong prefix of the cache changes it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import xxhash

from deepstack_jax.engine.core import Engine
from deepstack_jax.engine.request import Request, _visual_runs
from deepstack_jax.engine.shape import EngineShape
from deepstack_jax.engine.turn import Prefill
from tests.simulation import clock, model, threads

VOCABULARY = 250
_WEIGHTS = (np.arange(model.ROW_WIDTH, dtype=np.uint64) + np.uint64(1)) * np.uint64(0xD6E8FEB86659FD93)


def token_hashes(ids: np.ndarray, first: int, rows: np.ndarray) -> np.ndarray:
    """uint64 [n]: what the pages hold of tokens `ids` from place `first` on, whose rows [n, W] are 0 for text."""
    places = np.arange(first, first + len(ids), dtype=np.uint64)
    bits = rows.view(np.uint32).astype(np.uint64)
    return ids.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + places + bits @ _WEIGHTS


def answer_token(content: np.ndarray, number: int) -> int:
    """Token `number` of the answer to a prompt whose pages hold `content`, uint64 [T]."""
    return xxhash.xxh3_64_intdigest(content.tobytes() + number.to_bytes(4, "big")) % VOCABULARY


def right_tokens(prompt: int, count: int) -> list[int]:
    """The right answer to a prompt of the catalogue, for the checker."""
    ids = model.ids_of(prompt)[0]
    rows = np.zeros((len(ids), model.ROW_WIDTH), np.float32)
    rows[ids == model.IMAGE] = model.right_rows(prompt)
    content = token_hashes(ids, 0, rows)
    return [answer_token(content, number) for number in range(count)]


@dataclass
class _Row:
    """A slot of the decode program."""

    content: np.ndarray
    made: int
    limit: int


class SimulatedEngine(Engine):
    """The engine, with pages that hold hashes; a program takes up to `program_seconds`."""

    def __init__(self, fake: Any, shape: EngineShape, num_pages: int, program_seconds: float, **options: Any):
        self._program_seconds = program_seconds
        super().__init__(fake, shape, num_pages, **options)

    def _reset(self) -> None:
        super()._reset()
        self._pages = np.zeros((self.num_pages, self.shape.page), np.uint64)
        self._rows: dict[int, _Row] = {}

    def _no_mask(self, rows: int) -> Any:
        return None

    def _prefill(self, prefill: Prefill, events: list[Any]) -> tuple[Prefill, Any, None]:
        self._run_program()
        first = np.zeros(self.shape.pools * self.shape.rows_of(prefill.width), np.int32)
        for part, row in zip(prefill.parts, prefill.rows, strict=True):
            request = self._requests[part.id]
            self._write(request, part.start, part.count, part.pages)
            if part.last:
                content = self._pages[list(part.pages)].reshape(-1)[: request.length].copy()
                self._rows[part.slot] = _Row(content, 1, request.plan.max_new_tokens)
                first[row] = answer_token(content, 0)
            request.release_rows(part.start + part.count)
            if not part.last:
                self.scheduler.prefilled(part.id)
        return prefill, first, None

    def _write(self, request: Request, start: int, count: int, pages: Sequence[int]) -> None:
        rows = np.zeros((count, model.ROW_WIDTH), np.float32)
        visual = 0
        for tokens, image, skip in _visual_runs(request, slice(start, start + count)):
            rows[tokens] = model.joined(image.encoded, skip + len(tokens))[skip:]
            visual += len(tokens)
        if visual != int((request.visual_index[start : start + count] >= 0).sum()):
            clock.world().violated(clock.process().name, "prefilled tokens whose rows had not come")
        places = np.arange(start, start + count)
        page = np.asarray(pages)[places // self.shape.page]
        self._pages[page, places % self.shape.page] = token_hashes(
            request.input_ids[start : start + count], start, rows
        )

    def _decode(
        self, running: np.ndarray, steps: int, leave_on_end: bool, width: int, mask: Any
    ) -> tuple[None, Any, None]:
        self._run_program()
        made = np.full((self.shape.slots, self.shape.decode_steps), -1, np.int32)
        for slot in np.flatnonzero(running).tolist():
            row = self._rows[slot]
            count = min(steps, row.limit - row.made)
            made[slot, :count] = [answer_token(row.content, row.made + number) for number in range(count)]
            row.made += count
        return None, made, None

    def _run_program(self) -> None:
        threads.sleep(clock.world().dice.random() * self._program_seconds)


def empty_state(*_: Any) -> Any:
    """Stands for `core._empty_state`."""
    return SimpleNamespace(last=SimpleNamespace(is_deleted=lambda: False))


@dataclass(frozen=True)
class Options:
    """Stands for `EngineOptions`."""

    shape: EngineShape
    num_pages: int
    program_seconds: float
    research: bool = False

    def build(self, fake: Any, max_context: int | None = None, max_waiting: int = 64) -> SimulatedEngine:
        in_line = max_waiting + self.shape.slots
        return SimulatedEngine(fake, self.shape, self.num_pages, self.program_seconds, max_waiting=in_line)
