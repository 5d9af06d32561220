"""Rows through Mooncake between two processes: every byte arrives, every fault is detected, no memory is shared."""

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
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
from deepstack_jax.disagg.encode.outgoing import OutgoingRequest
from deepstack_jax.disagg.language.incoming import BlockCopy
from deepstack_jax.disagg.transports import TransferError, Transport, WriteSegment, mooncake
from deepstack_jax.disagg.transports.mooncake import MooncakeTransport
from deepstack_jax.disagg.wire.device_rows import HostMemory, HostRows, rows_per_step, to_device
from deepstack_jax.models.vision import VisualRows
from deepstack_jax.rounding import cdiv
from tests.bridge_cases import (
    WAIT_S,
    arrived_rows,
    expected_by,
    in_token_order,
    incoming_for,
    make_request,
    send,
)
from tests.bridge_peer import Peer, peer
from tests.cases import side_by_side
from tests.faults import Fault, FaultyTransport, random_faults
from tests.waiting import until


@pytest.fixture(scope="module")
def transport() -> Iterator[MooncakeTransport]:
    mooncake = MooncakeTransport("127.0.0.1")
    yield mooncake
    mooncake.close()


def as_json(writes: list[BlockWrite]) -> list[tuple[int, int, str, int]]:
    return [(write.token_block, write.pool_block, write.checksum.hex(), write.num_bytes) for write in writes]


def bytes_of(request: OutgoingRequest) -> int:
    return 16 * len(request.fill_ids) + 64 + (0 if request.rows is None else side_by_side(request.rows).nbytes)


KINDS = {
    "one picture over four blocks": "tt" + "i" * 13 + "ttt",
    "runs of odd lengths, a partial last block": "t" + "i" * 3 + "t" + "i" + "tt" + "v" * 5 + "t" + "i" * 7 + "t",
    "text only": "t" * 11,
    "visual to the last token": "i" * 10,
    "one token": "i",
}


@pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize(("dtype", "levels"), [("bfloat16", 3), ("float32", 0)])
@pytest.mark.parametrize("staged", [False, True], ids=["in place", "staged"])
def test_what_arrives_is_what_was_sent(transport, shared_peers, tmp_path, monkeypatch, kinds, dtype, levels, staged):
    monkeypatch.setattr(transport, "needs_registered_sources", staged)  # staged: like rdma
    receiver = shared_peers[dtype]
    request = make_request(kinds, 24, levels, np.dtype(dtype))
    count = cdiv(len(kinds), 4)
    pool_blocks = [5, 6, 2, 3, 0, 7, 1, 4][:count]  # some are adjacent, others are not
    bridge = SendBridge(transport, receiver.session, receiver.layout)
    receiver.command(expect=expected_by(request))

    writes = send(bridge, request, list(enumerate(pool_blocks)))
    assert [write.error for write in writes] == [None] * count
    assert receiver.command(copy_out=as_json(writes)) == [[write.checksum.hex(), write.num_bytes] for write in writes]

    got = receiver.request(tmp_path)
    visual = request.visual_index >= 0
    np.testing.assert_array_equal(got["visual_index"], np.where(visual, visual.cumsum() - 1, -1))
    assert len(got["rows"]) == visual.sum()
    if visual.any():
        np.testing.assert_array_equal(got["rows"], in_token_order(request))
    # only these bytes crossed the wire
    assert bridge.times.num_bytes == sum(write.num_bytes for write in writes) == bytes_of(request)
    bridge.close()


@pytest.fixture(scope="module")
def shared_peers() -> Iterator[dict[str, Peer]]:
    with peer(8, 4, 24, 3, "bfloat16") as bfloat16, peer(8, 4, 24, 0, "float32") as float32:
        yield {"bfloat16": bfloat16, "float32": float32}


def test_adjacent_blocks_of_one_image_are_one_segment_per_buffer(transport, shared_peers):
    receiver = shared_peers["bfloat16"]
    bridge = SendBridge(transport, receiver.session, receiver.layout)
    send(bridge, make_request("i" * 16, 24, 3, ml_dtypes.bfloat16), [(0, 2), (1, 3), (2, 4), (3, 5)])
    assert bridge.times.num_segments == 5
    bridge.close()


