"""A Hugging Face checkpoint directory: checked as a whole before any weight is read, then read tensor by tensor.

Takes a single `model.safetensors` or shards with `model.safetensors.index.json`, the expert layouts and names of
`converters.mapping`, and float32, float16 and bfloat16 tensors. The layout of fused experts is told from the shape of
`gate_up_proj`; where 2F == D it has to be given. `down_proj` does not settle it: transformers 5 exchanges the axes of
each tensor only where its shape demands it, so a checkpoint that passed through it may hold one of the two in either
order. Nor does `transformers_version` in config.json, which names the writer of the config and not of the weights.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import DTypeLike

from converters.direct_file import aligned_empty
from converters.mapping import EXPERT_LAYOUTS, HfTensor, Parameter, current_name, hf_tensors, parameters, tied_head
from converters.safetensors_file import CheckpointError, Entry, FiniteCheck, read_entries, read_tensor

if TYPE_CHECKING:  # deepstack_jax imports this module to load a checkpoint
    from deepstack_jax.config import ModelConfig

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
Inspect = Callable[[np.ndarray], None]
_AT_ONCE = 1 << 18  # values read together: they stay in the processor's cache for what follows


@dataclass(frozen=True)
class HfCheckpoint:
    """A checked directory. `entries` maps today's tensor names to where they lie; `files` keeps the names as found."""

    directory: Path
    config: ModelConfig
    expert_layout: str
    entries: dict[str, Entry]
    files: dict[str, list[str]]
    has_tied_head: bool = False
    parameters: list[Parameter] = field(default_factory=list, repr=False)

    def dtype_of(self, parameter: Parameter) -> np.dtype:
        """The dtype that the parameter's tensors have on disk."""
        return self.entries[parameter.tensors[0].name].dtype

    def read(self, parameter: Parameter, dtype: DTypeLike | None = None, inspect: Inspect | None = None) -> np.ndarray:
        """Reads one parameter into a new array of its canonical shape, in `dtype` or as it is on disk."""
        out = np.empty(parameter.shape, self.dtype_of(parameter) if dtype is None else np.dtype(dtype))
        flat, done = out.reshape(-1), 0
        for values in self.stream(parameter, dtype=dtype, inspect=inspect):
            flat[done : done + values.size] = values.reshape(-1)
            done += values.size
        return out

    def stream(
        self,
        parameter: Parameter,
        first: int = 0,
        count: int | None = None,
        dtype: DTypeLike | None = None,
        inspect: Inspect | None = None,
    ) -> Iterator[np.ndarray]:
        """Reads `count` rows of a parameter's first axis, from row `first`, as small contiguous arrays in order.

        Each is valid until the next one is asked for. `inspect` is called with the values as they are on disk.
        """
        given = self.dtype_of(parameter)
        wanted = given if dtype is None else np.dtype(dtype)
        count = parameter.shape[0] - first if count is None else count
        if parameter.tensors[0].transposed:
            yield from self._stream_experts(parameter, range(first, first + count), wanted, inspect)
            return
        entry = self.entries[parameter.tensors[0].name]
        row = prod(parameter.shape[1:])
        buffer = aligned_empty((min(_AT_ONCE, count * row),), given)
        for start in range(first * row, (first + count) * row, buffer.size or 1):
            out = buffer[: (first + count) * row - start]
            yield read_tensor(entry, start, out, inspect).astype(wanted, copy=False)

    def _stream_experts(
        self, parameter: Parameter, experts: range, dtype: np.dtype, inspect: Inspect | None
    ) -> Iterator[np.ndarray]:
        """Experts one by one, each a matrix whose axes are exchanged on disk, or two such matrices side by side."""
        out = aligned_empty(parameter.shape[1:], dtype)
        by_expert: dict[int, list[HfTensor]] = {}
        for tensor in parameter.tensors:
            if tensor.index:
                by_expert.setdefault(cast(int, tensor.index[0]), []).append(tensor)
        for i in experts:
            for tensor in by_expert.get(i, parameter.tensors):
                entry = self.entries[tensor.name]
                matrix = np.empty(entry.shape[-2:], entry.dtype)
                start = 0 if tensor.index else i * matrix.size
                _transpose(read_tensor(entry, start, matrix, inspect), out[tensor.index[1:]])
            yield out


