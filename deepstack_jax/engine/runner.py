"""A single thread owns the device. Requests are queued, run one at a time, and stream their tokens.

It runs the programs of `generation.py` in the same buckets, so the tokens are those of `generate` bit for bit. The
visual rows of a request may be there already (`programs.PromptArrays`), or its pixels are still to be encoded
(`processing.batch.Batch`). An error in one request ends only that request.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import numpy as np

from deepstack_jax.checkpoint import Model
from deepstack_jax.errors import one_line
from deepstack_jax.generation import GenerationPlan, encode_prompt, generate_steps, plan_generation
from deepstack_jax.processing.batch import Batch, prepare_batch
from deepstack_jax.programs import PromptArrays
from deepstack_jax.sampling_options import SamplingOptions

STEP_SECONDS = 0.03  # of decoding between two looks at the world: cancellations, deadlines, tokens given out
MAX_STEP_TOKENS = 64
PROBE_TOKENS = 4
MANY_FAILURES = 3

_log = logging.getLogger(__name__)


class RequestFailed(Exception):
    """Request that ended without an answer; the message is one line."""


class QueueFullError(RequestFailed):
    """As much work as allowed is waiting already."""


class DeadlineError(RequestFailed):
    """The work's deadline passed before its answer was whole."""


class StoppingError(RequestFailed):
    """The runner is stopping."""


@dataclass(frozen=True)
class Chunk:
    """The next tokens of an answer, and what it took so far. Only its last chunk says why it ended."""

    tokens: tuple[int, ...]
    prompt_tokens: int
    finish_reason: Literal["stop", "length"] | None = None  # at an end token (included) or at max_new_tokens
    timings: dict[str, float] = field(default_factory=dict)  # seconds of queue, encode, prefill, decode
    transfer_stats: dict[str, Any] | None = None  # where rows came from an encode node: how, for `meta_info`


Event = Chunk | RequestFailed


@dataclass(eq=False)
class Request:
    """One prompt in the runner's hands."""

    prompt: Batch | PromptArrays
    plan: GenerationPlan
    deadline: float  # on time.monotonic()'s clock
    emit: Callable[[Event], None]  # called in the runner's thread
    submitted: float = field(default_factory=time.monotonic)
    cancelled: bool = False

    def cancel(self) -> None:
        """Ends the work at the next look: nobody waits for its tokens any more."""
        self.cancelled = True


