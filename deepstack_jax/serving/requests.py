"""The body of `POST /generate`: it has the shape of SGLang's native API and is checked field by field."""

import asyncio
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from deepstack_jax.errors import one_line
from deepstack_jax.processing.messages import parse_messages, short
from deepstack_jax.processing.prompt_options import MEDIA_OPTIONS, PromptOptions
from deepstack_jax.processing.stop_strings import StopStrings
from deepstack_jax.sampling_options import SamplingOptionError, SamplingOptions
from deepstack_jax.serving.media import admit
from deepstack_jax.serving.policy import Budget, MediaPolicy

MAX_TOOLS = 256
_WHOLE = 2**31 - 1  # what the programs' int32 holds

# Fields of SGLang's API that are not supported, and the values with which they ask for nothing.
_NEUTRAL: dict[str, Sequence[Any]] = {
    "audio_data": ("", []),
    "input_ids": (),
    "input_embeds": (),
    "lora_path": ("",),
    "log_metrics": (True, False),
    "logprob_start_len": (-1,),
    "modalities": (["image"], ["video"], ["multi-images"]),
    "return_hidden_states": (False,),
    "return_logprob": (False,),
    "return_text_in_logprobs": (True, False),
    "session_params": ({},),
    "custom_logit_processor": ("",),
    "token_ids_logprob": ([],),
    "top_logprobs_num": (0,),
}
_NEUTRAL_SAMPLING: dict[str, Sequence[Any]] = {
    "custom_params": ({},),
    "ebnf": ("",),
    "json_schema": ("",),
    "logit_bias": ({},),
    "min_new_tokens": (0,),
    "n": (1,),
    "no_stop_trim": (False,),
    "regex": ("",),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "stop_regex": ("", []),
    "stream_interval": (1,),
    "structural_tag": ("",),
}
# other names of fields: those of the published design's example and their plurals; SGLang's later name of the seed
_OTHER_NAMES = {
    "image": "image_data",
    "images": "image_data",
    "video": "video_data",
    "videos": "video_data",
    "max_tokens": "max_new_tokens",
}
_OTHER_SAMPLING_NAMES = {"sampling_seed": "seed"}


