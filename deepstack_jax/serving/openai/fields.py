"""The bodies of OpenAI's endpoints, with the extensions that vLLM and SGLang serve; unknown fields are ignored."""

import random
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from deepstack_jax.errors import one_line, short
from deepstack_jax.processing.messages import ROLES
from deepstack_jax.processing.stop_strings import StopStrings
from deepstack_jax.sampling_options import SamplingOptionError
from deepstack_jax.serving.errors import RequestError
from deepstack_jax.serving.parsing import parse_json, to_json
from deepstack_jax.serving.requests import (
    MAX_BIASES,
    MAX_CHOICES,
    MAX_TOOLS,
    GenerateRequest,
    Messages,
    Name,
    Options,
    SamplingFields,
    Scales,
    Stops,
    explain_invalid,
)

MAX_OUTPUT_CHOICES = 4096  # of structured_outputs
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]


# for /openapi.json; what reads messages is processing.messages
MESSAGE_SCHEMA = {
    "type": "object",
    "required": ["role"],
    "properties": {
        "role": {"enum": list(ROLES)},
        "content": {
            "anyOf": [
                {"type": ["string", "null"]},
                {
                    "type": "array",
                    "items": {
                        "oneOf": [
                            {
                                "type": "object",
                                "required": ["type", "text"],
                                "properties": {"type": {"enum": ["text", "input_text"]}, "text": {"type": "string"}},
                            },
                            {
                                "type": "object",
                                "required": ["type", "image_url"],
                                "properties": {
                                    "type": {"enum": ["image_url", "input_image"]},
                                    "image_url": {"type": ["string", "object"]},
                                },
                            },
                            {
                                "type": "object",
                                "required": ["type", "video_url"],
                                "properties": {
                                    "type": {"const": "video_url"},
                                    "video_url": {"type": ["string", "object"]},
                                },
                            },
                        ]
                    },
                },
            ]
        },
        "tool_calls": {"type": ["array", "null"]},
        "tool_call_id": {"type": "string"},
        "reasoning_content": {"type": "string"},
    },
}


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class JsonSchema(msgspec.Struct, frozen=True):
    name: Name = ""
    description: str | None = None
    schema: dict[str, Any] | bool | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, frozen=True):
    type: Literal["text", "json_object", "json_schema", "regex", "grammar"]
    json_schema: JsonSchema | None = None
    pattern: str | None = None
    grammar: str | None = None


class StructuredOutputs(msgspec.Struct, frozen=True):
    """vLLM's extension: one of these."""

    json: str | dict[str, Any] | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: Annotated[list[str], Meta(max_length=MAX_OUTPUT_CHOICES)] | None = None
    grammar: str | None = None


class Function(msgspec.Struct, frozen=True):
    name: Annotated[str, Meta(min_length=1, max_length=256)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, frozen=True):
    function: Function
    type: Literal["function"] = "function"


class CommonFields(msgspec.Struct, frozen=True, kw_only=True):
    """What chat completions and completions share. None means the checkpoint's default, or none."""

    model: Name | None = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] = 1
    stop: Stops = []
    seed: int | None = None
    max_tokens: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float = 0.0
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Annotated[dict[str, float], Meta(max_length=MAX_BIASES)] = {}
    min_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] = 0
    ignore_eos: bool = False
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=14)] = []
    return_token_ids: bool = False
    cache_salt: Annotated[str, Meta(max_length=1024)] = ""
    regex: str | None = None
    structured_outputs: StructuredOutputs = StructuredOutputs()


class ChatRequest(CommonFields, frozen=True, kw_only=True):
    """The body of `POST /v1/chat/completions`."""

    messages: Annotated[Messages, Meta(min_length=1, extra_json_schema={"items": MESSAGE_SCHEMA})]
    max_completion_tokens: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] = 0
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Meta(max_length=MAX_TOOLS)] = []
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool = True
    chat_template_kwargs: Options = {}
    enable_thinking: bool | None = None
    reasoning_effort: Name | None = None
    mm_processor_kwargs: Options = {}
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    timeline: bool = False
    deepstack_scales: Scales | None = None


class CompletionRequest(CommonFields, frozen=True, kw_only=True):
    """The body of `POST /v1/completions`."""

    prompt: str | list[Any]  # a text, token ids, or a list of either
    echo: bool = False
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    suffix: str | None = None


def parse_body[T](body: bytes | bytearray, kind: type[T]) -> T:
    """Returns the request in a body; fields that are null count as absent.

    Raises:
        RequestError: 400 with one line that names the field, its value and what it should be.
    """
    raw = parse_json(body)
    if not isinstance(raw, dict):
        raise RequestError("the body is not a JSON object: send one", code="invalid_json")
    return convert_body(raw, kind)