def test_many_small_runs_in_a_block_are_packed_into_one_segment(transport, shared_peers, tmp_path):
    receiver = shared_peers["bfloat16"]
    request = make_request("itit", 24, 3, ml_dtypes.bfloat16)
    bridge = SendBridge(transport, receiver.session, receiver.layout)
    send(bridge, request, [(0, 7)])
    assert bridge.times.num_segments == 5
    embeddings = receiver.pool(tmp_path)[0][7].reshape(4, -1)
    np.testing.assert_array_equal(embeddings[:2], side_by_side(request.rows).view(np.uint8)[:, : 24 * 2])
    bridge.close()


def test_rows_of_text_never_cross_the_wire(transport, tmp_path):
    with peer(2, 8, 24, 3, "bfloat16") as receiver:
        bridge = SendBridge(transport, receiver.session, receiver.layout)
        send(bridge, make_request("tttiiittt", 24, 3, ml_dtypes.bfloat16), [(0, 1), (1, 0)])
        pool = receiver.pool(tmp_path)
        for buffer in (0, 4):
            tokens = pool[buffer][1].reshape(8, -1)
            assert (tokens[[0, 1, 2, 6, 7]] == 0xEE).all()
            assert (pool[buffer][0] == 0xEE).all()
        assert (pool[1][0].view(np.int32)[1:] == np.int32(-286331154)).all()  # 0xEEEEEEEE; the block has one token
        assert (pool[3][0] == 0xEE).all()  # only token block 0 carries aux_datas
        bridge.close()


def test_blocks_in_any_order_and_in_several_rounds(transport, tmp_path):
    kinds = "tt" + "i" * 9 + "t" + "v" * 14 + "ttt" + "i" * 3
    request = make_request(kinds, 40, 3, np.float32)
    with peer(2, 4, 40, 3, "float32") as receiver:
        bridge = SendBridge(transport, receiver.session, receiver.layout)
        receiver.command(expect=expected_by(request))
        for round in ([(5, 0), (1, 1)], [(7, 1), (0, 0)], [(2, 0), (3, 1)], [(6, 1), (4, 0)]):
            writes = send(bridge, request, round)
            assert [write.token_block for write in writes] == [token_block for token_block, _ in round]
            receiver.command(copy_out=as_json(writes))
        np.testing.assert_array_equal(receiver.request(tmp_path)["rows"], in_token_order(request))
        assert bridge.times.num_bytes == bytes_of(request)  # nothing twice
        bridge.close()


def test_more_segments_than_the_engine_queues(transport, tmp_path):
    # with every second pool block nothing merges: four segments per block
    count = 700
    with peer(2 * count, 2, 4, 1, "bfloat16") as receiver:
        request = make_request("i" * 2 * count, 4, 1, ml_dtypes.bfloat16)
        bridge = SendBridge(transport, receiver.session, receiver.layout)
        receiver.command(expect=expected_by(request))
        writes = send(bridge, request, [(block, 2 * block) for block in range(count)])
        assert not any(write.error for write in writes)
        assert bridge.times.num_segments == 4 * count + 1 > 2048
        receiver.command(copy_out=as_json(writes))
        np.testing.assert_array_equal(receiver.request(tmp_path)["rows"], in_token_order(request))
        bridge.close()
        # and in one write
        rows = np.arange(3000, dtype=np.int32)
        segments = [WriteSegment(rows.ctypes.data + 4 * n, receiver.layout.ptrs[1] + 8 * n, 4) for n in range(1400)]
        transport.submit(receiver.session, segments * 2).result(WAIT_S)
        ids = receiver.pool(tmp_path)[1].view(np.int32)
        np.testing.assert_array_equal(ids[:1400, 0], rows[:1400])


