"""Log lines, as text or JSON, and the middleware that names each request and writes one line about it.

What a request chooses is escaped and cut short in every line, and keys, prompts and answers are in none.
"""

import json
import logging
import random
import re
import time
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deepstack_jax.errors import printable
from deepstack_jax.serving.access import RIGHTS
from deepstack_jax.serving.endpoint import TokenCount
from deepstack_jax.serving.errors import error_response, reported
from deepstack_jax.serving.metrics import Metrics

CLIENT_CLOSED = 499  # nginx's status of a request whose client disconnected before an answer
_ID = re.compile(r"[\x21-\x7e]{1,128}")
_TRACEPARENT = re.compile(r"[0-9a-f]{2}(-[0-9a-f]+){3}")
MAX_FIELD = 200  # characters of what a request chooses
_MAX_TEXT = 2000  # of a message
_MAX_TRACEBACK = 20_000

_request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
_requests = logging.getLogger(f"{__name__}.requests")


def configure_logging(*, requests: bool, as_json: bool) -> None:
    """Writes log lines of this process to standard error.

    Args:
        requests: whether there is a line for each request; otherwise warnings and errors only.
        as_json: one JSON object per line.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if as_json else TextFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    _requests.setLevel(logging.INFO if requests else logging.WARNING)
    # it names the variables that requests give to templates
    logging.getLogger("deepstack_jax.processing.chat").setLevel(logging.ERROR)


class JsonFormatter(logging.Formatter):
    """One JSON object per line, in ASCII."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns the line of a record."""
        message = printable(record.getMessage(), _MAX_TEXT)
        fields = {"time": _time_of(record), "level": record.levelname.lower(), "message": message}
        fields |= _fields_of(record)
        if record.exc_info:
            fields["exception"] = _end(self.formatException(record.exc_info))
        return json.dumps(fields)


class TextFormatter(logging.Formatter):
    """A line for people; the lines of a traceback are indented, so that none of them looks like a line of its own."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns the line of a record."""
        given = "".join(f" {name}={json.dumps(value)}" for name, value in _fields_of(record).items() if value != "")
        message = printable(record.getMessage(), _MAX_TEXT)
        lines = [f"{_time_of(record)} {record.levelname} {message}{printable(given, _MAX_TEXT)}"]
        if record.exc_info:
            text = _end(self.formatException(record.exc_info))
            lines += ["  " + printable(line, _MAX_TEXT) for line in text.split("\n")]
        return "\n".join(lines)


class RequestLog:
    """Gives each request an id and a count of its tokens, returns the id, and writes a line when the answer is over.

    It also answers in place of what failed in a way that nothing expected.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, started = Headers(scope=scope), time.monotonic()
        status: int | None = None
        counted = False
        given = headers.get("x-request-id", "")
        request_id = given if _ID.fullmatch(given) else f"{random.getrandbits(128):032x}"
        state: dict[str, Any] = scope.setdefault("state", {})
        state |= {"request_id": request_id, "tokens": (tokens := TokenCount())}
        token = _request_id.set(request_id)

        def count(status: int) -> None:
            nonlocal counted
            if not counted:
                counted = True
                self._metrics.http(scope["path"] if scope["path"] in RIGHTS else "other", status)

        async def with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            elif status is not None and not message.get("more_body", False):
                count(status)  # so that a client who has its answer finds it in the metrics
            await send(message)

        try:
            await self._app(scope, receive, with_id)
        except Exception as error:
            error = reported(error)
            if status is None:
                await error_response(error)(scope, receive, with_id)
            # otherwise uvicorn closes the connection, because the answer is not whole
        finally:
            status = CLIENT_CLOSED if status is None else status
            count(status)
            fields = {
                "request_id": request_id,
                "traceparent": trace
                if _TRACEPARENT.fullmatch(trace := headers.get("traceparent", "")[:MAX_FIELD])
                else "",
                "tenant": state.get("tenant", ""),
                "method": scope["method"][:20],
                "path": scope["path"][:MAX_FIELD],
                "status": status,
                "prompt_tokens": tokens.prompt,
                "completion_tokens": tokens.completion,
                "seconds": round(time.monotonic() - started, 6),
            }
            _requests.info("request", extra={"fields": fields})
            _request_id.reset(token)


def _time_of(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """What belongs to a line beside its message."""
    request_id = _request_id.get()
    return ({"request_id": request_id} if request_id else {}) | getattr(record, "fields", {})


def _end(text: str) -> str:
    return text if len(text) <= _MAX_TRACEBACK else "..." + text[-_MAX_TRACEBACK:]
