"""What is shipped: the wheel's contents, the public names, and dependencies that are exactly those imported."""

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from email import message_from_bytes
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import hatchling.build
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import deepstack_jax as dsj

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PACKAGES = ("deepstack_jax", "pallas_kernels", "converters")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel that the build backend makes of this tree."""
    folder = tmp_path_factory.mktemp("wheel")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return zipfile.ZipFile(folder / hatchling.build.build_wheel(str(folder)))


def test_the_wheel_holds_three_packages_and_no_example(wheel: zipfile.ZipFile):
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert tops == {*PACKAGES, f"deepstack_jax-{PROJECT['version']}.dist-info"}


def test_the_wheel_holds_every_file_of_its_packages(wheel: zipfile.ZipFile):
    tracked = subprocess.run(["git", "ls-files", *PACKAGES], cwd=ROOT, capture_output=True, text=True, check=True)
    expected = {name for name in tracked.stdout.splitlines() if (ROOT / name).is_file()}
    assert expected <= set(wheel.namelist())
    for package in PACKAGES:
        assert f"{package}/py.typed" in expected
    for kind in ("tiny-vl/model.safetensors", "demo/fonts/sans.ttf", "photographs/chelsea.jpg", "h100.txtpb"):
        assert any(name.endswith(kind) for name in expected), kind


def test_the_wheel_says_what_it_is(wheel: zipfile.ZipFile):
    folder = f"deepstack_jax-{PROJECT['version']}.dist-info"
    metadata = message_from_bytes(wheel.read(f"{folder}/METADATA"))
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.12"
    assert "Typing :: Typed" in metadata.get_all("Classifier", [])
    assert metadata["Author"]
    assert metadata["Keywords"]
    assert "deepstack-jax = deepstack_jax.cli:main" in wheel.read(f"{folder}/entry_points.txt").decode()


def test_the_unpacked_wheel_draws_and_answers_without_the_repository(wheel: zipfile.ZipFile, tmp_path: Path):
    wheel.extractall(tmp_path)
    code = f"""
import sys
sys.path[:] = [{str(tmp_path)!r}] + [p for p in sys.path if not p.startswith({str(ROOT)!r}) or "site-packages" in p]
import deepstack_jax as dsj
assert dsj.__file__.startswith({str(tmp_path)!r}), dsj.__file__
from deepstack_jax.demo.samples import sample
drawn = sample(5, "picture")
model = dsj.load("tiny-vl", "float32")
inputs = dsj.prepare(model, drawn.exchanges[0].question, images=drawn.images)
print(dsj.decode(model, dsj.generate(model, **inputs, max_new_tokens=40))[0] == drawn.exchanges[0].answer)
"""
    child = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (child.returncode, child.stdout) == (0, "True\n"), child.stderr


def test_public_names_are_listed_and_found():
    assert dir(dsj) == sorted(dsj.__all__)
    for name in dsj.__all__:
        assert getattr(dsj, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'lod'"):
        dsj.lod  # noqa: B018
    assert dsj.__version__ == PROJECT["version"]


def test_importing_the_package_imports_no_jax():
    code = "import sys, deepstack_jax as dsj; dsj.SamplingOptions(top_k=3); print('jax' in sys.modules)"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (child.returncode, child.stdout) == (0, "False\n"), child.stderr


# What each part may import beside the core dependencies, by extra; the longest path that matches counts.
EXTRAS = {
    "deepstack_jax": (),
    "deepstack_jax/disagg": ("mooncake",),
    "deepstack_jax/processing/grammar.py": ("serve",),
    "deepstack_jax/serving": ("serve", "mooncake"),
    "deepstack_jax/bench": ("serve",),
    "deepstack_jax/cli/bench.py": ("serve",),
    "deepstack_jax/cli/http_server.py": ("serve",),
    "deepstack_jax/cli/serve.py": ("serve",),
    "deepstack_jax/cli/demo_split.py": ("serve", "mooncake"),
    "deepstack_jax/cli/verify.py": ("test",),
    "pallas_kernels": (),
    "converters": (),
    "examples": ("train",),
    "examples/tiny_vl/parity.py": ("train", "test"),
    "tests": ("test", "docs", "mooncake", "serve", "train"),
    "docs": ("docs",),
}
# Distributions that are declared and not imported here, and why they are needed.
NOT_IMPORTED = {
    "absl-py": "jax's ahead-of-time compilation for TPUs imports it",
    "accelerate": "transformers loads with a device map by it",
    "beartype": "jaxtyping's import hook checks annotations with it",
    "filelock": "jax locks the cache of compiled programs with it",
    "jinja2": "transformers renders chat templates with it",
    "mkdocs-material": "the theme of the documents",
    "mkdocstrings": "makes the API reference",
    "mooncake-transfer-engine-cuda13": "holds the module of mooncake-transfer-engine-non-cuda",
    "pyright": "a command",
    "pytest-timeout": "a plugin of pytest",
    "pytest-xdist": "a plugin of pytest",
    "ruff": "a command",
    "tokamax": "benchmarks/kernels.py measures it beside the kernels",
    "torchvision": "transformers' video processor imports it",
}


def declared(*extras: str) -> set[str]:
    """Names of distributions that the core (with no extra) or some extras require themselves."""
    lines = [line for extra in extras for line in PROJECT["optional-dependencies"][extra]]
    lines = lines if extras else PROJECT["dependencies"]
    return {canonicalize_name(Requirement(line).name) for line in lines} - {"deepstack-jax"}


def imports_of(file: Path) -> Iterator[str]:
    """The top levels that a file imports, by a statement or by a name given to import_module."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
        else:
            continue
        yield from (name.split(".")[0] for name in names)


