"""Tools, reasoning and structured output through OpenAI's client, on a random model whose template has them.

What the random model writes is decided by grammars: those that the server makes for a required call, and patterns by
which a test says what the model "wants" to write.
"""

import asyncio
import json
import re
from collections.abc import Iterator
from typing import Any, Literal

import jsonschema
import numpy as np
import openai
import pytest
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

import deepstack_jax as dsj
from deepstack_jax.engine.options import EngineOptions
from deepstack_jax.processing.grammar import compile_grammar
from deepstack_jax.serving.access import Access, Keys
from deepstack_jax.serving.limits import Limits
from deepstack_jax.serving.openai.tools import after_reasoning
from tests.api_server import api_server, client_of, write_thinking_checkpoint
from tests.tiny_tokenizer import tiny_tokenizer

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "weather", "description": "Forecast.", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "now"}},
]
SAID: list[Any] = [{"role": "user", "content": "How is the weather?"}]
QUIET = {"chat_template_kwargs": {"enable_thinking": False}}
CALLS = (
    r"Wait\.\n<tool_call>\n\{\"name\": \"weather\", \"arguments\": \{\"city\": \"Rome\", \"days\": 3\}\}\n</tool_call>"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> dsj.Model:
    path = tmp_path_factory.mktemp("tools") / "tiny"
    write_thinking_checkpoint(path)
    return dsj.load(path)


@pytest.fixture(scope="module")
def url(model: dsj.Model) -> Iterator[str]:
    with api_server(model, "tiny", EngineOptions(slots=4, chunk=128)) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return client_of(url)


def create(client: openai.OpenAI, messages: list[Any] = SAID, **options: Any) -> Any:
    options["extra_body"] = {**QUIET, **options.get("extra_body", {})}
    return client.chat.completions.create(model="tiny", messages=messages, **options)


def collect(events: Any) -> dict[str, Any]:
    """A stream put together as clients do: names come once, arguments piece by piece."""
    text, reasoning, reason, calls = "", "", None, {}
    for event in events:
        if not event.choices:
            continue
        choice = event.choices[0]
        text += choice.delta.content or ""
        reasoning += getattr(choice.delta, "reasoning", None) or ""
        for call in choice.delta.tool_calls or []:
            known = calls.setdefault(call.index, {"id": call.id, "name": call.function.name, "arguments": ""})
            assert (call.id is None) == (call.function.name is None)
            assert call.id in (None, known["id"])
            known["arguments"] += call.function.arguments or ""
        reason = choice.finish_reason or reason
    return {"text": text, "reasoning": reasoning, "reason": reason, "calls": list(calls.values())}


class TestTools:
    @pytest.mark.parametrize("seed", range(4))
    @pytest.mark.parametrize(
        ("choice", "reason"),
        [("required", "tool_calls"), ({"type": "function", "function": {"name": "weather"}}, "stop")],
    )
    def test_a_call_that_has_to_be_made_fits_its_schema(
        self, client: openai.OpenAI, choice: Any, reason: str, seed: int
    ):
        options: dict[str, Any] = {"tools": TOOLS, "tool_choice": choice, "temperature": 1.0, "seed": seed}
        answer = create(client, max_tokens=400, parallel_tool_calls=False, **options).choices[0]
        assert answer.finish_reason == reason
        assert answer.message.content is None
        (call,) = answer.message.tool_calls
        assert call.type == "function"
        arguments = json.loads(call.function.arguments)
        if call.function.name == "weather":
            jsonschema.validate(arguments, PARAMETERS)
        else:
            assert (choice, call.function.name) == ("required", "now")
        streamed = collect(create(client, max_tokens=400, parallel_tool_calls=False, stream=True, **options))
        assert streamed["reason"] == reason
        assert [(c["name"], c["arguments"]) for c in streamed["calls"]] == [
            (call.function.name, call.function.arguments)
        ]

    @pytest.mark.parametrize("stream", [False, True])
    def test_a_model_may_write_and_call(self, client: openai.OpenAI, stream: bool):
        pattern = {"regex": CALLS}
        answer = create(client, tools=TOOLS, max_tokens=200, stream=stream, extra_body=pattern)
        if stream:
            got = collect(answer)
        else:
            message = answer.choices[0].message
            calls = [{"name": c.function.name, "arguments": c.function.arguments} for c in message.tool_calls]
            got = {"text": message.content, "reason": answer.choices[0].finish_reason, "calls": calls}
        assert (got["text"], got["reason"]) == ("Wait.", "tool_calls")
        assert [(c["name"], c["arguments"]) for c in got["calls"]] == [("weather", '{"city": "Rome", "days": 3}')]

    def test_without_tools_or_with_none_markers_are_text(self, client: openai.OpenAI):
        for tools in ({}, {"tools": TOOLS, "tool_choice": "none"}):
            answer = create(client, max_tokens=200, extra_body={"regex": "<tool_call>a</tool_call>"}, **tools)
            assert answer.choices[0].message.content == "<tool_call>a</tool_call>"
            assert answer.choices[0].finish_reason == "stop"

    def test_calls_and_their_results_go_back_into_the_prompt(self, client: openai.OpenAI):
        first = create(client, tools=TOOLS, max_tokens=200, extra_body={"regex": CALLS}).choices[0].message
        turns = [*SAID, first, {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "12 degrees"}]
        assert create(client, turns, tools=TOOLS, max_tokens=4).usage.prompt_tokens > 200

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"tool_choice": "required"}, "needs tools"),
            ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "other"}}}, "names none"),
            ({"tools": TOOLS, "tool_choice": "perhaps"}, "tool_choice"),
            ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools"),
            ({"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}}, "exclude"),
        ],
    )
    def test_impossible_choices_are_refused(self, client: openai.OpenAI, options: dict[str, Any], words: str):
        with pytest.raises(openai.BadRequestError, match=words):
            create(client, **options)

    def test_responses_tell_of_calls(self, client: openai.OpenAI):
        tools: list[Any] = [{"type": "function", **TOOLS[0]["function"], "strict": True}]
        options: dict[str, Any] = {"tools": tools, "tool_choice": "required", "max_output_tokens": 400}
        with client.responses.stream(
            model="tiny", input="a", parallel_tool_calls=False, reasoning={"effort": "none"}, **options
        ) as stream:
            kinds = [event.type for event in stream]
            output = stream.get_final_response().output
        assert kinds.count("response.function_call_arguments.done") == 1
        call = output[-1]
        assert call.type == "function_call"
        jsonschema.validate(json.loads(call.arguments), PARAMETERS)
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "12 degrees"}
        turns: list[Any] = [{"role": "user", "content": "a"}, *[each.model_dump() for each in output], result]
        assert client.responses.create(model="tiny", input=turns, max_output_tokens=3, tools=tools).output


