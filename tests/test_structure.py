"""How the packages hang together: dependencies point one way, and nothing at run time needs PyTorch."""

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

MODEL = tuple(
    f"deepstack_jax.{name}"
    for name in (
        "checkpoint",
        "checkpoints",
        "config",
        "encoding",
        "models",
        "processing",
        "programs",
        "sampling",
    )
)
# What each part may import of this project. Parts that are not named here may import anything.
ALLOWED = {
    "pallas_kernels": ("pallas_kernels",),
    "deepstack_jax/config.py": ("deepstack_jax.config_rope", "deepstack_jax.config_values"),
    "deepstack_jax/config_rope.py": ("deepstack_jax.config_values",),
    "deepstack_jax/config_values.py": (),
    "deepstack_jax/sampling_options.py": (),
    "deepstack_jax/demo": ("deepstack_jax.demo",),
    "deepstack_jax/models": ("deepstack_jax.models", "deepstack_jax.config", "pallas_kernels"),
    "deepstack_jax/processing": ("deepstack_jax.processing", "deepstack_jax.config", "deepstack_jax.models"),
    "deepstack_jax/checkpoints": ("deepstack_jax.checkpoints", "deepstack_jax.config", "deepstack_jax.models"),
    "deepstack_jax/testing": (
        "deepstack_jax.testing",
        "deepstack_jax.checkpoints",
        "deepstack_jax.config",
        "deepstack_jax.models",
        "deepstack_jax.programs",
        "deepstack_jax.sampling",
    ),
    "converters": (
        "converters",
        "deepstack_jax.checkpoints",
        "deepstack_jax.config",
        "deepstack_jax.models",
        "deepstack_jax.bundled",
    ),
    "deepstack_jax/disagg": ("deepstack_jax.disagg", *MODEL),
    "deepstack_jax/engine": ("deepstack_jax.engine", *MODEL),
    "deepstack_jax/generation.py": ("deepstack_jax.engine", *MODEL),
    "deepstack_jax/research.py": MODEL,
    "deepstack_jax/bench": ("deepstack_jax.bench", "deepstack_jax.generation", *MODEL),
    "deepstack_jax/serving": (
        "deepstack_jax.serving",
        "deepstack_jax.generation",
        "deepstack_jax.engine",
        "deepstack_jax.disagg",
        "deepstack_jax.demo",  # pictures to ask tiny-vl about
        "deepstack_jax.bundled",
        "deepstack_jax.research",
        *MODEL,
    ),
}
# they import nothing but each other
EVERYWHERE = tuple(f"deepstack_jax.{name}" for name in ("errors", "processes", "rounding", "sharding", "version"))
PROJECT = ("deepstack_jax", "pallas_kernels", "converters")


def imports_of(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            if node.module in PROJECT:
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
            else:
                found.add(node.module or "")
    return found


def files_of(part: str) -> list[Path]:
    path = ROOT / part
    return [path] if path.is_file() else sorted(path.rglob("*.py"))


def test_dependencies_point_one_way():
    for part, allowed in ALLOWED.items():
        for file in files_of(part):
            for name in imports_of(file):
                if name.split(".")[0] in PROJECT:
                    known = name in EVERYWHERE or name.startswith(tuple(allowed))
                    assert known, f"{file.relative_to(ROOT)} imports {name}"


def test_the_product_imports_no_converter_but_in_its_commands():
    for file in files_of("deepstack_jax"):
        if "cli" not in file.parts:
            assert not any(name.startswith("converters") for name in imports_of(file)), file


def test_only_the_registry_knows_families_by_name():
    """A comparison with the model's type elsewhere would be a family that no entry of the registry describes."""
    for package in ("deepstack_jax", "converters"):
        for file in files_of(package):
            if file.name == "registry.py" or "testing" in file.parts:
                continue
            for node in ast.walk(ast.parse(file.read_text())):
                text = ast.unparse(node) if isinstance(node, ast.Compare | ast.Call) else ""
                compared = isinstance(node, ast.Compare) and "model_type" in text
                assert not compared, f"{file.relative_to(ROOT)}:{node.lineno}: {text}"
                assert not re.search(r"model_type\.\w+with\(", text), f"{file.relative_to(ROOT)}:{node.lineno}: {text}"


def test_kernels_import_jax_alone():
    for file in files_of("pallas_kernels"):
        for name in imports_of(file):
            root = name.split(".")[0]
            assert root in ("jax", "pallas_kernels") or root in sys.stdlib_module_names, f"{file.name} imports {name}"


def test_nothing_at_run_time_imports_pytorch():
    for package in PROJECT:
        for file in files_of(package):
            if file.name != "verify.py":  # compares with PyTorch: its purpose
                assert not {"torch", "torchvision"} & {name.split(".")[0] for name in imports_of(file)}, file


def test_the_server_imports_neither_fastapi_nor_pydantic():
    """msgspec checks requests. typer is left out: since 0.29 it reads the arguments of a command with pydantic."""
    unwanted = {"fastapi", "pydantic"}
    for package in PROJECT:
        for file in files_of(package):
            assert not unwanted & {name.split(".")[0] for name in imports_of(file)}, file
    files = [file.relative_to(ROOT).with_suffix("") for file in files_of("deepstack_jax/serving")]
    serving = [".".join(file.parts).removesuffix(".__init__") for file in files]
    modules = ["deepstack_jax.cli.serve", "deepstack_jax.disagg.nodes", *serving]
    code = f"import sys, {', '.join(modules)}; print(sorted({unwanted} & sys.modules.keys()))"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (child.returncode, child.stdout) == (0, "[]\n"), child.stderr
