"""Messages as OpenAI's clients send them, reduced to what the templates read."""

from collections.abc import Mapping
from typing import Any

from deepstack_jax.processing.messages import MESSAGE_KEYS, PART_KEYS
from deepstack_jax.processing.processor import Processor

LOW_DETAIL_PIXELS = 512 * 512  # OpenAI scales pictures of low detail down to that


def plain_messages(messages: list[Any], processor: Processor) -> list[Any]:
    """Returns the messages without the fields that nothing reads; null contents become empty.

    `reasoning` is another name of `reasoning_content`. What is not valid stays, and is refused where it is read.
    """
    low = LOW_DETAIL_PIXELS
    if processor.config.vision is not None:
        low = min(low, processor.image_settings.max_pixels)
    return [_plain(message, low) for message in messages]


def _plain(message: Any, low: int) -> Any:
    if not isinstance(message, Mapping):
        return message
    known = {key: value for key, value in message.items() if key in MESSAGE_KEYS and value is not None}
    if "reasoning_content" not in known and isinstance(message.get("reasoning"), str):
        known["reasoning_content"] = message["reasoning"]
    if known.get("role") == "function":  # the older name of a tool's answer
        known["role"] = "tool"
    known.setdefault("content", "")
    if isinstance(known["content"], list):
        known["content"] = [_plain_part(part, low) for part in known["content"]]
    return known


def _plain_part(part: Any, low: int) -> Any:
    """A part without `cache_control` and other fields that nothing reads; `detail` becomes a bound of pixels."""
    if not isinstance(part, Mapping):
        return part
    if part.get("type") == "refusal":
        return {"type": "text", "text": part.get("refusal")}
    plain = _known(part)
    details = [part.get("detail")]
    for key in ("image_url", "video_url"):
        if isinstance(inner := plain.get(key), Mapping):
            details.append(inner.get("detail"))
            plain[key] = _known(inner)
    if "low" in details and "max_pixels" not in plain:
        plain["max_pixels"] = low
    return plain


def _known(part: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in part.items() if key in PART_KEYS and key != "detail"}
