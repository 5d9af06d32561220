"""Who may call the server, how often, and what it writes into its log about it."""

import asyncio
import io
import json
import logging
import ssl
import subprocess
from collections.abc import AsyncGenerator, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.routing import Route

import deepstack_jax as dsj
from deepstack_jax.cli import main
from deepstack_jax.cli.http_server import Tls, trusted
from deepstack_jax.engine.options import EngineOptions
from deepstack_jax.engine.runner import Chunk
from deepstack_jax.serving import logs
from deepstack_jax.serving.access import ADMIN, RIGHTS, Access, Keys, make_key
from deepstack_jax.serving.connections import Gate
from deepstack_jax.serving.endpoint import NO_HEADERS
from deepstack_jax.serving.errors import RequestError, error_response, retry_after
from deepstack_jax.serving.hosts import HostRule
from deepstack_jax.serving.http import create_app
from deepstack_jax.serving.limits import Bucket, Limits, Tenant
from deepstack_jax.serving.policy import MediaPolicy
from deepstack_jax.serving.requests import GenerateRequest
from deepstack_jax.serving.text_node import TextNode
from tests.nodes import write_image_sensitive_checkpoint
from tests.test_serving_http import LONG, Watched, ask, serving
from tests.waiting import until

KEY, OTHER, BOSS, WRONG = "sk-first-7d1c", "sk-second-88aa", "sk-boss-0f3e", "sk-wrong-11bb"
SMALL = {"text": "Who is there?", "sampling_params": {"max_new_tokens": 8, "ignore_eos": True}}
ENDLESS = {"text": "Who is there?", "sampling_params": {"max_new_tokens": LONG, "ignore_eos": True}, "stream": True}


class Noting(Watched):
    """The node under test, with a note of whose requests it got."""

    def __init__(self, node: TextNode):
        super().__init__(node)
        self.tenants: list[str] = []

    async def generate(
        self,
        request: GenerateRequest,
        deadline: float,
        tenant: str = "",
        headers: Mapping[str, str] = NO_HEADERS,
        ended: Collection[int] = (),
    ) -> AsyncGenerator[Chunk]:
        self.tenants.append(tenant)
        async for chunk in super().generate(request, deadline, tenant, headers, ended):
            yield chunk


# (--host, whether it is a loopback address, --allow-host) -> hosts that are answered, and that are not
HOSTS: list[tuple[tuple[str, bool, tuple[str, ...]], list[str], list[str]]] = [
    (
        ("127.0.0.1", True, ()),
        [
            "127.0.0.1",
            "127.0.0.1:8000",
            "localhost:8000",
            "LOCALHOST.",
            "[::1]:8000",
            "127.8.8.8",
            "localhost:",
            "[::ffff:127.0.0.1]",
            "[0:0:0:0:0:0:0:1]",
            "127.0.0.1.:8000",
        ],
        [
            "localhost:80@evil.org",
            "localhost@evil.org",
            "[::1].evil.org",
            "[::1]@evil.org",
            "[::1",
            "::1",
            "localhost..",
            "localhost/",
            "localhost evil.org",
            "localhost,evil.org",
            "localhost:80:80",
            "[localhost]",
            "[127.0.0.1]",
            "0.0.0.0",
            "[::]",
            "[::ffff:10.1.2.3]",
            "127.1",
            "2130706433",
            "0x7f000001",
            "*",
            ".",
            ":80",
            "evil.org",
            "evil.org:8000",
            "10.1.2.3",
            "localhost.evil.org",
            "",
            "[evil]",
            "127.0.0.1.evil.org",
        ],
    ),
    (("0.0.0.0", False, ()), ["10.1.2.3:80", "[2001:db8::1]:80", "localhost"], ["evil.org", "0.0.0.0.evil.org", "]["]),
    (("node7", False, ("chat.example.org",)), ["node7:80", "Chat.Example.org", "10.1.2.3"], ["node8", "example.org"]),
    (
        ("127.0.0.1", True, ("bücher.example", "FD00:0::7", "Chat.example.org.")),
        ["xn--bcher-kva.example", "[fd00::7]:80", "chat.example.org"],
        ["[fd00::8]", "b.example"],
    ),
    (("0.0.0.0", False, ("*",)), ["evil.org", "anything:80"], []),
]


@pytest.mark.parametrize(("server", "answered", "refused"), HOSTS)
def test_a_server_answers_to_its_own_names(
    server: tuple[str, bool, tuple[str, ...]], answered: list[str], refused: list[str]
):
    rule = HostRule.of(*server)
    assert [host for host in answered + refused if rule.allows(host)] == answered


