"""The timeline of one answer: what was done for it, when, and on which node, from the times that its request noted."""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from deepstack_jax.config import ModelConfig
from deepstack_jax.disagg.language.fetch import Fetch, KnownPrompt
from deepstack_jax.engine.request import Image
from deepstack_jax.engine.request import Request as EngineRequest

StageName = Literal["prepare", "queue", "encode", "transfer", "prefill", "decode"]


@dataclass(frozen=True)
class Span:
    """One stage between two times of time.monotonic().

    Attributes:
        encoder: number of the encode node, None for the node that answers.
        bytes: on the wire.
        tokens: of the prompt, of visual rows or of the answer.
    """

    stage: StageName
    label: str
    begin: float
    end: float
    encoder: int | None = None
    bytes: int | None = None
    tokens: int | None = None


def image_names(config: ModelConfig, request: EngineRequest) -> dict[int, str]:
    """What each image and video of a prompt is called, by its first visual row; call it before any is encoded."""
    return dict(_named(config, request, request.images))


def _named(config: ModelConfig, request: EngineRequest, images: Iterable[Image]) -> Iterable[tuple[int, str]]:
    counts = {"image": 0, "video": 0}
    for image in images:
        kind = "video" if request.input_ids[image.first_token] == config.video_token_id else "image"
        counts[kind] += 1
        yield image.first_row, f"{kind} {counts[kind]}"


def local_spans(request: EngineRequest, names: Mapping[int, str], began: float) -> tuple[Span, ...]:
    """The spans of a prompt that this node prepared from `began` on."""
    prepare = Span("prepare", "read, decode, tokenize", began, request.submitted, tokens=request.length)
    return (prepare, *_engine_spans(request, names))


def split_spans(request: EngineRequest, prompt: KnownPrompt, fetch: Fetch, began: float) -> tuple[Span, ...]:
    """The spans of a prompt whose rows encode nodes send; `began` is when it was sent to one."""
    spans = [Span("prepare", "send the request", began, fetch.prepared.start if fetch.prepared else began)]
    if (prepared := fetch.prepared) is not None:
        how = "decode, tokenize"
        spans.append(Span("prepare", how, prepared.start, prepared.end, prepared.encoder, tokens=request.length))
    single = len(fetch.encoded) == len(prompt.images)
    for number, each in enumerate(fetch.encoded, 1):
        label = f"image {number}" if single else "images"
        rows = sum(prompt.blocks[block].rows for block in each.blocks if block in prompt.blocks)
        spans.append(Span("encode", label, each.start, each.end, each.encoder, tokens=rows))
    for number, each in enumerate(fetch.rounds, 1):
        rows = sum(prompt.blocks[block].rows for block in each.blocks if block in prompt.blocks)
        spans.append(Span("transfer", f"round {number}", each.start, each.end, each.encoder, each.num_bytes, rows))
    return (*spans, *_engine_spans(request, {}))


def _engine_spans(request: EngineRequest, names: Mapping[int, str]) -> Iterable[Span]:
    yield Span("queue", "wait for a slot", request.submitted, request.admitted_at)
    for stage in request.stages or ():
        stop = stage.first + stage.count
        label = names.get(stage.first, "image") if stage.kind == "encode" else f"tokens {stage.first} to {stop}"
        yield Span(stage.kind, label, stage.begin, stage.end, tokens=stage.count)
    if request.made > 1:
        yield Span("decode", "tokens", request.first_token_at, request.last_token_at, tokens=request.made - 1)


def timeline_fields(
    choices: Mapping[int, Sequence[Span]], role: str, arrived: float, usage: Mapping[str, Any]
) -> dict[str, Any]:
    """The timeline of an answer as it is sent, up to now.

    Args:
        choices: the spans of each choice, by number.
        role: of the node that answers.
        arrived: when the request's head had arrived; all times are counted from it.
        usage: OpenAI's.
    """
    now, spans = time.monotonic(), [span for number, own in choices.items() for span in _of_choice(number, own)]
    spans.append(Span("prepare", "read the request", arrived, min((span.begin for span in spans), default=now)))
    encoders = sorted({span.encoder for span in spans if span.encoder is not None})
    decoded = [span for span in spans if span.stage == "decode"]
    seconds, made = sum(span.end - span.begin for span in decoded), sum(span.tokens or 0 for span in decoded)
    return {
        "total_ms": _ms(now - arrived),
        "prompt_tokens": usage["prompt_tokens"],
        "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
        "completion_tokens": usage["completion_tokens"],
        "tokens_per_second": round(made / seconds, 3) if seconds > 0 else None,
        "bytes_on_wire": sum(span.bytes or 0 for span in spans),
        "split": bool(encoders),
        "nodes": [
            {"name": role, "role": role},
            *({"name": f"encoder {number}", "role": "encode"} for number in encoders),
        ],
        "spans": [
            {
                "stage": span.stage,
                "label": span.label,
                "node": 0 if span.encoder is None else 1 + encoders.index(span.encoder),
                "begin_ms": _ms(span.begin - arrived),
                "end_ms": _ms(max(span.end, span.begin) - arrived),
                "bytes": span.bytes,
                "tokens": span.tokens,
            }
            for span in sorted(spans, key=lambda span: span.begin)
        ],
    }


def _of_choice(number: int, spans: Sequence[Span]) -> Iterable[Span]:
    """The spans of a choice; those after the first have its number in their labels."""
    return (replace(span, label=f"{span.label}, choice {number + 1}") if number else span for span in spans)


def _ms(seconds: float) -> float:
    return round(max(seconds, 0.0) * 1000, 3)
