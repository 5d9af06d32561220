"""An engine on a mesh of several processes: process 0 hears of requests, and the others do what it does.

An engine's turns follow from the requests, from the clock of each turn, and from tokens, which every process reads
alike. So process 0 sends each call of its engine that changes anything, in order, and the others make the same call:
all launch the same programs. Each builds the grammar of a request for itself. Messages are msgpack over TCP, with a
token that the processes share; arrays are sent as they are. A process that is lost, or that lags behind by more than
`STEP_SECONDS`, ends all of them.
"""

import contextlib
import os
import queue
import secrets
import socket
import struct
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import jax
import msgspec
import numpy as np
from jax.experimental import multihost_utils

from deepstack_jax.engine.core import Engine, Event
from deepstack_jax.engine.prefix_cache import ImageSpan
from deepstack_jax.engine.request import GenerationPlan, Image, Request
from deepstack_jax.errors import one_line
from deepstack_jax.models.vision import PatchGeometry, VisualRows
from deepstack_jax.processes import coordinator_host
from deepstack_jax.processing.batch import VisionInput
from deepstack_jax.sampling import SamplingParams

CONNECT_SECONDS = 60.0
STEP_SECONDS = 300.0  # for one call on another process, compilation included
HEALTH_SECONDS = 2.0  # for which /health says what was lost, before the process ends
_LENGTH = struct.Struct("<Q")
_TOKEN_BYTES = 32


class LeadingEngine(Engine):
    """The engine of process 0. Every other process must run `follow` with the same model and arguments."""

    def __init__(self, *args: Any, **options: Any):
        self._depth = 0
        super().__init__(*args, **options)
        self._followers = _connect_followers(self._lose)

    def add(self, request: Request, salt: bytes = b"") -> None:
        for image in request.images:
            if image.encoded is not None:
                image.encoded = _on_host(image.encoded)
        self._with_all(lambda: ("add", _pack(request), salt), lambda: super(LeadingEngine, self).add(request, salt))

    def cancel(self, request: Request, reason: str = "cancelled") -> None:
        self._with_all(
            lambda: ("cancel", request.id, reason), lambda: super(LeadingEngine, self).cancel(request, reason)
        )

    def add_rows(self, request: Request, first_row: int, rows: VisualRows) -> None:
        rows = _on_host(rows)
        self._with_all(
            lambda: ("add_rows", request.id, first_row, _pack_rows(rows)),
            lambda: super(LeadingEngine, self).add_rows(request, first_row, rows),
        )

    def step(self, now: float | None = None) -> list[Event]:
        now = time.monotonic() if now is None else now
        return self._with_all(lambda: ("step", now), lambda: super(LeadingEngine, self).step(now))

    def warm_up(self) -> None:
        self._with_all(lambda: ("warm_up",), super().warm_up)

    def warm_up_rows(self, count: int) -> None:
        self._with_all(lambda: ("warm_up_rows", count), lambda: super(LeadingEngine, self).warm_up_rows(count))

    def close(self) -> None:
        for follower in self._followers:
            follower.closed = True  # before it hears it, as it then goes
            follower.send(("close",))

    def _with_all[R](self, message: Callable[[], tuple[Any, ...]], call: Callable[[], R]) -> R:
        """Sends a call to the others and makes it; calls within it are theirs as well."""
        if not self._depth:
            packed = msgspec.msgpack.encode(message())
            for follower in self._followers:
                follower.send_packed(packed)
        self._depth += 1
        try:
            return call()
        finally:
            self._depth -= 1

    def _lose(self, reason: str) -> None:
        """Says what was lost, to whoever asks for /health, and ends this process: its programs would wait forever."""
        self.lost = reason
        _end(reason, HEALTH_SECONDS)


def follow(engine: Engine) -> None:
    """Makes every call that process 0 makes of its engine, until that closes it. Ends the process if it is lost."""
    link = _connect_leader()
    for message in link:
        _make_call(engine, *message)
        link.done()


def _make_call(engine: Engine, name: str, *args: Any) -> None:
    if name == "add":
        request = _unpack(engine, args[0])
        try:
            engine.add(request, args[1])
        except Exception:
            return  # process 0's engine refused it as well, and says why
    elif name == "cancel":
        engine.scheduler.cancel(*args)
    elif name == "add_rows":
        number, first_row, rows = args
        if (request := engine.request(number)) is not None:
            engine.add_rows(request, first_row, _unpack_rows(rows))
    else:
        {"step": engine.step, "warm_up": engine.warm_up, "warm_up_rows": engine.warm_up_rows}[name](*args)


