"""Metrics in Prometheus' formats: counts of answers, and readings of the node at the time of the scrape.

Every answer's chunks pass `Metrics.answer`, whichever endpoint asked for them. The names that vLLM gives to the same
quantities can be exported beside our own, so that existing dashboards and routers work.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType

import jax
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample
from starlette.responses import Response

from deepstack_jax.engine.runner import Chunk
from deepstack_jax.serving.errors import as_request_error
from deepstack_jax.serving.readings import Reading
from deepstack_jax.version import VERSION

PREFIX = "deepstack_jax_"
OPENMETRICS = "application/openmetrics-text"
OUTCOMES = "stop", "length", "cancelled", "refused", "overloaded", "deadline", "failed"
SECONDS = tuple(unit * step for unit in (0.001, 0.01, 0.1, 1.0, 10.0, 100.0) for step in (1, 2, 5))
TOKENS = tuple(unit * step for unit in (1, 10, 100, 1000, 10_000, 100_000) for step in (1, 2, 5))

# names of ours -> names of vLLM that mean the same (v1/metrics/loggers.py there), both without prefix and suffix
VLLM_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "requests_running": "num_requests_running",
        "requests_waiting": "num_requests_waiting",
        "kv_cache_usage_ratio": "kv_cache_usage_perc",
        "prefix_cache_query_tokens": "prefix_cache_queries",
        "prefix_cache_hit_tokens": "prefix_cache_hits",
        "prompt_tokens": "prompt_tokens",
        "generation_tokens": "generation_tokens",
        "time_to_first_token_seconds": "time_to_first_token_seconds",
        "inter_token_latency_seconds": "inter_token_latency_seconds",
        "request_seconds": "e2e_request_latency_seconds",
        "request_queue_seconds": "request_queue_time_seconds",
        "request_prefill_seconds": "request_prefill_time_seconds",
        "request_decode_seconds": "request_decode_time_seconds",
        "request_prompt_tokens": "request_prompt_tokens",
        "request_generation_tokens": "request_generation_tokens",
    }
)
_VLLM_REASONS = {"stop": "stop", "length": "length", "cancelled": "abort"}


class Metrics:
    """Counts answers, HTTP requests and compiled programs, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._answers = self._counter("requests", "Answers that ended, by outcome.", "outcome")
        for outcome in OUTCOMES:
            self._answers.labels(outcome)
        self._http = self._counter("http_requests", "HTTP requests, by path and status.", "path", "status")
        self._cut = self._counter("http_connections_cut", "HTTP connections that the server cut, by reason.", "reason")
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of answers that began, cached ones too.")
        self._new_tokens = self._counter("generation_tokens", "Tokens of answers.")
        self._cached_tokens = self._counter("cached_prompt_tokens", "Prompt tokens that came from the prefix cache.")
        self._first = self._seconds("time_to_first_token_seconds", "From a request's arrival to its first tokens.")
        self._between = self._seconds("inter_token_latency_seconds", "Between two tokens of an answer.")
        self._whole = self._seconds("request_seconds", "From a request's arrival to its last token.")
        self._queue = self._seconds("request_queue_seconds", "In line for a slot.")
        self._encode = self._seconds("request_encode_seconds", "In the vision encoder, of requests with media.")
        self._prefill = self._seconds("request_prefill_seconds", "From the slot to the first token.")
        self._decode = self._seconds("request_decode_seconds", "From the first token to the last.")
        self._prompt_length = self._histogram("request_prompt_tokens", "Prompt tokens of a request.", TOKENS)
        self._new_length = self._histogram("request_generation_tokens", "Tokens of an answer.", TOKENS)
        self._transfer_bytes = self._counter("transfer_bytes", "Bytes of rows received from encode nodes.")
        self._transfer_seconds = self._counter("transfer_seconds", "Time in which rows were received, by request.")
        self._transfer_rounds = self._counter("transfer_rounds", "Rounds in which rows were received.")
        self._compiled = _compilations()
        self._compiled_before: int | None = None

    @contextmanager
    def answer(self) -> "Iterator[Answer]":
        """Counts one answer: whatever ends the block ends it."""
        answer = Answer(self)
        outcome = "failed"
        try:
            yield answer
            outcome = answer.finish_reason or "failed"
        except (GeneratorExit, asyncio.CancelledError) as end:
            outcome = answer.finish_reason or ("cancelled" if _is_cancelled(end) else "stop")
            raise
        except Exception as error:
            outcome = _outcome_of(as_request_error(error).status)
            raise
        finally:
            self._answers.labels(outcome).inc()
            if outcome in ("stop", "length"):
                answer.end()

    def outcomes(self) -> tuple[int, int]:
        """How many answers ended, and how many of them by a fault or a lack of the server."""
        counts = {sample.labels["outcome"]: int(sample.value) for sample in self._samples()}
        return sum(counts.values()), sum(counts.get(outcome, 0) for outcome in ("failed", "deadline", "overloaded"))

    def _samples(self) -> Iterator[Sample]:
        for family in self._answers.collect():
            yield from (sample for sample in family.samples if sample.name.endswith("_total"))

    def http(self, path: str, status: int) -> None:
        """Counts one HTTP request. `path` has to be one of a few: a client must not be able to add series."""
        self._http.labels(path, str(status)).inc()

    def connection_cut(self, reason: str) -> None:
        """Counts a connection that the server cut, for one of the reasons of `connections.Gate`."""
        self._cut.labels(reason).inc()

    def ready(self) -> None:
        """The node is ready: programs that are compiled from here on are counted."""
        self._compiled_before = self._compiled()

    def readings(self) -> Iterator[Reading]:
        """What is read at the time of the scrape."""
        before = self._compiled_before
        compiled = 0 if before is None else self._compiled() - before
        yield Reading("programs_compiled", compiled, "Programs compiled since the server was ready.", "counter")

    def _counter(self, name: str, help: str, *labels: str) -> Counter:
        return Counter(PREFIX + name, help, labels, registry=self.registry)

    def _histogram(self, name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(PREFIX + name, help, buckets=buckets, registry=self.registry)

    def _seconds(self, name: str, help: str) -> Histogram:
        return self._histogram(name, f"{help} Seconds.", SECONDS)


class Answer:
    """The answer to one request, as its chunks come; the choices of a request with several run at once."""

    def __init__(self, metrics: Metrics):
        self._metrics = metrics
        self._began = self._last = time.monotonic()
        self._chunk: Chunk | None = None
        self._tokens: dict[int, int] = {}  # so far, by choice
        self._last_of: dict[int, float] = {}  # when the last chunk of each choice that goes on came

    @property
    def begun(self) -> bool:
        """Whether a chunk came."""
        return self._chunk is not None

    @property
    def finish_reason(self) -> str | None:
        """Why the last choice ended; None while one goes on."""
        return None if self._last_of or self._chunk is None else self._chunk.finish_reason

    def add(self, chunk: Chunk) -> None:
        """Counts the tokens of a chunk, and the time since the one before."""
        metrics, now, count = self._metrics, time.monotonic(), len(chunk.tokens)
        metrics._new_tokens.inc(count)
        if not self.begun:
            metrics._prompt_tokens.inc(chunk.prompt_tokens)
            metrics._cached_tokens.inc(chunk.cached_tokens)
            metrics._first.observe(now - self._began)
        if (last := self._last_of.pop(chunk.choice, None)) is not None:
            for _ in range(count):  # a chunk's tokens were made one after another
                metrics._between.observe((now - last) / count)
        if chunk.finish_reason is None:
            self._last_of[chunk.choice] = now
        self._chunk, self._last = chunk, now
        self._tokens[chunk.choice] = self._tokens.get(chunk.choice, 0) + count

    def end(self) -> None:
        """The answer is whole."""
        metrics, chunk = self._metrics, self._chunk
        if chunk is None:
            return
        timings, split = chunk.timings, chunk.transfer_stats
        encode = timings.get("encode", 0.0)
        metrics._whole.observe(self._last - self._began)
        metrics._queue.observe(timings.get("queue", 0.0))
        if encode:
            metrics._encode.observe(encode)
        # rows from an encode node arrive while the prompt is prefilled; an encoder of our own runs before that
        metrics._prefill.observe(timings.get("prefill", 0.0) + (0.0 if split else encode))
        metrics._decode.observe(timings.get("decode", 0.0))
        metrics._prompt_length.observe(chunk.prompt_tokens)
        for tokens in self._tokens.values():
            metrics._new_length.observe(tokens)
        if split:
            metrics._transfer_bytes.inc(split["bytes"])
            metrics._transfer_seconds.inc(sum(end - begin for begin, end in split["rounds"]))
            metrics._transfer_rounds.inc(len(split["rounds"]))


class Exposition(Collector):
    """One scrape of all metrics of a server."""

    def __init__(self, metrics: Metrics, readings: Iterable[Reading], role: str, model_name: str, *, vllm: bool):
        """
        Args:
            metrics: what was counted.
            readings: the node's.
            role, model_name: the node's, for labels.
            vllm: whether there are metrics under vLLM's names.
        """
        self._metrics, self._readings, self._vllm = metrics, readings, vllm
        self._info = {"role": role, "model_name": model_name, "version": VERSION}
        self._labels = {"model_name": model_name, "engine": "0"}

    def response(self, accept: str) -> Response:
        """In OpenMetrics' format if the client accepts it, otherwise in Prometheus' own."""
        if not any(each.partition(";")[0].strip() == OPENMETRICS for each in accept.split(",")):
            return Response(generate_latest(self), headers={"content-type": CONTENT_TYPE_PLAIN_0_0_4})
        # other escapings would write vllm_ for vllm:, in names of samples only
        text = openmetrics.generate_latest(self, escaping=openmetrics.ALLOWUTF8)
        return Response(text, headers={"content-type": openmetrics.CONTENT_TYPE_LATEST})

    def collect(self) -> Iterator[Metric]:
        """All families, those of vLLM last."""
        families = [_without_times(family) for family in self._metrics.registry.collect()]
        families += [_family(reading) for reading in (*self._metrics.readings(), *self._readings)]
        yield _constant(f"{PREFIX}node", "What this server is.", self._info)
        yield from families
        if self._vllm:
            yield from self._vllm_families({family.name.removeprefix(PREFIX): family for family in families})

    def _vllm_families(self, families: Mapping[str, Metric]) -> Iterator[Metric]:
        for own, name in VLLM_NAMES.items():
            if own in families:
                yield self._renamed(families[own], f"vllm:{name}")
        answers, name = families["requests"], "vllm:request_success"
        family = Metric(name, "Answers that ended, by reason.", "counter")
        for sample in answers.samples:
            if reason := _VLLM_REASONS.get(sample.labels["outcome"]):
                family.samples.append(
                    Sample(f"{name}_total", {**self._labels, "finished_reason": reason}, sample.value)
                )
        yield family
        if "kv_pages" in families:
            sizes = {
                label: str(int(families[own].samples[0].value))
                for label, own in (("block_size", "kv_page_tokens"), ("num_gpu_blocks", "kv_pages"))
            }
            yield _constant("vllm:cache_config_info", "Sizes of the KV cache.", sizes | {"engine": "0"})

    def _renamed(self, family: Metric, name: str) -> Metric:
        renamed = Metric(name, family.documentation, family.type)
        renamed.samples = [
            each._replace(name=name + each.name.removeprefix(family.name), labels=self._labels | dict(each.labels))
            for each in family.samples
        ]
        return renamed


def _constant(name: str, help: str, labels: Mapping[str, str]) -> Metric:
    """A gauge of 1, which says what it has to say in its labels."""
    family = GaugeMetricFamily(name, help, labels=list(labels))
    family.add_metric(list(labels.values()), 1)
    return family


def _family(reading: Reading) -> Metric:
    kind = CounterMetricFamily if reading.kind == "counter" else GaugeMetricFamily
    return kind(PREFIX + reading.name, reading.help, reading.value)


def _without_times(family: Metric) -> Metric:
    """Without the time at which each series was made, which nobody asks for here and Prometheus keeps as a series."""
    family.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
    return family


def _is_cancelled(end: BaseException) -> bool:
    """Whether the client is gone; otherwise an endpoint has all that it wants, as after a stop string."""
    task = asyncio.current_task()
    return isinstance(end, asyncio.CancelledError) or (task is not None and task.cancelling() > 0)


def _outcome_of(status: int) -> str:
    if status < 500:
        return "refused"
    return {503: "overloaded", 504: "deadline"}.get(status, "failed")


_lock = threading.Lock()
_compiled: list[int] = []


def _compilations() -> Callable[[], int]:
    """Returns what tells how many programs this process has compiled, from the first call of this function on."""
    with _lock:
        if not _compiled:
            _compiled.append(0)
            jax.monitoring.register_event_duration_secs_listener(_count_compilation)
    return lambda: _compiled[0]


def _count_compilation(event: str, *_: object, **__: object) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        with _lock:
            _compiled[0] += 1
