"""What the GPU suite makes of its results: goals judged, and the summary. Nothing is measured here."""

import collections
import dataclasses
import re
from typing import NamedTuple

from . import report
from .peers import DENSE
from .record import MODES, Case, Kernel, Record

BACKWARD = ("dq", "dk", "dv", "dk_dv", "dkv")
MET, MISSED = "met", "MISSED"
SHOWN = 40  # failures, at most
DIMS = (64, 128, 256)  # what kernels pad head dims to
MAP = "64x128"  # of 8,192 tokens: on its label map implementations are compared with each other


class Goal(NamedTuple):
    """At least ``bound``: how many times faster than the fastest of ``peers``, or the TFLOP/s of ``kernels``."""

    text: str
    bound: float
    inputs: str
    tokens: int
    mode: str
    peers: tuple[str, ...] = ()
    kernels: tuple[str, ...] = ()
    batch: int = 1


class Verdict(NamedTuple):
    goal: str
    bound: str
    measured: str
    verdict: str  # MET, MISSED, or why there is none


_OVER_DENSE = "over the best dense attention"
_OVER_EAGER = "over the published formula in eager PyTorch"
_OVER_FLEX = "over FlexAttention, its mask built in the call"
_DENSE = [  # (inputs, tokens, images, mode, bound): of one head in bfloat16 with D = 256
    ("labels", 8192, 1, "fwd", 1.5),
    ("labels", 16384, 1, "fwd", 1.0),
    ("labels", 8192, 1, "fwd+bwd", 2.3),
    ("labels", 8192, 4, "fwd", 1.0),
    ("labels", 8192, 4, "fwd+bwd", 1.7),
    ("dense", 8192, 1, "fwd", 0.7),
    ("dense", 8192, 1, "fwd+bwd", 0.75),
]
_RATES = [("aggregate", 400, "fwd", ("aggregate",)), ("backward", 350, "fwd+bwd", BACKWARD)]
GOALS = [
    *(Goal(_OVER_DENSE, bound, inputs, n, mode, peers=DENSE, batch=batch) for inputs, n, batch, mode, bound in _DENSE),
    *(Goal(_OVER_EAGER, 20.0, "labels", 9409, mode, peers=("eager",)) for mode in MODES[:2]),
    *(Goal(_OVER_EAGER, 7.0, "dense", 9409, mode, peers=("eager",)) for mode in MODES[:2]),
    *(Goal(_OVER_FLEX, 5.0, "labels", 8192, mode, peers=("flex + mask",)) for mode in MODES[:2]),
    *(Goal("Triton, pass 1, TFLOP/s", 600, "labels", n, "fwd", kernels=("statistics",)) for n in (8192, 16384)),
    *(
        Goal(f"Triton, {text}, TFLOP/s", bound, inputs, n, mode, kernels=kernels)
        for text, bound, mode, kernels in _RATES
        for inputs, n in (("labels", 8192), ("dense", 8192), ("dense", 16384))
    ),
]


def rate(case: Case, kernels: tuple[str, ...]) -> float | None:
    """Return the TFLOP/s of the named kernels together, None if none ran."""
    ran = [kernel for name in kernels if (kernel := case.kernels.get(name)) and kernel.flops]
    return sum(x.flops for x in ran) / sum(x.seconds for x in ran) / 1e12 if ran else None


def judge(goal: Goal, cases: list[Case]) -> Verdict:
    """Judge the fastest of ours: in CUDA graphs, as called where the peers have none."""
    images = f", {goal.batch} images" if goal.batch > 1 else ""
    name = f"{goal.text}: {goal.inputs}, N = {goal.tokens}{images}, {goal.mode}"
    bound = f">= {goal.bound:g}" + ("" if goal.kernels else " x")
    wanted = goal.inputs, goal.tokens, goal.mode, goal.batch, 256, 1, "bfloat16"
    found = [c for c in cases if (c.inputs, c.tokens, c.mode, c.batch, c.dim, c.heads, c.dtype) == wanted]
    ran = (c for c in found if rate(c, goal.kernels) or any(peer in c.methods for peer in goal.peers))
    if not (case := next(ran, None)):
        return Verdict(name, bound, "-", "not measured")
    if goal.kernels:
        reached = rate(case, goal.kernels)
        return Verdict(name, bound, f"{reached:.0f}", MET if reached >= goal.bound else MISSED)
    fastest = {how: case.fastest(case.ours, how) for how in ("graph", "seconds")}
    ratios = {how: case.ratio(case.fastest(goal.peers, how), ours, how) for how, ours in fastest.items()}
    if not (decisive := ratios["graph"] or ratios["seconds"]):
        methods = {x: case.methods[x] for x in (*case.ours, *goal.peers) if x in case.methods and not case.times(x)}
        why = "; ".join(dict.fromkeys(f"{x}: {m.error or m.skipped or 'not run'}" for x, m in methods.items()))
        return Verdict(name, bound, "-", f"not measured ({why})")
    said = {"graph": "in CUDA graphs", "seconds": "as called"}
    measured = ", ".join(
        f"{ratio[1]:.2f} x {said[how]} ({fastest[how].removeprefix('asa ')})" for how, ratio in ratios.items() if ratio
    )
    return Verdict(name, bound, measured, MET if decisive[1] >= goal.bound else MISSED)


