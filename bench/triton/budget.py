"""What the compiler makes of every Triton kernel, without a GPU: registers, spills, shared memory, instructions.

    python -m bench.triton.budget                # every configuration of the table, for sm_80, sm_90 and sm_100
    python -m bench.triton.budget --quick        # bfloat16 at head dim 256 on sm_90
    python -m bench.triton.budget --archs 90 --dims 256 --dtypes bfloat16 --kernels dq dkv

The launches of real calls are recorded, on tensors without memory, instead of run; each distinct one is compiled. So
what is checked is what runs. Ends in a one-line verdict; exit status 1 if a budget is breached (``check``).
"""

import argparse
import concurrent.futures
import functools
import itertools
import logging
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from .. import peers
from . import launches

SHARED_LIMIT = {80: 101376, 90: 232448, 100: 232448}  # bytes a program may use; rows of 80 serve consumer cards too
BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TENSOR_CORES = r"\b(HGMMA|HMMA|UTCHMMA|UTCQMMA|UTCMMA)\b"
ASYNC_COPIES = r"\b(LDGSTS|UTMALDG)\b"

# Spilled stores of what is known to need them. Everything not named here must have none.
SPILL_CEILING = {
    ("finish_out", 256, 80): 2,
    ("aggregate", 256, 80): 25,  # 128 registers of the result; scores in chunks of D do not help (tried)
    ("dk", 256, 90): 10,  # 83 us on an H200, 105 us in the best row without (bench/results/nvidia-h200-tune.txt)
}

# Of the mask of a part of the rows, which stores a tile where it is asked to, by rows and by columns, and of that with
# extra tokens.
MASK_CEILING = 7

CALLS = (  # of asa_attention: arguments, whether thresholds learn
    ({}, False),
    ({}, True),
    ({"topk": 16}, True),
    ({"reciprocal": False}, True),
    ({"symmetric": True}, False),
    ({"grid": (16, 16, 16)}, True),
    ({"alpha": False, "beta": False}, False),
    ({"alpha": False}, True),
    ({"alpha": False, "beta": False, "topk": 16}, True),
    ({"grid": (64, 63), "extra_tokens": 64}, True),
    ({"grid": (64, 63), "extra_tokens": 64, "reciprocal": False, "topk": 16}, True),
)

# Constants that distinguish a launch from others of its kernel.
VARIANTS = ("MUTUAL", "SYMMETRIC", "ONE_WAY_BITS", "BY_ROWS", "BY_COLUMNS", "POSITIONS", "NEGATIVE")
VARIANTS += ("SPLITS", "COLUMN", "OF_KEYS", "DELTA", "DELTA_ERROR", "extra", "first")  # of a part of the rows


class Source(NamedTuple):
    label: str
    dim: int
    dtype: str
    arch: int
    variant: str
    options: object  # of the compiler
    text: ASTSource


class Compiled(NamedTuple):
    registers: int = 0
    spills: int = 0
    shared: int = 0
    tensor_cores: int = 0
    async_copies: int = 0
    seconds: float = 0
    error: str = ""


def source_of(launch: launches.Launch, dim: int, dtype: str, arch: int) -> Source:
    """Return what Triton would compile for a launch, by the code that it runs before every launch."""
    backend = make_backend(GPUTarget("cuda", arch, 32))
    bind = create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
    arguments = bind(*launch.arguments, **launch.named)
    options, signature, constants, attributes = launch.kernel._pack_args(backend, launch.named, *arguments)
    given = {name: isinstance(x, torch.Tensor) or x for name, x in constants_of(launch).items()}
    variant = " ".join(name.lower() for name in VARIANTS if given.get(name))
    text = ASTSource(launch.kernel, signature, constants, attributes)
    return Source(launch.label, dim, dtype, arch, variant, options, text)


def constants_of(launch: launches.Launch) -> dict[str, object]:
    """Return what a launch gives, by the names of arguments and of the fields of structs."""
    return {name.split(".")[-1]: x for name, x in launch.given.items()}


@functools.cache
def sources(archs, dims, dtypes, kernels) -> list[Source]:
    """Return the distinct launches of everything asked for."""
    found: dict[tuple, Source] = {}

    def keep(launch: launches.Launch, run) -> None:
        if (kernels and launch.label not in kernels) or (dtype == "tf32" and "PRECISION" not in constants_of(launch)):
            return
        source = source_of(launch, dim, dtype, arch)
        key = *source[:4], source.options.hash(), str(source.text.signature), str(source.text.constants)
        found[key] = source

    for arch, dtype, dim in itertools.product(archs, dtypes, dims):
        precision, kind = ("high", torch.float32) if dtype == "tf32" else ("highest", getattr(torch, dtype))
        with peers.matmul_precision(precision), launches.intercepted(keep, architecture=arch):
            for options, learn in CALLS:
                _call(dim, kind, learn, **options)
            query, value = (torch.empty(2, x, 64, 64, dtype=kind, device="meta") for x in (dim, 8 * dim))
            launches.go_through_criss_cross(query, value)  # with the published number of value channels
    return list(found.values())


