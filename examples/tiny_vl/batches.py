"""From samples to the arrays of a training step.

A sample's media are encoded once and its exchanges are asked one by one: each is a row of tokens that follows the media
as if it were the only one, which is how the model is used. Therefore a batch has the media's tokens, and groups of rows
(short ones, and long ones for descriptions) that continue them.

Pixels travel as bytes: a picture's two equal temporal halves and four bytes a value would make the queue between the
processes eight times as slow.
"""

from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from deepstack_jax.config import ModelConfig
from deepstack_jax.demo.changes import Clip
from deepstack_jax.demo.questions import ask_of_clip, ask_of_pair, ask_of_picture, ask_of_what_is_not
from deepstack_jax.demo.samples import Drawing, Exchange, Sample, draw, sample
from deepstack_jax.demo.scenes import Scene
from deepstack_jax.models.vision import PatchGeometry, patch_geometry
from deepstack_jax.processing.images import ImageSettings, patchify, resize, smart_resize
from deepstack_jax.processing.positions import rope_positions
from deepstack_jax.processing.processor import Processor
from deepstack_jax.processing.videos import VideoOptions, load_video
from tiny_vl.checkpoint import FRAMES_PER_SECOND
from tiny_vl.sight import CLASSES, UNKNOWN, scenes_of, seen_in

SEEDS = 32  # of a step: a batch has at most as many samples
VIEWS = {"picture": 32, "pair": 32, "clip": 64}  # pictures, or temporal patches of clips, in a batch
PATCHES = {"picture": 144, "pair": 144, "clip": 100}  # of a view at most: 192 x 192 pixels in pictures
MEDIA_TOKENS = {"picture": 41, "pair": 79, "clip": 104}
VIEWS_OF = {"picture": 1, "pair": 2, "clip": 4}
MORE = 4  # questions which of two pictures has more, besides a pair's own
LAST = ("number", "above", "count_kind", "pair_changed", "clip_event", "clip_motion")  # learned last, or asked seldom
BYTES = np.broadcast_to(np.arange(256, dtype=np.float32), (3, 256))  # patchify's table that keeps bytes as they are


@dataclass(frozen=True)
class RowShape:
    """Rows of one length: tokens of question and answer, those of the answer at most, and rows a sample."""

    length: int
    answer: int
    count: dict[str, int]  # by kind of sample


ROWS = {
    "long": RowShape(38, 24, {"picture": 1, "pair": 1, "clip": 0}),
    "short": RowShape(24, 9, {"picture": 8, "pair": 6, "clip": 6}),
}


@dataclass
class Rows:
    """Exchanges of one length, `count` rows a sample, one sample after another; all int32."""

    input_ids: np.ndarray  # [R, T]
    answer_at: np.ndarray  # [R, A]: the token before each token of the answer
    targets: np.ndarray  # [R, A]: the answer's tokens, its end token last; -1 past them
    families: list[str] = field(default_factory=list)  # of each row; "" for a row of padding


@dataclass
class TrainingBatch:
    """S samples of one kind with V views in all."""

    kind: str
    pixels: np.ndarray  # uint8 [V, P, C*Tp*p*p]
    geometry: PatchGeometry  # each field [V, P, ...]
    media_ids: np.ndarray  # int32 [S, T]
    media_positions: np.ndarray  # int32 [3, S, T]
    media_lengths: np.ndarray  # int32 [S]
    next_positions: np.ndarray  # int32 [S]: the M-RoPE position of the token after the media
    visual_index: np.ndarray  # int32 [S, T]: the row among [V * P / merge^2]
    seen: np.ndarray  # int32 [V * P / merge^2, 5]: what each row shows, see sight.py
    rows: dict[str, Rows]

    def arrays(self) -> dict[str, Any]:
        """What the compiled step takes."""
        rows = {
            name: {"input_ids": r.input_ids, "answer_at": r.answer_at, "targets": r.targets}
            for name, r in self.rows.items()
        }
        return {name: value for name, value in vars(self).items() if name != "kind"} | {"rows": rows}


