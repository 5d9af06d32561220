"""POST /v1/responses: OpenAI's Responses API, without stored responses and without tools that the server would run."""

import time
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from deepstack_jax.errors import short
from deepstack_jax.serving.endpoint import Call, Reply, Service
from deepstack_jax.serving.errors import RequestError
from deepstack_jax.serving.openai.answers import Choice, Usage, chat_logprobs, run_choices
from deepstack_jax.serving.openai.chat import chat_request, new_choice, thinking_of
from deepstack_jax.serving.openai.fields import ChatRequest, check_model, convert_body, parse_body
from deepstack_jax.serving.openai.response_items import ResponseItems
from deepstack_jax.serving.parsing import read_body
from deepstack_jax.serving.requests import MAX_OPTIONS, MAX_TOOLS, GenerateRequest, Name, Options
from deepstack_jax.serving.text_node import TextNode

MAX_ITEMS = 4096
MAX_METADATA = 16  # entries, as in OpenAI's API


class TextFormat(msgspec.Struct, frozen=True):
    type: Literal["text", "json_object", "json_schema"] = "text"
    name: Name = ""
    schema: dict[str, Any] | None = None
    strict: bool | None = None
    description: str | None = None


class TextOptions(msgspec.Struct, frozen=True):
    format: TextFormat = TextFormat()


class ReasoningOptions(msgspec.Struct, frozen=True):
    effort: Name | None = None


class ResponsesRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The body; what isn't here is ignored, or refused by `as_chat`."""

    input: str | Annotated[list[Any], Meta(min_length=1, max_length=MAX_ITEMS)]
    model: Name | None = None
    instructions: str | None = None
    stream: bool = False
    max_output_tokens: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    tools: Annotated[list[dict[str, Any]], Meta(max_length=MAX_TOOLS)] = []
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool = True
    text: TextOptions = TextOptions()
    reasoning: ReasoningOptions = ReasoningOptions()
    top_logprobs: int = 0
    include: Annotated[list[Name], Meta(max_length=MAX_OPTIONS)] = []
    previous_response_id: Name | None = None
    conversation: Any = None
    background: bool = False
    metadata: Annotated[dict[Name, Any], Meta(max_length=MAX_METADATA)] = {}
    user: Annotated[str, Meta(max_length=1024)] | None = None
    seed: int | None = None
    chat_template_kwargs: Options = {}
    enable_thinking: bool | None = None
    mm_processor_kwargs: Options = {}
    cache_salt: str = ""


async def respond_to_response(service: Service, node: TextNode, call: Call, reply: Reply) -> None:
    """POST /v1/responses of a node."""

    def read() -> tuple[ResponsesRequest, ChatRequest, tuple[bool, bool], GenerateRequest]:
        body = parse_body(call.body, ResponsesRequest)
        check_model(body.model, node.model_names)
        chat = as_chat(body)
        thinking = thinking_of(chat, node)
        return body, chat, thinking, chat_request(chat, node, thinking)

    body, chat, thinking, request = await read_body(call.body, read)
    choice, usage = new_choice(chat, node, thinking), Usage()
    items, head = ResponseItems(), _head(body, node, call)
    begun = False
    async for _, _, part, _ in run_choices(service, call, request, [choice], usage):
        logprobs = []
        if chat.logprobs:
            logprobs = chat_logprobs(node.processor, part.tokens, part.logprobs)["content"]
        events = [] if begun else [items.event(kind, response=_response(head, items)) for kind in _BEGINNING]
        begun = True
        events += items.feed(part.delta, logprobs)
        if body.stream:
            for event in events:
                await reply.event(event, event["type"])
    whole = choice.finish_reason != "length"
    events = list(items.finish(whole))
    response = _response(head, items, choice, usage)
    if not body.stream:
        await reply.json(lambda: response)
        return
    events.append(items.event("completed" if whole else "incomplete", response=response))
    for event in events:
        await reply.event(event, event["type"])
    await reply.end()


_BEGINNING = ("created", "in_progress")