class Runner:
    """Runs work in the order in which it came, one piece at a time.

    Attributes:
        last_run: time.monotonic() when a program last came back from the device, None before the first.
        error: the line of the failure that ended the newest work which came to the device, None if that went well.
    """

    def __init__(self, model: Model, max_waiting: int = 64, step_seconds: float = STEP_SECONDS):
        """
        Args:
            model: what `load` returned; its vision parameters are needed for work with pixels alone.
            max_waiting: pieces of work in line, the running one not counted.
            step_seconds: about how long decoding goes on between two looks at cancellations and deadlines.
        """
        self.model = model
        self.max_waiting = max_waiting
        self.step_seconds = step_seconds
        self.last_run: float | None = None
        self.error: str | None = None
        self._failures = 0  # since the model last ran
        self._testing = asyncio.Lock()
        self._probe_tokens: tuple[int, ...] | None = None
        self._busy_since: float | None = None
        self._waiting: deque[Request] = deque()
        self._running: Request | None = None
        self._stop_at: float | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="device", daemon=True)
        self._thread.start()

    def submit(
        self, prompt: Batch | PromptArrays, plan: GenerationPlan, deadline: float, emit: Callable[[Event], None]
    ) -> Request:
        """Puts one prompt (a batch of one row) in line.

        `emit` is called in the runner's thread with each chunk, the last of which has a `finish_reason`, or with one
        `RequestFailed` in the end. Nothing more is emitted once the work is cancelled.

        Raises:
            QueueFullError, StoppingError: the work was not taken.
        """
        request = Request(prompt, plan, deadline, emit)
        with self._changed:
            if self._stop_at is not None or not self._thread.is_alive():
                raise StoppingError("the server is stopping: send the request to another one")
            # what was cancelled gives back its place, and its pixels
            self._waiting = deque(other for other in self._waiting if not other.cancelled)
            if len(self._waiting) >= self.max_waiting:
                raise QueueFullError(f"{self.max_waiting} requests are waiting already: try again later")
            self._waiting.append(request)
            self._changed.notify_all()
        return request

    async def run(self, prompt: Batch | PromptArrays, plan: GenerationPlan, deadline: float) -> AsyncGenerator[Chunk]:
        """`submit` for asyncio: the chunks of the answer. Closing it, or cancelling its task, ends the request.

        Raises:
            RequestFailed: also `DeadlineError` on time where the thread is held up in a program.
        """
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()

        def emit(event: Event) -> None:
            try:
                loop.call_soon_threadsafe(events.put_nowait, event)
            except RuntimeError:  # the loop is closed: nobody waits
                request.cancel()

        request = self.submit(prompt, plan, deadline, emit)
        del prompt  # its pixels are let go once they are encoded
        try:
            while True:
                try:
                    # a little later than the thread, whose message says more
                    event = await asyncio.wait_for(events.get(), max(deadline - time.monotonic(), 0) + 0.1)
                except TimeoutError:
                    raise DeadlineError(_deadline_message("waiting for the device", request)) from None
                if isinstance(event, RequestFailed):
                    raise event
                yield event
                if event.finish_reason:
                    return
        finally:
            request.cancel()

    async def self_test(self, timeout: float) -> str | None:
        """Runs a tiny prompt through every program this model has; gives the reason where that fails, else None.

        The same tokens have to come each time: a device that computes something else than before is not able.
        """
        try:
            prompt = tiny_prompt(self.model)
            plan = plan_generation(self.model, prompt, SamplingOptions(max_new_tokens=PROBE_TOKENS, eos_token_id=[]))
            tokens: tuple[int, ...] = ()
            async for chunk in self.run(prompt, plan, time.monotonic() + timeout):
                tokens += chunk.tokens
        except (RequestFailed, ValueError) as error:
            return f"the self-test failed: {error}"
        if self._probe_tokens is None:
            self._probe_tokens = tokens
        if tokens != self._probe_tokens:
            self.error = f"the self-test gave the tokens {tokens}, and {self._probe_tokens} before"
            return self.error
        return None

    async def health(self, stuck_after: float = 300.0, idle_after: float = 30.0, timeout: float = 10.0) -> str | None:
        """None where the thread lives and the model has run of late, else the reason.

        Args:
            stuck_after: seconds for which one program may run, its compilation included.
            idle_after: an idle model that has not run for so many seconds, or failed last, is tested first.
            timeout: of that test, in seconds.
        """
        async with self._testing:  # who asks at the same time waits for the same test
            if not self.alive:
                return "the server is stopping" if self._stop_at is not None else "the device's thread has ended"
            if self.busy_seconds > stuck_after:
                return f"the device has been busy with one program for {self.busy_seconds:.0f} s"
            old = self.last_run is None or time.monotonic() - self.last_run > idle_after
            if not self.waiting and (old or self.error):
                return await self.self_test(timeout)
            if self._failures >= MANY_FAILURES:  # fewer may be the requests' own
                return f"{self._failures} requests failed one after another, the last with {self.error}"
            return "the model has not run yet" if self.last_run is None else None

    @property
    def alive(self) -> bool:
        """Whether the thread runs and takes request."""
        return self._thread.is_alive() and self._stop_at is None

    @property
    def busy_seconds(self) -> float:
        """How long the program that runs now has been running; 0 when none does."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    @property
    def waiting(self) -> int:
        """Pieces of work in line and running."""
        with self._changed:
            return len(self._waiting) + (self._running is not None)

    def stop(self, grace: float = 0.0) -> None:
        """Takes no more work; what has not ended in `grace` seconds ends with `StoppingError`. Returns at once."""
        with self._changed:
            at = time.monotonic() + grace
            self._stop_at = at if self._stop_at is None else min(at, self._stop_at)
            self._changed.notify_all()

    def join(self, timeout: float | None = None) -> bool:
        """Waits for the thread to end after `stop`; says whether it has."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (request := self._next()) is not None:
            last: Event | None = None
            try:
                last = self._answer(request)
            except RequestFailed as error:
                last = error.with_traceback(None)  # a traceback would keep the work's cache alive
            except BaseException as error:
                # nothing that one piece of work meets may end the thread
                _log.exception("a request failed")
                self.error = f"{type(error).__name__}: {one_line(error)[:300]}"
                self._failures += 1
                last = RequestFailed(f"the model failed on this request ({self.error}): try again, or a smaller one")
            with self._changed:
                self._running = self._busy_since = None
            if last is not None:  # only now: its receiver must find the place free
                _emit(request, last)

    def _next(self) -> Request | None:
        """The first in line, or None once the runner is stopped and the line is empty."""
        with self._changed:
            while not self._waiting:
                if self._stop_at is not None:
                    return None
                self._changed.wait()
            self._running = self._waiting.popleft()
            return self._running

    def _answer(self, request: Request) -> Event | None:
        """Emits all chunks but the last, which it returns; None where the work was cancelled."""
        laps = _StageTimer(request.submitted)
        laps.end("queue")
        if not self._check_alive(request, "in line"):
            return None
        self._busy_since = time.monotonic()
        prompt = (
            request.prompt if isinstance(request.prompt, PromptArrays) else encode_prompt(self.model, request.prompt)
        )
        jax.block_until_ready(prompt.rows)
        laps.end("encode")
        request.prompt = prompt
        if not self._check_alive(request, "after encoding"):
            return None
        pace = _StepSizer(self.step_seconds)
        stage, made, count = "prefill", 0, int(np.max(prompt.lengths))
        ends = {token for token in request.plan.sampling.end_token_ids.tolist() if token >= 0}
        for piece in generate_steps(self.model, prompt, request.plan, pace.next_step):
            tokens = tuple(token for token in piece[0].tolist() if token >= 0)
            made += len(tokens)
            laps.end(stage)
            stage, self.last_run, self.error, self._failures = "decode", time.monotonic(), None, 0
            finish = "stop" if tokens[-1] in ends else "length" if made == request.plan.max_new_tokens else None
            if finish:
                return Chunk(tokens, count, finish, dict(laps.seconds))
            if not self._check_alive(request, f"after {made} tokens"):
                return None
            _emit(request, Chunk(tokens, count, None, dict(laps.seconds)))
            self._busy_since = time.monotonic()
        raise AssertionError("an answer ends with an end token or at max_new_tokens")

    def _check_alive(self, request: Request, where: str) -> bool:
        """Whether to go on. Raises where a deadline has passed."""
        if request.cancelled:
            return False
        now = time.monotonic()
        if now >= request.deadline:
            raise DeadlineError(_deadline_message(where, request))
        if self._stop_at is not None and now >= self._stop_at:
            raise StoppingError(f"the server stopped {where}: send the request to another one")
        return True


