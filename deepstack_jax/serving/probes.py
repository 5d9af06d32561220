"""What operators and their tools ask: whether the server lives and can take requests, what it is, and its metrics."""

import platform
import time
from collections.abc import Mapping
from importlib.metadata import version
from types import MappingProxyType
from typing import Any

import jax
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deepstack_jax.engine.runner import QueueFullError
from deepstack_jax.serving.endpoint import Service, get_route
from deepstack_jax.serving.errors import error_response, without_places
from deepstack_jax.serving.metrics import Exposition
from deepstack_jax.version import VERSION

NO_LOAD: Mapping[str, float] = MappingProxyType({})
ONLY_PROBES = "only_probes"  # in the state of a request that came while the server had all connections that it takes
_PROBES = "/health", "/ready", "/version", "/metrics"
_PACKAGES = "deepstack-jax", "jax", "jaxlib", "transformers", "starlette", "uvicorn"


def probe_routes(service: Service, *, vllm_metrics: bool, options: Mapping[str, Any]) -> list[Route]:
    """The routes.

    Args:
        service: also while its node is loading.
        vllm_metrics: whether /metrics has vLLM's names as well.
        options: those of the command, for /server_info; no secrets may be among them.
    """

    def state(
        reason: str | None, good: str = "ok", bad: str = "unavailable", load: Mapping[str, float] = NO_LOAD
    ) -> Response:
        role = {} if service.loaded is None else {"role": service.loaded.role}
        if reason is None:
            return JSONResponse({"status": good, **role, **load})
        return JSONResponse({"status": bad, **role, "reason": without_places(reason), **load}, 503)

    async def health(_request: Request) -> Response:
        if service.loaded is None:
            return state(None, "loading")
        return state(service.loaded.dead(), load=service.loaded.load())

    async def ready(_request: Request) -> Response:
        if service.loaded is None:
            return state("the model is loading", bad="loading")
        if service.draining:
            return state("the server takes no more requests", bad="draining")
        return state(await service.loaded.unable(), "ready")

    async def health_generate(_request: Request) -> Response:
        return state(await service.node.self_test())

    async def version_of(_request: Request) -> Response:
        return JSONResponse({"version": VERSION})

    async def metrics(request: Request) -> Response:
        node = service.node
        vllm = vllm_metrics and node.role != "encode"  # an encode node has no engine
        scrape = Exposition(service.metrics, node.readings(), node.role, node.model_names[0], vllm=vllm)
        return scrape.response(request.headers.get("accept", ""))

    async def server_info(_request: Request) -> Response:
        node = service.node
        return JSONResponse(
            {
                "role": node.role,
                "models": list(node.model_names),
                "versions": {"python": platform.python_version()} | {name: version(name) for name in _PACKAGES},
                "devices": [f"{device.platform}:{device.id} {device.device_kind}" for device in jax.local_devices()],
                "uptime_seconds": int(time.time()) - service.started,
                "draining": service.draining,
                "options": {name: _plain(value) for name, value in options.items()},
                **node.describe(),
                "readings": {reading.name: reading.value for reading in node.readings()},
            }
        )

    async def drain(_request: Request) -> Response:
        service.drain()
        return JSONResponse({"status": "draining", "in_flight": service.in_flight})

    return [
        get_route("/health", health),
        get_route("/ready", ready),
        get_route("/health_generate", health_generate),
        get_route("/version", version_of),
        get_route("/metrics", metrics),
        get_route("/server_info", server_info),
        Route("/drain", drain, methods=["POST"]),
    ]


class OnlyProbes:
    """Answers a request that came while the server was full only if it is a probe, and closes its connection."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def and_close(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["connection"] = "close"
            await send(message)

        if scope["type"] != "http" or not scope.get("state", {}).get(ONLY_PROBES):
            await self._app(scope, receive, send)
        elif scope["method"] == "GET" and scope["path"] in _PROBES:
            await self._app(scope, receive, and_close)
        else:
            error = QueueFullError("the server has as many connections as it takes: try again later")
            await error_response(error)(scope, receive, and_close)


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
