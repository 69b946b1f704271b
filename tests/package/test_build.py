"""The compiled extension and the package around it."""

import ctypes
import importlib
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

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
        flags = ["-std=c++17", "-O0", "-Wall", "-Werror", "-fPIC"]
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


WARNINGS = """
import warnings, torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import asa_ops
    q, x = torch.randn(1, 1, 6, 4), torch.randn(1, 1, 3, 3)
    print(asa_ops.__file__, asa_ops.explain(q).splitlines()[1], sep="\\n")
    asa_ops.non_local_attention(q, q, q)  # has no kernels
    for impl in ("blocked", "reference"):
        asa_ops.asa_attention(q, q, q, torch.ones(1, 1, 6), impl=impl)
    print(len(caught), "warnings before")
    asa_ops.criss_cross_attention(x, x, x)
    for _ in range(2):
        asa_ops.asa_attention(q, q, q, torch.ones(1, 1, 6))
    asa_ops.reciprocal_neighbors(q, q, torch.ones(1, 1, 6))
    print(*(f"{warning.category.__name__}: {warning.message}" for warning in caught), sep="\\n")
"""


def test_installs_without_a_compiler_and_warns_once_where_the_extension_would_run(tmp_path):
    folder = installed(tmp_path, CXX="no-such-compiler")
    printed = output_of(sys.executable, "-c", WARNINGS, env=os.environ | {"PYTHONPATH": str(folder)}, cwd=folder)
    file, reason, before, *warned = printed.splitlines()
    assert file.startswith(str(folder)) and before == "0 warnings before" and len(warned) == 1
    for part in ("UserWarning: asa_ops runs in plain PyTorch", "REQUIRE_EXT=1", "impl='blocked'"):
        assert part in warned[0]
    why = reason.removeprefix("  cpu        ")
    assert why.startswith("the compiled extension is missing, asa_ops was installed without") and why in warned[0]


