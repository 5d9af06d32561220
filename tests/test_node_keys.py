"""Keys of single nodes: who is admitted with which certificate, and how one node is shut out while others go on.

Sockets and nodes are real. An impostor has bare sockets and whatever a thief may have.
"""

import asyncio
import base64
import contextlib
import logging
import os
import re
import signal
import stat
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
import zmq.asyncio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

import deepstack_jax as dsj
from deepstack_jax.cli import main
from deepstack_jax.disagg.keys.certificates import Authority, Certificate, NodeKey
from deepstack_jax.disagg.keys.files import make_authority, make_key, make_node_key, read_key
from deepstack_jax.disagg.keys.revocations import Revocations
from deepstack_jax.disagg.language import link
from deepstack_jax.disagg.wire import control
from deepstack_jax.disagg.wire.control import Listener
from deepstack_jax.disagg.wire.introduction import (
    MAX_INTRODUCTION,
    Introduction,
    introduction_pair,
    pack_introduction,
    unpack_introduction,
)
from deepstack_jax.disagg.wire.messages import (
    Goodbye,
    Heartbeat,
    HeartbeatReply,
    Hello,
    Message,
    Submit,
    Welcome,
    pack_message,
)
from deepstack_jax.disagg.wire.payload import pack
from tests.media import media
from tests.nodes import ServeNode
from tests.nodes import serving as serving_process
from tests.test_disagg_control import BLOCK, BareSocket, a_hello, connected, model, serving, until  # noqa: F401
from tests.whole_prompts import fetch

CLUSTER, OTHER_CLUSTER = Authority(bytes(range(32))), Authority(bytes(range(1, 33)))
ENCODE = CLUSTER.make_node_key("enc1", "encode")
LANGUAGE = CLUSTER.make_node_key("lang1", "language")
ALTERED: dict[str, dict[str, Any]] = {
    "name": {"name": "lang2"},
    "serial": {"serial": "0" * 16},
    "role": {"role": "any"},
    "key": {"public": bytes(32)},
    "signature": {"signature": bytes(64)},
    "end": {"expires": 2_000_000_000},
}


def with_list(key: NodeKey, file: Path, entries: str = "") -> NodeKey:
    """The key of a node whose list of revoked nodes is this file."""
    file.write_text(entries)
    return replace(key, revoked=Revocations(file))


def revoke(key: NodeKey, file: Path, entries: str) -> None:
    file.write_text(entries)
    key.revoked.reload()