def _call(dim, dtype, learn, symmetric=False, alpha=True, beta=True, **options) -> None:
    query = torch.empty(2, 2, 64 * 64, dim, dtype=dtype, device="meta")
    key = query if symmetric else torch.empty_like(query)
    threshold = torch.empty(2, 2, 64 * 64, dtype=torch.float32, device="meta")
    thresholds = (threshold if given else None for given in (alpha, beta))
    tensors = [query, key, torch.empty_like(query), *thresholds]
    for go_through in (launches.go_through, launches.go_through_part):
        go_through(tensors, {"grid": (64, 64)} | options, 2.0 if learn else None)


def compiled(source: Source) -> Compiled:
    started = time.time()
    try:
        result = triton.compile(source.text, target=GPUTarget("cuda", source.arch, 32), options=vars(source.options))
    except Exception as error:  # whatever the compiler raises is the finding
        return Compiled(seconds=time.time() - started, error=f"{type(error).__name__}: {str(error)[:300]}")
    seconds = time.time() - started
    with tempfile.NamedTemporaryFile(suffix=".cubin") as scratch:
        scratch.write(result.asm["cubin"])
        scratch.flush()
        # nvdisasm warns of every file for sm_80
        read = functools.partial(subprocess.check_output, text=True, stderr=subprocess.PIPE)
        usage, sass = (read([BINARIES / "cuobjdump", scratch.name, what]) for what in ("-res-usage", "-sass"))
    return Compiled(
        registers=int(re.search(r"REG:(\d+)", usage).group(1)),
        spills=len(re.findall(r"\bSTL\b", sass)),
        shared=result.metadata.shared,
        tensor_cores=len(re.findall(TENSOR_CORES, sass)),
        async_copies=len(re.findall(ASYNC_COPIES, sass)),
        seconds=seconds,
    )


def check(source: Source, result: Compiled) -> list[str]:
    if result.error:
        return [result.error]
    wrong = []
    half = source.dtype in ("bfloat16", "float16")
    ceiling = SPILL_CEILING.get((source.label, source.dim, source.arch), 0)
    if source.label == "mask" and not {"first", "extra"}.isdisjoint(source.variant.split()):
        ceiling = MASK_CEILING
    if half and source.arch < 100 and result.spills > ceiling:
        wrong.append(f"{result.spills} spilled stores, at most {ceiling} allowed")
    if result.shared > SHARED_LIMIT[source.arch]:
        wrong.append(f"{result.shared} bytes of shared memory, the limit is {SHARED_LIMIT[source.arch]}")
    if half and source.label in launches.MATRIX_KERNELS and not result.tensor_cores:
        wrong.append("no tensor-core instruction")
    return wrong


def _work(selection: tuple, index: int) -> Compiled:
    return compiled(sources(*selection)[index])  # recorded in this process: kernels cannot be sent to it


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
    logging.getLogger("asa_ops").setLevel(logging.ERROR)  # that it compiles is known
    if args.quick:
        args.archs, args.dims, args.dtypes = [90], [256], ["bfloat16"]
        args.kernels = args.kernels or list(launches.MATRIX_KERNELS)
    selection = tuple(map(tuple, (args.archs, args.dims, args.dtypes, args.kernels)))
    todo = sources(*selection)
    print(f"triton {triton.__version__}, torch {torch.__version__}: {len(todo)} kernels to compile")
    print("arch kernel             dim dtype    warps stages  regs spills  shared mma copies  sec", flush=True)
    breaches = []
    with concurrent.futures.ProcessPoolExecutor(args.jobs) as pool:
        results = pool.map(functools.partial(_work, selection), range(len(todo)))
        for source, result in zip(todo, results, strict=True):
            wrong = check(source, result)
            breaches += [(source, reason) for reason in wrong]
            cut = f"{source.options.num_warps:5} {source.options.num_stages:6} {result.registers:5} {result.spills:6}"
            used = f"{result.shared:7} {result.tensor_cores:3} {result.async_copies:6} {result.seconds:4.1f}"
            note = f"{source.variant}{'  <-- ' if wrong else ''}{'; '.join(wrong)}"
            print(f"{source.arch:4} {source.label:18} {source.dim:3} {source.dtype:8} {cut} {used}  {note}", flush=True)
    for source, reason in breaches:
        print(f"sm_{source.arch} {source.label} D={source.dim} {source.dtype} {source.variant}: {reason}")
    print(f"{'FAILED' if breaches else 'OK'}: {len(todo)} kernels, {len(breaches)} breaches of the budget")
    sys.exit(bool(breaches))


if __name__ == "__main__":
    main()
