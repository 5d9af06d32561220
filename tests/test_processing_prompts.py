"""Prompts: token ids and arrays of transformers' Qwen3VLProcessor, chat rendering, decoding, and bad prompts."""

import base64
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

from deepstack_jax.config import ModelConfig
from deepstack_jax.models.registry import parse_config
from deepstack_jax.processing.images import ImageError, load_image
from deepstack_jax.processing.messages import PromptError
from deepstack_jax.processing.processor import Processor
from deepstack_jax.processing.videos import VideoError
from tests.tiny_tokenizer import SPECIAL_TOKENS, save_tiny_tokenizer, tiny_tokenizer

DATA = Path(__file__).parent / "data"
CHELSEA, COFFEE = DATA / "chelsea.jpg", DATA / "coffee.jpg"
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
HALF = [0.5, 0.5, 0.5]
IMAGE_SIZE = {"shortest_edge": 1024, "longest_edge": 20_000}
VIDEO_SIZE = {"shortest_edge": 1024, "longest_edge": 60_000}

# a template unlike the built-in format, so that a test sees which of the two was used
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{% if p.type == 'image' %}(<|image_pad|>){% elif p.type == 'video' %}(<|video_pad|>){% else %}{{ p.text }}"
    "{% endif %}{% endfor %}{% endif %};{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def raw_config(text_only: bool = False) -> dict[str, Any]:
    text = {
        "vocab_size": 263,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 16,
    }
    if text_only:
        return {"model_type": "qwen3", **text}
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_heads": 2,
        "out_hidden_size": 32,
        "deepstack_visual_indexes": [0],
    }
    return {
        "model_type": "qwen3_vl",
        "image_token_id": SPECIAL_TOKENS["<|image_pad|>"],
        "video_token_id": SPECIAL_TOKENS["<|video_pad|>"],
        "text_config": text | {"rope_scaling": {"mrope_section": [4, 2, 2]}},
        "vision_config": vision,
    }


def model_config(text_only: bool = False) -> ModelConfig:
    return parse_config(raw_config(text_only))


def hf_processor() -> Qwen3VLProcessor:
    images = Qwen2VLImageProcessorPil(patch_size=16, size=IMAGE_SIZE, image_mean=HALF, image_std=HALF)
    videos = Qwen3VLVideoProcessor(size=VIDEO_SIZE, image_mean=HALF, image_std=HALF, cap_pixels_per_frame=False)
    return Qwen3VLProcessor(images, tiny_tokenizer(), videos, chat_template=TEMPLATE)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    save_tiny_tokenizer(path)
    processor = hf_processor()
    processor.image_processor.save_pretrained(path)
    processor.video_processor.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def processor(directory: Path) -> Processor:
    return Processor.from_directory(directory, model_config())


def text_of(processor: Processor, inputs: dict[str, np.ndarray], row: int = 0) -> str:
    """The prompt as the model sees it, runs of placeholders as one."""
    ids = inputs["input_ids"][row][inputs["attention_mask"][row] == 1]
    pads = (SPECIAL_TOKENS["<|image_pad|>"], SPECIAL_TOKENS["<|video_pad|>"])
    keep = [i == 0 or ids[i] != ids[i - 1] or ids[i] not in pads for i in range(len(ids))]
    return processor.tokenizer.decode(ids[keep])


def film(frames: int) -> np.ndarray:
    """Of a size that needs no resizing, so that the arrays of both video processors are equal."""
    return np.random.default_rng(frames).integers(0, 256, (frames, 32, 64, 3), np.uint8)


def assert_equal_to_transformers(inputs: dict[str, np.ndarray], expected: dict) -> None:
    assert set(inputs) == set(expected)
    for name, array in inputs.items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


# ---- against transformers


RAW_PROMPTS = {
    "text": ("<|im_start|>user\nhéllo 🌍<|im_end|>\n", [], []),
    "image": (f"<|im_start|>user\n{IMAGE}What?<|im_end|>\n", [CHELSEA], []),
    "adjacent images": ("<|im_start|>a<|image_pad|><|image_pad|>b", [COFFEE, CHELSEA], []),
    "video": (f"See: {VIDEO}!", [], [film(7)]),
    "bare video": ("<|im_start|>See: <|video_pad|>", [], [film(30)]),
    "all": (f"{VIDEO}and{IMAGE}or{IMAGE}{VIDEO}", [CHELSEA, COFFEE], [film(2), film(61)]),
}


