"""What may come from outside: real servers, real files and real decoders, each trying what it must not."""

import asyncio
import base64
import gzip
import io
import os
import shutil
import ssl
import struct
import subprocess
import time
import zlib
from collections.abc import Iterator
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from deepstack_jax.processing import download as downloading
from deepstack_jax.processing.images import ImageOptions, load_image
from deepstack_jax.processing.sources import MediaFile
from deepstack_jax.processing.videos import VideoOptions, VideoSettings, load_video
from deepstack_jax.serving.fetch import fetch, is_public
from deepstack_jax.serving.media import _open_beneath, admit
from deepstack_jax.serving.policy import Budget, MediaError, MediaPolicy
from tests.films import animation, film, picture
from tests.loopback import running

PHOTO = Path(__file__).parent / "data" / "chelsea.jpg"


def png(width: int = 40, height: int = 30) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), "teal").save(file, "PNG")
    return file.getvalue()


def png_header(width: int, height: int) -> bytes:
    """The start of a PNG that says how large it is and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def video(frames: int = 6, size: int = 32, rate: int = 2, container: str = "mp4", codec: str = "mpeg4") -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format=container) as out:
        stream = out.add_stream(codec, rate=rate)
        stream.width = stream.height = size
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.time_base = Fraction(1, rate)
        for i in range(frames):
            picture = np.full((size, size, 3), 20 * i % 256, np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(stream.encode())
    return file.getvalue()


def data_uri(data: bytes) -> str:
    return "data:application/octet-stream;base64," + base64.b64encode(data).decode()


def refused(kind: str, source: object, policy: MediaPolicy, budget: Budget | None = None) -> MediaError:
    with pytest.raises(MediaError) as caught:
        asyncio.run(admit(kind, source, policy, budget))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert 400 <= caught.value.status < 500
    return caught.value


# ---- data URIs ----


def test_an_image_and_a_video_come_in_as_data():
    image = asyncio.run(admit("image", data_uri(png()), MediaPolicy()))
    assert isinstance(image, MediaFile)
    assert (image.format, image.width, image.height) == ("PNG", 40, 30)
    film = asyncio.run(admit("video", data_uri(video()), MediaPolicy()))
    assert isinstance(film, MediaFile)
    assert film.data == video()


@pytest.mark.parametrize("source", [None, 7, ["a"], {"url": "x"}, ""])
def test_a_source_is_text(source: object):
    assert "named by text" in str(refused("image", source, MediaPolicy()))


def test_data_may_be_forbidden_and_are_bounded():
    assert refused("image", data_uri(png()), MediaPolicy(allow_data=False)).status == 403
    refused("image", data_uri(png()), MediaPolicy(max_bytes=len(png()) - 1))
    asyncio.run(admit("image", data_uri(png()), MediaPolicy(max_bytes=len(png()))))
    # plain text in percent signs: three characters a byte
    refused("image", "data:," + "%41" * 200, MediaPolicy(max_bytes=100))


def test_bytes_are_counted_over_all_media_of_a_request():
    policy = MediaPolicy(max_bytes=2 * len(png()) + 1)
    budget = Budget(policy)
    for _ in range(2):
        asyncio.run(admit("image", data_uri(png()), policy, budget))
    assert refused("image", data_uri(png()), policy, budget).status in (400, 413)


# ---- files ----


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """allowed/ with a photograph and links, beside a secret."""
    allowed = tmp_path / "allowed"
    (allowed / "sub").mkdir(parents=True)
    shutil.copy(PHOTO, allowed / "sub" / "cat.jpg")
    (tmp_path / "secret.png").write_bytes(png())
    (tmp_path / "allowed-too").mkdir()
    (tmp_path / "allowed-too" / "secret.png").write_bytes(png())
    (allowed / "inner.jpg").symlink_to("sub/cat.jpg")
    (allowed / "outer.png").symlink_to("../secret.png")
    (allowed / "outside").symlink_to(tmp_path)
    (allowed / "loop").symlink_to("loop")
    (allowed / "zero").symlink_to("/dev/zero")
    os.mkfifo(allowed / "pipe.png")
    return allowed


@pytest.mark.parametrize("name", ["sub/cat.jpg", "inner.jpg", "sub/../sub/cat.jpg", "ABSOLUTE", "file://ABSOLUTE"])
def test_files_under_the_folder_are_read(folder: Path, name: str):
    name = name.replace("ABSOLUTE", str(folder / "sub" / "cat.jpg"))
    image = asyncio.run(admit("image", name, MediaPolicy(allowed_folder=folder)))
    assert isinstance(image, MediaFile)
    np.testing.assert_array_equal(np.asarray(load_image(image)), np.asarray(Image.open(PHOTO)))


@pytest.mark.parametrize(
    "name",
    ["../secret.png", "outer.png", "outside/secret.png", "outside/allowed-too/secret.png", "../allowed-too/secret.png",
     "/etc/passwd", "/proc/self/environ", "zero", ".", "", "..", "file:///etc/passwd", "file://elsewhere/etc/passwd",
     "file:///etc/nothing-there", "sub/../../secret.png", "%2e%2e/secret.png", "file:///%2e%2e/secret.png"],
)  # fmt: skip
def test_nothing_outside_the_folder_is_read(folder: Path, name: str):
    error = refused("image", name, MediaPolicy(allowed_folder=folder))
    assert "secret" not in str(error).replace(name, "")
    if not name.startswith("%"):  # a folder of that name, in which nothing is
        assert error.status in (400, 403)


@pytest.mark.parametrize("name", ["pipe.png", "sub", "loop", "missing.png", "a\0b", "x" * 5000, "sub/cat.jpg/x"])
def test_what_is_no_regular_file_is_refused_at_once(folder: Path, name: str):
    started = time.monotonic()
    refused("image", name, MediaPolicy(allowed_folder=folder))
    assert time.monotonic() - started < 5  # a pipe nobody writes to would be waited for


def test_files_are_refused_by_default_and_bounded(folder: Path):
    assert refused("image", str(folder / "sub" / "cat.jpg"), MediaPolicy()).status == 403
    small = MediaPolicy(allowed_folder=folder, max_bytes=PHOTO.stat().st_size - 1)
    assert refused("image", "sub/cat.jpg", small).status == 413


def test_a_link_put_in_the_way_after_the_check_is_refused(folder: Path):
    os.close(_open_beneath(folder, ("sub", "cat.jpg")))
    for parts in (("inner.jpg",), ("outside", "secret.png"), ("pipe.png",)):
        with pytest.raises(OSError):
            _open_beneath(folder, parts)


# ---- URLs ----


class Site(BaseHTTPRequestHandler):
    """A server with pages that behave and pages that don't."""

    def do_GET(self) -> None:
        assert isinstance(self.server, Server)
        self.server.seen.append((self.path, dict(self.headers)))
        page = self.path.lstrip("/").partition("?")[0]
        if page.startswith("to/"):
            self.reply(302, b"", location=page[3:])
        elif page == "photo.jpg":
            self.reply(200, PHOTO.read_bytes())
        elif page == "gzip":
            self.reply(200, gzip.compress(bytes(10_000_000)), **{"content-encoding": "gzip"})
        elif page == "short":
            self.reply(200, b"abc", **{"content-length": "1000"})
        elif page == "lies":
            self.reply(200, b"", **{"content-length": str(10**12)})
        elif page == "endless":
            self.reply(200, b"", **{"transfer-encoding": "chunked", "content-length": ""})
            while True:
                self.wfile.write(b"10000\r\n" + bytes(0x10000) + b"\r\n")
        elif page == "chunks":  # six bytes on the wire for each of the body
            self.reply(200, b"", **{"transfer-encoding": "chunked", "content-length": ""})
            while True:
                self.wfile.write(b"1\r\nx\r\n" * 1000)
        elif page == "drip":
            self.reply(200, b"", **{"content-length": "1000"})
            self.drip(b"x")
        elif page == "drip-head":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nx: ")
            self.drip(b"x")
        elif page == "big-head":
            self.wfile.write(b"HTTP/1.1 200 OK\r\n")
            while True:
                self.wfile.write(b"x: " + b"y" * 1000 + b"\r\n")
        elif page == "nonsense":
            self.wfile.write(b"220 mail.example.org ESMTP\r\n")
        else:
            self.reply(404, b"no such page")

    def drip(self, piece: bytes) -> None:
        while True:
            self.wfile.write(piece)
            time.sleep(0.05)

    def reply(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in ({"content-length": str(len(body))} | headers).items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None: ...


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Site)
        self.seen: list[tuple[str, dict[str, str]]] = []

    def handle_error(self, *args: object) -> None: ...  # clients that hang up are what these tests are about


