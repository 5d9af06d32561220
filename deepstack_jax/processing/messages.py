"""Checks chat messages, as users and OpenAI's clients write them, and converts them to the form that templates read.

Every key of a message and of a part is either used or refused by name; a key whose value is null counts as absent.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from deepstack_jax.errors import short
from deepstack_jax.processing.images import IMAGE_OPTIONS, ImageOptions
from deepstack_jax.processing.videos import VIDEO_OPTIONS, VideoOptions

ROLES = ("system", "developer", "user", "assistant", "tool")
MESSAGE_KEYS = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content")
# OpenAI's client writes these into every message that it returns; they must be empty here
EMPTY_MESSAGE_KEYS = ("refusal", "annotations", "audio", "function_call")

Message = dict[str, Any]

_TYPES = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "image": "image",
    "image_url": "image",
    "input_image": "image",
    "video": "video",
    "video_url": "video",
}
# the keys under which a part may hold its picture or video; base64 and data hold base64 without a header
_BASE64_KEYS = ("base64", "data")
_SOURCE_KEYS = {
    "image": ("image", "image_url", "url", "path", *_BASE64_KEYS, "source"),
    "video": ("video", "video_url", "url", "path", *_BASE64_KEYS, "source"),
}
_OPTIONS = {"image": IMAGE_OPTIONS, "video": VIDEO_OPTIONS}
# ignored, because the file's bytes are more reliable
_DESCRIPTION_KEYS = ("format", "media_type", "mime_type", "mimeType")
_DETAILS = ("auto", "high", "original")


class PromptError(ValueError):
    """A prompt can't be served; the message is one line with the remedy."""


# every key that some kind of part may have
PART_KEYS = {"type", "text", "detail", *_DESCRIPTION_KEYS, *_SOURCE_KEYS["image"], *_SOURCE_KEYS["video"]}
PART_KEYS |= {*IMAGE_OPTIONS, *VIDEO_OPTIONS}


@dataclass(frozen=True)
class Media:
    """One image or video of a prompt. If the source is None, it is the next one of `images=` or `videos=`."""

    kind: str
    source: Any = None
    options: dict[str, Any] = field(default_factory=dict)


def parse_messages(messages: Sequence[Message], allow_empty: bool = False) -> tuple[list[Message], list[Media]]:
    """Checks one conversation and converts it to the form that chat templates read.

    Args:
        messages: each is `{"role": ..., "content": ...}` with a role of `ROLES` and, if they apply, `tool_calls`,
            `tool_call_id`, `name` and `reasoning_content`. Content is a str; or a list of parts
            `{"type": "text", "text": ...}`, `{"type": "image", "image": source}`, `{"type": "image"}` (the next one of
            `images=`), the same for videos, and OpenAI's `image_url`, `video_url`, `input_text` and `input_image`; or
            None if an assistant called tools or a tool returned nothing. The source of a part may also be under
            `image_url` or `video_url` (a str or an object with a `url`), `url`, `path`, `base64`, `data` or `source`.
            The part may also hold the options of `ImageOptions` or `VideoOptions`.
        allow_empty: whether a conversation may have no content at all.

    Returns:
        The messages, with parts of the types text, image and video only, and the media in reading order.

    Raises:
        PromptError: an unknown role, type, key or content, or a conversation without any content.
        ImageError, VideoError: an option of an image or a video is out of range.
    """
    parsed: list[Message] = []
    media: list[Media] = []
    for number, message in enumerate(messages):
        content = _parse_message(message, f"messages[{number}]")
        media += [part for part in content.parts if isinstance(part, Media)]
        parsed.append(content.message)
    says_nothing = not any(_text_of(message["content"]).strip() or "tool_calls" in message for message in parsed)
    if not media and says_nothing and not allow_empty:
        raise PromptError("empty prompt: give a message with text, an image or a video")
    return parsed, media


def user_message(text: str, images: Sequence[Any] = (), videos: Sequence[Any] = ()) -> Message:
    """Returns one message of the user: all images, then all videos, then the text."""
    parts = [{"type": "image", "image": image} for image in images]
    parts += [{"type": "video", "video": video} for video in videos]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}] if parts else text}


