"""Rows through Mooncake between two processes: every byte, every fault, and no memory shared by mistake."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from deepstack_jax.disagg import MultimodalDataBuffers
from deepstack_jax.disagg.encode import bridge as bridge_module
from deepstack_jax.disagg.encode.bridge import BlockWrite, SendBridge, WriteSkippedError
from deepstack_jax.disagg.encode.outgoing import OutgoingPrompt
from deepstack_jax.disagg.language.incoming import BlockCopy, IncomingPrompt
from deepstack_jax.disagg.transports import Piece, TransferError, Transport
from deepstack_jax.disagg.transports.mooncake import MooncakeTransport
from deepstack_jax.disagg.wire.device_rows import DeviceRows, HostMemory, HostRows, steps_of
from deepstack_jax.models.vision import VisualRows, separate_deepstack_embeds
from tests.bridge_peer import Peer, peer
from tests.cases import side_by_side
from tests.faults import Fault, FaultyTransport, random_faults
from tests.waiting import until

IMAGE, VIDEO, TEXT = 90, 91, 7
WAIT = 20.0  # seconds; far more than any write here takes


@pytest.fixture(scope="module")
def transport() -> Iterator[MooncakeTransport]:
    mooncake = MooncakeTransport("127.0.0.1")
    yield mooncake
    mooncake.close()


def prompt_of(kinds: str, hidden: int, levels: int, dtype, seed: int = 0) -> OutgoingPrompt:
    """One token a letter: i and v are visual, anything else text. Rows are bits drawn at random, NaNs among them."""
    rng = np.random.default_rng(seed)
    ids = np.asarray(
        [{"i": IMAGE, "v": VIDEO}.get(kind, TEXT + place % 50) for place, kind in enumerate(kinds)], np.int32
    )
    visual = np.isin(ids, [IMAGE, VIDEO])
    # rows of images come before rows of videos, whatever their order in the prompt
    images, videos = ids == IMAGE, ids == VIDEO
    index = np.full(len(ids), -1, np.int32)
    index[images] = np.arange(images.sum())
    index[videos] = images.sum() + np.arange(videos.sum())
    width = (1 + levels) * hidden * np.dtype(dtype).itemsize
    rows = rng.integers(0, 256, (int(visual.sum()), width), np.uint8).view(dtype)
    return OutgoingPrompt(
        fill_ids=ids,
        mrope_positions=rng.integers(-(2**31), 2**31, (3, len(ids)), np.int32, endpoint=False),
        aux_datas=rng.integers(0, 1000, 16, np.int32),
        visual_index=index,
        rows=separate_deepstack_embeds(jnp.asarray(rows), levels) if len(rows) else None,
    )


def send(bridge: SendBridge, prompt: OutgoingPrompt, blocks: list[tuple[int, int]]) -> list[BlockWrite]:
    ended: list[BlockWrite] = []
    done = threading.Event()

    def on_end(writes: list[BlockWrite]) -> None:
        ended.extend(writes)
        if len(ended) == len(blocks):
            done.set()

    bridge.write(prompt, blocks, on_end)
    assert done.wait(WAIT), f"{len(ended)} of {len(blocks)} blocks ended"
    return ended


def said(writes: list[BlockWrite]) -> list[tuple[int, int, str, int]]:
    return [(write.token_block, write.pool_block, write.checksum.hex(), write.num_bytes) for write in writes]


def in_token_order(prompt: OutgoingPrompt) -> np.ndarray:
    """The prompt's rows as the receiver should have them, as bytes."""
    return side_by_side(prompt.rows).view(np.uint8)[prompt.visual_index[prompt.visual_index >= 0]]


def bytes_of(prompt: OutgoingPrompt) -> int:
    return 16 * len(prompt.fill_ids) + 64 + (0 if prompt.rows is None else side_by_side(prompt.rows).nbytes)


KINDS = {
    "one picture over four blocks": "tt" + "i" * 13 + "ttt",
    "runs of odd lengths, a partial last block": "t" + "i" * 3 + "t" + "i" + "tt" + "v" * 5 + "t" + "i" * 7 + "t",
    "text alone": "t" * 11,
    "visual to the last token": "i" * 10,
    "one token": "i",
}


@pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize(("dtype", "levels"), [("bfloat16", 3), ("float32", 0)])
@pytest.mark.parametrize("staged", [False, True], ids=["in place", "staged"])
def test_what_arrives_is_what_was_sent(transport, shared_peers, tmp_path, monkeypatch, kinds, dtype, levels, staged):
    monkeypatch.setattr(transport, "needs_registered_sources", staged)  # staged: as for rdma
    there = shared_peers[dtype]
    prompt = prompt_of(kinds, 24, levels, np.dtype(dtype))
    count = -(-len(kinds) // 4)
    pool_blocks = [5, 6, 2, 3, 0, 7, 1, 4][:count]  # neighbours and strangers
    bridge = SendBridge(transport, there.session, there.layout)
    there.ask(expect=[len(kinds), int((prompt.visual_index >= 0).sum()), [IMAGE, VIDEO], 32])

    writes = send(bridge, prompt, list(enumerate(pool_blocks)))
    assert [write.error for write in writes] == [None] * count
    assert there.ask(copy_out=said(writes)) == [[write.checksum.hex(), write.num_bytes] for write in writes]

    got = there.prompt(tmp_path)
    np.testing.assert_array_equal(got["fill_ids"], prompt.fill_ids)
    np.testing.assert_array_equal(got["mrope_positions"], prompt.mrope_positions)
    np.testing.assert_array_equal(got["aux_datas"], prompt.aux_datas)
    visual = prompt.visual_index >= 0
    np.testing.assert_array_equal(got["visual_index"], np.where(visual, visual.cumsum() - 1, -1))
    assert len(got["rows"]) == 32
    rows = visual.sum()
    if rows:
        np.testing.assert_array_equal(got["rows"][:rows], in_token_order(prompt))
    assert not got["rows"][rows:].any()  # padding up to the bucket
    # nothing but this crossed the wire
    assert bridge.times.num_bytes == sum(write.num_bytes for write in writes) == bytes_of(prompt)
    bridge.close()


@pytest.fixture(scope="module")
def shared_peers() -> Iterator[dict[str, Peer]]:
    with peer(8, 4, 24, 3, "bfloat16") as bfloat16, peer(8, 4, 24, 0, "float32") as float32:
        yield {"bfloat16": bfloat16, "float32": float32}


def test_neighbouring_blocks_of_one_picture_are_one_piece_a_buffer(transport, shared_peers):
    there = shared_peers["bfloat16"]
    bridge = SendBridge(transport, there.session, there.layout)
    send(bridge, prompt_of("i" * 16, 24, 3, ml_dtypes.bfloat16), [(0, 2), (1, 3), (2, 4), (3, 5)])
    assert bridge.times.pieces == 5
    bridge.close()


def test_many_small_runs_in_a_block_are_packed_into_one_piece(transport, shared_peers, tmp_path):
    there = shared_peers["bfloat16"]
    prompt = prompt_of("itit", 24, 3, ml_dtypes.bfloat16)
    bridge = SendBridge(transport, there.session, there.layout)
    send(bridge, prompt, [(0, 7)])
    assert bridge.times.pieces == 5
    embeddings = there.pool(tmp_path)[0][7].reshape(4, -1)
    np.testing.assert_array_equal(embeddings[:2], side_by_side(prompt.rows).view(np.uint8)[:, : 24 * 2])
    bridge.close()


def test_text_between_pictures_never_crosses_the_wire(transport, tmp_path):
    with peer(2, 8, 24, 3, "bfloat16") as there:
        bridge = SendBridge(transport, there.session, there.layout)
        send(bridge, prompt_of("tttiiittt", 24, 3, ml_dtypes.bfloat16), [(0, 1), (1, 0)])
        pool = there.pool(tmp_path)
        for buffer in (0, 4):
            tokens = pool[buffer][1].reshape(8, -1)
            assert (tokens[[0, 1, 2, 6, 7]] == 0xEE).all()
            assert (pool[buffer][0] == 0xEE).all()
        assert (pool[1][0].view(np.int32)[1:] == np.int32(-286331154)).all()  # 0xEEEEEEEE: one token exists
        assert (pool[3][0] == 0xEE).all()  # aux_datas go with token block 0
        bridge.close()


def test_blocks_in_any_order_and_in_several_rounds(transport, tmp_path):
    kinds = "tt" + "i" * 9 + "t" + "v" * 14 + "ttt" + "i" * 3
    prompt = prompt_of(kinds, 40, 3, np.float32)
    with peer(2, 4, 40, 3, "float32") as there:
        bridge = SendBridge(transport, there.session, there.layout)
        there.ask(expect=[len(kinds), 26, [IMAGE, VIDEO], None])
        for round in ([(5, 0), (1, 1)], [(7, 1), (0, 0)], [(2, 0), (3, 1)], [(6, 1), (4, 0)]):
            writes = send(bridge, prompt, round)
            assert [write.token_block for write in writes] == [token_block for token_block, _ in round]
            there.ask(copy_out=said(writes))
        np.testing.assert_array_equal(there.prompt(tmp_path)["rows"], in_token_order(prompt))
        assert bridge.times.num_bytes == bytes_of(prompt)  # nothing twice
        bridge.close()


def test_more_pieces_than_the_engine_queues(transport, tmp_path):
    # every second pool block: nothing merges, four pieces a block
    count = 700
    with peer(2 * count, 2, 4, 1, "bfloat16") as there:
        prompt = prompt_of("i" * 2 * count, 4, 1, ml_dtypes.bfloat16)
        bridge = SendBridge(transport, there.session, there.layout)
        there.ask(expect=[2 * count, 2 * count, [IMAGE], None])
        writes = send(bridge, prompt, [(block, 2 * block) for block in range(count)])
        assert not any(write.error for write in writes)
        assert bridge.times.pieces == 4 * count + 1 > 2048
        there.ask(copy_out=said(writes))
        np.testing.assert_array_equal(there.prompt(tmp_path)["rows"], in_token_order(prompt))
        bridge.close()
        # and in one write
        rows = np.arange(3000, dtype=np.int32)
        pieces = [Piece(rows.ctypes.data + 4 * n, there.layout.ptrs[1] + 8 * n, 4) for n in range(1400)]
        transport.submit(there.session, pieces * 2).result(WAIT)
        ids = there.pool(tmp_path)[1].view(np.int32)
        np.testing.assert_array_equal(ids[:1400, 0], rows[:1400])


def test_the_first_and_the_last_writes_are_small():
    """The pipeline fills and empties fast, whatever the prompt's length."""
    pool = MultimodalDataBuffers(64, 4, 24, 3, ml_dtypes.bfloat16)
    local = Local()
    bridge = SendBridge(local, "here", pool.layout, slot_bytes=16 * 4 * 24 * 4 * 2)  # 16 blocks
    send(bridge, prompt_of("i" * 256, 24, 3, ml_dtypes.bfloat16), [(block, block) for block in range(64)])
    bridge.close()
    block_bytes = 4 * (16 + 4 * 24 * 2)
    blocks = [sum(piece.num_bytes for piece in pieces) // block_bytes for pieces in local.submitted]
    assert blocks == [4, 8, 13, 9, 7, 5, 4, 4, 4, 4, 2]


def test_rows_live_until_nothing_can_read_them_any_more(transport, shared_peers, tmp_path, monkeypatch):
    """They are written from where they are: longer than their prompt, and for a while after a failure."""
    monkeypatch.setattr(bridge_module, "UNSURE_SECONDS", 0.5)
    there = shared_peers["bfloat16"]
    for fault, outlive in ((Fault("delay", 0.3), False), (Fault("fail"), True)):
        bridge = SendBridge(FaultyTransport(transport, [fault]), there.session, there.layout)
        prompt = prompt_of("iiii", 24, 3, ml_dtypes.bfloat16)
        expected, levels = in_token_order(prompt), np.asarray(prompt.rows.deepstack)
        memory = HostMemory()
        room = memory.take(levels.nbytes)
        place = room.ctypes.data
        room[...] = levels.view(np.uint8).reshape(-1)
        levels = jax.device_put(room.view(levels.dtype).reshape(levels.shape))  # is that memory, as on every CPU
        prompt = replace(prompt, rows=VisualRows(prompt.rows.embeds, levels))

        def is_free(memory: HostMemory = memory, place: int = place) -> bool:
            gc.collect()
            return any(room.ctypes.data == place for room in [memory.take(4 * 3 * 24 * 2)])

        ended: list[BlockWrite] = []
        there.ask(expect=[4, 4, [IMAGE], None])
        bridge.write(prompt, [(0, 0)], ended.extend)
        del prompt, room, levels
        if not outlive:
            assert not is_free()
        until(lambda ended=ended: ended, WAIT)
        if outlive:
            assert not is_free()
            time.sleep(0.6)
            send(bridge, prompt_of("t", 24, 3, ml_dtypes.bfloat16), [(0, 0)])
        else:
            there.ask(copy_out=said(ended))
            np.testing.assert_array_equal(there.prompt(tmp_path)["rows"], expected)
        until(is_free, WAIT)
        bridge.close()


def test_blocks_that_do_not_exist_are_refused_before_anything_is_written(transport, shared_peers):
    there = shared_peers["bfloat16"]
    bridge = SendBridge(transport, there.session, there.layout)
    prompt = prompt_of("iiiii", 24, 3, ml_dtypes.bfloat16)
    with pytest.raises(ValueError, match="token block 2 is outside the prompt of 2 blocks"):
        bridge.write(prompt, [(0, 0), (2, 1)], lambda writes: None)
    with pytest.raises(ValueError, match="block 8 is outside the pool of 8 blocks"):
        bridge.write(prompt, [(0, 0), (1, 8)], lambda writes: None)
    assert bridge.times.pieces == 0
    bridge.close()


# what goes wrong


def test_each_fault_is_seen_as_declared(transport, tmp_path):
    """Two blocks a fault: the first meets it, the second doesn't."""
    kinds = "i" * 8
    prompt = prompt_of(kinds, 24, 3, ml_dtypes.bfloat16)
    clean = side_by_side(prompt.rows).view(np.uint8)
    seconds = 0.3

    def meet(fault: Fault) -> tuple[BlockWrite, BlockWrite, list[bool], float, Peer, list[np.ndarray]]:
        faulty = FaultyTransport(transport, [fault], seed=3)
        bridge = SendBridge(faulty, there.session, there.layout)
        there.ask(expect=[8, 8, [IMAGE], None])
        started = time.perf_counter()
        first = send(bridge, prompt, [(0, 0)])[0]
        took = time.perf_counter() - started
        second = send(bridge, prompt, [(1, 1)])[0]
        pool = there.pool(tmp_path)
        copies = there.ask(copy_out=said([first, second]))
        right = [
            copy == [write.checksum.hex(), write.num_bytes] for copy, write in zip(copies, (first, second), strict=True)
        ]
        assert faulty.counts[fault.kind] == 1
        assert faulty.counts["none"] == 1
        assert second.error is None
        bridge.close()
        return first, second, right, took, faulty, pool

    with peer(2, 4, 24, 3, "bfloat16") as there:
        first, _, right, _, _, pool = meet(Fault("drop"))
        assert first.error is None
        assert right == [False, True]
        assert (pool[0][0] == 0xEE).all()

        first, _, right, _, _, pool = meet(Fault("fail"))
        assert isinstance(first.error, TransferError)
        assert right == [False, True]
        assert (pool[0][0] == 0xEE).all()

        first, _, right, _, faulty, pool = meet(Fault("late", seconds))
        assert isinstance(first.error, TransferError)
        assert (pool[0][0] == 0xEE).all()  # not yet
        until(lambda: faulty.counts["late landed"] == 1, WAIT)
        np.testing.assert_array_equal(there.pool(tmp_path)[0][0].reshape(4, -1), clean[:4, : 24 * 2])

        first, _, right, took, _, _ = meet(Fault("delay", seconds))
        assert first.error is None
        assert right == [True, True]
        assert took >= seconds

        first, _, right, _, _, pool = meet(Fault("corrupt"))
        assert first.error is None
        assert right == [False, True]
        sent = [clean[:4, :48], prompt.fill_ids[:4], prompt.mrope_positions.T[:4], prompt.aux_datas, clean[:4, 48:]]
        differing = sum(
            np.unpackbits(buffer[0] ^ np.ascontiguousarray(part).view(np.uint8).reshape(-1)).sum()
            for buffer, part in zip(pool, sent, strict=True)
        )
        assert differing == 1


def test_a_stalled_write_holds_up_no_other_and_the_bridge_closes(transport, shared_peers):
    there = shared_peers["bfloat16"]
    faulty = FaultyTransport(transport, [Fault("stall")])
    bridge = SendBridge(faulty, there.session, there.layout)
    prompt = prompt_of("i" * 16, 24, 3, ml_dtypes.bfloat16)
    stalled: list[BlockWrite] = []
    bridge.write(prompt, [(0, 0)], stalled.extend)
    assert send(bridge, prompt, [(1, 1)])[0].error is None
    bridge.close()
    assert stalled == []


def test_random_faults_come_as_often_as_asked_and_again_with_the_same_seed():
    rates = {"drop": 0.2, "late": 0.1}
    drawn = [next(faults) for faults in [random_faults(5, rates)] for _ in range(4000)]
    kinds = [fault.kind if fault else "none" for fault in drawn]
    for kind, rate in {**rates, "none": 0.7}.items():
        assert abs(kinds.count(kind) / 4000 - rate) < 0.03  # four standard deviations of the draw
    again = random_faults(5, rates)
    assert [next(again) for _ in range(4000)] == drawn
    with pytest.raises(ValueError, match="unknown fault 'burn'"):
        random_faults(0, {"burn": 0.5})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="at most 1"):
        random_faults(0, {"drop": 0.6, "fail": 0.6})


def test_a_peer_killed_during_a_write_is_reported_and_others_go_on(transport, shared_peers):
    other = shared_peers["bfloat16"]
    with peer(1, 1 << 14, 1024, 0, "bfloat16") as victim:
        big = np.ones(victim.layout.total_lens[0], np.uint8)
        whole = Piece(big.ctypes.data, victim.layout.ptrs[0], big.nbytes)
        transport.submit(victim.session, [whole]).result(WAIT)
        write = transport.submit(victim.session, [whole] * 100)  # 3 GB: a second at least
        time.sleep(0.05)
        assert not write.done()
        victim.process.kill()
        with pytest.raises(TransferError, match=f"to {victim.session} failed"):
            write.result(WAIT)
        with pytest.raises(TransferError):  # and nobody is there from now on
            transport.submit(victim.session, [Piece(big.ctypes.data, victim.layout.ptrs[0], 64)]).result(WAIT)
        bridge = SendBridge(transport, other.session, other.layout)
        assert send(bridge, prompt_of("iiii", 24, 3, ml_dtypes.bfloat16), [(0, 0)])[0].error is None
        bridge.close()


def test_a_stopped_peer_is_given_up(transport, monkeypatch):
    monkeypatch.setenv("MC_TCP_PROGRESS_TIMEOUT_SEC", "1")  # the engine reads it at each write
    with peer(1, 1 << 14, 1024, 1, "bfloat16") as there:
        source = np.ones(there.layout.total_lens[0], np.uint8)
        whole = Piece(source.ctypes.data, there.layout.ptrs[0], source.nbytes)
        transport.submit(there.session, [whole]).result(WAIT)
        os.kill(there.process.pid, signal.SIGSTOP)
        with pytest.raises(TransferError):
            transport.submit(there.session, [whole]).result(WAIT)


def test_writes_outside_registered_memory_fail_and_harm_nobody(transport, shared_peers, tmp_path):
    there = shared_peers["float32"]
    source = np.zeros(4096, np.uint8)
    past_the_end = there.layout.ptrs[0] + there.layout.total_lens[0] - 64
    with pytest.raises(TransferError):
        transport.submit(there.session, [Piece(source.ctypes.data, past_the_end, 4096)]).result(WAIT)
    assert (there.pool(tmp_path)[0][-1][-64:] != 0).any()
    with pytest.raises(TransferError):
        transport.submit("127.0.0.1:9", [Piece(source.ctypes.data, past_the_end, 64)]).result(WAIT)


def test_blocks_no_longer_wanted_and_blocks_of_a_closed_bridge_are_skipped(transport, shared_peers):
    there = shared_peers["bfloat16"]
    prompt = prompt_of("i" * 16, 24, 3, ml_dtypes.bfloat16)
    bridge = SendBridge(transport, there.session, there.layout)
    ended: list[BlockWrite] = []
    bridge.write(prompt, [(0, 0), (1, 1)], ended.extend, wanted=lambda: False)
    bridge.close()
    bridge.write(prompt, [(2, 2)], ended.extend)
    assert [type(write.error) for write in ended] == [WriteSkippedError] * 3
    assert bridge.times.num_bytes == 0


def test_an_encoder_that_failed_fails_its_blocks_and_not_the_bridge(transport, shared_peers):
    there = shared_peers["bfloat16"]
    broken = prompt_of("iiii", 24, 3, ml_dtypes.bfloat16)
    assert broken.rows is not None
    broken.rows.deepstack.delete()
    bridge = SendBridge(transport, there.session, there.layout)
    assert isinstance(send(bridge, broken, [(0, 0)])[0].error, RuntimeError)
    assert send(bridge, prompt_of("iiii", 24, 3, ml_dtypes.bfloat16), [(0, 0)])[0].error is None
    bridge.close()


def test_a_closed_transport_refuses(shared_peers):
    mooncake = MooncakeTransport("127.0.0.1")
    mooncake.close()
    with pytest.raises(TransferError, match="the transport is closed"):
        mooncake.submit(shared_peers["float32"].session, [Piece(0, 0, 1)]).result(WAIT)


def test_ipv6(tmp_path):
    # the engine settles on one family a process: this sender has a process of its own
    code = """if True:
        import sys
        import numpy as np
        from deepstack_jax.disagg.transports.mooncake import MooncakeTransport
        from deepstack_jax.disagg.transports import Piece
        transport = MooncakeTransport("::1")
        source = np.arange(16, dtype=np.int32)
        transport.submit(sys.argv[1], [Piece(source.ctypes.data, int(sys.argv[2]), 64)]).result(20)
        transport.close()
    """
    with peer(2, 4, 24, 3, "bfloat16", host="::1") as there:
        assert there.session.startswith("[::1]:")
        command = [sys.executable, "-c", code, there.session, str(there.layout.ptrs[3] + 64)]
        sender = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert sender.returncode == 0, sender.stderr
        np.testing.assert_array_equal(there.pool(tmp_path)[3][1].view(np.int32), np.arange(16))


def test_what_is_missing_is_said_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "mooncake.engine", None)
    with pytest.raises(TransferError, match=r"Mooncake isn't installed: pip install") as error:
        MooncakeTransport("127.0.0.1")
    assert "\n" not in str(error.value)
    if not Path("/sys/class/infiniband").is_dir():
        with pytest.raises(TransferError, match="this machine has none: use tcp"):
            MooncakeTransport("127.0.0.1", "rdma")