@pytest.fixture
def site() -> Iterator[Server]:
    with running(Server()) as server:
        yield server


def policy_of(site: Server, **changes: object) -> MediaPolicy:
    """This machine's 127.0.0.1 alone may be reached, by a name of its own."""
    fields = {
        "allowed_domains": ("media.example.org", "*.cdn.example.org"),
        "allowed_networks": ("127.0.0.1/32",),
        "allowed_ports": (site.server_port,),
        "timeout": 20.0,
    }
    return MediaPolicy(**(fields | changes))  # type: ignore[arg-type]


class Names:
    """A resolver with a table; of several answers each question takes the next."""

    def __init__(self, **table: list[list[str]]):
        self.table = {name.replace("_", "."): answers for name, answers in table.items()}
        self.asked: list[str] = []

    async def __call__(self, host: str, port: int) -> list[str]:
        self.asked.append(host)
        answers = self.table.get(host, [["127.0.0.1"]])
        return answers.pop(0) if len(answers) > 1 else answers[0]


def get(site: Server, page: str, policy: MediaPolicy | None = None, names: Names | None = None, **url: str) -> bytes:
    policy = policy or policy_of(site)
    address = f"{url.get('scheme', 'http')}://{url.get('host', 'media.example.org')}:{site.server_port}/{page}"
    return asyncio.run(fetch(address, policy, Budget(policy), names or Names()))