class TestFiles:
    @pytest.fixture
    def authority(self, tmp_path: Path) -> Path:
        make_authority(tmp_path / "cluster.authority")
        return tmp_path / "cluster.authority"

    def test_keygen_makes_an_authority_and_keys_of_nodes(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
        authority, file = tmp_path / "cluster.authority", tmp_path / "enc1.key"
        for arguments in (
            [str(authority), "--authority"],
            [str(file), "--node", "enc1", "--role", "encode", "--signed-by", str(authority)],
        ):
            with pytest.raises(SystemExit) as end:
                main(["keygen", *arguments])
            assert not end.value.code
        key = read_key(file)
        assert isinstance(key, NodeKey)
        assert (key.certificate.name, key.certificate.role) == ("enc1", "encode")
        assert key.certificate.serial in capsys.readouterr().out
        assert not key.certificate.expires
        assert zmq.curve_public(key.secret) == key.public
        assert key.refusal(key.certificate, "encode") is None
        for made in (authority, file):
            assert stat.S_IMODE(made.stat().st_mode) == 0o600
        assert msgspec.json.decode(authority.read_bytes())["authority_secret"] not in file.read_text()
        assert sorted(each.name for each in tmp_path.iterdir()) == ["cluster.authority", "enc1.key"]

    def test_keygen_makes_keys_that_expire(self, tmp_path: Path, authority: Path, capsys: pytest.CaptureFixture[str]):
        file, before = tmp_path / "enc1.key", int(time.time())
        with pytest.raises(SystemExit) as end:
            main(["keygen", str(file), "--node", "enc1", "--signed-by", str(authority), "--days", "90"])
        assert not end.value.code
        key = read_key(file)
        assert isinstance(key, NodeKey)
        assert before <= key.certificate.expires - 90 * 24 * 3600 <= time.time()
        assert f"valid until {key.certificate.end}; only you can read it" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("arguments", "reason"),
        [
            (["--node", "enc1"], "--node enc1 needs --signed-by"),
            (["--signed-by", "x"], "give --node as well"),
            (["--role", "encode"], "give --node as well"),
            (["--days", "90"], "give --node as well"),
            (["--node", "a", "--authority"], "give one of them"),
            (["--node", "a", "--api-key", "b"], "give one of them"),
            (["--node", "Enc_1", "--signed-by", "{authority}"], "'Enc_1' can't name a node: use 1 to 63"),
            (["--node", "", "--signed-by", "{authority}"], "can't name a node"),
            (["--node", "a\n", "--signed-by", "{authority}"], "can't name a node"),
            (["--node", "a" * 64, "--signed-by", "{authority}"], "can't name a node"),
            (["--node", "0123456789abcdef", "--signed-by", "{authority}"], "which are a serial"),
            (["--node", "a", "--signed-by", "missing"], "No such file"),
            (["--node", "a", "--signed-by", "{key}"], "is not an authority's key file"),
            (["--node", "a", "--signed-by", "{open}"], "can be read by others: chmod 600"),
        ],
    )
    def test_what_keygen_can_not_do_is_refused_with_the_reason(
        self, tmp_path: Path, authority: Path, arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
    ):
        make_key(tmp_path / "key")
        make_authority(tmp_path / "open")
        (tmp_path / "open").chmod(0o644)
        files = {"authority": authority, "key": tmp_path / "key", "open": tmp_path / "open"}
        with pytest.raises(SystemExit) as end:
            main(["keygen", str(tmp_path / "new.key"), *(each.format(**files) for each in arguments)])
        assert end.value.code == 1
        assert reason in capsys.readouterr().err
        assert not (tmp_path / "new.key").exists()

    @pytest.mark.parametrize("options", [[], ["--authority"], ["--node", "enc1", "--signed-by", "{authority}"]])
    def test_a_file_that_can_not_be_made_is_named(
        self, tmp_path: Path, authority: Path, options: list[str], capsys: pytest.CaptureFixture[str]
    ):
        missing = tmp_path / "missing" / "new.key"
        for file, reason in (
            (authority, f"error: {authority} exists, and a key is never replaced: choose another name\n"),
            (missing, f"error: [Errno 2] No such file or directory: '{missing}'\n"),
        ):
            with pytest.raises(SystemExit) as end:
                main(["keygen", str(file), *(each.format(authority=authority) for each in options)])
            assert (end.value.code, capsys.readouterr().err) == (1, reason)

    def test_a_node_key_never_replaces_a_file_and_is_read_under_the_same_checks(self, tmp_path: Path, authority: Path):
        path = tmp_path / "enc1.key"
        make_node_key(path, "enc1", authority)
        before = path.read_bytes()
        with pytest.raises(FileExistsError):
            make_node_key(path, "enc1", authority)
        assert path.read_bytes() == before
        path.chmod(0o640)
        with pytest.raises(ValueError, match="can be read by others: chmod 600"):
            read_key(path)

    def test_the_authority_is_refused_as_the_key_of_a_node(self, authority: Path):
        with pytest.raises(ValueError, match=r"stays off the nodes: give the node one of its own.*--signed-by"):
            read_key(authority)

    @pytest.mark.parametrize("altered", [*ALTERED, "secret", "authority"])
    def test_a_file_that_was_altered_is_refused(self, tmp_path: Path, authority: Path, altered: str):
        path = tmp_path / "lang1.key"
        make_node_key(path, "lang1", authority, "language")
        content = msgspec.json.decode(path.read_bytes())
        if altered in ALTERED:
            content["certificate"] |= msgspec.to_builtins(ALTERED[altered])
        else:
            content[altered] = msgspec.to_builtins(bytes(range(32)))
        path.write_bytes(msgspec.json.encode(content))
        with pytest.raises(ValueError, match=r"lang1\.key is damaged: make another key"):
            read_key(path)