def tiny_prompt(model: Model) -> Batch:
    """A prompt of a few tokens, with a picture of one visual token where the model has the parameters to encode it."""
    config = model.config
    if config.vision is None or not model.vision_params:
        return prepare_batch(config, np.arange(1, 4)[None])
    merge = config.vision.spatial_merge_size
    ids = [1, config.vision_start_token_id, config.image_token_id, config.vision_end_token_id]
    pixels = np.linspace(-1, 1, merge**2 * config.vision.patch_dim, dtype=np.float32).reshape(merge**2, -1)
    return prepare_batch(config, np.array([ids]), None, pixels, np.array([[1, merge, merge]]))


@dataclass
class _StageTimer:
    """Seconds of each stage, those of the same name added up."""

    since: float
    seconds: dict[str, float] = field(default_factory=dict)

    def end(self, stage: str) -> None:
        now = time.monotonic()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self.since
        self.since = now


class _StepSizer:
    """How many tokens to decode at once: as many as fit the time, found by doubling. One call costs what a launch
    costs, which is a good part of a small model's token."""

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._tokens = 1
        self._since: float | None = None

    def next_step(self) -> int:
        now = time.monotonic()
        if self._since is not None:
            fit = int(self._seconds * self._tokens / max(now - self._since, 1e-9))
            self._tokens = max(1, min(2 * self._tokens, fit, MAX_STEP_TOKENS))
        self._since = now
        return self._tokens


def _emit(request: Request, event: Event) -> None:
    if request.cancelled:
        return
    try:
        request.emit(event)
    except Exception:
        _log.exception("the taker of an answer failed")
        request.cancel()


def _deadline_message(where: str, request: Request) -> str:
    return f"no answer within {request.deadline - request.submitted:.1f} s ({where}): ask for less, or try again later"
