"""GET /v1/models and /v1/models/{id}, POST /tokenize and /detokenize."""

from typing import Annotated, Any

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from deepstack_jax.processing.messages import parse_messages
from deepstack_jax.serving.endpoint import Call, Reply, Service
from deepstack_jax.serving.errors import RequestError, error_response
from deepstack_jax.serving.openai.chat_messages import plain_messages
from deepstack_jax.serving.openai.fields import TokenId, Tool, check_model, parse_body
from deepstack_jax.serving.parsing import read_body
from deepstack_jax.serving.requests import MAX_TOOLS, Messages, Name, Options, check_parts
from deepstack_jax.serving.text_node import TextNode


class TokenizeRequest(msgspec.Struct, frozen=True):
    """The body of `POST /tokenize`: a prompt as it is, or messages for the chat template."""

    model: Name | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    return_token_strs: bool = False
    chat_template_kwargs: Options = {}
    tools: Annotated[list[Tool], Meta(max_length=MAX_TOOLS)] = []


class DetokenizeRequest(msgspec.Struct, frozen=True):
    """The body of `POST /detokenize`."""

    tokens: list[TokenId]
    model: Name | None = None


def model_card(service: Service, name: str) -> dict[str, Any]:
    """One model of `GET /v1/models`."""
    card = {"id": name, "object": "model", "created": service.started, "owned_by": "deepstack-jax", "root": name}
    return card | {"parent": None, "max_model_len": service.node.max_model_len}


async def one_model(service: Service, request: Request) -> Response:
    """GET /v1/models/{id}."""
    name = request.path_params["id"]
    try:
        check_model(name, service.node.model_names)
    except RequestError as error:
        return error_response(error)
    return JSONResponse(model_card(service, name))


async def respond_to_tokenize(service: Service, node: TextNode, call: Call, reply: Reply) -> None:
    """POST /tokenize: the token ids of a prompt, in which each picture is one placeholder."""

    def read() -> dict[str, Any]:
        body = parse_body(call.body, TokenizeRequest)
        check_model(body.model, node.model_names)
        ids, texts = _tokenize(body, node), None
        if body.return_token_strs:
            texts = [node.processor.token_bytes(token).decode(errors="replace") for token in ids]
        return {"count": len(ids), "max_model_len": node.max_model_len, "tokens": ids, "token_strs": texts}

    answer = await read_body(call.body, read)
    await reply.json(lambda: answer)


def _tokenize(body: TokenizeRequest, node: TextNode) -> list[int]:
    if (body.prompt is None) == (body.messages is None):
        raise RequestError("send either prompt or messages", param="prompt")
    if body.prompt is not None:
        return node.token_ids(body.prompt, empty=True)
    check_parts(body.messages)
    messages, _ = parse_messages(plain_messages(body.messages or [], node.processor), allow_empty=True)
    text = node.processor.chat_text(
        messages,
        [msgspec.to_builtins(tool) for tool in body.tools],
        body.chat_template_kwargs,
        add_generation_prompt=body.add_generation_prompt and not body.continue_final_message,
        continue_final_message=body.continue_final_message,
    )
    return node.token_ids(text)


async def respond_to_detokenize(service: Service, node: TextNode, call: Call, reply: Reply) -> None:
    """POST /detokenize: the text of token ids, special tokens included."""

    def read() -> str:
        body = parse_body(call.body, DetokenizeRequest)
        check_model(body.model, node.model_names)
        return node.processor.text_of(body.tokens)

    text = await read_body(call.body, read)
    await reply.json(lambda: {"prompt": text})
