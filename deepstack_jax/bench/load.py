"""A client that puts load on a server's Chat Completions and notes when each event arrives."""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import msgspec
import numpy as np

from deepstack_jax.errors import one_line

Clock = Callable[[], float]
MESSAGE_CHARS = 300  # of a server's error
LIST_TIMEOUT_S = 30.0
KEEP_ALIVE_S = 2.0  # less than servers keep an idle connection, so that none is closed as a request is sent
CONTENT_KEYS = ("content", "reasoning_content", "reasoning", "tool_calls", "refusal")


@dataclass
class RequestRecord:
    """What came of one request. Times are the clock's, in seconds.

    Attributes:
        sent: when the request was sent.
        ended: when the last event had arrived, or the request had failed.
        content_times: arrival of each event that carries a part of the answer.
        status: HTTP status, None if no answer came.
        error: why it failed, in one line; None if it succeeded.
        prompt_tokens, output_tokens, cached_tokens: the server's usage, None if it reports none.
    """

    sent: float
    ended: float = 0.0
    content_times: list[float] = field(default_factory=list)
    status: int | None = None
    error: str | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None

    @property
    def tokens(self) -> int:
        """Tokens of the answer: the server's count, otherwise that of the events."""
        return len(self.content_times) if self.output_tokens is None else self.output_tokens


def api_base(url: str) -> str:
    """The URL under which `/chat/completions` lies: of a server, with or without its `/v1`, or of that endpoint itself.

    Raises:
        ValueError: not an http URL.
    """
    if not re.match(r"https?://[^/]", url):
        raise ValueError(f"{url} is not a URL: give http://HOST:PORT or https://HOST")
    base = url.rstrip("/")
    if base.endswith("/chat/completions"):
        return base.removesuffix("/chat/completions")
    return base if re.search(r"/v\d+$", base) else f"{base}/v1"


class Clients:
    """HTTP clients of one server, each of one request at a time, so that a client never looks for a free connection.

    In one client of many connections each request looks through all of them: 64 requests at once took 0.6 s.
    """

    def __init__(self, url: str, api_key: str | None = None, transport: httpx.AsyncBaseTransport | None = None):
        """
        Raises:
            ValueError: not an http URL.
        """
        self.base = api_base(url)
        self._idle: list[httpx.AsyncClient] = []
        self._transport = transport
        self._tls = httpx.create_ssl_context()  # takes 20 ms
        self._headers = {"accept-encoding": "identity"}  # a compressed stream arrives in other pieces
        if api_key:
            self._headers["authorization"] = f"Bearer {api_key}"

    @asynccontextmanager
    async def one(self) -> AsyncIterator[httpx.AsyncClient]:
        """A client that nothing else uses until the block ends."""
        client = self._idle.pop() if self._idle else self._open()
        try:
            yield client
        finally:
            self._idle.append(client)

    async def aclose(self) -> None:
        """Closes their connections."""
        for client in self._idle:
            await client.aclose()

    def _open(self) -> httpx.AsyncClient:
        limits = httpx.Limits(keepalive_expiry=KEEP_ALIVE_S)
        return httpx.AsyncClient(
            base_url=self.base,
            headers=self._headers,
            limits=limits,
            timeout=None,
            verify=self._tls,
            transport=self._transport,
        )


async def only_model(client: httpx.AsyncClient) -> str:
    """The id of the model that the server lists.

    Raises:
        ValueError: it can't be reached, or lists none or several.
    """
    record = RequestRecord(0.0)
    try:
        answer = await client.get("/models", timeout=LIST_TIMEOUT_S)
        record.status = answer.status_code
        record.error = None if answer.is_success else _message_of(answer)
        names = [model["id"] for model in answer.json()["data"]] if answer.is_success else []
    except httpx.HTTPError as error:
        record.error = _transport_error(client, error)
    except (ValueError, KeyError, TypeError):
        record.error = "the answer is not a list of models"
    if record.error:
        raise ValueError(f"GET {client.base_url}models: {explain(record)}")
    if len(names) != 1:
        found = f"{len(names)} models ({', '.join(names)})" if names else "no model"
        raise ValueError(f"{client.base_url}models lists {found}: pass --model")
    return names[0]


async def count_tokens(client: httpx.AsyncClient, model: str, text: str) -> int | None:
    """Tokens of a text, if the server has `/tokenize` beside its API."""
    body = {"model": model, "prompt": text, "add_special_tokens": False}
    try:
        answer = await client.post(client.base_url.join("../tokenize"), json=body, timeout=LIST_TIMEOUT_S)
        found = answer.json() if answer.is_success else {}
        count = found.get("count") or len(found["tokens"])
        return count if isinstance(count, int) and count > 0 else None
    except (httpx.HTTPError, ValueError, KeyError, TypeError, AttributeError):
        return None


def encode_body(
    model: str, messages: Sequence[dict[str, Any]], output_tokens: int | None, ignore_eos: bool, more: dict[str, Any]
) -> bytes:
    """A streamed, greedy request as JSON. `more` replaces fields and adds others; a None leaves the field out."""
    body: dict[str, Any] = {
        "model": model,
        "messages": messages,
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0,
        "max_tokens": output_tokens,
    }
    if ignore_eos:
        body["ignore_eos"] = True
    return msgspec.json.encode({key: value for key, value in (body | more).items() if value is not None})