def headline(results: Record, judged: list[Verdict]) -> str:
    parts = [f"{x.step} {x.status}" + (f" ({x.note})" if x.note else "") for x in results.steps if x.status != "passed"]
    if results.steps and not parts:
        parts.append("every step passed" if not results.left else "every step that ran passed")
    if results.left:
        parts.append(f"left to another call: {', '.join(results.left)}")
    counts = collections.Counter(re.split(r" \(|:", x.verdict)[0] for x in judged)  # without its details
    verdicts = ", ".join(f"{counts[kind]} {kind}" for kind in (MET, MISSED, "not measured") if counts[kind])
    return "; ".join([*parts, f"goals: {verdicts}" if judged else "no goal was measured"])


def tests(results: Record) -> str:
    """Say how the tests went: counts, and a line for each that failed, never ended or was skipped for a reason."""
    blocks = []
    for step, x in results.tests.items():
        counts = f"{x.passed} passed, {x.failed} failed, {x.error} error, {x.skipped} skipped"
        wrong = [f"- `{each['test']}`: {each['message']}" for each in x.failures]
        wrong += [f"- `{test}`: not finished" for test in x.unfinished]
        if len(wrong) > SHOWN:
            wrong = [*wrong[:SHOWN], f"- and {len(wrong) - SHOWN} more, in results.json"]
        lines = "\n".join([*wrong, *(f"- skipped: {reason}" for reason in x.skips)])
        summary = f"{step}: {x.selected} selected, {counts}, {len(x.unfinished)} not finished."
        blocks.append(report.joined(summary, lines))
    return report.joined(*blocks)


def all_passed(counts: dict[str, int]) -> bool:
    return 0 < counts["passed"] == counts["cases"] - counts["skipped"]


def choices(results: Record) -> str:
    """Return what ``impl="auto"`` may be based on: for every dtype and head dim what is right, and what is fastest."""
    found: dict[tuple[str, str], dict[str, dict[str, int]]] = collections.defaultdict(dict)
    for name, counts in results.correct.items():
        kernels, dtype, dim = name.split()
        found[dtype, dim][kernels] = counts
    rows = []
    for (dtype, dim), by_kernels in sorted(found.items(), key=lambda x: (x[0][0], int(x[0][1]))):
        right = ", ".join(
            f"{name}: {'all' if all_passed(x) else 'NOT ALL'} ({x['passed']} of {x['cases']}"
            + (f", {x['skipped']} skipped)" if x["skipped"] else ")")
            for name, x in by_kernels.items()
        )
        fastest = {mode: fastest_of(results.cases, dtype, int(dim), mode) for mode in MODES[:2]}
        names = {name for name, _ in fastest.values()}
        (name,) = names if len(names) == 1 else (None,)
        may = name if name and name in by_kernels and all_passed(by_kernels[name]) else "no change"
        times = (f"{name}, {1e3 * seconds:.3f} ms" if name else "not measured" for name, seconds in fastest.values())
        rows.append([dtype, dim, right, *times, may])
    return report.table(["dtype", "D", "right", *(f"fastest, {x}" for x in MODES[:2]), "auto may take"], rows)


def fastest_of(cases: list[Case], dtype: str, dim: int, mode: str) -> tuple[str | None, float]:
    """Return which of ours is the fastest in CUDA graphs on the label map, and its seconds."""
    wanted = "labels", MAP, 1, dtype, dim, mode
    for c in cases:
        if (c.inputs, c.size, c.batch, c.dtype, c.dim, c.mode) == wanted and (name := c.fastest(c.ours, "graph")):
            return name.removeprefix("asa "), c.median(name, "graph")
    return None, 0.0


def profiles(results: Record) -> str:
    """Return the table of every kernel of the profiled calls."""
    rows = []
    for x in results.profiles:
        total = Kernel(sum(k.seconds for k in x.kernels.values()), sum(k.launches for k in x.kernels.values()))
        for name, kernel in [*sorted(x.kernels.items(), key=lambda item: -item[1].seconds), ("all", total)]:
            rate = kernel.flops and kernel.seconds and kernel.flops / kernel.seconds
            numbers = report.number(kernel.seconds, 1e6), report.percent(kernel.seconds / total.seconds, 0)
            rows.append([x.label, x.method, name, kernel.launches, *numbers, report.number(rate or None, 1e-12, 0)])
    return report.table(["forward and backward", "method", "kernel", "launches", "us", "share", "TFLOP/s"], rows)


def render(results: Record) -> str:
    judged = [judge(goal, results.cases) for goal in GOALS] if results.cases else []
    missed = "\n".join(f"- {x.goal}: {x.measured}, wanted {x.bound}" for x in judged if x.verdict == MISSED)
    facts = results.environment | {name: f"{value:.0f}" for name, value in results.ceilings.items()}
    first = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in results.first_call.items())
    first = first and f"First calls in a fresh process without a compiler cache, D = 256: {first}."
    steps = [(x.step, x.status, f"{x.seconds:.0f}", x.note) for x in results.steps]
    left = "\n".join(f"- {step}: {what}" for step, what in results.left.items())
    parts = {
        "Steps": report.table(["step", "status", "seconds", "note"], steps),
        "What is left to another call": left,
        "What is right, what is fastest": choices(results),
        "Tests": tests(results),
        "Goals missed": missed or ("None of those measured." if judged else ""),
        "Goals": report.table(["goal", "wanted", "measured", "verdict"], judged),
        "Profiles": profiles(results),
        "First call, how it was measured": report.joined(first, *results.notes),
    }
    sections = [f"## {name}\n\n{text}" for name, text in parts.items() if text]
    # Its tables name no dtype.
    tables = report.sections(dataclasses.replace(results, cases=[c for c in results.cases if c.dtype == "bfloat16"]))
    return report.page(f"{headline(results, judged)}.", facts, *sections, tables)