# memory


def filled_pool(prompt: OutgoingPrompt, blocks: int, levels: int = 3) -> tuple[MultimodalDataBuffers, "Local"]:
    pool = MultimodalDataBuffers(blocks, 4, 24, levels, ml_dtypes.bfloat16)
    local = Local()
    bridge = SendBridge(local, "here", pool.layout)
    local.writes = send(bridge, prompt, [(block, block) for block in range(blocks)])
    bridge.close()
    return pool, local


class Local(Transport):
    """Writes within this process: the receiving side's memory is what these tests are about."""

    writes: list[BlockWrite]
    session = "here"
    needs_registered_sources = False

    def __init__(self):
        self.submitted: list[list[Piece]] = []

    def register(self, memory: np.ndarray) -> None: ...

    def unregister(self, memory: np.ndarray) -> None: ...

    def close(self) -> None: ...

    def submit(self, session, pieces):
        import ctypes
        from concurrent.futures import Future

        self.submitted.append(pieces)
        for piece in pieces:
            ctypes.memmove(piece.destination, piece.source, piece.num_bytes)
        future: Future[None] = Future()
        future.set_result(None)
        return future


def test_what_was_copied_out_does_not_change_with_the_pool():
    prompt = prompt_of("i" * 6 + "tt", 24, 3, ml_dtypes.bfloat16)
    pool, local = filled_pool(prompt, 2)
    incoming = IncomingPrompt(pool, 8, 6, [IMAGE], num_rows=8)
    for write in reversed(local.writes):  # the second block waits for the first
        copy = BlockCopy(write.checksum, write.num_bytes)
        assert incoming.copy_out(write.token_block, write.pool_block, copy) == copy
        for array in pool.arrays:
            array[write.pool_block] = 0
    assert incoming.complete
    rows = incoming.rows()
    np.testing.assert_array_equal(side_by_side(rows)[:6].view(np.uint8), in_token_order(prompt))
    np.testing.assert_array_equal(incoming.fill_ids, prompt.fill_ids)
    # and a block that has arrived isn't read again
    another = BlockCopy(b"another", 1)  # as another encoder, with other last bits, would say of it
    assert incoming.copy_out(0, 0, another) == another
    np.testing.assert_array_equal(side_by_side(rows)[:6].view(np.uint8), in_token_order(prompt))


