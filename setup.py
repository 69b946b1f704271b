"""Build the compiled extension asa_ops/_C.abi3.so; everything else is in pyproject.toml.

Without a working C++ compiler the package installs all the same, without the extension; without a working nvcc the
extension holds no CUDA kernels. Environment: ASA_OPS_REQUIRE_EXT=1 makes a missing C++ compiler an error,
ASA_OPS_CUDA_ARCHS (default "80;90a;100") are the GPUs that CUDA kernels are compiled for, ASA_OPS_NO_CUDA=1 leaves them
out, ASA_OPS_NAMESPACE is the namespace of the ops, for a copy of the package under another name, MAX_JOBS is how many
files are compiled at a time.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension, get_cxx_compiler, include_paths

VERSION = re.search(r'^__version__ = "(.*)"$', Path("asa_ops/__init__.py").read_text(), re.MULTILINE)[1]
# Large files, which take the longest to compile, come first, so that none is left over at the end.
CUDA_SOURCES = sorted(Path("csrc/cuda").rglob("*.cu"), key=lambda path: -path.stat().st_size)
CUDA_RUNTIME = ["-Wl,--as-needed", "-lcudart_static", "-ldl", "-lrt", "-lpthread", "-Wl,--exclude-libs,ALL", "-Wl,-s"]
# Folders of this machine stay out of the binary.
PREFIXES = [f"-ffile-prefix-map={folder}={name}" for folder, name in ((Path.cwd(), "."), (include_paths()[0], "torch"))]


def why_not(compiler: list[str], suffix: str, program: str) -> str | None:
    """Try a compiler on a small program; return why it does not work, or None."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, f"probe{suffix}")
        source.write_text(program)
        try:
            subprocess.run([*compiler, source, "-o", Path(folder, "probe")], check=True, capture_output=True, text=True)
        except OSError as error:
            return f"{compiler[0]!r} does not work: {error}"
        except subprocess.CalledProcessError as error:
            return f"{compiler[0]!r} fails with {error.returncode}: {error.stdout}{error.stderr}".strip()
    return None


def is_set(name: str) -> bool:
    return os.environ.get(name, "0") not in ("", "0")


def why_no_compiler() -> str | None:
    """Return why the C++ compiler that torch's build would use does not work, or None."""
    return why_not(shlex.split(get_cxx_compiler()), ".cpp", "#include <cstdint>\nint main() { return 0; }\n")


