"""Build the CPU kernels with AMX for machines that have AVX-512 only, or AVX2: then AVX-512 is emulated too.

The library, loaded beside the extension, defines the ops ``asa_ops::asa_amx_*``: with csrc/cpu/amx.h in plain C++ or,
with ``ASA_OPS_AMX_TRAPS=1``, with its instructions: the machine must then round to bf16 itself (AVX512-BF16), and a
handler of signals runs the others.
"""

import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import simt
import torch
from torch.utils.cpp_extension import get_cxx_compiler, include_paths, library_paths

from asa_ops.asa import ops
from asa_ops.core import extension

CAPABILITY = torch.backends.cpu.get_cpu_capability()
AVX512 = CAPABILITY == "AVX512"
GCC = "clang" not in os.path.realpath(simt.COMPILER or "")  # csrc/testing/avx512.h is for it alone
EMULATES = CAPABILITY == "AVX2" and sys.platform.startswith("linux") and GCC
AVAILABLE = extension.has("asa_fwd", "CPU") and bool(simt.COMPILER) and (AVX512 or EMULATES)
AVX512_EMULATED = ["-DASA_AVX512_EMULATED", "-mavx2", "-mfma", "-mbmi", "-mpopcnt", "-Wno-psabi"]

CPU = simt.ROOT / "csrc/cpu"
SOURCES = [*sorted((CPU / "asa").glob("*.cpp")), CPU / "amx.cpp", *sorted(CPU.glob("isa_*.cpp"))]
HEADERS = [*CPU.rglob("*.h"), *(simt.ROOT / "csrc").glob("*.h"), *(simt.ROOT / "csrc/testing").glob("a*.h")]
FLAGS = ["-std=c++17", "-O2", "-w", "-fPIC", "-fvisibility=hidden", "-DASA_AMX_TESTING"]
FLAGS += ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY", "-isystem", include_paths()[0]]
FLAGS += [] if AVX512 else AVX512_EMULATED


TRAPS = os.environ.get("ASA_OPS_AMX_TRAPS") == "1"
BACK_END = [] if TRAPS else ["-DASA_AMX_EMULATED"]


def load() -> None:
    """Register the ops in this process."""
    if not hasattr(torch.ops.asa_ops, "asa_amx_fwd"):
        torch.ops.load_library(build())
        ops.register("asa_amx", "cpu")


def build() -> Path:
    """Return the library, built anew if a source is newer."""
    folder = "amx_traps" if TRAPS else "amx" if AVX512 else "amx_avx2"
    library = simt.ROOT / "build" / folder / "libasa_amx.so"
    return simt.up_to_date(library, [*SOURCES, *HEADERS, Path(__file__)], lambda: compile_all(library))


def compile_all(library: Path) -> None:
    compiler = shlex.split(get_cxx_compiler())

    def compile_one(source: Path) -> Path:
        compiled = library.parent / f"{source.stem}.o"
        subprocess.run([*compiler, *FLAGS, *BACK_END, "-c", source, "-o", compiled], check=True)
        return compiled

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, SOURCES))
    links = [f"-L{library_paths()[0]}", "-ltorch_cpu", "-ltorch", "-lc10"]
    subprocess.run([*compiler, "-shared", *objects, *links, "-o", library], check=True)


def build_program() -> Path:
    """Return the program that tests csrc/cpu/amx.h, built anew if a source is newer."""
    source, program = simt.ROOT / "csrc/testing/amx.cc", simt.ROOT / "build/amx/layer"
    command = [*shlex.split(get_cxx_compiler()), "-std=c++17", "-O2", "-march=native", "-ffp-contract=off", "-Wall"]
    sources = [source, source.with_name("amx_traps.h"), CPU / "amx.h", Path(__file__)]
    return simt.up_to_date(
        program, sources, lambda: subprocess.run([*command, "-Werror", source, "-o", program], check=True)
    )
