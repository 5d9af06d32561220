"""POST /v1/chat/completions."""

import time
from typing import Any

import msgspec

from deepstack_jax.serving.endpoint import Call, Reply, Service
from deepstack_jax.serving.errors import RequestError
from deepstack_jax.serving.openai.answers import Choice, Part, Usage, chat_logprobs, open_choice, run_choices
from deepstack_jax.serving.openai.chat_messages import plain_messages
from deepstack_jax.serving.openai.fields import (
    ChatRequest,
    check_model,
    generate_request,
    grammar_of,
    parse_body,
    sampling_fields,
)
from deepstack_jax.serving.openai.output_parser import Delta, OutputParser
from deepstack_jax.serving.openai.tools import after_reasoning, chosen_tools, tool_grammar
from deepstack_jax.serving.parsing import read_body, to_json
from deepstack_jax.serving.requests import GenerateRequest, check_parts
from deepstack_jax.serving.text_node import TextNode
from deepstack_jax.serving.timeline import Span, timeline_fields


async def respond_to_chat(service: Service, node: TextNode, call: Call, reply: Reply) -> None:
    """POST /v1/chat/completions of a node."""

    def read() -> tuple[ChatRequest, tuple[bool, bool], GenerateRequest]:
        body = parse_body(call.body, ChatRequest)
        check_model(body.model, node.model_names)
        thinking = thinking_of(body, node)
        return body, thinking, chat_request(body, node, thinking)

    body, thinking, request = await read_body(call.body, read)
    choices = [new_choice(body, node, thinking) for _ in range(body.n)]
    answer = _Answer(body, node, call, choices, call.deadline - service.timeout)
    async for number, choice, part, chunk in run_choices(service, call, request, choices, answer.usage):
        if body.timeline:
            answer.spans[number] = chunk.timeline
        if body.return_token_ids and chunk.prompt_ids is not None:
            answer.prompt_ids = chunk.prompt_ids.tolist()
        if body.stream:
            for event in answer.events(number, choice, part):
                await reply.event(event)
    if not body.stream:
        await reply.json(answer.body)
        return
    if body.stream_options.include_usage:
        await reply.event(answer.frame([]) | {"usage": answer.usage.fields(choices)} | answer.timeline())
    await reply.event("[DONE]")
    await reply.end()


def chat_request(body: ChatRequest, node: TextNode, thinking: tuple[bool, bool]) -> GenerateRequest:
    """What the node answers for a chat request; `thinking` is from `thinking_of`.

    Raises:
        RequestError: options that are out of range, or don't go together.
    """
    check_parts(body.messages)
    if body.top_logprobs and not body.logprobs:
        raise RequestError("top_logprobs needs logprobs: set it to true", param="top_logprobs")
    tools = chosen_tools(body)
    grammar = grammar_of(body, body.response_format)
    if (calls := tool_grammar(body, tools, node.processor.tokenizer)) is not None:
        if grammar:
            raise RequestError("a required tool call and response_format exclude each other", param="tool_choice")
        grammar = {"lark": calls}
    if grammar and thinking[1]:
        grammar = after_reasoning(grammar, node.processor.tokenizer)
    variables = dict(body.chat_template_kwargs)
    if body.reasoning_effort is not None and node.processor.reads_variable("reasoning_effort"):
        variables.setdefault("reasoning_effort", body.reasoning_effort)
    most = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    prompts = body.add_generation_prompt
    return generate_request(
        sampling_fields(body, node.sampling_defaults, most, **grammar),
        body,
        body.top_logprobs if body.logprobs else None,
        messages=plain_messages(body.messages, node.processor),
        tools=tools,
        chat_template_kwargs=variables,
        enable_thinking=_enable_thinking(body),
        mm_processor_kwargs=body.mm_processor_kwargs,
        add_generation_prompt=not body.continue_final_message if prompts is None else prompts,
        continue_final_message=body.continue_final_message,
        allow_empty=True,
        timeline=body.timeline,
        deepstack_scales=body.deepstack_scales,
    )


def new_choice(body: ChatRequest, node: TextNode, thinking: tuple[bool, bool]) -> Choice:
    """A choice without tokens; `thinking` is from `thinking_of`."""
    thinks, in_reasoning = thinking
    tools = bool(body.tools) and body.tool_choice != "none"
    parser = OutputParser(thinks=thinks, in_reasoning=in_reasoning, tools=tools)
    one_call = not body.parallel_tool_calls or isinstance(body.tool_choice, dict)
    return open_choice(body, node, parser, one_call)


def _enable_thinking(body: ChatRequest) -> bool | None:
    """What the template is told; the effort "none" means no reasoning."""
    return False if body.enable_thinking is None and body.reasoning_effort == "none" else body.enable_thinking


