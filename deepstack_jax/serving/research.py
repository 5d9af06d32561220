"""POST /research/rows and POST /research/tokens: what reaches the text model, and what it thinks of each token."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

import jax
import msgspec
import numpy as np
from msgspec import Meta
from starlette.routing import Route

from deepstack_jax.config import ModelConfig
from deepstack_jax.engine.runner import DeadlineError
from deepstack_jax.processing.processor import Processor
from deepstack_jax.research import MAX_TOKENS, TokenChoices, token_choices
from deepstack_jax.serving.endpoint import Call, Endpoint, Reply, Service
from deepstack_jax.serving.errors import RequestError
from deepstack_jax.serving.looked_at import LookedAt, pictures_of, with_answer
from deepstack_jax.serving.openai.chat import chat_request, thinking_of
from deepstack_jax.serving.openai.fields import ChatRequest, TokenId, check_model, parse_body
from deepstack_jax.serving.openai.routes import text_endpoint
from deepstack_jax.serving.parsing import read_body
from deepstack_jax.serving.requests import GenerateRequest
from deepstack_jax.serving.text_node import TextNode

MAX_ROUTED = 1 << 20  # choices of experts in an answer: of its tokens, in all layers
MAX_LOOKED_AT = 16_384  # tokens of a prompt whose rows are looked at


class ResearchRequest(ChatRequest, frozen=True, kw_only=True):
    """The body of both endpoints: that of a chat completion, and the tokens of its answer."""

    answer_ids: Annotated[list[TokenId], Meta(max_length=MAX_TOKENS)] = msgspec.field(default_factory=list)


Look = Callable[[TextNode, LookedAt, ResearchRequest], dict[str, Any]]


def research_routes(service: Service) -> list[Route]:
    """The routes. An encode node passes its requests on."""
    one_at_a_time, thread = asyncio.Lock(), ThreadPoolExecutor(1, thread_name_prefix="research")

    def endpoint(path: str, most: int, look: Look) -> Endpoint:
        async def respond(_: Service, node: TextNode, call: Call, reply: Reply) -> None:
            node.check_research()
            if jax.process_count() > 1:
                raise RequestError("research looks only into models of one process: serve it in one", 400)
            body, request = await read_body(call.body, lambda: _parsed(call.body, node))

            async def looked() -> dict[str, Any]:
                async with one_at_a_time:
                    left = most - len(body.answer_ids)
                    looked_at = await node.look_at(request, call.deadline, lambda count: _check_length(count, left))
                    call.tokens.add(looked_at.length + len(body.answer_ids), 0)
                    run = asyncio.get_running_loop().run_in_executor
                    return await run(thread, lambda: look(node, looked_at, body))

            answer = await _by_deadline(looked(), call.deadline)
            await reply.json(lambda: answer)

        return text_endpoint(service, path, respond)

    looks = {"/research/rows": (MAX_LOOKED_AT, _rows), "/research/tokens": (MAX_TOKENS, _tokens)}
    return [Route(path, endpoint(path, *each), methods=["POST"]) for path, each in looks.items()]


def _parsed(data: bytes | bytearray, node: TextNode) -> tuple[ResearchRequest, GenerateRequest]:
    body = parse_body(data, ResearchRequest)
    check_model(body.model, node.model_names)
    vocabulary = node.config.text.vocab_size
    if body.answer_ids and max(body.answer_ids) >= vocabulary:
        highest = max(body.answer_ids)
        raise RequestError(
            f"answer_ids has {highest}: the model's tokens are 0 to {vocabulary - 1}", param="answer_ids"
        )
    return body, chat_request(body, node, thinking_of(body, node))


def _check_length(count: int, most: int) -> None:
    if count > most:
        raise RequestError(f"the prompt has {count} tokens: send at most {most} to look into", 413, "messages")


async def _by_deadline[T](step: Awaitable[T], deadline: float) -> T:
    try:
        async with asyncio.timeout(deadline - time.monotonic()):
            return await step
    except TimeoutError:
        raise DeadlineError("no result in time: send fewer tokens, or try again later") from None


# ---- in the thread


def _rows(node: TextNode, looked_at: LookedAt, body: ResearchRequest) -> dict[str, Any]:
    """The norms of each visual token's embedding and DeepStack levels."""
    config, rows = node.config, looked_at.prompt.rows
    if config.vision is None or rows is None:
        return {"images": []}
    parts = [np.asarray(rows.embeds)]
    if rows.deepstack is not None:
        parts += np.split(np.asarray(rows.deepstack), config.num_deepstack_levels, axis=1)
    norms = [np.linalg.norm(part.astype(np.float32), axis=1) for part in parts]
    pixels = config.vision.patch_size * config.vision.spatial_merge_size
    return {
        "images": [
            {
                "kind": picture.kind,
                "grid": list(picture.grid),
                "size": [picture.grid[2] * pixels, picture.grid[1] * pixels],
                "norms": [_rounded(of_level[picture.rows], 5) for of_level in norms],
            }
            for picture in pictures_of(config, looked_at)
        ]
    }


def _tokens(node: TextNode, looked_at: LookedAt, body: ResearchRequest) -> dict[str, Any]:
    """What the model thinks of each token of the prompt and of the answer."""
    whole = with_answer(looked_at, body.answer_ids)
    text = node.config.text
    per_token = sum(text.sparse_layers) * text.num_experts_per_tok
    if whole.length * per_token > MAX_ROUTED:
        _check_length(whole.length, MAX_ROUTED // per_token)
    choices = token_choices(node.model, whole.prompt)
    return _token_fields(node.config, node.processor, whole.ids.tolist(), choices) | {"answer_start": looked_at.length}


def _token_fields(
    config: ModelConfig, processor: Processor, ids: Sequence[int], choices: TokenChoices
) -> dict[str, Any]:
    visual = config.image_token_id, config.video_token_id

    def named(token: int) -> dict[str, Any]:
        return {"id": token, "text": processor.token_bytes(token).decode(errors="replace")}

    likeliest = zip(choices.top_ids.tolist(), _rounded(choices.top_probabilities, 6), strict=True)
    alternatives = [
        [named(token) | {"probability": probability} for token, probability in zip(*pair, strict=True)]
        for pair in likeliest
    ]
    probability = _rounded(choices.probability, 6)
    return {
        "tokens": [named(token) | {"visual": token in visual} for token in ids],
        "layers": choices.experts.shape[1],
        "experts": config.text.num_experts if choices.experts.shape[1] else 0,
        "top_k": choices.experts.tolist(),
        "weights": _rounded(choices.weights, 5),
        "alternatives": [[], *alternatives[1:]],
        "probability": [None, *probability[1:]],
    }


def _rounded(values: Any, digits: int) -> list[Any]:
    """Numbers as short as they are shown."""
    return np.round(np.asarray(values, np.float64), digits).tolist()
