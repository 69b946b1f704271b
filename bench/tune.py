"""Other rows for the table of Triton configurations (``asa_ops/asa/triton/configs.py``), timed on this GPU.

    PYTHONPATH=. python bench/tune.py                                   # the kernels of a call with head dim 256
    PYTHONPATH=. python bench/tune.py --dim 64 --heads 4 --kernels statistics mask --grid 64x64

Every candidate takes the place of its kernel's row in whole calls, forward and backward; told are the microseconds of
that kernel and of all kernels together, and by how much the output differs from that of the table as it is. Candidates
are compiled side by side beforehand, in processes that share Triton's cache. A candidate may also cut the work of its
kernel into a given number of parts, which the next kernel sums.
"""

import argparse
import itertools
import os
import subprocess
import sys
from typing import NamedTuple
from unittest import mock

import gpu_timings
import inputs
import torch

from asa_ops.asa.triton import configs as triton_configs
from asa_ops.asa.triton import problem as triton_problem
from asa_ops.asa.triton.configs import HALF, Config

FORWARD = ("statistics", "mask", "aggregate")
KERNELS = (*FORWARD, "dq", "dk", "dv", "dkv")
SPLITS = (1, 2, 4, 8)
PROCESSES = 14


class Candidate(NamedTuple):
    kernel: str
    config: Config
    splits: int | None = None  # parts, None: as the library chooses

    def __str__(self) -> str:
        m, n, warps, stages, tma, chunk, _, registers = self.config
        text = f"{m:3} x {n:3}, {warps:2} warps, {stages} stages, chunk {chunk:3}{', TMA' if tma else ''}"
        text += f", {registers} registers" if registers else ""
        return text if self.splits is None else f"{text}, {self.splits} parts"


def candidates(kernel: str, dim: int, row: Config, room: int) -> list[Candidate]:
    """Return what to try in place of ``row``: first it, then other blocks that fit into ``room``, then other parts."""
    if kernel == "mask":
        found = [
            row._replace(block_m=64, block_n=64, warps=4, stages=stages, chunk=chunk, registers=registers)
            for chunk, stages, registers in itertools.product((32, 64), (2, 3, 4), (None, 168, 128))
        ]
    else:
        columns = (64, 128) if kernel == "statistics" else (32, 64, 128)
        found = [
            row._replace(block_m=m, block_n=n, warps=warps, stages=stages)
            for (m, warps), n, stages in itertools.product([(64, 4), (128, 8)], columns, (2, 3, 4, 5, 6))
        ]
    found = [config for config in dict.fromkeys(found) if config != row and shared(kernel, config, dim) <= room]
    parts = [Candidate(kernel, row, splits) for splits in SPLITS] if kernel != "mask" else []
    return [Candidate(kernel, config) for config in (row, *found)] + parts


def shared(kernel: str, config: Config, dim: int) -> int:
    """Return the bytes of the tiles in shared memory, half precision: what is held, and what streams past in stages."""
    m, n, chunk = config.block_m, config.block_n, min(config.chunk, dim)
    held = {"mask": 0, "statistics": 1, "aggregate": 1, "dv": 1}.get(kernel, 2) * m * dim
    stream = {"mask": 2 * (m + n) * chunk, "statistics": n * dim}.get(kernel, 2 * n * dim)
    return 2 * (held + config.stages * stream)


class Bench:
    """Whole calls on one input."""

    def __init__(self, kind: str, grid: tuple[int, int], dim: int, heads: int):
        tensors = [x.cuda() for x in inputs.make(kind, grid, dim, heads)]
        tensors[:3] = [x.bfloat16() for x in tensors[:3]]
        self.forward = gpu_timings.runner("asa", tensors, grid, False, None)
        self.both = gpu_timings.runner("asa", tensors, grid, True, None)

    def run(self, kernel: str):
        return (self.forward if kernel in FORWARD else self.both)()

    def times(self, kernel: str) -> dict[str, float]:
        """Return the microseconds of every kernel."""
        run = self.forward if kernel in FORWARD else self.both
        return {name: 1e3 * x["ms"] for name, x in gpu_timings.kernel_times(run).items()}


