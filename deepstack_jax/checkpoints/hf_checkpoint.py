"""Reads a Hugging Face checkpoint directory. The whole directory is checked before any weight is read.

It takes a single `model.safetensors` or shards with `model.safetensors.index.json`, the expert layouts and names of
`mapping.py`, and float32, float16 and bfloat16 tensors. If their dtypes differ, all are read in the dtype that
transformers' `from_pretrained` chooses; tensors that are not part of the model are skipped, as in transformers.

The layout of fused experts is detected from the shape of `gate_up_proj`; if 2F == D it must be given. `down_proj` does
not settle it: transformers 5 swaps the axes of each tensor only if its shape requires that, so a checkpoint that passed
through it may hold one of the two in either order. `transformers_version` in config.json does not settle it either: it
names the writer of the config, not of the weights.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import DTypeLike

from deepstack_jax.checkpoints.direct_file import aligned_empty
from deepstack_jax.checkpoints.hf_folder import (
    check_index,
    index_dtype,
    refuse_larger_model,
    refuse_other_kinds,
    weight_files,
    why_missing,
)
from deepstack_jax.checkpoints.mapping import (
    EXPERT_LAYOUTS,
    HfTensor,
    Parameter,
    current_name,
    fused_experts,
    head_and_embedding,
    hf_tensors,
    parameters,
)
from deepstack_jax.checkpoints.safetensors_file import (
    DTYPES,
    CheckpointError,
    CheckpointWarning,
    Entry,
    FiniteCheck,
    TensorReader,
    read_entries,
    row_blocks,
)
from deepstack_jax.config import ModelConfig
from deepstack_jax.models.registry import family_of, read_config

Inspect = Callable[[np.ndarray], None]
Rows = tuple[int, int]  # from and to, of a parameter's first axis
_NAMED = 8  # the most skipped tensors that a note names
_AT_ONCE = 1 << 18  # values per read: few enough to stay in the processor's cache for the next step
_ROWS, _PAD = 64, 32  # rows per block of a transposition, and values of padding after each


@dataclass(frozen=True)
class HfCheckpoint:
    """A checkpoint directory whose headers were checked.

    Attributes:
        entries: current tensor name -> where the tensor is stored.
        files: file name -> the tensor names as found in it.
        dtype: the dtype in which parameters are read.
        notes: one line for each thing that is read differently from how it is stored.
        mixed: the line about tensors of other dtypes, empty if there are none.
    """

    directory: Path
    config: ModelConfig
    expert_layout: str
    entries: dict[str, Entry]
    files: dict[str, list[str]]
    dtype: np.dtype
    notes: tuple[str, ...] = ()
    mixed: str = ""
    parameters: list[Parameter] = field(default_factory=list, repr=False)

    def dtype_of(self, parameter: Parameter) -> np.dtype:
        """The dtype of the parameter's first tensor on disk."""
        return self.entries[parameter.tensors[0].name].dtype

    def read(
        self,
        parameter: Parameter,
        dtype: DTypeLike | None = None,
        inspect: Inspect | None = None,
        rows: Rows | None = None,
    ) -> np.ndarray:
        """Reads one parameter into a new array of its canonical shape, in `dtype` (by default the checkpoint's).

        `rows` (from, to) selects rows of its first axis, and nothing else is read. `inspect` is as in `stream`. Raises
        `CheckpointError` if a file has changed since it was checked.
        """
        first, end = rows or (0, parameter.shape[0])
        out = np.empty((end - first, *parameter.shape[1:]), self.dtype if dtype is None else np.dtype(dtype))
        flat, done = out.reshape(-1), 0
        for values in self.stream(parameter, first, end - first, dtype=dtype, inspect=inspect):
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

        Each array is valid only until the next one is requested. `inspect` is called with the values as stored on disk,
        and again with those that were cast to a narrower dtype.
        """
        wanted = self.dtype if dtype is None else np.dtype(dtype)
        count = parameter.shape[0] - first if count is None else count
        if parameter.tensors[0].transposed:
            yield from self._stream_experts(parameter, range(first, first + count), wanted, inspect)
            return
        entry = self.entries[parameter.tensors[0].name]
        row, row_on_disk = prod(parameter.shape[1:]), prod(entry.shape[1:])
        rows = range(first * row // row_on_disk, (first + count) * row // row_on_disk)
        out = aligned_empty((min(_AT_ONCE, count * row),), wanted)
        with TensorReader() as reader:
            for index in row_blocks(entry.shape, rows, _AT_ONCE):
                values = _cast(_inspected(reader.read(entry, index), inspect), wanted, inspect)
                out[: values.size] = values.reshape(-1)
                yield out[: values.size]

    def _stream_experts(
        self, parameter: Parameter, experts: range, dtype: np.dtype, inspect: Inspect | None
    ) -> Iterator[np.ndarray]:
        """Yields experts one by one: each is a matrix with its axes swapped on disk, or two of them side by side."""
        out = aligned_empty(parameter.shape[1:], dtype)
        by_expert: dict[int, list[HfTensor]] = {}
        for tensor in parameter.tensors:
            if tensor.index:
                by_expert.setdefault(cast(int, tensor.index[0]), []).append(tensor)
        with TensorReader() as reader:
            for i in experts:
                for tensor in by_expert.get(i, parameter.tensors):
                    entry, part = self.entries[tensor.name], out[tensor.index[1:]]
                    rows, columns = entry.shape[-2:]
                    # a few rows at a time, so that they stay in the processor's cache
                    for (some,) in row_blocks((rows, columns), range(rows), max(_AT_ONCE, columns)):
                        block = reader.read(entry, (some,) if tensor.index else (i, some))
                        _transpose(_cast(_inspected(block, inspect), dtype, inspect), part[:, some])
                yield out


def open_checkpoint(
    directory: str | Path, config: ModelConfig | None = None, expert_layout: str | None = None
) -> HfCheckpoint:
    """Checks the headers of every file in `directory` against `config` (by default the directory's own config.json).

    Raises `CheckpointError` for a missing, truncated or damaged file, a missing tensor, a wrong shape, an unsupported
    dtype, weights that are quantised or an adapter, a redundant head that differs from the tied embedding, and an
    expert layout that neither the shapes nor `expert_layout` (hf4 or hf5) settle.
    """
    directory = Path(directory)
    if config is None:
        config = read_config(directory)
    found = {file: read_entries(directory / file) for file in weight_files(directory)}
    refuse_other_kinds(entry for named in found.values() for entry in named.values())
    shapes = {current_name(name, config): entry.shape for named in found.values() for name, entry in named.items()}
    layout = detect_expert_layout(config, shapes, expert_layout)
    experts = config.text.num_experts if layout == "per_expert" else 0
    refuse_larger_model(directory, config, len(shapes), experts)
    entries, files, left_out = _sort_out(found, config, layout)
    check_index(directory, found, (name for named in files.values() for name in named))
    has_head = head_and_embedding(config)[0] in entries
    _check_tensors(directory, config, layout, entries, left_out)
    dtype, mixed = _one_dtype(directory, config, found, entries)
    _take_tied_head(entries, config, dtype)
    notes = [f"{directory}: {left_out}"] if left_out else []
    if family_of(config).is_text_part and not has_head:
        notes.append(
            f"{directory} holds no lm_head.weight: the embeddings are used as the head, which is right only where the "
            "whole model tied them; otherwise add its lm_head.weight and set tie_word_embeddings to false"
        )
    return HfCheckpoint(
        directory, config, layout, entries, files, dtype, tuple(notes), mixed, parameters(config, layout)
    )


def read_params(
    hf_dir: str | Path,
    config: ModelConfig | None = None,
    dtype: DTypeLike | None = None,
    expert_layout: str | None = None,
    prefixes: Sequence[str] | None = None,
) -> Iterator[tuple[str, np.ndarray]]:
    """Reads a Hugging Face directory as (dotted path, array of the canonical shape), one parameter at a time.

    `dtype` and `prefixes` are those of `read_rows`, the other arguments and the errors those of `open_checkpoint`. The
    directory is checked when the first item is requested.
    """
    for path, rows in read_rows(open_checkpoint(hf_dir, config, expert_layout), dtype, prefixes):
        (values,) = rows.values()
        yield path, values


def read_rows(
    checkpoint: HfCheckpoint,
    dtype: DTypeLike | None = None,
    prefixes: Sequence[str] | None = None,
    wanted: Mapping[str, Sequence[Rows]] | None = None,
) -> Iterator[tuple[str, dict[Rows, np.ndarray]]]:
    """Reads rows of the first axis of every parameter: yields (dotted path, array by (from, to)).

    `dtype` converts each array; by default the checkpoint's dtype is kept. `prefixes` selects the paths that start with
    one of them, such as `("visual.",)`. `wanted` names the rows by dotted path, and nothing else is read; None reads
    all rows. Raises `CheckpointError` if a file has changed since it was checked. A `CheckpointWarning` names each
    thing that is read differently from how it is stored.
    """
    warn_of_notes(checkpoint, dtype)
    for parameter in checkpoint.parameters:
        if prefixes is None or parameter.path.startswith(tuple(prefixes)):
            check = FiniteCheck()
            rows = ((0, parameter.shape[0]),) if wanted is None else wanted[parameter.path]
            arrays = {each: checkpoint.read(parameter, dtype, check, each) for each in rows}
            if check.failed:
                warn_non_finite(checkpoint, parameter)
            yield parameter.path, arrays


def warn_of_notes(checkpoint: HfCheckpoint, dtype: DTypeLike | None) -> None:
    """Emits a `CheckpointWarning` per note of a checkpoint that will be read in `dtype` (None: the checkpoint's)."""
    for note in (*checkpoint.notes, *([checkpoint.mixed] if checkpoint.mixed and dtype is None else [])):
        warnings.warn(note, CheckpointWarning, stacklevel=3)


class NonFiniteWarning(UserWarning):
    """Some weights are NaN or infinite."""


def warn_non_finite(checkpoint: HfCheckpoint, parameter: Parameter) -> None:
    """Emits a `NonFiniteWarning` that names `parameter` and its first file."""
    entry = checkpoint.entries[parameter.tensors[0].name]
    message = f"{entry.file}: the weights of {parameter.path} hold NaN or infinity: answers will be wrong"
    warnings.warn(message, NonFiniteWarning, stacklevel=3)


def detect_expert_layout(config: ModelConfig, shapes: dict[str, tuple[int, ...]], given: str | None = None) -> str:
    """Returns the expert layout (hf4, hf5 or per_expert) of a checkpoint whose tensors have these `shapes`.

    `given` decides only if the shapes are ambiguous (2F == D). Raises `CheckpointError` if it is then missing, if it
    contradicts the shapes, or if the shapes fit no layout.
    """
    if given is not None and given not in EXPERT_LAYOUTS:
        raise CheckpointError(f"expert layout {given!r} is unknown: expected one of {', '.join(EXPERT_LAYOUTS)}")
    if not any(config.text.sparse_layers):
        return "hf4"
    fused = next((name for name in fused_experts(config) if name in shapes), None)
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


def _sort_out(
    found: Mapping[str, Mapping[str, Entry]], config: ModelConfig, layout: str
) -> tuple[dict[str, Entry], dict[str, list[str]], str]:
    """Returns (the model's tensors by current name, file -> their names as found, the line about other tensors)."""
    wanted = {*hf_tensors(config, layout), *head_and_embedding(config)}
    entries: dict[str, Entry] = {}
    files: dict[str, list[str]] = {}
    others: list[str] = []
    for file, named in found.items():
        for name, entry in named.items():
            if (now := current_name(name, config)) not in wanted:
                others.append(name)
                continue
            if now in entries:
                raise CheckpointError(
                    f"{entry.file}: tensor {name} is also in {entries[now].file}: remove one of the two"
                )
            entries[now] = entry
            files.setdefault(file, []).append(name)
    return entries, files, _line_about(others, config)


def _line_about(others: Sequence[str], config: ModelConfig) -> str:
    if not others:
        return ""
    listed = ", ".join(sorted(others)[:_NAMED]) + (f" and {len(others) - _NAMED} more" if len(others) > _NAMED else "")
    count = f"{len(others)} tensors are" if len(others) > 1 else "1 tensor is"
    return f"{count} not part of {config.model_type} and left out: {listed}"


def _one_dtype(
    directory: Path, config: ModelConfig, found: Mapping[str, Mapping[str, Entry]], entries: Mapping[str, Entry]
) -> tuple[np.dtype, str]:
    """Returns (dtype of the parameters, the line about its choice).

    If tensors differ, the dtype is the one that transformers chooses: config.json's, the index's, or that of the first
    tensor by name in the first file.
    """
    counts = Counter(entry.dtype.name for entry in entries.values())
    if len(counts) == 1:
        return next(iter(entries.values())).dtype, ""
    named = next(iter(found.values()))
    first = next(name for name in sorted(named) if named[name].code in DTYPES)
    said = {
        "config.json": config.dtype,
        "its index": index_dtype(directory),
        f"tensor {first}": named[first].dtype.name,
    }
    source, name = next((source, name) for source, name in said.items() if name is not None)
    dtype = next((dtype for dtype in DTYPES.values() if dtype.name == name), None)
    if dtype is None:
        raise CheckpointError(
            f"{directory}: tensors have different dtypes ({_listed(counts)}) and {source} has {name!r}: set dtype in "
            "config.json to one of float32, bfloat16, float16"
        )
    return dtype, (
        f"{directory}: tensors have different dtypes ({_listed(counts)}): all are read as {name}, the dtype of {source}"
    )


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))