def test_the_first_and_the_last_writes_are_small():
    """The pipeline fills and drains quickly, whatever the length of the prompt."""
    pool = MultimodalDataBuffers(64, 4, 24, 3, ml_dtypes.bfloat16)
    local = LocalTransport()
    bridge = SendBridge(local, "here", pool.layout, slot_bytes=16 * 4 * 24 * 4 * 2)  # 16 blocks
    send(bridge, make_request("i" * 256, 24, 3, ml_dtypes.bfloat16), [(block, block) for block in range(64)])
    bridge.close()
    block_bytes = 4 * (16 + 4 * 24 * 2)
    blocks = [sum(segment.num_bytes for segment in segments) // block_bytes for segments in local.submitted]
    assert blocks == [4, 8, 13, 9, 7, 5, 4, 4, 4, 4, 2]


def test_rows_live_until_nothing_can_read_them(transport, shared_peers, tmp_path, monkeypatch):
    """They are written in place, so they outlive their request, and a failure for a while."""
    monkeypatch.setattr(bridge_module, "FAILED_WRITE_HOLD_S", 0.5)
    receiver = shared_peers["bfloat16"]
    for fault, fails in ((Fault("delay", 0.3), False), (Fault("fail"), True)):
        bridge = SendBridge(FaultyTransport(transport, [fault]), receiver.session, receiver.layout)
        request = make_request("iiii", 24, 3, ml_dtypes.bfloat16)
        expected, levels = in_token_order(request), np.asarray(request.rows.deepstack)
        memory = HostMemory()
        room = memory.take(levels.nbytes)
        place = room.ctypes.data
        room[...] = levels.view(np.uint8).reshape(-1)
        levels = jax.device_put(room.view(levels.dtype).reshape(levels.shape))  # shares that memory, as on every CPU
        request = replace(request, rows=VisualRows(request.rows.embeds, levels))

        def is_free(memory: HostMemory = memory, place: int = place) -> bool:
            gc.collect()
            return any(room.ctypes.data == place for room in [memory.take(4 * 3 * 24 * 2)])

        ended: list[BlockWrite] = []
        receiver.command(expect=expected_by(request))
        bridge.write(request, [(0, 0)], ended.extend)
        del request, room, levels
        if not fails:
            assert not is_free()
        until(lambda ended=ended: ended, WAIT_S)
        if fails:
            assert not is_free()
            time.sleep(0.6)
            send(bridge, make_request("t", 24, 3, ml_dtypes.bfloat16), [(0, 0)])
        else:
            receiver.command(copy_out=as_json(ended))
            np.testing.assert_array_equal(receiver.request(tmp_path)["rows"], expected)
        until(is_free, WAIT_S)
        bridge.close()


def test_blocks_that_do_not_exist_are_refused_before_anything_is_written(transport, shared_peers):
    receiver = shared_peers["bfloat16"]
    bridge = SendBridge(transport, receiver.session, receiver.layout)
    request = make_request("iiiii", 24, 3, ml_dtypes.bfloat16)
    with pytest.raises(ValueError, match="token block 2 is outside the prompt of 2 blocks"):
        bridge.write(request, [(0, 0), (2, 1)], lambda writes: None)
    with pytest.raises(ValueError, match="block 8 is outside the pool of 8 blocks"):
        bridge.write(request, [(0, 0), (1, 8)], lambda writes: None)
    assert bridge.times.num_segments == 0
    bridge.close()


# failures


def test_each_fault_has_its_declared_effect(transport, tmp_path):
    """Two blocks per fault: the first meets it, and the second does not."""
    kinds = "i" * 8
    request = make_request(kinds, 24, 3, ml_dtypes.bfloat16)
    clean = side_by_side(request.rows).view(np.uint8)
    seconds = 0.3

    def meet(fault: Fault) -> tuple[BlockWrite, BlockWrite, list[bool], float, Peer, list[np.ndarray]]:
        faulty = FaultyTransport(transport, [fault], seed=3)
        bridge = SendBridge(faulty, receiver.session, receiver.layout)
        receiver.command(expect=expected_by(request))
        started = time.perf_counter()
        first = send(bridge, request, [(0, 0)])[0]
        took = time.perf_counter() - started
        second = send(bridge, request, [(1, 1)])[0]
        pool = receiver.pool(tmp_path)
        copies = receiver.command(copy_out=as_json([first, second]))
        right = [
            copy == [write.checksum.hex(), write.num_bytes] for copy, write in zip(copies, (first, second), strict=True)
        ]
        assert faulty.counts[fault.kind] == 1
        assert faulty.counts["none"] == 1
        assert second.error is None
        bridge.close()
        return first, second, right, took, faulty, pool

    with peer(2, 4, 24, 3, "bfloat16") as receiver:
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
        until(lambda: faulty.counts["late landed"] == 1, WAIT_S)
        np.testing.assert_array_equal(receiver.pool(tmp_path)[0][0].reshape(4, -1), clean[:4, : 24 * 2])

        first, _, right, took, _, _ = meet(Fault("delay", seconds))
        assert first.error is None
        assert right == [True, True]
        assert took >= seconds

        first, _, right, _, _, pool = meet(Fault("corrupt"))
        assert first.error is None
        assert right == [False, True]
        sent = [clean[:4, :48], request.fill_ids[:4], request.mrope_positions.T[:4], request.aux_datas, clean[:4, 48:]]
        differing = sum(
            np.unpackbits(buffer[0] ^ np.ascontiguousarray(part).view(np.uint8).reshape(-1)).sum()
            for buffer, part in zip(pool, sent, strict=True)
        )
        assert differing == 1


def test_a_stalled_write_delays_no_other_and_the_bridge_closes(transport, shared_peers):
    receiver = shared_peers["bfloat16"]
    faulty = FaultyTransport(transport, [Fault("stall")])
    bridge = SendBridge(faulty, receiver.session, receiver.layout)
    request = make_request("i" * 16, 24, 3, ml_dtypes.bfloat16)
    stalled: list[BlockWrite] = []
    bridge.write(request, [(0, 0)], stalled.extend)
    assert send(bridge, request, [(1, 1)])[0].error is None
    bridge.close()
    assert stalled == []


def test_random_faults_have_the_requested_rates_and_repeat_with_the_seed():
    rates = {"drop": 0.2, "late": 0.1}
    drawn = [next(faults) for faults in [random_faults(5, rates)] for _ in range(4000)]
    kinds = [fault.kind if fault else "none" for fault in drawn]
    for kind, rate in {**rates, "none": 0.7}.items():
        assert abs(kinds.count(kind) / 4000 - rate) < 0.03  # four standard deviations
    again = random_faults(5, rates)
    assert [next(again) for _ in range(4000)] == drawn
    with pytest.raises(ValueError, match="unknown fault 'burn'"):
        random_faults(0, {"burn": 0.5})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="at most 1"):
        random_faults(0, {"drop": 0.6, "fail": 0.6})


