"""Resolves host names in threads of its own, so that a name whose server doesn't answer delays nothing else."""

import asyncio
import ipaddress
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from deepstack_jax.processing.daemon_threads import DaemonThreads

NAME_SECONDS = 5.0  # within which a name has to resolve
FAILED_SECONDS = 5.0  # for which a name that failed is not asked for again
_MAX_THREADS = 32  # lookups at once; the system's resolver can't be interrupted
_MAX_FAILED = 1024  # names that are remembered

Lookup = Callable[[str], list[Any]]


def _system_lookup(host: str) -> list[Any]:
    return socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)


class Resolver:
    """Resolves names; an instance is called like a function, from any event loop.

    Equal names that are asked for at the same time are one lookup. Addresses are never kept: whoever checks them
    connects to those that were checked. Only failures are remembered, for a few seconds.
    """

    def __init__(
        self,
        lookup: Lookup = _system_lookup,
        *,
        seconds: float = NAME_SECONDS,
        failed_seconds: float = FAILED_SECONDS,
        threads: int = _MAX_THREADS,
    ):
        """
        Args:
            lookup: returns what `socket.getaddrinfo` returns.
            seconds: after which a name counts as failed, although its thread may go on.
            failed_seconds: for which a failed name fails at once.
            threads: lookups at once; more names wait, and their time runs.
        """
        self._lookup, self._seconds, self._failed_seconds = lookup, seconds, failed_seconds
        self._threads = DaemonThreads("resolve", threads)
        self._lock = threading.RLock()  # a lookup that has ended already calls `_finish` at once
        self._pending: dict[str, Future[list[str]]] = {}
        self._failed: dict[str, float] = {}  # until when, on time.monotonic()'s clock

    async def __call__(self, host: str, port: int) -> list[str]:
        """Returns the addresses of a host without duplicates; the port doesn't matter.

        Raises:
            OSError: the name doesn't resolve, or not in time. A UnicodeError says that it is not a name.
        """
        try:
            return [str(ipaddress.ip_address(host))]  # which no hanging name may delay
        except ValueError:
            pass
        with self._lock:
            if self._failed.get(host, 0.0) > time.monotonic():
                raise socket.gaierror(socket.EAI_AGAIN, "the name failed just now")
            found = self._pending.get(host)
            if found is None:
                deadline = time.monotonic() + self._seconds
                found = self._pending[host] = self._threads.submit(lambda: self._resolve(host, deadline))
                found.add_done_callback(lambda done: self._finish(host, done))
        try:
            async with asyncio.timeout(self._seconds):
                return await asyncio.shield(asyncio.wrap_future(found))  # others may wait for the same lookup
        except TimeoutError:
            self._remember(host)
            raise

    def _resolve(self, host: str, deadline: float) -> list[str]:
        if time.monotonic() > deadline:
            raise TimeoutError  # nobody waits for it any more
        return list(dict.fromkeys(str(entry[4][0]) for entry in self._lookup(host)))

    def _finish(self, host: str, done: "Future[list[str]]") -> None:
        with self._lock:
            del self._pending[host]
            if done.exception() is None:
                self._failed.pop(host, None)
                return
        self._remember(host)

    def _remember(self, host: str) -> None:
        with self._lock:
            self._failed.pop(host, None)
            if len(self._failed) >= _MAX_FAILED:
                del self._failed[next(iter(self._failed))]  # the oldest
            self._failed[host] = time.monotonic() + self._failed_seconds


resolve_name = Resolver()
