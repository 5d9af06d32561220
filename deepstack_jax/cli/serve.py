"""`deepstack-jax serve`: a node that answers over HTTP."""

import asyncio
import math
import signal
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal
from urllib.parse import quote

import typer

from deepstack_jax.bundled import existing_checkpoint
from deepstack_jax.cli.mesh import Coordinator, MeshShape, NumProcesses, ProcessId, open_mesh

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from deepstack_jax.checkpoint import Model
    from deepstack_jax.engine.core import Engine
    from deepstack_jax.engine.options import EngineOptions
    from deepstack_jax.serving.http import Node
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
    key: Annotated[Path | None, typer.Option(help="the cluster's key file, made with deepstack-jax keygen")] = None,
    node_address: Annotated[
        str | None, typer.Option(help="address under which other nodes reach this one; --host by default")
    ] = None,
    protocol: Annotated[Literal["tcp", "rdma"], typer.Option(help="transport of the rows")] = "tcp",
    device: Annotated[str, typer.Option(help="RDMA devices, separated by commas; all by default")] = "",
    block_size: Annotated[int, typer.Option(min=1, help="tokens per block; the same on all nodes")] = 128,
    pool_blocks: Annotated[
        int | None, typer.Option(min=1, help="language node: receive blocks; as many as 256 MB hold by default")
    ] = None,
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
    """Answers over HTTP: POST /generate, GET /health, GET /v1/models.

    Prints the size of its engine, and one line when it is ready. With --coordinator, the same command runs in every
    process of the mesh, and process 0 speaks HTTP.

    Example: deepstack-jax serve ckpt --port 8000 --allow-domain upload.wikimedia.org
    """
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError:
        raise ValueError("serve needs Starlette and uvicorn: pip install 'deepstack-jax[serve]'") from None
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

    engine = EngineOptions(slots, chunk, kv_bytes, decode_steps, prefix_cache, _widths(decode_widths))
    if coordinator is not None and role != "unified":
        raise ValueError(f"--role {role} runs in one process: leave out --coordinator")
    placed = open_mesh(mesh, coordinator, num_processes, process_id)
    engine.shape(placed)  # refuses impossible sizes before the weights are read
    limits = NodeLimits(max_waiting, max_context, engine, warm_up)
    if not is_first():  # another process of the mesh speaks HTTP
        _follow(_load(role, checkpoint, dtype, expert_layout, encode_here, placed), limits)
        return
    with _bind(host, port) as listener:  # before the weights are read, so that a port in use is an error at once
        if not _is_loopback(listener):
            print(f"warning: {host} is open to others, and this server has no authentication", file=sys.stderr)
        from deepstack_jax.serving.http import create_app

        split = SplitOptions(
            tuple(encoder or ()),
            control,
            key,
            node_address or host,
            f"http://{_in_url(node_address or host)}:{listener.getsockname()[1]}",
            protocol,
            device,
            block_size,
            pool_blocks,
            cache_bytes,
            encode_here,
        )
        _check_split(role, split)
        model = _load(role, checkpoint, dtype, expert_layout, encode_here, placed)
        name = name or checkpoint.resolve().name

        async def serve() -> None:
            # in the loop that runs it: ZeroMQ's authenticator answers in the loop in which it was made
            node = make_node(role, model, policy, split, limits, name=name)
            from deepstack_jax.serving.text_node import TextNode

            if isinstance(node, TextNode):
                print(_engine_line(node.runner.engine), flush=True)
            app = create_app(node, policy, max_requests=2 * max_waiting, timeout=timeout)
            await _serve(node, app, listener, grace)

        asyncio.run(serve())


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
    node_address: str
    http_url: str
    protocol: Literal["tcp", "rdma"]
    device: str
    block_size: int
    pool_blocks: int | None
    cache_bytes: int
    encode_here: bool


@dataclass(frozen=True)
class NodeLimits:
    """The options of a node with the text model: what it accepts, and its engine."""

    max_waiting: int = 64
    max_context: int | None = None
    engine: "EngineOptions | None" = None
    warm_up: bool = True


def make_node(
    role: Role,
    model: "Model",
    policy: "MediaPolicy",
    split: SplitOptions,
    limits: NodeLimits,
    *,
    name: str,
) -> "Node":
    """The node of a role, in a running event loop."""
    from deepstack_jax.serving.text_node import TextNode

    if role == "unified":
        return TextNode(model, policy, name=name, **vars(limits))

    from deepstack_jax.disagg.nodes import open_encode_server, open_encoder_pool
    from deepstack_jax.disagg.wire.control import read_key

    key = read_key(split.key) if split.key else None
    device = f"?device={quote(split.device)}" if split.device else ""
    transport = f"mooncake+{split.protocol}://{_in_url(split.node_address)}{device}"
    if role == "encode":
        from deepstack_jax.serving.encode_node import EncodeNode

        server = open_encode_server(
            model,
            endpoint=split.control,
            key=key,
            block_size=split.block_size,
            cache_bytes=split.cache_bytes,
            transport=transport,
        )
        return EncodeNode(model, server, name=name)
    links = open_encoder_pool(
        model,
        split.encoders,
        key=key,
        block_size=split.block_size,
        num_blocks=split.pool_blocks,
        http_url=split.http_url,
        transport=transport,
    )
    return TextNode(model, policy, name=name, encoders=links, **vars(limits))


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


def _check_split(role: Role, split: SplitOptions) -> None:
    """Refuses options that don't belong together, before anything is loaded."""
    if split.encoders and role != "language":
        raise ValueError(f"--encoder {split.encoders[0]} is for --role language: leave it out")
    if role == "unified":
        return
    if role == "language" and not split.encoders and not split.encode_here:
        raise ValueError("--role language needs --encoder tcp://host:port of an encode node, or --encode-here")
    if split.node_address in ("0.0.0.0", "::"):
        raise ValueError(
            f"--host {split.node_address} is not an address that others can reach: give --node-address as well"
        )
    try:
        from deepstack_jax.disagg.wire.control import check_endpoint, read_key
    except ImportError as missing:
        raise ValueError(f"the split needs {missing.name}: pip install 'deepstack-jax[mooncake,serve]'") from None
    key = read_key(split.key) if split.key else None
    for endpoint in split.encoders if role == "language" else (split.control,):
        check_endpoint(endpoint, key)


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


async def _serve(node: "Node", app: object, listener: socket.socket, grace: float) -> None:
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            host, port = listener.getsockname()[:2]
            host = _in_url(host)
            where = f"http://{host}:{port}" + (f", control {node.control}" if node.control else "")
            print(f"ready: {node.role} node of {', '.join(node.model_names)} on {where}", flush=True)

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            node.stop(grace)
            await super().shutdown(sockets)

    config = uvicorn.Config(
        app,  # type: ignore[arg-type]
        http="h11",
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=1024,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=math.ceil(grace) + 2,  # the node says why first
    )
    try:
        await node.start()
        # uvicorn raises the signal again once it has ended cleanly: this is the end of it
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        await Server(config).serve([listener])
    finally:
        node.stop(0.0)
        await node.close()


def _bind(host: str, port: int) -> socket.socket:
    """A bound socket that doesn't listen yet: until the node is ready, connections are refused."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise ValueError(f"{host} port {port} can't be used ({error.strerror}): choose another one") from None
    return listener


def _is_loopback(listener: socket.socket) -> bool:
    import ipaddress

    return ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback
