"""The documents: their commands run, and the options, functions and links that they name exist."""

import ast
import io
import json
import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import redirect_stdout, suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType
from unittest import mock

import numpy as np
import pytest

import deepstack_jax as dsj
from deepstack_jax.cli import COMMANDS, main
from deepstack_jax.cli.bench import COMMANDS as BENCH_COMMANDS
from deepstack_jax.disagg.encode.bridge import SendBridge
from deepstack_jax.disagg.language.incoming import BlockCopy
from deepstack_jax.disagg.transports import TransferError, Transport, WriteSegment
from deepstack_jax.disagg.wire.buffers import MultimodalDataBuffers
from pallas_kernels.fused_moe.arg_specs import ODD, TILED
from tests.bridge_cases import arrived_rows, in_token_order, incoming_for, make_request, send
from tests.test_kernels import arrays, error_of, error_of_plain_form

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "examples/*/*.md", "benchmarks/results/*.md", ".github/**/*.md")
    for path in ROOT.glob(pattern)
)
FENCE = re.compile(r"^(<!-- (?P<mark>[\w ]+) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


def named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def without_fences(text: str) -> str:
    return FENCE.sub("", text)


# ---- links


def slug(heading: str) -> str:
    """The anchor that GitHub and mkdocs give a heading."""
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
    return re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", plain.strip().lower()))


def anchors(page: Path) -> set[str]:
    return {slug(line) for line in re.findall(r"^#+ (.*)$", without_fences(page.read_text()), re.MULTILINE)}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_to_files_and_headings_that_exist(page):
    links = re.findall(r"\]\(([^)\s]+)\)", without_fences(page.read_text()))
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        target, _, anchor = link.partition("#")
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), f"{link}: no such file"
        if anchor:
            assert anchor in anchors(path), f"{link}: no such heading"


# ---- options


@cache
def options_of(command: str) -> set[str]:
    """Those that `deepstack-jax COMMAND --help` lists."""
    help_text = io.StringIO()
    with mock.patch.dict(os.environ, COLUMNS="200"), redirect_stdout(help_text), pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    lists = re.findall(r"^│[ *]+(--[\w-]+(?: +--no-[\w-]+)?)", help_text.getvalue(), re.MULTILINE)
    assert "--help" in lists
    return {option for each in lists for option in each.split()}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_commands_have_the_options_that_pages_give_them(page):
    text = page.read_text().replace("\\\n", " ")
    code = [fence["text"] for fence in FENCE.finditer(text)] + re.findall(r"`([^`\n]+)`", without_fences(text))
    for command, rest in re.findall(r"^ *deepstack-jax (\w+)([^#\n]*)", "\n".join(code), re.MULTILINE):
        assert command in COMMANDS, f"deepstack-jax {command}: no such command"
        if command == "bench":
            part = rest.split()[0]
            assert part in BENCH_COMMANDS, f"deepstack-jax bench {part}: no such command"
            command = f"bench {part}"
        for option in re.findall(r"--[a-z][\w-]*", rest):
            assert option in options_of(command), f"deepstack-jax {command} has no {option}"


@pytest.mark.parametrize("page", [DOCS / "serving.md", DOCS / "disaggregation.md"], ids=named)
def test_the_tables_of_options_are_those_of_serve(page):
    first_cells = re.findall(r"^\| (`--[^|]*) \|", page.read_text(), re.MULTILINE)
    documented = {option for cell in first_cells for option in re.findall(r"--[\w-]+", cell)}
    assert documented
    assert documented <= options_of("serve")
    if page.name == "serving.md":
        off = {
            option for option in options_of("serve") if option.replace("--no-", "--") in options_of("serve") - {option}
        }
        assert documented == options_of("serve") - off - {"--help", "--debug"}


# ---- functions


def defined(file: Path) -> set[str]:
    """Functions, classes and methods of a file, by qualified name."""
    names: set[str] = set()

    def add(nodes: list[ast.stmt], prefix: str) -> None:
        for node in nodes:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                add(node.body, f"{prefix}{node.name}.")

    add(ast.parse(file.read_text()).body, "")
    return names


def test_the_reference_has_all_public_names():
    (members,) = re.findall(r"members: \[(.*)\]", (DOCS / "api" / "library.md").read_text())
    assert {*members.split(", "), "__version__"} == set(dsj.__all__)


LIFE = (DOCS / "life-of-a-request.md").read_text()
STEPS = re.findall(r"^\| `([\w.]+)` \| `([\w/.]+)` \|", LIFE, re.MULTILINE)


def test_the_life_of_a_request_names_functions_where_they_are():
    assert len(STEPS) > 50
    missing = [f"{file}: {name}" for name, file in STEPS if name not in defined(ROOT / file)]
    assert not missing


def test_the_diagrams_of_a_request_name_functions_of_the_tables():
    diagrams = [fence["text"] for fence in FENCE.finditer(LIFE) if fence["language"] == "mermaid"]
    assert len(diagrams) == 2
    named_in_diagrams = {name for diagram in diagrams for name in re.findall(r"([\w.]+)\(\)", diagram)}
    assert named_in_diagrams <= {name for name, _ in STEPS}


# ---- code


def as_pattern(line: str) -> str:
    """A shown line, its times, errors and random ids being any of their kind, any gap a gap, and `...` anything."""
    kinds = {
        r"\.\.\.": ".*",
        r"[0-9a-f]{32}": "[0-9a-f]{32}",
        r"\d+(?:\.\d+)?e-\d+|\d+\.\d+": r"\d[\d.e-]*",
        r"\s+": r"\s+",
    }
    parts = re.split("|".join(f"({kind})" for kind in kinds), line.strip())
    any_of_kind = [None, *kinds.values()]
    return "".join(
        any_of_kind[i % len(any_of_kind)] or re.escape(part) for i, part in enumerate(parts) if part is not None
    )


def shown(page: Path) -> list[tuple[str, list[str]]]:
    """(block, lines of the output shown under it) of each tested shell block."""
    fences = list(FENCE.finditer(page.read_text()))
    blocks = []
    for fence, after in zip(fences, [*fences[1:], None], strict=True):
        if fence["mark"] == "tested" and fence["language"] == "sh":
            output = after["text"] if after and after["language"] == "text" else ""
            blocks.append((fence["text"], [line for line in output.splitlines() if line.strip()]))
    return blocks


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.mark.slow
def test_the_tutorial_prints_what_it_shows(tmp_path):
    blocks = shown(DOCS / "tutorial.md")
    assert len(blocks) > 10
    marker = "=== block"
    script = "set -e\n" + "".join(f"{text}\necho\necho '{marker}'\n" for text, _ in blocks)
    ports = sorted(set(re.findall(r"(?:--port |127\.0\.0\.1:)(\d{4})\b", script)))
    for port, free in zip(ports, free_ports(len(ports)), strict=True):
        script = re.sub(rf"\b{port}\b", str(free), script)
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PATH": f"{ROOT / '.venv' / 'bin'}:{os.environ['PATH']}",
        "COLUMNS": "100",
    }
    with (tmp_path / "stderr").open("w") as stderr:
        run = subprocess.Popen(
            ["bash", "-c", script],
            cwd=tmp_path,
            env=environment,
            text=True,
            start_new_session=True,  # so that its servers can be ended with it
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
        )
    try:
        output, _ = run.communicate(timeout=900)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
    errors = (tmp_path / "stderr").read_text()
    assert run.returncode == 0, output + errors
    outputs = output.split(marker)
    assert len(outputs) == len(blocks) + 1
    for (text, lines), printed in zip(blocks, outputs, strict=False):
        for line in lines:
            assert re.search(as_pattern(line), printed), f"{text}printed\n{printed}{errors}and not {line}"


def code_of(page: Path) -> ModuleType:
    """The Python blocks of a page that are marked as tested, as one module."""
    module = ModuleType(page.stem.replace("-", "_"))
    blocks = [fence["text"] for fence in FENCE.finditer(page.read_text()) if fence["mark"] == "tested"]
    exec(compile("\n".join(blocks), str(page), "exec"), module.__dict__)
    return module


def test_the_backend_of_the_page_is_as_exact_as_the_plain_form():
    backend = code_of(DOCS / "add-a-kernel-backend.md")
    empty = replace(TILED, tokens=40, routing="half of the experts empty")
    for spec, dtype in ((replace(ODD, tokens=7), "float32"), (empty, "bfloat16")):
        out = backend.fused_moe(*arrays(spec, dtype, "float32"))
        # the bound of test_kernels.py for every backend
        assert error_of(out, spec, dtype, "float32") <= 1.1 * error_of_plain_form(spec, dtype, "float32")
    with pytest.raises(NotImplementedError, match="E = 17 is more than 16"):
        backend.fused_moe(*replace(ODD, experts=17).arrays("float32"))


@pytest.fixture
def transports() -> Iterator[tuple[Transport, Transport]]:
    page = code_of(DOCS / "add-a-transport.md")
    here, there = page.SocketTransport("127.0.0.1"), page.SocketTransport("127.0.0.1")
    yield here, there
    here.close()
    there.close()


def test_the_transport_of_the_page_carries_a_prompt(transports):
    here, there = transports
    prompt = make_request("tt" + "i" * 9 + "t", 24, 3, np.dtype("bfloat16"))
    pool = MultimodalDataBuffers(3, 4, 24, 3, np.dtype("bfloat16"))
    for array in pool.arrays:
        there.register(array)
    sender = SendBridge(here, there.session, pool.layout)
    writes = send(sender, prompt, [(0, 2), (1, 0), (2, 1)])
    sender.close()
    assert [write.error for write in writes] == [None] * 3
    incoming = incoming_for(prompt, pool)
    for write in writes:
        copy = BlockCopy(write.checksum, write.num_bytes)
        assert incoming.copy_out(write.token_block, write.pool_block, copy) == copy
    np.testing.assert_array_equal(arrived_rows(incoming), in_token_order(prompt))


def test_the_transport_of_the_page_fails_as_it_promises(transports):
    here, there = transports
    source, target = np.full(64, 7, np.uint8), np.zeros(64, np.uint8)

    def write(session: str, destination: int, length: int) -> BaseException | None:
        return here.submit(session, [WriteSegment(source.ctypes.data, destination, length)]).exception(timeout=30)

    address = target.ctypes.data
    assert isinstance(write(there.session, address, 64), TransferError)  # not registered
    there.register(target[:32])
    for start, length in ((0, 33), (-1, 8), (31, 2), (32, 1)):
        assert isinstance(write(there.session, address + start, length), TransferError)
    assert not target.any()
    assert write(there.session, address + 1, 31) is None
    assert target.tolist() == [0] + [7] * 31 + [0] * 32
    there.unregister(target[:32])
    assert isinstance(write(there.session, address, 1), TransferError)
    gone = there.session
    there.close()
    assert isinstance(write(gone, address, 1), TransferError)
    here.close()
    assert isinstance(write(gone, address, 1), TransferError)


@pytest.mark.slow
def test_the_notebook_prints_what_it_shows(monkeypatch, capsys):
    path = ROOT / "examples" / "ask_tiny_vl.ipynb"
    assert path.stat().st_size < 200_000
    monkeypatch.chdir(path.parent)  # as Jupyter does
    scope: dict[str, object] = {}
    answers: dict[str, str] = {}
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), str(path), "exec"), scope)
            shown = "".join("".join(output["text"]) for output in cell["outputs"]).splitlines()
            printed = capsys.readouterr().out.splitlines()
            assert len(printed) == len(shown)
            # without its levels the model guesses, and rounding may decide: another chip may guess otherwise
            assert [line for line in printed if line[:7] != "without"] == [
                line for line in shown if line[:7] != "without"
            ]
            answers |= {line[:18].strip(): line[18:] for line in printed if line[:7] in ("without", "all lev")}
    assert answers.keys() == {"all levels", "without [0]", "without [1]", "without [2]", "without [0, 1, 2]"}
    assert answers["all levels"] != answers["without [0, 1, 2]"]
