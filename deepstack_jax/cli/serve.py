"""`deepstack-jax serve`: a node that answers over HTTP."""

import os
import socket
import ssl
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal
from urllib.parse import quote

import typer

from deepstack_jax.bundled import existing_checkpoint
from deepstack_jax.cli.http_server import Tls, bind, in_thread, in_url, is_loopback, serve_node, trusted
from deepstack_jax.cli.mesh import Coordinator, MeshShape, NumProcesses, ProcessId, open_mesh
from deepstack_jax.errors import one_line

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from deepstack_jax.checkpoint import Model
    from deepstack_jax.disagg.keys.files import Key
    from deepstack_jax.disagg.keys.revocations import Revocations
    from deepstack_jax.disagg.language.encoder_pool import EncoderPool
    from deepstack_jax.engine.core import Engine
    from deepstack_jax.engine.options import EngineOptions
    from deepstack_jax.processing.preparation import Preparation
    from deepstack_jax.serving.access import Keys
    from deepstack_jax.serving.endpoint import Node
    from deepstack_jax.serving.policy import MediaPolicy

Role = Literal["unified", "encode", "language"]


def _above_zero(value: float) -> float:
    if not value > 0:  # NaN isn't above 0 either
        raise typer.BadParameter(f"{value:g} is not above 0")
    return value


