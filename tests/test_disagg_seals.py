"""Seals of token blocks: what fits, what doesn't, and what is hidden; and blocks with a key between real nodes."""

import hmac

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from deepstack_jax.disagg.encode.bridge import SendBridge
from deepstack_jax.disagg.language.bridge import ReceiveBridge
from deepstack_jax.disagg.language.incoming import BlockCopy
from deepstack_jax.disagg.transports.mooncake import MooncakeTransport
from deepstack_jax.disagg.wire.buffers import MultimodalDataBuffers
from deepstack_jax.disagg.wire.layout import checksum
from deepstack_jax.disagg.wire.seals import BlockSeal, Purpose
from tests.bridge_cases import IMAGE, VIDEO, WAIT_S, arrived_rows, make_request, send

KEY = bytes(range(32))
PURPOSE = Purpose("request", 3, 7)
ROWS = np.random.default_rng(5).integers(0, 256, (300, 2048), np.uint8)  # several parts
IDS = np.arange(12, dtype=np.int32)


def sealed(encrypts: bool, seal: BlockSeal | None = None) -> tuple[bytes, list[np.ndarray]]:
    sources = [IDS, ROWS[:0], ROWS]
    wire = [np.empty_like(each) for each in sources]
    seal = seal or BlockSeal(KEY, encrypts)
    return seal.seal(PURPOSE, 4, 9, zip(sources, wire, strict=True)), wire


def opened(seal: BlockSeal, wire: list[np.ndarray], proof: bytes, purpose=PURPOSE, token_block=4, pool_block=9) -> bool:
    targets = [np.empty_like(each) for each in wire]
    arrived = [each.copy() for each in wire]
    fits = seal.open(purpose, token_block, pool_block, list(zip(arrived, targets, strict=True)), proof) == proof
    if seal.has_key:
        assert not any(each.any() for each in arrived)  # it is wiped whether it fits or not
    if fits:
        np.testing.assert_array_equal(targets[0], IDS)
        np.testing.assert_array_equal(targets[2], ROWS)
    return fits


@pytest.mark.parametrize("encrypts", [False, True])
def test_a_seal_fits_the_block_and_the_purpose_that_it_was_made_for(encrypts: bool):
    proof, wire = sealed(encrypts)
    peer = BlockSeal(KEY, encrypts)
    assert opened(peer, wire, proof)
    assert opened(peer, wire, proof)  # a repeated message is opened again
    other = {"token_block": 5}, {"pool_block": 8}, *({"purpose": PURPOSE._replace(**change)} for change in CHANGES)
    for change in other:
        assert not opened(peer, wire, proof, **change), change
    for place in range(len(proof)):
        changed = bytearray(proof)
        changed[place] ^= 1
        assert not opened(peer, wire, bytes(changed)), place
    for bad in (b"", proof[:-1], proof + b"\0", bytes(8)):
        assert not opened(peer, wire, bad + b"?" * (not bad))
    for part, place in ((0, 3), (2, (0, 0)), (2, (299, 2047))):
        wire[part][place] ^= 1
        assert not opened(peer, wire, proof)
        wire[part][place] ^= 1
    assert not opened(BlockSeal(bytes(32), encrypts), wire, proof)
    assert not opened(BlockSeal(KEY, not encrypts), wire, proof)


CHANGES = {"request_id": "another"}, {"attempt": 2}, {"round": 8}


def test_the_cipher_is_aes_gcm_and_no_nonce_comes_twice_under_a_key():
    """The reference takes the whole block at once, from the derivation in the module's documentation."""
    seal = BlockSeal(KEY, encrypts=True)
    proofs = [sealed(True, seal) for _ in range(3)]
    for number, (proof, wire) in enumerate(proofs):
        salt, counter, tag = proof[:16], proof[16:24], proof[24:]
        assert int.from_bytes(counter, "big") == number
        key = hmac.digest(KEY, b"deepstack-jax blocks, encrypted" + salt, "sha256")
        header = b"\x93\x93\xa7request\x03\x07\x04\x09"  # msgpack of [["request", 3, 7], 4, 9]
        text = AESGCM(key).decrypt(bytes(4) + counter, b"".join(each.tobytes() for each in wire) + tag, header)
        assert text == IDS.tobytes() + ROWS.tobytes()
    assert len({proof[:24] for proof, _ in proofs} | {sealed(True)[0][:24] for _ in range(3)}) == 6
    assert not np.array_equal(proofs[0][1][2], proofs[1][1][2])


def test_without_a_key_it_is_the_checksum():
    proof, wire = sealed(False, BlockSeal())
    assert proof == checksum([IDS, ROWS])
    assert opened(BlockSeal(), wire, proof)


@pytest.mark.parametrize(("key", "encrypts"), [(b"", True), (bytes(31), False), (bytes(33), True)])
def test_keys_of_other_lengths_are_refused(key: bytes, encrypts: bool):
    with pytest.raises(ValueError, match="block key"):
        BlockSeal(key, encrypts)


@pytest.mark.parametrize("encrypts", [False, True])
def test_rows_cross_with_a_key_and_are_wiped_from_the_pool(encrypts: bool):
    request = make_request("tt" + "i" * 9 + "t", 24, 3, np.float32)
    pool = MultimodalDataBuffers(4, 4, 24, 3, np.float32)
    here, there = MooncakeTransport("127.0.0.1"), MooncakeTransport("127.0.0.1")
    bridge = SendBridge(here, there.session, pool.layout, seal=BlockSeal(KEY, encrypts))
    receive, seal = ReceiveBridge(there, pool), BlockSeal(KEY, encrypts)
    incoming = receive.expect(request.fill_ids, request.mrope_positions, [IMAGE, VIDEO])
    writes = send(bridge, request, [(0, 2), (1, 0), (2, 3)])
    clear = request.fill_ids[:4].tobytes() == pool.arrays[1][2].tobytes()
    assert clear is not encrypts
    for write in writes:
        expected = BlockCopy(write.checksum, write.num_bytes)
        blocks = write.token_block, write.pool_block
        stranger = receive.copy_out(incoming, *blocks, expected._replace(checksum=bytes(40)), seal).result(WAIT_S)
        assert stranger.checksum != bytes(40)  # it does not count, and it was wiped: the block is sent again
        (again,) = send(bridge, request, [blocks])
        expected = BlockCopy(again.checksum, again.num_bytes)
        assert receive.copy_out(incoming, *blocks, expected, seal).result(WAIT_S) == expected
        send(bridge, request, [blocks])  # once more than needed: it is wiped too
        assert receive.copy_out(incoming, *blocks, expected, seal).result(WAIT_S) == expected
    assert encrypts or not bridge._ring.any()  # nor is anything left where it was sent from
    assert request.rows is not None
    sent = np.concatenate([np.asarray(rows) for rows in request.rows if rows is not None], 1)
    np.testing.assert_array_equal(arrived_rows(incoming), sent.view(np.uint8))
    assert not any(array.any() for array in pool.arrays)
    bridge.close()
    receive.close()
    for transport in (here, there):
        transport.close()