def placed(candidate: Candidate, dim: int, architecture: int):
    """Return a context in which a candidate is its kernel's row."""
    key = (candidate.kernel, max(64, dim), HALF, architecture)
    table = mock.patch.dict(triton_configs._TABLE, {key: candidate.config})
    if candidate.splits is None:
        return table
    library = triton_problem.Problem.splits

    def splits(problem, programs, limit):
        return candidate.splits if limit == triton_problem.MAX_SPLITS else library(problem, programs, limit)

    return _both(table, mock.patch.object(triton_problem.Problem, "splits", splits))


class _both:
    def __init__(self, *contexts):
        self.contexts = contexts

    def __enter__(self):
        for context in self.contexts:
            context.__enter__()

    def __exit__(self, *error):
        for context in reversed(self.contexts):
            context.__exit__(*error)


def attempt(bench: Bench, candidate: Candidate, dim: int, architecture: int):
    """Return the results of a call with a candidate, or what went wrong."""
    try:
        with placed(candidate, dim, architecture):
            result = bench.run(candidate.kernel)
            torch.cuda.synchronize()
    except Exception as error:  # too much shared memory, too many registers: a finding
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['?'])[0][:80]}"
    return result


def difference(result: tuple, expected: tuple) -> float:
    """Return the largest relative error, in norm, of any of the results."""
    pairs = zip(result, expected, strict=True)
    return max(((x.float() - y.float()).norm() / y.float().norm().clamp(min=1e-9)).item() for x, y in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--dim", type=int, choices=[64, 128, 256], default=256)
    parser.add_argument("--heads", type=int, default=1)
    parser.add_argument("--grid", default="64x128", help="HxW (64x128)")
    parser.add_argument("--inputs", nargs="+", choices=inputs.INPUTS, default=["labels", "near-dense"])
    parser.add_argument("--compile", metavar="k/n", help="compile the k-th of n shares of the candidates, no more")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench/tune.py needs a CUDA device")
    device = torch.cuda.get_device_properties(0)
    architecture = 90 if device.major >= 9 else 80
    grid = tuple(int(side) for side in options.grid.split("x"))
    rows = {name: triton_configs.find(name, options.dim, torch.bfloat16, architecture) for name in options.kernels}
    room = device.shared_memory_per_block_optin
    todo = [x for name, row in rows.items() if row for x in candidates(name, options.dim, row, room)]
    benches = {kind: Bench(kind, grid, options.dim, options.heads) for kind in options.inputs}
    first = benches[options.inputs[0]]
    if options.compile:
        share, shares = (int(part) for part in options.compile.split("/"))
        for candidate in todo[share::shares]:
            attempt(first, candidate, options.dim, architecture)
        return
    expected = {
        kind: {True: bench.forward(), False: bench.both()} for kind, bench in benches.items()
    }  # compiles the rest
    shares = min(PROCESSES, max(1, (os.cpu_count() or 1) - 1))
    again = [sys.executable, __file__, *sys.argv[1:], "--compile"]
    for process in [subprocess.Popen([*again, f"{k}/{shares}"]) for k in range(shares)]:
        process.wait()
    for kind, bench in benches.items():
        for title, kernel in (("forward", FORWARD[0]), ("forward and backward", KERNELS[-1])):
            told = ", ".join(f"{name} {us:.1f}" for name, us in bench.times(kernel).items())
            print(f"{kind}, {title}, us: {told}")
    print(f"{'kernel':10} {'inputs':10} {'us':>7} {'all':>7} {'difference':>10}")
    for candidate in todo:
        for kind, bench in benches.items():
            result = attempt(bench, candidate, options.dim, architecture)
            if isinstance(result, str):
                print(f"{candidate.kernel:10} {kind:10} {'-':>7} {'-':>7} {'-':>10}  {candidate}: {result}", flush=True)
                break
            with placed(candidate, options.dim, architecture):
                times = bench.times(candidate.kernel)
            off = difference(result, expected[kind][candidate.kernel in FORWARD])
            told = f"{times[candidate.kernel]:7.1f} {sum(times.values()):7.1f} {off:10.1e}"
            print(f"{candidate.kernel:10} {kind:10} {told}  {candidate}", flush=True)


if __name__ == "__main__":
    main()