def _take_tied_head(entries: dict[str, Entry], config: ModelConfig, dtype: np.dtype) -> None:
    """Merges the two names under which a checkpoint may hold tied embeddings into one, the embedding's.

    Raises `CheckpointError` if it holds both and they differ when read in `dtype`.
    """
    head, embedding = head_and_embedding(config)
    if not config.text.tie_word_embeddings or head not in entries:
        return
    ours = entries.pop(head)
    theirs = entries.setdefault(embedding, ours)
    for block in row_blocks(ours.shape, range(ours.shape[0]), _AT_ONCE) if ours is not theirs else ():
        with TensorReader() as reader:
            one, other = (_cast(reader.read(entry, block), dtype).tobytes() for entry in (ours, theirs))
        if one != other:
            raise CheckpointError(
                f"{ours.file}: tensor {ours.name} differs from {theirs.name} although tie_word_embeddings is true: "
                "set it to false in config.json, or remove the tensor"
            )


def _check_tensors(
    directory: Path, config: ModelConfig, layout: str, entries: Mapping[str, Entry], left_out: str
) -> None:
    """Raises `CheckpointError` if a tensor is missing, has the wrong shape or has an unsupported dtype."""
    expected, (head, embedding) = hf_tensors(config, layout), head_and_embedding(config)
    tied = config.text.tie_word_embeddings and head in entries
    if missing := [name for name in expected if name not in entries and not (tied and name == embedding)]:
        raise CheckpointError(why_missing(directory, config, missing, entries, left_out))
    for name, entry in entries.items():
        _ = entry.dtype  # raises if it is not supported
        shape = expected[embedding if name == head else name]
        if entry.shape != shape:
            raise CheckpointError(
                f"{entry.file}: tensor {entry.name} has shape {list(entry.shape)}, expected {list(shape)}: "
                "the weights do not belong to this config.json"
            )


