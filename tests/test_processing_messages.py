"""Messages as people and OpenAI's clients write them: prompts of transformers' chat templates, and refusals by name."""

import base64
import io
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from deepstack_jax.config_values import ConfigError
from deepstack_jax.processing.images import ImageError
from deepstack_jax.processing.messages import Media, PromptError, parse_messages
from deepstack_jax.processing.processor import Processor
from deepstack_jax.processing.prompt_options import PromptOptions
from deepstack_jax.processing.videos import VideoError
from tests.test_processing_prompts import IMAGE, VIDEO, hf_processor, model_config
from tests.tiny_tokenizer import save_tiny_tokenizer, tiny_tokenizer

# a template that reads all that conversations with tools may hold
TOOLS_TEMPLATE = """
{%- if tools %}{{ '<|im_start|>system\n' }}
{%- if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}
{%- for tool in tools %}{{ '\n' + (tool | tojson) }}{% endfor %}{{ '<|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}{{ '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role != 'system' %}
{{- '<|im_start|>' + message.role }}{{ ' ' + message.name if message.name else '' }}{{ '\n' }}
{%- if message.reasoning_content %}{{ '[' + message.reasoning_content + ']' }}{% endif %}
{%- if message.content is string %}{{ message.content }}
{%- else %}{% for part in message.content %}
{%- if part.type == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- elif part.type == 'video' %}{{ '<|vision_start|><|video_pad|><|vision_end|>' }}
{%- else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}
{%- for call in message.tool_calls or [] %}
{%- set function = call.function or call %}
{{- '{' + function.name + ' ' }}
{%- if function.arguments is string %}{{ function.arguments }}{% else %}{{ function.arguments | tojson }}{% endif %}
{{- '}' }}{% endfor %}
{%- if message.tool_call_id %}{{ '#' + message.tool_call_id }}{% endif %}
{{- '<|im_end|>\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{ '[]\n' }}{% endif %}{% endif %}
"""
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Says how warm it is.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Ulm"}'}}
PICTURE = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)


def png(pixels: np.ndarray = PICTURE) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Processor:
    path = tmp_path_factory.mktemp("tools")
    save_tiny_tokenizer(path)
    reference = hf_processor()
    reference.image_processor.save_pretrained(path)
    reference.video_processor.save_pretrained(path)
    (path / "chat_template.jinja").write_text(TOOLS_TEMPLATE)
    return Processor.from_directory(path, model_config())


def user(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


ASKED = {"role": "user", "content": "How warm is it in Ulm?"}
CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}
CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "tools": ([ASKED], {"tools": [WEATHER]}),
    "tools after a system message": (
        [{"role": "system", "content": "Be brief."}, ASKED],
        {"tools": [WEATHER, WEATHER]},
    ),
    "a call and its result": (
        [ASKED, CALLED, {"role": "tool", "content": "21", "tool_call_id": "c1", "name": "weather"}],
        {"tools": [WEATHER]},
    ),
    "arguments as an object": (
        [ASKED, {**CALLED, "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Ulm"}}}]}, ASKED],
        {"tools": [WEATHER]},
    ),
    "calls without a wrapper": ([ASKED, {**CALLED, "tool_calls": [{"name": "f", "arguments": {}}] * 2}, ASKED], {}),
    "a result in parts, with a picture": (
        [
            ASKED,
            CALLED,
            {"role": "tool", "content": [{"type": "text", "text": "see"}, {"type": "image", "image": "x"}]},
        ],
        {},
    ),
    "reasoning": ([ASKED, {"role": "assistant", "content": "21", "reasoning_content": "hm"}, ASKED], {}),
    "names": ([{**ASKED, "name": "Eve"}], {}),
    "empty contents": ([{"role": "user", "content": []}, {"role": "assistant", "content": ""}, ASKED], {}),
    "no thinking": ([ASKED], {"enable_thinking": False}),
    "thinking": ([ASKED], {"enable_thinking": True}),
    "a variable that the template doesn't read": ([ASKED], {"nonsense": 3}),
    "variables that are no names": ([ASKED], {"a(": 3, "a\nb": 4}),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversations_equal_transformers_chat_template(processor: Processor, name: str):
    messages, variables = CONVERSATIONS[name]
    reference = hf_processor()
    reference.chat_template = TOOLS_TEMPLATE
    tools = variables.get("tools")
    variables = {key: value for key, value in variables.items() if key != "tools"}
    text = reference.apply_chat_template(messages, tools=tools, add_generation_prompt=True, **variables)
    expected = reference(text=[text], images=[PICTURE] if IMAGE in text else None, return_tensors="np")
    given = [{**m, "content": [{"type": "image"} if p["type"] == "image" else p for p in m["content"]]}
             if isinstance(m["content"], list) else m for m in messages]  # fmt: skip
    found = processor.prepare(
        given, images=[PICTURE] if IMAGE in text else [], tools=tools, chat_template_kwargs=variables
    )
    np.testing.assert_array_equal(found["input_ids"], expected["input_ids"])


