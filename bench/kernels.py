"""Every kernel of a call by torch's profiler: microseconds, launches, operations. A process that does what is left.

python -m bench.kernels FILE --impl triton cuda hopper
"""

import argparse
import collections
import dataclasses
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from . import accounting, progress, timings, workloads
from .accounting import Sparsity, kernel_operations
from .record import Kernel, Profile
from .workloads import Spec

REPEATS = 10
OTHERS = "kernels of PyTorch"
SPECS = [
    Spec("asa", "64x128", dim, 1, 1, "bfloat16", inputs, None)
    for inputs, dim in (("labels", 256), ("dense", 256), ("labels", 64))
]
# What the general CUDA kernel of sums computes in each of its forms, enum Form in csrc/cuda/asa/sums.cu.
FORMS = ("values", "dv", "dq, dk", "delta")


def short(name: str) -> str:
    """Return the short name of a kernel, of its name in C++ or Triton."""
    found = re.search(r"asa_(\w+?)_kernel", name)
    if not found:
        return OTHERS
    form = re.search(r"Form(?:\)|E)(\d)", name)
    return FORMS[int(form[1])] if found[1] == "sums" and form else found[1]


def by_kernel(events: Iterable[tuple[str, float]], flops: dict[str, int], repeats: int) -> dict[str, Kernel]:
    """Return the kernels of one of some equal calls, from all their launches (name, microseconds)."""
    seconds: collections.Counter[str] = collections.Counter()
    launches: collections.Counter[str] = collections.Counter()
    for name, microseconds in events:
        seconds[short(name)] += microseconds / 1e6 / repeats
        launches[short(name)] += 1
    if not seconds:
        raise RuntimeError("the profiler saw no kernels")
    return {name: Kernel(seconds[name], round(launches[name] / repeats), flops.get(name)) for name in seconds}


def operations(spec: Spec, sparsity: Sparsity) -> dict[str, int]:
    """Return the operations of CUDA kernels on the tiles they visit, as ``accounting.units`` counts them."""
    pairs = spec.tokens**2 * spec.heads * spec.batch

    def of(kernel: str, share: float) -> int:
        return kernel_operations(kernel, round(share * pairs), spec.dim, spec.dim, mutual=False)

    found = {"statistics": of("statistics", 1), "mask": of("mask", sparsity.plausible)}
    found |= {name: of(name, sparsity.active) for name in ("dq", "dv", "dkv")}
    return found | {"values": of("aggregate", sparsity.active), "dq, dk": 2 * found["dq"]}


def triton_operations(call: Callable, spec: Spec) -> dict[str, int]:
    """Return the operations of Triton's kernels; of dk and dv, which are launches of one kernel, together."""
    from .triton import launches  # where there is Triton

    found = launches.operations(call, spec.tokens)
    return found | {"dkv": sum(found.get(name, 0) for name in ("dk", "dv", "dk_dv", "dkv"))}


def launched(call: Callable) -> list[tuple[str, float]]:
    """Return the launches of REPEATS calls, (name, microseconds)."""
    for _ in range(3):  # what compiles
        call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(REPEATS):
            call()
        torch.cuda.synchronize()
    on_gpu = (x for x in profiler.events() if x.device_type == torch.autograd.DeviceType.CUDA)
    return [(x.name, x.time_range.elapsed_us()) for x in on_gpu]


def profiled(spec: Spec, impl: str) -> Profile:
    workload = workloads.build(spec, "cuda", [impl], [])
    call = workload.call(f"asa {impl}", True)
    if impl == "triton":
        flops = triton_operations(call, spec)
    else:
        flops = operations(spec, accounting.sparsity(workload.tensors, spec.grid))
    label = f"{spec.inputs} {spec.size}, D {spec.dim}"
    return Profile(label, f"asa {impl}", by_kernel(launched(call), flops, REPEATS))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="JSON lines of bench.progress")
    parser.add_argument("--impl", nargs="+", choices=timings.IMPLS, default=list(timings.IMPLS))
    options = parser.parse_args(arguments)

    def row(spec: Spec, impl: str) -> Callable[[], object]:
        return lambda: dataclasses.asdict(profiled(spec, impl))

    impls, why_not = workloads.runnable(SPECS[0], "cuda", timings.without_what_died(options.impl, options.file))
    print("\n".join(f"{impl}: {reason}" for impl, reason in why_not.items()))
    # "hopper" first: it is what nobody has measured.
    rows = {f"{spec.inputs} {spec.dim} {impl}": row(spec, impl) for spec in SPECS for impl in reversed(impls)}
    progress.work(options.file, rows)


if __name__ == "__main__":
    main()
