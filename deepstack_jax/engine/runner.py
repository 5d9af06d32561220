"""A single thread owns the device: it takes requests from other threads and gives out their tokens.

The thread drives an `Engine` turn by turn. Requests may be cancelled at any time and have deadlines, which every turn
honours. An error in one request ends only that request, unless a program failed on the device: then all that ran in it
fail, and the next ones find an empty engine.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from deepstack_jax.checkpoint import Model
from deepstack_jax.engine import core
from deepstack_jax.engine.grammar import TokenGrammar
from deepstack_jax.engine.options import EngineOptions
from deepstack_jax.engine.request import GenerationPlan
from deepstack_jax.engine.request import Request as EngineRequest
from deepstack_jax.engine.scheduler import QueueFull
from deepstack_jax.errors import one_line
from deepstack_jax.models.vision import VisualRows
from deepstack_jax.processing.batch import Batch, prepare_batch
from deepstack_jax.programs import PromptArrays
from deepstack_jax.sampling import SamplingParams, TokenLogprobs
from deepstack_jax.sampling_options import SamplingOptions

PROBE_TOKENS = 4
MANY_FAILURES = 3
STALLED_SECONDS = 0.02  # between two turns that find nothing to launch: requests wait for rows

_log = logging.getLogger(__name__)


class RequestFailed(Exception):
    """A request that ended without an answer; the message is one line."""


class QueueFullError(RequestFailed):
    """As many requests as allowed are waiting already."""


class DeadlineError(RequestFailed):
    """The request's deadline passed before its answer was whole."""


class StoppingError(RequestFailed):
    """The runner is stopping."""


@dataclass(frozen=True)
class Chunk:
    """The next tokens of an answer, and what it took so far. Only its last chunk says why it ended."""

    tokens: tuple[int, ...]
    prompt_tokens: int
    # "stop" at an end token (included) or where the grammar ends, "length" at max_new_tokens
    finish_reason: Literal["stop", "length"] | None = None
    timings: dict[str, float] = field(default_factory=dict)  # seconds of queue, encode, prefill, decode
    transfer_stats: dict[str, Any] | None = None  # where rows came from an encode node: how, for `meta_info`
    cached_tokens: int = 0  # of the prompt, found in the prefix cache
    engine_shape: str = ""  # the sizes on which its bits depend
    logprobs: tuple[TokenLogprobs, ...] = ()  # of `tokens`, if asked for
    prompt_ids: np.ndarray | None = None  # int32 [T]
    choice: int = 0  # which of the answers to its request it belongs to
    timeline: tuple[Any, ...] = ()  # where the request asks for it: the spans so far, see `serving.timeline`


Event = Chunk | RequestFailed


@dataclass(eq=False)
class Request:
    """A request in the runner's hands."""

    prompt: EngineRequest
    emit: Callable[[Event], None]  # called in the runner's thread
    cancelled: bool = False

    def cancel(self) -> None:
        """Ends the request at the next turn: its tokens are not needed any more."""
        self.cancelled = True


