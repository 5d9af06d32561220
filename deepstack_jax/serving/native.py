"""POST /generate: answers in the shape of SGLang's native API."""

import time
from contextlib import aclosing
from typing import Any

from deepstack_jax.engine.runner import Chunk
from deepstack_jax.processing.processor import DecodeStream
from deepstack_jax.processing.stop_strings import StopStrings
from deepstack_jax.serving.endpoint import Call, Endpoint, Reply, Service
from deepstack_jax.serving.parsing import read_body
from deepstack_jax.serving.requests import GenerateRequest, parse_request


def generate_endpoint(service: Service) -> Endpoint:
    """POST /generate of a node."""

    async def respond(call: Call, reply: Reply) -> None:
        request = await read_body(call.body, lambda: parse_request(call.body))
        answer = _Answer(service.node.decode_stream(), request, call.id)
        async with aclosing(service.generate(request, call)) as chunks:
            async for chunk in chunks:
                answer.add(chunk)
                if request.stream:
                    await reply.event(answer.event())
                if answer.ended:
                    break
        if not request.stream:
            await reply.json(answer.body)
            return
        await reply.event("[DONE]")
        await reply.end()

    return Endpoint(service, respond)


_OF_TOKENS = "output_token_logprobs", "output_top_logprobs"


class _Answer:
    """An unfinished answer in SGLang's shape. It ends with its last chunk, or at a stop string."""

    def __init__(self, pieces: DecodeStream, request: GenerateRequest, id: str):
        self.ended = False
        self._pieces = pieces
        self._stop = StopStrings.of(request.sampling_params.stop)
        self._only_new = request.stream_deltas
        self._started = time.monotonic()
        self._text, self._ids = "", []
        self._wants_logprobs = request.return_logprob
        self._sent = 0, 0  # characters and tokens that events have had
        self._meta: dict[str, Any] = {"id": request.rid or id}

    def add(self, chunk: Chunk) -> None:
        before = len(self._ids)
        for token in chunk.tokens:
            self._ids.append(token)
            self._text += self._stop.feed(self._pieces.feed(token))
            if self._stop.matched is not None:
                break  # tokens after the stop string are not part of the answer
        if chunk.finish_reason is not None and self._stop.matched is None:
            self._text += self._stop.feed(self._pieces.finish()) + self._stop.finish()
        self.ended = chunk.finish_reason is not None or self._stop.matched is not None
        self._meta |= {
            "prompt_tokens": chunk.prompt_tokens,
            "completion_tokens": len(self._ids),
            "finish_reason": self._reason(chunk) if self.ended else None,
        }
        if self._wants_logprobs:
            of_tokens = list(zip(chunk.logprobs, self._ids[before:], strict=False))
            own, top = (self._meta.setdefault(name, []) for name in _OF_TOKENS)
            own += [[each.logprob, token, None] for each, token in of_tokens]
            top += [[[logprob, token, None] for token, logprob in each.top] for each, _ in of_tokens]
        if self.ended:
            self._meta["e2e_latency"] = round(time.monotonic() - self._started, 6)
            self._meta["timings"] = {stage: round(seconds, 6) for stage, seconds in chunk.timings.items()}
            self._meta["cached_tokens"] = chunk.cached_tokens
            if chunk.engine_shape:
                self._meta["engine_shape"] = chunk.engine_shape
            if chunk.transfer_stats is not None:
                self._meta["split"] = chunk.transfer_stats

    def body(self) -> dict[str, Any]:
        return {"text": self._text, "output_ids": self._ids, "meta_info": self._meta}

    def event(self) -> dict[str, Any]:
        """The next event of a stream: the whole answer so far, or only what is new since the last event."""
        if not self._only_new:
            return self.body()
        characters, tokens = self._sent
        self._sent = len(self._text), len(self._ids)
        meta = self._meta | {name: self._meta[name][tokens:] for name in _OF_TOKENS if name in self._meta}
        return {"text": self._text[characters:], "output_ids": self._ids[tokens:], "meta_info": meta}

    def _reason(self, chunk: Chunk) -> dict[str, Any]:
        if self._stop.matched is not None:
            return {"type": "stop", "matched": self._stop.matched}
        if chunk.finish_reason == "stop":
            return {"type": "stop", "matched": self._ids[-1]}
        return {"type": "length", "length": len(self._ids)}
