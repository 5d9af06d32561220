"""A server of OpenAI's API in a thread of the test, and the real `openai` clients for it."""

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import openai
import uvicorn

import deepstack_jax as dsj
from deepstack_jax.engine.options import EngineOptions
from deepstack_jax.serving.http import create_app
from deepstack_jax.serving.policy import MediaPolicy
from deepstack_jax.serving.text_node import TextNode
from deepstack_jax.testing.random_checkpoint import tiny_config, write_random_checkpoint
from tests.tiny_tokenizer import save_tiny_tokenizer

# the format of Qwen's reasoning checkpoints, as far as the tests need it
THINKING_TEMPLATE = """
{%- if tools %}{{ '<|im_start|>system\n<tools>\n' }}{% for tool in tools %}{{ tool | tojson + '\n' }}{% endfor %}
{{- '</tools><|im_end|>\n' }}{% endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\n' }}
{%- if message.reasoning_content %}{{ '<think>\n' + message.reasoning_content + '\n</think>\n\n' }}{% endif %}
{{- message.content }}
{%- for call in message.tool_calls or [] %}
{{- '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}
{{- '}\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}
{%- if enable_thinking is undefined or enable_thinking %}{{ '<think>\n' }}{% endif %}{% endif %}
"""


def write_thinking_checkpoint(path: Any) -> None:
    """A random model of one layer whose template has tools and opens its reasoning in the prompt."""
    config = tiny_config(text_config={"num_hidden_layers": 1, "max_position_embeddings": 2048})
    write_random_checkpoint(path, config, seed=5)
    (path / "chat_template.jinja").unlink(missing_ok=True)
    save_tiny_tokenizer(path, chat_template=THINKING_TEMPLATE)


@contextmanager
def api_server(
    model: dsj.Model, name: str, options: EngineOptions, max_context: int | None = None, **app: Any
) -> Iterator[str]:
    """The URL of a server in a thread."""
    policy = MediaPolicy()
    node = TextNode(model, policy, name=name, engine=options, max_context=max_context, warm_up=False)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    config = uvicorn.Config(create_app(node, policy, **app), http="h11", ws="none", lifespan="off", log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(60)
        node.stop(0)
        asyncio.run(node.close())


def client_of(url: str, **options: Any) -> openai.OpenAI:
    """OpenAI's client of a server."""
    return openai.OpenAI(base_url=f"{url}/v1", **{"api_key": "none", "max_retries": 0, "timeout": 120} | options)
