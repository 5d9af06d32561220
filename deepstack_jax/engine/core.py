"""The engine without a thread: requests in, tokens out, one turn per call.

Many requests run at once in one pool of KV pages. A turn is at most one prefill program, one decode call and one run of
the vision encoder; the next turn is launched before the results of the last one are read. The scheduler decides what
runs; the answers don't depend on it: a prompt's pieces and programs follow from its own length, a row of a program from
its own request, and both programs have one shape (`EngineShape`).
"""

import itertools
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.profiler import StepTraceAnnotation, TraceAnnotation

from deepstack_jax import sharding
from deepstack_jax.checkpoint import Model
from deepstack_jax.encoding import checked_scales, encode_group, group_size
from deepstack_jax.engine.grammar import TokenGrammar
from deepstack_jax.engine.pages import PageLedger
from deepstack_jax.engine.prefix_cache import PrefixCache
from deepstack_jax.engine.request import GenerationPlan, Image, Request, Stage, chunk_of
from deepstack_jax.engine.scheduler import Scheduler
from deepstack_jax.engine.shape import EngineShape
from deepstack_jax.engine.turn import Admitted, Decode, Ended, Job, Part, Prefill, Turn
from deepstack_jax.models.vision import VisualRows
from deepstack_jax.programs import (
    EngineState,
    PromptChunk,
    decode_loop,
    empty_rows,
    prefill_chunk,
    scale_deepstack,
    write_rows,
)
from deepstack_jax.sampling import Logprobs, SamplingParams, TokenLogprobs, TokenMask

# one program, not one per array
_zero_state = sharding.on_mesh_of(argument=0)(
    jax.jit(lambda _, *sizes: EngineState.empty(*sizes), static_argnums=range(1, 6))
)


def _empty_state(parameter: jax.Array | None, *sizes: Any) -> EngineState:
    """A state of `EngineState.empty`'s arguments where a parameter is: on its mesh, or bound to its device."""
    return _bound(_zero_state(parameter, *sizes), parameter)


def _bound[Arrays](arrays: Arrays, parameter: jax.Array | None) -> Arrays:
    """Arrays bound to the device of a parameter, as rows from elsewhere are: JAX compiles anew for unbound ones.

    On a mesh they are bound already.
    """
    if sharding.mesh_of(parameter) is not None:
        return arrays
    return jax.device_put(arrays, jax.local_devices()[0] if parameter is None else next(iter(parameter.devices())))


@dataclass(frozen=True)
class NewTokens:
    """The next tokens of a request's answer, and why it ends with them if it does.

    `request` may have gone on: one step can give several events of a request. `logprobs` is aligned with `tokens`, and
    empty if the request doesn't want it.
    """

    request: Request
    tokens: tuple[int, ...]
    finish_reason: Literal["stop", "length"] | None
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True)
class Stopped:
    """A request that ended without a whole answer: by "deadline", or for the reason given to `cancel`."""

    request: Request
    reason: str
    where: str


@dataclass(frozen=True)
class Failed:
    """A request whose work raised an error."""

    request: Request
    error: Exception


Event = NewTokens | Stopped | Failed
_Parts = Sequence[tuple[Part, Request]]


@dataclass
class _Flight:
    """What one turn launched and nobody has read yet."""

    prefill: Prefill | None
    first_tokens: jax.Array | None  # int32 [R]
    decode: Decode | None
    tokens: jax.Array | None  # int32 [B, N], -1 where a row made none
    rows: np.ndarray | None = None  # the slots of `tokens`, None for all
    first_logprobs: Logprobs | None = None  # [R]
    logprobs: Logprobs | None = None  # [B, N]
    launched_at: float = field(default_factory=lambda: time.monotonic())


