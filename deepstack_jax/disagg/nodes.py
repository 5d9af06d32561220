"""Builds either side of the split from a loaded model and addresses."""

import socket
from collections.abc import Sequence
from typing import Any

import jax

from deepstack_jax.checkpoint import Model
from deepstack_jax.config import ModelConfig
from deepstack_jax.disagg.encode.server import MAX_PEERS, EncodeServer, new_incarnation
from deepstack_jax.disagg.encode.worker import EncodeWorker
from deepstack_jax.disagg.keys.files import Key
from deepstack_jax.disagg.language.bridge import ReceiveBridge
from deepstack_jax.disagg.language.encoder_pool import EncoderPool
from deepstack_jax.disagg.language.pending import ReceiverSettings
from deepstack_jax.disagg.transports import Transport, open_transport
from deepstack_jax.disagg.wire.buffers import MultimodalDataBuffers
from deepstack_jax.disagg.wire.control import Listener
from deepstack_jax.disagg.wire.identity import identity_of
from deepstack_jax.disagg.wire.messages import MAX_LIST, Hello
from deepstack_jax.disagg.wire.seals import check_installed
from deepstack_jax.processing.preparation import Preparation
from deepstack_jax.sharding import replicated

BLOCK_SIZE = 128  # tokens per block; all nodes of a cluster must agree
POOL_BYTES = 256 << 20  # size of a language node's receive pool, unless `num_blocks` is given
DEFAULT_TRANSPORT = "mooncake+tcp://127.0.0.1"


def open_encode_server(
    model: Model,
    *,
    endpoint: str = "tcp://127.0.0.1:*",
    key: Key | None = None,
    block_size: int = BLOCK_SIZE,
    cache_bytes: int = 1 << 30,
    max_peers: int = MAX_PEERS,
    encrypt_blocks: bool = False,
    transport: Transport | str = DEFAULT_TRANSPORT,
    preparation: Preparation | None = None,
) -> EncodeServer:
    """Returns an encode server for `model`, which needs only its vision parameters.

    Args:
        endpoint: tcp://host:port of the control socket; the port may be `*`.
        key: the cluster's or the node's own; required unless the endpoint is loopback.
        block_size: tokens per block.
        cache_bytes: limit of the row cache on the device.
        max_peers: language nodes that may be connected at once.
        encrypt_blocks: whether rows are encrypted on their way, which needs a key; all nodes must agree.
        transport: the transport that carries rows, or its URL with the host under which other nodes reach this one.
        preparation: decodes images and videos; without, threads of this process do.

    Raises:
        ValueError, TransferError: an argument can't be used; the message names the remedy.
    """
    _check_encryption(encrypt_blocks, key)
    hello = Hello(
        role="encode",
        node_id=_node_id(),
        incarnation=new_incarnation(),
        encrypt_blocks=encrypt_blocks,
        **_model_fields(model, block_size),
    )
    listener = Listener(endpoint, key)
    try:
        opened = open_transport(transport) if isinstance(transport, str) else transport
    except Exception:
        listener.close()
        raise
    worker = EncodeWorker(model, cache_bytes)
    return EncodeServer(model, hello, listener, opened, worker, preparation or Preparation(), max_peers)


def open_encoder_pool(
    model: Model,
    encoders: Sequence[str],
    *,
    key: Key | None = None,
    block_size: int = BLOCK_SIZE,
    num_blocks: int | None = None,
    share: int | None = None,
    http_url: str = "",
    transfer_timeout: float = 30.0,
    encrypt_blocks: bool = False,
    transport: Transport | str = DEFAULT_TRANSPORT,
) -> EncoderPool:
    """Returns the encode nodes that a language node with `model` uses, not yet connected.

    Args:
        encoders: tcp://host:port of each encode node's control socket.
        key, block_size, encrypt_blocks, transport: as for `open_encode_server`.
        num_blocks: blocks in the receive pool; None takes as many as fit in POOL_BYTES.
        share: maximum blocks that one request holds at once; None takes a quarter of the receive pool.
        http_url: URL of this node's HTTP server, to which encode nodes forward their requests.
        transfer_timeout: seconds without progress after which a transfer is abandoned.

    Raises:
        ValueError, TransferError: an argument can't be used; the message names the remedy.
    """
    _check_encryption(encrypt_blocks, key)
    config = model.config
    width, levels = config.text.hidden_size, config.num_deepstack_levels
    model_fields = _model_fields(model, block_size)
    row_bytes = block_size * width * (1 + levels) * model.dtype.itemsize
    num_blocks = num_blocks or min(MAX_LIST, max(1, POOL_BYTES // row_bytes))
    pool = MultimodalDataBuffers(num_blocks, block_size, width, levels, model.dtype)
    settings = ReceiverSettings(
        num_blocks,
        block_size,
        share=min(num_blocks, share or max(1, num_blocks // 4)),
        max_tokens=config.text.max_position_embeddings,
        transfer_timeout=transfer_timeout,
        encodes_locally=bool(model.vision_params),
    )
    opened = open_transport(transport) if isinstance(transport, str) else transport
    ptrs, total_lens, item_lens = (tuple(sizes) for sizes in pool.get_buf_infos())
    hello = Hello(
        role="language",
        node_id=_node_id(),
        incarnation=new_incarnation(),
        session=opened.session,
        ptrs=ptrs,
        total_lens=total_lens,
        item_lens=item_lens,
        http_url=http_url,
        encrypt_blocks=encrypt_blocks,
        **model_fields,
    )
    # an engine of several processes sends rows to the others from the host
    where = replicated(model.mesh) if jax.process_count() == 1 else None
    return EncoderPool(config, hello, ReceiveBridge(opened, pool, where), opened, settings, encoders, key)


def _check_encryption(encrypt_blocks: bool, key: Key | None) -> None:
    if encrypt_blocks and key is None:
        raise ValueError("encrypted blocks need a key: give --key")
    if key is not None:
        check_installed()


def _model_fields(model: Model, block_size: int) -> dict[str, Any]:
    """The fields of a Hello that describe the model; both sides must agree on them."""
    config: ModelConfig = model.config
    if config.vision is None:
        raise ValueError(f"{config.model_type} is a text-only model and can't be split: serve it as unified")
    return {
        "model": identity_of(model),
        "dtype": model.dtype.name,
        "hidden_size": config.text.hidden_size,
        "num_deepstack_embeddings": config.num_deepstack_levels,
        "block_size": block_size,
    }


def _node_id() -> str:
    """A name for people to read. Only the incarnation identifies a node."""
    name = "".join(character for character in socket.gethostname() if "!" <= character <= "~" and character != "/")
    return name[:64] or "node"
