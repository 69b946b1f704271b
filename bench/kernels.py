"""What the compiler makes of every Triton kernel, without a GPU: registers, spills, shared memory, instructions.

    python bench/kernels.py                # every configuration of the table, for sm_80, sm_90 and sm_100
    python bench/kernels.py --quick        # bfloat16 at head dim 256 on sm_90
    python bench/kernels.py --archs 90 --dims 256 --dtypes bfloat16 --kernels dq dkv

The launches of real calls are recorded, on tensors without memory, instead of run; each distinct one is compiled. So
what is checked is what runs. Ends in a one-line verdict; exit status 1 if a budget is breached (``check``).
"""

import argparse
import concurrent.futures
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from asa_ops.asa import triton as asa
from asa_ops.asa.triton import configs as triton_configs
from asa_ops.asa.types import Inputs, Options, Saved
from asa_ops.core import triton_launch
from asa_ops.criss_cross import ops as criss_cross_ops
from asa_ops.criss_cross import triton as criss_cross

SHARED_LIMIT = {80: 101376, 90: 232448, 100: 232448}  # bytes a program may use; rows of 80 serve consumer cards too
BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TENSOR_CORES = r"\b(HGMMA|HMMA|UTCHMMA|UTCQMMA|UTCMMA)\b"
ASYNC_COPIES = r"\b(LDGSTS|UTMALDG)\b"

# Spilled stores of what is known to need them. Everything not named here must have none.
SPILL_CEILING = {
    ("finish_dq", 64, 80): 1,
    ("finish_out", 256, 80): 2,
    ("aggregate", 256, 80): 25,  # 128 registers of the result; scores in chunks of D do not help (tried)
    ("dk", 256, 90): 10,  # 83 us on an H200, 105 us in the best row without (bench/results/nvidia-h200-tune.txt)
}

# Products on tensor cores, in the order of a call; the rest of the kernels moves data.
MATRIX_KERNELS = (*triton_configs.KERNELS, "criss_cross_fwd", "criss_cross_dqk", "criss_cross_dv")

CALLS = {  # of asa_attention, name: (arguments of the call, thresholds learn)
    "plain": ({}, False),
    "learning": ({}, True),
    "topk": ({"topk": 16}, True),
    "one_way": ({"reciprocal": False}, True),
    "symmetric": ({"symmetric": True}, False),
    "dense": ({"alpha": False, "beta": False}, False),
    "window_only": ({"alpha": False}, True),
    "topk_alone": ({"alpha": False, "beta": False, "topk": 16}, True),
}


class Launch(NamedTuple):
    """One distinct launch: what the compiler needs to know of it."""

    kernel: object  # the @triton.jit function
    label: str
    dim: int
    dtype: str
    signature: tuple  # ((name, type), ...), the type of a struct being a struct of types
    constants: tuple  # ((path, name, value), ...), a path being the index of an argument and those of fields in it
    divisible: tuple  # paths of what are multiples of 16
    warps: int
    stages: int
    registers: int | None


class Report(NamedTuple):
    """What came out of the compiler."""

    registers: int
    spills: int
    shared: int
    tensor_cores: int
    async_copies: int
    seconds: float
    error: str


def type_of(x: object) -> str | tuple:
    """Return an argument's type as Triton spells it, "constexpr" for None and constants."""
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}
    names |= {torch.int8: "i8", torch.uint8: "u8", torch.int32: "i32", torch.int64: "i64", torch.bool: "i1"}
    if x is None or isinstance(x, tl.constexpr):
        return "constexpr"
    if isinstance(x, tuple):  # a struct
        return type(x)(*map(type_of, x))
    if isinstance(x, torch.Tensor):
        return "*" + names[x.dtype]
    if isinstance(x, TensorDescriptor):
        return f"tensordesc<{names[x.base.dtype]}{list(x.block_shape)}>"
    if isinstance(x, float):
        return "fp32"
    return "i32" if -(2**31) <= x < 2**31 else "i64"


def leaves(x: object, path: tuple, name: str) -> Iterator[tuple[tuple, str, object]]:
    """Yield (path, name, value) of an argument, or of every field of a struct."""
    if isinstance(x, tuple):
        for index, (field, value) in enumerate(zip(x._fields, x, strict=True)):
            yield from leaves(value, (*path, index), field)
    else:
        yield path, name, x