def _end(reason: str, after: float = 0.0) -> None:
    print(f"error: {reason}", file=sys.stderr, flush=True)
    time.sleep(after)
    os._exit(1)  # threads wait in programs that never end


# ---- connections ----


class _Follower:
    """Process 0's connection to another process."""

    def __init__(self, number: int, connection: socket.socket, lose: Callable[[str], None]):
        self.number, self.closed = number, False
        self._connection, self._lose = connection, lose
        self._sent_at: deque[float] = deque()  # of calls that it has not made yet
        for target in (self._hear, self._watch):
            threading.Thread(target=target, name=f"process {number}", daemon=True).start()

    def send(self, message: tuple[Any, ...]) -> None:
        self.send_packed(msgspec.msgpack.encode(message))

    def send_packed(self, packed: bytes) -> None:
        self._sent_at.append(time.monotonic())
        with contextlib.suppress(OSError):  # `_hear` says it
            self._connection.sendall(_LENGTH.pack(len(packed)) + packed)

    def _hear(self) -> None:
        try:
            while self._connection.recv(1):
                self._sent_at.popleft()
        except OSError:
            pass
        if not self.closed:
            self._lose(f"process {self.number} of the mesh is lost: start all processes anew")

    def _watch(self) -> None:
        while not self.closed:
            oldest = self._sent_at[0] if self._sent_at else None
            if oldest is not None and time.monotonic() - oldest > STEP_SECONDS:
                self._lose(f"process {self.number} of the mesh has not answered for {STEP_SECONDS:g} s: start all anew")
            time.sleep(1.0)


class _Leader:
    """Another process's connection to process 0: its calls, in order."""

    def __init__(self, connection: socket.socket):
        self._connection = connection
        self._calls: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        threading.Thread(target=self._hear, name="process 0", daemon=True).start()

    def __iter__(self) -> "_Leader":
        return self

    def __next__(self) -> tuple[Any, ...]:
        call = self._calls.get()
        if call[0] == "close":
            raise StopIteration
        return call

    def done(self) -> None:
        """Tells process 0 that a call was made."""
        with contextlib.suppress(OSError):  # `_hear` says it
            self._connection.sendall(b".")

    def _hear(self) -> None:
        while (size := _read(self._connection, _LENGTH.size)) is not None:
            packed = _read(self._connection, _LENGTH.unpack(size)[0])
            if packed is None:
                break
            call = tuple(msgspec.msgpack.decode(packed))
            self._calls.put(call)
            if call[0] == "close":
                return
        _end("process 0 of the mesh is lost: start all processes anew")


def _connect_followers(lose: Callable[[str], None]) -> list[_Follower]:
    """Listens, tells the others where, and waits until each has come with the token."""
    token, missing = secrets.token_bytes(_TOKEN_BYTES), set(range(1, jax.process_count()))
    with socket.create_server(("", 0)) as listener:
        listener.settimeout(CONNECT_SECONDS)
        place = f"{_own_address()} {listener.getsockname()[1]}".encode()
        _share(token + place)
        found: list[_Follower] = []
        while missing:
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                raise ValueError(
                    f"process {min(missing)} of the mesh didn't connect: start all processes anew"
                ) from None
            connection.settimeout(CONNECT_SECONDS)
            said = _read(connection, _TOKEN_BYTES + _LENGTH.size)
            number = _LENGTH.unpack(said[_TOKEN_BYTES:])[0] if said else 0
            if said is None or not secrets.compare_digest(said[:_TOKEN_BYTES], token) or number not in missing:
                connection.close()
                continue
            connection.settimeout(None)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            missing.remove(number)
            found.append(_Follower(number, connection, lose))
    return found


def _connect_leader() -> _Leader:
    shared = _share(None)
    token, place = shared[:_TOKEN_BYTES], shared[_TOKEN_BYTES:].decode()
    host, port = place.split()
    try:
        connection = socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS)
    except OSError as error:
        raise ValueError(f"process 0 can't be reached at {place} ({one_line(error)}): open that network") from None
    connection.settimeout(None)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.sendall(token + _LENGTH.pack(jax.process_index()))
    return _Leader(connection)


