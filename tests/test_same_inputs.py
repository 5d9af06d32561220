"""Library, command, server and split take the same prompts, to the same tokens, and refuse the same ones.

One table of requests. Each goes to `dsj.prepare` and `dsj.generate`, to `deepstack-jax generate`, to a unified node and
to a language node whose encode node is a process of its own.
"""

import base64
import contextlib
import gzip
import http.server
import io
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import av
import numpy as np
import pytest
from PIL import Image

import deepstack_jax as dsj
from deepstack_jax.cli import main
from tests.nodes import BLOCK, POOL, ServeNode, serving, write_image_sensitive_checkpoint

TOKENS = 6
SIZE = (64, 64)
MARKED = "<|vision_start|><|image_pad|><|vision_end|>"
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}


def pixels(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*SIZE, 3), np.uint8)


def encoded(form: str = "PNG", seed: int = 1, **options: Any) -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(pixels(seed))
    if options.pop("moving", False):
        options |= {"save_all": True, "append_images": [Image.fromarray(pixels(seed + i)) for i in (1, 2, 3)]}
        options |= {"duration": 250}
    image.convert(options.pop("mode", "RGB")).save(file, form, **options)
    return file.getvalue()


def clip(container: str = "mp4", codec: str = "mpeg4") -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(codec, rate=4)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for seed in range(4):
            output.mux(stream.encode(av.VideoFrame.from_ndarray(pixels(seed), format="rgb24")))
        output.mux(stream.encode())
    return file.getvalue()


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


def uri(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64_of(data)}"


def user(*parts: Any, **message: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts), **message}]


def image(form: str = "PNG", **options: Any) -> dict[str, Any]:
    return {"type": "image", "image": uri(encoded(form, **options))}


def video(source: Any, **options: Any) -> dict[str, Any]:
    return {"type": "video", "video": source, **options}


FRAMES = [uri(encoded(seed=seed)) for seed in range(4)]
JPEGS = "data:video/jpeg;base64," + ",".join(base64_of(encoded("JPEG", seed)) for seed in range(4))
PNG = encoded()
WRAPPED = "\n".join(base64_of(PNG)[i : i + 76] for i in range(0, len(base64_of(PNG)), 76))

