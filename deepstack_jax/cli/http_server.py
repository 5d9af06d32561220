"""Runs the HTTP server of a node: it listens from the start, and answers probes while the node loads in a thread."""

import asyncio
import contextlib
import gc
import ipaddress
import logging
import os
import resource
import signal
import socket
import ssl
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepstack_jax.errors import REMEDIES, shortage

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from deepstack_jax.serving.endpoint import Node

BACKLOG = 128  # connections that wait to be accepted; asyncio takes as many before anything else runs
CLOSE_SECONDS = 2.0  # after the grace, to close everything in order
SAY_SECONDS = 0.3  # of them, for each step in which clients are told or cut
MIN_DESCRIPTORS, MAX_DESCRIPTORS = 64, 1 << 16
_ENDING = signal.SIGTERM, signal.SIGINT
_INTERRUPTED = 130  # exit code of Ctrl-C
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tls:
    """The files of a server's certificate chain and its key, in PEM.

    Raises:
        ValueError: they can't be used.
    """

    cert: Path
    key: Path

    def __post_init__(self) -> None:
        self.context()

    def context(self) -> ssl.SSLContext:
        """How the server speaks TLS."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        try:
            context.load_cert_chain(self.cert, self.key)
        except (OSError, ssl.SSLError) as error:
            reason = error.strerror or getattr(error, "reason", type(error).__name__)
            raise ValueError(
                f"--tls-cert {self.cert} and --tls-key {self.key} can't be used ({reason}): give a certificate chain "
                "and its key in PEM"
            ) from None
        return context


def trusted(authorities: Path | None) -> ssl.SSLContext | bool:
    """How certificates of other servers are checked: against a file of authorities in PEM, or the usual ones.

    Raises:
        ValueError: the file can't be used.
    """
    try:
        return ssl.create_default_context(cafile=authorities) if authorities else True
    except (OSError, ssl.SSLError) as error:
        reason = error.strerror or type(error).__name__
        raise ValueError(f"--tls-ca {authorities} can't be used ({reason}): give certificates in PEM") from None


def bind(host: str, port: int) -> socket.socket:
    """A bound socket that doesn't listen yet.

    Raises:
        ValueError: the address can't be used.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise ValueError(f"{host} port {port} can't be used ({error.strerror}): choose another one") from None
    return listener


def is_loopback(listener: socket.socket) -> bool:
    """Whether only this machine can reach the socket."""
    return ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback


def address_of(listener: socket.socket, tls: Tls | None) -> str:
    """The URL of the server."""
    host, port = listener.getsockname()[:2]
    return f"{'https' if tls else 'http'}://{in_url(host)}:{port}"


def in_url(host: str) -> str:
    """A host as URLs have it."""
    return f"[{host}]" if ":" in host else host


def serve_node(
    app: "Starlette",
    listener: socket.socket,
    load: "Callable[[], Awaitable[Node]]",
    *,
    tls: Tls | None,
    reloads: Mapping[str, Callable[[], None]],
    grace: float,
) -> None:
    """Serves until SIGTERM or SIGINT, and prints one line when the node is ready. Then it ends the process.

    Args:
        app: from `create_app`, without a node.
        listener: from `bind`.
        load: makes the node, without holding up the event loop that it runs in, and without starting it.
        tls: for HTTPS.
        reloads: what SIGHUP calls, by the name of what it reads again. A ValueError means that nothing has changed.
        grace: seconds for running requests to finish.
    """
    # there is nothing to finish yet, and Python would wait for threads that load or compile
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, lambda *_: _interrupt())
    runner = asyncio.Runner()
    try:
        runner.run(_serve(app, listener, load, tls, reloads, Ending(grace)))
        import jax

        if not jax.distributed.is_initialized():  # otherwise JAX has to part from the other processes
            # everything is closed: to take the interpreter and the model's arrays apart would take seconds, and the
            # runner would start a thread, which may be refused
            logging.shutdown()
            sys.stdout.flush()
            os._exit(0)
    finally:
        runner.close()


async def in_thread[T](call: Callable[[], T]) -> T:
    """Runs `call` in a thread that the process doesn't wait for when it ends."""
    loop = asyncio.get_running_loop()
    result: asyncio.Future[T] = loop.create_future()

    def run() -> None:
        try:
            value = call()
        except BaseException as error:
            loop.call_soon_threadsafe(result.set_exception, error)
        else:
            loop.call_soon_threadsafe(result.set_result, value)

    threading.Thread(target=run, name="load", daemon=True).start()
    return await result


