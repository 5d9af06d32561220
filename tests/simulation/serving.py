"""Machines whose nodes are whole: HTTP, the engine and its scheduler, and encode nodes that pass requests on."""

import asyncio
import base64
import io
import math
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

import msgspec
from PIL import Image

from deepstack_jax.processing.preparation import Preparation
from deepstack_jax.serving.encode_node import EncodeNode
from deepstack_jax.serving.http import create_app
from deepstack_jax.serving.policy import MediaPolicy
from deepstack_jax.serving.text_node import TextNode
from tests.simulation import engine, model
from tests.simulation.http import Exchange
from tests.simulation.nodes import EncodeMachine, LanguageMachine

if TYPE_CHECKING:
    from tests.simulation.clients import Call
    from tests.simulation.cluster import Cluster

_POLICY = MediaPolicy()
_STATUS = {"timeout_error": 504, "overloaded_error": 503, "invalid_request_error": 400}


@cache
def png_of(picture: int, height: int, width: int) -> bytes:
    """A picture as a file that the fake processor knows."""
    file = io.BytesIO()
    Image.new("RGB", (8 + 8 * width, 8 + 8 * height), (picture, 0, 0)).save(file, "PNG")
    model.FILES[file.getvalue()] = b"%d %d %d" % (picture, height, width)
    return file.getvalue()


@cache
def body_of(prompt: int, valid: bool, tokens: int, stream: bool) -> bytes:
    """The body of POST /generate."""
    pictures = [base64.b64encode(png_of(*picture)).decode() for picture in model.catalogue()[prompt].pictures]
    return msgspec.json.encode(
        {
            "text": model.text_of(model.catalogue()[prompt]) if valid else "nonsense",
            "image_data": [f"data:image/png;base64,{picture}" for picture in pictures],
            "sampling_params": {"max_new_tokens": tokens, "ignore_eos": True},
            "stream": stream,
        }
    )


class _HttpMachine:
    """What both kinds of nodes share as servers."""

    tells_loss = True
    app: Any = None
    node: Any = None
    cluster: "Cluster"
    calls: dict[int, Any]
    tasks: dict["asyncio.Task[None]", None]  # of requests that run

    def take(self, call: "Call") -> None:
        """A client's request arrives; its response goes back as it comes."""
        response = _Response(call)
        body = body_of(call.prompt, call.valid, call.tokens, call.stream)
        headers = {"content-type": "application/json", "x-request-id": f"c{call.number}"}
        self.calls[call.number] = Exchange(self, "/generate", headers, body, response.arrive)  # type: ignore[arg-type]

    async def close(self) -> None:
        """Ends the node as `cli.http_server` does: what runs has some time, then it is cancelled."""
        grace = self.cluster.knobs.grace
        if self.app is not None:
            self.app.state.service.draining = True
            self.node.stop(grace)
            if self.tasks:
                await asyncio.wait(self.tasks, timeout=math.ceil(grace) + 2)
            for task in self.tasks:
                task.cancel()
            await asyncio.gather(*self.tasks, return_exceptions=True)
            self.app = None
        self.node.stop(0.0)
        await self.node.close()

    def hang_up(self, call: "Call") -> None:
        """The client goes away."""
        if exchange := self.calls.pop(call.number, None):
            exchange.hang_up()

    def unrest(self) -> str:
        """What the node still holds, in one line."""
        if self.node is None or self.app is None:
            return "not started"
        found = ", ".join(f"{count} {name}" for name, count in self._held().items() if count)
        return ", ".join(filter(None, (super().unrest(), found)))  # type: ignore[misc]

    def _held(self) -> dict[str, int]:
        return {
            "calls": len(self.calls),
            "responses": self.app.state.service.in_flight,
            str(self.node.dead()): self.node.dead() is not None,
        }

    async def _open(self) -> None:
        await self.node.start()
        self.app = create_app(self.node, _POLICY, max_requests=1000, timeout=self.cluster.knobs.http_timeout)


class _Response:
    """What a client reads."""

    def __init__(self, call: "Call"):
        self._call, self._body = call, b""
        self._status = 0

    def arrive(self, message: Mapping[str, Any] | None) -> None:
        call = self._call
        if message is None:
            call.machine.calls.pop(call.number, None)
            call.lost()
        elif message["type"] == "http.response.start":
            if self._status:
                call.process.world.violated("call", call.number, "got two responses")
            self._status = message["status"]
        else:
            self._body += message.get("body", b"")
            if not message.get("more_body"):
                call.machine.calls.pop(call.number, None)
                call.end(*self._result())

    def _result(self) -> tuple[int, Any]:
        """The status, and the tokens or the reason."""
        if self._status != 200 or not self._call.stream:
            found = msgspec.json.decode(self._body)
            return self._status, found["error"]["message"] if self._status != 200 else found["output_ids"]
        events = [part.removeprefix(b"data: ") for part in self._body.split(b"\n\n") if part.startswith(b"data: {")]
        last = msgspec.json.decode(events[-1])
        if "error" in last:
            return _STATUS.get(last["error"]["type"], 500), last["error"]["message"]
        return 200, last["output_ids"]


class TextMachine(_HttpMachine, LanguageMachine):
    """A machine with a language node that answers over HTTP."""

    def _start(self) -> None:
        self.app, self.node, self.tasks = None, None, {}
        self.url = f"http://{self.name.lower()}:8000"
        self._make_encoders(http_url=self.url)
        knobs = self.cluster.knobs
        options = engine.Options(knobs.shape, knobs.num_pages, knobs.program_seconds)
        self.node = TextNode(
            model.new_model(encodes=knobs.encode_here),
            _POLICY,
            max_waiting=knobs.max_waiting,
            encoders=self.encoders,
            engine=options,  # type: ignore[arg-type]
            warm_up=False,
            overlap=knobs.overlap,
            preparation=Preparation(model.InlineDecoders()),
        )
        self.run(self._open())

    def _held(self) -> dict[str, int]:
        core = self.node.runner.engine
        return super()._held() | {
            "requests in the engine": self.node.runner.waiting,
            "slots in use": core.shape.slots - core.free_slots,
            "lost pages": sum(cache.ledger.in_use - len(set(cache.pages)) for cache in core.prefix_caches),
        }


class EncodeHttpMachine(_HttpMachine, EncodeMachine):
    """A machine with an encode node that passes clients' requests on."""

    def _start(self) -> None:
        self.app, self.node, self.calls, self.tasks = None, None, {}, {}
        self._make_server()
        self.node = EncodeNode(model.new_model(encodes=True), self.server, name="fake", verify=False)  # type: ignore[arg-type]
        self.run(self._open())
