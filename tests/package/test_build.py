"""The compiled extension and the package around it."""

import os
import runpy
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

import asa_ops
from asa_ops.core import extension

ROOT = Path(__file__).parents[2]
needs_nm = pytest.mark.skipif(not shutil.which("nm"), reason="nm (binutils) lists the symbols")


def output_of(*command: str | Path, **options) -> str:
    """Run a command, which must not fail, and return what it prints."""
    return subprocess.run(command, check=True, capture_output=True, text=True, **options).stdout


def symbols(library: Path | str, which: str) -> list[tuple[str, str]]:
    """Return the dynamic symbols of a library as (nm's letter, name without version)."""
    listing = output_of("nm", "-D", which, library).splitlines()
    return [(words[-2], words[-1].split("@")[0]) for words in map(str.split, listing)]


def copied(folder: Path, *ignored: str) -> Path:
    """Copy the package into a folder, and return the folder."""
    ignore = shutil.ignore_patterns("__pycache__", *ignored)
    shutil.copytree(ROOT / "asa_ops", folder / "asa_ops", ignore=ignore)
    return folder


def test_extension_is_built_and_of_this_version():
    assert extension.WHY_MISSING is None
    number = torch.ops.asa_ops.extension_version()
    assert asa_ops.__version__ == version("asa_ops") == f"{number // 10000}.{number // 100 % 100}.{number % 100}"


def test_extension_of_another_version_is_refused(monkeypatch):
    monkeypatch.setattr(extension, "version", lambda name: "99.0.0")
    assert "is of version" in extension.load(extension.LIBRARY)


def test_extension_that_cannot_be_loaded_is_explained(tmp_path):
    broken = tmp_path / "_C.abi3.so"
    assert "is missing" in extension.load(broken)
    broken.write_bytes(b"not a library")
    assert "cannot be loaded" in extension.load(broken)


@needs_nm
def test_extension_uses_the_stable_abi_only():
    """No C++ symbol of torch, none of Python: one binary for every torch >= 2.10 and every Python."""
    names = [name for _, name in symbols(extension.LIBRARY, "--undefined-only")]
    assert any(name.startswith("aoti_torch_") for name in names)
    for name in names:
        assert not name.startswith(("Py", "_Py")), name
        assert not any(part in name for part in ("N2at", "N3c10", "5torch", "3c10")), name


@pytest.mark.parametrize("compiler", ["aarch64-linux-gnu-g++", "clang++"])
def test_kernels_compile_for_other_machines_and_compilers(compiler, tmp_path):
    if not shutil.which(compiler):
        pytest.skip(f"no {compiler} here")
    for source in sorted((ROOT / "csrc/cpu").glob("isa_*.cpp")):
        flags = ["-std=c++17", "-O1", "-Wall", "-Werror", "-fPIC"]
        subprocess.run([compiler, *flags, "-c", source, "-o", tmp_path / "kernels.o"], check=True)


@needs_nm
@pytest.mark.skipif(not shutil.which("ldd"), reason="ldd lists libraries")
def test_extension_needs_nothing_that_a_torch_without_cuda_lacks():
    """Whatever it does not define is in libraries that are always there, or is weak: one binary for CPU and GPU."""
    folder = str(Path(torch.__file__).with_name("lib"))
    linked = output_of("ldd", extension.LIBRARY, env=os.environ | {"LD_LIBRARY_PATH": folder})
    libraries = [word for word in linked.split() if word.startswith("/") and "cuda" not in Path(word).name]
    assert {"libtorch_cpu.so", "libc.so.6"} <= {Path(library).name for library in libraries}
    defined = {name for library in libraries for _, name in symbols(library, "--defined-only")}
    needed = {name for kind, name in symbols(extension.LIBRARY, "--undefined-only") if kind not in "wv"}
    assert "aoti_torch_library_def" in needed
    assert not needed - defined


@needs_nm
@pytest.mark.skipif(not extension.cuda_architectures(), reason="the extension was built without CUDA kernels")
def test_symbols_of_cuda_are_weak():
    undefined = {name: kind for kind, name in symbols(extension.LIBRARY, "--undefined-only")}
    assert undefined["aoti_torch_get_current_cuda_stream"] == "w"
    assert not any(name.startswith(("cuda", "__cuda")) for name in undefined)  # the runtime is linked in


def test_works_and_explains_with_an_extension_that_cannot_be_loaded(tmp_path):
    (copied(tmp_path, "*.so") / "asa_ops" / "_C.abi3.so").write_bytes(b"not a library")
    assert "cpu        the compiled extension cannot be loaded" in run_with(tmp_path, sys.executable)


def run_with(folder: Path, python: str) -> str:
    """Import asa_ops from ``folder``, run a call and return what explain() says of it."""
    program = (
        "import torch, asa_ops; q = torch.randn(1, 1, 6, 4); print(asa_ops.__file__); print(asa_ops.explain(q)); "
        "print(asa_ops.asa_attention(q, q, q, torch.ones(1, 1, 6)).shape)"
    )
    told = output_of(python, "-c", program, env=os.environ | {"PYTHONPATH": str(folder)}, cwd=folder)
    assert told.startswith(str(folder)) and "torch.Size([1, 1, 6, 4])" in told
    return told


