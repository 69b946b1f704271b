"""What the compiler makes of every CUDA kernel, without a GPU: registers, spills, shared memory, instructions.

    python -m bench.cuda.budget                 # every kernel for sm_80, sm_90a and sm_100
    python -m bench.cuda.budget --quick         # one file for sm_90a
    python -m bench.cuda.budget --archs 90a --sources hopper/sums scores

Compiles as setup.py does; what has not changed since the last time is taken from build/cuda_budget. Needs nvcc, and
triton for the disassembler that it brings. Ends in a one-line verdict; exit status 1 if a budget is breached (``check``
and ``check_file``).

In the table `regs` is what a thread uses, and `entry` what it has when the kernel starts: those for sm_90a hand
registers over. `shared` is of the widest call, with what the compiler places there itself; `programs` is how many of
those run on a multiprocessor at a time.
"""

import argparse
import concurrent.futures
import contextlib
import functools
import importlib.util
import os
import re
import runpy
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from .launches import Launch, labels, recorded

ROOT = Path(__file__).parents[2]
CSRC = Path("csrc/cuda")
# All but the files of ops, which have no kernels and need torch.
OPS = ("call.cu", "part.cu")
SOURCES = sorted(path.relative_to(ROOT) for path in (ROOT / CSRC).rglob("*.cu") if path.name not in OPS)
ARCHS = ("80", "90a", "100")
SHARED_LIMIT = {"80": 101376, "90a": 232448, "100": 232448}  # bytes a program may use; code of 80 serves consumer cards
PROCESSOR_SHARED = {"80": 164 << 10, "90a": 228 << 10, "100": 228 << 10}  # bytes of a multiprocessor
RESERVED = 1024  # bytes of them for every program

# Bytes that kernels of float32 may spill: wide sums of products that no tensor core forms. Half precisions: none.
SINGLE_SPILLS = 32
# Kernels with tiles, by file: on tensor cores in half precisions, from asynchronous copies. In hopper/ all are such.
TILED = {
    "asa/scores": ("asa_statistics_kernel", "asa_topk_kernel"),
    "asa/select": ("asa_mask_kernel",),
    "asa/sums": ("asa_sums_kernel",),
    "asa/dt": ("asa_dt_kernel",),
}
# What the assembler says where it waits for every product before it starts the next, or leaves out what was asked for.
SERIALISED = re.compile(r".*(?:\(C75\d\d\)|Potential Performance Loss).*")


class Kernel(NamedTuple):
    label: str
    registers: int  # that a thread uses
    entry: int  # that it has when the kernel starts
    handed_over: int  # the most that a thread gets later; 0 where it keeps what it has
    spills: int  # bytes
    static: int  # bytes of shared memory that the compiler places
    hmma: int  # instructions, as the next ones
    hgmma: int
    copies: int  # asynchronous

    @property
    def is_half(self) -> bool:
        return "Half" in self.label or "BFloat16" in self.label

    @property
    def name(self) -> str:
        return self.label.split("<")[0]


def is_hopper(source: Path) -> bool:
    """Whether a file's kernels are for compute capability 9.0, and empty on other GPUs."""
    return source.parent.name == "hopper"


def is_for(source: Path, arch: str) -> bool:
    return arch == "90a" or not is_hopper(source)


def stem_of(source: Path) -> str:
    return str(source.relative_to(CSRC).with_suffix(""))


