"""Fetches a prompt with all of its rows at once, in the form in which the whole model has them."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from deepstack_jax.disagg.language.encoder_pool import EncoderPool
from deepstack_jax.disagg.language.fetch import Fetch, KnownPrompt
from deepstack_jax.disagg.language.incoming import BlockRows
from deepstack_jax.models.vision import VisualRows
from deepstack_jax.processing.batch import bucket
from deepstack_jax.programs import PromptArrays


@dataclass
class FetchedPrompt:
    """A prompt with its rows, padded to the same buckets as by `prepare_batch`, and how it was fetched."""

    prompt: PromptArrays
    known: KnownPrompt
    fetch: Fetch

    @property
    def encoder(self) -> int:
        return self.fetch.encoder


async def fetch(
    encoders: EncoderPool, request_id: str, payload: bytes, deadline: float, cached_tokens: int = 0
) -> FetchedPrompt:
    """Fetches what `EncoderPool.fetch` gives; rows of the first `cached_tokens` tokens stay zero."""
    parts: dict[BlockRows, VisualRows] = {}

    def on_rows(block: BlockRows, rows: VisualRows) -> None:
        assert block not in parts, "rows came twice"
        parts[block] = rows

    async with encoders.fetch(request_id, payload, deadline, on_rows) as fetching:
        known = await fetching.prompt
        fetching.want(cached_tokens, admitted=True)
        await fetching.done
    assert {known.blocks[number] for number in known.blocks_after(cached_tokens)} == parts.keys()
    return FetchedPrompt(_joined(known.arrays, parts), known, fetching)


def _joined(arrays: PromptArrays, parts: dict[BlockRows, VisualRows]) -> PromptArrays:
    count, index = int(arrays.lengths[0]), np.asarray(arrays.visual_index)
    pad, num_rows = bucket(count) - count, int((index >= 0).sum())
    joined = None
    for block, rows in parts.items():
        joined = joined or VisualRows(
            *(np.zeros((bucket(num_rows), x.shape[1]), x.dtype) for x in rows if x is not None)
        )
        for whole, part in zip(joined, rows, strict=True):
            whole[block.first_row : block.first_row + block.rows] = np.asarray(part)[: block.rows]
    return PromptArrays(
        input_ids=np.pad(arrays.input_ids, [(0, 0), (0, pad)]),
        position_ids=np.pad(arrays.position_ids, [(0, 0), (0, 0), (0, pad)]),
        lengths=arrays.lengths,
        rope_deltas=arrays.rope_deltas,
        visual_index=np.pad(index, [(0, 0), (0, pad)], constant_values=-1) if num_rows else None,
        rows=None if joined is None else VisualRows(*map(jnp.asarray, joined)),
    )
