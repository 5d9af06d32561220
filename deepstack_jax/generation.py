"""Answers prompts: `forward`, `generate` and `stream`. The last two create an engine for the duration of a call."""

import reprlib
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from deepstack_jax import sharding
from deepstack_jax.checkpoint import Model
from deepstack_jax.encoding import checked_scales, encode_images, encode_rows
from deepstack_jax.engine.core import Engine, Failed, NewTokens
from deepstack_jax.engine.options import default_chunk
from deepstack_jax.engine.request import GenerationPlan, Request
from deepstack_jax.engine.shape import EngineShape, default_tail_rows
from deepstack_jax.processing.batch import Batch, bucket, prepare_batch
from deepstack_jax.processing.images import ImageSource
from deepstack_jax.processing.processor import UserPrompt
from deepstack_jax.processing.videos import VideoSource
from deepstack_jax.programs import DECODE_BUFFER, PromptArrays, all_logits
from deepstack_jax.rounding import cdiv
from deepstack_jax.sampling import SamplingParams
from deepstack_jax.sampling_options import SamplingOptions

WIDTHS = (1, 2, 4, 8, 16, 32, 64)  # default numbers of rows of the decode program
SHARED_TOKENS = 1024  # of a prefill program that short prompts of a batch share, which then reads the weights once


@dataclass
class GenerateOutput:
    """The answers to B prompts."""

    tokens: np.ndarray  # int32 [B, max_new_tokens], padded with the pad token
    lengths: np.ndarray  # int32 [B]: tokens per answer, including its end token
    timings: dict[str, float] = field(default_factory=dict)  # seconds of encode, prefill, decode
    # with top_logprobs k: of each token, and of the k likeliest in its place; -inf and -1 after an answer's end
    logprobs: np.ndarray | None = None  # float32 [B, max_new_tokens]
    top_token_ids: np.ndarray | None = None  # int32 [B, max_new_tokens, k]
    top_logprobs: np.ndarray | None = None  # float32 [B, max_new_tokens, k]


def prepare(
    model: Model,
    messages_or_prompt: UserPrompt | Sequence[UserPrompt],
    images: Sequence[ImageSource] = (),
    videos: Sequence[VideoSource] = (),
    **options: Any,
) -> dict[str, Any]:
    """Returns arrays for `forward` and `generate`, with the names of a Hugging Face processor's output.

    Args:
        messages_or_prompt: a question; a conversation (messages with roles and content); or a list of either, which
            makes a batch padded on the left. A text that already has chat or vision markers is used verbatim.
        images: paths, URLs, data URIs, PIL images or arrays, in the order of the prompts' image placeholders.
        videos: paths, URLs, data URIs, or arrays and lists of frames.
        options: `tools`, `chat_template_kwargs` and `enable_thinking` for the chat template; `min_pixels` and
            `max_pixels` for images; `fps`, `num_frames`, `min_frames`, `max_frames` and `do_sample_frames` for videos;
            `images_kwargs` and `videos_kwargs` with the same and more (`ImageOptions`, `VideoOptions`). The meanings
            are those of transformers, and the part of a message overrides them.

    Returns:
        A dictionary of the arrays that `Processor.prepare` describes.

    Raises:
        ValueError: an input can't be read, the placeholders don't match the images and videos, or an option does not
            exist or is out of range.
    """
    return model.processor.prepare(messages_or_prompt, images=images, videos=videos, **options)


