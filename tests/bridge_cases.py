"""Requests with random rows for tests of bridges and transports, and sending them."""

import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import DTypeLike

from deepstack_jax.disagg import MultimodalDataBuffers
from deepstack_jax.disagg.encode.bridge import BlockWrite, SendBridge
from deepstack_jax.disagg.encode.outgoing import OutgoingRequest
from deepstack_jax.disagg.language.incoming import IncomingRequest
from deepstack_jax.models.vision import separate_deepstack_embeds
from tests.cases import side_by_side

IMAGE, VIDEO, TEXT = 90, 91, 7
WAIT_S = 20.0  # far longer than any write in these tests takes


def make_request(kinds: str, hidden: int, levels: int, dtype: DTypeLike, seed: int = 0) -> OutgoingRequest:
    """A request with one token per letter: i and v are visual, others are text. Rows have random bits, even NaNs."""
    rng = np.random.default_rng(seed)
    ids = np.asarray(
        [{"i": IMAGE, "v": VIDEO}.get(kind, TEXT + place % 50) for place, kind in enumerate(kinds)], np.int32
    )
    visual = np.isin(ids, [IMAGE, VIDEO])
    # rows of images precede rows of videos, whatever their order in the prompt
    images, videos = ids == IMAGE, ids == VIDEO
    index = np.full(len(ids), -1, np.int32)
    index[images] = np.arange(images.sum())
    index[videos] = images.sum() + np.arange(videos.sum())
    width = (1 + levels) * hidden * np.dtype(dtype).itemsize
    rows = rng.integers(0, 256, (int(visual.sum()), width), np.uint8).view(dtype)
    return OutgoingRequest(
        fill_ids=ids,
        mrope_positions=rng.integers(-(2**31), 2**31, (3, len(ids)), np.int32, endpoint=False),
        aux_datas=rng.integers(0, 1000, 16, np.int32),
        visual_index=index,
        rows=separate_deepstack_embeds(jnp.asarray(rows), levels) if len(rows) else None,
    )


def send(bridge: SendBridge, request: OutgoingRequest, blocks: list[tuple[int, int]]) -> list[BlockWrite]:
    """Writes blocks, pairs (token block, pool block), and waits until all of them have ended."""
    ended: list[BlockWrite] = []
    done = threading.Event()

    def on_end(writes: list[BlockWrite]) -> None:
        ended.extend(writes)
        if len(ended) == len(blocks):
            done.set()

    bridge.write(request, blocks, on_end)
    assert done.wait(WAIT_S), f"{len(ended)} of {len(blocks)} blocks ended"
    return ended


def expected_by(request: OutgoingRequest) -> list[Any]:
    """What a peer is told to expect."""
    return [request.fill_ids.tolist(), request.mrope_positions.tolist(), [IMAGE, VIDEO]]


def incoming_for(request: OutgoingRequest, pool: MultimodalDataBuffers) -> IncomingRequest:
    """The other side of a request, in this process."""
    return IncomingRequest(pool, request.fill_ids, request.mrope_positions, [IMAGE, VIDEO])


def arrived_rows(request: IncomingRequest) -> np.ndarray:
    """All rows of a request that has arrived, as bytes: embeddings, then deepstack levels."""
    rows = {block.first_row: (block, request.take_rows(number)) for number, block in request.blocks.items()}
    parts = [side_by_side(jax.tree.map(np.asarray, rows[first][1]))[: rows[first][0].rows] for first in sorted(rows)]
    return np.concatenate(parts).view(np.uint8) if parts else np.zeros((0, 0), np.uint8)


def in_token_order(request: OutgoingRequest) -> np.ndarray:
    """The rows that the receiver must have, as bytes in token order."""
    return side_by_side(request.rows).view(np.uint8)[request.visual_index[request.visual_index >= 0]]
