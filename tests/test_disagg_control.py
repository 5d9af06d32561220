"""The control plane: who is let in, who is refused and why, and how either side learns that the other is gone.

Real sockets, and real nodes behind them; a language node's half is the product's or, to misbehave, a bare socket.
"""

import asyncio
import os
import signal
import stat
import time
from collections.abc import AsyncIterator, Iterable, Iterator
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
from deepstack_jax.disagg.language.encoders import EncoderLinks, TransferFailedError
from deepstack_jax.disagg.language.link import SILENCE
from deepstack_jax.disagg.nodes import open_encode_server, open_encoder_links
from deepstack_jax.disagg.wire.control import (
    ClusterKey,
    Connection,
    Listener,
    check_endpoint,
    make_key,
    read_key,
)
from deepstack_jax.disagg.wire.messages import (
    PROTOCOL,
    Abort,
    Accepted,
    Goodbye,
    Heartbeat,
    HeartbeatReply,
    Hello,
    Message,
    Prepared,
    Refused,
    Release,
    Submit,
    Welcome,
    decode,
    encode,
)
from deepstack_jax.disagg.wire.payload import pack
from deepstack_jax.testing.random_checkpoint import tiny_config, write_random_checkpoint
from tests.faults import tamper_with_messages
from tests.test_disagg_split import EncodeProcess, encode_process, media

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
    with encode_process(model.path, "float32") as process:
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
async def linked(model: dsj.Model, endpoints: Iterable[str], **options: Any) -> AsyncIterator[EncoderLinks]:
    text_alone = dsj.Model(model.config, model.text_params, model.path, model.eos_token_ids, model.pad_token_id)
    links = open_encoder_links(text_alone, list(endpoints), block_size=BLOCK, num_blocks=4, **options)
    await links.start()
    try:
        yield links
    finally:
        await links.close()


async def until(condition: Any, seconds: float = 20.0) -> float:
    """Waits for it; how long that took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, "waited in vain"
        await asyncio.sleep(0.01)
    return time.monotonic() - began


class Bare:
    """A socket of the test's own: sends any bytes, with any keys."""

    def __init__(self, endpoint: str, server: bytes | None = None, pair: tuple[bytes, bytes] | None = None):
        self.context = zmq.asyncio.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        if server is not None and pair is not None:
            self.socket.curve_serverkey = server
            self.socket.curve_publickey, self.socket.curve_secretkey = pair
        self.socket.connect(endpoint)

    async def ask(self, *frames: bytes, seconds: float = 20.0) -> Message | None:
        """The first answer; None if there is none."""
        await self.socket.send_multipart(frames)
        return await self.answer(seconds)

    async def answer(self, seconds: float = 20.0) -> Message | None:
        if not await self.socket.poll(int(seconds * 1000)):
            return None
        return decode((await self.socket.recv_multipart())[0])[0]

    def close(self) -> None:
        self.context.destroy(linger=0)


def a_hello(server: EncodeServer, **changed: Any) -> Hello:
    """What a language node that fits would say; nothing is written to its pool."""
    row = BLOCK * server.hello.hidden_size * 4
    lens = (row, 4 * BLOCK, 12 * BLOCK, 64, row * server.hello.num_deepstack_embeddings)
    fields = {"role": "language", "incarnation": "bare", "session": "127.0.0.1:9", "ptrs": (1,) * 5}
    fields |= {"total_lens": lens, "item_lens": lens}
    return msgspec.structs.replace(server.hello, **fields | changed)


