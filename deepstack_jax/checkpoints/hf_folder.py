"""Selects the files of a Hugging Face directory to read, and explains why a directory can't be read."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from deepstack_jax.checkpoints.mapping import current_name, head_and_embedding
from deepstack_jax.checkpoints.safetensors_file import CheckpointError, Entry, read_entries, refuse_lfs_pointer
from deepstack_jax.config import ModelConfig
from deepstack_jax.config_values import unique_keys
from deepstack_jax.errors import naming, short

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SUMS = "SHA256SUMS"
_FEW = 32  # layers whose parameters are listed in less than a second
_SUM = re.compile(r"([0-9a-f]{64}) [ *](.+)")
# Files with weights in other formats, and files without weights that training leaves beside them.
_OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.distcp", "*.h5", "*.msgpack", "*.npz", "*.onnx")
_NO_WEIGHTS = re.compile(r"training_args|optimizer|scheduler|rng_state|scaler")
# Tensor names that only quantised checkpoints have, and the method; the first match is reported.
_QUANTIZED = (
    (re.compile(r"\.quant_state\.bitsandbytes|\.absmax$|\.quant_map$|\.SCB$"), "bitsandbytes"),
    (re.compile(r"\.g_idx$"), "GPTQ"),
    (re.compile(r"\.qweight$|\.qzeros$"), "AWQ or GPTQ"),
    (re.compile(r"\.weight_packed$"), "compressed-tensors"),
    (re.compile(r"\.weight_scale_2$"), "ModelOpt (NVFP4)"),
    (re.compile(r"\.weight_scale(_inv)?$|_proj_scale(_inv)?$"), "FP8 or int8"),
)
_ADAPTER = re.compile(r"\.lora_(A|B|embedding_[AB]|magnitude_vector)\b|\.base_layer\.|\.modules_to_save\.")


def weight_files(directory: Path) -> list[str]:
    """Returns the names of the files to read: a single file before the shards of an index, as in transformers.

    Raises `CheckpointError` if there is neither, or if the index is damaged or names a file that does not exist.
    """
    if (directory / SINGLE).exists():
        return [SINGLE]
    index = directory / INDEX
    if not index.exists():
        raise CheckpointError(_why_no_weights(directory))
    files = sorted(set(_weight_map(index).values()))
    for file in files:
        if not is_plain_name(file):
            raise CheckpointError(
                f"{index} names {short(file)}, which is not inside the directory: download the index again"
            )
        if not (directory / file).exists():
            raise CheckpointError(f"{index} names {file}, which does not exist: download the missing file")
    return files


def is_plain_name(name: str) -> bool:
    """Whether `name` can only be that of a file in the directory where it is looked for."""
    return Path(name).name == name not in ("", "..") and name.isprintable() and len(name.encode()) <= 255


def check_sums(directory: Path) -> list[str]:
    """Checks the files that SHA256SUMS lists, if the directory has one, and returns their names.

    The file is one that the command sha256sum writes. Files that it doesn't list are not checked. Raises
    `CheckpointError` if a listed file differs or is missing, or the list is damaged.
    """
    file, names = directory / SUMS, []
    with naming(file):
        lines = file.read_text(errors="replace").splitlines() if file.is_file() else ()
    for number, line in enumerate(lines, 1):
        match = _SUM.fullmatch(line)
        if not match or not is_plain_name(match[2]):
            raise CheckpointError(
                f"{file} line {number} is not a checksum and the name of a file beside it: make it again with sha256sum"
            )
        listed = directory / match[2]
        if not listed.is_file():
            raise CheckpointError(f"{listed} is missing, which {SUMS} lists: download it, or correct {SUMS}")
        with naming(listed), listed.open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != match[1]:
                raise CheckpointError(
                    f"{listed} is not what {SUMS} lists (its checksum differs): download it again, or correct {SUMS} "
                    "where it was edited"
                )
        names.append(match[2])
    return names


def write_sums(directory: Path) -> None:
    """Writes SHA256SUMS for all other files of the directory."""
    found = {}
    for one in sorted(directory.iterdir()):
        with one.open("rb") as stream:
            found[one.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    (directory / SUMS).write_text("".join(f"{digest}  {name}\n" for name, digest in found.items()))


def check_index(directory: Path, found: Mapping[str, Mapping[str, Entry]], wanted: Iterable[str]) -> None:
    """Raises `CheckpointError` if a file lacks one of the `wanted` tensors (as found) that the index says it has."""
    if SINGLE in found:  # an index beside a single file is ignored
        return
    places = _weight_map(directory / INDEX)
    for name in wanted:
        if name in places and name not in found[places[name]]:
            message = f"{directory / places[name]} lacks tensor {name}, which {INDEX} places there"
            elsewhere = next((file for file, named in found.items() if name in named), None)
            remedy = f"it is in {elsewhere}, correct the index" if elsewhere else "download both again"
            raise CheckpointError(f"{message}: {remedy}")


def index_dtype(directory: Path) -> str | None:
    """Returns the dtype that the index's metadata names, or None."""
    if (directory / SINGLE).exists() or not (directory / INDEX).exists():
        return None
    metadata = _read_index(directory / INDEX).get("metadata")
    found = metadata.get("dtype") if isinstance(metadata, dict) else None
    return found if isinstance(found, str) else None