def get_refused(site: Server, page: str, policy: MediaPolicy | None = None, names: Names | None = None, **url: str):
    with pytest.raises(MediaError) as caught:
        get(site, page, policy, names, **url)
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    ("address", "public"),
    [(a, True) for a in ("1.1.1.1", "93.184.216.34", "2606:4700:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808")]
    + [
        (a, False)
        for a in (
            "127.0.0.1", "127.8.8.8", "0.0.0.0", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1",
            "169.254.169.254", "100.64.0.1", "100.100.100.200", "192.0.0.192", "168.63.129.16", "198.18.0.1",
            "192.0.2.1", "224.0.0.1", "239.1.1.1", "240.0.0.1", "255.255.255.255", "192.88.99.1",
            "::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "fec0::1", "ff02::1", "2001:db8::1",
            "::ffff:127.0.0.1", "::ffff:169.254.169.254", "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe",
            "64:ff9b:1::1", "2002:7f00:1::1", "2002:808:808::1", "2001:0:7f00:1::1", "100::1", "localhost", "", "1",
        )
    ],
)  # fmt: skip
def test_which_addresses_are_public(address: str, public: bool):
    assert is_public(address) is public


def test_an_allowed_url_is_fetched(site: Server):
    assert get(site, "photo.jpg?size=1&q=a b".replace(" ", "%20")) == PHOTO.read_bytes()
    path, headers = site.seen[0]
    assert path == "/photo.jpg?size=1&q=a%20b"
    assert headers["Host"] == f"media.example.org:{site.server_port}"
    assert headers["Accept-Encoding"] == "identity"
    assert get(site, "photo.jpg", host="a.b.cdn.example.org") == PHOTO.read_bytes()
    image = asyncio.run(admit("image", f"http://127.0.0.1:{site.server_port}/photo.jpg",
                              policy_of(site, allowed_domains=("127.0.0.1",))))  # fmt: skip
    assert isinstance(image, MediaFile)


@pytest.mark.parametrize(
    "host",
    ["evil.org", "cdn.example.org", "xcdn.example.org", "media.example.org.evil.org", "127.0.0.1", "localhost", "[::1]",
     "media.example.org@evil.org", "evil.org\\@media.example.org", "2130706433", "0x7f.1", "media.example.org%2eevil"],
)  # fmt: skip
def test_other_domains_are_refused_before_anything_is_asked(site: Server, host: str):
    names = Names()
    get_refused(site, "photo.jpg", names=names, host=host)
    assert not names.asked
    assert not site.seen