@pytest.mark.parametrize("name", ["example.org:8000", "https://example.org", "example.org/chat", "", "a b"])
def test_names_that_could_never_match_are_refused(name: str):
    with pytest.raises(ValueError, match="leave out scheme, port and path"):
        HostRule.of("127.0.0.1", True, (name,))


@pytest.fixture(scope="module")
def policy() -> MediaPolicy:
    return MediaPolicy()


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory, policy: MediaPolicy) -> Iterator[Noting]:
    path = tmp_path_factory.mktemp("access") / "tiny"
    write_image_sensitive_checkpoint(path, min_pixels=4096)
    engine = EngineOptions(slots=2, decode_steps=1)
    node = TextNode(dsj.load(path), policy, name="tiny", engine=engine, warm_up=False)
    yield Noting(node)
    node.stop(0)
    asyncio.run(node.close())


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


# ---- rights


def test_every_route_has_a_right(node: Noting, policy: MediaPolicy):
    paths = {route.path for route in create_app(node, policy).routes if isinstance(route, Route)}
    assert paths == RIGHTS.keys()


@pytest.mark.parametrize("path", sorted(RIGHTS))
def test_each_path_takes_the_keys_of_its_right(node: Noting, policy: MediaPolicy, path: str):
    given = {"none": {}, "wrong": bearer(WRONG), "key": bearer(KEY), "admin": bearer(BOSS)}
    expected = {
        "open": {"none": 0, "wrong": 0, "key": 0, "admin": 0},
        "key": {"none": 401, "wrong": 401, "key": 0, "admin": 0},
        "admin": {"none": 401, "wrong": 401, "key": 403, "admin": 0},
    }[RIGHTS[path]]
    with serving(create_app(node, policy, access=Access(Keys([KEY], admin=BOSS)))) as client:
        for name, headers in given.items():
            status = client.get(path, headers=headers).status_code  # POST-only paths say 405 to those who may call
            assert status == expected[name] or (not expected[name] and status not in (401, 403)), name


def test_a_path_that_nobody_listed_needs_a_key(node: Noting, policy: MediaPolicy):
    with serving(create_app(node, policy, access=Access(Keys([KEY])))) as client:
        for path in ("/nowhere", "/health/", "//health", "/drain/", "/v1/anything"):
            assert client.get(f"{str(client.base_url).rstrip('/')}{path}").status_code == 401  # "//" would name a host
        assert client.get("/nowhere", headers=bearer(KEY)).status_code == 404


def test_without_an_admin_key_the_admins_paths_are_closed(node: Noting, policy: MediaPolicy):
    for keys in (Keys(), Keys([KEY])):
        with serving(create_app(node, policy, access=Access(keys))) as client:
            for method, path in (("GET", "/server_info"), ("POST", "/drain")):
                response = client.request(method, path, headers=bearer(KEY))
                assert response.status_code == 403
                assert "--admin-key" in response.json()["error"]["message"]


def test_a_refusal_has_the_shape_that_clients_of_openai_expect(node: Noting, policy: MediaPolicy):
    with serving(create_app(node, policy, access=Access(Keys([KEY, OTHER])))) as client:
        refused = client.post("/generate", json=SMALL, headers=bearer(WRONG))
        assert refused.status_code == 401
        assert refused.headers["www-authenticate"] == "Bearer"
        error = refused.json()["error"]
        assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
        assert error.keys() == {"message", "type", "param", "code"}
        for headers in (bearer(KEY), {"authorization": f"bearer  {OTHER}"}, {"x-api-key": KEY}):
            assert client.post("/generate", json=SMALL, headers=headers).status_code == 200
        for value in (KEY, f"Basic {KEY}", "Bearer", f"Bearer {KEY}x"):
            assert client.post("/generate", json=SMALL, headers={"authorization": value}).status_code == 401


def test_the_node_gets_the_names_of_the_keys(node: Noting, policy: MediaPolicy, tmp_path: Path):
    anna = make_key("anna", tmp_path / "keys")
    with serving(create_app(node, policy, access=Access(Keys([KEY], tmp_path / "keys", BOSS)))) as client:
        node.tenants.clear()
        for key in (anna, KEY, BOSS):
            assert client.post("/generate", json=SMALL, headers=bearer(key)).status_code == 200
    assert [node.tenants[0], node.tenants[2]] == ["anna", ADMIN]
    assert node.tenants[1].startswith("key-")
    assert KEY not in node.tenants[1]


