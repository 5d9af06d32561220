"""The tokens of a prompt as Prepared carries them."""

import numpy as np


def pack_prompt(input_ids: np.ndarray, mrope_positions: np.ndarray) -> bytes:
    """Encodes int32 [T] and int32 [3, T] as 16 bytes per token, least significant byte first."""
    return np.concatenate([input_ids[None], mrope_positions]).astype("<i4").tobytes()


def unpack_prompt(data: bytes, total_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the arrays that `pack_prompt` received.

    Raises:
        ValueError: the data are not those of `total_tokens` tokens.
    """
    if len(data) != 16 * total_tokens:
        raise ValueError(f"{len(data)} bytes are not a prompt of {total_tokens} tokens: expected 16 per token")
    arrays = np.frombuffer(data, "<i4").reshape(4, total_tokens).astype(np.int32)
    return arrays[0], arrays[1:]
