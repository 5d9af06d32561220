"""Answers in the making: what OpenAI's endpoints do alike with the tokens of each choice."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from deepstack_jax.engine.runner import Chunk
from deepstack_jax.processing.processor import Processor
from deepstack_jax.processing.stop_strings import StopStrings
from deepstack_jax.sampling import TokenLogprobs
from deepstack_jax.serving.endpoint import Call, Service
from deepstack_jax.serving.errors import RequestError
from deepstack_jax.serving.openai.fields import CommonFields
from deepstack_jax.serving.openai.output_parser import Delta, OutputParser
from deepstack_jax.serving.requests import GenerateRequest
from deepstack_jax.serving.text_node import TextNode


@dataclass
class Part:
    """What one chunk adds to a choice: text, told apart, and its tokens with their log probabilities."""

    delta: Delta
    tokens: list[int]
    logprobs: list[TokenLogprobs]


@dataclass(eq=False)
class Choice:
    """One answer of a request, as far as it has come.

    Attributes:
        parser: divides its text.
        min_tokens: stop strings are not looked for in the first ones.
        one_call: whether the answer ends with its first tool call.
        stop_token_ids, end_token_ids: the request's and the model's, which are no part of the text.
        finish_reason: "stop", "length" or "tool_calls" once it has ended.
        stop_reason: the stop string, or the stop token of the request, that ended it.
    """

    processor: Processor
    stop: StopStrings
    parser: OutputParser
    min_tokens: int = 0
    one_call: bool = False
    stop_token_ids: Sequence[int] = ()
    end_token_ids: Sequence[int] = ()
    whole: Delta = field(default_factory=Delta)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    reasoning_tokens: int = 0

    def __post_init__(self) -> None:
        self._pieces = self.processor.decode_stream()

    def add(self, chunk: Chunk) -> Part:
        """Takes the next tokens and returns what is new."""
        part = Part(Delta(), [], [])
        for number, token in enumerate(chunk.tokens):
            part.tokens.append(token)
            last = chunk.finish_reason == "stop" and number == len(chunk.tokens) - 1
            if chunk.logprobs and not (last and token in (*self.end_token_ids, *self.stop_token_ids)):
                part.logprobs.append(chunk.logprobs[number])
            text = self._pieces.feed(token)
            if len(self.token_ids) + len(part.tokens) > self.min_tokens:
                text = self.stop.feed(text)
            self._hear(part, text)
            self.reasoning_tokens += self.parser.reasoning
            if self.stop.matched is not None or (self.one_call and self.parser.calls_done):
                break
        self.token_ids += part.tokens
        self.logprobs += part.logprobs
        if self.stop.matched is not None:
            self._end(part, "stop", self.stop.matched)
        elif self.one_call and self.parser.calls_done:
            self._end(part, "stop", None)
        elif chunk.finish_reason is not None:
            self._hear(part, self.stop.feed(self._pieces.finish()) + self.stop.finish())
            last = self.token_ids[-1] if self.token_ids else None
            self._end(part, chunk.finish_reason, last if last in self.stop_token_ids else None)
        return part

    def _hear(self, part: Part, text: str) -> None:
        delta = self.parser.feed(text)
        _append(part.delta, delta)
        _append(self.whole, delta)

    def _end(self, part: Part, reason: str, stop_reason: str | int | None) -> None:
        rest = self.parser.finish()
        _append(part.delta, rest)
        _append(self.whole, rest)
        self.finish_reason = "tool_calls" if self.parser.calls and reason == "stop" else reason
        self.stop_reason = stop_reason


def open_choice(body: CommonFields, node: TextNode, parser: OutputParser, one_call: bool = False) -> Choice:
    """A choice of a request, without tokens."""
    return Choice(
        node.processor,
        StopStrings.of(body.stop),
        parser,
        body.min_tokens,
        one_call,
        body.stop_token_ids,
        () if body.ignore_eos else node.end_token_ids,
    )


@dataclass
class Usage:
    """Tokens of a request and of all its choices."""

    prompt_tokens: int = 0
    cached_tokens: int = 0

    def add(self, chunk: Chunk) -> None:
        """Takes what a chunk says of the prompt."""
        self.prompt_tokens = chunk.prompt_tokens
        self.cached_tokens = max(self.cached_tokens, chunk.cached_tokens)

    def fields(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """OpenAI's `usage`."""
        made = sum(len(choice.token_ids) for choice in choices)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": made,
            "total_tokens": self.prompt_tokens + made,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": sum(choice.reasoning_tokens for choice in choices)},
        }


async def run_choices(
    service: Service, call: Call, request: GenerateRequest, choices: Sequence[Choice], usage: Usage
) -> AsyncGenerator[tuple[int, Choice, Part, Chunk]]:
    """Runs a request until all of its choices have ended: (number of a choice, the choice, what is new, its chunk)."""
    ended: set[int] = set()  # a choice that a stop string ends gives its slot back while the others go on
    try:
        async with aclosing(service.generate(request, call, ended)) as chunks:
            async for chunk in chunks:
                usage.add(chunk)
                choice = choices[chunk.choice]
                part = choice.add(chunk)
                if choice.finish_reason is not None:
                    ended.add(chunk.choice)
                yield chunk.choice, choice, part, chunk
                if len(ended) == len(choices):
                    return
    except RequestError as error:
        if error.param == "max_new_tokens":  # the native API's name
            error.param, error.args = "max_tokens", (str(error).replace("max_new_tokens", "max_tokens"),)
        raise


def chat_logprobs(processor: Processor, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> dict[str, Any]:
    """OpenAI's `logprobs` of chat completions, for tokens and their log probabilities."""

    def fields(token: int, logprob: float) -> dict[str, Any]:
        data = processor.token_bytes(token)
        return {"token": data.decode(errors="replace"), "logprob": _finite(logprob), "bytes": list(data)}

    content = [
        fields(token, each.logprob) | {"top_logprobs": [fields(*one) for one in each.top]}
        for token, each in zip(tokens, logprobs, strict=False)
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(
    processor: Processor, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs], offset: int
) -> dict[str, Any]:
    """OpenAI's `logprobs` of completions; `offset` is the length of the text before these tokens."""
    texts = [processor.token_bytes(token).decode(errors="replace") for token in tokens[: len(logprobs)]]
    offsets = list(accumulate(map(len, texts), initial=offset))[:-1]
    top = [
        {processor.token_bytes(token).decode(errors="replace"): _finite(value) for token, value in each.top}
        for each in logprobs
    ]
    values = [_finite(each.logprob) for each in logprobs]
    return {"tokens": texts, "token_logprobs": values, "top_logprobs": top, "text_offset": offsets}


def _finite(logprob: float) -> float:
    return max(logprob, -9999.0)  # JSON has no infinity; OpenAI's lowest value


def _append(whole: Delta, new: Delta) -> None:
    whole.content += new.content
    whole.reasoning += new.reasoning
    for call in new.calls:
        if call.name or not whole.calls or whole.calls[-1].index != call.index:
            whole.calls.append(type(call)(call.index, call.id, call.name, call.arguments))
        else:
            whole.calls[-1].arguments += call.arguments
