"""Allowed and forbidden bodies that are expensive to read, and a server that measures what they cost.

`benchmarks/parsing.py` prints the measurement; `test_serving_bodies.py` asserts it.
"""

import asyncio
import base64
import gc
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from PIL import Image

import deepstack_jax as dsj
from deepstack_jax.cli.http_server import settle_heap
from deepstack_jax.engine.options import EngineOptions
from deepstack_jax.serving.http import create_app
from deepstack_jax.serving.policy import MediaPolicy
from deepstack_jax.serving.text_node import TextNode
from deepstack_jax.testing.random_checkpoint import tiny_config, write_random_checkpoint
from tests.api_server import THINKING_TEMPLATE
from tests.tiny_tokenizer import save_tiny_tokenizer

MIB = 1 << 20
TEXT = 16 * MIB  # the server's limit of a body without its media
CONTEXT = 1 << 18
BEAT_SECONDS = 0.005


@dataclass(frozen=True)
class Body:
    """A POST body and what its answer is.

    Attributes:
        path: where it is sent.
        build: makes the body.
        words: of the answer.
        status: of the answer.
    """

    path: str
    build: Callable[[], bytes]
    words: str
    status: int = 400


CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
GENERATE, TOKENIZE, DETOKENIZE = "/generate", "/tokenize", "/detokenize"
USER = {"role": "user", "content": "a"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
FULL = "ab " * (CONTEXT // 3)  # one token per character
LONG = {"max_tokens": CONTEXT}  # refused, but only once the prompt's tokens are counted
# what the bounds are called
TOO_MANY, TOO_DEEP, LONG_NUMBER = "lists, objects and keys", "levels of lists and objects", "a number of more than"
TOO_LONG, NO_ROOM = "characters, too many for", f"exceed the {CONTEXT} of this server"


def _body(path: str, words: str, status: int = 400, **fields: Any) -> Body:
    """A body of a few fields."""
    return Body(path, lambda: json.dumps(fields).encode(), words, status)


def _chat(words: str, status: int = 400, **fields: Any) -> Body:
    return _body(CHAT, words, status, **{"messages": [USER], "max_tokens": 1} | fields)


def _said(content: bytes, words: str, status: int = 400, **fields: Any) -> Body:
    """A chat of one message, whose content is JSON."""
    more = "".join(f",{json.dumps(name)}:{json.dumps(value)}" for name, value in ({"max_tokens": 1} | fields).items())
    return Body(CHAT, lambda: b'{"messages":[{"role":"user","content":' + content + b"}]" + more.encode() + b"}", words)


def _many(path: str, before: bytes, item: bytes, after: bytes, words: str, status: int = 400, size: int = TEXT) -> Body:
    """A body of about `size` bytes: as many items as fit, with commas between them."""
    return Body(path, lambda: before + b",".join([item] * (size // (len(item) + 1))) + after, words, status)


def _unknown(item: bytes, words: str, size: int = TEXT) -> Body:
    """A chat request with items in a field that nothing reads."""
    return _many(CHAT, b'{"messages":[{"role":"user","content":"a"}],"u":[', item, b"]}", words, size=size)


def _deep(before: bytes, after: bytes, levels: int, words: str = TOO_DEEP) -> Body:
    start = b'{"messages":[{"role":"user","content":"a"}],"u":'
    return Body(CHAT, lambda: start + before * levels + b"1" + after * levels + b"}", words)


def _picture(size: int = 0) -> str:
    """The base64 of a small image; with a size, of so many bytes that only begin like one."""
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "PNG")
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(size) if size else file.getvalue()).decode()


def _part(data: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


PARTS = b'{"messages":[{"role":"user","content":[', b"]}]}"

STRUCTURE = {
    "lists that nothing reads": _unknown(b"[]", TOO_MANY),
    "objects that nothing reads": _unknown(b'{"a":{}}', TOO_MANY),
    "a list instead of an object": _many(GENERATE, b"[", b"[]", b"]", TOO_MANY),
    "keys": Body(GENERATE, lambda: b"{" + b",".join(b'"%x":1' % i for i in range(TEXT // 11)) + b"}", TOO_MANY),
    "one key": _many(GENERATE, b"{", b'"a":1', b"}", TOO_MANY),
    "deep lists": _deep(b"[", b"]", 900),
    "very deep lists": _deep(b"[", b"]", TEXT // 2, TOO_MANY),
    "deep objects": _deep(b'{"a":', b"}", 900),
    "white space": Body(GENERATE, lambda: b" " * TEXT + b'{"text":"a"}', "bytes outside of strings"),
    "zeros": Body(CHAT, lambda: bytes(TEXT), "not valid JSON"),
    "quotation marks": Body(CHAT, lambda: b'"' * TEXT, "not valid JSON"),
    "backslashes": Body(CHAT, lambda: b'{"a":"' + b"\\" * TEXT, "escaped characters"),
}
NUMBERS = {
    "long floats": _unknown(b"1.23456789012345678901234567890123456789e-300", LONG_NUMBER),
    "floats of 22 digits": _unknown(b"1234567890123456789012e-300", "numbers of more than 20", 12 * MIB),
    "long integers": _unknown(b"1" * 4299, LONG_NUMBER),
    "a million digits": Body(CHAT, lambda: b'{"messages":[],"seed":' + b"1" * MIB + b"}", LONG_NUMBER),
    "a million decimals": Body(CHAT, lambda: b'{"messages":[],"top_p":0.' + b"1" * MIB + b"}", LONG_NUMBER),
}
STRINGS = {
    "escaped line breaks": _said(b'"' + b"\\n" * (TEXT // 2) + b'"', "escaped characters"),
    "escaped letters": _said(b'"' + b"\\u00e9" * (TEXT // 6) + b'"', "escaped characters"),
    "a surrogate": _said(b'"\\ud800"', "not valid JSON"),
    "wrong UTF-8": _said(b'"' + b"a" * TEXT + b'\xff"', "not valid JSON"),
    "a text of 16 MB": _said(b'"' + b"a" * (TEXT - 100) + b'"', TOO_LONG),
    "a text as long as media": _said(b'"' + b"a" * (40 * MIB) + b'"', TOO_LONG),
    "letters of three bytes": _said(b'"' + "中".encode() * (TEXT // 3 - 100) + b'"', TOO_LONG),
    "a text of five contexts": _said(b'"' + FULL.encode() * 5 + b'"', TOO_LONG),
    "a text of four contexts": _said(b'"' + FULL.encode() * 4 + b'"', TOO_LONG),
    "a text of one context": _said(b'"' + FULL.encode() + b'"', NO_ROOM, **LONG),
    "a text of /generate": _body(GENERATE, NO_ROOM, text=FULL, max_tokens=CONTEXT),
    "spaces": _body(COMPLETIONS, NO_ROOM, prompt=" " * CONTEXT, **LONG),
    "combining characters": _body(COMPLETIONS, NO_ROOM, prompt="a" + "\u0301\u0323" * (CONTEXT // 5), **LONG),
    "special tokens": _body(COMPLETIONS, NO_ROOM, prompt="<|im_start|>" * (CONTEXT // 2), **LONG),
    "halves of markers": _said(b'"' + b"<|vision_start|>" * (CONTEXT // 17) + b'"', NO_ROOM, **LONG),
}
MESSAGES = {
    "messages": _many(CHAT, b'{"messages":[', b'{"role":"user","content":""}', b"]}", TOO_MANY),
    "messages of /generate": _many(GENERATE, b'{"messages":[', b'{"role":"user","content":"a"}', b"]}", TOO_MANY),
    "4097 messages": _chat("expected array of length <= 4096", messages=[USER] * 4097),
    "4096 messages": _chat(NO_ROOM, messages=[USER] * 4096, **LONG),
    "empty parts": _many(CHAT, PARTS[0], b'{"type":"text","text":""}', PARTS[1], TOO_MANY),
    "texts as parts": _many(CHAT, PARTS[0], b'""', PARTS[1], "values"),
    "parts below the bound of objects": _many(
        CHAT, PARTS[0], b'{"type":"text"}', PARTS[1], "8192 parts", size=MIB // 2
    ),
    "images": _many(CHAT, PARTS[0], json.dumps(_part(_picture())).encode(), PARTS[1], "32 images", 413, MIB),
    "images of /generate": _body(GENERATE, "array of length <= 4096", text="a", image_data=[_picture()] * 20_000),
    "frames": _body(GENERATE, "a video of 300000 frames", 413, text="a", video_data=[["a"] * 300_000]),
    "an image of 31 MB": Body(
        CHAT,
        lambda: json.dumps({"messages": [{"role": "user", "content": [_part(_picture(31 * MIB))]}]}).encode(),
        "is not an image",
    ),
    "base64 of 31 MB": Body(
        GENERATE, lambda: json.dumps({"text": "a", "image_data": _picture(31 * MIB)}).encode(), "is not an image"
    ),
    "items": _many(RESPONSES, b'{"input":[', b'{"role":"user","content":""}', b"]}", TOO_MANY),
    "reasoning": _body(
        RESPONSES,
        NO_ROOM,
        input=[{"type": "reasoning", "content": [{"text": "a"}] * 20_000}, USER],
        max_output_tokens=CONTEXT,
    ),
}
OPTIONS = {
    "stop strings": _chat("values", stop=["a"] * 1_000_000),
    "257 stop strings": _chat("array of length <= 256", stop=["a"] * 257),
    "a stop string": _chat("str of length <= 1024", stop="a" * (TEXT - 200)),
    "biases": _chat(TOO_MANY, logit_bias={str(i): 1 for i in range(300_000)}),
    "biases of /generate": _body(
        GENERATE, "object of length <= 300", text="a", logit_bias={str(i): 1 for i in range(60_000)}
    ),
    "stop tokens": _chat("array of length <= 14", stop_token_ids=list(range(500_000))),
    "template variables": _chat("object of length <= 64", chat_template_kwargs={f"v{i}": 1 for i in range(100_000)}),
    "a template variable": _chat(NO_ROOM, chat_template_kwargs={"x": [[["a"] * 10] * 10] * 100}, **LONG),
    "a variable's name": _chat("str of length <= 256", chat_template_kwargs={"v" * MIB: 1}),
    "media options": _chat("object of length <= 64", mm_processor_kwargs={f"v{i}": 1 for i in range(100_000)}),
    "tools": _chat(TOO_MANY, tools=[TOOL] * 100_000),
    "257 tools": _chat("array of length <= 256", tools=[TOOL] * 257),
    "tools to count": _body(TOKENIZE, "array of length <= 256", messages=[USER], tools=[TOOL] * 10_000),
    "a tool's schema": _chat(
        "is too long: send at most 65536",
        tools=[{"function": {"name": "f", "parameters": {"properties": {f"p{i}": {} for i in range(20_000)}}}}],
        tool_choice="required",
    ),
    "a tool's description": _chat(TOO_LONG, tools=[{"function": {"name": "f", "description": "a" * (TEXT - 300)}}]),
    "a tool's name": _chat("str of length <= 256", tools=[{"function": {"name": "f" * MIB}}]),
    "a schema": _chat(
        "is too long: send at most 65536",
        response_format={"type": "json_schema", "json_schema": {"schema": {"enum": ["a" * (TEXT - 400)]}}},
    ),
    "a regular expression": _chat("is too long: send at most 65536", regex="a" * (TEXT - 400)),
    "empty lines of a grammar": _chat("no rule named start", structured_outputs={"grammar": "\n" * 60_000}),
    "outputs to choose from": _chat("array of length <= 4096", structured_outputs={"choice": ["a"] * 500_000}),
    "a grammar": _body(GENERATE, "is too long: send at most 65536", text="a", lark="start: " + "'a' " * (2 * MIB)),
    "metadata": _body(RESPONSES, "object of length <= 16", input="a", metadata={f"k{i}": "v" for i in range(100_000)}),
    "a user": _body(RESPONSES, "str of length <= 1024", input="a", user="u" * (TEXT - 200)),
    "a model": _chat("str of length <= 256", model="m" * (TEXT - 200)),
    "an unknown field": Body(GENERATE, lambda: json.dumps({"u" * (TEXT - 200): 1}).encode(), "unknown field uuu"),
    "a role": _chat("messages[0].role 'uuu", messages=[USER | {"role": "u" * (CONTEXT // 2)}]),
}
TOKENS = {
    "prompts": _body(COMPLETIONS, "values", prompt=["a"] * 1_000_000),
    "129 prompts": _body(COMPLETIONS, "129 prompts: send 1 to 128", prompt=["a"] * 129),
    "long prompts": _body(COMPLETIONS, "tokens together: send fewer", prompt=[FULL] * 8),
    "prompts of many choices": _body(COMPLETIONS, "128 answers together", prompt=["a"] * 128, n=128),
    "choices": _chat("64 requests are waiting", 503, n=128),
    "echoes": _body(COMPLETIONS, NO_ROOM, prompt=FULL, n=128, echo=True, **LONG),
    "token ids": _body(COMPLETIONS, "values", prompt=[1] * (TEXT // 3 - 100)),
    "token ids of a context": _body(COMPLETIONS, NO_ROOM, prompt=[1] * CONTEXT),
    "token ids of /generate": _body(GENERATE, NO_ROOM, input_ids=[1] * CONTEXT),
    "prompts of token ids": _body(COMPLETIONS, "prompts: send 1 to 128", prompt=[[1, 2]] * 100_000),
    "a text to count": _body(TOKENIZE, '"count":', 200, prompt=FULL, return_token_strs=True),
    "messages to count": _body(TOKENIZE, '"count":', 200, messages=[USER] * 4096),
    "tokens to join": _body(DETOKENIZE, '"prompt":"b', 200, tokens=[65] * CONTEXT),
    "too many tokens to join": _body(DETOKENIZE, "values", tokens=[65] * 3_000_000),
}
BODIES: dict[str, Body] = STRUCTURE | NUMBERS | STRINGS | MESSAGES | OPTIONS | TOKENS


@dataclass(frozen=True)
class Measured:
    """What one body cost.

    Attributes:
        status, text: of the answer.
        seconds: from sending to the whole answer.
        stall_seconds: the event loop's longest, in which this process had a processor.
        memory: bytes by which the process grew at its largest.
    """

    status: int
    text: str
    seconds: float
    stall_seconds: float
    memory: int


class MeasuredServer:
    """A server in a thread of this process, with a heartbeat in its event loop."""

    def __init__(self, address: tuple[str, int]):
        self.stall = 0.0
        self.address = address

    async def beat(self) -> None:
        """Notes by how much the loop is late, unless the machine was busy with other processes."""
        last, worked = time.perf_counter(), time.process_time()
        while True:
            await asyncio.sleep(BEAT_SECONDS)
            now, work = time.perf_counter(), time.process_time()
            self.stall = max(self.stall, min(now - last - BEAT_SECONDS, work - worked))
            last, worked = now, work

    def post(self, path: str, body: bytes) -> Measured:
        """Sends a body over a plain socket, which leaves the interpreter to the server."""
        head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: {len(body)}\r\n\r\n"
        before = _reset_peak()
        self.stall, begun = 0.0, time.perf_counter()
        with socket.create_connection(self.address, timeout=600) as connection:
            connection.sendall(head.encode())
            connection.sendall(body)
            pieces = []
            while piece := connection.recv(1 << 20):
                pieces.append(piece)
        answer = b"".join(pieces)
        seconds = time.perf_counter() - begun
        time.sleep(4 * BEAT_SECONDS)  # the beat after the last stall
        stall, memory = self.stall, _peak() - before
        status, text = int(answer.split(b" ", 2)[1]), answer.partition(b"\r\n\r\n")[2].decode()
        return Measured(status, text, seconds, stall, memory)


@contextmanager
def measured_server(folder: Path, timeout: float = 600.0) -> Iterator[MeasuredServer]:
    """A server of a tiny model whose context is a real one's."""
    config = tiny_config(text_config={"num_hidden_layers": 1, "max_position_embeddings": CONTEXT})
    write_random_checkpoint(folder / "tiny", config, seed=5)
    (folder / "tiny" / "chat_template.jinja").unlink(missing_ok=True)
    save_tiny_tokenizer(folder / "tiny", chat_template=THINKING_TEMPLATE)
    policy = MediaPolicy()
    options = EngineOptions(slots=8, chunk=128)
    node = TextNode(dsj.load(folder / "tiny"), policy, name="tiny", engine=options, warm_up=False)
    assert node.processor.longest_token  # loads the tokenizer, which a server does before it is ready
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    config = uvicorn.Config(
        create_app(node, policy, timeout=timeout), http="h11", ws="none", lifespan="off", log_config=None
    )
    server, measured = uvicorn.Server(config), MeasuredServer(listener.getsockname())

    async def serve() -> None:
        beat = asyncio.create_task(measured.beat())
        await server.serve([listener])
        beat.cancel()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    settle_heap()  # as the command does
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield measured
    finally:
        gc.unfreeze()
        server.should_exit = True
        thread.join(60)
        node.stop(0)
        asyncio.run(node.close())


def _reset_peak() -> int:
    """Begins to look for a new peak of this process's memory; returns its memory now, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) << 10
