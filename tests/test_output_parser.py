"""How the text of an answer becomes reasoning, content and tool calls, whatever pieces it comes in."""

import itertools
import json
import random

import pytest

from deepstack_jax.serving.openai.output_parser import CallDelta, OutputParser

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo", "days": [1, {"x": "}"}]}}\n</tool_call>'
WEATHER = ("weather", '{"city": "Oslo", "days": [1, {"x": "}"}]}')

# (options, text) -> (reasoning, content, calls)
CASES = {
    "plain": ({}, "Hello <think>x</think> <tool_call>", ("", "Hello <think>x</think> <tool_call>", [])),
    "no markers": ({"thinks": True, "tools": True}, "a <b> </c>\n", ("", "a <b> </c>\n", [])),
    "thinks": ({"thinks": True}, "<think>\nhm\n\nso\n</think>\n\nYes.\n", ("hm\n\nso", "Yes.\n", [])),
    "blanks first": ({"thinks": True}, "\n <think>hm</think>Yes", ("hm", "Yes", [])),
    "opened by the prompt": ({"thinks": True, "in_reasoning": True}, "hm</think>\n\nYes", ("hm", "Yes", [])),
    "never closed": ({"thinks": True, "in_reasoning": True}, "hm </thin", ("hm </thin", "", [])),
    "doesn't think": ({"thinks": True}, "Yes, </think> is a marker", ("", "Yes, </think> is a marker", [])),
    "one call": ({"tools": True}, CALL, ("", "", [WEATHER])),
    "text and two calls": (
        {"tools": True},
        f"I look.\n\n{CALL}\n{CALL}\nDone.",
        ("", "I look.Done.", [WEATHER, WEATHER]),
    ),
    "thinks and calls": (
        {"thinks": True, "in_reasoning": True, "tools": True},
        f"I need it.\n</think>\n\n{CALL}",
        ("I need it.", "", [WEATHER]),
    ),
    "arguments first": (
        {"tools": True},
        '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>',
        ("", "", [("f", '{"a": 1}')]),
    ),
    "arguments as a string": (
        {"tools": True},
        r'<tool_call>{"name": "f", "arguments": "{\"a\": 1}"}</tool_call>',
        ("", "", [("f", '{"a": 1}')]),
    ),
    "no arguments": ({"tools": True}, '<tool_call>{"name": "f"}</tool_call>', ("", "", [("f", "{}")])),
    "not a call": ({"tools": True}, "<tool_call>nonsense</tool_call> x", ("", "<tool_call>nonsense</tool_call>x", [])),
    "cut in the name": ({"tools": True}, '<tool_call>{"name": "f', ("", '<tool_call>{"name": "f', [])),
    "cut in the arguments": (
        {"tools": True},
        '<tool_call>{"name": "f", "arguments": {"a": "}',
        ("", "", [("f", '{"a": "}')]),
    ),
    "escapes": (
        {"tools": True},
        r'<tool_call>{"name": "f\"g", "arguments": {"a\\": "\"}\\"}}</tool_call>',
        ("", "", [('f"g', r'{"a\\": "\"}\\"}')]),
    ),
}


def parse(options: dict, pieces: list[str]) -> tuple[str, str, list[tuple[str, str]]]:
    parser = OutputParser(**options)
    deltas = [*map(parser.feed, pieces), parser.finish()]
    calls: list[list[CallDelta]] = []
    for call in itertools.chain.from_iterable(delta.calls for delta in deltas):
        if call.name:
            assert call.index == len(calls), "a call begins after the ones before it"
            assert call.id.startswith("call_")
            calls.append([])
        else:
            assert call.index == len(calls) - 1, "arguments belong to the newest call"
        calls[-1].append(call)
    assert parser.calls == len(calls)
    named = [(call[0].name, "".join(part.arguments for part in call)) for call in calls]
    return "".join(d.reasoning for d in deltas), "".join(d.content for d in deltas), named


@pytest.mark.parametrize("case", CASES)
def test_an_answer_is_divided_alike_in_any_pieces(case: str) -> None:
    options, text, expected = CASES[case]
    assert parse(options, [text]) == expected
    assert parse(options, list(text)) == expected
    for cut in range(len(text)):
        assert parse(options, [text[:cut], text[cut:]]) == expected
    generator = random.Random(case)
    for _ in range(50):
        cuts = sorted(generator.sample(range(len(text) + 1), min(5, len(text))))
        pieces = [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]
        assert parse(options, pieces) == expected


def test_arguments_are_given_out_as_they_come() -> None:
    parser = OutputParser(tools=True)
    parser.feed('<tool_call>{"name": "f", ')
    first = parser.feed('"arguments": {"text": "a')
    assert [(call.name, call.arguments) for call in first.calls] == [("f", ""), ("", '{"text": "a')]
    assert [call.arguments for call in parser.feed("b").calls] == ["b"]
    assert json.loads('{"text": "ab' + "".join(call.arguments for call in parser.feed('"}}</tool_call>').calls))