@pytest.mark.parametrize("name", RAW_PROMPTS)
def test_raw_prompts_equal_transformers(processor: Processor, name: str):
    prompt, images, videos = RAW_PROMPTS[name]
    expected = hf_processor()(
        text=[prompt], images=[Image.open(path) for path in images] or None, videos=videos or None, return_tensors="np"
    )
    assert_equal_to_transformers(processor.prepare(prompt, images, videos), expected)


def test_a_batch_of_unlike_prompts_equals_transformers_padded_left(processor: Processor):
    prompts, images, videos = [], [], []
    for prompt, its_images, its_videos in RAW_PROMPTS.values():
        prompts.append(prompt)
        images += its_images
        videos += its_videos
    expected = hf_processor()(
        text=prompts, images=[Image.open(path) for path in images], videos=videos, padding=True, return_tensors="np"
    )
    inputs = processor.prepare(prompts, images, videos)
    assert_equal_to_transformers(inputs, expected)
    assert {name: array.dtype for name, array in inputs.items()} == {
        "input_ids": np.int32,
        "attention_mask": np.int32,
        "mm_token_type_ids": np.int32,
        "pixel_values": np.float32,
        "image_grid_thw": np.int64,
        "pixel_values_videos": np.float32,
        "video_grid_thw": np.int64,
    }


def test_a_video_file_is_timed_by_its_own_rate_as_in_transformers(processor: Processor, tmp_path: Path):
    path = tmp_path / "film.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 32, 64, "yuv420p"
        for frame in film(90):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    with av.open(str(path)) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    metadata = [{"total_num_frames": 90, "fps": 25.0}]
    expected = hf_processor()(text=[VIDEO + "?"], videos=[frames], video_metadata=metadata, return_tensors="np")
    assert_equal_to_transformers(processor.prepare(VIDEO + "?", videos=[path]), expected)


def test_messages_equal_transformers_chat_template(directory: Path, tmp_path: Path):
    """The checkpoint's own template, in each of the three places where it may stand."""
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image", "image": str(CHELSEA)}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
        {"role": "user", "content": [{"type": "text", "text": "And this?"}, {"type": "image", "image": str(COFFEE)}]},
    ]
    expected = hf_processor().apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="np"
    )
    for place in ("chat_template.jinja", "chat_template.json", "tokenizer"):
        path = tmp_path / place
        path.mkdir()
        save_tiny_tokenizer(path, chat_template=TEMPLATE if place == "tokenizer" else None)
        (path / "preprocessor_config.json").write_text((directory / "preprocessor_config.json").read_text())
        if place == "chat_template.jinja":
            (path / place).write_text(TEMPLATE)
        elif place == "chat_template.json":
            (path / place).write_text(json.dumps({"chat_template": TEMPLATE}))
        assert_equal_to_transformers(Processor.from_directory(path, model_config()).prepare(messages), expected)


def test_an_image_with_a_rotation_note_is_turned_before_its_tokens_are_counted(processor: Processor, tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(CHELSEA) as image:
        image.save(tmp_path / "turned.png", exif=exif)
    _, height, width = processor.prepare("What?", [tmp_path / "turned.png"])["image_grid_thw"][0]
    assert height > width


# ---- the conversation format where a checkpoint has no template


def test_a_plain_prompt_is_one_message_of_the_user(processor: Processor):
    inputs = processor.prepare("Hi", [CHELSEA, COFFEE], [film(2)])
    expected = (
        f"<|im_start|>user\n{IMAGE}{IMAGE}<|vision_start|><0.0 seconds>{VIDEO}<|vision_end|>"
        "Hi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert text_of(processor, inputs) == expected


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": CHELSEA},
        {"type": "image", "image": str(CHELSEA)},
        {"type": "image", "path": str(CHELSEA)},
        {"type": "image", "url": CHELSEA.as_uri()},
        {"type": "image_url", "image_url": {"url": CHELSEA.as_uri(), "detail": "high"}},
        {"type": "image_url", "image_url": "data:image/jpeg;base64," + base64.b64encode(CHELSEA.read_bytes()).decode()},
    ],
)
def test_image_parts_of_every_form_give_the_same_inputs(processor: Processor, part: dict):
    messages = [{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}]
    expected = processor.prepare("What?", [CHELSEA])
    inputs = processor.prepare(messages)
    assert set(inputs) == set(expected)
    for name in inputs:
        np.testing.assert_array_equal(inputs[name], expected[name])


