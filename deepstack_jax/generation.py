"""Answers from prompts: `forward`, `generate` and its streaming form."""

import reprlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from deepstack_jax.checkpoint import Model
from deepstack_jax.config import ModelConfig
from deepstack_jax.models.vision import VisualRows
from deepstack_jax.processing.batch import Batch, VisionInput, bucket, prepare_batch
from deepstack_jax.processing.images import ImageSource
from deepstack_jax.processing.processor import UserPrompt
from deepstack_jax.processing.videos import VideoSource
from deepstack_jax.programs import PromptArrays, all_logits, decode_loop, encode_vision, prefill, write_rows
from deepstack_jax.sampling import SamplingParams
from deepstack_jax.sampling_options import SamplingOptions

ENCODE_TOGETHER = 4  # images that one run of the encoder takes at most


@dataclass
class GenerateOutput:
    """Answers of B prompts."""

    tokens: np.ndarray  # int32 [B, max_new_tokens], filled up with the pad token
    lengths: np.ndarray  # int32 [B]: tokens of each answer, its end token included
    timings: dict[str, float] = field(default_factory=dict)  # seconds of encode, prefill, decode


def prepare(
    model: Model,
    messages_or_prompt: UserPrompt | Sequence[UserPrompt],
    images: Sequence[ImageSource] = (),
    videos: Sequence[VideoSource] = (),
    **options: Any,
) -> dict[str, Any]:
    """Arrays for `forward` and `generate`, with the names of a Hugging Face processor's output.

    Args:
        messages_or_prompt: a question; a conversation (messages with roles and content); or a list of either, which
            makes a batch padded on the left. A text that already has chat or vision markers is taken as it is.
        images: paths, URLs, data URIs, PIL images or arrays, in the order of the prompts' image placeholders.
        videos: paths, or arrays and lists of frames.
        options: `tools`, `chat_template_kwargs` and `enable_thinking` for the chat template; `min_pixels` and
            `max_pixels` of every image, `fps`, `num_frames`, `min_frames`, `max_frames` and `do_sample_frames` of every
            video, all with transformers' meaning, where the part of a message doesn't say otherwise; `images_kwargs`
            and `videos_kwargs` with the same and more (`ImageOptions`, `VideoOptions`).

    Raises:
        ValueError: what can't be read, placeholders that don't match the images and videos given, and options that
            don't exist or are out of their range.
    """
    return model.processor.prepare(messages_or_prompt, images=images, videos=videos, **options)


def decode(model: Model, out: GenerateOutput) -> list[str]:
    """The text of each answer, special tokens left out."""
    return model.processor.decode(out.tokens, out.lengths)


def forward(
    model: Model,
    input_ids: ArrayLike,
    attention_mask: ArrayLike | None = None,
    pixel_values: ArrayLike | None = None,
    image_grid_thw: ArrayLike | None = None,
    pixel_values_videos: ArrayLike | None = None,
    video_grid_thw: ArrayLike | None = None,
    mm_token_type_ids: ArrayLike | None = None,
) -> jax.Array:
    """float32 logits [B, T, V]; unspecified where attention_mask is 0.

    Args:
        model: what `load` returned.
        input_ids: int [B, T].
        attention_mask: int or bool [B, T], 0 for padding on either side; all ones by default.
        pixel_values, pixel_values_videos: float [P, C*Tp*p*p], the patches of all images, of all videos.
        image_grid_thw, video_grid_thw: int [n, 3], the grid of each in patches (time, height, width).
        mm_token_type_ids: taken so that a processor's whole output can be passed; input_ids say as much.

    Raises:
        ValueError: arrays that don't fit the model or each other.
    """
    del mm_token_type_ids
    visuals = pixel_values, image_grid_thw, pixel_values_videos, video_grid_thw
    batch = prepare_batch(model.config, input_ids, attention_mask, *visuals)
    compact = np.asarray(all_logits(model.config, model.text_params, encode_prompt(model, batch)))
    length = np.shape(input_ids)[-1]
    logits = np.zeros((len(batch.token_columns), length, compact.shape[-1]), np.float32)
    for row, where in enumerate(batch.token_columns):
        logits[row, where] = compact[row, : len(where)]
    return jnp.asarray(logits)


