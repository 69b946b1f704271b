"""Build csrc/cuda as ordinary C++ behind csrc/testing/simt.h: a library that runs its kernels on CPU tensors.

Loaded beside the extension, it defines the ops ``asa_ops::asa_emulated_*`` of CPU tensors. Kernels whose barriers
suffice give the same bits in whichever order the threads of a block run: ``ASA_OPS_SIMT_REVERSED=1`` runs the last
first.
"""

import ctypes
import fcntl
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils.cpp_extension import get_cxx_compiler, include_paths, library_paths

from asa_ops.asa import ops
from asa_ops.core import dispatch

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "csrc/cuda").rglob("*.cu"))
HEADERS = [path for folder in ("", "cuda/**/", "testing/") for path in (ROOT / "csrc").glob(f"{folder}*.h")]
# For this machine: emulated fused multiply-adds would be slow.
FLAGS = ["-std=c++17", "-O1", "-march=native", "-ffp-contract=off", "-fno-strict-aliasing", "-Wall", "-Werror"]
FLAGS += ["-Wno-unknown-pragmas"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g1"]


COMPILER = shutil.which(shlex.split(get_cxx_compiler())[0])
# With a GPU kernels run there.
AVAILABLE = bool(COMPILER) and not torch.cuda.is_available()


def load(sanitize: bool = False, library: Path | None = None) -> None:
    """Register the ops for CPU tensors in this process, of a library built before if given: impl="cuda" runs then."""
    library = library or build(sanitize)
    if not hasattr(torch.ops.asa_ops, "asa_emulated_fwd"):
        torch.ops.load_library(library)
        ops.register("asa_emulated", "cuda")
        dispatch.remembered.cache_clear()


def launches() -> int:
    """Return how many kernels ran in this process."""
    return _count("launches")


def products() -> int:
    """Return how many products of warpgroups they formed."""
    return _count("products")


def _count(what: str) -> int:
    count = getattr(ctypes.CDLL(str(build())), f"simt_{what}")
    count.restype = ctypes.c_int64
    return count()


def programs() -> list[tuple[str, int, int]]:
    """Return the different launches of this process: the kernel's mangled name, its threads, its shared memory."""
    library = build()
    symbols = subprocess.run(["nm", library], check=True, capture_output=True, text=True).stdout
    names = {int(words[0], 16): words[2] for words in map(str.split, symbols.splitlines()) if len(words) == 3}
    origin = next(address for address, name in names.items() if name == "simt_launches")
    told = ctypes.CDLL(str(library)).simt_programs
    told.restype = ctypes.c_char_p
    lines = [[int(word) for word in line.split()] for line in told().decode().splitlines()]
    return [(names[origin + offset], threads, shared) for offset, threads, shared in lines]


def build(sanitize: bool = False) -> Path:
    """Return the library, built anew if a source is newer."""
    folder = ROOT / "build" / ("simt_sanitized" if sanitize else "simt")
    library = folder / "libasa_simt.so"
    return up_to_date(library, SOURCES, lambda: compile_all(library, SANITIZE if sanitize else []))


def build_program(source: Path, sanitize: bool = False) -> Path:
    """Return the program that one file of kernels with a main function is, built anew if it is newer."""
    options = SANITIZE if sanitize else ["-O0"]  # it compiles longer than it runs
    program = ROOT / "build" / ("simt_sanitized" if sanitize else "simt") / source.stem
    command = [*shlex.split(get_cxx_compiler()), *FLAGS, *options, "-x", "c++", source, "-o", program]
    return up_to_date(program, [source], lambda: subprocess.run(command, check=True))


def up_to_date(built: Path, sources: list[Path], build: Callable[[], object]) -> Path:
    """Return what was built, anew if a source is newer; several processes may ask at once."""
    built.parent.mkdir(parents=True, exist_ok=True)
    with open(built.parent / f"{built.stem}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        newest = max(path.stat().st_mtime for path in [*sources, *HEADERS, Path(__file__)])
        if not built.exists() or built.stat().st_mtime < newest:
            build()
    return built


def compile_all(library: Path, options: list[str], csrc: Path = ROOT / "csrc") -> None:
    """Compile the kernels, of a copy of the sources if given, to a library, with its objects in a folder beside it."""
    compiler, folder = shlex.split(get_cxx_compiler()), library.parent
    flags = [*FLAGS, "-fPIC", "-fvisibility=hidden", *options]
    flags += ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY", "-isystem", include_paths()[0]]

    def compile_one(source: Path) -> Path:
        source = source.relative_to(ROOT / "csrc")
        compiled = (folder / source.relative_to("cuda")).with_suffix(".o")
        compiled.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([*compiler, *flags, "-x", "c++", "-c", csrc / source, "-o", compiled], check=True)
        return compiled

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, SOURCES))
    links = [f"-L{library_paths()[0]}", "-ltorch_cpu", "-ltorch", "-lc10"]
    subprocess.run([*compiler, *options, "-shared", *objects, *links, "-o", library], check=True)