def ask_more(rng: np.random.Generator, drawing: Drawing) -> list[Exchange]:
    """More exchanges about a sample than it comes with: what else its questions could have been.

    Of two pictures, which one has more of some shapes and colors that either shows; of a picture and a clip, whatever
    is answered with "Nothing." and "It does not move." too: these are rare otherwise, and learned last.
    """
    subject = drawing.subject
    if isinstance(subject, Scene):
        return [*ask_of_what_is_not(rng, subject), *(e for _ in range(2) for e in ask_of_picture(rng, subject))]
    if isinstance(subject, Clip):
        return [*ask_of_what_is_not(rng, subject), *(e for _ in range(3) for e in ask_of_clip(rng, subject))]
    things = (*subject.first.things, *subject.second.things)
    words = {"shapes", *(thing.shape for thing in things), *(thing.color for thing in things)}
    more = [replace(subject, change=None, first=replace(subject.first, asked=word)) for word in sorted(words)]
    found = [exchange for pair in more for exchange in ask_of_pair(rng, pair) if exchange.family == "pair_more"]
    return [found[i] for i in rng.permutation(len(found))[:MORE]]


class Batcher:
    """Makes batches with the tokenizer and the processor's settings of the directory that `write_companions` wrote."""

    def __init__(self, directory: str | Path, config: ModelConfig):
        assert config.vision is not None
        self.config, self.vision = config, config.vision
        self.processor = Processor.from_directory(directory, config)
        self.encode = lru_cache(1 << 16)(lambda text: tuple(self.processor.tokenizer(text)["input_ids"]))
        self.geometry = lru_cache(256)(lambda h, w, p: patch_geometry(self.vision, np.array([[1, h, w]]), p))

    def batch(self, kind: str, first_seed: int, views: int | None = None, densely: bool = True) -> TrainingBatch:
        """The batch of the samples `first_seed`, `first_seed + 1`, ... of `kind`; `densely` asks more of each."""
        seeds = range(first_seed, first_seed + (views or VIEWS[kind]) // VIEWS_OF[kind])
        samples, drawings = [sample(seed, kind) for seed in seeds], [draw(seed, kind) for seed in seeds]
        exchanges = [
            self._choose(np.random.default_rng([seed, 1]), one, drawing, densely)
            for seed, one, drawing in zip(seeds, samples, drawings, strict=True)
        ]
        return self._batch(kind, samples, drawings, exchanges)

    def _batch(
        self, kind: str, samples: list[Sample], drawings: list[Drawing], chosen: list[dict[str, list[Exchange]]]
    ) -> TrainingBatch:
        views, length = VIEWS_OF[kind] * len(samples), MEDIA_TOKENS[kind]
        rows_of_view = PATCHES[kind] // self.vision.merge_unit
        pixels = np.zeros((views, PATCHES[kind], self.vision.patch_dim), np.uint8)
        geometry = [self.geometry(2, 2, PATCHES[kind])] * views
        seen = np.full((views, rows_of_view, len(CLASSES)), UNKNOWN, np.int32)
        ids = np.zeros((len(samples), length), np.int32)
        index = np.full((len(samples), length), -1, np.int32)
        lengths = np.zeros(len(samples), np.int32)
        images, videos = [], []
        for i, (one, drawing) in enumerate(zip(samples, drawings, strict=True)):
            patches, grids, tokens = self._media(one)
            scenes = scenes_of(drawing)
            (videos if one.video else images).extend(grids)
            place = i * VIEWS_OF[kind]
            visual = []
            for view, part in enumerate(patches, place):
                pixels[view, : len(part)] = part
                height, width = _grid_of(grids, view - place)
                geometry[view] = self.geometry(height, width, PATCHES[kind])
                count = len(part) // self.vision.merge_unit
                visual.append(view * rows_of_view + np.arange(count))
                seen[view, :count] = seen_in(scenes[view - place], height // 2, width // 2)
            lengths[i] = len(tokens)
            ids[i, : len(tokens)] = tokens
            is_visual = (ids[i] == self.config.image_token_id) | (ids[i] == self.config.video_token_id)
            index[i, is_visual] = np.concatenate(visual)
        mask = (np.arange(length) < lengths[:, None]).astype(np.int32)
        image_grid, video_grid = (np.array(found, np.int64) if found else None for found in (images, videos))
        positions, deltas = rope_positions(ids, mask, image_grid, video_grid, self.config)
        fields = ("coordinates", "position_index", "position_weight", "segment_start", "segment_stop")
        stacked = PatchGeometry(*(np.stack([getattr(g, name) for g in geometry]) for name in fields))
        rows = {
            name: self._rows(shape, shape.count[kind], [c[name] for c in chosen])
            for name, shape in ROWS.items()
            if shape.count[kind]
        }
        flat = seen.reshape(-1, len(CLASSES))
        return TrainingBatch(kind, pixels, stacked, ids, positions, lengths, lengths + deltas, index, flat, rows)

    def _media(self, one: Sample) -> tuple[list[np.ndarray], list[tuple[int, int, int]], list[int]]:
        """(patches of each view as bytes, grids, tokens up to where the question starts)."""
        if one.video:
            settings = self.processor.video_settings
            video = load_video(one.video, settings, VideoOptions(fps=FRAMES_PER_SECOND))
            steps, height, width = len(video.frames) // 2 + len(video.frames) % 2, *video.frames.shape[1:3]
            grid = steps, height // settings.patch_size, width // settings.patch_size
            patches = np.split(_bytes(video.frames, settings), steps)
            text, pad = "<|video_pad|>", self.config.video_token_id
            pieces = [
                f"<{t:.1f} seconds><|vision_start|>{text}<|vision_end|>"
                for t in video.timestamps(settings.temporal_patch_size)
            ]
            inside, grids = f"<|vision_start|>{''.join(pieces)}<|vision_end|>", [grid]
        else:
            settings, patches, grids = self.processor.image_settings, [], []
            for image in one.images:
                size = smart_resize(
                    image.height, image.width, settings.factor, settings.min_pixels, settings.max_pixels
                )
                frame = resize(image.convert("RGB"), *size, settings.resample)
                patches.append(_bytes(frame[None], settings))
                grids.append((1, size[0] // settings.patch_size, size[1] // settings.patch_size))
            inside, pad = "<|vision_start|><|image_pad|><|vision_end|>" * len(one.images), self.config.image_token_id
        counts = iter(len(part) // self.vision.merge_unit for part in patches)
        tokens: list[int] = []
        for token in self.encode(f"<|im_start|>user\n{inside}"):
            tokens += [token] * (next(counts) if token == pad else 1)
        return patches, grids, tokens

    def _choose(
        self, rng: np.random.Generator, one: Sample, drawing: Drawing, densely: bool
    ) -> dict[str, list[Exchange]]:
        """The sample's exchanges by group in random order, those of the families that are learned last first."""
        found = {_about(exchange): exchange for exchange in one.exchanges}
        for exchange in ask_more(rng, drawing) if densely else ():
            found.setdefault(_about(exchange), exchange)
        order = [list(found.values())[i] for i in rng.permutation(len(found))]
        order.sort(key=lambda exchange: exchange.family not in LAST)
        groups: dict[str, list[Exchange]] = {"long": [], "short": []}
        for exchange in order:
            groups["long" if exchange.family in ("describe", "pair_describe") else "short"].append(exchange)
        return groups

    def _rows(self, shape: RowShape, count: int, chosen: list[list[Exchange]]) -> Rows:
        size = len(chosen) * count
        ids = np.zeros((size, shape.length), np.int32)
        at = np.zeros((size, shape.answer), np.int32)
        targets = np.full((size, shape.answer), -1, np.int32)
        families = [""] * size
        for i, exchanges in enumerate(chosen):
            for row, exchange in enumerate(exchanges[:count], i * count):
                question = self.encode(f"{exchange.question}<|im_end|>\n<|im_start|>assistant\n")
                answer = self.encode(f"{exchange.answer}<|im_end|>")
                tokens = [*question, *answer[:-1]]
                ids[row, : len(tokens)] = tokens
                at[row] = np.minimum(len(question) - 1 + np.arange(shape.answer), shape.length - 1)
                targets[row, : len(answer)] = answer
                families[row] = exchange.family
        return Rows(ids, at, targets, families)


def _about(exchange: Exchange) -> tuple[str, str]:
    """What two wordings of one question have in common."""
    if exchange.family in ("describe", "number", "count", "count_kind", "pair_changed", "clip_event"):
        return exchange.family, ""
    return exchange.family, exchange.answer if "color" in exchange.family else exchange.question


def _bytes(frames: np.ndarray, settings: ImageSettings) -> np.ndarray:
    """The patches of `frames` before normalisation, uint8 [P, C*Tp*p*p]."""
    return patchify(frames, BYTES, settings).astype(np.uint8)


def _grid_of(grids: list[tuple[int, int, int]], view: int) -> tuple[int, int]:
    """Height and width in patches of a sample's view: its images', or those of all temporal patches of its clip."""
    _, height, width = grids[min(view, len(grids) - 1)]
    return height, width