def record(arch: int, dim: int, dtype: torch.dtype, precision: str, wanted: set[str]) -> dict[tuple, Launch]:
    """Return the distinct launches of matrix kernels in forward and backward calls with head dim ``dim``."""
    found: dict[tuple, Launch] = {}

    def launch(kernel, grid, *args, warps=4, stages=1, registers=None, **constants):
        parameters = kernel.arg_names
        given = dict(zip(parameters, args, strict=False)) | constants
        constexprs = {name for name, x in constants.items() if not isinstance(x, tuple)}
        types = [(name, "constexpr" if name in constexprs else type_of(given[name])) for name in parameters]
        values, divisible = [], []
        for index, parameter in enumerate(parameters):
            if parameter in constexprs:
                values.append(((index,), parameter, constants[parameter]))
                continue
            for path, name, x in leaves(given[parameter], (index,), parameter):
                if x is None or isinstance(x, tl.constexpr):
                    values.append((path, name, getattr(x, "value", None)))
                    continue
                # Arguments that a call may give without the alignment are compiled without it; Triton does so of
                # arguments only, not of the fields of structs.
                specialised = len(path) > 1 or name not in kernel.do_not_specialize
                if isinstance(x, torch.Tensor) or (specialised and type(x) is int and x % 16 == 0):
                    divisible.append(path)
        label = kernel.__name__.removeprefix("_").removeprefix("asa_").removesuffix("_kernel")
        if label == "dkv" and not (constants["WANT_DK"] and constants["WANT_DV"]):
            label = "dk" if constants["WANT_DK"] else "dv"
        if wanted and label not in wanted:
            return
        if precision != "highest" and not any(name == "PRECISION" for _, name, _ in values):
            return
        kind = "tf32" if precision != "highest" and dtype == torch.float32 else str(dtype).removeprefix("torch.")
        key = (label, dim, kind, tuple(types), tuple(values), warps, stages)
        found[key] = Launch(
            kernel, label, dim, kind, tuple(types), tuple(values), tuple(divisible), warps, stages, registers
        )

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        with (
            mock.patch.object(triton_launch, "launch", launch),
            mock.patch.object(triton_launch, "architecture", lambda device: arch),
            mock.patch.object(triton_launch, "processors", lambda device: 132),
        ):
            for options, learn in CALLS.values():
                _call(dim, dtype, learn, **options)
            _call_criss_cross(dim, dtype)
    finally:
        torch.set_float32_matmul_precision(before)
    return found


def _call(dim, dtype, learn, topk=0, reciprocal=True, symmetric=False, alpha=True, beta=True) -> None:
    """Go through a forward and a backward call on tensors without memory."""
    height = width = 64
    n = height * width
    query = torch.empty(2, 2, n, dim, dtype=dtype, device="meta")
    key = query if symmetric else torch.empty_like(query)
    threshold = torch.empty(2, 2, n, dtype=torch.float32, device="meta")
    thresholds = (threshold if given else None for given in (alpha, beta))
    inputs = Inputs(query, key, torch.empty_like(query), *thresholds, None)
    options = Options((height, width), 3, topk, reciprocal, 0.1)
    saved = Saved.new(inputs, options, "triton", keep_bits=True)
    band = 2.0 if learn else None
    asa.fwd(inputs, options, saved, band)
    asa.bwd(torch.empty_like(query), inputs, saved, options, band)


def _call_criss_cross(dim: int, dtype: torch.dtype) -> None:
    """The same for criss-cross attention, with the published number of value channels."""
    query, value = (torch.empty(2, channels, 64, 64, dtype=dtype, device="meta") for channels in (dim, 8 * dim))
    saved = criss_cross_ops.criss_cross_fwd(query, query, value, 1.0, "triton")
    criss_cross.fwd(query, query, value, 1.0, *saved)
    criss_cross.bwd(value, query, query, value, saved[1], 1.0)


def compile_launch(launch: Launch, arch: int) -> Report:
    """Compile one launch and read the result."""
    source = ASTSource(
        fn=launch.kernel,
        signature=dict(launch.signature),
        constexprs={path: value for path, _, value in launch.constants},
        attrs={path: [["tt.divisibility", 16]] for path in launch.divisible},
    )
    started = time.time()
    try:
        compiled = triton.compile(
            source,
            target=GPUTarget("cuda", arch, 32),
            options=triton_launch.compile_options(launch.warps, launch.stages, launch.registers),
        )
    except Exception as error:  # whatever the compiler raises is the finding
        return Report(0, 0, 0, 0, 0, time.time() - started, f"{type(error).__name__}: {str(error)[:300]}")
    seconds = time.time() - started
    with tempfile.NamedTemporaryFile(suffix=".cubin") as scratch:
        scratch.write(compiled.asm["cubin"])
        scratch.flush()
        usage = _run(BINARIES / "cuobjdump", "-res-usage", scratch.name)
        sass = _run(BINARIES / "cuobjdump", "-sass", scratch.name)
    return Report(
        registers=int(re.search(r"REG:(\d+)", usage).group(1)),
        spills=len(re.findall(r"\bSTL\b", sass)),
        shared=compiled.metadata.shared,
        tensor_cores=len(re.findall(TENSOR_CORES, sass)),
        async_copies=len(re.findall(ASYNC_COPIES, sass)),
        seconds=seconds,
        error="",
    )


