"""Where the product meets the world: clocks, threads, sockets, devices and secrets, all replaced in this one place."""

import contextlib
import secrets
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import httpx
import zmq.asyncio

from deepstack_jax.disagg.encode import bridge as encode_bridge
from deepstack_jax.disagg.encode import outgoing, server, worker
from deepstack_jax.disagg.language import bridge as language_bridge
from deepstack_jax.disagg.language import incoming
from deepstack_jax.engine import core, runner
from deepstack_jax.processing import preparation
from deepstack_jax.serving import text_node
from tests.simulation import clock, engine, http, model, network, threads

_THREADING = SimpleNamespace(Thread=threads.Thread, Lock=threads.Lock, Condition=threads.Condition, Event=threads.Event)
_QUEUE = SimpleNamespace(SimpleQueue=threads.SimpleQueue, Empty=threads.Empty)

_REPLACED: tuple[tuple[Any, str, Any], ...] = (
    (time, "monotonic", clock.monotonic),
    (time, "perf_counter", clock.monotonic),
    (time, "time", clock.wall),
    (time, "sleep", threads.sleep),
    (secrets, "token_hex", clock.token_hex),
    (secrets, "token_bytes", clock.token_bytes),
    (zmq.asyncio, "Context", network.Context),
    (encode_bridge, "threading", _THREADING),
    (encode_bridge, "queue", _QUEUE),
    (worker, "threading", _THREADING),
    (worker, "queue", _QUEUE),
    (preparation, "ThreadPoolExecutor", threads.ThreadPoolExecutor),
    (language_bridge, "ThreadPoolExecutor", threads.ThreadPoolExecutor),
    (worker, "separate_deepstack_embeds", model.separate_deepstack_embeds),
    (server, "prepare_batch", model.batch_of),
    (outgoing, "HostRows", model.HostRows),
    (incoming, "to_device", model.to_device),
    (runner, "threading", _THREADING),
    (text_node, "ThreadPoolExecutor", threads.ThreadPoolExecutor),
    (text_node, "prepare_batch", model.batch_of),
    (core, "_empty_state", engine.empty_state),
    (core, "empty_rows", lambda *_: None),
    (httpx, "AsyncHTTPTransport", http.Transport),
)


@contextlib.contextmanager
def simulated(*more: tuple[Any, str, Any]) -> Iterator[None]:
    """Replaces the world, and `more` (owner, name, value), within the block."""
    with contextlib.ExitStack() as stack:
        for owner, name, value in (*_REPLACED, *more):
            stack.enter_context(mock.patch.object(owner, name, value))
        yield