def _own_address() -> str:
    """The address under which others reach process 0: the one that they were given, or that of its host's name."""
    return coordinator_host() or socket.gethostbyname(socket.gethostname())


def _share(data: bytes | None) -> bytes:
    """Gives process 0's bytes, at most 256, to all processes."""
    filled = np.zeros(257, np.uint8)
    if data is not None:
        filled[0], filled[1 : 1 + len(data)] = len(data), np.frombuffer(data, np.uint8)
    shared = np.asarray(multihost_utils.broadcast_one_to_all(filled))
    return shared[1 : 1 + int(shared[0])].tobytes()


def _read(connection: socket.socket, size: int) -> bytes | None:
    """Returns that many bytes, or None if the peer is gone."""
    data = bytearray()
    while len(data) < size:
        try:
            piece = connection.recv(min(size - len(data), 1 << 20))
        except OSError:
            return None
        if not piece:
            return None
        data += piece
    return bytes(data)


# ---- messages ----


# of a request, beside its images and plan
_SENT = ("input_ids", "position_ids", "visual_index", "rope_delta", "deadline", "tenant", "deepstack_scales")


def _pack(request: Request) -> dict[str, Any]:
    plan = request.plan.sampling
    return {
        **{name: _packed(getattr(request, name)) for name in _SENT},
        "images": [_pack_image(image) for image in request.images],
        "sampling": {each.name: _packed(getattr(plan, each.name)) for each in fields(plan)},
        "max_new_tokens": request.plan.max_new_tokens,
        "grammar": None if request.grammar is None else request.grammar.spec,
        "spans": None if request.spans is None else [(s.first, s.rows, s.digest) for s in request.spans],
    }


def _unpack(engine: Engine, sent: dict[str, Any]) -> Request:
    sampling = SamplingParams(**{name: _unpacked(value) for name, value in sent["sampling"].items()})
    spans = None if sent["spans"] is None else tuple(ImageSpan(*span) for span in sent["spans"])
    named = {name: _unpacked(sent[name]) for name in _SENT}
    images = [_unpack_image(image) for image in sent["images"]]
    grammar = None if sent["grammar"] is None else engine.grammar_of(sent["grammar"])
    plan = GenerationPlan(sampling, sent["max_new_tokens"])
    return Request(**named, images=images, plan=plan, spans=spans, grammar=grammar)


def _pack_image(image: Image) -> dict[str, Any]:
    pixels = image.pixels
    return {
        "place": (image.first_row, image.rows, image.first_token, image.stop_token),
        "pixels": None
        if pixels is None
        else {
            "pixel_values": _packed(pixels.pixel_values),
            "geometry": {each.name: _packed(getattr(pixels.geometry, each.name)) for each in fields(pixels.geometry)},
            "num_rows": pixels.num_rows,
        },
        "encoded": None if image.encoded is None else _pack_rows(image.encoded),
    }


def _unpack_image(sent: dict[str, Any]) -> Image:
    pixels = sent["pixels"]
    if pixels is not None:
        geometry = PatchGeometry(**{name: _unpacked(array) for name, array in pixels["geometry"].items()})
        pixels = VisionInput(_unpacked(pixels["pixel_values"]), geometry, pixels["num_rows"])
    encoded = None if sent["encoded"] is None else _unpack_rows(sent["encoded"])
    first_row, rows, first_token, stop_token = sent["place"]
    return Image(first_row, rows, first_token, stop_token, pixels, encoded)


def _on_host[Rows](rows: Rows) -> Rows:
    """Rows that came to process 0 alone, as arguments that all processes give to a program alike."""
    return jax.tree.map(np.asarray, rows)


def _pack_rows(rows: jax.Array | VisualRows) -> list[Any]:
    arrays = rows if isinstance(rows, VisualRows) else (rows,)
    return [None if array is None else _packed(np.asarray(array)) for array in arrays]


def _unpack_rows(sent: list[Any]) -> Any:
    first, *rest = (_unpacked(array) for array in sent)
    return VisualRows(first, *rest) if rest else first


def _packed(value: Any) -> Any:
    if not isinstance(value, np.ndarray):
        return value
    return {"dtype": value.dtype.name, "shape": value.shape, "data": np.ascontiguousarray(value).tobytes()}


def _unpacked(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return np.frombuffer(value["data"], jax.numpy.dtype(value["dtype"])).reshape(value["shape"]).copy()