@pytest.mark.parametrize(
    "url",
    ["http://media.example.org/\x01", "http://media.example.org\n.evil.org/", "http://media.example.org:99999/",
     "http://user:secret@media.example.org/", "http://", "http://[::1/", "http://media.example.org:22/",
     "http://" + "a" * 70 + ".example.org/", "https://media.example.org:25/"],
)  # fmt: skip
def test_odd_urls_are_refused(url: str):
    names, policy = Names(), MediaPolicy(allowed_domains=("*", "media.example.org"))
    with pytest.raises(MediaError):
        asyncio.run(fetch(url, policy, Budget(policy), names))
    assert not names.asked


def test_urls_are_refused_by_default():
    assert refused("image", "http://media.example.org/x.png", MediaPolicy()).status == 403


@pytest.mark.parametrize(
    "addresses",
    [["127.0.0.2"], ["127.0.0.1", "10.0.0.1"], ["93.184.216.34", "169.254.169.254"], ["::1"], ["::ffff:127.0.0.1"], []],
)
def test_a_name_with_any_private_address_is_refused_without_a_connection(site: Server, addresses: list[str]):
    get_refused(site, "photo.jpg", names=Names(media_example_org=[addresses]))
    assert not site.seen


def test_the_checked_address_is_the_one_connected_to(site: Server):
    """DNS rebinding: the second answer would lead elsewhere, and nobody asks for it."""
    names = Names(media_example_org=[["127.0.0.1"], ["10.0.0.1"]])
    assert get(site, "photo.jpg", names=names) == PHOTO.read_bytes()
    assert names.asked == ["media.example.org"]


def test_redirects_are_followed_and_checked_anew(site: Server):
    assert get(site, "to//photo.jpg") == PHOTO.read_bytes()
    for there, reason in (
        (f"http://127.0.0.1:{site.server_port}/photo.jpg", "not an allowed domain"),
        ("http://media.example.org:1/photo.jpg", "port 1"),
        ("ftp://media.example.org/photo.jpg", "scheme 'ftp'"),
        ("file:///etc/passwd", "scheme 'file'"),
        (f"http://x.cdn.example.org:{site.server_port}/photo.jpg", "not public"),
    ):
        site.seen.clear()
        error = get_refused(site, f"to/{there}", names=Names(x_cdn_example_org=[["127.0.0.2"]]))
        assert reason in str(error)
        assert error.status == 403
        assert len(site.seen) == 1
    # rebinding between the hops: the same name, private the second time
    names = Names(media_example_org=[["127.0.0.1"], ["169.254.169.254"]])
    assert "not public" in str(get_refused(site, "to//photo.jpg", names=names))
    site.seen.clear()
    assert "redirects more than 3 times" in str(get_refused(site, "to//to//to//to//to//photo.jpg"))
    assert len(site.seen) == 4


@pytest.mark.parametrize("page", ["lies", "endless", "chunks", "gzip", "photo.jpg"])
def test_bytes_are_bounded(site: Server, page: str):
    started = time.monotonic()
    assert get_refused(site, page, policy_of(site, max_bytes=20_000)).status == 413
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("page", ["drip", "drip-head"])
def test_time_is_bounded_whatever_drips(site: Server, page: str):
    started = time.monotonic()
    assert "did not arrive within 0.5 s" in str(get_refused(site, page, policy_of(site, timeout=0.5)))
    assert time.monotonic() - started < 5


def test_a_resolver_that_hangs_is_not_waited_for(site: Server):
    async def never(host: str, port: int) -> list[str]:
        await asyncio.sleep(60)
        return []

    get_refused(site, "photo.jpg", policy_of(site, timeout=0.2), never)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("page", "reason"),
    [("short", "can't be fetched"), ("nothing", "answered 404"), ("nonsense", "can't be"),
     ("big-head", "can't be fetched")],
)  # fmt: skip
def test_bad_answers_are_refused(site: Server, page: str, reason: str):
    assert reason in str(get_refused(site, page))


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes its certificate with openssl")
def test_tls_verifies_the_name_although_the_connection_goes_to_an_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
         "-keyout", key, "-out", certificate, "-days", "2", "-subj", "/CN=media.example.org",
         "-addext", "subjectAltName=DNS:media.example.org"],
        check=True, capture_output=True,
    )  # fmt: skip
    server = Server()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    try:
        with running(server):
            downloading.tls_context.cache_clear()
            assert "certificate is not valid" in str(get_refused(server, "photo.jpg", scheme="https"))
            monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
            downloading.tls_context.cache_clear()
            assert get(server, "photo.jpg", scheme="https") == PHOTO.read_bytes()
            error = get_refused(server, "photo.jpg", scheme="https", host="other.cdn.example.org")
            assert "certificate is not valid" in str(error)
    finally:
        downloading.tls_context.cache_clear()


