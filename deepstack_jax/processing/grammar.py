"""Grammars for structured output, by llguidance: JSON, JSON schemas, regular expressions, and its form of Lark.

A compiled grammar says which tokens may come next (`LLGrammar.fill`). Each is compiled once per tokenizer and kept;
every answer gets a copy at its beginning.

JSON may have one space, or a line break with its indentation, where JSON allows blanks: models may write as they do by
themselves, and can't go on with blanks forever. A schema's own `x-guidance` goes first, and `%json` in a Lark grammar
has its own. Objects have their properties in the schema's order. A schema with what llguidance doesn't support is
refused rather than followed in part, and `additionalProperties` holds as it is written.
"""

import hashlib
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import cachetools
import numpy as np

from deepstack_jax.errors import one_line

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

KINDS = ("json_object", "json_schema", "regex", "lark")
MAX_TEXT = 64 << 10  # bytes
MAX_DEPTH = 64  # of values in a JSON schema
COMPILE_SECONDS = 5.0
_KEPT = 64  # compiled grammars per tokenizer
_JSON: Any = {"whitespace_flexible": False, "whitespace_pattern": r"\n[ ]{0,32}|[ ]"}
# a chain of rules takes stack in proportion: the longest in MAX_TEXT bytes fits
_STACK_BYTES = 256 << 20
# 100 MB of lexer states; a mask takes at most some tens of milliseconds
_LIMITS: Any = {"max_lexer_states": 50_000, "max_grammar_size": 200_000, "verbose_errors": False}


