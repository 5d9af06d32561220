"""Sources: whatever a caller holds gives the same bytes, and options are checked by name.

The references are the standard library's base64, Pillow's and PyAV's own writers, and RFC 2397, 3986, 4648 and 8089.
"""

import base64
import gzip
import io
import mmap
import os
import random
import sys
import tempfile
import textwrap
import time
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import av
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image

from deepstack_jax.errors import one_line
from deepstack_jax.processing.sources import (
    SNIFFED_BYTES,
    decode_base64,
    describe,
    host_array,
    looks_like_media,
    looks_like_video,
    open_source,
    option_values,
)


class SourceError(ValueError):
    pass


def encoded(file_format: str, size: tuple[int, int] = (13, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.frombytes("RGB", size, random.Random(1).randbytes(size[0] * size[1] * 3)).save(buffer, file_format)
    return buffer.getvalue()


PNG = encoded("PNG")
JPEG = encoded("JPEG")
TEXT = base64.b64encode(PNG).decode()
URL_SAFE = base64.urlsafe_b64encode(PNG).decode()


def content(source: Any, max_bytes: int = 1 << 20) -> bytes:
    opened = open_source(source, max_bytes, SourceError)
    return opened.read_bytes() if isinstance(opened, Path) else opened.read()


def refusal(source: Any, max_bytes: int = 1 << 20) -> str:
    with pytest.raises(SourceError) as error:
        open_source(source, max_bytes, SourceError)
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 400
    return message


def test_the_picture_uses_all_letters_of_base64():
    assert {"+", "/"} <= set(TEXT)
    assert TEXT.endswith("=")


# ---- paths


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "with space é#1?.png").write_bytes(PNG)
    return tmp_path


def test_paths_of_every_kind_are_given_as_they_are(home: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(home)
    name = "with space é#1?.png"
    path = home / name
    sources: list[Any] = [path, str(path), name, f"./{name}", f"~/{name}", Path("~") / name]
    sources += [path.as_uri(), path.as_uri().replace("file://", "FILE://localhost"), f"file:{quote(str(path))}"]
    sources += [f"file://{path}", f"file://{name}", np.str_(path)]
    for source in sources:
        opened = open_source(source, 1, SourceError)
        assert isinstance(opened, Path), source
        assert opened.samefile(path)


def test_an_object_with_a_path_is_a_path(home: Path):
    class Entry:
        def __fspath__(self) -> str:
            return str(next(home.iterdir()))

    assert content(Entry()) == PNG
    with os.scandir(home) as entries:
        assert content(next(entries)) == PNG


def test_a_file_that_is_named_like_a_home_folder_is_itself(home: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(home)
    Path("~x.png").write_bytes(JPEG)
    assert content("~x.png") == JPEG


def test_a_file_whose_name_is_base64_of_a_picture_is_the_file(home: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(home)
    name = base64.b64encode(b"GIF89a" + bytes(12)).decode()
    assert content(name) == b"GIF89a" + bytes(12)
    Path(name).write_bytes(JPEG)
    assert content(name) == JPEG


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("none.png", "no file none.png: give an existing file, an http(s) URL, a data URI or base64"),
        (Path("none.png"), "no file none.png"),
        ("~/none.png", "no file ~/none.png"),
        ("~nobody-of-that-name/none.png", "no file ~nobody"),
        ("file:///none%20here.png", "no file file:///none%20here.png"),
        ("file://[none", "no file file://[none"),
        (".", "no file .:"),
        ("", "an empty text names no file"),
        (" \n", "an empty text names no file"),
        ("a\nb.png", "no file a\\nb.png"),
        ("a\0b.png", "no file a\\x00b.png"),
        ("\ud800.png", "no file \\ud800.png"),
        ("x" * 5000, "no file xxx"),
        ("iVBORw0K.png", "no file iVBORw0K.png"),
        ("iVBORw0KGgoAAAAN SUhEUg==", "no file iVBORw0KGgoAAAAN SUhEUg=="),
        ("s3://bucket/a.png", "s3://bucket/a.png has the scheme s3, which is not read: give an existing file"),
        (None, "NoneType is not a file, URL, bytes or file object"),
        (5, "int is not a file"),
    ],
)
def test_what_names_no_file_is_refused(source: Any, message: str):
    assert refusal(source).startswith(message)


# ---- base64 and data URIs


LINES = {
    "plain": TEXT,
    "mime": base64.encodebytes(PNG).decode(),
    "crlf": base64.encodebytes(PNG).decode().replace("\n", "\r\n"),
    "cr": base64.encodebytes(PNG).decode().replace("\n", "\r"),
    "pem": "\n".join(textwrap.wrap(TEXT, 64)),
    "indented": textwrap.indent(base64.encodebytes(PNG).decode(), "\t  "),
    "surrounded": f" \n\t{TEXT} \r\n",
    "padding left out": TEXT.rstrip("="),
    "url-safe": URL_SAFE,
    "url-safe, padding left out": URL_SAFE.rstrip("="),
}


@pytest.mark.parametrize("text", LINES.values(), ids=LINES)
def test_base64_as_tools_write_it(text: str):
    assert decode_base64(text) == PNG
    assert content(text) == PNG
    assert content(text.encode()) == PNG
    assert content("data:image/png;base64," + text) == PNG
    assert content("data:image/png;base64," + quote(text, safe="")) == PNG


@pytest.mark.parametrize("length", range(8))
def test_every_length_of_base64(length: int):
    data = bytes(range(250, 250 - length, -1))
    for text in (base64.b64encode(data).decode(), base64.urlsafe_b64encode(data).decode()):
        assert decode_base64(text) == decode_base64(text.rstrip("=")) == data


@pytest.mark.parametrize(
    "text",
    [
        "QUJ D",  # a form that turned "+" into " "
        "QUJD=",
        "QUI",
        "QUI==",
        "QQ=",
        "QQ===",
        "Q",
        "QUJDR",
        "QQ==QQ==",
        "=QQ=",
        "+-_/",
        "QUJD\\nQUJD",
        "b'QUJD'",
        '"QUJD"',
        "QUJDé",
        "QUJ\0",
        "\ud800",
    ],
)
def test_anything_else_is_not_base64(text: str):
    if text == "QUI":
        assert decode_base64(text) == b"AB"  # only the padding is missing
        return
    with pytest.raises(ValueError, match="not valid base64"):
        decode_base64(text)
    assert "is not valid base64: encode the file's bytes again" in refusal("data:image/png;base64," + text)


@pytest.mark.parametrize(
    "header",
    [
        "data:image/png;base64,",
        "data:;base64,",
        "data:base64,",
        "data:image/jpeg;base64,",
        "data:application/octet-stream;base64,",
        "data:text/plain;charset=utf-8;base64,",
        "data:image/png;base64;charset=utf-8,",
        'data:image/png;name="a.png";base64,',
        "DATA:IMAGE/PNG;BASE64,",
        "data: image/png; base64 , \n",
        " \ndata:image/png;base64,",
        "data:image/png,",  # ";base64" forgotten
        "data:,",
    ],
)
def test_data_uris_with_every_kind_of_header(header: str):
    assert content(header + TEXT) == content((header + TEXT).encode()) == PNG


def test_a_data_uri_of_bytes_without_base64():
    assert content("data:image/png," + quote(PNG)) == PNG
    svg = b"<svg xmlns='http://www.w3.org/2000/svg'/>"
    assert content("data:image/svg+xml," + quote(svg)) == svg


@pytest.mark.parametrize(
    "text",
    [
        "data:," * 100_000,
        "data:;base64," + "\n" * 3_000_000,
        "data:;base64,QUJD" + " " * 3_000_000 + "=",
        "data:;base64,QUJD" + " \n" * 1_000_000 + "x",
        "data:;base64," + "%41" * 1_000_000,
        "data:," + "%" * 3_000_000,
        "\n" * 3_000_000 + "x",
        "iVBORw0KGgoAAAAN" + " " * 3_000_000 + "SUhE",
    ],
    ids=lambda text: text[:20],
)
def test_texts_that_try_to_cost_much_cost_little(text: str):
    started = time.process_time()
    for source in (text, text.encode()):
        with suppress(SourceError):
            content(source, 10_000_000)
    assert time.process_time() - started < 2


def test_a_data_uri_without_a_comma_is_refused():
    assert "has no comma after its header: write data:image/png;base64,..." in refusal("data:image/png;base64")


SIZE = len(PNG)
WRAPPED = base64.encodebytes(PNG).decode()


@pytest.mark.parametrize(
    "source",
    [
        *[f"data:;base64,{text}" for text in (TEXT, WRAPPED, quote(WRAPPED), TEXT.rstrip("="))],
        *["data:," + quote(PNG), "data:," + TEXT, TEXT, WRAPPED],
        *[TEXT.encode(), WRAPPED.encode(), f"data:;base64,{TEXT}".encode()],
        *[PNG, bytearray(PNG), memoryview(PNG), io.BytesIO(PNG)],
    ],
    ids=lambda source: (
        f"{type(source).__name__} {source[:20]!r}" if hasattr(source, "count") else type(source).__name__
    ),
)
def test_a_size_is_that_of_the_file_and_is_checked_before_it_is_decoded(source: Any, monkeypatch: pytest.MonkeyPatch):
    assert content(source, SIZE) == PNG
    decode = base64.b64decode

    def decode_starts(text: Any, **kwargs: Any) -> bytes:
        assert len(text) <= SNIFFED_BYTES // 3 * 4 < len(TEXT)
        return decode(text, **kwargs)

    monkeypatch.setattr(base64, "b64decode", decode_starts)
    assert f"holds more than {SIZE - 1} bytes: pass a smaller file" in refusal(source, SIZE - 1)


# ---- bytes and file objects


class Pipe(io.RawIOBase):
    """Gives a few bytes at a time and can't seek, as a pipe or a socket."""

    def __init__(self, data: bytes):
        self._data = io.BytesIO(data)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        piece = self._data.read(min(5, len(buffer)))
        buffer[: len(piece)] = piece
        return len(piece)


class Bare:
    """An object that has read(), and nothing else of a file."""

    def __init__(self, data: Any):
        self._data = data

    def read(self, size: int = -1) -> Any:
        data, self._data = self._data, type(self._data)()
        return data


@pytest.fixture
def file_objects(tmp_path: Path) -> Iterator[list[Any]]:
    path = tmp_path / "a.png"
    path.write_bytes(PNG)
    (tmp_path / "a.gz").write_bytes(gzip.compress(PNG))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.png", PNG)
    with (
        path.open("rb") as opened,
        path.open("rb", buffering=0) as raw,
        path.open("rb") as behind,
        mmap.mmap(behind.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        gzip.open(tmp_path / "a.gz") as zipped,
        zipfile.ZipFile(tmp_path / "a.zip") as archive,
        archive.open("a.png") as member,
        tempfile.SpooledTemporaryFile() as spooled,
        tempfile.NamedTemporaryFile() as named,
    ):
        for file in (spooled, named):
            file.write(PNG)  # and it stands at its end
        yield [opened, raw, mapped, zipped, member, spooled, named]


def test_file_objects_are_read_from_their_start_each_time(file_objects: list[Any]):
    at_end = io.BytesIO(PNG)
    at_end.seek(0, io.SEEK_END)
    for file in [*file_objects, at_end, io.BufferedReader(io.BytesIO(PNG))]:
        for _ in range(2):
            assert content(file) == PNG, file
        file.seek(3)
        assert content(file) == PNG, file


@pytest.mark.parametrize("make", [Pipe, lambda data: io.BufferedReader(Pipe(data)), Bare, lambda d: Bare(bytearray(d))])
def test_file_objects_that_can_not_seek_are_read_from_where_they_stand(make: Any):
    assert content(make(PNG)) == PNG
    assert content(make(TEXT.encode())) == PNG
    assert refusal(make(PNG), len(PNG) - 1).endswith(f"holds more than {len(PNG) - 1} bytes: pass a smaller file")


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, np.bytes_])
def test_bytes_of_every_kind(kind: Any):
    assert content(kind(PNG)) == PNG
    assert content(kind(TEXT.encode())) == PNG
    assert content(io.BytesIO(kind(TEXT.encode()))) == PNG
    assert content(kind(b"hello")) == b"hello"  # the reader of pictures says what it is not


def test_a_view_of_every_second_byte():
    assert content(memoryview(bytes(b for byte in PNG for b in (byte, 0)))[::2]) == PNG


def test_file_objects_that_give_no_bytes_are_refused(tmp_path: Path):
    path = tmp_path / "a.png"
    path.write_bytes(JPEG)
    with path.open(encoding="utf-8") as text:
        assert refusal(text) == f'file {path} was opened as text: open it with mode "rb"'
    assert refusal(io.StringIO("abc")) == 'file object StringIO was opened as text: open it with mode "rb"'
    assert refusal(Bare([1])) == "read() of file object Bare gives list, not bytes: give the file's bytes"
    with path.open("rb") as closed:
        pass
    assert refusal(closed).startswith("BufferedReader can't be read (I/O operation on closed file): give an open file")
    with path.open("ab") as writing:
        assert refusal(writing).startswith(f"file {path} can't be read (read)")


# ---- what a file starts with


def film(container: str) -> bytes:
    buffer = io.BytesIO()
    codec = {"webm": "libvpx-vp9", "ogg": "libtheora", "flv": "flv1", "mpeg": "mpeg1video"}.get(container, "mpeg4")
    with av.open(buffer, "w", format=container) as output:
        stream: Any = output.add_stream(codec, rate=25)
        stream.width = stream.height = 32
        for _ in range(2):
            output.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")))
        output.mux(stream.encode())
    return buffer.getvalue()


PICTURES = ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "AVIF", "JPEG2000", "ICO", "MPO"]
FILMS = ["mp4", "mov", "matroska", "webm", "avi", "mpegts", "mpeg", "flv", "asf"]