# ---- what the bytes are ----


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not an image"),
        (b"hello", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n", "not an image"),
        (png_header(50_000, 50_000), "more pixels than any image"),
        (png_header(9_000, 9_000), "needs 8.1e+07 pixels"),
        (png_header(12_000, 12_000), "more pixels"),
    ],
)
def test_images_are_refused_by_their_header(data: bytes, reason: str):
    started = time.monotonic()
    assert reason in str(refused("image", data_uri(data), MediaPolicy()))
    assert time.monotonic() - started < 2


def test_pixels_are_counted_over_all_images_of_a_request():
    policy = MediaPolicy(max_pixels=2500)
    budget = Budget(policy)
    for _ in range(2):
        asyncio.run(admit("image", data_uri(png()), policy, budget))
    assert refused("image", data_uri(png()), policy, budget).status == 413


def test_an_animation_is_no_image_but_a_video():
    file = io.BytesIO()
    first, *rest = (Image.new("RGB", (32, 32), (80 * i, 0, 0)) for i in range(3))
    first.save(file, "GIF", save_all=True, append_images=rest)
    assert "animated" in str(refused("image", data_uri(file.getvalue()), MediaPolicy()))
    assert asyncio.run(admit("video", data_uri(file.getvalue()), MediaPolicy()))


@pytest.mark.parametrize("container", ["mp4", "matroska"])  # the second doesn't say how many frames it has
@pytest.mark.parametrize(
    ("changes", "what"),
    [({"max_frames": 5}, "frames"), ({"max_seconds": 2.9}, "seconds"), ({"max_pixels": 1000}, "pixels"),
     ({"max_decoded_pixels": 6 * 32 * 32 - 1}, "decoded pixels")],
)  # fmt: skip
def test_videos_are_refused_before_a_frame_is_decoded(container: str, changes: dict[str, int], what: str):
    film = data_uri(video(container=container))
    error = refused("video", film, MediaPolicy(**changes))  # type: ignore[arg-type]
    assert f" {what}:" in str(error)
    assert error.status == 413
    exact = {"max_frames": 6, "max_seconds": 3, "max_pixels": 6 * 32 * 32, "max_decoded_pixels": 6 * 32 * 32}
    asyncio.run(admit("video", film, MediaPolicy(**exact)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"hello",
        PHOTO.read_bytes(),
        b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
        b"ffconcat version 1.0\nfile /etc/passwd\n",
    ],
)
def test_what_is_no_video_is_refused(data: bytes):
    assert "not a video" in str(refused("video", data_uri(data), MediaPolicy()))


# ---- the same videos as the library, in every form


def moving(kind: str, count: int = 6, **options: object) -> bytes:
    return animation(kind, film(count, 32, 32), **({"duration": 500} | options))


CONTAINERS = ("mp4", "matroska", "webm", "avi", "mov", "mpegts", "flv", "asf", "mpeg", "h264", "mjpeg")


@pytest.mark.parametrize("container", [*CONTAINERS, "GIF", "WEBP", "PNG", "AVIF"])
def test_the_server_takes_the_videos_that_the_library_takes(container: str):
    codec = {"webm": "libvpx", "h264": "libx264", "mjpeg": "mjpeg", "mpeg": "mpeg1video", "flv": "libx264"}
    data = moving(container) if container.isupper() else video(24, 32, 24, container, codec.get(container, "mpeg4"))
    expected = load_video(io.BytesIO(data), VideoSettings())
    bare = base64.b64encode(data).decode()
    for source in (data_uri(data), *([bare] if container != "h264" else [])):  # which starts like nothing in particular
        admitted = asyncio.run(admit("video", source, MediaPolicy()))
        loaded = load_video(admitted, VideoSettings())  # type: ignore[arg-type]
        np.testing.assert_array_equal(loaded.frames, expected.frames)
        assert (loaded.fps, loaded.frame_indices) == (expected.fps, expected.frame_indices)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "AVIF"])