# ---- key files


def test_a_key_file_has_hashes_only_and_can_be_reloaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "keys"
    with pytest.raises(SystemExit) as end:
        main(["keygen", str(file), "--api-key", "anna"])
    assert end.value.code == 0
    anna = capsys.readouterr().out.strip()
    assert anna not in file.read_text()
    keys = Keys(file=file)
    assert keys.name_of(anna) == "anna"
    bert = make_key("bert", file)
    assert keys.name_of(bert) is None
    keys.reload()
    assert (keys.name_of(anna), keys.name_of(bert)) == ("anna", "bert")

    file.write_text("# nobody but bert\n\n" + file.read_text().splitlines()[1] + "  # works here\n")
    keys.reload()
    assert (keys.name_of(anna), keys.name_of(bert)) == (None, "bert")
    file.write_text(f"bert {bert}\n")
    with pytest.raises(ValueError, match="line 1") as refused:
        keys.reload()
    assert bert not in str(refused.value)
    assert keys.name_of(bert) == "bert"  # a mistake in the file locks nobody out


@pytest.mark.parametrize("lines", ["anna", "anna sha256:12", "admin sha256:" + "0" * 64, f"a sha256:{'0' * 64}\n" * 2])
def test_key_files_with_mistakes_are_refused(tmp_path: Path, lines: str):
    (tmp_path / "keys").write_text(lines)
    with pytest.raises(ValueError, match=r"is not 'name sha256:HEX' with a new name"):
        Keys(file=tmp_path / "keys")
    with pytest.raises(ValueError, match="can't be read"):
        Keys(file=tmp_path / "nothing")


def test_names_and_keys_that_cannot_be_used_are_refused(tmp_path: Path):
    make_key("anna", tmp_path / "keys")
    for name, words in (("anna", "already"), ("admin", "can't name a key"), ("a b", "can't name a key")):
        with pytest.raises(ValueError, match=words):
            make_key(name, tmp_path / "keys")
    for key in ("", "with space", "ümlaut"):
        with pytest.raises(ValueError, match="printable ASCII"):
            Keys([key])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0 is open to others, and there is no key"),
        (["--host", "0.0.0.0", "--admin-key", "abc"], "there is no key"),
        (["--no-auth", "--api-key", "abc"], "--no-auth lets anybody in, and there are API keys"),
        (["--api-key-file", "nowhere"], "the key file nowhere can't be read"),
        (["--tls-cert", "nowhere"], "--tls-cert and --tls-key belong together"),
        (["--tls-cert", "nowhere", "--tls-key", "nowhere"], "can't be used (No such file or directory)"),
    ],
)
def test_the_command_refuses_before_it_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str
):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SystemExit) as end:
        main(["serve", str(tmp_path), "--port", "0", *options])
    assert end.value.code == 1
    message = capsys.readouterr().err
    assert words in message
    assert message.count("\n") == 1


# ---- limits


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_bucket_fills_up_continuously_and_no_further():
    clock = Clock()
    bucket = Bucket(120, clock)
    bucket.take(150)
    assert (bucket.level, bucket.seconds_until(1)) == (-30, 15.5)
    clock.now += 15.5
    assert bucket.level == 1
    clock.now += 1000
    assert bucket.level == 120


def test_clients_that_are_refused_together_are_told_different_times():
    """With one time for all, they would come back together."""
    refusal = RequestError("try again later", 503)
    assert {error_response(refusal).headers["retry-after"] for _ in range(200)} == {"1", "2", "3"}
    assert {int(retry_after(59.5)) for _ in range(1000)} == set(range(60, 76))
    assert "retry-after" not in error_response(RequestError("no")).headers


def test_each_limit_refuses_and_lets_in_again():
    clock = Clock()
    tenant = Tenant(Limits(requests_per_minute=2, tokens_per_minute=60, concurrent_requests=1), clock)
    tenant.begin()
    with pytest.raises(RequestError, match="1 requests at once") as refused:
        tenant.begin()
    assert 1 <= int(refused.value.headers["retry-after"]) <= 3
    tenant.end()
    tenant.begin()
    tenant.charge(90)
    tenant.end()
    with pytest.raises(RequestError, match="2 requests per minute") as refused:
        tenant.begin()
    assert 30 <= int(refused.value.headers.pop("retry-after")) <= 37
    assert refused.value.headers == {
        "x-ratelimit-limit-requests": "2",
        "x-ratelimit-remaining-requests": "0",
        "x-ratelimit-reset-requests": "60s",
        "x-ratelimit-limit-tokens": "60",
        "x-ratelimit-remaining-tokens": "0",
        "x-ratelimit-reset-tokens": "90s",
    }
    clock.now += 30
    with pytest.raises(RequestError, match="60 tokens per minute") as refused:
        tenant.begin()
    assert 1 <= int(refused.value.headers["retry-after"]) <= 3
    assert refused.value.kind == "tokens"
    clock.now += 1
    tenant.begin()