def test_a_peer_killed_during_a_write_is_reported_and_others_continue(transport, shared_peers):
    other = shared_peers["bfloat16"]
    with peer(1, 1 << 14, 1024, 0, "bfloat16") as victim:
        big = np.ones(victim.layout.total_lens[0], np.uint8)
        whole = WriteSegment(big.ctypes.data, victim.layout.ptrs[0], big.nbytes)
        transport.submit(victim.session, [whole]).result(WAIT_S)
        write = transport.submit(victim.session, [whole] * 100)  # 3 GB, which takes at least a second
        time.sleep(0.05)
        assert not write.done()
        victim.process.kill()
        with pytest.raises(TransferError, match=f"to {victim.session} failed"):
            write.result(WAIT_S)
        with pytest.raises(TransferError):  # and later writes fail too
            transport.submit(victim.session, [WriteSegment(big.ctypes.data, victim.layout.ptrs[0], 64)]).result(WAIT_S)
        bridge = SendBridge(transport, other.session, other.layout)
        assert send(bridge, make_request("iiii", 24, 3, ml_dtypes.bfloat16), [(0, 0)])[0].error is None
        bridge.close()


def test_a_write_to_a_stopped_peer_fails(transport, monkeypatch):
    monkeypatch.setenv("MC_TCP_PROGRESS_TIMEOUT_SEC", "1")  # the engine reads it at each write
    with peer(1, 1 << 14, 1024, 1, "bfloat16") as receiver:
        source = np.ones(receiver.layout.total_lens[0], np.uint8)
        whole = WriteSegment(source.ctypes.data, receiver.layout.ptrs[0], source.nbytes)
        transport.submit(receiver.session, [whole]).result(WAIT_S)
        os.kill(receiver.process.pid, signal.SIGSTOP)
        with pytest.raises(TransferError):
            transport.submit(receiver.session, [whole]).result(WAIT_S)


def test_writes_outside_registered_memory_fail_and_damage_nothing(transport, shared_peers, tmp_path):
    receiver = shared_peers["float32"]
    source = np.zeros(4096, np.uint8)
    past_the_end = receiver.layout.ptrs[0] + receiver.layout.total_lens[0] - 64
    with pytest.raises(TransferError):
        transport.submit(receiver.session, [WriteSegment(source.ctypes.data, past_the_end, 4096)]).result(WAIT_S)
    assert (receiver.pool(tmp_path)[0][-1][-64:] != 0).any()
    with pytest.raises(TransferError):
        transport.submit("127.0.0.1:9", [WriteSegment(source.ctypes.data, past_the_end, 64)]).result(WAIT_S)


