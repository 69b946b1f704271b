"""asa_attention, or another block, beside what else could be used: seconds, bytes, operations; one interleaved run.

    python bench/run.py                                     # a few minutes on two cores
    python bench/run.py --size 97x97 --dim 64 256 --inputs photo labels --mode fwd fwd+bwd --out results.json
    python bench/run.py --op non_local,mode=gaussian criss_cross --size 64x64 --dim 512
    python bench/run.py --device cuda --dtype bfloat16 --size 128x128 --dim 256

Every combination of what is given is a case. In modes "fwd" and "fwd+bwd" every round times every method once, one
after the other, so that a slow moment of the machine meets all of them: what counts are the medians of the rounds'
ratios. Methods more than ten times slower than the fastest take part in two rounds. Forward runs without autograd. In
mode "mem" the figures are the bytes that a call adds to the peak, forward and with the backward: of a fresh process on
a CPU, of torch's allocator on a GPU.

GFLOP/s are of the operations that a method computes, where that is known: what of all pairs it visits
(``accounting.units``) for ASA and dense attention, else what FlopCounterMode counts.

Peers that are not installed are skipped, with a line that says so; of a method that fails the table says what it
raised. The exit status is 1 if one of ours failed. Each result is written as soon as it is there.
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import math
import re
import sys
from pathlib import Path

import accounting
import measure
import record
import torch
import workloads
from inputs import INPUTS
from peers import INDIFFERENT, PEERS
from record import MODES, Case, Method, Record, files
from tqdm import tqdm
from workloads import Spec

from asa_ops.core import dispatch

NO_BACKWARD = "has no backward on a CPU"


def measured(
    spec: Spec, mode: str, impls: list[str], peers: list[str], rounds: int, tell=lambda name: None, sweep: str = ""
) -> Case:
    """Measure one case.

    Args:
        spec: op and input.
        mode: one of ``record.MODES``.
        impls: implementations of "asa".
        peers: what to compare with.
        rounds: to time; more come before to warm up.
        tell: is told what is being measured.
        sweep: see ``record.Case``.
    """
    tell("inputs")
    workload = workloads.build(spec, impls, peers)
    methods = {name: Method() for name in workload.prepare}
    methods |= {name: Method(skipped=reason) for name, reason in workload.skipped.items()}
    if mode == "mem":
        _measure_bytes(spec, workload, methods, tell)
    else:
        _measure_seconds(spec, workload, methods, mode == "fwd+bwd", rounds, tell)
    sparsity = {}
    if workload.tensors:
        tell("survivors")
        try:
            sparsity = accounting.sparsity(workload.tensors, spec.grid)._asdict()
        except Exception as error:  # ours, whose survivors are counted
            methods[workload.ours[0]].error = methods[workload.ours[0]].error or measure.describe(error)
    fields = {name: value for name, value in dataclasses.asdict(spec).items() if name != "device"}
    return Case(**fields, mode=mode, sweep=sweep, sparsity=sparsity, ours=workload.ours, methods=methods)


def _measure_seconds(spec, workload, methods, backward, rounds, tell) -> None:
    calls = {}
    for name in workload.prepare:
        tell(name)
        if backward and not _has_backward(name, spec.device):
            methods[name].skipped = NO_BACKWARD
            continue
        try:
            calls[name] = workload.call(name, backward)
        except Exception as error:  # whatever a method raises is the finding
            methods[name].error = measure.describe(error)
            continue
        # A compiled function is no operator that is counted. Where else counting fails, timing tells why.
        if not name.startswith("flex"):
            with contextlib.suppress(Exception):
                methods[name].flops = accounting.registered_flops(calls[name]) or None
    seconds, errors = measure.interleaved(calls, rounds, spec.device, tell)
    for name in calls:
        methods[name].seconds, methods[name].error = seconds[name], errors.get(name)


def _measure_bytes(spec, workload, methods, tell) -> None:
    workload.leaves, workload.parameters = [], []  # a process of its own makes them again
    for name, mode in itertools.product(workload.prepare, ("fwd", "fwd+bwd")):
        tell(f"{name}, bytes")
        if mode == "fwd+bwd" and not _has_backward(name, spec.device):
            continue
        # What dense attention takes does not depend on the input: it is measured once.
        same = dataclasses.replace(spec, inputs="iid", alpha=None) if name in INDIFFERENT else spec
        try:
            methods[name].memory[mode] = _bytes(same, name, mode == "fwd+bwd")
        except Exception as error:
            methods[name].error = measure.describe(error)


@functools.cache
def _bytes(spec: Spec, name: str, backward: bool) -> int:
    if spec.device == "cpu":
        return measure.bytes_in_fresh_process(dataclasses.asdict(spec), name, backward)
    return workloads.bytes_of(spec, name, backward)


def _has_backward(name: str, device: str) -> bool:
    return device != "cpu" or name not in PEERS or PEERS[name].backward_on_cpu


def failed(case: Case) -> list[str]:
    """Return what went wrong with ours."""
    return [f"{case.label}: {name}: {case.methods[name].error}" for name in case.ours if case.methods[name].error]


# The table.

FRACTIONS = ("density", "active", "candidates")
TITLE = ("case", "survivors", "method", "ms", "ours / it (quartiles)", "MB", "MB with backward", "GFLOP/s", "")


def rows(case: Case) -> list[list[str]]:
    """Return the lines of the table for one case, ours first; what was skipped has none."""
    ours = case.ours[0]
    lines = []
    for name, method in case.methods.items():
        middle, ratio = case.median(name), case.ratio(ours, name)
        operations = accounting.operations_of(case, name) or method.flops
        if method.skipped:
            continue
        lines.append(
            [
                case.label,
                f"{100 * case.sparsity['density']:.1f} %" if case.sparsity else "-",
                name,
                f"{1e3 * middle:.1f}" if middle else "-",
                f"{ratio[1]:.2f} ({ratio[0]:.2f}-{ratio[2]:.2f})" if ratio and name not in case.ours else "-",
                *(f"{method.memory[mode] / 1e6:.1f}" if mode in method.memory else "-" for mode in MODES[:2]),
                f"{operations / middle / 1e9:.0f}" if middle and operations else "-",
                method.error or "",
            ]
        )
    return lines


def skips(cases: list[Case]) -> str:
    """Return a line for every method that was not tried, and why."""
    found = {(name, m.skipped): None for case in cases for name, m in case.methods.items() if m.skipped}
    return "\n".join(f"skipped {name}: {reason}" for name, reason in found)


def table(header: tuple[str, ...], lines: list[list[str]]) -> str:
    """Return a Markdown table with even columns."""
    cells = [list(header), *lines]
    widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
    told = [" | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
    told.insert(1, " | ".join("-" * max(width, 3) for width in widths))
    return "\n".join(f"| {line} |" for line in told)


def summary(cases: list[Case]) -> str:
    """Return every row, without repeating the case, and what the input looks like."""
    lines, before = [], None
    for line in itertools.chain.from_iterable(map(rows, cases)):
        lines.append(["", "", *line[2:]] if line[0] == before else line)
        before = line[0]
    text = table(TITLE, lines)
    seen = {}
    for case in cases:
        if case.sparsity:
            alpha = "" if case.alpha is None else f" alpha={case.alpha:g}"
            seen[f"{case.inputs}{alpha} {case.size}, {case.dim}"] = case.sparsity
    if seen:
        told = [
            [label, f"{x['survivors']:.1f}", *(f"{100 * x[name]:.1f} %" for name in FRACTIONS)]
            for label, x in seen.items()
        ]
        header = ("input", "survivors a row", "of all pairs", "active tiles 64 x 64", "candidates")
        text = f"{table(header, told)}\n\n{text}"
    return "\n\n".join(filter(None, [text, skips(cases)]))


# The command line.


def size(text: str) -> str:
    if not re.fullmatch(r"[1-9]\d{0,4}x[1-9]\d{0,4}", text):
        raise argparse.ArgumentTypeError(f"expected HxW, as 64x64, got {text!r}")
    return text


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number >= 1, got {text!r}")
    return int(text)


def threshold(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a finite number >= 0, got {text!r}")
    return value


def op(text: str) -> str:
    try:
        workloads.parse_op(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def add_common(parser: argparse.ArgumentParser) -> None:
    """Add what the benchmarks have in common."""
    parser.add_argument(
        "--impl", nargs="+", choices=dispatch.NAMES, default=["auto"], help="of asa and criss_cross_attention (auto)"
    )
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS), help="default: all; none: no name")
    parser.add_argument("--dtype", choices=workloads.DTYPES, default="float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=positive, default=7)
    parser.add_argument("--out", type=Path, help="write the seconds and bytes as JSON")
    parser.add_argument("--add", action="store_true", help="to what --out holds; of equal cases the new one stays")


def start(parser: argparse.ArgumentParser, options: argparse.Namespace, todo: list[tuple[Spec, str]]) -> Record:
    """Check what the options ask for, and return the record that results of ``todo``, (spec, mode), go to."""
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: torch {torch.__version__} finds no CUDA device")
    if options.out:
        files.check_out(parser, options.out)
        files.check([options.out])
    try:
        for impl, (spec, _) in itertools.product(options.impl, todo):
            if call := workloads.dispatched(spec):
                dispatch.resolve(call, impl)
    except RuntimeError as error:
        parser.error(f"--impl {impl}: {error}")
    if options.impl != ["auto"] and (without := [spec.op for spec, _ in todo if not workloads.dispatched(spec)]):
        parser.error(f"--impl: {without[0]} has one implementation")
    environment = measure.environment(options.device)
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
        return results
    return Record(environment, measure.ceilings(options.device, getattr(torch, options.dtype)), [])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", nargs="+", type=op, default=["asa"], help=f"{', '.join(workloads.OPS)}")
    parser.add_argument("--size", nargs="+", type=size, default=["64x64"], metavar="HxW")
    parser.add_argument("--dim", nargs="+", type=positive, default=[64], help="head dim; channels of a block")
    parser.add_argument("--heads", type=positive, default=1)
    parser.add_argument("--batch", type=positive, default=1)
    parser.add_argument("--inputs", nargs="+", choices=INPUTS, help="default: all but dense; iid where op is a block")
    parser.add_argument("--alpha", nargs="+", type=threshold, help="one threshold for all pixels, not the input's")
    parser.add_argument("--mode", nargs="+", choices=MODES, default=list(MODES))
    add_common(parser)
    options = parser.parse_args(arguments)
    kinds = options.inputs or ([name for name in INPUTS if name != "dense"] if options.op == ["asa"] else ["iid"])
    if options.op != ["asa"] and (kinds != ["iid"] or options.heads > 1 or options.alpha):
        parser.error("blocks take --inputs iid, --heads 1 and no --alpha: their cost depends on none of these")
    todo = [
        (Spec(op, size, dim, options.heads, options.batch, options.dtype, kind, alpha, options.device), mode)
        for op in options.op
        for size in options.size
        for dim in options.dim
        for kind in kinds
        for alpha in options.alpha or [None]
        for mode in options.mode
    ]
    results = start(parser, options, todo)
    print("\n".join(f"{name}: {value}" for name, value in (results.environment | results.ceilings).items()), flush=True)
    mine, wrong = [], []
    with tqdm(todo, desc="cases", unit="case", file=sys.stdout) as bar:
        for spec, mode in bar:
            case = measured(spec, mode, options.impl, options.peers, options.rounds, bar.set_postfix_str)
            mine.append(case)
            wrong += failed(case)
            results.add(case)
            if options.out:
                results.write(options.out)
    print(f"\n{summary(mine)}")
    if wrong:
        sys.exit("\n".join(["", "ours failed:", *wrong]))


if __name__ == "__main__":
    files.run(main)