class TestReasoning:
    @pytest.mark.parametrize("stream", [False, True])
    def test_text_up_to_the_marker_is_reasoning(self, client: openai.OpenAI, stream: bool):
        pattern = {"regex": "<think>\nI see it[.]\n</think>\n\nIt is (red|blue)[.]"}
        answer: Any = create(client, max_tokens=100, stream=stream, extra_body=pattern)
        if stream:
            got = collect(answer)
        else:
            message = answer.choices[0].message
            assert message.reasoning == message.reasoning_content
            got = {"text": message.content, "reasoning": message.reasoning, "reason": answer.choices[0].finish_reason}
            made = answer.usage.completion_tokens
            assert 10 < answer.usage.completion_tokens_details.reasoning_tokens < made - 10
        assert got["text"] in ("It is red.", "It is blue.")
        assert (got["reasoning"], got["reason"]) == ("I see it.", "stop")

    def test_the_prompt_may_open_the_reasoning(self, client: openai.OpenAI):
        """The random model never closes it; what the grammar asks for comes after it."""
        body = {"regex": "It is (red|blue)[.]"}
        answer: Any = client.chat.completions.create(
            model="tiny", messages=SAID, max_tokens=20, temperature=1.0, seed=1, extra_body=body
        )
        assert answer.choices[0].finish_reason == "length"
        assert not answer.choices[0].message.content
        assert answer.choices[0].message.reasoning
        assert answer.usage.completion_tokens_details.reasoning_tokens == 20

    @pytest.mark.parametrize(
        "grammar",
        [
            {"regex": "It is (red|blue)[.]"},
            {"lark": 'start: "It is " color\ncolor: "red." | "blue."'},
        ],
    )
    def test_a_grammar_begins_after_the_reasoning(self, grammar: dict[str, str]):
        tokenizer = tiny_tokenizer()
        ((kind, text),) = after_reasoning(grammar, tokenizer).items()
        state = compile_grammar(tokenizer, kind, text, vocab_size=300, end_tokens=[258])
        row = np.zeros(10, np.int32)

        def allowed() -> set[int]:
            state.fill(row)
            return set(np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist())

        for token in tokenizer("It is green.\n</think>\n\nIt is red.")["input_ids"]:
            assert 258 not in allowed()
            assert token in allowed()
            state.accept(token)
        assert allowed() == {258}

    def test_enable_thinking_is_a_field_too(self, client: openai.OpenAI):
        answer = client.chat.completions.create(
            model="tiny", messages=SAID, max_tokens=40, extra_body={"enable_thinking": False, "regex": "a{9}"}
        )
        assert answer.choices[0].message.content == "a" * 9
        assert not hasattr(answer.choices[0].message, "reasoning")


class Forecast(BaseModel):
    city: Literal["Oslo", "Rome"]
    days: list[int]