def test_blocks_no_longer_needed_and_blocks_of_a_closed_bridge_are_skipped(transport, shared_peers):
    receiver = shared_peers["bfloat16"]
    request = make_request("i" * 16, 24, 3, ml_dtypes.bfloat16)
    bridge = SendBridge(transport, receiver.session, receiver.layout)
    ended: list[BlockWrite] = []
    bridge.write(request, [(0, 0), (1, 1)], ended.extend, should_write=lambda: False)
    bridge.close()
    bridge.write(request, [(2, 2)], ended.extend)
    assert [type(write.error) for write in ended] == [WriteSkippedError] * 3
    assert bridge.times.num_bytes == 0


def test_an_encoder_that_failed_fails_its_blocks_and_not_the_bridge(transport, shared_peers):
    receiver = shared_peers["bfloat16"]
    broken = make_request("iiii", 24, 3, ml_dtypes.bfloat16)
    assert broken.rows is not None
    broken.rows.deepstack.delete()
    bridge = SendBridge(transport, receiver.session, receiver.layout)
    assert isinstance(send(bridge, broken, [(0, 0)])[0].error, RuntimeError)
    assert send(bridge, make_request("iiii", 24, 3, ml_dtypes.bfloat16), [(0, 0)])[0].error is None
    bridge.close()


def test_a_slot_is_given_back_once_when_a_checksum_fails_during_its_write(transport, shared_peers, monkeypatch):
    """The write reads the slot until it ends, so only its end may give the slot back."""
    receiver = shared_peers["bfloat16"]
    request = make_request("iiii", 24, 3, ml_dtypes.bfloat16)
    bridge = SendBridge(transport, receiver.session, receiver.layout)
    free = bridge._free.qsize()
    with monkeypatch.context() as patched:
        patched.setattr(bridge._seal, "seal", lambda *_: 1 / 0)
        assert isinstance(send(bridge, request, [(0, 0)])[0].error, ZeroDivisionError)
    until(lambda: bridge._free.qsize() == free)
    assert send(bridge, request, [(0, 0)])[0].error is None
    until(lambda: bridge._free.qsize() == free)
    bridge.close()


def test_a_closed_transport_refuses(shared_peers):
    mooncake = MooncakeTransport("127.0.0.1")
    mooncake.close()
    with pytest.raises(TransferError, match="the transport is closed"):
        mooncake.submit(shared_peers["float32"].session, [WriteSegment(0, 0, 1)]).result(WAIT_S)


def test_thirty_peers_come_and_go_and_leave_no_descriptors(monkeypatch):
    monkeypatch.setattr(mooncake, "IDLE_TIMEOUT_S", 0.2)
    sender, source = MooncakeTransport("127.0.0.1"), np.arange(4096, dtype=np.uint8)

    def descriptors() -> int:
        """Those of this process; the peers are in it too."""
        return len(os.listdir("/proc/self/fd"))

    def come_and_go(count: int) -> None:
        peers = [MooncakeTransport("127.0.0.1") for _ in range(count)]
        pools = [np.zeros(4096, np.uint8) for _ in peers]
        for one, pool in zip(peers, pools, strict=True):
            one.register(pool)
        for one, pool in zip(peers, pools, strict=True):
            segments = [WriteSegment(source.ctypes.data + 64 * i, pool.ctypes.data + 64 * i, 64) for i in range(64)]
            sender.submit(one.session, segments).result(WAIT_S)
        assert all(np.array_equal(pool, source) for pool in pools)
        with ThreadPoolExecutor(count) as pool:
            list(pool.map(MooncakeTransport.close, peers))
        until(lambda: sender.num_engines == 1)

    come_and_go(1)  # the first use opens some for good
    before = descriptors()
    come_and_go(30)
    until(lambda: descriptors() <= before)  # threads that end may take a moment to close theirs
    sender.close()
    assert sender.num_engines == 0