def open_checkpoint(
    directory: str | Path, config: ModelConfig | None = None, expert_layout: str | None = None
) -> HfCheckpoint:
    """Checks the headers of every file in `directory` against `config` (by default the directory's own config.json).

    Raises `CheckpointError` for a missing, truncated or damaged file, a missing or unknown tensor, a wrong shape, a
    dtype that is not supported, a superfluous head that differs from the tied embedding, and an expert layout that
    neither the shapes nor `expert_layout` (hf4 or hf5) settle.
    """
    directory = Path(directory)
    if config is None:
        from deepstack_jax.config import read_config

        config = read_config(directory)
    found = {file: read_entries(directory / file) for file in _files(directory)}
    _check_index(directory, found)
    entries: dict[str, Entry] = {}
    for named in found.values():
        for name, entry in named.items():
            now = current_name(name, config)
            if now in entries:
                raise CheckpointError(
                    f"{entry.file}: tensor {name} is also in {entries[now].file}: remove one of the two"
                )
            entries[now] = entry
    files = {file: list(named) for file, named in found.items()}
    head = _take_tied_head(entries, config)
    layout = detect_expert_layout(config, {name: entry.shape for name, entry in entries.items()}, expert_layout)
    _check_tensors(directory, config, layout, entries)
    listed = parameters(config, layout)
    _check_one_dtype(listed, entries)
    return HfCheckpoint(directory, config, layout, entries, files, head is not None, listed)


def read_params(
    hf_dir: str | Path,
    config: ModelConfig | None = None,
    dtype: DTypeLike | None = None,
    expert_layout: str | None = None,
    prefixes: Sequence[str] | None = None,
) -> Iterator[tuple[str, np.ndarray]]:
    """Reads a Hugging Face directory as (dotted path, array of the canonical shape), one parameter at a time.

    `dtype` converts each array, by default the dtype on disk is kept. `prefixes` limits the reading to paths that
    start with one of them, such as `("visual.",)`. The directory is checked when the first item is asked for; errors
    are those of `open_checkpoint`.
    """
    checkpoint = open_checkpoint(hf_dir, config, expert_layout)
    for parameter in checkpoint.parameters:
        if prefixes is None or parameter.path.startswith(tuple(prefixes)):
            check = FiniteCheck()
            values = checkpoint.read(parameter, dtype, inspect=check)
            if check.failed:
                warn_non_finite(checkpoint, parameter)
            yield parameter.path, values


class NonFiniteWarning(UserWarning):
    """Weights that hold NaN or infinity."""


def warn_non_finite(checkpoint: HfCheckpoint, parameter: Parameter) -> None:
    """Warns that what was read of `parameter` is not finite."""
    entry = checkpoint.entries[parameter.tensors[0].name]
    message = f"{entry.file}: the weights of {parameter.path} hold NaN or infinity: answers will be wrong"
    warnings.warn(message, NonFiniteWarning, stacklevel=3)


def detect_expert_layout(config: ModelConfig, shapes: dict[str, tuple[int, ...]], given: str | None = None) -> str:
    """The expert layout of a checkpoint with tensors of these `shapes`; `given` decides only what shapes leave open."""
    if given is not None and given not in EXPERT_LAYOUTS:
        raise CheckpointError(f"expert layout {given!r} is unknown: expected one of {', '.join(EXPERT_LAYOUTS)}")
    if not any(config.text.sparse_layers):
        return "hf4"
    fused = next((name for name in shapes if name.endswith(".mlp.experts.gate_up_proj")), None)
    if fused is None:
        return "per_expert"
    e, d, f = config.text.num_experts, config.text.hidden_size, config.text.moe_intermediate_size
    if 2 * f == d:
        if given not in ("hf4", "hf5"):
            raise CheckpointError(
                f"expert layout can't be told from shape (2F == D == {d}): pass --expert-layout hf4|hf5"
            )
        return given
    layouts: dict[tuple[int, ...], str] = {(e, d, 2 * f): "hf4", (e, 2 * f, d): "hf5"}
    found = layouts.get(shapes[fused])
    if found is None:
        raise CheckpointError(
            f"tensor {fused} has shape {list(shapes[fused])}, expected {[e, d, 2 * f]} or {[e, 2 * f, d]}: "
            "the weights do not belong to this config.json"
        )
    if given not in (None, found):
        raise CheckpointError(f"tensor {fused} has layout {found}, not {given}: leave out --expert-layout")
    return found


