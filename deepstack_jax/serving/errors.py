"""Errors as clients get them: an HTTP status, and OpenAI's error fields."""

import logging
import math
import random
import re
import traceback
import uuid
from typing import Any

import msgspec
from starlette.responses import Response

from deepstack_jax.engine.runner import DeadlineError, QueueFullError, RequestFailed, StoppingError
from deepstack_jax.errors import one_line, printable, shortage
from deepstack_jax.serving.policy import MediaError

# paths of two parts and more, URLs, and hosts with a port; not the paths of this server's endpoints
_PLACE = re.compile(
    r"\b(?:tcp|https?|file)://[^\s'\")]+"
    r"|(?<![\w:/.])/(?!v1/)[\w.@+~-]+(?:/[\w.@+~-]+)+/?"
    r"|\[[0-9a-fA-F:]+\]:\d{1,5}\b"
    r"|\b(?:\d{1,3}(?:\.\d{1,3}){3}|localhost)(?::\d{1,5})?\b"
)
OVERLOADED = "overloaded_error"  # the type of errors that another try, or another server, may get around
SHORT = "short_of_resources"  # the code of errors for want of memory, threads or open files
INTERNAL = "internal_error"  # the code of errors that nothing expected
_MAX_FRAMES = 8
_log = logging.getLogger(__name__)


class RequestError(Exception):
    """A request that is answered with an error: an HTTP status and OpenAI's error fields. The message is one line."""

    def __init__(
        self,
        message: str,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        kind: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.kind = kind or ("invalid_request_error" if status < 500 else "server_error")
        self.param, self.code, self.headers = param, code, headers or {}


def without_places(text: str) -> str:
    """Returns what an error of a library says, without absolute paths and addresses, which are the operator's."""
    return _PLACE.sub("[...]", text)


def error_fields(error: Exception) -> dict[str, Any]:
    """Returns the fields of OpenAI's error object."""
    error = as_request_error(error)
    param = error.param and printable(error.param, 100)
    return {"message": one_line(error), "type": error.kind, "param": param, "code": error.code}


def error_response(error: Exception) -> Response:
    """Returns the response that tells a client of an error, with `Retry-After` if another try may succeed."""
    error = as_request_error(error)
    retry = {"retry-after": retry_after()} if error.status in (429, 503) else {}
    body = msgspec.json.encode({"error": error_fields(error)})
    return Response(body, error.status, retry | error.headers, "application/json")


def retry_after(seconds: float = 1.0) -> str:
    """Returns a `Retry-After` of at least `seconds`, drawn so that clients refused together come back apart."""
    least = math.ceil(max(seconds, 1))
    return str(random.randint(least, least + max(2, least // 4)))


def as_request_error(error: Exception) -> RequestError:
    """Returns the error with its status and code; what nothing expected becomes a 500 without details."""
    match error:
        case RequestError():
            return error
        case MediaError(status=503):
            return RequestError(one_line(error), 503, code="queue_full", kind=OVERLOADED, headers={"retry-after": "1"})
        case MediaError():
            return RequestError(one_line(error), error.status, code="media_refused")
        case ValueError():  # a library's may name a file of this server
            return RequestError(without_places(one_line(error)))
        case QueueFullError() | StoppingError():
            code = "queue_full" if isinstance(error, QueueFullError) else "stopping"
            return RequestError(str(error), 503, code=code, kind=OVERLOADED)
        case DeadlineError():
            return RequestError(str(error), 504, code="deadline", kind="timeout_error")
        case RequestFailed():
            return RequestError(without_places(str(error)), 500)
    if lacking := shortage(error):
        return RequestError(f"the server is short of {lacking}: try again later", 503, code=SHORT, kind=OVERLOADED)
    return RequestError(f"the server failed ({type(error).__name__}): see its log", 500, code=INTERNAL)


def reported(error: Exception) -> RequestError:
    """Returns the error as its client gets it. One that nothing expected is logged under an id that its message has.

    The log line says where it was raised, and not its message, which may hold what the request said.
    """
    known = as_request_error(error)
    if known.code == SHORT:
        _log.error("a request failed: %s", one_line(known))
    if known.code != INTERNAL or error is known:
        return known
    frames = traceback.extract_tb(error.__traceback__)[-_MAX_FRAMES:]
    places = [f"{frame.filename.rpartition('/')[2]}:{frame.lineno} {frame.name}" for frame in frames]
    fields = {"error_id": uuid.uuid4().hex, "error": type(error).__name__, "at": " > ".join(places)}
    _log.error("a request failed", extra={"fields": fields})
    message = f"the server failed: give its operator the error id {fields['error_id']}"
    return RequestError(message, 500, code=INTERNAL)