def test_ipv6(tmp_path):
    # the engine uses one address family per process, so this sender has its own process
    code = """if True:
        import sys
        import numpy as np
        from deepstack_jax.disagg.transports.mooncake import MooncakeTransport
        from deepstack_jax.disagg.transports import WriteSegment
        transport = MooncakeTransport("::1")
        source = np.arange(16, dtype=np.int32)
        transport.submit(sys.argv[1], [WriteSegment(source.ctypes.data, int(sys.argv[2]), 64)]).result(20)
        transport.close()
    """
    with peer(2, 4, 24, 3, "bfloat16", host="::1") as receiver:
        assert receiver.session.startswith("[::1]:")
        command = [sys.executable, "-c", code, receiver.session, str(receiver.layout.ptrs[3] + 64)]
        sender = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert sender.returncode == 0, sender.stderr
        np.testing.assert_array_equal(receiver.pool(tmp_path)[3][1].view(np.int32), np.arange(16))


def test_missing_dependencies_are_reported_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "mooncake.engine", None)
    with pytest.raises(TransferError, match=r"Mooncake isn't installed: pip install") as error:
        MooncakeTransport("127.0.0.1")
    assert "\n" not in str(error.value)
    if not Path("/sys/class/infiniband").is_dir():
        with pytest.raises(TransferError, match="this machine has none: use tcp"):
            MooncakeTransport("127.0.0.1", "rdma")


# memory


def filled_pool(
    request: OutgoingRequest, blocks: int, levels: int = 3
) -> tuple[MultimodalDataBuffers, "LocalTransport"]:
    pool = MultimodalDataBuffers(blocks, 4, 24, levels, ml_dtypes.bfloat16)
    local = LocalTransport()
    bridge = SendBridge(local, "here", pool.layout)
    local.writes = send(bridge, request, [(block, block) for block in range(blocks)])
    bridge.close()
    return pool, local


class LocalTransport(Transport):
    """Writes within this process, for tests of the receiving side's memory."""

    writes: list[BlockWrite]
    session = "here"
    needs_registered_sources = False

    def __init__(self):
        self.submitted: list[list[WriteSegment]] = []

    def register(self, memory: np.ndarray) -> None: ...

    def unregister(self, memory: np.ndarray) -> None: ...

    def close(self) -> None: ...

    def submit(self, session, segments):
        import ctypes
        from concurrent.futures import Future

        self.submitted.append(segments)
        for segment in segments:
            ctypes.memmove(segment.destination, segment.source, segment.num_bytes)
        future: Future[None] = Future()
        future.set_result(None)
        return future


def test_copied_blocks_do_not_change_with_the_pool():
    request = make_request("i" * 6 + "tt", 24, 3, ml_dtypes.bfloat16)
    pool, local = filled_pool(request, 2)
    incoming = incoming_for(request, pool)
    for write in reversed(local.writes):
        copy = BlockCopy(write.checksum, write.num_bytes)
        assert incoming.copy_out(write.token_block, write.pool_block, copy) == copy
        for array in pool.arrays:
            array[write.pool_block] = 0
    # a block that has arrived is not read again
    another = BlockCopy(b"another", 1)  # as reported by another encoder, whose rows differ in their last bits
    assert incoming.copy_out(0, 0, another) == another
    first = incoming.take_rows(0)
    assert first is not None
    assert incoming.take_rows(0) is None  # rows are given out once
    incoming.copy_out(0, 0, another)
    assert incoming.take_rows(0) is None
    second = incoming.take_rows(1)
    assert second is not None
    assert all(len(rows) == 4 for part in (first, second) for rows in part)  # whole blocks: one shape for all programs
    expected = in_token_order(request)
    np.testing.assert_array_equal(side_by_side(first).view(np.uint8), expected[:4])
    np.testing.assert_array_equal(side_by_side(second).view(np.uint8)[:2], expected[4:])
    assert not side_by_side(second)[2:].any()


def test_a_damaged_block_does_not_count_and_may_be_sent_again():
    request = make_request("i" * 8, 24, 3, ml_dtypes.bfloat16)
    pool, local = filled_pool(request, 2)
    incoming = incoming_for(request, pool)
    expected = [BlockCopy(write.checksum, write.num_bytes) for write in local.writes]
    for buffer, place in ((4, (0, 3, 71)), (1, (0, 0)), (2, (0, 1, 2)), (3, (0, 5))):
        good = pool.arrays[buffer][place].copy()
        pool.arrays[buffer][place] = good + np.asarray(1, good.dtype) if buffer != 4 else -good
        assert incoming.copy_out(0, 0, expected[0]) != expected[0]
        pool.arrays[buffer][place] = good
    assert incoming.copy_out(1, 1, expected[1]) == expected[1]
    assert incoming.take_rows(0) is None
    assert incoming.copy_out(0, 0, expected[0]) == expected[0]
    np.testing.assert_array_equal(arrived_rows(incoming), in_token_order(request))