# what is said beside the prompt is called as for the library; the server calls it as `body_of` says
ACCEPTED: dict[str, dict[str, Any]] = {
    "text": {"prompt": "Who?"},
    "image beside text": {"prompt": "Who?", "images": [uri(PNG)]},
    "bare base64": {"prompt": "Who?", "images": [base64_of(PNG)]},
    "wrapped base64": {"prompt": "Who?", "images": [f"data:image/png;base64, {WRAPPED}\n"]},
    "a path": {"prompt": "Who?", "images": ["MEDIA/a picture.png"]},
    "a URL with spaces and letters beyond ASCII": {"prompt": "Who?", "images": ["SITE/ä b.png?q=ü x#part"]},
    "a URL that answers compressed": {"prompt": "Who?", "images": ["SITE/gzip/a.png"]},
    "markers": {"prompt": f"{MARKED}Who?", "images": [uri(PNG)]},
    "a whole prompt": {"prompt": f"<|im_start|>user\n{MARKED}<|im_end|>\n", "images": [uri(PNG)]},
    "image_url": {"messages": user({"type": "image_url", "image_url": {"url": uri(PNG), "detail": "auto"}}, "Who?")},
    "input_image": {
        "messages": user({"type": "input_image", "image_url": uri(PNG)}, {"type": "input_text", "text": "?"})
    },
    "image under base64": {"messages": user({"type": "image", "base64": base64_of(PNG)}, "Who?")},
    "image without a type": {"messages": user({"image": uri(PNG)}, {"text": "Who?"})},
    "image from the list": {"messages": user({"type": "image"}, "Who?"), "images": [uri(PNG)]},
    "nulls of other parts": {"messages": user({**image(), "text": None, "fps": None}, "Who?")},
    "JPEG": {"messages": user(image("JPEG"), "Who?")},
    "MPO": {"messages": user(image("MPO", save_all=True, append_images=[Image.new("RGB", SIZE)]), "Who?")},
    "WebP": {"messages": user(image("WEBP", lossless=True), "Who?")},
    "GIF": {"messages": user(image("GIF", mode="P"), "Who?")},
    "TIFF": {"messages": user(image("TIFF", mode="CMYK"), "Who?")},
    "BMP": {"messages": user(image("BMP"), "Who?")},
    "AVIF": {"messages": user(image("AVIF"), "Who?")},
    "grey with alpha": {"messages": user(image(mode="LA"), "Who?")},
    "max_pixels of a part": {"messages": user({**image(), "max_pixels": 4096}, "Who?")},
    "resized": {"messages": user({**image(), "resized_height": 96, "resized_width": 64}, "Who?")},
    "max_pixels of the call": {"prompt": "Who?", "images": [uri(PNG)], "max_pixels": 4096},
    "images_kwargs": {"prompt": "Who?", "images": [uri(PNG)], "images_kwargs": {"max_pixels": 4096}},
    "video": {"prompt": "What?", "videos": [uri(clip(), "video/mp4")]},
    "video_url": {"messages": user({"type": "video_url", "video_url": {"url": uri(clip(), "video/mp4")}}, "What?")},
    "frames": {"messages": user(video(FRAMES, fps=2), "What?")},
    "frames beside text": {"prompt": "What?", "videos": [FRAMES]},
    "all frames": {"messages": user(video(FRAMES, fps=4, do_sample_frames=False), "What?")},
    "JPEG frames in one URI": {"messages": user(video(JPEGS), "What?")},
    "num_frames": {"messages": user(video(uri(clip(), "video/mp4"), num_frames=2), "What?")},
    "fps of the call": {"prompt": "What?", "videos": [uri(clip(), "video/mp4")], "fps": 1.0, "min_frames": 2},
    "moving GIF": {"messages": user(video(uri(encoded("GIF", moving=True), "image/gif")), "What?")},
    "moving WebP": {"messages": user(video(uri(encoded("WEBP", moving=True), "image/webp")), "What?")},
    "moving PNG": {"messages": user(video(uri(encoded("PNG", moving=True), "image/apng")), "What?")},
    "moving AVIF": {"messages": user(video(uri(encoded("AVIF", moving=True), "image/avif")), "What?")},
    "system and developer": {"messages": [{"role": "developer", "content": "Be brief."}, *user("Who?")]},
    "tools": {"messages": user("Who?"), "tools": [{"type": "function", "function": {"name": "weather"}}]},
    "a call and its result": {
        "messages": [
            *user("Who?"),
            {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None},
            {"role": "tool", "content": "21", "tool_call_id": "c1", "name": "weather"},
        ]
    },
    "reasoning": {
        "messages": [*user("Who?"), {"role": "assistant", "content": "I", "reasoning_content": "hm"}, *user("?")]
    },
    "no thinking": {"messages": user(image(), "Who?"), "enable_thinking": False},
    "variables": {"messages": user("Who?"), "chat_template_kwargs": {"enable_thinking": True}},
}
# and a word that all four say
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({"prompt": ""}, "empty prompt"),
    "a typed placeholder": ({"prompt": "What is <|image_pad|>?"}, "the text holds <|image_pad|>"),
    "a typed placeholder beside an image": (
        {"messages": user(image(), "What is <|image_pad|>?")},
        "the text holds <|image_pad|>",
    ),
    "an image too many": ({"prompt": MARKED, "images": [uri(PNG)] * 2}, "1 image placeholders"),
    "a misspelt option": ({"messages": user({**image(), "max_pixel": 3})}, "unknown key 'max_pixel'"),
    "a misspelt message key": ({"messages": user("a", contents="b")}, "unknown field messages[0].contents"),
    "a role": ({"messages": [{"role": "robot", "content": "a"}]}, "messages[0].role 'robot'"),
    "a picture under no key": ({"messages": user({"type": "image_url"}, "a")}, "nothing was found under image_url"),
    "an option out of range": ({"messages": user({**image(), "max_pixels": 0})}, "max_pixels"),
    "an option of the call out of range": ({"prompt": "a", "images": [uri(PNG)], "min_pixels": -1}, "min_pixels"),
    "fps and num_frames": ({"messages": user(video(FRAMES, fps=1, num_frames=2))}, "num_frames"),
    "low detail": (
        {"messages": user({"type": "image_url", "image_url": {"url": uri(PNG), "detail": "low"}})},
        "detail 'low'",
    ),
    "no picture": ({"prompt": "a", "images": [uri(b"hello")]}, "is not an image"),
    "bad base64": ({"prompt": "a", "images": ["data:image/png;base64,!"]}, "is not valid base64"),
    "a truncated picture": ({"prompt": "a", "images": [uri(PNG[:-3000])]}, "truncated"),
    "a moving picture as an image": ({"prompt": "a", "images": [uri(encoded("WEBP", moving=True))]}, "as a video"),
    "pages": (
        {"prompt": "a", "images": [uri(encoded("TIFF", moving=True), "image/tiff")]},
        "pages",
    ),
    "a missing URL": ({"prompt": "a", "images": ["SITE/404"]}, "answered 404"),
    "tools of the wrong kind": ({"messages": user("a"), "tools": [3]}, "tools"),
    "a variable of our own": (
        {"messages": user("a"), "chat_template_kwargs": {"tokenize": 1}},
        "chat_template_kwargs.tokenize",
    ),
    "no frames": ({"messages": user(video([]), "a")}, "no frames"),
}


