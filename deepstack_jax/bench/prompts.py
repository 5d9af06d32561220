"""Made-up prompts: words and pictures drawn from a seed, the same ones on every machine."""

import base64
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from deepstack_jax.errors import naming

Messages = list[dict[str, Any]]
_COMMON = (
    "air animal answer area arm art back bank bed bird blue board boat body book bridge building car card center chair "
    "child church circle city class clock cloud coast cold color corner country cup day deep desk dog door dream earth "
    "east edge evening eye face family farm field fire fish floor flower food foot forest friend garden glass gold "
    "grass green group hair hand head heart hill history home horse hotel hour house ice island job kitchen lake land "
    "language leaf letter level light line list market metal milk mind money moon morning mountain mouth music name "
    "night north ocean office oil page paper park party pattern people picture place plan plant point pool power "
    "problem question rain record red river road rock room school science sea season seat shape ship shoulder sign sky "
    "snow son song sound south space spring square staff star station stone store storm story street summer sun table "
    "teacher tent test town trade train tree truth valley village voice wall war water weather week west white wind "
    "window winter woman wood word work world year"
)
WORDS = _COMMON.split()
JPEG_QUALITY = 85


@dataclass(frozen=True)
class PromptShape:
    """What a made-up prompt holds.

    Attributes:
        words: of its text.
        images: pictures before the text.
        image_size: (width, height) of each in pixels.
        same_image: whether all prompts have the same pictures.
        seed: prompts of one seed are the same everywhere; those of another differ from their first word on.
    """

    words: int = 128
    images: int = 0
    image_size: tuple[int, int] = (448, 448)
    same_image: bool = False
    seed: int = 0

    def messages(self, number: int) -> Messages:
        """The prompt of that number in Chat Completions' form."""
        text = words_of(np.random.default_rng((self.seed, number)), self.words)
        if not self.images:
            return [{"role": "user", "content": text}]
        rng = np.random.default_rng((self.seed, 0 if self.same_image else number, 1))
        urls = [data_uri(draw_picture(rng, *self.image_size)) for _ in range(self.images)]
        pictures = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        return [{"role": "user", "content": [*pictures, {"type": "text", "text": text}]}]


def words_of(rng: np.random.Generator, count: int) -> str:
    """Returns `count` common English words in random order."""
    return " ".join(rng.choice(WORDS, count))


def draw_picture(rng: np.random.Generator, width: int, height: int) -> bytes:
    """Returns a JPEG of soft patches of colour under light noise: about as many bytes as a photograph of that size."""
    colors = rng.integers(0, 256, (8, 8, 3), np.uint8)
    patches = np.asarray(Image.fromarray(colors).resize((width, height), Image.Resampling.BICUBIC), np.int16)
    noise = rng.integers(-8, 9, (height, width, 1), np.int16)
    file = io.BytesIO()
    Image.fromarray(np.clip(patches + noise, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=JPEG_QUALITY)
    return file.getvalue()


def data_uri(jpeg: bytes) -> str:
    """Returns the picture as a `data:` URI."""
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"


def read_prompts(file: Path) -> list[Messages]:
    """Reads one conversation per line: a JSON list of messages, or an object that has it under "messages".

    Raises:
        ValueError: a line that is neither, or no line at all; the message names the line.
        OSError: the file can't be read.
    """
    prompts = []
    with naming(file):
        lines = file.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{file}, line {number} is not JSON: {error}") from None
        messages = found.get("messages") if isinstance(found, dict) else found
        if not isinstance(messages, list) or not messages or not all(isinstance(each, dict) for each in messages):
            raise ValueError(f'{file}, line {number} has no messages: give [{{"role": "user", "content": "..."}}]')
        prompts.append(messages)
    if not prompts:
        raise ValueError(f"{file} holds no prompts: give one list of messages per line")
    return prompts
