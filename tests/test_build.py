"""The compiled extension and the package around it."""

import ast
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

import asa_ops
from asa_ops import extension

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "asa_ops").rglob("*.py"))


def test_extension_is_built_and_of_this_version():
    assert extension.WHY_MISSING is None
    number = torch.ops.asa_ops.extension_version()
    assert version("asa_ops") == f"{number // 10000}.{number // 100 % 100}.{number % 100}"


def test_extension_of_another_version_is_refused(monkeypatch):
    monkeypatch.setattr(extension, "version", lambda name: "99.0.0")
    assert "is of version" in extension.load(extension.LIBRARY)


def test_extension_that_cannot_be_loaded_is_explained(tmp_path):
    broken = tmp_path / "_C.abi3.so"
    assert "is missing" in extension.load(broken)
    broken.write_bytes(b"not a library")
    assert "cannot be loaded" in extension.load(broken)


@pytest.mark.skipif(not shutil.which("nm"), reason="nm (binutils) lists the symbols")
def test_extension_uses_the_stable_abi_only():
    """No C++ symbol of torch, none of Python: one binary for every torch >= 2.10 and every Python."""
    listing = subprocess.run(["nm", "-D", "--undefined-only", extension.LIBRARY], check=True, capture_output=True)
    symbols = [line.split()[-1] for line in listing.stdout.decode().splitlines()]
    assert any(symbol.startswith("aoti_torch_") for symbol in symbols)
    for symbol in symbols:
        assert not symbol.startswith(("Py", "_Py")), symbol
        assert not any(name in symbol for name in ("N2at", "N3c10", "5torch", "3c10")), symbol


@pytest.mark.parametrize("compiler", ["aarch64-linux-gnu-g++", "clang++"])
def test_kernels_compile_for_other_machines_and_compilers(compiler, tmp_path):
    if not shutil.which(compiler):
        pytest.skip(f"no {compiler} here")
    for source in sorted((ROOT / "csrc/cpu").glob("asa_*.cpp")):
        flags = ["-std=c++17", "-O1", "-Wall", "-Werror", "-fPIC"]
        subprocess.run([compiler, *flags, "-c", source, "-o", tmp_path / "kernels.o"], check=True)


def test_installs_and_works_without_a_compiler(tmp_path):
    copy = tmp_path / "source"
    ignore = shutil.ignore_patterns(".*", "*.so", "build", "*.egg-info", "__pycache__", "tests")
    shutil.copytree(ROOT, copy, ignore=ignore)
    target = tmp_path / "installed"
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-build-isolation",
        "--no-deps",
        "--quiet",
        "--target",
        target,
    ]
    environment = os.environ | {"CXX": "no-such-compiler", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    subprocess.run([*command, copy], check=True, env=environment, cwd=tmp_path, capture_output=True)
    program = (
        "import torch, asa_ops; q = torch.randn(1, 1, 6, 4); print(asa_ops.__file__); print(asa_ops.explain(q)); "
        "print(asa_ops.asa_attention(q, q, q, torch.ones(1, 1, 6)).shape)"
    )
    run = subprocess.run(
        [sys.executable, "-c", program],
        check=True,
        env=environment | {"PYTHONPATH": str(target)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.stdout.startswith(str(target))
    assert "the compiled extension is missing (no working C++ compiler" in run.stdout
    assert "torch.Size([1, 1, 6, 4])" in run.stdout


def imports(path: Path) -> set[str]:
    """Return the modules that a file imports, relative ones as absolute names."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = (
                ".".join((*package[: len(package) - node.level + 1], node.module or "")) if node.level else node.module
            )
            found |= {f"{base.rstrip('.')}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_dependencies_point_one_way(path):
    modules = imports(path)
    for name in ("torchvision", "timm", "transformers", "mmcv", "matplotlib", "skimage"):
        assert not any(module.split(".")[0] == name for module in modules), name
    if not path.name.startswith("triton"):
        assert not any(module.split(".")[0] == "triton" for module in modules)
    implementations = ("reference", "blocked", "triton_fwd", "triton_bwd")
    if path.stem in implementations:
        used = {module.split(".")[2] for module in modules if module.startswith("asa_ops.") and module.count(".") > 1}
        assert not used & (set(implementations) - {path.stem} | {"api", "ops"})
    if path.parent.name == "asa_ops" and path.stem != "__init__":
        assert not any(module.startswith("asa_ops.asa") for module in modules)


def test_public_names():
    expected = ["AsaStats", "NeighborGraph", "asa_attention", "explain", "nn", "reciprocal_neighbors"]
    assert sorted(asa_ops.__all__) == expected
    assert all(getattr(asa_ops, name).__doc__ for name in expected)