class Site(http.server.BaseHTTPRequestHandler):
    """One picture under every path but 404, compressed under /gzip/ whatever the client takes."""

    def do_GET(self) -> None:
        path = unquote(self.path)
        body = encoded(seed=5)
        self.send_response(404 if path == "/404" else 200)
        if path.startswith("/gzip/"):
            body = gzip.compress(body)
            self.send_header("Content-Encoding", "gzip")
        else:
            assert path in ("/ä b.png?q=ü x", "/404"), path
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def site() -> Iterator[int]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("media")
    (path / "a picture.png").write_bytes(encoded(seed=6))
    return path


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a template that reads tools, reasoning and thinking."""
    from tests.test_processing_messages import TOOLS_TEMPLATE

    path = tmp_path_factory.mktemp("inputs") / "tiny"
    write_image_sensitive_checkpoint(path, min_pixels=4096)
    (path / "chat_template.jinja").write_text(TOOLS_TEMPLATE)
    return path


@pytest.fixture(scope="module")
def model(template: Path) -> dsj.Model:
    return dsj.load(template)


@pytest.fixture(scope="module")
def nodes(template: Path, media: Path, site: int) -> Iterator[dict[str, ServeNode]]:
    allowed = ("--allow-folder", str(media), "--allow-domain", "localhost", "--allow-network", "127.0.0.0/8")
    allowed += ("--allow-network", "::1/128", "--allow-port", str(site))
    with contextlib.ExitStack() as stack:
        unified = ServeNode(template, *allowed)
        stack.callback(unified.close)
        encode = stack.enter_context(serving(template, "--role", "encode", *BLOCK))
        split = ("--role", "language", "--encoder", encode.control, *BLOCK, *POOL)
        language = stack.enter_context(serving(template, *split, *allowed))
        language.ask_when_connected(text="Who?", image_data=uri(PNG))
        yield {"unified": unified.wait(), "language": language}


@pytest.fixture
def placed(media: Path, site: int) -> Any:
    """Puts addresses of this run in place of those that the table can't know."""

    def place(value: Any) -> Any:
        if isinstance(value, str):
            return value.replace("MEDIA", str(media)).replace("SITE", f"http://localhost:{site}")
        if isinstance(value, dict):
            return {key: place(one) for key, one in value.items()}
        return [place(one) for one in value] if isinstance(value, list) else value

    return place


def by_library(model: dsj.Model, case: dict[str, Any]) -> list[int]:
    options = {key: value for key, value in case.items() if key not in ("prompt", "messages")}
    inputs = dsj.prepare(model, case.get("prompt", case.get("messages")), **options)
    return dsj.generate(model, **inputs, max_new_tokens=TOKENS, eos_token_id=[]).tokens[0].tolist()


def by_command(checkpoint: Path, case: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The exit code, and the JSON or the error that it printed."""
    options = ["--max-new-tokens", str(TOKENS), "--json"]
    for key, value in case.items():
        if key in ("images", "videos"):
            for one in value:
                options += [f"--{key[:-1]}", one]
        elif key == "enable_thinking":
            options.append("--enable-thinking" if value else "--no-enable-thinking")
        else:
            options += [f"--{key.replace('_', '-')}", value if isinstance(value, str) else json.dumps(value)]
    with pytest.raises(SystemExit) as end:
        main(["generate", str(checkpoint), *options])
    said = capsys.readouterr()
    code = int(end.value.code or 0)
    return code, said.err if code else said.out


def body_of(case: dict[str, Any]) -> dict[str, Any]:
    """The case as the server's native API has it."""
    names = {"prompt": "text", "images": "image_data", "videos": "video_data"}
    plain = ("prompt", "messages", "images", "videos", "tools", "chat_template_kwargs", "enable_thinking")
    body = {names.get(key, key): value for key, value in case.items() if key in plain}
    others = {key: value for key, value in case.items() if key not in plain}
    return body | ({"mm_processor_kwargs": others} if others else {})


NOT_OF_THE_COMMAND = ("images_kwargs", "videos_kwargs")  # it has an option for each of theirs


def is_of_the_command(case: dict[str, Any]) -> bool:
    """Whether the command has a way to say it: a file name can't be a list of frames."""
    return not any(key in case for key in NOT_OF_THE_COMMAND) and not any(
        isinstance(one, list) for one in case.get("videos", ())
    )


@pytest.mark.parametrize("name", ACCEPTED)
def test_all_take_it_to_the_same_tokens(
    model: dsj.Model, template: Path, nodes: dict[str, ServeNode], placed: Any, capsys: Any, name: str
):
    case = placed(ACCEPTED[name])
    right = by_library(model, case)
    for role, node in nodes.items():
        options = {"max_new_tokens": TOKENS, "ignore_eos": True}
        assert node.ask(**body_of(case), sampling_params=options)["output_ids"] == right, role
    if is_of_the_command(case):
        code, said = by_command(template, case, capsys)
        assert code == 0, said
        # the command ends at the checkpoint's end token
        found = json.loads(said)["token_ids"]
        assert found == right[: len(found)]


@pytest.mark.parametrize("name", REFUSED)
def test_all_refuse_it_in_the_same_words(
    model: dsj.Model, template: Path, nodes: dict[str, ServeNode], placed: Any, capsys: Any, name: str
):
    case, words = placed(REFUSED[name][0]), REFUSED[name][1]
    with pytest.raises(ValueError) as error:
        by_library(model, case)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    for role, node in nodes.items():
        response = node.client.post("/generate", json=body_of(case))
        assert response.status_code == 400, (role, response.text)
        assert words in response.json()["error"]["message"], role
    if is_of_the_command(case):
        code, said = by_command(template, case, capsys)
        assert code == 1, said
        assert words in said
        assert said.count("\n") == 1