def run(
    checkpoint: Annotated[Path, typer.Argument(help="converted or Hugging Face directory")],
    role: Annotated[Role, typer.Option(help="the whole model, or one side of the split")] = "unified",
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one")] = 8000,
    encoder: Annotated[
        list[str] | None, typer.Option(help="language node: the control address of an encode node, tcp://host:port")
    ] = None,
    control: Annotated[
        str, typer.Option(help="encode node: where its control socket listens; * takes a free port")
    ] = "tcp://127.0.0.1:*",
    key: Annotated[
        Path | None,
        typer.Option(
            help="key file of the cluster or of this node, made with deepstack-jax keygen; on loopback, this user's"
        ),
    ] = None,
    revoked: Annotated[
        Path | None,
        typer.Option(help="names or serials of nodes that are shut out, one per line; a changed file is read again"),
    ] = None,
    max_peers: Annotated[int, typer.Option(min=1, help="encode node: language nodes that may connect")] = 16,
    node_address: Annotated[
        str | None, typer.Option(help="address under which other nodes reach this one; --host by default")
    ] = None,
    protocol: Annotated[Literal["tcp", "rdma"], typer.Option(help="transport of the rows")] = "tcp",
    device: Annotated[str, typer.Option(help="RDMA devices, separated by commas; all by default")] = "",
    block_size: Annotated[int, typer.Option(min=1, help="tokens per block; the same on all nodes")] = 128,
    pool_blocks: Annotated[
        int | None, typer.Option(min=1, help="language node: receive blocks; as many as 256 MB hold by default")
    ] = None,
    encrypt_blocks: Annotated[
        bool, typer.Option("--encrypt-blocks", help="encrypt rows on their way; the same on all nodes")
    ] = False,
    cache_bytes: Annotated[
        int, typer.Option(min=0, help="encode node: bytes of rows that are kept for repeated images")
    ] = 1 << 30,
    encode_here: Annotated[
        bool, typer.Option(help="language node: load the vision weights too, and encode if no encoder is left")
    ] = False,
    allow_domain: Annotated[
        list[str] | None, typer.Option(help="fetch media from here: example.org, '*.example.org', '*'; none by default")
    ] = None,
    allow_folder: Annotated[Path | None, typer.Option(help="read media from this folder; none by default")] = None,
    allow_network: Annotated[
        list[str] | None, typer.Option(help="allowed domains may have addresses in this private network: 10.1.2.0/24")
    ] = None,
    allow_port: Annotated[list[int] | None, typer.Option(help="ports of URLs; 80 and 443 by default")] = None,
    max_bytes: Annotated[int, typer.Option(min=1, help="encoded size of a request's media")] = 32 << 20,
    max_pixels: Annotated[int, typer.Option(min=1, help="pixels of a request's images")] = 64 << 20,
    max_frames: Annotated[int, typer.Option(min=1, help="frames of a request's videos, sampled or not")] = 7200,
    max_seconds: Annotated[float, typer.Option(callback=_above_zero, help="length of a request's videos")] = 600.0,
    max_decoded_pixels: Annotated[
        int,
        typer.Option(min=1, help="pixels of all frames of a request's videos; about two minutes of 1080p by default"),
    ] = 8_000_000_000,
    decoders: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="processes that decode media, one of them only small pictures; one more than CPUs, at most 5, "
            "by default; 0 decodes in the server",
        ),
    ] = None,
    max_items: Annotated[int, typer.Option(min=1, help="images and videos per request")] = 32,
    url_timeout: Annotated[
        float, typer.Option(callback=_above_zero, help="seconds per URL, redirects included")
    ] = 20.0,
    timeout: Annotated[float, typer.Option(min=0.1, help="seconds from a request to its last token")] = 600.0,
    max_waiting: Annotated[int, typer.Option(min=1, help="requests that wait for a slot; more get a 503")] = 64,
    max_context: Annotated[
        int | None, typer.Option(min=2, help="tokens of prompt and answer; the model's own limit by default")
    ] = None,
    slots: Annotated[
        int | None, typer.Option(min=1, help="requests that run at once; 4 on CPU, 32 on a chip by default")
    ] = None,
    chunk: Annotated[
        int | None, typer.Option(min=128, help="tokens of a prefill chunk; 512 on CPU, 1024 on a chip by default")
    ] = None,
    kv_bytes: Annotated[
        int | None,
        typer.Option(
            min=1, help="memory for KV pages; by default 1 GiB on CPU, and on a chip 80% of what weights leave"
        ),
    ] = None,
    decode_steps: Annotated[
        int, typer.Option(min=1, max=64, help="steps of a decode call: tokens per stream between two events")
    ] = 8,
    decode_widths: Annotated[
        str | None,
        typer.Option(help="more widths, such as 1,8: faster if few requests run, but bits then depend on how many do"),
    ] = None,
    prefix_cache: Annotated[
        bool, typer.Option(help="keep the KV pages of prompts for later ones with the same beginning")
    ] = True,
    warm_up: Annotated[bool, typer.Option(help="compile every language program before the server is ready")] = True,
    grace: Annotated[float, typer.Option(min=0, help="seconds for running requests to finish after SIGTERM")] = 20.0,
    api_key: Annotated[
        list[str] | None, typer.Option(help="a key that clients must send; better in DEEPSTACK_JAX_API_KEY")
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="hashes of more keys, made with deepstack-jax keygen; SIGHUP reloads them")
    ] = None,
    admin_key: Annotated[
        str | None, typer.Option(help="the key of /drain and /server_info; better in DEEPSTACK_JAX_ADMIN_KEY")
    ] = None,
    no_auth: Annotated[
        bool, typer.Option("--no-auth", help="let anybody in whom --host lets reach the server")
    ] = False,
    requests_per_minute: Annotated[int | None, typer.Option(min=1, help="per key; no limit by default")] = None,
    tokens_per_minute: Annotated[
        int | None, typer.Option(min=1, help="of prompts and answers, per key; no limit by default")
    ] = None,
    concurrent_requests: Annotated[int | None, typer.Option(min=1, help="per key; no limit by default")] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(help="a name under which clients reach the server, '*' for any; addresses need none"),
    ] = None,
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="a site whose pages may call: https://example.org, or '*'")
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="certificate chain in PEM: serves HTTPS")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="key of --tls-cert in PEM")] = None,
    tls_ca: Annotated[
        Path | None, typer.Option(help="encode node: authorities in PEM that language nodes' certificates come from")
    ] = None,
    access_log: Annotated[bool, typer.Option("--access-log", help="log a line for each request")] = False,
    log_json: Annotated[bool, typer.Option("--log-json", help="log JSON objects, and one for each request")] = False,
    research: Annotated[
        bool, typer.Option("--research", help="requests may scale DeepStack levels and look at rows and experts")
    ] = False,
    page: Annotated[bool, typer.Option(help="GET / shows the page in a browser")] = True,
    vllm_metrics: Annotated[bool, typer.Option(help="/metrics also has the names that vLLM gives them")] = True,
    name: Annotated[str | None, typer.Option(help="the model's name; the directory's by default")] = None,
    dtype: Annotated[Literal["float32", "bfloat16"] | None, typer.Option(help="the checkpoint's by default")] = None,
    expert_layout: Annotated[
        Literal["hf4", "hf5"] | None, typer.Option(help="only needed if shapes are ambiguous")
    ] = None,
    mesh: MeshShape = None,
    coordinator: Coordinator = None,
    num_processes: NumProcesses = None,
    process_id: ProcessId = None,
) -> None:
    """Answers over HTTP: OpenAI's API (/v1/chat/completions and others), POST /generate, probes and metrics.

    Without keys, only a loopback address is served. Prints the size of its engine, and one line when it is ready. With
    --coordinator, the same command runs in every process of the mesh, and process 0 speaks HTTP.

    Example: deepstack-jax serve ckpt --port 8000 --allow-domain upload.wikimedia.org
    """
    options = {name: value for name, value in locals().items() if name not in _SECRET}
    try:
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as missing:
        raise ValueError(f"serve needs {missing.name}: pip install 'deepstack-jax[serve]'") from None
    from deepstack_jax.disagg.keys.revocations import Revocations
    from deepstack_jax.serving.policy import MediaPolicy

    existing_checkpoint(checkpoint)
    if allow_folder is not None and not allow_folder.is_dir():
        raise ValueError(f"--allow-folder {allow_folder} is not a directory: give an existing one")
    policy = MediaPolicy(
        allowed_domains=tuple(allow_domain or ()),
        allowed_folder=allow_folder,
        max_bytes=max_bytes,
        max_pixels=max_pixels,
        max_frames=max_frames,
        max_seconds=max_seconds,
        max_decoded_pixels=max_decoded_pixels,
        max_items=max_items,
        timeout=url_timeout,
        allowed_networks=tuple(allow_network or ()),
        allowed_ports=tuple(allow_port or (80, 443)),
    )
    from deepstack_jax.engine.options import EngineOptions
    from deepstack_jax.processes import is_first

    engine = EngineOptions(slots, chunk, kv_bytes, decode_steps, prefix_cache, _widths(decode_widths), research)
    if coordinator is not None and role == "encode":
        raise ValueError("--role encode runs in one process: leave out --coordinator, and start more encode nodes")
    split = SplitOptions(
        tuple(encoder or ()),
        control,
        key,
        Revocations(revoked),
        node_address or host,
        protocol,
        device,
        block_size,
        pool_blocks,
        cache_bytes,
        max_peers,
        encrypt_blocks,
        encode_here,
        trusted(tls_ca),
    )
    node_key = _check_split(role, split)
    placed = open_mesh(mesh, coordinator, num_processes, process_id)
    engine.shape(placed)  # refuses impossible sizes before the weights are read
    limits = NodeLimits(max_waiting, max_context, engine, warm_up)
    if not is_first():  # another process of the mesh speaks HTTP
        _follow(_load(role, checkpoint, dtype, expert_layout, encode_here, placed), limits)
        return
    with bind(host, port) as listener:  # before the weights are read, so that a port in use is an error at once
        from deepstack_jax.serving.access import Access, Keys
        from deepstack_jax.serving.hosts import HostRule
        from deepstack_jax.serving.http import create_app
        from deepstack_jax.serving.limits import Limits
        from deepstack_jax.serving.logs import configure_logging

        keys = Keys(
            [*(api_key or ()), *_keys_in("DEEPSTACK_JAX_API_KEY")],
            api_key_file,
            admin_key or next(iter(_keys_in("DEEPSTACK_JAX_ADMIN_KEY")), None),
        )
        tls = _tls(tls_cert, tls_key)
        _check_access(keys, no_auth, host, listener)
        configure_logging(requests=access_log or log_json, as_json=log_json)
        app = create_app(
            None,
            policy,
            max_requests=2 * max_waiting,
            timeout=timeout,
            access=Access(keys, Limits(requests_per_minute, tokens_per_minute, concurrent_requests)),
            origins=cors_origin or (),
            hosts=HostRule.of(host, is_loopback(listener), (split.node_address, *(allow_host or ()))),
            vllm_metrics=vllm_metrics,
            options=options,
            page=page,
            research=research,
        )
        url = f"{'https' if tls else 'http'}://{in_url(split.node_address)}:{listener.getsockname()[1]}"

        async def load() -> "Node":
            model = await in_thread(lambda: _load(role, checkpoint, dtype, expert_layout, encode_here, placed))
            preparation = _preparation(decoders, policy, 2 * max_waiting)
            named = name or checkpoint.resolve().name
            return await make_node(role, model, policy, split, limits, preparation, node_key, name=named, http_url=url)

        files = {"the keys": keys, "the revoked nodes": split.revoked}
        reloads = {name: each.reload for name, each in files.items() if each.has_file}
        serve_node(app, listener, load, tls=tls, reloads=reloads, grace=grace)