class TestCertificates:
    def test_the_authority_signs_name_serial_role_and_key(self):
        """The bytes are put together by hand here, from the specification of msgpack."""
        use, (name, serial, role) = b"deepstack-jax node certificate 1", (b"lang1", b"", b"language")
        serial = LANGUAGE.certificate.serial.encode()
        signed = b"\x95" + b"\xd9" + bytes([len(use)]) + use
        signed += b"".join(bytes([0xA0 + len(each)]) + each for each in (name, serial, role))
        signed += b"\xc4\x20" + LANGUAGE.certificate.public
        Ed25519PublicKey.from_public_bytes(CLUSTER.public).verify(LANGUAGE.certificate.signature, signed)

    @pytest.mark.parametrize("altered", ALTERED)
    def test_nothing_of_a_certificate_can_be_altered(self, altered: str):
        certificate = msgspec.structs.replace(LANGUAGE.certificate, **ALTERED[altered])
        assert "not signed by this cluster's authority" in str(ENCODE.refusal(certificate, "language"))

    def test_no_byte_of_an_introduction_can_be_altered(self):
        """What can be read differently is not certified."""
        data = pack_introduction(Introduction(LANGUAGE.certificate))
        assert unpack_introduction([data]) == Introduction(LANGUAGE.certificate)
        for position in range(len(data)):
            assert unpack_introduction([data[:position]]) is None
            for mask in (0x01, 0x10, 0x80, 0xFF):
                altered = bytearray(data)
                altered[position] ^= mask
                found = unpack_introduction([bytes(altered)])
                if found is not None and found.certificate != LANGUAGE.certificate:
                    assert not ENCODE.certifies(found.certificate), (position, mask)

    def test_other_authorities_other_roles_and_revoked_nodes_are_refused(self, tmp_path: Path):
        assert ENCODE.refusal(LANGUAGE.certificate, "language") is None
        assert "expected one for role encode" in str(ENCODE.refusal(LANGUAGE.certificate, "encode"))
        stranger = OTHER_CLUSTER.make_node_key("lang1", "language")
        assert "not signed" in str(ENCODE.refusal(stranger.certificate, "language"))
        for number, entry in enumerate((LANGUAGE.certificate.name, LANGUAGE.certificate.serial)):
            key = with_list(ENCODE, tmp_path / str(number), f"# stolen on Monday\n{entry}  # with its rack\r\n")
            assert f"node lang1 (serial {LANGUAGE.certificate.serial}) is revoked" == key.refusal(
                LANGUAGE.certificate, "language"
            )
            renewed = CLUSTER.make_node_key("lang1")
            assert (key.refusal(renewed.certificate, "language") is None) == (entry == LANGUAGE.certificate.serial)

    def test_a_certificate_ends_when_it_says_and_a_clock_may_be_wrong_by_minutes(self, monkeypatch: pytest.MonkeyPatch):
        key = CLUSTER.make_node_key("lang1", "language", expires=1_800_000_000)
        reason = (
            f"node lang1 (serial {key.certificate.serial}) has a key that was valid until 2027-01-15 08:00 UTC: make "
            "another one with deepstack-jax keygen FILE --node lang1 --signed-by AUTHORITY, or set the clock"
        )
        for now, expected in ((0, None), (1_800_000_299, None), (1_800_000_301, reason), (4_000_000_000, reason)):
            monkeypatch.setattr(time, "time", lambda now=now: now)
            assert ENCODE.refusal(key.certificate, "language") == expected
            assert ENCODE.refusal(LANGUAGE.certificate, "language") is None

    def test_an_admitted_node_whose_key_has_ended_may_not_connect_again(self, monkeypatch: pytest.MonkeyPatch):
        lasting, ending = LANGUAGE.certificate, CLUSTER.make_node_key("lang2", "language", 1_800_000_000).certificate

        async def work() -> list[bool]:
            listener = Listener("tcp://127.0.0.1:*", ENCODE)
            try:
                monkeypatch.setattr(time, "time", lambda: 1_799_999_999)
                assert all(listener._admit(ENCODE, each) for each in (lasting, ending))
                monkeypatch.setattr(time, "time", lambda: 1_800_000_301)
                assert [listener._admit(ENCODE, each) for each in (lasting, ending)] == [True, False]
                return [listener._shut_out(each.serial.encode()) for each in (lasting, ending)]
            finally:
                listener.close()

        assert asyncio.run(work()) == [False, True]

    def test_a_certificate_keeps_its_form_unless_it_has_an_end(self):
        """Nodes of before `--days` read the former, and would take the latter for ever if they could."""
        ending = CLUSTER.make_node_key("lang1", "language", expires=1_800_000_000).certificate
        fields = {"name", "serial", "role", "public", "signature"}
        assert msgspec.to_builtins(LANGUAGE.certificate).keys() == fields
        assert msgspec.to_builtins(ending).keys() == fields | {"expires"}
        endless = msgspec.structs.replace(ending, expires=0)
        assert not ENCODE.certifies(endless)
        assert not ENCODE.certifies(msgspec.structs.replace(ending, expires=ending.expires + 1))
        assert len(pack_introduction(Introduction(ending))) <= MAX_INTRODUCTION


DAMAGED: dict[str, tuple[bytes, str]] = {
    "not text": (b"\xff\xfe\n", "it is not text"),
    "another format": (b'{"revoked": ["lang1"]}\n', "line 1 is neither the name nor the serial"),
    "two names": (b"lang2\nlang3 lang4\n", "line 2 is neither the name nor the serial"),
    "zeros": (bytes(100) + b"\n", "line 1 is neither"),
    "cut off": (b"lang2\nlang", "the last line of .* is cut off"),
    "too long": (b"#" * (1 << 20) + b"\n", "is longer than"),
    "open to others": (b"lang2\n", "can be changed by other users: chown .*, and chmod go-w"),
    "missing": (b"", "can't be read \\(No such file"),
    "a folder": (b"", "Is a directory|is not a regular file"),
    "a pipe": (b"", "is not a regular file"),
}