def convert_body[T](raw: dict[str, Any], kind: type[T]) -> T:
    """As `parse_body`, of JSON that was parsed already."""
    plain = {name: value for name, value in raw.items() if value is not None}
    try:
        return msgspec.convert(plain, kind)
    except msgspec.ValidationError as error:
        raise explain_invalid(str(error), plain) from None


def check_model(name: str | None, known: Iterable[str]) -> None:
    """Refuses another model's name; an empty one is this model.

    Raises:
        RequestError: 404.
    """
    if name and name not in known:
        raise RequestError(
            f"the model {short(name)} does not exist: use {', '.join(known)}", 404, "model", "model_not_found"
        )


def sampling_fields(
    body: CommonFields,
    defaults: Mapping[str, float],
    max_tokens: int | None,
    **more: Any,
) -> SamplingFields:
    """Returns the sampling options of a body; `defaults` are those of the checkpoint's generation_config.json.

    Raises:
        RequestError: one is out of its range.
    """
    chosen = {name: getattr(body, name) for name in ("temperature", "top_p", "top_k", "repetition_penalty")}
    given = {name: value for name, value in chosen.items() if value is not None}
    if given.get("top_p") == 0:  # OpenAI takes it: the most likely token
        given["top_p"] = 1e-9
    fields = SamplingFields(
        max_new_tokens=max_tokens,
        **{"temperature": 1.0, **defaults, **given},
        min_p=body.min_p,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        seed=random.getrandbits(31) if body.seed is None else body.seed,
        stop=body.stop,
        stop_token_ids=body.stop_token_ids,
        ignore_eos=body.ignore_eos,
        min_new_tokens=body.min_tokens,
        logit_bias=body.logit_bias,
        n=body.n,
        **more,
    )
    try:
        fields.options()
        StopStrings.of(fields.stop)
    except SamplingOptionError as error:
        name = {"max_new_tokens": "max_tokens"}.get(error.name, error.name)
        raise RequestError(
            f"{name} {short(error.value)}: expected {error.expected}", param=name, code="invalid_value"
        ) from None
    except ValueError as error:
        raise RequestError(one_line(error), code="invalid_value") from None
    return fields


def grammar_of(body: CommonFields, response_format: ResponseFormat | None) -> dict[str, str]:
    """Returns the one constraint that a body asks for, as a field of `SamplingFields`; {} for none.

    Raises:
        RequestError: several, or one without its schema, pattern or grammar.
    """
    found: list[dict[str, str]] = []
    outputs = body.structured_outputs
    if response_format is not None and response_format.type != "text":
        found.append(_of_response_format(response_format))
    if body.regex is not None:
        found.append({"regex": body.regex})
    if outputs.json is not None:
        found.append({"json_schema": outputs.json if isinstance(outputs.json, str) else to_json(outputs.json).decode()})
    if outputs.json_object:
        found.append({"json_schema": '{"type": "object"}'})
    if outputs.regex is not None:
        found.append({"regex": outputs.regex})
    if outputs.choice is not None:
        if not outputs.choice:
            raise RequestError("structured_outputs.choice is empty: send some texts", param="structured_outputs.choice")
        found.append({"lark": _choices(outputs.choice)})
    if outputs.grammar is not None:
        found.append({"lark": outputs.grammar})
    if len(found) > 1:
        raise RequestError("several constraints of the output are given: send one of them", param="response_format")
    return found[0] if found else {}


def _of_response_format(given: ResponseFormat) -> dict[str, str]:
    match given.type:
        case "json_object":
            return {"json_schema": '{"type": "object"}'}
        case "json_schema":
            if given.json_schema is None or given.json_schema.schema is None:
                raise RequestError(
                    "response_format.json_schema has no schema: send a JSON schema", param="response_format.json_schema"
                )
            return {"json_schema": to_json(given.json_schema.schema).decode()}
        case "regex":
            if given.pattern is None:
                raise RequestError("response_format.pattern is missing: send a pattern", param="response_format")
            return {"regex": given.pattern}
    if given.grammar is None:
        raise RequestError("response_format.grammar is missing: send a grammar", param="response_format")
    return {"lark": given.grammar}


def _choices(choices: list[str]) -> str:
    return "start: " + " | ".join(to_json(choice).decode() for choice in choices)


def generate_request(
    sampling: SamplingFields, body: CommonFields, logprobs: int | None, **fields: Any
) -> GenerateRequest:
    """Returns what a node answers, with the fields that all endpoints fill alike."""
    return GenerateRequest(
        sampling_params=sampling,
        cache_salt=body.cache_salt,
        return_logprob=logprobs is not None,
        top_logprobs_num=logprobs or 0,
        **fields,
    )