def as_chat(body: ResponsesRequest) -> ChatRequest:
    """The chat request that asks for the same.

    Raises:
        RequestError: what the server doesn't keep or run.
    """
    for name in ("previous_response_id", "conversation", "background"):
        if getattr(body, name):
            raise RequestError(f"{name} is not supported: responses are not stored, send the whole input", param=name)
    for i, tool in enumerate(body.tools):
        if tool.get("type") != "function":
            raise RequestError(f"tools[{i}] {short(tool)}: only functions can be called here", param=f"tools[{i}]")
    messages: list[Any] = [{"role": "system", "content": body.instructions}] if body.instructions else []
    messages += [{"role": "user", "content": body.input}] if isinstance(body.input, str) else _messages(body.input)
    given = body.text.format
    formats = {
        "text": None,
        "json_object": {"type": "json_object"},
        "json_schema": {"type": "json_schema", "json_schema": {"name": given.name, "schema": given.schema}},
    }
    wants_logprobs = body.top_logprobs > 0 or "message.output_text.logprobs" in body.include
    chat = {
        "messages": messages,
        "max_completion_tokens": body.max_output_tokens,
        "tools": [_chat_tool(tool) for tool in body.tools],
        "response_format": formats[given.type],
        "reasoning_effort": body.reasoning.effort,
        "logprobs": wants_logprobs,
        **{name: getattr(body, name) for name in _SAME_IN_CHAT},
    }
    return convert_body(chat, ChatRequest)


_SAME_IN_CHAT = (
    "temperature",
    "top_p",
    "tool_choice",
    "parallel_tool_calls",
    "top_logprobs",
    "seed",
    "chat_template_kwargs",
    "enable_thinking",
    "mm_processor_kwargs",
    "cache_salt",
)


def _chat_tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {key: value for key, value in tool.items() if key != "type"}}


def _messages(items: list[Any]) -> list[Any]:
    """Input items as chat messages: a model's reasoning, text and calls between two other messages are one message."""
    messages: list[dict[str, Any]] = []

    def assistant() -> dict[str, Any]:
        if not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": ""})
        return messages[-1]

    def only_thought() -> bool:
        return bool(messages) and messages[-1]["role"] == "assistant" and messages[-1]["content"] == ""

    for number, item in enumerate(items):
        where = f"input[{number}]"
        if not isinstance(item, Mapping):
            raise RequestError(f"{where} {short(item)}: expected an object", param=where)
        match item.get("type", "message"):
            case "message" if item.get("role") == "assistant" and only_thought():
                messages[-1]["content"] = item.get("content")
            case "message":
                messages.append({"role": item.get("role"), "content": item.get("content")})
            case "function_call":
                called = {"name": item.get("name"), "arguments": item.get("arguments")}
                call = {"id": item.get("call_id"), "type": "function", "function": called}
                assistant().setdefault("tool_calls", []).append(call)
            case "function_call_output":
                output = item.get("output")
                messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": output})
            case "reasoning":
                texts = [part.get("text", "") for part in item.get("content") or [] if isinstance(part, Mapping)]
                if texts:
                    assistant()["reasoning_content"] = "".join(texts)
            case other:
                raise RequestError(f"{where}.type {short(other)} is not supported: leave the item out", param=where)
    return messages


def _head(body: ResponsesRequest, node: TextNode, call: Call) -> dict[str, Any]:
    """The fields of a response that don't change."""
    defaults = node.sampling_defaults
    given = body.text.format
    shown = {"type": given.type}
    if given.type == "json_schema":
        shown |= {"name": given.name, "schema": given.schema, "strict": given.strict, "description": given.description}
    return {
        "id": f"resp_{call.id}",
        "object": "response",
        "created_at": int(time.time()),
        "model": body.model or node.model_names[0],
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata,
        "parallel_tool_calls": body.parallel_tool_calls,
        "previous_response_id": None,
        "reasoning": {"effort": body.reasoning.effort, "summary": None},
        "store": False,
        "system_fingerprint": node.fingerprint,
        "temperature": defaults.get("temperature", 1.0) if body.temperature is None else body.temperature,
        "text": {"format": shown},
        "tool_choice": body.tool_choice or "auto",
        "tools": body.tools,
        "top_p": defaults.get("top_p", 1.0) if body.top_p is None else body.top_p,
        "truncation": "disabled",
        "user": body.user,
    }


def _response(
    head: dict[str, Any], items: ResponseItems, choice: Choice | None = None, usage: Usage | None = None
) -> dict[str, Any]:
    """The response so far, or the whole one with its choice."""
    cut = choice is not None and choice.finish_reason == "length"
    fields = {
        "status": "in_progress" if choice is None else "incomplete" if cut else "completed",
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "output": [] if choice is None else items.items,
        "usage": None,
    }
    if choice is not None and usage is not None:
        counted = usage.fields([choice])
        fields["usage"] = {
            "input_tokens": counted["prompt_tokens"],
            "input_tokens_details": counted["prompt_tokens_details"],
            "output_tokens": counted["completion_tokens"],
            "output_tokens_details": counted["completion_tokens_details"],
            "total_tokens": counted["total_tokens"],
        }
    return head | fields