def kernels_of(told: str, listing: str, arch: str) -> list[Kernel]:
    """Return what the assembler told of the kernels of one file, and what the disassembler lists."""
    entry = rf"Compiling entry function '(\S+)' for 'sm_{arch}'\n(.*?)(?=Compiling entry function|\Z)"
    reports = dict(re.findall(entry, told, re.S))
    bodies = dict(re.findall(r"Function : (\S+)\n(.*?)(?=Function : |\Z)", listing, re.S))
    if not reports or reports.keys() != bodies.keys():
        raise ValueError(f"the assembler tells of {sorted(reports)}, the disassembler of {sorted(bodies)}")
    found = []
    for label, (name, report) in zip(labels(list(reports)), reports.items(), strict=True):
        instructions = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", bodies[name])
        used = int(re.search(r"Used (\d+) registers", report)[1])
        handed_over = [int(x, 16) for x in re.findall(r"USETMAXREG\.TRY_ALLOC\S* \S+ 0x([0-9a-f]+)", bodies[name])]
        static = re.search(r"(\d+) bytes smem", report)
        found.append(
            Kernel(
                label=label,
                registers=registers_named(instructions) if handed_over else used,
                entry=used,
                handed_over=max(handed_over, default=0),
                spills=int(re.search(r"(\d+) bytes spill stores", report)[1]),
                static=int(static[1]) if static else 0,
                hmma=count(r"\bHMMA\b", instructions),
                hgmma=count(r"\bHGMMA\b", instructions),
                copies=count(r"\b(LDGSTS|UBLKCP)\b", instructions),
            )
        )
    return found


def count(pattern: str, instructions: list[str]) -> int:
    return sum(bool(re.search(pattern, instruction)) for instruction in instructions)