def thinking_of(body: ChatRequest, node: TextNode) -> tuple[bool, bool]:
    """Whether the answer may hold reasoning, and whether it begins with it (see `Processor.thinking`)."""
    if body.continue_final_message or body.add_generation_prompt is False:
        return False, False
    variables = dict(body.chat_template_kwargs)
    if (thinking := _enable_thinking(body)) is not None:
        variables["enable_thinking"] = thinking
    return node.processor.thinking(variables)


class _Answer:
    """The answer in OpenAI's shape: whole, or the events of a stream."""

    def __init__(self, body: ChatRequest, node: TextNode, call: Call, choices: list[Choice], arrived: float):
        self.usage = Usage()
        self.spans: dict[int, tuple[Span, ...]] = {}  # of each choice, if the timeline is asked for
        self.prompt_ids: list[int] = []
        self._request, self._node, self._choices = body, node, choices
        self._arrived = arrived
        self._began = [False] * len(choices)
        self._head = {
            "id": f"chatcmpl-{call.id}",
            "created": int(time.time()),
            "model": body.model or node.model_names[0],
            "system_fingerprint": node.fingerprint,
        }

    def body(self) -> dict[str, Any]:
        """The whole answer."""
        choices = [
            {
                "index": number,
                "message": self._message(choice.whole),
                "logprobs": self._logprobs(choice.token_ids, choice.logprobs),
                "finish_reason": self._reason(choice),
                "stop_reason": choice.stop_reason,
            }
            | ({"token_ids": choice.token_ids} if self._request.return_token_ids else {})
            for number, choice in enumerate(self._choices)
        ]
        whole = self._head | {"object": "chat.completion", "choices": choices}
        whole["usage"] = self.usage.fields(self._choices)
        whole |= self.timeline()
        return whole | ({"prompt_token_ids": self.prompt_ids} if self._request.return_token_ids else {})

    def timeline(self) -> dict[str, Any]:
        """The field with the timeline, if it is asked for."""
        if not self._request.timeline:
            return {}
        usage = self.usage.fields(self._choices)
        return {"timeline": timeline_fields(self.spans, self._node.role, self._arrived, usage)}

    def frame(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """One event of a stream."""
        event = self._head | {"object": "chat.completion.chunk", "choices": choices}
        options = self._request.stream_options
        if options.include_usage:
            event["usage"] = self.usage.fields(self._choices) if options.continuous_usage_stats else None
        return event

    def events(self, number: int, choice: Choice, part: Part) -> list[dict[str, Any]]:
        """The events that tell what is new in a choice."""
        events = []
        ids = self._request.return_token_ids
        if not self._began[number]:
            self._began[number] = True
            first = self.frame([self._choice(number, {"role": "assistant", "content": ""})])
            events.append(first | ({"prompt_token_ids": self.prompt_ids} if ids else {}))
        deltas = list(_deltas(part.delta))
        if not deltas and (part.logprobs or (ids and part.tokens)):
            deltas = [{}]
        for i, delta in enumerate(deltas):
            new = self._choice(number, delta)
            if i == 0:
                new["logprobs"] = self._logprobs(part.tokens, part.logprobs)
                new |= {"token_ids": part.tokens} if ids else {}
            events.append(self.frame([new]))
        if choice.finish_reason is not None:
            ended = {"finish_reason": self._reason(choice), "stop_reason": choice.stop_reason}
            events.append(self.frame([self._choice(number, {}) | ended]))
        return events

    def _choice(self, number: int, delta: dict[str, Any]) -> dict[str, Any]:
        return {"index": number, "delta": delta, "logprobs": None, "finish_reason": None}

    def _reason(self, choice: Choice) -> str | None:
        # OpenAI ends the answer to a named tool with "stop"
        named = isinstance(self._request.tool_choice, dict)
        return "stop" if named and choice.finish_reason == "tool_calls" else choice.finish_reason

    def _logprobs(self, tokens: list[int], logprobs: list[Any]) -> msgspec.Raw | None:
        if not self._request.logprobs:
            return None
        # JSON at once: as objects, those of all choices together would take many times the memory
        return msgspec.Raw(to_json(chat_logprobs(self._node.processor, tokens, logprobs)))

    def _message(self, whole: Delta) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": whole.content, "refusal": None}
        if whole.reasoning:
            message |= {"reasoning": whole.reasoning, "reasoning_content": whole.reasoning}
        if whole.calls:
            message["content"] = whole.content or None
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in whole.calls
            ]
        return message


def _deltas(new: Delta) -> list[dict[str, Any]]:
    """OpenAI's deltas, in the order in which a model writes: reasoning, content, tool calls."""
    deltas: list[dict[str, Any]] = []
    if new.reasoning:
        deltas.append({"reasoning": new.reasoning, "reasoning_content": new.reasoning})
    if new.content:
        deltas.append({"content": new.content})
    for call in new.calls:
        function = {"name": call.name, "arguments": call.arguments} if call.name else {"arguments": call.arguments}
        first = {"id": call.id, "type": "function"} if call.name else {}
        deltas.append({"tool_calls": [{"index": call.index, **first, "function": function}]})
    return deltas