_SECRET = "api_key", "admin_key"
_MOST_DECODERS = 5


def _preparation(decoders: int | None, policy: "MediaPolicy", max_waiting: int) -> "Preparation":
    """What decodes media. An image of all pixels that a request may have takes its process 8 bytes per pixel."""
    from deepstack_jax.processing.decoders import Decoders
    from deepstack_jax.processing.preparation import BYTES_PER_PIXEL, Preparation

    count = min((os.cpu_count() or 1) + 1, _MOST_DECODERS) if decoders is None else decoders
    pool = Decoders(count, (1 << 30) + 16 * policy.max_pixels, max_waiting)
    return Preparation(pool, 2 * BYTES_PER_PIXEL * policy.max_pixels)


def _keys_in(variable: str) -> list[str]:
    """The keys that an environment variable holds, separated by commas."""
    return [key.strip() for key in os.environ.get(variable, "").split(",") if key.strip()]


def _tls(cert: Path | None, key: Path | None) -> Tls | None:
    if cert is None and key is None:
        return None
    if cert is None or key is None:
        raise ValueError("--tls-cert and --tls-key belong together: give both")
    return Tls(cert, key)


def _check_access(keys: "Keys", no_auth: bool, host: str, listener: socket.socket) -> None:
    """Refuses to be open to others by mistake."""
    if keys and no_auth:
        raise ValueError("--no-auth lets anybody in, and there are API keys: leave one of them out")
    if not keys and not no_auth and not is_loopback(listener):
        raise ValueError(
            f"--host {host} is open to others, and there is no key: give --api-key-file or --api-key, "
            "or --no-auth to let anybody in"
        )