@pytest.mark.parametrize(
    ("changes", "what"),
    [({"max_frames": 5}, "frames"), ({"max_seconds": 2.9}, "seconds"), ({"max_pixels": 1000}, "pixels"),
     ({"max_decoded_pixels": 6 * 32 * 32 - 1}, "decoded pixels")],
)  # fmt: skip
def test_animations_are_bounded_as_videos(kind: str, changes: dict[str, int], what: str):
    error = refused("video", data_uri(moving(kind)), MediaPolicy(**changes))  # type: ignore[arg-type]
    assert f" {what}:" in str(error)
    assert error.status == 413
    exact = {"max_frames": 6, "max_seconds": 3.001, "max_pixels": 6 * 32 * 32, "max_decoded_pixels": 6 * 32 * 32}
    asyncio.run(admit("video", data_uri(moving(kind)), MediaPolicy(**exact)))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "AVIF", "TIFF"])
def test_several_pictures_in_one_are_not_an_image(kind: str):
    message = str(refused("image", data_uri(moving(kind)), MediaPolicy()))
    if kind == "TIFF":
        assert "has several pages: send the one" in message
    else:
        assert "is animated: send it as a video" in message  # which works: the test above
        assert "video_url" in message


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_a_still_picture_is_not_a_video(kind: str):
    message = str(refused("video", data_uri(picture(kind, film(1, 32, 32)[0])), MediaPolicy()))
    assert f"is a still picture ({kind}), not a video: pass it as an image" in message


def test_the_refusal_of_a_video_lists_what_is_read():
    message = str(refused("video", data_uri(b"hello, I am text"), MediaPolicy()))
    assert "mp4, matroska, webm" in message
    assert "animated GIF, WEBP, PNG, AVIF" in message


# ---- videos as frames


def frames_of(count: int, kind: str = "PNG", size: int = 32) -> list[bytes]:
    return [picture(kind, frame) for frame in film(count, size, size)]


def test_a_list_of_frames_is_the_video_that_the_library_makes_of_it(folder: Path):
    contents = frames_of(6)
    (folder / "frame.png").write_bytes(contents[0])
    sources = ["frame.png", base64.b64encode(contents[1]).decode(), *map(data_uri, contents[2:])]
    admitted = asyncio.run(admit("video", sources, MediaPolicy(allowed_folder=folder)))
    options = VideoOptions(fps=2)
    np.testing.assert_array_equal(
        load_video(admitted, VideoSettings(), options).frames,  # type: ignore[arg-type]
        load_video(contents, VideoSettings(), options).frames,
    )


def jpeg_uri(contents: list[bytes]) -> str:
    return "data:video/jpeg;base64," + ",".join(base64.b64encode(content).decode() for content in contents)


def test_frames_in_one_data_uri_are_the_video_that_the_library_makes_of_them():
    uri = jpeg_uri(frames_of(7, "JPEG"))
    for source in (uri, uri.replace(",", ",\n"), " " + uri):
        loaded = load_video(asyncio.run(admit("video", source, MediaPolicy())), VideoSettings())  # type: ignore[arg-type]
        expected = load_video(source, VideoSettings())
        np.testing.assert_array_equal(loaded.frames, expected.frames)
        assert loaded.timestamps(2) == expected.timestamps(2) == [0.25, 1.25, 2.25, 3]


@pytest.mark.parametrize("form", ["list", "data URI"])
@pytest.mark.parametrize(
    ("changes", "what"),
    [({"max_frames": 5}, "frames"), ({"max_pixels": 6 * 32 * 32 - 1}, "pixels"),
     ({"max_decoded_pixels": 6 * 32 * 32 - 1}, "decoded pixels"), ({"max_bytes": 1000}, "bytes")],
)  # fmt: skip
def test_frames_share_the_budget_of_their_request(form: str, changes: dict[str, int], what: str):
    contents = frames_of(6, "JPEG")
    source = jpeg_uri(contents) if form == "data URI" else [data_uri(content) for content in contents]
    error = refused("video", source, MediaPolicy(**changes))  # type: ignore[arg-type]
    assert f" {what}" in str(error)
    total = sum(map(len, contents))
    exact = {"max_frames": 6, "max_pixels": 6 * 32 * 32, "max_decoded_pixels": 6 * 32 * 32, "max_bytes": total}
    asyncio.run(admit("video", source, MediaPolicy(**exact)))  # type: ignore[arg-type]