def generate(
    model: Model,
    input_ids: ArrayLike,
    attention_mask: ArrayLike | None = None,
    pixel_values: ArrayLike | None = None,
    image_grid_thw: ArrayLike | None = None,
    pixel_values_videos: ArrayLike | None = None,
    video_grid_thw: ArrayLike | None = None,
    mm_token_type_ids: ArrayLike | None = None,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    seed: int | Sequence[int] = 0,
    eos_token_id: int | Sequence[int] | None = None,
    sampling: SamplingOptions | None = None,
) -> GenerateOutput:
    """Answers prompts; the arrays are those of `forward`. A row's answer depends on nothing else of its batch.

    Args:
        max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, seed, eos_token_id: as
            `SamplingOptions` says.
        sampling: all of them together, in place of the single ones.

    Raises:
        ValueError: arrays that don't fit, an option out of its range, or single options beside `sampling`.
    """
    del mm_token_type_ids
    options = SamplingOptions(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        seed=seed,
        eos_token_id=eos_token_id,
    )
    options = _one_of(sampling, options)
    started = time.perf_counter()
    timings: dict[str, float] = {}

    def lap(stage: str, result: object) -> None:
        nonlocal started
        jax.block_until_ready(result)
        timings[stage] = time.perf_counter() - started
        started = time.perf_counter()

    visuals = pixel_values, image_grid_thw, pixel_values_videos, video_grid_thw
    batch = prepare_batch(model.config, input_ids, attention_mask, *visuals)
    plan = plan_generation(model, batch, options)
    lap("prepare", None)
    prompt = encode_prompt(model, batch)
    lap("encode", prompt.rows)
    state = prefill(model.config, plan.capacity, model.text_params, prompt, plan.sampling)
    lap("prefill", state)
    state = decode_loop(model.config, model.text_params, state, plan.sampling, np.int32(plan.max_new_tokens))
    lap("decode", state)
    return GenerateOutput(np.asarray(state.tokens)[:, : plan.max_new_tokens], np.asarray(state.lengths), timings)


def stream(
    model: Model,
    inputs: Mapping[str, ArrayLike] | None = None,
    *,
    sampling: SamplingOptions | None = None,
    **named: Any,
) -> Iterator[np.ndarray]:
    """`generate` token by token: yields int32 [B], -1 for rows that have ended.

    It takes the arrays and the options of `generate` by name, or the arrays in one mapping: `stream(model, **inputs)`
    or `stream(model, inputs)`. It runs the programs of `generate` and yields the tokens that it returns.

    Raises:
        ValueError: as `generate`, before the first token is asked for.
    """
    names = [field.name for field in fields(SamplingOptions)]
    options = _one_of(sampling, SamplingOptions(**{name: named.pop(name) for name in names if name in named}))
    batch = prepare_batch(model.config, **(inputs or {}), **named)
    plan = plan_generation(model, batch, options)

    def tokens() -> Iterator[np.ndarray]:
        for piece in generate_steps(model, encode_prompt(model, batch), plan):
            yield piece[:, 0]

    return tokens()


def _one_of(sampling: SamplingOptions | None, single: SamplingOptions) -> SamplingOptions:
    """`sampling`, or else the options that were given one by one."""
    if sampling is None:
        return single
    if not isinstance(sampling, SamplingOptions):
        raise TypeError(f"sampling {reprlib.repr(sampling)} is not supported: give SamplingOptions")
    if single != SamplingOptions():
        both = [field.name for field in fields(single) if getattr(single, field.name) != field.default]
        raise ValueError(f"{both[0]} and sampling: both given, give one of them")
    return sampling


@dataclass(frozen=True)
class GenerationPlan:
    """How a prompt is answered, checked against the model: what the compiled programs take beside the prompt."""

    sampling: SamplingParams
    capacity: int  # slots of the cache, a row
    max_new_tokens: int


def plan_generation(model: Model, prompt: Batch | PromptArrays, options: SamplingOptions) -> GenerationPlan:
    """Checks the options against the model and a prompt, before any work on the device.

    Raises:
        ValueError: a number of seeds that is not the prompt's rows, or a prompt and an answer that exceed the model's
            positions.
    """
    named = options.eos_token_id
    ends = model.eos_token_ids if named is None else (named,) if isinstance(named, int) else named
    rows = len(np.asarray(prompt.lengths))
    sampling = SamplingParams.of(rows, options, end_token_ids=ends, pad_token_id=model.pad_token_id)
    return GenerationPlan(sampling, _capacity(model, prompt, options.max_new_tokens), options.max_new_tokens)


