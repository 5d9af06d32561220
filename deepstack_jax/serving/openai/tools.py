"""Tools of a chat request: which of them the model sees, and the grammar of a call that it has to make."""

import re
from typing import Any

import msgspec

from deepstack_jax.errors import short
from deepstack_jax.processing.grammar import lark_marker, tool_call_grammar
from deepstack_jax.serving.errors import RequestError
from deepstack_jax.serving.openai.fields import ChatRequest
from deepstack_jax.serving.openai.output_parser import THINK_END


def chosen_tools(body: ChatRequest) -> list[dict[str, Any]]:
    """The JSON schemas that the template shows; none with tool_choice "none".

    Raises:
        RequestError: a required or named tool that isn't there.
    """
    name = tool_name(body.tool_choice)
    if body.tool_choice == "required" and not body.tools:
        raise RequestError("tool_choice required needs tools: send some", param="tool_choice")
    if isinstance(body.tool_choice, dict) and name not in [tool.function.name for tool in body.tools]:
        raise RequestError(f"tool_choice {short(body.tool_choice)} names none of the tools", param="tool_choice")
    if body.tool_choice == "none":
        return []
    return [_without_nulls(msgspec.to_builtins(tool)) for tool in body.tools]


def tool_name(choice: Any) -> str | None:
    """Returns the function that `tool_choice` names, None if it names none."""
    if not isinstance(choice, dict):
        return None
    function = choice.get("function", choice)
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else None


def _without_nulls(tool: dict[str, Any]) -> dict[str, Any]:
    function = {key: value for key, value in tool["function"].items() if value is not None}
    return {"type": "function", "function": function}


def tool_grammar(body: ChatRequest, tools: list[dict[str, Any]], tokenizer: Any) -> str | None:
    """The grammar, in Lark, of the calls that the model has to make; None if it is free not to call.

    With "required" these are one call or several of any tools, with a named function exactly one call of it.
    """
    name = tool_name(body.tool_choice)
    if body.tool_choice != "required" and name is None:
        return None
    called = [tool["function"] for tool in tools if name in (None, tool["function"]["name"])]
    return tool_call_grammar(tokenizer, called, several=name is None and body.parallel_tool_calls)


def after_reasoning(grammar: dict[str, str], tokenizer: Any) -> dict[str, str]:
    """The grammar for a model that reasons first: any text up to `</think>`, and then what it asks for."""
    ((kind, text),) = grammar.items()
    end = lark_marker(tokenizer, THINK_END)
    first = f"start: reasoning {end} /\\n{{0,2}}/ answer\nreasoning: /(?s:.*)/\n"
    if end.startswith('"'):  # not a token of its own: the text ends where it first appears
        first = "start: reasoning /\\n{0,2}/ answer\nreasoning[lazy]: /(?s:.*)<\\/think>/\n"
    match kind:
        case "json_schema":
            return {"lark": f"{first}answer: %json {text}\n"}
        case "regex":
            return {"lark": first + "answer: /" + text.replace("/", "\\/") + "/\n"}
    start = re.compile(r"^([ \t]*)start(\s*:)", re.MULTILINE)
    if not start.search(text):
        raise RequestError("the grammar has no rule named start: add it", param="response_format")
    return {kind: first + start.sub(r"\1answer\2", text, count=1)}
