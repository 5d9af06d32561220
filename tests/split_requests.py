"""Requests of the random schedules whose rows come from encode nodes, in token blocks and in any order.

A first encode node may be gone in the middle: another one, which encodes in another group of images, sends the blocks
that are missing. What the language node's engine sees of a request is built by the language node's own code.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

import deepstack_jax as dsj
from deepstack_jax.disagg.encode.images import images_of
from deepstack_jax.disagg.language.fetch import KnownPrompt
from deepstack_jax.disagg.language.incoming import BlockRows, IncomingRequest
from deepstack_jax.disagg.wire.buffers import MultimodalDataBuffers
from deepstack_jax.disagg.wire.messages import ImageRows
from deepstack_jax.encoding import encode_group
from deepstack_jax.engine.core import Engine
from deepstack_jax.models.vision import VisualRows, separate_deepstack_embeds
from deepstack_jax.programs import PromptArrays
from deepstack_jax.serving.remote_rows import engine_request
from tests.engine_questions import Question

BLOCK = 8  # tokens
Rows = dict[int, VisualRows]  # by token block


@dataclass(frozen=True)
class Delivery:
    """A block that is on its way."""

    turn: int
    block: BlockRows
    rows: VisualRows
    encoder: int


class SplitRequest:
    """A question as it reaches an engine from encode nodes.

    Attributes:
        request: for the engine.
        encoders: the encode nodes whose rows it got.
    """

    def __init__(self, model: dsj.Model, question: Question, arrives: int, rng: random.Random):
        self.encoders: set[int] = set()
        known, *encoders = _what_is_sent(model, question)
        self.request = engine_request(known, question.plan)
        lost = arrives + rng.randint(1, 8)  # the turn at which the first encode node is gone
        again = lost + rng.randint(0, 6)
        self._deliveries = []
        for number, block in known.blocks.items():
            turn, encoder = arrives + rng.randint(0, 9), 0
            if turn >= lost:
                turn, encoder = again + rng.randint(0, 4), 1
            self._deliveries.append(Delivery(turn, block, encoders[encoder][number], encoder))
            if rng.random() < 0.1:  # written once more, and late
                turn += rng.randint(0, 5)
                self._deliveries.append(Delivery(turn, block, encoders[1][number], 1))

    def deliver(self, engine: Engine, turn: int) -> None:
        """Gives the engine the blocks of a turn that it wants: those in the prefix cache are not sent."""
        for each in self._deliveries:
            if each.turn == turn and each.block.stop_token > self.request.cached_tokens:
                engine.add_rows(self.request, each.block.first_row, each.rows)
                self.encoders.add(each.encoder)


def can_be_split(question: Question) -> bool:
    """Whether an encode node could have prepared it: a prompt shows all rows of its images."""
    index = question.batch.visual_index
    return index is not None and 0 < question.batch.num_visual_tokens == np.count_nonzero(index >= 0)


_sent: dict[Question, tuple[KnownPrompt, Rows, Rows]] = {}  # of each question, which schedules ask many times


def _what_is_sent(model: dsj.Model, question: Question) -> tuple[KnownPrompt, Rows, Rows]:
    """What a language node knows of a prompt, and the rows of each block as two encode nodes send them."""
    if question in _sent:
        return _sent[question]
    known = known_prompt(model, question)
    encoded = alone(model, question), in_pairs(model, question)
    first, second = ({n: rows_of(model, rows, block) for n, block in known.blocks.items()} for rows in encoded)
    _sent[question] = known, first, second
    return _sent[question]


def known_prompt(model: dsj.Model, question: Question) -> KnownPrompt:
    """What a language node knows once the encode node has prepared the prompt."""
    config, batch, length = model.config, question.batch, int(question.batch.lengths[0])
    positions = batch.position_ids[:, 0, :length]
    pool = MultimodalDataBuffers(1, BLOCK, config.text.hidden_size, config.num_deepstack_levels, model.dtype)
    visual_ids = config.image_token_id, config.video_token_id
    incoming = IncomingRequest(pool, batch.input_ids[0, :length], positions, visual_ids)
    in_order, images = images_of(batch, BLOCK)
    np.testing.assert_array_equal(incoming.visual_index, in_order)
    arrays = PromptArrays(
        batch.input_ids[:, :length], positions[:, None], batch.lengths, batch.rope_deltas, in_order[None]
    )
    spans = tuple(ImageRows(image.first_row, image.rows, image.digest) for image in images)
    return KnownPrompt(arrays, spans, incoming.blocks)


def alone(model: dsj.Model, question: Question) -> np.ndarray:
    """Rows [M, (1+N)*D] in the order of tokens, each image encoded by itself."""
    return _in_token_order(question, [encode_group(model, [visual])[0] for visual in question.batch.visuals])


def in_pairs(model: dsj.Model, question: Question) -> np.ndarray:
    """The same, each image encoded beside another one."""
    return _in_token_order(question, [encode_group(model, [visual] * 2)[1] for visual in question.batch.visuals])


def rows_of(model: dsj.Model, rows: np.ndarray, block: BlockRows) -> VisualRows:
    """The rows of one block, padded with zeros to the size of a block."""
    own = rows[block.first_row : block.first_row + block.rows]
    padded = np.pad(own, [(0, BLOCK - len(own)), (0, 0)])
    return separate_deepstack_embeds(jnp.asarray(padded), model.config.num_deepstack_levels)


def _in_token_order(question: Question, encoded: Sequence[jax.Array]) -> np.ndarray:
    visuals, index = question.batch.visuals, question.batch.visual_index
    assert index is not None
    rows = [np.asarray(each)[: visual.num_rows] for each, visual in zip(encoded, visuals, strict=True)]
    return np.concatenate(rows)[index[index >= 0]]
