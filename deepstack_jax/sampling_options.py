"""The options of `generate` and `stream`: how answers are sampled and where they end. All checks are here."""

import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import Any

MAX_LOGIT_BIASES = 300  # entries of logit_bias, as in OpenAI's API
MAX_TOP_LOGPROBS = 20
_LARGEST = 3.4028234663852886e38  # of float32
_TOKEN_ID = "a token id"
_SEEDS = "a whole number"

# for each number, a check of its range and the range in words
_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "max_new_tokens": (lambda x: x >= 1 and _is_whole(x), "1 or more"),
    "temperature": (lambda x: 0 <= x <= _LARGEST, "0 (greedy) or more, at most 3.4e38"),
    "top_k": (lambda x: x >= -1 and _is_whole(x), "0 or -1 (all) or a positive integer"),
    "top_p": (lambda x: 0 < x <= 1, "above 0 and at most 1"),
    "min_p": (lambda x: 0 <= x <= 1, "between 0 and 1"),
    # outside this range, products with logits would lose digits
    "repetition_penalty": (lambda x: 1e-12 <= x <= 1e12, "positive (1 for none), from 1e-12 to 1e12"),
    "presence_penalty": (lambda x: abs(x) <= _LARGEST, "finite (0 for none), at most 3.4e38"),
    "frequency_penalty": (lambda x: abs(x) <= 1e30, "finite (0 for none), at most 1e30"),  # times a token's count
    "min_tokens": (lambda x: x >= 0 and _is_whole(x), "0 or more"),
}
_WHOLE = ("max_new_tokens", "top_k", "min_tokens")


class SamplingOptionError(ValueError):
    """An option is not a number or is out of range; has the `name`, the `value` and what is `expected` instead."""

    def __init__(self, name: str, value: Any, problem: str, expected: str):
        super().__init__(f"{name} {reprlib.repr(value)} {problem}: {expected}")
        self.name, self.value, self.expected = name, value, expected.removeprefix("expected ")


@dataclass(frozen=True)
class SamplingOptions:
    """The options of `generate`. None means the default; whole numbers may be floats; for top_k, -1 means 0.

    Args:
        max_new_tokens: at least 1; prompt and answer together must fit the model's positions.
        temperature: 0 is greedy; above 0 samples, and near 0 only among the most likely tokens.
        top_k, top_p, min_p: limit the tokens that are sampled from; 0, 1.0 and 0.0 keep all.
        repetition_penalty: above 1, makes tokens of the prompt and the answer less likely (transformers' rule).
        presence_penalty: subtracted from the logits of tokens that the answer has (OpenAI's rule).
        frequency_penalty: the same, multiplied by how often the answer has the token (OpenAI's rule).
        seed: any whole number, taken modulo 2**32 (row r draws with seed + r), or one per row.
        eos_token_id: end tokens; None takes those of the checkpoint, and an empty list means none.
        min_tokens: end tokens can't be drawn before the answer has so many tokens; at most max_new_tokens.
        logit_bias: from -100 to 100 for at most 300 token ids, added to their logits before anything else is done to
            them (OpenAI's and vLLM's rule).
        top_logprobs: with each token, its log probability and those of so many of the likeliest tokens, 0 to 20. They
            are log_softmax in float32 of the model's own logits, before bias, penalties, temperature and masks.

    Raises:
        SamplingOptionError: an option is not valid; this ValueError names it, its value and what is expected.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | Sequence[int] = 0
    eos_token_id: int | Sequence[int] | None = None
    min_tokens: int = 0
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)
    top_logprobs: int | None = None

    def __post_init__(self):
        defaults = {field.name: field.default for field in fields(self)}
        for name, (is_good, expected) in _RANGES.items():
            number = _checked(name, getattr(self, name), defaults[name], is_good, expected)
            self._set(name, int(number) if name in _WHOLE else number)
        self._set("top_k", max(self.top_k, 0))
        self._set("seed", _whole_numbers("seed", 0 if self.seed is None else self.seed))
        if self.eos_token_id is not None:
            ends = _whole_numbers("eos_token_id", self.eos_token_id, _TOKEN_ID, -(2**31), 2**31)
            self._set("eos_token_id", (ends,) if isinstance(ends, int) else ends)
        if self.min_tokens > self.max_new_tokens:
            expected = f"expected at most max_new_tokens {self.max_new_tokens}"
            raise SamplingOptionError("min_tokens", self.min_tokens, "is out of range", expected)
        if self.logit_bias is not None:
            self._set("logit_bias", _biases(self.logit_bias))
        if self.top_logprobs is not None:
            most = MAX_TOP_LOGPROBS
            count = _checked(
                "top_logprobs", self.top_logprobs, 0, lambda x: 0 <= x <= most and _is_whole(x), f"0 to {most}"
            )
            self._set("top_logprobs", int(count))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def seeds(self, batch: int) -> list[int]:
        """Returns the seed of each row, in [0, 2**32).

        Raises:
            ValueError: the number of seeds differs from the number of rows.
        """
        seeds = range(self.seed, self.seed + batch) if isinstance(self.seed, int) else self.seed
        if len(seeds) != batch:
            raise ValueError(f"{len(seeds)} seeds for a batch of {batch}: give one integer or one per row")
        return [seed % 2**32 for seed in seeds]


def _biases(given: Any) -> dict[int, float] | None:
    if not isinstance(given, Mapping):
        raise SamplingOptionError("logit_bias", given, "is not a mapping", "give numbers by token id")
    if len(given) > MAX_LOGIT_BIASES:
        problem = f"has {len(given)} entries"
        raise SamplingOptionError("logit_bias", given, problem, f"expected at most {MAX_LOGIT_BIASES}")
    biases = {
        int(_checked("logit_bias of token", token, 0, lambda x: _is_whole(x) and 0 <= x < 2**31, _TOKEN_ID)): float(
            _checked(f"logit_bias[{token}]", bias, 0, lambda x: abs(x) <= 100, "-100 to 100")
        )
        for token, bias in given.items()
    }
    return biases or None


def _whole_numbers(
    name: str, value: Any, expected: str = _SEEDS, least: float = -float("inf"), end: float = float("inf")
) -> int | tuple[int, ...]:
    """Returns one whole number in [least, end) as an int, or several (a sequence or a 1-D array) as a tuple."""

    def is_good(x: float) -> bool:
        return _is_whole(x) and least <= x < end

    if isinstance(value, list | tuple | range) or getattr(value, "ndim", None) == 1:
        return tuple(int(_checked(f"{name}[{i}]", one, 0, is_good, expected)) for i, one in enumerate(value))
    return int(_checked(name, value, 0, is_good, expected))


def _checked(name: str, value: Any, default: Any, is_good: Callable[[float], bool], expected: str) -> float:
    """Returns `value` as a Python number, or `default` for None."""
    number = default if value is None else _number(name, value)
    if not is_good(number):
        raise SamplingOptionError(name, number, "is out of range", f"expected {expected}")
    return number


def _number(name: str, value: Any) -> float:
    scalar = value.item() if getattr(value, "ndim", None) == 0 else value
    if isinstance(scalar, bool) or not isinstance(scalar, Real):
        raise SamplingOptionError(name, scalar, "is not a number", "give one number for all rows")
    return scalar if isinstance(scalar, int) else float(scalar)


def _is_whole(number: float) -> bool:
    return isinstance(number, int) or number.is_integer()
