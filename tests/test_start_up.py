"""How commands start: compiled programs are kept between runs, and what is missing is told before jax is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from deepstack_jax.cli import COMPILING

CHILD = """
import sys
from deepstack_jax.cli import main
try:
    main()
finally:
    print(*(name for name in ("jax", "torch") if sys.modules.get(name)), file=sys.stderr)
"""
ASK = ("generate", "tiny-vl", "--prompt", "How many shapes are there?", "--max-new-tokens", "4")
SETTINGS = ("JAX_COMPILATION_CACHE", "JAX_ENABLE_COMPILATION_CACHE", "JAX_PERSISTENT_CACHE", "XDG_CACHE_HOME")


def run(*args: object, code: str = CHILD, **env: str) -> subprocess.CompletedProcess[str]:
    """A command in an environment that says nothing about caches but what `env` says."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(SETTINGS)}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, env=inherited | env, timeout=300
    )


def programs_in(folder: Path) -> set[str]:
    return {path.name.split("-")[0] for path in folder.rglob("*-cache")}


@pytest.mark.slow
def test_a_second_run_reads_the_programs_of_the_first(tmp_path: Path):
    first = run(*ASK, XDG_CACHE_HOME=str(tmp_path))
    assert first.returncode == 0, first.stderr
    assert {"jit_prefill_chunk", "jit_decode_loop"} <= programs_in(tmp_path / "deepstack-jax")
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*-cache")}
    second = run(*ASK, XDG_CACHE_HOME=str(tmp_path), PYTHONPATH="")  # PyTorch is installed, and not hidden from it
    assert second.stdout == first.stdout
    assert second.stderr.split()[-1] == "jax"  # transformers has not imported PyTorch
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*-cache")} == kept
    assert "warning" not in (first.stderr + second.stderr).lower()


SHOW = """
import os, sys
from deepstack_jax.cli import compile_cache
given = sys.argv[1] if sys.argv[1:] else None
compile_cache.use(given)
compile_cache.use(None)  # as a child does
import jax
print(jax.config.jax_enable_compilation_cache, jax.config.jax_compilation_cache_dir)
print(jax.config.jax_persistent_cache_min_compile_time_secs, jax.config.jax_compilation_cache_max_size > 0)
"""


def shown(*args: object, **env: str) -> tuple[list[str], str]:
    done = run(*args, code=SHOW, **env)
    assert done.returncode == 0, done.stderr
    return done.stdout.split(), done.stderr


def test_the_cache_is_where_the_user_wants_it(tmp_path: Path):
    home, own, other = (str(tmp_path / name) for name in ("home", "own", "other"))
    under = f"{home}/.cache/deepstack-jax/programs-"
    found, _ = shown(HOME=home)
    assert found[1].startswith(under)
    assert found[0::2] + found[3:] == ["True", "0.0", "True"]
    # a relative XDG_CACHE_HOME is ignored, as its specification says
    assert shown(HOME=home, XDG_CACHE_HOME="here")[0][1].startswith(under)
    assert shown(HOME=home, XDG_CACHE_HOME=own)[0][1].startswith(f"{own}/deepstack-jax/programs-")
    # what jax's own settings say stays, unless the option says otherwise
    assert shown(HOME=home, JAX_COMPILATION_CACHE_DIR=own)[0] == ["True", own, "1.0", "False"]
    assert shown(HOME=home, JAX_ENABLE_COMPILATION_CACHE="false")[0][0] == "False"
    assert shown(other, HOME=home, JAX_COMPILATION_CACHE_DIR=own)[0] == ["True", other, "0.0", "True"]
    assert shown("~/there", HOME=home)[0][1] == f"{home}/there"
    assert shown("none", HOME=home, JAX_COMPILATION_CACHE_DIR=own)[0][0] == "False"
    assert not (tmp_path / "own" / "none").exists()


def test_a_directory_that_cannot_be_written_is_one_warning(tmp_path: Path):
    (tmp_path / "file").write_text("")
    for given, env in (
        ((tmp_path / "file" / "cache",), {}),
        ((), {"XDG_CACHE_HOME": str(tmp_path / "file")}),
        (("/proc/nowhere",), {}),
    ):
        found, errors = shown(*given, **env)
        assert found[0] == "False"
        assert len(errors.splitlines()) == 1, errors
        assert errors.startswith("warning: compiled programs are not kept: ")
        assert str((*given, tmp_path / "file")[0]) in errors


@pytest.mark.parametrize("command", COMPILING)
def test_commands_that_compile_have_the_option(command: str):
    done = run(*command.split(), "--help", COLUMNS="200")
    assert "--compile-cache" in done.stdout
    assert "--debug" in done.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["generate", "nowhere", "--prompt", "x"], "no config.json in nowhere"),
        (["generate", "tiny-vl", "--prompt", "x", "--image", "none.jpg"], "no file none.jpg"),
        (["generate", "tiny-vl", "--prompt", "x", "--video", "none.mp4"], "no file none.mp4"),
        (["generate", "tiny-vl", "--messages", "none.json"], "--messages none.json: there is no such file"),
        (["generate", "tiny-vl", "--prompt", "x", "--top-p", "2"], "top_p 2.0 is out of range"),
        (["serve", "nowhere"], "no config.json in nowhere"),
        (["inspect", "nowhere"], "no config.json in nowhere"),
        (["convert", "nowhere", "there"], "no config.json in nowhere"),
        (["export", "nowhere", "there"], "no directory nowhere"),
        (["bench", "decode", "nowhere"], "no config.json in nowhere"),
        (["bench", "serve", "--prompts", "none.jsonl"], "[Errno 2] No such file or directory: 'none.jsonl'"),
        (["demo", "--checkpoint", "nowhere"], "no config.json in nowhere"),
        (["demo", "--image", "none.jpg"], "no file none.jpg"),
    ],
)
def test_what_does_not_exist_is_told_before_jax_is_imported(args: list[str], message: str, tmp_path: Path):
    done = run(*args, XDG_CACHE_HOME=str(tmp_path))
    error, imported = done.stderr.splitlines()
    assert done.returncode == 1
    assert error.startswith(f"error: {message}")
    assert imported == ""


def test_debug_is_an_option_and_never_a_part_of_a_value():
    for args in (["inspect", "nowhere", "--debug"], ["--debug", "inspect", "nowhere"]):
        assert "Traceback" in run(*args).stderr
    done = run("generate", "tiny-vl", "--messages", "--debug")  # the value of --messages
    assert "Traceback" not in done.stderr
    assert "--messages --debug: there is no such file" in done.stderr


def test_the_version_is_told():
    import deepstack_jax as dsj

    assert run("--version").stdout == f"deepstack-jax {dsj.__version__}\n"