def _follow(model: "Model", limits: "NodeLimits") -> None:
    """Runs what process 0 runs, until that ends."""
    from deepstack_jax.engine.followers import follow

    assert limits.engine is not None
    follow(limits.engine.build(model, limits.max_context, limits.max_waiting))


def _widths(text: str | None) -> tuple[int, ...]:
    try:
        return tuple(int(width) for width in text.split(",")) if text else ()
    except ValueError:
        raise ValueError(f"--decode-widths {text} is not a list of whole numbers: give 1,8 for example") from None


@dataclass(frozen=True)
class SplitOptions:
    """The options that only encode and language nodes need."""

    encoders: tuple[str, ...]
    control: str
    key: Path | None
    revoked: "Revocations"
    node_address: str
    protocol: Literal["tcp", "rdma"]
    device: str
    block_size: int
    pool_blocks: int | None
    cache_bytes: int
    max_peers: int
    encrypt_blocks: bool
    encode_here: bool
    verify: ssl.SSLContext | bool = True


@dataclass(frozen=True)
class NodeLimits:
    """The options of a node with the text model: what it accepts, and its engine."""

    max_waiting: int = 64
    max_context: int | None = None
    engine: "EngineOptions | None" = None
    warm_up: bool = True


async def make_node(
    role: Role,
    model: "Model",
    policy: "MediaPolicy",
    split: SplitOptions,
    limits: NodeLimits,
    preparation: "Preparation | None" = None,
    key: "Key | None" = None,
    *,
    name: str,
    http_url: str,
) -> "Node":
    """The node of a role, not yet started; `http_url` is where other nodes reach it. Prints the size of its engine."""
    if role == "unified":
        return await _text_node(model, policy, name, limits, preparation)

    from deepstack_jax.disagg.nodes import open_encode_server, open_encoder_pool

    device = f"?device={quote(split.device)}" if split.device else ""
    transport = f"mooncake+{split.protocol}://{in_url(split.node_address)}{device}"
    if role == "encode":
        from deepstack_jax.serving.encode_node import EncodeNode

        server = open_encode_server(
            model,
            endpoint=split.control,
            key=key,
            block_size=split.block_size,
            cache_bytes=split.cache_bytes,
            max_peers=split.max_peers,
            encrypt_blocks=split.encrypt_blocks,
            transport=transport,
            preparation=preparation,
        )
        return EncodeNode(model, server, name=name, verify=split.verify)
    links = open_encoder_pool(
        model,
        split.encoders,
        key=key,
        block_size=split.block_size,
        num_blocks=split.pool_blocks,
        encrypt_blocks=split.encrypt_blocks,
        http_url=http_url,
        transport=transport,
    )
    return await _text_node(model, policy, name, limits, preparation, links)


