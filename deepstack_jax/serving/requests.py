"""What `POST /generate` takes: SGLang's native API in shape, checked field by field."""

import asyncio
import io
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta
from PIL import Image

from deepstack_jax.processing.chat import parse_messages
from deepstack_jax.serving.media import admit
from deepstack_jax.serving.policy import Budget, MediaPolicy

MAX_FPS = 120.0
_WHOLE = 2**31 - 1  # what the programs' int32 holds


class RequestError(Exception):
    """A request that gets an error for an answer: an HTTP status and OpenAI's error fields. The message is one line."""

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


class SamplingOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`sampling_params`: the names and neutral values of `dsj.generate`, and SGLang's way to name end tokens."""

    max_new_tokens: Annotated[int, Meta(ge=1, le=_WHOLE)] = 64
    temperature: Annotated[float, Meta(ge=0, le=1000)] = 0.0
    top_k: Annotated[int, Meta(ge=0, le=_WHOLE)] = 0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Meta(gt=0, le=1000)] = 1.0
    presence_penalty: Annotated[float, Meta(ge=-1000, le=1000)] = 0.0
    seed: Annotated[int, Meta(ge=0, le=2**32 - 1)] = 0
    stop_token_ids: Annotated[list[Annotated[int, Meta(ge=0, le=_WHOLE)]], Meta(max_length=16)] = []
    ignore_eos: bool = False

    def options(self, eos_token_ids: tuple[int, ...]) -> dict[str, Any]:
        """The keyword arguments of `dsj.generate`, for a model with these end tokens."""
        taken = {name: getattr(self, name) for name in self.__struct_fields__}
        own = () if taken.pop("ignore_eos") else eos_token_ids
        return taken | {"eos_token_id": [*own, *taken.pop("stop_token_ids")]}


class ChatMessage(msgspec.Struct, forbid_unknown_fields=True):
    """One message; the parts of its content are checked when it is parsed."""

    role: Literal["system", "user", "assistant"]
    content: str | list[Any]


class GenerateRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of `POST /generate`."""

    text: str | None = None
    messages: list[ChatMessage] | None = None
    image_data: str | list[str] | None = None
    video_data: str | list[str] | None = None
    sampling_params: SamplingOptions = SamplingOptions()
    stream: bool = False


@dataclass
class Inputs:
    """What `processor.prepare` takes, all media admitted."""

    prompt: str | list[dict[str, Any]]
    images: list[Image.Image]
    videos: list[io.BytesIO]
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
    try:
        request = msgspec.convert(raw, GenerateRequest)
    except msgspec.ValidationError as error:
        raise _explained(str(error), raw) from None
    if (request.text is None) == (request.messages is None):
        found = "neither" if request.text is None else "both"
        raise RequestError(f"text and messages: {found} given, send one of them", param="text")
    return request


async def admit_media(request: GenerateRequest, policy: MediaPolicy) -> Inputs:
    """Fetches and checks all images and videos of a request; nothing of them is decoded yet.

    Raises:
        RequestError: too many of them, or one that is no text or number where it should be.
        MediaError, PromptError: what the policy refuses, messages that can't be served.
    """
    budget, tasks = Budget(policy), []

    def later(kind: Literal["image", "video"], source: Any) -> asyncio.Task[Any]:
        if len(tasks) == policy.max_items:
            raise RequestError(f"more than {policy.max_items} images and videos: send fewer", 413)
        tasks.append(asyncio.create_task(admit(kind, source, policy, budget)))
        return tasks[-1]

    try:
        images = [later("image", source) for source in _listed(request.image_data)]
        videos = [later("video", source) for source in _listed(request.video_data)]
        prompt, parts = request.text or "", []
        if request.messages is not None:
            prompt, media = parse_messages(msgspec.to_builtins(request.messages))
            parts = [part for message in prompt for part in message["content"] if isinstance(part, dict)]
            parts = [part for part in parts if part["type"] != "text"]
            for part, one in zip(parts, media, strict=True):
                part |= _checked_options(one.options)
                if one.source is not None:
                    part[one.kind] = later("image" if one.kind == "image" else "video", one.source)
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:  # where one fails, or the client goes away, the others are not needed
            task.cancel()
    for part in parts:
        if part["type"] in part:
            part[part["type"]] = part[part["type"]].result()
    return Inputs(prompt, [task.result() for task in images], [task.result() for task in videos], bool(tasks))


def _listed(value: str | list[str] | None) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else value


def _checked_options(options: dict[str, Any]) -> dict[str, Any]:
    fps, sample = options.get("fps", 1.0), options.get("do_sample_frames", True)
    if isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps <= MAX_FPS:
        raise RequestError(f"fps {_short(fps)} of a video: expected a number above 0, at most {MAX_FPS:g}", param="fps")
    if not isinstance(sample, bool):
        raise RequestError(f"do_sample_frames {_short(sample)} of a video: expected true or false")
    return options


def _explained(text: str, raw: Any) -> RequestError:
    """msgspec's message with the value and, of an unknown field, the ones there are."""
    text, _, path = text.partition(" - at `$")
    steps = [int(step) if step.isdigit() else step for step in re.findall(r"\w+", path)]
    where = re.sub(r"^\.", "", path.rstrip("`")) or None
    if field := re.search(r"unknown field `(.*)`", text):
        struct = ChatMessage if "messages" in steps else SamplingOptions if steps else GenerateRequest
        name = f"{where}.{field[1]}" if where else field[1]
        known = ", ".join(struct.__struct_fields__)
        return RequestError(f"unknown field {_short(name)[1:-1]}: use {known}", param=name[:100], code="unknown_field")
    value = raw
    for step in steps:
        try:
            value = value[step]
        except (KeyError, IndexError, TypeError):
            break
    message = f"{where or 'the body'} {_short(value)}: {text[:1].lower()}{text[1:].replace('`', '')}"
    return RequestError(message, param=where, code="invalid_value")


def _short(value: Any) -> str:
    text = repr(value[:100] if isinstance(value, str) else value)
    return text if len(text) <= 100 else text[:100] + "..."