def poisson_arrivals(rate: float, count: int, seed: int) -> np.ndarray:
    """Seconds, from the first request on, at which `count` requests arrive: `rate` per second on average."""
    gaps = np.random.default_rng(seed).exponential(1 / rate, count)
    return np.cumsum(gaps) - gaps[0]


async def run_load(
    clients: Clients,
    bodies: Sequence[bytes],
    *,
    concurrency: int | None = None,
    arrivals: Sequence[float] | np.ndarray = (),
    timeout: float = 600.0,
    clock: Clock = time.perf_counter,
    on_done: Callable[[], None] = lambda: None,
) -> list[RequestRecord]:
    """Sends every body once; returns the records in the order of `bodies`.

    Args:
        concurrency: requests that run at once: the next one is sent when one ends. None sends them at `arrivals`.
        arrivals: seconds after the first request, one per body, however many are running then.
        timeout: seconds from a request to the end of its answer.
    """
    records: list[RequestRecord | None] = [None] * len(bodies)
    waiting = iter(enumerate(bodies))

    async def send_one(number: int, body: bytes) -> None:
        async with clients.one() as client:
            records[number] = await send(client, body, timeout, clock)
        on_done()

    async def send_in_turn() -> None:
        for number, body in waiting:
            await send_one(number, body)

    async with asyncio.TaskGroup() as group:
        if concurrency is not None:
            for _ in range(min(concurrency, len(bodies))):
                group.create_task(send_in_turn())
        else:
            begun = clock()
            for (number, body), arrival in zip(waiting, arrivals, strict=True):
                await asyncio.sleep(max(begun + arrival - clock(), 0))
                group.create_task(send_one(number, body))
    return [record for record in records if record]


async def send(client: httpx.AsyncClient, body: bytes, timeout: float, clock: Clock) -> RequestRecord:
    """Sends one request and reads its whole answer. What goes wrong is noted in the record."""
    record = RequestRecord(clock())
    headers = {"content-type": "application/json"}
    try:
        async with (
            asyncio.timeout(timeout),
            client.stream("POST", "/chat/completions", content=body, headers=headers) as response,
        ):
            record.status = response.status_code
            if response.status_code != httpx.codes.OK:
                await response.aread()
                record.error = _message_of(response)
            else:
                await read_events(response.aiter_bytes(), record, clock)
    except TimeoutError:
        record.error = f"no whole answer within {timeout:g} s"
    except httpx.HTTPError as error:
        record.error = _transport_error(client, error)
    record.ended = record.ended or clock()
    return record


async def read_events(chunks: AsyncIterator[bytes], record: RequestRecord, clock: Clock) -> None:
    """Reads a stream of server-sent events into the record."""
    rest, whole, events = b"", False, 0
    async for chunk in chunks:
        now = clock()
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            events += 1
            record.ended = now
            data = line.removeprefix(b"data:").strip()
            whole = (data == b"[DONE]" or _read_event(data, record, now)) or whole
    if record.error is None and not whole:
        record.error = "the stream broke off" if events else "the answer is not a stream of events"


def _read_event(data: bytes, record: RequestRecord, now: float) -> bool:
    """Reads one event; returns whether it ends the answer."""
    try:
        event = msgspec.json.decode(data)
        if event.get("error"):
            record.error = _error_text(event)
        if usage := event.get("usage"):
            record.prompt_tokens = usage.get("prompt_tokens")
            record.output_tokens = usage.get("completion_tokens")
            record.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        choices = event.get("choices") or ()
        if any((choice.get("delta") or {}).get(key) for choice in choices for key in CONTENT_KEYS):
            record.content_times.append(now)
        return any(choice.get("finish_reason") for choice in choices)
    except (msgspec.DecodeError, AttributeError, TypeError):
        record.error = f"an event is not a chunk of Chat Completions: {data[:80].decode(errors='replace')}"
        return False


def explain(record: RequestRecord) -> str:
    """A failed request's status, message and, where a user can do something, the remedy."""
    status = "" if record.status in (None, httpx.codes.OK) else f"{record.status} "
    remedies = {
        401: " (give --api-key, or set OPENAI_API_KEY)",
        403: " (give --api-key, or set OPENAI_API_KEY)",
        404: " (check --url and --model)",
    }
    return f"{status}{record.error}{remedies.get(record.status or 0, '')}"


def _message_of(response: httpx.Response) -> str:
    """The message of an error's body, otherwise the reason of its status."""
    try:
        found = _error_text(response.json())
    except ValueError:
        found = ""
    if where := response.headers.get("location"):
        found = f"redirected to {where}"
    return found or response.reason_phrase or "no message"


def _error_text(body: Any) -> str:
    """The text of an error body: OpenAI's {"error": {"message": ...}}, or one of the forms that others use."""
    error = body.get("error", body) if isinstance(body, dict) else body
    message = error.get("message") or error.get("detail") if isinstance(error, dict) else error
    return " ".join(str(message or error).split())[:MESSAGE_CHARS]


def _transport_error(client: httpx.AsyncClient, error: httpx.HTTPError) -> str:
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        return f"{client.base_url.copy_with(path='/')} can't be reached: {one_line(error)}"
    return f"the connection failed: {one_line(error)}"
