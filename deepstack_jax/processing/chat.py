"""Renders checked messages as the text of a prompt, by the checkpoint's chat template or in Qwen3-VL's format."""

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deepstack_jax.config_values import read_json_object
from deepstack_jax.errors import naming, one_line, short
from deepstack_jax.processing.messages import Message, PromptError

IMAGE_TOKEN = "<|image_pad|>"
VIDEO_TOKEN = "<|video_pad|>"
VISION_START = "<|vision_start|>"
VISION_END = "<|vision_end|>"
TURN_START = "<|im_start|>"

# Qwen3-VL's conversation format without tools, for checkpoints without a template. Each content is one str, and there
# is no default system message.
QWEN_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_MARKED = re.compile(
    f"{re.escape(VISION_START)}(?:{re.escape(IMAGE_TOKEN)}|{re.escape(VIDEO_TOKEN)})+{re.escape(VISION_END)}"
)
_log = logging.getLogger(__name__)


def is_raw_prompt(text: str) -> bool:
    """Whether `text` already is a whole prompt: it opens a turn, or marks where an image or a video goes."""
    return TURN_START in text or _MARKED.search(text) is not None


def bare_placeholder(text: str) -> str | None:
    """Returns the first placeholder token in `text` that is outside vision markers, or None."""
    rest = _MARKED.sub("", text)
    return next((token for token in (IMAGE_TOKEN, VIDEO_TOKEN) if token in rest), None)


def refuse_placeholder(token: str) -> PromptError:
    """Returns the error for a placeholder that a user typed, which would otherwise be bound to a picture."""
    kind = "image" if token == IMAGE_TOKEN else "video"
    return PromptError(
        f"the text holds {token}, which stands for {'an' if kind == 'image' else 'a'} {kind} in the model's input: "
        f"take it out of the text, and give {kind}s as parts of a message or as {VISION_START}{token}{VISION_END}"
    )


def render(
    messages: Sequence[Message],
    tokenizer: Any,
    template: str | None,
    tools: Sequence[Any] = (),
    variables: Mapping[str, Any] | None = None,
    *,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
) -> str:
    """Returns the prompt's text, up to where the assistant's answer starts.

    Args:
        messages: the result of `parse_messages`.
        tokenizer: transformers' tokenizer, which renders `template`, or its own template if that is None.
        template: the checkpoint's chat template. If there is none at all, Qwen3-VL's conversation format is used.
        tools: JSON schemas of functions, or Python functions.
        variables: variables of the template, such as `enable_thinking`.
        add_generation_prompt: whether the text ends with the beginning of the assistant's turn.
        continue_final_message: whether it ends where the last message does, for an answer that goes on from there.

    Raises:
        PromptError: the template refuses the messages or does not support tools.
    """
    variables = dict(variables or {})
    if template is None and not tokenizer.chat_template:
        _refuse_extras(messages, tools, variables)
        template = QWEN_TEMPLATE
    source: str = template or tokenizer.get_chat_template(tools=list(tools) or None)
    if "image" not in source:
        # templates of text models expect each content to be one str, and silently drop lists
        messages = [{**message, "content": _render_content(message["content"])} for message in messages]
    if "developer" not in source:
        # OpenAI's newer name for the system role
        messages = [{**m, "role": "system"} if m["role"] == "developer" else m for m in messages]
    _check_variables(source, tools, variables)
    try:
        return tokenizer.apply_chat_template(
            list(messages),
            tools=list(tools) or None,
            chat_template=source,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **variables,
        )
    except Exception as error:  # a template is a program, which may raise anything
        raise PromptError(f"the checkpoint's chat template refuses the messages: {one_line(error)}") from None


def read_chat_template(directory: Path) -> str | None:
    """Returns the template in chat_template.jinja or chat_template.json; None means the tokenizer's own.

    Raises `PromptError` or `ConfigError` if the file is damaged.
    """
    file = directory / "chat_template.jinja"
    if file.is_file():
        try:
            with naming(file):
                return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise PromptError(f"{file} is not UTF-8 text ({error}): copy it from the checkpoint again") from None
    file = directory / "chat_template.json"
    if not file.is_file():
        return None
    template = read_json_object(file).get("chat_template")
    if not isinstance(template, str):
        raise PromptError(f"{file} has no text chat_template: copy it from the checkpoint again")
    return template


def _check_variables(source: str, tools: Sequence[Any], variables: Mapping[str, Any]) -> None:
    """Refuses tools that the template would silently drop, and warns about variables that it doesn't read."""
    names = (*(["tools"] if tools else []), *variables)
    unread = [name for name in names if not re.search(rf"\b{re.escape(name)}\b", source)]
    if "tools" in unread:
        raise PromptError("the checkpoint's chat template has no place for tools: leave them out")
    if unread:
        shown = ", ".join(name if name.isidentifier() else short(name) for name in unread)
        _log.warning("the checkpoint's chat template doesn't read %s", shown)


def _refuse_extras(messages: Sequence[Message], tools: Sequence[Any], variables: Mapping[str, Any]) -> None:
    """Refuses anything that `QWEN_TEMPLATE` would silently drop."""
    for message in messages:
        extras = [key for key in message if key not in ("role", "content")]
        if tools or extras or variables or message["role"] == "tool":
            what = extras[0] if extras else next(iter(variables), "tools")
            raise PromptError(
                f"this checkpoint has no chat template, and so no place for {what}: copy its chat_template.jinja"
            )


def _render_content(content: str | list[dict[str, str]]) -> str:
    if isinstance(content, str):
        return content
    tokens = {"image": VISION_START + IMAGE_TOKEN + VISION_END, "video": VISION_START + VIDEO_TOKEN + VISION_END}
    return "".join(tokens.get(part["type"]) or part["text"] for part in content)
