"""What the page shows: the files that ship with the package, and its sample pictures."""

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path

from PIL import Image

from deepstack_jax.bundled import BUNDLED
from deepstack_jax.config import ModelConfig
from deepstack_jax.demo.samples import Exchange, sample
from deepstack_jax.models.registry import read_config

_DRAWINGS = {f"drawing-{seed}": seed for seed in (3, 14, 15, 92)}  # the sample pictures for tiny-vl, by their seeds
_HERE = Path(__file__).parent
_PHOTOGRAPHS = {
    "coffee": (BUNDLED["tiny-vl"].parent / "coffee.jpg", "What is on the table?"),
    "astronaut": (_HERE / "samples" / "astronaut.jpg", "Who is this, and what is behind her?"),
    "rocket": (_HERE / "samples" / "rocket.jpg", "What is happening here?"),
}
TYPES = {
    "css": "text/css; charset=utf-8",
    "html": "text/html; charset=utf-8",
    "jpg": "image/jpeg",
    "js": "text/javascript; charset=utf-8",
    "json": "application/json",
    "png": "image/png",
    "svg": "image/svg+xml",
    "txt": "text/plain; charset=utf-8",
    "webmanifest": "application/manifest+json",
}


@dataclass(frozen=True)
class File:
    """The bytes of a file, and their media type."""

    data: bytes
    kind: str

    @cached_property
    def tag(self) -> str:
        """The ETag of the bytes."""
        return f'"{hashlib.sha256(self.data).hexdigest()[:32]}"'


@dataclass(frozen=True)
class Drawn:
    """A picture of the kind that tiny-vl was trained on, as PNG, and one of the questions that it allows."""

    png: bytes
    exchange: Exchange


@cache
def static_files() -> Mapping[str, File]:
    """The files of the page by name. They are read once, so that no request names a path of this machine."""
    folder = _HERE / "static"
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix[1:] in TYPES)
    return {path.relative_to(folder).as_posix(): File(path.read_bytes(), TYPES[path.suffix[1:]]) for path in files}


def knows_drawings(config: ModelConfig) -> bool:
    """Whether a model is tiny-vl, which was trained on drawn pictures."""
    return replace(config, dtype=None) == _drawing_config()


@cache
def _drawing_config() -> ModelConfig:
    return replace(read_config(BUNDLED["tiny-vl"]), dtype=None)  # it may be loaded in another one


def samples_for(config: ModelConfig) -> list[dict[str, str]]:
    """The sample pictures for a model: the name, the URL and a question for each."""
    if config.vision is None:
        return []
    if knows_drawings(config):
        named = dict.fromkeys(_DRAWINGS, "Describe the picture.")
    else:
        named = {name: question for name, (_, question) in _PHOTOGRAPHS.items()}
    return [{"name": name, "url": f"/page/samples/{name}", "question": text} for name, text in named.items()]


def sample_file(name: str) -> File | None:
    """The sample picture of that name, None if there is none."""
    return _sample_file(name) if name in _PHOTOGRAPHS or name in _DRAWINGS else None


@cache  # of names that there are: requests choose others
def _sample_file(name: str) -> File:
    if name in _DRAWINGS:
        return File(draw(_DRAWINGS[name]).png, TYPES["png"])
    return File(_PHOTOGRAPHS[name][0].read_bytes(), TYPES["jpg"])


def draw(seed: int) -> Drawn:
    """The picture of a seed with one of its questions; the seed decides both."""
    drawn = sample(seed, "picture")
    return Drawn(_as_png(drawn.images[0]), drawn.exchanges[seed % len(drawn.exchanges)])


def _as_png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