class TestRevocations:
    @pytest.mark.parametrize("kind", DAMAGED)
    def test_a_damaged_list_is_refused_at_start_and_later_leaves_the_last_good_one(self, tmp_path: Path, kind: str):
        file, (content, reason) = tmp_path / "revoked.txt", DAMAGED[kind]
        key, reloads = with_list(ENCODE, file, "lang1\n"), []
        key.revoked.watch(lambda: reloads.append(None))
        if kind in ("missing", "a folder", "a pipe"):
            file.unlink()
            if kind != "missing":
                (os.mkfifo if kind == "a pipe" else Path.mkdir)(file)
        else:
            file.write_bytes(content)
            file.chmod(0o662 if kind == "open to others" else 0o600)
        with pytest.raises(ValueError, match=reason):
            key.revoked.reload()
        with pytest.raises(ValueError, match=reason):
            Revocations(file)
        assert LANGUAGE.certificate in key.revoked
        assert not reloads

    def test_a_list_that_got_shorter_takes_nothing_back(self, tmp_path: Path):
        key = with_list(ENCODE, tmp_path / "revoked.txt", "lang1\n")
        revoke(key, tmp_path / "revoked.txt", "lang7\n")
        assert LANGUAGE.certificate in key.revoked
        assert CLUSTER.make_node_key("lang7").certificate in key.revoked
        assert ENCODE.certificate not in key.revoked
        revoke(key, tmp_path / "revoked.txt", "")
        assert LANGUAGE.certificate in key.revoked

    @pytest.mark.parametrize("way", ["written", "replaced", "given other rights"])
    def test_a_list_that_changed_is_read_before_the_next_node_is_admitted(
        self, tmp_path: Path, way: str, caplog: pytest.LogCaptureFixture
    ):
        file = tmp_path / "revoked.txt"
        key = with_list(ENCODE, file, "# nobody\n")
        assert key.shut_out(LANGUAGE.certificate) is None
        if way == "given other rights":
            file.write_text("lang1\n")
            file.chmod(0o662)
        else:
            new = tmp_path / "new" if way == "replaced" else file
            new.write_text("lang1")  # without the end of the line
            new.replace(file)
        for _ in range(3):
            assert key.shut_out(LANGUAGE.certificate) is None
        (message,) = caplog.messages
        assert "the revoked nodes are still those from before: " in message
        if way == "given other rights":
            file.chmod(0o600)
        else:
            file.write_text("lang1\n")
        assert "is revoked" in str(key.shut_out(LANGUAGE.certificate))
        file.unlink()
        assert "is revoked" in str(key.shut_out(LANGUAGE.certificate))
        assert "No such file" in caplog.messages[1]