class TestKeys:
    def test_a_key_file_is_its_owners_alone_and_is_never_overwritten(self, tmp_path: Path):
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
    def test_one_that_others_can_read_is_refused(self, tmp_path: Path, mode: int):
        path = tmp_path / "cluster.key"
        make_key(path)
        path.chmod(mode)
        with pytest.raises(ValueError, match=r"can be read by others: chmod 600 .*cluster.key"):
            read_key(path)

    @pytest.mark.parametrize("content", ["", "{}", "[]", '{"public": 1, "secret": 2}', "mixed", "no text"])
    def test_what_is_no_key_file_is_refused(self, tmp_path: Path, content: str):
        path = tmp_path / "cluster.key"
        if content == "mixed":  # the halves of two pairs
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
    def test_what_is_no_endpoint_is_refused(self, endpoint: str, key: ClusterKey):
        with pytest.raises(ValueError, match="is not a valid endpoint: expected tcp://host:port"):
            check_endpoint(endpoint, key)

    def test_strangers_get_nothing_and_leave_no_trace(self, model: dsj.Model, key: ClusterKey):
        async def work() -> None:
            async with serving(model, key=key) as server:
                where, own, other = server.listener.endpoint, (key.public, key.secret), zmq.curve_keypair()
                strangers = {
                    "no CURVE": Bare(where),
                    "another key": Bare(where, other[0], other),
                    "the server's key and one's own": Bare(where, key.public, other),
                    "the cluster's pair for another server": Bare(where, other[0], own),
                }
                for stranger in strangers.values():
                    await stranger.socket.send(encode(a_hello(server)))
                member = Bare(where, key.public, own)
                assert isinstance(await member.ask(encode(a_hello(server))), Welcome)
                await asyncio.sleep(0.5)
                for name, stranger in strangers.items():
                    assert await stranger.answer(0.1) is None, name
                    stranger.close()
                member.close()
                assert len(server.peers) == 1
                assert not server.listener.dropped
                assert not server.sender.dropped

        asyncio.run(work())

    def test_nodes_with_the_key_find_each_other(self, model: dsj.Model, key: ClusterKey):
        async def work() -> None:
            async with serving(model, key=key) as server, linked(model, [server.listener.endpoint], key=key) as links:
                await until(lambda: links.num_encoders == 1)

        asyncio.run(work())


class TestConnecting:
    def test_what_is_no_message_is_counted_and_dropped(self, model: dsj.Model):
        async def work() -> None:
            async with serving(model) as server:
                bare = Bare(server.listener.endpoint)
                good = encode(a_hello(server))
                bad = [(b"",), (b"\x01",), (good[:-1],), (good + b"\x00",), (os.urandom(50),), (good, good)]
                for frames in bad:
                    await bare.socket.send_multipart(frames)
                assert isinstance(await bare.ask(good), Welcome)
                assert server.listener.dropped == len(bad)
                bare.close()

        asyncio.run(work())

    def test_a_language_node_counts_and_drops_them_too(self, model: dsj.Model):
        async def work() -> None:
            listener = Listener("tcp://127.0.0.1:*")
            messages = aiter(listener.messages())
            async with linked(model, [listener.endpoint]) as links:
                connection, said = await anext(messages)
                assert isinstance(said, Hello)
                for frames in ([b""], [os.urandom(30)], [encode(Goodbye())] * 2, [encode(Goodbye())[:-1]]):
                    await listener._socket.send_multipart([connection, *frames])
                await until(lambda: links._links[0].connection.dropped == 4)
                fits = msgspec.structs.replace(said, role="encode", incarnation="e")
                listener.send(connection, Welcome(fits))
                await until(lambda: links.num_encoders == 1)
            await messages.aclose()  # type: ignore[attr-defined]
            listener.close()

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
        ],
    )
    def test_a_node_that_does_not_fit_is_refused_with_the_reason(
        self, model: dsj.Model, changed: dict[str, Any], remedy: str
    ):
        async def work() -> None:
            async with serving(model) as server:
                bare = Bare(server.listener.endpoint)
                answer = await bare.ask(encode(a_hello(server, **changed)))
                assert isinstance(answer, Refused)
                assert remedy in answer.reason
                assert not server.peers
                # nor is it served
                answer = await bare.ask(encode(Submit("r", 1, 1000, b"")))
                assert answer == Goodbye("say hello first")
                bare.close()

        asyncio.run(work())

    def test_ipv6(self, model: dsj.Model, key: ClusterKey):
        async def work() -> None:
            async with serving(model, endpoint="tcp://[::1]:*", key=key) as server:
                assert server.listener.endpoint.startswith("tcp://[::1]:")
                async with linked(model, [server.listener.endpoint], key=key) as links:
                    await until(lambda: links.num_encoders == 1)

        asyncio.run(work())

    def test_several_nodes_on_one_host(self, model: dsj.Model):
        async def work() -> None:
            async with serving(model) as one, serving(model) as two:
                both = [one.listener.endpoint, two.listener.endpoint]
                async with linked(model, both) as first, linked(model, both) as second:
                    await until(lambda: first.num_encoders == second.num_encoders == 2)
                    assert len(one.peers) == len(two.peers) == 2
                await until(lambda: not one.peers and not two.peers, 5)  # both have said goodbye

        asyncio.run(work())

    def test_one_encoder_under_two_names_keeps_both_connections(self, model: dsj.Model):
        async def work() -> None:
            async with serving(model) as server:
                where = server.listener.endpoint
                names = [where, where, where.replace("127.0.0.1", "localhost")]
                async with linked(model, names) as links:
                    await until(lambda: links.num_encoders == 2)
                    bridges = [peer.bridge for peer in server.peers.values()]
                    await asyncio.sleep(3)  # some heartbeats
                    assert [peer.bridge for peer in server.peers.values()] == bridges
                    assert links.num_encoders == 2

        asyncio.run(work())

    def test_an_encoder_started_again_under_its_address_is_another_peer(self, model: dsj.Model):
        async def work() -> None:
            former = open_encode_server(model, block_size=BLOCK)
            await former.start()
            where = former.listener.endpoint
            async with linked(model, [where]) as links:
                await until(lambda: links.num_encoders == 1)
                before = list(links.receiver.peers)
                for task in former._tasks:
                    task.cancel()
                former.peers, kept = {}, former.peers
                former.listener.close()  # without a goodbye, as if killed
                async with serving(model, endpoint=where):
                    await until(lambda: links.num_encoders == 1 and list(links.receiver.peers) != before)
                    assert len(links.receiver.peers) == 1
            for peer in kept.values():
                peer.bridge.close()
            former.listener = Listener("tcp://127.0.0.1:*")
            await former.close()

        asyncio.run(work())


