"""The fake model: rows are a pure function of a picture, and tokens are one of the prompt and its rows.

Prompts come from a small catalogue, which is the same in all runs, so that each is prepared only once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import xxhash

from deepstack_jax.config import ModelConfig
from deepstack_jax.models.registry import parse_config
from deepstack_jax.models.vision import VisualRows
from deepstack_jax.processing.batch import Batch, VisionInput, prepare_batch
from deepstack_jax.processing.decoder_process import Result, Task, perform
from deepstack_jax.processing.decoders import Decoders
from deepstack_jax.processing.processor import ParsedPrompts
from deepstack_jax.processing.sources import MediaFile
from deepstack_jax.testing.random_checkpoint import tiny_config

WIDTH = 4  # of the text model
IMAGE, START, END = 261, 259, 260  # token ids
NUM_PROMPTS = 40


def _config() -> ModelConfig:
    parsed = parse_config(tiny_config())
    assert parsed.vision is not None
    vision = replace(parsed.vision, deepstack_visual_indexes=parsed.vision.deepstack_visual_indexes[:1])
    return replace(parsed, text=replace(parsed.text, hidden_size=WIDTH), vision=vision, dtype="float32")


CONFIG = _config()
ROW_WIDTH = WIDTH * (1 + CONFIG.num_deepstack_levels)


@dataclass(frozen=True)
class Prompt:
    """A prompt of the catalogue: words and pictures in turns; a picture is its name and its size in tokens."""

    number: int
    parts: tuple[int | tuple[int, int, int], ...]  # words, or (picture, height, width) in tokens

    @property
    def pictures(self) -> tuple[tuple[int, int, int], ...]:
        return tuple(part for part in self.parts if isinstance(part, tuple))

    @property
    def files(self) -> list[bytes]:
        """The pictures as files."""
        return [b"%d %d %d" % picture for picture in self.pictures]


@cache
def catalogue() -> tuple[Prompt, ...]:
    """All prompts that clients send; some pictures are in several of them."""
    dice = np.random.default_rng(7)
    prompts = []
    for number in range(NUM_PROMPTS):
        parts: list[Any] = [int(dice.integers(1, 6))]
        for _ in range(int(dice.choice([1, 1, 1, 2, 3, 5]))):
            picture = int(dice.integers(12))
            parts += [(picture, 1 + picture % 3, 1 + picture % 4), int(dice.integers(0, 8))]
        prompts.append(Prompt(number, tuple(parts)))
    return tuple(prompts)


def text_of(prompt: Prompt) -> str:
    """What a client sends beside the pictures."""
    return f"prompt {prompt.number}"


@cache
def ids_of(number: int) -> np.ndarray:
    """int64 [1, T]: the tokens of a prompt."""
    ids: list[int] = []
    for place, part in enumerate(catalogue()[number].parts):
        if isinstance(part, tuple):
            ids += [START, *[IMAGE] * (part[1] * part[2]), END]
        else:
            ids += [1 + (number * 31 + place * 7 + word) % 250 for word in range(part)]
    return np.asarray([ids])


def pixels_of(file: bytes) -> tuple[np.ndarray, list[int]]:
    """The patches of a picture, and its grid in patches."""
    picture, height, width = map(int, file.split())
    patches = np.zeros((4 * height * width, CONFIG.vision.patch_dim), np.float32)  # type: ignore[union-attr]
    patches[:, 0] = 1 + picture
    return patches, [1, 2 * height, 2 * width]


def rows_of_pixels(pixels: np.ndarray, count: int) -> np.ndarray:
    """float32 [count, (1+N)*D]: what the encoder makes of a picture."""
    return rows_of_picture(max(int(pixels[0, 0]) - 1, 0), count)


@cache
def rows_of_picture(picture: int, count: int) -> np.ndarray:
    """float32 [count, (1+N)*D]: the rows of a picture, small whole numbers that no other picture has in this order."""
    numbers = np.arange(count * ROW_WIDTH, dtype=np.uint64) + np.uint64(1000 * picture + 1)
    mixed = (numbers * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(42)
    rows = mixed.astype(np.float32).reshape(count, ROW_WIDTH)
    rows.flags.writeable = False
    return rows


@cache
def right_rows(number: int) -> np.ndarray:
    """float32 [rows, (1+N)*D]: the visual rows of a prompt in the order of its tokens, for the checker."""
    return np.concatenate([rows_of_picture(picture, h * w) for picture, h, w in catalogue()[number].pictures])


FILES: dict[bytes, bytes] = {}  # pictures as clients send them -> as the fake encoder takes them


class _Text:
    """Stands for `DecodeStream`; tokens have no text."""

    def feed(self, token: int) -> str:
        return ""

    def finish(self) -> str:
        return ""


class _Processor:
    """Stands for `processing.processor.Processor`."""

    tokenizer = None
    longest_token = 64
    decode_stream = _Text

    @staticmethod
    def count_exceeds(texts: Any, most: int) -> bool:
        return False

    @staticmethod
    def parse(prompt: str, images: Sequence[MediaFile], videos: Sequence[MediaFile], **_: Any) -> ParsedPrompts:
        """Keeps the number of the prompt and the files of its pictures.

        Raises:
            ValueError: the prompt is not in the catalogue.
        """
        word, _, number = prompt.partition(" ")
        if word != "prompt":
            raise ValueError(f"{prompt!r} is not a prompt: send one of the catalogue")
        files = [FILES[image.data] for image in images] + [file.data for file in videos]
        return _Parsed([number], [], tuple(files))

    @staticmethod
    def assemble(parsed: "_Parsed", _: Sequence[Any]) -> dict[str, Any]:
        """What `batch_of` takes."""
        return {"number": int(parsed.texts[0]), "files": parsed.files}


@dataclass(frozen=True)
class _Parsed(ParsedPrompts):
    files: tuple[bytes, ...]


class InlineDecoders(Decoders):
    """Reads headers in the event loop, because real threads have no place in the simulated world."""

    def __init__(self) -> None:
        super().__init__(0)

    async def _run(self, task: Task, more_seconds: float) -> Result:
        return perform(task)


@cache
def batch_of(_: ModelConfig, number: int, files: tuple[bytes, ...]) -> Batch:
    """Stands for `prepare_batch`, which it calls once per prompt."""
    pictures = [pixels_of(file) for file in files]
    return prepare_batch(
        CONFIG,
        ids_of(number),
        pixel_values=np.concatenate([patches for patches, _ in pictures]),
        image_grid_thw=np.asarray([grid for _, grid in pictures]),
    )


def new_model(encodes: bool = False) -> Any:
    """What nodes take for a loaded model; `encodes` says whether it has the vision encoder."""
    return SimpleNamespace(
        config=CONFIG,
        processor=_Processor(),
        mesh=None,
        params={},
        vision_params={"visual": None} if encodes else {},
        text_params={},
        path=None,
        dtype=np.dtype(np.float32),
        eos_token_ids=(),
        pad_token_id=0,
    )


def encode_images(_: Any, visuals: Sequence[VisionInput]) -> list[np.ndarray]:
    """Stands for `encoding.encode_images`, without the time it takes."""
    return [rows_of_pixels(visual.pixel_values, visual.num_rows) for visual in visuals]


def separate_deepstack_embeds(rows: np.ndarray, _: int) -> VisualRows:
    """Stands for `models.vision.separate_deepstack_embeds`, whose shapes are checked for JAX's arrays only."""
    return VisualRows(rows[:, :WIDTH], rows[:, WIDTH:])  # type: ignore[arg-type]


class HostRows:
    """Stands for `device_rows.HostRows`: rows that the host can read in place."""

    def __init__(self, rows: np.ndarray):
        self._bytes = np.ascontiguousarray(rows).view(np.uint8)

    def read(self, start: int, stop: int) -> Any:
        yield self._bytes[start:stop]


def to_device(host: np.ndarray, _: Any = None) -> np.ndarray:
    """Stands for `device_rows.to_device`."""
    host.flags.writeable = False
    return host


def joined(rows: Any, count: int) -> np.ndarray:
    """float32 [count, (1+N)*D]: the first rows with their deepstack levels beside them, as this node encoded them."""
    if isinstance(rows, np.ndarray):
        return rows[:count]
    assert rows.deepstack is not None
    return np.concatenate([rows.embeds[:count], rows.deepstack[:count]], axis=1)  # type: ignore[arg-type]


def answer_to(ids: np.ndarray, rows: np.ndarray) -> int:
    """The answer to a prompt with these rows, as one number."""
    return xxhash.xxh3_64_intdigest(ids.astype("<i4").tobytes() + np.ascontiguousarray(rows, "<f4").tobytes())