async def _text_node(
    model: "Model",
    policy: "MediaPolicy",
    name: str,
    limits: NodeLimits,
    preparation: "Preparation | None",
    encoders: "EncoderPool | None" = None,
) -> "Node":
    from deepstack_jax.serving.text_node import TextNode

    options = {"encoders": encoders, "preparation": preparation, **vars(limits)}
    node = await in_thread(lambda: TextNode(model, policy, name=name, **options))
    print(_engine_line(node.runner.engine), flush=True)
    return node


def _engine_line(engine: "Engine") -> str:
    """How many requests run at once, and how many tokens the KV pages hold."""
    from deepstack_jax.engine.options import page_bytes

    shape = engine.shape
    mebibytes = engine.num_pages * page_bytes(engine.model, shape.page) / (1 << 20)
    pages = f"{shape.pools * (engine.num_pages - 1):,} KV pages of {shape.page}"
    held = f"{engine.token_capacity:,} tokens, {mebibytes:,.1f} MiB{' per device' if engine.model.mesh else ''}"
    return f"engine: {shape.slots} slots, chunks of {shape.chunk} tokens, {pages} ({held})"


def _load(
    role: Role, checkpoint: Path, dtype: str | None, expert_layout: str | None, encode_here: bool, mesh: "Mesh | None"
) -> "Model":
    """The weights that a role needs."""
    import deepstack_jax as dsj
    from deepstack_jax.cli.progress import loading

    parts = {"encode": ("visual.",), "language": None if encode_here else ("language_model.",), "unified": None}
    with loading(f"loading {checkpoint}") as progress:
        return dsj.load(checkpoint, dtype, mesh, expert_layout=expert_layout, parts=parts[role], progress=progress)


def _check_split(role: Role, split: SplitOptions) -> "Key | None":
    """Refuses options that don't belong together, before anything is loaded; returns the key of a split's node."""
    if split.encoders and role != "language":
        raise ValueError(f"--encoder {split.encoders[0]} is for --role language: leave it out")
    if split.revoked.has_file and (role == "unified" or split.key is None):
        raise ValueError("--revoked is for nodes of a split: give --role, and a node's own key with --key")
    if role == "unified":
        return None
    if role == "language" and not split.encoders and not split.encode_here:
        raise ValueError("--role language needs --encoder tcp://host:port of an encode node, or --encode-here")
    if split.node_address in ("0.0.0.0", "::"):
        raise ValueError(
            f"--host {split.node_address} is not an address that others can reach: give --node-address as well"
        )
    try:
        from deepstack_jax.disagg.wire.control import is_loopback_host
    except ImportError as missing:
        raise ValueError(f"the split needs {missing.name}: pip install 'deepstack-jax[mooncake,serve]'") from None
    key = _key(role, split)
    if split.encrypt_blocks and key is None:
        raise ValueError("--encrypt-blocks needs a key: give --key")
    if not split.encrypt_blocks and not is_loopback_host(split.node_address):
        print(
            "warning: rows cross the network in the clear, and whoever reaches Mooncake's ports may read them: "
            "keep these ports private, or give --encrypt-blocks on all nodes",
            file=sys.stderr,
        )
    return key


def _key(role: Role, split: SplitOptions) -> "Key | None":
    """The key of --key. Without it only loopback is used, with the user's own key where that can be kept."""
    from deepstack_jax.disagg.keys.certificates import NodeKey
    from deepstack_jax.disagg.keys.files import read_key, users_key
    from deepstack_jax.disagg.wire.control import check_endpoint

    key = read_key(split.key) if split.key else None
    if isinstance(key, NodeKey) and role != "unified":
        key = replace(key, revoked=split.revoked)
        if reason := key.refusal(key.certificate, role):
            raise ValueError(f"--key {split.key} can't be used: {reason}")
    elif split.revoked.has_file:
        raise ValueError(
            f"--key {split.key} is the key of all nodes, of which none can be revoked by itself: give this node its "
            "own, made with deepstack-jax keygen FILE --node NAME --signed-by AUTHORITY"
        )
    for endpoint in split.encoders if role == "language" else (split.control,):
        check_endpoint(endpoint, key)
    if key is not None:
        return key
    try:
        return users_key()
    except (OSError, RuntimeError) as error:  # no home, or one that can't be written
        reason = f"this user's key can't be kept ({one_line(error)})"
        print(f"warning: the split trusts all users of this machine, because {reason}: give --key", file=sys.stderr)
        return None