def ids(processor: Processor, *args: Any, **options: Any) -> list[int]:
    return processor.prepare(*args, **options)["input_ids"][0].tolist()


def test_what_openai_writes_into_messages_says_the_same(processor: Processor):
    """Nulls are absent, and an answer of OpenAI's client can be sent back as it came."""
    plain = [ASKED, CALLED, {"role": "tool", "content": ""}, ASKED]
    dumped = [
        {**ASKED, "name": None},
        {**CALLED, "content": None, "refusal": None, "audio": None, "function_call": None, "annotations": []},
        {"role": "tool", "content": None, "tool_calls": None},
        {**ASKED, "tool_calls": []},
    ]
    assert ids(processor, dumped) == ids(processor, plain)
    without = [ASKED, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": ""}, ASKED]
    assert ids(processor, without) == ids(processor, plain)
    assert ids(processor, [ASKED], enable_thinking=False) == ids(
        processor, [ASKED], chat_template_kwargs={"enable_thinking": False}
    )


def test_a_developer_is_a_system_to_templates_that_know_none(processor: Processor):
    as_system, as_developer = ([{"role": role, "content": "Be brief."}, ASKED] for role in ("system", "developer"))
    assert ids(processor, as_developer) == ids(processor, as_system)


def test_python_functions_are_tools_as_for_transformers(processor: Processor):
    def weather(city: str) -> str:
        """
        Says how warm it is.

        Args:
            city: where.
        """
        return city

    reference = hf_processor()
    reference.chat_template = TOOLS_TEMPLATE
    text = reference.apply_chat_template([ASKED], tools=[weather], add_generation_prompt=True)
    assert ids(processor, [ASKED], tools=[weather]) == reference(text=[text])["input_ids"][0]


def test_a_variable_that_is_not_read_is_logged_and_tools_without_a_place_are_refused(
    processor: Processor, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.WARNING, "deepstack_jax"):
        ids(processor, [ASKED], chat_template_kwargs={"nonsense": 3})
    assert "doesn't read nonsense" in caplog.text
    save_tiny_tokenizer(tmp_path, chat_template="{{ messages[0].content }}")
    toolless = Processor.from_directory(tmp_path, model_config(text_only=True))
    with pytest.raises(PromptError, match="has no place for tools"):
        toolless.prepare([ASKED], tools=[WEATHER])


@pytest.mark.parametrize(
    "messages", [[ASKED, CALLED, ASKED], [{**ASKED, "name": "Eve"}], [{"role": "tool", "content": "a"}]]
)
def test_a_checkpoint_without_a_template_refuses_what_its_format_can_not_say(tmp_path: Path, messages: list):
    save_tiny_tokenizer(tmp_path)
    bare = Processor.from_directory(tmp_path, model_config())
    with pytest.raises(PromptError, match="has no chat template, and so no place for"):
        bare.prepare(messages)
    with pytest.raises(PromptError, match="no place for tools"):
        bare.prepare([ASKED], tools=[WEATHER])


# ---- parts

BASE64 = base64.b64encode(png()).decode()
URI = "data:image/png;base64," + BASE64


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": URI},
        {"type": "image", "image": png()},
        {"type": "image", "image": PICTURE},
        {"type": "image", "url": URI},
        {"type": "image", "base64": BASE64},
        {"type": "image", "base64": URI},
        {"type": "image", "data": BASE64, "mimeType": "image/png"},
        {"type": "image", "image": BASE64},
        {"type": "image", "image_url": URI},
        {"type": "image", "image_url": {"url": URI}},
        {"type": "image", "image": {"url": URI}},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": BASE64}},
        {"type": "image", "source": {"type": "url", "url": URI}},
        {"type": "image_url", "image_url": {"url": URI, "detail": "auto"}},
        {"type": "image_url", "image_url": URI},
        {"type": "image_url", "url": URI},
        {"type": "input_image", "image_url": URI, "detail": "high"},
        {"type": "image", "image": URI, "text": None, "video": None, "fps": None},
        {"image": URI},
        {"image_url": {"url": URI}},
    ],
)
def test_pictures_under_the_keys_that_people_use_are_one_picture(processor: Processor, part: dict[str, Any]):
    expected = processor.prepare(user({"type": "image"}, "What?"), images=[PICTURE])
    for text in ("What?", {"type": "input_text", "text": "What?"}, {"text": "What?"}):
        found = processor.prepare(user(part, text))
        assert found.keys() == expected.keys()
        for name in found:
            np.testing.assert_array_equal(found[name], expected[name])


