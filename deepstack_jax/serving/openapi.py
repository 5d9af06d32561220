"""GET /openapi.json: the endpoints that take bodies, with schemas that are derived from the types that read them."""

from collections.abc import Mapping
from typing import Any

import msgspec

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def openapi(bodies: Mapping[str, type[msgspec.Struct]], version: str) -> dict[str, Any]:
    """The OpenAPI 3.1 document of the POST endpoints in `bodies`, which are paths with their bodies' types."""
    schemas, components = msgspec.json.schema_components(bodies.values(), ref_template="#/components/schemas/{name}")
    components = {**components, "Error": _ERROR}
    error = {
        "description": "error",
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
    }
    answer = {"description": "answer", "content": {kind: {} for kind in ("application/json", "text/event-stream")}}
    paths = {
        path: {
            "post": {
                "operationId": path.strip("/").replace("/", "_"),
                "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
                "responses": {"200": answer, "4XX": error, "5XX": error},
                "security": [{}, {"key": []}],
            }
        }
        for path, schema in zip(bodies, schemas, strict=True)
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "deepstack-jax", "version": version},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }
