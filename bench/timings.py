"""What the GPU suite times, the most important first: a process that does what is left of it.

    python -m bench.timings FILE --impl triton cuda hopper

FILE gets a line of ``progress`` for every case of ``record``, what the machine does at most, and what first calls take.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from . import measure, progress, run, workloads
from .record import MODES
from .workloads import Spec

ROUNDS = 15
SECONDS = 90  # that a row may take: FlexAttention compiles for long
IMPLS = ("triton", "cuda", workloads.HOPPER)
SDPA = ("sdpa cudnn", "sdpa flash", "sdpa efficient")
CALLS = MODES[:2]
CEILINGS, FIRST_CALL = "ceilings", "first call"  # rows that are no cases


class Row(NamedTuple):
    """Cases, one for each mode."""

    inputs: str
    size: str = "64x128"
    dim: int = 256
    batch: int = 1
    dtype: str = "bfloat16"
    peers: tuple[str, ...] = SDPA
    modes: tuple[str, ...] = CALLS

    @property
    def spec(self) -> Spec:
        return Spec("asa", self.size, self.dim, 1, self.batch, self.dtype, self.inputs, None)

    def name(self, mode: str) -> str:
        more = [peer for peer in self.peers if peer not in SDPA]
        shape = f"{self.dtype} {self.inputs} {self.size}, D {self.dim}, B {self.batch}, {mode}"
        return shape + (f", beside {', '.join(more)}" if more else "")


ROWS = [
    Row("labels"),
    Row("dense"),
    Row("labels", batch=4),
    Row("labels", "128x128"),
    *(Row(inputs) for inputs in ("photo", "conv", "iid")),
    *(Row(inputs, dim=64) for inputs in ("labels", "dense")),
    *(Row(inputs, "97x97") for inputs in ("labels", "dense")),
    Row("labels", dim=128),
    *(Row("labels", dim=dim, dtype="float16") for dim in (256, 128, 64)),
    Row("dense", batch=4),
    Row("labels", dim=64, batch=4),
    Row("dense", "128x128"),
    # Again beside what is slow, or compiles for long.
    *(Row(inputs, "97x97", peers=(*SDPA, "xformers", "eager")) for inputs in ("labels", "dense")),
    Row("labels", peers=(*SDPA, "flex", "flex + mask")),
    *(Row(inputs, size) for size in ("97x97", "128x128") for inputs in ("photo", "conv", "iid")),
    *(Row("labels", size, dim=64) for size in ("97x97", "128x128")),
    *(Row("labels", size, peers=(*SDPA, "eager"), modes=("mem",)) for size in ("97x97", "128x128")),
]


def cases(impls: list[str]) -> dict[str, Callable[[], object]]:
    """Return what measures a case, by name."""

    def measured(row: Row, mode: str) -> Callable[[], object]:
        return lambda: dataclasses.asdict(run.measured(row.spec, mode, "cuda", impls, list(row.peers), ROUNDS))

    return {row.name(mode): measured(row, mode) for row in ROWS for mode in row.modes}


def first_calls() -> dict[str, float]:
    """Return the seconds of first calls, in a process and with a compiler cache of their own."""
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-m", "bench.timings", "--first-call"]
        environment = os.environ | {"TRITON_CACHE_DIR": cache}
        printed = subprocess.run(command, cwd=measure.ROOT, env=environment, check=True, capture_output=True, text=True)
    return json.loads(printed.stdout.strip().splitlines()[-1])


def first_call() -> dict[str, float]:
    """Return the seconds of the first calls in this process; of importing asa_ops, in another one."""
    imported = "import time, torch; start = time.perf_counter(); import asa_ops; print(time.perf_counter() - start)"
    spec = Spec("asa", "64x64", 256, 1, 1, "bfloat16", "labels", None)
    seconds = {"CUDA context": measure.seconds_of(lambda: torch.zeros(1, device="cuda"), "cpu")}
    seconds["import asa_ops"] = float(subprocess.check_output([sys.executable, "-c", imported]))
    workload = workloads.build(spec, "cuda", ["triton"], [])
    both = workload.call("asa triton", True)
    seconds["first forward"] = measure.seconds_of(workload.call("asa triton", False), "cuda")
    seconds["first forward and backward after it"] = measure.seconds_of(both, "cuda")
    return seconds | {"the next": measure.seconds_of(both, "cuda")}


def without_what_died(impls: list[str], file: Path) -> list[str]:
    """Return the implementations without the newest kernels, if a process ended in a row: it was likely them."""
    events = progress.read(file)
    died = progress.died(events) or any(x.get("message") == progress.ENDED for x in events)
    return [impl for impl in impls if not (died and impl == workloads.HOPPER)]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?", help="JSON lines of bench.progress")
    parser.add_argument("--impl", nargs="+", choices=IMPLS, default=list(IMPLS))
    parser.add_argument("--first-call", action="store_true", help="print what a first call takes, as JSON")
    options = parser.parse_args(arguments)
    if options.first_call:
        print(json.dumps(first_call()))
        return
    if not options.file:
        parser.error("a file is missing")
    others = {CEILINGS: lambda: measure.ceilings("cuda", torch.bfloat16), FIRST_CALL: first_calls}
    progress.work(options.file, cases(without_what_died(options.impl, options.file)) | others, SECONDS)


if __name__ == "__main__":
    main()