def texts_in(value: Any) -> Iterator[str]:
    """Yields every str inside nested lists and objects, including keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, one in value.items():
            yield from texts_in(key)
            yield from texts_in(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from texts_in(one)


@dataclass(frozen=True)
class _Parsed:
    message: Message
    parts: list[str | Media]


def _parse_message(message: Any, where: str) -> _Parsed:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise PromptError(f"{where} {short(message)} needs a role and a content")
    for key, value in message.items():
        if key in EMPTY_MESSAGE_KEYS and value:
            raise PromptError(f"{where}.{key} is not supported: leave it out")
        if key not in MESSAGE_KEYS and key not in EMPTY_MESSAGE_KEYS:
            raise PromptError(f"unknown field {where}.{short(key)[1:-1]}: use {', '.join(MESSAGE_KEYS)}")
    role = message["role"]
    if role not in ROLES:
        raise PromptError(f"{where}.role {short(role)} is not known: use one of {', '.join(ROLES)}")
    extras = {key: message[key] for key in MESSAGE_KEYS[2:] if message.get(key) is not None}
    _check_extras(extras, role, where)
    if "content" not in message and "tool_calls" not in extras:
        raise PromptError(f"{where} {short(message)} needs a role and a content")
    content = message.get("content")
    if content is None and role in ("assistant", "tool"):
        content = ""
    if isinstance(content, str):
        return _Parsed({"role": role, "content": content, **extras}, [content])
    if not isinstance(content, list | tuple):
        raise PromptError(f"{where}.content {short(content)}: expected text or a list of parts")
    parts = [_parse_part(part, f"{where}.content[{i}]") for i, part in enumerate(content)]
    shown = [{"type": p.kind} if isinstance(p, Media) else {"type": "text", "text": p} for p in parts]
    return _Parsed({"role": role, "content": shown, **extras}, parts)


def _check_extras(extras: dict[str, Any], role: str, where: str) -> None:
    for key in ("name", "tool_call_id", "reasoning_content"):
        if key in extras and not isinstance(extras[key], str):
            raise PromptError(f"{where}.{key} {short(extras[key])}: expected text")
    calls = extras.get("tool_calls", [])
    if not isinstance(calls, list | tuple):
        raise PromptError(f"{where}.tool_calls {short(calls)}: expected a list of calls")
    for i, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise PromptError(
                f"{where}.tool_calls[{i}] {short(call)}: expected "
                '{"type": "function", "function": {"name": ..., "arguments": ...}}'
            )
    if not calls:
        extras.pop("tool_calls", None)
    elif role != "assistant":
        raise PromptError(f"{where}.tool_calls: only an assistant calls tools, not the role {role!r}")
    if "tool_call_id" in extras and role != "tool":
        raise PromptError(f"{where}.tool_call_id: only a tool's message has one, not the role {role!r}")


def _parse_part(part: Any, where: str) -> str | Media:
    if isinstance(part, str):
        return part
    kind = _kind_of(part)
    if kind is None:
        raise PromptError(
            f"content part {short(part)} is not known: use text, image, video, image_url, video_url or input_image"
        )
    given = {key: value for key, value in part.items() if value is not None}
    # data sets write the keys of all kinds of parts into each part, with null where they don't apply
    unknown = [key for key in part if key not in PART_KEYS] + [key for key in given if key not in _keys_of(kind)]
    if unknown:
        raise PromptError(
            f"{where} has the unknown key {short(unknown[0])}: a part of type {part.get('type', kind)} has "
            f"{', '.join(_keys_of(kind)[1:])}"
        )
    if kind == "text":
        if not isinstance(given.get("text"), str):
            raise PromptError(f"content part {short(part)} is not known: a text part needs a str under text")
        return given["text"]
    return _parse_media(kind, part.get("type", kind), given, where)


def _kind_of(part: Any) -> str | None:
    """Returns "text", "image" or "video"; the keys of a part without a type determine its kind."""
    if not isinstance(part, Mapping):
        return None
    kind = part.get("type")
    if kind is None:
        keys = ("text", "image", "image_url", "video", "video_url")
        kind = next((key for key in keys if part.get(key) is not None), None)
    return _TYPES.get(kind) if isinstance(kind, str) else None


def _keys_of(kind: str) -> tuple[str, ...]:
    """Returns the keys that may have a value in a part of this kind."""
    if kind == "text":
        return ("type", "text")
    more = ("detail",) if kind == "image" else ()
    return ("type", *_SOURCE_KEYS[kind], *_OPTIONS[kind], *more, *_DESCRIPTION_KEYS)


def _parse_media(kind: str, part_type: str, given: dict[str, Any], where: str) -> Media:
    found = [key for key in _SOURCE_KEYS[kind] if key in given]
    if len(found) > 1:
        raise PromptError(f"{where} names its {kind} twice, under {found[0]} and {found[1]}: keep one of them")
    options = {key: given[key] for key in _OPTIONS[kind] if key in given}
    _check_detail(given.get("detail"), where)
    source = None
    if found:
        source, more = _source(kind, found[0], given[found[0]], where)
        if twice := options.keys() & more.keys():
            raise PromptError(f"{where} has {min(twice)} twice: keep one of them")
        options |= more
    elif part_type not in ("image", "video"):
        # OpenAI's parts always hold their source
        key = part_type if part_type.endswith("_url") else "image_url"
        raise PromptError(f"content part {where} has no {kind}: nothing was found under {key}")
    (ImageOptions if kind == "image" else VideoOptions).of(options)
    return Media(kind, source, options)


def _source(kind: str, key: str, value: Any, where: str) -> tuple[Any, dict[str, Any]]:
    """Returns the picture or video under `key`, and the options beside it if the value is an object."""
    if isinstance(value, str | bytes) and not value:
        raise PromptError(f"{where} has no {kind}: {key} is empty")
    if key in _BASE64_KEYS and isinstance(value, str):
        return value if value[:5].lower() == "data:" else f"data:;base64,{value}", {}
    if not isinstance(value, Mapping):
        if key.endswith("url") and not isinstance(value, str):
            raise PromptError(f"{where} has no {kind}: {key} {short(value)} is not text")
        return value, {}
    given = {name: one for name, one in value.items() if one is not None}
    inner = tuple(name for name in _SOURCE_KEYS[kind] if name not in ("source", "image_url", "video_url"))
    allowed = (*inner, *_OPTIONS[kind], "detail", "type", *_DESCRIPTION_KEYS)
    if unknown := [name for name in given if name not in allowed]:
        raise PromptError(f"{where}.{key} has the unknown key {short(unknown[0])}: use {', '.join(allowed)}")
    found = [name for name in inner if name in given]
    if len(found) != 1 or isinstance(given[found[0]], Mapping):
        raise PromptError(f"content part {where} has no {kind}: {key} needs one of {', '.join(inner)}")
    _check_detail(given.get("detail"), where)
    source, _ = _source(kind, found[0], given[found[0]], f"{where}.{key}")
    return source, {name: given[name] for name in _OPTIONS[kind] if name in given}


def _check_detail(detail: Any, where: str) -> None:
    if detail is not None and detail not in _DETAILS:
        raise PromptError(
            f"{where} has detail {short(detail)}: use one of {', '.join(_DETAILS)}, and max_pixels for less detail"
        )


def _text_of(content: str | list[dict[str, str]]) -> str:
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