class TestStructuredOutput:
    def test_pydantic_models_are_parsed(self, client: openai.OpenAI):
        answer = client.chat.completions.parse(
            model="tiny",
            messages=SAID,
            response_format=Forecast,
            temperature=0.7,
            seed=1,
            max_tokens=300,
            extra_body=QUIET,
        )
        assert answer.choices[0].finish_reason == "stop"
        assert isinstance(answer.choices[0].message.parsed, Forecast)

    @pytest.mark.parametrize(
        ("body", "allowed"),
        [
            ({"response_format": {"type": "json_object"}}, None),
            ({"extra_body": {"regex": "(red|blue) [0-9]{3}"}}, r"(red|blue) [0-9]{3}"),
            ({"extra_body": {"structured_outputs": {"choice": ["yes", "no"]}}}, "yes|no"),
            ({"response_format": {"type": "regex", "pattern": "a{2,5}b"}}, "a{2,5}b"),
            ({"response_format": {"type": "grammar", "grammar": 'start: "x" /[0-9]/'}}, "x[0-9]"),
        ],
    )
    def test_answers_have_the_form(self, client: openai.OpenAI, body: dict[str, Any], allowed: str | None):
        answer = create(client, temperature=0.7, seed=2, max_tokens=500, **body)
        text = answer.choices[0].message.content
        if allowed is not None:
            assert answer.choices[0].finish_reason == "stop"
            assert re.fullmatch(allowed, text), text
        elif answer.choices[0].finish_reason == "stop":
            assert isinstance(json.loads(text), dict)

    def test_neighbours_of_a_grammar_keep_their_answers(self, url: str, client: openai.OpenAI):
        apart = create(client, max_tokens=40).choices[0].message.content

        async def ask() -> list[str]:
            async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as other:
                asked = [
                    other.chat.completions.create(model="tiny", messages=SAID, max_tokens=40, extra_body=QUIET | extra)
                    for extra in ({}, {"regex": "b{30}"}, {}, {"regex": "c{30}"})
                ]
                return [answer.choices[0].message.content or "" for answer in await asyncio.gather(*asked)]

        assert asyncio.run(ask()) == [apart, "b" * 30, apart, "c" * 30]

    @pytest.mark.parametrize(
        "body",
        [
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "nothing"}}}},
            {"extra_body": {"regex": "("}},
            {"response_format": {"type": "grammar", "grammar": "start: nothing"}},
            {"extra_body": {"regex": "a", "structured_outputs": {"regex": "b"}}},
            {"extra_body": {"structured_outputs": {"choice": []}}},
        ],
    )
    def test_what_can_not_be_followed_is_refused(self, client: openai.OpenAI, body: dict[str, Any]):
        with pytest.raises(openai.BadRequestError):
            create(client, **body)


def test_keys_and_limits_are_openais_exceptions(model: dsj.Model) -> None:
    access = Access(Keys(["secret-1"]), Limits(concurrent_requests=1))

    async def ask(url: str, count: int, **options: Any) -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", **options) as client:
            asked = [client.chat.completions.create(model="tiny", messages=SAID, max_tokens=9) for _ in range(count)]
            return await asyncio.gather(*asked, return_exceptions=True)

    with api_server(model, "tiny", EngineOptions(slots=4, chunk=128), access=access) as url:
        for key in ("secret-2", "none"):
            (error,) = asyncio.run(ask(url, 1, api_key=key, max_retries=0))
            assert isinstance(error, openai.AuthenticationError)
            assert error.code == "invalid_api_key"
        at_once = asyncio.run(ask(url, 4, api_key="secret-1", max_retries=0))
        refused = [error for error in at_once if isinstance(error, openai.RateLimitError)]
        assert len(refused) == 3
        assert all(1 <= int(error.response.headers["retry-after"]) <= 3 for error in refused)
        # the client waits as long as the server says, and then gets its answer
        answers = asyncio.run(ask(url, 4, api_key="secret-1", max_retries=20))
        assert [answer.choices[0].finish_reason for answer in answers] == ["length"] * 4


def test_langchain_calls_tools_and_parses_answers(url: str) -> None:
    """Another client, which builds on its own reading of the API."""
    options: Any = {"base_url": f"{url}/v1", "api_key": "none", "model": "tiny", "max_retries": 0, "extra_body": QUIET}
    model = ChatOpenAI(**options, max_tokens=300, temperature=0.7, seed=1)
    called = model.bind_tools(TOOLS, tool_choice="weather").invoke("How is the weather?")
    (call,) = called.tool_calls
    assert call["name"] == "weather"
    jsonschema.validate(call["args"], PARAMETERS)
    parsed = model.with_structured_output(Forecast, method="json_schema").invoke("How is the weather?")
    assert isinstance(parsed, Forecast)
    text = "".join(str(chunk.content) for chunk in model.bind(max_tokens=12).stream("Say something."))
    assert text == model.bind(max_tokens=12).invoke("Say something.").content