def test_a_conversation_is_written_turn_by_turn_without_a_default_system_message(processor: Processor):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": ["One ", {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": "three"},
        {"role": "user", "content": "?"},
    ]
    expected = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nOne two<|im_end|>\n"
        "<|im_start|>assistant\nthree<|im_end|>\n<|im_start|>user\n?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert text_of(processor, processor.prepare(messages)) == expected
    assert text_of(processor, processor.prepare("Hi")).startswith("<|im_start|>user\nHi")


def test_parts_with_and_without_a_source_share_one_order(processor: Processor):
    messages = [
        {
            "role": "user",
            "content": [
                {"type": "image"},
                {"type": "image", "image": np.asarray(load_image(CHELSEA))},
                {"type": "image"},
            ],
        }
    ]
    square = np.zeros((64, 64, 3), np.uint8)
    grids = processor.prepare(messages, images=[COFFEE, square])["image_grid_thw"]
    alone = [processor.prepare("x", [image])["image_grid_thw"][0] for image in (COFFEE, CHELSEA, square)]
    np.testing.assert_array_equal(grids, alone)


def test_images_of_a_batch_are_taken_in_reading_order(processor: Processor):
    conversation = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}]
    square = np.zeros((64, 64, 3), np.uint8)
    inputs = processor.prepare([conversation, f"{IMAGE}b", "plain <|im_start|>"], images=[square, CHELSEA])
    assert inputs["image_grid_thw"][0].tolist() == [1, 4, 4]
    tokens = (inputs["mm_token_type_ids"] == 1).sum(axis=1)
    assert tokens.tolist() == [4, inputs["image_grid_thw"][1].prod() // 4, 0]


def test_options_of_a_video_part_are_followed(processor: Processor):
    def text(**options) -> str:
        part = {"type": "video", "video": film(40), **options}
        return text_of(processor, processor.prepare([{"role": "user", "content": [part]}]))

    assert "<0.3 seconds>" in text()  # frames 0 and 13 of 40 at 24 a second
    assert text(fps=10).count("seconds>") == 4  # 40 frames are 4 s, at 2 a second 8 frames
    assert text(do_sample_frames=False).count("seconds>") == 20


def test_a_text_checkpoint_renders_text_parts_as_one_string(tmp_path: Path):
    # templates of text models read strings alone
    save_tiny_tokenizer(tmp_path, chat_template="{{ messages[0].content + '!' }}")
    processor = Processor.from_directory(tmp_path, model_config(text_only=True))
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    inputs = processor.prepare(messages)
    assert text_of(processor, inputs) == "ab!"
    assert set(inputs) == {"input_ids", "attention_mask", "mm_token_type_ids"}


def test_a_template_that_knows_text_alone_gets_the_placeholders_written_out(directory: Path, tmp_path: Path):
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}")
    processor = Processor.from_directory(tmp_path, model_config())
    assert text_of(processor, processor.prepare("Hi", [CHELSEA])) == f"user: {IMAGE}Hi"


