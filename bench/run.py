"""asa_attention on a CPU beside dense attention and the published eager formula, in one interleaved run.

    python bench/run.py                                   # half an hour on two cores
    python bench/run.py --sizes 4096 --dims 64 --out results.json

Every round times every method once, one after the other, so that a slow moment of the machine meets all of them; the
table shows medians of the rounds' ratios to F.scaled_dot_product_attention with their quartiles. Memory is what a call
adds to the peak of a fresh process.

A part of the ratio is not sparsity but a faster matrix product than that of torch's BLAS. So the table also shows the
rate of our own, and the forward in units of it: one product of all queries with all keys. Its time is what pass 1
(scores, lse, thresholds and bits) takes more at twice the head dim.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from inputs import INPUTS, SIDES
from tqdm import tqdm

from asa_ops import asa_attention
from asa_ops.asa import reference

EAGER_LIMIT = 9409  # tokens; its ten or so N x N matrices are 7 GB at 16384 in the forward alone


def method(name: str, query, key, value, alpha, beta, grid):
    """Return one attention output by the named method."""
    if name == "sdpa":
        return torch.nn.functional.scaled_dot_product_attention(query, key, value)
    if name == "eager":
        return reference.asa_attention(query, key, value, alpha, beta, grid=grid, published=True)
    if name == "pass 1":  # nobody survives
        return asa_attention(query, key, value, torch.full_like(alpha, torch.inf), impl="cpu")
    if name == "pass 1, 2 D":
        query, key = (torch.cat([x, x], -1) for x in (query, key))
        return method("pass 1", query, key, value, alpha, beta, grid)
    return asa_attention(query, key, value, alpha, beta, grid=grid, impl=name)


def run(name: str, tensors, grid, backward: bool) -> None:
    query, key, value, alpha, beta = tensors
    if backward:
        query, key, value = (x.detach().requires_grad_() for x in (query, key, value))
    with torch.set_grad_enabled(backward):
        out = method(name, query, key, value, alpha, beta, grid)
    if backward:
        out.backward(value.detach())


def peak() -> int:
    """Return this process's peak of resident memory in bytes (Linux; ru_maxrss would include the parent's)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def memory(name: str, kind: str, n: int, dim: int, backward: bool) -> float:
    """Return the bytes that a call adds to the peak of a fresh process."""
    program = (
        "import sys; import run; from inputs import INPUTS, SIDES\n"
        "name, kind, n, dim, backward = sys.argv[1:]; n, dim, backward = int(n), int(dim), backward == 'True'\n"
        "tensors = INPUTS[kind](n, dim)\n"
        "run.run(name, [x[:, :, :64] for x in tensors], (8, 8), backward)\n"
        "before = run.peak(); run.run(name, tensors, (SIDES[n],) * 2, backward); print(run.peak() - before)"
    )
    arguments = [name, kind, str(n), str(dim), str(backward)]
    folder = Path(__file__).parent
    result = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=folder, check=True, capture_output=True, text=True
    )
    return float(result.stdout)


def case(kind: str, n: int, dim: int, backward: bool, rounds: int, bar: tqdm) -> dict:
    tensors, grid = INPUTS[kind](n, dim), (SIDES[n],) * 2
    slow = ["blocked", *(["eager"] if n <= EAGER_LIMIT else [])]
    names = ["sdpa", "cpu", *([] if backward else ["pass 1", "pass 1, 2 D"]), *slow]
    seconds = {name: [] for name in names}
    for i in range(rounds + 2):  # the first two warm up
        for name in names:
            if name in slow and i not in (1, 2):
                continue  # far slower: once, and once to warm up, is enough for their ratio
            start = time.perf_counter()
            run(name, tensors, grid, backward)
            if i > 1:
                seconds[name].append(time.perf_counter() - start)
            bar.update()
    _, stats = asa_attention(*tensors, grid=grid, return_stats=True)
    result = {
        "inputs": kind,
        "N": n,
        "D": dim,
        "mode": "fwd+bwd" if backward else "fwd",
        "density": stats.survivors.double().mean().item() / n,
        "seconds": seconds,
        "memory": {name: memory(name, kind, n, dim, backward) for name in ("sdpa", "cpu", *slow[1:])},
    }
    if not backward:
        once, twice = (statistics.median(seconds[name]) for name in ("pass 1", "pass 1, 2 D"))
        result["seconds of a product"] = twice - once
        result["product GF/s"] = 2 * n**2 * dim / (twice - once) / 1e9
    return result


def quartiles(values: list[float]) -> list[float]:
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3


def row(result: dict) -> str:
    seconds = result["seconds"]
    low, middle, high = quartiles([a / b for a, b in zip(seconds["cpu"], seconds["sdpa"], strict=True)])
    cpu, memory = statistics.median(seconds["cpu"]), result["memory"]
    over = {name: f"{seconds[name][0] / cpu:.1f} x" if name in seconds else "-" for name in ("eager", "blocked")}
    unit = f"{cpu / result['seconds of a product']:.2f}" if "pass 1" in seconds else "-"
    rate = f"{result['product GF/s']:.0f}" if "pass 1" in seconds else "-"
    less = f"{memory['cpu'] / memory['eager']:.3f}" if "eager" in memory else "-"
    return (
        f"| {result['inputs']} | {result['N']} | {result['D']} | {result['mode']} | {100 * result['density']:.1f} % "
        f"| {1e3 * cpu:.0f} | {middle:.2f} ({low:.2f}-{high:.2f}) | {over['eager']} | {over['blocked']} | {unit} "
        f"| {rate} | {memory['cpu'] / 1e6:.0f} | {memory['sdpa'] / 1e6:.0f} | {less} |"
    )


TITLE = """| inputs | N | D | mode | density | ms | / SDPA (quartiles) | eager / ours | blocked / ours | / product \
| GF/s | MB | SDPA MB | / eager MB |
|---|---|---|---|---|---|---|---|---|---|---|---|---|---|"""


def commit() -> str:
    folder = Path(__file__).parent
    result = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=folder, capture_output=True, text=True)
    return result.stdout.strip() or "unknown"


def processor() -> str:
    """Return the processor's name, with its family and model where Linux tells: names of virtual ones say little."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    info = dict(line.split(":", 1) for line in lines if ":" in line)
    info = {key.strip(): value.strip() for key, value in info.items()}
    name, *numbers = (info.get(key, "?") for key in ("model name", "cpu family", "model"))
    return f"{name} (family {numbers[0]}, model {numbers[1]})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", choices=SIDES, default=list(SIDES), help="tokens")
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 256], help="head dims")
    parser.add_argument("--inputs", nargs="+", choices=INPUTS, default=list(INPUTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the raw seconds and bytes as JSON")
    options = parser.parse_args()
    environment = {
        "commit": commit(),
        "processor": processor(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "instruction set": ["portable", "AVX2", "AVX-512"][torch.ops.asa_ops.cpu_isa()],
    }
    cases = [(k, n, d, b) for n in options.sizes for d in options.dims for b in (False, True) for k in options.inputs]
    results = []
    with tqdm(desc="calls", unit="call") as bar:
        for kind, n, dim, backward in cases:
            results.append(case(kind, n, dim, backward, options.rounds, bar))
            bar.write(row(results[-1]))
    print(f"\n{environment}\n\n{TITLE}")
    print("\n".join(row(result) for result in results))
    if options.out:
        options.out.write_text(json.dumps({"environment": environment, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