class LLGrammar:
    """The state of one answer in a grammar (`deepstack_jax.engine.grammar.TokenGrammar`)."""

    def __init__(self, matcher: "LLMatcher", tokenizer: "LLTokenizer", spec: str):
        self.spec, self.finished = spec, False
        self._matcher, self._tokenizer = matcher, tokenizer

    def fill(self, row: np.ndarray) -> None:
        """Writes which tokens may come next into `row`, int32 [W]; end tokens where the text may end.

        Raises:
            ValueError: the grammar is too complex from here on.
        """
        self._matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        self._check()
        # where only one text can follow, llguidance may name a special token that is spelled like it and then refuse it
        if np.bitwise_count(row.view(np.uint32)).sum() == 1:
            (token,) = np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist()
            forced = self._matcher.compute_ff_bytes()  # none where only the end can follow
            if forced and not self._matcher.validate_tokens([token]):
                token = self._tokenizer.greedy_tokenize(forced.decode(errors="ignore"))[0]
                row[:] = 0
                row.view(np.uint32)[token // 32] = 1 << token % 32

    def accept(self, token: int) -> None:
        """Goes on by a token.

        Raises:
            ValueError: the token doesn't fit.
        """
        self._matcher.consume_token(token)
        self._check()
        self.finished = token in self._tokenizer.eos_tokens

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ValueError(f"the grammar can't be followed: {_first_line(self._matcher.get_error())}")


def compile_grammar(
    tokenizer: Any,
    kind: str,
    text: str,
    *,
    vocab_size: int,
    end_tokens: Sequence[int],
    seconds: float | None = COMPILE_SECONDS,
) -> LLGrammar:
    """Returns a grammar at its beginning, for one answer. It takes up to `seconds`; any thread may call it.

    Args:
        tokenizer: the model's fast tokenizer of transformers.
        kind: "json_object" (then `text` doesn't matter), "json_schema", "regex" (Rust's, over the whole answer), or
            "lark" (llguidance's form of Lark, with `start` and `%json`; special tokens stand without quotes).
        text: the schema, expression or grammar.
        vocab_size: of the model, which may have more logits than the tokenizer has tokens.
        end_tokens: of the model; each of them ends the text where the grammar allows an end.
        seconds: for which it may take longer than others wait; None for any time.

    Raises:
        ValueError: the text is too long or too deep, is not such a grammar, has what is not supported, or takes too
            long to compile.
    """
    if kind not in KINDS:
        raise ValueError(f"grammar kind {kind!r} is not known: pass one of {', '.join(KINDS)}")
    if len(text.encode()) > MAX_TEXT:
        raise ValueError(f"{kind} of {len(text.encode())} bytes is too long: send at most {MAX_TEXT}")
    spec = json.dumps([kind, "" if kind == "json_object" else text])
    ends = tuple(end_tokens)
    with _lock:
        of_tokenizer = _compiled.setdefault(tokenizer, {})
        if (vocab_size, ends) not in of_tokenizer:
            of_tokenizer[vocab_size, ends] = _Compiled(tokenizer, vocab_size, ends)
        compiled = of_tokenizer[vocab_size, ends]
    return LLGrammar(compiled.matcher(kind, text, spec, seconds), compiled.tokenizer, spec)


def tool_call_grammar(
    tokenizer: Any,
    functions: Sequence[Mapping[str, Any]],
    *,
    several: bool = True,
    markers: tuple[str, str] = ("<tool_call>", "</tool_call>"),
) -> str:
    """Returns Lark for `compile_grammar`: calls of functions in Qwen's form, and nothing else.

    A call is `<tool_call>`, a line with `{"name": ..., "arguments": ...}`, and `</tool_call>` on a line of its own.

    Args:
        tokenizer: the model's fast tokenizer of transformers.
        functions: each with `name` and perhaps `parameters`, a JSON schema.
        several: one call or more, each on lines of its own; otherwise exactly one.
        markers: what stands around a call.
    """
    begin, end = (lark_marker(tokenizer, marker) for marker in markers)
    bodies = " | ".join(f"%json {json.dumps(_call_schema(function))}" for function in functions)
    calls = 'call ("\\n" call)*' if several else "call"
    return f'start: {calls}\ncall: {begin} "\\n" body "\\n" {end}\nbody: {bodies}\n'


def lark_marker(tokenizer: Any, text: str) -> str:
    """Returns how a marker is written in Lark: as one token if the tokenizer has it as one that it never splits.

    As a quoted text, such a token would not be allowed.
    """
    added = tokenizer.get_added_vocab().get(text)
    return json.dumps(text) if added is None else f"<[{added}]>"


def _call_schema(function: Mapping[str, Any]) -> dict[str, Any]:
    arguments = function.get("parameters") or {"type": "object"}
    return {
        "type": "object",
        "properties": {"name": {"const": function["name"]}, "arguments": arguments},
        "required": ["name", "arguments"],
        "additionalProperties": False,
        "x-guidance": _JSON,
    }


def grammar_of_spec(tokenizer: Any, spec: str, *, vocab_size: int, end_tokens: Sequence[int]) -> LLGrammar:
    """Returns the grammar whose `spec` another process sent, however long it takes.

    Raises:
        ValueError: as `compile_grammar`.
    """
    kind, text = json.loads(spec)
    return compile_grammar(tokenizer, kind, text, vocab_size=vocab_size, end_tokens=end_tokens, seconds=None)


class _Compiled:
    """The grammars that were compiled for one tokenizer."""

    def __init__(self, tokenizer: Any, vocab_size: int, end_tokens: tuple[int, ...]):
        from llguidance.hf import from_tokenizer

        self.tokenizer = from_tokenizer(tokenizer, n_vocab=vocab_size, eos_token=list(end_tokens))
        self._matchers: cachetools.LRUCache[bytes, LLMatcher] = cachetools.LRUCache(_KEPT)
        self._lock = threading.Lock()

    def matcher(self, kind: str, text: str, spec: str, seconds: float | None) -> "LLMatcher":
        """A copy of the grammar with this spec, which is compiled if need be."""
        key = hashlib.sha256(spec.encode()).digest()
        with self._lock:
            known = self._matchers.get(key)
        if known is None:
            known = _in_thread(lambda: self._compile(kind, text), kind, seconds)
        with self._lock:
            self._matchers[key] = known
            return known.deep_copy()

    def _compile(self, kind: str, text: str) -> "LLMatcher":
        from llguidance import LLMatcher, LLParserLimits

        matcher = LLMatcher(self.tokenizer, _in_own_form(kind, text), log_level=0, limits=LLParserLimits(**_LIMITS))
        if not matcher.is_error():
            matcher.compute_bitmask()  # finds what nothing can follow
        if matcher.is_error():
            raise ValueError(f"{kind} can't be followed: {_first_line(matcher.get_error())}")
        return matcher


def _in_own_form(kind: str, text: str) -> str:
    """What llguidance compiles."""
    from llguidance import LLMatcher

    match kind:
        case "json_object":
            return LLMatcher.grammar_from_json_schema({"type": "object"}, defaults=_JSON)
        case "json_schema":
            return LLMatcher.grammar_from_json_schema(_parsed(text), defaults=_JSON)
        case "regex":
            return LLMatcher.grammar_from_regex(text)
    return LLMatcher.grammar_from_lark(text)


def _parsed(text: str) -> dict[str, Any]:
    try:
        schema = json.loads(text)
    except ValueError as error:
        raise ValueError(f"json_schema is not JSON ({one_line(error)}): send an object") from None
    except RecursionError:
        raise ValueError(f"json_schema is nested too deeply: send at most {MAX_DEPTH} levels") from None
    if not isinstance(schema, dict):
        raise ValueError(f"json_schema is a {type(schema).__name__}: send an object")
    level, depth = [schema], 0
    while level:
        if (depth := depth + 1) > MAX_DEPTH:
            raise ValueError(f"json_schema is nested too deeply: send at most {MAX_DEPTH} levels")
        values = [value for each in level for value in (each.values() if isinstance(each, dict) else each)]
        level = [value for value in values if isinstance(value, dict | list)]
    return schema


def _in_thread[T](work: Callable[[], T], kind: str, seconds: float | None) -> T:
    """Runs `work` in a thread with a large stack.

    Raises:
        ValueError: it took too long; it goes on, and counts among the threads that may run at once.
    """
    done: Future[T] = Future()
    late = f"{kind} takes more than {seconds} s to compile: simplify it"
    if not _running.acquire(timeout=seconds):
        raise ValueError(late)

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)
        finally:
            _running.release()

    with _lock:
        before = threading.stack_size(_STACK_BYTES)
        try:
            threading.Thread(target=run, name="grammar", daemon=True).start()
        except RuntimeError:  # none can be started
            _running.release()
            raise
        finally:
            threading.stack_size(before)
    try:
        return done.result(seconds)
    except TimeoutError:
        raise ValueError(late) from None


def _first_line(message: str) -> str:
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    told = lines[:1] + [line for line in lines[1:] if line.startswith("error: ")]
    return " ".join(told)[:300] or "no reason is given"


_lock = threading.Lock()
_running = threading.Semaphore(2)
_compiled: WeakKeyDictionary[Any, dict[tuple[int, tuple[int, ...]], _Compiled]] = WeakKeyDictionary()
