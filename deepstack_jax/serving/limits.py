"""Limits per tenant: requests and tokens per minute, and requests at once."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from deepstack_jax.serving.errors import RequestError, retry_after


@dataclass(frozen=True)
class Limits:
    """What each tenant may use; None is no limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None  # of prompts and answers
    concurrent_requests: int | None = None


class Bucket:
    """An allowance that fills up continuously, to at most that of one minute. It may be overdrawn."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic):
        self.per_minute, self._clock = per_minute, clock
        self._level, self._at = float(per_minute), clock()

    @property
    def level(self) -> float:
        """What is left now, below 0 if it was overdrawn."""
        now = self._clock()
        self._level = min(self._level + (now - self._at) * self.per_minute / 60, self.per_minute)
        self._at = now
        return self._level

    def take(self, count: int) -> None:
        """Takes this many, also where fewer are left."""
        self._level = self.level - count

    def seconds_until(self, level: float) -> float:
        """How long it takes to fill up to a level; 0 if it is there."""
        return max(level - self.level, 0) * 60 / self.per_minute


class Tenant:
    """What one tenant has left of its limits."""

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic):
        self._limits = limits
        self._requests, self._tokens = (
            None if most is None else Bucket(most, clock)
            for most in (limits.requests_per_minute, limits.tokens_per_minute)
        )
        self._running = 0

    def begin(self) -> None:
        """Counts a request, which `end` ends.

        Raises:
            RequestError: 429, with the headers of the limits. The request is not counted then.
        """
        if self._requests and self._requests.level < 1:
            self._refuse("requests", f"{self._limits.requests_per_minute} requests per minute", self._requests)
        if self._tokens and self._tokens.level < 1:  # how many this request takes is known only at its end
            self._refuse("tokens", f"{self._limits.tokens_per_minute} tokens per minute", self._tokens)
        if self._limits.concurrent_requests and self._running >= self._limits.concurrent_requests:
            self._refuse("requests", f"{self._limits.concurrent_requests} requests at once", None)
        self._running += 1
        if self._requests:
            self._requests.take(1)

    def end(self) -> None:
        """A request that `begin` counted is over."""
        self._running -= 1

    def charge(self, tokens: int) -> None:
        """Takes the tokens that a request has used."""
        if self._tokens:
            self._tokens.take(tokens)

    def headers(self) -> dict[str, str]:
        """OpenAI's headers, which say what is left and when all of it is there again."""
        headers = {}
        for name, bucket in (("requests", self._requests), ("tokens", self._tokens)):
            if bucket:
                headers |= {
                    f"x-ratelimit-limit-{name}": str(bucket.per_minute),
                    f"x-ratelimit-remaining-{name}": str(max(math.floor(bucket.level), 0)),
                    f"x-ratelimit-reset-{name}": f"{bucket.seconds_until(bucket.per_minute):.0f}s",
                }
        return headers

    def _refuse(self, kind: str, limit: str, bucket: Bucket | None) -> None:
        seconds = retry_after(bucket.seconds_until(1) if bucket else 1)
        raise RequestError(
            f"this key's limit of {limit} is reached: try again in {seconds} s",
            429,
            code="rate_limit_exceeded",
            kind=kind,
            headers={"retry-after": seconds, **self.headers()},
        )