def why_no_cuda(nvcc: str | None, flags: list[str]) -> str | None:
    """Return why the extension cannot hold CUDA kernels, or None."""
    if is_set("ASA_OPS_NO_CUDA"):
        return "ASA_OPS_NO_CUDA is set"
    if not CUDA_SOURCES:
        return "there are none in csrc/cuda"
    if not nvcc:
        return "no nvcc in CUDA_HOME, on the PATH or in /usr/local/cuda"
    program = "#include <cuda_runtime.h>\n__global__ void kernel() {}\nint main() { kernel<<<1, 1>>>(); return 0; }\n"
    return why_not([nvcc, *flags, "-frandom-seed", "probe"], ".cu", program)


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    folders = [*([f"{home}/bin"] if home else []), os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"]
    return shutil.which("nvcc", path=os.pathsep.join(folders))


def cuda_architectures() -> list[str]:
    """Return the GPUs to compile for as 10 * compute capability, ascending.

    With an "a" after it the code uses what only this capability has, and runs on no other; that is taken of "90;90a".
    """
    wanted = os.environ.get("ASA_OPS_CUDA_ARCHS") or "80;90a;100"
    if not re.fullmatch(r"\d+a?(;\d+a?)*", wanted) or min(map(int, re.findall(r"\d+", wanted))) < 80:
        sys.exit(f'asa_ops: ASA_OPS_CUDA_ARCHS must be like "80;90a", each 80 or more, got "{wanted}"')
    by_number = {int(arch.rstrip("a")): arch for arch in sorted(wanted.split(";"))}
    return [by_number[number] for number in sorted(by_number)]


def nvcc_flags(architectures: list[str]) -> list[str]:
    """Return the flags for machine code of each architecture, and PTX of the last without a letter.

    From that newer GPUs are served.
    """
    last = [arch for arch in architectures if arch.isdigit()][-1:]
    codes = [f"arch=compute_{arch},code=sm_{arch}" for arch in architectures if arch not in last]
    codes += [f"arch=compute_{arch},code=[sm_{arch},compute_{arch}]" for arch in last]
    host = ["-fPIC", "-fvisibility=hidden", *PREFIXES]
    # Products and sums are never fused: the same score must be the same number in every kernel.
    flags = ["-std=c++17", "-O3", "--fmad=false", "-Xptxas", "-v", *(f"-gencode={code}" for code in codes)]
    return flags + [word for flag in host for word in ("-Xcompiler", flag)]


class BuildWithCuda(BuildExtension):
    """Also compiles csrc/cuda: BuildExtension itself refuses to where torch was built without CUDA."""

    def build_extension(self, extension):
        architectures, nvcc = cuda_architectures(), find_nvcc()
        flags = nvcc_flags(architectures)
        if reason := why_no_cuda(nvcc, flags):
            print(f"asa_ops: building without CUDA kernels ({reason})", file=sys.stderr)
            extension.define_macros.append(("ASA_OPS_CUDA_ARCHS", '""'))
        else:
            extension.define_macros += [("ASA_OPS_CUDA_ARCHS", f'"{";".join(architectures)}"'), ("USE_CUDA", None)]
            add_cuda(extension, [nvcc, *flags], Path("build/cuda", "-".join(architectures)))
        super().build_extension(extension)


def add_cuda(extension, nvcc: list[str], folder: Path) -> None:
    """Compile csrc/cuda to objects in ``folder``, a lasting one, and have them linked with the CUDA runtime."""
    # nvcc says where its toolkit is, also where it is a wrapper: INCLUDES="-I/usr/local/cuda/include"
    dry_run = subprocess.run([nvcc[0], "-dryrun", "-c", CUDA_SOURCES[0]], check=True, capture_output=True, text=True)
    variables = dict(re.findall("^#\\$ (INCLUDES|LIBRARIES)=(.*)$", dry_run.stderr, re.MULTILINE))
    extension.include_dirs += [flag.removeprefix("-I") for flag in shlex.split(variables["INCLUDES"])]
    defines = [f"-D{name}" if value is None else f"-D{name}={value}" for name, value in extension.define_macros]
    command = [*nvcc, *defines, "-I", include_paths()[0]]
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        objects = list(pool.map(lambda source: compile_cuda(source, folder, command), CUDA_SOURCES))
    extension.extra_objects += map(str, objects)
    extension.extra_link_args += shlex.split(variables["LIBRARIES"]) + CUDA_RUNTIME


def compile_cuda(source: Path, folder: Path, command: list[str]) -> Path:
    """Compile one file and return the object, the one of before if its command and the files it read are unchanged.

    It lies in ``folder`` as the file does in csrc/cuda, and beside it the assembler's report on registers and spills,
    which tests read.
    """
    place = folder / source.relative_to("csrc/cuda")
    place.parent.mkdir(parents=True, exist_ok=True)
    suffixes = ".o", ".d", ".command", ".registers"
    compiled, dependencies, command_used, registers = map(place.with_suffix, suffixes)
    # The seed is that of the names which nvcc makes up: the same source gives the same object.
    options = ["-frandom-seed", source.name, "-MD", "-MF", str(dependencies), "-c", str(source), "-o", str(compiled)]
    line = shlex.join([*command, *options])
    try:
        files = dependencies.read_text().replace("\\\n", " ").split(":", 1)[1].split()
        newest = max(Path(file).stat().st_mtime_ns for file in files)
        if command_used.read_text() == line and newest < compiled.stat().st_mtime_ns:
            return compiled
    except OSError:  # never compiled, or what it read is gone
        pass
    command_used.unlink(missing_ok=True)
    print(line, flush=True)
    started = time.time_ns()
    run = subprocess.run([*command, *options], stderr=subprocess.PIPE, text=True)
    if run.returncode:
        sys.exit(f"{run.stderr}\nasa_ops: {source} does not compile")
    registers.write_text(run.stderr)
    os.utime(compiled, ns=(started, started))  # what is edited while it compiles counts as newer
    command_used.write_text(line)
    return compiled


def extension() -> dict:
    """Return setup()'s arguments for the extension."""
    major, minor, patch = (int(part) for part in VERSION.split("."))
    module = CppExtension(
        "asa_ops._C",
        sorted(str(path) for path in Path("csrc").rglob("*.cpp") if path.parent.name != "testing"),
        depends=sorted(map(str, Path("csrc").rglob("*.h"))),
        py_limited_api=True,
        define_macros=[
            ("TORCH_TARGET_VERSION", "0x020a000000000000"),  # torch 2.10
            ("TORCH_STABLE_ONLY", None),
            ("ASA_OPS_VERSION", str(10000 * major + 100 * minor + patch)),
            *([("ASA_OPS_NAMESPACE", namespace)] if (namespace := os.environ.get("ASA_OPS_NAMESPACE")) else []),
        ],
        extra_compile_args=["-std=c++17", "-O3", "-Wall", "-fvisibility=hidden", "-g0", *PREFIXES],
        extra_link_args=["-Wl,--no-as-needed", "-ltorch"] if sys.platform == "linux" else [],
    )
    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": BuildWithCuda},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


reason = why_no_compiler()
if reason and is_set("ASA_OPS_REQUIRE_EXT"):
    sys.exit(f"asa_ops: the extension that ASA_OPS_REQUIRE_EXT asks for needs a C++ compiler: {reason}")
if reason:
    print(f"asa_ops: building without the compiled extension ({reason})", file=sys.stderr)
setup(version=VERSION, **({} if reason else extension()))
