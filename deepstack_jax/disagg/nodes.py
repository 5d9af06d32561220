"""Puts the two sides of the split together: a loaded model and addresses in, a server or its counterpart out."""

import socket
from collections.abc import Sequence
from typing import Any

from deepstack_jax.checkpoint import Model
from deepstack_jax.config import ModelConfig
from deepstack_jax.disagg.encode.server import EncodeServer, new_incarnation
from deepstack_jax.disagg.encode.worker import EncodeWorker
from deepstack_jax.disagg.language.bridge import ReceiveBridge
from deepstack_jax.disagg.language.encoders import EncoderLinks
from deepstack_jax.disagg.language.receiver import ReceiverSettings
from deepstack_jax.disagg.transports import Transport, open_transport
from deepstack_jax.disagg.wire.buffers import MultimodalDataBuffers
from deepstack_jax.disagg.wire.control import ClusterKey, Listener
from deepstack_jax.disagg.wire.identity import identity_of
from deepstack_jax.disagg.wire.messages import MAX_LIST, Hello

BLOCK_SIZE = 128  # tokens; the same on all nodes of a cluster
POOL_BYTES = 256 << 20  # of a language node's pool, if nothing else is asked for
DEFAULT_TRANSPORT = "mooncake+tcp://127.0.0.1"


def open_encode_server(
    model: Model,
    *,
    endpoint: str = "tcp://127.0.0.1:*",
    key: ClusterKey | None = None,
    block_size: int = BLOCK_SIZE,
    cache_bytes: int = 1 << 30,
    transport: Transport | str = DEFAULT_TRANSPORT,
) -> EncodeServer:
    """An encode server of `model`, which needs only its vision parameters.

    Args:
        endpoint: of the control socket, tcp://host:port; the port may be `*`.
        key: the cluster's; required where the endpoint isn't loopback.
        block_size: tokens.
        cache_bytes: most that the cache of rows takes on the device.
        transport: what carries rows, or the URL of one, with the host under which other nodes reach it.

    Raises:
        ValueError, TransferError: what can't be used, with the remedy.
    """
    hello = Hello(role="encode", node_id=_node_id(), incarnation=new_incarnation(), **_said(model, block_size))
    listener = Listener(endpoint, key)
    try:
        carrier = open_transport(transport) if isinstance(transport, str) else transport
    except Exception:
        listener.close()
        raise
    return EncodeServer(model, hello, listener, carrier, EncodeWorker(model, cache_bytes))


def open_encoder_links(
    model: Model,
    encoders: Sequence[str],
    *,
    key: ClusterKey | None = None,
    block_size: int = BLOCK_SIZE,
    num_blocks: int | None = None,
    share: int | None = None,
    http_url: str = "",
    transfer_timeout: float = 30.0,
    transport: Transport | str = DEFAULT_TRANSPORT,
) -> EncoderLinks:
    """The links of a language node with `model` to encode nodes' control endpoints.

    Args:
        encoders: tcp://host:port of each.
        key, block_size, transport: as of `open_encode_server`.
        num_blocks: of the pool; None takes as many as fit POOL_BYTES.
        share: most blocks that a request gets at once; None takes a quarter of the pool.
        http_url: where this node takes requests, for encode nodes that pass theirs on.
        transfer_timeout: seconds without progress after which a transfer is given up.

    Raises:
        ValueError, TransferError: what can't be used, with the remedy.
    """
    config = model.config
    width, levels = config.text.hidden_size, config.num_deepstack_levels
    said = _said(model, block_size)
    row_bytes = block_size * width * (1 + levels) * model.dtype.itemsize
    num_blocks = num_blocks or min(MAX_LIST, max(1, POOL_BYTES // row_bytes))
    pool = MultimodalDataBuffers(num_blocks, block_size, width, levels, model.dtype)
    settings = ReceiverSettings(
        num_blocks,
        block_size,
        share=min(num_blocks, share or max(1, num_blocks // 4)),
        max_tokens=config.text.max_position_embeddings,
        transfer_timeout=transfer_timeout,
        encodes_here=bool(model.vision_params),
    )
    carrier = open_transport(transport) if isinstance(transport, str) else transport
    ptrs, total_lens, item_lens = (tuple(sizes) for sizes in pool.get_buf_infos())
    hello = Hello(
        role="language",
        node_id=_node_id(),
        incarnation=new_incarnation(),
        session=carrier.session,
        ptrs=ptrs,
        total_lens=total_lens,
        item_lens=item_lens,
        http_url=http_url,
        **said,
    )
    return EncoderLinks(config, hello, ReceiveBridge(carrier, pool), carrier, settings, encoders, key)


def _said(model: Model, block_size: int) -> dict[str, Any]:
    """What both sides say of the model, and have to agree on."""
    config: ModelConfig = model.config
    if config.vision is None:
        raise ValueError(f"{config.model_type} is a text model, which has nothing to split: serve it as unified")
    return {
        "model": identity_of(model),
        "dtype": model.dtype.name,
        "hidden_size": config.text.hidden_size,
        "num_deepstack_embeddings": config.num_deepstack_levels,
        "block_size": block_size,
    }


def _node_id() -> str:
    """A name for people; what tells nodes apart is the incarnation."""
    name = "".join(character for character in socket.gethostname() if "!" <= character <= "~" and character != "/")
    return name[:64] or "node"
