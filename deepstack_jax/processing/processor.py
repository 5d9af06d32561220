"""The processor turns messages, images and videos into the model's input arrays, and tokens back into text."""

import codecs
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np

from deepstack_jax.config import ModelConfig
from deepstack_jax.errors import one_line
from deepstack_jax.processing.chat import (
    IMAGE_TOKEN,
    QWEN_TEMPLATE,
    TURN_START,
    VIDEO_TOKEN,
    VISION_END,
    VISION_START,
    bare_placeholder,
    is_raw_prompt,
    read_chat_template,
    refuse_placeholder,
    render,
)
from deepstack_jax.processing.images import ImageSettings, ImageSource, image_patches, read_image_settings
from deepstack_jax.processing.media import Loaded, MediaInput, load_media
from deepstack_jax.processing.messages import Media, Message, PromptError, parse_messages, texts_in, user_message
from deepstack_jax.processing.prompt_options import PromptOptions
from deepstack_jax.processing.videos import (
    Video,
    VideoSettings,
    VideoSource,
    preprocess_videos,
    read_video_settings,
)

UserPrompt = str | Sequence[Message]


@dataclass(frozen=True)
class ParsedPrompts:
    """The texts of the prompts, with a placeholder per image and video, and what these stand for, in order."""

    texts: list[str]
    media: list[MediaInput]


_DECODED_TOKENS = 8192  # decoded at once
_COUNTED_CHARACTERS = 1 << 16  # tokenized at once where tokens are only counted
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer_config.json")