def refuse_other_kinds(entries: Iterable[Entry]) -> None:
    """Raises `CheckpointError` if tensor names show that the weights are quantised or are an unmerged adapter."""
    names = {entry.name: entry for entry in entries}
    for pattern, method in _QUANTIZED:
        if name := next(filter(pattern.search, names), None):
            raise CheckpointError(
                f"{names[name].file}: tensor {name} says that the weights are quantised with {method}, which is not "
                "supported: give the checkpoint in bfloat16 that it was made from"
            )
    if name := next(filter(_ADAPTER.search, names), None):
        raise CheckpointError(
            f"{names[name].file}: tensor {name} belongs to an adapter that is not merged: merge it into its base model "
            "first (merge_and_unload of PEFT, then save_pretrained)"
        )


def refuse_larger_model(directory: Path, config: ModelConfig, tensors: int, experts: int = 0) -> None:
    """Raises `CheckpointError` if `config` needs more than the number of `tensors` that the weights have.

    Every layer, block and, if `experts` have tensors of their own, expert has at least one. This is checked before the
    names and shapes of all parameters are made, which takes time and memory in proportion to `config`. A small model is
    left to the checks that name the missing tensor.
    """
    counts = {
        "num_hidden_layers": config.text.num_hidden_layers,
        "num_experts": experts * sum(config.text.sparse_layers),
        "vision_config.depth": config.vision.depth if config.vision else 0,
    }
    key, count = max(counts.items(), key=lambda item: item[1])
    if count > max(tensors, _FEW):
        said = experts if key == "num_experts" else count
        raise CheckpointError(
            f"{directory}: config.json has {key} {said} and the weights have only {tensors} tensors: correct it"
        )