def test_an_extension_that_is_required_and_cannot_be_built_is_an_error(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("setuptools.setup", lambda **arguments: pytest.fail("it went on"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("ASA_OPS_REQUIRE_EXT", "1")
    with pytest.raises(SystemExit, match="ASA_OPS_REQUIRE_EXT asks for needs a C\\+\\+ compiler: 'no-such-compiler'"):
        runpy.run_path("setup.py")


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


# It uses what is newer than manylinux_2_28, or has newer versions.
NEWER = """
#include <dlfcn.h>
#include <pthread.h>
#include <cmath>
#include <memory>
#include <new>
#include <sstream>
#include <string>
extern "C" int answer(double x, long n) {
  std::unique_ptr<double[]> many(new double[n]);
  std::shared_ptr<double> shared = std::make_shared<double>(std::exp(x)), other = shared;
  pthread_t thread;
  pthread_create(&thread, nullptr, [](void* p) -> void* { return *static_cast<double*>(p) += 1, p; }, shared.get());
  pthread_join(thread, nullptr);
  std::ostringstream out;
  out << *other << (dlsym(RTLD_DEFAULT, "exp") != nullptr);
  return std::stoi(out.str());
}
"""


def link(folder: Path, program: str, *flags: str) -> Path:
    (folder / "program.cpp").write_text(program)
    command = ["c++", "-O1", "-fPIC", "-shared", *flags, folder / "program.cpp", "-o", folder / "program.so"]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return folder / "program.so"


@needs_nm
@pytest.mark.skipif(sys.platform != "linux", reason="manylinux is of Linux")
def test_a_wheel_takes_no_symbol_newer_than_manylinux(tmp_path):
    """Whatever glibc and libstdc++ the machine has that links it."""
    program = output_of(sys.executable, ROOT / "release/manylinux.py", tmp_path / "stubs")
    flags = shlex.split(program)
    library = link(tmp_path, NEWER, *flags)
    taken = re.findall(r" [UwW] \w+@(\w+?)_([\d.]+)$", output_of("nm", "-D", library), re.MULTILINE)
    assert {"GLIBC", "GLIBCXX"} <= {library for library, _ in taken}
    newest = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7,)}
    assert all(tuple(map(int, version.split("."))) <= newest[name] for name, version in taken)
    assert ctypes.CDLL(str(library)).answer(ctypes.c_double(0.0), ctypes.c_long(4)) == 21  # exp(0) + 1, and found
    with pytest.raises(subprocess.CalledProcessError) as failed:
        link(tmp_path, 'extern "C" int close_range(...); int f() { return close_range(); }', *flags)  # of glibc 2.34
    assert "close_range" in failed.value.stderr


LOADS = """
import sys, torch
from pathlib import Path
from kernels import get_local_kernel
from kernels._rust import Build, Digest, DigestAlgorithm, Metadata

out, variant = map(Path, sys.argv[1:])
package = get_local_kernel(out)
q = torch.randn(1, 1, 6, 4, requires_grad=True)
package.asa_attention(q, q, q, torch.ones(1, 1, 6)).sum().backward()
assert "  cpu        runs" in package.explain(q) and q.grad is not None
metadata = Metadata.read_from_file(variant / "metadata.json")
metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, variant))
(backend,) = Build.open(out).general.backends
assert backend == metadata.backend.backend_type and metadata.name.python_name == "asa_ops"
print(package.__name__, package.__file__)
"""


def loaded_by_kernels(out: Path, variant: Path) -> list[str]:
    """Have Hugging Face's kernels load what is laid out, away from the source tree; return its name and file."""
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"}
    return output_of(sys.executable, "-c", LOADS, out, variant, cwd=out, env=environment).split()


@pytest.fixture
def hub(monkeypatch) -> ModuleType:
    pytest.importorskip("kernels", reason="no Hugging Face kernels here")
    monkeypatch.syspath_prepend(ROOT / "release")
    return importlib.import_module("hub")


def test_kernels_loads_the_package(hub, tmp_path):
    """Here under its own name, with the extension that is built already."""
    variant = hub.lay_out(ROOT / "asa_ops", "asa_ops", hub.Backend("cpu", {"type": "cpu"}), tmp_path)
    assert variant.name == f"torch-stable-abi210-cpu-{platform.machine()}-linux"
    assert loaded_by_kernels(tmp_path, variant) == ["asa_ops", str(variant / "__init__.py")]
    assert hub.capabilities(["80", "90a", "100"]) == ["8.0", "9.0a", "10.0+PTX"]


@pytest.mark.slow
def test_kernels_loads_the_package_beside_an_installed_one(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("ASA_OPS_NO_CUDA", "1")
    package = hub.build("_asa_ops_test", tmp_path / "build")
    variant = hub.lay_out(package, "_asa_ops_test", hub.backend_of(package, "_asa_ops_test"), tmp_path / "out")
    hub.check(variant)
    assert loaded_by_kernels(tmp_path / "out", variant)[0] == "_asa_ops_test"
    beside = "import sys, torch, asa_ops; from kernels import get_local_kernel; from pathlib import Path\n"
    beside += "other, q = get_local_kernel(Path(sys.argv[1])), torch.randn(1, 2, 96, 16)\n"
    beside += "a, b = (x.asa_attention(q, q, q, 1.0, 1.0, grid=(8, 12), impl='cpu') for x in (asa_ops, other))\n"
    beside += "print(other is not asa_ops and torch.equal(a, b), *sorted({x.__name__ for x in (asa_ops, other)}))"
    assert output_of(sys.executable, "-c", beside, variant, cwd=ROOT).split() == ["True", "_asa_ops_test", "asa_ops"]


def test_public_names():
    functions = ["asa_attention", "channel_linear_attention", "channelized_axial_attention", "criss_cross_attention"]
    functions += ["efficient_attention", "explain", "interlaced_sparse_attention", "linear_attention"]
    functions += ["non_local_attention", "reciprocal_neighbors", "salient_positions_attention"]
    expected = {"AsaStats", "NeighborGraph", "nn", "squeeze_and_attention", *functions}
    assert set(asa_ops.__all__) == expected
    assert all(getattr(asa_ops, name).__doc__ for name in expected)