def _cast(values: np.ndarray, dtype: np.dtype, inspect: Inspect | None = None) -> np.ndarray:
    """Returns `values` in `dtype`. A narrower result is passed to `inspect`, because values may have overflowed."""
    if values.dtype == dtype:
        return values
    with np.errstate(over="ignore"):
        cast = values.astype(dtype)
    if inspect and dtype.itemsize < values.itemsize:
        inspect(cast)
    return cast


def _inspected(values: np.ndarray, inspect: Inspect | None) -> np.ndarray:
    if inspect:
        inspect(values)
    return values


def _transpose(matrix: np.ndarray, out: np.ndarray) -> None:
    """Writes the transpose of `matrix [n, m]` into `out [m, n]` of the same dtype."""
    bits = np.dtype(f"u{matrix.itemsize}")  # numpy moves integers faster than bfloat16
    matrix, out = matrix.view(bits), out.view(bits)
    count, columns = matrix.shape
    # A few rows at a time, so that each cache line of `out` is filled at once. The padding keeps the rows' copies from
    # lying a power of two apart, where they would evict each other from the processor's cache.
    copies = np.empty((_ROWS, columns + _PAD), bits)[:, :columns]
    for i in range(0, count, _ROWS):
        rows = copies[: min(_ROWS, count - i)]
        rows[...] = matrix[i : i + _ROWS]
        out[:, i : i + _ROWS] = rows.T