@pytest.mark.parametrize(
    ("part", "words"),
    [
        (
            {"type": "image", "img": URI},
            "unknown key 'img': a part of type image has image, image_url, url, path, base64",
        ),
        ({"type": "image", "image": URI, "max_pixel": 9}, "unknown key 'max_pixel'.*max_pixels"),
        ({"type": "image", "image": URI, "fps": 2}, "unknown key 'fps'"),
        ({"type": "image", "image": URI, "misspelt": None}, "unknown key 'misspelt'"),
        ({"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}, "unknown key 'cache_control'"),
        ({"type": "text", "text": "a", "image": URI}, "unknown key 'image': a part of type text has text"),
        ({"type": "text", "text": 3}, "needs a str under text"),
        ({"type": "video", "video": "x", "total_pixels": 3}, "unknown key 'total_pixels'"),
        ({"type": "video_url", "video_url": {"url": "x", "fpps": 3}}, "video_url has the unknown key 'fpps'"),
        ({"type": "image", "image": URI, "url": URI}, "names its image twice, under image and url"),
        ({"type": "image", "image": ""}, "has no image: image is empty"),
        ({"type": "image_url"}, "has no image: nothing was found under image_url"),
        ({"type": "input_image", "file_id": "f"}, "unknown key 'file_id'"),
        ({"type": "input_image"}, "nothing was found under image_url"),
        ({"type": "image_url", "image_url": {}}, "has no image: image_url needs one of image, url"),
        ({"type": "image_url", "image_url": 7}, "image_url 7 is not text"),
        ({"type": "video_url", "video_url": {"detail": "auto"}}, "has no video: video_url needs one of"),
        ({"type": "image_url", "image_url": {"url": URI, "detail": "low"}}, "detail 'low': use one of auto, high"),
        ({"type": "image", "image": URI, "max_pixels": "many"}, "max_pixels"),
        ({"type": "video", "video": "x", "fps": 2, "num_frames": 4}, "fps"),
        ({"type": "video", "video": "x", "fps": "7"}, "fps"),
        ({"type": "sound", "sound": "x"}, "is not known: use text, image"),
        ({"type": "refusal", "refusal": "no"}, "is not known"),
        ({"nothing": 1}, "is not known"),
        (7, "content part 7 is not known"),
    ],
)
def test_a_part_that_can_not_be_read_says_which_key_is_wrong(part: Any, words: str):
    with pytest.raises((PromptError, ImageError, VideoError), match=words) as error:
        parse_messages(user(part, "What?"))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (
            {"role": "robot", "content": "a"},
            r"messages\[0\].role 'robot' is not known: use one of system, developer, user",
        ),
        ({"role": "user", "content": "a", "tool": 1}, r"unknown field messages\[0\].tool: use role, content, name"),
        ({"role": "user", "content": "a", "contents": None}, r"unknown field messages\[0\].contents"),
        ({"role": "user"}, "needs a role and a content"),
        ({"content": "a"}, "needs a role and a content"),
        ({"role": "user", "content": None}, r"messages\[0\].content None: expected text or a list of parts"),
        ({"role": "user", "content": "a", "name": 3}, r"messages\[0\].name 3: expected text"),
        ({"role": "assistant", "content": "a", "refusal": "no"}, r"messages\[0\].refusal is not supported"),
        ({"role": "assistant", "content": "a", "tool_calls": {}}, r"tool_calls {}: expected a list"),
        ({"role": "assistant", "content": "a", "tool_calls": [{"function": "f"}]}, r"tool_calls\[0\]"),
        ({"role": "user", "content": "a", "tool_calls": [CALL]}, "only an assistant calls tools"),
        ({"role": "user", "content": "a", "tool_call_id": "c"}, "only a tool's message has one"),
    ],
)
def test_a_message_that_can_not_be_read_says_which_key_is_wrong(message: Any, words: str):
    with pytest.raises(PromptError, match=words):
        parse_messages([message])