def decode(model: Model, out: GenerateOutput) -> list[str]:
    """Returns the text of each answer, without special tokens."""
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
    deepstack_scales: Sequence[float] | None = None,
) -> jax.Array:
    """Returns float32 logits [B, T, V], which are unspecified where attention_mask is 0.

    Args:
        model: a model from `load`.
        input_ids: int [B, T].
        attention_mask: int or bool [B, T], 0 for padding on either side; all ones by default.
        pixel_values, pixel_values_videos: float [P, C*Tp*p*p], the patches of all images and of all videos.
        image_grid_thw, video_grid_thw: int [n, 3], the grid of each in patches (time, height, width).
        mm_token_type_ids: ignored; it is accepted so that the whole output of a processor can be passed.
        deepstack_scales: N factors of the DeepStack levels: 1 leaves a level as it is, 0 leaves it out.

    Raises:
        ValueError: the arrays don't fit the model or each other, or there are other than N scales.
    """
    del mm_token_type_ids
    visuals = pixel_values, image_grid_thw, pixel_values_videos, video_grid_thw
    batch = prepare_batch(model.config, input_ids, attention_mask, *visuals)
    compact = np.asarray(
        all_logits(
            model.config, model.text_params, encode_prompt(model, batch, checked_scales(model.config, deepstack_scales))
        )
    )
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
    frequency_penalty: float = 0.0,
    seed: int | Sequence[int] = 0,
    eos_token_id: int | Sequence[int] | None = None,
    min_tokens: int = 0,
    logit_bias: Mapping[int, float] | None = None,
    top_logprobs: int | None = None,
    sampling: SamplingOptions | None = None,
    slots: int | None = None,
    chunk: int | None = None,
    deepstack_scales: Sequence[float] | None = None,
) -> GenerateOutput:
    """Answers prompts; the arrays are those of `forward`. A row's answer doesn't depend on the other rows of its batch.

    Args:
        max_new_tokens, temperature, top_k, top_p, min_p, seed, eos_token_id: see `SamplingOptions`.
        repetition_penalty, presence_penalty, frequency_penalty: see `SamplingOptions`.
        min_tokens, logit_bias, top_logprobs: see `SamplingOptions`.
        sampling: all of these options together, instead of single ones.
        slots: the number of rows of the decode program. Bits depend on it: with a server's number, they equal the
            server's. None takes the smallest of 1, 2, 4, ... 64 that holds the prompts; more than 64 take turns.
        chunk: the tokens of a prefill chunk, a multiple of 128, on which bits depend in the same way. None takes a
            server's default.
        deepstack_scales: as for `forward`, for all prompts.

    Raises:
        ValueError: the arrays don't fit, an option or a size is out of range, or single options are given beside
            `sampling`.
        TypeError: `sampling` is not a `SamplingOptions`.
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
        frequency_penalty=frequency_penalty,
        seed=seed,
        eos_token_id=eos_token_id,
        min_tokens=min_tokens,
        logit_bias=logit_bias,
        top_logprobs=top_logprobs,
    )
    options = _one_of(sampling, options)
    visuals = pixel_values, image_grid_thw, pixel_values_videos, video_grid_thw
    batch = prepare_batch(model.config, input_ids, attention_mask, *visuals)
    requests = _requests(model, batch, options, deepstack_scales)
    tokens = np.full((len(requests), options.max_new_tokens), model.pad_token_id, np.int32)
    lengths = np.zeros(len(requests), np.int32)
    engine = engine_for(model, requests, slots, chunk)
    likeliest = *tokens.shape, options.top_logprobs or 0
    top_ids, top_values = np.full(likeliest, -1, np.int32), np.full(likeliest, -np.inf, np.float32)
    logprobs = np.full(tokens.shape, -np.inf, np.float32)
    for row, event in _run(engine, requests):
        end = lengths[row] + len(event.tokens)
        tokens[row, lengths[row] : end] = event.tokens
        for place, (logprob, top) in enumerate(event.logprobs, lengths[row]):
            logprobs[row, place] = logprob
            if top:
                top_ids[row, place], top_values[row, place] = zip(*top, strict=True)
        lengths[row] = end
    wanted = () if options.top_logprobs is None else (logprobs, top_ids, top_values)
    return GenerateOutput(tokens, lengths, _timings(engine, requests), *wanted)


def stream(
    model: Model,
    inputs: Mapping[str, ArrayLike] | None = None,
    *,
    sampling: SamplingOptions | None = None,
    slots: int | None = None,
    chunk: int | None = None,
    deepstack_scales: Sequence[float] | None = None,
    **named: Any,
) -> Iterator[np.ndarray]:
    """Runs `generate` token by token: yields int32 [B], -1 for rows that have ended.

    It takes the arrays and options of `generate` by name, or the arrays in one mapping: `stream(model, **inputs)` or
    `stream(model, inputs)`. It runs the same programs as `generate` and yields the same tokens.

    Raises:
        ValueError, TypeError: as in `generate`, at the call rather than at the first token; also for top_logprobs.
    """
    names = [field.name for field in fields(SamplingOptions)]
    options = _one_of(sampling, SamplingOptions(**{name: named.pop(name) for name in names if name in named}))
    if options.top_logprobs is not None:
        raise ValueError(f"top_logprobs {options.top_logprobs}: a stream yields tokens only: take generate")
    batch = prepare_batch(model.config, **(inputs or {}), **named)
    requests = _requests(model, batch, options, deepstack_scales)

    def tokens() -> Iterator[np.ndarray]:
        waiting: list[deque[int]] = [deque() for _ in requests]
        ended = [False] * len(requests)
        for row, event in _run(engine_for(model, requests, slots, chunk, decode_steps=1), requests):
            waiting[row].extend(event.tokens)
            ended[row] = event.finish_reason is not None
            while any(waiting) and all(queue or end for queue, end in zip(waiting, ended, strict=True)):
                yield np.array([queue.popleft() if queue else -1 for queue in waiting], np.int32)

    return tokens()


def _requests(
    model: Model, batch: Batch, options: SamplingOptions, deepstack_scales: Sequence[float] | None
) -> list[Request]:
    plan, scales = plan_generation(model, batch, options), checked_scales(model.config, deepstack_scales)
    return [Request.of_row(batch, plan, row, deepstack_scales=scales) for row in range(len(batch.lengths))]


def _run(engine: Engine, requests: Sequence[Request]) -> Iterator[tuple[int, NewTokens]]:
    """Yields (row, new tokens) until all answers are complete."""
    rows = {id(request): row for row, request in enumerate(requests)}
    for event in engine.run():
        if isinstance(event, Failed):
            raise event.error
        assert isinstance(event, NewTokens)
        yield rows[id(event.request)], event


def _timings(engine: Engine, requests: Sequence[Request]) -> dict[str, float]:
    """Returns the seconds of encoding, of prefill (until every row has its first token) and of decoding after that."""
    start = min(request.submitted for request in requests)
    first, last = (max(times) for times in zip(*((r.first_token_at, r.last_token_at) for r in requests), strict=True))
    encode = engine.encode_seconds
    return {"encode": encode, "prefill": first - start - encode, "decode": last - first}


def _one_of(sampling: SamplingOptions | None, single: SamplingOptions) -> SamplingOptions:
    """Returns `sampling`, or the options that were given one by one; raises if both are given."""
    if sampling is None:
        return single
    if not isinstance(sampling, SamplingOptions):
        raise TypeError(f"sampling {reprlib.repr(sampling)} is not supported: give SamplingOptions")
    if single != SamplingOptions():
        both = [field.name for field in fields(single) if getattr(single, field.name) != field.default]
        raise ValueError(f"{both[0]} and sampling: both given, give one of them")
    return sampling


def plan_generation(model: Model, prompt: Batch | PromptArrays, options: SamplingOptions) -> GenerationPlan:
    """Checks the options against the model and a prompt, before any work on the device.

    Raises:
        ValueError: the number of seeds differs from the number of rows, prompt and answer exceed the model's
            positions, or logit_bias names tokens that the model doesn't have.
    """
    named = options.eos_token_id
    ends = model.eos_token_ids if named is None else (named,) if isinstance(named, int) else named
    vocabulary, highest = model.config.text.vocab_size, max(options.logit_bias or (0,))
    if highest >= vocabulary:
        raise ValueError(f"logit_bias of token {highest}: the model's tokens are 0 to {vocabulary - 1}")
    rows = len(np.asarray(prompt.lengths))
    sampling = SamplingParams.of(rows, options, end_token_ids=ends, pad_token_id=model.pad_token_id)
    _check_context(model, prompt, options.max_new_tokens)
    return GenerationPlan(sampling, options.max_new_tokens)


def encode_prompt(model: Model, batch: Batch, scales: Sequence[float] = ()) -> PromptArrays:
    """Returns the arrays of a batch, with its visual rows encoded and their DeepStack levels scaled."""
    rows = encode_rows(model, batch, scales)
    return PromptArrays(batch.input_ids, batch.position_ids, batch.lengths, batch.rope_deltas, batch.visual_index, rows)


def engine_for(
    model: Model,
    requests: Sequence[Request],
    slots: int | None = None,
    chunk: int | None = None,
    decode_steps: int = DECODE_BUFFER,
) -> Engine:
    """Returns an engine with room for these requests, all of which are queued, their images encoded.

    Encoding comes first, so that prompts that share a prefill program are ready at the same time.

    Args:
        slots: rows of the decode program; None takes the smallest of `WIDTHS` that holds all requests, or the largest,
            and lets short prompts share prefill programs, which a server's shape does not. On a mesh it is a multiple
            of the size of `data`.
        chunk: tokens of a prefill chunk; None takes a server's default.
        decode_steps: the most tokens per row in one call of the decode program.
    """
    chunk, sizes = default_chunk(model.mesh) if chunk is None else chunk, sharding.sizes(model.mesh)
    tail_rows: tuple[tuple[int, int], ...] = ()  # a server's
    if slots is None:
        slots = next((width for width in WIDTHS if width >= len(requests)), WIDTHS[-1])
        slots = cdiv(slots, sizes[0]) * sizes[0]
        tail_rows = default_tail_rows(chunk, slots // sizes[0], SHARED_TOKENS)
    shape = EngineShape(
        slots, chunk, tail_rows=tail_rows, decode_steps=decode_steps, steps_beside_prefill=0, mesh=sizes
    )
    needed = sorted(shape.pages_of(each.length + each.plan.max_new_tokens - 1) for each in requests)
    ends = max(each.plan.sampling.end_token_ids.shape[1] for each in requests)
    pages = 1 + bucket(sum(needed[-slots // shape.pools :]))  # enough for any share of the requests
    engine = Engine(model, shape, pages, max_waiting=len(requests), prefix_cache=False, end_tokens=ends)
    started = time.monotonic()
    images = [image for request in requests for image in request.images if image.pixels]
    for image, rows in zip(images, encode_images(model, [im.pixels for im in images if im.pixels]), strict=True):
        image.encoded, image.pixels = rows, None
    jax.block_until_ready([image.encoded for image in images])
    engine.encode_seconds = time.monotonic() - started
    for request in requests:
        engine.add(request)
    return engine


def _check_context(model: Model, prompt: Batch | PromptArrays, max_new_tokens: int) -> None:
    longest, limit = int(np.max(prompt.lengths)), model.config.text.max_position_embeddings
    if longest + max_new_tokens > limit:
        raise ValueError(
            f"{longest} prompt tokens and max_new_tokens {max_new_tokens} exceed the model's {limit} positions: "
            f"shorten the prompt or ask for at most {max(limit - longest, 0)}"
        )
