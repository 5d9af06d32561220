"""The control plane: which peers are admitted or refused, and how either side detects that the other is gone.

Sockets and encode nodes are real. The language node is either real or, to misbehave, a bare socket.
"""

import asyncio
import os
import signal
import stat
import threading
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
import zmq.asyncio

import deepstack_jax as dsj
from deepstack_jax.disagg.encode import server as encode_node
from deepstack_jax.disagg.encode.server import EncodeServer
from deepstack_jax.disagg.keys.files import ClusterKey, make_key, read_key, users_key
from deepstack_jax.disagg.language import link
from deepstack_jax.disagg.language.encoder_pool import EncoderPool
from deepstack_jax.disagg.language.fetch import TransferFailedError
from deepstack_jax.disagg.language.link import HEARTBEAT_TIMEOUT_S
from deepstack_jax.disagg.nodes import open_encode_server, open_encoder_pool
from deepstack_jax.disagg.wire.control import Connection, Listener, check_endpoint
from deepstack_jax.disagg.wire.messages import (
    PROTOCOL,
    Abort,
    Accepted,
    Goodbye,
    Heartbeat,
    HeartbeatReply,
    Hello,
    Message,
    NodeLoad,
    Prepared,
    Refused,
    Release,
    Submit,
    Welcome,
    pack_message,
    unpack_message,
)
from deepstack_jax.disagg.wire.payload import pack, unpack
from deepstack_jax.testing.random_checkpoint import tiny_config, write_random_checkpoint
from tests.faults import inject_message_faults
from tests.media import media
from tests.nodes import EncodeProcess, encode_process
from tests.whole_prompts import fetch

BLOCK = 16
CONFIG = tiny_config(text_config={"num_hidden_layers": 1}, vision_config={"depth": 1, "deepstack_visual_indexes": [0]})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> dsj.Model:
    path = tmp_path_factory.mktemp("control") / "model"
    write_random_checkpoint(path, CONFIG, seed=2)
    return dsj.load(path, "float32")


@pytest.fixture(scope="module")
def process(model: dsj.Model) -> Iterator[EncodeProcess]:
    """An encode node as a process of its own."""
    assert model.path is not None
    with encode_process(model.path, "float32", BLOCK) as process:
        yield process


@pytest.fixture
def key(tmp_path: Path) -> ClusterKey:
    make_key(tmp_path / "cluster.key")
    return read_key(tmp_path / "cluster.key")


@asynccontextmanager
async def serving(model: dsj.Model, **options: Any) -> AsyncIterator[EncodeServer]:
    server = open_encode_server(model, block_size=BLOCK, **options)
    await server.start()
    try:
        yield server
    finally:
        await server.close()


@asynccontextmanager
async def connected(model: dsj.Model, endpoints: Iterable[str], **options: Any) -> AsyncIterator[EncoderPool]:
    text_only = dsj.Model(model.config, model.text_params, model.path, model.eos_token_ids, model.pad_token_id)
    encoders = open_encoder_pool(text_only, list(endpoints), block_size=BLOCK, num_blocks=4, **options)
    await encoders.start()
    try:
        yield encoders
    finally:
        await encoders.close()


