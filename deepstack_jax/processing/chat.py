"""Chat messages: checking them, finding the images and videos in them, and rendering them to the prompt's text."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError

IMAGE_TOKEN = "<|image_pad|>"
VIDEO_TOKEN = "<|video_pad|>"
VISION_START = "<|vision_start|>"
VISION_END = "<|vision_end|>"
ROLES = ("system", "user", "assistant")

Message = dict[str, Any]


class PromptError(ValueError):
    """A prompt that can't be served; the message is one line with the remedy."""


@dataclass(frozen=True)
class Media:
    """One image or video of a prompt. A source of None means the next of `images=` or `videos=`."""

    kind: str
    source: Any = None
    options: dict[str, Any] = field(default_factory=dict)


def parse_messages(messages: Sequence[Message]) -> tuple[list[Message], list[Media]]:
    """Checks one conversation and brings it to the form that chat templates read.

    Args:
        messages: `{"role": "system" | "user" | "assistant", "content": ...}` each. Content is a str, or a list of
            `{"type": "text", "text": ...}`, `{"type": "image", "image": source}`, `{"type": "image"}` (the next of
            `images=`), `{"type": "video", "video": source, "fps": ..., "do_sample_frames": ...}`, and OpenAI's
            `{"type": "image_url", "image_url": {"url": ...}}` and `video_url`. `url` and `path` may stand for `image`
            and `video`.

    Returns:
        The messages with parts of the types text, image and video alone, and the media in reading order.

    Raises:
        PromptError: an unknown role, type or content, or a conversation that says nothing.
    """
    parsed: list[Message] = []
    media: list[Media] = []
    for message in messages:
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise PromptError(f"message {_short(message)} needs a role and a content")
        if message["role"] not in ROLES:
            raise PromptError(f"role {message['role']!r} is not known: use one of {', '.join(ROLES)}")
        content = message["content"]
        if isinstance(content, list | tuple):
            parts = [_parse_part(part) for part in content]
            media += [part for part in parts if isinstance(part, Media)]
            content = [{"type": p.kind} if isinstance(p, Media) else {"type": "text", "text": p} for p in parts]
        elif not isinstance(content, str):
            raise PromptError(f"content {_short(content)} of a message is neither text nor a list of parts")
        parsed.append({"role": message["role"], "content": content})
    if not media and not any(_text_of(message["content"]).strip() for message in parsed):
        raise PromptError("empty prompt: give a message with text, an image or a video")
    return parsed, media


def user_message(text: str, images: Sequence[Any] = (), videos: Sequence[Any] = ()) -> Message:
    """One message of the user: all images, then all videos, then the text."""
    parts = [{"type": "image", "image": image} for image in images]
    parts += [{"type": "video", "video": video} for video in videos]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}] if parts else text}


def is_raw_prompt(text: str) -> bool:
    """Whether `text` is a whole prompt already: it opens a turn or holds a visual placeholder."""
    return any(token in text for token in ("<|im_start|>", IMAGE_TOKEN, VIDEO_TOKEN))


def render(messages: Sequence[Message], tokenizer: Any, template: str | None) -> str:
    """The prompt's text, up to where the assistant's answer starts.

    Args:
        messages: from `parse_messages`.
        tokenizer: renders `template`, or its own template when that is None.
        template: the checkpoint's chat template; with none at all, Qwen3-VL's conversation format is written.
    """
    if template is None and not tokenizer.chat_template:
        return _render_qwen(messages)
    source: str = template or tokenizer.get_chat_template()
    if "image" not in source:
        # templates of text models read contents that are one str, and drop lists without a word
        messages = [{**message, "content": _render_content(message["content"])} for message in messages]
    try:
        return tokenizer.apply_chat_template(
            list(messages), chat_template=source, tokenize=False, add_generation_prompt=True
        )
    except (TemplateError, TypeError, ValueError) as error:
        raise PromptError(f"the checkpoint's chat template refuses the messages: {error}") from None


def read_chat_template(directory: Path) -> str | None:
    """The template in chat_template.jinja or chat_template.json; None leaves it to the tokenizer's own."""
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text()
    file = directory / "chat_template.json"
    if not file.is_file():
        return None
    try:
        template = json.loads(file.read_text())["chat_template"]
    except (ValueError, KeyError, TypeError):
        template = None
    if not isinstance(template, str):
        raise PromptError(f"{file} has no text chat_template: copy it from the checkpoint again")
    return template


def _render_qwen(messages: Sequence[Message]) -> str:
    """Qwen3-VL's conversation format. There is no default system message."""
    turns = [
        f"<|im_start|>{message['role']}\n{_render_content(message['content'])}<|im_end|>\n" for message in messages
    ]
    return "".join(turns) + "<|im_start|>assistant\n"


def _render_content(content: str | list[dict[str, str]]) -> str:
    if isinstance(content, str):
        return content
    tokens = {"image": VISION_START + IMAGE_TOKEN + VISION_END, "video": VISION_START + VIDEO_TOKEN + VISION_END}
    return "".join(tokens.get(part["type"]) or part["text"] for part in content)


def _parse_part(part: Any) -> str | Media:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    match kind:
        case "text":
            if isinstance(part.get("text"), str):
                return part["text"]
        case "image" | "video":
            source = next((part[key] for key in (kind, "url", "path") if part.get(key) is not None), None)
            options = {key: part[key] for key in ("fps", "do_sample_frames") if part.get(key) is not None}
            return Media(kind, source, options if kind == "video" else {})
        case "image_url" | "video_url":
            url = part.get(kind)
            url = url.get("url") if isinstance(url, dict) else url
            if isinstance(url, str):
                return Media(kind.removesuffix("_url"), url)
    raise PromptError(f"content part {_short(part)} is not known: use text, image, video, image_url or video_url")


def _text_of(content: str | list[dict[str, str]]) -> str:
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:100] + "..."