def test_limits_are_each_keys_own_and_said_in_headers(node: Noting, policy: MediaPolicy):
    access = Access(Keys([KEY, OTHER], admin=BOSS), Limits(requests_per_minute=2))
    with serving(create_app(node, policy, access=access)) as client:
        for left in ("1", "0"):
            response = client.post("/generate", json=SMALL, headers=bearer(KEY))
            assert response.status_code == 200
            assert response.headers["x-ratelimit-remaining-requests"] == left
        refused = client.post("/generate", json=SMALL, headers=bearer(KEY))
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert client.get("/v1/models", headers=bearer(KEY)).status_code == 200  # reading is not work
        assert client.post("/generate", json=SMALL, headers=bearer(OTHER)).status_code == 200
        for _ in range(3):
            assert client.post("/generate", json=SMALL, headers=bearer(BOSS)).status_code == 200


def test_tokens_are_counted_as_the_client_counts_them(node: Noting, policy: MediaPolicy):
    with serving(create_app(node, policy, access=Access(limits=Limits(tokens_per_minute=1)))) as client:
        meta = ask(client, **SMALL)["meta_info"]  # nobody knows before what it takes
        used = meta["prompt_tokens"] + meta["completion_tokens"]
        refused = client.post("/generate", json=SMALL)
        assert (refused.status_code, refused.json()["error"]["type"]) == (429, "tokens")
        # one comes back per minute, and one was there before
        assert 60 * (used - 1) < int(refused.headers["retry-after"]) <= 60 * used * 5 // 4


def test_requests_at_once_are_limited_until_one_ends(node: Noting, policy: MediaPolicy):
    with serving(create_app(node, policy, access=Access(limits=Limits(concurrent_requests=1)))) as client:
        with client.stream("POST", "/generate", json=ENDLESS) as response:
            lines = response.iter_lines()  # closes the response once nobody holds it
            next(lines)
            assert client.post("/generate", json=SMALL).status_code == 429
        until(lambda: client.post("/generate", json=SMALL).status_code == 200)


# ---- browsers, TLS