@pytest.mark.parametrize("name", PICTURES + FILMS)
def test_pictures_and_videos_are_known_by_their_start(name: str):
    data = encoded(name, (16, 16)) if name in PICTURES else film(name)
    start = data[:SNIFFED_BYTES]
    assert looks_like_media(start)
    assert looks_like_video(start) == (name in FILMS)
    assert content(base64.b64encode(data).decode()) == data


@pytest.mark.parametrize("start", [b"", b"BM", b"GIF8", b"hello, I am text", b"%PDF-1.7\n" * 9, bytes(300), b"G" * 188])
def test_nothing_else_looks_like_one(start: bytes):
    assert not looks_like_media(start[:SNIFFED_BYTES])


# ---- arrays, options and names


def test_arrays_come_without_importing_their_library():
    assert host_array(jnp.ones(2, jnp.int4), "a", SourceError).dtype == np.int32
    assert host_array(torch.ones(2).to(torch.float8_e4m3fn), "a", SourceError).tolist() == [1, 1]
    assert "torch" in sys.modules  # this test's own; the module asks the object
    source = Path(sys.modules[host_array.__module__].__file__ or "").read_text()
    assert "import torch" not in source
    assert "import jax" not in source


KINDS = {"count": int, "rate": float, "flag": bool}


def test_options_are_read_by_name():
    raw = {"count": 3.0, "rate": 2, "flag": False}
    assert option_values(raw, KINDS, "a thing", SourceError) == {"count": 3, "rate": 2.0, "flag": False}
    raw = {"count": np.int32(3), "rate": np.float32(0.5), "flag": np.True_}
    values = option_values(raw, KINDS, "a thing", SourceError)
    assert values == {"count": 3, "rate": 0.5, "flag": True}
    assert [type(value) for value in values.values()] == [int, float, bool]
    assert option_values(dict.fromkeys(KINDS) | {"other": None}, KINDS, "a thing", SourceError) == {}


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"cuont": 1}, "cuont is not an option of a thing: use count, rate, flag"),
        ({"a\nb" * 99: 1}, "a\\nb"),
        ({"count": 0}, "count 0 of a thing must be a whole number above 0"),
        ({"count": 1.5}, "count 1.5 of a thing must be a whole number above 0"),
        ({"count": True}, "count True of a thing must be a whole number above 0"),
        ({"count": "1"}, "count '1' of a thing must be a whole number above 0"),
        ({"rate": 0}, "rate 0 of a thing must be a number above 0"),
        ({"rate": float("inf")}, "rate inf of a thing must be a number above 0"),
        ({"rate": float("nan")}, "rate nan of a thing"),
        ({"rate": "x" * 999}, "rate 'xxx"),
        ({"rate": 1j}, "rate 1j of a thing"),
        ({"flag": 1}, "flag 1 of a thing must be true or false"),
        ({"flag": "true"}, "flag 'true' of a thing must be true or false"),
    ],
)
def test_options_that_can_not_be_read_are_named(raw: dict, message: str):
    with pytest.raises(SourceError) as error:
        option_values(raw, KINDS, "a thing", SourceError)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 200


def test_names_are_short_and_on_one_line():
    sources = [TEXT * 9, "data:image/png;base64," + base64.encodebytes(PNG).decode() * 9, PNG * 9, io.BytesIO(PNG)]
    for source in [*sources, Bare(PNG), Path("a\nb"), object()]:
        assert 0 < len(describe(source)) <= 130
        assert "\n" not in describe(source)
    assert describe("a b.png") == describe(Path("a b.png")) == "a b.png"
    assert describe(PNG) == describe(io.BytesIO(PNG)) == f"file of {len(PNG)} bytes"


def test_errors_are_told_in_one_line():
    assert one_line(ValueError("a\n  b")) == "a b"
    assert one_line(ValueError()) == "ValueError"