async def until(condition: Any, seconds: float = 20.0) -> float:
    """Waits until the condition holds; returns the seconds that this took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, f"the condition did not hold within {seconds} s"
        await asyncio.sleep(0.01)
    return time.monotonic() - began


class BareSocket:
    """A DEALER socket that sends any bytes with any keys."""

    def __init__(self, endpoint: str, server: bytes | None = None, pair: tuple[bytes, bytes] | None = None):
        self.context = zmq.asyncio.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        if server is not None and pair is not None:
            self.socket.curve_serverkey = server
            self.socket.curve_publickey, self.socket.curve_secretkey = pair
        self.socket.connect(endpoint)

    async def ask(self, *frames: bytes, seconds: float = 20.0) -> Message | None:
        """Sends a message and returns the first answer, or None if there is none."""
        await self.socket.send_multipart(frames)
        return await self.answer(seconds)

    async def answer(self, seconds: float = 20.0) -> Message | None:
        if not await self.socket.poll(int(seconds * 1000)):
            return None
        return unpack_message((await self.socket.recv_multipart())[0])[0]

    def close(self) -> None:
        self.context.destroy(linger=0)


def a_hello(server: EncodeServer, **changed: Any) -> Hello:
    """The Hello of a compatible language node; nothing is written to its pool."""
    row = BLOCK * server.hello.hidden_size * 4
    lens = (row, 4 * BLOCK, 12 * BLOCK, 64, row * server.hello.num_deepstack_embeddings)
    fields = {"role": "language", "incarnation": "bare", "session": "127.0.0.1:9", "ptrs": (1,) * 5}
    fields |= {"total_lens": lens, "item_lens": lens}
    return msgspec.structs.replace(server.hello, **fields | changed)


class TestKeys:
    def test_only_its_owner_can_read_a_key_file_and_it_is_never_overwritten(self, tmp_path: Path):
        path = tmp_path / "cluster.key"
        make_key(path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        before = path.read_bytes()
        with pytest.raises(FileExistsError):
            make_key(path)
        assert path.read_bytes() == before
        key = read_key(path)
        assert zmq.curve_public(key.secret) == key.public

    @pytest.mark.parametrize("mode", [0o640, 0o604, 0o666])
    def test_a_key_file_that_others_can_read_is_refused(self, tmp_path: Path, mode: int):
        path = tmp_path / "cluster.key"
        make_key(path)
        path.chmod(mode)
        with pytest.raises(ValueError, match=r"can be read by others: chmod 600 .*cluster.key"):
            read_key(path)

    def test_links_and_other_kinds_of_files_are_refused(self, tmp_path: Path):
        path, link, pipe = tmp_path / "cluster.key", tmp_path / "link.key", tmp_path / "pipe.key"
        make_key(path)
        link.symlink_to(path)
        with pytest.raises(ValueError, match=r"link\.key is a link: give the file that it leads to"):
            read_key(link)
        os.mkfifo(pipe, 0o600)
        with pytest.raises(ValueError, match=r"pipe\.key is not a regular file"):
            read_key(pipe)
        assert [each.name for each in sorted(tmp_path.iterdir())] == ["cluster.key", "link.key", "pipe.key"]

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
    def test_a_key_file_of_another_user_is_refused(self, tmp_path: Path):
        path = tmp_path / "cluster.key"
        make_key(path)
        os.chown(path, 12345, 12345)
        with pytest.raises(ValueError, match="belongs to another user: chown 0 "):
            read_key(path)

    def test_nodes_of_one_user_that_start_at_once_make_one_key(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
        with ThreadPoolExecutor(8) as pool:
            keys = set(pool.map(lambda _: users_key(), range(8)))
        assert len(keys) == 1
        folder = tmp_path / "config" / "deepstack-jax"
        assert [each.name for each in folder.iterdir()] == ["cluster.key"]
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert keys == {read_key(folder / "cluster.key"), users_key()}

    @pytest.mark.parametrize("content", ["", "{}", "[]", '{"public": 1, "secret": 2}', "mixed", "no text"])
    def test_other_files_are_refused_as_key_files(self, tmp_path: Path, content: str):
        path = tmp_path / "cluster.key"
        if content == "mixed":  # from two different pairs
            content = msgspec.json.encode(
                {"public": zmq.curve_keypair()[0].decode(), "secret": zmq.curve_keypair()[1].decode()}
            ).decode()
        path.write_bytes(b"\xff\xfe" if content == "no text" else content.encode())
        path.chmod(0o600)
        with pytest.raises(ValueError, match="is not a key file: make one with deepstack-jax keygen"):
            read_key(path)

    @pytest.mark.parametrize(
        "endpoint",
        ["tcp://10.0.0.1:5", "tcp://0.0.0.0:5", "tcp://*:5", "tcp://[::]:5", "tcp://[fe80::1%eth0]:5", "tcp://host:5"],
    )
    def test_beyond_loopback_a_key_is_required(self, endpoint: str, key: ClusterKey):
        check_endpoint(endpoint, key)
        with pytest.raises(ValueError, match="is not loopback: give --key"):
            check_endpoint(endpoint, None)
        with pytest.raises(ValueError, match="is not loopback: give --key"):
            Listener(endpoint)
        with pytest.raises(ValueError, match="is not loopback: give --key"):
            Connection(endpoint)

    @pytest.mark.parametrize("endpoint", ["ipc:///x", "tcp://127.0.0.1", "tcp://::1:5", "127.0.0.1:5", "tcp://:5"])
    def test_invalid_endpoints_are_refused(self, endpoint: str, key: ClusterKey):
        with pytest.raises(ValueError, match="is not a valid endpoint: expected tcp://host:port"):
            check_endpoint(endpoint, key)

    def test_peers_without_the_key_receive_nothing_and_leave_no_trace(self, model: dsj.Model, key: ClusterKey):
        async def work() -> None:
            async with serving(model, key=key) as server:
                endpoint, own, other = server.listener.endpoint, (key.public, key.secret), zmq.curve_keypair()
                strangers = {
                    "no CURVE": BareSocket(endpoint),
                    "another key": BareSocket(endpoint, other[0], other),
                    "the server's key and one's own": BareSocket(endpoint, key.public, other),
                    "the cluster's pair for another server": BareSocket(endpoint, other[0], own),
                }
                for stranger in strangers.values():
                    await stranger.socket.send(pack_message(a_hello(server)))
                member = BareSocket(endpoint, key.public, own)
                answer = await member.ask(pack_message(a_hello(server)))
                assert isinstance(answer, Refused)
                assert "gives no key for its blocks" in answer.reason
                assert isinstance(await member.ask(pack_message(a_hello(server, block_key=bytes(32)))), Welcome)
                await asyncio.sleep(0.5)
                for name, stranger in strangers.items():
                    assert await stranger.answer(0.1) is None, name
                    stranger.close()
                member.close()
                assert len(server.peers) == 1
                assert not server.listener.num_unreadable
                assert not server.sender.ignored

        asyncio.run(work())

    def test_nodes_with_the_key_find_each_other(self, model: dsj.Model, key: ClusterKey):
        async def work() -> None:
            async with (
                serving(model, key=key) as server,
                connected(model, [server.listener.endpoint], key=key) as encoders,
            ):
                await until(lambda: encoders.num_encoders == 1)

        asyncio.run(work())


class TestConnecting:
    def test_unreadable_messages_are_counted_and_dropped(self, model: dsj.Model):
        async def work() -> None:
            async with serving(model) as server:
                bare = BareSocket(server.listener.endpoint)
                good = pack_message(a_hello(server))
                bad = [(b"",), (b"\x01",), (good[:-1],), (good + b"\x00",), (os.urandom(50),), (good, good)]
                for frames in bad:
                    await bare.socket.send_multipart(frames)
                assert isinstance(await bare.ask(good), Welcome)
                assert server.listener.num_unreadable == len(bad)
                bare.close()

        asyncio.run(work())

    def test_a_language_node_counts_and_drops_unreadable_messages_too(self, model: dsj.Model):
        async def work() -> None:
            with zmq.asyncio.Context() as context, context.socket(zmq.ROUTER) as encoder:
                encoder.setsockopt(zmq.LINGER, 0)
                port = encoder.bind_to_random_port("tcp://127.0.0.1")
                async with connected(model, [f"tcp://127.0.0.1:{port}"]) as encoders:
                    connection, data = await encoder.recv_multipart()
                    hello = unpack_message(data)[0]
                    assert isinstance(hello, Hello)
                    goodbye = pack_message(Goodbye())
                    for frames in ([b""], [os.urandom(30)], [goodbye] * 2, [goodbye[:-1]]):
                        await encoder.send_multipart([connection, *frames])
                    await until(lambda: encoders.num_unreadable == 4)
                    compatible = msgspec.structs.replace(hello, role="encode", incarnation="e")
                    await encoder.send_multipart([connection, pack_message(Welcome(compatible))])
                    await until(lambda: encoders.num_encoders == 1)

        asyncio.run(work())

    @pytest.mark.parametrize(
        ("changed", "remedy"),
        [
            ({"protocol": PROTOCOL - 1}, "install the same release on both"),
            ({"model": "another"}, "load the same checkpoint on both"),
            ({"dtype": "bfloat16"}, "load both with the same dtype"),
            ({"hidden_size": 8}, "load the same checkpoint on both"),
            ({"num_deepstack_embeddings": 3}, "load the same checkpoint on both"),
            ({"block_size": 32}, "start both with the same block size"),
            ({"role": "encode"}, "expected role language"),
            ({"session": ""}, "the pool needs a session"),
            ({"encrypt_blocks": True}, "start both with --encrypt-blocks, or neither"),
            ({"block_key": b"short"}, "a key of 5 bytes for blocks"),
            ({"http_url": "http://10.0.0.1:80@evil:80"}, "is not of the form http://host:port"),
            ({"http_url": "http://10.0.0.1:80/path?"}, "is not of the form http://host:port"),
            ({"http_url": "file:///etc/passwd"}, "is not of the form http://host:port"),
        ],
    )
    def test_a_node_that_does_not_fit_is_refused_with_the_reason(
        self, model: dsj.Model, changed: dict[str, Any], remedy: str
    ):
        async def work() -> None:
            async with serving(model) as server:
                bare = BareSocket(server.listener.endpoint)
                answer = await bare.ask(pack_message(a_hello(server, **changed)))
                assert isinstance(answer, Refused)
                assert remedy in answer.reason
                assert not server.peers
                # and its requests are refused too
                answer = await bare.ask(pack_message(Submit("r", 1, 1000, b"")))
                assert answer == Goodbye("send Hello first")
                bare.close()

        asyncio.run(work())

    def test_more_language_nodes_than_allowed_are_refused_until_one_leaves(self, model: dsj.Model):
        async def work() -> None:
            async with serving(model, max_peers=2) as server:
                nodes = [BareSocket(server.listener.endpoint) for _ in range(3)]
                hellos = [pack_message(a_hello(server, incarnation=f"bare{number}")) for number in range(3)]
                for node, hello in zip(nodes[:2], hellos, strict=False):
                    assert isinstance(await node.ask(hello), Welcome)
                answer = await nodes[2].ask(hellos[2])
                assert isinstance(answer, Refused)
                assert "has 2 language nodes: start it with a higher --max-peers" in answer.reason
                assert isinstance(await nodes[0].ask(hellos[0]), Welcome)  # one that is known may repeat its Hello
                await nodes[1].socket.send(pack_message(Goodbye()))
                await until(lambda: len(server.peers) == 1)
                assert isinstance(await nodes[2].ask(hellos[2]), Welcome)
                for node in nodes:
                    node.close()

        asyncio.run(work())

    def test_ipv6(self, model: dsj.Model, key: ClusterKey):
        async def work() -> None:
            async with serving(model, endpoint="tcp://[::1]:*", key=key) as server:
                assert server.listener.endpoint.startswith("tcp://[::1]:")
                async with connected(model, [server.listener.endpoint], key=key) as encoders:
                    await until(lambda: encoders.num_encoders == 1)

        asyncio.run(work())

    def test_several_nodes_on_one_host(self, model: dsj.Model):
        async def work() -> None:
            async with serving(model) as one, serving(model) as two:
                both = [one.listener.endpoint, two.listener.endpoint]
                async with connected(model, both) as first, connected(model, both) as second:
                    await until(lambda: first.num_encoders == second.num_encoders == 2)
                    assert len(one.peers) == len(two.peers) == 2
                await until(lambda: not one.peers and not two.peers, 5)  # both language nodes have said Goodbye

        asyncio.run(work())

    def test_an_encoder_with_two_addresses_keeps_both_connections(self, model: dsj.Model):
        async def work() -> None:
            async with serving(model) as server:
                endpoint = server.listener.endpoint
                names = [endpoint, endpoint, endpoint.replace("127.0.0.1", "localhost")]
                async with connected(model, names) as encoders:
                    await until(lambda: encoders.num_encoders == 2)
                    bridges = [peer.bridge for peer in server.peers.values()]
                    await asyncio.sleep(3)  # some heartbeats
                    assert [peer.bridge for peer in server.peers.values()] == bridges
                    assert encoders.num_encoders == 2

        asyncio.run(work())

    def test_an_encoder_that_restarts_at_its_address_is_a_different_peer(self, model: dsj.Model):
        async def work() -> None:
            former = open_encode_server(model, block_size=BLOCK)
            await former.start()
            endpoint = former.listener.endpoint
            async with connected(model, [endpoint]) as encoders:
                await until(lambda: encoders.num_encoders == 1)
                before = list(encoders.receiver.peers)
                forgotten = list(former.peers.values())
                former.peers.clear()  # so that `close` sends no Goodbye, as if the node were killed
                await former.close()
                for peer in forgotten:
                    peer.bridge.close()
                async with serving(model, endpoint=endpoint):
                    await until(lambda: encoders.num_encoders == 1 and list(encoders.receiver.peers) != before)
                    assert len(encoders.receiver.peers) == 1

        asyncio.run(work())


class TestLiving:
    @pytest.mark.parametrize(("which", "name"), [("_listen", "listener"), ("_run_timers", "timers")])
    def test_a_task_that_dies_makes_the_encode_node_unhealthy_at_once(
        self, model: dsj.Model, monkeypatch: pytest.MonkeyPatch, which: str, name: str
    ):
        fatal = asyncio.Event()

        async def dies(_: EncodeServer) -> None:
            await fatal.wait()
            raise RuntimeError("a bug")

        async def work() -> None:
            monkeypatch.setattr(EncodeServer, which, dies)
            async with serving(model) as server:
                assert server.failure is None
                fatal.set()
                await until(lambda: server.failure is not None, 5)
                assert name in str(server.failure)
                assert str(server.failure).endswith(" failed (RuntimeError): restart the node")

        asyncio.run(work())

    def test_a_link_that_dies_makes_the_language_node_unhealthy(self, model: dsj.Model):
        async def work() -> None:
            async with serving(model) as server, connected(model, [server.listener.endpoint]) as encoders:
                await until(lambda: encoders.num_encoders == 1)
                assert encoders.failure is None
                for link in encoders._links:
                    link.connection._socket.close(linger=0)
                await until(lambda: encoders.failure is not None, 5)
                assert "encoder 0" in str(encoders.failure)
                assert "127.0.0.1" not in str(encoders.failure)

        asyncio.run(work())

    def test_a_stuck_preparation_is_told_of_and_other_encoders_are_preferred(
        self, model: dsj.Model, monkeypatch: pytest.MonkeyPatch
    ):
        """The request is cancelled, but its thread goes on."""
        monkeypatch.setattr(link, "PREPARATION_SLOW_S", 0.2)
        stuck, began, goes_on = [], threading.Event(), threading.Event()

        def hang(payload: bytes) -> Any:
            if payload:
                return unpack(payload)
            began.set()
            goes_on.wait(60)
            raise ValueError("it has ended")

        async def work() -> None:
            async with serving(model) as one, serving(model) as other:
                monkeypatch.setattr(encode_node, "unpack", hang)
                async with connected(model, [one.listener.endpoint, other.listener.endpoint]) as encoders:
                    await until(lambda: encoders.num_encoders == 2)
                    first = next(peer for peer in encoders.receiver.peers if peer.startswith("encoder 0/"))
                    encoders.receiver.peers = dict.fromkeys([first, *encoders.receiver.peers])
                    assert one.preparing_seconds == 0
                    stuck.append(asyncio.create_task(fetch(encoders, "r", b"", time.monotonic() + 60)))
                    await until(began.is_set)
                    stuck[0].cancel()
                    await until(lambda: encoders.receiver.slow == {first})
                    assert one.preparing_seconds > 0.2
                    request = asyncio.create_task(fetch(encoders, "s", b"junk", time.monotonic() + 60))
                    with pytest.raises(TransferFailedError, match="can't read the request"):
                        await request
                    assert not one.sender.outgoing
                    goes_on.set()
                    await until(lambda: not encoders.receiver.slow)
                    assert one.preparing_seconds == 0

        asyncio.run(work())

    def test_a_stopped_encoder_is_detected_in_time_and_reconnects(self, model: dsj.Model, process: EncodeProcess):
        async def work() -> None:
            async with connected(model, [process.endpoint]) as encoders:
                await until(lambda: encoders.num_encoders == 1)
                before = list(encoders.receiver.peers)
                await asyncio.sleep(0.7)  # some time between two heartbeats
                process.process.send_signal(signal.SIGSTOP)
                took = await until(lambda: not encoders.num_encoders)
                process.process.send_signal(signal.SIGCONT)
                assert took <= HEARTBEAT_TIMEOUT_S + 0.5  # this process has other tasks too
                (status,) = encoders.encoders  # as those see it who watch
                assert (status.state, status.load) == ("unreachable", None)
                assert [event.what for event in encoders.events] == ["connected", status.reason]
                await until(lambda: encoders.num_encoders == 1)
                assert list(encoders.receiver.peers) == before  # it has the same incarnation
                assert (status.state, [*encoders.events][-1].what) == ("ready", "is back")

        asyncio.run(work())

    def test_a_node_that_was_blocked_itself_does_not_lose_its_encoders(self, model: dsj.Model, process: EncodeProcess):
        async def work() -> None:
            async with connected(model, [process.endpoint]) as encoders:
                await until(lambda: encoders.num_encoders == 1)
                lost = []
                encoders.peer_down = lambda peer, reason: lost.append(reason)  # type: ignore[method-assign]
                await asyncio.sleep(0.5)
                time.sleep(HEARTBEAT_TIMEOUT_S + 2)  # as when other code holds the interpreter lock
                await asyncio.sleep(1.5)
                assert not lost
                assert encoders.num_encoders == 1

        asyncio.run(work())

    def test_a_language_node_that_is_gone_is_forgotten(self, model: dsj.Model, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(encode_node, "PEER_TIMEOUT_S", 1.0)

        async def work() -> None:
            async with serving(model) as server:
                bare = BareSocket(server.listener.endpoint)
                assert isinstance(await bare.ask(pack_message(a_hello(server))), Welcome)
                reply = await bare.ask(pack_message(Heartbeat(7)))
                assert reply == HeartbeatReply(7, server.hello.incarnation, 0, load=NodeLoad(0, 0, 0, 0, 0, 0, 0, 0))
                bare.close()
                await until(lambda: not server.peers and not server.num_closing_bridges, 5)
                assert not server.sender.peers

        asyncio.run(work())

    def test_timers_continue_after_a_failure(self, model: dsj.Model, monkeypatch: pytest.MonkeyPatch):
        """Deadlines on both sides depend on these loops."""
        monkeypatch.setattr(encode_node, "PEER_TIMEOUT_S", 1.0)

        def broken(_: float) -> list[Any]:
            monkeypatch.undo()
            monkeypatch.setattr(encode_node, "PEER_TIMEOUT_S", 1.0)
            raise RuntimeError("a bug")

        async def work() -> None:
            async with serving(model) as server:
                bare = BareSocket(server.listener.endpoint)
                assert isinstance(await bare.ask(pack_message(a_hello(server))), Welcome)
                monkeypatch.setattr(server.sender, "tick", broken)
                await until(lambda: not server.peers, 5)
                bare.close()
            async with with_simulated_encoder(model) as (encoders, _, _):
                monkeypatch.setattr(encoders.receiver, "tick", broken)
                with pytest.raises(TransferFailedError, match="deadline passed"):
                    await asyncio.wait_for(fetch(encoders, "r", b"", time.monotonic() + 0.5), 5)

        asyncio.run(work())


@asynccontextmanager
async def with_simulated_encoder(model: dsj.Model) -> AsyncIterator[tuple[EncoderPool, Any, asyncio.Queue[Message]]]:
    """An EncoderPool connected to a simulated encoder, a function that sends as the encoder, and what it receives."""
    listener = Listener("tcp://127.0.0.1:*")
    received: asyncio.Queue[Message] = asyncio.Queue()
    connections: list[bytes] = []

    async def listen() -> None:
        async for connection, message in listener.messages():
            match message:
                case Hello():
                    connections[:] = [connection]
                    hello = msgspec.structs.replace(message, role="encode", incarnation="simulated")
                    listener.send(connection, Welcome(hello))
                case Heartbeat(sequence):
                    listener.send(connection, HeartbeatReply(sequence, "simulated", 0))
                case _:
                    received.put_nowait(message)

    task = asyncio.create_task(listen())
    try:
        async with connected(model, [listener.endpoint]) as encoders:
            await until(lambda: encoders.num_encoders == 1)
            yield encoders, lambda message: listener.send(connections[0], message), received
    finally:
        task.cancel()
        listener.close()


class TestRequests:
    def test_a_duplicate_id_is_refused_and_the_first_request_continues(self, model: dsj.Model):
        async def work() -> None:
            async with with_simulated_encoder(model) as (encoders, _, received):
                first = asyncio.create_task(fetch(encoders, "r", b"", time.monotonic() + 60))
                assert isinstance(await received.get(), Submit)
                with pytest.raises(ValueError, match="'r' is already in progress"):
                    await fetch(encoders, "r", b"", time.monotonic() + 60)
                assert not first.done()
                assert list(encoders.receiver.requests) == ["r"]
                first.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await first
                while not isinstance(message := await received.get(), Abort):
                    pass
                assert message.request_id == "r"
                assert not encoders.receiver.requests

        asyncio.run(work())

    def test_closing_ends_requests_in_progress_and_refuses_new_ones(self, model: dsj.Model):
        async def work() -> None:
            async with with_simulated_encoder(model) as (encoders, _, received):
                pending = asyncio.create_task(fetch(encoders, "r", b"", time.monotonic() + 60))
                await received.get()
                await encoders.close()
                for request in (pending, fetch(encoders, "s", b"", time.monotonic() + 60)):
                    with pytest.raises(TransferFailedError, match="stopping: try again later") as error:
                        await asyncio.wait_for(request, 1)
                    assert error.value.status == 503
                while not isinstance(await received.get(), Goodbye):
                    pass

        asyncio.run(work())

    def test_more_visual_rows_than_tokens_end_the_attempt(self, model: dsj.Model):
        async def work() -> None:
            async with with_simulated_encoder(model) as (encoders, send, received):
                request = asyncio.create_task(fetch(encoders, "r", b"", time.monotonic() + 60))
                for _ in range(4):
                    while not isinstance(message := await asyncio.wait_for(received.get(), 5), Submit):
                        pass
                    send(Prepared("r", message.attempt, 5, 6, 0, b"somebody's prompt"))
                with pytest.raises(TransferFailedError, match="6 visual rows for 5 tokens") as error:
                    await asyncio.wait_for(request, 5)
                assert error.value.status == 503

        asyncio.run(work())

    def test_an_unknown_attempt_is_aborted(self, model: dsj.Model):
        async def work() -> None:
            async with with_simulated_encoder(model) as (_, send, received):
                for message in (
                    Accepted("unknown", 3),
                    Prepared("unknown", 3, 5, 5, 0, b"somebody's prompt"),
                ):
                    send(message)
                    assert await asyncio.wait_for(received.get(), 5) == Abort("unknown", 3)

        asyncio.run(work())

    @pytest.mark.parametrize("lost", [Release, Abort])
    def test_rows_are_dropped_long_before_the_deadline_if_release_or_abort_is_lost(
        self, model: dsj.Model, process: EncodeProcess, lost: type[Message]
    ):
        """The encoder sends reminders of attempts about which it receives no message."""
        num_dropped = 0

        def drop_first(data: bytes) -> list[tuple[float, bytes]]:
            nonlocal num_dropped
            if isinstance(unpack_message(data)[0], lost) and not num_dropped:
                num_dropped += 1
                return []
            return [(0.0, data)]

        async def work() -> None:
            with inject_message_faults(drop_first):
                async with connected(model, [process.endpoint]) as encoders:
                    await until(lambda: encoders.num_encoders == 1)
                    payload = pack("What is this?", *media("one image"))
                    request = asyncio.create_task(fetch(encoders, "r", payload, time.monotonic() + 600))
                    if lost is Abort:
                        await until(lambda: encoders.receiver.requests and encoders.receiver.requests["r"].accepted, 60)
                        request.cancel()
                        with pytest.raises(asyncio.CancelledError):
                            await request
                    else:
                        await request
                        assert process.command()["jobs"] == 1
                    assert num_dropped == 1
                    await until(lambda: not process.command()["jobs"], encode_node.REMINDER_INTERVAL_S + 30)

        asyncio.run(work())