def why_missing(
    directory: Path, config: ModelConfig, missing: list[str], entries: Mapping[str, Entry], left_out: str
) -> str:
    """Returns the error text for a directory that lacks the tensors `missing`.

    `entries` are the model's tensors that it holds; `left_out` is the line about tensors that are not the model's.
    """
    others = f" (and {len(missing) - 1} others)" if len(missing) > 1 else ""
    lacks = f"{directory} lacks tensor {missing[0]}{others}"
    head, embedding = head_and_embedding(config)
    if (directory / SINGLE).exists() and (directory / INDEX).exists():
        return f"{lacks}: {SINGLE} is read before {INDEX}, so remove it if the index's files are the checkpoint"
    if file := _unread_file(directory, config, missing[0], entries):
        return f"{lacks}: it is in {file}, which {INDEX} does not name, so correct the index"
    if missing == [head]:
        return (
            f"{lacks}: a base model was saved without its head, so save the whole model (Auto{_auto_class(config)} of "
            "transformers), or set tie_word_embeddings to true in config.json if its embeddings were tied"
        )
    if missing == [embedding] and head in entries:
        return f"{lacks}: set tie_word_embeddings to true in config.json where {head} is the embedding too"
    held, layer = {_layer(name) for name in entries} - {-1}, _layer(missing[0])
    if held and layer == max(held) + 1:
        said = config.text.num_hidden_layers
        return f"{lacks}: config.json has num_hidden_layers {said} and the weights have {layer} layers: correct it"
    if all(".visual." in name for name in missing) and not any(".visual." in name for name in entries):
        return (
            f"{lacks}: these are the weights of its text model only, so give all of them, or make the object "
            f"text_config its config.json (model_type {config.model_type}_text)"
        )
    if not entries:
        return f"{lacks}: its weights are of another model than its config.json ({left_out})"
    return f"{lacks}: download the checkpoint again or correct its config.json"


def _unread_file(directory: Path, config: ModelConfig, name: str, entries: Mapping[str, Entry]) -> str | None:
    """Returns the name of a file that holds the tensor but is not read, if there is one."""
    read = {entry.file.name for entry in entries.values()}
    for file in sorted(directory.glob("*.safetensors")):
        try:
            if file.name not in read and name in {current_name(found, config) for found in read_entries(file)}:
                return file.name
        except (CheckpointError, OSError):  # a file that can't be read doesn't help
            continue
    return None


def _layer(name: str) -> int:
    """Returns the decoder layer that a tensor belongs to, or -1."""
    found = re.match(r"model\.(?:language_model\.)?layers\.(\d+)\.", name)
    return int(found[1]) if found else -1


def _auto_class(config: ModelConfig) -> str:
    return "ModelForImageTextToText" if config.is_vision_language else "ModelForCausalLM"


def _weight_map(index: Path) -> dict[str, str]:
    try:
        found = _read_index(index)["weight_map"]
        if not all(isinstance(file, str) for file in found.values()):
            raise TypeError("weight_map must map names of tensors to names of files")
    except (KeyError, TypeError, AttributeError) as error:
        raise _damaged(index, error) from None
    return found


def _read_index(index: Path) -> dict[str, Any]:
    refuse_lfs_pointer(index)
    with naming(index):
        data = index.read_bytes()
    try:
        found = json.loads(data.decode(), object_pairs_hook=unique_keys)
        if not isinstance(found, dict):
            raise TypeError(f"it holds {type(found).__name__}, not an object")
    except (ValueError, TypeError, RecursionError) as error:
        raise _damaged(index, error) from None
    return found


def _damaged(index: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{index} is damaged ({type(error).__name__}: {error}): download it again, or correct it")


def _why_no_weights(directory: Path) -> str:
    """Returns the error text for a directory that has neither of the two files, based on what it holds instead."""
    if shard := min((file.name for file in directory.glob("*.safetensors")), default=None):
        if re.search(r"-of-\d+\.safetensors$", shard):
            return f"{directory} holds {shard} without {INDEX}, which says what its files hold: download {INDEX} too"
        return f"{directory} holds {shard} and no {SINGLE}: rename it to {SINGLE} where it is the whole model"
    if gguf := min(directory.glob("*.gguf"), default=None):
        return f"{gguf} is a GGUF file: give the Hugging Face checkpoint in safetensors that it was made from"
    found = sorted(file.name for pattern in _OTHER_WEIGHTS for file in directory.rglob(pattern))
    if other := next((name for name in found if not _NO_WEIGHTS.search(name)), None):
        return (
            f"{directory} holds its weights as {other} and no {SINGLE}: save them as safetensors first "
            "(from_pretrained of transformers, then save_pretrained)"
        )
    return f"no {SINGLE} and no {INDEX} in {directory}: give a Hugging Face checkpoint's directory"