class Processor:
    """Makes the arrays that transformers' Qwen3VLProcessor makes, without torch.

    Attributes:
        config: the checkpoint's configuration.
        tokenizer: transformers' tokenizer, loaded on first use and only from the directory.
    """

    def __init__(self, directory: Path, config: ModelConfig):
        self.directory = directory
        self.config = config

    @classmethod
    def from_directory(cls, path: str | Path, config: ModelConfig) -> "Processor":
        """Returns the processor of the checkpoint in `path`, a Hugging Face directory or a converted one."""
        return cls(Path(path), config)

    @cached_property
    def tokenizer(self) -> Any:
        # imported here because the import takes a second, which reading a configuration should not cost
        from transformers import AutoTokenizer

        if not any((self.directory / name).is_file() for name in _TOKENIZER_FILES):
            raise PromptError(
                f"no tokenizer in {self.directory}: copy tokenizer.json and tokenizer_config.json into it"
            )
        try:
            return AutoTokenizer.from_pretrained(str(self.directory), local_files_only=True)
        except Exception as error:  # transformers and tokenizers raise all kinds, even Exception itself
            raise PromptError(
                f"the tokenizer in {self.directory} can't be loaded ({one_line(error)}): copy its files again"
            ) from None

    @cached_property
    def chat_template(self) -> str | None:
        """The checkpoint's template if it has its own file; None means the tokenizer's."""
        return read_chat_template(self.directory)

    @cached_property
    def image_settings(self) -> ImageSettings:
        return read_image_settings(self.directory, self._vision)

    @cached_property
    def video_settings(self) -> VideoSettings:
        return read_video_settings(self.directory, self._vision)

    def check_files(self) -> None:
        """Reads the directory's tokenizer, chat template and settings, which are otherwise read on first use.

        Raises:
            PromptError, ImageError, VideoError, ConfigError: a file is damaged or has a wrong value.
        """
        if self.config.vision:
            _ = self.image_settings, self.video_settings
        if any((self.directory / name).is_file() for name in _TOKENIZER_FILES):
            self.chat_text([{"role": "user", "content": "a"}])

    def prepare(
        self,
        messages_or_prompt: UserPrompt | Sequence[UserPrompt],
        images: Sequence[ImageSource] = (),
        videos: Sequence[VideoSource] = (),
        **options: Any,
    ) -> dict[str, np.ndarray]:
        """Makes the model's inputs, with the names that transformers uses.

        Args:
            messages_or_prompt: a str (one message of the user: all images, all videos, then the text), a str that
                holds `<|im_start|>` or a visual placeholder (a whole prompt, used verbatim), a list of messages (one
                conversation), or a list of any of these (a batch, padded on the left).
            images: images as `load_image` takes them, for the placeholders without a source, in order over the batch.
            videos: the same, as `load_video` takes them.
            options: those of `PromptOptions.of`: `tools`, `chat_template_kwargs`, `enable_thinking`, `max_pixels`, ...

        Returns:
            input_ids, attention_mask and mm_token_type_ids (0 text, 1 image, 2 video), all int32 `[B, T]`. With images,
            also pixel_values, float32 `[P, C*Tp*p*p]`, and image_grid_thw, int64 `[n, 3]`; with videos,
            pixel_values_videos and video_grid_thw of the same forms.

        Raises:
            PromptError, ImageError, VideoError: one line that names the problem and the remedy.
        """
        parsed = self.parse(messages_or_prompt, images, videos, **options)
        return self.assemble(parsed, [load_media(one) for one in parsed.media])

    def parse(
        self,
        messages_or_prompt: UserPrompt | Sequence[UserPrompt],
        images: Sequence[ImageSource] = (),
        videos: Sequence[VideoSource] = (),
        **options: Any,
    ) -> "ParsedPrompts":
        """Does what `prepare` does before it decodes images and videos; the arguments are the same.

        Raises:
            PromptError, ImageError, VideoError: one line that names the problem and the remedy.
        """
        checked = PromptOptions.of(options)
        images, videos = _listed(images, "images"), _listed(videos, "videos")
        batch = self._batch(messages_or_prompt, images, videos)
        prompts = [self._parse(prompt, images, videos, checked) for prompt in batch]
        media = [one for _, of_prompt in prompts for one in of_prompt]
        return ParsedPrompts([text for text, _ in prompts], self._media_inputs(media, images, videos, checked))

    def assemble(self, parsed: "ParsedPrompts", loaded: Sequence[Loaded]) -> dict[str, np.ndarray]:
        """Does what `prepare` does after `load_media` has loaded each of `parsed.media`.

        Raises:
            PromptError: one line that names the problem and the remedy.
        """
        images = [one for one in loaded if not isinstance(one, Video)]
        videos = [one for one in loaded if isinstance(one, Video)]
        outputs: dict[str, np.ndarray] = {}
        if images:
            outputs["pixel_values"], outputs["image_grid_thw"] = image_patches(images, self.image_settings)
        if videos:
            outputs["pixel_values_videos"], outputs["video_grid_thw"] = preprocess_videos(videos, self.video_settings)
        if outputs:
            self._check_visual_tokens()
        image_grids = iter(outputs.get("image_grid_thw", ()))
        video_grids = iter(zip(videos, outputs.get("video_grid_thw", ()), strict=True))
        rows = [self._tokenize(text, image_grids, video_grids) for text in parsed.texts]
        return self._pad(rows) | outputs

    def decode(self, tokens: np.ndarray, lengths: np.ndarray) -> list[str]:
        """Returns the text of the first `lengths` `[B]` of each row's tokens `[B, N]`, without special tokens."""
        rows = zip(np.asarray(tokens), np.asarray(lengths), strict=True)
        return [self._decode(row[:length].tolist()) for row, length in rows]

    def chat_text(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] = (),
        variables: dict[str, Any] | None = None,
        **ends: bool,
    ) -> str:
        """Returns parsed messages as the text of a prompt (see `chat.render`), a placeholder per image and video."""
        return render(messages, self.tokenizer, self.chat_template, tools, variables, **ends)

    def reads_variable(self, name: str) -> bool:
        """Whether the chat template reads a variable of this name."""
        return re.search(rf"\b{re.escape(name)}\b", self._template_source) is not None

    def thinking(self, variables: dict[str, Any]) -> tuple[bool, bool]:
        """Returns (whether the model's answers may hold reasoning, whether prompts already open it).

        The template tells: one that knows `</think>` belongs to a model that reasons, and prompts may end with
        `<think>`. `variables` are those of the template.
        """
        if "</think>" not in self._template_source:
            return False, False
        text = self.chat_text([{"role": "user", "content": "a"}], variables=variables)
        return True, text.rstrip().endswith("<think>")

    def text_of(self, ids: Sequence[int]) -> str:
        """Returns the text of token ids, special tokens included."""
        # piece by piece, because the tokenizer holds the interpreter while it decodes
        pieces, start = [], 0
        while start < len(ids):
            end = start + _DECODED_TOKENS
            text = self._text_of(ids[start:end])
            while text.endswith("\ufffd") and end < min(len(ids), start + _DECODED_TOKENS + 4):
                end += 1  # to the end of a character
                text = self._text_of(ids[start:end])
            pieces.append(text)
            start = end
        return "".join(pieces)

    def _text_of(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    @cached_property
    def longest_token(self) -> int:
        """The most bytes that one token stands for."""
        added = self.tokenizer.get_added_vocab()
        own = self._is_byte_level  # each of its characters is a byte
        return max(len(text if own and text not in added else text.encode()) for text in self.tokenizer.get_vocab())

    def count_exceeds(self, texts: Iterable[str], most: int) -> bool:
        """Whether texts have more than `most` tokens, each token at the end of a piece counted in full.

        Pieces are tokenized one by one, without keeping the tokens, until they are too many.
        """
        for text in texts:
            for start in range(0, len(text), _COUNTED_CHARACTERS):
                piece = text[start : start + _COUNTED_CHARACTERS]
                most -= sum(map(len, self.tokenizer.backend_tokenizer.encode_batch_fast([piece])))
                if most < 0:
                    return True
        return False

    def token_bytes(self, token: int) -> bytes:
        """Returns the bytes that one token stands for, which may be a part of a character."""
        if token not in self._token_bytes:
            self._token_bytes[token] = self._read_token(token)
        return self._token_bytes[token]

    @cached_property
    def decodes_bytes(self) -> bool:
        """Whether `decode` joins the `decoded_bytes` of tokens and reads them as UTF-8."""
        return repr(self.tokenizer.backend_tokenizer.decoder).startswith("ByteLevel(")

    def decoded_bytes(self, token: int) -> bytes:
        """Returns what one token adds to the bytes of `decode`; special tokens add none."""
        if token not in self._decoded_bytes:
            text, table = self.tokenizer.convert_ids_to_tokens(token), _byte_of_character()
            added = self.tokenizer.added_tokens_decoder.get(token)
            if text is None or (added and added.special):
                text = ""
            # a token of the vocabulary is written in the table's characters, an added one may hold others
            known = all(character in table for character in text)
            self._decoded_bytes[token] = bytes(map(table.__getitem__, text)) if known else text.encode()
        return self._decoded_bytes[token]

    @cached_property
    def _decoded_bytes(self) -> dict[int, bytes]:
        return {}

    @cached_property
    def _token_bytes(self) -> dict[int, bytes]:
        return {}

    def _read_token(self, token: int) -> bytes:
        text = self.tokenizer.convert_ids_to_tokens(token)
        if text is None:  # the vocabulary may be padded
            return b""
        if self._is_byte_level and token not in self.tokenizer.added_tokens_decoder:
            return bytes(_byte_of_character()[character] for character in text)
        return self.text_of([token]).encode()

    @cached_property
    def _is_byte_level(self) -> bool:
        return "ByteLevel" in repr(self.tokenizer.backend_tokenizer.decoder)

    @cached_property
    def _template_source(self) -> str:
        if self.chat_template is not None:
            return self.chat_template
        try:
            return self.tokenizer.get_chat_template()
        except ValueError:  # there is none
            return QWEN_TEMPLATE

    def decode_stream(self) -> "DecodeStream":
        """Returns an incremental `decode` of one row, for text that is streamed."""
        return DecodeStream(self)

    @property
    def _vision(self) -> Any:
        if self.config.vision is None:
            raise PromptError(
                f"this {self.config.model_type} checkpoint accepts only text: leave images and videos out"
            )
        return self.config.vision

    def _batch(self, prompt: Any, images: list, videos: list) -> list[UserPrompt]:
        """Returns the prompts of a batch, each a str or a list of messages."""
        if isinstance(prompt, str):
            return [prompt]
        if not isinstance(prompt, list | tuple):
            raise PromptError(f"a prompt is a str, a list of messages or a list of these, not {type(prompt).__name__}")
        if not prompt:
            raise PromptError("empty prompt: give a message with text, an image or a video")
        if isinstance(prompt[0], dict):
            return [prompt]
        plain = sum(isinstance(one, str) and not is_raw_prompt(one) for one in prompt)
        if plain and len(prompt) > 1 and (images or videos):
            raise PromptError(
                f"{len(images)} images and {len(videos)} videos can't be divided among {plain} plain prompts of "
                "a batch: give messages with image and video parts"
            )
        return list(prompt)

    def _parse(self, prompt: UserPrompt, images: list, videos: list, options: PromptOptions) -> tuple[str, list[Media]]:
        """Returns one prompt's text, with a placeholder per image and video, and the media they stand for."""
        if isinstance(prompt, str):
            if self.config.vision and TURN_START not in prompt and (token := bare_placeholder(prompt)):
                raise refuse_placeholder(token)
            if is_raw_prompt(prompt):
                if options.tools or options.template_variables:
                    what = "tools" if options.tools else next(iter(options.template_variables))
                    raise PromptError(f"{what} can't be added to a prompt that is already complete: give messages")
                return prompt, _placeholders(prompt) if self.config.vision else []
            # the images themselves follow later: None stands for the next one
            prompt = [user_message(prompt, [None] * len(images), [None] * len(videos))]
        elif not isinstance(prompt, list | tuple):
            raise PromptError(f"a prompt of a batch is a str or a list of messages, not {type(prompt).__name__}")
        messages, media = parse_messages(prompt, options.allow_empty)
        if media:
            self._vision  # noqa: B018  refuses before rendering
        marked = self._marked(messages, media, options) if self.config.vision else []
        text = render(
            messages,
            self.tokenizer,
            self.chat_template,
            options.tools,
            options.template_variables,
            add_generation_prompt=options.add_generation_prompt,
            continue_final_message=options.continue_final_message,
        )
        if not self.config.vision:
            return text, []
        found = _placeholders(text)
        for kind in ("image", "video"):
            asked, marks, count = (sum(m.kind == kind for m in of) for of in (media, marked, found))
            if count != asked + marks:
                raise PromptError(
                    f"{count} {kind} placeholders in the rendered prompt, but the messages have {asked + marks} "
                    f"{kind}s: remove placeholders from the text, and put {kind}s into messages of the user"
                )
        # if the messages have no parts of a kind, placeholders in their text stand for the next given ones of that kind
        kinds = {m.kind for m in media}
        return text, media + [m for m in found if m.kind not in kinds]

    def _marked(self, messages: list[Message], media: list[Media], options: PromptOptions) -> list[Media]:
        """Returns the images and videos that the texts of messages mark; refuses all other placeholders."""
        kinds, marked = {m.kind for m in media}, []
        for message in messages:
            for text in texts_in(message["content"]):
                if token := bare_placeholder(text):
                    raise refuse_placeholder(token)
                marked += _placeholders(text)
        others = [{key: message[key] for key in message if key != "content"} for message in messages]
        elsewhere = [
            m for text in texts_in([others, options.tools, options.template_variables]) for m in _placeholders(text)
        ]
        for one in [m for m in marked if m.kind in kinds] + elsewhere:
            raise refuse_placeholder(IMAGE_TOKEN if one.kind == "image" else VIDEO_TOKEN)
        return marked

    def _media_inputs(self, media: list[Media], images: list, videos: list, options: PromptOptions) -> list[MediaInput]:
        if media or images or videos:
            self._vision  # noqa: B018  refuses before anything is fetched
        for kind, given in (("image", images), ("video", videos)):
            total = sum(m.kind == kind for m in media)
            own = sum(m.kind == kind and m.source is not None for m in media)
            if total != own + len(given):
                raise PromptError(
                    f"{total} {kind} placeholders in the prompt, but {own + len(given)} {kind}s given: "
                    f"give one {kind} per placeholder"
                )
        rest = {"image": iter(images), "video": iter(videos)}
        inputs = []
        for one in media:
            source = next(rest[one.kind]) if one.source is None else one.source
            settings = self.image_settings if one.kind == "image" else self.video_settings
            inputs.append(MediaInput(source, settings, options.of_media(one.kind, one.options)))
        return inputs

    def _tokenize(self, text: str, image_grids: Iterator[Any], video_grids: Iterator[Any]) -> np.ndarray:
        """Returns the token ids of one prompt, int64 `[T]`, with as many tokens per placeholder as merged patches.

        For each temporal patch, a video's placeholder becomes its timestamp and a block of its own, all inside the pair
        of vision tokens that the template wrote, as in transformers since 5.10.
        """
        merge_unit = self.config.vision.merge_unit if self.config.vision else 1
        counts: list[int] = []
        pieces: list[str] = []
        for piece in _split_placeholders(text):
            if piece == IMAGE_TOKEN and (grid := next(image_grids, None)) is not None:
                counts.append(int(np.prod(grid)) // merge_unit)
            elif piece == VIDEO_TOKEN and (entry := next(video_grids, None)) is not None:
                video, (_, height, width) = entry
                times = video.timestamps(self.video_settings.temporal_patch_size)
                counts += [int(height * width) // merge_unit] * len(times)
                piece = "".join(f"<{t:.1f} seconds>{VISION_START}{VIDEO_TOKEN}{VISION_END}" for t in times)
            pieces.append(piece)
        ids = np.array(self.tokenizer("".join(pieces))["input_ids"], np.int64)
        if not len(ids):
            raise PromptError("empty prompt: the tokenizer produces no token for it")
        vocab_size = self.config.text.vocab_size
        if ids.max() >= vocab_size:
            raise PromptError(
                f"token id {ids.max()} of the prompt is outside the vocabulary of {vocab_size}: "
                "the tokenizer belongs to another checkpoint"
            )
        repeats = np.ones(len(ids), np.int64)
        if counts:
            repeats[np.isin(ids, (self.config.image_token_id, self.config.video_token_id))] = counts
        return np.repeat(ids, repeats)

    def _pad(self, rows: list[np.ndarray]) -> dict[str, np.ndarray]:
        pad = next((i for i in (self.tokenizer.pad_token_id, self.config.pad_token_id) if i is not None), 0)
        length = max(map(len, rows))
        input_ids = np.full((len(rows), length), pad, np.int32)
        attention_mask = np.zeros_like(input_ids)
        for i, row in enumerate(rows):
            input_ids[i, length - len(row) :] = row
            attention_mask[i, length - len(row) :] = 1
        kinds = np.zeros_like(input_ids)
        if self.config.vision:
            kinds[input_ids == self.config.image_token_id] = 1
            kinds[input_ids == self.config.video_token_id] = 2
        return {"input_ids": input_ids, "attention_mask": attention_mask, "mm_token_type_ids": kinds}

    def _check_visual_tokens(self) -> None:
        expected = {IMAGE_TOKEN: self.config.image_token_id, VIDEO_TOKEN: self.config.video_token_id}
        for token, token_id in expected.items():
            if (found := self.tokenizer.convert_tokens_to_ids(token)) != token_id:
                raise PromptError(
                    f"the tokenizer gives {token} the id {found}, but config.json says {token_id}: "
                    "the tokenizer belongs to another checkpoint"
                )

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class DecodeStream:
    """Decodes one row token by token; the pieces together equal the `decode` of the whole row.

    Tokens of a byte-level tokenizer, such as Qwen's, are decoded byte by byte. Otherwise those that may be a part of a
    character are decoded again with each new one.
    """

    def __init__(self, processor: Processor):
        self._processor = processor
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace") if processor.decodes_bytes else None
        self._ids: list[int] = []
        self._start = 0  # decoding starts one piece back, for tokenizers whose decoding depends on the previous token
        self._shown = 0  # the number of tokens whose text was returned

    def feed(self, token_id: int) -> str:
        """Takes one token and returns the text that it completes: "" while a character is incomplete."""
        if self._utf8 is not None:
            return self._utf8.decode(self._processor.decoded_bytes(int(token_id)))
        self._ids.append(int(token_id))
        before, after = self._texts()
        # an incomplete character decodes to U+FFFD until its last byte arrives
        if after.endswith("\ufffd"):
            return ""
        self._start, self._shown = self._shown, len(self._ids)
        return after[len(before) :]

    def finish(self) -> str:
        """Returns the rest after the last token; an incomplete character becomes U+FFFD."""
        if self._utf8 is not None:
            return self._utf8.decode(b"", final=True)
        before, after = self._texts()
        self._start = self._shown = len(self._ids)
        return after[len(before) :]

    def _texts(self) -> tuple[str, str]:
        decode = self._processor._decode
        return decode(self._ids[self._start : self._shown]), decode(self._ids[self._start :])


@cache
def _byte_of_character() -> dict[str, int]:
    """The printable characters by which byte-level tokenizers write bytes (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _listed(values: Any, name: str) -> list:
    """Returns `values` as a list. A common mistake is to pass a single path or image instead of a list."""
    if not isinstance(values, list | tuple):
        raise PromptError(f"{name} must be a list, not {type(values).__name__}: write {name}=[...]")
    return list(values)


def _split_placeholders(text: str) -> list[str]:
    """Splits `text` so that each placeholder is a piece of its own."""
    pieces: list[str] = []
    for i, outer in enumerate(text.split(IMAGE_TOKEN)):
        if i:
            pieces.append(IMAGE_TOKEN)
        for j, inner in enumerate(outer.split(VIDEO_TOKEN)):
            if j:
                pieces.append(VIDEO_TOKEN)
            pieces.append(inner)
    return pieces


def _placeholders(text: str) -> list[Media]:
    kinds = {IMAGE_TOKEN: "image", VIDEO_TOKEN: "video"}
    return [Media(kinds[piece]) for piece in _split_placeholders(text) if piece in kinds]