def test_a_damaged_block_does_not_count_and_may_come_again():
    prompt = prompt_of("i" * 8, 24, 3, ml_dtypes.bfloat16)
    pool, local = filled_pool(prompt, 2)
    incoming = IncomingPrompt(pool, 8, 8, [IMAGE])
    expected = [BlockCopy(write.checksum, write.num_bytes) for write in local.writes]
    for buffer, place in ((4, (0, 3, 71)), (1, (0, 0)), (2, (0, 1, 2)), (3, (0, 5))):
        good = pool.arrays[buffer][place].copy()
        pool.arrays[buffer][place] = good + np.asarray(1, good.dtype) if buffer != 4 else -good
        assert incoming.copy_out(0, 0, expected[0]) != expected[0]
        pool.arrays[buffer][place] = good
    assert incoming.copy_out(1, 1, expected[1]) == expected[1]
    with pytest.raises(RuntimeError, match="1 of 2 blocks haven't arrived"):
        incoming.rows()
    assert incoming.copy_out(0, 0, expected[0]) == expected[0]
    np.testing.assert_array_equal(side_by_side(incoming.rows()).view(np.uint8), in_token_order(prompt))


def test_more_visual_tokens_than_announced_rows_are_refused():
    prompt = prompt_of("i" * 8, 24, 3, ml_dtypes.bfloat16)
    pool, local = filled_pool(prompt, 2)
    incoming = IncomingPrompt(pool, 8, 7, [IMAGE])
    first, second = (BlockCopy(write.checksum, write.num_bytes) for write in local.writes)
    assert incoming.copy_out(0, 0, first) == first
    with pytest.raises(ValueError, match="more visual tokens than the 7 rows"):
        incoming.copy_out(1, 1, second)