class Ending:
    """Ends the process when SIGTERM or SIGINT comes: in order if it can, otherwise `CLOSE_SECONDS` after the grace.

    A thread of its own reads the signals, because the main one may stand still in a library's code, and Python joins
    threads when it exits, also those that never end. A second signal ends the process at once.

    Attributes:
        grace: seconds for running requests to finish.
    """

    def __init__(self, grace: float):
        self.grace, self._closed = grace, False
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)

    def listen(self, stop: Callable[[], None]) -> None:
        """Calls `stop` in the event loop once a signal comes. From the main thread, with the loop running."""
        loop = asyncio.get_running_loop()
        for number in _ENDING:
            signal.signal(number, lambda *_: None)  # the byte in the socket counts
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(
            target=self._wait, args=(lambda: loop.call_soon_threadsafe(stop),), name="signals", daemon=True
        ).start()

    def close(self) -> None:
        """Everything that others notice is closed. If threads of this process are left, they get little more time."""
        self._closed = True
        self._writer.send(bytes(1))

    def _wait(self, stop: Callable[[], object]) -> None:
        while self._reader.recv(1)[0] not in _ENDING:
            pass
        deadline = time.monotonic() + self.grace + CLOSE_SECONDS
        with contextlib.suppress(RuntimeError):  # the loop is closed: it is ending anyway
            stop()
        while (left := deadline - time.monotonic()) > 0:
            self._reader.settimeout(left)
            with contextlib.suppress(TimeoutError):
                if (number := self._reader.recv(1)[0]) in _ENDING:
                    os._exit(128 + number)
            if self._closed:
                deadline = min(deadline, time.monotonic() + CLOSE_SECONDS)
        if self._closed:
            os._exit(0)
        reason = f"the server did not close in time, and ends {CLOSE_SECONDS:g} s after its grace"
        print(reason, file=sys.stderr, flush=True)
        os._exit(1)


async def _serve(
    app: "Starlette",
    listener: socket.socket,
    load: "Callable[[], Awaitable[Node]]",
    tls: Tls | None,
    reloads: Mapping[str, Callable[[], None]],
    ending: Ending,
) -> None:
    import uvicorn

    from deepstack_jax.serving.connections import ConnectionLimits, Gate

    service, loop = app.state.service, asyncio.get_running_loop()
    gate = Gate(
        ConnectionLimits.within(raise_descriptor_limit()), tls and tls.context(), service.metrics.connection_cut
    )

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield  # its handlers are installed only once the node is ready

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            service.drain()
            gate.close_waiting()
            if service.loaded:
                service.loaded.stop(ending.grace)  # the node says why to the clients of what it runs
            loop.call_later(ending.grace + SAY_SECONDS, service.end)  # and the service to the others
            loop.call_later(ending.grace + 2 * SAY_SECONDS, gate.close)
            await super().shutdown(sockets)

    config = uvicorn.Config(
        app,
        http=gate.protocol,  # type: ignore[arg-type]
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="error",  # warnings are one per bad request, which clients choose
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=ending.grace + 3 * SAY_SECONDS,  # type: ignore[arg-type]
    )
    server = Server(config)
    loop.set_exception_handler(Shortages(lambda: gate.narrow(loop)).handle)
    if reloads:
        signal.signal(signal.SIGHUP, lambda *_: loop.call_soon_threadsafe(_reload, reloads))
    serving = asyncio.create_task(server.serve([listener]))
    node = None
    try:
        node = await load()
        await node.start()
        settle_heap()
        service.open(node)
        ending.listen(lambda: server.handle_exit(signal.SIGTERM, None))
        control = f", control {node.control}" if node.control else ""
        print(
            f"ready: {node.role} node of {', '.join(node.model_names)} on {address_of(listener, tls)}{control}",
            flush=True,
        )
        await serving
    finally:
        serving.cancel()  # if loading failed
        if node is not None:
            node.stop(0.0)
            await node.close()
            ending.close()


def settle_heap() -> None:
    """Lets no later garbage collection look through what exists now: that would hold up all requests for 0.3 s."""
    gc.collect()
    gc.freeze()


class Shortages:
    """Logs at most once per second that connections fail for want of something, and makes room.

    Where none could be accepted, asyncio then tries again.
    """

    def __init__(self, make_room: Callable[[], None]) -> None:
        self._next, self._make_room = 0.0, make_room

    def handle(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """An exception handler for an event loop."""
        error = context.get("exception")
        lacking = error and shortage(error)
        if not lacking:
            loop.default_exception_handler(context)
        elif loop.time() >= self._next:
            self._next = loop.time() + 1.0
            self._make_room()
            _log.error("connections fail, for the server is short of %s: %s", lacking, REMEDIES[lacking])


def raise_descriptor_limit() -> int:
    """Raises the limit on open files as far as it may be and helps; returns it.

    Raises:
        ValueError: it is too low for a server.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        soft = most
    if soft == resource.RLIM_INFINITY:
        return MAX_DESCRIPTORS
    if soft < MIN_DESCRIPTORS:
        raise ValueError(
            f"a server needs {MIN_DESCRIPTORS} open files and may have {soft}: raise the limit (ulimit -n)"
        )
    return soft


def _reload(reloads: Mapping[str, Callable[[], None]]) -> None:
    for name, reload in reloads.items():
        try:
            reload()
        except ValueError as error:
            _log.error("%s are still those from before: %s", name, error)


def _interrupt() -> None:
    if sys.stderr.isatty():
        print("\x1b[?25h", end="", file=sys.stderr, flush=True)  # the cursor, which the progress bar hides
    os._exit(_INTERRUPTED)