@pytest.mark.parametrize("what", ["ids", "positions"])
def test_blocks_that_contradict_the_prompt_are_refused(what: str):
    request = make_request("ttii" + "i" * 4, 24, 3, ml_dtypes.bfloat16)
    pool, local = filled_pool(request, 2)
    announced = {"fill_ids": request.fill_ids.copy(), "mrope_positions": request.mrope_positions.copy()}
    announced["fill_ids" if what == "ids" else "mrope_positions"][..., 1] += 1
    incoming = incoming_for(replace(request, **announced), pool)
    first, second = (BlockCopy(write.checksum, write.num_bytes) for write in local.writes)
    with pytest.raises(ValueError, match="the ids or positions of token block 0 contradict the prompt"):
        incoming.copy_out(0, 0, first)
    assert incoming.take_rows(0) is None
    assert incoming.copy_out(1, 1, second) == second


def test_rows_are_added_image_by_image_and_missing_ones_are_never_sent():
    whole = make_request("tiii" + "iiit" + "vvvv", 24, 3, ml_dtypes.bfloat16)
    rows = whole.rows
    assert rows is not None
    request = replace(whole, rows=None)

    def add(first: int, stop: int) -> None:
        """With rows of padding, as an encoder's bucket has."""
        request.add_rows(first, stop - first, VisualRows(*(jnp.pad(x[first:stop], [(0, 3), (0, 0)]) for x in rows)))

    pool = MultimodalDataBuffers(3, 4, 24, 3, ml_dtypes.bfloat16)
    bridge = SendBridge(LocalTransport(), "here", pool.layout)
    add(6, 10)
    add(0, 2)
    assert isinstance(send(bridge, request, [(0, 0)])[0].error, ValueError)  # the third row is missing
    add(2, 6)
    incoming = incoming_for(whole, pool)
    for write in send(bridge, request, [(2, 2), (0, 0), (1, 1)]):
        copy = BlockCopy(write.checksum, write.num_bytes)
        assert incoming.copy_out(write.token_block, write.pool_block, copy) == copy
    bridge.close()
    np.testing.assert_array_equal(arrived_rows(incoming), in_token_order(whole))


def test_memory_is_reused_only_when_nothing_refers_to_it():
    memory = HostMemory()
    size = 1 << 16
    first = memory.take(size)
    place = first.ctypes.data
    device = jax.device_put(first.view(np.float32).reshape(128, -1))
    assert device.unsafe_buffer_pointer() == place  # a CPU uses aligned memory in place, which makes reuse dangerous
    doubled = jax.jit(lambda x: x * 2)(device)
    del first
    second = memory.take(size)
    assert second.ctypes.data != place
    doubled.block_until_ready()
    del device
    gc.collect()  # JAX releases references when Python collects garbage
    third = memory.take(size)
    assert third.ctypes.data == place
    kept = third[100:200].view(np.int32)
    del third
    assert memory.take(size).ctypes.data != place  # a view of it exists
    del kept
    assert memory.take(size + 4096).ctypes.data != place


@pytest.mark.parametrize("count", [1, 7, 1000, 3001])
def test_rows_through_pinned_memory_as_on_an_accelerator(count):
    width = 2048
    rows = jax.random.normal(jax.random.key(count), (count, width), jnp.float32)
    step = rows_per_step(rows.shape, rows.dtype)
    assert step == min(count, 256)
    host = HostRows(rows, in_place=False)
    expected = np.asarray(rows).view(np.uint8)
    for start, stop in ((0, count), (count // 3, count), (count // 2, count // 2 + 1)):
        read = list(host.read(start, stop))
        assert all(len(part) <= step for part in read)
        np.testing.assert_array_equal(np.concatenate(read), expected[start:stop])

    filled = HostMemory().take(rows.nbytes).view(np.float32).reshape(rows.shape)
    filled[...] = np.asarray(rows)
    device = to_device(filled, in_place=False)
    np.testing.assert_array_equal(np.asarray(device), np.asarray(rows))
    assert device.unsafe_buffer_pointer() != filled.ctypes.data
    assert not filled.flags.writeable