class TestLiving:
    def test_a_stopped_encoder_is_noticed_in_time_and_found_again(self, model: dsj.Model, process: EncodeProcess):
        async def work() -> None:
            async with linked(model, [process.endpoint]) as links:
                await until(lambda: links.num_encoders == 1)
                before = list(links.receiver.peers)
                await asyncio.sleep(0.7)  # anywhere between two heartbeats
                process.process.send_signal(signal.SIGSTOP)
                took = await until(lambda: not links.num_encoders)
                process.process.send_signal(signal.SIGCONT)
                assert took <= SILENCE + 0.5  # this process has other things to do, too
                await until(lambda: links.num_encoders == 1)
                assert list(links.receiver.peers) == before  # it has the same incarnation

        asyncio.run(work())

    def test_a_node_that_was_held_up_itself_blames_no_encoder(self, model: dsj.Model, process: EncodeProcess):
        async def work() -> None:
            async with linked(model, [process.endpoint]) as links:
                await until(lambda: links.num_encoders == 1)
                lost = []
                links.peer_down = lambda peer, reason: lost.append(reason)  # type: ignore[method-assign]
                await asyncio.sleep(0.5)
                time.sleep(SILENCE + 2)  # as while something else holds the interpreter
                await asyncio.sleep(1.5)
                assert not lost
                assert links.num_encoders == 1

        asyncio.run(work())

    def test_a_language_node_that_is_gone_is_forgotten(self, model: dsj.Model, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(encode_node, "PEER_SILENCE", 1.0)

        async def work() -> None:
            async with serving(model) as server:
                bare = Bare(server.listener.endpoint)
                assert isinstance(await bare.ask(encode(a_hello(server))), Welcome)
                reply = await bare.ask(encode(Heartbeat(7)))
                assert reply == HeartbeatReply(7, server.hello.incarnation, 0)
                bare.close()
                await until(lambda: not server.peers and not server._closing, 5)
                assert not server.sender.peers

        asyncio.run(work())

    def test_timers_go_on_after_a_failure(self, model: dsj.Model, monkeypatch: pytest.MonkeyPatch):
        """Both sides' loops: without them no deadline would be kept."""
        monkeypatch.setattr(encode_node, "PEER_SILENCE", 1.0)

        def broken(_: float) -> list[Any]:
            monkeypatch.undo()
            monkeypatch.setattr(encode_node, "PEER_SILENCE", 1.0)
            raise RuntimeError("a bug")

        async def work() -> None:
            async with serving(model) as server:
                bare = Bare(server.listener.endpoint)
                assert isinstance(await bare.ask(encode(a_hello(server))), Welcome)
                monkeypatch.setattr(server.sender, "tick", broken)
                await until(lambda: not server.peers, 5)
                bare.close()
            async with faked(model) as (links, _, _):
                monkeypatch.setattr(links.receiver, "tick", broken)
                with pytest.raises(TransferFailedError, match="deadline passed"):
                    await asyncio.wait_for(links.fetch("r", b"", time.monotonic() + 0.5), 5)

        asyncio.run(work())


@asynccontextmanager
async def faked(model: dsj.Model) -> AsyncIterator[tuple[EncoderLinks, Any, asyncio.Queue[Message]]]:
    """Links to an encoder that the test plays: what to send through, and the messages about requests that came."""
    listener = Listener("tcp://127.0.0.1:*")
    came: asyncio.Queue[Message] = asyncio.Queue()
    connections: list[bytes] = []

    async def listen() -> None:
        async for connection, message in listener.messages():
            match message:
                case Hello():
                    connections[:] = [connection]
                    fits = msgspec.structs.replace(message, role="encode", incarnation="played")
                    listener.send(connection, Welcome(fits))
                case Heartbeat(sequence):
                    listener.send(connection, HeartbeatReply(sequence, "played", 0))
                case _:
                    came.put_nowait(message)

    task = asyncio.create_task(listen())
    try:
        async with linked(model, [listener.endpoint]) as links:
            await until(lambda: links.num_encoders == 1)
            yield links, lambda message: listener.send(connections[0], message), came
    finally:
        task.cancel()
        listener.close()


class TestRequests:
    def test_an_id_under_way_is_refused_and_its_request_goes_on(self, model: dsj.Model):
        async def work() -> None:
            async with faked(model) as (links, _, came):
                first = asyncio.create_task(links.fetch("r", b"", time.monotonic() + 60))
                assert isinstance(await came.get(), Submit)
                with pytest.raises(ValueError, match="'r' is under way already"):
                    await links.fetch("r", b"", time.monotonic() + 60)
                assert not first.done()
                assert list(links.receiver.requests) == ["r"]
                first.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await first
                while not isinstance(message := await came.get(), Abort):
                    pass
                assert message.request_id == "r"
                assert not links.receiver.requests

        asyncio.run(work())

    def test_closing_ends_what_is_under_way_and_takes_nothing_more(self, model: dsj.Model):
        async def work() -> None:
            async with faked(model) as (links, _, came):
                under_way = asyncio.create_task(links.fetch("r", b"", time.monotonic() + 60))
                await came.get()
                await links.close()
                for request in (under_way, links.fetch("s", b"", time.monotonic() + 60)):
                    with pytest.raises(TransferFailedError, match="stopping: try again later") as error:
                        await asyncio.wait_for(request, 1)
                    assert error.value.status == 503
                while not isinstance(await came.get(), Goodbye):
                    pass

        asyncio.run(work())

    def test_rows_for_more_tokens_than_there_are_end_the_attempt(self, model: dsj.Model):
        async def work() -> None:
            async with faked(model) as (links, send, came):
                request = asyncio.create_task(links.fetch("r", b"", time.monotonic() + 60))
                for _ in range(4):
                    while not isinstance(message := await asyncio.wait_for(came.get(), 5), Submit):
                        pass
                    send(Prepared("r", message.attempt, 5, 6, 0, b"somebody's prompt"))
                with pytest.raises(TransferFailedError, match="6 visual rows for 5 tokens") as error:
                    await asyncio.wait_for(request, 5)
                assert error.value.status == 503

        asyncio.run(work())

    def test_an_attempt_that_nobody_waits_for_is_ended(self, model: dsj.Model):
        async def work() -> None:
            async with faked(model) as (_, send, came):
                for message in (
                    Accepted("unknown", 3),
                    Prepared("unknown", 3, 5, 5, 0, b"somebody's prompt"),
                ):
                    send(message)
                    assert await asyncio.wait_for(came.get(), 5) == Abort("unknown", 3)

        asyncio.run(work())

    @pytest.mark.parametrize("lost", [Release, Abort])
    def test_rows_are_dropped_long_before_the_deadline_where_release_or_abort_is_lost(
        self, model: dsj.Model, process: EncodeProcess, lost: type[Message]
    ):
        """The encoder asks about attempts of which it hears nothing."""
        spared = 0

        def tamper(data: bytes) -> list[tuple[float, bytes]]:
            nonlocal spared
            if isinstance(decode(data)[0], lost) and not spared:
                spared += 1
                return []
            return [(0.0, data)]

        async def work() -> None:
            with tamper_with_messages(tamper):
                async with linked(model, [process.endpoint]) as links:
                    await until(lambda: links.num_encoders == 1)
                    payload = pack("What is this?", *media("one image"))
                    request = asyncio.create_task(links.fetch("r", payload, time.monotonic() + 600))
                    if lost is Abort:
                        await until(lambda: links.receiver.requests and links.receiver.requests["r"].accepted, 60)
                        request.cancel()
                        with pytest.raises(asyncio.CancelledError):
                            await request
                    else:
                        await request
                        assert process.counters()["jobs"] == 1
                    assert spared == 1
                    await until(lambda: not process.counters()["jobs"], encode_node.REMIND + 30)

        asyncio.run(work())
