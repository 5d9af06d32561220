"""What clients are told of errors, and what is kept from them."""

import pytest

from deepstack_jax.engine.runner import RequestFailed
from deepstack_jax.serving.errors import RequestError, as_request_error, without_places


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("can't open /srv/models/qwen/config.json: no such file", "can't open [...]: no such file"),
        ("[Errno 2] No such file: '/a/b c'", "[Errno 2] No such file: '[...] c'"),
        ("tcp://10.0.0.1:7000 is gone", "[...] is gone"),
        ("write to 10.0.0.1:15000 failed", "write to [...] failed"),
        ("write to [fe80::1]:15000 failed", "write to [...] failed"),
        ("localhost:80 and 127.0.0.1 do not answer", "[...] and [...] do not answer"),
        ("see https://internal.example:8443/v1/x?y=z for it", "see [...] for it"),
        ("send it to /v1/chat/completions or /generate", "send it to /v1/chat/completions or /generate"),
        ("2/3 of 1.5 or 1.2.3, ratio 1:2, text/plain", "2/3 of 1.5 or 1.2.3, ratio 1:2, text/plain"),
    ],
)
def test_paths_and_addresses_are_the_operators(said: str, told: str):
    assert without_places(said) == told


@pytest.mark.parametrize("kind", [ValueError, RequestFailed])
def test_errors_of_libraries_name_no_place(kind: type[Exception]):
    assert str(as_request_error(kind("bad /etc/secret/key at 10.1.2.3:99"))) == "bad [...] at [...]"


def test_what_a_client_sent_is_quoted():
    error = RequestError("http://example.org/a.png is not an allowed domain", 403)
    assert as_request_error(error) is error