def _run(*command: object) -> str:
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout


def check(launch: Launch, arch: int, report: Report) -> list[str]:
    """Return what in a report breaches the budget."""
    if report.error:
        return [report.error]
    wrong = []
    half = launch.dtype in ("bfloat16", "float16")
    matrix = launch.label in MATRIX_KERNELS
    ceiling = SPILL_CEILING.get((launch.label, launch.dim, arch), 0)
    if half and arch < 100 and report.spills > ceiling:
        wrong.append(f"{report.spills} spilled stores, at most {ceiling} allowed")
    if report.shared > SHARED_LIMIT[arch]:
        wrong.append(f"{report.shared} bytes of shared memory, the limit is {SHARED_LIMIT[arch]}")
    if half and matrix and not report.tensor_cores:
        wrong.append("no tensor-core instruction")
    return wrong


def launches(archs, dims, dtypes, kernels) -> Iterator[tuple[int, Launch]]:
    """Yield (architecture, launch) for everything asked for."""
    for arch in archs:
        for dtype in dtypes:
            kind = torch.float32 if dtype == "tf32" else getattr(torch, dtype)
            precision = "high" if dtype == "tf32" else "highest"
            for dim in dims:
                for launch in record(arch, dim, kind, precision, set(kernels)).values():
                    yield arch, launch


_recorded: list = []


def _start_worker(selection: tuple) -> None:
    _recorded.extend(launches(*selection))


def _work(index: int) -> Report:
    arch, launch = _recorded[index]
    return compile_launch(launch, arch)


def variant(launch: Launch) -> str:
    """Name what distinguishes a launch from others of its kernel."""
    names = ("MUTUAL", "SYMMETRIC", "ONE_WAY_BITS", "HAS_TOPK", "BY_ROWS", "BY_COLUMNS", "HAS_BITS")
    names += ("NEGATIVE", "SPLITS", "COLUMN", "OF_KEYS", "DELTA", "DELTA_ERROR")
    constants = {name: value for _, name, value in launch.constants}
    return " ".join(name.lower() for name in names if constants.get(name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", type=int, nargs="+", default=[80, 90, 100], choices=sorted(SHARED_LIMIT))
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float16", "float32", "tf32"])
    parser.add_argument("--kernels", nargs="+", action="extend", default=[], help="only these: mask, dq, ...")
    parser.add_argument("--quick", action="store_true", help="bfloat16 at head dim 256 on sm_90, matrix kernels")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    args = parser.parse_args()
    if triton.knobs.runtime.interpret:
        sys.exit("TRITON_INTERPRET is set: nothing would be compiled")
    if args.quick:
        args.archs, args.dims, args.dtypes = [90], [256], ["bfloat16"]
        args.kernels = args.kernels or list(MATRIX_KERNELS)
    selection = (args.archs, args.dims, args.dtypes, args.kernels)
    todo = list(launches(*selection))
    print(f"triton {triton.__version__}, torch {torch.__version__}: {len(todo)} kernels to compile", flush=True)
    header = "arch kernel             dim dtype    warps stages  regs spills  shared mma copies  sec"
    print(header, flush=True)
    breaches = []
    with concurrent.futures.ProcessPoolExecutor(args.jobs, initializer=_start_worker, initargs=(selection,)) as pool:
        for (arch, launch), report in zip(todo, pool.map(_work, range(len(todo))), strict=True):
            wrong = check(launch, arch, report)
            breaches += [(arch, launch, reason) for reason in wrong]
            print(
                f"{arch:4} {launch.label:18} {launch.dim:3} {launch.dtype:8} {launch.warps:5} {launch.stages:6} "
                f"{report.registers:5} {report.spills:6} {report.shared:7} {report.tensor_cores:3} "
                f"{report.async_copies:6} {report.seconds:4.1f}  {variant(launch)}{'  <-- ' if wrong else ''}"
                f"{'; '.join(wrong)}",
                flush=True,
            )
    for arch, launch, reason in breaches:
        print(f"sm_{arch} {launch.label} D={launch.dim} {launch.dtype} {variant(launch)}: {reason}")
    print(f"{'FAILED' if breaches else 'OK'}: {len(todo)} kernels, {len(breaches)} breaches of the budget")
    sys.exit(bool(breaches))


if __name__ == "__main__":
    main()
