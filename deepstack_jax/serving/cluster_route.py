"""GET /cluster: this node and those that it is linked with, for people who watch. No answer has an address."""

import time
from dataclasses import asdict
from typing import Any, Literal

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from deepstack_jax.disagg.events import MAX_TEXT
from deepstack_jax.errors import printable
from deepstack_jax.serving.cluster import Cluster, NodeStatus
from deepstack_jax.serving.endpoint import Service, get_route
from deepstack_jax.serving.errors import without_places
from deepstack_jax.serving.parsing import to_json


def cluster_route(service: Service) -> Route:
    """The route."""

    async def cluster(_request: Request) -> Response:
        return Response(to_json(_fields(service)), media_type="application/json", headers={"cache-control": "no-store"})

    return get_route("/cluster", cluster)


def _fields(service: Service) -> dict[str, Any]:
    """The answer. What libraries and other nodes say is shown without addresses, and printable."""
    node, now = service.loaded, time.monotonic()
    cluster = Cluster({}) if node is None else node.cluster()
    state, reason = _own_state(service)
    name, role = ("this node", "unknown") if node is None else (node.role, node.role)
    requests, failures = service.metrics.outcomes()
    counted: dict[str, Any] = {"in_flight": service.in_flight, "requests": requests, "failures": failures}
    own = NodeStatus(name, role, state, reason, now - service.since, **(counted | cluster.own))
    nodes = [_node_fields(own, own=True), *(_node_fields(each, own=False) for each in cluster.others)]
    events = [
        {"seconds_ago": round(now - each.at, 3), "node": each.node, "what": _public(each.what)}
        for each in cluster.events
    ]
    return {"role": node.role if node else None, "time": round(time.time(), 3), "nodes": nodes, "events": events}


def _node_fields(status: NodeStatus, own: bool) -> dict[str, Any]:
    reason = None if status.reason is None else _public(status.reason)
    since = {"since_seconds": round(status.since_seconds, 3), "reason": reason}
    return asdict(status) | since | {"self": own}


def _own_state(service: Service) -> tuple[Literal["ready", "loading", "draining", "unhealthy"], str | None]:
    if service.loaded is None:
        return "loading", "the model is loading"
    if (reason := service.loaded.dead()) is not None:
        return "unhealthy", reason
    return ("draining", "the server takes no more requests") if service.draining else ("ready", None)


def _public(text: str) -> str:
    return printable(without_places(text), MAX_TEXT)