def registers_named(instructions: list[str]) -> int:
    """Return how many registers the instructions name; the assembler's number is that of the start of a kernel."""
    last = [int(x) for instruction in instructions for x in re.findall(r"\bR(\d+)\b", instruction)]
    for columns, first in re.findall(r"\bHGMMA\.64x(\d+)x\S* R(\d+)", "\n".join(instructions)):
        last.append(int(first) + int(columns) // 2 - 1)  # of its sums, of which it names the first
    return max(last, default=-1) + 1


def programs(kernel: Kernel, launch: Launch, arch: str) -> int:
    """Return how many programs of a launch run on a multiprocessor at a time."""
    warps = rounded_up(launch.threads, 32) // 32
    # A multiprocessor has four parts, and each of them 16384 registers.
    by_registers = 4 * (16384 // rounded_up(32 * kernel.entry, 256)) // warps
    by_shared = PROCESSOR_SHARED[arch] // rounded_up(kernel.static + launch.shared + RESERVED, 128)
    return min(by_registers, by_shared, 64 // warps, 32)


def rounded_up(x: int, unit: int) -> int:
    return -(-x // unit) * unit


def check(source: Path, kernel: Kernel) -> list[str]:
    """Return what breaches the budget of a kernel."""
    wrong = []
    allowed = 0 if kernel.is_half else SINGLE_SPILLS
    if kernel.spills > allowed:
        wrong.append(f"{kernel.spills} bytes spilled, at most {allowed} allowed")
    allowed = kernel.handed_over or 255
    if kernel.registers > allowed:
        wrong.append(f"{kernel.registers} registers, at most {allowed} allowed")
    if is_hopper(source) and not kernel.hgmma:
        wrong.append("no HGMMA instruction")
    if kernel.name in TILED.get(stem_of(source), ()):
        if bool(kernel.hmma) != kernel.is_half:
            wrong.append(f"{kernel.hmma} HMMA instructions")
        if not kernel.copies:
            wrong.append("no asynchronous copy")
    return wrong


def check_file(source: Path, told: str, kernels: list[Kernel]) -> list[str]:
    """Return what breaches the budget of a file, beside its kernels."""
    missing = set(TILED.get(stem_of(source), ())) - {kernel.name for kernel in kernels}
    return [f"no kernel is called {name}" for name in sorted(missing)] + SERIALISED.findall(told)


def check_launches(kernel: Kernel, launches: list[Launch], arch: str) -> list[str]:
    if not launches:
        return ["no call of bench/cuda/launches.py launches it"]
    most = kernel.static + max(launch.shared for launch in launches)
    if most > SHARED_LIMIT[arch]:
        return [f"{most} bytes of shared memory, the limit is {SHARED_LIMIT[arch]}"]
    if not all(programs(kernel, launch, arch) for launch in launches):
        return ["not one program has room on a multiprocessor"]
    return []


def disassembled(compiled: Path, arch: str) -> str:
    tool = Path(importlib.util.find_spec("triton").origin).parent / "backends/nvidia/bin/cuobjdump"
    command = [tool, "-sass", "-arch", f"sm_{arch}", compiled]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def read(source: Path, compiled: Path, arch: str) -> tuple[list[Kernel], list[str]]:
    """Return the kernels of a file that setup.py compiled, and what breaches the budget of the file."""
    told = compiled.with_suffix(".registers").read_text()
    kernels = kernels_of(told, disassembled(compiled, arch), arch)
    return kernels, check_file(source, told, kernels)


@functools.cache
def setup_file() -> dict:
    """Return what setup.py defines, without its building anything: how files are compiled is said there alone."""
    with mock.patch("setuptools.setup"):
        return runpy.run_path("setup.py")


def compiled(source: Path, arch: str) -> Path:
    defined = setup_file()
    nvcc = [defined["find_nvcc"](), *defined["nvcc_flags"]([arch])]
    return defined["compile_cuda"](source, Path("build/cuda_budget", arch), nvcc)


def _work(task: tuple[str, Path]) -> tuple[list[Kernel], list[str], float]:
    arch, source = task
    started = time.time()
    return *read(source, compiled(source, arch), arch), time.time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", nargs="+", default=ARCHS, choices=ARCHS)
    parser.add_argument("--sources", nargs="+", default=[], help="only these: scores, hopper/dq, ...")
    parser.add_argument("--quick", action="store_true", help="hopper/dq for sm_90a")
    parser.add_argument("--jobs", type=int, default=int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1))
    args = parser.parse_args()
    if args.quick:
        args.archs, args.sources = ["90a"], ["hopper/dq"]
    os.chdir(ROOT)
    if not setup_file()["find_nvcc"]():
        sys.exit("there is no nvcc in CUDA_HOME, on the PATH or in /usr/local/cuda")
    by_name = {stem_of(source).removeprefix("asa/"): source for source in SOURCES}
    if unknown := set(args.sources) - by_name.keys():
        sys.exit(f"--sources are of {', '.join(by_name)}, not {', '.join(sorted(unknown))}")
    sources = [by_name[name] for name in args.sources or by_name]
    tasks = [(arch, x) for arch in args.archs for x in sources if is_for(x, arch)]
    table, started, breaches, n_kernels = sys.stdout, time.time(), [], 0
    launches = recorded()
    print(f"{len(tasks)} files to compile")
    print(f"arch {'kernel':42} threads  regs entry spills shared programs hgmma hmma copies", flush=True)
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),  # setup.py prints its commands
        concurrent.futures.ThreadPoolExecutor(args.jobs) as pool,
    ):
        for (arch, source), (kernels, wrong_file, seconds) in zip(tasks, pool.map(_work, tasks), strict=True):
            breaches += [f"sm_{arch} {source}: {reason}" for reason in wrong_file]
            print(f"{arch:>4} {source}, {seconds:.0f} s{'  <-- ' * bool(wrong_file)}", file=table)
            for kernel in kernels:
                calls = launches.get(kernel.label, [])
                wrong = check(source, kernel) + check_launches(kernel, calls, arch)
                breaches += [f"sm_{arch} {kernel.label}: {reason}" for reason in wrong]
                print(f"{arch:>4} {row(kernel, calls, arch)}{'  <-- ' * bool(wrong)}{'; '.join(wrong)}", file=table)
            table.flush()
            n_kernels += len(kernels)
    for breach in breaches:
        print(breach)
    verdict = "FAILED" if breaches else "OK"
    print(f"{verdict}: {n_kernels} kernels, {len(breaches)} breaches of the budget, {time.time() - started:.0f} s")
    sys.exit(bool(breaches))


def row(kernel: Kernel, launches: list[Launch], arch: str) -> str:
    threads = shared = run = "-"
    if launches:
        widest = max(launches, key=lambda launch: launch.shared)
        threads, shared, run = widest.threads, kernel.static + widest.shared, programs(kernel, widest, arch)
    registers = f"{threads:>7} {kernel.registers:5} {kernel.entry:5} {kernel.spills:6}"
    return f"{kernel.label:42} {registers} {shared:>6} {run:>8} {kernel.hgmma:5} {kernel.hmma:4} {kernel.copies:6}"


if __name__ == "__main__":
    main()