class Impostor:
    """Both sockets of an encode node, for a thief: it shows any certificate, and has any key."""

    def __init__(self, shown: Certificate, public: bytes, secret: bytes):
        self.context = zmq.asyncio.Context()
        self.introductions, self.control = self.context.socket(zmq.ROUTER), self.context.socket(zmq.ROUTER)
        for socket, pair in ((self.introductions, introduction_pair(CLUSTER.public)), (self.control, (public, secret))):
            socket.curve_server, (socket.curve_publickey, socket.curve_secretkey) = True, pair
        self.endpoint = f"tcp://127.0.0.1:{self.introductions.bind_to_random_port('tcp://127.0.0.1')}"
        self.shown = Introduction(shown, self.control.bind_to_random_port("tcp://127.0.0.1"))

    async def introduce(self) -> Certificate:
        """Answers one introduction."""
        connection, data = await asyncio.wait_for(self.introductions.recv_multipart(), 20)
        introduction = unpack_introduction([data])
        assert introduction is not None
        await self.introductions.send_multipart([connection, pack_introduction(self.shown)])
        return introduction.certificate

    def close(self) -> None:
        self.context.destroy(linger=0)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A silence is noticed soon."""
    monkeypatch.setattr(control, "INTRODUCTION_INTERVAL_S", 0.1)
    monkeypatch.setattr(link, "HEARTBEAT_INTERVAL_S", 0.1)
    monkeypatch.setattr(link, "HEARTBEAT_TIMEOUT_S", 1.0)


@asynccontextmanager
async def simulated_encoder(key: NodeKey) -> AsyncIterator[tuple[Listener, list[Message]]]:
    """An encode node that welcomes everybody and does nothing else, and what it has received."""
    listener, received = Listener("tcp://127.0.0.1:*", key), list[Message]()

    async def listen() -> None:
        async for connection, message in listener.messages():
            received.append(message)
            if isinstance(message, Hello):
                listener.send(connection, Welcome(msgspec.structs.replace(message, role="encode", incarnation="e")))
            elif isinstance(message, Heartbeat):
                listener.send(connection, HeartbeatReply(message.sequence, "e", 0))

    tasks = [asyncio.create_task(work) for work in (listen(), listener.check_keys(), listener.introduce())]
    try:
        yield listener, received
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        listener.close()


class TestAdmission:
    def test_a_request_is_answered_by_nodes_with_keys_of_their_own(self, model: dsj.Model):  # noqa: F811
        async def work() -> None:
            async with (
                serving(model, key=ENCODE, encrypt_blocks=True) as server,
                connected(model, [server.listener.endpoint], key=LANGUAGE, encrypt_blocks=True) as encoders,
            ):
                await until(lambda: encoders.num_encoders == 1)
                (name,) = (peer.name for peer in server.peers.values())
                assert name.startswith(f"lang1-{LANGUAGE.certificate.serial}/")
                fetched = await fetch(encoders, "r", pack("What is this?", *media("one image")), time.monotonic() + 100)
                images, _ = media("one image")
                expected = dsj.prepare(model, "What is this?", images=images)["input_ids"]
                count = int(fetched.prompt.lengths[0])
                assert fetched.prompt.input_ids[0, :count].tolist() == expected[0].tolist()
                assert server.listener.num_refused == 0

        asyncio.run(work())

    def test_peers_without_a_valid_certificate_receive_nothing(self, model: dsj.Model, tmp_path: Path):  # noqa: F811
        make_key(tmp_path / "cluster.key")
        shared, pair = read_key(tmp_path / "cluster.key"), zmq.curve_keypair()
        public = introduction_pair(CLUSTER.public)[0]
        forged = msgspec.structs.replace(LANGUAGE.certificate, name="lang2")
        introductions = [
            b"",
            os.urandom(50),
            b"\xc1",
            pack_message(Goodbye()),
            pack_introduction(Introduction(forged)),
            pack_introduction(Introduction(ENCODE.certificate)),
            pack_introduction(Introduction(OTHER_CLUSTER.make_node_key("lang1").certificate)),
            pack_introduction(Introduction(LANGUAGE.certificate)) + b"\x00",
        ]

        async def work() -> None:
            async with serving(model, key=ENCODE) as server:
                endpoint, port = server.listener.endpoint, server.listener._control_port
                at_control, hello = f"tcp://127.0.0.1:{port}", pack_message(a_hello(server, block_key=bytes(32)))
                known = BareSocket(endpoint, public, pair)
                for data in introductions:
                    await known.socket.send(data)
                # the certificate of another node: it is public, so it is answered, and admits that node's key only
                await known.socket.send(pack_introduction(Introduction(LANGUAGE.certificate)))
                answer = unpack_introduction(await known.socket.recv_multipart())
                assert answer == Introduction(ENCODE.certificate, port)
                assert server.listener.num_refused == len(introductions)
                strangers = {
                    "no CURVE": BareSocket(at_control),
                    "a key without a certificate": BareSocket(at_control, ENCODE.public, pair),
                    "the key of all nodes of another cluster": BareSocket(
                        at_control, ENCODE.public, (shared.public, shared.secret)
                    ),
                    "the encode node's public key as its own": BareSocket(at_control, pair[0], pair),
                    "no CURVE for introductions": BareSocket(endpoint),
                    "introductions of another cluster": BareSocket(
                        endpoint, introduction_pair(OTHER_CLUSTER.public)[0], pair
                    ),
                }
                for stranger in strangers.values():
                    await stranger.socket.send(hello)
                large = BareSocket(endpoint, public, pair)  # ZeroMQ breaks off such a connection
                await large.socket.send(bytes(MAX_INTRODUCTION + 1))
                member = BareSocket(at_control, ENCODE.public, (LANGUAGE.public, LANGUAGE.secret))
                assert isinstance(await member.ask(hello), Welcome)
                assert await member.ask(hello, hello, seconds=0.2) is None
                for name, stranger in strangers.items():
                    assert await stranger.answer(0.1) is None, name
                    stranger.close()
                for each in (known, large, member):
                    each.close()
                assert len(server.peers) == 1
                assert server.listener.num_unreadable == 1
                assert server.listener.num_refused == len(introductions)

        asyncio.run(work())

    def test_an_encode_node_needs_the_next_port_too(self):
        with pytest.raises(ValueError, match=r"65536 can't be used .*: with keys of nodes, the port after that of the"):
            Listener("tcp://127.0.0.1:65535", ENCODE)

    def test_keys_of_different_kinds_or_clusters_do_not_fit(self, model: dsj.Model, tmp_path: Path):  # noqa: F811
        make_key(tmp_path / "cluster.key")
        shared, stranger = read_key(tmp_path / "cluster.key"), OTHER_CLUSTER.make_node_key("lang1")

        async def work() -> None:
            async with (
                serving(model, key=ENCODE) as server,
                serving(model, key=shared) as with_shared,
                connected(model, [server.listener.endpoint], key=shared) as lost,
                connected(model, [server.listener.endpoint], key=stranger) as lost_too,
                connected(model, [server.listener.endpoint, with_shared.listener.endpoint], key=LANGUAGE) as found,
            ):
                await until(lambda: found.num_encoders and server.peers)
                await asyncio.sleep(0.5)
                assert (lost.num_encoders, lost_too.num_encoders, found.num_encoders) == (0, 0, 1)
                assert (len(server.peers), len(with_shared.peers)) == (1, 0)

        asyncio.run(work())

    @pytest.mark.usefixtures("quick")
    def test_a_replayed_certificate_of_an_encode_node_gets_no_message(self, model: dsj.Model):  # noqa: F811
        async def work() -> None:
            impostor = Impostor(ENCODE.certificate, *zmq.curve_keypair())
            async with connected(model, [impostor.endpoint], key=LANGUAGE) as encoders:
                for _ in range(2):  # it comes back once it knows that CURVE has failed
                    assert await impostor.introduce() == LANGUAGE.certificate
                assert not await impostor.control.poll(0)
                assert not encoders.num_encoders
            impostor.close()

        asyncio.run(work())

    @pytest.mark.usefixtures("quick")
    @pytest.mark.parametrize(
        ("thief", "reason"),
        [
            (CLUSTER.make_node_key("enc2"), "node enc2 (serial {serial}) is revoked"),
            (CLUSTER.make_node_key("lang2", "language"), "has a key for role language: expected one for role encode"),
            (OTHER_CLUSTER.make_node_key("enc1"), "not signed by this cluster's authority"),
        ],
        ids=["revoked", "language", "another authority"],
    )
    def test_an_encode_node_that_is_refused_gets_no_block_key(
        self,
        model: dsj.Model,  # noqa: F811
        tmp_path: Path,
        thief: NodeKey,
        reason: str,
    ):
        """It has the secret of what it shows, so CURVE would succeed."""
        key = with_list(LANGUAGE, tmp_path / "revoked.txt", "enc2\n")

        async def work() -> None:
            impostor = Impostor(thief.certificate, thief.public, thief.secret)
            async with connected(model, [impostor.endpoint], key=key) as encoders:
                for _ in range(2):
                    await impostor.introduce()
                await until(lambda: encoders.refused)
                assert reason.format(serial=thief.certificate.serial) in encoders.refused[impostor.endpoint]
                assert not await impostor.control.poll(0)
            impostor.close()

        asyncio.run(work())

    def test_a_node_can_not_take_the_place_of_another(self, model: dsj.Model):  # noqa: F811
        """It says the same of itself as the other node does, and asks ZeroMQ for the same connection."""
        thief = CLUSTER.make_node_key("lang2", "language")

        async def work() -> None:
            async with serving(model, key=ENCODE) as server:
                hello = pack_message(a_hello(server, block_key=bytes(32)))
                bare = []
                for key in (LANGUAGE, thief):
                    introduction = BareSocket(
                        server.listener.endpoint, introduction_pair(CLUSTER.public)[0], zmq.curve_keypair()
                    )
                    await introduction.socket.send(pack_introduction(Introduction(key.certificate)))
                    introduced = unpack_introduction(await introduction.socket.recv_multipart())
                    assert introduced is not None
                    introduction.close()
                    address = f"tcp://127.0.0.1:{introduced.port}"
                    bare.append(BareSocket(address, ENCODE.public, (key.public, key.secret)))
                    assert isinstance(await bare[-1].ask(hello), Welcome)
                assert [peer.name.partition("-")[0] for peer in server.peers.values()] == ["lang1", "lang2"]
                assert isinstance(await bare[0].ask(pack_message(Heartbeat(3))), HeartbeatReply)
                (connection, *_) = server.peers
                bare[0].close()
                replayed = BareSocket(address, ENCODE.public, (thief.public, thief.secret))
                replayed.socket.setsockopt(zmq.RECONNECT_IVL, 10)
                replayed.socket.disconnect(address)
                replayed.socket.setsockopt(zmq.ROUTING_ID, b"x" + connection[1:-16])
                replayed.socket.connect(address)
                assert await replayed.ask(pack_message(Heartbeat(4))) == Goodbye("send Hello first")
                for each in (bare[1], replayed):
                    each.close()

        asyncio.run(work())


class TestShuttingOut:
    @pytest.mark.usefixtures("quick")
    def test_a_stolen_language_node_is_shut_out_while_others_go_on(
        self,
        model: dsj.Model,  # noqa: F811
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ):
        file, honest = tmp_path / "revoked.txt", CLUSTER.make_node_key("lang2")
        key = with_list(ENCODE, file)
        began = asyncio.Event()

        async def hang(*_: Any) -> None:
            began.set()
            await asyncio.Event().wait()

        async def work() -> None:
            async with (
                serving(model, key=key) as server,
                connected(model, [server.listener.endpoint], key=LANGUAGE) as stolen,
                connected(model, [server.listener.endpoint], key=honest) as others,
            ):
                await until(lambda: stolen.num_encoders == others.num_encoders == 1)
                with monkeypatch.context() as patched:
                    patched.setattr(server, "_prepare", hang)
                    request = asyncio.create_task(fetch(stolen, "r", pack("Hello", [], []), time.monotonic() + 100))
                    await until(began.is_set)
                assert server.num_attempts == 1
                revoke(key, file, "lang1\n")
                assert [peer.name.partition("-")[0] for peer in server.peers.values()] == ["lang2"]
                assert server.num_attempts == len(server.sender.outgoing) == 0
                await until(lambda: server.listener._reported and not stolen.num_encoders)
                assert others.num_encoders == 1
                await fetch(others, "s", pack("Hello", *media("one image")), time.monotonic() + 100)
                request.cancel()
                await asyncio.gather(request, return_exceptions=True)
                assert [peer.name.partition("-")[0] for peer in server.peers.values()] == ["lang2"]

        with caplog.at_level(logging.WARNING):
            asyncio.run(work())
        said = f"node lang1 (serial {LANGUAGE.certificate.serial}) is revoked"
        assert [record.getMessage() for record in caplog.records if "revoked" in record.getMessage()] == [
            f"{said}, and is no longer served",
            f"a language node is refused: {said}",
        ]

    @pytest.mark.usefixtures("quick")
    def test_requests_move_from_a_revoked_encode_node_to_another(
        self,
        model: dsj.Model,  # noqa: F811
        tmp_path: Path,
        caplog: pytest.LogCaptureFixture,
    ):
        file, honest = tmp_path / "revoked.txt", CLUSTER.make_node_key("enc2", "encode")
        key = with_list(LANGUAGE, file)

        async def work() -> None:
            async with (
                simulated_encoder(ENCODE) as (listener, received),
                serving(model, key=honest) as server,
                connected(model, [listener.endpoint, server.listener.endpoint], key=key) as encoders,
            ):
                await until(lambda: encoders.num_encoders == 2)
                first = next(peer for peer in encoders.receiver.peers if peer.startswith("encoder 0/"))
                encoders.receiver.peers = dict.fromkeys([first, *encoders.receiver.peers])
                payload = pack("What is this?", *media("one image"))
                request = asyncio.create_task(fetch(encoders, "r", payload, time.monotonic() + 100))
                await until(lambda: any(isinstance(each, Submit) for each in received))
                revoke(key, file, f"{ENCODE.certificate.serial}\n")
                assert encoders.num_encoders == 1
                count = len(received)
                assert (await request).encoder == 1
                await until(lambda: encoders.refused)
                assert len(received) == count
                assert encoders.receiver.pool.num_free == encoders.receiver.settings.num_blocks

        with caplog.at_level(logging.WARNING):
            asyncio.run(work())
        said = f"encoder 0, node enc1 (serial {ENCODE.certificate.serial}), is revoked, and is no longer used"
        assert said in caplog.messages

    @pytest.mark.usefixtures("quick")
    def test_the_node_that_replaces_an_encode_node_gets_another_block_key(
        self,
        model: dsj.Model,  # noqa: F811
    ):
        """The former one may be stolen, and could seal blocks in the name of its successor."""
        successor = CLUSTER.make_node_key("enc1", "encode")

        async def work() -> None:
            async with contextlib.AsyncExitStack() as stack:
                introductions = Impostor(ENCODE.certificate, *zmq.curve_keypair())  # of both, at one address
                stack.callback(introductions.close)
                encoders = await stack.enter_async_context(connected(model, [introductions.endpoint], key=LANGUAGE))
                keys = []
                for key in (ENCODE, successor):
                    async with simulated_encoder(key) as (listener, received):
                        assert listener._admit(key, LANGUAGE.certificate)
                        introductions.shown = Introduction(key.certificate, listener._control_port)
                        await introductions.introduce()
                        await until(lambda: encoders.num_encoders == 1 and len(received) > 3)
                        keys.append({each.block_key for each in received if isinstance(each, Hello)})
                        assert keys[-1] == {encoders._links[0].seal._key}
                    await until(lambda: not encoders.num_encoders)
                assert [len(each) for each in keys] == [1, 1]
                assert keys[0] != keys[1]

        asyncio.run(work())


@pytest.fixture
def node_keys(tmp_path: Path) -> tuple[Path, Path]:
    """Files with the keys of an encode node and a language node."""
    authority = tmp_path / "cluster.authority"
    make_authority(authority)
    make_node_key(tmp_path / "enc1.key", "enc1", authority, "encode")
    make_node_key(tmp_path / "lang1.key", "lang1", authority, "language")
    return tmp_path / "enc1.key", tmp_path / "lang1.key"


class TestServe:
    def test_a_changed_list_shuts_a_node_out_when_the_next_one_comes(
        self,
        model: dsj.Model,  # noqa: F811
        tmp_path: Path,
        node_keys: tuple[Path, Path],
    ):
        """Without SIGHUP; and a node whose key has expired is refused, with the date in the log."""
        encode, language = node_keys
        revoked, key = tmp_path / "revoked.txt", read_key(language)
        revoked.write_text("# nobody\n")
        authority = msgspec.json.decode((tmp_path / "cluster.authority").read_bytes())["authority_secret"]
        assert isinstance(key, NodeKey)
        ended = Authority(base64.b64decode(authority)).make_node_key("lang2", "language", expires=1_000_000_000)
        options = ("--role", "encode", "--key", str(encode), "--revoked", str(revoked), "--decoders", "0")

        async def work(node: ServeNode) -> None:
            assert node.process.stderr
            async with connected(model, [node.control], key=key) as encoders:
                await until(lambda: encoders.num_encoders == 1)
                revoked.write_text("lang1\n")
                async with connected(model, [node.control], key=ended) as others:
                    lines = [await asyncio.to_thread(node.process.stderr.readline) for _ in range(2)]
                    assert f"{key.certificate} is revoked, and is no longer served" in lines[0]
                    assert f"a language node is refused: {ended.certificate} has a key that was valid until" in lines[1]
                    assert "2001-09-09 01:46 UTC" in lines[1]
                    assert not others.num_encoders
                await until(lambda: not encoders.num_encoders)

        assert model.path is not None
        with serving_process(model.path, "--block-size", str(BLOCK), *options) as node:
            asyncio.run(work(node))
            assert node.terminate()[0] == 0

    def test_sighup_reads_the_list_again(
        self,
        model: dsj.Model,  # noqa: F811
        tmp_path: Path,
        node_keys: tuple[Path, Path],
    ):
        encode, language = node_keys
        revoked, key = tmp_path / "revoked.txt", read_key(language)
        revoked.write_text("# nobody\n")
        assert isinstance(key, NodeKey)
        assert model.path is not None
        options = ("--role", "encode", "--key", str(encode), "--revoked", str(revoked), "--decoders", "0")

        async def work(node: ServeNode) -> None:
            async with connected(model, [node.control], key=key) as encoders:
                await until(lambda: encoders.num_encoders == 1)
                revoked.write_text("lang1")  # without the end of the line
                node.process.send_signal(signal.SIGHUP)
                assert node.process.stderr
                line = await asyncio.to_thread(node.process.stderr.readline)
                assert "the revoked nodes are still those from before: the last line of" in line
                assert encoders.num_encoders == 1
                revoked.write_text("lang1\n")
                node.process.send_signal(signal.SIGHUP)
                line = await asyncio.to_thread(node.process.stderr.readline)
                assert f"{key.certificate} is revoked, and is no longer served" in line
                await until(lambda: not encoders.num_encoders)
                assert (await asyncio.to_thread(node.metrics))["refused_messages_total"] > 0

        with serving_process(model.path, "--block-size", str(BLOCK), *options) as node:
            asyncio.run(work(node))
            code, _ = node.terminate()
            assert code == 0

    @pytest.mark.parametrize(
        ("arguments", "reason"),
        [
            (["--role", "encode", "--key", "{language}"], "expected one for role encode"),
            (["--role", "encode", "--key", "{encode}", "--revoked", "{list}"], "enc1 (serial .*) is revoked"),
            (["--role", "encode", "--key", "{ended}"], "can't be used: node enc2 (serial .*) has a key that was valid"),
            (["--role", "encode", "--key", "{encode}", "--revoked", "missing"], "can't be read (No such file"),
            (["--role", "encode", "--key", "{shared}", "--revoked", "{list}"], "is the key of all nodes"),
            (["--role", "encode", "--revoked", "{list}"], "give --role, and a node's own key with --key"),
            (["--revoked", "{list}"], "give --role, and a node's own key with --key"),
            (["--role", "encode", "--key", "{authority}"], "stays off the nodes"),
        ],
    )
    def test_what_does_not_fit_is_refused_before_anything_is_loaded(
        self,
        model: dsj.Model,  # noqa: F811
        tmp_path: Path,
        node_keys: tuple[Path, Path],
        arguments: list[str],
        reason: str,
        capsys: pytest.CaptureFixture[str],
    ):
        make_key(tmp_path / "cluster.key")
        (tmp_path / "revoked.txt").write_text("enc1\n")
        make_node_key(tmp_path / "enc2.key", "enc2", tmp_path / "cluster.authority", "encode", days=-1)
        files = {
            "ended": tmp_path / "enc2.key",
            "encode": node_keys[0],
            "language": node_keys[1],
            "shared": tmp_path / "cluster.key",
            "authority": tmp_path / "cluster.authority",
            "list": tmp_path / "revoked.txt",
        }
        with pytest.raises(SystemExit) as end:
            main(["serve", str(model.path), *(each.format(**files) for each in arguments)])
        assert end.value.code == 1
        assert re.search(re.escape(reason).replace(r"\.\*", ".*"), capsys.readouterr().err)
