"""The routes of OpenAI's API. An encode node passes its requests on to a language node."""

from collections.abc import Awaitable, Callable
from functools import cache

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from deepstack_jax.serving.encode_node import EncodeNode
from deepstack_jax.serving.endpoint import Call, Endpoint, Reply, Service, get_route
from deepstack_jax.serving.openai.chat import respond_to_chat
from deepstack_jax.serving.openai.completions import respond_to_completion
from deepstack_jax.serving.openai.fields import ChatRequest, CompletionRequest
from deepstack_jax.serving.openai.models import (
    DetokenizeRequest,
    TokenizeRequest,
    model_card,
    one_model,
    respond_to_detokenize,
    respond_to_tokenize,
)
from deepstack_jax.serving.openai.responses import ResponsesRequest, respond_to_response
from deepstack_jax.serving.openapi import openapi
from deepstack_jax.serving.parsing import to_json
from deepstack_jax.serving.requests import GenerateRequest
from deepstack_jax.serving.text_node import TextNode
from deepstack_jax.version import VERSION

Respond = Callable[[Service, TextNode, Call, Reply], Awaitable[None]]

# each path, with the type of its body
POSTS: dict[str, tuple[Respond, type[msgspec.Struct]]] = {
    "/v1/chat/completions": (respond_to_chat, ChatRequest),
    "/v1/completions": (respond_to_completion, CompletionRequest),
    "/v1/responses": (respond_to_response, ResponsesRequest),
    "/tokenize": (respond_to_tokenize, TokenizeRequest),
    "/detokenize": (respond_to_detokenize, DetokenizeRequest),
}
BODIES = {"/generate": GenerateRequest, **{path: body for path, (_, body) in POSTS.items()}}


def openai_routes(service: Service) -> list[Route]:
    """The routes of a node."""

    async def models(_request: Request) -> Response:
        cards = [model_card(service, name) for name in service.node.model_names]
        return JSONResponse({"object": "list", "data": cards})

    async def model(request: Request) -> Response:
        return await one_model(service, request)

    async def schema(_request: Request) -> Response:
        return Response(_schema(), media_type="application/json")

    posts = [
        Route(path, text_endpoint(service, path, respond), methods=["POST"]) for path, (respond, _) in POSTS.items()
    ]
    gets = {"/v1/models": models, "/v1/models/{id:path}": model, "/openapi.json": schema}
    return [*posts, *(get_route(path, endpoint) for path, endpoint in gets.items())]


@cache
def _schema() -> bytes:
    return to_json(openapi(BODIES, VERSION))


def text_endpoint(service: Service, path: str, respond: Respond) -> Endpoint:
    """An endpoint of nodes with the text model, to which an encode node passes its requests on."""

    async def answer(call: Call, reply: Reply) -> None:
        node = service.node
        if isinstance(node, EncodeNode):
            await node.forward(path, call, reply)
            return
        assert isinstance(node, TextNode)
        await respond(service, node, call, reply)

    return Endpoint(service, answer)
