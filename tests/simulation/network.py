"""The control network: what ZeroMQ's ROUTER and DEALER sockets do over TCP, with links that fail.

Messages of one direction of a connection arrive in order, once, or never. They are lost when the connection breaks,
when the queue of an unconnected socket is full, or when the other end was lost without a word. A stalled direction
delivers late what was sent meanwhile. A DEALER reconnects with a back-off, and then has a new identity.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import zmq

from tests.simulation import clock
from tests.simulation.world import Process, World

HIGH_WATER_MARK = 1000  # messages, as ZeroMQ's default


@dataclass
class Link:
    """The path between a language node and an encode node's endpoint; it outlives the processes at its ends.

    Attributes:
        latency: seconds a message takes at most as a rule.
        cut: nothing gets through, and connections break.
        stalled: by direction (up is towards the encode node), what is sent arrives only later.
    """

    latency: float = 0.002
    cut: bool = False
    stalled_up: bool = False
    stalled_down: bool = False


class Network:
    """All endpoints, links and connections.

    `watch` is called with (sender's process, receiver's process, bytes) as a message is delivered.
    """

    def __init__(self, world: World):
        self.world = world
        self.routers: dict[str, Router] = {}
        self.links: dict[tuple[str, str], Link] = {}
        self.pipes: list[_Pipe] = []
        self.watch: Callable[[Process, Process, bytes], None] = lambda *_: None

    def link(self, node: str, endpoint: str) -> Link:
        """The link between a node, by the name that all of its incarnations share, and an endpoint."""
        return self.links.setdefault((node, endpoint), Link())

    def cut(self, link: Link) -> None:
        """Breaks the link's connections; those inside are not told at once if the loss is silent."""
        link.cut = True
        for pipe in [pipe for pipe in self.pipes if pipe.link is link]:
            pipe.break_off()

    def heal(self, link: Link) -> None:
        """Undoes every fault of the link."""
        link.cut = link.stalled_up = link.stalled_down = False
        for pipe in self.pipes:
            if pipe.link is link:
                pipe.resume()

    def lose(self, process: Process, silently: bool) -> None:
        """The process has ended: its connections break, or `silently` stay half open at the other end."""
        for endpoint in [each for each, router in self.routers.items() if router.process is process]:
            del self.routers[endpoint]
        for pipe in [pipe for pipe in self.pipes if process in (pipe.dealer.process, pipe.router.process)]:
            if silently and pipe.router.process is process:
                pipe.half_open = True
            else:
                pipe.break_off()


class _Pipe:
    """One connection between a DEALER and a ROUTER."""

    def __init__(self, network: Network, link: Link, dealer: "Dealer", router: "Router", identity: bytes):
        self.network, self.link, self.dealer, self.router, self.identity = network, link, dealer, router, identity
        self.half_open = False  # the router's process is gone, and the dealer does not know
        self.broken = False
        self._last = {True: 0.0, False: 0.0}  # delivery of the latest message, by direction
        self._on_the_way: dict[bool, deque[bytes]] = {True: deque(), False: deque()}
        self._held: dict[bool, deque[bytes]] = {True: deque(), False: deque()}

    def send(self, up: bool, data: bytes) -> None:
        link, world = self.link, self.network.world
        if self.half_open:
            if self.network.routers.get(self.router.endpoint) is not None:  # the new process answers with a reset
                self.break_off()
            return
        if link.stalled_up if up else link.stalled_down:
            self._held[up].append(data)
            return
        at = max(self._last[up], world.now + link.latency * (0.1 + 0.9 * world.dice.random()))
        self._last[up] = at
        self._on_the_way[up].append(data)
        world.after(at - world.now, self._deliver, up)

    def resume(self) -> None:
        for up, held in self._held.items():
            while held:
                self.send(up, held.popleft())

    def _deliver(self, up: bool) -> None:
        data = self._on_the_way[up].popleft()  # in order, whichever of several events at one time comes first
        if self.broken:
            return
        sender, receiver = (self.dealer, self.router) if up else (self.router, self.dealer)
        if receiver.process.alive:
            self.network.watch(sender.process, receiver.process, data)
            receiver.arrive([self.identity, data] if up else [data])

    def break_off(self) -> None:
        """Both ends learn that the connection is gone; what is on its way is lost."""
        if not self.broken:
            self.broken = True
            self.network.pipes.remove(self)
            self.router.pipes.pop(self.identity, None)
            self.dealer.pipe = None
            self.dealer.retry()


class Context:
    """As `zmq.asyncio.Context`."""

    network: Network

    def socket(self, kind: int) -> "_Socket":
        return {zmq.ROUTER: Router, zmq.DEALER: Dealer, zmq.REP: Questions}[kind](self.network, clock.process())

    def destroy(self, linger: int | None = None) -> None:
        pass


class _Sent:
    """What sending without waiting returns."""

    @staticmethod
    def done() -> bool:
        return True

    @staticmethod
    def exception() -> None:
        return None


_SENT = _Sent()


class _Socket:
    """What both kinds of sockets share: receiving, and options that change nothing here."""

    def __init__(self, network: Network, process: Process):
        self.network, self.process = network, process
        self.closed = False
        self.endpoint = ""
        self._inbox: deque[list[bytes]] = deque()
        self._reader: asyncio.Future[list[bytes]] | None = None
        process.at_kill.append(self._drop)

    def setsockopt(self, option: int, value: Any) -> None:
        pass

    def arrive(self, parts: list[bytes]) -> None:
        """A message has arrived at this process, which reads it when it can."""
        if not self.closed:
            self._inbox.append(parts)
            if len(self._inbox) == 1:
                self.process.after(0.0, self._feed)

    def _feed(self) -> None:
        if self._inbox and self._reader is not None and not self._reader.done():
            self._reader.set_result(self._inbox.popleft())

    def recv_multipart(self) -> "asyncio.Future[list[bytes]]":
        self._reader = asyncio.get_running_loop().create_future()
        if self._inbox:
            self._reader.set_result(self._inbox.popleft())
        return self._reader

    def _drop(self) -> None:
        self.closed = True


class Questions(_Socket):
    """Where ZeroMQ asks about the keys of peers: all have the cluster's, and nobody asks."""

    def bind(self, endpoint: str) -> None:
        """Does nothing."""

    def close(self, linger: int | None = None) -> None:
        """Receives nothing more."""
        self.closed = True


class Router(_Socket):
    """An encode node's socket."""

    def __init__(self, network: Network, process: Process):
        super().__init__(network, process)
        self.pipes: dict[bytes, _Pipe] = {}

    def bind(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.network.routers[endpoint] = self

    def getsockopt_string(self, option: int) -> str:
        return self.endpoint

    def send_multipart(self, parts: Sequence[bytes], flags: int = 0) -> _Sent:
        identity, data = parts
        if not self.closed and (pipe := self.pipes.get(identity)) is not None:
            pipe.send(False, data)
        return _SENT

    def close(self, linger: int | None = None) -> None:
        if not self.closed:
            self.closed = True
            if self.network.routers.get(self.endpoint) is self:
                del self.network.routers[self.endpoint]
            # its last messages get some time
            self.network.world.after((linger or 0) / 1000, self._hang_up)

    def _hang_up(self) -> None:
        for pipe in list(self.pipes.values()):
            pipe.break_off()


class Dealer(_Socket):
    """A language node's socket to one encode node."""

    def __init__(self, network: Network, process: Process):
        super().__init__(network, process)
        self.pipe: _Pipe | None = None
        self._unsent: deque[bytes] = deque()
        self._first_wait = self._longest_wait = self._wait = 0.1

    def setsockopt(self, option: int, value: Any) -> None:
        if option == zmq.RECONNECT_IVL:
            self._first_wait = self._wait = value / 1000
        elif option == zmq.RECONNECT_IVL_MAX:
            self._longest_wait = value / 1000

    def connect(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.link = self.network.link(self.process.name.partition("#")[0], endpoint)
        self._attempt_soon(self.link.latency)

    def retry(self) -> None:
        """The connection is gone: it is tried again, at growing intervals."""
        if not self.closed:
            wait = self._wait * (0.5 + self.network.world.dice.random())
            self._wait = min(2 * self._wait, self._longest_wait)
            self._attempt_soon(wait)

    def send_multipart(self, parts: Sequence[bytes], flags: int = 0) -> _Sent:
        if self.pipe is not None:
            self.pipe.send(True, parts[0])
        elif not self.closed and len(self._unsent) < HIGH_WATER_MARK:
            self._unsent.append(parts[0])
        return _SENT

    def close(self, linger: int | None = None) -> None:
        if not self.closed:
            self.closed = True
            if self.pipe is not None:
                self.network.world.after((linger or 0) / 1000, self.pipe.break_off)

    def _attempt_soon(self, seconds: float) -> None:
        self.process.after(seconds, self._attempt)

    def _attempt(self) -> None:
        router = self.network.routers.get(self.endpoint)
        if self.closed or self.pipe is not None:
            return
        if router is None or self.link.cut:
            self.retry()
            return
        self._wait = self._first_wait
        identity = b"\0" + self.network.world.dice.randbytes(4)
        self.pipe = router.pipes[identity] = _Pipe(self.network, self.link, self, router, identity)
        self.network.pipes.append(self.pipe)
        while self._unsent:
            self.pipe.send(True, self._unsent.popleft())
