"""The HTTP application of a node: its routes, which are the same on every role, and what stands before them."""

from collections.abc import Mapping, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from deepstack_jax.serving.access import Access, AccessMiddleware
from deepstack_jax.serving.cluster_route import cluster_route
from deepstack_jax.serving.endpoint import Node, Service
from deepstack_jax.serving.errors import RequestError, error_response
from deepstack_jax.serving.hosts import HostMiddleware, HostRule
from deepstack_jax.serving.logs import RequestLog
from deepstack_jax.serving.native import generate_endpoint
from deepstack_jax.serving.openai.routes import openai_routes
from deepstack_jax.serving.page.routes import page_routes
from deepstack_jax.serving.policy import MediaPolicy
from deepstack_jax.serving.probes import OnlyProbes, probe_routes
from deepstack_jax.serving.refusals import PacedRefusals
from deepstack_jax.serving.research import research_routes

_EXPOSED = ["retry-after", "x-request-id"] + [
    f"x-ratelimit-{what}-{of}" for what in ("limit", "remaining", "reset") for of in ("requests", "tokens")
]


def create_app(
    node: Node | None,
    policy: MediaPolicy,
    *,
    max_requests: int = 128,
    timeout: float = 600.0,
    access: Access | None = None,
    origins: Sequence[str] = (),
    hosts: HostRule | None = None,
    vllm_metrics: bool = True,
    options: Mapping[str, Any] | None = None,
    page: bool = True,
    research: bool = False,
) -> Starlette:
    """The application of one node. Its `state.service` is the `Service`.

    Args:
        node: None while it is loading: `Service.open` takes it then.
        policy, max_requests, timeout, origins: see `Service`.
        access: who may call; anybody by default.
        hosts: the names to which the server answers; any by default.
        vllm_metrics, options: see `probe_routes`.
        page: whether GET / shows the page.
        research: see `Service`.
    """
    service = Service(None, policy, max_requests, timeout, origins, research=research)
    access = access or Access()

    routes = [
        Route("/generate", generate_endpoint(service), methods=["POST"]),
        *openai_routes(service),
        *probe_routes(service, vllm_metrics=vllm_metrics, options=options or {}),
        cluster_route(service),
        *research_routes(service),
        *(page_routes(service, access) if page else ()),
    ]
    middleware = [
        Middleware(RequestLog, service.metrics),
        Middleware(PacedRefusals, lambda: service.in_flight > 0),
        Middleware(OnlyProbes),
    ]
    if hosts is not None:
        middleware.append(Middleware(HostMiddleware, hosts))
    if origins:
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=list(origins),
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
                expose_headers=_EXPOSED,
            )
        )
    middleware.append(Middleware(AccessMiddleware, access))
    app = Starlette(
        routes=routes,
        middleware=middleware,
        exception_handlers={HTTPException: _refuse_route, RequestError: _refuse},
    )
    app.state.service = service
    if node is not None:
        service.open(node)
    return app


async def _refuse(_request: Request, error: Exception) -> Response:
    return error_response(error)


async def _refuse_route(_request: Request, error: Exception) -> Response:
    """The answer where no route has the path, or none with it has the method."""
    assert isinstance(error, HTTPException)
    message = f"{error.detail}: use POST /generate or POST /v1/chat/completions; GET /openapi.json lists the others"
    return error_response(RequestError(message, error.status_code, headers=dict(error.headers or {})))
