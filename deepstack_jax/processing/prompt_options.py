"""Options of a prompt besides its messages: tools, variables of the chat template, and how media become patches.

The names and meanings are those of transformers' processors and chat templates. The library, the command line and the
server all read them here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from deepstack_jax.errors import short
from deepstack_jax.processing.images import IMAGE_OPTIONS, ImageOptions
from deepstack_jax.processing.messages import PromptError
from deepstack_jax.processing.videos import VIDEO_OPTIONS, VideoOptions

# as in transformers, flat min_pixels and max_pixels apply to images; those of videos are in videos_kwargs or the part
_FLAT_VIDEO_OPTIONS = tuple(name for name in VIDEO_OPTIONS if name not in IMAGE_OPTIONS)
MEDIA_OPTIONS = (*IMAGE_OPTIONS, *_FLAT_VIDEO_OPTIONS, "images_kwargs", "videos_kwargs")
TEMPLATE_OPTIONS = (
    "tools",
    "chat_template_kwargs",
    "enable_thinking",
    "add_generation_prompt",
    "continue_final_message",
    "allow_empty",
)
# arguments of transformers' apply_chat_template that are set elsewhere
_RESERVED = (
    "conversation",
    "messages",
    "tools",
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
    "padding",
    "truncation",
    "max_length",
    "return_tensors",
    "return_dict",
    "return_assistant_tokens_mask",
    "tokenizer_kwargs",
)


@dataclass(frozen=True)
class PromptOptions:
    """Checked options of one call of `prepare`. A part's own options override those of images and videos."""

    tools: tuple[Any, ...] = ()  # JSON schemas, or Python functions as in transformers
    template_variables: dict[str, Any] = field(default_factory=dict)
    images: dict[str, Any] = field(default_factory=dict)
    videos: dict[str, Any] = field(default_factory=dict)
    add_generation_prompt: bool = True
    continue_final_message: bool = False  # the answer goes on where the last message ends
    allow_empty: bool = False  # whether messages may hold no text at all

    @staticmethod
    def of(raw: Mapping[str, Any]) -> "PromptOptions":
        """Checks options by name; None counts as absent.

        Raises:
            PromptError: an unknown name, or a value of the wrong type.
            ImageError, VideoError: an option of images or videos is out of range.
        """
        known = (*TEMPLATE_OPTIONS, *MEDIA_OPTIONS)
        if unknown := [name for name in raw if name not in known]:
            raise PromptError(f"unknown option {short(unknown[0])} of a prompt: use {', '.join(known)}")
        given = {name: value for name, value in raw.items() if value is not None}
        images = _media_options(given, IMAGE_OPTIONS, "images_kwargs")
        videos = _media_options(given, _FLAT_VIDEO_OPTIONS, "videos_kwargs")
        ImageOptions.of(images)
        VideoOptions.of(videos)
        flags = {name: _flag(given, name) for name in TEMPLATE_OPTIONS[3:] if name in given}
        if flags.get("continue_final_message"):
            flags["add_generation_prompt"] = False
        return PromptOptions(_tools(given.get("tools", ())), _variables(given), images, videos, **flags)

    def of_media(self, kind: str, own: Mapping[str, Any]) -> ImageOptions | VideoOptions:
        """Returns the options of one image or video; those of its part override those of the call."""
        if kind == "image":
            return ImageOptions.of({**self.images, **own})
        # transformers takes only one of the two: if a part sets one, the call's other one does not apply
        other = {"fps": "num_frames", "num_frames": "fps"}
        left_out = {other[name] for name in own if name in other}
        return VideoOptions.of({**{k: v for k, v in self.videos.items() if k not in left_out}, **own})


def _media_options(given: Mapping[str, Any], names: Sequence[str], nested: str) -> dict[str, Any]:
    flat = {name: given[name] for name in names if name in given}
    inner = given.get(nested, {})
    if not isinstance(inner, Mapping):
        raise PromptError(f"{nested} {short(inner)}: expected an object of options")
    inner = {name: value for name, value in inner.items() if value is not None}
    if twice := flat.keys() & inner.keys():
        raise PromptError(f"{min(twice)} is given twice, by itself and in {nested}: keep one of them")
    return flat | inner


def _flag(given: Mapping[str, Any], name: str) -> bool:
    if not isinstance(given[name], bool):
        raise PromptError(f"{name} {short(given[name])}: expected true or false")
    return given[name]


def _tools(tools: Any) -> tuple[Any, ...]:
    if not isinstance(tools, list | tuple):
        raise PromptError(f"tools {short(tools)}: expected a list of JSON schemas")
    for i, tool in enumerate(tools):
        if not isinstance(tool, Mapping) and not callable(tool):
            raise PromptError(f"tools[{i}] {short(tool)}: expected a JSON schema of a function")
    return tuple(tools)


def _variables(given: Mapping[str, Any]) -> dict[str, Any]:
    variables = given.get("chat_template_kwargs", {})
    if not isinstance(variables, Mapping):
        raise PromptError(f"chat_template_kwargs {short(variables)}: expected an object of variables")
    if taken := [name for name in variables if name in _RESERVED]:
        raise PromptError(f"chat_template_kwargs.{taken[0]} is not a variable of a template: leave it out")
    variables = dict(variables)
    if (thinking := given.get("enable_thinking")) is not None:
        if not isinstance(thinking, bool):
            raise PromptError(f"enable_thinking {short(thinking)}: expected true or false")
        if variables.setdefault("enable_thinking", thinking) != thinking:
            raise PromptError("enable_thinking and chat_template_kwargs.enable_thinking differ: keep one of them")
    return variables
