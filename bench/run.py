"""asa_attention, or another block, beside what else could be used: seconds, bytes, operations; one interleaved run.

    python -m bench.run                                     # a few minutes on two cores
    python -m bench.run --size 97x97 --dim 64 256 --inputs photo labels --mode fwd fwd+bwd --out results.json
    python -m bench.run --op non_local,mode=gaussian criss_cross --size 64x64 --dim 512
    python -m bench.run --device cuda --dtype bfloat16 --size 128x128 --dim 256
    python -m bench.run --sweep tokens survivors dim        # how cost grows; half an hour

Every combination of what is given is a case. Modes "fwd", without autograd, and "fwd+bwd" time every method once a
round, those more than ten times slower than the fastest in two rounds; on a GPU in a CUDA graph too, and ASA's Triton
kernels one by one. Mode "mem" counts the bytes that a call adds to the peak, of a fresh process on a CPU, of torch's
allocator on a GPU. GFLOP/s are of the operations that a method computes. docs/speed.md says how it is measured.

``--impl auto learning`` measures thresholds that learn, as those of a block do, beside constant ones.

Sweeps, each with everything else fixed, and after them the exponents of cost ~ tokens^e and cost ~ D^e:

    tokens      label maps, D = 64, sizes (--size) to 256x256 (65,536 tokens); from 20,000 tokens on, one round
    survivors   independent normal inputs at 64x64 and one threshold for all, from 0 (everybody survives) up
    dim         label maps at 64x64, D = 16 to 512
    calls       not how cost grows, but what calls cost that are so small that the host's share shows

Peers that are not installed are skipped, with a line that says so; of a method that fails the table says what it
raised. The exit status is 1 if one of ours failed. Each result is written as soon as it is there.
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from examples import files

from . import accounting, measure, progress, record, report, workloads
from .inputs import INPUTS
from .peers import INDIFFERENT, PEERS
from .record import MODES, Case, Kernel, Method, Record
from .workloads import Spec

try:
    from tqdm import tqdm

    shown = functools.partial(tqdm, desc="cases", unit="case", file=sys.stdout)
except ImportError:  # a GPU machine has torch, Triton and NumPy
    shown = iter

NO_BACKWARD = "has no backward on a CPU"
SIZES = ["32x32", "48x48", "64x64", "96x96", "128x128", "192x192", "256x256"]
ALPHAS = [0.0, 0.1, 0.25, 0.4, 0.5, 0.65, 0.8, 1.0, 1.5, 2.0, 4.0, 8.0, 16.0]
DIMS = [16, 32, 64, 128, 256, 512]
CALLS = [  # so little that what a call costs the host shows: one map, windows of a Swin network, many narrow heads
    {"size": "4x4"},
    {"size": "7x7", "dim": 32, "heads": 8, "batch": 512},
    {"size": "16x16", "dim": 8, "heads": 64},
]
REPEATS = 200  # of calls so small, back to back
LARGE = 20000  # tokens from which one round of a sweep is timed in place of --rounds; such calls take seconds


def measured(
    spec: Spec, mode: str, device: str, impls: list[str], peers: list[str], rounds: int, sweep: str = ""
) -> Case:
    """Measure one case of ``record``: implementations of ours and peers in rounds, after some that warm up."""
    workload = workloads.build(spec, device, impls, peers)
    methods = {name: Method() for name in workload.prepare}
    methods |= {name: Method(skipped=reason) for name, reason in workload.skipped.items()}
    kernels, sparsity = {}, {}
    if mode == "mem":
        _measure_bytes(spec, device, workload, methods)
    else:
        _measure_seconds(device, workload, methods, mode == "fwd+bwd", rounds)
    with _noted(methods[workload.ours[0]]):  # what is measured of ours alone
        if device == "cuda" and mode != "mem" and methods.get("asa triton", Method()).seconds:
            from .triton import launches  # where there is Triton

            call = workload.call("asa triton", mode == "fwd+bwd")
            flops = launches.operations(call, spec.tokens)
            timed = launches.kernel_seconds(call)
            kernels = {name: Kernel(*times, flops.get(name)) for name, times in timed.items()}
        if workload.tensors:
            sparsity = accounting.sparsity(workload.tensors, spec.grid)._asdict()
    return Case(*dataclasses.astuple(spec), mode, sweep, sparsity, workload.ours, methods, kernels)


@contextlib.contextmanager
def _noted(method: Method) -> Iterator[None]:
    """Note what is raised with a method, unless something is noted already: that is the finding."""
    try:
        yield
    except Exception as error:
        method.error = method.error or progress.describe(error)


def _measure_seconds(device, workload, methods, backward, rounds) -> None:
    calls = {}
    for name in workload.prepare:
        if backward and not _has_backward(name, device):
            methods[name].skipped = NO_BACKWARD
            continue
        with _noted(methods[name]):
            calls[name] = workload.call(name, backward)
            # A compiled function is no operator that is counted. Where else counting fails, timing tells why.
            if not name.startswith("flex"):
                with contextlib.suppress(Exception):
                    methods[name].flops = accounting.registered_flops(calls[name]) or None
    repeats = REPEATS if workload.grad_out.numel() < 2**14 else 1
    seconds, errors = measure.interleaved(calls, rounds, device, repeats)
    for name in calls:
        methods[name].seconds, methods[name].error = seconds[name], errors.get(name)
    if device == "cuda":
        ran = {name: x for name, x in calls.items() if seconds[name] and (name not in PEERS or PEERS[name].graph)}
        for name, times in measure.in_graphs(ran, rounds).items():
            methods[name].graph = times


def _measure_bytes(spec, device, workload, methods) -> None:
    for name, mode in itertools.product(workload.prepare, MODES[:2]):
        if mode == "fwd+bwd" and not _has_backward(name, device):
            continue
        # What dense attention takes does not depend on the input: it is measured once.
        same = dataclasses.replace(spec, inputs="iid", alpha=None) if name in INDIFFERENT else spec
        with _noted(methods[name]):
            methods[name].memory[mode] = measure.bytes_once(same, device, name, mode == "fwd+bwd")


def _has_backward(name: str, device: str) -> bool:
    return device != "cpu" or name not in PEERS or PEERS[name].backward_on_cpu


def failed(case: Case) -> list[str]:
    return [f"{case.label}: {name}: {case.methods[name].error}" for name in case.ours if case.methods[name].error]


def parsed(parse: Callable[[str], object], text: str) -> str:
    """Return the text, if ``parse`` takes it; what it raises is shown as every wrong argument."""
    try:
        parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number >= 1, got {text!r}")
    return int(text)


def threshold(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 <= float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"expected a finite number >= 0, got {text!r}")


def to_do(parser: argparse.ArgumentParser, options: argparse.Namespace) -> list[tuple[str, Spec, str]]:
    """Return what the options ask for, (sweep, spec, mode)."""
    if options.sweep:
        for name in ("op", "dim", "heads", "batch", "inputs", "alpha", "mode"):
            if getattr(options, name):
                parser.error(f"--sweep fixes --{name}")
        spec = Spec("asa", "64x64", 64, 1, 1, options.dtype, "labels", None)
        varied = {
            "tokens": [{"size": size} for size in options.size or SIZES],
            "survivors": [{"inputs": "iid", "alpha": alpha} for alpha in ALPHAS],
            "dim": [{"dim": dim} for dim in DIMS],
            "calls": [{"inputs": "iid", "alpha": 1.0, **each} for each in CALLS],
        }
        found = [(sweep, dataclasses.replace(spec, **each)) for sweep in options.sweep for each in varied[sweep]]
        return [(*x, mode) for x in found for mode in MODES if mode != "mem" or x[0] == "tokens"]
    ops = options.op or ["asa"]
    kinds = options.inputs or ([name for name in INPUTS if name != "dense"] if ops == ["asa"] else ["iid"])
    heads, batch = options.heads or 1, options.batch or 1
    if ops != ["asa"] and (kinds != ["iid"] or heads > 1 or options.alpha):
        parser.error("blocks take --inputs iid, --heads 1 and no --alpha: their cost depends on none of these")
    every = ops, options.size or ["64x64"], options.dim or [64], kinds, options.alpha or [None], options.mode or MODES
    try:
        return [
            ("", Spec(op, size, dim, heads, batch, options.dtype, kind, alpha), mode)
            for op, size, dim, kind, alpha, mode in itertools.product(*every)
        ]
    except ValueError as error:
        parser.error(f"--size: {error}")


def start(parser: argparse.ArgumentParser, options: argparse.Namespace, specs: list[Spec]) -> Record:
    """Check what the options ask for, and return the record that results of ``specs`` go to."""
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: torch {torch.__version__} finds no CUDA device")
    if options.out:
        files.check_out(parser, options.out)
        files.check([options.out])
    for spec in specs:
        try:
            found, why_not = workloads.runnable(spec, options.device, options.impl)
        except ValueError as error:
            parser.error(f"--impl: {error}")
        if not found:
            parser.error("; ".join(f"--impl {impl}: {reason}" for impl, reason in why_not.items()))
    environment = measure.environment(options.device)
    results = Record(environment, {}, [])
    if options.add and options.out and options.out.exists():
        try:
            results = record.read(options.out)
        except ValueError as error:
            parser.error(f"--add: {error}")
        for name in (set(environment) | set(results.environment)) - {"commit"}:
            here, there = environment.get(name), results.environment.get(name)
            if here != there:
                parser.error(f"--add: {options.out} has {name} = {there!r}, here it is {here!r}")
        if others := {case.dtype for case in results.cases} - {options.dtype}:
            parser.error(f"--add: {options.out} is of {', '.join(sorted(others))}, got --dtype {options.dtype}")
        commits = [*str(results.environment.get("commit")).split(", "), str(environment["commit"])]
        results.environment = environment | {"commit": ", ".join(dict.fromkeys(commits))}
    # The machine may have been slow when they were measured before.
    for name, value in measure.ceilings(options.device, getattr(torch, options.dtype)).items():
        results.ceilings[name] = max(value, results.ceilings.get(name, 0))
    return results


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = functools.partial(parsed, lambda text: Spec("asa", text, 1, 1, 1, "float32", "iid", None))
    op = functools.partial(parsed, workloads.parse_op)
    parser.add_argument("--op", nargs="+", type=op, help=f"default: asa; {', '.join(workloads.OPS)}")
    parser.add_argument("--size", nargs="+", type=size, metavar="HxW", help="default: 64x64; L or TxHxW of other grids")
    parser.add_argument("--dim", nargs="+", type=positive, help="head dim; channels of a block (64)")
    parser.add_argument("--heads", type=positive)
    parser.add_argument("--batch", type=positive)
    parser.add_argument("--inputs", nargs="+", choices=INPUTS, help="default: all but dense; iid where op is a block")
    parser.add_argument("--alpha", nargs="+", type=threshold, help="one threshold for all pixels, not the input's")
    parser.add_argument("--mode", nargs="+", choices=MODES, help="default: all")
    parser.add_argument("--sweep", nargs="+", choices=[*report.SWEEPS, "calls"], help="see above")
    parser.add_argument("--impl", nargs="+", choices=workloads.IMPLS, default=["auto"], help="of attention (auto)")
    parser.add_argument("--peers", nargs="*", choices=PEERS, help="default: all; in a sweep sdpa flash and eager")
    parser.add_argument("--dtype", choices=workloads.DTYPES, default="float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=positive, default=7)
    parser.add_argument("--out", type=Path, help="write the seconds and bytes as JSON")
    parser.add_argument("--add", action="store_true", help="to what --out holds; of equal cases the new one stays")
    return parser


def main(given: list[str] | None = None) -> None:
    parser = arguments()
    options = parser.parse_args(given)
    todo = to_do(parser, options)
    if options.peers is None:
        options.peers = ["sdpa flash", "eager"] if options.sweep else list(PEERS)
    results = start(parser, options, [spec for _, spec, _ in todo])
    print("\n".join(f"{name}: {value}" for name, value in (results.environment | results.ceilings).items()), flush=True)
    mine = []
    for sweep, spec, mode in shown(todo):
        rounds = 1 if sweep and spec.tokens > LARGE else options.rounds
        case = measured(spec, mode, options.device, options.impl, options.peers, rounds, sweep)
        mine.append(case)
        results.add(case)
        if options.out:
            results.write(options.out)
    tables = report.inputs_table(mine, even=True), report.methods_table(mine), report.absent(mine)
    print(f"\n{report.joined(*tables, report.exponents(mine), report.crossings(mine))}")
    if wrong := [line for case in mine for line in failed(case)]:
        sys.exit("\n".join(["", "ours failed:", *wrong]))


if __name__ == "__main__":
    files.run(main)