def test_frames_by_url_count_as_items(site: Server):
    url = f"http://media.example.org:{site.server_port}/photo.jpg"
    error = refused("video", [url] * 3, policy_of(site, max_items=2, allowed_domains=("elsewhere.org",)))
    assert error.status == 403
    assert "frame 1 of 3 of a video: " in str(error)


@pytest.mark.parametrize(
    ("bad", "message"),
    [("data:image/png;base64,", "not an image"), ("data:image/png;base64,!!!!", "not valid base64"),
     ("", "named by text"), (7, "named by text"), (data_uri(b"hello"), "not an image"),
     ("/etc/passwd", "not allowed here"),
     (data_uri(moving("GIF")), "is animated"), (["x"], "named by text")],
)  # fmt: skip
def test_a_bad_frame_is_named_by_its_number(bad: object, message: str):
    good = data_uri(frames_of(1)[0])
    error = refused("video", [good, bad, good], MediaPolicy())
    assert "frame 2 of 3" in str(error)
    assert message in str(error)


@pytest.mark.parametrize(("bad", "message"), [(b"", "is empty"), (b"hello", "not an image")])
def test_a_bad_frame_of_a_data_uri_is_named_by_its_number(bad: bytes, message: str):
    contents = frames_of(3, "JPEG")
    error = refused("video", jpeg_uri([*contents[:2], bad]), MediaPolicy())
    assert "frame 3 of 3" in str(error)
    assert message in str(error)


def test_no_frames_are_no_video():
    assert "no frames" in str(refused("video", [], MediaPolicy()))


def test_frames_need_what_data_need():
    sources = [data_uri(content) for content in frames_of(2)]
    for source in (sources, jpeg_uri(frames_of(2, "JPEG"))):
        assert refused("video", source, MediaPolicy(allow_data=False)).status == 403


# ---- bare base64


@pytest.mark.parametrize("has_folder", [False, True])
@pytest.mark.parametrize("write", ["plain", "lines", "space", "urlsafe", "unpadded"])
def test_base64_without_a_header_is_data(write: str, has_folder: bool, folder: Path):
    encode = base64.urlsafe_b64encode if write == "urlsafe" else base64.b64encode
    text = encode(PHOTO.read_bytes()).decode()
    text = {
        "lines": "\r\n".join(text[i : i + 76] for i in range(0, len(text), 76)),
        "space": f"\n {text}\n",
        "unpadded": text.rstrip("="),
    }.get(write, text)
    policy = MediaPolicy(allowed_folder=folder if has_folder else None)
    image = asyncio.run(admit("image", text, policy))
    np.testing.assert_array_equal(np.asarray(load_image(image)), np.asarray(Image.open(PHOTO)))
    assert refused("image", text, MediaPolicy(allow_data=False)).status == 403
    refused("image", text, MediaPolicy(max_bytes=PHOTO.stat().st_size - 1))


@pytest.mark.parametrize("name", ["photo", "abcd", "aGVsbG8=", "AAAA" * 100, "sub/cat", "iVBORw0KGgo"])
def test_other_text_is_a_name_of_a_file(name: str):
    error = refused("image", name, MediaPolicy())
    assert error.status == 403
    assert "files of the server are not allowed here" in str(error)


# ---- options that make media larger


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("image", ImageOptions(min_pixels=90_000_000)),
        ("image", ImageOptions(resized_height=50_000, resized_width=50_000, max_pixels=10**10)),
        ("video", VideoOptions(min_pixels=90_000_000)),
        ("video", VideoOptions(resized_height=50_000, resized_width=50_000, max_pixels=10**10)),
        ("video", VideoOptions(num_frames=100_000)),
        ("frames", VideoOptions(num_frames=100_000)),
        ("frames", VideoOptions(resized_height=50_000, resized_width=50_000, max_pixels=10**10)),
    ],
)
def test_options_that_make_media_larger_count(kind: str, options: ImageOptions | VideoOptions):
    source: object = data_uri(png() if kind == "image" else video())
    if kind == "frames":
        source = [data_uri(png())] * 3
    with pytest.raises(MediaError) as caught:
        asyncio.run(admit("image" if kind == "image" else "video", source, MediaPolicy(), None, options))
    assert caught.value.status == 413
    usual = ImageOptions(max_pixels=10**6) if kind == "image" else VideoOptions(fps=2, max_pixels=10**6)
    asyncio.run(admit("image" if kind == "image" else "video", source, MediaPolicy(), None, usual))
