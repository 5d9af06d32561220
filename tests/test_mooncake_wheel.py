"""The error for a missing Mooncake names the wheel that this machine can load."""

import ctypes.util
import sys
from pathlib import Path

import pytest

from deepstack_jax.disagg.transports.mooncake_wheel import explain, wheel_for_this_machine

DRIVER = {"cuda": "libcuda.so.1"}


@pytest.mark.parametrize(
    ("libraries", "plugins", "wheel"),
    [
        ({}, [], "mooncake-transfer-engine-non-cuda"),
        # compilers for CUDA without its driver, as where programs are compiled for other machines
        ({"cudart": "libcudart.so.13"}, ["jax_cuda13_plugin"], "mooncake-transfer-engine-non-cuda"),
        (DRIVER, [], "mooncake-transfer-engine-non-cuda"),
        (DRIVER, ["jax_cuda13_plugin"], "mooncake-transfer-engine-cuda13"),
        (DRIVER, ["jax_cuda12_plugin"], "mooncake-transfer-engine"),
        # what jax brings goes before what the system has
        (DRIVER | {"cudart": "libcudart.so.12"}, ["jax_cuda13_plugin"], "mooncake-transfer-engine-cuda13"),
        (DRIVER | {"cudart": "libcudart.so.12"}, [], "mooncake-transfer-engine"),
        (DRIVER | {"cudart": "libcudart.so.12.8.90"}, [], "mooncake-transfer-engine"),
        (DRIVER | {"cudart": "libcudart.so.13"}, [], "mooncake-transfer-engine-cuda13"),
        (DRIVER | {"cudart": "libcudart.so.11.0"}, [], "mooncake-transfer-engine-non-cuda"),
    ],
)
def test_the_wheel_follows_the_machines_cuda(
    libraries: dict[str, str], plugins: list[str], wheel: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    for name in plugins:
        (tmp_path / f"{name}.py").write_text("")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(ctypes.util, "find_library", libraries.get)
    assert wheel_for_this_machine() == wheel
    assert explain(ModuleNotFoundError("No module named 'mooncake'")).endswith(f"pip install {wheel}")


def test_a_missing_library_gets_its_own_remedy(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ctypes.util, "find_library", {}.get)
    missing = "cannot open shared object file: No such file or directory"
    assert "libibverbs1" in explain(ImportError(f"libibverbs.so.1: {missing}"))
    for library in ("libcudart.so.12", "libcuda.so.1"):
        told = explain(ImportError(f"{library}: {missing}"))
        assert library in told
        assert "mooncake-transfer-engine-non-cuda" in told
        assert "\n" not in told