def generate_steps(
    model: Model, prompt: PromptArrays, plan: GenerationPlan, step: Callable[[], int] = lambda: 1
) -> Iterator[np.ndarray]:
    """The tokens of `generate` in pieces: yields int32 [B, n], -1 for rows that have ended.

    `step` says before each run of the decode program how many tokens it makes; the first piece is one token. The
    pieces together don't depend on it.
    """
    state = prefill(model.config, plan.capacity, model.text_params, prompt, plan.sampling)
    made, tokens = 1, np.array(state.last)[:, None]
    while True:
        yield tokens
        # copies, here and above: the state is donated to the next run, and on CPU an array's view is its buffer
        if made == plan.max_new_tokens or np.array(state.done).all():
            return
        until = min(made + max(step(), 1), plan.max_new_tokens)
        state = decode_loop(model.config, model.text_params, state, plan.sampling, np.int32(until))
        columns = np.arange(made, made := int(state.step))  # fewer than asked for where all rows have ended
        tokens = np.where(columns < np.array(state.lengths)[:, None], np.array(state.tokens)[:, columns], -1)


def encode_images(model: Model, visuals: Sequence[VisionInput]) -> list[jax.Array]:
    """Rows [bucket of m, (1+N)*D] of each image and video; those of one bucket run together, up to ENCODE_TOGETHER.

    The number that runs together is a power of two, so that programs stay few; no image's bits depend on it.
    """
    rows: dict[int, jax.Array] = {}
    waiting: dict[int, list[int]] = {}
    for i, visual in enumerate(visuals):
        waiting.setdefault(len(visual.pixel_values), []).append(i)
    for numbers in waiting.values():
        while numbers:
            size = min(ENCODE_TOGETHER, 1 << (len(numbers).bit_length() - 1))
            group, numbers[:] = numbers[:size], numbers[size:]
            items = [(visuals[i].pixel_values, visuals[i].geometry) for i in group]
            # one alone needs no copy of its pixels
            stacked = jax.tree.map(lambda *arrays: np.stack(arrays) if arrays[1:] else arrays[0][None], *items)
            rows |= zip(group, encode_vision(model.config, model.vision_params, *stacked), strict=True)
    return [rows[i] for i in range(len(visuals))]


def encode_rows(model: Model, batch: Batch) -> VisualRows | None:
    """The visual rows of a batch, a bucket of them, or None where it has no image and no video."""
    if not batch.visuals:
        return None
    return concat_rows(model.config, encode_images(model, batch.visuals), batch.visuals)


def concat_rows(config: ModelConfig, parts: Sequence[jax.Array], visuals: Sequence[VisionInput]) -> VisualRows:
    """The rows of one image after another, filled up with zeros to a bucket."""
    height = bucket(sum(visual.num_rows for visual in visuals))
    width, levels = config.text.hidden_size, config.num_deepstack_levels
    widths = (width, levels * width) if levels else (width,)
    rows = VisualRows(*(jnp.zeros((height, each), parts[0].dtype) for each in widths))
    first = 0
    for part, visual in zip(parts, visuals, strict=True):
        rows = write_rows(config, rows, part, np.int32(first), np.int32(visual.num_rows))
        first += visual.num_rows
    return rows


def encode_prompt(model: Model, batch: Batch) -> PromptArrays:
    """What the prefill program takes, the visual rows encoded."""
    rows = encode_rows(model, batch)
    return PromptArrays(batch.input_ids, batch.position_ids, batch.lengths, batch.rope_deltas, batch.visual_index, rows)


def _capacity(model: Model, prompt: Batch | PromptArrays, max_new_tokens: int) -> int:
    """Slots a row: a function of the prompt's bucket and of max_new_tokens, so that prompts share programs."""
    longest, limit = int(np.max(prompt.lengths)), model.config.text.max_position_embeddings
    if longest + max_new_tokens > limit:
        raise ValueError(
            f"{longest} prompt tokens and max_new_tokens {max_new_tokens} exceed the model's {limit} positions: "
            f"shorten the prompt or ask for at most {max(limit - longest, 0)}"
        )
    return bucket(np.shape(prompt.input_ids)[1] + max_new_tokens)