class Engine:
    """Requests on one device (or mesh), without a thread.

    Attributes:
        shape: sizes of the programs, on which bits depend.
        num_pages: KV pages of each pool (`EngineShape.pools`), page 0 included.
        prefix_caches: what each pool keeps of prompts that ended.
        images_encoded: images and videos that went through the vision encoder.
        encode_seconds: spent in the vision encoder, waiting for it included where nothing else ran.
        lost: which process of the mesh is lost, None as long as all are there.
    """

    def __init__(
        self,
        model: Model,
        shape: EngineShape,
        num_pages: int,
        *,
        max_waiting: int = 64,
        prefix_cache: bool = True,
        end_tokens: int = 16,
        research: bool = False,
    ):
        """
        Args:
            model: what `load` returned; its vision parameters are needed for requests with pixels only.
            shape: sizes of the programs.
            num_pages: KV pages of each pool, page 0 (which nothing reads) included.
            max_waiting: requests in line at most, those in slots not counted.
            prefix_cache: whether whole chunks of prompts are kept for those that begin alike.
            end_tokens: end tokens of a request at most, a multiple of 16.
            research: whether `warm_up` also compiles what scales DeepStack levels.
        """
        self.model, self.shape, self.num_pages = model, shape, num_pages
        self._end_tokens, self._max_waiting, self._cache_prefixes = end_tokens, max_waiting, prefix_cache
        self._ids, self._research = itertools.count(), research
        self.images_encoded, self.encode_seconds = 0, 0.0
        self.lost: str | None = None
        self._stalled = True
        vision = model.config.vision is not None
        most_rows = shape.pools * max(width * requests for width, requests in shape.tail_rows)
        self._no_rows = self._empty_rows(most_rows) if vision else None
        self._no_masks: dict[int, TokenMask] = {}
        self._turns = 0
        self._reset()

    def _reset(self) -> None:
        """Empty pages and rows: at the start, and after a program failed with the state in it."""
        sizes = self.shape.chunk, self.shape.page
        self.prefix_caches = tuple(
            PrefixCache(PageLedger(self.num_pages), *sizes, enabled=self._cache_prefixes)
            for _ in range(self.shape.pools)
        )
        self.scheduler = Scheduler(self.shape, self.prefix_caches, self._max_waiting)
        self._requests: dict[int, Request] = {}
        self._flights: deque[_Flight] = deque()
        pages = self.shape.pools * self.num_pages
        self._state = _empty_state(
            self._parameter, self.model.config, self.shape.slots, pages, self.shape.page, self._end_tokens
        )

    @property
    def _parameter(self) -> jax.Array | None:
        """Any parameter: one tells the mesh."""
        return next(iter(self.model.params.values()), None)

    def _empty_rows(self, count: int) -> VisualRows:
        return _bound(empty_rows(self.model.config, count, self.model.mesh), self._parameter)

    def warm_up(self) -> None:
        """Compiles every language program: decodes nothing at each width, then prefills a prompt of each width."""
        for width in self.shape.decode_widths:
            self._decode(np.zeros(self.shape.slots, bool), 1, False, width, self._no_mask(self.shape.slots))
        if self._research and self._no_rows is not None and (levels := self.model.config.num_deepstack_levels):
            rows = jax.tree.map(jnp.zeros_like, self._no_rows)
            scale_deepstack(rows.deepstack, np.ones((len(rows.embeds), levels), np.float32))
        options = SamplingParams.of(1, end_token_ids=[-1] * self._end_tokens)
        limit = self.model.config.text.max_position_embeddings
        for width, _ in self.shape.tail_rows:
            length = min(width, limit - 2, (self.num_pages - 1) * self.shape.page - 1)
            ids = np.zeros(length, np.int32)
            positions = np.tile(np.arange(length, dtype=np.int32), (3, 1))
            text = np.full(length, -1, np.int32)
            self.add(Request(ids, positions, text, 0, [], GenerationPlan(options, 2)))
            for event in self.run():
                if isinstance(event, Failed):
                    raise event.error
        for cache in self.prefix_caches:
            cache.clear()

    def warm_up_rows(self, count: int) -> None:
        """Compiles what puts `count` visual rows that come from elsewhere into a chunk."""
        zero = np.int32(0)
        rows = self._empty_rows(count)
        if jax.process_count() > 1:
            rows = jax.tree.map(np.asarray, rows)  # as they come then
        write_rows(self.model.config, jax.tree.map(jnp.zeros_like, self._no_rows), rows, zero, zero, zero)

    @property
    def token_capacity(self) -> int:
        """Tokens that the KV pages of all pools hold."""
        return self.shape.pools * (self.num_pages - 1) * self.shape.page

    @property
    def waiting(self) -> int:
        """Requests that have no slot yet."""
        return len(self.scheduler.overtaken)

    @property
    def free_slots(self) -> int:
        """Slots that no request holds."""
        return len(self.scheduler.free_slots)

    @property
    def idle(self) -> bool:
        """Whether no request is left."""
        return self.scheduler.idle and not self._flights

    def check(self, request: Request) -> None:
        """Refuses what could never run. Any thread may call it.

        Raises:
            NeverFits: a ValueError: the pages can't hold its prompt and answer.
            ValueError: more end tokens than a row has room for, or not one scale for each DeepStack level.
        """
        checked_scales(self.model.config, request.deepstack_scales or None)
        if request.plan.sampling.end_token_ids.shape[1] > self._end_tokens:
            raise ValueError(f"{len(request.plan.ends)} end tokens: give at most {self._end_tokens}")
        self.scheduler.check_fits(request.length, request.plan.max_new_tokens)

    def add(self, request: Request, salt: bytes = b"") -> None:
        """Puts a request in line.

        Raises:
            ValueError: as `check`.
            QueueFull: too many requests are in line.
        """
        self.check(request)
        request.plan = request.plan.with_room(self._end_tokens)
        request.id = next(self._ids)
        keys = request.keys(self.shape, salt) if self._cache_prefixes else ()
        job = Job(
            request.id,
            request.length,
            request.plan.max_new_tokens,
            request.deadline,
            request.tenant,
            keys,
            request.ready,
            request.grammar is not None,
        )
        self.scheduler.submit(job)
        self._requests[request.id] = request

    def cancel(self, request: Request, reason: str = "cancelled") -> None:
        """Ends a request at the next turn; ignored if it has ended."""
        self.scheduler.cancel(request.id, reason)

    def add_rows(self, request: Request, first_row: int, rows: VisualRows) -> None:
        """Rows of a request arrived: those of its image that begins with row `first_row`. Ignored if it has ended."""
        request.add_rows(first_row, rows)
        self.scheduler.arrived(request.id, request.ready)

    def find_cached(self, request: Request, salt: bytes = b"") -> int:
        """Prompt tokens that the prefix cache has now; more or fewer when it is admitted. Any thread may call it."""
        keys = request.keys(self.shape, salt) if self._cache_prefixes else ()
        return max(len(cache.find(keys, request.length)) for cache in self.prefix_caches) * self.shape.chunk

    @property
    def stalled(self) -> bool:
        """Whether the last turn found nothing to launch or to read: requests wait for rows that others send."""
        return self._stalled

    def grammar_of(self, spec: str) -> TokenGrammar:
        """Builds a grammar that another process describes.

        Raises:
            ValueError: the text is not the spec of a grammar for this model.
        """
        from deepstack_jax.processing.grammar import grammar_of_spec

        vocabulary, ends = self.model.config.text.vocab_size, self.model.eos_token_ids
        return grammar_of_spec(self.model.processor.tokenizer, spec, vocab_size=vocabulary, end_tokens=ends)

    def request(self, number: int) -> Request | None:
        """Returns the request with this id, None if it has ended."""
        return self._requests.get(number)

    def close(self) -> None:
        """Ends what belongs to the engine; it is not used any more."""

    def step(self, now: float | None = None) -> list[Event]:
        """Launches one turn and reads the results of the one before; of the last one if nothing was left to launch.

        If the next step of a request depends on its newest token, the results of the turn before are read first.

        `now` is the time for deadlines; None takes that of time.monotonic().
        """
        self._turns += 1
        with StepTraceAnnotation("engine turn", step_num=self._turns):
            return self._step(now)

    def _step(self, now: float | None) -> list[Event]:
        events = self._read_ahead() if self.scheduler.waits else []
        turn = self.scheduler.next_turn(time.monotonic() if now is None else now)
        events += self._end(turn.ended)
        for admitted in turn.admitted:
            self._begin(admitted)
        try:
            launched = self._launch(turn, events)
            encoded = self._encode(events)
            self._stalled = not (launched or encoded or turn.admitted or self._flights)
            while len(self._flights) > launched:
                events += self._read(self._flights.popleft())
        except Exception as error:
            events += self._fail(error)
        return events

    def run(self) -> Iterator[Event]:
        """The events of all requests until none is left."""
        while not self.idle:
            yield from self.step()

    def _read_ahead(self) -> list[Event]:
        """Reads everything that was launched."""
        events: list[Event] = []
        try:
            while self._flights:
                events += self._read(self._flights.popleft())
        except Exception as error:
            events += self._fail(error)
        return events

    def _begin(self, admitted: Admitted) -> None:
        """Tells the request what the cache gave it: the images in there are not waited for any more."""
        request = self._requests[admitted.id]
        request.begin(admitted.cached_tokens)
        self.scheduler.arrived(request.id, request.ready)

    def _end(self, ended: Sequence[Ended]) -> Iterator[Event]:
        for each in ended:
            yield Stopped(self._requests.pop(each.id), each.reason, each.where)

    def _launch(self, turn: Turn, events: list[Event]) -> bool:
        """Launches the prefill, then the decode call; says whether there was anything to launch."""
        flight = _Flight(turn.prefill, None, turn.decode, None)
        if turn.prefill:
            flight.prefill, flight.first_tokens, flight.first_logprobs = self._prefill(turn.prefill, events)
        if turn.decode:
            mask = self._mask_of(self.shape.slots, turn.decode.rows, events)
            running = np.zeros(self.shape.slots, bool)
            running[[slot for slot, number in turn.decode.rows if number in self._requests]] = True
            width = self.shape.decode_width(int(running.sum()))
            steps, leave_on_end = turn.decode.steps, turn.decode.leave_on_end
            with TraceAnnotation("decode", rows=len(turn.decode.rows), steps=steps):
                flight.rows, flight.tokens, flight.logprobs = self._decode(running, steps, leave_on_end, width, mask)
        if turn.prefill or turn.decode:
            self._flights.append(flight)
        return turn.prefill is not None or turn.decode is not None

    def _prefill(self, prefill: Prefill, events: list[Event]) -> tuple[Prefill, jax.Array | None, Logprobs | None]:
        """Launches a prefill; returns it without the parts of requests that failed, and the first tokens."""
        chunk, prefill = self._chunk_of(prefill, events)
        parts = [(part, self._requests[part.id]) for part in prefill.parts]
        first_tokens = logprobs = None
        with self._failing([request for _, request in parts], events):
            if chunk is not None:
                program = self.model.config, self.model.text_params
                with TraceAnnotation("prefill", tokens=sum(part.count for part in prefill.parts)):
                    self._state, first_tokens, logprobs = prefill_chunk(*program, self._state, chunk)
            for part, request in parts:
                request.release_rows(part.start + part.count)
                if not part.last:  # later launches come after it on the device: others may share its pages
                    self.scheduler.prefilled(part.id)
        return self._sound(prefill), first_tokens, logprobs

    def _chunk_of(self, prefill: Prefill, events: list[Event]) -> tuple[PromptChunk | None, Prefill]:
        """The arrays of a prefill program with its parts: requests whose own arrays can't be made fail alone."""
        table_width = self._state.cache.page_table.shape[1]

        def arrays(prefill: Prefill) -> PromptChunk:
            rows = self.shape.pools * self.shape.rows_of(prefill.width)
            last = [(row, part.id) for row, part in zip(prefill.rows, prefill.parts, strict=True) if part.last]
            mask = self._mask_of(rows, last)
            return chunk_of(self.model.config, self.shape, prefill, self._requests, self._no_rows, table_width, mask)

        try:
            return arrays(prefill), prefill
        except Exception:
            for part, row in zip(prefill.parts, prefill.rows, strict=True):
                with self._failing([self._requests[part.id]], events):
                    arrays(replace(prefill, parts=(part,), rows=(row,)))
            prefill = self._sound(prefill)
            return arrays(prefill) if prefill.parts else None, prefill

    def _sound(self, prefill: Prefill) -> Prefill:
        """The prefill without the parts of requests that failed."""
        kept = [each for each in zip(prefill.parts, prefill.rows, strict=True) if each[0].id in self._requests]
        parts, rows = zip(*kept, strict=True) if kept else ((), ())
        return replace(prefill, parts=parts, rows=rows)

    def _mask_of(self, rows: int, taken: Iterable[tuple[int, int]], events: list[Event] | None = None) -> TokenMask:
        """What the grammars of requests allow next; `taken` has pairs of (row, id).

        With `events`, a grammar's error ends its own request, otherwise it is raised.
        """
        masked = [(row, one) for row, id in taken if (one := self._requests.get(id)) and one.grammar is not None]
        if not masked:
            return self._no_mask(rows)
        which, allowed = np.zeros(rows, bool), np.zeros(self._no_mask(rows).allowed.shape, np.int32)
        for row, request in masked:
            with nullcontext() if events is None else self._failing([request], events):
                request.fill_mask(allowed[row])
                which[row] = True
        return self._on_device(TokenMask(which, allowed))

    def _no_mask(self, rows: int) -> TokenMask:
        """The mask of rows that may draw any token; it is put on the device once."""
        if rows not in self._no_masks:
            self._no_masks[rows] = self._on_device(TokenMask.none(rows, self.model.config.text.vocab_size))
        return self._no_masks[rows]

    def _on_device(self, mask: TokenMask) -> TokenMask:
        """The mask on the model's device, or on each of its mesh: always placed alike, so programs stay the same."""
        where = sharding.replicated(self.model.mesh)
        if where is None:
            return jax.tree.map(jnp.asarray, mask)
        return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, where, lambda part: x[part]), mask)

    def _decode(
        self, running: np.ndarray, steps: int, leave_on_end: bool, width: int, mask: TokenMask
    ) -> tuple[np.ndarray | None, jax.Array, Logprobs]:
        """Launches a decode call of `width` rows; returns the slots of its rows, None for all, and what they made."""
        rows = None
        if width < self.shape.slots:
            rows = np.argsort(~running, kind="stable")[:width].astype(np.int32)
        limits = np.int32(steps), np.bool_(leave_on_end)
        program = self.model.config, self.model.text_params
        self._state, tokens, logprobs = decode_loop(*program, self._state, running, *limits, mask, rows)
        return rows, tokens, logprobs

    def _encode(self, events: list[Event]) -> bool:
        """Runs the vision encoder once, over images of one bucket of the requests that came first, if any waits."""
        waiting = [
            (request, image)
            for number in self.scheduler.running
            if (request := self._requests.get(number)) is not None
            for image in request.to_encode
        ]
        if not waiting:
            return False
        started, pixels = time.monotonic(), waiting[0][1].pixels
        assert pixels is not None
        alike = [
            each for each in waiting if each[1].pixels and len(each[1].pixels.pixel_values) == len(pixels.pixel_values)
        ]
        same: dict[bytes, list[Image]] = {}  # several answers to one request show the same picture: it is encoded once
        for _, image in alike:
            same.setdefault(image.pixels.digest if image.pixels and alike[1:] else b"", []).append(image)
        pictures = list(same.values())[: group_size(self.model, len(same))]
        taken = {id(image) for images in pictures for image in images}
        group = [each for each in alike if id(each[1]) in taken]
        timed = any(request.stages is not None for request, _ in group)
        try:
            self._encode_images(pictures, wait=timed)
        except Exception:
            for request, image in group:  # one by one: only requests whose images can't be encoded fail
                if request.id in self._requests:
                    with self._failing([request], events):
                        self._encode_images([[image]])
        seconds = time.monotonic() - started
        self.encode_seconds += seconds
        for request, image in group:
            if request.stages is not None:
                request.stages.append(Stage("encode", started, started + seconds, image.first_row, image.rows))
        for request in {request.id: request for request, _ in group}.values():
            request.encode_seconds += seconds
            self.scheduler.arrived(request.id, request.ready)
        return True

    def _encode_images(self, pictures: Sequence[Sequence[Image]], wait: bool = False) -> None:
        """Encodes pictures of one bucket, each for all images that show it."""
        encoded = encode_group(self.model, [images[0].pixels for images in pictures if images[0].pixels])
        if wait or not self._flights:
            jax.block_until_ready(encoded)
        self.images_encoded += len(pictures)
        for images, rows in zip(pictures, encoded, strict=False):
            for image in images:
                image.encoded, image.pixels = rows, None

    def _read(self, flight: _Flight) -> Iterator[Event]:
        """Waits for what a turn launched, reports it to the scheduler and gives out the tokens."""
        self._note_prefill(flight)
        if flight.prefill and flight.first_tokens is not None:
            rows = zip(flight.prefill.rows, flight.prefill.parts, strict=True)
            last = [(row, part.id) for row, part in rows if part.last]
            first = np.asarray(flight.first_tokens).tolist() if last else []
            logprobs = self._read_logprobs(flight.first_logprobs, (id for _, id in last))
            for row, id in last:
                if id not in self.scheduler.running:
                    continue  # a later launch of it failed
                event = self._progress(id, (first[row],), logprobs, row)
                self.scheduler.prefilled(id, _ends(event))
                if event:
                    yield event
        if flight.decode and flight.tokens is not None:
            made = np.asarray(flight.tokens)
            slots = range(self.shape.slots) if flight.rows is None else flight.rows.tolist()
            row_of = {slot: row for row, slot in enumerate(slots)}
            logprobs = self._read_logprobs(flight.logprobs, (id for _, id in flight.decode.rows))
            for slot, id in flight.decode.rows:
                if id not in self.scheduler.running:
                    continue
                row = row_of[slot]
                tokens = tuple(token for token in made[row].tolist() if token >= 0)
                event = self._progress(id, tokens, logprobs, row)
                self.scheduler.decoded(id, len(tokens), _ends(event))
                if event:
                    yield event

    def _note_prefill(self, flight: _Flight) -> None:
        """Writes down when a prefill ran, for those of its requests that want to know: nobody else waits for it."""
        parts = flight.prefill.parts if flight.prefill else ()
        told = [(part, one) for part in parts if (one := self._requests.get(part.id)) and one.stages is not None]
        if not told:
            return
        jax.block_until_ready(flight.first_tokens)
        for part, request in told:
            assert request.stages is not None
            request.stages.append(Stage("prefill", flight.launched_at, time.monotonic(), part.start, part.count))

    def _read_logprobs(self, logprobs: Logprobs | None, ids: Iterable[int]) -> Logprobs | None:
        """Waits for log probabilities [rows, n]; None if none of these requests wants them."""
        plans = [request.plan for id in ids if (request := self._requests.get(id))]
        if logprobs is None or all(plan.top_logprobs is None for plan in plans):
            return None
        return jax.tree.map(lambda x: np.asarray(x).reshape(len(x), -1, *x.shape[logprobs.chosen.ndim :]), logprobs)

    def _progress(
        self, id: int, tokens: tuple[int, ...], logprobs: Logprobs | None, row: int
    ) -> NewTokens | Failed | None:
        """Adds tokens to a request's answer; None if it made none, or if it was cancelled in the meantime."""
        request = self._requests.get(id)
        if request is None or not tokens:
            return None
        try:
            request.add(tokens)
        except Exception as error:  # its grammar's
            del self._requests[request.id]
            return Failed(request, error)
        if request.finish_reason:
            del self._requests[request.id]
        return NewTokens(request, tokens, request.finish_reason, _told(request, len(tokens), logprobs, row))

    @contextmanager
    def _failing(self, requests: Sequence[Request], events: list[Event]) -> Iterator[None]:
        """An error ends these requests, unless it took the state with it."""
        try:
            yield
        except Exception as error:
            if self._state.last.is_deleted():
                raise
            for request in {request.id: request for request in requests}.values():
                self.scheduler.drop(request.id)
                del self._requests[request.id]
                events.append(Failed(request, error))

    def _fail(self, error: Exception) -> Iterator[Event]:
        """Every request fails with a program that took the state with it."""
        requests = list(self._requests.values())
        self._reset()
        for request in requests:
            yield Failed(request, error)


def _ends(event: NewTokens | Failed | None) -> bool:
    return isinstance(event, Failed) or (event is not None and event.finish_reason is not None)


def _told(request: Request, count: int, logprobs: Logprobs | None, row: int) -> tuple[TokenLogprobs, ...]:
    """The log probabilities of a request's next tokens, as far as it wants them."""
    wanted = request.plan.top_logprobs
    if wanted is None or logprobs is None:
        return ()
    chosen, ids, values = (array[row, :count].tolist() for array in logprobs)
    tops = (tuple(zip(ids[i][:wanted], values[i][:wanted], strict=True)) for i in range(count))
    return tuple(TokenLogprobs(one, top) for one, top in zip(chosen, tops, strict=True))
