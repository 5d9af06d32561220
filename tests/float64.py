"""The results of the kernels in float64, by NumPy and straight from their definitions."""

import numpy as np
from numpy.typing import ArrayLike, DTypeLike


def fused_moe(
    hidden: ArrayLike,
    gate_up: ArrayLike,
    down: ArrayLike,
    top_k_index: ArrayLike,
    top_k_weights: ArrayLike,
    read_as: DTypeLike | None = None,
) -> np.ndarray:
    """[T, D], token by token; hidden states are first rounded to `read_as`, the dtype in which a product reads them."""
    hidden = np.asarray(hidden)
    hidden = hidden if read_as is None else hidden.astype(read_as)
    hidden, weights = hidden.astype(np.float64), np.asarray(top_k_weights, np.float64)
    gate_up, down = np.asarray(gate_up), np.asarray(down)
    out = np.zeros_like(hidden)
    for t, (experts, shares) in enumerate(zip(np.asarray(top_k_index), weights, strict=True)):
        for expert, share in zip(experts, shares, strict=True):
            if expert < 0:
                continue
            gate, up = np.split(hidden[t] @ gate_up[expert].astype(np.float64), 2)
            out[t] += share * ((gate / (1 + np.exp(-gate)) * up) @ down[expert].astype(np.float64))
    return out


def deepstack_add(hidden: ArrayLike, rows: ArrayLike, visual_index: ArrayLike, level: int) -> np.ndarray:
    """[T, D]."""
    out = np.array(hidden, np.float64)
    index = np.asarray(visual_index)
    width = out.shape[1]
    of_level = np.asarray(rows)[:, level * width : (level + 1) * width].astype(np.float64)
    out[index >= 0] += of_level[index[index >= 0]]
    return out


def ranged_attention(
    query: ArrayLike, key: ArrayLike, value: ArrayLike, start: ArrayLike, stop: ArrayLike
) -> np.ndarray:
    """[B, T, H, h], query by query, over its own keys only."""
    query, key, value = (np.asarray(x).astype(np.float64) for x in (query, key, value))
    start, stop = np.asarray(start), np.asarray(stop)
    batch, heads, length, head_dim = query.shape
    groups = heads // key.shape[1]
    out = np.zeros((batch, length, heads, head_dim))
    for b, t, k in np.ndindex(batch, length, key.shape[1]):
        keys, of_group = slice(start[b, t], stop[b, t]), slice(k * groups, (k + 1) * groups)
        scores = query[b, of_group, t] @ key[b, k, keys].T / np.sqrt(head_dim)
        if scores.size:
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            out[b, t, of_group] = weights / weights.sum(axis=-1, keepdims=True) @ value[b, k, keys]
    return out


def paged_attention(
    query: ArrayLike,
    key_pages: ArrayLike,
    value_pages: ArrayLike,
    page_table: ArrayLike,
    start: ArrayLike,
    stop: ArrayLike,
) -> np.ndarray:
    """As `ranged_attention`, over the keys of each row's pages in order."""
    pages = (in_order(np.asarray(x), np.asarray(page_table)) for x in (key_pages, value_pages))
    return ranged_attention(query, *pages, start, stop)


def norm_rope_append(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    query_norm: ArrayLike,
    key_norm: ArrayLike,
    cos: ArrayLike,
    sin: ArrayLike,
    *_: ArrayLike,
    eps: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The queries [B, H, T, h], and the keys and values [B, K, T, h] that belong into the tokens' slots."""
    turn = np.asarray(cos, np.float64) + 1j * np.asarray(sin, np.float64)

    def norm_rope(x: ArrayLike, weight: ArrayLike) -> np.ndarray:
        x, weight = (np.asarray(each).astype(np.float64) for each in (x, weight))
        x = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * weight
        first, second = np.split(x, 2, axis=-1)
        turned = (first + 1j * second) * turn[:, :, None]
        return np.concatenate([turned.real, turned.imag], axis=-1).swapaxes(1, 2)

    return norm_rope(query, query_norm), norm_rope(key, key_norm), np.asarray(value).astype(np.float64).swapaxes(1, 2)


def in_order(pages: np.ndarray, page_table: np.ndarray) -> np.ndarray:
    """[B, K, P * page, h]: the keys or values of each row, one after another."""
    rows = np.moveaxis(pages[page_table], 1, 2)
    return rows.reshape(*rows.shape[:2], -1, rows.shape[-1])
