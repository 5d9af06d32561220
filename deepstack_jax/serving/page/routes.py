"""The routes of the page: GET /, its files, what it has to know of the server, and POST /page/draw."""

import asyncio
import base64
import secrets
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from deepstack_jax.demo.samples import UNSEEN_SEEDS
from deepstack_jax.serving.access import Access, presented_key
from deepstack_jax.serving.endpoint import Call, Endpoint, Reply, Service, get_route
from deepstack_jax.serving.errors import RequestError
from deepstack_jax.serving.openai.fields import parse_body
from deepstack_jax.serving.page.files import File, draw, knows_drawings, sample_file, samples_for, static_files
from deepstack_jax.serving.parsing import to_json
from deepstack_jax.version import VERSION

# The page runs only its own scripts and sends nothing to other sites; no other site shows it in a frame or reads it.
HEADERS: Mapping[str, str] = MappingProxyType(
    {
        "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
        "img-src 'self' data: blob:; media-src 'self' blob: data:; connect-src 'self'; font-src 'none'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cross-origin-opener-policy": "same-origin",
        "cross-origin-resource-policy": "same-origin",
        "permissions-policy": "camera=(self)",
        "cache-control": "no-cache",
    }
)


class DrawRequest(msgspec.Struct, frozen=True):
    """The body of `POST /page/draw`: the same seed draws the same picture."""

    seed: Annotated[int, msgspec.Meta(ge=0, lt=2**53)] | None = None


def page_routes(service: Service, access: Access) -> list[Route]:
    """The routes.

    Args:
        service: also while its node is loading.
        access: whose API keys the page asks for.
    """

    async def page(request: Request) -> Response:
        return _file(request, static_files().get("index.html"))

    async def static(request: Request) -> Response:
        return _file(request, static_files().get(request.path_params["name"]))

    async def picture(request: Request) -> Response:
        return _file(request, await asyncio.to_thread(sample_file, request.path_params["name"]))

    async def info(request: Request) -> Response:
        known = not access.keys or access.keys.name_of(presented_key(request.headers)) is not None
        return Response(to_json(_info(service, known) | {"needs_key": bool(access.keys)}), 200, HEADERS, _JSON)

    async def respond(call: Call, reply: Reply) -> None:
        if not knows_drawings(service.node.config):
            raise RequestError("pictures are drawn only for tiny-vl: serve tiny-vl, or send a picture of your own", 404)
        seed = parse_body(call.body, DrawRequest).seed
        await reply.json(lambda: _drawn(secrets.randbelow(UNSEEN_SEEDS) if seed is None else seed))

    return [
        get_route("/", page),
        get_route("/page/info", info),
        Route("/page/draw", Endpoint(service, respond), methods=["POST"]),
        get_route("/page/samples/{name}", picture),
        get_route("/page/{name:path}", static),
    ]


_JSON = "application/json"


def _file(request: Request, file: File | None) -> Response:
    """A file, or only that the client's copy of it is good.

    Raises:
        RequestError: 404.
    """
    if file is None:
        raise RequestError("the page has no such file: open /", 404)
    headers = {**HEADERS, "etag": file.tag}
    if file.tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(file.data, 200, headers, file.kind)


def _info(service: Service, known: bool) -> dict[str, Any]:
    """What the page has to know of the server. Only who is `known` learns the model's name."""
    node, policy = service.loaded, service.policy
    told = {
        "version": VERSION,
        "research": service.research,
        "max_items": policy.max_items,
        "max_bytes": policy.max_bytes,
    }
    if node is None:
        return told | {"role": None, "model": None, "loading": True}
    config = node.config
    return told | {
        "role": node.role,
        "model": node.model_names[0] if known else None,
        "loading": False,
        "demo": knows_drawings(config),
        "max_model_len": node.max_model_len,
        "deepstack_levels": config.num_deepstack_levels,
        "video": config.vision is not None,
        "samples": samples_for(config),
    }


def _drawn(seed: int) -> dict[str, Any]:
    drawn = draw(seed)
    told = {"image": "data:image/png;base64," + base64.b64encode(drawn.png).decode(), "seed": seed}
    return told | {name: getattr(drawn.exchange, name) for name in ("question", "answer", "family")}