@cache
def distributions_by_import() -> dict[str, set[str]]:
    """Which installed distributions have a top level; it takes seconds to find out."""
    return {name: {canonicalize_name(one) for one in found} for name, found in packages_distributions().items()}


def distributions_of(part: str) -> Iterator[tuple[Path, str, set[str]]]:
    """(file, import, distributions that have it) for what comes from other projects."""
    by_import = distributions_by_import()
    path = ROOT / part
    for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
        for name in imports_of(file):
            if name not in {*sys.stdlib_module_names, *PACKAGES, "tests", "tiny_vl"} and not name.startswith("_"):
                yield file, name, by_import.get(name, {name})


def test_every_import_is_declared():
    for part in EXTRAS:
        for file, name, distributions in distributions_of(part):
            path = str(file.relative_to(ROOT))
            closest = max((key for key in EXTRAS if path.startswith(key)), key=len)
            allowed = declared() | declared(*EXTRAS[closest])
            assert distributions & allowed, f"{path} imports {name}: declare it in pyproject.toml"


def test_every_dependency_is_imported():
    imported = {one for part in EXTRAS for _, _, distributions in distributions_of(part) for one in distributions}
    for extras in [(), *((extra,) for extra in PROJECT["optional-dependencies"])]:
        for name in declared(*extras) - NOT_IMPORTED.keys():
            assert name in imported, f"nothing imports {name}: take it out of pyproject.toml"
    product = {one for part in PACKAGES for _, _, distributions in distributions_of(part) for one in distributions}
    for name in declared() - NOT_IMPORTED.keys():
        assert name in product, f"only tests or examples import {name}: move it to an extra"
    everything = declared() | declared(*PROJECT["optional-dependencies"])
    assert NOT_IMPORTED.keys() <= everything


def test_every_dependency_has_a_lower_bound():
    lines = [*PROJECT["dependencies"], *(line for extra in PROJECT["optional-dependencies"].values() for line in extra)]
    for line in lines:
        requirement = Requirement(line)
        if requirement.name != "deepstack-jax":
            assert re.search(r">=", str(requirement.specifier)), f"{line} has no lower bound"


def test_each_environment_gets_one_of_mooncakes_wheels():
    def wheels(extra: str, platform: str) -> list[str]:
        found = [Requirement(line) for line in PROJECT["optional-dependencies"][extra]]
        environment = {"sys_platform": platform}
        return [r.name for r in found if "mooncake" in r.name and (not r.marker or r.marker.evaluate(environment))]

    assert wheels("cuda", "linux") == ["mooncake-transfer-engine-cuda13"]
    assert wheels("mooncake", "linux") == ["mooncake-transfer-engine-non-cuda"]
    assert wheels("cuda", "darwin") == wheels("mooncake", "darwin") == []
