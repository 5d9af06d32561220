"""POST /v1/completions: prompts as they are, without a chat template."""

import time
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any

import msgspec

from deepstack_jax.errors import short
from deepstack_jax.serving.endpoint import Call, Reply, Service
from deepstack_jax.serving.errors import RequestError
from deepstack_jax.serving.merged import closing_all, merged
from deepstack_jax.serving.openai.answers import Choice, Part, Usage, completion_logprobs, open_choice, run_choices
from deepstack_jax.serving.openai.fields import (
    CompletionRequest,
    TokenId,
    check_model,
    generate_request,
    grammar_of,
    parse_body,
    sampling_fields,
)
from deepstack_jax.serving.openai.output_parser import OutputParser
from deepstack_jax.serving.parsing import read_body
from deepstack_jax.serving.requests import check_logprobs
from deepstack_jax.serving.text_node import TextNode

MAX_PROMPTS = 128  # and answers
MAX_PROMPT_TOKENS = 1 << 20  # of all prompts, unless the context has more
DEFAULT_TOKENS = 16  # OpenAI's default


async def respond_to_completion(service: Service, node: TextNode, call: Call, reply: Reply) -> None:
    """POST /v1/completions of a node."""

    def read() -> tuple[CompletionRequest, list[list[int]]]:
        body = parse_body(call.body, CompletionRequest)
        check_model(body.model, node.model_names)
        _check(body)
        prompts = _token_ids(body, node)
        check_logprobs(len(prompts) * body.n, _most_tokens(body), body.logprobs)
        return body, prompts

    body, prompts = await read_body(call.body, read)
    sampling = sampling_fields(body, node.sampling_defaults, _most_tokens(body), **grammar_of(body, None))
    groups = [[open_choice(body, node, OutputParser()) for _ in range(body.n)] for _ in prompts]
    usages = [Usage() for _ in prompts]
    answer = _Answer(body, node, call, prompts, groups, usages)
    requests = [generate_request(sampling, body, body.logprobs, input_ids=ids) for ids in prompts]
    runs = [run_choices(service, call, *each) for each in zip(requests, groups, usages, strict=True)]
    async with closing_all(runs), aclosing(merged(runs)) as parts:
        async for group, (number, choice, part, _) in parts:
            if body.stream and (event := answer.event(group, number, choice, part)):
                await reply.event(event)
    if not body.stream:
        await reply.json(answer.body)
        return
    if body.stream_options.include_usage:
        await reply.event(answer.frame([]) | {"usage": answer.usage()})
    await reply.event("[DONE]")
    await reply.end()


def _most_tokens(body: CompletionRequest) -> int:
    return DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens


def _check(body: CompletionRequest) -> None:
    if body.suffix:
        raise RequestError("suffix is not supported: the model doesn't fill in the middle", param="suffix")
    if body.echo and body.logprobs is not None:
        raise RequestError(
            "echo with logprobs is not supported: log probabilities are those of the answer", param="echo"
        )


def _token_ids(body: CompletionRequest, node: TextNode) -> list[list[int]]:
    """The prompts as token ids.

    Raises:
        RequestError: too many of them, or one that is empty, too long, or outside the vocabulary.
    """
    prompts = (
        [body.prompt] if isinstance(body.prompt, str) or isinstance(next(iter(body.prompt), None), int) else body.prompt
    )
    if not 1 <= len(prompts) <= MAX_PROMPTS:
        raise RequestError(f"{len(prompts)} prompts: send 1 to {MAX_PROMPTS}", param="prompt")
    if len(prompts) * body.n > MAX_PROMPTS:
        raise RequestError(
            f"{len(prompts)} prompts with n {body.n}: ask for at most {MAX_PROMPTS} answers together", param="n"
        )
    most, ids = max(MAX_PROMPT_TOKENS, node.max_model_len), []
    for one in prompts:
        ids.append(node.token_ids(one) if isinstance(one, str) else _checked_ids(one, node))
        if (most := most - len(ids[-1])) < 0:
            raise RequestError(
                f"the prompts have more than {max(MAX_PROMPT_TOKENS, node.max_model_len)} tokens together: send fewer",
                param="prompt",
                code="context_length_exceeded",
            )
    return ids


def _checked_ids(prompt: Any, node: TextNode) -> list[int]:
    try:
        ids = msgspec.convert(prompt, list[TokenId])
    except msgspec.ValidationError:
        ids = []
    if not ids:
        raise RequestError(f"prompt {short(prompt)}: expected a text, token ids, or a list of either", param="prompt")
    node.check_tokens(len(ids))
    return ids


class _Answer:
    """The answer in OpenAI's shape; choices count through the prompts."""

    def __init__(
        self,
        body: CompletionRequest,
        node: TextNode,
        call: Call,
        prompts: Sequence[list[int]],
        groups: Sequence[Sequence[Choice]],
        usages: Sequence[Usage],
    ):
        self._request, self._node, self._prompts = body, node, prompts
        self._groups, self._usages = groups, usages
        self._shown = [[0] * body.n for _ in prompts]  # characters that events have had
        self._head = {
            "id": f"cmpl-{call.id}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": body.model or node.model_names[0],
            "system_fingerprint": node.fingerprint,
        }

    def body(self) -> dict[str, Any]:
        """The whole answer."""
        choices = []
        for group, of_prompt in enumerate(self._groups):
            for number, choice in enumerate(of_prompt):
                text = self._echo(group) + choice.whole.content
                choices.append(self._choice(group, number, choice, text, choice.token_ids, choice.logprobs, 0))
        return self.frame(choices) | {"usage": self.usage()}

    def frame(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """One event of a stream."""
        event = self._head | {"choices": choices}
        options = self._request.stream_options
        if self._request.stream and options.include_usage:
            event["usage"] = self.usage() if options.continuous_usage_stats else None
        return event

    def event(self, group: int, number: int, choice: Choice, part: Part) -> dict[str, Any] | None:
        """The event that tells what is new in a choice, None for nothing."""
        shown = self._shown[group][number]
        text = part.delta.content
        if not shown and len(choice.token_ids) == len(part.tokens):
            text = self._echo(group) + text
        if not (text or part.logprobs or choice.finish_reason):
            return None
        self._shown[group][number] += len(text)
        return self.frame([self._choice(group, number, choice, text, part.tokens, part.logprobs, shown)])

    def usage(self) -> dict[str, Any]:
        """Tokens of all prompts and choices."""
        cached = sum(usage.cached_tokens for usage in self._usages)
        total = Usage(sum(usage.prompt_tokens for usage in self._usages), cached)
        return total.fields([choice for group in self._groups for choice in group])

    def _echo(self, group: int) -> str:
        if not self._request.echo:
            return ""
        prompt = self._request.prompt
        if isinstance(prompt, str):
            return prompt
        given = prompt[group]
        return given if isinstance(given, str) else self._node.processor.text_of(self._prompts[group])

    def _choice(
        self, group: int, number: int, choice: Choice, text: str, tokens: list[int], logprobs: list[Any], offset: int
    ) -> dict[str, Any]:
        with_logprobs = self._request.logprobs is not None
        fields: dict[str, Any] = {
            "index": group * self._request.n + number,
            "text": text,
            "logprobs": completion_logprobs(self._node.processor, tokens, logprobs, offset) if with_logprobs else None,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }
        if self._request.return_token_ids:
            fields |= {"token_ids": tokens, "prompt_token_ids": self._prompts[group]}
        return fields