def test_options_reach_the_media_with_the_part_before_the_call():
    _, media = parse_messages(
        user(
            {"type": "image", "image": "a", "max_pixels": 5000.0},
            {"type": "image_url", "image_url": {"url": "b", "min_pixels": 3000}},
            {"type": "video_url", "video_url": "c", "num_frames": 6},
            {"type": "video", "video": ["d", "e"], "do_sample_frames": False},
        )
    )
    assert media == [
        Media("image", "a", {"max_pixels": 5000.0}),
        Media("image", "b", {"min_pixels": 3000}),
        Media("video", "c", {"num_frames": 6}),
        Media("video", ["d", "e"], {"do_sample_frames": False}),
    ]
    options = PromptOptions.of({"max_pixels": 9000, "fps": 3, "videos_kwargs": {"max_pixels": 70_000}, "tools": None})
    chosen = [options.of_media(one.kind, one.options) for one in media]
    assert [one.max_pixels for one in chosen] == [5000, 9000, 70_000, 70_000]
    assert (chosen[2].num_frames, chosen[2].fps) == (6, None)
    assert (chosen[3].num_frames, chosen[3].fps) == (None, 3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_pixel": 3}, "unknown option 'max_pixel' of a prompt: use tools"),
        ({"images_kwargs": {"fps": 2}}, "fps"),
        ({"images_kwargs": 3}, "images_kwargs 3: expected an object"),
        ({"max_pixels": 9000, "images_kwargs": {"max_pixels": 8000}}, "max_pixels is given twice"),
        ({"max_pixels": 0}, "max_pixels 0"),
        ({"fps": -1}, "fps -1"),
        ({"tools": {"type": "function"}}, "expected a list"),
        ({"tools": ["weather"]}, r"tools\[0\] 'weather'"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs.tokenize is not a variable"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs \\[\\]: expected an object"),
        ({"chat_template_kwargs": {"tools": 1}}, "is not a variable of a template"),
        ({"enable_thinking": "no"}, "enable_thinking 'no': expected true or false"),
        ({"enable_thinking": True, "chat_template_kwargs": {"enable_thinking": False}}, "differ"),
    ],
)
def test_options_of_a_prompt_are_refused_by_name(processor: Processor, options: dict[str, Any], words: str):
    with pytest.raises((PromptError, ImageError, VideoError), match=words):
        processor.prepare("Hi", **options)


# ---- placeholders in texts


@pytest.mark.parametrize("token", ["<|image_pad|>", "<|video_pad|>"])
def test_a_placeholder_that_a_person_types_is_refused_by_name(processor: Processor, token: str):
    typed = f"What does {token} mean?"
    marked = f"What does <|vision_start|>{token}<|vision_end|> mean?"
    media = {"images": [PICTURE]} if "image" in token else {"videos": [[PICTURE] * 2]}
    part: dict[str, Any] = {"type": token[2:7]}
    named = f"the text holds {token.replace('|', '[|]')}"
    said = {"role": "assistant", "content": "a"}
    for prompt, given in (
        (typed, {}),
        (typed, media),
        ([{"role": "user", "content": typed}], {}),
        ([{"role": "user", "content": typed}], media),
        (user(part, typed), media),
        (user(part, marked), media),
        ([*user(part, "a"), {**said, "content": typed}], media),
        ([*user(part, "a"), {**said, "reasoning_content": marked}], media),
        ([*user(part, "a"), {**said, "tool_calls": [{"name": "f", "arguments": {token: 1}}]}], media),
        ([*user(part, "a"), {"role": "tool", "content": typed}], media),
    ):
        with pytest.raises(PromptError, match=named):
            processor.prepare(prompt, **given)
    described = {**WEATHER, "function": {**WEATHER["function"], "description": marked}}
    with pytest.raises(PromptError, match=named):
        processor.prepare([ASKED], tools=[described])
    # put together from two parts
    with pytest.raises(PromptError, match="placeholders in the rendered prompt"):
        processor.prepare(user(token[:6], token[6:]), **media)


def test_markers_still_stand_for_what_is_given(processor: Processor):
    raw = f"<|im_start|>user\n{IMAGE}What?<|im_end|>\n<|im_start|>assistant\n"
    expected = ids(processor, user({"type": "image"}, "What?"), images=[PICTURE])
    assert ids(processor, raw, images=[PICTURE]) == expected
    assert ids(processor, [{"role": "user", "content": f"{IMAGE}What?"}], images=[PICTURE]) == expected
    bare = raw.replace(IMAGE, "<|image_pad|>")
    assert ids(processor, bare, images=[PICTURE]).count(259) == 0
    assert VIDEO not in raw


def test_to_a_text_model_a_placeholder_is_text(tmp_path: Path):
    save_tiny_tokenizer(tmp_path)
    text = Processor.from_directory(tmp_path, model_config(text_only=True))
    found = text.prepare("What does <|image_pad|> mean?")["input_ids"][0]
    wanted = tiny_tokenizer()("<|im_start|>user\nWhat does <|image_pad|> mean?<|im_end|>\n<|im_start|>assistant\n")
    assert found.tolist() == wanted["input_ids"]


def test_a_damaged_template_file_says_where(tmp_path: Path):
    save_tiny_tokenizer(tmp_path)
    (tmp_path / "chat_template.json").write_text('{"chat_template": "a",}')
    with pytest.raises(ConfigError, match=r"chat_template.json is not valid JSON \(.*line 1 column 2"):
        Processor.from_directory(tmp_path, model_config()).prepare("Hi")
    (tmp_path / "chat_template.json").write_text(json.dumps({"template": "a"}))
    with pytest.raises(PromptError, match="has no text chat_template"):
        Processor.from_directory(tmp_path, model_config()).prepare("Hi")