class RequestError(Exception):
    """A request that is answered with an error: an HTTP status and OpenAI's error fields. The message is one line."""

    def __init__(
        self,
        message: str,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        kind: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.kind = kind or ("invalid_request_error" if status < 500 else "server_error")
        self.param, self.code, self.headers = param, code, headers or {}


class SamplingFields(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`sampling_params`: `SamplingOptions`, which knows the ranges, and SGLang's ways to name ends."""

    max_new_tokens: Annotated[int, Meta(le=_WHOLE)] = SamplingOptions.max_new_tokens
    temperature: float = SamplingOptions.temperature
    top_k: Annotated[int, Meta(le=_WHOLE)] = SamplingOptions.top_k
    top_p: float = SamplingOptions.top_p
    min_p: float = SamplingOptions.min_p
    repetition_penalty: float = SamplingOptions.repetition_penalty
    presence_penalty: float = SamplingOptions.presence_penalty
    frequency_penalty: float = SamplingOptions.frequency_penalty
    seed: int = 0
    stop: str | list[str] = []
    stop_token_ids: Annotated[list[Annotated[int, Meta(ge=0, le=_WHOLE)]], Meta(max_length=16)] = []
    ignore_eos: bool = False

    def options(self, eos_token_ids: tuple[int, ...] = ()) -> SamplingOptions:
        """The options of an answer, for a model with these end tokens. Stop strings are not among them.

        Raises:
            SamplingOptionError: one is out of its range.
        """
        ends = [*(() if self.ignore_eos else eos_token_ids), *self.stop_token_ids]
        taken = {name: getattr(self, name) for name in self.__struct_fields__ if hasattr(SamplingOptions, name)}
        return SamplingOptions(**taken, eos_token_id=ends)


class GenerateRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of `POST /generate`. Messages are checked by `parse_messages`, media and their options when admitted."""

    text: str | None = None
    messages: list[Any] | None = None
    image_data: str | list[str] = []
    video_data: str | list[str | list[str]] = []
    tools: Annotated[list[dict[str, Any]], Meta(max_length=MAX_TOOLS)] = []
    chat_template_kwargs: dict[str, Any] = {}
    enable_thinking: bool | None = None
    mm_processor_kwargs: dict[str, Any] = {}
    sampling_params: SamplingFields = SamplingFields()
    stream: bool = False
    stream_deltas: bool = False
    rid: Annotated[str, Meta(max_length=128)] = ""

    def prompt_options(self) -> dict[str, Any]:
        """The keyword arguments of `processor.prepare`."""
        named = {name: getattr(self, name) for name in ("tools", "chat_template_kwargs", "enable_thinking")}
        return {name: value for name, value in named.items() if value or value is False} | self.mm_processor_kwargs


@dataclass
class Inputs:
    """What `processor.prepare` takes, all media admitted."""

    prompt: str | list[dict[str, Any]]
    images: list[Any]
    videos: list[Any]
    options: dict[str, Any]
    has_media: bool


def parse_request(body: bytes) -> GenerateRequest:
    """The request in a body.

    Raises:
        RequestError: 400 with one line that names the field, its value and what it should be.
    """
    try:
        raw = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise RequestError(f"the body is not valid JSON ({error}): send one JSON object", code="invalid_json") from None
    plain = _plain(raw) if isinstance(raw, dict) else raw
    try:
        request = msgspec.convert(plain, GenerateRequest)
    except msgspec.ValidationError as error:
        raise _explained(str(error), plain) from None
    _check_whole(request, plain)
    return request


async def admit_media(request: GenerateRequest, policy: MediaPolicy) -> Inputs:
    """Fetches and checks all images and videos of a request; nothing of them is decoded yet.

    Raises:
        RequestError: too many of them, or one that should be text and isn't.
        MediaError, PromptError: what the policy refuses, messages that can't be served.
    """
    budget, tasks = Budget(policy), []
    options = PromptOptions.of(request.prompt_options())

    def later(kind: Literal["image", "video"], source: Any, own: Mapping[str, Any]) -> asyncio.Task[Any]:
        if len(tasks) == policy.max_items:
            raise RequestError(
                f"more than {policy.max_items} images and videos: send fewer, or serve with --max-items", 413
            )
        tasks.append(asyncio.create_task(admit(kind, source, policy, budget, options.of_media(kind, own))))
        return tasks[-1]

    try:
        images = [later("image", source, {}) for source in _listed(request.image_data)]
        videos = [later("video", source, {}) for source in _listed(request.video_data)]
        prompt, parts = request.text or "", []
        if request.messages is not None:
            prompt, media = parse_messages(request.messages)
            parts = [part for message in prompt for part in message["content"] if isinstance(part, dict)]
            parts = [part for part in parts if part["type"] != "text"]
            for part, one in zip(parts, media, strict=True):
                part |= one.options
                if one.source is not None:
                    part[one.kind] = later("image" if one.kind == "image" else "video", one.source, one.options)
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:  # if one fails, or the client disconnects, the others are not needed
            task.cancel()
    for part in parts:
        if part["type"] in part:
            part[part["type"]] = part[part["type"]].result()
    admitted_images, admitted_videos = ([task.result() for task in of_kind] for of_kind in (images, videos))
    return Inputs(prompt, admitted_images, admitted_videos, request.prompt_options(), bool(tasks))


def _listed(value: str | list[Any]) -> list[Any]:
    """One source or several as a list; an empty text is none."""
    return [one for one in ([value] if isinstance(value, str) else value) if one != ""]


def _check_whole(request: GenerateRequest, plain: dict[str, Any]) -> None:
    """What no field's type says; `plain` has the values as they were sent."""
    has_messages = request.messages is not None
    has_text = request.text is not None and not (has_messages and not request.text)
    if has_text == has_messages:
        found = "both" if has_text else "neither"
        raise RequestError(f"text and messages: {found} given, send one of them", param="text")
    if unknown := [name for name in request.mm_processor_kwargs if name not in MEDIA_OPTIONS]:
        raise _unknown_field(f"mm_processor_kwargs.{unknown[0]}", MEDIA_OPTIONS)
    try:
        request.sampling_params.options()
        StopStrings.of(request.sampling_params.stop)
        PromptOptions.of(request.prompt_options())
    except SamplingOptionError as error:
        name = f"sampling_params.{error.name}"
        message = f"{name} {short(plain['sampling_params'][error.name])}: expected {error.expected}"
        raise RequestError(message, param=name, code="invalid_value") from None
    except ValueError as error:
        raise RequestError(one_line(error), code="invalid_value") from None


def _plain(raw: dict[str, Any]) -> dict[str, Any]:
    """A body with the fields of `GenerateRequest` only: other names, nulls and what asks for nothing are resolved.

    Sampling options may stand beside the text, as the published design writes them.

    Raises:
        RequestError: 400 for a field that is given twice, or that asks for what isn't served.
    """
    body = _known_fields(raw, _NEUTRAL | _NEUTRAL_SAMPLING, _OTHER_NAMES | _OTHER_SAMPLING_NAMES, "")
    params = body.pop("sampling_params", {})
    if not isinstance(params, dict):
        return body | {"sampling_params": params}
    params = _known_fields(params, _NEUTRAL_SAMPLING, _OTHER_SAMPLING_NAMES, "sampling_params.")
    for name in [name for name in SamplingFields.__struct_fields__ if name in body]:
        if name in params:
            raise RequestError(f"{name} and sampling_params.{name}: both given, send one of them", param=name)
        params[name] = body.pop(name)
    for name in ("max_new_tokens", "top_k", "seed"):
        if isinstance(value := params.get(name), float) and value.is_integer():
            params[name] = int(value)
    return body | {"sampling_params": params}


def _known_fields(
    raw: Mapping[str, Any], neutral: Mapping[str, Sequence[Any]], other_names: Mapping[str, str], where: str
) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for given, value in raw.items():
        name = other_names.get(given, given)
        if name in neutral:
            if value is not None and not any(_same(value, one) for one in neutral[name]):
                raise RequestError(
                    f"{where}{name} {short(value)} is not supported: leave it out",
                    param=f"{where}{name}",
                    code="unsupported_value",
                )
        elif name in fields:
            raise RequestError(f"{where}{given} and {where}{name}: both given, send one of them", param=where + given)
        elif value is not None or name not in _FIELDS:
            fields[name] = value
    return fields


def _same(value: Any, neutral: Any) -> bool:
    # to Python True is 1; to a client it isn't
    return value == neutral and isinstance(value, bool) is isinstance(neutral, bool)


_FIELDS = {*GenerateRequest.__struct_fields__, *SamplingFields.__struct_fields__}


def _unknown_field(name: str, known: Sequence[str]) -> RequestError:
    message = f"unknown field {short(name)[1:-1]}: use {', '.join(known)}"
    return RequestError(message, param=name[:100], code="unknown_field")


def _explained(text: str, raw: Any) -> RequestError:
    """msgspec's message with the value and, of an unknown field, the ones there are."""
    text, _, path = text.partition(" - at `$")
    steps = [int(step) if step.isdigit() else step for step in re.findall(r"\w+", path)]
    where = re.sub(r"^\.", "", path.rstrip("`")) or None
    if field := re.search(r"unknown field `(.*)`", text):
        struct = SamplingFields if steps else GenerateRequest
        name = f"{where}.{field[1]}" if where else field[1]
        return _unknown_field(name, struct.__struct_fields__)
    value = raw
    for step in steps:
        try:
            value = value[step]
        except (KeyError, IndexError, TypeError):
            break
    message = f"{where or 'the body'} {short(value)}: {text[:1].lower()}{text[1:].replace('`', '')}"
    return RequestError(message, param=where, code="invalid_value")
