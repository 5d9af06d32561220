"""The body of `POST /generate`: it has the shape of SGLang's native API and is checked field by field."""

import asyncio
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from deepstack_jax.disagg.tasks import settle
from deepstack_jax.errors import one_line, printable, short
from deepstack_jax.processing.decoders import Decoders
from deepstack_jax.processing.messages import parse_messages
from deepstack_jax.processing.prompt_options import MEDIA_OPTIONS, TEMPLATE_OPTIONS, PromptOptions
from deepstack_jax.processing.stop_strings import MAX_STOP_CHARACTERS, StopStrings
from deepstack_jax.sampling_options import SamplingOptionError, SamplingOptions
from deepstack_jax.serving.errors import RequestError
from deepstack_jax.serving.media import admit
from deepstack_jax.serving.parsing import parse_json
from deepstack_jax.serving.policy import Budget, MediaPolicy

MAX_REASON = 300  # characters
MAX_MESSAGES = 4096
MAX_PARTS = 8192  # of all messages
MAX_SOURCES = 4096  # of media; what a policy takes are fewer
MAX_TOOLS = 256
MAX_OPTIONS = 64  # variables of a template, or options of media
MAX_STOPS = 256  # with those that repeat
MAX_CHOICES = 128
MAX_LOGPROBS = 1 << 18  # of a request: of its tokens, and of the likeliest in their places; about 130 bytes for each
MAX_PATH = 300  # characters of where a value stands
MAX_BIASES = 300  # OpenAI's bound
GRAMMAR_KINDS = ("json_schema", "regex", "lark")
_WHOLE = 2**31 - 1  # what the programs' int32 holds

Name = Annotated[str, Meta(max_length=256)]
Options = Annotated[dict[Name, Any], Meta(max_length=MAX_OPTIONS)]
Messages = Annotated[list[Any], Meta(max_length=MAX_MESSAGES)]
Scales = Annotated[list[Annotated[float, Meta(ge=0, le=4)]], Meta(max_length=64)]  # of DeepStack levels
_Stop = Annotated[str, Meta(max_length=MAX_STOP_CHARACTERS)]
Stops = _Stop | Annotated[list[_Stop], Meta(max_length=MAX_STOPS)]

