"""Other rows for the table of Triton configurations (``asa_ops/asa/triton/configs.py``), timed on this GPU.

    python -m bench.triton.tune                                   # the kernels of a call with head dim 256
    python -m bench.triton.tune --dim 64 --heads 4 --kernels statistics mask --grid 64x64

Every candidate takes the place of its kernel's row in whole calls, forward and backward. The table has the microseconds
of that kernel, those of all kernels together, and by how much the output differs from that of the table as it is.
Candidates are compiled side by side beforehand, in processes that share Triton's cache. A candidate may also cut the
work of its kernel into a given number of parts, which the next kernel sums.
"""

import argparse
import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch

from .. import measure, progress, workloads
from ..inputs import INPUTS
from . import launches

FORWARD = ("statistics", "mask", "aggregate")
KERNELS = (*FORWARD, "dq", "dk", "dv", "dkv")
SPLITS = (1, 2, 4, 8)
PROCESSES = 14


class Candidate(NamedTuple):
    kernel: str
    config: tuple  # a row of the table
    splits: int | None = None  # parts, None: as the library chooses

    def __str__(self) -> str:
        m, n, warps, stages, tma, chunk, _, registers = self.config
        text = f"{m:3} x {n:3}, {warps:2} warps, {stages} stages, chunk {chunk:3}{', TMA' if tma else ''}"
        text += f", {registers} registers" if registers else ""
        return text if self.splits is None else f"{text}, {self.splits} parts"


def candidates(kernel: str, dim: int, row, room: int) -> list[Candidate]:
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


def shared(kernel: str, config, dim: int) -> int:
    """Return the bytes of the tiles in shared memory, half precision: what is held, and what streams past in stages."""
    m, n, chunk = config.block_m, config.block_n, min(config.chunk, dim)
    held = {"mask": 0, "statistics": 1, "aggregate": 1, "dv": 1}.get(kernel, 2) * m * dim
    stream = {"mask": 2 * (m + n) * chunk, "statistics": n * dim}.get(kernel, 2 * n * dim)
    return 2 * (held + config.stages * stream)


def calls_on(spec: workloads.Spec) -> tuple[Callable[[], tuple], Callable[[], tuple]]:
    """Return a call, forward alone and with its backward: kernels of FORWARD are timed in the first."""
    workload = workloads.build(spec, "cuda", ["triton"], [])
    forward, both = (workload.call("asa triton", backward) for backward in (False, True))
    return lambda: (forward(),), both


def microseconds(call: Callable) -> dict[str, float]:
    return {name: 1e6 * seconds for name, (seconds, _) in launches.kernel_seconds(call).items()}


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
    parser.add_argument("--inputs", nargs="+", choices=INPUTS, default=["labels", "near-dense"])
    parser.add_argument("--compile", metavar="k/n", help="compile the k-th of n shares of the candidates, no more")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench.triton.tune needs a CUDA device")
    device = torch.cuda.get_device_properties(0)
    architecture = 90 if device.major >= 9 else 80
    rows = {name: launches.configuration(name, options.dim, architecture) for name in options.kernels}
    room = device.shared_memory_per_block_optin
    todo = [x for name, row in rows.items() if row for x in candidates(name, options.dim, row, room)]

    def placed(candidate: Candidate):
        return launches.configured(candidate.kernel, options.dim, architecture, candidate.config, candidate.splits)

    def attempt(kind: str, candidate: Candidate) -> tuple | str:
        try:
            with placed(candidate):
                result = calls[kind][candidate.kernel not in FORWARD]()
                torch.cuda.synchronize()
        except Exception as error:  # too much shared memory, too many registers: a finding
            return progress.describe(error)
        return result

    shape = options.grid, options.dim, options.heads, 1, "bfloat16"
    calls = {kind: calls_on(workloads.Spec("asa", *shape, kind, None)) for kind in options.inputs}
    if options.compile:
        share, shares = (int(part) for part in options.compile.split("/"))
        for candidate in todo[share::shares]:
            attempt(options.inputs[0], candidate)
        return
    expected = {kind: [call() for call in pair] for kind, pair in calls.items()}
    shares = min(PROCESSES, max(1, (os.cpu_count() or 1) - 1))  # the rest is compiled by processes side by side
    again = [sys.executable, "-m", "bench.triton.tune", *sys.argv[1:], "--compile"]
    for process in [subprocess.Popen([*again, f"{k}/{shares}"], cwd=measure.ROOT) for k in range(shares)]:
        process.wait()
    for kind, pair in calls.items():
        for title, call in zip(("forward", "forward and backward"), pair, strict=True):
            listed = ", ".join(f"{name} {us:.1f}" for name, us in microseconds(call).items())
            print(f"{kind}, {title}, us: {listed}")
    print(f"{'kernel':10} {'inputs':10} {'us':>7} {'all':>7} {'difference':>10}")
    for candidate in todo:
        backward = candidate.kernel not in FORWARD
        for kind, pair in calls.items():
            result = attempt(kind, candidate)
            if isinstance(result, str):
                print(f"{candidate.kernel:10} {kind:10} {'-':>7} {'-':>7} {'-':>10}  {candidate}: {result}", flush=True)
                break
            with placed(candidate):
                times = microseconds(pair[backward])
            off = difference(result, expected[kind][backward])
            figures = f"{times[candidate.kernel]:7.1f} {sum(times.values()):7.1f} {off:10.1e}"
            print(f"{candidate.kernel:10} {kind:10} {figures}  {candidate}", flush=True)


if __name__ == "__main__":
    main()