def installed(tmp_path: Path, **environment: str) -> Path:
    """Install a copy of the source tree into a folder, as pip does, and return the folder."""
    ignore = shutil.ignore_patterns(".*", "*.so", "build", "*.egg-info", "__pycache__", "tests")
    shutil.copytree(ROOT, tmp_path / "source", ignore=ignore)
    environment = os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"} | environment
    options = ["--no-build-isolation", "--no-deps", "--quiet", "--target", tmp_path / "installed"]
    output_of(sys.executable, "-m", "pip", "install", *options, tmp_path / "source", env=environment, cwd=tmp_path)
    return tmp_path / "installed"


def test_installs_and_works_without_a_compiler(tmp_path):
    folder = installed(tmp_path, CXX="no-such-compiler")
    assert "the compiled extension is missing (no working C++ compiler" in run_with(folder, sys.executable)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["asked", "broken"])
def test_builds_without_cuda_when_asked_or_nvcc_is_broken(way, tmp_path):
    environment = {"ASA_OPS_NO_CUDA": "1"} if way == "asked" else {"PATH": with_broken_nvcc(tmp_path), "CUDA_HOME": ""}
    folder = installed(tmp_path, **environment)
    assert "  cpu        runs" in run_with(folder, sys.executable)
    program = "import torch, sys; torch.ops.load_library(sys.argv[1]); print(torch.ops.asa_ops.cuda_architectures())"
    library = folder / "asa_ops" / extension.LIBRARY.name
    assert output_of(sys.executable, "-c", program, library).strip() == ""


def with_broken_nvcc(folder: Path) -> str:
    """Return a PATH on which nvcc is found first and always fails."""
    (folder / "nvcc").write_text("#!/bin/sh\necho nothing works >&2\nexit 3\n")
    (folder / "nvcc").chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


@pytest.fixture
def setup_file(monkeypatch) -> dict:
    """Return what setup.py defines, without its building anything."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("setuptools.setup", lambda **arguments: None)
    return runpy.run_path("setup.py")


def test_setup_says_why_there_will_be_no_cuda_kernels(setup_file, tmp_path, monkeypatch):
    why_not, find = setup_file["why_no_cuda"], setup_file["find_nvcc"]
    monkeypatch.setitem(why_not.__globals__, "CUDA_SOURCES", [])
    assert "none in csrc/cuda" in why_not("nvcc", [])
    monkeypatch.setitem(why_not.__globals__, "CUDA_SOURCES", ["kernel.cu"])
    assert "no nvcc" in why_not(None, [])
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("PATH", with_broken_nvcc(tmp_path))
    assert why_not(find(), []).endswith("nvcc' fails with 3: nothing works")
    monkeypatch.setenv("ASA_OPS_NO_CUDA", "1")
    assert why_not(find(), []) == "ASA_OPS_NO_CUDA is set"


def test_setup_reads_the_architectures(setup_file, monkeypatch):
    architectures, flags = setup_file["cuda_architectures"], setup_file["nvcc_flags"]
    monkeypatch.delenv("ASA_OPS_CUDA_ARCHS", raising=False)
    assert architectures() == ["80", "90a", "100"]
    for wanted, expected in {"100;86": ["86", "100"], "90a;80;90": ["80", "90a"], "90a": ["90a"]}.items():
        monkeypatch.setenv("ASA_OPS_CUDA_ARCHS", wanted)
        assert architectures() == expected
    for wrong in ("8.0", "75", "75a", "80,90", "90A", "a", "80;"):
        monkeypatch.setenv("ASA_OPS_CUDA_ARCHS", wrong)
        with pytest.raises(SystemExit, match=f'must be like "80;90a", each 80 or more, got "{wrong}"'):
            architectures()
    codes = {
        ("86", "100"): ["86,code=sm_86", "100,code=[sm_100,compute_100]"],
        ("80", "90a"): ["90a,code=sm_90a", "80,code=[sm_80,compute_80]"],
        ("90a",): ["90a,code=sm_90a"],
    }
    for wanted, expected in codes.items():
        found = [flag for flag in flags(list(wanted)) if flag.startswith("-gencode")]
        assert found == [f"-gencode=arch=compute_{code}" for code in expected]


@pytest.mark.skipif("ASA_OPS_OTHER_PYTHON" not in os.environ, reason="ASA_OPS_OTHER_PYTHON names no Python with torch")
def test_the_same_binary_works_under_another_python_and_torch(tmp_path):
    assert "  cpu        runs" in run_with(copied(tmp_path), os.environ["ASA_OPS_OTHER_PYTHON"])


def test_public_names():
    functions = ["asa_attention", "channel_linear_attention", "channelized_axial_attention", "criss_cross_attention"]
    functions += ["efficient_attention", "explain", "interlaced_sparse_attention", "linear_attention"]
    functions += ["non_local_attention", "reciprocal_neighbors", "salient_positions_attention"]
    expected = {"AsaStats", "NeighborGraph", "nn", "squeeze_and_attention", *functions}
    assert set(asa_ops.__all__) == expected
    assert all(getattr(asa_ops, name).__doc__ for name in expected)