def test_the_tokenizer_is_read_from_the_directory_alone(directory: Path):
    """In a process of its own, since the tests themselves run with transformers' offline switch."""
    code = (
        "import json, socket, sys\n"
        "def refuse(*args, **kwargs): raise AssertionError('the network was asked')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "from deepstack_jax.models.registry import parse_config\n"
        "from deepstack_jax.processing.processor import Processor\n"
        "config = parse_config(json.loads(sys.argv[2]))\n"
        "print(Processor.from_directory(sys.argv[1], config).prepare('Hi')['input_ids'].shape)\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    command = [sys.executable, "-c", code, str(directory), json.dumps(raw_config())]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert run.stdout == "(1, 21)\n"


# ---- bad prompts


@pytest.mark.parametrize("prompt", ["", "  \n", [], [[]], [""], [{"role": "user", "content": ""}]])
def test_empty_prompts_are_refused(processor: Processor, prompt):
    with pytest.raises(PromptError, match="empty prompt"):
        processor.prepare(prompt)


@pytest.mark.parametrize(
    ("prompt", "images", "videos", "message"),
    [
        (IMAGE, [], [], "1 image placeholders in the prompt, but 0 images given"),
        (IMAGE * 3, [CHELSEA] * 2, [], "3 image placeholders in the prompt, but 2 images given"),
        ("<|im_start|>", [CHELSEA], [], "0 image placeholders in the prompt, but 1 images given"),
        (VIDEO, [CHELSEA], [], "0 image placeholders in the prompt, but 1 images given"),
        (VIDEO, [], [film(2)] * 2, "1 video placeholders in the prompt, but 2 videos given"),
        ([{"role": "user", "content": "x"}], [CHELSEA], [], "0 image placeholders .* 1 images given"),
        (
            [{"role": "user", "content": [{"type": "image"}, {"type": "image", "image": CHELSEA}]}],
            [],
            [],
            "2 image placeholders in the prompt, but 1 images given",
        ),
        (
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "<|image_pad|>"}]}],
            [CHELSEA],
            [],
            r"the text holds <\|image_pad\|>, which stands for an image",
        ),
        (["a", "b"], [CHELSEA], [], "1 images and 0 videos can't be divided among 2 plain prompts"),
    ],
)
def test_placeholders_that_do_not_match_what_is_given_are_refused(processor, prompt, images, videos, message):
    with pytest.raises(PromptError, match=message):
        processor.prepare(prompt, images, videos)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([{"role": "user", "content": [{"type": "audio", "audio": "a.wav"}]}], "content part .*audio.* is not known"),
        ([{"role": "user", "content": [{"type": "text"}]}], "is not known"),
        ([{"role": "user", "content": [3]}], "content part 3 is not known"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "has no image: image_url needs"),
        ([{"role": "user", "content": None}], "content None: expected text or a list of parts"),
        ([{"role": "robot", "content": "x"}], "role 'robot' is not known: use one of system, developer, user"),
        ([{"content": "x"}], "needs a role and a content"),
        ([3], "a prompt of a batch is a str or a list of messages, not int"),
        (3, "a prompt is a str, a list of messages"),
    ],
)
def test_malformed_messages_are_refused(processor: Processor, prompt, message: str):
    with pytest.raises(PromptError, match=message):
        processor.prepare(prompt)


def test_a_single_image_where_a_list_belongs_is_refused(processor: Processor):
    with pytest.raises(PromptError, match="images must be a list, not str"):
        processor.prepare("What?", images=str(CHELSEA))


def test_bad_media_are_refused_with_their_own_errors(processor: Processor, tmp_path: Path):
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(ImageError, match="is not an image"):
        processor.prepare("What?", images=[tmp_path / "a.png"])
    with pytest.raises(VideoError, match="no frames"):
        processor.prepare("What?", videos=[[]])


def test_a_text_checkpoint_refuses_images(directory: Path):
    processor = Processor.from_directory(directory, model_config(text_only=True))
    message = "this qwen3 checkpoint accepts only text: leave images and videos out"
    for prompt, images in (
        ("What?", [CHELSEA]),
        (IMAGE, [CHELSEA]),
        ([{"role": "user", "content": [{"type": "image"}]}], []),
    ):
        with pytest.raises(PromptError, match=message):
            processor.prepare(prompt, images)


def test_a_token_outside_the_vocabulary_is_refused(directory: Path):
    config = model_config()
    processor = Processor.from_directory(directory, replace(config, text=replace(config.text, vocab_size=200)))
    with pytest.raises(PromptError, match="token id 258 of the prompt is outside the vocabulary of 200"):
        processor.prepare("Hi")


