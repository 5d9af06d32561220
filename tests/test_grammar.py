"""Grammars of llguidance: what they allow is valid, by jsonschema, and an engine's answers follow them."""

import asyncio
import json
import random
import time
from typing import Any

import jsonschema
import numpy as np
import pytest

import deepstack_jax as dsj
from deepstack_jax.engine.core import Engine, NewTokens
from deepstack_jax.engine.options import EngineOptions
from deepstack_jax.engine.request import Request
from deepstack_jax.engine.runner import Runner
from deepstack_jax.engine.shape import EngineShape
from deepstack_jax.generation import plan_generation
from deepstack_jax.processing.batch import Batch, prepare_batch
from deepstack_jax.processing.grammar import LLGrammar, compile_grammar, tool_call_grammar
from tests.random_schemas import allowed_tokens, draw_schema, walk
from tests.tiny_tokenizer import SPECIAL_TOKENS, tiny_tokenizer

VOCABULARY, ENDS = 300, (258, 256)
TOKENIZER = tiny_tokenizer()
TEXTS = [TOKENIZER.decode([token]) if token < 256 else "" for token in range(VOCABULARY)]
QUESTION = "What is this?"
ANSWER = {
    "type": "object",
    "properties": {"color": {"enum": ["red", "green"]}, "count": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["color", "count"],
    "additionalProperties": False,
}


def grammar_of(kind: str, text: str) -> LLGrammar:
    return compile_grammar(TOKENIZER, kind, text, vocab_size=VOCABULARY, end_tokens=ENDS)


def text_of(tokens: list[int]) -> str:
    return TOKENIZER.decode(tokens, skip_special_tokens=True)


def takes(grammar: LLGrammar, text: str) -> bool:
    """Whether the grammar allows the whole text and then an end."""
    for token in [*TOKENIZER(text)["input_ids"], ENDS[0]]:
        if token not in allowed_tokens(grammar, VOCABULARY):
            return False
        grammar.accept(token)
    return grammar.finished


def check_schemas(seeds: range) -> None:
    for seed in seeds:
        rng = random.Random(seed)
        schema = draw_schema(rng)
        grammar = grammar_of("json_schema", json.dumps(schema))
        text = text_of(walk(grammar, TEXTS, ENDS, rng, rng.choice((0, 10, 60))))
        try:
            jsonschema.validate(
                json.loads(text), schema, jsonschema.Draft202012Validator, format_checker=jsonschema.FormatChecker()
            )
        except (ValueError, jsonschema.ValidationError) as error:
            raise AssertionError(f"schema {seed}: {schema} allows {text!r}: {error}") from None


class TestJson:
    def test_texts_are_valid_whatever_is_drawn(self):
        check_schemas(range(200))

    @pytest.mark.exhaustive
    @pytest.mark.parametrize("part", range(1, 6))
    def test_a_thousand_are(self, part: int):
        check_schemas(range(200 * part, 200 * (part + 1)))

    def test_an_object_of_any_kind(self):
        for seed in range(20):
            rng = random.Random(seed)
            tokens = walk(grammar_of("json_object", ""), TEXTS, ENDS, rng, 40)
            assert isinstance(json.loads(text_of(tokens)), dict)

    @pytest.mark.parametrize(
        ("text", "fits"),
        [
            ('{"color":"red","count":3}', True),
            ('{"color": "red", "count": 3}', True),
            ('{\n  "color": "green",\n  "count": 0\n}', True),
            ('{"color":  "red", "count": 3}', False),  # two blanks
            ('{\n\n"color": "red", "count": 3}', False),
            (' {"color": "red", "count": 3}', False),
            ('{"color": "red"}', False),
            ('{"color": "red", "count": 10}', False),
            ('{"color": "red", "count": 3, "x": 1}', False),
        ],
    )
    def test_blanks_are_those_that_models_write(self, text: str, fits: bool):
        assert takes(grammar_of("json_schema", json.dumps(ANSWER)), text) == fits

    @pytest.mark.parametrize("more", [None, True, {"type": "integer"}])
    def test_more_properties_are_allowed_as_the_schema_says(self, more: Any):
        schema = {"type": "object", "properties": {"a": {"type": "null"}}}
        schema |= {} if more is None else {"additionalProperties": more}
        assert takes(grammar_of("json_schema", json.dumps(schema)), '{"a": null, "b": 1}')
        assert takes(grammar_of("json_schema", json.dumps(schema)), '{"b": "x"}') == (more in (None, True))


class TestOthers:
    def test_a_regular_expression(self):
        for text, fits in (("aab", True), ("b", True), ("aa", False), ("aabb", False)):
            assert takes(grammar_of("regex", "a*b"), text) == fits

    def test_each_end_token_of_the_model_ends_a_text_that_may_end(self):
        for end in ENDS:
            grammar = grammar_of("regex", "a+")
            assert not set(ENDS) & set(allowed_tokens(grammar, VOCABULARY))
            grammar.accept(TOKENIZER("a")["input_ids"][0])
            assert set(ENDS) <= set(allowed_tokens(grammar, VOCABULARY))
            grammar.accept(end)
            assert grammar.finished

    def test_a_finished_text_leaves_end_tokens_only(self):
        grammar = grammar_of("regex", "ab")
        for token in TOKENIZER("ab")["input_ids"]:
            assert allowed_tokens(grammar, VOCABULARY).tolist() == [token]
            grammar.accept(token)
        assert allowed_tokens(grammar, VOCABULARY).tolist() == sorted(ENDS)

    def test_each_answer_begins_anew(self):
        first, second = (grammar_of("regex", "abc") for _ in range(2))
        first.accept(TOKENIZER("a")["input_ids"][0])
        assert allowed_tokens(second, VOCABULARY).tolist() == TOKENIZER("a")["input_ids"]
        assert allowed_tokens(first, VOCABULARY).tolist() == TOKENIZER("b")["input_ids"]

    def test_a_token_that_does_not_fit_is_refused_in_one_line(self):
        grammar = grammar_of("regex", "abc")
        with pytest.raises(ValueError, match=r"^the grammar can't be followed: [^\n]+$"):
            grammar.accept(TOKENIZER("x")["input_ids"][0])

    @pytest.mark.parametrize("special", [True, False])
    def test_tool_calls_in_lark(self, special: bool):
        """Qwen's markers are tokens of their own, which are not special in its tokenizer."""
        markers = {"<tool_call>": 263, "</tool_call>": 264}
        tokenizer = tiny_tokenizer(SPECIAL_TOKENS | (markers if special else {}))
        if not special:
            tokenizer.add_tokens(list(markers))
        assert tokenizer.convert_tokens_to_ids(list(markers)) == [263, 264]
        other = {"name": "g"}
        call = '<tool_call>\n{"name": "f", "arguments": {"color": "red", "count": 3}}\n</tool_call>'
        more = f'{call}\n<tool_call>\n{{"name": "g", "arguments": {{}}}}\n</tool_call>'
        for functions, several, fitting in (
            ([{"name": "f", "parameters": ANSWER}, other], True, {call, more}),
            ([{"name": "f", "parameters": ANSWER}], False, {call}),
            ([other], True, set()),
        ):
            lark = tool_call_grammar(tokenizer, functions, several=several)
            for text in (call, more, "hello", call.replace("red", "blue"), call[:-1]):
                grammar = compile_grammar(tokenizer, "lark", lark, vocab_size=VOCABULARY, end_tokens=ENDS)
                ids = tokenizer(text)["input_ids"]
                assert ids.count(263) == text.count("<tool_call>")
                assert (text in fitting) == all(self.goes_on(grammar, token) for token in [*ids, ENDS[0]])

    def test_markers_that_are_no_tokens_are_spelled(self):
        lark = tool_call_grammar(TOKENIZER, [{"name": "g"}], several=False)
        assert takes(grammar_of("lark", lark), '<tool_call>\n{"name": "g", "arguments": {"x": 1}}\n</tool_call>')

    @pytest.mark.parametrize("text", ["<|im_end|>", "a<|endoftext|>b"])
    def test_the_spelling_of_a_special_token_in_a_text_that_must_come(self, text: str):
        grammar = grammar_of("json_schema", json.dumps({"const": text}))
        tokens = walk(grammar, TEXTS, ENDS, random.Random(0), 0)
        assert json.loads(TOKENIZER.decode(tokens[:-1])) == text
        assert not set(tokens[:-1]) & set(SPECIAL_TOKENS.values())

    def goes_on(self, grammar: LLGrammar, token: int) -> bool:
        if token not in allowed_tokens(grammar, VOCABULARY):
            return False
        grammar.accept(token)
        return True


class TestRefusals:
    @pytest.mark.parametrize(
        ("kind", "text", "message"),
        [
            ("bnf", "x", "grammar kind 'bnf' is not known: pass one of json_object, json_schema, regex, lark"),
            ("regex", "é" * 40_000, "regex of 80000 bytes is too long: send at most 65536"),
            ("json_schema", "{", "json_schema is not JSON"),
            ("json_schema", "[1]", "json_schema is a list: send an object"),
            ("json_schema", "true", "json_schema is a bool: send an object"),
            ("json_schema", '{"items":' * 64 + "{}" + "}" * 64, "json_schema is nested too deeply: send at most 64 le"),
            ("json_schema", "[" * 60_000, "json_schema is nested too deeply: send at most 64 levels"),
            ("json_schema", '{"type": "nope"}', "json_schema can't be followed: Invalid type: nope"),
            ("json_schema", '{"not": {}}', 'json_schema can\'t be followed: Unimplemented keys: ["not"]'),
            ("json_schema", '{"$ref": "http://x.test/y"}', "json_schema can't be followed: Resource 'http://x.test/y'"),
            ("json_schema", '{"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}', "can't be followed"),
            ("json_schema", '{"enum": []}', "Unsatisfiable schema"),
            ("regex", "a[", "regex can't be followed: at 1(8): invalid regex"),
            ("lark", "start: x", 'lark can\'t be followed: at 1(8): unknown name: "x"'),
            ("lark", "", "lark can't be followed: Empty grammar"),
            ("lark", "start: <nope>", "unknown special token"),
        ],
    )
    def test_what_is_no_grammar_is_refused_in_one_line(self, kind: str, text: str, message: str):
        with pytest.raises(ValueError) as error:
            grammar_of(kind, text)
        assert message in str(error.value)
        assert "\n" not in str(error.value)

    def test_what_takes_long(self):
        schema = json.dumps({"properties": {f"property{i}": {} for i in range(2500)}})
        with pytest.raises(ValueError, match=r"json_schema takes more than 0.001 s to compile: simplify it"):
            compile_grammar(TOKENIZER, "json_schema", schema, vocab_size=VOCABULARY, end_tokens=ENDS, seconds=0.001)

    @pytest.mark.parametrize("kind", ["lark", "json_schema"])
    def test_the_longest_chain_of_rules_does_not_overflow_a_stack(self, kind: str):
        if kind == "lark":
            text = "start:r0\n" + "".join(f"r{i}:r{i + 1}\n" for i in range(5_000)) + 'r5000:"a"'
        else:
            links = ",".join(f'"{i}":{{"$ref":"#/$defs/{i + 1}"}}' for i in range(2_000))
            text = '{"$ref":"#/$defs/0","$defs":{' + links + ',"2000":{"type":"null"}}}'
        assert takes(grammar_of(kind, text), "a" if kind == "lark" else "null")


@pytest.fixture(scope="module")
def model() -> dsj.Model:
    return dsj.load("tiny-vl", "float32")


def of_model(model: dsj.Model, schema: dict[str, Any] = ANSWER) -> LLGrammar:
    sizes = {"vocab_size": model.config.text.vocab_size, "end_tokens": model.eos_token_ids}
    return compile_grammar(model.processor.tokenizer, "json_schema", json.dumps(schema), **sizes)


def asked(model: dsj.Model, text: str = QUESTION, **options: Any) -> tuple[Batch, Any]:
    batch = prepare_batch(model.config, **dsj.prepare(model, text))
    return batch, plan_generation(model, batch, dsj.SamplingOptions(**({"max_new_tokens": 60} | options)))


class TestEngine:
    SHAPE = EngineShape(slots=2, chunk=128)

    def run(self, engine: Engine, *requests: Request) -> list[list[int]]:
        tokens: dict[Request, list[int]] = {request: [] for request in requests}
        for request in requests:
            engine.add(request)
        for event in engine.run():
            assert isinstance(event, NewTokens)
            tokens[event.request] += event.tokens
        return [tokens[request] for request in requests]

    @pytest.mark.parametrize("options", [{}, {"temperature": 2.0, "seed": 5}], ids=["greedy", "sampled"])
    def test_an_answer_follows_its_schema_beside_one_that_is_free(self, model: dsj.Model, options: dict[str, Any]):
        free = asked(model, "How many circles are there?", max_new_tokens=20, temperature=1.0, seed=2, eos_token_id=[])
        ((alone,),) = [self.run(Engine(model, self.SHAPE, 12), Request.of_row(*free))]
        engine = Engine(model, self.SHAPE, 12)
        request = Request.of_row(*asked(model, **options), grammar=engine.grammar_of(of_model(model).spec))
        beside, tokens = self.run(engine, Request.of_row(*free), request)
        assert beside == alone
        assert tokens[-1] in model.eos_token_ids
        assert request.finish_reason == "stop"
        jsonschema.validate(json.loads(model.processor.tokenizer.decode(tokens, skip_special_tokens=True)), ANSWER)

    @pytest.mark.slow
    def test_a_runner_takes_grammars(self, model: dsj.Model):
        runner = Runner(model, options=EngineOptions(slots=2, chunk=128))

        async def answer(grammar: LLGrammar | None) -> list[int]:
            chunks = runner.run(*asked(model), time.monotonic() + 120, grammar=grammar)
            return [token async for chunk in chunks for token in chunk.tokens]

        async def both() -> list[list[int]]:
            return await asyncio.gather(answer(of_model(model)), answer(None))

        try:
            tokens, free = asyncio.run(both())
        finally:
            runner.stop()
            assert runner.join(60)
        jsonschema.validate(json.loads(model.processor.tokenizer.decode(tokens, skip_special_tokens=True)), ANSWER)
        ids = dsj.prepare(model, QUESTION)
        assert free == dsj.generate(model, **ids, max_new_tokens=60, slots=2, chunk=128).tokens[0, : len(free)].tolist()


def test_masks_are_filled_as_the_engine_reads_them():
    """Bit t % 32 of word t // 32, also the highest, which makes a word negative."""
    row = np.zeros(10, np.int32)
    grammar_of("regex", "[^a]").fill(row)
    bits = [(int(row[t // 32]) >> (t % 32)) & 1 for t in range(256)]
    allowed = {text for text, bit in zip(TEXTS, bits, strict=False) if bit}
    assert "a" not in allowed
    assert {"b", "~", "]"} <= allowed
    assert (row < 0).any()
