"""How long one map takes over several processes: measured with a few on this machine, predicted for more.

    python -m bench.scaling                        # the page on the screen; minutes on two cores
    python -m bench.scaling --out docs/scaling.md

The model: a pass takes so many seconds for each of its pairs, measured with one thread; a process has its share of
them.
Tokens are copied into messages and out of them by every process, all of them. A message takes a latency and its bytes.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from asa_ops import asa_attention, distributed
from asa_ops.asa.types import Inputs
from asa_ops.distributed import collectives
from examples import files

from . import inputs, measure
from .report import table

DIM = 64
SIZES = (1, 2, 4, 8, 16, 32, 64)
TOKENS = tuple(2**e for e in range(14, 21))
LINKS = {"10 Gbit/s Ethernet": (1.25e9, 50e-6), "100 Gbit/s": (12.5e9, 5e-6)}  # bytes a second, seconds a message
MESSAGES = 12  # of a forward and a backward


@dataclass(frozen=True)
class Costs:
    """Seconds with one thread."""

    scan: float  # a pair
    aggregate: float  # a survivor, as the others
    rows: float
    columns: float
    whole: float  # a survivor in the backward of one process, which forms probabilities once
    copy: float  # a byte of a message
    survivors: float  # fraction of all pairs

    def compute(self, n: int, size: int) -> float:
        """Return the seconds of a forward and a backward of n tokens that ``size`` processes share evenly."""
        backward = self.whole if size == 1 else self.rows + self.columns
        of_pairs = self.scan + self.survivors * (self.aggregate + backward)
        return n * n * of_pairs / size + (self.copy * received(n, size) if size > 1 else 0)

    def communicate(self, n: int, size: int, link: tuple[float, float]) -> float:
        speed, latency = link
        return received(n, size) / speed + MESSAGES * latency if size > 1 else 0.0


def received(n: int, size: int) -> float:
    """Return how many bytes a process receives in a forward and a backward, float32, by the counts that tests check."""
    others = n * (1 - 1 / size)
    forward = others * (3 * DIM + 2) * 4 + others * (n / size) / 8
    backward = others * (DIM * 4 + 9 + 24)
    return forward + backward


def median_of(run: Callable[[], object], rounds: int) -> float:
    times = []
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


def find_costs(grid: tuple[int, int], rounds: int) -> Costs:
    """Measure every pass on a label map."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    ops, n = torch.ops.asa_ops, grid[0] * grid[1]
    query, key, value, alpha, beta = inputs.make("labels", grid, DIM)
    given = [*Inputs(query, key, value, alpha, beta, None), list(grid), [3, 3], 0, 0, True, DIM**-0.5]
    rows = [0, n]
    lse, *found, begun = ops.asa_rows_scan(*given, rows)
    bits, _, _, local = found
    out, _, survivors = ops.asa_rows_fwd(*given, rows, lse, *found, begun, bits)
    d_out, nan_rows = torch.ones_like(out), torch.zeros_like(lse, dtype=torch.bool)
    of_rows = d_out, nan_rows, survivors, *given, rows
    _, softmax, groups = ops.asa_rows_bwd(*of_rows, *found, bits)
    leaves = [x.clone().requires_grad_(i < 3) for i, x in enumerate((query, key, value, alpha, beta))]

    def backward() -> None:
        out = asa_attention(*leaves, grid=grid)
        begin = time.perf_counter()
        out.backward(d_out)
        whole.append(time.perf_counter() - begin)

    whole: list[float] = []
    median_of(backward, rounds)
    pairs = float(survivors.sum())
    message = [query, key, value]
    packed = collectives._pack(message)
    costs = Costs(
        scan=median_of(lambda: ops.asa_rows_scan(*given, rows), rounds) / n**2,
        aggregate=median_of(lambda: ops.asa_rows_fwd(*given, rows, lse, *found, begun, bits), rounds) / pairs,
        rows=median_of(lambda: ops.asa_rows_bwd(*of_rows, *found, bits), rounds) / pairs,
        columns=median_of(lambda: ops.asa_columns_bwd(*of_rows, bits, local, bits, softmax, groups), rounds) / pairs,
        whole=statistics.median(whole[1:]) / pairs,
        copy=median_of(lambda: collectives._unpack([collectives._pack(message)], message, [n]), rounds) / packed.nbytes,
        survivors=pairs / n**2,
    )
    torch.set_num_threads(threads)
    return costs


