"""Names that don't resolve delay nothing else."""

import asyncio
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from deepstack_jax.processing.resolver import Resolver, resolve_name
from deepstack_jax.serving import media
from deepstack_jax.serving.policy import Budget, MediaError, MediaPolicy


class NameServer:
    """Looks names up in a table; `hang.*` hang until `release`."""

    def __init__(self):
        self.release = threading.Event()
        self.asked: list[str] = []

    def __call__(self, host: str) -> list[tuple[object, ...]]:
        self.asked.append(host)
        if host.startswith("hang"):
            self.release.wait(60)
        if host.startswith("none"):
            raise socket.gaierror(socket.EAI_NONAME, "unknown")
        stream = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.7", 0))
        return [stream, stream]


@pytest.fixture
def names() -> Iterator[NameServer]:
    server = NameServer()
    yield server
    server.release.set()


def test_a_name_that_hangs_delays_no_other_one(names: NameServer):
    resolver = Resolver(names, seconds=0.2, threads=2)

    async def run() -> None:
        hanging = asyncio.create_task(resolver("hang.example", 80))
        assert await resolver("other.example", 80) == ["192.0.2.7"]
        assert await asyncio.to_thread(lambda: "a file") == "a file"
        assert not hanging.done()
        with pytest.raises(TimeoutError):
            await hanging

    asyncio.run(run())


def test_addresses_never_wait_for_a_thread(names: NameServer):
    resolver = Resolver(names, seconds=30, threads=1)

    async def run() -> None:
        hanging = asyncio.create_task(resolver("hang.example", 80))
        assert await resolver("127.0.0.1", 80) == ["127.0.0.1"]
        assert await resolver("::1", 80) == ["::1"]
        hanging.cancel()

    asyncio.run(run())
    assert names.asked in ([], ["hang.example"])


def test_equal_names_are_one_lookup_and_who_gives_up_takes_nothing_from_others(names: NameServer):
    resolver = Resolver(names, seconds=30)

    async def run() -> list[str]:
        first, second = (asyncio.create_task(resolver("hang.example", 80)) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        names.release.set()
        return await second

    assert asyncio.run(run()) == ["192.0.2.7"]
    assert names.asked == ["hang.example"]


@pytest.mark.parametrize("name", ["none.example", "hang.example"])
def test_failures_are_remembered_for_a_while_and_addresses_never(names: NameServer, name: str):
    resolver = Resolver(names, seconds=0.1, failed_seconds=30)
    for _ in range(3):
        with pytest.raises(OSError):
            asyncio.run(resolver(name, 80))
    assert names.asked == [name]
    for _ in range(3):
        asyncio.run(resolver("there.example", 80))
    assert names.asked == [name] + 3 * ["there.example"]


def test_names_that_waited_for_a_thread_until_their_time_was_over_are_not_looked_up(names: NameServer):
    resolver = Resolver(names, seconds=0.1, failed_seconds=0, threads=1)
    for name in ("hang.example", "late.example"):
        with pytest.raises(TimeoutError):
            asyncio.run(resolver(name, 80))
    names.release.set()
    assert asyncio.run(resolver("next.example", 80)) == ["192.0.2.7"]
    assert names.asked == ["hang.example", "next.example"]


def test_the_system_resolves_localhost():
    assert "127.0.0.1" in asyncio.run(resolve_name("localhost", 80))


def test_the_process_ends_although_a_name_hangs():
    program = (
        "import asyncio, threading\n"
        "from deepstack_jax.processing.resolver import Resolver\n"
        "resolver = Resolver(lambda host: threading.Event().wait(), seconds=0.1)\n"
        "try: asyncio.run(resolver('hang.example', 80))\n"
        "except TimeoutError: print('ended')\n"
    )
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, env=env)
    assert (ended.returncode, ended.stdout) == (0, "ended\n"), ended.stderr


def test_a_file_on_a_disk_that_hangs_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    release = threading.Event()
    monkeypatch.setattr(media, "_read_file", lambda *_: release.wait(60))
    policy = MediaPolicy(allowed_folder=tmp_path, timeout=0.2)
    try:
        with pytest.raises(MediaError, match=r"within 0\.2 s") as refused:
            asyncio.run(media.read("picture.png", policy, Budget(policy)))
        assert refused.value.status == 503
    finally:
        release.set()