def test_pages_of_listed_sites_may_call(node: Noting, policy: MediaPolicy):
    site, other = "https://example.org", "https://example.com"
    access = Access(Keys([KEY]))
    with serving(create_app(node, policy, access=access, origins=[site])) as client:
        asks = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
        preflight = client.options("/generate", headers={"origin": site, **asks})  # browsers send no key with it
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == site
        assert client.options("/generate", headers={"origin": other, **asks}).status_code == 400
        answered = client.post("/generate", json=SMALL, headers={"origin": site, **bearer(KEY)})
        assert answered.status_code == 200
        assert answered.headers["access-control-allow-origin"] == site
        assert client.post("/generate", json=SMALL, headers={"origin": other, **bearer(KEY)}).status_code == 403
        refused = client.post("/generate", json=SMALL, headers={"origin": site})
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, site)
    with serving(create_app(node, policy, origins=["*"])) as client:
        assert client.post("/generate", json=SMALL, headers={"origin": other}).status_code == 200


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Tls:
    path = tmp_path_factory.mktemp("tls")
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *names]
    try:
        subprocess.run([*command, "-keyout", path / "key", "-out", path / "cert"], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("no openssl command to make a certificate with")
    return Tls(path / "cert", path / "key")


def test_the_server_speaks_https(node: Noting, policy: MediaPolicy, certificate: Tls):
    with serving(create_app(node, policy), Gate(tls=certificate.context())) as client:
        url = str(client.base_url).replace("http://", "https://")
        with httpx.Client(base_url=url, verify=trusted(certificate.cert), trust_env=False) as secure:
            assert secure.get("/health").json()["status"] == "ok"
            assert secure.post("/generate", json=SMALL).status_code == 200
        with httpx.Client(base_url=url, trust_env=False) as strict, pytest.raises(httpx.ConnectError):
            strict.get("/health")
    with pytest.raises(ValueError, match="--tls-ca"):
        trusted(certificate.key)
    with pytest.raises(ValueError, match="can't be used"):
        Tls(certificate.key, certificate.cert)
    assert isinstance(trusted(certificate.cert), ssl.SSLContext)


# ---- logs


@contextmanager
def logging_to(formatter: logging.Formatter, monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """Everything that any logger of the process writes."""
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [handler])
    monkeypatch.setattr(root, "level", logging.DEBUG)
    logs._requests.setLevel(logging.INFO)
    yield text


def test_a_json_line_tells_what_became_of_a_request(
    node: Noting, policy: MediaPolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    anna, trace = make_key("anna", tmp_path / "keys"), f"00-{'a' * 32}-{'b' * 16}-01"
    with (
        logging_to(logs.JsonFormatter(), monkeypatch) as text,
        serving(create_app(node, policy, access=Access(Keys(file=tmp_path / "keys")))) as client,
    ):
        sent = {"x-request-id": "call-7", "traceparent": trace, **bearer(anna)}
        response = client.post("/generate", json=SMALL, headers=sent)
        assert response.headers["x-request-id"] == "call-7"
        meta = response.json()["meta_info"]
        assert meta["id"] == "call-7"
        until(lambda: "call-7" in text.getvalue())
    lines = [json.loads(line) for line in text.getvalue().splitlines()]
    (line,) = [line for line in lines if line["message"] == "request"]
    assert line.pop("time") <= "9999"
    assert 0 < line.pop("seconds") < 100
    assert line == {
        "level": "info",
        "message": "request",
        "request_id": "call-7",
        "traceparent": trace,
        "tenant": "anna",
        "method": "POST",
        "path": "/generate",
        "status": 200,
        "prompt_tokens": meta["prompt_tokens"],
        "completion_tokens": 8,
    }


@pytest.mark.parametrize("formatter", [logs.JsonFormatter(), logs.TextFormatter()])
def test_what_a_request_chooses_cannot_forge_a_line(
    node: Noting, policy: MediaPolicy, formatter: logging.Formatter, monkeypatch: pytest.MonkeyPatch
):
    with logging_to(formatter, monkeypatch) as text, serving(create_app(node, policy)) as client:
        for path in ("/%0a2026-01-01%20ERROR%20forged", "/%1b%5b2Jcleared", "/x%20status=200"):
            response = client.get(path, headers={"x-request-id": "two words", "traceparent": "forged\tvalue"})
            assert len(response.headers["x-request-id"]) == 32  # one of our own
        until(lambda: text.getvalue().count("/x status=200") == 1)
        logging.getLogger("deepstack_jax").error("a picture named %s failed", "a\nforged line\x1b[2J")
        try:
            raise ValueError("a\n2026-01-01 ERROR forged")
        except ValueError:
            logging.getLogger("deepstack_jax").exception("failed")
    for line in text.getvalue().splitlines():
        assert line.isprintable()
        assert line.startswith(("{", "20", "  "))
        assert not line.startswith("2026-01-01")
        assert not line.startswith("forged")


@pytest.mark.parametrize("formatter", [logs.JsonFormatter(), logs.TextFormatter()])
def test_keys_are_in_no_log_and_no_answer(
    node: Noting, policy: MediaPolicy, formatter: logging.Formatter, monkeypatch: pytest.MonkeyPatch
):
    said = ""
    access = Access(Keys([KEY], admin=BOSS), Limits(requests_per_minute=2))
    with logging_to(formatter, monkeypatch) as text, serving(create_app(node, policy, access=access)) as client:
        for key in (KEY, WRONG, BOSS):
            for headers in (bearer(key), {"x-api-key": key}, {"authorization": f"Basic {key}"}):
                for method, path in (("POST", "/generate"), ("GET", "/server_info"), ("GET", "/metrics")):
                    response = client.request(method, path, json=SMALL, headers=headers)
                    said += response.text + str(response.headers)
        said += client.post("/generate", content=b"{", headers=bearer(KEY)).text
        until(lambda: text.getvalue().count("/server_info") >= 9)
    said += text.getvalue()
    assert "rate_limit_exceeded" in said
    assert not any(key in said for key in (KEY, WRONG, BOSS))


def test_many_at_once_with_keys_of_their_own(node: Noting, policy: MediaPolicy):
    with serving(create_app(node, policy, access=Access(Keys([KEY, OTHER])))) as client, ThreadPoolExecutor(8) as pool:

        def one(i: int) -> dict[str, Any]:
            return client.post("/generate", json=SMALL, headers=bearer((KEY, OTHER)[i % 2])).json()

        assert len({tuple(answer["output_ids"]) for answer in pool.map(one, range(8))}) == 1