# Fields of SGLang's API that are not supported, and the values with which they ask for nothing.
_NEUTRAL: dict[str, Sequence[Any]] = {
    "audio_data": ("", []),
    "input_embeds": (),
    "lora_path": ("",),
    "log_metrics": (True, False),
    "logprob_start_len": (-1,),
    "modalities": (["image"], ["video"], ["multi-images"]),
    "return_hidden_states": (False,),
    "return_text_in_logprobs": (True, False),
    "session_params": ({},),
    "custom_logit_processor": ("",),
    "token_ids_logprob": ([],),
}
_NEUTRAL_SAMPLING: dict[str, Sequence[Any]] = {
    "custom_params": ({},),
    "ebnf": ("",),
    "n": (1,),
    "no_stop_trim": (False,),
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


class SamplingFields(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`sampling_params`: `SamplingOptions`, which knows the ranges, and SGLang's ways to name ends."""

    max_new_tokens: Annotated[int, Meta(le=_WHOLE)] | None = (
        SamplingOptions.max_new_tokens
    )  # None: to the context's end
    temperature: float = SamplingOptions.temperature
    top_k: Annotated[int, Meta(le=_WHOLE)] = SamplingOptions.top_k
    top_p: float = SamplingOptions.top_p
    min_p: float = SamplingOptions.min_p
    repetition_penalty: float = SamplingOptions.repetition_penalty
    presence_penalty: float = SamplingOptions.presence_penalty
    frequency_penalty: float = SamplingOptions.frequency_penalty
    seed: int = 0
    stop: Stops = []
    stop_token_ids: Annotated[list[Annotated[int, Meta(ge=0, le=_WHOLE)]], Meta(max_length=16)] = []
    ignore_eos: bool = False
    min_new_tokens: Annotated[int, Meta(ge=0, le=_WHOLE)] = 0
    logit_bias: Annotated[dict[str, float], Meta(max_length=MAX_BIASES)] = {}
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] = 1
    json_schema: str = ""
    regex: str = ""
    lark: str = ""

    def options(
        self,
        eos_token_ids: tuple[int, ...] = (),
        max_new_tokens: int = _WHOLE,
        choice: int = 0,
        top_logprobs: int | None = None,
    ) -> SamplingOptions:
        """The options of one of `n` answers, for a model with these end tokens. Stop strings are not among them.

        `max_new_tokens` holds where the request doesn't set it.

        Raises:
            SamplingOptionError: one is out of its range.
        """
        ends = [*(() if self.ignore_eos else eos_token_ids), *self.stop_token_ids]
        taken = {name: getattr(self, name) for name in _SAMPLING_NAMES}
        return SamplingOptions(
            **taken,
            max_new_tokens=max_new_tokens if self.max_new_tokens is None else self.max_new_tokens,
            seed=self.seed + choice,
            eos_token_id=ends,
            min_tokens=self.min_new_tokens,
            logit_bias=_token_ids(self.logit_bias),
            top_logprobs=top_logprobs,
        )

    def grammar(self) -> tuple[str, str] | None:
        """What constrains the answers, as (kind, text); None if nothing does.

        Raises:
            ValueError: several constraints are given.
        """
        given = [(kind, getattr(self, kind)) for kind in GRAMMAR_KINDS if getattr(self, kind)]
        if len(given) > 1:
            raise ValueError(f"{given[0][0]} and {given[1][0]}: both given, send one of them")
        return given[0] if given else None


class GenerateRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of `POST /generate`. Messages are checked by `parse_messages`, media and their options when admitted."""

    text: str | None = None
    messages: Messages | None = None
    image_data: str | Annotated[list[str], Meta(max_length=MAX_SOURCES)] = []
    video_data: str | Annotated[list[str | list[str]], Meta(max_length=MAX_SOURCES)] = []
    tools: Annotated[list[dict[str, Any]], Meta(max_length=MAX_TOOLS)] = []
    chat_template_kwargs: Options = {}
    enable_thinking: bool | None = None
    mm_processor_kwargs: Options = {}
    sampling_params: SamplingFields = SamplingFields()
    input_ids: Annotated[list[Annotated[int, Meta(ge=0, le=_WHOLE)]], Meta(min_length=1)] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    allow_empty: bool = False
    cache_salt: Annotated[str, Meta(max_length=1024)] = ""
    return_logprob: bool = False
    top_logprobs_num: Annotated[int, Meta(ge=0, le=20)] = 0
    stream: bool = False
    stream_deltas: bool = False
    rid: Annotated[str, Meta(max_length=128)] = ""
    timeline: bool = False
    deepstack_scales: Scales | None = None

    @property
    def top_logprobs(self) -> int | None:
        """How many alternatives of each token are asked for; None for no log probabilities."""
        return self.top_logprobs_num if self.return_logprob else None

    @property
    def most_logged_tokens(self) -> int | None:
        """How many tokens each answer may have for its log probabilities; None for any number."""
        asked = self.top_logprobs
        return None if asked is None else MAX_LOGPROBS // (self.sampling_params.n * (1 + asked))

    def prompt_options(self) -> dict[str, Any]:
        """The keyword arguments of `processor.prepare`."""
        named = {name: getattr(self, name) for name in TEMPLATE_OPTIONS}
        absent = {name: getattr(GenerateRequest(), name) for name in TEMPLATE_OPTIONS}
        return {name: value for name, value in named.items() if value != absent[name]} | self.mm_processor_kwargs


@dataclass
class Inputs:
    """What `processor.prepare` takes, all media admitted."""

    prompt: str | list[dict[str, Any]]
    images: list[Any]
    videos: list[Any]
    options: dict[str, Any]
    has_media: bool


def check_logprobs(answers: int, tokens: int | None, top_logprobs: int | None) -> None:
    """Refuses more log probabilities than a request may have; see `most_logged_tokens` where `tokens` are not given.

    Raises:
        RequestError: which numbers make how many.
    """
    if tokens is None or top_logprobs is None:
        return
    count = answers * tokens * (1 + top_logprobs)
    if count > MAX_LOGPROBS:
        raise RequestError(
            f"answers, their tokens, and log probabilities of each token are {answers} x {tokens} x {1 + top_logprobs} "
            f"= {count}, and a request may have {MAX_LOGPROBS} log probabilities: ask for fewer"
        )


def parse_request(body: bytes | bytearray) -> GenerateRequest:
    """The request in a body.

    Raises:
        RequestError: 400 with one line that names the field, its value and what it should be.
    """
    raw = parse_json(body)
    plain = _plain(raw) if isinstance(raw, dict) else raw
    try:
        request = msgspec.convert(plain, GenerateRequest)
    except msgspec.ValidationError as error:
        raise explain_invalid(str(error), plain) from None
    _check_whole(request, plain)
    check_parts(request.messages)
    return request


def check_parts(messages: Sequence[Any] | None) -> None:
    """Refuses messages of too many parts.

    Raises:
        RequestError: 400.
    """
    contents = [message.get("content") for message in messages or () if isinstance(message, Mapping)]
    if sum(len(content) for content in contents if isinstance(content, list)) > MAX_PARTS:
        raise RequestError(
            f"the messages have more than {MAX_PARTS} parts: join parts of text", param="messages", code="invalid_value"
        )


async def admit_media(request: GenerateRequest, policy: MediaPolicy, decoders: Decoders) -> Inputs:
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
        admitted = admit(kind, source, policy, budget, options.of_media(kind, own), decoders)
        tasks.append(asyncio.create_task(admitted))
        return tasks[-1]

    try:
        images = [later("image", source, {}) for source in _listed(request.image_data)]
        videos = [later("video", source, {}) for source in _listed(request.video_data)]
        prompt, parts = request.text or "", []
        if request.messages is not None:
            # a long conversation takes longer than the event loop may be held
            prompt, media = await asyncio.to_thread(parse_messages, request.messages, request.allow_empty)
            contents = [message["content"] for message in prompt if isinstance(message["content"], list)]
            parts = [part for content in contents for part in content if part["type"] != "text"]
            for part, one in zip(parts, media, strict=True):
                part |= one.options
                if one.source is not None:
                    part[one.kind] = later("image" if one.kind == "image" else "video", one.source, one.options)
        await asyncio.gather(*tasks)
    finally:
        await settle(*tasks)  # if one fails, or the client disconnects, the others are not needed
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
    if has_text == has_messages and request.input_ids is None:
        found = "both" if has_text else "neither"
        raise RequestError(f"text and messages: {found} given, send one of them", param="text")
    if request.input_ids is not None and (has_text or has_messages or request.image_data or request.video_data):
        raise RequestError(
            "input_ids stand for the whole prompt: leave out text, messages and media", param="input_ids"
        )
    if request.sampling_params.n > 1:
        raise RequestError("n above 1 is served by /v1/chat/completions: leave it out", param="sampling_params.n")
    if request.timeline:
        raise RequestError("a timeline is served by /v1/chat/completions: leave it out", param="timeline")
    if unknown := [name for name in request.mm_processor_kwargs if name not in MEDIA_OPTIONS]:
        raise _unknown_field(f"mm_processor_kwargs.{unknown[0]}", MEDIA_OPTIONS)
    try:
        request.sampling_params.options()
        request.sampling_params.grammar()
        StopStrings.of(request.sampling_params.stop)
        PromptOptions.of(request.prompt_options())
    except SamplingOptionError as error:
        name = f"sampling_params.{error.name}"
        # one of logit_bias has no name of its own in the body
        value = plain["sampling_params"].get(error.name, error.value)
        message = f"{name} {short(value)}: expected {error.expected}"
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


_SAMPLING_NAMES = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)


def _token_ids(biases: Mapping[str, float]) -> dict[int, float] | None:
    """Returns the biases by token id, None for none.

    Raises:
        ValueError: a key is not a token id.
    """
    wrong = next((key for key in biases if not (key.isascii() and key.isdecimal() and len(key) < 10)), None)
    if wrong is not None:
        raise ValueError(f"logit_bias has the key {short(wrong)}: expected token ids")
    return {int(key): value for key, value in biases.items()} or None


_FIELDS = {*GenerateRequest.__struct_fields__, *SamplingFields.__struct_fields__}


def _unknown_field(name: str, known: Sequence[str]) -> RequestError:
    message = f"unknown field {short(name)[1:-1]}: use {', '.join(known)}"
    return RequestError(message, param=name, code="unknown_field")


def explain_invalid(text: str, raw: Any) -> RequestError:
    """msgspec's message with the value and, of an unknown field, the ones there are."""
    text, _, path = text.rpartition(" - at `") if text.endswith("`") and " - at `" in text else (text, "", "")
    path = path.removeprefix("key` in `").strip("`$")[:MAX_PATH]  # it may be part of a field's name
    steps = [int(step) if step.isdecimal() else step for step in re.findall(r"\w+", path)]
    where = path.removeprefix(".") or None
    if field := re.search(r"unknown field `(.*)`", text, re.DOTALL):
        struct = SamplingFields if steps else GenerateRequest
        name = f"{where}.{field[1]}" if where else field[1]
        return _unknown_field(name, struct.__struct_fields__)
    value = raw
    for step in steps:
        try:
            value = value[step]
        except (KeyError, IndexError, TypeError):
            break
    text = printable(text.replace("`", ""), MAX_REASON)  # which repeats a value that is none of an enumeration
    message = f"{where or 'the body'} {short(value)}: {text[:1].lower()}{text[1:]}"
    return RequestError(message, param=where, code="invalid_value")