def test_memory_is_used_again_only_when_nothing_refers_to_it():
    memory = HostMemory()
    size = 1 << 16
    first = memory.take(size)
    place = first.ctypes.data
    device = jax.device_put(first.view(np.float32).reshape(128, -1))
    assert device.unsafe_buffer_pointer() == place  # a CPU takes aligned memory as it is: that is the danger
    doubled = jax.jit(lambda x: x * 2)(device)
    del first
    second = memory.take(size)
    assert second.ctypes.data != place
    doubled.block_until_ready()
    del device
    gc.collect()  # JAX gives references back when Python collects
    third = memory.take(size)
    assert third.ctypes.data == place
    kept = third[100:200].view(np.int32)
    del third
    assert memory.take(size).ctypes.data != place  # a view of it is alive
    del kept
    assert memory.take(size + 4096).ctypes.data != place


@pytest.mark.parametrize("count", [1, 7, 1000, 3001])
def test_rows_through_pinned_memory_as_on_an_accelerator(count):
    width = 2048
    rows = jax.random.normal(jax.random.key(count), (count, width), jnp.float32)
    step = steps_of(rows.shape, rows.dtype)
    assert step == min(count, 256)
    host = HostRows(rows, in_place=False)
    expected = np.asarray(rows).view(np.uint8)
    for start, stop in ((0, count), (count // 3, count), (count // 2, count // 2 + 1)):
        read = list(host.read(start, stop))
        assert all(len(part) <= step for part in read)
        np.testing.assert_array_equal(np.concatenate(read), expected[start:stop])

    filled = HostMemory().take(rows.nbytes).view(np.float32).reshape(rows.shape)
    device = DeviceRows(filled, in_place=False)
    for ready in (0, count // 2, count):
        filled[:ready] = np.asarray(rows)[:ready]
        device.send(ready)
    np.testing.assert_array_equal(np.asarray(device.finish()), np.asarray(rows))
    assert device.finish().unsafe_buffer_pointer() != filled.ctypes.data