def test_a_tokenizer_of_another_checkpoint_is_refused(directory: Path):
    processor = Processor.from_directory(directory, replace(model_config(), image_token_id=300))
    with pytest.raises(PromptError, match=r"gives <\|image_pad\|> the id 261, but config.json says 300"):
        processor.prepare("What?", [CHELSEA])


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path):
    with pytest.raises(PromptError, match=r"no tokenizer in .*: copy tokenizer\.json"):
        Processor.from_directory(tmp_path, model_config()).prepare("Hi")


def test_a_damaged_tokenizer_is_refused(directory: Path, tmp_path: Path):
    (tmp_path / "tokenizer.json").write_text("{")
    (tmp_path / "tokenizer_config.json").write_text((directory / "tokenizer_config.json").read_text())
    with pytest.raises(PromptError, match="can't be loaded") as error:
        Processor.from_directory(tmp_path, model_config()).prepare("Hi")
    assert "\n" not in str(error.value)


def test_a_template_that_refuses_the_messages_says_why(tmp_path: Path):
    save_tiny_tokenizer(tmp_path, chat_template="{{ raise_exception('no system message, please') }}")
    with pytest.raises(PromptError, match="refuses the messages: no system message, please"):
        Processor.from_directory(tmp_path, model_config()).prepare("Hi")


# ---- decoding


def test_decode_counts_lengths_and_leaves_special_tokens_out(processor: Processor):
    rows = ["héllo<|im_end|>", "<|im_start|>🌍 ok"]
    ids = [processor.tokenizer(row)["input_ids"] for row in rows]
    tokens = np.full((2, 20), SPECIAL_TOKENS["<|image_pad|>"], np.int32)
    for i, row in enumerate(ids):
        tokens[i, : len(row)] = row
    tokens[0, len(ids[0])] = ids[0][0]  # past the length: not to be seen
    assert processor.decode(tokens, np.array([len(row) for row in ids])) == ["héllo", "🌍 ok"]


@given(st.lists(st.integers(0, 262), max_size=40))
@settings(max_examples=300, deadline=None)
def test_streamed_pieces_join_to_what_decode_gives(processor: Processor, ids: list[int]):
    stream = processor.decode_stream()
    pieces = [stream.feed(token_id) for token_id in ids] + [stream.finish()]
    expected = processor.decode(np.array([ids], np.int32).reshape(1, -1), np.array([len(ids)]))
    assert ["".join(pieces)] == expected


def test_a_stream_of_bytes_that_are_no_text_is_decoded_in_one_pass(processor: Processor, monkeypatch: Any):
    """Every character of Unicode's planes in pieces, bytes that fit nowhere, and added tokens between them."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["é", "a b", "<tool>"])  # é is also a character of the table of bytes
    monkeypatch.setattr(processor, "tokenizer", tokenizer)
    for name in ("decodes_bytes", "_decoded_bytes"):
        processor.__dict__.pop(name, None)
    rng = np.random.default_rng(0)
    data = rng.choice([0x41, 0x80, 0xBF, 0xC2, 0xE0, 0xE2, 0x82, 0xAC, 0xED, 0xA0, 0xF0, 0x9F, 0x98, 0xF4, 0xFF], 3000)
    of_byte = {processor.decoded_bytes(token): token for token in range(len(tokenizer))}
    ids = [of_byte[bytes([byte])] for byte in data]
    for token in range(len(tokenizer) - 12, len(tokenizer)):  # among them are the special ones
        ids.insert(int(rng.integers(len(ids))), token)
    stream = processor.decode_stream()
    with monkeypatch.context() as patch:
        patch.delattr(Processor, "_decode")  # which would be called for each token
        streamed = "".join([*map(stream.feed, ids), stream.finish()])
    assert [streamed] == processor.decode(np.array([ids]), np.array([len(ids)]))
    for name in ("decodes_bytes", "_decoded_bytes"):
        processor.__dict__.pop(name, None)


@given(st.text(max_size=30).filter(lambda text: "<|" not in text))  # special tokens are left out
@settings(max_examples=200, deadline=None)
def test_streamed_pieces_never_hold_half_a_character(processor: Processor, text: str):
    stream = processor.decode_stream()
    shown = ""
    for token_id in processor.tokenizer(text)["input_ids"]:  # one token a byte: every character is split
        shown += stream.feed(token_id)
        assert text.startswith(shown)
    assert shown + stream.finish() == text