def _serve(rank: int, sizes: Sequence[int], grids: Sequence[tuple[int, int]], rounds: int, folder: str) -> None:
    """Time calls of every size in turn, and write what the slowest process of each took."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=max(sizes))
    groups = [dist.new_group(list(range(size))) for size in sizes]
    times: dict[tuple[int, int], list[float]] = {}
    for grid in grids:
        n = grid[0] * grid[1]
        tokens = inputs.make("labels", grid, DIM)
        for turn in range(rounds + 1):
            for size, group in zip(sizes, groups, strict=True):
                dist.barrier()
                if rank >= size:
                    continue
                own = slice(n * rank // size, n * (rank + 1) // size)
                mine = [x[:, :, own].contiguous().requires_grad_(i < 3) for i, x in enumerate(tokens)]
                dist.barrier(group)
                begin = time.perf_counter()
                if size == 1:
                    out = asa_attention(*mine, grid=grid)
                else:
                    out = distributed.asa_attention(*mine, grid=grid, group=group)
                out.sum().backward()
                taken = torch.tensor(time.perf_counter() - begin, dtype=torch.float64)
                dist.all_reduce(taken, dist.ReduceOp.MAX, group=group)
                if turn:
                    times.setdefault((n, size), []).append(float(taken))
    if rank == 0:
        torch.save({key: statistics.median(x) for key, x in times.items()}, f"{folder}/times")
    dist.barrier()
    os._exit(0)  # threads of gloo may abort a process that tears Python down


def time_processes(sizes: Sequence[int], grids: Sequence[tuple[int, int]], rounds: int) -> dict[tuple[int, int], float]:
    """Return seconds by (tokens, processes)."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_serve, (sizes, grids, rounds, folder), nprocs=max(sizes))
        return torch.load(f"{folder}/times")


def page(costs: Costs, times: dict[tuple[int, int], float], cores: int) -> str:
    """Return the page."""

    def seconds(x: float) -> str:
        return f"{x:.3g}"

    measured = []
    for (n, size), taken in sorted(times.items()):
        share = costs.compute(n, size) * max(1, size / cores)  # more processes than cores take turns
        alone = times[n, 1] / taken / min(size, cores)
        measured.append([f"{n:,}", str(size), seconds(taken), seconds(share), f"{alone:.2f}"])
    parts = [
        "# One map over many processes: how long it takes",
        f"A label map (`bench/inputs.py`), D = {DIM}, float32, one head, forward and backward, one thread a process. "
        f"Measured by `python -m bench.scaling` on {measure.processor()}, {cores} cores, commit {measure.commit()}.",
        "## Costs measured",
        table(
            ["of", "picoseconds"],
            [
                ["scan, a pair", f"{costs.scan * 1e12:.0f}"],
                ["aggregate, a survivor", f"{costs.aggregate * 1e12:,.0f}"],
                ["backward by rows, a survivor", f"{costs.rows * 1e12:,.0f}"],
                ["backward by columns, a survivor", f"{costs.columns * 1e12:,.0f}"],
                ["backward of one process, a survivor", f"{costs.whole * 1e12:,.0f}"],
                ["copies, a byte of a message", f"{costs.copy * 1e12:,.0f}"],
            ],
        ),
        f"{costs.survivors:.1%} of all pairs survive. The two backward passes of several processes form the "
        "probabilities of their pairs twice; one process does it once.",
        "## The model against measurements",
        "The model leaves out the time of messages, which stay on this machine. Efficiency: the time of one process, "
        "divided by that of several and by how many of them have a core.",
        table(["tokens", "processes", "seconds", "model", "efficiency"], measured),
    ]
    for name, link in LINKS.items():
        lines = []
        for n in TOKENS:
            whole = costs.compute(n, 1)
            cells = []
            for size in SIZES:
                taken = costs.compute(n, size) + costs.communicate(n, size, link)
                cells.append(f"{seconds(taken)} ({whole / taken / size:.2f})")
            dominated = [s for s in SIZES[1:] if costs.communicate(n, s, link) > costs.compute(n, s)]
            lines.append([f"{n:,}", *cells, str(dominated[0]) if dominated else "-"])
        parts += [
            f"## Predicted, {name} between processes",
            f"Seconds, and the efficiency in brackets; {link[0] / 1e9:g} GB/s and {link[1] * 1e6:g} microseconds a "
            "message, nothing overlapped. Last column: from how many processes on messages take longer than products.",
            table(["tokens", *(f"{size}" for size in SIZES), "messages dominate from"], lines),
        ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the page there")
    parser.add_argument("--sides", type=int, nargs="+", default=[64, 128], metavar="SIDE", help="of square maps")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4], metavar="R", help="1 among them")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    if 1 not in args.processes or min(args.processes) < 1:
        parser.error(f"--processes must be positive, 1 among them, got {args.processes}")
    if args.out:
        files.check_out(parser, args.out, ".md")
    grids = [(side, side) for side in args.sides]
    costs = find_costs(grids[-1], args.rounds)
    times = time_processes(sorted(set(args.processes)), grids, args.rounds)
    text = page(costs, times, os.cpu_count() or 1)
    if args.out:
        files.write(args.out, text)
    else:
        print(text)


if __name__ == "__main__":
    main()