def _files(directory: Path) -> list[str]:
    if not (index := directory / INDEX).exists():
        if not (directory / SINGLE).exists():
            raise CheckpointError(
                f"no {SINGLE} and no {INDEX} in {directory}: give a Hugging Face checkpoint's directory"
            )
        return [SINGLE]
    try:
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is damaged ({type(error).__name__}: {error}): download it again") from None
    for file in files:
        if Path(file).name != file:
            raise CheckpointError(
                f"{index} names {file!r}, which is not inside the directory: download the index again"
            )
        if not (directory / file).exists():
            raise CheckpointError(f"{index} names {file}, which does not exist: download the missing file")
    return files


def _check_index(directory: Path, found: dict[str, dict[str, Entry]]) -> None:
    if not (index := directory / INDEX).exists():
        return
    for name, file in json.loads(index.read_text())["weight_map"].items():
        if name not in found[file]:
            raise CheckpointError(
                f"{directory / file} lacks tensor {name}, which {INDEX} places there: download both again"
            )


def _take_tied_head(entries: dict[str, Entry], config: ModelConfig) -> Entry | None:
    """Removes the head that a checkpoint with tied embeddings may hold all the same, when it equals the embedding."""
    head, embedding = tied_head(config) or (None, None)
    if head not in entries or embedding not in entries:
        return None
    ours, theirs = entries.pop(head), entries[embedding]
    same = ours.shape == theirs.shape and ours.dtype == theirs.dtype and len(ours.shape) == 2
    size = prod(ours.shape) if same else 0
    for start in range(0, size, _AT_ONCE):
        room = [np.empty(min(_AT_ONCE, size - start), ours.dtype) for _ in range(2)]
        one, other = (read_tensor(entry, start, out) for entry, out in zip((ours, theirs), room, strict=True))
        same = same and one.tobytes() == other.tobytes()
    if not same:
        raise CheckpointError(
            f"{ours.file}: tensor {ours.name} differs from {theirs.name} although tie_word_embeddings is true: "
            "set it to false in config.json, or remove the tensor"
        )
    return ours


def _check_tensors(directory: Path, config: ModelConfig, layout: str, entries: dict[str, Entry]) -> None:
    expected = hf_tensors(config, layout)
    missing = [name for name in expected if name not in entries]
    unknown = [name for name in entries if name not in expected]
    if missing:
        others = f" (and {len(missing) - 1} others)" if len(missing) > 1 else ""
        raise CheckpointError(
            f"{directory} lacks tensor {missing[0]}{others}: download the checkpoint again or correct its config.json"
        )
    if unknown:
        entry = entries[unknown[0]]
        others = f" (and {len(unknown) - 1} others)" if len(unknown) > 1 else ""
        raise CheckpointError(
            f"{entry.file}: tensor {entry.name}{others} is unknown to model_type {config.model_type}: "
            "give a checkpoint of this family, or remove the tensor"
        )
    for name, shape in expected.items():
        if (entry := entries[name]).shape != shape:
            raise CheckpointError(
                f"{entry.file}: tensor {entry.name} has shape {list(entry.shape)}, expected {list(shape)}: "
                "the weights do not belong to this config.json"
            )


def _check_one_dtype(listed: list[Parameter], entries: dict[str, Entry]) -> None:
    for parameter in listed:
        kinds = {entries[tensor.name].dtype.name: tensor.name for tensor in parameter.tensors}
        if len(kinds) > 1:
            (one, first), (other, second), *_ = kinds.items()
            raise CheckpointError(
                f"experts of one layer have different dtypes ({first} {one}, {second} {other}): give one dtype to all"
            )


def _transpose(matrix: np.ndarray, out: np.ndarray) -> None:
    """Writes the transpose of `matrix [n, m]` into `out [m, n]`."""
    if matrix.dtype == out.dtype:
        bits = np.dtype(f"u{matrix.itemsize}")  # numpy moves integers faster than bfloat16
        matrix, out = matrix.view(bits), out.view(bits)
    rows = 8  # at a time: ten times as fast as all at once, whose strided writes miss the processor's cache
    for i in range(0, matrix.shape[0], rows):
        out[:, i : i + rows] = matrix[i : i + rows].T