class Runner:
    """Runs requests on an engine of its own, in a thread of its own.

    Attributes:
        last_run: time.monotonic() when a program last came back from the device, None before the first.
        error: the line of the failure that ended the newest request, None if that went well.
    """

    def __init__(
        self, model: Model, max_waiting: int = 64, options: EngineOptions | None = None, max_context: int | None = None
    ):
        """
        Args:
            model: what `load` returned; its vision parameters are needed for requests with pixels only.
            max_waiting: requests in line, those in slots not counted.
            options: the engine's sizes.
            max_context: tokens of prompt and answer of a request at most; None takes the model's positions.
        """
        self.max_waiting = max_waiting
        self.engine = (options or EngineOptions()).build(model, max_context, max_waiting)
        self._shape = self.engine.shape.name()
        self.last_run: float | None = None
        self.error: str | None = None
        self._failures = 0  # since the model last ran
        self._testing = asyncio.Lock()
        self._probe_tokens: tuple[int, ...] | None = None
        self._busy_since: float | None = None
        self._inbox: deque[Request] = deque()
        self._arrived: deque[tuple[EngineRequest, int, VisualRows]] = deque()
        self._requests: dict[EngineRequest, Request] = {}  # those that the engine has
        self._stop_at: float | None = None
        self._ended = False  # the thread, by an error that nothing expected
        self._warm_up: threading.Event | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="device", daemon=True)
        self._thread.start()

    def submit(
        self,
        prompt: Batch | PromptArrays | EngineRequest,
        plan: GenerationPlan,
        deadline: float,
        emit: Callable[[Event], None],
        tenant: str = "",
        grammar: TokenGrammar | None = None,
    ) -> Request:
        """Puts one prompt in line: a batch of one row, or a request whose rows come by `add_rows`.

        `emit` is called in the runner's thread with each chunk, the last of which has a `finish_reason`, or with one
        `RequestFailed` in the end. Nothing more is emitted once the request is cancelled. The answer follows `grammar`,
        which belongs to this request from now on.

        Raises:
            QueueFullError, StoppingError: the request was not taken.
            ValueError: the prompt doesn't fit the engine.
        """
        if not isinstance(prompt, EngineRequest):
            prompt = EngineRequest.of_row(prompt, plan, deadline=deadline, tenant=tenant)
        if grammar is not None:
            prompt.grammar = grammar
        request = Request(prompt, emit)
        self.engine.check(request.prompt)
        with self._changed:
            if self._stop_at is not None or self._ended:
                raise StoppingError("the server is stopping: send the request to another one")
            # what was cancelled gives back its place, and its pixels
            self._inbox = deque(other for other in self._inbox if not other.cancelled)
            if len(self._inbox) + self.engine.waiting >= self.max_waiting + self.engine.free_slots:
                raise QueueFullError(f"{self.max_waiting} requests are waiting already: try again later")
            self._inbox.append(request)
            self._changed.notify_all()
        return request

    async def run(
        self,
        prompt: Batch | PromptArrays | EngineRequest,
        plan: GenerationPlan,
        deadline: float,
        tenant: str = "",
        grammar: TokenGrammar | None = None,
    ) -> AsyncGenerator[Chunk]:
        """`submit` for asyncio: the chunks of the answer. Closing it, or cancelling its task, ends the request.

        Raises:
            RequestFailed: also `DeadlineError` on time where the thread is held up in a program.
        """
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()

        def emit(event: Event) -> None:
            try:
                loop.call_soon_threadsafe(events.put_nowait, event)
            except RuntimeError:  # the loop is closed
                request.cancel()

        request = self.submit(prompt, plan, deadline, emit, tenant, grammar)
        del prompt  # its pixels are let go once they are encoded
        try:
            while True:
                try:
                    # a little later than the thread, whose message says more
                    event = await asyncio.wait_for(events.get(), max(deadline - time.monotonic(), 0) + 0.1)
                except TimeoutError:
                    raise DeadlineError(_deadline_message("waiting for the device", request.prompt)) from None
                if isinstance(event, RequestFailed):
                    raise event
                yield event
                if event.finish_reason:
                    return
        finally:
            request.cancel()

    def find_cached(self, request: EngineRequest) -> int:
        """Prompt tokens that the prefix cache has now, an estimate of what the request gets when it is admitted."""
        return self.engine.find_cached(request, salt=request.cache_salt)

    def add_rows(self, request: EngineRequest, first_row: int, rows: VisualRows) -> None:
        """Gives a request rows of its prompt, which its next chunks may be waiting for. Any thread may call it.

        Args:
            request: what `submit` took.
            first_row: the first visual row of an image of `request.images`.
            rows: all rows of that image; rows of padding may follow them.
        """
        with self._changed:
            self._arrived.append((request, first_row, rows))
            self._changed.notify_all()

    def warm_up(self) -> None:
        """Compiles every language program, in the runner's thread, before the first request.

        Raises:
            ValueError: one of them failed.
        """
        done = threading.Event()
        with self._changed:
            self._warm_up = done
            if self._ended:
                done.set()
            self._changed.notify_all()
        done.wait()
        if self.error is not None:
            raise ValueError(f"the engine could not start: {self.error}")

    async def self_test(self, timeout: float) -> str | None:
        """Runs a tiny prompt with an image, if the model encodes; gives the reason if that fails, otherwise None.

        The same tokens have to come each time: a device that computes something else than before is not able.
        """
        try:
            prompt = tiny_prompt(self.model)
            options = SamplingOptions(max_new_tokens=PROBE_TOKENS, eos_token_id=[])
            plan = GenerationPlan(SamplingParams.of(1, options), PROBE_TOKENS)
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

    def dead(self, stuck_after: float = 300.0) -> str | None:
        """Why requests will never be answered again, None if they may. `stuck_after` is as for `health`."""
        if self.engine.lost:
            return self.engine.lost
        if self._ended:
            return "the device's thread has ended"
        if self.busy_seconds > stuck_after:
            return f"the device has been busy with one program for {self.busy_seconds:.0f} s"
        return None

    @property
    def stopping(self) -> str | None:
        """The reason why no more requests are taken once `stop` was called, None before."""
        return None if self._stop_at is None else "the server is stopping"

    @property
    def failing(self) -> bool:
        """Whether so many requests failed one after another that the cause is hardly their own."""
        return self._failures >= MANY_FAILURES

    async def health(self, stuck_after: float = 300.0, idle_after: float = 30.0, timeout: float = 10.0) -> str | None:
        """None if the thread lives and the model has run recently, otherwise the reason.

        Args:
            stuck_after: seconds for which one turn may run, compilation included.
            idle_after: an idle model that has not run for so many seconds, or failed last, is tested first.
            timeout: of that test, in seconds.
        """
        async with self._testing:  # callers at the same time wait for the same test
            if reason := self.dead(stuck_after) or self.stopping:
                return reason
            old = self.last_run is None or time.monotonic() - self.last_run > idle_after
            if not self.waiting and (old or self.error):
                return await self.self_test(timeout)
            if self.failing:
                return f"{self._failures} requests failed one after another, the last with {self.error}"
            return "the model has not run yet" if self.last_run is None else None

    @property
    def model(self) -> Model:
        """What the engine runs."""
        return self.engine.model

    @property
    def alive(self) -> bool:
        """Whether the thread runs and takes requests."""
        return not self._ended and self._stop_at is None

    @property
    def busy_seconds(self) -> float:
        """How long the turn that runs now has been running; 0 when none does."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    @property
    def waiting(self) -> int:
        """Requests in line and in slots."""
        with self._changed:
            return len(self._inbox) + len(self._requests)

    def stop(self, grace: float = 0.0) -> None:
        """Takes no more requests; those that don't end in `grace` seconds get `StoppingError`. Returns at once."""
        with self._changed:
            at = time.monotonic() + grace
            self._stop_at = at if self._stop_at is None else min(at, self._stop_at)
            self._changed.notify_all()

    def join(self, timeout: float | None = None) -> bool:
        """Waits for the thread to end after `stop`; says whether it has."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            while self._take():
                self._busy_since = time.monotonic()
                self._cancel()
                ended = []
                for event in self.engine.step():
                    ended += self._hear(event)
                self._busy_since = None
                for request, last in ended:  # only now: its receiver must find the place free
                    _emit(request, last)
            self.engine.close()
        except BaseException as error:  # what this thread keeps of requests may be wrong from here on
            self._end(error)

    def _end(self, error: BaseException) -> None:
        """Fails all requests: nobody else would, as this thread ends."""
        with self._changed:
            self._ended, self._busy_since = True, None
            failed = RequestFailed(f"the device's thread has ended ({type(error).__name__}): see the server's log")
            self.error = one_line(failed)
            left = [*self._requests.values(), *self._inbox]
            self._requests, self._inbox = {}, deque()
            if self._warm_up is not None:
                self._warm_up.set()
        for request in left:
            _emit(request, failed)
        _log.critical("the device's thread has ended", exc_info=error)

    def _take(self) -> bool:
        """Waits for something to do and takes what came in; False once the runner is stopped and nothing is left."""
        with self._changed:
            while not self._inbox and self._warm_up is None:
                if self._requests or not self.engine.idle:  # what was launched last still holds slots
                    if self.engine.stalled and not self._arrived:
                        self._changed.wait(STALLED_SECONDS)
                    break
                if self._stop_at is not None:
                    return False
                self._changed.wait()
            taken, self._inbox = self._inbox, deque()
            arrived, self._arrived = self._arrived, deque()
            for request in taken:
                self._requests[request.prompt] = request
        self._start(taken)
        for arrival in arrived:
            if arrival[0] in self._requests:
                self.engine.add_rows(*arrival)
        return True

    def _start(self, taken: deque[Request]) -> None:
        if self._warm_up is not None:
            self._guarded(self.engine.warm_up)
            self._warm_up.set()
            self._warm_up = None
        for request in taken:
            if request.cancelled:
                del self._requests[request.prompt]
            else:
                self._add(request)

    def _add(self, request: Request) -> None:
        """Hands a request to the engine. The place in line was counted before those taken last were in it."""
        try:
            self.engine.add(request.prompt, salt=request.prompt.cache_salt)
            return
        except QueueFull as error:
            last: RequestFailed = QueueFullError(str(error))
        except Exception as error:
            last = self._failed(error)
        with self._changed:
            del self._requests[request.prompt]
        _emit(request, last)

    def _cancel(self) -> None:
        """Passes on what was cancelled, and stops what is left when the grace is over."""
        stopping = self._stop_at is not None and time.monotonic() >= self._stop_at
        for request in list(self._requests.values()):
            if request.cancelled or stopping:
                self.engine.cancel(request.prompt, "cancelled" if request.cancelled else "stopping")

    def _hear(self, event: core.Event) -> Iterator[tuple[Request, Event]]:
        """Emits what goes on, and yields what a request ends with."""
        request = self._requests[event.request]
        if isinstance(event, core.NewTokens):
            self.last_run, self.error, self._failures = time.monotonic(), None, 0
            one = event.request
            chunk = Chunk(
                event.tokens,
                one.length,
                event.finish_reason,
                one.timings,
                cached_tokens=one.cached_tokens,
                engine_shape=self._shape,
                logprobs=event.logprobs,
                prompt_ids=event.request.input_ids,
            )
            if event.finish_reason is None:
                _emit(request, chunk)
                return
            last: Event = chunk
        elif isinstance(event, core.Stopped):
            last = _stopped(event)
        else:
            last = self._failed(event.error)
        with self._changed:
            del self._requests[event.request]
        yield request, last

    def _failed(self, error: Exception) -> RequestFailed:
        _log.error("a request failed", exc_info=error)
        self.error = f"{type(error).__name__}: {one_line(error)[:300]}"
        self._failures += 1
        return RequestFailed(f"the model failed on this request ({self.error}): try again, or a smaller one")

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            self._failed(error)


def tiny_prompt(model: Model) -> Batch:
    """A prompt of a few tokens, with an image of one visual token if the model has the parameters to encode it."""
    config = model.config
    if config.vision is None or not model.vision_params:
        return prepare_batch(config, np.arange(1, 4)[None])
    merge = config.vision.spatial_merge_size
    ids = [1, config.vision_start_token_id, config.image_token_id, config.vision_end_token_id]
    pixels = np.linspace(-1, 1, merge**2 * config.vision.patch_dim, dtype=np.float32).reshape(merge**2, -1)
    return prepare_batch(config, np.array([ids]), None, pixels, np.array([[1, merge, merge]]))


def _stopped(event: core.Stopped) -> RequestFailed:
    if event.reason == "deadline":
        return DeadlineError(_deadline_message(event.where, event.request))
    return StoppingError(f"the server stopped {event.where}: send the request to another one")


def _emit(request: Request, event: Event) -> None:
    if request.cancelled:
        return
    try:
        request.emit(event)
    except Exception:
        _log.exception("the receiver of an answer failed")
        request.cancel()


def _deadline_message(where: str, request: EngineRequest) -> str:
    return f"no answer within {request.deadline - request.submitted:.1f} s ({where}): ask for less, or try again later"
